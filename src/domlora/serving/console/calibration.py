"""Whether what happened is what was predicted, of counts alone."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

__all__ = ["CONFIDENCE", "TOLERANCE", "Calibration", "calibration"]

CONFIDENCE, TOLERANCE = 0.99, 0.1
_Z = 2.5758293035489004  # of 99 %, two-sided
_LEAST = 20  # predicted or observed; with fewer, chance is larger than what one wants to see
_LEAST_BELOW = 5  # observed; with fewer, the approximation of the lower bound is poor

Verdict = Literal["high", "low", "fine", "few"]


class Calibration(NamedTuple):
    """Predicted over observed with an interval; ``high`` predicts too much. None where it is not to be had."""

    ratio: float | None
    low: float | None
    high: float | None
    verdict: Verdict


def calibration(predicted: float, observed: float) -> Calibration:
    """Compare a sum of probabilities with a count of events.

    The interval takes the count for a Poisson one, which is a little wide, since events of probability ``p`` vary by
    ``p (1 - p)``. A domain is off only where the interval leaves 1 out and the ratio is more than ``TOLERANCE`` away: of a
    thousand domains some leave it out by chance, and of a million rows each does by a trifle.

    **Source**: Byar's approximation, Breslow and Day 1987, volume II, equation 2.13.

    Args:
        predicted: sum of the probabilities of rows with feedback.
        observed: how many events there were.

    Example:
        >>> calibration(130.0, 100.0).verdict, calibration(101.0, 100.0).verdict, calibration(3.0, 1.0).verdict
        ('high', 'fine', 'few')
        >>> [round(value, 2) for value in calibration(130.0, 100.0)[:3]]
        [1.3, 1.01, 1.71]
    """
    high = (observed + 1) * (1 - 1 / (9 * (observed + 1)) + _Z / (3 * math.sqrt(observed + 1))) ** 3
    bounds: tuple[float, float | None] = (predicted / high, None)
    if observed >= _LEAST_BELOW:
        low = observed * (1 - 1 / (9 * observed) - _Z / (3 * math.sqrt(observed))) ** 3
        bounds = (predicted / high, predicted / low)
    ratio = predicted / observed if observed else None
    return Calibration(ratio, *bounds, _verdict(predicted, observed, bounds))


def _verdict(predicted: float, observed: float, bounds: tuple[float, float | None]) -> Verdict:
    if max(predicted, observed) < _LEAST:
        return "few"
    if bounds[0] > 1 and predicted > (1 + TOLERANCE) * observed:
        return "high"
    if bounds[1] is not None and bounds[1] < 1 and predicted < (1 - TOLERANCE) * observed:
        return "low"
    return "fine"
