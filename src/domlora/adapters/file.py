"""One domain's adapter as a directory that PEFT reads too.

    adapter_config.json         PEFT's LoraConfig: ranks, scales and which layers
    adapter_model.safetensors   for each adapted layer A (R, in), B (out, R) and a bias (out,)
    domlora.json                the base it belongs to, and the sha256 of the two files above

PEFT adds ``scale (B A x + bias)`` to a layer. It multiplies the bias too, so what is written is ``c / scale``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from domlora.adapters.bank import adapter_layers, base_state, distinct_layers, load_rows_, rows_of
from domlora.adapters.lowrank import LowRankLinear
from domlora.errors import BundleError, DataError
from domlora.files import new_folder

__all__ = ["base_fingerprint", "load_adapter_", "save_adapter", "write_adapter"]

_CONFIG, _TENSORS, _SEAL, _FORMAT = "adapter_config.json", "adapter_model.safetensors", "domlora.json", 1
_A, _B, _BIAS, _EXACT = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_bias"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Settings of a LoraConfig that do not change what a trained adapter computes.
_FREE = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # ways to start, see init_lora_weights
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
_PLAIN = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica")}
_WHY = {
    "alora_invocation_tokens": "it acts on some tokens only",
    "bias": "it changes biases of the base",
    "init_lora_weights": "it was trained beside a base that this start had changed",
    "layer_replication": "it changes the layers of the base",
    "modules_to_save": "it replaces whole layers of the base",
    "target_parameters": "it corrects parameters outside of linear layers",
    "trainable_token_indices": "it changes rows of an embedding",
    "use_dora": "DoRA rescales the weights of the base",
    "use_qalora": "it pools the inputs of a layer",
}


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
    with new_folder(folder, overwrite=overwrite, marker=_SEAL) as fresh:
        write_adapter(model, domain, fresh, base=base)


def write_adapter(model: nn.Module, domain: int, folder: Path, *, base: str | None = None) -> None:
    """As :func:`save_adapter`, but into a folder that is there: for whoever puts a whole tree in place at once."""
    rows = rows_of(model, domain)
    for bank, row in rows.items():
        if not bool(torch.isfinite(row).all()):
            raise DataError("an adapter must be finite to be written", received={"domain": domain, "bank": bank})
    config = _config(model)
    tensors = {
        _key(name, end): tensor.cpu().contiguous()
        for name, layer in distinct_layers(model).items()
        for end, tensor in _as_peft(rows, name, layer, config["lora_bias"]).items()
    }
    files = {
        _CONFIG: json.dumps(config, indent=1, sort_keys=True).encode(),
        _TENSORS: save(tensors, metadata={"format": "pt"}),  # one entry: several come in random order
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    seal = {"format": _FORMAT, "base": base or base_fingerprint(model), "files": digests}
    files[_SEAL] = json.dumps(seal, indent=1, sort_keys=True).encode()
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
    rows, stored = rows_of(model, domain), _read(folder)
    if stored.base is not None and stored.base != (base or base_fingerprint(model)):
        raise BundleError(
            "an adapter must stand beside the base that it was trained on, and this one belongs to another base",
            received=str(folder),
        )
    _check_plain(stored.config)
    rest = dict(stored.tensors)
    for name, layer in distinct_layers(model).items():
        part = {end: rest.pop(_key(name, end)) for end in (_A, _B, _BIAS, _EXACT) if _key(name, end) in rest}
        if part:
            _check_part(name, layer, part)
        elif stored.base is not None:
            raise BundleError("the adapter must have every adapted layer of the model", received={"missing": name})
        if part and stored.base is None:
            _check_one_place(model, layer)
        _fill_(rows, name, layer, part, stored.config)
    _check_nothing_left(rest)
    damaged = [bank for bank, row in rows.items() if not bool(torch.isfinite(row).all())]
    if damaged:
        raise BundleError("an adapter must be finite", received=damaged[:3])
    return load_rows_(model, domain, rows)


@dataclass(frozen=True, slots=True)
class _Stored:
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    base: str | None  # None: written by PEFT, which names no base


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _key(name: str, end: str) -> str:
    return _joined("domlora" if end == _EXACT else "base_model.model", name, end)


def _as_peft(rows: Mapping[str, Tensor], name: str, layer: LowRankLinear, lora_bias: bool) -> dict[str, Tensor]:
    """A layer's row as PEFT has it; PEFT knows no rank 0, so that becomes a rank 1 of zeros."""
    like = layer.lora_A.detach()
    if layer.rank:
        part = {_A: rows[_joined(name, "lora_A")].T, _B: rows[_joined(name, "lora_B")].T}
    else:
        part = {_A: like.new_zeros(1, layer.in_features), _B: like.new_zeros(layer.out_features, 1)}
    if layer.lora_bias is not None:
        bias, scale = rows[_joined(name, "lora_bias")], _alpha(layer) / max(layer.rank, 1)
        part[_BIAS] = bias / scale
        if not torch.equal(_times(part[_BIAS], scale).to(bias.dtype), bias):  # PEFT ignores this copy, we read it
            part[_EXACT] = bias
    elif lora_bias:
        part[_BIAS] = like.new_zeros(layer.out_features)
    return part


def _config(model: nn.Module) -> dict[str, Any]:
    """A LoraConfig that names every layer in full and gives it its own rank and scale."""
    layers = distinct_layers(model)
    ranks = {name: max(layer.rank, 1) for name, layer in layers.items()}
    alphas = {name: _alpha(layer) for name, layer in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    kind = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {**kind, "domlora": _SEAL},  # PEFT writes its own when it saves, and with that takes ours off
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "target_modules": _targets(model, list(layers)),
        "lora_bias": any(layer.lora_bias is not None for layer in layers.values()),
        "bias": "none",
    }


def _alpha(layer: LowRankLinear) -> float:
    """PEFT's scale is ``lora_alpha / r``; the whole number where one gives our scale exactly."""
    rank = max(layer.rank, 1)
    alpha = layer.scale * rank
    return round(alpha) if round(alpha) / rank == layer.scale else alpha


def _targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """The layers' names, or a pattern of them where PEFT, which compares ends of names, would find more than these."""
    ends = tuple(f".{name}" for name in names)
    others = (name for name, _ in model.named_modules() if name not in names)
    if any(name.endswith(ends) for name in others):
        return f"(?:{'|'.join(map(re.escape, names))})"
    return names


def _read(folder: Path) -> _Stored:
    """The folder's content; where ``domlora.json`` is there, or has to be, checked against it."""
    files = {name: _content(folder, name) for name in (_CONFIG, _TENSORS)}
    base = _checked_base(folder, files) if (folder / _SEAL).exists() else None
    try:
        config = json.loads(files[_CONFIG])
        tensors = load(files[_TENSORS])
        if not isinstance(config, dict):
            raise TypeError(f"{_CONFIG} holds no object")
    except (ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise BundleError(f"the files of an adapter must be whole ({error})", received=str(folder)) from error
    mapping = config.get("auto_mapping")
    if base is None and isinstance(mapping, dict) and "domlora" in mapping:
        raise BundleError(f"an adapter that domlora wrote must have its {_SEAL}", received=str(folder))
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


def _checked_base(folder: Path, files: Mapping[str, bytes]) -> str:
    """The fingerprint that ``domlora.json`` gives, after the two other files were found to be the ones it saw."""
    content = _content(folder, _SEAL)
    try:
        seal = json.loads(content)
        if seal["format"] != _FORMAT:
            raise ValueError(f"format {seal['format']!r}, and this version reads {_FORMAT}")
        base, digests = str(seal["base"]), {name: seal["files"][name] for name in files}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"an adapter must have a whole {_SEAL} ({error!r})", received=str(folder)) from error
    for name, bits in files.items():
        if hashlib.sha256(bits).hexdigest() != digests[name]:
            raise BundleError(f"{name} is damaged: its sha256 is not the one of {_SEAL}", received=str(folder))
    return base


def _check_plain(config: Mapping[str, Any]) -> None:
    """Refuse whatever is not ``W + scale B A`` on linear layers, and settings that this reader does not know."""
    if config.get("peft_type") != "LORA":
        raise BundleError("an adapter must have peft_type LORA", received=config.get("peft_type"))
    for key, value in config.items():
        if key in _FREE or (value in _PLAIN[key] if key in _PLAIN else not value):
            continue
        raise BundleError(
            f"an adapter must be plain LoRA: {_WHY.get(key, 'this setting is not known here')}", received={key: value}
        )


def _check_part(name: str, layer: LowRankLinear, part: Mapping[str, Tensor]) -> None:
    """Refuse tensors of one layer that do not fit it."""
    shapes = {end: tuple(tensor.shape) for end, tensor in part.items()}
    rank = shapes[_A][0] if len(shapes.get(_A, ())) == 2 else 0
    bias = (layer.out_features,)
    want = {_A: (rank, layer.in_features), _B: (layer.out_features, rank), _BIAS: bias, _EXACT: bias}
    if not {_A, _B} <= part.keys() or not rank or any(shape != want[end] for end, shape in shapes.items()):
        raise BundleError(
            f"the tensors of layer {name!r} must fit it, {layer.in_features} to {layer.out_features}", received=shapes
        )
    for end, tensor in part.items():
        if tensor.dtype not in (*_FLOATS, layer.lora_A.dtype):
            raise BundleError(f"{_key(name, end)} must hold floats of 16 or 32 bits", received=str(tensor.dtype))
    if rank > layer.rank and bool(part[_A].any()) and bool(part[_B].any()):  # zeros add nothing, whatever their rank
        raise BundleError(
            f"layer {name!r} has rank {layer.rank} here, and the adapter needs more",
            received=rank,
            next_step=f"Attach with rank={rank} or with a lower temperature",
        )
    if layer.lora_bias is None and _BIAS in part and bool(part[_BIAS].any()):
        raise BundleError(
            f"layer {name!r} has no bias for each domain here, and the adapter has one", received=_key(name, _BIAS)
        )


def _check_one_place(model: nn.Module, layer: LowRankLinear) -> None:
    """PEFT corrects the first place of a layer; a block that is used twice is one place with two names."""
    names = [name for name, each in adapter_layers(model).items() if each is layer]
    parents = {(id(model.get_submodule(parent)), leaf) for parent, _, leaf in (name.rpartition(".") for name in names)}
    if len(parents) > 1:
        raise BundleError("PEFT corrects a layer in one place alone, and here it has several", received=names)


def _fill_(
    rows: dict[str, Tensor], name: str, layer: LowRankLinear, part: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Put a layer's tensors into copies of its rows, with PEFT's scale folded into B and the bias."""
    new = {bank: rows[_joined(name, bank)] for bank in ("lora_B", "lora_bias") if _joined(name, bank) in rows}
    for row in new.values():
        row.zero_()
    if not part:
        return
    rank = len(part[_A])
    scale = _scale(config, name, rank)
    if rank <= layer.rank:
        rows[_joined(name, "lora_A")][:, :rank] = part[_A].T
        new["lora_B"][:rank] = _times(part[_B].T, scale / layer.scale)
    if "lora_bias" in new and _BIAS in part:
        new["lora_bias"].copy_(part.get(_EXACT, _times(part[_BIAS], scale)))


def _times(tensor: Tensor, factor: float) -> Tensor:
    """In 32 bits at least, so that a factor costs a 16-bit tensor nothing."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies a layer's correction by."""
    try:
        declared = _matched(config.get("rank_pattern"), name, config.get("r", 8))
        alpha = float(_matched(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
        if declared != rank or not math.isfinite(alpha):
            raise ValueError(f"rank {declared} and alpha {alpha} for tensors of rank {rank}")
    except (AttributeError, TypeError, ValueError, ArithmeticError, re.error) as error:
        raise BundleError(f"{_CONFIG} must give each layer its rank and scale ({error})", received=name) from error
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matched(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that fits a layer's name or the end of it, as PEFT's ``get_pattern_key`` finds it."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def _check_nothing_left(rest: Collection[str]) -> None:
    if not rest:
        return
    what = "embeddings" if any("lora_embedding" in key for key in rest) else "layers without an adapter here"
    raise BundleError(
        f"each tensor of an adapter must belong to an adapted linear layer of the model, and some are of {what}",
        received=sorted(rest)[:3],
        next_step="Attach to all layers that the adapter corrects (include=...)",
    )
