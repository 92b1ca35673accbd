"""R3: 1,000 adapters, and then versions, swapped under load: no answer is lost, none is of neither of them."""

import time

import httpx
import pytest
from pushing import Adapters, Watched, memory, new_store
from support import say, serving

SWAPS = 1_000
pytestmark = pytest.mark.reliability


@pytest.fixture
def store(exported):
    with memory() as folder:
        yield new_store(exported, folder / "live")


def test_swap_of_adapters(store, exported, tmp_path):
    adapters = Adapters(exported)
    expected = {f"v{seed}": adapters.expected(seed) for seed in range(2)}
    payloads = [adapters.payload("toys", seed) for seed in range(2)]
    with serving(store.folder, tmp_path / "log") as server, httpx.Client(base_url=server.url, timeout=10) as admin:
        assert admin.put("/v1/adapters/toys", content=payloads[0]).status_code == 200
        with Watched(server.url, "toys", expected) as quiet:
            time.sleep(2)
        with Watched(server.url, "toys", expected) as watched:
            start, swaps = time.perf_counter(), 0
            while swaps < SWAPS:
                swaps += 1
                assert admin.put("/v1/adapters/toys", content=payloads[swaps % 2]).status_code == 200
            took_s = time.perf_counter() - start
        starts = server.counts()["domlora_worker_starts_total"]
    say(
        f"R3 {swaps} swaps in {took_s:.1f} s, {watched.count} answers, {len(watched.bad)} bad, "
        f"p99 {watched.percentile(99):.1f} ms (without swaps {quiet.percentile(99):.1f} ms)"
    )
    assert watched.bad == []
    assert watched.seen == set(expected)
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
    say(f"R3 40 versions swapped, {watched.count} answers, {len(watched.bad)} bad, p99 {watched.percentile(99):.1f} ms")
    assert watched.bad == []
    assert watched.seen == {"1", "2"}
