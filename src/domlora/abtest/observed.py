"""What was predicted beside what happened, for the rows a process answered.

Clicks come late, so a row is judged once, when its window has passed: it was clicked by then or it was not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

__all__ = ["Observer"]

Tell = Callable[[str | None, float, float, int], object]
SHOWN = "shown"


@dataclass(slots=True, eq=False)
class _Recent:
    """One request of one domain whose window has not passed."""

    request_id: str
    until_s: float
    domain: str | None
    probability: NDArray[np.float32]
    rows: NDArray[np.int32] | None  # their places in the answer; None for all of it
    shown: set[int] = field(default_factory=set)
    clicked: set[int] = field(default_factory=set)

    def place(self, row: int) -> int | None:
        if self.rows is None:
            return row if row < len(self.probability) else None
        found = np.flatnonzero(self.rows == row)
        return int(found[0]) if len(found) else None


class Observer:
    """Sums of probabilities and of clicks by domain, of rows whose window has passed.

    A request that is sent again counts once, as it was answered first.
    All rows of an answer count as shown, until some client reports the event ``shown``: from then on only reported rows do.
    Feedback that another process of the same log received is read from its segments.

    Args:
        tell: called with the domain, the sum of probabilities, the clicks and the number of rows.
        event: what the model predicts.
        window_s: how long a click may take.
        max_rows: that are remembered; then the oldest are judged early.
        others: the log's folder, to learn what other processes received; None if there are none.
        writer: the name of this process's segments.

    Example:
        >>> from domlora.abtest.log import Exposure, Feedback
        >>> observer = Observer(lambda *sums: print(*sums), window_s=60.0)
        >>> probability = np.array([0.5, 0.25], np.float32)
        >>> observer.saw("exposures", [Exposure("r1", 0.0, None, "toys", (), "3", "3", probability, None)])
        >>> observer.saw("feedback", [Feedback("r1", 1, "click", 1.0, 5.0)])
        >>> observer.tell(59.0)
        >>> observer.tell(61.0)
        toys 0.75 1.0 2
    """

    def __init__(
        self,
        tell: Tell,
        *,
        event: str = "click",
        window_s: float = 600.0,
        max_rows: int = 2_000_000,
        others: Path | None = None,
        writer: str = "",
    ) -> None:
        self._tell, self._event, self._window_s, self._max_rows = tell, event, window_s, max_rows
        self._place = None if others is None else others / "feedback"
        self._writer = writer
        self._there = self._read = self._listed()
        self._by_request: dict[str, list[_Recent]] = {}
        self._order: deque[_Recent] = deque()
        self._rows, self._reports_shown = 0, False
        self._sums: dict[str | None, list[float]] = {}

    def look(self) -> None:
        """Note which files of other processes are there; :meth:`tell` hears those.

        To be called before the exposures are taken that :meth:`saw` gets: else a file may be about one not yet known.
        """
        self._there = self._listed()

    def saw(self, kind: str, events: Iterable[Any]) -> None:
        """Take exposures or feedback of this process."""
        for event in events:
            if kind == "exposures":
                self._remember(event)
            else:
                self._note(event.request_id, event.row, event.event, event.value)

    def tell(self, now_s: float) -> None:
        """Hear what others wrote before the last :meth:`look`, judge the rows whose window has passed, tell their sums."""
        self._hear_others()
        while self._order and (self._order[0].until_s <= now_s or self._rows > self._max_rows):
            self._judge(self._order.popleft())
        for domain, (predicted, observed, count) in self._sums.items():
            self._tell(domain, predicted, observed, int(count))
        self._sums.clear()

    def _remember(self, event: Any) -> None:
        recent = _Recent(event.request_id, event.time_s + self._window_s, event.domain, event.probability, event.rows)
        known = self._by_request.setdefault(event.request_id, [])
        if known and known[0].until_s != recent.until_s:  # the parts of one answer have one time
            return
        known.append(recent)
        self._order.append(recent)
        self._rows += len(recent.probability)

    def _note(self, request_id: str, row: int | None, event: str, value: float) -> None:
        self._reports_shown = self._reports_shown or event == SHOWN
        for recent in self._by_request.get(request_id, ()):
            place = None if row is None else recent.place(row)
            if place is not None and event in (SHOWN, self._event):
                recent.shown.add(place)
                if event == self._event and value > 0:
                    recent.clicked.add(place)

    def _judge(self, recent: _Recent) -> None:
        self._rows -= len(recent.probability)
        self._by_request.pop(recent.request_id, None)
        counted = recent.probability[sorted(recent.shown)] if self._reports_shown else recent.probability
        if len(counted):
            sums = self._sums.setdefault(recent.domain, [0.0, 0.0, 0.0])
            sums[0] += float(counted.sum(dtype=np.float64))
            sums[1] += len(recent.clicked)
            sums[2] += len(counted)

    def _hear_others(self) -> None:
        if self._place is not None:
            for name in sorted(self._there - self._read):
                for columns in _columns(self._place / name):
                    self._note(*columns)
        self._read = self._there

    def _listed(self) -> set[str]:
        if self._place is None or not self._place.is_dir():
            return set()
        return {path.name for path in self._place.glob("*.L0.parquet") if f"-{self._writer}-" not in path.name}


def _columns(path: Path) -> Iterable[Sequence[Any]]:
    """``(request_id, row, event, value)`` of each event of a segment."""
    names = ["request_id", "row", "event", "value"]
    try:
        table = pq.read_table(path, columns=names, partitioning=None)
    except (OSError, pa.ArrowInvalid):  # merged meanwhile, or damaged
        return ()
    return zip(*(table[name].to_pylist() for name in names), strict=True)
