"""From a model and its batches to one table: a line a domain, then totals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from domlora.errors import DataError, EngineError
from domlora.evaluation.metrics import auc_by_group, calibration_by_group, gauc, gauc_by_group, macro_auc, wauc
from domlora.features.batch import Batch

__all__ = ["UNKNOWN_DOMAIN", "DomainRow", "Predictions", "Table", "by_domain", "predict"]

UNKNOWN_DOMAIN = "(unknown)"
"""The name of the line of all rows whose domain is not known (-1)."""


class Predictions(NamedTuple):
    """What a model said about some rows, in the order of the batches.

    **Shape**: all ``(B,)``: ``label`` float32, ``probability`` float64, ``domain`` int64 (-1 unknown), ``weight``
    float32 or None, ``user`` int64 or None.
    """

    label: NDArray[np.float32]
    probability: NDArray[np.float64]
    domain: NDArray[np.int64]
    weight: NDArray[np.float32] | None = None
    user: NDArray[np.int64] | None = None


def predict(model: nn.Module, batches: Iterable[Batch]) -> Predictions:
    """Probabilities of a model in evaluation mode: ``sigmoid(model(ids, dense, domain))``, in float64.

    Batches are moved to the device of the model's first parameter. Afterwards every submodule is back in the mode it
    had, also where some were frozen in evaluation mode inside a training model.

    Raises:
        DataError: no rows, or only some batches have weights or users.
        EngineError: the model gives another shape than one logit a row, or NaN.

    Example:
        >>> class Rate(nn.Module):
        ...     def forward(self, ids, dense, domain):
        ...         return dense[:, 0]
        >>> dense, domain = torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)
        >>> predict(Rate(), [Batch(domain[:, None], dense, domain, torch.ones(2))]).probability
        array([0.5, 0.5])
    """
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    modes = [(module, module.training) for module in model.modules()]
    logits, read = _Column("logit"), [_Column(name) for name in ("label", "domain", "weight", "user")]
    try:
        model.eval()
        with torch.inference_mode():
            for batch in batches:
                logits.append(_logit(model, batch, device))
                for column, piece in zip(read, (batch.label, batch.domain, batch.weight, batch.user), strict=True):
                    column.append(piece)
    finally:
        for module, training in modes:
            module.training = training
    if not logits.rows:
        raise DataError("an evaluation needs at least one row", received=f"{logits.pieces} batches")
    label, domain, weight, user = (column.whole() for column in read)
    return Predictions(label, _probability(logits.values()), domain, weight, user)


@dataclass(frozen=True, slots=True)
class DomainRow:
    """One line of a table.

    Args:
        name: the domain.
        rows, positives: counted, whatever their weights.
        click_rate: mean label, and like all that follows with the rows' weights, if they have any.
        auc: NaN where the domain has one class or no row.
        log_loss: in nats.
        normalized_entropy: log loss over the entropy of the domain's own click rate.
        pcoc: predicted over observed clicks.
        ece: expected calibration error, in equal-mass bins of the domain's own.
        gauc: AUC by user inside the domain; NaN if users are not known or none has two classes.
    """

    name: str
    rows: int
    positives: int
    click_rate: float
    auc: float
    log_loss: float
    normalized_entropy: float
    pcoc: float
    ece: float
    gauc: float

    @property
    def status(self) -> str:
        """``scored``, ``one class`` or ``no rows``."""
        if self.rows == 0:
            return "no rows"
        return "one class" if math.isnan(self.auc) else "scored"


@dataclass(frozen=True, slots=True)
class Table:
    """How good a model is in each domain and over all; AUC in 0..1.

    Args:
        domains: a line a domain, in the order of the schema, then ``(unknown)`` if there are such rows; that line counts
            in the totals like any other.
        overall: all rows as if they were one domain.
        wauc: mean AUC of the scored domains weighted by their rows (by their summed weights, if rows have any).
        macro_auc: plain mean AUC of the scored domains.
        gauc_coverage: share of all rows whose user has both classes.
    """

    domains: tuple[DomainRow, ...]
    overall: DomainRow
    wauc: float
    macro_auc: float
    gauc_coverage: float

    @property
    def num_domains_scored(self) -> int:
        return sum(row.status == "scored" for row in self.domains)

    @property
    def num_domains_one_class(self) -> int:
        return sum(row.status == "one class" for row in self.domains)

    @property
    def summary(self) -> dict[str, float]:
        """The totals, one number a key; NaN where not defined."""
        return {
            "wauc": self.wauc,
            "macro_auc": self.macro_auc,
            "auc": self.overall.auc,
            "gauc": self.overall.gauc,
            "log_loss": self.overall.log_loss,
            "normalized_entropy": self.overall.normalized_entropy,
            "pcoc": self.overall.pcoc,
            "ece": self.overall.ece,
            "num_domains_scored": self.num_domains_scored,
            "num_domains_one_class": self.num_domains_one_class,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold: NaN becomes None."""
        return {
            "domains": [_plain({**asdict(row), "status": row.status}) for row in self.domains],
            "overall": _plain(asdict(self.overall)),
            "summary": _plain({**self.summary, "gauc_coverage": self.gauc_coverage}),
        }

    def to_markdown(self) -> str:
        """A pipe table: a line a domain, then macro mean, WAUC and all rows."""
        head = ["domain", "rows", "positives", "click rate", "AUC", "GAUC", "log loss", "NE", "PCOC", "ECE"]
        lines = [_cells(row) for row in self.domains]
        for name, value in (("(macro mean)", self.macro_auc), ("(WAUC)", self.wauc)):
            lines.append([name, "", "", "", _digits(value), *[""] * 5])
        lines.append(_cells(self.overall))
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return "\n".join(_line(cells, widths) for cells in (head, rule, *lines)) + "\n"


def by_domain(predictions: Predictions, domain_names: Sequence[str], num_bins: int = 10) -> Table:
    """The table of a model's predictions.

    Args:
        domain_names: name of domain 0, 1, ...; a domain without rows keeps its line.
        num_bins: equal-mass bins of the calibration error, in each domain and over all.

    Raises:
        DataError: a domain outside the names, or what ``domlora.evaluation.metrics`` refuses.

    Example:
        >>> label, probability = np.array([0, 1, 0, 1, 1]), np.array([0.1, 0.2, 0.9, 0.8, 0.7])
        >>> table = by_domain(Predictions(label, probability, np.array([0, 0, 1, 1, 1])), ["app", "web"])
        >>> table.wauc, table.macro_auc, [row.auc for row in table.domains]
        (0.4, 0.5, [1.0, 0.0])
    """
    label, probability, domain, weight, user = predictions
    names, group = _names_and_groups(domain, domain_names)
    (overall,) = _rows(predictions, np.zeros(np.shape(label), dtype=np.int64), ["(all)"], num_bins)
    return Table(
        domains=tuple(_rows(predictions, group, names, num_bins)),
        overall=overall,
        wauc=wauc(label, probability, domain, weight),
        macro_auc=macro_auc(label, probability, domain, weight),
        gauc_coverage=math.nan if user is None else gauc(label, probability, user, weight).coverage,
    )


def _logit(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    logit: Tensor = model(batch.ids.to(device), batch.dense.to(device), batch.domain.to(device))
    if logit.shape != batch.domain.shape:
        raise EngineError(
            f"a model must give one logit a row, {tuple(batch.domain.shape)}", received=tuple(logit.shape)
        )
    return logit.cpu()


def _probability(logit: Tensor) -> NDArray[np.float64]:
    bad = logit.isnan().nonzero().flatten()
    if len(bad):
        raise EngineError(
            "the model's logits must not be NaN",
            received=f"{len(bad)} of {len(logit)} rows, the first of them {bad[:5].tolist()}",
            next_step="Lower the learning rate, or look for NaN in the dense columns",
        )
    probability: NDArray[np.float64] = logit.double().sigmoid().numpy()
    return probability


class _Column:
    """A column that grows piece by piece, in memory that doubles.

    Thousands of small pieces kept apart would lie between the batches' own memory and leave holes that nothing fits:
    five million rows took 2.7 GiB instead of 0.3.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows = self.pieces = self._absent = 0
        self._values = torch.empty(0)

    def append(self, piece: Tensor | None) -> None:
        self.pieces += 1
        if piece is None:
            self._absent += 1
            return
        end = self.rows + len(piece)
        if end > len(self._values):
            grown = torch.empty(2 * end if self.rows else end, dtype=piece.dtype)
            grown[: self.rows] = self._values[: self.rows]
            self._values = grown
        self._values[self.rows : end] = piece
        self.rows = end

    def values(self) -> Tensor:
        """All of it."""
        return self._values[: self.rows]

    def whole(self) -> Any:
        """All of it as an array, or None where no batch has it."""
        if self._absent == self.pieces:
            return None
        if self._absent:
            have = f"{self.pieces - self._absent} of {self.pieces} batches"
            raise DataError(f"either all batches have {self.name} or none", received=have)
        return self.values().numpy()


def _names_and_groups(domain: NDArray[np.int64], names: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the lines and the line of each row: unknown domains go to a line behind the others."""
    outside = np.flatnonzero((domain < -1) | (domain >= len(names)))
    if outside.size:
        raise DataError(
            f"domain must be in 0..{len(names) - 1}, or -1 where it is not known",
            received=np.unique(domain[outside])[:5].tolist(),
            next_step=f"{outside.size} rows, the first of them {outside[:5].tolist()}",
        )
    unknown = domain == -1
    return [*names, *([UNKNOWN_DOMAIN] if unknown.any() else [])], np.where(unknown, len(names), domain)


def _rows(predictions: Predictions, group: NDArray[np.int64], names: list[str], num_bins: int) -> list[DomainRow]:
    label, probability, _, weight, user = predictions
    size = len(names)
    order = auc_by_group(label, probability, group, size, weight)
    calibration = calibration_by_group(label, probability, group, size, weight, num_bins=num_bins)
    nothing = np.full(size, np.nan)
    by_user = nothing if user is None else gauc_by_group(label, probability, user, group, size, weight)
    counts = np.bincount(group, minlength=size), np.bincount(group, label, size).astype(np.int64)
    click_rate, loss, entropy, pcoc, ece = calibration
    columns = (*counts, click_rate, order, loss, entropy, pcoc, ece, by_user)
    return [DomainRow(name, *line) for name, *line in zip(names, *(c.tolist() for c in columns), strict=True)]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def _cells(row: DomainRow) -> list[str]:
    order = _digits(row.auc) if row.status == "scored" else row.status
    rest = map(_digits, (row.gauc, row.log_loss, row.normalized_entropy, row.pcoc, row.ece))
    return [row.name.replace("|", "\\|"), str(row.rows), str(row.positives), _digits(row.click_rate), order, *rest]


def _digits(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = cells
    return "| " + " | ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) + " |"
