"""Whose body is read, and how much of it."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading

import pytest

from domlora.serving.http import app as application
from domlora.serving.http.limits import inflate


@pytest.fixture
def ads(client_of):
    return client_of(token="secret", max_body_bytes=2_000, max_adapter_bytes=9_000)


def ask(client, method, path, body=b"", **headers):
    """Status, answer, and how many bytes of a body of which nobody is told the length were read."""
    told = [(b"host", b"x"), *((name.replace("_", "-").encode(), value.encode()) for name, value in headers.items())]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": told}
    read, said = 0, []

    async def receive():
        nonlocal read
        part = body[read : read + 500]
        read += len(part)
        return {"type": "http.request", "body": part, "more_body": read < len(body)}

    async def send(message):
        said.append(message)

    asyncio.run(client.app(scope, receive, send))
    return said[0]["status"], json.loads(said[1]["body"]), read


@pytest.mark.parametrize("path", ["/v1/adapters/toys", "/v2/repository/models/ads/load", "/v1/bundle"])
@pytest.mark.parametrize(("given", "status"), [({}, 401), ({"authorization": "Bearer guess"}, 403)])
def test_who_may_not_change_anything_may_not_send_more_than_others(ads, path, given, status):
    for method in ("PUT", "POST"):
        found, _, read = ask(ads, method, path, b"x" * 8_000, **given)
        assert (found, read) == (status, 2_500)  # where the cap is passed
        assert ask(ads, method, path, b"x" * 8_000, content_length="8000", **given)[::2] == (status, 0)
        assert ask(ads, method, path, b"x" * 900, **given)[::2] == (status, 900)  # its connection goes on


def test_an_adapter_alone_may_be_as_large_as_an_adapter(ads):
    body, token = b"x" * 8_000, {"authorization": "Bearer secret"}
    status, told, read = ask(ads, "PUT", "/v1/adapters/toys", body, **token)
    assert (status, told["reason"], read) == (400, "bundle", 8_000)
    for method, path in (("PUT", "/nowhere"), ("PUT", "/v2/repository/models/ads/load"), ("POST", "/v1/adapters/toys")):
        status, _, read = ask(ads, method, path, body, **token)
        assert status == 413
        assert read <= 2_500


def test_what_is_compressed_and_large_is_unpacked_beside_the_loop(ads, monkeypatch):
    seen = []

    def noted(body, encoding, cap):
        seen.append((threading.current_thread() is threading.main_thread(), cap))
        return inflate(body, encoding, cap)

    monkeypatch.setattr(application, "inflate", noted)
    told = {"authorization": "Bearer secret", "content_encoding": "gzip"}
    assert ask(ads, "PUT", "/v1/adapters/toys", gzip.compress(b"x" * 100_000), **told)[0] == 413
    assert ask(ads, "PUT", "/v1/adapters/toys", gzip.compress(b"x" * 8_000), **told)[1]["reason"] == "bundle"
    assert seen == [(False, 9_000)] * 2
