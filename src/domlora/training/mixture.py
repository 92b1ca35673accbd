"""Experts that learn one domain each, then a gate that mixes them: MoE-MLoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from domlora.adapters.attach import AdapterOptions, freeze_
from domlora.adapters.mixture import alone, attach_mixture_, expert_parameters, gate_of
from domlora.errors import ConfigError
from domlora.training.fit import Fit, OnProgress, Rows, fit
from domlora.training.per_domain import Part, fit_part, summed
from domlora.training.rows import OneDomain
from domlora.training.stages import Mixture, with_vectors
from domlora.training.validation import scores_of

__all__ = ["mix"]


def mix(
    base: nn.Module,
    data: Rows,
    model_options: Mapping[str, Any],
    adapter: AdapterOptions,
    options: Mixture,
    *,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[dict[str, Any], Fit]:
    """Give a trained base experts and a gate, in place, and train them in two stages with the base frozen.

    ``h = act(x W + b + sum_e g_e(d) (s (x A_e) B_e + c_e))``, ``g(d) = softmax(V e_d + v)``. First each expert alone, as if
    it were the only one, on the rows of domain ``e mod D``, stopped by their validation rows, its zero start a candidate; an
    expert whose domain has nothing to train on or to stop by stays zero. Then the gate alone, on all rows. If that ends
    below the base on the validation split, the base is kept: all experts are zero again. Unknown domains get the base.

    Args:
        base: as ``build_model`` makes it of ``model_options``; changed in place.
        adapter: rank and place of each expert.

    Returns:
        What ``build_model`` must be given to make the like, and the fit: the base at epoch 0, then the validations of the
        gate's stage, whose epochs count on from the experts' passes over the data.

    Raises:
        ConfigError: fewer experts than domains.

    **Source**: MoE-MLoRA (Yaggel, German and Ben Siman Tov 2025, arXiv 2506.07563): a backbone on all domains, experts each
    on their domain, then a gate on a domain's embedding. The paper's formulas could not be read, so the layer is that of the
    authors' code. Intended differences from that code, which does not train in those stages: its gate and the gate's
    embedding are nested layers that its Keras does not track, so they stay a random mix, and are not saved; its freezing
    has no effect, so every stage moves everything; and its switches of expert and gate come after the graph is built, so
    every stage trains the whole mixture. Our own choices: the gate starts as the mean of all experts, starting points are
    candidates, and domains are read row by row.
    """
    made = _mixture_options(data, adapter, options)
    torch.manual_seed(options.experts.fit.seed)
    attach_mixture_(base, data.schema.num_domains, **made)
    start, before = scores_of(base, data), {name: tensor.clone() for name, tensor in base.state_dict().items()}
    parts = _fit_experts(base, data, options, made["num_experts"], checkpoint, on_progress)
    freeze_(base)
    gate_of(base).requires_grad_()
    gate = fit(
        base,
        data,
        options.gate.fit,
        options.gate.optimizer,
        start_is_candidate=True,
        checkpoint=None if checkpoint is None else checkpoint / "gate",
        on_progress=on_progress,
    )
    found = _together(start, parts, gate, data.num_rows("train"))
    if start[options.gate.fit.monitor] >= gate.best_value:
        base.load_state_dict(before)
        found.best_value, found.best_epoch = start[options.gate.fit.monitor], 0.0
    return {**with_vectors(model_options, data), "mixture": made}, found


def _mixture_options(data: Rows, adapter: AdapterOptions, options: Mixture) -> dict[str, Any]:
    num_domains = data.schema.num_domains
    num_experts = num_domains if options.num_experts is None else options.num_experts
    if num_experts < num_domains:
        raise ConfigError(f"num_experts must be at least the domains, {num_domains}", received=num_experts)
    return {"num_experts": num_experts, "gate_dim": options.gate_dim, **asdict(adapter)}


def _fit_experts(
    model: nn.Module,
    data: Rows,
    options: Mixture,
    num_experts: int,
    checkpoint: Path | None,
    on_progress: OnProgress | None,
) -> list[Part]:
    parts = []
    for expert in range(num_experts):
        rows = OneDomain(data, expert % data.schema.num_domains)
        if not rows.can_be_trained:
            continue
        freeze_(model)
        for parameter in expert_parameters(model, expert):
            parameter.requires_grad_()
        folder = None if checkpoint is None else checkpoint / f"expert-{expert}"
        with alone(model, expert):
            parts.append(
                fit_part(
                    model,
                    rows,
                    options.experts,
                    start_is_candidate=True,
                    checkpoint=folder,
                    on_progress=on_progress,
                )
            )
    return parts


def _together(start: Mapping[str, float], parts: list[Part], gate: Fit, num_rows: int) -> Fit:
    """The fit of the whole: the base, then the gate's stage behind the experts' passes."""
    found = summed([*parts, Part(num_rows, gate)], num_rows)
    passed = summed(parts, num_rows).best_epoch
    later = [{**entry, "epoch": entry["epoch"] + passed} for entry in gate.history]
    found.history = [{"epoch": 0.0, "loss": math.nan, **start}, *later]
    found.best_value, found.best_epoch = gate.best_value, passed + gate.best_epoch
    return found
