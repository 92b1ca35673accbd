from __future__ import annotations

import threading

import numpy as np

from domlora.serving.rows.cache import Cache
from domlora.serving.rows.chain import NUMBER_BITS, Chain, Level


def test_the_rows_unused_for_longest_make_room() -> None:
    cache = Cache(1_100)
    cache.put((code, bytes(80)) for code in range(4))  # 270 bytes each
    assert cache.get([0]) == [bytes(80)]
    cache.put([(4, bytes(80)), (5, bytes(80))])
    assert [row is not None for row in cache.get(range(6))] == [True, False, False, True, True, True]
    assert cache.size_bytes <= 1_100


def test_a_cache_of_nothing_keeps_nothing() -> None:
    cache = Cache(0)
    cache.put([(1, b"row")])
    assert len(cache) == 0
    assert cache.size_bytes == 0


def test_threads_share_a_cache_that_is_always_full() -> None:
    cache, wrong = Cache(20_000), []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(300):
            codes = random.integers(0, 400, 50).tolist()
            found = cache.get(codes)
            wrong.extend(row for code, row in zip(codes, found, strict=True) if row not in (None, b"%d" % code))
            cache.put((code, b"%d" % code) for code in codes)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert 0 < cache.size_bytes <= 20_000


def test_a_row_is_looked_for_in_the_push_that_has_it() -> None:
    random = np.random.default_rng(0)
    below = random.permutation(50)  # what the row of each number is
    above = np.insert(below, 20, [100, 101])
    above[[3, 40]] = 102, 103
    changed = np.array([3, 20, 21, 40])
    chain = Chain([Level(1, changed, np.array([0, 22]), np.array([0, -2])), Level(0)])
    for code, wanted in zip(chain.codes(np.arange(52)).tolist(), above.tolist(), strict=True):
        push, number = code >> NUMBER_BITS, code & ((1 << NUMBER_BITS) - 1)
        assert (above if push else below)[number] == wanted
        assert bool(push) == (wanted >= 100)
