"""Spans for OpenTelemetry, where one is wanted and its packages are installed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from domlora.errors import needing
from domlora.serving.http.logs import App, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from domlora.serving.http.answers import Answer, Request
    from domlora.serving.http.exchange import Scorer

__all__ = ["Traced", "tracer_to"]

_SAID = {
    b"x-domlora-bundle": "domlora.bundle",
    b"x-domlora-adapter": "domlora.adapter",
    b"x-domlora-arm": "domlora.arm",
}
_FAILED = 500


def tracer_to(endpoint: str, name: str) -> Any:
    """A tracer that sends spans in the background; sampling is as OpenTelemetry's own ``OTEL_TRACES_SAMPLER`` says.

    Args:
        endpoint: of a collector, such as ``http://localhost:4318/v1/traces``.
        name: of the service.

    Raises:
        ConfigError: the packages are not installed.
    """
    with needing("opentelemetry", "otlp_endpoint"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=5)))
    return provider.get_tracer("domlora")


class Traced:
    """An application with a span for each request, a child of the caller's (``traceparent``) where there is one.

    Args:
        app: the application.
        tracer: of OpenTelemetry.
    """

    def __init__(self, app: App, tracer: Any) -> None:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        self._app = app
        self._tracer = tracer
        self._extract = extract
        self._kind = SpanKind.SERVER

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._span(scope["method"], scope["path"], scope["headers"]) as span:

            async def told(message: Message) -> None:
                if message["type"] == "http.response.start":
                    _describe(span, message["status"], message.get("headers", ()))
                await send(message)

            await self._app(scope, receive, told)

    def around(self, scorer: Scorer) -> Scorer:
        """The same for what answers without ASGI."""

        def told(request: Request) -> Answer:
            with self._span(request.method, request.path, request.headers.items()) as span:
                answer = scorer(request)
                _describe(span, answer.status, answer.headers)
                return answer

        return told

    def _span(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> AbstractContextManager[Any]:
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        facts = {"http.request.method": method, "url.path": path}
        context = self._extract(carrier)
        span: AbstractContextManager[Any] = self._tracer.start_as_current_span(
            method, context=context, kind=self._kind, attributes=facts
        )
        return span


def _describe(span: Any, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("http.response.status_code", status)
    for name, value in headers:
        if name in _SAID:
            span.set_attribute(_SAID[name], value.decode("latin-1"))
    if status >= _FAILED:
        span.set_status(Status(StatusCode.ERROR))
