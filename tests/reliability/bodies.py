"""Bodies for the two scoring routes: valid ones, each kind of wrong one, and ways to draw any number of others."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import strategies as st
from support import DOMAINS

SCORE, INFER = "/v1/score", "/v2/models/live/infer"
LENGTH = "inference-header-content-length"
ROW = {"item": "i7", "past": ["i1", "never seen", "i4"], "city": "c1", "slot": 3, "hour": 2.5, "age": 31.5}
ASKED = {
    "domain": "toys",
    "unit": "u7",
    "request": {name: ROW[name] for name in ("past", "city", "hour")},
    "candidates": [{"item": f"i{n}", "slot": n, "age": n / 2} for n in range(4)],
    "items": ["a", "b", "c", "d"],
    "explain": True,
}
IDS = np.array([[9, 4, 5, 0, 11, 3], [602 - 1, 2, 0, 0, 1, 5]], dtype="<i8")  # item, past of three, pair, hour
DENSE = np.array([[0.5, 0.0], [0.0, 1.0]], dtype="<f4")
MAX_ROWS = 50


def raw_ids(ids: np.ndarray) -> dict[str, Any]:
    return {"name": "ids", "shape": list(ids.shape), "datatype": "INT64", "data": ids.reshape(-1).tolist()}


def inputs(**changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a request in JSON, with changes to one of them."""
    dense = {"name": "dense", "shape": [2, 2], "datatype": "FP32", "data": DENSE.reshape(-1).tolist()}
    domain = {"name": "domain", "shape": [2], "datatype": "BYTES", "data": ["toys", "books"]}
    return [{**each, **changes.get(each["name"], {})} for each in (raw_ids(IDS), dense, domain)]


def binary(
    size: int | None = None, domain: bytes = b"toys", ids: np.ndarray = IDS, dense: np.ndarray = DENSE
) -> tuple[bytes, int]:
    """A request with binary tensors, and the length of its JSON."""
    text = len(domain).to_bytes(4, "little") + domain
    parts = {"ids": ("INT64", [2, 6], ids.tobytes()), "dense": ("FP32", [2, 2], dense.tobytes())}
    parts["domain"] = ("BYTES", [1], text)
    told = [
        {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": size or len(data)}}
        for name, (kind, shape, data) in parts.items()
    ]
    outputs = [{"name": "logit", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": told, "outputs": outputs}).encode()
    return head + b"".join(data for _, _, data in parts.values()), len(head)


def infer(**changes: dict[str, Any]) -> bytes:
    return json.dumps({"inputs": inputs(**changes)}).encode()


def with_id(value: int) -> bytes:
    return infer(ids={"data": [value, *IDS.reshape(-1).tolist()[1:]]})


def score(**changes: Any) -> bytes:
    return json.dumps({**ASKED, **changes}).encode()


def row(**changes: Any) -> bytes:
    return json.dumps({"domain": "toys", "rows": [{**ROW, **changes}]}).encode()


DEEP = b"[" * 10_000 + b"]" * 10_000
WRONG_INFER: dict[str, tuple[bytes, int | None]] = {
    name: body if isinstance(body, tuple) else (body, None)
    for name, body in {
        "wrong dtype": infer(ids={"datatype": "FP32"}),
        "wrong values": infer(ids={"data": [1.5] * 12}),
        "wrong shape": infer(ids={"shape": [3, 4]}),
        "wrong rank": infer(ids={"shape": [12]}),
        "no rows": infer(ids={"shape": [0, 6], "data": []}, dense={"shape": [0, 2], "data": []}),
        "too many rows": json.dumps({"inputs": [raw_ids(np.full((MAX_ROWS + 1, 6), 2))]}).encode(),
        "NaN": infer(dense={"data": [float("nan"), 0, 0, 0]}),
        "infinite": infer(dense={"data": [1e39, 0, 0, 0]}),
        "infinite literal": infer().replace(b"0.5", b"Infinity"),
        "id -1": with_id(-1),
        "id = V": with_id(602),
        "id 2^63": with_id(2**63),
        "id -2^63 - 1": with_id(-(2**63) - 1),
        "unknown domain": infer(domain={"data": ["nowhere", "toys"]}),
        "missing input": json.dumps({"inputs": inputs()[1:]}).encode(),
        "missing numbers": json.dumps({"inputs": [inputs()[0], inputs()[2]]}).encode(),
        "extra input": json.dumps({"inputs": [*inputs(), {**inputs()[0], "name": "more"}]}).encode(),
        "extra field": infer(ids={"more": 1}),
        "duplicate input": json.dumps({"inputs": [*inputs(), inputs()[0]]}).encode(),
        "duplicate field": infer().replace(b'"name": "ids"', b'"name": "ids", "name": "ids"'),
        "no UTF-8": binary(domain=b"\xff\xfe\xff"),
        "no UTF-8 in JSON": infer().replace(b"toys", b"\xff\xfe"),
        "deep": b'{"inputs": ' + DEEP + b"}",
        "deep data": infer().replace(b'["toys", "books"]', DEEP),
        "huge integer": infer().replace(b"[9,", b"[9" + b"0" * 5_000 + b","),
        "binary size": binary(size=95),
        "binary size too large": binary(size=2**62),
        "too long a header": (binary()[0], 10_000),
        "too short a header": (binary()[0], 20),
        "bytes left over": (binary()[0] + b"1234", binary()[1]),
        "bytes missing": (binary()[0][:-1], binary()[1]),
        "negative shape": infer(ids={"shape": [-2, -6]}),
        "shape that overflows": infer(ids={"shape": [2**62, 6]}),
        "shape whose product is 0": infer(ids={"shape": [2**32, 2**32]}),
        "no JSON": b"inputs",
        "empty": b"",
    }.items()
}
WRONG_SCORE = {
    "wrong type": row(age="old"),
    "wrong form": row(past={"a": 1}),
    "a list for a value": row(item=["i1", "i2"]),
    "no rows": score(candidates=[], items=[]),
    "too many rows": json.dumps({"domain": "toys", "rows": [ROW] * (MAX_ROWS + 1)}).encode(),
    "columns of two lengths": score(candidates={"item": ["i1"], "slot": [1, 2], "age": [1]}),
    "infinite literal": row(age=float("inf")),
    "NaN literal": row(age=float("nan")),
    "unknown domain": score(domain="nowhere"),
    "missing feature": score(request={"past": [], "city": "c1"}),
    "extra feature": row(more=1),
    "extra field": score(more=1),
    "feature on both sides": score(request={**ASKED["request"], "item": "i1"}),
    "duplicate feature": row().replace(b'"item": "i7"', b'"item": "i7", "item": "i8"'),
    "duplicate field": score().replace(b'"domain": "toys"', b'"domain": "toys", "domain": "books"'),
    "no UTF-8": row().replace(b"i7", b"\xff\xfe"),
    "half a surrogate pair": row(item="\ud800"),
    "deep": b'{"rows": ' + DEEP + b"}",
    "deep value": row().replace(b'"i7"', DEEP),
    "huge integer": row().replace(b"31.5", b"9" * 5_000),
    "too few items": score(items=["a"]),
    "no JSON": b"rows",
    "empty": b"",
}

TEXTS = st.text(max_size=8) | st.sampled_from(["i7", "toys", "\x00", "\x1f", "1e999", "nan", "inf", "9" * 400])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.fixed_dictionaries(dict.fromkeys(ROW, VALUES), optional={"domain": VALUES})
PLAUSIBLE = st.fixed_dictionaries(
    {
        "item": TEXTS | st.integers() | st.none(),
        "past": st.lists(TEXTS, max_size=5) | st.none(),
        "city": TEXTS | st.booleans(),
        "slot": st.integers(-(2**70), 2**70) | TEXTS,
        "hour": st.floats(allow_nan=False, allow_infinity=False) | st.none(),
        "age": st.floats(allow_nan=False, allow_infinity=False, width=32) | st.integers(-(10**6), 10**6),
    },
    optional={"domain": st.sampled_from([*DOMAINS, "nowhere"])},
)
SCORE_FIELDS = st.dictionaries(st.sampled_from([*ASKED, "rows"]), VALUES | st.lists(ROWS, max_size=3), max_size=3)
INPUT_FIELDS = st.dictionaries(
    st.sampled_from(["name", "shape", "datatype", "parameters", "data", "more"]),
    VALUES | st.sampled_from(["ids", "INT64", "BYTES", [2, 6], [2, 2], {"binary_data_size": 96}]),
    max_size=3,
)
MORE = st.dictionaries(st.sampled_from(["id", "outputs", "parameters"]), VALUES, max_size=2)
SIZES = (602, 602, 602, 602, 102, 6)
ROW_OF_IDS = st.tuples(*(st.integers(0, size - 1) for size in SIZES)) | st.tuples(
    *[st.integers(-(2**63), 2**63 - 1)] * 6
)
ARRAYS = st.tuples(ROW_OF_IDS, ROW_OF_IDS).map(lambda drawn: np.array(drawn, "<i8"))
PATCHES = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6)


def _patched(body: bytes, patches: list[tuple[int, int]], cut: int) -> bytes:
    changed = bytearray(body)
    for place, byte in patches:
        changed[place % len(changed)] = byte
    return bytes(changed[:-cut] if cut else changed)


@st.composite
def fuzzed_score(draw: st.DrawFn) -> tuple[bytes, None]:
    """Fields of any kind, rows of any kind, a valid body with bytes changed, or noise."""
    kind = draw(st.sampled_from(["fields", "rows", "plausible", "plausible", "bytes", "bytes", "noise"]))
    if kind == "fields":
        return score(**draw(SCORE_FIELDS)), None
    if kind == "rows":
        return json.dumps({"rows": draw(st.lists(ROWS, max_size=3)), "domain": draw(VALUES)}).encode(), None
    if kind == "plausible":
        one = draw(PLAUSIBLE)  # all rows of a request have the same fields
        rows = [one, *({**one, "item": item} for item in draw(st.lists(TEXTS, max_size=3)))]
        return json.dumps({"rows": rows, "unit": draw(TEXTS), "explain": draw(st.booleans())}).encode(), None
    if kind == "noise":
        return draw(st.binary(max_size=300)), None
    whole = draw(st.sampled_from([score(), row()]))
    return _patched(whole, draw(PATCHES), draw(st.just(0) | st.integers(0, len(whole) - 1))), None


@st.composite
def fuzzed_infer(draw: st.DrawFn) -> tuple[bytes, int | None]:
    """As JSON or with binary tensors: inputs of any kind, bytes changed, a length that may be wrong, or noise."""
    kind = draw(st.sampled_from(["inputs", "tensors", "tensors", "binary", "binary", "json", "noise"]))
    if kind == "inputs":
        changes = {name: draw(INPUT_FIELDS) for name in draw(st.sets(st.sampled_from(["ids", "dense", "domain"])))}
        return json.dumps({"inputs": inputs(**changes), **draw(MORE)}).encode(), None
    if kind == "tensors":
        ids, dense = draw(ARRAYS), draw(st.binary(min_size=16, max_size=16))
        return binary(ids=ids, dense=np.frombuffer(dense, "<f4").reshape(2, 2))
    if kind == "noise":
        return draw(st.binary(max_size=300)), draw(st.none() | st.integers(0, 2**63))
    whole, length = binary(domain=draw(st.sampled_from(DOMAINS)).encode()) if kind == "binary" else (infer(), None)
    told = length if length is None else draw(st.just(length) | st.integers(0, len(whole) + 1))
    return _patched(whole, draw(PATCHES), draw(st.just(0) | st.integers(0, len(whole) - 1))), told
