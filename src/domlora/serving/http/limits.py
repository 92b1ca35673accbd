"""What one request may take: bytes, time and a place among those who wait."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter
from typing import Any

from domlora.errors import DataError, DomloraError
from domlora.serving.settings import Settings

__all__ = ["Admission", "BusyError", "TooLargeError", "TooSlowError", "inflate", "is_scoring", "read_body"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_LOG = logging.getLogger("domlora.serving")
_SLICE_S = 0.001  # of computing between two looks at the sockets: what a refusal waits for
_LONG_SLICE_S = 0.02  # where refusals take so much of a pass that they must wait, or nothing would be computed
_LATE = 1.5  # times max_wait_s: an accepted request that waited so long after all is refused
BYTES_A_SECOND = 100_000  # a slower body is a slow client's
_MEMORY = 0.98  # of what is learned, at each turn


class TooLargeError(DataError):
    """A body of more bytes than are allowed: 413."""


class TooSlowError(DataError):
    """A body that did not come in time: 408."""


class BusyError(DomloraError):
    """More requests than can be answered in time: 503 with Retry-After."""

    retry_after_s = 1


def is_scoring(path: str) -> bool:
    """Whether a request to this path is computed on the event loop, and so waits for its turn.

    >>> is_scoring("/v1/score"), is_scoring("/v2/models/live/infer"), is_scoring("/v2/health/ready")
    (True, True, False)
    """
    return path == "/v1/score" or (path.endswith("/infer") and path.startswith("/v2/models/"))


class Admission:
    """Bounded waiting for an event loop that computes.

    Requests whose bytes are all there wait here and not as tasks, so that it is known how many wait. In each pass of the
    loop those of the next millisecond are answered; then sockets are read again, and who would wait longer than
    ``max_wait_s`` is refused at once, for the price of parsing its headers. The time of a request is learned from the
    passes. Clients that ask again at once wait longer for a refusal, so that at least a third of the time is for answers.

    Args:
        max_wait_s: the longest a request may wait for its turn.

    Example:
        >>> async def two() -> list[str]:
        ...     said: list[str] = []
        ...     admission = Admission(max_wait_s=0.05)
        ...     for name in ("first", "second"):
        ...         admission.offer(perf_counter(), lambda name=name: said.append(name), lambda: said.append("busy"))
        ...     await asyncio.sleep(0.01)
        ...     return said
        >>> asyncio.run(two())
        ['first', 'second']
    """

    def __init__(self, max_wait_s: float) -> None:
        self._max_wait_s = max_wait_s
        self._queue: deque[tuple[float, Callable[[], None], Callable[[], None]]] = deque()
        self.going = False
        self._turned = self._computed_from = self._own_s = 0.0
        self._started = 0
        self._count, self._passes_s, self._compute_s = 1.0, 0.001, 0.001  # sums that forget

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return len(self._queue)

    @property
    def full(self) -> bool:
        """Whether one more would wait too long."""
        return len(self._queue) * self._passes_s >= self._max_wait_s * self._count

    def offer(self, arrived: float, start: Callable[[], None], refuse: Callable[[], None]) -> None:
        """Call ``start`` when it is this request's turn, or ``refuse`` now.

        Args:
            arrived: ``perf_counter`` at its first byte.
            start: answers, or makes the task that does.
            refuse: answers 503.
        """
        if self.full:
            refuse()
            return
        self._queue.append((arrived, start, refuse))
        if not self.going:
            self.going = True
            asyncio.get_running_loop().call_soon(self._begin)

    def _begin(self) -> None:
        self._turned = perf_counter()
        self._start(_SLICE_S)

    def _start(self, slice_s: float) -> None:
        """Start those of a slice, with a look at the clock before their tasks, if any, and the next turn behind."""
        loop, now = asyncio.get_running_loop(), self._turned
        loop.call_soon(self._note)
        self._started, most = 0, max(1, int(slice_s * self._count / self._compute_s))
        while self._queue and self._started < most and (not self._started or now < self._turned + slice_s):
            arrived, start, refuse = self._queue.popleft()
            late = now - arrived > _LATE * self._max_wait_s
            self._started += not late
            try:
                (refuse if late else start)()
            except Exception:  # of one connection: the turns of all others go on
                _LOG.exception("not answered")
            now = perf_counter()
        self._own_s = now - self._turned
        self.going = self._started > 0
        if self.going:
            loop.call_soon(self._turn)

    def _note(self) -> None:
        self._computed_from = perf_counter()

    def _turn(self) -> None:
        """Learn from the pass that ends here, and begin the next one."""
        now = perf_counter()
        pass_s, compute_s = now - self._turned, now - self._computed_from + self._own_s
        self._count = self._count * _MEMORY + self._started
        self._passes_s = self._passes_s * _MEMORY + pass_s
        self._compute_s = self._compute_s * _MEMORY + compute_s
        self._turned = now
        self._start(min(max(_SLICE_S, (pass_s - compute_s) / 2), _LONG_SLICE_S))


async def read_body(scope: Scope, receive: Receive, settings: Settings, cap: int | None = None) -> bytes:
    """The whole body as it came, which :func:`inflate` decompresses; no more of it is held than is allowed.

    Args:
        scope, receive: of ASGI.
        settings: ``max_body_bytes`` and ``body_timeout_s``.
        cap: the most bytes, in place of ``max_body_bytes``.

    Raises:
        TooLargeError: more bytes than allowed, told or sent.
        TooSlowError: the body does not come.
        DataError: the client has gone.
    """
    cap = settings.max_body_bytes if cap is None else cap
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value) > cap:
            raise _too_large(cap)
    if scope.get("complete"):  # our protocol has all of it, within the cap
        body: bytes = (await receive()).get("body", b"")
        return body
    return await _slow_body(receive, settings, cap)


def inflate(body: bytes, encoding: bytes, cap: int) -> bytes:
    """A body that a client compressed.

    Args:
        body: what came.
        encoding: the value of Content-Encoding: gzip, deflate, identity or none.
        cap: the most bytes that come out.

    Raises:
        TooLargeError: more than ``cap`` would come out; not more than that was computed.
        DataError: another encoding, or bytes that are not of it.

    Example:
        >>> import gzip
        >>> inflate(gzip.compress(b"[1, 2]"), b"gzip", 100)
        b'[1, 2]'
    """
    name = encoding.strip().lower()
    if name in (b"", b"identity"):
        return body
    if name not in (b"gzip", b"deflate"):
        raise DataError(
            "a body is compressed with gzip or deflate, or not at all",
            received=encoding.decode("latin-1")[:40],
            next_step="Leave Content-Encoding out",
        )
    unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib, whichever the first bytes say
    try:
        plain = unpacker.decompress(body, cap + 1)
    except zlib.error as error:
        raise DataError("the body is not what its Content-Encoding says", received=name.decode()) from error
    if len(plain) > cap:
        raise _too_large(cap)
    if not unpacker.eof:
        raise DataError("the compressed body ends too early", received=f"{len(body)} bytes")
    return plain


async def _slow_body(receive: Receive, settings: Settings, cap: int) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s) as limit:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise DataError("the client went before its request was whole")
                body += message.get("body", b"")
                if len(body) > cap:
                    raise _too_large(cap)
                more = message.get("more_body", False)
                _extend(limit, len(message.get("body", b"")))
    except TimeoutError as error:
        raise TooSlowError(
            f"a body must come within {settings.body_timeout_s} s, and a second more for each 100 kB",
            received=f"{len(body)} bytes",
        ) from error
    return bytes(body)


def _extend(limit: asyncio.Timeout, num_bytes: int) -> None:
    deadline = limit.when()
    if deadline is not None and not limit.expired():
        limit.reschedule(deadline + num_bytes / BYTES_A_SECOND)


def _too_large(cap: int) -> TooLargeError:
    return TooLargeError(f"a body may have {cap:,} bytes", next_step="Send fewer rows in one request")
