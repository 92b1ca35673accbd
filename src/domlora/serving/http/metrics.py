"""What a server counts, for Prometheus.

Several workers count into files of one folder, each into those of its place: a worker that is started anew goes on where
the one before stopped, and any of them can show the sum.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector

if TYPE_CHECKING:
    from domlora.serving.rows.store import Counts

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
NO_DOMAIN, OTHER = "", "other"
_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_FEW_BUCKETS = (0.005, 0.025)  # there may be a thousand domains, and a scrape takes the processor from scoring


class Metrics:
    """Counters of one worker, each series looked up once and kept.

    The label ``domain`` has the domains that :meth:`know` was told, up to ``max_domains``; any other is ``other``, so that a
    client cannot make series. A request of several domains or none has the empty domain.

    Args:
        max_domains: series of their own.
        folder: where workers count together; None for a process alone.
        place: of this worker, a number that no other living process of the folder has.

    Example:
        >>> metrics = Metrics()
        >>> metrics.know(["toys"])
        >>> metrics.answered("score", 200, "toys", 64, 0.002)
        >>> metrics.answered("score", 200, "no such domain", 64, 0.002)
        >>> [line for line in metrics.expose().decode().splitlines() if line.startswith("domlora_rows_total")]
        ['domlora_rows_total{domain="toys"} 64.0', 'domlora_rows_total{domain="other"} 64.0']
    """

    def __init__(self, max_domains: int = 1_000, folder: Path | None = None, place: int = 0) -> None:
        self._max_domains = max_domains
        self._known: set[str] = set()
        self._folder = folder
        self._registry = CollectorRegistry()
        _count_into(folder, place)
        self._requests = self._counter("requests", "Answers, refusals among them", "route", "status")
        self._by_domain = self._counter("domain_requests", "Answers to scoring requests", "domain", "status")
        self._rows = self._counter("rows", "Rows scored", "domain")
        self._seconds = Histogram(
            "domlora_request_seconds",
            "From a request's first byte to its answer",
            ["route"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._domain_seconds = Histogram(
            "domlora_domain_request_seconds",
            "The same of scoring requests that were answered",
            ["domain"],
            buckets=_FEW_BUCKETS,
            registry=self._registry,
        )
        self._rejected = self._counter("rejected", "Requests refused by a limit", "reason")
        self._score = self._counter(
            "probability_sum", "Sum of the probabilities answered; over rows: their mean", "domain"
        )
        self._ids = self._counter("unknown_ids", "Values scored as out-of-vocabulary", "feature")
        self._domains = self._counter("unknown_domain", "Rows of a domain that has no adapter")
        self._predicted = self._counter("predicted_sum", "Sum of the probabilities of rows with feedback", "domain")
        self._observed = self._counter("observed_sum", "Sum of what happened in rows with feedback", "domain")
        self._matched = self._counter("observed_rows", "Rows with feedback", "domain")
        self._lookups = self._counter("row_lookups", "Rows of remote tables, by where they came from", "result")
        self._row_seconds = Histogram(
            "domlora_row_fetch_seconds", "Of one answer of the row store", buckets=_BUCKETS, registry=self._registry
        )
        self._row_failures = self._counter("row_store_failures", "Times that the row store did not answer")
        self._degraded = self._counter("degraded_rows", "Rows scored with a fallback for one that could not be had")
        self._waiting = Gauge(
            "domlora_events_waiting",
            "Rows of exposures and feedback that are not written yet",
            registry=self._registry,
            multiprocess_mode="sum",
        )
        self._dropped = self._counter("events_dropped", "Such rows that there was no room for: they are in no log")
        self._dropped_before = 0
        self._swaps = self._counter("swaps", "Other versions or adapters taken into service")
        self._loads = self._counter("adapter_loads", "Adapters read into memory", "result")
        self._starts = self._counter("worker_starts", "Workers started; more than there are: some were started anew")
        self._version = Gauge(
            "domlora_bundle_version", "Version in service", registry=self._registry, multiprocess_mode="mostrecent"
        )
        self._looks = self._counter("shared_looks", "Looks at the shared store", "result")
        self._generation = Gauge(
            "domlora_shared_generation",
            "Generation of the shared store in service",
            registry=self._registry,
            multiprocess_mode="mostrecent",
        )
        self._seen_at = Gauge(
            "domlora_shared_seen_timestamp_seconds",
            "When the shared store was last reached; time() less this is how old the copy may be",
            registry=self._registry,
            multiprocess_mode="mostrecent",
        )
        self._series: dict[Any, tuple[Any, ...]] = {}

    def know(self, domains: Iterable[str]) -> None:
        """These domains have series of their own from now on; those known before keep theirs."""
        for domain in domains:
            if len(self._known) >= self._max_domains:
                break
            self._known.add(domain)

    def answered(self, route: str, status: int, domain: str | None, rows: int, seconds: float) -> None:
        """One answer.

        Args:
            route: a name from a fixed set, such as ``score``; not a path.
            status: of HTTP.
            domain: of a scoring request of one domain; None for several, or for another route.
            rows: how many were scored; 0 where none were.
            seconds: since its first byte.
        """
        self.answered_all([(route, status, domain, rows, seconds)])

    def answered_all(self, answers: Iterable[tuple[str, int, str | None, int, float]]) -> None:
        """Many answers, each as :meth:`answered` has it; what they share is counted once for all."""
        routes: dict[tuple[str, int], list[Any]] = {}
        domains: dict[tuple[str | None, int, None], list[Any]] = {}
        for route, status, domain, rows, seconds in answers:
            asked = (route, status)
            here = routes.get(asked)
            if here is None:
                here = routes[asked] = [*self._of(asked, self._route_series), 0]
            here[1](seconds)
            here[2] += 1
            if rows or domain is not None:
                told = (domain, status, None)
                there = domains.get(told)
                if there is None:
                    there = domains[told] = [*self._of(told, self._domain_series), 0, 0]
                if rows:
                    there[2](seconds)
                there[3] += 1
                there[4] += rows
        for requests, _, number in routes.values():
            requests.inc(number)
        for answered, scored, _, number, total in domains.values():
            answered.inc(number)
            scored.inc(total)

    def scored(self, domain: str | None, total_probability: float, rows: int) -> None:
        """Rows of a domain and the sum of their probabilities; a request of several domains tells each."""
        del rows  # counted with the answer
        self._of(("score", domain), self._score_series)[0].inc(total_probability)

    def unknown_ids(self, feature: str, n: int = 1) -> None:
        """Values of a feature that the vocabulary does not hold."""
        self._ids.labels(feature).inc(n)

    def unknown_domain(self, n: int = 1) -> None:
        """Rows of a domain without an adapter."""
        self._domains.inc(n)

    def observed(self, domain: str | None, predicted_total: float, observed_total: float, n: int) -> None:
        """Feedback that met its rows: what was predicted for them and what happened."""
        name = self._name(domain)
        self._predicted.labels(name).inc(predicted_total)
        self._observed.labels(name).inc(observed_total)
        self._matched.labels(name).inc(n)

    def logged(self, waiting: int, dropped: int) -> None:
        """Rows of the event log that wait, and those that were dropped since this process began."""
        self._waiting.set(waiting)
        self._dropped.inc(dropped - self._dropped_before)
        self._dropped_before = dropped

    def looked_up(self, counts: Counts) -> None:
        """Rows of tables that lie elsewhere."""
        for result in ("hits", "fetched", "missing"):
            self._lookups.labels(result).inc(getattr(counts, result))
        for seconds in counts.seconds:
            self._row_seconds.observe(seconds)
        self._row_failures.inc(counts.failures)
        self._degraded.inc(counts.degraded)

    def rejected(self, reason: str) -> None:
        """A request that the application refused, by a reason from a fixed set; :meth:`answered` counts its answer."""
        self._rejected.labels(reason).inc()

    def refused(self, reason: str, status: int, n: int) -> None:
        """Answers that a limit gave before there was an application to ask."""
        self._rejected.labels(reason).inc(n)
        self._requests.labels("refused", status).inc(n)

    def swapped(self) -> None:
        """Another version or adapter went into service."""
        self._swaps.inc()

    def loaded(self, result: str) -> None:
        """An adapter was read, or not: ``ok``, ``refused``, ``evicted``."""
        self._loads.labels(result).inc()

    def started(self) -> None:
        """A worker was started."""
        self._starts.inc()

    def serves(self, version: str) -> None:
        """The version in service; one that is not a number shows as 0."""
        self._version.set(int(version) if version.isdigit() else 0)

    def looked(self, generation: int, newest: bool) -> None:
        """A look at the shared store: the generation in service, and whether it is known to be the newest one."""
        self._looks.labels("ok" if newest else "failed").inc()
        self._generation.set(generation)
        if newest:
            self._seen_at.set_to_current_time()

    def expose(self) -> bytes:
        """All workers' counters in the text format."""
        if self._folder is None:
            return generate_latest(self._registry)
        together = CollectorRegistry()
        MultiProcessCollector(together, str(self._folder))  # type: ignore[no-untyped-call]
        return generate_latest(together)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"domlora_{name}", text, labels, registry=self._registry)

    def _name(self, domain: str | None) -> str:
        if domain is None:
            return NO_DOMAIN
        return domain if domain in self._known else OTHER

    def _of(self, key: Any, make: Callable[[Any], tuple[Any, ...]]) -> tuple[Any, ...]:
        found = self._series.get(key)
        return found if found is not None else make(key)

    def _route_series(self, key: tuple[str, int]) -> tuple[Any, ...]:
        route, status = key
        series = (self._requests.labels(route, status), self._seconds.labels(route).observe)
        self._series[key] = series
        return series

    def _domain_series(self, key: tuple[str | None, int, None]) -> tuple[Any, ...]:
        name = self._name(key[0])
        seconds = self._domain_seconds.labels(name).observe
        series = (self._by_domain.labels(name, key[1]), self._rows.labels(name), seconds)
        if name != OTHER:  # else a client fills the table
            self._series[key] = series
        return series

    def _score_series(self, key: tuple[str, str | None]) -> tuple[Any, ...]:
        name = self._name(key[1])
        series = (self._score.labels(name),)
        if name != OTHER:
            self._series[key] = series
        return series


def _count_into(folder: Path | None, place: int) -> None:
    """Choose where prometheus_client keeps values from now on, in all of this process; it looks when a series is made."""
    if folder is None:
        values.ValueClass = values.MutexValue
        return
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = values.MultiProcessValue(partial(int, place))  # type: ignore[no-untyped-call]
