"""Spans for OpenTelemetry, where one is wanted and its packages are installed."""

from __future__ import annotations

from typing import Any

from domlora.errors import ConfigError
from domlora.serving.http.logs import App, Message, Receive, Scope, Send

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
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            "otlp_endpoint needs OpenTelemetry", next_step="pip install 'domlora[opentelemetry]', or leave it out"
        ) from error
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
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        facts = {"http.request.method": scope["method"], "url.path": scope["path"]}
        with self._tracer.start_as_current_span(
            scope["method"], context=self._extract(carrier), kind=self._kind, attributes=facts
        ) as span:

            async def told(message: Message) -> None:
                if message["type"] == "http.response.start":
                    _describe(span, message)
                await send(message)

            await self._app(scope, receive, told)


def _describe(span: Any, message: Message) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("http.response.status_code", message["status"])
    for name, value in message.get("headers", ()):
        if name in _SAID:
            span.set_attribute(_SAID[name], value.decode("latin-1"))
    if message["status"] >= _FAILED:
        span.set_status(Status(StatusCode.ERROR))
