"""A connection: uvicorn's protocol with deadlines, caps, and turns for requests that compute."""

from __future__ import annotations

import fcntl
import json
import termios
from array import array
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from time import perf_counter
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from domlora.serving.http.limits import BYTES_A_SECOND, Admission, is_scoring
from domlora.serving.http.metrics import Metrics
from domlora.serving.settings import Settings

__all__ = ["Protocol", "ServerConfig", "Shared", "raw_answer", "unread"]

_MAX_HEADER_BYTES = 64 << 10
_LINGER_S, _LINGER_BYTES = 1.0, 4 << 20  # of a refused body that is still read: closing at once would lose the answer
_UNREAD_S = 10.0  # an answer that the client does not take
_RECENT_S = 0.5  # at the end: the next request of a client that was just answered, or has just come, may be on its way
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(slots=True)
class Shared:
    """What the connections of a process share.

    Args:
        settings: of the server.
        metrics: where refusals are counted.
        admission: who waits for a turn.
        draining: the server ends soon, and is not ready.
        closing: nobody new can come; no connection is kept after its answer.
        refused: reasons and statuses that :meth:`count` has not told the metrics yet.
    """

    settings: Settings
    metrics: Metrics
    admission: Admission = field(init=False)
    draining: bool = False
    closing: bool = False
    refused: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.admission = Admission(self.settings.max_wait_s)

    def count(self) -> None:
        """Tell the metrics what was refused; called now and then, because in an overload counting costs too."""
        while self.refused:
            (reason, status), number = self.refused.popitem()
            self.metrics.refused(reason, status, number)


class ServerConfig(Config):
    """uvicorn's configuration, and what our connections share."""

    def __init__(self, app: Any, shared: Shared) -> None:
        self.shared = shared
        super().__init__(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=shared.settings.keep_alive_s,  # type: ignore[arg-type]  # call_later takes a float
            timeout_graceful_shutdown=shared.settings.grace_s,  # type: ignore[arg-type]
        )


def raw_answer(status: int, error: str, next_step: str, *, close: bool = True) -> bytes:
    """A whole answer as it goes over the wire.

    >>> raw_answer(504, "too late", "Try again").splitlines()[0]
    b'HTTP/1.1 504 Gateway Timeout'
    """
    body = json.dumps({"error": error, "next_step": next_step}).encode()
    head = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *(["retry-after: 1"] if status == HTTPStatus.SERVICE_UNAVAILABLE else []),
        *(["connection: close"] if close else []),
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


_BUSY = [
    raw_answer(503, "the server is at its limit", "Try again after a second", close=close) for close in (False, True)
]
_FULL = raw_answer(503, "the server has as many connections as it may have", "Try again after a second")
_TOO_LARGE = raw_answer(413, "the body has more bytes than are allowed", "Send fewer rows in one request")
_TOO_SLOW = raw_answer(408, "the request did not come in time", "Send it without a pause")
_MALFORMED = raw_answer(400, "the request is not HTTP/1.1", "Use an HTTP client")
_TOO_MANY_HEADERS = raw_answer(431, "the headers have more bytes than are allowed", "Send fewer headers")


def unread(transport: Any) -> int:
    """Bytes that have come and that nobody has read yet."""
    number = array("i", [0])
    with suppress(OSError, AttributeError):
        fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.FIONREAD, number)
    return number[0]


class Protocol(HttpToolsProtocol):
    """One connection.

    A request to a scoring path is held until its body is whole, then offered to
    :class:`~domlora.serving.http.limits.Admission`; what is refused costs no task. ``scope["arrived"]`` is ``perf_counter``
    at a request's first byte, and ``scope["complete"]`` says that its body is whole and within the cap. :meth:`sweep` closes
    what is slow.
    """

    config: ServerConfig

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.shared = self.config.shared
        self.settings = self.shared.settings
        self.since: float | None = perf_counter()  # a message has begun and is not whole
        self._in_headers = True
        self._received = 0  # bytes of these headers, or of this body
        self._held: tuple[Any, Any] | None = None
        self._ended = False
        self._skipped = False  # a refused request whose body is still coming
        self._idle_since = perf_counter()
        self._unsent_since: float | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self._refuse_connection("connections", 503, _FULL)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            self._received += len(data)
            if self._received > _LINGER_BYTES:
                self.transport.abort()
            return
        if self.since is None:
            self.since, self._in_headers, self._received = perf_counter(), True, 0
        self._received += len(data)
        super().data_received(data)
        if self._in_headers and self._received > _MAX_HEADER_BYTES and self.since is not None:
            self._refuse_connection("headers", 431, _TOO_MANY_HEADERS)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        now = perf_counter()
        self.since, self._in_headers = now, True
        self.scope["arrived"] = now  # type: ignore[typeddict-unknown-key]

    def on_headers_complete(self) -> None:
        self._in_headers, self._received = False, 0
        if self.shared.admission.full and self._may_skip():
            self._skipped = True  # for a third of what it costs to make the request and then refuse it
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._skipped:
            return
        if self._held is None:
            super().on_body(body)
            return
        self.cycle.body += body
        if len(self.cycle.body) > self.settings.max_body_bytes:
            self._refuse_held("too_large", 413, _TOO_LARGE)

    def on_message_complete(self) -> None:
        if self._skipped:
            self._refuse_skipped()
            return
        super().on_message_complete()
        if self._ended:
            return
        self.since = None
        if self._held is not None:
            held, self._held = self._held, None
            self._offer(*held)

    def on_response_complete(self) -> None:
        """As uvicorn's, but idle connections are closed by :meth:`sweep`: a timer for each answer costs more."""
        if self.transport.is_closing():
            return
        self._idle_since = perf_counter()
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self.cycle.more_body and not self._ended:
            self._linger()  # the application answered before it had read the body

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - what the parser says helps nobody
        if self.cycle is None or self.cycle.response_complete:
            self._refuse_connection("malformed", 400, _MALFORMED)
            return
        self._count("malformed", 400)  # behind a request that is still answered: nothing may come before that answer
        self.pipeline.clear()
        self.cycle.keep_alive = False
        self._ended, self._received, self.since = True, 0, perf_counter()

    def sweep(self, now: float) -> None:
        """Close this connection if its client is too slow; called some times a second."""
        working = self.cycle is not None and not self.cycle.response_complete
        if self._ended:
            if self.since is not None and now - self.since > _LINGER_S and not working:
                self.transport.abort()
        elif self.shared.closing and not self._expects(now):
            self.transport.close()
        elif self.since is not None:
            self._sweep_message(now - self.since)
        elif not working and now - self._idle_since > self.settings.keep_alive_s:
            self.transport.close()
        self._sweep_answer(now)

    def shutdown(self) -> None:
        """Close at once if nothing is asked; what has come in part is still answered, then the connection closes.

        A client that was just answered or has just connected is given a moment: its next request would be lost else.
        """
        if self.cycle is not None:
            self.cycle.keep_alive = False
        if not self._expects(perf_counter()):
            self.transport.close()

    def waits(self) -> bool:
        """Whether a request is here, in part or whole, that nothing was answered to."""
        answered = self.cycle is None or self.cycle.response_complete
        return not self._ended and (not answered or (self.since is not None and self._received > 0))

    def _expects(self, now: float) -> bool:
        """Whether somebody has asked, or may be about to."""
        return now - self._idle_since < _RECENT_S or self.waits() or unread(self.transport) > 0

    def _sweep_message(self, waited_s: float) -> None:
        if self._in_headers:
            working = self.cycle is not None and not self.cycle.response_complete
            if waited_s > self.settings.header_timeout_s and not working:
                self._refuse_connection("too_slow", 408, _TOO_SLOW)
            return
        allowed_s = self.settings.body_timeout_s + self._received / BYTES_A_SECOND
        if self._held is not None and waited_s > allowed_s:
            self._refuse_held("too_slow", 408, _TOO_SLOW)
        elif waited_s > allowed_s + 1.0:  # the application should have ended it
            self.transport.abort()

    def _sweep_answer(self, now: float) -> None:
        if not self.transport.get_write_buffer_size():
            self._unsent_since = None
        elif self._unsent_since is None:
            self._unsent_since = now
        elif now - self._unsent_since > _UNREAD_S:
            self.transport.abort()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if self.shared.closing:
            cycle.keep_alive = False
        if not is_scoring(cycle.scope["path"]) or cycle.scope["method"] != "POST":
            super()._start_asgi_task(cycle, app)
        elif not cycle.more_body:  # it waited behind another one of this connection
            self._offer(cycle, app)
        else:
            self._hold(cycle, app)

    def _hold(self, cycle: Any, app: Any) -> None:
        self._held = (cycle, app)
        told = [value for name, value in cycle.scope["headers"] if name == b"content-length"]
        if told and int(told[0]) > self.settings.max_body_bytes:
            self._refuse_held("too_large", 413, _TOO_LARGE)
        elif cycle.waiting_for_100_continue:
            cycle.waiting_for_100_continue = False
            self.transport.write(CONTINUE)

    def _offer(self, cycle: Any, app: Any) -> None:
        cycle.scope["complete"] = True
        admission, arrived = self.shared.admission, cycle.scope["arrived"]
        admission.offer(arrived, partial(self._start, cycle, app), partial(self._refuse_busy, cycle))

    def _start(self, cycle: Any, app: Any) -> None:
        if not cycle.disconnected:
            super()._start_asgi_task(cycle, app)

    def _refuse_busy(self, cycle: Any) -> None:
        """Answer this request without the application; the connection goes on."""
        if cycle.disconnected:
            return
        self._count("busy", 503)
        cycle.response_complete = True
        self.transport.write(_BUSY[not cycle.keep_alive])
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _may_skip(self) -> bool:
        """Whether this is a request to score, and nothing is before it in this connection."""
        scoring = self.parser.get_method() == b"POST" and is_scoring(self.url.partition(b"?")[0].decode("latin-1"))
        return scoring and (self.cycle is None or self.cycle.response_complete)

    def _refuse_skipped(self) -> None:
        self._skipped, self.since, self._idle_since = False, None, perf_counter()
        keeps = self.parser.should_keep_alive() and not self.shared.closing
        self._count("busy", 503)
        self.transport.write(_BUSY[not keeps])
        if not keeps:
            self.transport.close()

    def _refuse_held(self, reason: str, status: int, answer: bytes) -> None:
        """Answer the request whose body is coming, and take no more of it."""
        if self._held is None:
            return
        (cycle, _), self._held = self._held, None
        self._count(reason, status)
        cycle.response_complete = True
        cycle.body = bytearray()
        self.transport.write(answer)
        self._linger()

    def _refuse_connection(self, reason: str, status: int, answer: bytes) -> None:
        self._count(reason, status)
        self.transport.write(answer)
        self._linger()

    def _count(self, reason: str, status: int) -> None:
        self.shared.refused[reason, status] += 1

    def _linger(self) -> None:
        """Say no more, read a little more, then close: a reset would take the answer away."""
        if self.transport.is_closing():
            return
        self._ended, self._received, self.since = True, 0, perf_counter()
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
