"""Where the adapter of a new domain may start: what the adapters of other domains say about its rows.

An adapter of rank R is a product ``A B``, and the same product has many pairs: the mean of two domains' ``A`` times the mean
of their ``B`` is the mean of nothing. What can be averaged is the correction, ``sum_d w_d A_d B_d``; its best approximation
of rank R is its truncated singular value decomposition (Eckart and Young 1936).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from domlora.adapters.bank import distinct_layers, load_rows_
from domlora.adapters.root import disabled, routed
from domlora.features.batch import Batch

__all__ = ["Row", "Said", "averaged", "calibrated", "mixing_weights", "say_all", "shifts_of", "sum_loss"]

Row = dict[str, Tensor]
Floats = NDArray[np.float64]

_PASS_ROWS, _STEPS, _CALIBRATIONS, _SMALL_SHIFT = 16384, 300, 8, 1e-3


class Said(NamedTuple):
    """Logits of the same rows: of the base ``(B,)`` and with each domain's adapter ``(B, D)``; labels, weights ``(B,)``."""

    base: Floats
    others: Floats
    label: Floats
    weight: Floats


@torch.inference_mode()
def say_all(model: nn.Module, rows: Batch) -> Said:
    """Score rows with the base and with the adapter of every domain, many domains in one batch.

    The base is told the rows' own domain, the adapters each of theirs.
    """
    device = next(model.parameters()).device
    num_domains = next(iter(distinct_layers(model).values())).route.num_domains
    model.eval()
    with disabled(model):
        base = model(rows.ids.to(device), rows.dense.to(device), rows.domain.to(device))
    parts = [_all_domains(model, part, num_domains) for part in _split(rows.to(device), num_domains)]
    return Said(_array(base), _array(torch.cat(parts)), *_labels(rows))


def _split(rows: Batch, num_domains: int) -> list[Batch]:
    size = max(_PASS_ROWS // num_domains, 1)
    return [rows.take(slice(first, first + size)) for first in range(0, rows.num_rows, size)]


def _all_domains(model: nn.Module, rows: Batch, num_domains: int) -> Tensor:
    """``(B, D)``"""
    adapter = torch.arange(num_domains, device=rows.domain.device).repeat_interleave(rows.num_rows)  # (D B,)
    with routed(model, adapter):
        logit: Tensor = model(
            rows.ids.repeat(num_domains, 1), rows.dense.repeat(num_domains, 1), rows.domain.repeat(num_domains)
        )
    return logit.view(num_domains, rows.num_rows).T


def sum_loss(logit: Floats, label: Floats, weight: Floats) -> Floats:
    """Binary cross entropy summed over rows: ``(B,)`` to a scalar, ``(B, D)`` to one number a domain."""
    loss: Floats = weight @ (np.logaddexp(0.0, logit) - (label * logit.T).T)
    return loss


def shifts_of(logit: Floats, label: Floats, weight: Floats) -> Floats:
    """What to add to each column ``(B, D)`` of logits so that it says the observed click rate, ``(D,)``.

    A shift is normal beforehand, with a standard deviation of 1, so that one class alone does not make it infinite.
    """
    shift = np.zeros(logit.shape[1])
    for _ in range(20):
        rate = _sigmoid(logit + shift)
        slope = weight @ rate - weight @ label + shift
        shift -= np.clip(slope / (weight @ (rate * (1 - rate)) + 1.0), -1.0, 1.0)
    return shift


def mixing_weights(base: Floats, others: Floats, label: Floats, weight: Floats) -> Floats:
    """Weights of the domains ``(D,)``, at least 0 and of sum 1 with what is left to the base: the best convex mix of logits.

    Minimises ``sum_rows loss(base + sum_d w_d (others_d - base)) + KL(w, uniform)`` by entropic mirror descent: with few
    rows near uniform, with many the maximum of the likelihood. Mixed logits stand for mixed corrections, to first order.
    """
    gain = np.column_stack([np.zeros(len(base)), others - base[:, None]])  # (B, 1 + D), the base first
    total, size = weight.sum(), gain.shape[1]
    curvature = 0.25 * (weight @ np.square(gain).max(1)) / total
    step, prior = 1.0 / max(curvature, 1e-12), 1.0 / total
    log_mix = np.full(size, -np.log(size))
    for _ in range(_STEPS):
        error = weight * (_sigmoid(base + gain @ np.exp(log_mix)) - label)
        log_mix = (log_mix - step * (error @ gain) / total) / (1.0 + step * prior)
        log_mix -= log_mix.max() + np.log(np.exp(log_mix - log_mix.max()).sum())
    found: Floats = np.exp(log_mix)[1:]
    return found


def averaged(model: nn.Module, weights: Floats) -> Row:
    """One adapter for the weighted sum of the domains' corrections, of the model's rank.

    Directions in which the sum has nothing are as in a fresh adapter: random in ``A``, zero in ``B``, so that they can be
    learned. Draws from torch's generator.
    """
    row: Row = {}
    for name, layer in distinct_layers(model).items():
        share = torch.from_numpy(weights).to(layer.lora_A.device)
        a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        joined = (share[:, None, None] * a).permute(1, 0, 2).flatten(1)  # (in, D R)
        fresh = {key: value[0] for key, value in layer.fresh_rows(1).items()}
        _put_product_(fresh, joined @ b.flatten(0, 1))
        if layer.lora_bias is None:
            del fresh["lora_bias"]
        else:
            fresh["lora_bias"].copy_(share @ layer.lora_bias.detach().double())
        row |= {f"{name}.{key}".lstrip("."): value for key, value in fresh.items()}
    return row


def _put_product_(fresh: Row, product: Tensor) -> None:
    """Write the best factors of a matrix ``(in, out)`` into a fresh adapter, its scale shared between the two."""
    left, sizes, right = torch.linalg.svd(product, full_matrices=False)
    sizes = sizes[: fresh["lora_B"].shape[0]]
    kept = int((sizes > 1e-6 * sizes.max()).sum()) if len(sizes) else 0
    root = sizes[:kept].sqrt()
    fresh["lora_A"][:, :kept] = (left[:, :kept] * root).to(fresh["lora_A"])
    fresh["lora_B"][:kept] = (root[:, None] * right[:kept]).to(fresh["lora_B"])


def calibrated(model: nn.Module, row: Row, rows: Batch) -> Row | None:
    """The adapter with one number more, for the mean of the logits, put into the bias of its last layer that has one.

    The bias moves where it changes all rows' logits as equally as it can, by the most likely amount, see :func:`shifts_of`.
    Where that layer gives the logit itself, that is one number added to every logit; below a relu it is nearly so.

    Args:
        model: with a bank of one row.
        row: the adapter; it is not changed.
        rows: to learn from.

    Returns:
        None where no adapted layer has a bias.
    """
    biases = [name for name, layer in distinct_layers(model).items() if layer.lora_bias is not None]
    if not biases:
        return None
    name = f"{biases[-1]}.lora_bias".lstrip(".")
    label, weight = _labels(rows)
    rows = rows.to(row[name].device)
    best, found, shift = np.inf, row, 0.0
    now = row
    for _ in range(_CALIBRATIONS):
        load_rows_(model, 0, now)
        logit, slopes = _slopes(model, biases[-1], rows)
        loss = float(sum_loss(logit, label, weight)) + 0.5 * shift**2
        if loss < best:
            best, found = loss, now
        direction = _uniform(slopes)
        rate, slope = _sigmoid(logit), slopes @ direction
        down = weight @ ((rate - label) * slope) + shift
        step = float(np.clip(-down / (weight @ (rate * (1 - rate) * slope**2) + 1.0), -1.0, 1.0))
        if abs(step) < _SMALL_SHIFT:
            break
        shift += step
        now = {**now, name: now[name] + torch.from_numpy(step * direction).to(now[name])}
    return found


def _slopes(model: nn.Module, name: str, rows: Batch) -> tuple[Floats, Floats]:
    """Logits ``(B,)``, and what each would change with the bias of one layer ``(B, out)``."""
    given: list[Tensor] = []
    hook = distinct_layers(model.eval())[name].register_forward_hook(lambda _, __, out: given.append(out))
    try:
        with torch.enable_grad():
            logit: Tensor = model(rows.ids, rows.dense, rows.domain)
            slopes = torch.autograd.grad(logit.sum(), given)
    finally:
        hook.remove()
    each = sum(slope.flatten(1, -2).sum(1) if slope.dim() > 2 else slope for slope in slopes)
    return _array(logit), _array(torch.as_tensor(each))


def _uniform(slopes: Floats) -> Floats:
    """The change ``(out,)`` that comes nearest to adding 1 to every logit; ridge regression."""
    square = slopes.T @ slopes
    ridge = 1e-3 * np.trace(square) / len(square) + 1e-12
    found: Floats = np.linalg.solve(square + ridge * np.eye(len(square)), slopes.sum(0))
    return found


def _labels(rows: Batch) -> tuple[Floats, Floats]:
    """Labels and weights."""
    return _array(rows.label), _array(torch.ones_like(rows.label) if rows.weight is None else rows.weight)


def _array(tensor: Tensor) -> Floats:
    found: Floats = tensor.detach().double().cpu().numpy()
    return found


def _sigmoid(logit: Floats) -> Floats:
    half: Floats = 0.5 * (1.0 + np.tanh(0.5 * logit))
    return half
