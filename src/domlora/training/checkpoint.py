"""A run on disk: tensors as safetensors, facts as JSON, replaced as one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from domlora.errors import DataError
from domlora.files import new_folder, sha256_of

__all__ = ["read_checkpoint", "write_checkpoint"]

_TENSORS, _FACTS = "tensors.safetensors", "checkpoint.json"


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Replace ``folder`` by a new checkpoint; a reader, or a run killed meanwhile, sees the old one or the new one."""
    with new_folder(folder, overwrite=True, marker=_FACTS) as fresh:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, fresh / _TENSORS)
        text = json.dumps({**facts, "sha256": sha256_of(fresh / _TENSORS)}, indent=1)
        (fresh / _FACTS).write_text(text, encoding="utf-8")


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint.

    Raises:
        DataError: a file is missing or damaged.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        if sha256_of(folder / _TENSORS) != facts.pop("sha256"):
            raise ValueError(f"{_TENSORS} has another sha256 than {_FACTS} says")
        return load_file(folder / _TENSORS), facts
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DataError(
            f"a checkpoint must be whole ({error})",
            received=str(folder),
            next_step="Remove the folder to begin again",
        ) from error
