"""R1: 60 % of the capacity, open loop: no failure, p99 within 25 ms, memory stands still."""

import pytest
from load import closed_loop, open_loop
from support import QUIET, infer_requests, limit, say

SECONDS = limit(20.0, 10.0)
pytestmark = pytest.mark.reliability


def test_load_is_held(serve):
    requests = infer_requests()
    with serve() as server:
        capacity = closed_loop(server.port, requests, 8, 3.0).rate()
        first = open_loop(server.port, requests, 0.6 * capacity, SECONDS / 2)
        middle = server.rss_mb()
        second = open_loop(server.port, requests, 0.6 * capacity, SECONDS / 2, seed=1)
        growth, counts = server.rss_mb() / middle - 1, server.counts()
    answers = first.status + second.status
    p99 = max(first.percentile(99, 200), second.percentile(99, 200))
    say(
        f"capacity {capacity:.0f}/s, offered {0.6 * capacity:.0f}/s for {SECONDS:.0f} s: {len(answers)} answers, "
        f"{len(answers) - first.count()[200] - second.count()[200]} other than 200, "
        f"p50 {second.percentile(50, 200):.1f} ms, p99 {p99:.1f} ms, memory {growth:+.1%}"
    )
    assert set(answers) <= ({200} if QUIET else {200, 503})
    assert answers.count(200) >= 0.5 * len(answers)
    assert p99 <= limit(25, 250)
    assert growth <= 0.02
    counted = sum(n for name, n in counts.items() if "requests_total" in name and 'route="infer"' in name)
    assert counted >= answers.count(200)
