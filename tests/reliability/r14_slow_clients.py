"""R14: 300 clients that send headers a byte at a time, 100 that do so with bodies: all closed, nobody else notices."""

import asyncio
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import uvloop
from load import closed_loop, open_loop
from support import infer_requests, limit, say

pytestmark = pytest.mark.reliability


async def trickle(port, start):
    """How long the server bears it."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(start)
    closed = asyncio.create_task(reader.read())
    while not closed.done() and time.perf_counter() - began < 20:
        writer.write(b"a")
        await asyncio.wait([closed], timeout=0.5)
    writer.close()
    closed.cancel()
    return time.perf_counter() - began


def attack(port):
    headers = b"POST /v1/score HTTP/1.1\r\nhost: x\r\nx-slow: "
    bodies = [
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\n\r\n" for path in ("/v1/score", "/v1/feedback")
    ]

    async def all_of_them():
        clients = [trickle(port, headers) for _ in range(300)]
        clients += [trickle(port, bodies[n % 2].encode()) for n in range(100)]
        return await asyncio.gather(*clients)

    return uvloop.run(all_of_them())


def test_slow_clients(serve):
    requests = infer_requests()
    with serve(header_timeout_s=4.0, body_timeout_s=4.0, max_wait_s=1.0) as server:
        rate = 0.3 * closed_loop(server.port, requests, 8, 3.0).rate()
        quiet = open_loop(server.port, requests, rate, 5.0)
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as attackers:
            borne = attackers.submit(attack, server.port)
            seen = open_loop(server.port, requests, rate, 7.0)
            borne_s = borne.result()
    say(
        f"closed after {min(borne_s):.1f} to {max(borne_s):.1f} s; others {dict(seen.count())}, "
        f"p99 {seen.percentile(99, 200):.1f} ms, without them {quiet.percentile(99, 200):.1f} ms"
    )
    assert max(borne_s) <= limit(5.0, 8.0)
    assert set(seen.status) == {200}
    assert seen.percentile(99, 200) <= max(2 * quiet.percentile(99, 200), limit(50, 250))
