"""R6: fifty ask for one adapter and fifty for as many at once; the cap holds, pinned ones stay, each gets its own answer."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from pushing import CLOSE, Adapters, answer, memory, new_store
from support import say, serving

pytestmark = pytest.mark.reliability
MANY, CAP = 50, 8


def test_concurrent_loads(exported, tmp_path):
    adapters = Adapters(exported)
    expected = {f"d{number}": adapters.expected(number) for number in range(MANY)}
    one = adapters.payload("one", 99)
    with memory() as folder:
        store = new_store(exported, folder / "live")
        settings = {"max_adapters": CAP, "max_wait_s": 20.0, "deadline_s": 20.0}
        with serving(store.folder, tmp_path / "log", **settings) as server, ThreadPoolExecutor(MANY) as pool:

            def push(domain: str, content: bytes, pinned: bool = False) -> int:
                with httpx.Client(base_url=server.url, timeout=30) as client:
                    asked = client.put(
                        f"/v1/adapters/{domain}", content=content, params={"pinned": str(pinned).lower()}
                    )
                return asked.status_code

            def right(domain: str) -> bool:
                with httpx.Client(base_url=server.url, timeout=30) as client:
                    told, logits = answer(client, domain)
                return told.status_code == 200 and bool(np.abs(logits - expected[domain]).max() <= CLOSE)

            def listed() -> list[dict]:
                return server.get("/v1/adapters").json()["adapters"]

            same = list(pool.map(lambda _: push("one", one, pinned=True), range(MANY)))
            files = len(list((store.folder / "adapters").iterdir()))
            different = list(pool.map(lambda n: push(f"d{n}", adapters.payload(f"d{n}", n)), range(MANY)))
            answers = list(pool.map(right, [*expected] * 3))
            held = [each["domain"] for each in listed() if each["in_memory"]]
    say(
        f"{MANY} + {MANY} loads, {sum(answers)} of {len(answers)} answers right, in memory {len(held)} of at most {CAP}"
    )
    assert set(same) == set(different) == {200}
    assert files == 1
    assert all(answers)
    assert len(held) <= CAP
    assert "one" in held
