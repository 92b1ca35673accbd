"""Processes that train one model together: each has a copy of it and a part of the rows of every batch.

Dense gradients are averaged by torch's DistributedDataParallel. Sparse ones, of tables and banks of adapters under a lazy
rule, travel as the rows they have: DDP would sum them as sparse tensors, which NCCL cannot do at all. A batch is cut between
the ranks, so the number of ranks changes which process sees a row and not which rows make a step.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from domlora.errors import ConfigError, EngineError
from domlora.evaluation.evaluate import Predictions, predict
from domlora.features.batch import Batch
from domlora.layers.whole_batch import set_whole_sum
from domlora.training.engine import Engine, set_engine
from domlora.training.rows import Rows
from domlora.training.rowwise import Summing

__all__ = ["Ranks", "joined"]

_LEAST_ROWS = 2
"""Of a rank; smaller batches go to all of them whole. One row has no batch mates to be normalised with."""
_DENSE = -1


class Ranks(Engine):
    """The processes of torch's default process group.

    Dropout draws anew in every step from ``(seed, step, rank)``: a run that goes on after a rank was lost draws what it
    would have drawn, and another number of ranks draws others.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.split = False
        self.where = torch.device("cpu")
        self.wrapped = WeakSet[DistributedDataParallel]()

    def called(self, model: nn.Module, apart: Sequence[nn.Parameter]) -> nn.Module:
        """The model in DistributedDataParallel, with the first rank's weights on all.

        Raises:
            EngineError: a layer of torch's batch normalisation, which sees the rows of one rank alone.
        """
        self.where = next(model.parameters()).device
        if any(isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            raise EngineError(
                "batch normalisation must see the whole batch, and ranks share it",
                received=type(model).__name__,
                next_step="On GPUs call torch.nn.SyncBatchNorm.convert_sync_batchnorm(model); else train in one process",
            )
        names = {id(p): name for name, p in model.named_parameters()}
        for parameter in apart:
            dist.broadcast(parameter.detach(), 0)
        ignored = [names[id(p)] for p in apart]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)  # type: ignore[no-untyped-call]
        if all(name in ignored for name, p in model.named_parameters() if p.requires_grad):
            return model  # DDP refuses a model that has nothing for it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.13 on
            # a rank may have no row of a domain, and then none of its adapter's or tower's gradients
            wrapped = DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=True
            )
        self.wrapped.add(wrapped)
        return wrapped

    def let_go(self) -> None:
        """Let the wrapped models forget the process group, before it is ended.

        Whichever reducer lived longer would end the group itself, with the interpreter's lock in its hands and waiting for
        a thread that may want that lock: a process that never ends.
        """
        for wrapped in self.wrapped:
            del wrapped.logger, wrapped.reducer

    def share(self, batch: Batch) -> tuple[Batch, float]:
        """An even stretch of the rows, and ``size * rows / all rows``: the mean over ranks is that of the batch."""
        rows = batch.num_rows
        self.split = rows >= _LEAST_ROWS * self.size
        if not self.split:
            return batch, 1.0
        mine = self._stretch(rows)
        return batch.take(mine), self.size * (mine.stop - mine.start) / rows

    def begin_step(self, seed: int, step: int) -> None:
        """Seed what dropout draws from."""
        torch.manual_seed((seed * 1_000_003 + step) * 1_000_003 + self.rank & (1 << 63) - 1)

    def add_up(self, apart: Sequence[nn.Parameter]) -> None:
        """Sparse gradients become those of all ranks' rows, one behind the other; dense ones are averaged."""
        if not apart:
            return
        rows_of = Summing()
        parts = [self._rows(p, rows_of) for p in apart]
        counts = self._gather(torch.tensor([_DENSE if ids is None else len(ids) for ids, _ in parts]))  # (W, P)
        lazy = (counts != _DENSE).all(0).tolist()
        for parameter, is_lazy in zip(apart, lazy, strict=True):
            if not is_lazy:
                self._mean_of_dense(parameter)
        chosen = [place for place, is_lazy in enumerate(lazy) if is_lazy]
        if chosen:
            self._gather_rows([apart[i] for i in chosen], [parts[i] for i in chosen], counts[:, chosen])

    def mean(self, value: float) -> float:
        whole = torch.tensor([value], dtype=torch.float64, device=self.where)
        dist.all_reduce(whole)
        return float(whole) / self.size

    def whole_sum(self, mine: Tensor) -> Tensor:
        """See :mod:`domlora.layers.whole_batch`; of a batch that all ranks have whole, what is here already."""
        return cast(Tensor, _Sum.apply(mine)) if self.split else mine  # type: ignore[no-untyped-call]

    def first_says(self, value: bool) -> bool:
        said = torch.tensor([value], device=self.where, dtype=torch.uint8)
        dist.broadcast(said, 0)
        return bool(said)

    def check_same(self, facts: Mapping[str, str]) -> None:
        for what, mine in facts.items():
            digits = torch.tensor(list(mine.encode()), dtype=torch.uint8, device=self.where)
            said = [bytes(each.tolist()).decode() for each in self._gather_uneven(digits)]
            if len(set(said)) > 1:
                raise ConfigError(
                    f"all ranks must be given the same {what}",
                    received=", ".join(f"rank {rank}: {each[:12]}" for rank, each in enumerate(said)),
                    next_step="Let all of them read the same folders",
                )

    def say(self, model: nn.Module, data: Rows) -> Predictions:
        """Each rank scores a stretch of every batch; then all have what all said."""
        if data.num_rows("valid") < self.validation_rows:
            return super().say(model, data)
        places: list[Tensor] = []
        mine = predict(model, self._stretches(data.batches("valid", self.validation_rows), places))
        found = torch.cat(self._gather_uneven(torch.cat(places).to(self.where)))
        order = found.argsort()[int((found < 0).sum()) :].cpu()
        whole = {k: self._whole(column, order) for k, column in mine._asdict().items() if column is not None}
        return Predictions(**whole)

    def _whole(self, column: Any, order: Tensor) -> Any:
        pieces = self._gather_uneven(torch.from_numpy(column).to(self.where))
        return torch.cat(pieces).cpu()[order].numpy()

    def _stretches(self, batches: Iterator[Batch], places: list[Tensor]) -> Iterator[Batch]:
        """This rank's rows of each batch, and in ``places`` where they stand.

        Where there are fewer rows than ranks, those without take the first one, for nobody: tables that ranks share answer
        when all of them ask.
        """
        done = 0
        for batch in batches:
            mine = self._stretch(batch.num_rows)
            if mine.stop > mine.start:
                places.append(torch.arange(done + mine.start, done + mine.stop))
                yield batch.take(mine)
            else:
                places.append(torch.tensor([-1]))
                yield batch.take(slice(0, 1))
            done += batch.num_rows

    def _stretch(self, rows: int) -> slice:
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def _rows(self, parameter: nn.Parameter, rows_of: Summing) -> tuple[Tensor | None, Tensor]:
        """Ids and gradient of the rows this rank has: none where it did not use the parameter."""
        if parameter.grad is None:
            return torch.zeros(0, dtype=torch.int64, device=parameter.device), parameter.new_zeros(0)
        if not parameter.grad.is_sparse:
            return None, parameter.grad
        ids, grad = rows_of(parameter)
        return torch.arange(len(parameter), device=parameter.device) if ids is None else ids, grad

    def _mean_of_dense(self, parameter: nn.Parameter) -> None:
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
        dist.all_reduce(grad)
        parameter.grad = grad.div_(self.size)

    def _gather_rows(
        self, parameters: Sequence[nn.Parameter], parts: Sequence[tuple[Tensor | None, Tensor]], counts: Tensor
    ) -> None:
        """All ids in one message and all values in another, cut up again by rank and parameter."""
        widths = torch.tensor([p[0].numel() for p in parameters])
        ids = self._padded_gather(torch.cat([cast(Tensor, part[0]) for part in parts]), counts.sum(1))
        values = self._padded_gather(torch.cat([part[1].flatten() for part in parts]), (counts * widths).sum(1))
        ids_of = [torch.split(mine, sizes) for mine, sizes in zip(ids, counts.tolist(), strict=True)]
        values_of = [torch.split(mine, sizes) for mine, sizes in zip(values, (counts * widths).tolist(), strict=True)]
        for place, parameter in enumerate(parameters):
            index = torch.cat([mine[place] for mine in ids_of]).unsqueeze(0)
            rows = torch.cat([mine[place] for mine in values_of]).view(-1, *parameter.shape[1:]).div_(self.size)
            parameter.grad = torch.sparse_coo_tensor(index, rows, parameter.shape, check_invariants=False)

    def _gather(self, mine: Tensor) -> Tensor:
        """Equal shapes of all ranks, as one tensor ``(W, ...)`` on the CPU."""
        mine = mine.to(self.where)
        whole = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(whole, mine)
        return torch.stack(whole).cpu()

    def _gather_uneven(self, mine: Tensor) -> list[Tensor]:
        """The vectors of all ranks, whatever their lengths."""
        return self._padded_gather(mine, self._gather(torch.tensor([len(mine)])).flatten())

    def _padded_gather(self, mine: Tensor, lengths: Tensor) -> list[Tensor]:
        most = max(int(lengths.max()), 1)
        padded = mine.new_zeros(most)
        padded[: len(mine)] = mine
        whole = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(whole, padded)
        return [part[:length] for part, length in zip(whole, lengths.tolist(), strict=True)]


class _Sum(torch.autograd.Function):
    """The sum over ranks; what each has of it, all have in their gradients."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor) -> Tensor:  # noqa: ARG004
        whole = mine.detach().clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004
        whole = grad.clone()
        dist.all_reduce(whole)
        return whole


@contextmanager
def joined(*, timeout_s: float = 1800.0) -> Iterator[Engine]:
    """Trainings inside the block are shared by the ranks that torchrun started, or Ray, or whoever made a process group.

    One process by itself, with no such environment, trains by itself.

    Args:
        timeout_s: how long a rank waits for another that does not answer.

    Raises:
        EngineError: the ranks do not find each other.

    Example:
        >>> with joined() as engine:
        ...     engine.rank, engine.size
        (0, 1)
    """
    begun = dist.is_available() and dist.is_initialized()
    if not begun and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Engine()
        return
    if not begun:
        _begin(timeout_s)
    ranks = Ranks()
    set_engine(ranks)
    set_whole_sum(ranks.whole_sum)
    try:
        yield ranks
    finally:
        set_engine(None)
        set_whole_sum(None)
        ranks.let_go()
        if not begun:
            dist.destroy_process_group()


def _begin(timeout_s: float) -> None:
    """Meet the others; on a machine with GPUs each rank takes its own."""
    kind = "nccl" if torch.cuda.is_available() else "gloo"
    if kind == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    waits = timedelta(seconds=timeout_s)
    try:
        store, rank, size = next(rendezvous("env://", timeout=waits))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun on one machine keeps its store when it starts ranks again: they would meet the addresses of dead ones
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group(kind, store=store, rank=rank, world_size=size, timeout=waits)
    except (RuntimeError, ValueError) as error:
        raise EngineError(
            f"ranks must find each other ({error})",
            received={key: os.environ.get(key) for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")},
            next_step="Start them with torchrun",
        ) from error
