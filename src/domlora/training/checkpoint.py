"""A run on disk: tensors as safetensors, facts as JSON, replaced as one folder."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from domlora.bundle.mapped import unshared
from domlora.errors import ConfigError, DataError
from domlora.files import new_folder, sha256_of

__all__ = ["check_same_run", "flat", "in_parts", "read_checkpoint", "start_digest", "write_checkpoint"]

_TENSORS, _FACTS = "tensors.safetensors", "checkpoint.json"


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], more: Callable[[Path], None] | None = None
) -> None:
    """Replace ``folder`` by a new checkpoint; a reader, or a run killed meanwhile, sees the old one or the new one.

    Args:
        more: writes other files into a folder that is given to it.

    Raises:
        DataError: no room on the disk, a quota, or a folder that cannot be written; the old checkpoint is as it was.
    """
    with new_folder(folder, overwrite=True, marker=_FACTS) as fresh:
        save_file(unshared(tensors), fresh / _TENSORS)
        if more is not None:
            more(fresh)
        beside = {str(p.relative_to(fresh)): sha256_of(p) for p in sorted(fresh.glob("*/*"))}
        text = json.dumps({**facts, "sha256": sha256_of(fresh / _TENSORS), "beside": beside}, indent=1)
        (fresh / _FACTS).write_text(text, encoding="utf-8")


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a checkpoint.

    Raises:
        DataError: a file is missing, damaged or may not be read.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        for name, digest in {_TENSORS: facts.pop("sha256"), **facts.pop("beside", {})}.items():
            if sha256_of(folder / name) != digest:
                raise ValueError(f"{name} has another sha256 than {_FACTS} says")
        return load_file(folder / _TENSORS), facts
    except PermissionError as error:
        raise DataError(
            f"a checkpoint must be readable ({error.strerror})",
            received=str(folder),
            next_step="Let this user read it, or remove the folder to begin again",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DataError(
            f"a checkpoint must be whole ({error})",
            received=str(folder),
            next_step="Remove the folder to begin again",
        ) from error


def flat(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts of a run under one name each, ``part/name``.

    Example:
        >>> import torch
        >>> flat({"model": {"bias": torch.zeros(1)}})
        {'model/bias': tensor([0.])}
    """
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def in_parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """What :func:`flat` was given; a part without tensors is empty."""
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    return parts


def check_same_run(folder: Path, began: Mapping[str, str], mine: Mapping[str, str]) -> None:
    """Refuse the checkpoint of another run.

    Raises:
        ConfigError: what is not as it was when the run began.
    """
    for what, value in mine.items():
        if began.get(what, value) != value:  # what a checkpoint of an earlier version does not tell
            raise ConfigError(
                f"a run goes on only with the {what} it began with",
                received=value,
                next_step=f"It began with {began[what]}. Remove {folder} to begin again",
            )


def start_digest(model: nn.Module) -> str:
    """A sha256 over the weights at the start, their names and which of them move, and what modules are set to.

    Two models of the same weights differ where a module's dropout, scale or the like does.
    """
    found = hashlib.sha256(str([name for name, p in model.named_parameters() if p.requires_grad]).encode())
    for name, part in model.named_modules():
        own = {key: value for key, value in vars(part).items() if isinstance(value, bool | int | float | str)}
        found.update(f"{name} {sorted((key, own[key]) for key in own if key[0] != '_' and key != 'training')}".encode())
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
