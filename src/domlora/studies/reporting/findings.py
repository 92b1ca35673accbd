"""What a dataset's runs come to, in sentences: each method against the base, and how many models it holds for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from domlora.studies.reporting.cells import Cell
from domlora.studies.reporting.standings import Standing
from domlora.studies.reporting.statistics import DASH, MINUS, Interval, Verdict, interval_text, verdict
from domlora.studies.reporting.tables import DatasetTable, DomainRow

__all__ = ["Family", "Finding", "domain_counts", "families", "findings", "percent", "share_text", "word"]

_SPOKEN = {
    "joint": "adapters trained with the base (joint)",
    "two_stage": "adapters (two_stage)",
    "bias_only": "biases alone (bias_only)",
}
_HEADLINES = ("two_stage", "joint", "bias_only")
_WORDS = ("gain", "loss", "no difference", "one run", "one class", "no rows")


class Finding(NamedTuple):
    """What one method does on one dataset: in a sentence, as numbers, in a word."""

    method: str
    sentence: str
    difference: Interval
    verdict: Verdict


class Family(NamedTuple):
    """One method over the models of a dataset: which gain, which lose, and which stay after Holm's correction."""

    method: str
    num_models: int
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    stays: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """``two_stage: gain in 2 of 10 models, loss in 0; after Holm's correction 1 stays: nfm.``"""
        num = len(self.stays)
        after = "none stays" if not num else f"{num} stay{'s' * (num == 1)}: {', '.join(self.stays)}"
        counts = f"gain in {len(self.gains)} of {self.num_models} models, loss in {len(self.losses)}"
        return f"{self.method}: {counts}; after Holm's correction {after}."


def findings(dataset: DatasetTable) -> tuple[Finding, ...]:
    """What every method that has pairs with the base does to WAUC; the one to lead with first."""
    cells = [cell for cell in dataset.overall.cells if cell.difference.num_pairs]
    cells.sort(key=lambda cell: _HEADLINES.index(cell.method) if cell.method in _HEADLINES else len(_HEADLINES))
    return tuple(
        Finding(cell.method, _sentence(cell, _only_model(dataset, cell)), cell.difference, verdict(cell.difference))
        for cell in cells
    )


def _only_model(dataset: DatasetTable, cell: Cell) -> str:
    """The one of several models that has a method, if it is one."""
    found = [
        row.model for row in dataset.models for each in row.cells if each.method == cell.method and each.num_models
    ]
    return found[0] if len(found) == 1 < len(dataset.models) else ""


def families(dataset: DatasetTable) -> tuple[Family, ...]:
    """The tests that Holm's correction takes together: of each method that is tested on two models or more."""
    found = []
    for place, method in enumerate(dataset.methods):
        cells = {row.model: row.cells[place] for row in dataset.models}
        tested = {model: cell for model, cell in cells.items() if not math.isnan(cell.p_holm)}
        if len(tested) > 1:
            words = {model: verdict(cell.difference) for model, cell in tested.items()}
            gains = tuple(model for model in tested if words[model] == "gain")
            losses = tuple(model for model in tested if words[model] == "loss")
            stays = tuple(model for model, cell in tested.items() if cell.stays)
            found.append(Family(method, len(tested), gains, losses, stays))
    return tuple(found)


def word(cell: Cell | Standing, *, corrected: bool) -> str:
    """The verdict on a difference, with a dagger where it stays after Holm's correction, if something was corrected."""
    return verdict(cell.difference) + ("\u2020" if corrected and cell.stays else "")


def domain_counts(rows: Iterable[DomainRow], method: str) -> str:
    """How many domains gain, lose, or tell nothing: ``gain in 3, no difference in 18``."""
    words = [
        row.status if row.status != "scored" else verdict(cell.difference)
        for row in rows
        for cell in row.cells
        if cell.method == method
    ]
    counts = Counter(words)
    return ", ".join(f"{each} in {counts[each]}" for each in _WORDS if counts[each])


def share_text(share: Interval) -> str:
    """A share of the gap to the truth with its interval, in percent; nothing where it is not known."""
    if math.isnan(share.mean):
        return ""
    ends = "" if math.isnan(share.low) else f" [{percent(share.low)}, {percent(share.high)}]"
    return f"{percent(share.mean)}{ends}"


def percent(share: float, digits: int = 0) -> str:
    """A share in percent.

    >>> percent(0.753), percent(-0.1, 1), percent(math.nan)
    ('75 %', '\u221210.0 %', '–')
    """
    return DASH if math.isnan(share) else f"{100 * share:.{digits}f} %".replace("-", MINUS)


def _sentence(cell: Cell, model: str = "") -> str:
    """``Adapters (two_stage) change WAUC by +0.12 points [-0.05, +0.29] over 5 seeds: no difference.``"""
    subject = _SPOKEN.get(cell.method, f"runs of {cell.method}")
    if model:
        subject += f" with {model}"
    if cell.num_models > 1:
        subject = f"averaged over {cell.num_models} models, {subject}"
    mean, _, interval = interval_text(cell.difference).partition(" ")
    start = f"{subject[0].upper()}{subject[1:]} change WAUC by {mean} points"
    if cell.difference.num_pairs == 1:
        return f"{start} with one seed: no interval, so nothing is proven."
    found = verdict(cell.difference)
    said = found if found == "no difference" else f"a {found}"
    share = share_text(cell.gap_closed)
    tail = f" Share of the gap to the truth closed: {share}." if share else ""
    return f"{start} {interval} over {cell.difference.num_pairs} seeds: {said}.{tail}"
