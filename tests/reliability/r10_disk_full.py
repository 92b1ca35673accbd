"""R10: the store's disk is full: pushes are refused with 503, what is served answers on, and room is all that it takes."""

import os
import shutil
import subprocess

import httpx
import pytest
from pushing import Adapters, answer, new_store
from support import say, serving

pytestmark = pytest.mark.reliability


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", place], check=False).returncode
    ):
        pytest.skip("nothing can be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_disk_full(exported, small_disk, tmp_path):
    adapters = Adapters(exported)
    store = new_store(exported, small_disk / "live")
    with serving(store.folder, tmp_path / "log") as server, httpx.Client(base_url=server.url, timeout=10) as client:

        def push(seed: int) -> int:
            return client.put("/v1/adapters/toys", content=adapters.payload("toys", seed)).status_code

        assert push(1) == 200
        before = answer(client, "toys")[1]
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
        refused = [push(2) for _ in range(20)]
        assert all((answer(client, "toys")[1] == before).all() for _ in range(20))
        assert server.get("/v2/health/ready").status_code == 200
        ballast.unlink()
        assert push(2) == 200
        assert (answer(client, "toys")[1] != before).any()
        starts = server.counts()["domlora_worker_starts_total"]
    say(f"{len(refused)} pushes refused with {set(refused)} on a full disk")
    assert set(refused) == {503}
    assert starts == 1
