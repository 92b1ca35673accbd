"""The processes: what happens when one dies, hangs, cannot load, or is asked to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from domlora.errors import ConfigError
from domlora.serving.http.supervisor import serve
from domlora.serving.settings import Settings

HERE, SOURCE = Path(__file__).parent, Path(__file__).parents[3] / "src"
START = """
import sys
from domlora.serving.http.supervisor import serve
from domlora.serving.settings import Settings
sys.exit(serve(Settings.from_json(sys.argv[1]), factory=sys.argv[2]))
"""


class Started:
    """A server in processes of its own."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process, self.folder = process, folder
        self.lines: list[dict[str, Any]] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        url = self.wait(lambda: [line["url"] for line in self.lines if line["event"] == "listening"])[0]
        self.client = httpx.Client(base_url=url, timeout=15)
        self.url = url

    def _read(self) -> None:
        for line in self.process.stderr or ():
            self.lines.append(json.loads(line))

    def wait(self, seen: Callable[[], Any], timeout_s: float = 10.0) -> Any:
        until = time.perf_counter() + timeout_s
        while not (found := seen()):
            assert time.perf_counter() < until, self.lines
            time.sleep(0.01)
        return found

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == name]

    def ready(self, number: int = 1) -> None:
        self.wait(lambda: len(self.events("ready")) >= number)

    def pid(self) -> int:
        return int(httpx.post(f"{self.url}/v1/score", timeout=15).json()["pid"])

    def counts(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


@contextmanager
def started(folder: Path, factory: str = "small_app:make", **settings: Any) -> Iterator[Started]:
    told = {"bundle": str(folder), "port": 0, "drain_s": 0.2, "deadline_s": 0.5, **settings}
    environment = {**os.environ, "PYTHONPATH": f"{SOURCE}:{HERE}"}
    command = [sys.executable, "-c", START, json.dumps(told), factory]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield Started(process, folder)
    finally:
        process.terminate()
        try:
            process.wait(15)
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("name", "extra"), [("uvloop", "serve"), ("opentelemetry.exporter.otlp.proto.http", "opentelemetry")]
)
def test_libraries_that_workers_need_are_looked_for_before_there_are_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ConfigError, match=rf"No module named '{name}'.*pip install 'domlora\[{extra}\]'"):
        serve(Settings(tmp_path, port=0, otlp_endpoint="http://127.0.0.1:1/v1/traces"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    with started(tmp_path_factory.mktemp("served"), workers=2, deadline_s=1.0) as server:
        server.ready(2)
        yield server


def test_workers_share_the_socket(two: Started) -> None:
    two.wait(lambda: len({two.pid() for _ in range(20)}) == 2)
    assert httpx.get(f"{two.url}/v2/health/live").json() == {"live": True}


def test_a_killed_worker_is_replaced_and_nobody_is_refused(two: Started) -> None:
    victim, before = two.pid(), len(two.events("ready"))
    os.kill(victim, signal.SIGKILL)
    began = time.perf_counter()
    while len(two.events("ready")) == before:
        assert two.pid() != victim
    assert time.perf_counter() - began < 10.0
    assert two.events("worker ended")[-1]["exit_code"] == -signal.SIGKILL


def test_who_waits_for_a_hanging_worker_is_told_in_time(two: Started) -> None:
    before = len(two.events("ready"))
    found: list[tuple[float, int]] = []

    def ask(path: str) -> None:
        began = time.perf_counter()
        status = httpx.post(f"{two.url}{path}", timeout=15).status_code
        found.append((time.perf_counter() - began, status))

    threads = [threading.Thread(target=ask, args=("/v1/score?hang_s=30",))]
    threads[0].start()
    time.sleep(0.1)
    others = [threading.Thread(target=ask, args=("/v1/score",)) for _ in range(10)]
    for thread in others:
        thread.start()
    for thread in (*threads, *others):
        thread.join()
    late = [seconds for seconds, status in found if status == 504]
    assert max(late) < 1.2 * 1.0 + 0.3  # a busy machine sends late
    assert all(status in (200, 504) for _, status in found)
    assert sum(status == 200 for _, status in found) >= 9  # the other worker accepted them, all but one at the most
    two.wait(lambda: len(two.events("ready")) > before)
    counts = two.counts()
    assert counts['domlora_rejected_total{reason="hung"}'] == len(late)
    assert counts['domlora_requests_total{route="refused",status="504"}'] == len(late)
    assert two.events("hung")[-1]["answered_504"] == len(late)


def test_there_is_room_for_connections_before_they_come(two: Started) -> None:
    """The kernel's table of open files; to double it while connections come stops a process for milliseconds."""
    told = Path(f"/proc/{two.pid()}/status").read_text()
    assert int(told.split("FDSize:")[1].split()[0]) > Settings(Path("x")).max_connections


def test_what_fails_is_logged_and_the_worker_goes_on(two: Started) -> None:
    assert httpx.get(f"{two.url}/fail").status_code == 500
    two.wait(lambda: any("on purpose" in line.get("trace", "") for line in two.lines))
    assert two.pid()


def test_a_worker_that_holds_the_interpreter_is_killed_from_outside(tmp_path: Path) -> None:
    with started(tmp_path, deadline_s=0.1) as server:
        server.ready()
        os.kill(server.pid(), signal.SIGSTOP)
        server.wait(lambda: server.events("worker silent"), 15)
        server.ready(2)
        assert server.pid()


def test_sigterm_loses_nothing(tmp_path: Path) -> None:
    with started(tmp_path, drain_s=0.5) as server:
        server.ready()
        found: list[httpx.Response] = []
        url = f"{server.url}/v1/score?sleep_s=1.2"
        asking = [threading.Thread(target=lambda: found.append(httpx.post(url, timeout=15))) for _ in range(8)]
        for thread in asking:
            thread.start()
        server.client.get("/x")
        time.sleep(0.2)
        server.process.terminate()
        began = time.perf_counter()
        server.wait(lambda: server.client.get("/v2/health/ready").status_code == 503, 0.5)
        assert httpx.post(f"{server.url}/v1/score").status_code == 200
        assert httpx.get(f"{server.url}/v2/health/live").status_code == 200
        for thread in asking:
            thread.join()
        assert server.process.wait(10) == 0
        assert time.perf_counter() - began < 10
    assert [(answer.status_code, answer.headers["connection"]) for answer in found] == [(200, "close")] * 8
    assert (tmp_path / "closed").exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


def test_what_cannot_be_loaded_is_said_until_it_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(tmp_path, "small_app:make_damaged") as server:
        answer = server.wait(lambda: server.client.get("/v2/health/ready"))
        assert answer.status_code == 503
        assert "tables.bin" in answer.json()["error"]
        assert str(tmp_path.parent) not in answer.text
        assert server.client.get("/v2/health/live").status_code == 200
        assert server.client.post("/v1/score").status_code == 503
        (tmp_path / "whole").touch()
        server.wait(lambda: server.client.get("/v2/health/ready").status_code == 200, 10)
        assert server.events("worker ended") == []


def test_workers_end_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    with started(tmp_path) as server:
        server.ready()
        worker = server.pid()
        server.process.kill()
        server.wait(lambda: not Path(f"/proc/{worker}").exists(), 5)
    assert (tmp_path / "closed").exists()


def test_an_address_that_is_taken(two: Started, tmp_path: Path) -> None:
    from domlora.errors import ConfigError
    from domlora.serving.http.supervisor import serve
    from domlora.serving.settings import Settings

    with pytest.raises(ConfigError, match="Choose another --port"):
        serve(Settings(tmp_path, port=int(two.url.rsplit(":", 1)[1])))


def test_neither_supervisor_nor_worker_reads_torch() -> None:
    script = "import sys, domlora.serving.http.supervisor as s, domlora.serving.http.worker; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    rooms = ("torch", "numba", "domlora.data", "domlora.models", "domlora.layers", "domlora.adapters", "domlora.bundle")
    assert not set(rooms) & set(said)
