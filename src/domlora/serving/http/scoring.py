"""From rows to probabilities: which model answers which row, and what is said and remembered of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from domlora.errors import DataError
from domlora.serving.http.service import Header, Route, Service
from domlora.serving.snapshot import Snapshot

__all__ = ["Asked", "LogitsOf", "Part", "Scores", "probability_of", "score"]

NO_ADAPTER = "none"
_LONGEST = 200  # characters of a domain: it is told in headers, kept, and logged with each row
Rows = NDArray[np.intp]


class Part(NamedTuple):
    """Rows that one snapshot answers.

    Args:
        snapshot: what answers.
        domain: their numbers in it, or one for all.
        rows: their places in the request; None for all of it.
    """

    snapshot: Snapshot
    domain: NDArray[np.int64] | int
    rows: Rows | None = None


LogitsOf = Callable[[Part], NDArray[np.float32]]


class Asked(NamedTuple):
    """A request for scores, whatever the protocol.

    Args:
        num_rows: how many rows.
        domain: of all rows, or each row's.
        unit: who asks; experiments and the log need it.
        request_id: of the answer.
        version: asked for by its number, whatever experiments say.
        items: what the rows are called in the log.
    """

    num_rows: int
    domain: str | Sequence[str | None] | None
    unit: str | None
    request_id: str
    version: int | None = None
    items: Sequence[str | int] | None = None


class Scores(NamedTuple):
    """Rows answered.

    Args:
        logit, probability: of each row.
        bundle: the version that answered; several where arms of several domains differ.
        adapters: domain to the version of its adapter.
        arms: experiment to arm.
        domain: of all rows; None for several or none.
        headers: that say the same.
        degraded: rows scored with a fallback for one that could not be had.
    """

    logit: NDArray[np.float32]
    probability: NDArray[np.float32]
    bundle: str
    adapters: Mapping[str, str]
    arms: Mapping[str, str]
    headers: tuple[Header, ...]
    domain: str | None = None
    degraded: int = 0


def score(service: Service, asked: Asked, logits_of: LogitsOf) -> Scores:
    """Choose what answers, let it answer, count it and log who was shown it.

    Args:
        service: what answers.
        asked: the request.
        logits_of: the logits of the rows of a part.

    Raises:
        UnknownDomainError: a domain without an adapter, where the policy is ``error``.
        DataError: rows that cannot be scored, or a domain of more than 200 characters.
        UnavailableError: what should answer cannot be read.
    """
    if service.rows is not None:
        service.rows.take_degraded()  # those of a request that failed
    if asked.domain is None or isinstance(asked.domain, str):
        _check_domain(asked.domain)
        scores = _of_one(service, asked, asked.domain, logits_of)
    else:
        scores = _of_many(service, asked, asked.domain, logits_of)
    return scores if service.rows is None else _degraded(scores, service.rows.take_degraded())


def probability_of(logit: NDArray[np.float32]) -> NDArray[np.float32]:
    """``1 / (1 + exp(-logit))``, in float32.

    >>> probability_of(np.array([0.0, -200.0, 200.0], np.float32)).tolist()
    [0.5, 0.0, 1.0]
    """
    with np.errstate(over="ignore"):
        probability: NDArray[np.float32] = np.exp(-logit)
    probability += 1.0
    return np.reciprocal(probability, out=probability)


def _of_one(service: Service, asked: Asked, domain: str | None, logits_of: LogitsOf) -> Scores:
    route = service.route(domain, asked.unit, asked.num_rows, asked.version)
    snapshot = service.snapshot(route.domain, route.version)
    adapter = None if route.domain is None else snapshot.adapters.get(route.domain)
    logit = logits_of(Part(snapshot, _number(snapshot, route)))
    _check(logit)
    probability = probability_of(logit)
    service.count(domain, probability)
    if asked.unit is not None and service.log is not None:
        said = (domain, route.assignments, snapshot.version, adapter, probability, asked.items)
        service.log.exposed(asked.request_id, time.time(), asked.unit, *said)
    adapters = {} if adapter is None or route.domain is None else {route.domain: adapter}
    headers = service.headers(snapshot.version, adapter or NO_ADAPTER, domain)
    return _scores(logit, probability, snapshot.version, adapters, [route], headers, domain)


def _of_many(service: Service, asked: Asked, domains: Sequence[str | None], logits_of: LogitsOf) -> Scores:
    places = {domain: place for place, domain in enumerate(dict.fromkeys(domains))}
    for domain in places:
        _check_domain(domain)
    place = np.fromiter(map(places.__getitem__, domains), np.int64, len(domains))
    sizes = np.bincount(place).tolist()
    routes = {
        domain: service.route(domain, asked.unit, size, asked.version)
        for domain, size in zip(places, sizes, strict=True)
    }
    snapshots = _snapshots(service, list(routes.values()))
    logit = np.empty(asked.num_rows, dtype=np.float32)
    for part in _parts(list(routes.values()), snapshots, place):
        logit[slice(None) if part.rows is None else part.rows] = logits_of(part)
    _check(logit)
    probability = probability_of(logit)
    _tell(service, asked, routes, snapshots, place, probability)
    bundle = ", ".join(sorted({snapshot.version for snapshot in snapshots.values()}))
    adapters = {
        route.domain: adapter
        for route in routes.values()
        if route.domain is not None and (adapter := snapshots[route.version].adapters.get(route.domain)) is not None
    }
    return _scores(logit, probability, bundle, adapters, list(routes.values()), service.headers(bundle, None, None))


def _snapshots(service: Service, routes: Sequence[Route]) -> dict[int | None, Snapshot]:
    """One for each version: an adapter that is read for the last row must not drive out that of the first."""
    wanted: dict[int | None, list[str]] = {}
    for route in routes:
        wanted.setdefault(route.version, []).extend([route.domain] if route.domain is not None else [])
    return {version: service.snapshot_of_all(domains, version) for version, domains in wanted.items()}


def _parts(
    routes: Sequence[Route], snapshots: Mapping[int | None, Snapshot], place: NDArray[np.int64]
) -> Iterator[Part]:
    """The rows of each version.

    Args:
        routes: of the domains there are.
        snapshots: of the versions.
        place: each row's domain, as its place in ``routes``.
    """
    numbers = np.array([_number(snapshots[route.version], route) for route in routes])
    if len(snapshots) == 1:
        yield Part(snapshots[routes[0].version], numbers[place])
        return
    for version, snapshot in snapshots.items():
        rows = np.flatnonzero(np.array([route.version == version for route in routes])[place])
        yield Part(snapshot, numbers[place[rows]], rows)


def _tell(
    service: Service,
    asked: Asked,
    routes: Mapping[str | None, Route],
    snapshots: Mapping[int | None, Snapshot],
    place: NDArray[np.int64],
    probability: NDArray[np.float32],
) -> None:
    """Count and log each domain for itself."""
    now = time.time()
    for number, (domain, route) in enumerate(routes.items()):
        rows = np.flatnonzero(place == number)
        own = probability[rows]
        service.count(domain, own)
        if asked.unit is not None and service.log is not None:
            snapshot = snapshots[route.version]
            adapter = None if route.domain is None else snapshot.adapters.get(route.domain)
            items = None if asked.items is None else [asked.items[row] for row in rows.tolist()]
            said = (domain, route.assignments, snapshot.version, adapter, own, items, rows.astype(np.int32))
            service.log.exposed(asked.request_id, now, asked.unit, *said)


def _degraded(scores: Scores, num_rows: int) -> Scores:
    if not num_rows:
        return scores
    told = min(num_rows, len(scores.logit))  # who asks to explain has each row scored twice
    return scores._replace(degraded=told, headers=(*scores.headers, (b"x-domlora-degraded", b"%d" % told)))


def _check_domain(domain: str | None) -> None:
    if domain is not None and len(domain) > _LONGEST:
        raise DataError(f"a domain must have at most {_LONGEST} characters", received=domain[:_LONGEST])


def _number(snapshot: Snapshot, route: Route) -> int:
    """Of the route's domain; -1 for the base."""
    number = None if route.domain is None else snapshot.number_of(route.domain)
    return -1 if number is None else number


def _check(logit: NDArray[np.float32]) -> None:
    if np.count_nonzero(np.isfinite(logit)) < len(logit):
        raise DataError("a row's numbers are too large for this model: its score is not a number")


def _scores(
    logit: NDArray[np.float32],
    probability: NDArray[np.float32],
    bundle: str,
    adapters: Mapping[str, str],
    routes: Sequence[Route],
    headers: tuple[Header, ...],
    domain: str | None = None,
) -> Scores:
    arms = {each.experiment: each.arm.name for route in routes for each in route.assignments}
    if arms:
        said = ", ".join(f"{experiment}={arm}" for experiment, arm in arms.items())
        headers = (*headers, (b"x-domlora-arm", said.encode()))
    return Scores(logit, probability, bundle, adapters, arms, headers, domain)
