"""The same model for a vocabulary that has grown: tables of all features stand one after the other, so rows move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from domlora.adapters.attach import attach_, options_of
from domlora.adapters.bank import adapter_parameters, base_state
from domlora.errors import SchemaError
from domlora.features.schema import OOV_ID, Schema
from domlora.layers.embedding import EmbeddingTable, MixedEmbedding
from domlora.layers.experts import DomainEmbedding
from domlora.models.build import build_model

__all__ = ["Piece", "grown", "pieces_of"]


class Piece(NamedTuple):
    """Rows ``old : old + length`` of a table are rows ``new : new + length`` of the grown one."""

    old: int
    new: int
    length: int


def pieces_of(old: nn.Module, new: nn.Module) -> dict[str, list[Piece]]:
    """Where the rows of each embedding table went: one piece a feature that has rows of its own, as long as in the shorter.

    Args:
        old, new: one model before and after its schema grew, or the other way round; with adapters or without.

    Returns:
        By parameter, as :func:`domlora.adapters.bank.base_state` names it.

    Raises:
        SchemaError: the two have not the same tables of the same features.
    """
    tables, others = _tables(old), _tables(new)
    if tables.keys() != others.keys():
        raise SchemaError("a grown model must have the tables of the old one", received=sorted(others))
    found = {}
    for name, table in tables.items():
        before, after = list(pairwise(_bounds(table))), list(pairwise(_bounds(others[name])))
        if len(before) != len(after):
            raise SchemaError("a grown table must have the features of the old one", received=name)
        found[name] = [
            Piece(start, to, min(end - start, to_end - to))
            for (start, end), (to, to_end) in zip(before, after, strict=True)
        ]
    return found


def grown(model: nn.Module, model_options: Mapping[str, Any], old: Schema, new: Schema) -> nn.Module:
    """The same model for a schema with more ids, or more domains.

    Old rows, all other weights and all adapters keep their bits. The row of a new id starts as that of its feature's
    out-of-vocabulary id, so that it is scored as before until it is trained; but where ``model_options`` give pretrained
    vectors for the new schema, those of new ids are taken from there. A new domain's adapter is a fresh one.

    Args:
        model: built for ``old``; not changed.
        model_options: ``name`` and what ``build_model`` was given.
        new: ``old`` with more ids at the ends of its features and more domains at the end.

    Raises:
        SchemaError: the model has weights of each domain beside its adapters, and domains were added; or a feature has fewer
            ids than before.

    Example:
        >>> from domlora.features.schema import Feature
        >>> old, new = (Schema((Feature("item", num_ids=n),), domains=("app", "web")) for n in (4, 6))
        >>> options = {"name": "mlp", "hidden_units": [8]}
        >>> model = build_model(schema=old, **options)
        >>> ids, none, domain = torch.tensor([[3]]), torch.zeros(1, 0), torch.tensor([1])
        >>> bool(model.eval()(ids, none, domain) == grown(model, options, old, new).eval()(ids, none, domain))
        True
    """
    fewer = [one.name for one, two in zip(old.features, new.features, strict=False) if two.num_ids < one.num_ids]
    if fewer or len(new.features) != len(old.features) or new.num_domains < old.num_domains:
        raise SchemaError(
            "a grown schema must have the features of the old one and no id or domain less", received=fewer
        )
    larger = build_model(schema=new, **model_options)
    state, fresh = base_state(model), base_state(larger)
    if state.keys() != fresh.keys():
        raise _no_room(old, new, sorted(state.keys() ^ fresh.keys())[:3])
    pieces = pieces_of(model, larger)
    given = _given(larger, model_options)
    for name, tensor in fresh.items():
        if name in pieces:
            tensor.copy_(_rows(state[name], tensor, pieces[name], keep_new=name in given))
        elif tensor.shape == state[name].shape:
            tensor.copy_(state[name])
        else:
            raise _no_room(old, new, {name: (tuple(state[name].shape), tuple(tensor.shape))})
    adapter = options_of(model)
    if adapter is not None:
        attach_(larger, new.num_domains, **asdict(adapter))
        _copy_adapters_(model, larger)
    return larger.train(model.training)


def _rows(old: Tensor, built: Tensor, pieces: list[Piece], *, keep_new: bool) -> Tensor:
    """The grown table: old rows where they went, and new ones behind them."""
    table = built.clone()
    ends = [piece.new for piece in pieces[1:]] + [len(built)]
    for piece, end in zip(pieces, ends, strict=True):
        table[piece.new : piece.new + piece.length] = old[piece.old : piece.old + piece.length]
        if not keep_new:
            table[piece.new + piece.length : end] = old[piece.old + OOV_ID]
    return table


def _tables(model: nn.Module) -> dict[str, EmbeddingTable]:
    """By their parameter; vectors of domains are none of them, since their rows do not belong to ids."""
    return {
        f"{name}.weight": part
        for name, part in model.named_modules()
        if isinstance(part, EmbeddingTable) and not isinstance(part, DomainEmbedding)
    }


def _bounds(table: EmbeddingTable) -> list[int]:
    """Where the rows of each feature that has some begin, and where the last end."""
    return [*sorted(set(table.offsets.tolist())), len(table.weight)] if len(table.offsets) else [0]


def _given(model: nn.Module, model_options: Mapping[str, Any]) -> set[str]:
    """Tables whose vectors the options give."""
    vectors = [v for v in (model_options.get("pretrained") or {}).values() if not isinstance(v, int)]
    if not vectors:
        return set()
    mixed = {name: part for name, part in model.named_modules() if isinstance(part, MixedEmbedding)}
    return {
        f"{name}.tables.{number}.weight"
        for name, part in mixed.items()
        for number in range(len(part.tables) - part.num_given, len(part.tables))
    }


def _copy_adapters_(model: nn.Module, larger: nn.Module) -> None:
    banks = dict(adapter_parameters(larger))
    with torch.no_grad():
        for name, bank in adapter_parameters(model):
            banks[name][: len(bank)] = bank


def _no_room(old: Schema, new: Schema, received: object) -> SchemaError:
    """A model holds weights of each domain, as layers of them or as copies of itself."""
    more = new.num_domains - old.num_domains
    return SchemaError(
        f"a model with weights of each domain beside its adapters cannot take {more} more domains",
        received=received,
        next_step="Train it anew on all domains, or use a backbone with adapters",
    )
