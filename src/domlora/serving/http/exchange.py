"""A request to score from its bytes to those of its answer: no task, no scope and no messages of ASGI between them.

Those cost a quarter of scoring 64 rows. All other requests go through uvicorn's own cycle.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import ClassVar
from urllib.parse import parse_qsl, unquote

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from domlora.serving.http.answers import Answer, Request
from domlora.serving.http.limits import is_scoring

__all__ = ["Exchange", "Scorer", "raw_answer", "target_of", "wire"]

Scorer = Callable[[Request], Answer]
"""Answers a request whose body is whole; it raises nothing."""

_MOST_KEPT_BYTES = 256
_NO_QUERY: Mapping[str, str] = {}


class Exchange:
    """What a connection keeps of a request to score; it has what uvicorn's protocol looks at in a cycle of its own.

    Args:
        path, query: of the URL, see :func:`target_of`.
        headers: names in lower case.
        arrived: ``perf_counter`` at the first byte.
        keep_alive: whether the connection stays after the answer.
        expects: whether the client waits with its body until it is told to go on.
    """

    __slots__ = (
        "arrived",
        "body",
        "disconnected",
        "headers",
        "keep_alive",
        "more_body",
        "path",
        "query",
        "response_complete",
        "response_started",
        "size",
        "waiting_for_100_continue",
    )
    message_event: ClassVar = asyncio.Event()  # uvicorn sets it, and nobody waits for it

    def __init__(
        self,
        path: str,
        query: bytes,
        headers: list[tuple[bytes, bytes]],
        arrived: float,
        keep_alive: bool,
        expects: bool,
    ) -> None:
        self.path, self.query, self.headers, self.arrived = path, query, headers, arrived
        self.keep_alive, self.waiting_for_100_continue = keep_alive, expects
        self.body: list[bytes] = []
        self.size = 0
        self.more_body = True
        self.disconnected = self.response_started = self.response_complete = False

    def add(self, body: bytes) -> int:
        """Take a piece of the body; how many bytes there are now."""
        self.body.append(body)
        self.size += len(body)
        return self.size

    def request(self) -> Request:
        """As handlers take it, with the body as it came."""
        query = dict(parse_qsl(self.query.decode("latin-1"), keep_blank_values=True)) if self.query else _NO_QUERY
        return Request("POST", self.path, query, dict(self.headers), b"".join(self.body), self.arrived)


def target_of(url: bytes) -> tuple[str, bytes] | None:
    """The path and the query of a URL to score; None for any other.

    >>> target_of(b"/v2/models/live.home%2Fgarden/infer?a=1"), target_of(b"/v1/feedback")
    (('/v2/models/live.home/garden/infer', b'a=1'), None)
    """
    return _kept_target(url) if len(url) <= _MOST_KEPT_BYTES else _target(url)


def wire(answer: Answer, more: Iterable[tuple[bytes, bytes]], keep_alive: bool) -> bytes:
    """A whole answer as it goes over the wire.

    Args:
        answer: its headers have no line breaks.
        more: headers that all answers have.
        keep_alive: whether the connection stays.

    Example:
        >>> wire(Answer(200, b"{}"), [(b"date", b"now")], keep_alive=False).splitlines()[:3]
        [b'HTTP/1.1 200 OK', b'content-type: application/json', b'content-length: 2']
    """
    body = answer.body
    parts = [
        STATUS_LINE[answer.status],
        b"content-type: %s\r\ncontent-length: %d\r\n" % (answer.content_type.encode(), len(body)),
        *[b"%s: %s\r\n" % header for header in more],
        *[b"%s: %s\r\n" % header for header in answer.headers],
        b"\r\n" if keep_alive else b"connection: close\r\n\r\n",
        body,
    ]
    return b"".join(parts)


def raw_answer(status: int, error: str, next_step: str, *, close: bool = True) -> bytes:
    """A whole answer as it goes over the wire.

    >>> raw_answer(504, "too late", "Try again").splitlines()[0]
    b'HTTP/1.1 504 Gateway Timeout'
    """
    body = json.dumps({"error": error, "next_step": next_step}).encode()
    head = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        *(["retry-after: 1"] if status == HTTPStatus.SERVICE_UNAVAILABLE else []),
        *(["connection: close"] if close else []),
    ]
    return "\r\n".join([*head, "", ""]).encode() + body


def _target(url: bytes) -> tuple[str, bytes] | None:
    try:
        parsed = httptools.parse_url(url)
        path = unquote(parsed.path.decode("ascii"))
    except (httptools.HttpParserInvalidURLError, UnicodeDecodeError):
        return None
    return (path, parsed.query or b"") if is_scoring(path) else None


_kept_target = lru_cache(maxsize=1024)(_target)
