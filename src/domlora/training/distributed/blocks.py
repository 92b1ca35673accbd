"""Blocks of tables on disk: each rank writes its own and any number of ranks reads them, as safetensors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from domlora.bundle.mapped import on_disk
from domlora.errors import DataError
from domlora.training.checkpoint import flat, in_parts, read_checkpoint

__all__ = ["agreed", "best_of", "read_blocks_", "write_blocks"]

_FOLDER = "rows"


def agreed(word: str) -> str:
    """What the first rank says; all call it."""
    said = [word]
    if dist.is_initialized():
        dist.broadcast_object_list(said, 0)
    return said[0]


def write_blocks(folder: Path, blocks: Mapping[str, Tensor]) -> None:
    """Write tensors, those that ranks have parts of in parts; all ranks call it with one folder.

    torch's own way to store checkpoints has pickles; the one of Hugging Face has safetensors alone.
    """
    with _by_itself() as alone:
        save(dict(blocks), storage_writer=_Writer(str(folder / _FOLDER), save_distributed=True), no_dist=alone)


class _Writer(HuggingFaceStorageWriter):
    """One file for each tensor of a rank, written from where it lies; torch's holds two copies of a file in memory."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        for number, item in enumerate(plan.items):
            tensor, name = planner.resolve_data(item), item.index.fqn
            assert isinstance(tensor, Tensor)
            assert item.tensor_data is not None
            place = json.dumps({name: {"saved_offsets": item.tensor_data.chunk.offsets}})
            metadata = {CUSTOM_METADATA_KEY: place, DCP_VERSION_KEY: str(HF_DCP_VERSION), FORMAT_KEY: FORMAT_VALUE}
            file = Path(self.path) / f"{plan.storage_data['shard_index']:05}-{number:05}.safetensors"
            save_file({name: tensor.detach().contiguous()}, file, metadata)
        written: Future[list[WriteResult]] = Future()
        written.set_result([])
        return written


def read_blocks_(folder: Path, blocks: Mapping[str, Tensor]) -> None:
    """Fill tensors from what :func:`write_blocks` wrote, on however many ranks."""
    reader = HuggingFaceStorageReader(str(folder / _FOLDER))
    with _by_itself() as alone:
        load(dict(blocks), storage_reader=reader, no_dist=alone)


@contextmanager
def _by_itself() -> Iterator[bool]:
    """Whether this process belongs to no ranks; torch warns where it does not, though it was told."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield not dist.is_initialized()


def best_of(checkpoint: Path, folder: Path | None = None) -> dict[str, Tensor]:
    """The best weights so far of a run, whole, whether it runs in one process or on ranks, as a model's state dict.

    Needs neither ranks nor TorchRec. A model built as the run's takes them with ``load_state_dict`` and is then saved as
    any other: :class:`domlora.bundle.Bundle`. Tables that ranks cut are on disk, and a model built within
    :func:`domlora.layers.rows.empty_tables` that takes them with ``assign=True`` leaves them there.

    Args:
        checkpoint: its folder.
        folder: whose disk has room for such tables; that of the checkpoint without.

    Raises:
        DataError: a damaged checkpoint, one from before the first validation, no room, or ``folder`` cannot be written.
    """
    best = in_parts(read_checkpoint(checkpoint)[0])["best"]
    if not best:
        raise DataError("a checkpoint has no best weights before the first validation", received=str(checkpoint))
    if (checkpoint / _FOLDER).is_dir():
        found: Mapping[str, Any] = (
            HuggingFaceStorageReader(str(checkpoint / _FOLDER)).read_metadata().state_dict_metadata
        )
        rows = {
            name: on_disk(found[name].size, folder or checkpoint.parent)
            for name in flat({"best": best})
            if name in found
        }
        read_blocks_(checkpoint, rows)
        best |= in_parts(rows)["best"]
    return best
