"""The one loop: batches, loss, step, validate, stop early, best weights.

Pretraining and adapting differ only in which parameters require a gradient and whether the starting point is a candidate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domlora.errors import ConfigError, DataError, nearest
from domlora.evaluation.evaluate import Predictions
from domlora.features.batch import Batch
from domlora.files import only_one
from domlora.training.average import Average
from domlora.training.checkpoint import check_same_run, flat, in_parts, read_checkpoint, start_digest, write_checkpoint
from domlora.training.device import brought, random_state, set_random_state
from domlora.training.engine import engine
from domlora.training.guard import Place, check_finite, explodes, lost_in
from domlora.training.optimizers import Optimizer, OptimizerOptions
from domlora.training.progress import Fit, OnProgress, Part, Progress, Watcher
from domlora.training.rows import Rows
from domlora.training.validation import figures_of, say

__all__ = ["Fit", "FitOptions", "OnProgress", "Progress", "Rows", "Run", "Watcher", "fit", "loss_of"]

Monitor = Literal["wauc", "macro_auc"]
Schedule = Literal["constant", "cosine"]

_APART_S = 1.0  # between checkpoints where validations follow faster: small domains train nearly twice as fast


@dataclass(frozen=True, slots=True)
class FitOptions:
    """How long and on what a model trains.

    Args:
        batch_size: rows a step.
        max_epochs: passes over the training split at the most.
        patience: validations without improvement after which training stops.
        evaluations_per_epoch: click models often peak within one pass; above 1 validates inside it.
        monitor: validation figure that decides: ``wauc`` (AUC of each domain weighted by its rows) or ``macro_auc`` (the
            plain mean, as in the authors' code).
        schedule: ``constant``, or ``cosine`` from the full learning rate at the start to zero at ``max_epochs``.
        average_decay: score and keep an exponential moving average of the weights with this decay a step; 0 for none.
        seed: order of the rows, dropout. Equal seeds give equal bits on one machine.
        device: where to train, such as ``cuda``; by default where the model is, and there it is again afterwards. On a GPU
            sums are made in no fixed order: equal seeds give about equal results.
    """

    batch_size: int = 4096
    max_epochs: int = 30
    patience: int = 3
    evaluations_per_epoch: int = 1
    monitor: Monitor = "wauc"
    schedule: Schedule = "constant"
    average_decay: float = 0.0
    seed: int = 1
    device: str = ""

    def __post_init__(self) -> None:
        counts = (self.batch_size, self.max_epochs, self.patience, self.evaluations_per_epoch)
        if min(counts) < 1 or not 0 <= self.average_decay < 1 or self.seed < 0:
            raise ConfigError("fit needs counts of at least 1, average_decay in [0, 1) and seed >= 0", received=self)
        for value, kind in ((self.monitor, Monitor), (self.schedule, Schedule)):
            if value not in get_args(kind):
                raise ConfigError("unknown option of fit", received=value, next_step=nearest(value, get_args(kind)))


def loss_of(logit: Tensor, batch: Batch) -> Tensor:
    """Binary cross entropy, weighted by ``batch.weight`` if there is one; a scalar."""
    return F.binary_cross_entropy_with_logits(logit, batch.label, weight=batch.weight)


def fit(
    model: nn.Module,
    data: Rows,
    options: FitOptions,
    optimizer: OptimizerOptions,
    *,
    start_is_candidate: bool = False,
    checkpoint: Path | None = None,
    checkpoint_every_s: float = 600.0,
    on_progress: OnProgress | None = None,
    kind: type[Run] | None = None,
) -> Fit:
    """Train the parameters that require a gradient.

    Afterwards the model holds the best weights on the validation split and is in evaluation mode. Sets torch's global seed.

    Args:
        model: ``model(ids, dense, domain)`` gives logits ``(B,)``.
        data: has splits ``train`` and ``valid``.
        start_is_candidate: the weights before the first step may win too, so that an adapted model is never worse on
            validation than its base.
        checkpoint: a folder that is rewritten after validations, at most once a second, at the end and, in long epochs, in
            between; if it is there already the run goes on from it and ends with the bits of an uninterrupted one.
        checkpoint_every_s: how old a checkpoint becomes at the most; 0 writes one after each step.
        on_progress: called about ten times a second; a :class:`Watcher` is told of validations too.
        kind: a :class:`Run` of another kind.

    Raises:
        ConfigError: options that do not go together, or a checkpoint of another run.
        EngineError: the loss explodes, or a weight is NaN or infinite (:mod:`domlora.training.guard`); the checkpoint is the
            one before.
        DataError: the validation split has no domain with two classes, another process runs on the checkpoint, or it cannot
            be written.
    """
    if not checkpoint_every_s >= 0:
        raise ConfigError("checkpoint_every_s must be at least 0", received=checkpoint_every_s)
    run = (Run if kind is None else kind)(model, data, options, optimizer, on_progress, checkpoint, checkpoint_every_s)
    return run.go(start_is_candidate)


class Run:
    """State of one fit; ``position`` counts validations, ``part`` is what came after the last.

    ``stepped`` is what the steps move: the model itself, unless a method says otherwise (``training/negotiation.py``).
    """

    def __init__(
        self,
        model: nn.Module,
        data: Rows,
        options: FitOptions,
        rules: OptimizerOptions,
        on_progress: OnProgress | None = None,
        checkpoint: Path | None = None,
        checkpoint_every_s: float = 600.0,
        stepped: nn.Module | None = None,
    ) -> None:
        self.model, self.stepped = model, model if stepped is None else stepped
        self.data, self.options, self.on_progress = data, options, on_progress
        self.checkpoint, self.checkpoint_every_s = checkpoint, checkpoint_every_s
        self.saved = self.shown = time.perf_counter()
        self.home, self.device = brought((self.model, self.stepped), options.device)
        self.engine = engine()
        rules = self.rules_left(rules)
        self.optimizer = Optimizer(self.stepped, rules)
        self.called = self.engine.called(self.stepped, self.optimizer.lazy)
        self.identity = {} if checkpoint is None else self.identify(rules)
        self.part = Part()
        self.average = Average(model, options.average_decay)
        self.result = Fit()
        self.best: dict[str, Tensor] = {}
        self.watcher = on_progress if isinstance(on_progress, Watcher) else None
        if self.watcher is not None:
            setattr(self, "say", partial(self.overheard, self.say))  # noqa: B010 - whatever say a kind of run has
        self.position = self.misses = self.steps = 0
        self.last_position = options.max_epochs * options.evaluations_per_epoch
        self.rows_per_epoch = data.num_rows("train")
        self.steps_per_epoch = math.ceil(self.rows_per_epoch / options.batch_size)
        if not self.steps_per_epoch:
            raise DataError("the train split needs at least one row", received=0)
        if options.evaluations_per_epoch > self.steps_per_epoch:
            raise ConfigError(
                f"evaluations_per_epoch must not exceed the steps of an epoch, {self.steps_per_epoch}",
                received=options.evaluations_per_epoch,
                next_step="Make batch_size smaller",
            )

    @staticmethod
    def building() -> AbstractContextManager[None]:
        """What a model that such a run trains from its start is built within."""
        return nullcontext()

    def rules_left(self, rules: OptimizerOptions) -> OptimizerOptions:
        """What is left to the optimizer, where a kind of run sees to some of it itself."""
        return rules

    def identify(self, rules: OptimizerOptions) -> dict[str, str]:
        """What a run must have in common with the one it goes on; reads every weight."""
        return {
            "kind": type(self).__name__,
            "options": repr(self.options),
            "optimizer": repr(rules),
            "data": self.data.fingerprint(),
            "start": start_digest(self.model),
        }

    def go(self, start_is_candidate: bool) -> Fit:
        """From the start, or from the checkpoint, to the end."""
        with nullcontext() if self.checkpoint is None or self.engine.rank else only_one(self.checkpoint):
            return self.run(start_is_candidate)

    def run(self, start_is_candidate: bool) -> Fit:
        self.engine.check_same(self.identity)
        if self.checkpoint is not None and self.engine.first_says(self.checkpoint.exists()):
            self.restore(self.checkpoint)
        else:
            torch.manual_seed(self.options.seed)
            if start_is_candidate:
                self.judge(self.model, 0.0, math.nan)
        while not self.ended:
            self.advance()
            if self.ended or self.is_older(min(_APART_S, self.checkpoint_every_s)):
                self.save()
        self.model.load_state_dict(self.best)
        self.model.to(self.home).eval()
        return self.result

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do but to take the best weights."""
        return self.position >= self.last_position or self.misses >= self.options.patience

    def advance(self) -> None:
        """Train up to the next validation, then validate."""
        loss = self.train()
        self.position += 1
        with self.average.swapped_in():
            self.judge(self.model, self.position / self.options.evaluations_per_epoch, loss)

    def train(self) -> float:
        """Train up to the next validation; gives the mean loss since the last one."""
        options = self.options
        epoch, number = divmod(self.position, options.evaluations_per_epoch)
        first, last = self.first_step(number), self.first_step(number + 1)
        start = first + self.part.steps
        self.stepped.train()
        began = time.perf_counter()
        for batch in islice(self.batches(epoch, start), last - start):
            loss = self.step(batch.to(self.device))
            self.part.add(batch.num_rows, loss, time.perf_counter() - began)
            self.report(epoch, first * options.batch_size)
            began = time.perf_counter()
        self.check()
        done, self.part = self.part, Part()
        self.result.seconds += done.seconds
        self.result.rows_per_second = done.rows / done.seconds
        return done.loss / done.rows

    def first_step(self, number: int) -> int:
        """Where in an epoch its part before validation ``number`` begins."""
        return self.steps_per_epoch * number // self.options.evaluations_per_epoch

    @property
    def place(self) -> Place:
        """Which batch comes next."""
        epoch, number = divmod(self.position, self.options.evaluations_per_epoch)
        return Place(epoch, self.first_step(number) + self.part.steps, self.steps)

    @property
    def usual_loss(self) -> float:
        """The mean since the last validation, or the one that it told of."""
        if self.part.rows:
            return self.part.loss / self.part.rows
        return self.result.history[-1]["loss"] if self.result.history else math.nan

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """What the steps of an epoch see, without the first ``start``."""
        options = self.options
        return self.data.batches("train", options.batch_size, seed=options.seed, epoch=epoch, start=start)

    def report(self, epoch: int, rows_before: int) -> None:
        """Show where the run is, and keep it, each from time to time."""
        now, done = time.perf_counter(), self.part
        rows = rows_before + done.rows
        if now - self.shown > 0.1 and rows < self.rows_per_epoch:  # the end is told with its validation
            self.shown = now
            self.show(epoch, rows, done.loss / done.rows, done.rows / done.seconds)
        if self.is_older(self.checkpoint_every_s):
            self.save()

    def is_older(self, seconds: float) -> bool:
        """Whether the checkpoint was written, or the run begun, so long ago."""
        return time.perf_counter() - self.saved >= seconds

    def save(self) -> None:
        if self.checkpoint is not None and not self.engine.rank:  # all ranks have the same to save
            self.check()
            write_checkpoint(self.checkpoint, self.tensors(), self.facts())
            self.saved = time.perf_counter()

    def check(self) -> None:
        """Refuse weights that are no numbers; reads all of them, so it is not for each step."""
        buffers = {name for model in (self.model, self.stepped) for name, _ in model.named_buffers()}
        check_finite(self.tensors(), self.place, buffers)

    def step(self, batch: Batch) -> float:
        mine, share = self.engine.share(batch)
        self.engine.begin_step(self.options.seed, self.steps)
        self.optimizer.zero_grad()
        loss = share * loss_of(self.called(mine.ids, mine.dense, mine.domain), mine)
        value = self.engine.mean(loss.item())
        if explodes(value, self.usual_loss):
            raise lost_in(self.place, value, self.usual_loss, self.stepped, batch, self.data.schema)
        loss.backward()  # type: ignore[no-untyped-call]
        self.engine.add_up(self.optimizer.lazy)
        self.optimizer.step(self.lr_factor())
        self.steps += 1
        self.average.update()
        return value

    def lr_factor(self) -> float:
        if self.options.schedule == "constant":
            return 1.0
        done = self.steps / (self.steps_per_epoch * self.options.max_epochs)
        return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))

    def judge(self, model: nn.Module, epoch: float, loss: float) -> None:
        scores = self.scores(model)
        value = scores[self.monitor]
        self.result.history.append({"epoch": epoch, "loss": loss, **scores})
        self.misses += 1
        if value > self.result.best_value:
            self.misses = 0
            self.result.best_value, self.result.best_epoch = value, epoch
            self.remember(model)
        self.show(int(epoch), self.rows_per_epoch, loss, self.result.rows_per_second)
        if self.watcher is not None:
            self.watcher.validated(self.result.history, self.heard)

    def overheard(self, say: Callable[[nn.Module], Predictions], model: nn.Module) -> Predictions:
        """What is judged, kept for the watcher."""
        self.heard = say(model)
        return self.heard

    @property
    def monitor(self) -> str:
        """Which of the scores decides."""
        return self.options.monitor

    def scores(self, model: nn.Module) -> dict[str, float]:
        """What a validation finds."""
        return figures_of(self.say(model))

    def say(self, model: nn.Module) -> Predictions:
        """What is judged."""
        return say(model, self.data)

    def remember(self, model: nn.Module) -> None:
        """Take what was judged as the best so far."""
        self.best = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def show(self, epoch: int, rows: int, loss: float, rows_per_second: float) -> None:
        if self.on_progress is not None:
            history = self.result.history
            value = history[-1][self.monitor] if history else None
            total = self.rows_per_epoch
            self.on_progress(Progress(epoch, min(rows, total), total, loss, value, rows_per_second))

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """All tensors that going on takes, beside the best weights."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state(),
            "optimizer": self.optimizer.state(),
            "rng": random_state(self.device),
        }

    def load_parts(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what :meth:`parts` gave."""
        self.model.load_state_dict(parts["model"])
        self.average.load_state(parts["average"])
        self.optimizer.load_state(parts["optimizer"])
        set_random_state(dict(parts["rng"]), self.device)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: of a run that has ended the best weights alone."""
        return flat({"best": self.best, **({} if self.ended else self.parts())})

    def facts(self) -> dict[str, Any]:
        result = self.result
        return {
            "position": self.position,
            "misses": self.misses,
            "steps": self.steps,
            "part": asdict(self.part),
            "seconds": result.seconds,
            "best_value": result.best_value,
            "best_epoch": result.best_epoch,
            "history": result.history,
            "rows_per_second": result.rows_per_second,
            "identity": self.identity,
        }

    def restore(self, folder: Path) -> None:
        tensors, facts = read_checkpoint(folder)
        check_same_run(folder, facts["identity"], self.identity)
        parts = in_parts(tensors)
        self.best = parts["best"]
        self.position, self.misses, self.steps = facts["position"], facts["misses"], facts["steps"]
        self.part = Part(**facts.get("part", {}))  # checkpoints were once written after validations alone
        self.result.history = facts["history"]
        self.result.seconds, self.result.rows_per_second = facts["seconds"], facts["rows_per_second"]
        self.result.best_value, self.result.best_epoch = facts["best_value"], facts["best_epoch"]
        if not self.ended:
            self.load_parts(parts)
