"""R3: 1,000 adapters, and then versions, swapped under load: no answer is lost, none is of neither of them."""

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import httpx
import pytest
from load import open_loop
from pushing import Adapters, Watched, memory, new_store
from support import infer_requests, limit, say, serving

SWAPS, SECONDS = 1_000, 10.0
PACE_S = 0.9 * SECONDS / SWAPS
RATE = 300.0  # requests a second beside the swaps
pytestmark = pytest.mark.reliability


@pytest.fixture
def store(exported):
    with memory() as folder:
        yield new_store(exported, folder / "live")


def test_swap_of_adapters(store, exported, tmp_path):
    """One client checks every number; times are those of an open loop in a process of its own, with and without swaps."""
    adapters, requests = Adapters(exported), infer_requests()
    expected = {f"v{seed}": adapters.expected(seed) for seed in range(2)}
    payloads = [adapters.payload("toys", seed) for seed in range(2)]
    with (
        serving(store.folder, tmp_path / "log", max_wait_s=limit(0.05, 5.0)) as server,
        httpx.Client(base_url=server.url, timeout=10) as admin,
        ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as load,
    ):
        assert admin.put("/v1/adapters/toys", content=payloads[0]).status_code == 200
        with Watched(server.url, "toys", expected, clients=1) as watched:
            quiet = load.submit(open_loop, server.port, requests, RATE, SECONDS / 2).result()
            swapping = load.submit(open_loop, server.port, requests, RATE, SECONDS)
            start = time.perf_counter()
            for swap in range(1, SWAPS + 1):
                assert admin.put("/v1/adapters/toys", content=payloads[swap % 2]).status_code == 200
                time.sleep(max(0.0, start + swap * PACE_S - time.perf_counter()))
            took_s = time.perf_counter() - start
            swapped = swapping.result()
        starts = server.counts()["domlora_worker_starts_total"]
    ratio = swapped.percentile(99, 200) / quiet.percentile(99, 200)
    failed = len(swapped.status) - swapped.count()[200] + len(quiet.status) - quiet.count()[200]
    say(
        f"{SWAPS} swaps in {took_s:.1f} s, {watched.count} answers checked, {len(watched.bad)} bad; {failed} of "
        f"{len(swapped.status) + len(quiet.status)} at {RATE:.0f}/s failed, p99 {swapped.percentile(99, 200):.1f} ms, "
        f"without swaps {quiet.percentile(99, 200):.1f} ms ({ratio:.1f} times)"
    )
    assert watched.bad == []
    assert watched.seen == set(expected)
    assert failed == 0
    assert took_s <= limit(SECONDS, 120)
    assert ratio <= limit(1.5)
    assert starts == 1


def test_swap_of_versions(store, exported, tmp_path):
    store.add_version(exported, 2)
    adapters = Adapters(exported)
    expected = {number: adapters.exported("toys") for number in ("1", "2")}
    patient = {"max_wait_s": 5.0}  # a busy machine may refuse a request now and then; lost is another thing
    with (
        serving(store.folder, tmp_path / "log", **patient) as server,
        httpx.Client(base_url=server.url, timeout=10) as admin,
        Watched(server.url, "toys", expected) as watched,
    ):
        for number in range(40):
            assert admin.post("/v1/bundle", json={"version": 1 + number % 2}).status_code == 200
            time.sleep(0.1)
    say(f"40 versions swapped, {watched.count} answers, {len(watched.bad)} bad, p99 {watched.percentile(99):.1f} ms")
    assert watched.bad == []
    assert watched.seen == {"1", "2"}
