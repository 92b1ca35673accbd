"""How many numbers a model has learned, and how many one more domain would add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from domlora.adapters.attach import attach_, options_of
from domlora.features.schema import Schema
from domlora.models.build import build_model, stored_options
from domlora.training.optimizers import parameter_groups

__all__ = ["build_on_meta", "count_parameters", "parameters_per_domain"]


def count_parameters(model: nn.Module) -> dict[str, int]:
    """``params_total``, ``params_tables`` and ``params_adapters``, frozen ones counted too."""
    groups = parameter_groups(model, frozen=True)
    sizes = {kind: sum(p.numel() for p in group) for kind, group in groups.items()}
    return {
        "params_total": sum(sizes.values()),
        "params_tables": sizes["tables"],
        "params_adapters": sizes["adapters"],
    }


def parameters_per_domain(model: nn.Module, model_options: Mapping[str, Any], schema: Schema) -> int | None:
    """How many numbers one more domain adds: the size of the same model for ``D + 1`` domains less that for ``D``.

    The domain's row of the embedding tables is not counted where the domain is a feature too: it is a value of a feature
    like any other.

    Returns:
        None for a model that ``build_model`` and ``attach_`` do not make again, whose sizes are not to be had so.
    """
    other = next(name for name in map(str, range(schema.num_domains + 1)) if name not in schema.domains)
    size = _size(model, model_options, schema)
    if size != sum(p.numel() for p in model.parameters()):
        return None
    return _size(model, model_options, replace(schema, domains=(*schema.domains, other))) - size


def _size(model: nn.Module, model_options: Mapping[str, Any], schema: Schema) -> int:
    """Numbers in a model like this one for the domains of a schema; nothing is computed or stored."""
    adapter = options_of(model)
    like = build_on_meta(model_options, schema)
    with torch.device("meta"):
        if adapter is not None:
            attach_(like, schema.num_domains, **asdict(adapter))
    return sum(p.numel() for p in like.parameters())


def build_on_meta(model_options: Mapping[str, Any], schema: Schema) -> nn.Module:
    """A model without numbers: its options are checked and its parameters have shapes.

    Raises:
        ConfigError, SchemaError: as ``build_model`` does.
    """
    with torch.device("meta"):
        return build_model(schema=schema, **stored_options(model_options))
