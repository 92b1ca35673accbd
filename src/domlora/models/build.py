"""Names to models: one dict, one function."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args, get_origin

from torch import nn

from domlora.adapters.mixture import attach_mixture_
from domlora.errors import ConfigError, nearest
from domlora.features.schema import Schema
from domlora.models.backbones import DCN, MLP, NFM, PNN, WDL, AutoInt, DeepFM, FiBiNET, XDeepFM
from domlora.models.multi_domain.clusters import AdaptDHM
from domlora.models.multi_domain.experts import PLE, MMoE, SharedBottom
from domlora.models.multi_domain.gates import AdaSparse, PEPNet
from domlora.models.multi_domain.generated import APG, HAMUR, M2M
from domlora.models.multi_domain.mixtures import M3oE, SARNet
from domlora.models.multi_domain.star import STAR
from domlora.models.parts import table_of
from domlora.models.per_domain import PerDomain, Unknown

__all__ = ["MODELS", "build_model", "stored_options"]

MODELS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "star": STAR,
    "wdl": WDL,
    "nfm": NFM,
    "autoint": AutoInt,
    "pnn": PNN,
    "dcn": DCN,
    "fibinet": FiBiNET,
    "deepfm": DeepFM,
    "xdeepfm": XDeepFM,
    "shared_bottom": SharedBottom,
    "mmoe": MMoE,
    "ple": PLE,
    "pepnet": PEPNet,
    "adasparse": AdaSparse,
    "sar_net": SARNet,
    "m2m": M2M,
    "adaptdhm": AdaptDHM,
    "hamur": HAMUR,
    "m3oe": M3oE,
    "apg": APG,
}
"""Every model by its exact key, in the order of the paper's tables."""


def build_model(
    name: str,
    schema: Schema,
    *,
    embedding_dim: int = 8,
    hidden_units: Sequence[int] = (256, 128, 64),
    dropout: float = 0.5,
    embedding_dims: Mapping[str, int] | None = None,
    pretrained: Mapping[str, Any] | None = None,
    freeze_pretrained: bool | Mapping[str, bool] = True,
    mixture: Mapping[str, Any] | None = None,
    per_domain: bool = False,
    unknown_domains: Unknown = "mean",
    **options: Any,
) -> nn.Module:
    """A fresh model for the rows of a schema.

    Names are matched exactly and options checked against the model's own signature, its type annotations included, so
    a new model needs a class and a line in ``MODELS``.

    Args:
        name: a key of ``MODELS``.
        schema: which features and domains there are.
        embedding_dim: numbers in a feature's vector; the MLoRA authors take 8 where embeddings are learned.
        hidden_units: width of each layer of the tower.
        dropout: probability to drop a unit of the tower, in [0, 1).
        embedding_dims: widths of their own by feature, such as ``{"user": 32}``; a learned map without a bias takes those
            vectors to ``embedding_dim``. Narrower for features of few values, or where memory counts.
        pretrained: given vectors ``(num_ids, width)`` by feature, of any width, in the order of its ids: absent, unknown,
            then its vocabulary. Their scale is kept; learned ones start with a standard deviation of ``init_std``. Features
            that share the ids of one with its own width or given vectors follow it and are not named.
        freeze_pretrained: keep given vectors as they are, without gradients or states of an optimizer; otherwise they are
            learned on. For some of them, ``{"item": False}``; the others are kept.
        mixture: experts and their gate, arguments of :func:`domlora.adapters.mixture.attach_mixture_`.
        per_domain: a copy of the model for each domain, see :class:`domlora.models.per_domain.PerDomain`.
        unknown_domains: with ``per_domain``, who answers for unknown domains: the ``mean`` of the copies, or a copy more,
            the ``base``.
        options: the model's own, see its class.

    Raises:
        ConfigError: a name, an option or a value that is not valid.
        SchemaError: a model of feature crosses and fewer than two categorical features.

    Example:
        >>> from domlora.features.schema import Feature
        >>> schema = Schema((Feature("user", num_ids=9), Feature("item", num_ids=5)), domains=("app", "web"))
        >>> type(build_model("xdeepfm", schema, cin_units=[16, 16])).__name__
        'XDeepFM'
        >>> build_model("dcn", schema, cross_layer=3)
        Traceback (most recent call last):
        domlora.errors.ConfigError: model 'dcn' has no such option. Received: 'cross_layer'. Did you mean 'cross_layers'? ...
    """
    if name not in MODELS:
        raise ConfigError("no model has this name", received=name, next_step=nearest(str(name), MODELS))
    _checked("per_domain", per_domain, bool)
    _checked("unknown_domains", unknown_domains, Unknown)
    if unknown_domains == "base" and not per_domain:
        raise ConfigError("unknown_domains goes with per_domain", received=unknown_domains)
    given = {"embedding_dim": embedding_dim, "hidden_units": hidden_units, "dropout": dropout, **options}
    tables = {"embedding_dims": embedding_dims, "pretrained": pretrained, "freeze_pretrained": freeze_pretrained}
    model = _plain(name, schema, given, tables)
    if mixture is not None:
        _attach_mixture_(model, schema.num_domains, mixture)
    return PerDomain(model, schema.num_domains, unknown_domains) if per_domain else model


def _attach_mixture_(model: nn.Module, num_domains: int, options: Mapping[str, Any]) -> None:
    known = set(inspect.signature(attach_mixture_).parameters) - {"model", "num_domains", "domain"}
    for key in options.keys() - known:
        raise ConfigError("mixture has no such option", received=key, next_step=nearest(key, known))
    for key in ("num_experts", *({"gate_dim"} & options.keys())):
        _checked(key, options.get(key), int)
    attach_mixture_(model, num_domains, **options)


def _plain(name: str, schema: Schema, given: Mapping[str, Any], tables: Mapping[str, Any]) -> nn.Module:
    """The model itself, its options checked against its signature."""
    known = dict(inspect.signature(MODELS[name], eval_str=True).parameters)
    makes_tables = known.pop("make_table", None) is not None
    del known["schema"]
    for key in given.keys() - known.keys():
        raise ConfigError(f"model {name!r} has no such option", received=key, next_step=nearest(key, known))
    checked = {key: _checked(key, value, known[key].annotation) for key, value in given.items()}
    own, vectors, freeze = tables["embedding_dims"] or {}, tables["pretrained"] or {}, tables["freeze_pretrained"]
    named = freeze if isinstance(freeze, Mapping) else None
    for value in [freeze] if named is None else named.values():
        _checked("freeze_pretrained", value, bool)
    if own or vectors or named:
        if not makes_tables:
            raise ConfigError(
                f"model {name!r} has no make_table, so its features have one width", received=[*own, *vectors]
            )
        checked["make_table"] = partial(table_of, embedding_dims=own, pretrained=vectors, freeze_pretrained=freeze)
    return MODELS[name](schema, **checked)


def stored_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of :func:`build_model` as JSON: of pretrained vectors the width alone, since a model's weights hold them.

    >>> import torch
    >>> stored_options({"name": "mlp", "pretrained": {"item": torch.zeros(5, 64)}})
    {'name': 'mlp', 'pretrained': {'item': 64}}
    """
    if not options.get("pretrained"):
        return dict(options)
    widths = {name: v if isinstance(v, int) else len(v[0]) for name, v in options["pretrained"].items()}
    return {**options, "pretrained": widths}


def _checked(key: str, value: Any, kind: Any) -> Any:
    """The value if it fits its annotation: sizes are positive, ``dropout`` is in [0, 1), other reals are above 0."""
    rule, holds = "", True
    if kind is bool:
        rule, holds = "must be true or false", isinstance(value, bool)
    elif kind is int:
        rule, holds = "must be a whole number of at least 1", _is_size(value)
    elif kind is float and key == "dropout":
        rule, holds = "must be at least 0 and below 1", _is_real(value) and 0 <= value < 1
    elif kind is float:
        rule, holds = "must be above 0", _is_real(value) and 0 < value < float("inf")
    elif get_origin(kind) is Literal:
        rule, holds = f"must be one of {', '.join(map(repr, get_args(kind)))}", value in get_args(kind)
    elif get_origin(kind) is Sequence:
        rule = "must be a list of whole numbers of at least 1, and not empty"
        holds = isinstance(value, Sequence) and len(value) > 0 and all(map(_is_size, value))
    if not holds:
        raise ConfigError(f"{key} {rule}", received=value)
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
