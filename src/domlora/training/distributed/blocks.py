"""Blocks of tables on disk: each rank writes its own and any number of ranks reads them, as safetensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from domlora.errors import DataError
from domlora.training.checkpoint import flat, in_parts, read_checkpoint

__all__ = ["best_of", "read_blocks_", "told", "write_blocks"]

_FOLDER = "rows"


def told(folder: Path | None) -> Path:
    """The folder that the first rank names; all call it."""
    said = [str(folder)]
    if dist.is_initialized():
        dist.broadcast_object_list(said, 0)
    return Path(said[0])


def write_blocks(folder: Path, blocks: Mapping[str, Tensor]) -> None:
    """Write tensors, those that ranks have parts of as one file a rank; all ranks call it with one folder.

    torch's own way to store checkpoints has pickles; the one of Hugging Face has safetensors alone.
    """
    writer = HuggingFaceStorageWriter(str(folder / _FOLDER), save_distributed=True)
    with _by_itself() as alone:
        save(dict(blocks), storage_writer=writer, no_dist=alone)


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


def best_of(checkpoint: Path) -> dict[str, Tensor]:
    """The best weights so far of a run, whole, whether it runs in one process or on ranks, as a model's state dict.

    Needs neither ranks nor TorchRec. A model built as the run's takes them with ``load_state_dict`` and is then saved as
    any other: :class:`domlora.bundle.Bundle`.

    Raises:
        DataError: a damaged checkpoint, or one from before the first validation.
    """
    best = in_parts(read_checkpoint(checkpoint)[0])["best"]
    if not best:
        raise DataError("a checkpoint has no best weights before the first validation", received=str(checkpoint))
    if (checkpoint / _FOLDER).is_dir():
        found: Mapping[str, Any] = (
            HuggingFaceStorageReader(str(checkpoint / _FOLDER)).read_metadata().state_dict_metadata
        )
        rows = {name: torch.empty(found[name].size) for name in flat({"best": best}) if name in found}
        read_blocks_(checkpoint, rows)
        best |= in_parts(rows)["best"]
    return best
