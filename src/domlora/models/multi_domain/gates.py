"""One tower whose inputs and units are scaled for each row, by what its domain and its ids say.

A domain adds a vector of ``embedding_dim`` numbers and nothing else, so these models cost the same for ten domains and for a
thousand, and need no grouping of rows. A row of domain -1 uses the mean of all domains' vectors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domlora.errors import ConfigError, nearest
from domlora.features.schema import Schema
from domlora.layers.dropout import relu_dropout
from domlora.layers.experts import DomainEmbedding, GateUnit, linear_of
from domlora.layers.mlp import MLP
from domlora.models.parts import MakeTable, head_of, join, scalar, table_of

__all__ = ["AdaSparse", "PEPNet"]


class PEPNet(nn.Module):
    """Embeddings scaled by what the domain says, hidden units by what a row's ids say.

    With ``x`` the embedded features and dense columns, ``e_d`` the domain's vector, ``p`` the embedded priors, ``sg`` the
    identity without a gradient and ``gate(z) = 2 sigmoid(relu(z W + b) W' + b')``:

    - EPNet: ``o = gate_0([e_d, sg(x)]) ⊙ x``
    - PPNet: ``h_i = gate_i([p, sg(o)]) ⊙ dropout(relu(h_{i-1} W_i + b_i))``, with ``h_0 = o``

    and ``logit = head(h)``. Gates start near one: glorot normal weights, biases at zero.

    **Args**: as the backbones; ``gate_units``, the width between a gate's two layers; ``priors``, names of features of ids
    whose vectors PPNet reads with their gradient. By default those of kind ``categorical``; the paper takes ids and
    profiles of the user, the item and its author. With none, PPNet reads ``sg(o)`` alone.

    Raises:
        ConfigError: a prior that is no feature of ids.

    Source: Chang et al. 2023, "PEPNet: Parameter and Embedding Personalized Network for Infusing with Personalized Prior
    Information". Intended differences: one task, so one tower; the domain's side is its id alone, without statistics of
    the domain; each hidden layer's output is scaled, as in FuxiCTR's PPNet, and the tower's input by EPNet alone; dropout
    and start as in every other model.
    """

    places: Tensor

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int,
        hidden_units: Sequence[int],
        dropout: float,
        init_std: float = 0.01,
        make_table: MakeTable = table_of,
        gate_units: int = 64,
        priors: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        places = _places_of(schema, priors)
        width = schema.num_fields * embedding_dim + schema.num_dense
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.domain_embedding = DomainEmbedding(schema.num_domains, embedding_dim, init_std)
        self.embedding_gate = GateUnit(embedding_dim + width, gate_units, width)
        self.tower = MLP(width, hidden_units, dropout)
        prior_width = len(places) * embedding_dim + width
        self.unit_gates = nn.ModuleList(GateUnit(prior_width, gate_units, units) for units in hidden_units)
        self.head = head_of(self.tower.out_features, bias=True)
        self.register_buffer("places", torch.tensor(places, dtype=torch.int64), persistent=False)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        vectors = self.embedding(ids)  # (B, F, E)
        x = join(vectors, dense)
        h = x * self.embedding_gate(torch.cat([self.domain_embedding(domain), x.detach()], dim=1))
        prior = torch.cat([vectors.index_select(1, self.places).flatten(1), h.detach()], dim=1)
        for layer, gate in zip(self.tower, self.unit_gates, strict=True):
            h = relu_dropout(layer(h), self.tower.dropout, self.training) * gate(prior)
        return scalar(self.head(h))


class AdaSparse(nn.Module):
    """Hidden units weighted, or switched off, by what the domain and the units themselves say.

    ``h_i = u ⊙ π`` with ``u = dropout(relu(h_{i-1} W_i + b_i))``, ``v = [e_d, u] P_i + p_i``, the domain's vector ``e_d``,
    and a factor ``π`` by ``variant``:

    - ``binarization``: 1 where ``sigmoid(alpha v) > epsilon``, else 0. Its gradient is that of the sigmoid.
    - ``scaling``: ``beta sigmoid(v)``
    - ``fusion``: ``beta sigmoid(alpha v)`` where that is above ``epsilon``, else 0

    ``logit = head(h)``. Pruners ``P_i`` start glorot normal and ``p_i`` at zero: with ``beta`` 2, factors start near one.

    **Args**: as the backbones; ``variant``; ``alpha``, steepness of the sigmoid; ``beta``, the largest factor;
    ``epsilon``, up to which a unit is off.

    Raises:
        ConfigError: an ``epsilon`` that switches every unit off.

    Source: Yang et al. 2022, "AdaSparse: Learning Adaptively Sparse Structures for Multi-Domain Click-Through Rate
    Prediction": the domain-aware pruner and its three kinds of weighting factors. Intended differences: no sparsity
    regularisation, which draws the share of units that are off into a chosen range (a model here gives logits and no
    loss), so that the share is what the click loss makes of it; ``alpha`` stays as set, theirs grows in training; the
    domain's side is its id alone; dropout and start as in every other model. Not checked against the paper: a pruner reads
    and weighs its layer's output, as in Scenario-Wise-Rec, which prunes the input too; ``alpha``, ``beta`` and
    ``epsilon`` are those of SATrans's code; the gradient of ``binarization`` is our choice.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        embedding_dim: int,
        hidden_units: Sequence[int],
        dropout: float,
        init_std: float = 0.01,
        make_table: MakeTable = table_of,
        variant: Literal["binarization", "scaling", "fusion"] = "fusion",
        alpha: float = 1.0,
        beta: float = 2.0,
        epsilon: float = 0.25,
    ) -> None:
        super().__init__()
        if epsilon >= {"binarization": 1.0, "scaling": float("inf"), "fusion": beta}[variant]:
            raise ConfigError("epsilon must be below the largest factor, or every unit is off", received=epsilon)
        self.variant, self.alpha, self.beta, self.epsilon = variant, alpha, beta, epsilon
        width = schema.num_fields * embedding_dim + schema.num_dense
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.domain_embedding = DomainEmbedding(schema.num_domains, embedding_dim, init_std)
        self.tower = MLP(width, hidden_units, dropout)
        self.pruners = nn.ModuleList(linear_of(embedding_dim + units, units) for units in hidden_units)
        self.head = head_of(self.tower.out_features, bias=True)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        h, of_domain = join(self.embedding(ids), dense), self.domain_embedding(domain)
        for layer, pruner in zip(self.tower, self.pruners, strict=True):
            units = relu_dropout(layer(h), self.tower.dropout, self.training)
            h = units * self._factor(pruner(torch.cat([of_domain, units], dim=1)))
        return scalar(self.head(h))

    def _factor(self, v: Tensor) -> Tensor:
        if self.variant == "scaling":
            return self.beta * torch.sigmoid(v)
        soft = torch.sigmoid(self.alpha * v)
        if self.variant == "binarization":
            return soft + ((soft > self.epsilon).to(soft) - soft).detach()
        return F.threshold(self.beta * soft, self.epsilon, 0.0)


def _places_of(schema: Schema, priors: Collection[str] | None) -> list[int]:
    """The places of the priors among the features of ids."""
    names = [feature.name for feature in schema.categorical]
    if priors is None:
        return [place for place, feature in enumerate(schema.categorical) if feature.kind == "categorical"]
    if isinstance(priors, str):
        raise ConfigError("priors must be a list of names of features", received=priors)
    for name in priors:
        if name not in names:
            raise ConfigError("priors must name features of ids", received=name, next_step=nearest(str(name), names))
    return [place for place, name in enumerate(names) if name in priors]
