"""R16: kill -9 of one worker of two under load: its requests in flight are lost, no more; it is back within 3 s."""

import os
import signal
import time

import pytest
from load import TORN, closed_loop
from support import beside, infer_requests, limit, say

CLIENTS = 8
pytestmark = pytest.mark.reliability


def test_respawn(serve):
    requests = infer_requests()
    with serve(workers=2, max_wait_s=1.0) as server:
        with beside(lambda: closed_loop(server.port, requests, CLIENTS, 6.0)) as found:
            time.sleep(1.5)
            began = time.time()
            os.kill(server.workers()[0], signal.SIGKILL)
            server.wait(lambda: len(server.events("ready")) == 3)
            back_s = time.time() - began
        count = found[0].count()
        starts = server.counts()["domlora_worker_starts_total"]
    say(f"{count[200]} answered, {count[TORN]} lost of {CLIENTS} clients, ready again after {back_s:.1f} s")
    assert set(count) <= {200, TORN}
    assert count[TORN] <= CLIENTS
    assert back_s <= limit(3, 20)
    assert starts == 3
