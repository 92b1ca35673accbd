"""What the server counted, out of the text that Prometheus reads."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple, Self

__all__ = ["Figures"]

_LINE = re.compile(r"^([a-z_0-9]+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)  # a label's text may hold braces: up to the last
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")

Labels = Mapping[str, str]


class Figures(NamedTuple):
    """Counters by name, each with the labels of its series.

    Args:
        series: by name.
        now_s: when they were read, in seconds since 1970.

    Example:
        >>> figures = Figures.read('domlora_rows_total{domain="toys"} 64.0\\ndomlora_swaps_total 2.0\\n')
        >>> figures.by("rows", "domain"), figures.total("swaps"), figures.total("starts")
        ({'toys': 64.0}, 2.0, 0.0)
    """

    series: Mapping[str, list[tuple[Labels, float]]]
    now_s: float

    @classmethod
    def read(cls, text: str) -> Self:
        """From what ``Metrics.expose`` gives; the moments at which series were made are left out."""
        series: dict[str, list[tuple[Labels, float]]] = defaultdict(list)
        for name, labels, value in _LINE.findall(text):
            if not name.endswith("_created"):
                found = {key: _plain(word) for key, word in _LABEL.findall(labels)} if labels else {}
                series[name].append((found, float(value)))
        return cls(dict(series), time.time())

    def by(self, name: str, label: str) -> dict[str, float]:
        """A counter's sum for each value of a label."""
        sums: dict[str, float] = defaultdict(float)
        for labels, value in self.of(name):
            sums[labels.get(label, "")] += value
        return dict(sums)

    def total(self, name: str) -> float:
        """A counter's sum over all series; 0 if nothing was counted."""
        return sum((value for _, value in self.of(name)), 0.0)

    def of(self, name: str) -> list[tuple[Labels, float]]:
        """All series of a counter, named as ``Metrics`` names it."""
        return self.series.get(f"domlora_{name}_total", [])

    def quantiles(self, routes: Collection[str], levels: Mapping[str, float]) -> dict[str, float] | None:
        """Of the seconds that requests took, linear between the bounds of the buckets; None without a request."""
        counts: dict[float, float] = defaultdict(float)
        for labels, value in self.series.get("domlora_request_seconds_bucket", []):
            if labels["route"] in routes:
                counts[float(labels["le"])] += value
        bounds = sorted(counts)
        if not bounds or not counts[bounds[-1]]:
            return None
        return {name: _quantile(bounds, counts, level) for name, level in levels.items()}


def _quantile(bounds: list[float], counts: Mapping[float, float], level: float) -> float:
    wanted = level * counts[bounds[-1]]
    low, below = 0.0, 0.0
    for bound in bounds:
        if counts[bound] >= wanted:
            if math.isinf(bound):
                return low
            return low + (bound - low) * (wanted - below) / ((counts[bound] - below) or 1.0)
        low, below = bound, counts[bound]
    return low


def _plain(word: str) -> str:
    """A label's text as it was before it was written.

    >>> _plain('a \\\\"b\\\\"')
    'a "b"'
    """
    return _ESCAPED.sub(lambda found: "\n" if found[1] == "n" else found[1], word) if "\\" in word else word
