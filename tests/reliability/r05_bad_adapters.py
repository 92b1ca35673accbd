"""R5: eight kinds of bad adapters are refused by name, and what answered before answers on, bit for bit."""

import json

import httpx
import numpy as np
import pytest
from pushing import Adapters, answer, new_store
from support import say, serving

from domlora.serving.payload import Payload, write_payload

pytestmark = pytest.mark.reliability


def bad_ones(adapters: Adapters) -> dict[str, tuple[bytes, str]]:
    whole, banks = adapters.payload("toys", 2), adapters.banks(2)
    first = next(iter(banks))

    def other(change: dict[str, np.ndarray], base: str = adapters.base) -> bytes:
        return write_payload(Payload("toys", base, "2", {**banks, **change}))

    return {
        "truncated": (whole[:-1], "whole"),
        "bit flip": (whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:], "sha256"),
        "wrong shape": (other({first: banks[first][:-1]}), "must fit layer"),
        "rank": (adapters.payload("toys", 2, rank=9), "rank must be at most 8"),
        "nan": (other({first: np.full_like(banks[first], np.nan)}), "finite"),
        "float64": (other({first: banks[first].astype(np.float64)}), "float32"),
        "unknown tensor": (other({"tower.9.lora_A": np.ones((2, 2), np.float32)}), "banks of every adapted layer"),
        "other base": (other({}, base="0" * 64), "another base"),
    }


def test_bad_adapters(exported, tmp_path):
    adapters = Adapters(exported)
    store = new_store(exported, tmp_path / "live")
    with serving(store.folder, tmp_path / "log", max_rank=8) as server:
        with httpx.Client(base_url=server.url, timeout=10) as client:
            assert client.put("/v1/adapters/toys", content=adapters.payload("toys", 1)).status_code == 200
            before = answer(client, "toys")[1]
            for kind, (content, word) in bad_ones(adapters).items():
                told = client.put("/v1/adapters/toys", content=content)
                assert (kind, told.status_code, word in told.text) == (kind, 400, True), told.text
                assert str(tmp_path) not in json.dumps(told.json())
                assert (answer(client, "toys")[1] == before).all(), kind
        starts = server.counts()["domlora_worker_starts_total"]
    say(f"{len(bad_ones(adapters))} of 8 refused")
    assert starts == 1
