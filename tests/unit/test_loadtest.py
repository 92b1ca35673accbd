"""The load generator before servers that are quick, slow, busy or gone; what it sends; and what it says of a real server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from domlora.errors import ConfigError, DataError
from domlora.features.text import canonical_text
from domlora.loadtest import Plan, cpu_seconds, draw_domains, from_file, http_request, random_requests, run

METADATA = {
    "name": "live",
    "inputs": [
        {"name": "ids", "datatype": "INT64", "shape": [-1, 3], "parameters": {"num_ids": [2, 500, 9]}},
        {"name": "dense", "datatype": "FP32", "shape": [-1, 2]},
        {"name": "domain", "datatype": "BYTES", "shape": [-1]},
    ],
}
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
BUSY = b'HTTP/1.1 503 Busy\r\nretry-after: 1\r\ncontent-length: 37\r\n\r\n{"error": "the server is at its limi"}'


class Scripted:
    """A server with a thread for each connection; it answers what a function says, which may wait and may say nothing."""

    def __init__(self, say: Callable[[int], bytes | None]) -> None:
        self.say, self.asked, self.lock = say, 0, threading.Lock()
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        with connection:
            while connection.recv(1 << 16):
                with self.lock:
                    self.asked += 1
                    number = self.asked
                said = self.say(number)
                if said is None:
                    return
                try:
                    connection.sendall(said)
                except OSError:
                    return


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    made: list[Scripted] = []

    def make(say: Callable[[int], bytes | None] = lambda _: GOOD) -> Scripted:
        made.append(Scripted(say))
        return made[-1]

    yield make
    for each in made:
        each.listening.shutdown(socket.SHUT_RDWR)
        each.listening.close()


def request(url: str = "http://x") -> list[bytes]:
    return [http_request("/v1/score", b"{}", url)]


def test_an_open_loop_sends_as_often_as_it_is_asked_to(scripted: Callable[..., Scripted]) -> None:
    server = scripted()
    report = run(Plan(server.url, rate=400, clients=64, seconds=1.0, warmup_s=0.25), request())
    expected, spread = 400, 4 * 400**0.5
    assert abs(report.offered - expected) < spread
    assert report.statuses == {"200": round(report.offered)}
    assert abs(server.asked - 1.25 * expected) < 1.25 * spread
    assert (
        0
        < report.latency_ms["p50"]
        <= report.latency_ms["p99"]
        <= report.latency_ms["p99.9"]
        <= report.latency_ms["max"]
    )


def test_its_moments_are_a_poisson_process(scripted: Callable[..., Scripted]) -> None:
    moments: list[float] = []

    def say(_: int) -> bytes:
        moments.append(time.monotonic())
        return GOOD

    run(Plan(scripted(say).url, rate=300, clients=64, seconds=1.3, warmup_s=0), request())
    counts = np.histogram(moments, bins=np.arange(min(moments), min(moments) + 1.25, 0.05))[0]
    assert 0.3 < counts.var() / counts.mean() < 3.0  # evenly spaced ones have almost none


def test_a_pause_of_the_server_is_felt_by_all_who_came_in_it(scripted: Callable[..., Scripted]) -> None:
    """The server stands still once for half a second. Of 200 requests a second about 100 came in that time; a client that
    waited for its answer before it asked again would have one slow answer.
    """
    still = threading.Lock()
    begun = time.monotonic()

    def say(_: int) -> bytes:
        with still:
            if 0.5 < time.monotonic() - begun < 0.9:
                time.sleep(0.5)
        return GOOD

    open_loop = run(Plan(scripted(say).url, rate=200, clients=4, seconds=1.5, warmup_s=0), request())
    assert open_loop.latency_ms["max"] > 400
    assert open_loop.latency_ms["p90"] > 100
    assert open_loop.sent_late_ms > 100  # four connections were not enough, and that is part of the time


def test_a_closed_loop_asks_when_it_is_answered(scripted: Callable[..., Scripted]) -> None:
    server = scripted(lambda _: time.sleep(0.02) or GOOD)
    report = run(Plan(server.url, clients=3, seconds=1.0, warmup_s=0.1), request())
    assert 60 < report.answered <= 151
    assert report.latency_ms["p50"] >= 20


def test_refusals_are_counted_by_reason(scripted: Callable[..., Scripted]) -> None:
    report = run(Plan(scripted(lambda n: BUSY if n % 2 else GOOD).url, clients=1, seconds=0.3, warmup_s=0), request())
    assert report.statuses.keys() == {"200", "503 the server is at its limi"}
    assert abs(report.statuses["200"] - report.statuses["503 the server is at its limi"]) <= 1


def test_what_is_not_answered_is_counted(scripted: Callable[..., Scripted]) -> None:
    lost = run(
        Plan(scripted(lambda n: None if n % 3 == 0 else GOOD).url, clients=2, seconds=0.3, warmup_s=0), request()
    )
    assert lost.statuses["connection lost"] > 0
    assert lost.statuses["200"] > lost.statuses["connection lost"]
    plan = Plan(
        scripted(lambda _: time.sleep(5) or None).url, rate=50, clients=2, seconds=0.4, warmup_s=0, timeout_s=0.2
    )
    late = run(plan, request())
    assert late.statuses.keys() == {"timed out"}
    assert late.latency_ms == {}
    odd = run(Plan(scripted(lambda _: b"HTTP/1.1 200 OK\r\n\r\nx").url, clients=1, seconds=0.2, warmup_s=0), request())
    assert odd.statuses.keys() == {"not HTTP with a length"}


def test_nobody_there_is_told_and_not_hidden() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    report = run(Plan(url, rate=50, clients=8, seconds=0.4, warmup_s=0), request())
    assert report.statuses.keys() == {"connection lost"}
    assert report.answered == 0


def test_an_answer_in_pieces_and_a_long_request(scripted: Callable[..., Scripted]) -> None:
    """A body of 8 MB is not taken by a socket at once."""
    seen = Counter[int]()

    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            wanted = 8_000_000
            while wanted > 0:
                got = connection.recv(1 << 20)
                seen["bytes"] += len(got)
                wanted -= len(got)
            for piece in (GOOD[:9], GOOD[9:30], GOOD[30:]):
                connection.sendall(piece)
                time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        plan = Plan(url, rate=1000, clients=1, seconds=0.001, warmup_s=0, timeout_s=5.0, seed=1)
        report = run(plan, [http_request("/", b"x" * 8_000_000, url)])
    assert seen["bytes"] >= 8_000_000
    assert report.statuses.get("200", 0) == 1


def test_several_processes_share_the_work(scripted: Callable[..., Scripted]) -> None:
    server = scripted()
    report = run(Plan(server.url, rate=300, clients=8, seconds=0.5, warmup_s=0.1, processes=2), request())
    assert abs(report.offered - 300) < 4 * (300 / 0.5) ** 0.5
    assert report.statuses.keys() == {"200"}


def test_processor_time_of_a_process_and_its_children() -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass\nimport sys\nprint(1, flush=True)\nsys.stdin.read()"
    above = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {spin!r}])"
    process = subprocess.Popen([sys.executable, "-c", above], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    spent = cpu_seconds(process.pid)
    process.communicate()
    assert 0.3 <= spent < 2.0
    with pytest.raises(ConfigError, match="process"):
        cpu_seconds(process.pid)


def test_random_requests_have_ids_that_there_are() -> None:
    made = random_requests(METADATA, ["a", "b"], 2, rows=400, form="json", seed=3)
    for (path, body, length), domain in zip(made, "ab", strict=True):
        told = json.loads(body)
        assert (path, length) == ("/v2/models/live/infer", None)
        assert told["parameters"] == {"domain": domain}
        ids = np.reshape(told["inputs"][0]["data"], told["inputs"][0]["shape"])
        assert ids.shape == (400, 3)
        assert (ids.min(axis=0) == 0).all()
        assert ids.max(axis=0)[[0, 2]].tolist() == [1, 8]
        assert 480 < ids.max() < 500
        assert told["inputs"][1]["shape"] == [400, 2]
    binary = random_requests(METADATA, ["a", "b"], 2, rows=400, seed=3)[0]
    np.testing.assert_array_equal(
        np.frombuffer(binary[1], "<i8", 1200, binary[2]), json.loads(made[0][1])["inputs"][0]["data"]
    )


def test_a_server_that_does_not_say_its_ids_needs_a_file() -> None:
    silent = {"name": "live", "inputs": [{"name": "ids", "datatype": "INT64", "shape": [-1, 3]}]}
    with pytest.raises(ConfigError, match=r"num_ids.*file"):
        random_requests(silent, [], 1, rows=1)


@pytest.mark.parametrize(("zipf", "share"), [(0.0, 0.25), (1.0, 0.48), (2.0, 0.702)])
def test_domains_are_drawn_as_told(zipf: float, share: float) -> None:
    drawn = draw_domains(["a", "b", "c", "d"], 20_000, zipf=zipf)
    assert abs(drawn.count("a") / 20_000 - share) < 0.015


def test_requests_come_from_json_lines(tmp_path: Path) -> None:
    bodies: list[Mapping[str, object]] = [{"domain": "a", "candidates": [{"item": 1}]}, {"inputs": []}]
    file = tmp_path / "some.jsonl"
    file.write_text("\n".join([json.dumps(bodies[0]), "", json.dumps(bodies[1])]))
    made = from_file(file, "live", rows=9)
    assert [path for path, _, _ in made] == ["/v1/score", "/v2/models/live/infer"]
    assert [json.loads(body) for _, body, _ in made] == bodies


def test_requests_come_from_parquet(tmp_path: Path) -> None:
    file = tmp_path / "some.parquet"
    domains = ["a", "a", "a", "b", None]
    pq.write_table(pa.table({"domain": domains, "item": list("uvwxy"), "past": [[1], [], [2, 3], None, [4]]}), file)
    told = [json.loads(body) for _, body, _ in from_file(file, "live", rows=2)]
    assert [each["domain"] for each in told] == ["a", "a", "b", None]
    assert told[0]["candidates"] == {"item": ["u", "v"], "past": [[1], []]}
    assert told[1]["candidates"] == {"item": ["w"], "past": [[2, 3]]}


def test_values_of_parquet_that_json_does_not_have(tmp_path: Path) -> None:
    file, number = tmp_path / "some.parquet", Decimal("2.50")
    when = datetime(2026, 5, 26, 12, 30, tzinfo=UTC)
    columns = {
        "day": [when.date(), None],
        "at": [when, when],
        "price": [number, Decimal(3)],
        "age": [float("nan"), 1.0],
    }
    pq.write_table(pa.table(columns), file)
    sent = from_file(file, "live", rows=2)[0][1]
    told = json.loads(sent, parse_constant=lambda name: pytest.fail(name))["candidates"]
    assert told == {
        "day": ["2026-05-26", None], "at": [canonical_text(when)] * 2, "price": [2.5, 3], "age": [None, 1.0]
    }  # fmt: skip
    assert [canonical_text(value) for value in told["price"]] == [canonical_text(number), canonical_text(Decimal(3))]
    pq.write_table(pa.table({"raw": [b"x"]}), file)
    with pytest.raises(DataError, match="type bytes"):
        from_file(file, "live", rows=2)


def test_a_host_without_an_address_is_one_line() -> None:
    plan = Plan("http://no-such-host.invalid:80", seconds=0.1, warmup_s=0.0)
    with pytest.raises(ConfigError, match=r"must have an address.*no-such-host"):
        run(plan, [http_request("/v1/score", b"{}", plan.url)])


def test_what_the_client_extra_brings_is_named() -> None:
    """And needed only for random ids."""
    code = (
        "import sys; sys.modules['httpx'] = None\n"
        "from domlora.loadtest import from_file, random_requests\n"
        "from domlora.cli import main\n"
        "sys.argv = ['domlora', 'loadtest', 'http://127.0.0.1:9']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'domlora[client]'" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff"])
def test_a_file_that_cannot_be_used_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "some.jsonl"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="request"):
        from_file(file, "live", rows=1)
    (tmp_path / "some.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="Parquet"):
        from_file(tmp_path / "some.parquet", "live", rows=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 0},
        {"seconds": 0},
        {"clients": 0},
        {"processes": 9},
        {"warmup_s": -1},
        {"url": "localhost:80"},
        {"url": "http://h:99999"},
    ],
)
def test_a_plan_is_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Plan(**{"url": "http://localhost:80", **wrong})
