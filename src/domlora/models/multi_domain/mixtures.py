"""Experts for all domains beside experts of each domain's own, and what a domain makes of its input before they read it.

A row of domain -1 uses the mean over domains of whatever a domain has of its own; all domains start from one draw, so that
this mean is a network from the start.

The grouping of the rows lives in one cell that all layers read, so one eager model must not be called from two threads at
once. Under ``torch.compile`` and ``torch.export`` each row gathers its domain's weights: exact, for any batch, but meant for
the small batches of serving.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domlora.features.schema import Schema
from domlora.layers.domain_linear import DomainLinear, DomainRows, StarLinear
from domlora.layers.dropout import relu_dropout
from domlora.layers.experts import DomainEmbedding, DomainMLP, Experts, domain_linear, linear_of, mixture
from domlora.layers.mlp import MLP
from domlora.models.parts import MakeTable, head_of, join, scalar, table_of

__all__ = ["M3oE", "SARNet"]


class SARNet(nn.Module):
    """Features weighed by the domain, shifted and scaled by it, then experts for all and of the domain's own.

    For a row of domain ``d`` with features ``x_f`` and the domain's vector ``z_d``:

    - attention: ``x_f <- F softmax_f(relu([x_f, z_d, x_f ⊙ z_d] Q + q) · v) x_f``, weights of mean one
    - transform: ``u = (1 + β_d) ⊙ [x, dense] + γ_d``
    - experts: ``e = [own_{d,1}(u), ..., own_{d,m}(u), shared_1(u), ..., shared_n(u)]``, an own one being
      ``dropout(relu(u W_d + b_d))``
    - gate: ``logit = head(sum_k softmax(u G_d + g_d)_k e_k)``

    ``β`` and ``γ`` start at zero, domains' vectors at spread ``init_std``, and what else is a domain's own as in this
    module's text.

    **Args**: as the backbones, where ``hidden_units`` are those of each shared expert, ``tower.<k>``; ``num_experts`` shared
    by all; ``num_own_experts`` of each domain; ``attention_units``, the hidden width of the attention.

    Source: Shen et al. 2021, "SAR-Net: A Scenario-Aware Ranking Network for Personalized Fair Recommendation in Hundreds
    of Travel Scenarios": scenario attention, scenario-specific transform, mixture of experts behind a gate. The structure
    was checked against two public implementations, not against the paper's equations. Intended differences from those:
    the attention is over the features of a row, since sequences come pooled here, and there is none from the candidate
    item, which a schema does not name; experts are not debiased: there is no fairness coefficient in click logs without
    known interventions, so the experts' bias networks, which read it in training alone, are left out; shared experts are
    towers, not single layers, and there is no batch norm before them; a gate of each domain's own, theirs have one for
    all; dropout and start as in every other model.
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
        num_experts: int = 2,
        num_own_experts: int = 1,
        attention_units: int = 32,
    ) -> None:
        super().__init__()
        width, num_domains = schema.num_fields * embedding_dim + schema.num_dense, schema.num_domains
        self.rows = DomainRows()
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.domain_embedding = DomainEmbedding(num_domains, embedding_dim, init_std)
        self.attention = nn.Sequential(
            linear_of(3 * embedding_dim, attention_units), nn.ReLU(), head_of(attention_units)
        )
        self.transform = DomainEmbedding(num_domains, 2 * width, init_std=0.0)
        self.tower = Experts(MLP(width, hidden_units, dropout) for _ in range(num_experts))
        self.own_experts = Experts(
            DomainMLP(width, hidden_units[-1:], dropout, num_domains, self.rows) for _ in range(num_own_experts)
        )
        self.gate = domain_linear(width, num_own_experts + num_experts, num_domains, self.rows)
        self.head = head_of(hidden_units[-1], bias=True)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        self.rows.group_(domain)
        x = join(self._attended(self.embedding(ids), domain), dense)
        scale, shift = self.transform(domain).chunk(2, dim=1)
        u = x + x * scale + shift
        return scalar(self.head(mixture(self.gate(u), self.own_experts(u) + self.tower(u))))

    def _attended(self, x: Tensor, domain: Tensor) -> Tensor:
        """``(B, F, E)`` to the same."""
        of_domain = self.domain_embedding(domain).unsqueeze(1).expand_as(x)
        scores = self.attention(torch.cat([x, of_domain, x * of_domain], dim=2))  # (B, F, 1)
        return x * torch.softmax(scores, dim=1) * x.shape[1]


class M3oE(nn.Module):
    """A star layer, then experts for all, of the domain and of the task, added with learned weights.

    For a row of domain ``d``, with ``x`` the embedded features and dense columns:

    - representation: ``r = relu(x (W_s ⊙ W_d) + b_s + b_d) + x``
    - shared: ``s = sum_k softmax(sg(r) G_d + g_d)_k shared_k(r)``, ``sg`` being the identity without a gradient
    - domain: ``o = α own_d(r) + (1 - α) own_mean(r)``, where ``own_mean`` has the mean weights of all domains' experts
    - task: ``t = task(r)``

    and ``logit = head_d(domain_mlp_d(s + β o + δ t))``. ``α, β, δ`` are learned, each through a sigmoid, and start at 1/2;
    domain weights of the star layer start at one. What else is a domain's own starts as in this module's text.

    **Args**: as the backbones, where ``hidden_units`` are those of each expert: of the shared ones, ``tower.<k>``, the
    task's, which is the last of them, and each domain's; ``num_experts`` shared; ``domain_units``, the widths of each
    domain's own tower.

    Source: Zhang et al. 2024, "M3oE: Multi-Domain Multi-Task Mixture-of-Experts Recommendation Framework", as in the
    authors' code; the paper's equations were not seen. Intended differences: one task; the other domains' experts come in
    as one expert of their mean weights, where theirs is the mean of what each of them answers, which would run each row
    through the experts of every domain; the mean is over all domains, the row's own too; the learned weights move with
    all others, not by a search of their own; the star layer's rows pass it by themselves, theirs through a Linear; its
    domain weights start at one; no layer norm; dropout and start as in every other model.
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
        num_experts: int = 2,
        domain_units: Sequence[int] = (64,),
    ) -> None:
        super().__init__()
        width, num_domains = schema.num_fields * embedding_dim + schema.num_dense, schema.num_domains
        self.rows = DomainRows()
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.representation = MLP(width, [width], linear=lambda i, o: StarLinear(i, o, num_domains, self.rows))
        self.tower = Experts(MLP(width, hidden_units, dropout) for _ in range(num_experts + 1))
        self.own_expert = DomainMLP(width, hidden_units, dropout, num_domains, self.rows)
        self.gate = domain_linear(width, num_experts, num_domains, self.rows)
        self.own_share, self.domain_weight, self.task_weight = (nn.Parameter(torch.zeros(())) for _ in range(3))
        self.domain_mlp = DomainMLP(hidden_units[-1], domain_units, dropout, num_domains, self.rows)
        self.head = domain_linear(self.domain_mlp.out_features, 1, num_domains, self.rows)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        self.rows.group_(domain)
        x = join(self.embedding(ids), dense)
        r = self.representation(x) + x
        *shared, of_task = self.tower(r)
        of_domain = torch.lerp(self._mean_expert(r), self.own_expert(r), torch.sigmoid(self.own_share))
        fused = mixture(self.gate(r.detach()), shared)
        fused = fused + torch.sigmoid(self.domain_weight) * of_domain + torch.sigmoid(self.task_weight) * of_task
        return scalar(self.head(self.domain_mlp(fused)))

    def _mean_expert(self, h: Tensor) -> Tensor:
        """The answer of an expert whose weights are the mean of all domains' experts."""
        for layer in cast(Iterable[DomainLinear], self.own_expert):
            weight = layer.weight.mean(0).view(layer.out_features, layer.in_features)
            h = relu_dropout(F.linear(h, weight, layer.bias.mean(0)), self.own_expert.dropout, self.own_expert.training)
        return h
