"""Shared and own towers: one bottom, experts behind gates, and experts of each domain's own.

They come from multi-task learning. Here a domain takes the place of a task: each row is answered by the tower and the head
of its own domain alone, and its label trains those alone. A row of domain -1 uses the mean over domains of whatever a
domain has of its own; all domains start from one draw, so that this mean is a network from the start.

The grouping of the rows lives in one cell that all layers read, so one eager model must not be called from two threads at
once. Under ``torch.compile`` and ``torch.export`` each row gathers its domain's weights: exact, for any batch, but meant for
the small batches of serving.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from domlora.features.schema import Schema
from domlora.layers.domain_linear import DomainRows
from domlora.layers.experts import DomainMLP, Experts, domain_linear, linear_of, mixture
from domlora.layers.mlp import MLP
from domlora.models.parts import MakeTable, join, scalar, table_of

__all__ = ["PLE", "MMoE", "SharedBottom"]


class SharedBottom(nn.Module):
    """One tower for all domains, then a small tower and a head of each domain's own.

    ``logit = head_d(domain_mlp_d(tower([x, dense])))`` for a row of domain ``d``. Starts as in this module's text.

    **Args**: as the backbones, where ``hidden_units`` are those of the shared ``tower``, and ``domain_units``, the widths of
    each domain's own tower.

    Source: Caruana 1997, "Multitask Learning", as the shared-bottom baseline of Ma et al. 2018 (MMoE), whose towers are
    those of tasks. Intended differences: domains for tasks; all domains start from the same draw; dropout and start as in
    every other model.
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
        domain_units: Sequence[int] = (64,),
    ) -> None:
        super().__init__()
        width = schema.num_fields * embedding_dim + schema.num_dense
        self.rows = DomainRows()
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.tower = MLP(width, hidden_units, dropout)
        self.domain_mlp = DomainMLP(self.tower.out_features, domain_units, dropout, schema.num_domains, self.rows)
        self.head = domain_linear(self.domain_mlp.out_features, 1, schema.num_domains, self.rows)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        self.rows.group_(domain)
        shared = self.tower(join(self.embedding(ids), dense))
        return scalar(self.head(self.domain_mlp(shared)))


class MMoE(nn.Module):
    """Experts for all domains, which a gate of each domain's own mixes for its own tower.

    ``logit = head_d(domain_mlp_d(sum_k softmax(x G_d + g_d)_k expert_k(x)))`` for a row of domain ``d``, with ``x`` the
    embedded features and dense columns. Experts start apart from each other; gates, towers and heads as in this module's
    text.

    **Args**: as the backbones, where ``hidden_units`` are those of each expert, ``tower.<k>``; ``num_experts``;
    ``domain_units``, the widths of each domain's own tower.

    Source: Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts":
    ``f^k(x) = sum_i g^k(x)_i f_i(x)`` with ``g^k(x) = softmax(W_gk x)``. Intended differences: domains for tasks; a gate has
    a bias; all gates start from the same draw; dropout and start as in every other model. DeepCTR can put hidden layers
    into a gate, as MAMDR's settings do; here it is one layer, as in the paper.
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
        num_experts: int = 4,
        domain_units: Sequence[int] = (64,),
    ) -> None:
        super().__init__()
        width = schema.num_fields * embedding_dim + schema.num_dense
        self.rows = DomainRows()
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.tower = Experts(MLP(width, hidden_units, dropout) for _ in range(num_experts))
        self.gate = domain_linear(width, num_experts, schema.num_domains, self.rows)
        self.domain_mlp = DomainMLP(hidden_units[-1], domain_units, dropout, schema.num_domains, self.rows)
        self.head = domain_linear(self.domain_mlp.out_features, 1, schema.num_domains, self.rows)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        self.rows.group_(domain)
        x = join(self.embedding(ids), dense)
        mixed = mixture(self.gate(x), self.tower(x))
        return scalar(self.head(self.domain_mlp(mixed)))


class PLE(nn.Module):
    """Levels of experts for all domains and of each domain's own, mixed level by level; then the domain's own tower.

    With ``s`` what the shared experts of a level read and ``o`` what the own ones of domain ``d`` read, both ``x`` at first:

    - ``e = [own_{d,1}(o), ..., own_{d,m}(o), shared_1(s), ..., shared_n(s)]``
    - ``o' = sum_k softmax(o G_d + g_d)_k e_k``, for the next level and at last for the tower
    - ``s' = sum_k softmax(s G + g)_k e_k``, for the next level, so the last one has none

    and ``logit = head_d(domain_mlp_d(o))``. Own experts see the rows of their domain alone. Experts of a level start apart
    from each other; what is a domain's own starts as in this module's text.

    **Args**: as the backbones, where ``hidden_units`` are those of each expert in each level, ``tower.<level>.<k>`` for the
    shared ones; ``num_levels``, 1 for the paper's CGC; in each level ``num_experts`` shared by all and ``num_own_experts``
    of each domain; ``domain_units``, the widths of each domain's own tower.

    Source: Tang et al. 2020, "Progressive Layered Extraction (PLE)": customized gate control, and extraction networks one
    above the other. Intended differences: domains for tasks; a level's shared gate mixes the shared experts and those of the
    row's own domain, where the paper's mixes those of all tasks, which would run each row through the experts of every
    domain; gates have a bias; all domains start from the same draw; dropout and start as in every other model.
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
        num_levels: int = 1,
        num_experts: int = 2,
        num_own_experts: int = 1,
        domain_units: Sequence[int] = (64,),
    ) -> None:
        super().__init__()
        width, num_domains = schema.num_fields * embedding_dim + schema.num_dense, schema.num_domains
        widths = [width, *[hidden_units[-1]] * (num_levels - 1)]
        choices = num_own_experts + num_experts
        self.rows = DomainRows()
        self.embedding = make_table(schema, embedding_dim, init_std)
        self.tower = nn.ModuleList(
            Experts(MLP(before, hidden_units, dropout) for _ in range(num_experts)) for before in widths
        )
        self.own_experts = nn.ModuleList(
            Experts(DomainMLP(before, hidden_units, dropout, num_domains, self.rows) for _ in range(num_own_experts))
            for before in widths
        )
        self.own_gates = nn.ModuleList(domain_linear(before, choices, num_domains, self.rows) for before in widths)
        self.shared_gates = nn.ModuleList(linear_of(before, choices) for before in widths[:-1])
        self.domain_mlp = DomainMLP(hidden_units[-1], domain_units, dropout, num_domains, self.rows)
        self.head = domain_linear(self.domain_mlp.out_features, 1, num_domains, self.rows)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        self.rows.group_(domain)
        own = shared = join(self.embedding(ids), dense)
        for level, gate in enumerate(self.own_gates):
            experts = self.own_experts[level](own) + self.tower[level](shared)
            mixed = mixture(gate(own), experts)
            if level < len(self.shared_gates):
                shared = mixture(self.shared_gates[level](shared), experts)
            own = mixed
        return scalar(self.head(self.domain_mlp(own)))
