"""``POST /v1/score``: raw values in, probabilities out, through the encoder that prepared the training rows.

The features of a request are told once beside its candidates, ``{"domain": "toys", "request": {...}, "candidates": [...]}``,
or rows are told one by one, each with its own domain, ``{"rows": [{..., "domain": "toys"}, ...]}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from domlora.errors import DataError, SchemaError, nearest
from domlora.features.columns import Column
from domlora.features.schema import Schema
from domlora.features.text import canonical_text, domain_text
from domlora.serving.http.answers import Answer, Request, compressed, json_answer, json_object, request_id_header
from domlora.serving.http.scoring import Asked, Part, Scores, probability_of, score
from domlora.serving.http.service import Service
from domlora.serving.snapshot import Snapshot

__all__ = ["scored"]

_LONGEST = 200  # characters of a unit
DOMAIN = "domain"
Value = str | int | float | bool | None
Columns = dict[str, Sequence[Any]]


class _Score(msgspec.Struct, forbid_unknown_fields=True):
    domain: Value = None
    unit: str | int | None = None
    request: dict[str, Any] = {}
    candidates: list[dict[str, Any]] | dict[str, list[Any]] | None = None
    rows: list[dict[str, Any]] | None = None
    items: list[str | int] | None = None
    explain: bool = False


_DECODER = msgspec.json.Decoder(_Score)


def scored(service: Service, request: Request) -> Answer:
    """Score rows of raw values.

    The body's fields:

    * ``domain``: of all rows; a row of its own may tell another one, as rows of training did.
    * ``unit``: who asks, for experiments and the log.
    * ``request``: features that all candidates have alike; they are encoded once.
    * ``candidates``: a list of objects, or an object of lists of equal length.
    * ``rows``: in place of both, a list of objects.
    * ``items``: what the rows are called in the log.
    * ``explain``: answer the base's logit and probability too, and what the adapter adds.

    Every feature is there once; one that is not known is ``null``.

    Raises:
        DataError: the body is of another form, or values cannot be encoded.
        UnknownDomainError: no such domain, where the policy is ``error``.
    """
    asked: _Score = json_object(request.body, _DECODER, _num_fields)
    schema = service.live.current.encoder.schema
    columns, num_rows = _columns(asked)
    service.check_rows(num_rows)
    if asked.items is not None and len(asked.items) != num_rows:
        raise DataError("each row needs one item", received=(len(asked.items), num_rows))
    domain = _domain(asked, schema, columns, num_rows)
    _check_names(schema, columns)
    base = np.empty(num_rows, np.float32)

    def logits_of(part: Part) -> NDArray[np.float32]:
        ids, dense = _encoded(part.snapshot, columns, num_rows, part.rows)
        service.check_ids(part.snapshot, ids)
        if asked.explain:
            base[slice(None) if part.rows is None else part.rows] = part.snapshot.logits(ids, dense, -1)
        return part.snapshot.logits(ids, dense, part.domain)

    request_id = service.request_id(request)
    scores = score(service, Asked(num_rows, domain, _unit(asked.unit), request_id, items=asked.items), logits_of)
    answer = _answer(scores, request_id, base if asked.explain else None)
    return compressed(answer, request.headers.get(b"accept-encoding"))


def _num_fields(asked: _Score) -> int:
    """How many fields there are at least."""
    found = (asked.domain is not None) + (asked.unit is not None) + (asked.items is not None) + asked.explain
    found += (asked.candidates is not None) + (asked.rows is not None) + bool(asked.request) + len(asked.request)
    rows = asked.rows or ()
    if isinstance(asked.candidates, dict):
        return found + len(asked.candidates) + sum(map(len, rows))
    return found + sum(map(len, rows)) + sum(map(len, asked.candidates or ()))


def _columns(asked: _Score) -> tuple[Columns, int]:
    """Column to values, one for all rows or one a row, and the number of rows."""
    if (asked.rows is None) == (asked.candidates is None) or (asked.rows is not None and asked.request):
        raise DataError("a request needs 'candidates', beside which 'request' may stand, or 'rows'")
    if asked.rows is not None:
        return _turned(asked.rows), len(asked.rows)
    if isinstance(asked.candidates, dict):
        lengths = {len(column) for column in asked.candidates.values()} or {0}
        if len(lengths) > 1:
            raise DataError("columns of candidates must be equally long", received=sorted(lengths)[:8])
        columns, num_rows = dict[str, Sequence[Any]](asked.candidates), lengths.pop()
    else:
        candidates = asked.candidates or []
        columns, num_rows = _turned(candidates), len(candidates)
    twice = asked.request.keys() & columns.keys()
    if twice:
        raise DataError("a feature must be in the request or in the candidates", received=min(twice)[:_LONGEST])
    columns.update((name, [value]) for name, value in asked.request.items())
    return columns, num_rows


def _turned(rows: Sequence[Mapping[str, Any]]) -> Columns:
    """Rows as columns; all rows have the fields of the first."""
    names = rows[0] if rows else {}
    try:
        columns: Columns = {name: [row[name] for row in rows] for name in names}
    except KeyError as error:
        raise DataError(
            "all rows must have the same fields", received=f"a row without {error}", next_step="Send null for no value"
        ) from error
    if sum(map(len, rows)) != len(names) * len(rows):
        number = next(number for number, row in enumerate(rows) if len(row) != len(names))
        raise DataError(
            "all rows must have the same fields",
            received=f"row {number} with {sorted(rows[number].keys() - names.keys())[:3]}",
        )
    return columns


def _domain(asked: _Score, schema: Schema, columns: Columns, num_rows: int) -> str | list[str | None] | None:
    """Of all rows, or each one's. A column that only tells the domain is taken out, one that is a feature too is put in.

    A row says its domain as rows of training did, by ``schema.domain`` or by its parts, or as ``domain``.
    """
    parts = schema.domain.split("/")
    told: list[Sequence[Any]] = [columns[name] for name in (schema.domain, DOMAIN) if name in columns][:1]
    if not told and all(part in columns for part in parts):
        told = [columns[part] for part in parts]
    for name in {schema.domain, DOMAIN, *parts} - set(schema.columns):
        columns.pop(name, None)
    if asked.domain is not None or not told:
        if len(parts) == 1 and schema.domain in schema.columns and not told:
            columns[schema.domain] = [asked.domain]
        return canonical_text(asked.domain) or None
    whole = [column if len(column) == num_rows else [*column] * num_rows for column in told]
    names = [_name(values) for values in zip(*whole, strict=True)]
    return names[0] if len(set(names)) == 1 else names


def _name(values: tuple[Any, ...]) -> str | None:
    """Of the domain that a row's values tell."""
    try:
        return (domain_text(values) if len(values) > 1 else canonical_text(values[0])) or None
    except SchemaError as error:
        raise DataError(f"a row's domain cannot be used: {error}") from error


def _check_names(schema: Schema, columns: Columns) -> None:
    known = schema.columns
    missing, extra = [name for name in known if name not in columns], columns.keys() - set(known)
    if missing:
        raise DataError(
            "a row must have every feature", received=sorted(columns)[:30], next_step=f"Missing: {missing[:8]}"
        )
    if extra:
        raise DataError(
            "no such feature", received=min(extra)[:_LONGEST], next_step=nearest(min(extra)[:_LONGEST], known)
        )


def _encoded(
    snapshot: Snapshot, columns: Columns, num_rows: int, rows: NDArray[np.intp] | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and numbers of all rows, or of some."""
    if rows is None:
        return snapshot.encoder.encode_inputs(columns, num_rows)
    whole = len(rows)
    chosen: dict[str, Column] = {
        name: column if len(column) == 1 else [column[row] for row in rows] for name, column in columns.items()
    }
    return snapshot.encoder.encode_inputs(chosen, whole)


def _unit(unit: str | int | None) -> str | None:
    if unit is None or unit == "":
        return None
    text = str(unit)
    if len(text) > _LONGEST:
        raise DataError(f"a unit must have at most {_LONGEST} characters", received=text[:_LONGEST])
    return text


def _answer(scores: Scores, request_id: str, base: NDArray[np.float32] | None) -> Answer:
    told: dict[str, Any] = {
        "request_id": request_id,
        "probability": scores.probability.tolist(),
        "bundle": scores.bundle,
        "adapters": scores.adapters,
        "arms": scores.arms,
    }
    if scores.degraded:
        told["degraded"] = scores.degraded
    if base is not None:
        told["explain"] = {
            "logit": scores.logit.tolist(),
            "base_logit": base.tolist(),
            "base_probability": probability_of(base).tolist(),
            "adapter_logit": (scores.logit - base).tolist(),
        }
    headers = (*scores.headers, *request_id_header(request_id))
    return json_answer(told, headers=headers)._replace(domain=scores.domain, rows=len(scores.logit))
