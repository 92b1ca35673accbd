"""The server and the command line with tables that lie elsewhere."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from domlora.cli.program import app
from domlora.errors import ConfigError
from domlora.serving.folder import read_facts
from domlora.serving.http.metrics import Metrics
from domlora.serving.http.service import make
from domlora.serving.rows.keys import keys_of
from domlora.serving.settings import Settings

BODY = {
    "domain": "app",
    "request": {"past": ["i1", "i2"], "age": 0.5},
    "candidates": {"item": ["i5", "i6"], "city": ["c1", "c1"]},
}


def ask(served: Any, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], bytes]:
    said: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"" if body is None else json.dumps(body).encode(), "more_body": False}

    async def send(message: Any) -> None:
        said.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": []}
    asyncio.run(served.app(scope, receive, send))
    return said[0]["status"], {name.decode(): value.decode() for name, value in said[0]["headers"]}, said[1]["body"]


def settings_of(versions: Any, url: str, store: Any, **options: Any) -> Settings:
    from domlora.serving.store import Store

    if not store.exists():
        Store.create(store).add_version(versions.old.folder)
    return Settings(bundle=store, rows=url, rows_timeout_s=5.0, **options)


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["store", "rows", *words])
    assert result.exit_code == 0, result.exception
    return result.output


def test_rows_are_pushed_listed_served_and_dropped(server: Any, versions: Any, tmp_path: Any) -> None:
    assert "sent 606 of 606 rows" in run("push", str(versions.old.folder), server.url)
    sha256 = read_facts(versions.old.folder)["remote"][0]["sha256"]
    assert json.loads(run("list", server.url))[sha256]["complete"]
    assert "sent 3 of 611 rows" in run(
        "push", str(versions.new.folder), server.url, "--after", str(versions.old.folder)
    )
    served = make(settings_of(versions, server.url, tmp_path / "store"), Metrics())
    status, headers, body = ask(served, "POST", "/v1/score", BODY)
    assert status == 200, body
    assert "x-domlora-degraded" not in headers
    assert "degraded" not in json.loads(body)
    served.refresh()
    text = ask(served, "GET", "/metrics")[2].decode()
    assert 'domlora_row_lookups_total{result="fetched"}' in text
    assert "domlora_row_fetch_seconds_count" in text
    assert "domlora_degraded_rows_total 0.0" in text
    served.close()
    assert "removed 3 rows" in run("drop", read_facts(versions.new.folder)["remote"][0]["sha256"], server.url)


def test_an_answer_without_a_row_says_so_or_is_503(server: Any, versions: Any, tmp_path: Any) -> None:
    run("push", str(versions.old.folder), server.url)
    degrading = make(settings_of(versions, server.url, tmp_path / "store"), Metrics())
    strict = make(settings_of(versions, server.url, tmp_path / "store", rows_missing="error"), Metrics())
    sha256 = read_facts(versions.old.folder)["remote"][0]["sha256"]
    server.client.delete(*keys_of(sha256, [7]))  # item i5: padding and out-of-vocabulary come first
    status, headers, body = ask(degrading, "POST", "/v1/score", BODY)
    assert (status, headers["x-domlora-degraded"], json.loads(body)["degraded"]) == (200, "1", 1)
    degrading.refresh()
    assert "domlora_degraded_rows_total 1.0" in ask(degrading, "GET", "/metrics")[2].decode()
    status, headers, body = ask(strict, "POST", "/v1/score", BODY)
    assert (status, headers["retry-after"], json.loads(body)["reason"]) == (503, "1", "rows_missing")
    whole = {**BODY, "candidates": {"item": ["i8"], "city": ["c1"]}}
    assert ask(strict, "POST", "/v1/score", whole)[0] == 200
    for each in (degrading, strict):
        each.close()


def test_policies_are_checked() -> None:
    with pytest.raises(ConfigError, match="rows_missing must be 'degrade' or 'error'"):
        Settings.told({"bundle": "x", "rows_missing": "ignore"}, {})
