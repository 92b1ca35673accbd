"""What every click model is put together from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from domlora.errors import SchemaError
from domlora.features.schema import Schema
from domlora.layers.embedding import EmbeddingTable, FirstOrder

__all__ = ["first_order_of", "head_of", "join", "require_pairs", "scalar", "table_of"]


def table_of(schema: Schema, embedding_dim: int, init_std: float) -> EmbeddingTable:
    """The embeddings of a schema's categorical features."""
    return EmbeddingTable([feature.num_ids for feature in schema.categorical], embedding_dim, init_std)


def first_order_of(schema: Schema) -> FirstOrder:
    """The first-order term over all of a schema's features."""
    return FirstOrder([feature.num_ids for feature in schema.categorical], schema.num_dense)


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
    if schema.num_slots < 2:
        raise SchemaError(
            f"{name!r} crosses categorical features, so it needs at least 2 of them",
            received=[feature.name for feature in schema.categorical],
            next_step="Take 'mlp', 'wdl', 'dcn' or 'star', or add a categorical feature",
        )
    return schema.num_slots * (schema.num_slots - 1) // 2
