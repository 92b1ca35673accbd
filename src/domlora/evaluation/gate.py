"""Whether a candidate may take the place of the model that is live: domain by domain, on the newest rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from domlora.errors import ConfigError, DataError
from domlora.evaluation.evaluate import Predictions
from domlora.evaluation.paired import Difference, auc_differences, wauc_difference
from domlora.evaluation.rows import read_rows

__all__ = ["Judged", "Limits", "Remembered", "Verdict", "judge", "remember"]

Status = Literal["passed", "fell", "drifted", "reversed", "unjudged"]
_NOTHING = {"auc": math.nan, "standard_error": math.nan, "rarer": 0.0}

Remembered = Mapping[str, Mapping[str, float]]
"""By domain, ``auc`` and ``standard_error`` of a model when it was published, and ``rarer``, rows of the rarer class; for
whoever looks at what is served also ``mean_score``, the mean probability."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a domain must not lose. Falls and drifts are of AUC, from 0 to 1.

    Args:
        max_fall: how far the candidate's AUC may be below the live model's on the same rows; of all judged domains together,
            its WAUC.
        max_drift: how far both may be below what the live model had when it was published. A larger fall says that the rows
            are not what they were: shuffled labels make all models equally bad, and ``max_fall`` does not see them. Where
            only the live one has fallen, it was new ids; but where it is as far below 0.5, labels are reversed, and that a
            candidate has learned them is no excuse.
        z: how many standard errors a fall must exceed to be more than chance; a fall within chance passes.
        min_rarer: clicks, or non-clicks where those are fewer, that a domain needs to be judged: with few of them the
            standard error is itself chance.
        max_miscalibration: how far predicted over observed clicks may be from 1 before a warning, which stops nothing. It
            alone sees a domain whose clicks are no longer recorded.
    """

    max_fall: float = 0.002
    max_drift: float = 0.05
    z: float = 2.0
    min_rarer: int = 50
    max_miscalibration: float = 0.2

    def __post_init__(self) -> None:
        limits = (self.max_fall, self.max_drift, self.z, self.min_rarer, self.max_miscalibration)
        if not all(0 <= value < math.inf for value in limits):
            raise ConfigError("a gate needs limits of at least 0", received=self)


@dataclass(frozen=True, slots=True)
class Judged:
    """One domain. Figures that are not to be had are NaN.

    Args:
        live, candidate: AUC on the same rows.
        standard_error: of their difference.
        before: the live model's AUC when it was published; ``drift_error`` of its difference to now.
        clicks: observed; ``expected`` by the candidate, whose own chance is ``expected_error``; ``pcoc`` is their ratio.
        status: ``fell``, ``drifted`` and ``reversed`` stop the candidate; ``unjudged`` has too few rows of a class.
    """

    domain: str
    num_rows: int
    clicks: int
    expected: float
    expected_error: float
    live: float
    candidate: float
    standard_error: float
    before: float
    drift_error: float
    pcoc: float
    status: Status


@dataclass(frozen=True, slots=True)
class Verdict:
    """What :func:`judge` found; ``wauc`` is the candidate's minus the live model's over judged domains, NaN without any."""

    domains: tuple[Judged, ...]
    wauc: Difference
    limits: Limits

    @property
    def passed(self) -> bool:
        """Whether nothing is in the way."""
        return not self.reasons

    @property
    def reasons(self) -> list[str]:
        """A line for each domain in the way, with figures; where there is none, one for all together if they fall."""
        lines = [_reason(row, self.limits) for row in self.domains if row.status in ("fell", "drifted", "reversed")]
        fall, error = -self.wauc.value, self.wauc.standard_error
        if not lines and fall > self.limits.max_fall and fall > self.limits.z * error:
            lines.append(f"all judged domains: WAUC falls by {_points(fall, error, self.limits.max_fall)}")
        return lines

    @property
    def warnings(self) -> list[str]:
        """A line for each domain whose clicks are not what the candidate expects, and one if nothing could be judged."""
        lines = [
            f"{row.domain}: {row.clicks:,} clicks in {row.num_rows:,} rows, and the candidate expects {row.expected:,.1f}"
            for row in self.domains
            if abs(row.expected - row.clicks) > self.limits.max_miscalibration * row.clicks
            and abs(row.expected - row.clicks) > self.limits.z * row.expected_error
        ]
        if all(row.status == "unjudged" for row in self.domains):
            lines.append("no domain has rows enough to be judged")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """As JSON; NaN is None."""
        return {
            "passed": self.passed,
            "reasons": self.reasons,
            "warnings": self.warnings,
            "wauc": [_or_none(value) for value in self.wauc],
            "domains": [{key: _or_none(value) for key, value in asdict(row).items()} for row in self.domains],
        }

    def to_markdown(self) -> str:
        """A line a domain, AUC in percent; then the warnings."""
        lines = [
            "| domain | rows | live | candidate | difference | before | predicted / clicks | status |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
        for row in self.domains:
            change = f"{100 * (row.candidate - row.live):+.2f} ± {100 * row.standard_error:.2f}"
            figures = [f"{100 * row.live:.2f}", f"{100 * row.candidate:.2f}", change, f"{100 * row.before:.2f}"]
            cells = " | ".join("-" if "nan" in cell else cell for cell in (*figures, f"{row.pcoc:.2f}"))
            lines.append(f"| {row.domain} | {row.num_rows:,} | {cells} | {row.status} |")
        if self.warnings:
            lines += ["", *(f"- warning: {line}" for line in self.warnings)]
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
        DataError: not the same rows, or scores that are no probabilities.

    Example:
        >>> dice = np.random.default_rng(1)
        >>> label, domain = dice.integers(0, 2, 4000).astype("f4"), np.repeat([0, 1], 2000)
        >>> good = Predictions(label, (dice.random(4000) + label) / 2, domain)
        >>> bad = good._replace(probability=np.where(domain == 1, dice.random(4000), good.probability))
        >>> judge(good, bad, ["app", "web"]).reasons[0][:40]
        'web: AUC falls from 100.00 to 48.91, by '
    """
    limits = limits or Limits()
    for one, two in ((live.label, candidate.label), (live.domain, candidate.domain)):
        if not np.array_equal(one, two):
            raise DataError("a gate compares two models on the same rows", received=(len(one), len(two)))
    read_rows(candidate.label, candidate.probability, bounded=True)
    group, count = live.domain + 1, len(domains) + 1  # those of no domain are group 0
    here, other, change = (
        auc_differences(live.label, one, two, group, count)
        for one, two in (
            (live.probability, np.full(len(group), 0.5)),
            (candidate.probability, np.full(len(group), 0.5)),
            (candidate.probability, live.probability),
        )
    )
    rows, clicks = np.bincount(group, minlength=count), np.bincount(group, live.label, count)
    said = candidate.probability.astype(np.float64)
    expected, chance = np.bincount(group, said, count), np.bincount(group, said * (1 - said), count)
    judged = []
    for number, name in enumerate(domains, start=1):
        before = (remembered or {}).get(name, _NOTHING)
        row = Judged(
            domain=name,
            num_rows=int(rows[number]),
            clicks=int(clicks[number]),
            expected=float(expected[number]),
            expected_error=math.sqrt(chance[number]),
            live=float(0.5 + here.value[number]),
            candidate=float(0.5 + other.value[number]),
            standard_error=float(change.standard_error[number]),
            before=before["auc"] if before["rarer"] >= limits.min_rarer else math.nan,
            drift_error=math.hypot(before["standard_error"], float(here.standard_error[number])),
            pcoc=float(expected[number] / clicks[number]) if clicks[number] else math.nan,
            status="unjudged",
        )
        judged.append(replace(row, status=_status(row, float(here.standard_error[number]), limits)))
    return Verdict(tuple(judged), _wauc(live, candidate, judged), limits)


def remember(said: Predictions, domains: Sequence[str]) -> dict[str, dict[str, float]]:
    """AUC and its standard error in each domain that has enough rows of both classes, for the next day's :func:`judge`.

    **Source**: DeLong et al. 1988, of one AUC.
    """
    group, count = said.domain + 1, len(domains) + 1
    found = auc_differences(said.label, said.probability, np.full(len(group), 0.5), group, count)
    rows, clicks = np.bincount(group, minlength=count), np.bincount(group, said.label, count)
    rarer = np.minimum(clicks, rows - clicks)
    mean = np.bincount(group, said.probability, count) / np.maximum(rows, 1)
    figures = zip(domains, found.value[1:], found.standard_error[1:], rarer[1:], mean[1:], strict=True)
    return {
        name: {
            "auc": float(0.5 + value),
            "standard_error": float(error),
            "rarer": float(number),
            "mean_score": float(score),
        }
        for name, value, error, number, score in figures
        if not math.isnan(error)
    }


def _wauc(live: Predictions, candidate: Predictions, judged: Sequence[Judged]) -> Difference:
    """Over the judged domains: of one with a few clicks even the error is unknown."""
    chosen = np.array([False, *(row.status != "unjudged" for row in judged)])[live.domain + 1]
    if not chosen.any():
        return Difference(math.nan, math.nan)
    columns = (live.label, candidate.probability, live.probability, live.domain)
    return wauc_difference(*(column[chosen] for column in columns))


def _status(row: Judged, live_error: float, limits: Limits) -> Status:
    if math.isnan(row.standard_error) or min(row.clicks, row.num_rows - row.clicks) < limits.min_rarer:
        return "unjudged"
    drift, fall, below = row.before - max(row.live, row.candidate), row.live - row.candidate, 0.5 - row.live
    if below > limits.max_drift and below > limits.z * live_error:
        return "reversed"
    if drift > limits.max_drift and drift > limits.z * row.drift_error:
        return "drifted"
    return "fell" if fall > limits.max_fall and fall > limits.z * row.standard_error else "passed"


def _reason(row: Judged, limits: Limits) -> str:
    now, then, before = 100 * row.live, 100 * row.candidate, 100 * row.before
    if row.status == "fell":
        fall = _points(row.live - row.candidate, row.standard_error, limits.max_fall)
        return f"{row.domain}: AUC falls from {now:.2f} to {then:.2f}, by {fall}"
    if row.status == "reversed":
        return f"{row.domain}: AUC of the live model is {now:.2f} on these rows, below 50; look whether labels are reversed"
    fall = _points(row.before - max(row.live, row.candidate), row.drift_error, limits.max_drift)
    return (
        f"{row.domain}: AUC was {before:.2f} when the live model was published, and on these rows it is {now:.2f} and the "
        f"candidate's {then:.2f}, a fall of {fall}; look at the labels of this day"
    )


def _points(fall: float, error: float, most: float) -> str:
    return f"{100 * fall:.2f} ± {100 * error:.2f} points (at most {100 * most:g})"


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
