"""The console's addresses: the page, and its documents as JSON."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from domlora.errors import DomloraError
from domlora.serving.console import experiments, views
from domlora.serving.console.figures import Figures
from domlora.serving.console.page import MEDIA, STATIC, policy
from domlora.serving.http.answers import Answer, Handler, NotFoundError, Request, json_answer, refusal
from domlora.serving.http.service import Service

__all__ = ["document", "routes"]

PAGE, DATA = "/console/", "/v1/console/"
_FRESH_S = 1.0  # counters are added up so often at the most, however many people look
_IDLE = 20  # times as long as adding up took: that is a twentieth of a core, of thousands of domains too
_GUARD = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)

Document = Callable[[Service], Any]


def routes() -> dict[str, Handler]:
    """The handlers by path; one that ends in ``/`` is for all paths below it."""
    return {PAGE.removesuffix("/"): _to_page, PAGE: _file, DATA: _document}


def document(service: Service, name: str) -> Any:
    """A document by its name, as JSON takes it.

    Args:
        name: ``overview``, ``domains``, ``drift``, ``schema``, ``experiments``, ``experiments/NAME`` or ``versions/N``.

    Raises:
        NotFoundError: there is none of this name.
    """
    plain = {"schema": views.schema, "experiments": experiments.every}
    counted = {"overview": views.overview, "domains": views.domains, "drift": views.drift}
    if name in plain:
        return plain[name](service)
    if name in counted:
        return counted[name](service, _COUNTED.figures(service))
    kind, _, one = name.partition("/")
    if kind == "experiments" and one:
        return experiments.one(service, one)
    if kind == "versions" and one.isdecimal():
        return views.version_of(service, int(one))
    raise NotFoundError("the console has no such document", received=name[:100])


class _Counted:
    """The figures of a moment ago: adding up the counters of many domains takes longer than scoring does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of: object = None
        self._until = 0.0
        self._last = Figures({}, 0.0)

    def figures(self, service: Service) -> Figures:
        with self._lock:
            start = time.monotonic()
            if self._of is not service.metrics or start > self._until:
                self._last, self._of = views.figures_of(service), service.metrics
                now = time.monotonic()
                self._until = now + max(_FRESH_S, _IDLE * (now - start))
            return self._last


_COUNTED = _Counted()


def _document(service: Service, request: Request) -> Answer:
    try:
        told = document(service, request.path.removeprefix(DATA))
    except DomloraError as error:
        return refusal(error)
    return json_answer(told, headers=((b"cache-control", b"no-store"), *_GUARD))


def _file(service: Service, request: Request) -> Answer:
    """A file of the page; a browser that has it is told so."""
    del service
    try:
        body, kind, tag = _read(request.path.removeprefix(PAGE) or "index.html")
    except NotFoundError as error:
        return refusal(error)
    headers = (
        (b"cache-control", b"no-cache"),
        (b"etag", tag),
        (b"content-security-policy", policy().encode()),
        *_GUARD,
    )
    if request.headers.get(b"if-none-match") == tag:
        return Answer(304, b"", kind, headers)
    return Answer(200, body, kind, headers)


def _to_page(service: Service, request: Request) -> Answer:
    """To the address that the page's own are relative to; relative itself, for a proxy may have put something before it."""
    del service, request
    return Answer(308, b"", "text/plain", ((b"location", b"console/"), *_GUARD))


@lru_cache(maxsize=64)
def _read(name: str) -> tuple[bytes, str, bytes]:
    known = {path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.suffix in MEDIA}
    if name not in known:
        raise NotFoundError("the console has no such file", received=name[:100])
    body = (STATIC / name).read_bytes()
    return body, MEDIA[(STATIC / name).suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"'.encode()
