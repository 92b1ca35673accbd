"""What is sent: requests made from what the server says of its model, or from a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from domlora.errors import ConfigError, DataError, needing
from domlora.features.text import canonical_text

__all__ = ["draw_domains", "from_file", "http_request", "random_requests"]

_SCORE = "/v1/score"
_WANTED = ("probability",)


def http_request(path: str, body: bytes, url: str, *, header_length: int | None = None) -> bytes:
    """A request as it goes over the wire.

    Args:
        path: of the request.
        body: of the request.
        url: of the server.
        header_length: where binary data begins; None for JSON alone.

    Example:
        >>> http_request("/v1/score", b"{}", "http://localhost:8000").splitlines()[:2]
        [b'POST /v1/score HTTP/1.1', b'host: localhost:8000']
    """
    kind = "application/json" if header_length is None else "application/octet-stream"
    host = urlsplit(url).netloc
    lines = [f"POST {path} HTTP/1.1", f"host: {host}", f"content-type: {kind}", f"content-length: {len(body)}"]
    lines += [] if header_length is None else [f"inference-header-content-length: {header_length}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def draw_domains(domains: Sequence[str], number: int, *, zipf: float = 0.0, seed: int = 0) -> list[str]:
    """Domains of requests.

    Args:
        domains: to draw from, the most asked one first.
        number: how many.
        zipf: the ``k``-th domain is asked ``1 / k ** zipf`` times as often as the first; 0 for all alike.
        seed: of the draw.

    Example:
        >>> drawn = draw_domains(["a", "b"], 3000, zipf=1.0)
        >>> 1.8 < drawn.count("a") / drawn.count("b") < 2.2
        True
    """
    if not domains:
        return []
    weights = np.arange(1, len(domains) + 1, dtype=np.float64) ** -zipf
    places = np.random.default_rng(seed).choice(len(domains), number, p=weights / weights.sum())
    return [domains[place] for place in places]


def random_requests(
    metadata: Mapping[str, Any],
    domains: Sequence[str],
    number: int,
    *,
    rows: int,
    form: str = "binary",
    seed: int = 0,
) -> list[tuple[str, bytes, int | None]]:
    """Requests of the Open Inference Protocol with random ids that the model has.

    Args:
        metadata: of the model, as the server tells it.
        domains: one for each request; none for requests without a domain.
        number: how many.
        rows: of each.
        form: ``binary`` tensors, or ``json``.
        seed: of the ids.

    Returns:
        For each its path, its body, and where binary data begins.

    Raises:
        ConfigError: the server does not say how many ids the model has, or the client's libraries are not installed.
    """
    with needing("client", "a load test with random ids"):
        from domlora.client.requests import infer_body
    sizes, num_dense = _inputs(metadata)
    random = np.random.default_rng(seed)
    path = f"/v2/models/{metadata['name']}/infer"
    made: list[tuple[str, bytes, int | None]] = []
    for place in range(number):
        ids = random.integers(0, sizes, size=(rows, len(sizes)))
        dense = random.standard_normal((rows, num_dense)).astype(np.float32) if num_dense else None
        domain = domains[place] if domains else None
        if form == "binary":
            made.append((path, *infer_body(ids, dense, domain=domain, outputs=_WANTED)))
        else:
            made.append((path, _infer_json(ids, dense, domain), None))
    return made


def from_file(file: Path, model: str, *, rows: int, domain: str = "domain") -> list[tuple[str, bytes, int | None]]:
    """Requests from a file.

    Args:
        file: JSON lines, each the body of a request to ``/v1/score`` or, if it has ``inputs``, to ``/infer``; or Parquet,
            whose columns are features: rows of one domain that follow each other go together.
        model: its name in URLs.
        rows: of a request from Parquet at the most.
        domain: the column of Parquet that names the domain.

    Raises:
        DataError: the file cannot be read, is empty, or has values that no request can hold.
    """
    infer = f"/v2/models/{model}/infer"
    try:
        bodies = _parquet(file, rows, domain) if file.suffix == ".parquet" else _json_lines(file)
        made: list[tuple[str, bytes, int | None]] = [
            (infer if "inputs" in body else _SCORE, json.dumps(body, default=_plain).encode(), None) for body in bodies
        ]
    except (OSError, ValueError) as error:
        raise DataError(f"requests must be JSON lines or Parquet ({error})", received=str(file)) from error
    if not made:
        raise DataError("there must be a request", received=str(file))
    return made


def _inputs(metadata: Mapping[str, Any]) -> tuple[NDArray[np.int64], int]:
    """Ids of each slot, and the number of dense columns."""
    inputs = {each["name"]: each for each in metadata["inputs"]}
    sizes = (inputs["ids"].get("parameters") or {}).get("num_ids")
    if sizes is None:
        raise ConfigError(
            "the server must say how many ids the model has, as the parameter 'num_ids' of its input 'ids'",
            next_step="Give requests in a file",
        )
    return np.array(sizes, dtype=np.int64), inputs["dense"]["shape"][1] if "dense" in inputs else 0


def _infer_json(ids: NDArray[Any], dense: NDArray[Any] | None, domain: str | None) -> bytes:
    inputs = [{"name": "ids", "shape": ids.shape, "datatype": "INT64", "data": ids.ravel().tolist()}]
    if dense is not None:
        inputs.append({"name": "dense", "shape": dense.shape, "datatype": "FP32", "data": dense.ravel().tolist()})
    parameters = {} if domain is None else {"domain": domain}
    wanted = [{"name": name} for name in _WANTED]
    return json.dumps({"inputs": inputs, "outputs": wanted, "parameters": parameters}).encode()


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                body = json.loads(line)
                if not isinstance(body, dict):
                    raise ValueError("a line must be an object")
                yield body


def _parquet(file: Path, rows: int, domain: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(file).iter_batches():
        columns = {name: [_or_none(value) for value in values] for name, values in batch.to_pydict().items()}
        domains = columns.pop(domain, [None] * batch.num_rows)
        start = 0
        for end in range(1, batch.num_rows + 1):
            if end == batch.num_rows or domains[end] != domains[start] or end - start == rows:
                candidates = {name: values[start:end] for name, values in columns.items()}
                yield {"domain": domains[start], "candidates": candidates}
                start = end


def _or_none(value: Any) -> Any:
    """JSON has no NaN; to the encoder it is an absent value."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _plain(value: object) -> int | float | str | None:
    """Values of Parquet that JSON does not have, in a form that has the same text in the encoder."""
    if isinstance(value, date):
        return canonical_text(value)
    if isinstance(value, Decimal):
        if not value.is_finite():
            return None
        return int(value) if value == value.to_integral_value() else float(value)
    raise ValueError(f"no request can hold a value of the type {type(value).__name__}")
