"""R17: a call that hangs for 10 s: who waits for it has 504 within 1.2 deadlines, the worker is replaced, others go on."""

import time

import pytest
from load import closed_loop, open_loop
from support import HANGING, beside, hanging_request, infer_requests, limit, say

DEADLINE_S = 1.0
pytestmark = pytest.mark.reliability


def test_hung_inference(serve):
    requests = infer_requests()
    with serve(factory=HANGING, workers=2, deadline_s=DEADLINE_S, max_wait_s=1.0) as server:
        rate = 0.3 * closed_loop(server.port, requests, 8, 2.0).rate()
        with beside(lambda: open_loop(server.port, requests, rate, 6.0)) as others:
            time.sleep(1.0)
            hung = open_loop(server.port, [hanging_request(10.0)], 1000.0, 0.0005)
            server.wait(lambda: len(server.events("ready")) == 3)
        seen, said = others[0], server.events("hung")
    count = seen.count()
    say(
        f"hanging request: {dict(hung.count())} after {hung.percentile(100, 504):.0f} ms; beside it {dict(count)}, "
        f"504 at the latest after {seen.percentile(100, 504):.0f} ms, 200 p99 {seen.percentile(99, 200):.0f} ms; {said}"
    )
    assert set(hung.status) == {504}
    assert max(hung.percentile(100, 504), seen.percentile(100, 504)) <= limit(1200, 2500) * DEADLINE_S
    assert set(count) <= {200, 504}
    assert count[504] <= 0.2 * len(seen.status)
    assert len(said) == 1
