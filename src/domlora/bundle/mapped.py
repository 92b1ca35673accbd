"""Tensors and files without a copy of them in memory: read where they lie on disk, written from where they are."""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from domlora.files import told

__all__ = ["map_tensor", "map_tensors", "on_disk", "unshared"]

# Without it Linux refuses to map a file that is longer than its memory, for all of it might be changed. Python has the name
# from 3.13 on.
_UNRESERVED = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def map_tensor(path: Path, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A file of numbers as a tensor. What is changed of it is changed in this process and not in the file.

    The file may be removed, but neither cut nor written to, while the tensor lives.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is shorter than the shape.
    """
    return _view(_mapping(path), dtype, shape, 0)


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, each as :func:`map_tensor` has it.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is something else.
    """
    try:
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            header = dict(json.loads(file.read(length))) if length <= size else {}
        header.pop("__metadata__", None)
        if 8 + length + max((each["data_offsets"][1] for each in header.values()), default=0) != size:
            raise ValueError("it has another length than its header says")
        mapping = _mapping(path)
        return {name: _placed(mapping, 8 + length, each) for name, each in header.items()}
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path.name} must be a safetensors file of numbers ({error!r})") from error


def on_disk(shape: torch.Size, folder: Path) -> Tensor:
    """New numbers of a shape, float32, in a file of this process that has no name and goes with it.

    Raises:
        DataError: no room, or the folder cannot be written.
    """
    size = 4 * shape.numel()
    if not size:
        return torch.empty(shape, dtype=torch.float32)
    with told(folder), tempfile.TemporaryFile(dir=folder) as file:
        if sys.platform == "linux":
            os.posix_fallocate(file.fileno(), 0, size)  # a mapping would find out too late that there is no room
        else:
            file.truncate(size)
        return _view(mmap.mmap(file.fileno(), size), torch.float32, shape, 0)


def unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors wants them; copied only where they do, because tables are long."""
    found, seen = {}, set()
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        is_alone = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        found[name] = tensor if is_alone else tensor.contiguous().clone()
    return found


def _mapping(path: Path) -> mmap.mmap | None:
    """None of an empty file, which cannot be mapped."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return None
        flags = mmap.MAP_PRIVATE | _UNRESERVED
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _view(mapping: mmap.mmap | None, dtype: torch.dtype, shape: Sequence[int], offset: int) -> Tensor:
    count = math.prod(shape)
    if not count or mapping is None:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset).view(tuple(shape))


def _placed(mapping: mmap.mmap | None, start: int, header: Mapping[str, Any]) -> Tensor:
    """A tensor as the header of its file says."""
    first, end = header["data_offsets"]
    tensor = _view(mapping, _TYPES[header["dtype"]], header["shape"], start + first)
    if first < 0 or end - first != tensor.nbytes:
        raise ValueError("a tensor must be as long as its shape says")
    return tensor
