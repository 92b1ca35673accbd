"""The Open Inference Protocol, version 2, with the binary tensor extension: what clients of Triton and KServe speak.

Inputs are ids and numbers as the bundle's encoder gives them: ``ids`` INT64 ``(B, S)``, ``dense`` FP32 ``(B, G)`` where the
model has numbers, ``domain`` BYTES ``(B,)``, or ``(1,)`` for all rows. Outputs are ``probability`` and ``logit``, FP32
``(B,)``. Parameters: ``domain`` in place of that input, ``unit`` who asks. A domain is the model ``MODEL.DOMAIN`` too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version as version_of
from math import prod
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from domlora.errors import DataError, nearest
from domlora.serving.http.answers import (
    BINARY,
    JSON,
    Answer,
    NotFoundError,
    Request,
    compressed,
    json_answer,
    json_object,
    request_id_header,
)
from domlora.serving.http.scoring import Asked, Part, Scores, score
from domlora.serving.http.service import Service, check_rows

__all__ = ["PREFIX", "infer", "live", "model", "ready", "server"]

PREFIX = "/v2/models/"
_URL = re.compile(r"(?P<name>.+?)(?:/versions/(?P<version>[^/]*))?(?:/(?P<action>infer|ready))?", re.DOTALL)
_HEADER_LENGTH = b"inference-header-content-length"
_OUTPUTS = ("probability", "logit")
_MOST_KEPT_BYTES = 1024
_LONGEST = 200  # characters of a unit, of a request's id


class _Kind(NamedTuple):
    """An input that there is."""

    name: str
    datatype: str
    shape: str
    dimensions: int
    dtype: np.dtype[Any]
    flat: msgspec.json.Decoder[Any]
    nested: msgspec.json.Decoder[Any]


_INTEGERS, _NUMBERS, _TEXTS = (msgspec.json.Decoder(kind) for kind in (list[int], list[float], list[str]))
_ROWS_OF_INTEGERS, _ROWS_OF_NUMBERS = (msgspec.json.Decoder(kind) for kind in (list[list[int]], list[list[float]]))
_KINDS = {
    "ids": _Kind("ids", "INT64", "[rows, slots]", 2, np.dtype("<i8"), _INTEGERS, _ROWS_OF_INTEGERS),
    "dense": _Kind("dense", "FP32", "[rows, numbers]", 2, np.dtype("<f4"), _NUMBERS, _ROWS_OF_NUMBERS),
    "domain": _Kind("domain", "BYTES", "[rows] or [1]", 1, np.dtype("O"), _TEXTS, _TEXTS),
}


class _Input(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: msgspec.Raw = msgspec.Raw()


class _Output(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    parameters: dict[str, Any] = {}


class _Infer(msgspec.Struct, forbid_unknown_fields=True):
    inputs: list[_Input]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_Output] = []


_DECODER = msgspec.json.Decoder(_Infer)


class _Tensor(NamedTuple):
    """An input of a request: where its bytes begin in the binary data and how many they are, or its values from JSON."""

    kind: _Kind
    shape: tuple[int, ...]
    at: int
    size: int | None
    data: Any


class _Asked(NamedTuple):
    """What the JSON of a request asks for."""

    id: str
    unit: str | None
    domain: str | None
    outputs: tuple[tuple[str, bool], ...]
    tensors: tuple[_Tensor, ...]
    num_bytes: int


class _Model(NamedTuple):
    """What a URL names."""

    name: str
    version: int | None
    domain: str | None
    action: str


def live(_: Service, __: Request) -> Answer:
    """``GET /v2/health/live``."""
    return json_answer({"live": True})


def ready(_: Service, __: Request) -> Answer:
    """``GET /v2/health/ready``: where there is a service, there is a model that answers."""
    return json_answer({"ready": True})


def server(_: Service, __: Request) -> Answer:
    """``GET /v2``."""
    extensions = ["binary_tensor_data", "model_repository"]
    return json_answer({"name": "domlora", "version": version_of("domlora"), "extensions": extensions})


def model(service: Service, request: Request) -> Answer:
    """``GET /v2/models/MODEL[/versions/N][/ready]``, and ``POST`` to ``/infer`` of a version or of ``MODEL.DOMAIN``."""
    found = _named(service, request.path)
    if (found.action == "infer") != (request.method == "POST"):
        raise NotFoundError("no such route", received=f"{request.method} {request.path[:_LONGEST]}")
    if found.action == "infer":
        return _infer(service, request, found)
    if found.action == "ready":
        return json_answer({"name": found.name, "ready": True})
    return json_answer(_described(service, found))


def infer(service: Service, request: Request) -> Answer:
    """``POST /v2/models/MODEL/infer``."""
    return _infer(service, request, _Model(service.live.current.name, None, None, "infer"))


def _named(service: Service, path: str) -> _Model:
    """What a URL names, if it is there."""
    match = _URL.fullmatch(path.removeprefix(PREFIX))
    told = match.groupdict() if match is not None else {"name": "", "version": None, "action": None}
    name, own, version = told["name"] or "", service.live.current.name, told["version"]
    domain = name.removeprefix(f"{own}.") if name != own else None
    if domain == name or (domain is not None and domain not in service.live.known()):
        raise NotFoundError("no such model", received=name[:_LONGEST], next_step=f"The model is called {own!r}")
    if version is not None and version not in service.versions:
        raise NotFoundError(
            "no such version is in memory",
            received=version[:_LONGEST],
            next_step=f"Known: {', '.join(service.versions)}",
        )
    return _Model(name, None if version is None else int(version), domain, told["action"] or "")


def _described(service: Service, named: _Model) -> dict[str, Any]:
    snapshot = service.live.of(named.version)
    schema = snapshot.program.schema
    more = {"num_ids": [feature.num_ids for feature in schema.slots]}
    ids = {"name": "ids", "datatype": "INT64", "shape": [-1, schema.num_slots], "parameters": more}
    dense = {"name": "dense", "datatype": "FP32", "shape": [-1, schema.num_dense]}
    inputs = [ids, *([dense] if schema.num_dense else []), {"name": "domain", "datatype": "BYTES", "shape": [-1]}]
    return {
        "name": named.name,
        "versions": [snapshot.version] if named.version is not None else service.versions,
        "platform": "onnxruntime_onnx",
        "inputs": inputs,
        "outputs": [{"name": name, "datatype": "FP32", "shape": [-1]} for name in _OUTPUTS],
    }


def _infer(service: Service, request: Request, named: _Model) -> Answer:
    body = request.body
    start = _header_length(request.headers.get(_HEADER_LENGTH), len(body))
    parsed = _parsed if start <= _MOST_KEPT_BYTES else _parsed.__wrapped__
    asked = parsed(body[:start], service.settings.max_rows)
    if len(body) != start + asked.num_bytes:
        more = len(body) - start - asked.num_bytes
        raise DataError("the body must end where its inputs end", received=f"{more} bytes more")
    inputs = {tensor.kind.name: _array(tensor, body, start) for tensor in asked.tensors}
    ids, dense = inputs["ids"], inputs.get("dense")
    num_rows = len(ids)
    if dense is None:
        dense = np.empty((num_rows, 0), np.float32)

    def logits_of(part: Part) -> NDArray[np.float32]:
        own = ids if part.rows is None else ids[part.rows]
        logits = part.snapshot.logits(own, dense if part.rows is None else dense[part.rows], part.domain)
        service.check_ids(part.snapshot, own)
        return logits

    domain = _domain(named, asked, inputs.get("domain"), num_rows)
    request_id = asked.id or service.request_id(request)
    scores = score(service, Asked(num_rows, domain, asked.unit, request_id, named.version), logits_of)
    answer = _answer(named, asked, scores, request_id)
    return compressed(answer, request.headers.get(b"accept-encoding"))


@lru_cache(maxsize=4096)  # a client's requests of one size and domain have one header, unless it numbers them
def _parsed(header: bytes, max_rows: int) -> _Asked:
    """What the JSON asks for, as far as it can be checked without the binary data."""
    told: _Infer = json_object(header, _DECODER, _num_fields)
    if len(told.id) > _LONGEST:
        raise DataError(f"an id must have at most {_LONGEST} characters", received=told.id[:_LONGEST])
    tensors: dict[str, _Tensor] = {}
    at = 0
    for each in told.inputs:
        tensor = _tensor(each, at, max_rows)
        if each.name in tensors:
            raise DataError("an input must come once", received=each.name)
        tensors[each.name] = tensor
        at += tensor.size or 0
    if "ids" not in tensors:
        raise DataError("a request needs the input 'ids'", received=sorted(tensors))
    unit, domain = _text(told.parameters, "unit"), _text(told.parameters, "domain")
    return _Asked(told.id, unit, domain, _outputs(told), tuple(tensors.values()), at)


def _tensor(told: _Input, at: int, max_rows: int) -> _Tensor:
    """An input whose name, type, shape and number of bytes agree, of a number of rows that is allowed."""
    kind = _KINDS.get(told.name)
    if kind is None:
        raise DataError("no such input", received=told.name[:_LONGEST], next_step=nearest("", _KINDS))
    if told.datatype != kind.datatype:
        raise DataError(f"input {told.name!r} must be {kind.datatype}", received=told.datatype[:_LONGEST])
    if len(told.shape) != kind.dimensions or min(told.shape) < 0:
        raise DataError(f"input {told.name!r} must have the shape {kind.shape}", received=told.shape[:8])
    check_rows(told.shape[0], max_rows)
    size = told.parameters.get("binary_data_size")
    if size is None:
        return _Tensor(kind, tuple(told.shape), at, None, _of_json(told, kind))
    if type(size) is not int or size < 0 or told.data:
        raise DataError(
            f"input {told.name!r} must have binary_data_size, the number of its bytes after the JSON, or data in it",
            received=size,
        )
    if not kind.dtype.hasobject and size != prod(told.shape) * kind.dtype.itemsize:
        raise DataError(f"input {told.name!r} must have as many bytes as its shape says", received=(size, told.shape))
    return _Tensor(kind, tuple(told.shape), at, size, None)


def _array(tensor: _Tensor, body: bytes, start: int) -> Any:
    """An input's array; of ``domain`` a list of texts."""
    if tensor.size is None:
        return tensor.data
    at = start + tensor.at
    if tensor.kind.dtype.hasobject:
        return _texts(body[at : at + tensor.size], tensor.shape[0])
    array = np.frombuffer(body, tensor.kind.dtype, tensor.size // tensor.kind.dtype.itemsize, at)
    return (array if array.flags.aligned else array.copy()).reshape(tensor.shape)


def _header_length(told: bytes | None, size: int) -> int:
    """Where binary data begins."""
    if told is None:
        return size
    if not told.isdigit() or len(told) > 18 or int(told) > size:
        raise DataError(
            "Inference-Header-Content-Length must be the length of the JSON that the body begins with",
            received=told[:40].decode("latin-1"),
        )
    return int(told)


def _num_fields(told: _Infer) -> int:
    """How many fields there are at least."""
    found = 1 + bool(told.id) + bool(told.outputs) + bool(told.parameters) + len(told.parameters)
    for tensor in told.inputs:
        found += 3 + bool(tensor.parameters) + len(tensor.parameters) + bool(tensor.data)
    for output in told.outputs:
        found += 1 + bool(output.parameters) + len(output.parameters)
    return found


def _texts(data: bytes, number: int) -> list[str]:
    """Texts, each of which has its length before it in four bytes."""
    found: list[str] = []
    at = 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data) or len(found) == number:
            raise DataError(
                "input 'domain' must be texts with their lengths before them", received=f"{len(data)} bytes"
            )
        found.append(_utf8(data[at + 4 : end]))
        at = end
    if len(found) != number:
        raise DataError("input 'domain' must hold as many texts as its shape says", received=len(found))
    return found


def _utf8(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DataError("input 'domain' must be UTF-8", received=text[:_LONGEST]) from error


def _of_json(told: _Input, kind: _Kind) -> Any:
    """A tensor from JSON, as one list or as a list of rows."""
    text = bytes(told.data)
    decoder = kind.nested if text.lstrip()[1:].lstrip()[:1] == b"[" else kind.flat
    try:
        values = decoder.decode(text)
        with np.errstate(over="ignore"):  # what no float32 holds is infinite, and refused as such
            array: NDArray[Any] = np.array(values, dtype=kind.dtype)
    except (ValueError, OverflowError, RecursionError) as error:
        raise DataError(
            f"the data of input {told.name!r} must be {kind.datatype} ({str(error)[:_LONGEST]})",
            next_step="" if text else "Give it as data, or as binary_data_size and bytes after the JSON",
        ) from error
    if array.size != prod(told.shape) or (decoder is kind.nested and list(array.shape) != told.shape):
        raise DataError(f"the data of input {told.name!r} must fill its shape", received=(array.shape, told.shape))
    return values if kind.dtype.hasobject else array.reshape(told.shape)


def _domain(named: _Model, asked: _Asked, given: list[str] | None, num_rows: int) -> str | list[str] | None:
    """Of all rows, or each one's; it is told in one place."""
    if (asked.domain is not None) + (given is not None) + (named.domain is not None) > 1:
        raise DataError("the domain must be told once: by the model's name, by the parameter or by the input")
    if given is None:
        return asked.domain if named.domain is None else named.domain
    if len(given) not in (1, num_rows):
        raise DataError(f"input 'domain' must have 1 text, or {num_rows}", received=len(given))
    return given[0] if len(given) == 1 or len(set(given)) == 1 else given


def _text(parameters: Mapping[str, Any], name: str) -> str | None:
    value = parameters.get(name)
    if value is not None and (not isinstance(value, str) or len(value) > _LONGEST):
        raise DataError(f"the parameter {name!r} must be a text of up to {_LONGEST} characters", received=value)
    return value or None


def _outputs(told: _Infer) -> tuple[tuple[str, bool], ...]:
    """The outputs that are wanted, and whether as binary data."""
    binary = _flag(told.parameters, "binary_data_output", False)
    if not told.outputs:
        return tuple((name, binary) for name in _OUTPUTS)
    names = [output.name for output in told.outputs]
    if len(set(names)) < len(names) or not set(names) <= set(_OUTPUTS):
        raise DataError("outputs must be 'probability', 'logit' or both", received=names[:8])
    if any("classification" in output.parameters for output in told.outputs):
        raise DataError("outputs are not classes", next_step="Leave the parameter 'classification' out")
    return tuple((output.name, _flag(output.parameters, "binary_data", binary)) for output in told.outputs)


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise DataError(f"the parameter {name!r} must be true or false", received=value)
    return value


def _answer(named: _Model, asked: _Asked, scores: Scores, request_id: str) -> Answer:
    values = {"probability": scores.probability, "logit": scores.logit}
    binary = [values[name].tobytes() for name, binary in asked.outputs if binary]
    if len(binary) == len(asked.outputs):
        text = _header(named.name, scores.bundle, asked.id, asked.outputs, len(scores.logit))
    else:
        data = {name: values[name].tolist() for name, binary in asked.outputs if not binary}
        text = _header.__wrapped__(named.name, scores.bundle, asked.id, asked.outputs, len(scores.logit), data)
    headers = (*scores.headers, *request_id_header(request_id))
    if not binary:
        return Answer(200, text, JSON, headers, scores.domain, len(scores.logit))
    headers = (*headers, (_HEADER_LENGTH, b"%d" % len(text)))
    return Answer(200, b"".join((text, *binary)), BINARY, headers, scores.domain, len(scores.logit))


@lru_cache(maxsize=256)
def _header(
    name: str,
    version: str,
    told_id: str,
    outputs: tuple[tuple[str, bool], ...],
    num_rows: int,
    data: Mapping[str, list[float]] | None = None,
) -> bytes:
    """The JSON of an answer."""
    tensors = []
    for output, binary in outputs:
        tensor: dict[str, Any] = {"name": output, "datatype": "FP32", "shape": [num_rows]}
        more = {"parameters": {"binary_data_size": 4 * num_rows}} if binary else {"data": (data or {})[output]}
        tensors.append({**tensor, **more})
    told = {"model_name": name, "model_version": version, "outputs": tensors}
    return msgspec.json.encode({**told, "id": told_id} if told_id else told)
