"""``POST /v1/feedback``: what happened to rows that were answered."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from domlora.abtest.log import EventLog, Feedback
from domlora.abtest.observed import Observer
from domlora.abtest.segments import SegmentFiles
from domlora.errors import DataError
from domlora.serving.http.answers import (
    Answer,
    NotFoundError,
    Request,
    UnavailableError,
    json_answer,
    json_object,
    refusal,
)

if TYPE_CHECKING:
    from domlora.serving.http.metrics import Metrics
    from domlora.serving.http.service import Service
    from domlora.serving.settings import Settings

__all__ = ["feedback", "open_log"]

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_MOST_EVENTS = 10_000
_LONGEST = 200
_EARLY_S = 300.0  # a client's clock may be so much ahead of ours


class _Event(msgspec.Struct, forbid_unknown_fields=True):
    request_id: str
    event: str
    row: int | None = None
    value: float = 1.0
    time_s: float | None = None
    unit: str | None = None


class _Events(msgspec.Struct, forbid_unknown_fields=True):
    events: list[_Event]


_DECODER = msgspec.json.Decoder(_Events)


def open_log(folder: Path, settings: Settings, metrics: Metrics) -> EventLog:
    """The log of one worker, which tells the metrics what was predicted and what happened.

    Args:
        folder: ``STORE/log``; workers share it.
        settings: ``flush_s``, ``keep_days``, and ``workers``: if there are several, they learn from each other's segments.
        metrics: of this worker.
    """
    files = SegmentFiles(folder)
    others = folder if settings.workers > 1 else None
    observer = Observer(metrics.observed, others=others, writer=files.writer)
    return EventLog(
        folder,
        sink=files,
        flush_s=settings.flush_s,
        keep_days=settings.keep_days,
        observer=observer,
        tell=metrics.logged,
    )


def feedback(service: Service, request: Request) -> Answer:
    """Take events; all of them or, if one is not valid, none.

    The body is ``{"events": [{"request_id": ..., "row": 0, "event": "click"}]}``, an event with a ``value`` (1 if left out),
    a ``time_s`` (now) and a ``unit`` if wanted. ``row`` is the place in the answer; an event without it belongs to what its
    unit saw last, and its ``request_id`` may be any name of it, such as an order's. ``click`` is what the model predicts;
    ``shown`` says that a row was seen; other names are for experiments. The same event of the same row counts once, so a
    client that got no answer sends all of it again.
    """
    try:
        if service.log is None:
            raise NotFoundError("this server keeps no log of events", next_step="Serve a store, which has one")
        events = _events(request.body, service.settings.max_rows)
        new = service.log.happened(*events)
        if new is None:
            raise UnavailableError("there is no room for more events", next_step="Send them again later")
    except (DataError, NotFoundError, UnavailableError) as error:
        return refusal(error)
    return json_answer({"accepted": new, "duplicates": len(events) - new})


def _events(body: bytes, max_rows: int) -> list[Feedback]:
    told: _Events = json_object(body, _DECODER, _num_fields)
    if not 1 <= len(told.events) <= _MOST_EVENTS:
        raise DataError(f"a request must have 1 to {_MOST_EVENTS} events", received=len(told.events))
    now_s = time.time()
    for number, event in enumerate(told.events):
        wrong = _wrong(event, max_rows, now_s)
        if wrong is not None:
            rule, received = wrong
            raise DataError(f"events[{number}]: {rule}", received=received, next_step="None of the events was taken")
    return [
        Feedback(
            each.request_id, each.row, each.event, each.value, now_s if each.time_s is None else each.time_s, each.unit
        )
        for each in told.events
    ]


def _wrong(event: _Event, max_rows: int, now_s: float) -> tuple[str, Any] | None:
    """What is wrong with an event, and the value."""
    if not 0 < len(event.request_id) <= _LONGEST:
        return f"request_id must have 1 to {_LONGEST} characters", event.request_id[:_LONGEST]
    if event.row is None and event.unit is None:
        return "there must be a row, or a unit whose last row it is", event.row
    if event.row is not None and not 0 <= event.row < max_rows:
        return f"row must be between 0 and {max_rows - 1}", event.row
    if not _NAME.fullmatch(event.event):
        return "event must be a name of up to 40 small letters, digits and underscores", event.event[:_LONGEST]
    if not math.isfinite(event.value):
        return "value must be finite", event.value
    if event.time_s is not None and not 0 <= event.time_s <= now_s + _EARLY_S:
        return "time_s must be seconds since 1970, and not later than now", event.time_s
    if event.unit is not None and not 0 < len(event.unit) <= _LONGEST:
        return f"unit must have 1 to {_LONGEST} characters", event.unit[:_LONGEST]
    return None


def _num_fields(told: _Events) -> int:
    """How many fields there are at least; the optional ones are counted where they differ from their default."""
    return 1 + sum(
        2 + (event.row is not None) + (event.value != 1.0) + (event.time_s is not None) + (event.unit is not None)
        for event in told.events
    )
