"""One domain's adapter as a directory that PEFT reads too.

adapter_config.json         PEFT's LoraConfig: ranks, scales and which layers
adapter_model.safetensors   for each adapted layer A (R, in), B (out, R) and a bias (out,)
domlora.json                the base it belongs to, and the sha256 of the two files above
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from domlora.adapters.bank import adapter_parameters, base_state, distinct_layers, load_rows_, rows_of
from domlora.adapters.lowrank import LowRankLinear
from domlora.adapters.peft import (
    BIAS,
    CONFIG,
    EXACT,
    SEAL,
    A,
    B,
    as_peft,
    check_nothing_left,
    check_one_place,
    check_part,
    check_plain,
    config_of,
    joined,
    key_of,
    scale_of,
    times,
)
from domlora.errors import BundleError, DataError
from domlora.files import new_folder

__all__ = ["adapter_digests", "base_fingerprint", "load_adapter_", "load_adapters_", "save_adapter", "write_adapter"]

_TENSORS, _FORMAT = "adapter_model.safetensors", 1


def base_fingerprint(model: nn.Module) -> str:
    """The sha256 of the base: of names, types, shapes and bytes of its parameters and buffers.

    It is the same with adapters and without, on every device. Extra state that is not a tensor does not count.

    Example:
        >>> from domlora.adapters.attach import attach_
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> plain = base_fingerprint(net)
        >>> base_fingerprint(attach_(net, num_domains=3, domain=None)) == plain
        True
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base_state(model).items()):
        if isinstance(tensor, Tensor):
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def adapter_digests(model: nn.Module) -> list[str]:
    """Of each domain's adapter a sha256 that stands for all that is written of it, the base it belongs to left out."""
    banks = [(name, bank.detach().cpu().contiguous()) for name, bank in adapter_parameters(model)]
    kinds = [[name, str(bank.dtype), list(bank.shape[1:])] for name, bank in banks]
    start = hashlib.sha256(json.dumps([config_of(model), kinds], sort_keys=True).encode())
    rows = [bank.reshape(len(bank), -1).view(torch.uint8).numpy() for _, bank in banks if bank.numel()]
    digests = []
    for domain in range(len(banks[0][1])):
        digest = start.copy()
        for each in rows:
            digest.update(each[domain].data)
        digests.append(digest.hexdigest())
    return digests


def save_adapter(
    model: nn.Module, domain: int, folder: Path, *, overwrite: bool = False, base: str | None = None
) -> None:
    """Write one domain's adapter, complete or not at all.

    ``PeftModel.from_pretrained(plain_base, folder)`` then scores as this model does for that domain. What PEFT cannot say:

    - a layer that the model has in two places is corrected in both here and in the first alone by PEFT;
    - a model that is itself an ``nn.Linear`` has a layer without a name, which PEFT never adapts;
    - a bias is there in all layers or in none: where a layer has none, zeros are written, and PEFT will not merge them
      into a base layer without a bias.

    Args:
        folder: where the directory will be.
        overwrite: replace a directory of this kind that is there.
        base: what :func:`base_fingerprint` says, if it is known already; else the whole base is read for it.

    Raises:
        UnknownDomainError: no such row in the bank.
        DataError: the adapter is not finite, the folder exists and ``overwrite`` is false, or it holds something else.

    Example:
        >>> import tempfile
        >>> from domlora.adapters.attach import attach_
        >>> net = attach_(nn.Sequential(nn.Linear(4, 2)), num_domains=3, domain=None)
        >>> with tempfile.TemporaryDirectory() as there:
        ...     save_adapter(net, 1, Path(there) / "books")
        ...     _ = load_adapter_(net, 2, Path(there) / "books")
        >>> bool((net[0].lora_A[1] == net[0].lora_A[2]).all())
        True
    """
    with new_folder(folder, overwrite=overwrite, marker=SEAL) as fresh:
        write_adapter(model, domain, fresh, base=base)


def write_adapter(model: nn.Module, domain: int, folder: Path, *, base: str | None = None) -> None:
    """As :func:`save_adapter`, but into a folder that is there: for whoever puts a whole tree in place at once."""
    rows = rows_of(model, domain)
    for bank, row in rows.items():
        if not bool(torch.isfinite(row).all()):
            raise DataError("an adapter must be finite to be written", received={"domain": domain, "bank": bank})
    config = config_of(model)
    tensors = {
        key_of(name, end): tensor.cpu().contiguous()
        for name, layer in distinct_layers(model).items()
        for end, tensor in as_peft(rows, name, layer, config["lora_bias"]).items()
    }
    files = {
        CONFIG: json.dumps(config, indent=1, sort_keys=True).encode(),
        _TENSORS: save(tensors, metadata={"format": "pt"}),  # one entry: several come in random order
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    seal = {"format": _FORMAT, "base": base or base_fingerprint(model), "files": digests}
    files[SEAL] = json.dumps(seal, indent=1, sort_keys=True).encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def load_adapter_(model: nn.Module, domain: int, folder: Path, *, base: str | None = None) -> nn.Module:
    """Read one domain's adapter into its row of every bank; other rows keep their bits.

    What :func:`save_adapter` wrote comes back bit for bit, after its base and its sha256 were checked. A directory that
    PEFT's ``save_pretrained`` wrote names no base, so that **nothing but names and shapes tells whether it belongs to this
    one**. Its scale is folded into B and the bias. Where it has a smaller rank, no bias or not the layer at all, the rest
    of B and of the bias is zero and the rest of A stays (A and B both zero would never train again).

    Args:
        folder: the directory.
        base: what :func:`base_fingerprint` says, if it is known already; else the whole base is read for it.

    Raises:
        UnknownDomainError: no such row in the bank.
        BundleError: a file is missing or damaged, belongs to another base, is not plain LoRA, or does not fit the banks;
            nothing is written then.
    """
    rows, stored = rows_of(model, domain), _read(_files_of(folder), str(folder))
    if stored.base is not None:
        _check_base(stored, base or base_fingerprint(model), str(folder))
    check_plain(stored.config)
    parts = _parts(distinct_layers(model), stored)
    for name, layer in distinct_layers(model).items():
        if parts[name] and stored.base is None:
            check_one_place(model, layer)
        _fill_(rows, name, layer, parts[name], stored.config)
    _check_finite(rows)
    return load_rows_(model, domain, rows)


def load_adapters_(model: nn.Module, adapters: Mapping[str, tuple[Mapping[str, bytes], str]]) -> nn.Module:
    """Read an adapter for each row of the banks, all rows at once, from files that :func:`write_adapter` wrote.

    Args:
        adapters: in the order of the rows, what to call each in an error, its files' contents by name, and the fingerprint
            of the base that it was written beside.

    Raises:
        BundleError: as :func:`load_adapter_`, and for files of options that the banks do not have; nothing is written then.
    """
    config, layers = config_of(model), distinct_layers(model)
    parts = []
    for name, (files, base) in adapters.items():
        stored = _read(files, name)
        _check_base(stored, base, name)
        if stored.config != config:
            raise BundleError("an adapter must have been written with the options of the model's banks", received=name)
        parts.append(_parts(layers, stored))
    banks: dict[str, Tensor] = {}
    for layer, module in layers.items():
        banks |= _banks(layer, module, [part[layer] for part in parts], config)
    _check_finite(banks)
    with torch.no_grad():
        for bank, parameter in adapter_parameters(model):
            parameter.copy_(banks[bank])
    return model


@dataclass(frozen=True, slots=True)
class _Stored:
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    base: str | None  # None: written by PEFT, which names no base


def _files_of(folder: Path) -> dict[str, bytes]:
    sealed = (folder / SEAL).exists()
    return {name: _content(folder, name) for name in (CONFIG, _TENSORS, *([SEAL] if sealed else []))}


def _read(files: Mapping[str, bytes], folder: str) -> _Stored:
    """The files' content; where ``domlora.json`` is there, or has to be, checked against it."""
    base = _checked_base(folder, files) if SEAL in files else None
    try:
        config = json.loads(files[CONFIG])
        tensors = load(files[_TENSORS])
        if not isinstance(config, dict):
            raise TypeError(f"{CONFIG} holds no object")
    except (ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise BundleError(f"the files of an adapter must be whole ({error})", received=folder) from error
    mapping = config.get("auto_mapping")
    if base is None and isinstance(mapping, dict) and "domlora" in mapping:
        raise BundleError(f"an adapter that domlora wrote must have its {SEAL}", received=folder)
    return _Stored(config, tensors, base)


def _content(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        if (folder / "adapter_model.bin").is_file():
            rule, step = "an adapter is never read from a pickle", "Save it with safe_serialization=True in PEFT"
        else:
            rule, step = f"an adapter must have a readable {name}", "Pass a folder of save_adapter or save_pretrained"
        raise BundleError(rule, received=str(folder), next_step=step) from error


def _checked_base(folder: str, files: Mapping[str, bytes]) -> str:
    """The fingerprint that ``domlora.json`` gives, after the two other files were found to be the ones it saw."""
    try:
        seal = json.loads(files[SEAL])
        if seal["format"] != _FORMAT:
            raise ValueError(f"format {seal['format']!r}, and this version reads {_FORMAT}")
        base, digests = str(seal["base"]), {name: seal["files"][name] for name in (CONFIG, _TENSORS)}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"an adapter must have a whole {SEAL} ({error!r})", received=folder) from error
    for name, digest in digests.items():
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise BundleError(f"{name} is damaged: its sha256 is not the one of {SEAL}", received=folder)
    return base


def _check_base(stored: _Stored, base: str, folder: str) -> None:
    if stored.base != base:
        raise BundleError(
            "an adapter must stand beside the base that it was trained on, and this one belongs to another base",
            received=folder,
        )


def _parts(layers: Mapping[str, LowRankLinear], stored: _Stored) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer by their ends, after they were found to fit it; none left over."""
    rest, parts = dict(stored.tensors), {}
    for name, layer in layers.items():
        part = {end: rest.pop(key_of(name, end)) for end in (A, B, BIAS, EXACT) if key_of(name, end) in rest}
        if part:
            check_part(name, layer, part)
        elif stored.base is not None:
            raise BundleError("the adapter must have every adapted layer of the model", received={"missing": name})
        parts[name] = part
    check_nothing_left(rest)
    return parts


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    damaged = [bank for bank, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if damaged:
        raise BundleError("an adapter must be finite", received=damaged[:3])


def _fill_(
    rows: dict[str, Tensor], name: str, layer: LowRankLinear, part: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Put a layer's tensors into copies of its rows, with PEFT's scale folded into B and the bias."""
    new = {bank: rows[joined(name, bank)] for bank in ("lora_B", "lora_bias") if joined(name, bank) in rows}
    for row in new.values():
        row.zero_()
    if not part:
        return
    rank = len(part[A])
    scale = scale_of(config, name, rank)
    if rank <= layer.rank:
        rows[joined(name, "lora_A")][:, :rank] = part[A].T
        new["lora_B"][:rank] = times(part[B].T, scale / layer.scale)
    if "lora_bias" in new and BIAS in part:
        new["lora_bias"].copy_(part.get(EXACT, times(part[BIAS], scale)))


def _banks(
    name: str, layer: LowRankLinear, parts: Sequence[Mapping[str, Tensor]], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The banks of a layer from what all domains have of it, as :func:`_fill_` fills a row."""
    scale = scale_of(config, name, max(layer.rank, 1))
    banks = {
        "lora_A": torch.empty_like(layer.lora_A),
        "lora_B": torch.empty_like(layer.lora_B),
    }  # of no numbers at rank 0
    if layer.rank:
        banks["lora_A"] = torch.stack([part[A] for part in parts]).mT
        banks["lora_B"] = times(torch.stack([part[B] for part in parts]).mT, scale / layer.scale)
    if layer.lora_bias is not None:
        banks["lora_bias"] = torch.stack([part.get(EXACT, times(part[BIAS], scale)) for part in parts])
    return {joined(name, bank): tensor for bank, tensor in banks.items()}
