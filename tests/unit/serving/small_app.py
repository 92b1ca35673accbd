"""A small application for the tests of the server's processes: it scores by being busy."""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Any
from urllib.parse import parse_qs

from domlora.errors import BundleError, DomloraError
from domlora.serving.http.limits import TooLargeError, TooSlowError, read_body
from domlora.serving.http.metrics import Metrics
from domlora.serving.http.worker import Served
from domlora.serving.settings import Settings


def make(settings: Settings, metrics: Metrics) -> Served:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        status, answer = await _answer(settings, metrics, scope, receive)
        body = json.dumps(answer).encode() if isinstance(answer, dict) else answer
        metrics.answered(scope["path"].strip("/"), status, None, 0, time.perf_counter() - scope["arrived"])
        headers = [(b"content-length", b"%d" % len(body)), (b"x-domlora-bundle", b"3")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return Served(app, lambda: None, lambda: (settings.bundle / "closed").touch())


def make_damaged(settings: Settings, metrics: Metrics) -> Served:
    if not (settings.bundle / "whole").exists():
        raise BundleError("a file of the export is damaged", received=str(settings.bundle.absolute() / "tables.bin"))
    return make(settings, metrics)


async def _answer(settings: Settings, metrics: Metrics, scope: Any, receive: Any) -> tuple[int, Any]:
    asked = {name: values[0] for name, values in parse_qs(scope["query_string"].decode()).items()}
    if scope["path"] == "/metrics":
        return 200, metrics.expose()
    if scope["path"] == "/fail":
        raise RuntimeError("on purpose")
    try:
        body = await read_body(scope, receive, settings)
    except DomloraError as error:
        status = {TooLargeError: 413, TooSlowError: 408}.get(type(error), 400)
        return status, {"error": str(error)}
    if "sleep_s" in asked:
        await asyncio.sleep(float(asked["sleep_s"]))
    if "hang_s" in asked:
        time.sleep(float(asked["hang_s"]))
    until = time.perf_counter() + float(asked.get("busy_s", 0))
    while time.perf_counter() < until:
        pass
    return 200, {"pid": os.getpid(), "bytes": len(body), "path": scope["path"]}
