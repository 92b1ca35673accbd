"""A client that sends at a given rate, whatever the server does, and notes what became of each request.

Open loop: a request is sent when it is due, on a free connection or a new one, and its time counts from when it was due. A
client that waits for answers before it asks again would hide an overload.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import uvloop

TORN, REFUSED = -1, -2  # in the place of a status


@dataclass
class Seen:
    """What became of the requests."""

    status: list[int] = field(default_factory=list)
    due: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    retry_after: int = 0
    elapsed_s: float = 0.0

    def count(self) -> Counter[int]:
        return Counter(self.status)

    def percentile(self, q: float, *statuses: int) -> float:
        """Of the milliseconds of the answers with these statuses."""
        found = [s for s, status in zip(self.seconds, self.status, strict=True) if status in statuses]
        return float(np.percentile(found, q) * 1e3) if found else 0.0

    def rate(self, status: int = 200) -> float:
        return self.count()[status] / self.elapsed_s


class _Connection(asyncio.Protocol):
    def __init__(self, pool: _Pool) -> None:
        self.pool, self.transport, self.due, self.data = pool, None, None, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def send(self, request: bytes, due: float) -> None:
        self.due = due
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.data += data
        end = self.data.find(b"\r\n\r\n")
        if end < 0 or self.due is None:
            return
        at = self.data.index(b"content-length: ") + 16
        if len(self.data) < end + 4 + int(self.data[at : self.data.index(b"\r", at)]):
            return
        head, self.data = self.data[:end], b""
        self.pool.seen.retry_after += b"retry-after: " in head
        self._done(int(head[9:12]))
        if b"connection: close" in head:
            self.transport.close()
            self.pool.go_on()
        elif self.pool.again is not None:
            self.send(next(self.pool.again), time.perf_counter())
        else:
            self.pool.free.append(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        if self.due is not None:
            self._done(TORN)
            self.pool.go_on()
        if self in self.pool.free:
            self.pool.free.remove(self)

    def _done(self, status: int) -> None:
        seen = self.pool.seen
        seen.status.append(status)
        seen.due.append(self.due)
        seen.seconds.append(time.perf_counter() - self.due)
        self.due = None


class _Pool:
    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.free: list[_Connection] = []
        self.seen = Seen()
        self.again: Iterator[bytes] | None = None
        self.tasks: set[asyncio.Task] = set()

    def go_on(self) -> None:
        """A client of the closed loop has lost its connection and takes another one."""
        if self.again is not None:
            self.send(next(self.again), time.perf_counter())

    def send(self, request: bytes, due: float) -> None:
        while self.free:
            connection = self.free.pop()
            if not connection.transport.is_closing():
                connection.send(request, due)
                return
        task = asyncio.get_running_loop().create_task(self._send_anew(request, due))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _send_anew(self, request: bytes, due: float) -> None:
        try:
            make = asyncio.get_running_loop().create_connection(lambda: _Connection(self), self.host, self.port)
            _, connection = await make
            connection.send(request, due)
        except OSError:
            self.seen.status.append(REFUSED)
            self.seen.due.append(due)
            self.seen.seconds.append(time.perf_counter() - due)


def request_of(path: str, body: bytes = b"", *headers: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def open_loop(
    port: int, requests: list[bytes], rate: float, seconds: float, seed: int = 0, wait_s: float = 15.0
) -> Seen:
    """Send ``rate`` requests a second, at random moments, and wait for the answers."""
    return uvloop.run(_open_loop(port, requests, rate, seconds, seed, wait_s))


async def _open_loop(port: int, requests: list[bytes], rate: float, seconds: float, seed: int, wait_s: float) -> Seen:
    pool, generator = _Pool("127.0.0.1", port), random.Random(seed)
    started = due = time.perf_counter() + 0.05
    sent = 0
    while due < started + seconds:
        now = time.perf_counter()
        while due <= now and due < started + seconds:
            pool.send(requests[sent % len(requests)], due)
            sent += 1
            due += generator.expovariate(rate)
        await asyncio.sleep(max(0.001, due - time.perf_counter()))
    until = time.perf_counter() + wait_s
    while len(pool.seen.status) < sent and time.perf_counter() < until:
        await asyncio.sleep(0.005)
    pool.seen.elapsed_s = seconds
    return pool.seen


def closed_loop(port: int, requests: list[bytes], clients: int, seconds: float) -> Seen:
    """So many clients that each ask again when they have their answer; what a server can do at the most."""
    return uvloop.run(_closed_loop(port, requests, clients, seconds))


async def _closed_loop(port: int, requests: list[bytes], clients: int, seconds: float) -> Seen:
    pool = _Pool("127.0.0.1", port)
    pool.again = itertools.cycle(requests)
    for _ in range(clients):
        pool.send(next(pool.again), time.perf_counter())
    await asyncio.sleep(seconds)
    pool.again = None
    pool.seen.elapsed_s = seconds
    return pool.seen
