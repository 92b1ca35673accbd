"""Tables of all ranks as a file on each machine, so that no process has to hold them whole."""

from __future__ import annotations

import socket
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


def spooled(rows: Tensor, num_rows: int, beside: Path | None) -> Tensor:
    """A table ``(num_rows, ...)`` as the ranks have it together, mapped from a file that has no name any more.

    All ranks call it. Rows go around 65,536 at a time, and the first rank of each machine writes them. What one that was
    killed has left beside the path goes with the next attempt.

    Args:
        rows: of this rank, cut as :func:`domlora.layers.rows.stretch_of` says.
        num_rows: of all ranks.
        beside: a path of this run, beside which the file is; without one it is where temporary files are.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    place = Path(tempfile.gettempdir()) if beside is None else beside.parent
    name = f".rows.{uuid.uuid4().hex}" if beside is None else f".{beside.name.lstrip('.')}.rows"
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    writer = hosts.index(socket.gethostname())
    path = place / f"{agreed(name)}.{writer}"
    is_writer = dist.get_rank() == writer
    try:
        with told(place), path.open("wb") if is_writer else nullcontext() as out:
            for chunk in _around(rows, num_rows):
                if out is not None:
                    out.write(chunk.view(-1).view(torch.uint8).numpy().data)
        dist.barrier()
        with told(place):
            whole = map_tensor(path, rows.dtype, (num_rows, *rows.shape[1:]))
        dist.barrier()
        return whole
    finally:
        if is_writer:
            path.unlink(missing_ok=True)


def _around(rows: Tensor, num_rows: int) -> Iterator[Tensor]:
    """All rows in their order, on each rank."""
    for rank in range(dist.get_world_size()):
        start, stop, _ = stretch_of(num_rows, rank, dist.get_world_size())
        for first in range(0, stop - start, _CHUNK):
            size = min(_CHUNK, stop - start - first)
            is_mine = rank == dist.get_rank()
            chunk = rows[first : first + size].contiguous() if is_mine else rows.new_empty(size, *rows.shape[1:])
            dist.broadcast(chunk, rank)
            yield chunk
