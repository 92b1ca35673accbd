"""R23: requests and a swap each second, 10 minutes or as long as ``DOMLORA_SOAK_S`` says; files, threads and memory stay."""

import os
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from pushing import Adapters, Watched, memory, new_store
from support import limit, say, serving

pytestmark = pytest.mark.reliability
SECONDS = float(os.environ.get("DOMLORA_SOAK_S", limit(600, 20)))
LONG_S = 300  # from here on memory is compared closely: allocators are done with what they keep


def _seen(pid: int) -> tuple[int, int, int]:
    """Open files, threads and resident bytes of a process."""
    place = Path(f"/proc/{pid}")
    resident = int((place / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(list((place / "fd").iterdir())), len(list((place / "task").iterdir())), resident


def test_soak(exported, tmp_path):
    adapters = Adapters(exported)
    expected = {f"v{seed}": adapters.expected(seed) for seed in range(4)}
    payloads = [adapters.payload("toys", seed) for seed in range(4)]
    seen = []
    with memory() as folder:
        store = new_store(exported, folder / "live")
        store.add_version(exported, 2)
        with (
            serving(store.folder, tmp_path / "log", max_wait_s=5.0) as server,
            httpx.Client(base_url=server.url, timeout=10) as admin,
        ):
            assert admin.put("/v1/adapters/toys", content=payloads[0]).status_code == 200
            (pid,) = server.workers()
            with Watched(server.url, "toys", expected) as watched:
                start = time.perf_counter()
                while time.perf_counter() - start < SECONDS:
                    swap = len(seen)
                    assert admin.put("/v1/adapters/toys", content=payloads[swap % 4]).status_code == 200
                    if swap % 10 == 9:
                        assert admin.post("/v1/bundle", json={"version": 1 + swap // 10 % 2}).status_code == 200
                    time.sleep(1)
                    seen.append(_seen(pid))
            assert server.workers() == [pid]
    files, threads, resident = (np.array(column) for column in zip(*seen, strict=True))
    half = len(seen) // 2
    grown = np.median(resident[half:]) / np.median(resident[half // 2 : half]) - 1
    say(
        f"{SECONDS:.0f} s, {watched.count} answers, {len(watched.bad)} bad, {len(seen)} swaps; memory {grown:+.1%} "
        f"({resident[-1] / 1e6:.0f} MB), files {files[0]} to {files[-1]}, threads {threads[0]} to {threads[-1]}"
    )
    assert watched.bad == []
    assert abs(int(files[-1]) - int(files[half])) <= 2
    assert abs(int(threads[-1]) - int(threads[half])) <= 2
    assert grown <= (0.02 if SECONDS >= LONG_S else 0.1)
