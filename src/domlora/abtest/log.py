"""What was shown and what happened, out of the way of whoever answers.

A request leaves its arrays in memory, which takes about a microsecond. A thread makes columns of them and gives them to a
sink, by default :class:`domlora.abtest.segments.SegmentFiles`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from domlora.abtest.observed import Observer
from domlora.abtest.segments import EXPOSURES, FEEDBACK, EventSink, Kind, SegmentFiles, compact, retain
from domlora.errors import ConfigError, DataError

__all__ = ["EventLog", "Exposure", "Feedback"]

_LOG = logging.getLogger("domlora.serving")
_PATIENCE_S = 30.0  # the longest pause between two tries on a full disk
_MOST_SEEN = 200_000
_NO_EXPERIMENT = (("", ""),)


class Feedback(NamedTuple):
    """Something that happened to a row of an answer.

    Args:
        request_id: of the answer.
        row: its place in the answer; None if it is not known which.
        event: ``click``, ``conversion``, or ``shown`` for a row that was seen.
        value: 1.0, money, seconds; 0.0 for what did not happen.
        time_s: when, seconds since 1970.
        unit: who, if it is known.
    """

    request_id: str
    row: int | None
    event: str
    value: float
    time_s: float
    unit: str | None = None


class Exposure(NamedTuple):
    """What :meth:`EventLog.exposed` was told."""

    request_id: str
    time_s: float
    unit: str | None
    domain: str | None
    assignments: Sequence[Any]
    bundle: str
    adapter: str | None
    probability: NDArray[np.float32]
    items: Sequence[Any] | None = None
    rows: NDArray[np.int32] | None = None


class EventLog:
    """Events of one process, in memory until the next second, then in a sink.

    When the sink refuses, such as a full disk, events wait in memory and are offered again, at longer and longer intervals.
    What does not fit in memory is dropped, counted and warned of; whoever answers never waits.

    Args:
        folder: where segments go, ``STORE/log``; with a ``sink`` of your own it may be None.
        sink: where events go instead.
        flush_s: how often they do.
        max_rows: or as soon as there are so many.
        max_pending_rows: the most that wait; 64 candidates take some 600 bytes, with items more.
        sync: bring each segment to disk before it counts, see ``SegmentFiles``.
        keep_days: segments older than this are removed; None keeps them all.
        tidy_s: how often small segments are merged and old ones removed; None for never.
        observer: compares what was predicted with what happened, in the same thread.
        tell: called there with the rows that wait, and those that were dropped so far.

    Raises:
        ConfigError: neither folder nor sink.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     log = EventLog(Path(name))
        ...     probability = np.array([0.2, 0.1], np.float32)
        ...     log.exposed("r1", 0.0, "user-7", "toys", (), "3", "3", probability, ["robot", "kite"])
        ...     log.happened(Feedback("r1", 0, "click", 1.0, 2.5))
        ...     log.close()
        ...     pa.parquet.read_table(f"{name}/exposures")["item"].to_pylist()
        1
        ['robot', 'kite']
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        sink: EventSink | None = None,
        flush_s: float = 1.0,
        max_rows: int = 10_000,
        max_pending_rows: int = 1_000_000,
        sync: bool = False,
        keep_days: float | None = None,
        tidy_s: float | None = 60.0,
        observer: Observer | None = None,
        tell: Callable[[int, int], object] | None = None,
    ) -> None:
        if sink is None:
            if folder is None:
                raise ConfigError("an event log needs a folder or a sink")
            sink = SegmentFiles(folder, sync=sync)
        self.folder, self.sink = folder, sink
        self._flush_s, self._max_rows, self._most = flush_s, max_rows, max_pending_rows
        self._keep_days, self._tidy_s = keep_days, tidy_s
        self._observer, self._tell = observer, tell
        self._exposures: deque[Exposure] = deque()
        self._feedback: deque[Feedback] = deque()
        self._seen: dict[int, None] = {}  # the oldest first; a hash and not the text, which would take much room
        self._held: dict[Kind, list[Any]] = {"exposures": [], "feedback": []}
        self._taken = self._dropped = self._written = self._told = 0
        self._counting, self._writing = threading.Lock(), threading.Lock()
        self._wake, self._closed = threading.Event(), False
        self._pause_s, self._failure = 0.0, ""
        self._tidied = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Rows that wait."""
        return self._taken - self._written

    @property
    def dropped(self) -> int:
        """Rows that did not fit in memory while the sink refused."""
        return self._dropped

    @property
    def failure(self) -> str:
        """Why the sink refuses at the moment; empty if it does not."""
        return self._failure

    def exposed(
        self,
        request_id: str,
        time_s: float,
        unit: str | None,
        domain: str | None,
        assignments: Sequence[Any],
        bundle: str,
        adapter: str | None,
        probability: NDArray[np.float32],
        items: Sequence[Any] | None = None,
        rows: NDArray[np.int32] | None = None,
    ) -> None:
        """Remember what a request was answered.

        Args:
            request_id: of the answer.
            time_s: seconds since 1970.
            unit: who asked.
            domain: of all rows; a request of several domains is several exposures.
            assignments: of ``Assigner.assign``; each experiment gets rows of its own. None leaves ``experiment`` empty.
            bundle, adapter: versions that answered.
            probability: ``(B,)``; not changed by anybody from now on.
            items: a name for each row, for analyses of what was shown.
            rows: ``(B,)`` places of these rows in the answer, where it has others too.

        Raises:
            DataError: not as many items or places as rows.
        """
        for given in (items, rows):
            if given is not None and len(given) != len(probability):
                raise DataError("each row needs one item and one place", received=(len(given), len(probability)))
        event = Exposure(request_id, time_s, unit, domain, assignments, bundle, adapter, probability, items, rows)
        if self._accept(_rows_of(event)):
            self._exposures.append(event)

    def happened(self, *events: Feedback) -> int | None:
        """Remember what happened; how many were new, or None if there is no room, and then none is taken.

        The same event of the same row counts once, as far back as this process remembers. Other processes have a memory of
        their own, so a reader of the log takes the first of each.
        """
        fresh = {}
        for event in events:
            key = hash(event[:3])
            if key not in self._seen and key not in fresh:
                fresh[key] = event
        if not self._accept(len(fresh)):
            return None
        self._seen.update(dict.fromkeys(fresh))
        while len(self._seen) > _MOST_SEEN:
            del self._seen[next(iter(self._seen))]
        self._feedback.extend(fresh.values())
        return len(fresh)

    def flush(self) -> bool:
        """Offer all that waits to the sink now; whether it took everything."""
        with self._writing:
            return self._write()

    def close(self) -> None:
        """Write the rest and stop; what the sink still refuses is lost, and said."""
        self._closed = True
        self._wake.set()
        self._thread.join()
        if not self.flush():
            _LOG.error("events lost", extra={"fields": {"rows": self.pending, "reason": self._failure}})
        self.sink.close()

    def _accept(self, rows: int) -> bool:
        with self._counting:
            if self._taken - self._written + rows > self._most:
                self._dropped += rows
                return False
            self._taken += rows
        if self._taken - self._written >= self._max_rows:
            self._wake.set()
        return True

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait(self._flush_s)
            self._wake.clear()
            if self._pause_s:  # a full disk stays full for a while, however much is waiting
                self._sleep(self._pause_s)
            try:
                self.flush()
                self._tidy()
            except Exception:
                _LOG.exception("events not written")

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._closed and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
            self._report()

    def _write(self) -> bool:
        self._say_dropped()
        if self._observer is not None:
            self._observer.look()
        feedback = _drain(self._feedback)  # before the exposures: what it is about was exposed before it came
        fresh: dict[Kind, list[Any]] = {"exposures": _drain(self._exposures), "feedback": feedback}
        done = True
        for kind, events in fresh.items():
            held = self._held[kind]
            held.extend(events)
            if self._observer is not None:
                self._observer.saw(kind, events)
            done = (not held or self._offer(kind, held)) and done
        if self._observer is not None:
            self._observer.tell(time.time())
        self._report()
        return done

    def _offer(self, kind: Kind, held: list[Any]) -> bool:
        try:
            table = self._table(kind, held)
            self.sink.write(kind, table)
        except OSError as error:
            self._refused(error)
            return False
        with self._counting:
            self._written += sum(map(_SIZES[kind], held))
        held.clear()
        if self._failure:
            _LOG.warning("events written again", extra={"fields": {"dropped": self._dropped}})
        self._failure, self._pause_s = "", 0.0
        return True

    def _table(self, kind: Kind, held: list[Any]) -> pa.Table:
        """Columns of all events but those that no column can hold, which would stop all that come after them."""
        try:
            return _TABLES[kind](held)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            good = [event for event in held if _fits(kind, event)]
        lost = sum(map(_SIZES[kind], held)) - sum(map(_SIZES[kind], good))
        with self._counting:
            self._dropped += lost
            self._written += lost
        held[:] = good
        return _TABLES[kind](held) if held else _SCHEMAS[kind].empty_table()

    def _refused(self, error: OSError) -> None:
        if not self._failure:
            _LOG.warning("events not written", extra={"fields": {"reason": str(error), "pending": self.pending}})
        self._failure = str(error)
        self._pause_s = min(max(self._flush_s, 2 * self._pause_s), _PATIENCE_S)

    def _say_dropped(self) -> None:
        if self._dropped > self._told:
            _LOG.warning("events dropped", extra={"fields": {"rows": self._dropped - self._told}})
            self._told = self._dropped

    def _report(self) -> None:
        if self._tell is not None:
            self._tell(self.pending, self._dropped)

    def _tidy(self) -> None:
        if self._tidy_s is None or self.folder is None or time.monotonic() - self._tidied < self._tidy_s:
            return
        self._tidied = time.monotonic()
        try:
            compact(self.folder)
        finally:  # on a full disk nothing is merged, and all the more must go
            if self._keep_days is not None:
                retain(self.folder, self._keep_days)


def _drain(waiting: deque[Any]) -> list[Any]:
    """All that is there now; others may go on appending."""
    return [waiting.popleft() for _ in range(len(waiting))]


def _rows_of(exposure: Exposure) -> int:
    return len(exposure.probability) * (len(exposure.assignments) or 1)


def _exposures(events: list[Exposure]) -> pa.Table:
    """One block of rows for each event and each experiment it is in."""
    blocks = [(event, pair) for event in events for pair in _arms(event)]
    sizes = np.array([len(event.probability) for event, _ in blocks], np.int64)
    block = np.repeat(np.arange(len(blocks)), sizes)  # of each row
    row = [np.arange(len(event.probability)) if event.rows is None else event.rows for event, _ in blocks]
    spread = pa.array(block)

    def text(values: list[str | None]) -> pa.Array:
        return pa.array(values, pa.string()).take(spread)

    columns = {
        "time_s": np.array([event.time_s for event, _ in blocks], np.float64)[block],
        "request_id": text([event.request_id for event, _ in blocks]),
        "row": np.concatenate(row, dtype=np.int32, casting="same_kind"),
        "unit": text([event.unit for event, _ in blocks]),
        "domain": text([event.domain for event, _ in blocks]),
        "experiment": text([experiment for _, (experiment, _) in blocks]),
        "arm": text([arm for _, (_, arm) in blocks]),
        "bundle": text([event.bundle for event, _ in blocks]),
        "adapter": text([event.adapter for event, _ in blocks]),
        "item": _items(blocks, len(block)),
        "probability": np.concatenate([event.probability for event, _ in blocks], dtype=np.float32),
    }
    return pa.table(columns, schema=EXPOSURES)


def _arms(event: Exposure) -> Sequence[tuple[str, str]]:
    return [(each.experiment, each.arm.name) for each in event.assignments] or _NO_EXPERIMENT


def _items(blocks: list[tuple[Exposure, tuple[str, str]]], rows: int) -> pa.Array:
    if all(event.items is None for event, _ in blocks):
        return pa.nulls(rows, pa.string())
    names: list[str | None] = []
    for event, _ in blocks:
        size = len(event.probability)
        names += [None] * size if event.items is None else [None if item is None else str(item) for item in event.items]
    return pa.array(names, pa.string())


def _feedback(events: list[Feedback]) -> pa.Table:
    columns: dict[str, Callable[[Feedback], Any]] = {
        "time_s": lambda event: event.time_s,
        "request_id": lambda event: event.request_id,
        "row": lambda event: event.row,
        "unit": lambda event: event.unit,
        "event": lambda event: event.event,
        "value": lambda event: event.value,
    }
    return pa.table({name: [of(event) for event in events] for name, of in columns.items()}, schema=FEEDBACK)


def _fits(kind: Kind, event: Any) -> bool:
    try:
        _TABLES[kind]([event])
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


_TABLES: dict[Kind, Callable[[list[Any]], pa.Table]] = {"exposures": _exposures, "feedback": _feedback}
_SCHEMAS: dict[Kind, pa.Schema] = {"exposures": EXPOSURES, "feedback": FEEDBACK}
_SIZES: dict[Kind, Callable[[Any], int]] = {"exposures": _rows_of, "feedback": lambda _: 1}
