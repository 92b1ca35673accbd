"""A new domain for a trained model: one row more in every bank, rows of tables for its new words, and nothing else moves.

The row is found on a frozen base, in a bank of its own: in a shared one, momentum and decay of weights would move the
neighbours. Simple answers come first, and a less simple one must be better on the validation rows by more than chance:

=============== ==================================================================================================
own             the adapter that the domain has already, if it was trained before
base            no adapter
calibrated      the base and one number, for the click rate
nearest         the adapter of the domain that says most about the new rows, and one number
mix             the best convex mix of all domains' corrections, and one number
mean            the mean of all domains' corrections, and one number; only as a start that was asked for
trained_START   trained from there, and drawn back to it the more the fewer the rows
=============== ==================================================================================================

Words that the model does not know, such as users who came with the domain, get rows in the embedding tables, behind all
others (``new_words``). They start as the out-of-vocabulary row and learn with a trained adapter; where that is not chosen
the tables stay as they are.

*Better* is a higher AUC, or an AUC that is not lower and a smaller log loss, each by ``min_gain`` standard errors. Where
validation rows are of one class, log loss decides alone; without any, nothing is trained and the first answer stands.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from domlora.adapters.bank import load_rows_, rows_of
from domlora.adapters.file import base_fingerprint
from domlora.bundle import Bundle
from domlora.errors import DataError
from domlora.evaluation.evaluate import Predictions
from domlora.evaluation.metrics import log_loss, wauc
from domlora.evaluation.paired import auc_differences
from domlora.features.encode import Encoder
from domlora.features.growth import check_grown
from domlora.models.growth import pieces_of
from domlora.training.fit import Fit, FitOptions, OnProgress
from domlora.training.new_rows import EncodedRows, NewRows
from domlora.training.new_words import NewWords
from domlora.training.one_more import check_base, same_base, with_domain, with_row, with_words
from domlora.training.one_row import Adapters, OneRow, alone
from domlora.training.optimizers import LAZY_RULES, OptimizerOptions
from domlora.training.stages import Onboarding, Recipe
from domlora.training.starts import Row, averaged, calibrated, mixing_weights, say_all, shifts_of, sum_loss
from domlora.training.update import moved
from domlora.training.validation import say

__all__ = ["Onboarded", "fit_options", "is_better", "onboard"]

_LEAST_BATCH, _MOST_SCORED = 32, 1 << 20


@dataclass(frozen=True, slots=True)
class Onboarded:
    """What was found.

    Args:
        domain: its name.
        chosen: the candidate that the domain got.
        candidates: by name, the simple ones first: ``auc`` and ``log_loss`` on the validation rows.
        num_rows: training and validation rows of the domain.
        unknown: by feature, how many ids of the training rows the bundle did not know.
        nearest: the domain whose adapter says most about the rows, or "" if no other has one.
        weights: what each domain has in ``mix``, the largest first; what is missing to 1 is the base's.
        fits: by candidate, for the trained ones.
        seconds: all of it took.
    """

    domain: str
    chosen: str
    candidates: Mapping[str, Mapping[str, float]]
    num_rows: Mapping[str, int]
    unknown: Mapping[str, int]
    nearest: str
    weights: Mapping[str, float]
    fits: Mapping[str, Fit] = field(repr=False)
    seconds: float

    @property
    def fit(self) -> Fit | None:
        """Of what was chosen; None if that was not trained."""
        return self.fits.get(self.chosen)

    def facts(self) -> dict[str, Any]:
        """What a bundle remembers, as JSON."""
        figures = {name: {key: _plain(value) for key, value in of.items()} for name, of in self.candidates.items()}
        told = {"chosen": self.chosen, "nearest": self.nearest, "candidates": figures, "seconds": self.seconds}
        return {**told, "num_rows": dict(self.num_rows), "unknown": dict(self.unknown)}

    def __str__(self) -> str:
        rows = " and ".join(f"{count:,} {split}" for split, count in self.num_rows.items())
        lines = [f"{self.domain}: {self.chosen}, from {rows} rows in {self.seconds:.1f} s"]
        for name, figures in self.candidates.items():
            lines.append(f"  {name:<16} AUC {figures['auc']:.4f}  log loss {figures['log_loss']:.4f}")
        if self.nearest:
            lines.append(f"  nearest domain: {self.nearest}")
        if unknown := ", ".join(f"{name} {count:,}" for name, count in self.unknown.items() if count):
            lines.append(f"  ids of training rows that the bundle did not know: {unknown}")
        return "\n".join(lines)


def onboard(
    bundle: Bundle,
    data: EncodedRows,
    domain: str,
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Bundle, Onboarded]:
    """Give a trained model one domain more.

    A domain that the bundle knows already gets its row anew, and keeps the old one where nothing is better. Adapters have
    the bundle's own options; a bundle without any gets them by ``recipe.adapter``, untrained for the domains it has.

    Args:
        bundle: is not changed. The base of the returned one is not a copy, both hold the same memory, unless it grew.
        data: rows that were prepared with ``--grow BUNDLE``, or with the bundle's own encoder. Only those of ``domain`` are
            read.
        domain: its name in the data.
        recipe: its ``onboard`` and ``adapter``.
        checkpoint, on_progress: as in :func:`domlora.training.fit.fit`.

    Returns:
        The bundle with one domain more at the end, and what was found. All other domains keep every bit of their logits, for
        all words that the bundle knew; a word that it did not know is scored by its new row there too, if it got one.

    Raises:
        SchemaError: the data's encoder did not grow out of the bundle's, or the base has weights of each domain.
        UnknownDomainError: the data have no such domain.
        DataError: no training row of the domain.

    Example:
        >>> from domlora.data.synthetic import World
        >>> from domlora.training.fit import FitOptions
        >>> from domlora.training.stages import Stage, pretrain
        >>> data = World(num_domains=3, num_dense=4).dataset(3000, seed=1)[0]
        >>> options, short = {"name": "mlp", "hidden_units": [8]}, FitOptions(max_epochs=1)
        >>> recipe = Recipe(joint=Stage(short), onboard=Onboarding(short))
        >>> model, _ = pretrain(data, options, recipe, method="joint")
        >>> bundle, found = onboard(Bundle(model, options, data.encoder), data, "d2", recipe)
        >>> list(found.candidates)
        ['own', 'base', 'calibrated', 'nearest', 'mix', 'trained_mix']
    """
    began = time.perf_counter()
    check_grown(bundle.encoder, data.encoder)
    encoder, number = with_domain(bundle.encoder, data.encoder, domain)
    if number == bundle.encoder.schema.num_domains:
        check_base(bundle, encoder.schema)
    rows = NewRows(data, domain, encoder.schema, number, most_valid=recipe.onboard.max_valid_rows)
    if not rows.num_rows("train"):
        raise DataError("a new domain needs training rows", received=domain)
    unknown, seen, larger = rows.unknown(), rows, bundle
    if recipe.onboard.new_words and any(unknown.values()):
        larger = with_words(bundle, data)
        seen = rows.seen_by(replace(larger.encoder.schema, domains=encoder.schema.domains))
    torch.manual_seed(recipe.onboard.fit.seed)
    model, optimizer = with_row(larger, number, recipe), bundle.optimizer
    words = None if larger is bundle else NewWords(bundle.model, model)
    search = _Search(model, number, bundle.adapter is not None, seen, recipe.onboard, words)
    chosen = search.go(checkpoint, on_progress)
    if chosen in search.words_of:
        encoder = Encoder(seen.schema, larger.encoder.vocabularies)
        optimizer = moved(optimizer, pieces_of(bundle.model, model), model)
    elif words is not None:  # none of them has learned anything, so that the base stays as it was
        larger, model = bundle, with_row(bundle, number, recipe)
    search.load(model, number, chosen)
    found = Onboarded(
        domain,
        chosen,
        {name: _figures(said) for name, said in search.said.items()},
        {split: rows.num_rows(split) for split in ("train", "valid")},
        unknown,
        search.nearest,
        search.weights,
        search.fits,
        time.perf_counter() - began,
    )
    facts = {**bundle.facts, "onboarded": {**bundle.facts.get("onboarded", {}), domain: found.facts()}}
    larger = replace(larger, model=model, encoder=encoder, facts=facts, optimizer=optimizer)
    return larger, found


class _Search:
    """All candidates for one row; ``alone`` is the model with a bank of that row and no other.

    Args:
        model: with a row for the domain.
        number: of the domain.
        adapted: whether the rows of other domains have been trained.
        words: of the tables, rows that learn with the adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        number: int,
        adapted: bool,
        rows: NewRows,
        options: Onboarding,
        words: NewWords | None = None,
    ) -> None:
        self.words, self.words_of = words, dict[str, dict[str, Tensor]]()
        self.model, self.number, self.adapted, self.rows, self.options = model, number, adapted, rows, options
        self.alone = alone(same_base(model))
        self.adapters = Adapters(self.alone, words)
        num_domains = rows.schema.num_domains
        self.others = [domain for domain in range(num_domains) if domain != number and adapted]
        most = min(options.max_scored_rows, max(_MOST_SCORED // num_domains, 1))
        self.sample = next(rows.batches("train", most, seed=options.fit.seed))
        self.nearest, self.weights = "", dict[str, float]()
        self.candidates: dict[str, Row] = {}
        self.fits: dict[str, Fit] = {}

    def go(self, checkpoint: Path | None, on_progress: OnProgress | None) -> str:
        """Find all candidates; the name of the one that is chosen."""
        self.find_simple()
        self.said = {name: self.say(name) for name in self.candidates}
        if self.rows.num_rows("valid"):
            base = "" if checkpoint is None else base_fingerprint(self.model)
            for start, name in self.starts().items():
                place = None if checkpoint is None else checkpoint / start
                self.train(f"trained_{start}", name, base=base, checkpoint=place, on_progress=on_progress)
        return self.choose()

    def find_simple(self) -> None:
        """Those that are not trained, one by one."""
        own, fresh = rows_of(self.model, self.number), rows_of(self.alone, 0)
        if self.adapted and any(value.any() for name, value in own.items() if not name.endswith("lora_A")):
            self.candidates["own"] = own
        self.candidates["base"] = fresh
        if self.options.calibrate and (row := calibrated(self.alone, fresh, self.sample)) is not None:
            self.candidates["calibrated"] = row
        if self.others:
            self.ask_others()

    def ask_others(self) -> None:
        """The nearest domain, the mix of all, and their mean if it is asked for."""
        said = say_all(self.model, self.sample)
        base, others = said.base, said.others[:, self.others]
        if self.options.calibrate:
            both = np.column_stack([base, others])
            base, others = np.split(both + shifts_of(both, said.label, said.weight), [1], axis=1)
            base = base[:, 0]
        names = self.rows.schema.domains
        nearest = self.others[int(sum_loss(others, said.label, said.weight).argmin())]
        self.nearest = names[nearest]
        self.add("nearest", rows_of(self.model, nearest))
        weights = np.zeros(len(names))
        weights[self.others] = mixing_weights(base, others, said.label, said.weight)
        self.weights = {names[place]: float(weights[place]) for place in np.argsort(-weights) if weights[place] > 0}
        self.add("mix", averaged(self.model, weights))
        if "mean" in self.options.starts:
            weights[self.others] = 1.0 / len(self.others)
            self.add("mean", averaged(self.model, weights))

    def add(self, name: str, row: Row) -> None:
        """A candidate, calibrated if that is wanted and possible."""
        changed = calibrated(self.alone, row, self.sample) if self.options.calibrate else None
        self.candidates[name] = row if changed is None else changed

    def starts(self) -> dict[str, str]:
        """Start to candidate: from zero where there are no other domains to start from."""
        zero = "calibrated" if "calibrated" in self.candidates else "base"
        names = self.options.starts if self.others else self.options.starts and ("zero",)
        return {name: zero if name == "zero" else name for name in names}

    def train(
        self, name: str, start: str, *, base: str, checkpoint: Path | None, on_progress: OnProgress | None
    ) -> None:
        self.load(self.alone, 0, start)
        run = OneRow(
            self.adapters,
            self.rows,
            fit_options(self.options, self.rows.num_rows("train")),
            _rules(self.options),
            self.options.prior_rows / self.rows.num_rows("train"),
            base=base,
            by_loss=not self.rows.has_both_classes,
            start=self.said[start],
            checkpoint=checkpoint,
            on_progress=on_progress,
        )
        self.fits[name] = run.go(start_is_candidate=True)
        self.candidates[name] = rows_of(self.alone, 0)
        if self.words is not None and self.fits[name].best_epoch:
            self.words_of[name] = self.words.of(self.alone)
        self.said[name] = run.said or self.say(name)

    def load(self, model: nn.Module, number: int, name: str) -> None:
        """Write a candidate into a model, and the rows of its words."""
        load_rows_(model, number, self.candidates[name])
        if self.words is not None and (model is self.alone or name in self.words_of):
            self.words.load_(model, self.words_of.get(name, self.words.start))

    def say(self, name: str) -> Predictions | None:
        """What a candidate says about the validation rows, if there are any."""
        self.load(self.alone, 0, name)
        return say(self.alone, self.rows) if self.rows.num_rows("valid") else None

    def choose(self) -> str:
        """The simplest candidate that no less simple one is better than."""
        chosen, *others = self.said
        for name in others:
            one, two = self.said[name], self.said[chosen]
            if one is not None and two is not None and is_better(one, two, self.options.min_gain):
                chosen = name
        return chosen


def fit_options(options: Onboarding, num_rows: int) -> FitOptions:
    """Smaller batches where rows are few, and no more validations than steps."""
    fit = options.fit
    batch_size = min(fit.batch_size, max(num_rows // options.min_steps, _LEAST_BATCH))
    steps = math.ceil(num_rows / batch_size)
    return replace(fit, batch_size=batch_size, evaluations_per_epoch=min(fit.evaluations_per_epoch, steps))


def _rules(options: Onboarding) -> OptimizerOptions:
    """Rows of tables that no new word reads must stand still, so their rule is a lazy one."""
    tables = options.optimizer.tables
    lazy = tables if tables.name in LAZY_RULES else replace(tables, name="lazy_adam")
    return replace(options.optimizer, tables=lazy)


def is_better(one: Predictions, two: Predictions, min_gain: float) -> bool:
    """Whether the first has a higher AUC, or a smaller log loss and no lower AUC, by more than chance."""
    gains = auc_differences(one.label, one.probability, two.probability, np.zeros(len(one.label), dtype=np.int64), 1)
    gain, chance = float(gains.value[0]), min_gain * float(gains.standard_error[0]) if min_gain else 0.0
    if gain > chance:
        return True
    if gain < -chance:
        return False
    saved = _losses(two) - _losses(one)  # AUC says nothing: one class, or no difference
    weight = np.ones(len(saved)) if one.weight is None else one.weight / one.weight.mean()
    error = float((weight * saved).std(ddof=1) / math.sqrt(len(saved))) if len(saved) > 1 else math.inf
    return float((weight * saved).mean()) > min_gain * error


def _losses(said: Predictions) -> NDArray[np.float64]:
    """Binary cross entropy of each row."""
    right = np.where(said.label > 0.5, said.probability, 1.0 - said.probability)
    found: NDArray[np.float64] = -np.log(np.clip(right, 1e-15, None))
    return found


def _figures(said: Predictions | None) -> dict[str, float]:
    if said is None:
        return {"auc": math.nan, "log_loss": math.nan}
    label, probability, domain, weight, _ = said
    return {"auc": wauc(label, probability, domain, weight), "log_loss": log_loss(label, probability, weight)}


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
