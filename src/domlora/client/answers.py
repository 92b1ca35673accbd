"""What a server answers, as values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "HEADER_LENGTH",
    "Adapter",
    "Explained",
    "Inferred",
    "Scored",
    "Taken",
    "json_of",
    "read_inferred",
    "read_scored",
]

HEADER_LENGTH = "inference-header-content-length"


class Explained(NamedTuple):
    """What the adapter added to each row's logit."""

    logit: list[float]
    base_logit: list[float]
    base_probability: list[float]
    adapter_logit: list[float]


@dataclass(frozen=True, slots=True)
class Scored:
    """An answer of ``score``.

    Args:
        request_id: what feedback refers to.
        probability: of each row.
        bundle: the version that answered.
        adapters: domain to the version of its adapter.
        arms: experiment to the unit's arm.
        explain: if it was asked for.
        degraded: how many rows were answered with fallbacks, since the store of rows did not answer.
    """

    request_id: str
    probability: NDArray[np.float64]
    bundle: str
    adapters: Mapping[str, str]
    arms: Mapping[str, str]
    explain: Explained | None = None
    degraded: int = 0


@dataclass(frozen=True, slots=True)
class Inferred:
    """An answer of ``infer``.

    Args:
        request_id: what feedback refers to.
        probability, logit: of each row.
        bundle: the version that answered.
        adapter: the version of its adapter; None where rows have several domains or none has an adapter.
    """

    request_id: str
    probability: NDArray[np.float32]
    logit: NDArray[np.float32]
    bundle: str
    adapter: str | None


class Taken(NamedTuple):
    """How many events were new, and how many were there already."""

    accepted: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class Adapter:
    """A domain that is served.

    Args:
        domain, version: whose, and which.
        pinned: it stays in memory.
        pushed: it came at run time, and not with the bundle.
        in_memory: of the process that answered; None where it was not said.
        rank, size_bytes, sha256: of a pushed one.
    """

    domain: str
    version: str
    pinned: bool = False
    pushed: bool = True
    in_memory: bool | None = None
    rank: int | None = None
    size_bytes: int | None = None
    sha256: str | None = None


def json_of(response: httpx.Response) -> Any:
    """The body as JSON."""
    return json.loads(response.content)


def read_scored(response: httpx.Response) -> Scored:
    """Of ``/v1/score``; what a newer server tells besides is left alone."""
    told = json_of(response)
    raw = told.get("explain")
    return Scored(
        request_id=told["request_id"],
        probability=np.array(told["probability"]),
        bundle=told["bundle"],
        adapters=told["adapters"],
        arms=told["arms"],
        explain=None if raw is None else Explained(*(raw[name] for name in Explained._fields)),
        degraded=told.get("degraded", 0),
    )


def read_inferred(response: httpx.Response) -> Inferred:
    """Of ``/infer`` with binary outputs."""
    body, headers = response.content, response.headers
    at = int(headers[HEADER_LENGTH])
    head, found = json.loads(body[:at]), dict[str, NDArray[np.float32]]()
    for output in head["outputs"]:
        size = output["parameters"]["binary_data_size"]
        found[output["name"]] = np.frombuffer(body, "<f4", size // 4, at).reshape(output["shape"])
        at += size
    adapter = headers.get("x-domlora-adapter")
    known = None if adapter in (None, "none") else adapter
    return Inferred(headers.get("x-request-id", ""), found["probability"], found["logit"], head["model_version"], known)
