"""R4: domains come, change their rank and go under load. Who asks 100 ms after the 200 has the new one; gone is 404."""

import time
from contextlib import ExitStack

import httpx
import numpy as np
import pytest
from pushing import CLOSE, Adapters, Watched, answer, memory, new_store
from support import limit, say, serving

pytestmark = pytest.mark.reliability
ROUNDS, WORKERS, CONNECTIONS = 15, 2, 6


def test_domains_come_and_go(exported, tmp_path):
    adapters = Adapters(exported)
    settings = {"workers": WORKERS, "unknown_domain": "error", "max_wait_s": 5.0}
    with memory() as folder, ExitStack() as stack:
        store = new_store(exported, folder / "live")
        server = stack.enter_context(serving(store.folder, tmp_path / "log", **settings))
        made = [httpx.Client(base_url=server.url, timeout=10, verify=False) for _ in range(CONNECTIONS)]
        clients = [stack.enter_context(client) for client in made]
        with Watched(server.url, "books", {"1": adapters.exported("books")}) as watched:
            late = [_come_and_go(clients, adapters, f"new{number}", number) for number in range(ROUNDS)]
        starts = server.counts()["domlora_worker_starts_total"]
    say(
        f"{ROUNDS} domains came and went: the last request without it began {max(late) * 1e3:.0f} ms after the 200 "
        f"(median {np.median(late) * 1e3:.0f}); {watched.count} other answers, {len(watched.bad)} bad"
    )
    assert watched.bad == []
    assert max(late) <= limit(0.1)
    assert np.median(late) <= limit(0.1, 0.5)
    assert starts == WORKERS


def _come_and_go(clients: list[httpx.Client], adapters: Adapters, domain: str, seed: int) -> float:
    """How long after the 200 of a push the last request began that was answered without it."""
    expected = adapters.expected(seed, rank=16)
    place = f"/v1/adapters/{domain}"
    assert clients[0].put(place, content=adapters.payload(domain, seed)).status_code == 200
    told = clients[0].put(place, content=adapters.payload(domain, seed, rank=16), params={"version": "b"})
    assert told.json()["rank"] == 16
    late = _last(clients, lambda client: _is(client, domain, expected))
    assert clients[0].delete(place).status_code == 200
    return max(late, _last(clients, lambda client: answer(client, domain)[0].status_code == 404))


def _last(clients, right) -> float:
    """When the last request began that was not answered right, in seconds from now."""
    start, last, wrong = time.perf_counter(), 0.0, True
    while wrong:
        wrong = False
        for client in clients:
            began = time.perf_counter() - start
            if not right(client):
                last, wrong = began, True
        assert last < 10
    return last


def _is(client: httpx.Client, domain: str, expected: np.ndarray) -> bool:
    told, logits = answer(client, domain)
    return told.status_code == 200 and bool(np.abs(logits - expected).max() <= CLOSE)
