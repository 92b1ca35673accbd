"""A connection: uvicorn's protocol with deadlines, caps, and turns for requests that compute."""

from __future__ import annotations

import fcntl
import termios
from array import array
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from domlora.serving.http.answers import Answer
from domlora.serving.http.exchange import Exchange, raw_answer, target_of, wire
from domlora.serving.http.limits import BYTES_A_SECOND, is_scoring
from domlora.serving.http.shared import Shared

__all__ = ["Protocol", "ServerConfig", "Shared", "raw_answer", "unread"]

_MAX_HEADER_BYTES = 64 << 10
_LINGER_S, _LINGER_BYTES = 1.0, 4 << 20  # of a refused body that is still read: closing at once would lose the answer
_UNREAD_S = 10.0  # an answer that the client does not take
_RECENT_S = 0.5  # at the end: the next request of a client that was just answered, or has just come, may be on its way
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


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
    :class:`~domlora.serving.http.limits.Admission`, and answered by ``Shared.scorer`` in its turn. All others, and
    those that come before there is a scorer, are the application's: ``scope["arrived"]`` is ``perf_counter`` at a request's
    first byte, and ``scope["complete"]`` says that its body is whole and within the cap. :meth:`sweep` closes what is slow.
    """

    config: ServerConfig

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.shared = self.config.shared
        self.settings = self.shared.settings
        self.since: float | None = perf_counter()  # a message has begun and is not whole
        self._in_headers = True
        self._received = 0  # bytes of these headers, or of this body
        self._around = 0  # bytes of these headers; or since the body's last: its wrapping, and what stands behind it
        self._turn: Any = None  # the cycle that is answered; behind it are those of the pipeline
        self._held: tuple[Any, Any] | None = None
        self._ended = False  # nothing more is read
        self._mute = False  # nothing more is said
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
            self._begin()
        self._received += len(data)
        self._around += len(data)
        super().data_received(data)
        if self._around > _MAX_HEADER_BYTES and self.since is not None and not self._ended:
            self._refuse_message("headers", 431, _TOO_MANY_HEADERS)

    def connection_lost(self, exc: Exception | None) -> None:
        for cycle in (self._turn, *(cycle for cycle, _ in self.pipeline)):  # uvicorn tells the last one alone
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self.url, self.headers, self.expect_100_continue = b"", [], False
        if self.since is None:  # behind another one, and in the same packet
            self._begin()
        self.since = perf_counter()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:  # else it stands behind a body in chunks, where nobody looks for one
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._ended:  # it came in the packet of a body that was refused
            return
        self._in_headers, self._received, self._around = False, 0, 0
        target = target_of(self.url) if self.parser.get_method() == b"POST" else None
        if target is None or self.shared.scorer is None or self.parser.should_upgrade():
            self._take_as_uvicorn()
        elif self.shared.admission.full and (self.cycle is None or self.cycle.response_complete):
            self._skipped = True  # for a third of what it costs to make the request and then refuse it
        else:
            self._take(*target)

    def on_body(self, body: bytes) -> None:
        self._around = 0
        cycle: Any = self.cycle
        if self._skipped or self._ended:
            return
        if isinstance(cycle, Exchange):
            size = 0 if cycle.response_complete else cycle.add(body)
        elif self._held is not None:
            cycle.body += body
            size = len(cycle.body)
        else:
            super().on_body(body)
            return
        if size > self.settings.max_body_bytes:
            self._refuse_held("too_large", 413, _TOO_LARGE)

    def on_message_complete(self) -> None:
        if self._ended:
            return
        if self._skipped:
            self._refuse_skipped()
            return
        super().on_message_complete()
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
        self._refuse_message("malformed", 400, _MALFORMED)

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

    def _begin(self) -> None:
        self.since, self._in_headers, self._received, self._around = perf_counter(), True, 0, 0

    def _take(self, path: str, query: bytes) -> None:
        """Begin a request to score, behind the one before if that is not answered."""
        before, keeps = self.cycle, self.parser.should_keep_alive() and self.parser.get_http_version() != "1.0"
        arrived = self.since or perf_counter()
        exchange: Any = Exchange(path, query, self.headers, arrived, keeps, self.expect_100_continue)
        self.cycle = exchange
        if before is None or before.response_complete:
            self._start_asgi_task(exchange, None)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((exchange, self.app))

    def _take_as_uvicorn(self) -> None:
        """Begin any other request. Its scope is made only now: one to score needs none."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        self.scope["arrived"] = self.since  # type: ignore[typeddict-unknown-key]
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._turn = cycle
        if self.shared.closing:
            cycle.keep_alive = False
        if isinstance(cycle, Exchange):
            if cycle.more_body:
                self._hold(cycle, app)
            else:  # it waited behind another one of this connection
                self._offer(cycle, app)
        elif not is_scoring(cycle.scope["path"]) or cycle.scope["method"] != "POST":
            super()._start_asgi_task(cycle, app)
        elif not cycle.more_body:  # it waited behind another one of this connection
            self._offer(cycle, app)
        else:
            self._hold(cycle, app)

    def _hold(self, cycle: Any, app: Any) -> None:
        self._held = (cycle, app)
        headers = cycle.headers if isinstance(cycle, Exchange) else cycle.scope["headers"]
        told = [value for name, value in headers if name == b"content-length"]
        if told and int(told[0]) > self.settings.max_body_bytes:
            self._refuse_held("too_large", 413, _TOO_LARGE)
        elif cycle.waiting_for_100_continue:
            cycle.waiting_for_100_continue = False
            self._write(CONTINUE)

    def _offer(self, cycle: Any, app: Any) -> None:
        offer, refuse = self.shared.admission.offer, partial(self._refuse_busy, cycle)
        if isinstance(cycle, Exchange):
            offer(cycle.arrived, partial(self._answer, cycle), refuse)
        else:
            cycle.scope["complete"] = True
            offer(cycle.scope["arrived"], partial(self._start, cycle, app), refuse)

    def _start(self, cycle: Any, app: Any) -> None:
        if not cycle.disconnected:
            super()._start_asgi_task(cycle, app)

    def _answer(self, exchange: Exchange) -> None:
        if exchange.disconnected or self.shared.scorer is None:
            return
        answer = self.shared.scorer(exchange.request())
        if self.flow.write_paused:  # a client that does not take what it asked for
            task = self.loop.create_task(self._say_later(exchange, answer))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        else:
            self._say(exchange, answer)

    async def _say_later(self, exchange: Exchange, answer: Answer) -> None:
        await self.flow.drain()
        self._say(exchange, answer)

    def _say(self, exchange: Exchange, answer: Answer) -> None:
        if exchange.disconnected:
            return
        exchange.response_started = exchange.response_complete = True
        self._write(wire(answer, self.server_state.default_headers, exchange.keep_alive))
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _refuse_busy(self, cycle: Any) -> None:
        """Answer this request without the application; the connection goes on."""
        if cycle.disconnected:
            return
        self._count("busy", 503)
        cycle.response_complete = True
        self._write(_BUSY[not cycle.keep_alive])
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _refuse_skipped(self) -> None:
        self._skipped, self.since, self._idle_since = False, None, perf_counter()
        keeps = self.parser.should_keep_alive() and not self.shared.closing
        self._count("busy", 503)
        self._write(_BUSY[not keeps])
        if not keeps:
            self.transport.close()

    def _refuse_held(self, reason: str, status: int, answer: bytes) -> None:
        """Answer the request whose body is coming, and take no more of it."""
        if self._held is None:
            return
        (cycle, _), self._held = self._held, None
        self._count(reason, status)
        cycle.response_complete = True
        cycle.body.clear()
        self._write(answer)
        self._linger()

    def _refuse_message(self, reason: str, status: int, answer: bytes) -> None:
        """Answer what is coming, and take no more of it; nothing is said before the answer to a request in front of it."""
        if self._held is not None:
            self._refuse_held(reason, status, answer)
        elif self._turn is None or self._turn.response_complete:
            self._refuse_connection(reason, status, answer)
        else:  # the connection closes after that answer
            self._count(reason, status)
            self.pipeline.clear()
            self.cycle, self._turn.keep_alive = self._turn, False
            self._ended, self._received, self.since = True, 0, perf_counter()

    def _refuse_connection(self, reason: str, status: int, answer: bytes) -> None:
        self._count(reason, status)
        self._write(answer)
        self._linger()

    def _write(self, data: bytes) -> None:
        """Send, unless the client cannot be told any more: writing would raise."""
        if not self._mute and not self.transport.is_closing():
            self.transport.write(data)

    def _count(self, reason: str, status: int) -> None:
        self.shared.refused[reason, status] += 1

    def _linger(self) -> None:
        """Say no more, read a little more, then close: a reset would take the answer away."""
        if self.transport.is_closing():
            return
        self._ended, self._received, self.since = True, 0, perf_counter()
        self.flow.resume_reading()
        self._mute = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
