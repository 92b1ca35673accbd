"""The application: from a path to its handler, and from what it says to bytes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import perf_counter
from typing import NamedTuple
from urllib.parse import parse_qsl

from domlora.errors import DataError
from domlora.serving.console import analysis
from domlora.serving.console import handlers as console
from domlora.serving.http import admin, v2
from domlora.serving.http.answers import Answer, Handler, NotFoundError, Request, json_answer, reason_of, refusal
from domlora.serving.http.feedback import feedback
from domlora.serving.http.limits import inflate, read_body
from domlora.serving.http.logs import Receive, Scope, Send
from domlora.serving.http.metrics import CONTENT_TYPE
from domlora.serving.http.score import scored
from domlora.serving.http.service import Service

__all__ = ["Application", "make_app"]

_LOG = logging.getLogger("domlora.serving")
_FAILED = 500
_CONSOLE, _CONSOLE_THREADS = "console", 4
_NO_QUERY: Mapping[str, str] = {}


class _Route(NamedTuple):
    """What answers a path.

    Args:
        name: as metrics have it.
        handler: that answers.
        methods: of HTTP that it takes; None where the handler looks itself.
        slow: whether it waits or works for long, and so runs in a thread.
    """

    name: str
    handler: Handler
    methods: tuple[str, ...] | None = ("GET", "HEAD")
    slow: bool = False


def make_app(service: Service) -> Application:
    """The application of a service.

    Its routes are few and most are whole paths: one look into a dictionary finds them. Handlers are called on the event
    loop, slow ones in a thread.

    Args:
        service: what handlers share.
    """
    return Application(service)


class Application:
    """An application of ASGI; :meth:`score` is the shorter way for requests that score.

    Args:
        service: what handlers share.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._routes = _routes(service)
        self._below = {path: route for path, route in self._routes.items() if path.endswith("/")}
        self._infer = _Route("infer", v2.model, ("POST",))
        self._admin = _Route("admin", admin.handle, None, slow=True)
        self._console = ThreadPoolExecutor(_CONSOLE_THREADS, _CONSOLE)  # metrics and adapters do not wait for pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(f"this application answers HTTP alone, not {scope['type']!r}")
        route = self._routes.get(scope["path"]) or self._found(scope["path"])
        arrived = scope.get("arrived") or perf_counter()
        try:
            answer = await self._answer(route, scope, receive, arrived)
        except Exception as error:
            answer = self._refused(route, error)
        self._service.answered(route.name, answer, perf_counter() - arrived)
        body = answer.body
        headers = [
            (b"content-type", answer.content_type.encode()),
            (b"content-length", b"%d" % len(body)),
            *answer.headers,
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def score(self, request: Request) -> Answer:
        """Answer a request to a scoring path, whose body is whole and as it came."""
        route = self._routes.get(request.path) or self._found(request.path)
        try:
            encoding = request.headers.get(b"content-encoding")
            if encoding:
                body = inflate(request.body, encoding, self._service.settings.max_body_bytes)
                request = request._replace(body=body)
            answer = route.handler(self._service, request)
        except Exception as error:
            answer = self._refused(route, error)
        self._service.answered(route.name, answer, perf_counter() - request.arrived)
        return answer

    def close(self) -> None:
        """End what the console has begun, and write what is not written yet."""
        self._console.shutdown(wait=False, cancel_futures=True)
        analysis.end()
        self._service.close()

    def _refused(self, route: _Route, error: Exception) -> Answer:
        answer = refusal(error)
        if answer.status == _FAILED:
            _LOG.error("failed", exc_info=error, extra={"fields": {"route": route.name}})
        self._service.metrics.rejected(reason_of(error))
        return answer

    async def _answer(self, route: _Route, scope: Scope, receive: Receive, arrived: float) -> Answer:
        method, raw = scope["method"], scope["query_string"]
        if route.methods is not None and method not in route.methods:
            allowed = ", ".join(route.methods)
            told = {"error": f"this route takes {allowed}. Received: {method!r}.", "next_step": ""}
            return json_answer(told, 405, ((b"allow", allowed.encode()),))
        query = dict(parse_qsl(raw.decode("latin-1"), keep_blank_values=True)) if raw else _NO_QUERY
        request = Request(method, scope["path"], query, dict(scope["headers"]), b"", arrived)
        settings = self._service.settings
        no = admin.refused(self._service, request) if route is self._admin else None
        if no is not None:  # who may not push needs no room for an adapter
            with suppress(DataError):  # what is not read to its end costs the connection
                await read_body(scope, receive, settings)
            return no
        cap = settings.max_adapter_bytes if admin.takes_adapter(request) else settings.max_body_bytes
        body = await read_body(scope, receive, settings, cap)
        if route.slow:
            pool = self._console if route.name == _CONSOLE else None
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(pool, self._handled, route, request, body, cap)
        return self._handled(route, request, body, cap)

    def _handled(self, route: _Route, request: Request, body: bytes, cap: int) -> Answer:
        plain = inflate(body, request.headers.get(b"content-encoding", b""), cap)
        return route.handler(self._service, request._replace(body=plain))

    def _found(self, path: str) -> _Route:
        """The route of a path that is not whole in the dictionary."""
        if path.startswith(v2.PREFIX):
            return self._infer if path.endswith("/infer") else self._below[v2.PREFIX]
        if admin.handles(path):
            return self._admin
        fitting = [prefix for prefix in self._below if path.startswith(prefix)]
        return self._below[max(fitting, key=len)] if fitting else _NOWHERE


def _routes(service: Service) -> dict[str, _Route]:
    """Path to route; one that ends in ``/`` is for all paths below it that have none of their own."""
    found = {
        "/v1/score": _Route("score", scored, ("POST",)),
        f"{v2.PREFIX}{service.live.current.name}/infer": _Route("infer", v2.infer, ("POST",)),
        v2.PREFIX: _Route("model", v2.model),
        "/v2": _Route("server", v2.server),
        "/v2/health/live": _Route("health", v2.live),
        "/v2/health/ready": _Route("health", v2.ready),
        "/v1/feedback": _Route("feedback", feedback, ("POST",)),
        "/metrics": _Route("metrics", _metrics, slow=True),
    }
    if service.settings.console:
        pages = console.routes().items()
        found.update({path: _Route(_CONSOLE, handler, slow=True) for path, handler in pages})
    return found


def _metrics(service: Service, _: Request) -> Answer:
    service.tell()
    return Answer(200, service.metrics.expose(), CONTENT_TYPE)


def _nowhere(_: Service, request: Request) -> Answer:
    raise NotFoundError("no such route", received=request.path[:200])


_NOWHERE = _Route("none", _nowhere, None)
