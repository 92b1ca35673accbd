"""Requests behind others on one connection: what one client does there must not end the turns of all."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from domlora.serving.http.answers import Answer, Request
from domlora.serving.http.limits import Admission
from domlora.serving.http.metrics import Metrics
from domlora.serving.http.protocol import ServerConfig, Shared
from domlora.serving.http.server import Door, Server
from domlora.serving.settings import Settings

SETTINGS = Settings(
    Path("bundle"), max_body_bytes=100_000, max_wait_s=10.0, header_timeout_s=0.5, body_timeout_s=2.0, drain_s=0.0
)


class Running:
    """A server in a thread; it scores by waiting as long as the query says, and answers the body's length."""

    def __init__(self) -> None:
        self.shared = Shared(SETTINGS, Metrics())
        self.shared.scorer = self.score
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        door = Door(self.shared)
        door.app = self.app
        self.server = Server(ServerConfig(door, self.shared), listening)
        self.thread = threading.Thread(target=lambda: uvloop.run(self.run()))
        self.thread.start()

    async def run(self) -> None:
        serving = asyncio.get_running_loop().create_task(self.server.serve())
        while not serving.done():
            self.server.sweep()
            await asyncio.sleep(0.02)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        while scope["method"] == "POST" and (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.body", "body": b"other"})

    def score(self, asked: Request) -> Answer:
        time.sleep(float(next(iter(asked.query), 0)))
        return Answer(200, b"%d" % len(asked.body))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    @contextmanager
    def busy(self, seconds: float) -> Iterator[None]:
        """Computes meanwhile, and then reads what has come at once."""
        with self.connect() as sock:
            sock.sendall(asking(b"1", "connection: close", path=f"/v1/score?{seconds}"))
            time.sleep(0.1)
            yield
            rest_of(sock)

    def scores(self) -> bool:
        """Whether somebody else is still answered."""
        with self.connect() as sock:
            sock.sendall(asking(b"12345", "connection: close"))
            return rest_of(sock).endswith(b"\r\n\r\n5")


@pytest.fixture
def server(caplog: pytest.LogCaptureFixture) -> Iterator[Running]:
    running = Running()
    yield running
    running.server.should_exit = True
    running.thread.join(10)
    assert [record.message for record in caplog.records if record.name == "domlora.serving"] == []


def asking(body: bytes, *headers: str, path: str = "/v1/score?0", size: int | None = None) -> bytes:
    told = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body) if size is None else size}", *headers]
    return "\r\n".join([*told, "", ""]).encode() + body


def chunked(*parts: bytes, path: str = "/v1/score?0") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


def rest_of(sock: socket.socket) -> bytes:
    came = b""
    while data := sock.recv(65536):
        came += data
    return came


def test_the_next_request_may_begin_in_the_packet_that_ends_a_long_body(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(asking(b"x", size=70_000))
        time.sleep(0.1)
        sock.sendall(b"x" * 69_997)
        time.sleep(0.1)
        following = asking(b"1", "connection: close")
        sock.sendall(b"xx" + following[:1])
        assert b"\r\n\r\n70000" in sock.recv(65536)
        sock.sendall(following[1:])
        assert rest_of(sock).endswith(b"\r\n\r\n1")
    assert server.scores()


def test_a_client_that_goes_while_its_second_request_waits(server: Running) -> None:
    gone, others = server.connect(), [server.connect() for _ in range(3)]
    with server.busy(0.3):
        gone.sendall(asking(b"1") + asking(b"2") + asking(b"3"))
        time.sleep(0.05)
        for other in others:
            other.sendall(asking(b"4", "connection: close", path="/v1/score?0.2"))
    time.sleep(0.1)  # the first one is answered, and the second one waits behind the other clients'
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    gone.close()
    for other in others:
        assert rest_of(other).endswith(b"\r\n\r\n1")
        other.close()
    assert server.scores()


def test_endless_headers_behind_a_request_that_waits(server: Running) -> None:
    with server.connect() as sock:
        with server.busy(0.3):
            sending = asking(b"1") + b"POST / HTTP/1.1\r\n" + b"x-many: header\r\n" * 30_000
            thread = threading.Thread(target=sock.sendall, args=(sending,))
            thread.start()
        came = rest_of(sock)
        thread.join()
    assert came.startswith(b"HTTP/1.1 200 OK")
    assert came.count(b"HTTP/1.1") == 1 or came.count(b"HTTP/1.1 431 ") == 1  # it was answered before they came
    assert server.scores()


def test_what_follows_a_body_that_was_refused_is_not_looked_at(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(chunked(b"x" * 90_000))
        time.sleep(0.2)
        sock.sendall(b"4e20\r\n" + b"x" * 20_000 + b"\r\n0\r\n\r\n" + asking(b"1") * 3)
        came = rest_of(sock)
    assert came.startswith(b"HTTP/1.1 413 ")
    assert came.count(b"HTTP/1.1") == 1
    assert server.scores()


def test_a_body_that_is_no_chunks_is_answered(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(chunked(b"12") + b"no chunk\r\n")
        assert rest_of(sock).startswith(b"HTTP/1.1 400 ")


def test_what_is_no_http_behind_two_requests_ends_the_connection(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(asking(b"1", path="/v1/score?0.2") + asking(b"2") + b"\x16\x03\x01 hello\r\n\r\n")
        came = rest_of(sock)
    assert came.count(b"HTTP/1.1") == 1
    assert b"connection: close" in came
    assert server.scores()


@pytest.mark.parametrize("path", ["/v1/score", "/other"])
def test_headers_behind_a_body_are_left_out_and_have_their_cap(server: Running, path: str) -> None:
    few = chunked(b"123", path=path) + b"0\r\nx-sum: 7\r\ncontent-encoding: gzip\r\n\r\n"
    with server.connect() as sock:
        sock.sendall(few + asking(b"1", "connection: close"))
        assert rest_of(sock).count(b"HTTP/1.1 200 OK") == 2
    sent = 0
    with server.connect() as sock, pytest.raises((TimeoutError, ConnectionError, StopIteration)):  # noqa: PT012
        sock.sendall(chunked(b"123", path=path) + b"0\r\n")
        while sent < 64 << 20:
            sock.sendall(b"x-more: header\r\n" * 1_000)
            sent += 16_000
    assert sent < 32 << 20
    assert server.scores()


def test_one_that_fails_does_not_end_the_turns_of_others(caplog: pytest.LogCaptureFixture) -> None:
    async def turns() -> list[str]:
        said: list[str] = []

        def fail() -> None:
            raise RuntimeError("on purpose")

        admission = Admission(max_wait_s=10.0)
        for start in (fail, lambda: said.append("second")):
            admission.offer(time.perf_counter(), start, fail)
        admission.offer(time.perf_counter() - 100.0, fail, fail)  # too late: refused
        admission.offer(time.perf_counter(), lambda: said.append("last"), fail)
        await asyncio.sleep(0.1)
        return said

    with caplog.at_level(logging.ERROR):
        assert asyncio.run(turns()) == ["second", "last"]
    assert [record.message for record in caplog.records] == ["not answered"] * 2
