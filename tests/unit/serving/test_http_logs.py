from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from domlora.errors import ConfigError
from domlora.serving.http.answers import Answer, Request
from domlora.serving.http.logs import JsonLines, Logged, log_to
from domlora.serving.http.tracing import Traced, tracer_to

HEADERS = ((b"x-domlora-bundle", b"3"), (b"x-request-id", b"r-1"), (b"x-domlora-adapter", b"toys@2"))


def answering(status: int) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": HEADERS})
        await send({"type": "http.response.body", "body": b"{}"})

    return app


def beside(around: Logged | Traced, status: int) -> Any:
    """The same, of what is around a scorer."""
    scorer = around.around(lambda _: Answer(status, b"{}", headers=HEADERS))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scorer(Request(scope["method"], scope["path"], {}, dict(scope["headers"]), b"", time.perf_counter()))

    return app


def ask(app: Any, times: int = 1) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": [(b"traceparent", PARENT)]}
    for _ in range(times):
        asyncio.run(app(scope, None, send))
    return sent


PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def written(app: Any, times: int = 1) -> list[dict[str, Any]]:
    stream, told = io.StringIO(), logging.getLogger("domlora.serving")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    told.addHandler(handler)
    before = told.level
    told.setLevel(logging.INFO)
    try:
        ask(app, times)
    finally:
        told.removeHandler(handler)
        told.setLevel(before)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("app", [Logged(answering(200), 1.0), beside(Logged(answering(503), 1.0), 200)])
def test_a_line_says_what_the_answer_was(app: Any) -> None:
    (line,) = written(app)
    assert line.pop("ms") >= 0
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "event": "answered",
        "method": "POST",
        "path": "/v1/score",
        "status": 200,
        "pid": os.getpid(),
        "version": "3",
        "request_id": "r-1",
        "adapter": "toys@2",
    }


@pytest.mark.parametrize(
    ("status", "share", "expected"), [(200, 0.0, 0), (503, 0.0, 0), (500, 0.0, 20), (200, 1.0, 20)]
)
def test_a_share_is_logged_and_every_failure(status: int, share: float, expected: int) -> None:
    assert len(written(Logged(answering(status), share), 20)) == expected
    assert len(written(beside(Logged(answering(200), share), status), 20)) == expected


def test_a_sample_is_about_its_share() -> None:
    assert 50 < len(written(Logged(answering(200), 0.5), 200)) < 150


def test_a_full_pipe_stops_nobody() -> None:
    script = (
        "import logging, sys, time\n"
        "from domlora.serving.http.logs import log_to\n"
        "listener = log_to(sys.stdout)\n"
        "began = time.perf_counter()\n"
        "for n in range(20_000): logging.getLogger('domlora.serving').info('line %d', n)\n"
        "sys.stderr.write(f'{time.perf_counter() - began}\\n')\n"
        "sys.stderr.flush()\n"
        "listener.stop()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert float(process.stderr.readline()) < 10  # nobody reads standard output yet
    out, _ = process.communicate(timeout=30)
    whole = [json.loads(line) for line in out.splitlines()]
    assert whole[0]["event"] == "line 0"
    assert 1_000 < len(whole) < 20_000


def test_a_failure_carries_its_trace() -> None:
    stream = io.StringIO()
    before = logging.getLogger().handlers[:]
    levels = {name: logging.getLogger(name).level for name in ("", "domlora.serving", "uvicorn.error")}
    listener = log_to(stream)
    try:
        try:
            raise RuntimeError("on purpose")
        except RuntimeError:
            logging.getLogger("domlora.serving").exception("failed", extra={"fields": {"place": 1}})
    finally:
        listener.stop()
        logging.getLogger().handlers[:] = before
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"], line["place"]) == ("failed", "error", 1)
    assert "RuntimeError: on purpose" in line["trace"]


def test_spans_reach_a_collector() -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.handle_request)
    thread.start()
    tracer = tracer_to(f"http://127.0.0.1:{collector.server_port}/v1/traces", "live")
    ask(Traced(answering(500), tracer))
    ask(beside(Traced(answering(200), tracer), 500))
    tracer.span_processor.force_flush()
    thread.join(5)
    collector.server_close()
    tracer.span_processor.shutdown()
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    (resource,) = ExportTraceServiceRequest.FromString(bodies[0]).resource_spans
    spans = resource.scope_spans[0].spans
    assert len(spans) == 2
    for span in spans:
        facts = {each.key: each.value for each in span.attributes}
        assert span.trace_id.hex() == PARENT.decode().split("-")[1]
        assert facts["http.response.status_code"].int_value == 500
        assert facts["domlora.bundle"].string_value == "3"
    assert any(
        each.key == "service.name" and each.value.string_value == "live" for each in resource.resource.attributes
    )


def test_tracing_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install .domlora\[opentelemetry\]"):
        tracer_to("http://localhost:4318", "live")
