"""Embedding tables that FBGEMM keeps and moves, whole in one process or cut by rows between the ranks by TorchRec."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from domlora.errors import ConfigError
from domlora.layers.embedding import EmbeddingTable
from domlora.layers.experts import DomainEmbedding
from domlora.layers.rows import stretch_of
from domlora.training.distributed.spool import spooled
from domlora.training.optimizers import Rule

__all__ = ["Tables"]

_EPS = 1e-8
_CHUNK = 1 << 18  # numbers
_ODD = -7046029254386353131  # 2**64 over the golden ratio, as a number with a sign
_FEATURE, _TABLE = "rows", "table"


class Tables:
    """Tables of a model, kept outside of it with row-wise Adagrad in their backward pass.

    The model's own weights have no rows until :meth:`give_back`, and what it reads is fetched; on ranks each distinct row
    of a batch once, from the one that has it. On ``W`` ranks rank ``r`` has rows ``[r C, (r + 1) C)`` of a table of ``N``
    rows, ``C = ceil(N / W)``, and starts from those that its model has; gradients of all ranks are added up and divided by
    ``W``. A table made within :func:`domlora.layers.rows.cut_tables` never was whole. FBGEMM wants rows of a multiple of
    four numbers: shorter ones are filled up, and learning rate, ``eps`` and decay are set so that the rest moves as alone.

    Args:
        model: its tables of one row or more, but for those of domains; those that do not move are kept too.
        rule: learning rate and decay.

    Raises:
        ConfigError: the libraries are missing, there are no tables, a weight is not float32 on a CPU, or ranks do not talk
            by gloo or were given other tables.

    **Source**: FBGEMM's ``EXACT_ROWWISE_ADAGRAD`` with decoupled decay, which
    :class:`domlora.training.rowwise.RowWiseAdagrad` has too; Ivchenko et al. 2022, "TorchRec: a PyTorch Domain Library for
    Recommendation Systems", for tables cut by rows.
    """

    def __init__(self, model: nn.Module, rule: Rule) -> None:
        on_ranks = dist.is_initialized()
        if on_ranks and dist.get_backend() != "gloo":
            raise ConfigError(
                "fused tables are on the CPU, where ranks talk by gloo",
                received=dist.get_backend(),
                next_step="Hide the GPUs from them: CUDA_VISIBLE_DEVICES=",
            )
        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if on_ranks else None
        # its own group: a rank without rows of a domain sends its dense gradients earlier than others do
        self._group = dist.new_group() if on_ranks else None
        self._lr_factor = 1.0
        tables = _tables_of(model)
        if self._group is not None:
            _check_same([table for table in tables.values() if table.stretch is None], self._group)
        self._kept = {name: _Kept(table, rule, self._group) for name, table in tables.items()}

    def rows(self) -> dict[str, Tensor]:
        """This rank's rows of each table, the memory that moves."""
        return {name: kept.rows for name, kept in self._kept.items()}

    def sums(self) -> dict[str, Tensor]:
        """Their accumulators, of tables that move."""
        return {name: kept.sums for name, kept in self._kept.items() if kept.moves}

    def whole(self, name: str, block: Tensor) -> Tensor:
        """Blocks of one table as the tensor that they are of all ranks together; in one process the block itself."""
        if self._mesh is None:
            return block.contiguous()
        shape = torch.Size((self._kept[name].num_rows, *block.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            block.contiguous(), self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    def set_lr_factor(self, factor: float) -> None:
        """How large the next steps are."""
        if factor != self._lr_factor:
            self._lr_factor = factor
            for kept in self._kept.values():
                kept.set_lr(kept.lr * factor)

    def digest(self) -> str:
        """Of all rows as they are now, however they are cut: a sha256 over sums of what each number and its place give."""
        sums = torch.tensor([_sum_of(kept.rows, kept.start) for kept in self._kept.values()])
        if self._group is not None:
            dist.all_reduce(sums, group=self._group)
        found = [(name, kept.num_rows) for name, kept in self._kept.items()]
        return hashlib.sha256(f"{found} {sums.tolist()}".encode()).hexdigest()

    def give_back(self, rows: Mapping[str, Tensor], beside: Path | None) -> None:
        """Let the model have these rows, on each rank those of all, and be as it was before.

        What ranks have together is on disk, mapped, see :func:`~domlora.training.distributed.spool.spooled`.
        """
        for name, kept in self._kept.items():
            kept.put_back(rows[name] if self._group is None else spooled(rows[name], kept.num_rows, beside))
        self._kept = {}
        if self._group is not None:
            dist.destroy_process_group(self._group)


def _tables_of(model: nn.Module) -> dict[str, EmbeddingTable]:
    """Those of one row or more, by the name of their weight; domains have so few rows that all ranks have them."""
    found = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, EmbeddingTable) and not isinstance(module, DomainEmbedding) and _num_rows(module)
    }
    if not found:
        raise ConfigError("a model must have tables to fuse them", received=type(model).__name__)
    for table in found.values():
        if (table.weight.dtype, table.weight.device.type) != (torch.float32, "cpu"):
            raise ConfigError(
                "fused tables are float32 on a CPU",
                received=f"{table.weight.dtype} on {table.weight.device}",
                next_step="Set tables.name to 'rowwise_adagrad', which has the same formula",
            )
    return found


def _num_rows(table: EmbeddingTable) -> int:
    """Of all ranks together."""
    return len(table.weight) if table.stretch is None else table.stretch.num_rows


def _check_same(tables: Sequence[EmbeddingTable], group: dist.ProcessGroup) -> None:
    """Refuse tables that are whole and not the same on all ranks: each would keep a part of another one."""
    least = torch.tensor([_sum_of(table.weight.detach(), 0) for table in tables], dtype=torch.int64)
    most = least.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    if not torch.equal(least, most):
        raise ConfigError(
            "all ranks must be given the same tables", next_step="Let all of them read the same bundle, or set one seed"
        )


class _Kept:
    """One table's rows on this rank."""

    def __init__(self, table: EmbeddingTable, rule: Rule, group: dist.ProcessGroup | None) -> None:
        self.num_rows, width = _num_rows(table), table.weight.shape[1]
        filled = -(-width // 4) * 4
        share = math.sqrt(width / filled)  # zeros that fill a row up make the mean of its squares smaller
        self.lr = rule.lr * share
        settings = {"learning_rate": self.lr, "eps": _EPS * share, "weight_decay": rule.weight_decay / share}
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        each = stretch_of(self.num_rows, 0, size).stop
        whole = (each * size, filled)  # all ranks have a row, if only to fill up
        found = _alone(*whole, settings) if group is None else _on_ranks(*whole, settings, group)
        self.lookup, self.set_lr = found.lookup, found.set_lr
        mine = stretch_of(self.num_rows, rank, size)
        if table.stretch not in (None, mine):
            raise ConfigError(
                "a table must be cut for the ranks that train it", received=f"{table.stretch}, not {mine}"
            )
        self.start, own = mine.start, mine.stop - mine.start
        self.rows, self.sums = found.rows.detach()[:own, :width], found.sums[:own]
        self.table, self.moves = table, table.weight.requires_grad
        with torch.no_grad():
            self.rows.copy_(table.weight[mine.start : mine.stop] if table.stretch is None else table.weight)
        table.weight, table.stretch = nn.Parameter(table.weight.new_empty(0, width), requires_grad=False), None
        table.fetch = self.fetch

    def fetch(self, rows: Tensor) -> Tensor:
        """Vectors of rows, which their gradient moves."""
        learns = self.moves and torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(learns):  # FBGEMM has no kernels for inference mode
            return self.lookup(rows)[:, : self.rows.shape[1]]

    def put_back(self, weight: Tensor) -> None:
        self.table.fetch = None
        self.table.weight = nn.Parameter(weight, requires_grad=self.moves)


class _Found(NamedTuple):
    """How rows are looked up, and what there is of them here."""

    lookup: Callable[[Tensor], Tensor]
    rows: Tensor
    sums: Tensor
    set_lr: Callable[[float], None]


def _alone(num_rows: int, width: int, settings: Mapping[str, float]) -> _Found:
    """A table of FBGEMM's in this process."""
    with _installed():
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        place = (num_rows, width, EmbeddingLocation.HOST, ComputeDevice.CPU)
        tables = SplitTableBatchedEmbeddingBagsCodegen(
            [place], pooling_mode=PoolingMode.NONE, **_row_wise_adagrad(), **settings
        )
    _speed_up_(tables, settings)

    def lookup(rows: Tensor) -> Tensor:
        vectors: Tensor = tables(indices=rows, offsets=torch.tensor([0, len(rows)]))
        return vectors

    sums = tables.split_optimizer_states()[0][0]
    return _Found(lookup, tables.split_embedding_weights()[0], sums, tables.set_learning_rate)


def _on_ranks(num_rows: int, width: int, settings: Mapping[str, float], group: dist.ProcessGroup) -> _Found:
    """A table of TorchRec's, cut by rows."""
    with _installed(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchRec has sharded tensors, which torch wants to be rid of
        from torchrec import KeyedJaggedTensor

        sharded = _cut(num_rows, width, settings, group)
        _speed_up_(sharded, settings)
        optimizer = sharded.fused_optimizer
        (state,) = optimizer.state_dict()["state"].values()
        rows, sums = _local(sharded.state_dict()), _local(state)

    def lookup(rows: Tensor) -> Tensor:
        distinct, places = _distinct(rows)
        asked = KeyedJaggedTensor(keys=[_FEATURE], values=distinct, lengths=torch.tensor([len(distinct)]))
        vectors: Tensor = sharded(asked)[_FEATURE].values()
        return vectors.index_select(0, places)

    def set_lr(lr: float) -> None:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()  # moves nothing, but tells the tables

    return _Found(lookup, rows, sums, set_lr)


def _cut(num_rows: int, width: int, settings: Mapping[str, float], group: dist.ProcessGroup) -> Any:
    """TorchRec's module; its plan is written by hand, because the planner finds none for gloo."""
    from torchrec import EmbeddingCollection, EmbeddingConfig
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingEnv

    config = EmbeddingConfig(name=_TABLE, embedding_dim=width, num_embeddings=num_rows, feature_names=[_FEATURE])
    tables = EmbeddingCollection(tables=[config], device=torch.device("meta"))
    sharder = EmbeddingCollectionSharder(fused_params={**_row_wise_adagrad(), **settings})
    by_rows = {_TABLE: row_wise(compute_kernel="fused")}
    size = group.size()
    plan = construct_module_sharding_plan(
        tables, by_rows, sharder=sharder, local_size=size, world_size=size, device_type="cpu"
    )
    return sharder.shard(tables, plan, ShardingEnv.from_process_group(group), torch.device("cpu"))


def _sum_of(rows: Tensor, start: int) -> int:
    """The sum, modulo 2**64, of what each number's bits and its place in the whole table are mixed to."""
    found = torch.zeros((), dtype=torch.int64)
    step = max(1, _CHUNK // rows.shape[1])
    for first in range(0, len(rows), step):
        bits = rows[first : first + step].contiguous().view(torch.int32).long()
        places = torch.arange(bits.numel()).view_as(bits) + (start + first) * bits.shape[1]
        mixed = (bits + places * _ODD) * _ODD
        found += ((mixed ^ (mixed >> 29)) * _ODD).sum()
    return int(found)


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows in ascending order, and where among them each row stands.

    As ``torch.unique`` has it; sorting 32-bit numbers takes half the time.
    """
    ascending, order = torch.sort(rows.int() if rows.numel() and int(rows.max()) < 2**31 else rows)
    distinct, places = torch.unique_consecutive(ascending, return_inverse=True)
    return distinct.long(), torch.empty_like(places).scatter_(0, order, places)


def _row_wise_adagrad() -> dict[str, Any]:
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode

    return {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "weight_decay_mode": WeightDecayMode.DECOUPLE}


def _speed_up_(module: nn.Module, settings: Mapping[str, float]) -> None:
    """Let FBGEMM's tables see every row as the sum of a bag of one.

    That is the same, and on a CPU its backward pass takes a twentieth of the time or less. It knows no decay, though, so
    tables that decay stay as they are.
    """
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen

    def in_bags_of_one(
        _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**named, "offsets": torch.arange(len(named["indices"]) + 1)}

    for tables in module.modules():
        if isinstance(tables, SplitTableBatchedEmbeddingBagsCodegen) and not settings["weight_decay"]:
            tables.pooling_mode, tables.is_nobag = PoolingMode.SUM, False
            tables.register_forward_pre_hook(in_bags_of_one, with_kwargs=True)


def _local(tensors: Mapping[str, Any]) -> Tensor:
    """This rank's block of the one tensor there is."""
    (whole,) = tensors.values()
    (shard,) = whole.local_shards()
    tensor: Tensor = shard.tensor
    return tensor


@contextmanager
def _installed() -> Iterator[None]:
    """Raises ConfigError: TorchRec or FBGEMM are not there, or not for this torch."""
    try:
        yield
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"fused tables need TorchRec and FBGEMM ({error})",
            next_step="Install them with: pip install 'domlora[torchrec]' && pip install --no-deps torchrec==1.8.0",
        ) from error
