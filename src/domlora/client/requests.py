"""What can be asked of a server: each function describes one request, and is a method of both clients."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from domlora.client.answers import HEADER_LENGTH, Adapter, Inferred, Scored, Taken, json_of, read_inferred, read_scored
from domlora.errors import ConfigError, DataError, DomloraError, UnknownDomainError

__all__ = [
    "Call",
    "Event",
    "adapters",
    "delete_adapter",
    "feedback",
    "health",
    "infer",
    "infer_body",
    "metadata",
    "put_adapter",
    "score",
    "set_live",
]

T = TypeVar("T")
_OUTPUTS = ("probability", "logit")


class Event(NamedTuple):
    """Something that happened to a row of an answer.

    Args:
        request_id, row: the answer, and the place in it.
        event: ``click`` is what the model predicts, ``shown`` that the row was seen; others are for experiments.
        value: such as a price.
        time_s: seconds since 1970; None for now.
        unit: who it was; None for who asked.
    """

    request_id: str
    row: int
    event: str = "click"
    value: float = 1.0
    time_s: float | None = None
    unit: str | None = None


class Call(NamedTuple, Generic[T]):
    """A request, and what its answer means.

    Args:
        method, path: of HTTP; ``{model}`` in the path is the client's model.
        read: the answer's meaning.
        body, headers, query: of the request.
        missing: the error that 404 is.
        repeatable: sent again even when it may have been taken.
        tries: at the most; None for the client's.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    body: bytes = b""
    headers: Mapping[str, str] = {}
    query: Mapping[str, str] = {}
    missing: type[DomloraError] = ConfigError
    repeatable: bool = True
    tries: int | None = None


def score(
    candidates: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
    *,
    domain: str | None = None,
    request: Mapping[str, Any] | None = None,
    unit: str | None = None,
    items: Sequence[str | int] | None = None,
    explain: bool = False,
    request_id: str | None = None,
) -> Call[Scored]:
    """Score rows of raw values.

    Args:
        candidates: rows, or columns of equal length. Rows may have a ``domain`` of their own.
        domain: of all rows.
        request: features that all rows have alike.
        unit: who asks, for experiments and the log.
        items: what the rows are called in the log.
        explain: also tell what the adapter adds.
        request_id: what feedback refers to; a new one without.

    Raises:
        DataError: values that cannot be encoded; UnknownDomainError: no such domain, where the policy is ``error``.
    """
    told: dict[str, Any] = {"domain": domain, "unit": unit, "request": request, "items": items}
    body = {name: value for name, value in told.items() if value is not None}
    rows = dict(candidates) if isinstance(candidates, Mapping) else list(candidates)
    what = json.dumps({**body, "candidates": rows, "explain": explain}, default=_plain).encode()
    return Call(
        "POST", "/v1/score", read_scored, what, _headers("application/json", request_id), {}, UnknownDomainError
    )


def infer(
    ids: ArrayLike,
    dense: ArrayLike | None = None,
    *,
    domain: str | Sequence[str] | None = None,
    unit: str | None = None,
    version: int | None = None,
    request_id: str | None = None,
) -> Call[Inferred]:
    """Score encoded rows as binary tensors: the cheapest way in.

    **Shape**: ``ids (B, S)`` int64, ``dense (B, G)`` float32.

    Args:
        ids, dense: as the bundle's encoder gives them.
        domain: of all rows, or each one's.
        unit: who asks, for experiments and the log.
        version: of the bundle; the live one, or an experiment's arm, without.
        request_id: what feedback refers to; a new one without.

    Raises:
        DataError: shapes, types or ids that the model does not have; UnknownDomainError: no such domain.
    """
    body, length = infer_body(ids, dense, domain=domain, unit=unit)
    path = f"/v2/models/{{model}}{'' if version is None else f'/versions/{version}'}/infer"
    headers = {**_headers("application/octet-stream", request_id), HEADER_LENGTH: str(length)}
    return Call("POST", path, read_inferred, body, headers, {}, ConfigError if domain is None else UnknownDomainError)


def feedback(events: Iterable[Event]) -> Call[Taken]:
    """Tell what happened to rows. All events are taken, or none; the same event of the same row counts once."""
    told = [{name: value for name, value in each._asdict().items() if value is not None} for each in events]
    body = json.dumps({"events": told}, default=_plain).encode()
    return Call("POST", "/v1/feedback", lambda r: Taken(**json_of(r)), body, {"content-type": "application/json"})


def adapters() -> Call[list[Adapter]]:
    """All domains that are served."""
    return Call("GET", "/v1/adapters", lambda r: [Adapter(**each) for each in json_of(r)["adapters"]])


def put_adapter(domain: str, content: bytes, *, version: str | None = None, pinned: bool = False) -> Call[Adapter]:
    """Serve an adapter from now on.

    Args:
        domain: whose.
        content: of the file that ``domlora store pack`` writes.
        version: what to call it; what the file says without.
        pinned: keep it in memory.

    Raises:
        BundleError, DataError: it is damaged or of another base; the old one is still served.
        ConfigError: this client may not.
    """
    query = {"pinned": "true"} if pinned else {}
    query |= {} if version is None else {"version": version}
    path = f"/v1/adapters/{quote(domain, safe='')}"
    return Call(
        "PUT", path, lambda r: Adapter(**json_of(r)), content, {"content-type": "application/octet-stream"}, query
    )


def delete_adapter(domain: str) -> Call[None]:
    """Stop serving a domain. Raises UnknownDomainError: it is not served."""
    path = f"/v1/adapters/{quote(domain, safe='')}"
    return Call("DELETE", path, lambda _: None, missing=UnknownDomainError, repeatable=False)


def set_live(version: int) -> Call[int]:
    """Serve another version of the bundle."""
    body = json.dumps({"version": version}).encode()
    return Call("POST", "/v1/bundle", lambda r: int(json_of(r)["version"]), body, {"content-type": "application/json"})


def metadata() -> Call[dict[str, Any]]:
    """The model's inputs, outputs and versions, as the Open Inference Protocol has them."""
    return Call("GET", "/v2/models/{model}", lambda r: dict(json_of(r)))


def health() -> Call[bool]:
    """Whether the server is ready. Raises UnavailableError: it is not, and why, or cannot be reached."""
    return Call("GET", "/v2/health/ready", lambda _: True, tries=1)


def infer_body(
    ids: ArrayLike,
    dense: ArrayLike | None = None,
    *,
    domain: str | Sequence[str] | None = None,
    unit: str | None = None,
    outputs: Sequence[str] = _OUTPUTS,
) -> tuple[bytes, int]:
    """The body of a request with binary tensors, and how long the JSON is that it begins with.

    >>> body, length = infer_body([[2, 3]], domain="toys")
    >>> json.loads(body[:length])["parameters"], len(body) - length
    ({'domain': 'toys'}, 16)
    """
    tensors = [("ids", "INT64", _array(ids, "<i8"))]
    tensors += [] if dense is None else [("dense", "FP32", _array(dense, "<f4"))]
    parts = [(name, kind, list(array.shape), array.tobytes()) for name, kind, array in tensors]
    if domain is not None and not isinstance(domain, str):
        texts = [name.encode() for name in domain]
        packed = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
        parts.append(("domain", "BYTES", [len(texts)], packed))
    inputs = [
        {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
        for name, kind, shape, raw in parts
    ]
    told = {"domain": domain if isinstance(domain, str) else None, "unit": unit}
    parameters = {name: value for name, value in told.items() if value is not None}
    wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    head = json.dumps({"inputs": inputs, "outputs": wanted, "parameters": parameters}).encode()
    return b"".join((head, *(raw for *_, raw in parts))), len(head)


def _array(values: ArrayLike, dtype: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.ndim != 2 or (dtype == "<i8" and array.dtype.kind not in "iu"):
        rule = "ids must be whole numbers of shape (rows, slots), dense numbers of shape (rows, columns)"
        raise DataError(rule, received=f"{array.dtype} of shape {array.shape}")
    return array.astype(dtype, copy=False)


def _headers(content_type: str, request_id: str | None) -> dict[str, str]:
    """One id for all tries of a request, so that the log sees one request."""
    return {"content-type": content_type, "x-request-id": request_id or os.urandom(8).hex()}


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy as JSON has them."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise DataError("values must be texts, numbers, lists or None", received=value)
