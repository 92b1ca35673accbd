"""Adapting many domains at once: each by itself on one worker, as files that a killed run does not lose.

On a frozen base what one domain learns changes no other domain's logit, so nothing is lost by training each alone, and a
thousand domains are a thousand small tasks that share nothing but files. What a task writes depends on the base, the
domain's rows and the recipe, not on how many workers there are, on their order or on what runs them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from domlora.adapters.attach import attach_
from domlora.adapters.file import load_adapter_
from domlora.bundle import Bundle
from domlora.errors import EngineError, UnknownDomainError, nearest
from domlora.evaluation.gate import remember
from domlora.files import only_one
from domlora.training.new_rows import EncodedRows
from domlora.training.parallel.cut import CutRows
from domlora.training.parallel.work import ROWS, Job, facts_at, places_of, prepare
from domlora.training.parallel.worker import Outcome, adapt_one
from domlora.training.stages import Recipe
from domlora.training.validation import figures_of, say

__all__ = ["Apart", "Engine", "adapt_apart"]

Engine = Callable[[Callable[[int], Outcome], Sequence[int]], Iterator[tuple[int, Outcome | None]]]
"""Runs a function on each number, at the same time on several workers; None for one whose workers died."""


@dataclass(frozen=True, slots=True)
class Apart:
    """What became of the domains.

    Args:
        chosen: how many got what was ``trained``, and how many kept their ``start``.
        untrained: those that had too few rows to try.
        made: how many were adapted by this run; an earlier one that was killed made the others.
        valid: WAUC of the validation split with all adapters.
        seconds: of this run.
    """

    chosen: dict[str, int]
    untrained: tuple[str, ...]
    made: int
    valid: float
    seconds: float

    def __str__(self) -> str:
        told = f"{self.chosen['trained']} domains adapted, {self.chosen['start']} keep their start"
        few = f", of which {len(self.untrained)} have too few rows: {', '.join(self.untrained[:5])}"
        more = ", ..." if len(self.untrained) > 5 else ""
        return f"{told}{few + more if self.untrained else ''}; validation WAUC {self.valid:.5f}"


def adapt_apart(
    bundle: Bundle,
    data: EncodedRows,
    recipe: Recipe,
    folder: Path,
    engine: Engine,
    *,
    domains: Sequence[str] = (),
    on_outcome: Callable[[str, Outcome | None], None] | None = None,
) -> tuple[Bundle, Apart]:
    """Train the adapter of each domain alone on the frozen base, many at the same time.

    Each domain is trained as ``onboard`` trains one: from its own row if the bundle has adapters, else from zero; drawn
    back to the start; stopped early by the domain's own validation rows; kept only where it is better than the start by
    more than chance. A domain without training rows, or without validation rows of both classes, keeps its start.

    Args:
        bundle: its model gets adapters if it has none, and rows that were trained.
        data: prepared as the bundle's were.
        recipe: of its ``onboard`` the options ``fit``, ``optimizer.adapters``, ``prior_rows``, ``min_steps`` and
            ``min_gain``; its ``adapter`` where the bundle has none.
        folder: what workers read and write, see :mod:`domlora.training.parallel.work`. All machines must have it at the
            same path. A run that was killed goes on with what is there.
        engine: such as ``partial(in_workers, workers=8)`` or ``partial(on_ray, workers=64, address="auto")``.
        domains: their names; none for all. The others keep their start.
        on_outcome: told the name of each domain and what its worker said.

    Returns:
        A bundle with the adapters, and what became of the domains.

    Raises:
        UnknownDomainError: the data have no such domain.
        ConfigError: the folder is of a run with another base, recipe or data.
        EngineError: a domain could not be adapted; all others are on disk by then.
    """
    began, names = time.perf_counter(), data.schema.domains
    numbers = _numbers(domains, names)
    with only_one(folder):
        job = prepare(bundle, data, recipe, folder)
        places = places_of(folder, names)
        missing = [number for number in numbers if not places[number].exists()]
        if missing:
            _run(job, data, missing, engine, on_outcome)
        facts = {names[number]: facts_at(places[number]) for number in numbers}
        _fill(bundle, job, {number: places[number] for number in numbers})
    said = say(bundle.model, data)
    valid = figures_of(said)["wauc"]
    kept = {"method": "adapt_each", "data": job.data, "valid": valid, "auc": remember(said, names), "domains": facts}
    chosen = {name: sum(each["chosen"] == name for each in facts.values()) for name in ("trained", "start")}
    untrained = tuple(name for name, each in facts.items() if "why" in each)
    found = Apart(chosen, untrained, len(missing), valid, time.perf_counter() - began)
    return replace(bundle, facts={**kept, "base": bundle.facts}), found


def _numbers(domains: Sequence[str], names: Sequence[str]) -> list[int]:
    for domain in domains:
        if domain not in names:
            raise UnknownDomainError("the data must have the domain", received=domain, next_step=nearest(domain, names))
    wanted = set(domains or names)
    return [number for number, name in enumerate(names) if name in wanted]


def _run(
    job: Job, data: EncodedRows, missing: list[int], engine: Engine, told: Callable[[str, Outcome | None], None] | None
) -> None:
    """Adapt what is missing, domains with many rows first, so that no worker is left with a long one at the end."""
    names, sizes = data.schema.domains, CutRows(job.folder / ROWS, data.schema).num_rows
    failed: dict[str, str] = {}
    for number, outcome in engine(partial(adapt_one, job), sorted(missing, key=lambda number: -sizes[number])):
        if told is not None:
            told(names[number], outcome)
        if outcome is None:
            failed[names[number]] = "its workers died, of memory perhaps"
        elif outcome.error:
            failed[names[number]] = outcome.error
    if failed:
        raise EngineError(
            f"every domain must be adapted before they are put into one bundle, and {len(failed)} could not be",
            received=dict(list(failed.items())[:5]),
            next_step="All others are kept: run the same command again for the rest",
        )


def _fill(bundle: Bundle, job: Job, places: dict[int, Path]) -> None:
    """Attach adapters where there are none, and read all that were made."""
    if bundle.adapter is None:
        torch.manual_seed(job.options.fit.seed)
        options: dict[str, Any] = asdict(job.adapter)
        attach_(bundle.model, bundle.encoder.schema.num_domains, **options)
    for number, place in places.items():
        load_adapter_(bundle.model, number, place, base=job.base)
    bundle.model.eval()
