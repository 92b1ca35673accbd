"""Domains in turn, and a step towards where they led: domain negotiation and domain regularisation of MAMDR.

An *outer step* of weights ``w`` over some domains: from ``v = w`` run inner steps on the rows of one domain after the
other, then ``w = w + lr (v - w)``.

===== ===============================================================================================================
dn    one outer step of the shared weights over all domains, in an order drawn anew in each outer pass
dr    for each domain ``d`` and each of its helpers ``j``: an outer step of the weights ``S + T_d`` over ``j``, then ``d``
mamdr both, one after the other in each outer pass
===== ===============================================================================================================

``S`` are the shared weights and ``T_d`` what domain ``d`` adds to them, zero at the start; an outer step of the shared ones
moves all domains along, one of ``S + T_d`` moves ``T_d``. A domain's helpers are others, drawn in each outer pass, and
itself at last. They keep a domain of few rows from overfitting: what it learns must also follow from theirs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from domlora.errors import DataError
from domlora.features.batch import Batch
from domlora.models.build import build_model
from domlora.models.per_domain import PerDomain
from domlora.training.fit import Fit, OnProgress, Rows, Run
from domlora.training.optimizers import OptimizerOptions
from domlora.training.per_domain import copies_of
from domlora.training.rows import OneDomain
from domlora.training.stages import Negotiation, with_vectors

__all__ = ["negotiate", "regularise"]

_SHARED = -1


def negotiate(
    data: Rows,
    model_options: Mapping[str, Any],
    options: Negotiation,
    *,
    regularised: bool = False,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[nn.Module, dict[str, Any], Fit]:
    """Train a model from scratch by domain negotiation, with ``regularised`` by all of MAMDR.

    An epoch is an outer pass: with negotiation alone one pass over the rows, with regularisation about
    ``2 (num_helpers + 1)`` more. Rows of unknown domains are left out of training. Training rows are kept in memory.

    Returns:
        One model, with ``regularised`` one for each domain and the shared one for unknown domains; what ``build_model``
        must be given to make its like; the fit.

    Raises:
        DataError: no row of a known domain to train on.

    **Source**: Luo et al. 2023, "MAMDR: A Model Agnostic Learning Framework for Multi-Domain Recommendation" (ICDE): checked
    against the authors' code, since the paper could not be read beyond its abstract. As there, one Adam goes through all
    inner steps, and a domain is its own last helper. Intended differences: ``T_d`` starts at zero, where theirs is a
    second random start added to the first; helpers are the next domains in a random order, so that in each outer pass
    every domain helps as often as another; statistics, which are not trained, are those after the inner steps; a batch's
    domain is read row by row; and validation is by ``monitor``, theirs by the plain mean of AUC.
    """
    made = with_vectors(model_options, data)
    if regularised:
        made |= {"per_domain": True, "unknown_domains": "base"}
    torch.manual_seed(options.fit.seed)
    model = build_model(schema=data.schema, **made)
    run = _Negotiation(model, data, options, True, regularised, on_progress, checkpoint)
    return model, made, run.go(start_is_candidate=False)


def regularise(
    base: nn.Module,
    data: Rows,
    model_options: Mapping[str, Any],
    options: Negotiation,
    *,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[nn.Module, dict[str, Any], Fit]:
    """Train what each domain adds to a trained base, which stays as it is, by domain regularisation; see :func:`negotiate`.

    The base is a candidate, and answers for unknown domains.
    """
    model, made = copies_of(base, data, model_options)
    run = _Negotiation(model, data, options, False, True, on_progress, checkpoint)
    return model, made, run.go(start_is_candidate=True)


class _Visit(NamedTuple):
    """Inner steps on the rows of a domain for the weights of ``target``: the shared ones, or those of a domain."""

    target: int
    domain: int
    steps: int
    first: bool
    last: bool


class _Negotiation(Run):
    """Steps move a copy of the model, ``stepped``; outer steps bring the weights that are kept towards it."""

    def __init__(
        self,
        model: nn.Module,
        data: Rows,
        options: Negotiation,
        shared: bool,
        specific: bool,
        on_progress: OnProgress | None,
        checkpoint: Path | None,
    ) -> None:
        self.rules, self.shared, self.specific = options, shared, specific
        stepped = copy.deepcopy(_kept(model, _SHARED))
        super().__init__(model, data, options.fit, options.optimizer, on_progress, checkpoint, stepped=stepped)
        self.begins: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        views = {domain: OneDomain(data, domain) for domain in range(data.schema.num_domains)}
        self.views = {domain: view for domain, view in views.items() if view.num_rows("train")}
        if not self.views:
            raise DataError("the train split needs a row of a known domain", received=0)
        visits = self.visits(0)
        self.steps_per_epoch = sum(visit.steps for visit in visits)
        self.rows_per_epoch = sum(self.num_rows(visit) for visit in visits)

    def identify(self, rules: OptimizerOptions) -> dict[str, str]:
        return {**super().identify(rules), "negotiation": repr((self.rules, self.shared, self.specific))}

    def visits(self, epoch: int) -> list[_Visit]:
        """All inner passes of an outer one, in an order that depends on seed and epoch alone; as many steps in each."""
        # + 1, because a seed sequence does not see a zero at its end
        random = np.random.default_rng((self.options.seed, epoch, 1))
        order = [int(domain) for domain in random.permutation(list(self.views))]
        most, own = self.rules.inner_steps, self.rules.target_steps
        found = []
        if self.shared:
            found += self.outer_step(_SHARED, [(domain, most) for domain in order])
        if self.specific:
            num_helpers = min(self.rules.num_helpers, len(order) - 1)
            for place, domain in enumerate(order):
                others = [order[(place + k) % len(order)] for k in range(1, num_helpers + 1)]
                for helper in (*others, domain):
                    found += self.outer_step(domain, [(helper, most), (domain, own)])
        return found

    def outer_step(self, target: int, passes: Sequence[tuple[int, int]]) -> list[_Visit]:
        """The inner passes between two outer steps: domains, and how many batches of each at the most (0 for all)."""
        last = len(passes) - 1
        return [
            _Visit(target, domain, self.num_steps(domain, most), place == 0, place == last)
            for place, (domain, most) in enumerate(passes)
        ]

    def num_steps(self, domain: int, most: int) -> int:
        steps = -(-self.views[domain].num_rows("train") // self.options.batch_size)
        return min(steps, most) if most else steps

    def num_rows(self, visit: _Visit) -> int:
        return min(self.views[visit.domain].num_rows("train"), visit.steps * self.options.batch_size)

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        self.begins, self.ends, visits, at = {}, {}, self.visits(epoch), 0
        for visit in visits:
            if visit.first:
                self.begins[at] = visit.target
            at += visit.steps
            if visit.last:
                self.ends[at] = visit.target
        return self.read(visits, epoch * len(visits), start)

    def read(self, visits: Sequence[_Visit], first: int, start: int) -> Iterator[Batch]:
        """The batches of visits without the first ``start``; each visit, counted from ``first``, orders its rows anew."""
        size, seed = self.options.batch_size, self.options.seed
        for number, visit in enumerate(visits, first):
            done = min(start, visit.steps)
            start -= done
            if done < visit.steps:
                rows = self.views[visit.domain].batches("train", size, seed=seed, epoch=number, start=done)
                yield from islice(rows, visit.steps - done)

    def step(self, batch: Batch) -> float:
        at = self.part.steps
        if at in self.begins:
            self.begin(_kept(self.model, self.begins[at]))
        loss = super().step(batch)
        if at + 1 in self.ends:
            self.end(self.ends[at + 1])
        return loss

    def begin(self, kept: nn.Module) -> None:
        """Inner steps start from the weights that are kept."""
        with torch.no_grad():
            for mine, moved in zip(_moving(kept, self.stepped), _moving(self.stepped, self.stepped), strict=True):
                moved.copy_(mine)
            _copy_buffers(kept, self.stepped)

    def end(self, target: int) -> None:
        """The outer step; one of the shared weights takes those of all domains along."""
        kept = _kept(self.model, target)
        along = list(self.model.copies) if target == _SHARED and isinstance(self.model, PerDomain) else []
        with torch.no_grad():
            for moved, mine, *others in zip(
                *(_moving(model, self.stepped) for model in (self.stepped, kept, *along)), strict=True
            ):
                shift = (moved - mine) * self.rules.outer_lr
                for weights in (mine, *others):
                    weights.add_(shift)
            for model in (kept, *along):
                _copy_buffers(self.stepped, model)

    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        return {**super().parts(), "stepped": self.stepped.state_dict()}

    def load_parts(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().load_parts(parts)
        self.stepped.load_state_dict(parts["stepped"])


def _kept(model: nn.Module, target: int) -> nn.Module:
    """The module that holds the weights of a target."""
    if not isinstance(model, PerDomain):
        return model
    return cast(nn.Module, model.base) if target == _SHARED else model.copies[target]


def _moving(model: nn.Module, like: nn.Module) -> list[Tensor]:
    """The parameters of a model that move in one like it."""
    return [p for p, other in zip(model.parameters(), like.parameters(), strict=True) if other.requires_grad]


def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    for theirs, mine in zip(source.buffers(), target.buffers(), strict=True):
        mine.copy_(theirs)
