"""What every click model is put together from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domlora.errors import ConfigError, SchemaError, nearest
from domlora.features.schema import OOV_ID, PAD_ID, Feature, Schema
from domlora.layers.embedding import Field, FirstOrder, MixedEmbedding, table_for

__all__ = ["MakeTable", "fields_of", "first_order_of", "head_of", "join", "require_pairs", "scalar", "table_of"]

MakeTable = Callable[[Schema, int, float], nn.Module]
"""Makes what turns ``ids (B, S)`` into ``(B, F, E)``, of a schema, ``E`` and ``init_std``."""


def table_of(
    schema: Schema,
    embedding_dim: int,
    init_std: float,
    *,
    embedding_dims: Mapping[str, int] | None = None,
    pretrained: Mapping[str, Any] | None = None,
    freeze_pretrained: bool | Mapping[str, bool] = True,
) -> nn.Module:
    """The embeddings of a schema's categorical features: one fused table, unless widths differ or vectors are given.

    A feature that shares another's ids uses its rows, and a sequence is pooled as its feature says.

    Args:
        embedding_dims: widths of their own by feature; a learned map takes such vectors to ``embedding_dim``.
        pretrained: vectors ``(num_ids, width)`` by feature, in the order of its ids: absent, unknown, then its vocabulary.
            Copied. A width alone stands for vectors that ``load_state_dict`` will bring; until then they are NaN.
        freeze_pretrained: keep given vectors as they are; by feature, those it leaves out are kept.

    Raises:
        ConfigError: a name that is no categorical feature or one that shares, or a width or vectors that do not fit.
    """
    own, given, features = embedding_dims or {}, pretrained or {}, schema.categorical
    for key, names in (("embedding_dims", own), ("pretrained", given)):
        for name in names:
            _check_feature(key, name, features)
    for name in own.keys() & given.keys():
        raise ConfigError("pretrained vectors have their own width, so embedding_dims must leave it out", received=name)
    learned_on = _learned_on(freeze_pretrained, given)
    vectors = {place: _vectors_of(f, given[f.name]) for place, f in enumerate(features) if f.name in given}
    widths = [
        vectors[place].shape[1] if place in vectors else _width_of(f, own.get(f.name, embedding_dim))
        for place, f in enumerate(features)
    ]
    fields, trainable = fields_of(schema), [place for place, f in enumerate(features) if f.name in learned_on]
    if not vectors and all(width == embedding_dim for width in widths):
        return table_for(fields, embedding_dim, init_std)
    return MixedEmbedding(fields, widths, embedding_dim, init_std, pretrained=vectors, trainable=trainable)


def fields_of(schema: Schema) -> list[Field]:
    """What a table must know of each categorical feature.

    Example:
        >>> item, past = Feature("item", num_ids=9), Feature("past", "sequence", num_ids=9, share="item", max_length=5)
        >>> fields_of(Schema((item, past), domains=("app",)))[1]
        Field(num_ids=9, owner=0, pooling='mean', max_length=5)
    """
    places = {feature.name: place for place, feature in enumerate(schema.categorical)}
    return [
        Field(
            feature.num_ids,
            owner=None if feature.share is None else places[feature.share],
            pooling=feature.pooling if feature.kind == "sequence" else None,
            max_length=feature.max_length,
        )
        for feature in schema.categorical
    ]


def first_order_of(schema: Schema) -> FirstOrder:
    """The first-order term over all of a schema's features."""
    return FirstOrder(fields_of(schema), schema.num_dense)


def head_of(in_features: int, bias: bool = False) -> nn.Linear:
    """A Linear to one number, glorot normal; with a bias where no ``linear`` holds the global one."""
    head = nn.Linear(in_features, 1, bias=bias)
    nn.init.xavier_normal_(head.weight)
    if bias:
        nn.init.zeros_(head.bias)
    return head


def join(vectors: Tensor, dense: Tensor) -> Tensor:
    """``(B, ...)`` and ``(B, G)`` to ``(B, ... + G)``."""
    flat = vectors.flatten(1)
    return torch.cat([flat, dense], dim=1) if dense.shape[1] else flat


def scalar(column: Tensor) -> Tensor:
    """``(B, 1)`` to ``(B,)``."""
    return column.squeeze(-1)


def require_pairs(schema: Schema, name: str) -> int:
    """The number of pairs of categorical features; a model of crosses without one would be another model in disguise."""
    if schema.num_fields < 2:
        raise SchemaError(
            f"{name!r} crosses categorical features, so it needs at least 2 of them",
            received=[feature.name for feature in schema.categorical],
            next_step="Take 'mlp', 'wdl', 'dcn' or 'star', or add a categorical feature",
        )
    return schema.num_fields * (schema.num_fields - 1) // 2


def _check_feature(key: str, name: str, features: Sequence[Feature]) -> None:
    known = {feature.name: feature for feature in features}
    if name not in known:
        raise ConfigError(f"{key} must name categorical features", received=name, next_step=nearest(str(name), known))
    owner = known[name].share
    if owner is not None:
        rule = f"feature {name!r} shares the vectors of {owner!r}, so {key} must leave it out"
        raise ConfigError(rule, received=name, next_step=f"Name {owner!r} instead, which sets both")


def _learned_on(freeze: bool | Mapping[str, bool], given: Mapping[str, Any]) -> list[str]:
    """Names of the given vectors that are not frozen."""
    if not isinstance(freeze, Mapping):
        return [] if freeze else list(given)
    for name in freeze:
        if name not in given:
            raise ConfigError(
                "freeze_pretrained must name features with pretrained vectors",
                received=name,
                next_step=nearest(str(name), given),
            )
    return [name for name, frozen in freeze.items() if not frozen]


def _width_of(feature: Feature, width: Any) -> int:
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        rule = f"the width of feature {feature.name!r} must be a whole number of at least 1"
        raise ConfigError(rule, received=width)
    return width


def _vectors_of(feature: Feature, given: Any) -> Tensor:
    if isinstance(given, int):
        return torch.full((feature.num_ids, _width_of(feature, given)), torch.nan)
    try:
        vectors = torch.as_tensor(given).to(torch.get_default_dtype(), copy=True)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError("pretrained vectors must be a tensor or an array", received=type(given).__name__) from None
    if vectors.dim() != 2 or len(vectors) != feature.num_ids or not vectors.shape[1]:
        raise ConfigError(
            f"feature {feature.name!r} has {feature.num_ids} ids, so its vectors must be ({feature.num_ids}, width)",
            received=tuple(vectors.shape),
            next_step=f"Rows {PAD_ID} and {OOV_ID} are for an absent and an unknown value, the others for its vocabulary",
        )
    if not vectors.isfinite().all():
        raise ConfigError(f"the vectors of feature {feature.name!r} must be finite", received="NaN or infinite numbers")
    return vectors
