"""Four servers in network namespaces behind a balancer: one publishing reaches all, and one that dies costs no request."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from hosts import Replica, balancer, missing, replicas, wait_for
from load import Seen, open_loop
from pushing import Adapters, Watched, answer, memory
from support import infer_requests, write_export

from domlora.serving.shared.place import Place
from domlora.serving.shared.publishing import publish
from domlora.serving.store import Store

REPLICAS, RATE = 4, 100.0
SOON_S = 2.0
pytestmark = pytest.mark.scale


class World:
    """A publisher's store, the shared store, and replicas behind a balancer."""

    def __init__(self, store: Store, place: Place, servers: list[Replica], port: int, folder: Path) -> None:
        self.store, self.place, self.servers, self.port, self.folder = store, place, servers, port, folder

    def publish(self, header: str, value: str) -> float:
        """Seconds from the call until the last replica answers with it."""
        start = time.perf_counter()
        publish(self.store, self.place)
        with ThreadPoolExecutor(REPLICAS) as pool:
            list(pool.map(partial(self._serves, header, value), self.servers))
        return time.perf_counter() - start

    @staticmethod
    def _serves(header: str, value: str, server: Replica) -> None:
        with httpx.Client(base_url=server.url, timeout=10) as client:
            wait_for(lambda: answer(client, "toys")[0].headers.get(header) == value, 60)


@pytest.fixture(scope="module")
def able() -> None:
    lacking = missing()
    if lacking:
        pytest.skip(lacking)


@pytest.fixture(scope="module")
def exports(able: None, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("export")
    for seed in range(2):
        write_export(folder / str(seed), seed)
    return [folder / "0", folder / "1"]


@pytest.fixture(params=["haproxy", "nginx"])
def world(request: pytest.FixtureRequest, exports: list[Path]) -> Iterator[World]:
    with memory() as folder:
        store, place = Store.create(folder / "store"), Place(str(folder / "place"))
        store.add_version(exports[0], 1)
        publish(store, place)
        with replicas(REPLICAS, place.url, folder) as servers, balancer(request.param, folder) as port:
            yield World(store, place, servers, port, folder)


@contextmanager
def load(port: int, seconds: float) -> Iterator[Future[Seen]]:
    """Requests at random moments from a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_paths, initargs=(sys.path,)) as pool:
        yield pool.submit(open_loop, port, infer_requests(), RATE, seconds)


def _paths(told: list[str]) -> None:
    sys.path[:] = told


def failures(seen: Seen) -> str:
    bad = {status: count for status, count in sorted(seen.count().items()) if status != 200}
    times = [round(seen.percentile(q, 200)) for q in (99, 100)]
    return f"{sum(bad.values())} of {len(seen.status)} failed {bad or ''}, p99 {times[0]} ms, longest {times[1]} ms"


def say(request: Any, text: str) -> None:
    sys.stdout.write(f"\n{request.node.name}: {text}\n")


def test_published_once_served_by_all(world: World, exports: list[Path], request: Any) -> None:
    adapters = [Adapters(export) for export in exports]
    expected = {
        "1": adapters[0].exported("toys"),
        **{f"v{seed}": adapters[0].expected(seed) for seed in range(5)},
        "2": adapters[1].exported("toys"),
    }
    took = []
    url = f"http://127.0.0.1:{world.port}"
    with load(world.port, 25.0) as loaded, Watched(url, "toys", expected, clients=1) as watched:
        time.sleep(3)
        for seed in range(5):
            world.store.put_adapter("toys", adapters[0].payload("toys", seed), f"v{seed}")
            took.append(world.publish("x-domlora-adapter", f"v{seed}"))
        world.store.add_version(exports[1], 2)
        world.store.set_live(2)
        version_s = world.publish("x-domlora-bundle", "2")
        seen = loaded.result()
    say(
        request,
        f"adapter served by all {REPLICAS} after {min(took):.2f} to {max(took):.2f} s, version after {version_s:.2f} s; "
        f"{failures(seen)}; {watched.count} answers checked number by number, {len(watched.bad)} bad",
    )
    assert max(took) <= SOON_S
    assert seen.count().keys() == {200}
    assert watched.bad == []
    assert watched.seen >= {"1", "v0", "2"}
    assert [server.metric("domlora_shared_generation") for server in world.servers] == [7.0] * REPLICAS


@pytest.mark.parametrize("how", ["killed", "unplugged"])
def test_one_dies_and_comes_back(world: World, exports: list[Path], how: str, request: Any) -> None:
    """It has lost its disk too, and comes back to what was published while it was away before it is ready."""
    adapters, victim = Adapters(exports[0]), world.servers[1]
    with load(world.port, 20.0) as loaded:
        time.sleep(4)
        (victim.kill if how == "killed" else victim.unplug)()
        time.sleep(2)
        world.store.put_adapter("toys", adapters.payload("toys", 1), "v1")
        publish(world.store, world.place)
        if how == "unplugged":
            victim.kill()
            victim.plug()
        shutil.rmtree(victim.folder)
        victim.start()
        back_s = wait_for(victim.ready, 60)
        with httpx.Client(base_url=victim.url, timeout=10) as client:
            first = answer(client, "toys")[0].headers["x-domlora-adapter"]
        seen = loaded.result()
    say(request, f"{failures(seen)}; ready {back_s:.1f} s after its start with {first!r}")
    assert first == "v1"
    assert seen.count().keys() == {200}
