"""Tables of all ranks as a file on each machine, so that no process has to hold them whole."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from domlora.bundle.mapped import map_tensor
from domlora.files import told
from domlora.layers.rows import stretch_of
from domlora.training.distributed.blocks import agreed

__all__ = ["spooled"]

_CHUNK = 1 << 16


def spooled(rows: Tensor, num_rows: int, folder: Path | None) -> Tensor:
    """A table as the ranks have it together, mapped from a file that has no name any more; all ranks call it.

    Rows go around 65,536 at a time. Ranks of one machine, as torchrun and Ray number them, share a file.

    Args:
        rows: of this rank, cut as :func:`domlora.layers.rows.stretch_of` says.
        num_rows: of all ranks.
        folder: where the file is; without one where temporary files are.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    place = Path(tempfile.gettempdir()) if folder is None else folder
    rank = dist.get_rank() if dist.is_initialized() else 0
    writer = rank - int(os.environ.get("LOCAL_RANK", "0"))  # the first one of this machine
    path = place / f".rows.{agreed(Path(uuid.uuid4().hex))}.{writer}"
    with told(place):
        place.mkdir(parents=True, exist_ok=True)
    try:
        with told(place), path.open("xb") if rank == writer else nullcontext() as out:
            for chunk in _around(rows, num_rows):
                if out is not None:
                    out.write(chunk.view(-1).view(torch.uint8).numpy().data)
        _wait()
        whole = map_tensor(path, rows.dtype, (num_rows, *rows.shape[1:]))
        _wait()
        return whole
    finally:
        if rank == writer:
            path.unlink(missing_ok=True)


def _around(rows: Tensor, num_rows: int) -> Iterator[Tensor]:
    """All rows in their order, on each rank."""
    if not dist.is_initialized():
        yield from (chunk.contiguous() for chunk in torch.split(rows, _CHUNK))
        return
    for rank in range(dist.get_world_size()):
        start, stop, _ = stretch_of(num_rows, rank, dist.get_world_size())
        for first in range(0, stop - start, _CHUNK):
            size = min(_CHUNK, stop - start - first)
            is_mine = rank == dist.get_rank()
            chunk = rows[first : first + size].contiguous() if is_mine else rows.new_empty(size, *rows.shape[1:])
            dist.broadcast(chunk, rank)
            yield chunk


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
