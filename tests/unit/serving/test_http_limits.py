"""Bytes, time and turns: one process of the real server on a real socket, and read_body by itself."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop

from domlora.errors import ConfigError, DataError
from domlora.serving.http.answers import Answer, Request
from domlora.serving.http.limits import Admission, TooLargeError, TooSlowError, inflate, read_body
from domlora.serving.http.metrics import Metrics
from domlora.serving.http.protocol import ServerConfig, Shared
from domlora.serving.http.server import Door, Server
from domlora.serving.settings import Settings

SETTINGS = Settings(
    Path("bundle"),
    max_body_bytes=10_000,
    max_adapter_bytes=20_000,
    max_connections=8,
    header_timeout_s=0.4,
    body_timeout_s=0.4,
    keep_alive_s=0.5,
    drain_s=0.0,
)


class Running:
    """A server in a thread, and a client of bytes."""

    def __init__(self, settings: Settings, *, scores: bool = False) -> None:
        self.metrics = Metrics()
        self.shared = Shared(settings, self.metrics)
        self.shared.scorer = self.score if scores else None
        door = Door(self.shared)
        door.app = self.app
        self.settings = settings
        self.arrived: list[float] = []
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.server = Server(ServerConfig(door, self.shared), listening)
        self.thread = threading.Thread(target=lambda: uvloop.run(self.run()))
        self.thread.start()

    async def run(self) -> None:
        sweeping = asyncio.get_running_loop().create_task(self.sweep())
        await self.server.serve()
        sweeping.cancel()

    async def sweep(self) -> None:
        while True:
            self.server.sweep()
            self.shared.count()
            await asyncio.sleep(0.02)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.arrived.append(time.perf_counter() - scope["arrived"])
        try:
            body = await read_body(scope, receive, self.settings)
            encoding = dict(scope["headers"]).get(b"content-encoding", b"")
            status, said = 200, str(len(inflate(body, encoding, self.settings.max_body_bytes)))
        except DataError as error:
            status, said = (413 if isinstance(error, TooLargeError) else 400), str(error)
        if scope["query_string"]:
            time.sleep(float(scope["query_string"]))
        body = said.encode()
        await send(
            {"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]}
        )
        await send({"type": "http.response.body", "body": body})

    def score(self, asked: Request) -> Answer:
        self.arrived.append(time.perf_counter() - asked.arrived)
        time.sleep(float(next(iter(asked.query), 0)))
        try:
            encoding = asked.headers.get(b"content-encoding")
            body = inflate(asked.body, encoding, self.settings.max_body_bytes) if encoding else asked.body
        except DataError as error:
            return Answer(413 if isinstance(error, TooLargeError) else 400, str(error).encode())
        return Answer(200, b"%d" % len(body) + asked.headers.get(b"x-more", b"") * 50_000)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def ask(self, *parts: bytes) -> bytes:
        """Send parts, and all that comes until the server closes."""
        with self.connect() as sock:
            for part in parts:
                sock.sendall(part)
            return rest_of(sock)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)


def rest_of(sock: socket.socket) -> bytes:
    came = b""
    while data := sock.recv(65536):
        came += data
    return came


@pytest.fixture(scope="module", params=[False, True], ids=["application", "scorer"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    """Requests to score are answered by the application, as all others are, or by a scorer beside it."""
    running = Running(SETTINGS, scores=request.param)
    yield running
    running.stop()


def asking(path: str, body: bytes, *headers: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: x", *headers, "", ""]).encode() + body


def status_of(answer: bytes) -> int:
    return int(answer.split()[1])


def test_a_request_is_answered_and_its_arrival_noted(server: Running) -> None:
    for path in ("/v1/score", "/other"):
        answer = server.ask(asking(path, b"12345", "content-length: 5", "connection: close"))
        assert status_of(answer) == 200
        assert answer.endswith(b"\r\n5")
        assert 0 < server.arrived[-1] < 1


@pytest.mark.parametrize("path", ["/v1/score", "/v2/models/m/infer", "/other"])
def test_more_bytes_than_allowed_are_413_before_they_are_sent(server: Running, path: str) -> None:
    answer = server.ask(asking(path, b"", "content-length: 314572800"))
    assert status_of(answer) == 413


@pytest.mark.parametrize("path", ["/v1/score", "/other"])
def test_a_chunked_body_without_end_is_cut_off(server: Running, path: str) -> None:
    chunk, sent = b"1000\r\n" + b"x" * 4096 + b"\r\n", 0
    with server.connect() as sock:
        sock.sendall(asking(path, b"", "transfer-encoding: chunked"))
        sock.settimeout(0.001)
        answer = b""
        while not answer and sent < 300 << 20:
            try:
                sent += sock.send(chunk)
                answer = sock.recv(65536)
            except TimeoutError:
                continue
    assert status_of(answer) == 413
    assert sent < SETTINGS.max_body_bytes + (8 << 20)


def test_what_follows_a_body_is_another_request(server: Running) -> None:
    answer = server.ask(asking("/v1/score", b"12345" + b"y" * 500 + b"\r\n\r\n", "content-length: 5"))
    assert status_of(answer) == 200
    assert answer.endswith(b"\r\n5")
    assert answer.count(b"HTTP/1.1") == 1


def test_a_compressed_body_comes_out_within_the_cap(server: Running) -> None:
    good, bomb = gzip.compress(b"a" * 9_000), gzip.compress(b"a" * 100_000_000)
    for body, status in ((good, 200), (bomb[:9_000], 413)):
        told = (f"content-length: {len(body)}", "content-encoding: gzip", "connection: close")
        assert status_of(server.ask(asking("/v1/score", body, *told))) == status


def test_slow_headers_and_bodies_are_closed_in_time(server: Running) -> None:
    def trickle(start: bytes) -> tuple[float, bytes]:
        began = time.perf_counter()
        with server.connect() as sock:
            sock.sendall(start)
            sock.settimeout(0.05)
            answer = b""
            while time.perf_counter() - began < 5:
                try:
                    if not (data := sock.recv(65536)):
                        break
                    answer += data
                except TimeoutError:
                    sock.sendall(start and b"a")
                except ConnectionError:
                    break
        return time.perf_counter() - began, answer

    for start in (b"", b"POST /v1/score HTTP/1.1\r\nx-slow: ", asking("/v1/score", b"", "content-length: 9999")):
        seconds, answer = trickle(start)
        assert 0.3 < seconds < 2.0
        assert not answer or status_of(answer) in (400, 408)
    seconds, _ = trickle(asking("/other", b"", "content-length: 9999"))
    assert seconds < 3.0


def test_endless_headers_are_refused(server: Running) -> None:
    assert status_of(server.ask(b"GET / HTTP/1.1\r\n" + b"x-many: header\r\n" * 8_000)) == 431


def test_what_is_no_http_is_400(server: Running) -> None:
    assert status_of(server.ask(b"\x16\x03\x01 hello\r\n\r\n")) == 400


def test_an_idle_connection_is_closed_later_than_a_slow_one(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(asking("/v1/score", b"1", "content-length: 1"))
        assert sock.recv(65536)
        began = time.perf_counter()
        assert sock.recv(65536) == b""
    assert 0.4 < time.perf_counter() - began < 2.0


def test_curl_is_told_to_go_on(server: Running) -> None:
    with server.connect() as sock:
        sock.sendall(asking("/v1/score", b"", "content-length: 3", "expect: 100-continue", "connection: close"))
        assert sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"abc")
        assert rest_of(sock).endswith(b"\r\n3")


def test_pipelined_requests_are_answered_in_their_order(server: Running) -> None:
    parts = [asking("/v1/score", b"x" * n, f"content-length: {n}") for n in (1, 2, 3)]
    answer = server.ask(*parts, asking("/other", b"", "connection: close"))
    assert [part[:1] for part in answer.split(b"\r\n\r\n")[1:]] == [b"1", b"2", b"3", b"0"]


def test_a_client_that_does_not_read_gets_its_answers_one_after_another() -> None:
    running, long = Running(replace(SETTINGS, max_wait_s=10.0), scores=True), 50_001
    try:
        with running.connect() as sock:
            asks = asking("/v1/score", b"1", "content-length: 1", "x-more: 7")
            last = asking("/v1/score", b"1", "content-length: 1", "x-more: 7", "connection: close")
            sender = threading.Thread(target=sock.sendall, args=(asks * 200 + last,))
            sender.start()
            time.sleep(0.2)
            waiting = sum(
                connection.transport.get_write_buffer_size() for connection in running.server.server_state.connections
            )
            came = rest_of(sock)
            sender.join()
    finally:
        running.stop()
    assert 0 < waiting < 4 * long + 65536  # who does not read is not computed for
    assert came.count(b"HTTP/1.1 200 OK") == 201
    assert came.count(b"7" * 50_000) == 201


def test_one_connection_too_many_is_answered_503(server: Running) -> None:
    time.sleep(0.6)
    others = [server.connect() for _ in range(SETTINGS.max_connections)]
    time.sleep(0.1)
    answer = server.ask(b"")
    for other in others:
        other.close()
    assert status_of(answer) == 503
    assert b"retry-after" in answer
    time.sleep(0.1)
    assert 'domlora_rejected_total{reason="connections"} 1.0' in server.metrics.expose().decode()


def test_who_would_wait_too_long_is_refused_and_counted() -> None:
    running = Running(Settings(Path("bundle"), max_wait_s=0.02, drain_s=0.0))
    asks = [asking("/v1/score?0.01", b"[]", "content-length: 2", "connection: close")] * 40
    try:
        running.ask(asks[0])
        sockets = [running.connect() for _ in asks]
        time.sleep(0.2)
        for sock, ask in zip(sockets, asks, strict=True):
            sock.sendall(ask)
        answers = [rest_of(sock) for sock in sockets]
        time.sleep(0.1)
        counts = running.metrics.expose().decode()
    finally:
        running.stop()
    refused = [answer for answer in answers if status_of(answer) == 503]
    assert {status_of(answer) for answer in answers} == {200, 503}
    assert all(b"retry-after: 1" in answer and json.loads(answer.split(b"\r\n\r\n")[1]) for answer in refused)
    assert f'domlora_rejected_total{{reason="busy"}} {len(refused)}.0' in counts
    assert f'domlora_requests_total{{route="refused",status="503"}} {len(refused)}.0' in counts


def test_turns_come_in_the_order_of_asking_and_leave_the_loop_free() -> None:
    async def turns() -> tuple[list[int], int]:
        said: list[int] = []
        admission, ticks = Admission(max_wait_s=10.0), 0

        def start(number: int) -> None:
            asyncio.get_running_loop().call_soon(lambda: (time.sleep(0.001), said.append(number)))

        for number in range(50):
            admission.offer(time.perf_counter(), lambda number=number: start(number), lambda: said.append(-1))
        while len(said) < 50:
            ticks += 1
            await asyncio.sleep(0)
        return said, ticks

    said, ticks = asyncio.run(turns())
    assert said == list(range(50))
    assert ticks > 10  # a few rows of scoring between two looks at the sockets, not all of them


def messages(*parts: bytes, pause_s: float = 0.0) -> Any:
    waiting = list(parts)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause_s)
        part = waiting.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(waiting)}

    return receive


def read(receive: Any, *headers: tuple[bytes, bytes], cap: int | None = None) -> bytes:
    return asyncio.run(read_body({"method": "PUT", "headers": headers}, receive, SETTINGS, cap))


def test_read_body_of_any_server() -> None:
    assert read(messages(b"ab", b"", b"c")) == b"abc"
    assert len(read(messages(b"x" * 15_000), cap=20_000)) == 15_000
    with pytest.raises(TooLargeError, match="10,000 bytes"):
        read(messages(b"x" * 6_000, b"x" * 6_000, b"never asked for"))
    with pytest.raises(TooLargeError):
        read(messages(), (b"content-length", b"10001"))
    with pytest.raises(TooSlowError, match=r"within 0\.4 s"):
        read(messages(*[b"x"] * 100, pause_s=0.1))


def test_read_body_of_a_client_that_goes() -> None:
    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    with pytest.raises(DataError, match="client went"):
        read(gone)


@pytest.mark.parametrize("encoding", [b"deflate", b" GZIP", b"identity", b""])
def test_bodies_are_what_they_say(encoding: bytes) -> None:
    pack = {b"deflate": zlib.compress, b" GZIP": gzip.compress}.get(encoding, bytes)
    assert inflate(pack(b"abc"), encoding, 3) == b"abc"


@pytest.mark.parametrize(
    ("body", "encoding", "rule"),
    [
        (b"not gzip", b"gzip", "not what its Content-Encoding says"),
        (gzip.compress(b"x" * 900, mtime=0)[:-9], b"gzip", "ends too early"),
        (b"x", b"br", "gzip or deflate"),
    ],
)
def test_bodies_that_are_not_what_they_say(body: bytes, encoding: bytes, rule: str) -> None:
    with pytest.raises(DataError, match=rule):
        inflate(body, encoding, 1_000)


@pytest.mark.parametrize(
    ("told", "rule"),
    [
        ({"workers": 1.5}, "workers must be of type int"),
        ({"deadline_s": float("nan")}, "deadline_s must be finite"),
        ({"port": 70_000}, "port must be at most"),
        ({"unknown_ids": "ignore"}, "unknown_ids must be"),
        ({"token": " "}, "token must not be blank"),
        ({"log_share": 2.0}, "between 0 and 1"),
        ({"max_wait": 1.0}, "max_wait_s"),
    ],
)
def test_settings_that_cannot_be(told: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        Settings.told({"bundle": "live", **told}, {})


def test_settings_survive_the_pipe_and_the_environment() -> None:
    settings = Settings.told({"bundle": "live", "token": "s"}, {"DOMLORA_DEADLINE_S": "0.5", "DOMLORA_HOME": "x"})
    assert settings.deadline_s == 0.5
    assert Settings.from_json(settings.to_json()) == settings
    with pytest.raises(ConfigError, match="DOMLORA_WORKERS must be of type int"):
        Settings.told({"bundle": "live"}, {"DOMLORA_WORKERS": "two"})
    assert not Settings(Path("live"), host="0.0.0.0").admin_allowed
