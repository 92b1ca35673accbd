"""R1: 60 % of the capacity, open loop: no failure, p99 within 25 ms, memory stands still."""

import pytest
from load import closed_loop, open_loop
from support import infer_requests, say

SECONDS = 10.0
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
    say(
        f"R1 capacity {capacity:.0f}/s, offered {0.6 * capacity:.0f}/s: {len(answers)} answers, "
        f"p50 {second.percentile(50, 200):.1f} ms, p99 {second.percentile(99, 200):.1f} ms, memory {growth:+.1%}"
    )
    assert set(answers) == {200}
    assert max(first.percentile(99, 200), second.percentile(99, 200)) <= 25
    assert growth <= 0.02
    assert sum(value for name, value in counts.items() if "requests_total" in name and 'status="200"' in name) >= len(
        answers
    )
