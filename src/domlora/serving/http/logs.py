"""One JSON object a line, written by a thread of its own: a full pipe must not stop an event loop."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import queue
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from domlora.serving.http.answers import Answer, Request
    from domlora.serving.http.exchange import Scorer

__all__ = ["JsonLines", "Logged", "log_to"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_LOG = logging.getLogger("domlora.serving")
_MAX_LINES = 10_000  # that wait for the disk or the pipe; more are dropped
_ENDING_S = 2.0
_OVERLOADED = 503
_SAID = {
    b"x-request-id": "request_id",
    b"x-domlora-bundle": "version",
    b"x-domlora-adapter": "adapter",
    b"x-domlora-domain": "domain",
    b"x-domlora-arm": "arm",
}


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level, what, and the fields given as ``extra={"fields": {...}}``.

    Example:
        >>> record = logging.makeLogRecord({"msg": "ready", "levelname": "INFO", "fields": {"version": "3"}, "created": 0.0})
        >>> JsonLines().format(record)
        '{"time": "1970-01-01T00:00:00.000Z", "level": "info", "event": "ready", "version": "3"}'
    """

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.created % 1 * 1000):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Dropping(logging.handlers.QueueHandler):
    """Into the queue if there is room; the caller never waits."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # the formatter runs in the other thread

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        del record  # the queue is full


class _Listener(logging.handlers.QueueListener):
    """Its end waits for room and for the writing, but not for a pipe that nobody reads any more."""

    def stop(self) -> None:
        lines = cast("queue.Queue[Any]", self.queue)
        with suppress(queue.Full):
            lines.put(None, timeout=_ENDING_S)  # what tells the thread that this is all
        if self._thread is not None:
            self._thread.join(_ENDING_S)
            self._thread = None


def log_to(stream: TextIO = sys.stderr) -> logging.handlers.QueueListener:
    """All logging of this process to a stream, from a thread; ``stop()`` of what comes back writes the rest.

    Args:
        stream: where the lines go.
    """
    lines: queue.Queue[logging.LogRecord | None] = queue.Queue(_MAX_LINES)
    writer = logging.StreamHandler(stream)
    writer.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [_Dropping(lines)]
    root.setLevel(logging.WARNING)
    _LOG.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of each request that is no HTTP
    listener = _Listener(lines, writer)
    listener.start()
    return listener


class Logged:
    """An application whose answers are logged: a share of them, and every failure (5xx, but no overload).

    A line has what the answer's headers say (version, adapter, arm, request id), status and time; never a body.

    Args:
        app: the application.
        share: between 0 and 1.
    """

    def __init__(self, app: App, share: float) -> None:
        self._app = app
        self._share = share

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start" and self._chosen(message["status"]):
                since = scope.get("arrived", started)
                _tell(scope["method"], scope["path"], message["status"], message.get("headers", ()), since)
            await send(message)

        await self._app(scope, receive, told)

    def around(self, scorer: Scorer) -> Scorer:
        """The same for what answers without ASGI."""

        def told(request: Request) -> Answer:
            answer = scorer(request)
            if self._chosen(answer.status):
                _tell(request.method, request.path, answer.status, answer.headers, request.arrived)
            return answer

        return told

    def _chosen(self, status: int) -> bool:
        chosen = self._share > 0 and random.random() < self._share
        return chosen or (status >= 500 and status != _OVERLOADED)


def _tell(method: str, path: str, status: int, headers: Iterable[tuple[bytes, bytes]], since: float) -> None:
    said = {_SAID[name]: value.decode("latin-1") for name, value in headers if name in _SAID}
    fields = {
        "method": method,
        "path": path,
        "status": status,
        "ms": round((time.perf_counter() - since) * 1e3, 3),
        "pid": os.getpid(),
        **said,
    }
    _LOG.info("answered", extra={"fields": fields})
