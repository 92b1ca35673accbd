"""R7: what was pushed and chosen survives kill -9 of the whole server; and a bundle is followed across restarts."""

import os
import signal

import httpx
import numpy as np
import pytest
from pushing import CLOSE, Adapters, answer, new_store, small_bundle, wait_for
from support import say, serving

from domlora.serving.store import Store

pytestmark = pytest.mark.reliability


def test_restart(exported, tmp_path):
    adapters = Adapters(exported)
    store = new_store(exported, tmp_path / "live")
    with serving(store.folder, tmp_path / "log", workers=2) as server:
        with httpx.Client(base_url=server.url, timeout=10) as client:
            for seed, domain in enumerate(("toys", "new", "gone")):
                told = client.put(
                    f"/v1/adapters/{domain}", content=adapters.payload(domain, seed), params={"pinned": "1"}
                )
                assert told.status_code == 200
            assert client.delete("/v1/adapters/gone").status_code == 200
            assert client.delete("/v1/adapters/books").status_code == 200
        for pid in [*server.workers(), server.process.pid]:
            os.kill(pid, signal.SIGKILL)
        server.process.wait(10)
    with (
        serving(store.folder, tmp_path / "log2", unknown_domain="error") as server,
        httpx.Client(base_url=server.url, timeout=10) as client,
    ):
        for seed, domain in enumerate(("toys", "new")):
            told, logits = answer(client, domain)
            assert told.headers["x-domlora-adapter"] == f"v{seed}"
            assert np.abs(logits - adapters.expected(seed)).max() <= CLOSE
        assert [answer(client, domain)[0].status_code for domain in ("gone", "books", "games")] == [404, 404, 200]
    say("2 pushed, 2 removed domains as they were after kill -9")


def test_a_bundle_that_goes_on_learning(tmp_path):
    bundle = small_bundle()
    bundle.save(tmp_path / "live")
    asked = []
    with (
        serving(tmp_path / "live", tmp_path / "log", max_wait_s=5.0) as server,
        httpx.Client(base_url=server.url, timeout=10) as client,
    ):
        before = answer(client, "toys")[1]
        for parameter in bundle.model.parameters():
            parameter.data *= 2.0
        bundle.publish(tmp_path / "live")

        def moved() -> bool:
            told, logits = answer(client, "toys")
            asked.append(told.status_code)
            return told.headers["x-domlora-bundle"] == "2" and bool((logits != before).any())

        seconds = wait_for(moved, 120)
        assert client.post("/v1/bundle", json={"version": 1}).status_code == 200
    say(f"a newer version of the bundle answers after {seconds:.1f} s; {len(asked)} requests meanwhile, all answered")
    assert set(asked) == {200}
    with (
        serving(tmp_path / "live", tmp_path / "log2") as server,
        httpx.Client(base_url=server.url, timeout=10) as client,
    ):
        assert (answer(client, "toys")[1] == before).all()  # what somebody chose stays chosen
    assert Store.open(tmp_path / "live.store").versions() == [1, 2]
