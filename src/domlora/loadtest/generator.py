"""One process that sends requests and notes what becomes of each.

Sockets are read and written by hand, without a framework: whoever measures a server must not be slower than it. In the open
loop a request is sent when it is due, whatever became of those before, and its time counts from when it was due: a client
that waits for answers before it asks again does not notice how long others would have waited.
"""

from __future__ import annotations

import json
import random
import select
import socket
import time
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from domlora.errors import ConfigError

__all__ = ["OK", "Load", "Seen", "generate"]

OK, TIMED_OUT, LOST, MALFORMED = 200, -1, -2, -3
_UNANSWERED = {TIMED_OUT: "timed out", LOST: "connection lost", MALFORMED: "not HTTP with a length"}
_CHUNK = 1 << 18
_LOOK_S = 0.1  # how often timeouts are looked for
_LENGTH = b"\r\ncontent-length:"
_REASON = 80  # characters


@dataclass(frozen=True, slots=True)
class Load:
    """What one process does.

    Args:
        host, port: where to send.
        start_at: ``time.monotonic`` of the first request.
        seconds: how long to send, the warm-up included.
        warmup_s: so long at the beginning nothing is noted.
        rate: requests a second at random moments (a Poisson process); None for the closed loop.
        clients: of the closed loop, each of which asks again when it is answered; of the open one the most connections.
        timeout_s: a request that takes longer is given up, and its connection closed.
        seed: of the moments and of the order of requests.
    """

    host: str
    port: int
    start_at: float
    seconds: float
    warmup_s: float
    rate: float | None
    clients: int
    timeout_s: float
    seed: int


@dataclass(slots=True)
class Seen:
    """What became of requests.

    Args:
        seconds: of each answer with 200, from when it was due.
        late: by how many seconds it was sent later than it was due.
        statuses: how many of each status and reason; all that were due and not in the warm-up are here.
        cpu_s: that sending and noting took.
    """

    seconds: array[float] = field(default_factory=lambda: array("d"))
    late: array[float] = field(default_factory=lambda: array("d"))
    statuses: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0


class _Connection:
    __slots__ = ("connecting", "due", "got", "sent", "sock", "unsent")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.connecting = True
        self.due = self.sent = 0.0  # due is 0 where nothing is asked
        self.got = b""
        self.unsent = b""


def generate(load: Load, requests: Sequence[bytes]) -> Seen:
    """Send requests, each one or more times, and wait for the answers.

    Args:
        load: how many and for how long.
        requests: whole, as they go over the wire.

    Raises:
        ConfigError: the host has no address.
    """
    return _Generator(load, requests).run()


class _Generator:
    def __init__(self, load: Load, requests: Sequence[bytes]) -> None:
        self._load = load
        self._random = random.Random(load.seed)
        self._requests = list(requests)
        self._random.shuffle(self._requests)
        self._next = 0
        self._address = _address_of(load)
        self._poll = select.epoll()
        self._open: dict[int, _Connection] = {}
        self._free: list[_Connection] = []
        self._waiting: deque[float] = deque()  # due, and no connection is free
        self._measured_from = load.start_at + load.warmup_s
        self._ends = load.start_at + load.seconds
        self._noted = Seen()

    def run(self) -> Seen:
        time.sleep(max(self._load.start_at - time.monotonic(), 0))
        began = time.process_time()
        if self._load.rate is None:
            for _ in range(self._load.clients):
                self._send(time.monotonic())
            self._turn_until(self._ends)
        else:
            self._open_loop(self._load.rate)
        self._turn_until(time.monotonic() + self._load.timeout_s + _LOOK_S, only_while_asked=True)
        for connection in self._open.values():
            connection.sock.close()
        self._poll.close()
        self._noted.cpu_s = time.process_time() - began
        return self._noted

    def _open_loop(self, rate: float) -> None:
        due, look_at = self._load.start_at, 0.0
        while due < self._ends:
            now = time.monotonic()
            while due <= now and due < self._ends:
                self._send(due)
                due += self._random.expovariate(rate)
            if now > look_at:
                self._give_up(now)
                look_at = now + _LOOK_S
            self._turn(min(due, self._ends) - time.monotonic())

    def _turn_until(self, end: float, *, only_while_asked: bool = False) -> None:
        look_at = 0.0
        while (now := time.monotonic()) < end:
            if only_while_asked and not self._waiting and not any(each.due for each in self._open.values()):
                return
            if now > look_at:
                self._give_up(now)
                look_at = now + _LOOK_S
            self._turn(min(_LOOK_S, end - now))

    def _turn(self, timeout_s: float) -> None:
        """Read what is there, waiting for it: ``select`` counts microseconds, ``epoll`` only milliseconds."""
        if timeout_s > 0:
            select.select([self._poll], [], [], timeout_s)
        for number, events in self._poll.poll(0):
            connection = self._open.get(number)
            if connection is None:
                continue
            if events & select.EPOLLOUT:
                self._write(connection)
            if events & ~select.EPOLLOUT and self._open.get(number) is connection:
                self._read(connection)

    def _send(self, due: float) -> None:
        """Send the next request on a free connection, or a new one, or wait for one."""
        if self._free:
            self._ask(self._free.pop(), due)
        elif len(self._open) < self._load.clients:
            self._ask(self._connect(), due)
        else:
            self._waiting.append(due)

    def _connect(self) -> _Connection:
        family, kind, protocol, _, address = self._address
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = self._open[sock.fileno()] = _Connection(sock)
        connection.connecting = sock.connect_ex(address) != 0  # an error is seen when the socket can be written
        self._poll.register(sock.fileno(), select.EPOLLIN | select.EPOLLOUT)
        return connection

    def _ask(self, connection: _Connection, due: float) -> None:
        request = self._requests[self._next]
        self._next = (self._next + 1) % len(self._requests)
        connection.due, connection.sent = due, time.monotonic()
        connection.unsent = request
        if not connection.connecting:
            self._write(connection)

    def _write(self, connection: _Connection) -> None:
        connection.connecting = False
        if connection.unsent:
            try:
                sent = connection.sock.send(connection.unsent)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._lose(connection, LOST)
                return
            whole, connection.unsent = sent == len(connection.unsent), connection.unsent[sent:]
            if whole:
                return
        more = select.EPOLLOUT if connection.unsent else 0
        self._poll.modify(connection.sock.fileno(), select.EPOLLIN | more)

    def _read(self, connection: _Connection) -> None:
        try:
            got = connection.sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            got = b""
        if not got:
            self._lose(connection, LOST)
            return
        connection.got = connection.got + got if connection.got else got
        end = connection.got.find(b"\r\n\r\n")
        if end < 0:
            return
        head = connection.got[:end].lower()
        at = head.find(_LENGTH)
        if at < 0 or not connection.due:
            self._lose(connection, MALFORMED)
            return
        size = int(head[at + len(_LENGTH) :].partition(b"\r\n")[0])
        if len(connection.got) >= end + 4 + size:
            self._answered(connection, head, connection.got[end + 4 :])

    def _answered(self, connection: _Connection, head: bytes, body: bytes) -> None:
        now = time.monotonic()
        status = int(head[9:12])
        self._note(connection, status, now, body)
        connection.due, connection.got = 0.0, b""
        if b"connection: close" in head:
            self._drop(connection)
            connection = self._connect()
        self._go_on(connection, now)

    def _go_on(self, connection: _Connection, now: float) -> None:
        """What a connection does next."""
        if self._waiting:
            self._ask(connection, self._waiting.popleft())
        elif self._load.rate is None and now < self._ends:
            self._ask(connection, now)
        else:
            self._free.append(connection)

    def _note(self, connection: _Connection, status: int, now: float, body: bytes = b"") -> None:
        if connection.due < self._measured_from:
            return
        self._noted.late.append(connection.sent - connection.due)
        if status == OK:
            self._noted.seconds.append(now - connection.due)
            self._noted.statuses["200"] += 1
        else:
            self._noted.statuses[_said(status, body)] += 1

    def _lose(self, connection: _Connection, status: int) -> None:
        """Close a connection; its request, if there is one, was not answered."""
        if connection.due:
            self._note(connection, status, time.monotonic())
        elif connection in self._free:
            self._free.remove(connection)
        asked = bool(connection.due)
        self._drop(connection)
        if asked and (self._waiting or (self._load.rate is None and time.monotonic() < self._ends)):
            self._go_on(self._connect(), time.monotonic())

    def _drop(self, connection: _Connection) -> None:
        number = connection.sock.fileno()
        if number >= 0:
            self._poll.unregister(number)
            del self._open[number]
            connection.sock.close()

    def _give_up(self, now: float) -> None:
        """Requests that have waited too long, on a connection or for one."""
        oldest = now - self._load.timeout_s
        for connection in [each for each in self._open.values() if each.due and each.due < oldest]:
            self._lose(connection, TIMED_OUT)
        while self._waiting and self._waiting[0] < oldest:
            due = self._waiting.popleft()
            if due >= self._measured_from:
                self._noted.statuses[_UNANSWERED[TIMED_OUT]] += 1


def _address_of(load: Load) -> tuple[Any, ...]:
    try:
        return socket.getaddrinfo(load.host, load.port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"a server's host must have an address ({error})", received=load.host) from error


def _said(status: int, body: bytes) -> str:
    """A status and its reason: the server's word for it, or how its message begins."""
    if status in _UNANSWERED:
        return _UNANSWERED[status]
    try:
        told = json.loads(body)
        reason = str(told.get("reason") or told["error"].partition(". ")[0])
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = ""
    return f"{status} {' '.join(reason.split())[:_REASON].removesuffix('.')}".rstrip()
