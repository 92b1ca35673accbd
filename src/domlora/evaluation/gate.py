"""Whether a candidate may take the place of the model that is live: domain by domain, on the newest rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from domlora.errors import ConfigError, DataError
from domlora.evaluation.evaluate import Predictions
from domlora.evaluation.paired import Difference, auc_differences, wauc_difference

__all__ = ["Judged", "Limits", "Remembered", "Verdict", "judge", "remember"]

Status = Literal["passed", "fell", "drifted", "unjudged"]
Remembered = Mapping[str, Mapping[str, float]]
"""By domain, ``auc`` and ``standard_error`` that a model had when it was published."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a domain must not lose. All are AUC, from 0 to 1.

    Args:
        max_fall: how far the candidate's AUC may be below the live model's on the same rows.
        max_drift: how far both may be below what the live model had when it was published. A larger fall says that the rows
            are not what they were: shuffled labels make all models equally bad, and ``max_fall`` does not see them. Where the
            candidate is good, new ids alone have made the live one fall.
        z: how many standard errors a fall must exceed to be more than chance; a fall within chance passes.
    """

    max_fall: float = 0.002
    max_drift: float = 0.05
    z: float = 2.0

    def __post_init__(self) -> None:
        if not all(0 <= value < math.inf for value in (self.max_fall, self.max_drift, self.z)):
            raise ConfigError("a gate needs limits of at least 0", received=self)


@dataclass(frozen=True, slots=True)
class Judged:
    """One domain. Figures that are not to be had are NaN.

    Args:
        live, candidate: AUC on the same rows.
        standard_error: of their difference.
        before: the live model's AUC when it was published; ``drift_error`` of its difference to now.
        pcoc: predicted over observed clicks of the candidate.
        status: ``fell`` and ``drifted`` stop the candidate; ``unjudged`` has too few rows of a class.
    """

    domain: str
    num_rows: int
    live: float
    candidate: float
    standard_error: float
    before: float
    drift_error: float
    pcoc: float
    status: Status


@dataclass(frozen=True, slots=True)
class Verdict:
    """What :func:`judge` found; ``wauc`` is the candidate's minus the live model's."""

    domains: tuple[Judged, ...]
    wauc: Difference
    limits: Limits

    @property
    def passed(self) -> bool:
        """Whether no domain is in the way."""
        return not self.reasons

    @property
    def reasons(self) -> list[str]:
        """A line for each domain in the way, with its figures."""
        return [_reason(row, self.limits) for row in self.domains if row.status in ("fell", "drifted")]

    def to_dict(self) -> dict[str, Any]:
        """As JSON; NaN is None."""
        rows = [
            {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(row).items()}
            for row in self.domains
        ]
        return {"passed": self.passed, "reasons": self.reasons, "wauc": list(self.wauc), "domains": rows}

    def to_markdown(self) -> str:
        """A line a domain; AUC in percent."""
        lines = [
            "| domain | rows | live | candidate | difference | before | status |",
            "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for row in self.domains:
            change = f"{100 * (row.candidate - row.live):+.2f} ± {100 * row.standard_error:.2f}"
            cells = (f"{100 * row.live:.2f}", f"{100 * row.candidate:.2f}", change, f"{100 * row.before:.2f}")
            lines.append(
                f"| {row.domain} | {row.num_rows:,} | {' | '.join(cells)} | {row.status} |".replace("nan", "-")
            )
        return "\n".join(lines)


def judge(
    live: Predictions,
    candidate: Predictions,
    domains: Sequence[str],
    limits: Limits | None = None,
    remembered: Remembered | None = None,
) -> Verdict:
    """Compare two models on the same rows, and the rows with what the live one was used to.

    Args:
        live, candidate: what they say of the newest rows, in the same order.
        domains: names of the domains by number; rows of no domain are not judged.
        remembered: what :func:`remember` gave when the live model was published.

    Raises:
        DataError: not the same rows.

    Example:
        >>> dice = np.random.default_rng(1)
        >>> label, domain = dice.integers(0, 2, 4000).astype("f4"), np.repeat([0, 1], 2000)
        >>> good = Predictions(label, dice.random(4000) + label, domain)
        >>> bad = good._replace(probability=np.where(domain == 1, dice.random(4000), good.probability))
        >>> judge(good, bad, ["app", "web"]).reasons[0][:40]
        'web: AUC falls from 100.00 to 48.91, by '
    """
    limits = limits or Limits()
    if len(live.label) != len(candidate.label) or not np.array_equal(live.domain, candidate.domain):
        raise DataError("a gate compares two models on the same rows", received=(len(live.label), len(candidate.label)))
    group, count = live.domain + 1, len(domains) + 1  # those of no domain are group 0
    half = np.full(len(group), 0.5)
    here = auc_differences(live.label, live.probability, half, group, count)
    other = auc_differences(live.label, candidate.probability, half, group, count)
    change = auc_differences(live.label, candidate.probability, live.probability, group, count)
    rows = np.bincount(group, minlength=count)
    clicks = np.bincount(group, live.label, count)
    said = np.bincount(group, candidate.probability, count)
    judged = []
    for number, name in enumerate(domains, start=1):
        before = (remembered or {}).get(name, {"auc": math.nan, "standard_error": math.nan})
        known = (
            float(0.5 + here.value[number]),
            float(0.5 + other.value[number]),
            float(change.standard_error[number]),
            before["auc"],
            math.hypot(before["standard_error"], float(here.standard_error[number])),
        )
        pcoc = float(said[number] / clicks[number]) if clicks[number] else math.nan
        judged.append(Judged(name, int(rows[number]), *known, pcoc, _status(*known, limits)))
    known_rows = live.domain >= 0
    overall = wauc_difference(
        *(each[known_rows] for each in (live.label, candidate.probability, live.probability, live.domain))
    )
    return Verdict(tuple(judged), overall, limits)


def remember(said: Predictions, domains: Sequence[str]) -> dict[str, dict[str, float]]:
    """AUC and its standard error in each domain that has enough rows of both classes, for the next day's :func:`judge`.

    **Source**: DeLong et al. 1988, of one AUC.
    """
    found = auc_differences(
        said.label, said.probability, np.full(len(said.label), 0.5), said.domain + 1, len(domains) + 1
    )
    return {
        name: {"auc": float(0.5 + value), "standard_error": float(error)}
        for name, value, error in zip(domains, found.value[1:], found.standard_error[1:], strict=True)
        if not math.isnan(error)
    }


def _status(live: float, candidate: float, error: float, before: float, drift_error: float, limits: Limits) -> Status:
    drift, fall = before - max(live, candidate), live - candidate
    if drift > limits.max_drift and drift > limits.z * drift_error:
        return "drifted"
    if math.isnan(error):
        return "unjudged"
    return "fell" if fall > limits.max_fall and fall > limits.z * error else "passed"


def _reason(row: Judged, limits: Limits) -> str:
    now, then, before = 100 * row.live, 100 * row.candidate, 100 * row.before
    if row.status == "fell":
        fall = f"{now - then:.2f} ± {100 * row.standard_error:.2f} points (at most {100 * limits.max_fall:g})"
        return f"{row.domain}: AUC falls from {now:.2f} to {then:.2f}, by {fall}"
    fall = f"{before - max(now, then):.2f} ± {100 * row.drift_error:.2f} points (at most {100 * limits.max_drift:g})"
    return (
        f"{row.domain}: AUC was {before:.2f} when the live model was published, and on these rows it is {now:.2f} and the "
        f"candidate's {then:.2f}, a fall of {fall}; look at the labels of this day"
    )
