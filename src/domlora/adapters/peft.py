"""A layer's adapter and its settings in PEFT's words, and what of PEFT's this library can stand for.

PEFT adds ``scale (B A x + bias)`` to a layer. It multiplies the bias too, so what is written is ``c / scale``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from domlora.adapters.bank import adapter_layers, distinct_layers
from domlora.adapters.lowrank import LowRankLinear
from domlora.errors import BundleError

__all__ = [
    "BIAS",
    "CONFIG",
    "EXACT",
    "SEAL",
    "A",
    "B",
    "as_peft",
    "check_nothing_left",
    "check_one_place",
    "check_part",
    "check_plain",
    "config_of",
    "joined",
    "key_of",
    "scale_of",
    "times",
]

CONFIG, SEAL = "adapter_config.json", "domlora.json"
A, B, BIAS, EXACT = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_bias"
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


def joined(*parts: str) -> str:
    """A name from its parts; that of the root is empty."""
    return ".".join(part for part in parts if part)


def key_of(name: str, end: str) -> str:
    """What a tensor of a layer is called in the file."""
    return joined("domlora" if end == EXACT else "base_model.model", name, end)


def as_peft(rows: Mapping[str, Tensor], name: str, layer: LowRankLinear, lora_bias: bool) -> dict[str, Tensor]:
    """A layer's row as PEFT has it; PEFT knows no rank 0, so that becomes a rank 1 of zeros."""
    like = layer.lora_A.detach()
    if layer.rank:
        part = {A: rows[joined(name, "lora_A")].T, B: rows[joined(name, "lora_B")].T}
    else:
        part = {A: like.new_zeros(1, layer.in_features), B: like.new_zeros(layer.out_features, 1)}
    if layer.lora_bias is not None:
        bias, scale = rows[joined(name, "lora_bias")], _alpha(layer) / max(layer.rank, 1)
        part[BIAS] = bias / scale
        if not torch.equal(times(part[BIAS], scale).to(bias.dtype), bias):  # PEFT ignores this copy, we read it
            part[EXACT] = bias
    elif lora_bias:
        part[BIAS] = like.new_zeros(layer.out_features)
    return part


def config_of(model: nn.Module) -> dict[str, Any]:
    """A LoraConfig that names every layer in full and gives it its own rank and scale."""
    layers = distinct_layers(model)
    ranks = {name: max(layer.rank, 1) for name, layer in layers.items()}
    alphas = {name: _alpha(layer) for name, layer in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    kind = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {**kind, "domlora": SEAL},  # PEFT writes its own when it saves, and with that takes ours off
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


def check_plain(config: Mapping[str, Any]) -> None:
    """Refuse whatever is not ``W + scale B A`` on linear layers, and settings that this reader does not know."""
    if config.get("peft_type") != "LORA":
        raise BundleError("an adapter must have peft_type LORA", received=config.get("peft_type"))
    for key, value in config.items():
        if key in _FREE or (value in _PLAIN[key] if key in _PLAIN else not value):
            continue
        raise BundleError(
            f"an adapter must be plain LoRA: {_WHY.get(key, 'this setting is not known here')}", received={key: value}
        )


def check_part(name: str, layer: LowRankLinear, part: Mapping[str, Tensor]) -> None:
    """Refuse tensors of one layer that do not fit it."""
    shapes = {end: tuple(tensor.shape) for end, tensor in part.items()}
    rank = shapes[A][0] if len(shapes.get(A, ())) == 2 else 0
    bias = (layer.out_features,)
    want = {A: (rank, layer.in_features), B: (layer.out_features, rank), BIAS: bias, EXACT: bias}
    if not {A, B} <= part.keys() or not rank or any(shape != want[end] for end, shape in shapes.items()):
        raise BundleError(
            f"the tensors of layer {name!r} must fit it, {layer.in_features} to {layer.out_features}", received=shapes
        )
    for end, tensor in part.items():
        if tensor.dtype not in (*_FLOATS, layer.lora_A.dtype):
            raise BundleError(f"{key_of(name, end)} must hold floats of 16 or 32 bits", received=str(tensor.dtype))
    if rank > layer.rank and bool(part[A].any()) and bool(part[B].any()):  # zeros add nothing, whatever their rank
        raise BundleError(
            f"layer {name!r} has rank {layer.rank} here, and the adapter needs more",
            received=rank,
            next_step=f"Attach with rank={rank} or with a lower temperature",
        )
    if layer.lora_bias is None and BIAS in part and bool(part[BIAS].any()):
        raise BundleError(
            f"layer {name!r} has no bias for each domain here, and the adapter has one", received=key_of(name, BIAS)
        )


def check_one_place(model: nn.Module, layer: LowRankLinear) -> None:
    """PEFT corrects the first place of a layer; a block that is used twice is one place with two names."""
    names = [name for name, each in adapter_layers(model).items() if each is layer]
    parents = {(id(model.get_submodule(parent)), leaf) for parent, _, leaf in (name.rpartition(".") for name in names)}
    if len(parents) > 1:
        raise BundleError("PEFT corrects a layer in one place alone, and here it has several", received=names)


def times(tensor: Tensor, factor: float) -> Tensor:
    """In 32 bits at least, so that a factor costs a 16-bit tensor nothing."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor


def scale_of(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies a layer's correction by."""
    try:
        declared = _matched(config.get("rank_pattern"), name, config.get("r", 8))
        alpha = float(_matched(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
        if declared != rank or not math.isfinite(alpha):
            raise ValueError(f"rank {declared} and alpha {alpha} for tensors of rank {rank}")
    except (AttributeError, TypeError, ValueError, ArithmeticError, re.error) as error:
        raise BundleError(f"{CONFIG} must give each layer its rank and scale ({error})", received=name) from error
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matched(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that fits a layer's name or the end of it, as PEFT's ``get_pattern_key`` finds it."""
    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, default)


def check_nothing_left(rest: Collection[str]) -> None:
    """Refuse tensors that no adapted layer took."""
    if not rest:
        return
    what = "embeddings" if any("lora_embedding" in key for key in rest) else "layers without an adapter here"
    raise BundleError(
        f"each tensor of an adapter must belong to an adapted linear layer of the model, and some are of {what}",
        received=sorted(rest)[:3],
        next_step="Attach to all layers that the adapter corrects (include=...)",
    )
