"""R13: bodies that lie about their length, never end, or unpack to gigabytes: 413 early, and no memory."""

import gzip
import socket

import pytest
from load import request_of
from support import say

CAP = 8 << 20
pytestmark = pytest.mark.reliability


def send(port, start, part, most):
    """Send until there is an answer; its status, and how many bytes went."""
    sent, answer = 0, b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(start)
        sock.settimeout(0.0005)
        while not answer and sent < most:
            try:
                sent += sock.send(part)
                answer = sock.recv(65536)
            except TimeoutError:
                continue
        sock.settimeout(10)
        answer = answer or sock.recv(65536)
    return int(answer.split()[1]), sent


@pytest.mark.parametrize("path", ["/v1/score", "/v2/models/live/infer", "/v1/feedback"])
def test_oversize_bodies(serve, path):
    chunked = f"POST {path} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n".encode()
    lie = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {300 << 20}\r\n\r\n".encode()
    bomb = gzip.compress(bytes(1 << 30), 9)
    packed = request_of(path, bomb, "content-encoding: gzip")
    part = b"10000\r\n" + bytes(65536) + b"\r\n"
    with serve() as server:
        server.get("/v2")
        before = server.rss_mb()
        seen = {
            "chunked": send(server.port, chunked, part, 300 << 20),
            "lie": send(server.port, lie, part, 300 << 20),
            "bomb": send(server.port, packed, b"", 1),
        }
        growth = server.rss_mb() - before
    say(f"{path}: {seen}, memory {growth:+.1f} MB")
    assert {status for status, _ in seen.values()} == {413}
    assert max(sent for _, sent in seen.values()) < CAP + (8 << 20)
    assert growth <= 16
