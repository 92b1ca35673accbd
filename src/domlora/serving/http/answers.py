"""What a handler takes and gives, and what a client is told when something is wrong."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from domlora.errors import BundleError, DataError, DomloraError, UnknownDomainError
from domlora.serving.http.limits import BusyError, TooLargeError, TooSlowError
from domlora.serving.rows.layout import RowsMissingError

if TYPE_CHECKING:
    from domlora.serving.http.service import Service

__all__ = [
    "BINARY",
    "JSON",
    "Answer",
    "Handler",
    "NotFoundError",
    "Request",
    "UnavailableError",
    "compressed",
    "json_answer",
    "json_object",
    "reason_of",
    "refusal",
    "request_id_header",
]

JSON, BINARY = "application/json", "application/octet-stream"
_LONGEST = 1000  # characters of a message: what was received may be a whole table
_LEAST_TO_COMPRESS = 4096  # bytes; fewer fit into few packets, and compressing them costs as much as scoring
_PRINTABLE = re.compile(r"[!-~]{1,128}")
_PATH = re.compile(r"(?<![\w.~%-])/(?:[\w.@~%+-]+/)+[\w.@~%+-]*")


class NotFoundError(DomloraError):
    """There is no such thing at this URL: 404."""


class UnavailableError(DomloraError):
    """Not the client's fault, and it may be over soon: 503."""


_STATUS: tuple[tuple[type[BaseException], int, str], ...] = (
    (TooLargeError, 413, "too_large"),
    (TooSlowError, 408, "too_slow"),
    (BusyError, 503, "busy"),
    (UnavailableError, 503, "unavailable"),
    (RowsMissingError, 503, "rows_missing"),
    (NotFoundError, 404, "not_found"),
    (UnknownDomainError, 404, "unknown_domain"),
    (BundleError, 400, "bundle"),
    (DomloraError, 400, "invalid"),
)


class Request(NamedTuple):
    """What came.

    Args:
        method, path: of HTTP; the path is decoded.
        query: the parameters after the question mark, the last one of a name.
        headers: by lower-case name, the last one of a name.
        body: whole, and decompressed.
        arrived: ``perf_counter`` at the first byte.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[bytes, bytes]
    body: bytes
    arrived: float


class Answer(NamedTuple):
    """What goes out.

    Args:
        status: of HTTP.
        body: its bytes.
        content_type: of the body.
        headers: besides content-type and content-length.
        domain, rows: what was scored, to be counted.
    """

    status: int
    body: bytes
    content_type: str = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()
    domain: str | None = None
    rows: int = 0


Handler = Callable[["Service", Request], Answer]
"""Synchronous and on the event loop's thread: scoring takes less than handing it to another one."""


def json_answer(what: Any, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()) -> Answer:
    """A value as JSON.

    >>> json_answer({"live": True}).body
    b'{"live":true}'
    """
    return Answer(status, msgspec.json.encode(what), JSON, headers)


def refusal(error: BaseException) -> Answer:
    """An error as an answer: what must hold, what was received, what to do next; never a path or a trace.

    400 for what is wrong with a request, 404 for what is not there, 408 and 413 for a body that is too slow or too large,
    503 for a server that cannot answer now, and 500 for a bug.

    Example:
        >>> refusal(DataError("ids must be INT64", received="INT32", next_step="Cast them")).body
        b'{"error":"ids must be INT64. Received: \\'INT32\\'.","next_step":"Cast them.","reason":"invalid"}'
        >>> refusal(KeyError("/etc/secret")).status, refusal(KeyError("/etc/secret")).body
        (500, b'{"error":"the server failed","next_step":"Its log says why.","reason":"failed"}')
    """
    status = next((status for kind, status, _ in _STATUS if isinstance(error, kind)), 500)
    if not isinstance(error, DomloraError):
        return json_answer({"error": "the server failed", "next_step": "Its log says why.", "reason": "failed"}, status)
    text = _PATH.sub("...", str(error).removesuffix(error.next_step).rstrip())
    said = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    again = ((b"retry-after", b"1"),) if status == 503 else ()
    told = {"error": _sayable(said), "next_step": _sayable(error.next_step[:_LONGEST]), "reason": reason_of(error)}
    return json_answer(told, status, again)


def reason_of(error: BaseException) -> str:
    """The name by which refusals for this kind of error are counted.

    >>> reason_of(UnknownDomainError("no adapter for this domain"))
    'unknown_domain'
    """
    return next((reason for kind, _, reason in _STATUS if isinstance(error, kind)), "failed")


def json_object(raw: bytes | memoryview, decoder: msgspec.json.Decoder[Any], num_fields: Callable[[Any], int]) -> Any:
    """A JSON text as the decoder's type, each field of which is there once.

    Each field of a text has a colon. So where there are no more colons than fields were found, no field came twice, and
    nothing else need be looked at; colons within texts take the long way.

    Args:
        raw: the text.
        decoder: checks names and types.
        num_fields: counts the fields of what was decoded; too few only cost time.

    Raises:
        DataError: no JSON, of another form, or with a field that comes twice.

    Example:
        >>> decoder = msgspec.json.Decoder(dict[str, int])
        >>> json_object(b'{"a": 1, "b": 2}', decoder, len)
        {'a': 1, 'b': 2}
        >>> json_object(b'{"a": 1, "a": 2}', decoder, len)
        Traceback (most recent call last):
        domlora.errors.DataError: a field of an object must come once. Received: 'a'.
    """
    try:
        found = decoder.decode(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the body must be JSON of the form that the API describes ({_short(error)})") from error
    if bytes(raw).count(b":") > num_fields(found):
        _refuse_twins(bytes(raw))
    return found


def request_id_header(request_id: str) -> tuple[tuple[bytes, bytes], ...]:
    """The header that tells it, if a header can.

    >>> request_id_header("r-7"), request_id_header("two lines\\r\\nset-cookie: no")
    (((b'x-request-id', b'r-7'),), ())
    """
    return ((b"x-request-id", request_id.encode()),) if _PRINTABLE.fullmatch(request_id) else ()


def compressed(answer: Answer, accepted: bytes | None) -> Answer:
    """The answer in an encoding that the client asked for, if it is long enough for that to be worth while.

    Args:
        answer: as it is.
        accepted: the value of Accept-Encoding.
    """
    if not accepted or len(answer.body) < _LEAST_TO_COMPRESS:
        return answer
    names = [name.strip() for name in accepted.lower().split(b",")]
    if b"gzip" in names:
        body, name = gzip.compress(answer.body, 1, mtime=0), b"gzip"
    elif b"deflate" in names:
        body, name = zlib.compress(answer.body, 1), b"deflate"
    else:
        return answer
    more = ((b"content-encoding", name), (b"vary", b"accept-encoding"))
    return answer._replace(body=body, headers=(*answer.headers, *more))


def _refuse_twins(raw: bytes) -> None:
    import json

    def once(pairs: list[tuple[str, Any]]) -> None:
        names: set[str] = set()
        for name, _ in pairs:
            if name in names:
                raise DataError("a field of an object must come once", received=name[:100])
            names.add(name)

    try:
        json.loads(raw, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the body must be JSON ({_short(error)})") from error


def _short(error: Exception) -> str:
    return str(error)[:200] or type(error).__name__


def _sayable(text: str) -> str:
    """Without halves of surrogate pairs, which no UTF-8 holds."""
    return text.encode("utf-8", errors="backslashreplace").decode()
