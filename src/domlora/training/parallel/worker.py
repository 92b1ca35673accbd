"""One process that adapts domain after domain: the base is read once, each result is a folder that is there or not."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from os import getpid
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from domlora.adapters.attach import attach_
from domlora.adapters.bank import load_rows_, rows_of
from domlora.adapters.file import base_fingerprint, write_adapter
from domlora.errors import BundleError, DataError, DomloraError
from domlora.evaluation.evaluate import Predictions
from domlora.evaluation.metrics import log_loss, wauc
from domlora.features.schema import Schema
from domlora.files import new_folder
from domlora.layers.rows import empty_tables
from domlora.models.build import build_model
from domlora.training.onboard import fit_options, is_better
from domlora.training.one_row import Adapters, OneRow, alone
from domlora.training.parallel.cut import CutDomain, CutRows
from domlora.training.parallel.work import BASE, FACTS, ROWS, Job, places_of
from domlora.training.starts import Row

__all__ = ["Outcome", "Worker", "adapt_one"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker tells of a domain.

    Args:
        seconds, cpu_seconds: that it took, of the clock and of the process.
        process, process_seconds: which process, and its CPU time since it began.
        error: why there is no adapter; "" if there is one.
    """

    seconds: float
    cpu_seconds: float
    process: int
    process_seconds: float
    error: str = ""


def adapt_one(job: Job, number: int) -> Outcome:
    """Adapt one domain in this process, with one thread; the base is read with the first one.

    Raises:
        DomloraError: the run's folder cannot be used. What is wrong with one domain alone is told in the outcome.
    """
    worker, error = _worker(job), ""
    began, cpu = time.perf_counter(), time.process_time()
    try:
        worker.adapt(number)
    except DomloraError as refused:
        error = str(refused)
    now = time.process_time()
    return Outcome(time.perf_counter() - began, now - cpu, getpid(), now, error)


@lru_cache(maxsize=1)
def _worker(job: Job) -> Worker:
    torch.set_num_threads(1)
    return Worker(job)


class Worker:
    """The frozen base with a bank of one row, which is every domain's in turn.

    The weights are mapped into memory: workers of one machine share them.

    Args:
        job: as :func:`~domlora.training.parallel.work.prepare` gave it.
    """

    def __init__(self, job: Job) -> None:
        self.job, base = job, job.folder / BASE
        schema = Schema.from_json((base / "schema.json").read_text(encoding="utf-8"))
        self.places = places_of(job.folder, schema.domains)
        self.rows = CutRows(job.folder / ROWS, schema)
        options = json.loads((base / "model.json").read_text(encoding="utf-8"))
        with empty_tables():  # they come with the weights
            model = build_model(schema=schema, **options)
        model.load_state_dict(load_file(base / "model.safetensors"), assign=True)
        if base_fingerprint(model) != job.base:
            raise BundleError("the base of a parallel run must be the one it began with", received=str(base))
        torch.manual_seed(job.options.fit.seed)
        self.model = alone(attach_(model, 1, **asdict(job.adapter)))
        self.fresh = rows_of(self.model, 0)
        own = base / "adapters.safetensors"
        self.own: Any = safe_open(own, "pt") if own.exists() else None

    def adapt(self, number: int) -> None:
        """Train the row of a domain, and write it where it is better than its start by more than chance."""
        rows, start = CutDomain(self.rows, number), self.start(number)
        load_rows_(self.model, 0, start)
        facts: dict[str, Any] = {"num_rows": {split: rows.num_rows(split) for split in ("train", "valid")}}
        if rows.can_be_trained:
            facts |= _judged(self.trained(rows), self.job.options.min_gain)
            if facts["chosen"] == "start":
                load_rows_(self.model, 0, start)
        else:
            facts |= {"chosen": "start", "why": "needs training rows, and validation rows of both classes"}
        self.write(number, facts)

    def start(self, number: int) -> Row:
        """The domain's own row if the bundle has one, else a fresh one, the same for all."""
        if self.own is None:
            return self.fresh
        return {name: self.own.get_slice(name)[number] for name in self.fresh}

    def trained(self, rows: CutDomain) -> _Heard:
        """A run that has ended, from what the row holds."""
        options, num_rows = self.job.options, rows.num_rows("train")
        fit, pull = fit_options(options, num_rows), options.prior_rows / num_rows
        run = _Heard(Adapters(self.model), rows, fit, options.optimizer, pull)
        run.go(start_is_candidate=True)
        return run

    def write(self, number: int, facts: Mapping[str, Any]) -> None:
        """Put the row in its place, complete and on disk; a second worker that was at it has written the same bytes."""
        place = self.places[number]
        try:
            with new_folder(place) as fresh:
                write_adapter(self.model, 0, fresh, base=self.job.base)
                (fresh / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        except DataError:
            if not place.exists():
                raise


class _Heard(OneRow):
    """Keeps what was said by the start, and by the best so far."""

    start: Predictions | None = None
    best_said: Predictions
    last: Predictions

    def say(self, model: nn.Module) -> Predictions:
        self.last = super().say(model)
        return self.last

    def remember(self, model: nn.Module) -> None:
        super().remember(model)
        self.start, self.best_said = self.last if self.start is None else self.start, self.last


def _judged(run: _Heard, min_gain: float) -> dict[str, Any]:
    """What became of a domain that was trained."""
    assert run.start is not None  # it is a candidate
    chosen = "trained" if is_better(run.best_said, run.start, min_gain) else "start"
    said = {"start": run.start, "trained": run.best_said}
    figures = {
        name: {"auc": _auc(each), "log_loss": log_loss(each.label, each.probability, each.weight)}
        for name, each in said.items()
    }
    epochs = {"best_epoch": run.result.best_epoch, "epochs": run.result.history[-1]["epoch"]}
    return {"chosen": chosen, "candidates": figures, **epochs}


def _auc(said: Predictions) -> float:
    return wauc(said.label, said.probability, said.domain, said.weight)
