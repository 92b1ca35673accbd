"""R15: SIGTERM with 16 busy clients: no answer is torn, `ready` says so at once, exit code 0 within 10 s."""

import time

import httpx
import pytest
from load import REFUSED, TORN, closed_loop
from support import beside, infer_requests, limit, say

pytestmark = pytest.mark.reliability


def test_drain(serve):
    requests = infer_requests()
    with serve(workers=2, max_wait_s=1.0) as server, httpx.Client(base_url=server.url) as client:
        client.get("/v2/health/ready").raise_for_status()
        with beside(lambda: closed_loop(server.port, requests, 16, 4.0)) as found:
            time.sleep(1.5)
            began = time.perf_counter()
            server.process.terminate()
            while client.get("/v2/health/ready").status_code == 200:
                time.sleep(0.001)
            not_ready_s = time.perf_counter() - began
            code = server.process.wait(10)
            ended_s = time.perf_counter() - began
        count = found[0].count()
    say(
        f"{count[200]} answered, {count[TORN]} torn, {count[REFUSED]} refused after the end, "
        f"not ready after {not_ready_s * 1e3:.0f} ms, ended after {ended_s:.1f} s with {code}"
    )
    assert set(count) <= {200, REFUSED}
    assert count[200] > limit(1000, 100)
    assert not_ready_s < limit(0.1, 1.0)
    assert code == 0
    assert ended_s <= 10
