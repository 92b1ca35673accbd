"""Analyses that take long: who else asks, what else is asked, and a server that ends meanwhile."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from domlora.abtest.experiments import Arm, Experiment
from domlora.abtest.registry import Registry
from domlora.serving.console import analysis, handlers
from domlora.serving.console.analysis import Analyses

LONG = (sys.executable, "-c", "import time; time.sleep(60)")
SAYING = (sys.executable, "-c", "print('{\"of\": 1}')")
REFUSING = (sys.executable, "-c", "import sys; sys.stderr.write('must be started\\n'); sys.exit(2)")
STORE = Path("store")


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Analyses, Future[Any]]]:
    """One that takes long, and who waits for it."""
    monkeypatch.setattr(analysis, "_COMMAND", LONG)
    analyses = Analyses()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(analyses.of, STORE, "long")
        until = time.monotonic() + 10
        while analyses._process is None and time.monotonic() < until:
            time.sleep(0.01)
        yield analyses, waiting
        analyses.end()


def test_nobody_else_waits_for_an_analysis(begun: tuple[Analyses, Future[Any]]) -> None:
    analyses, waiting = begun
    start = time.monotonic()
    for name in ("long", "another"):
        assert analyses.of(STORE, name) == (None, "It is being analysed. Look again in a moment.")
    assert time.monotonic() - start < 1
    assert not waiting.done()


def test_an_analysis_ends_with_its_server(begun: tuple[Analyses, Future[Any]], client_of: Callable[..., Any]) -> None:
    client_of().app.close()
    found, reason = begun[1].result(5)
    assert found is None
    assert reason.startswith("The analysis failed")


def test_an_analysis_is_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    analyses = Analyses()
    for command, said in ((SAYING, ({"of": 1}, "")), (REFUSING, (None, "must be started"))):
        monkeypatch.setattr(analysis, "_COMMAND", command)
        assert analyses.of(STORE, said[1] or "a") == said
        monkeypatch.setattr(analysis, "_COMMAND", LONG)
        assert analyses.of(STORE, said[1] or "a") == said


def test_a_server_ends_well_while_it_analyses(served: Any) -> None:
    from tests.unit.serving.test_http_process import started

    folder = served.store.folder
    registry = Registry.open(folder / "experiments")
    registry.create(Experiment("e", (Arm("now"), Arm("base", adapters=False))))
    registry.start("e")
    with started(folder, "small_analysis:make", drain_s=0.0, grace_s=1.0) as server, ThreadPoolExecutor(1) as pool:
        server.ready()
        url = f"{server.url}/v1/console/experiments/e"
        looking = pool.submit(httpx.get, url, timeout=20)
        time.sleep(1.0)
        assert "being analysed" in httpx.get(url, timeout=5).json()["reason"]
        server.process.terminate()
        assert server.process.wait(15) == 0
        assert looking.exception(5) or looking.result().status_code >= 500


def test_metrics_and_adapters_do_not_wait_for_the_console(
    client_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, let_go = client_of(), threading.Event()
    monkeypatch.setattr(handlers, "document", lambda *_: let_go.wait(20))

    async def ask(path: str) -> int:
        said: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            said.append(message)

        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
        await client.app(scope, receive, send)
        return int(said[0]["status"])

    async def asked() -> list[int]:
        looking = [asyncio.create_task(ask("/v1/console/overview")) for _ in range(40)]
        await asyncio.sleep(0.1)
        try:
            found = [await asyncio.wait_for(ask(path), 5) for path in ("/metrics", "/v1/adapters")]
        finally:
            let_go.set()
        return [*found, *await asyncio.gather(*looking)]

    assert asyncio.run(asked()) == [200] * 42
