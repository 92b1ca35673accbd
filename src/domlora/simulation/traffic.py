"""Visits that ask a running server, see its ranking, click, and report it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from domlora.errors import ConfigError, EngineError
from domlora.simulation.population import Population, Visit

__all__ = ["ArmTally", "Tally", "Traffic"]

_FEEDBACK_EVENTS, _FEEDBACK_S = 200, 0.5
_TIMEOUT_S = 10.0
_TRIES = 20


@dataclass(slots=True)
class ArmTally:
    """What happened in an arm.

    Args:
        visits, clicks: counts.
        expected: the sum of the true probabilities of what was shown: clicks without their luck.
    """

    visits: int = 0
    clicks: int = 0
    expected: float = 0.0


@dataclass(slots=True)
class Tally:
    """What a traffic did.

    Args:
        arms: by experiment and arm.
        visits, clicks, refused: counts; refused visits (503) are asked again.
        seconds: that it took.
    """

    arms: dict[tuple[str, str], ArmTally] = field(default_factory=dict)
    visits: int = 0
    clicks: int = 0
    refused: int = 0
    seconds: float = 0.0


class Traffic:
    """A population in front of a server.

    A visit sends its candidates to ``/v1/score``, sees the ``num_shown`` best, clicks with the true probabilities and
    reports ``shown`` and ``click`` to ``/v1/feedback``. Which visits there are and their luck depend on the population's
    seed alone.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``.
        population: who visits.
        num_shown: candidates that a user sees.
        rate: visits a second, all connections together; None for as many as get answered.
        connections: at a time, each kept open.
        first: number of the first visit.

    Raises:
        ConfigError: no such address, or a number out of range.
    """

    def __init__(
        self,
        url: str,
        population: Population,
        *,
        num_shown: int = 3,
        rate: float | None = None,
        connections: int = 2,
        first: int = 0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ConfigError("a server's address must be like http://127.0.0.1:8000", received=url)
        if not 0 < num_shown <= population.num_candidates or connections < 1 or (rate is not None and rate <= 0):
            raise ConfigError("numbers of a traffic must be above 0", received=(num_shown, rate, connections))
        self._host, self._port = parts.hostname, parts.port or 80
        self._population, self._num_shown, self._rate = population, num_shown, rate
        self._connections = connections
        self._next = first
        self.tally = Tally()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: Exception | None = None

    def run(self, *, seconds: float | None = None, visits: int | None = None) -> Tally:
        """Visit for so long, or so often.

        Raises:
            EngineError: the server does not answer, or refuses a visit for another reason than its load.
        """
        if (seconds is None) == (visits is None):
            raise ConfigError("a traffic needs seconds or visits", received=(seconds, visits))
        started, begin = time.monotonic(), self._next
        run = _Run(started, begin, seconds, None if visits is None else begin + visits)
        threads = [threading.Thread(target=self._connection, args=(run,)) for _ in range(self._connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.tally.seconds += time.monotonic() - started
        if self._failure is not None:
            raise EngineError(
                "the server must answer visits", received=str(self._failure), next_step="Look at its log"
            ) from self._failure
        return self.tally

    def stop(self) -> None:
        """End a run from another thread."""
        self._stop.set()

    def _connection(self, run: _Run) -> None:
        line = _Line(self._host, self._port)
        events: list[dict[str, Any]] = []
        reported = time.monotonic()
        try:
            for number in self._due(run):
                events += self._visit(line, self._population.visit(number))
                if len(events) >= _FEEDBACK_EVENTS or time.monotonic() - reported > _FEEDBACK_S:
                    self._report(line, events)
                    reported = time.monotonic()
            self._report(line, events)
        except Exception as error:
            self._failure = error
            self._stop.set()
        finally:
            line.close()

    def _due(self, run: _Run) -> Iterator[int]:
        """Numbers of visits, each at its time."""
        while not self._stop.is_set() and time.monotonic() < run.until:
            with self._lock:
                number, at = self._next, run.started
                if self._rate is not None:
                    at += (number - run.begin) / self._rate
                if (run.end is not None and number >= run.end) or at >= run.until:
                    return
                self._next += 1
            self._stop.wait(max(at - time.monotonic(), 0))
            yield number

    def _visit(self, line: _Line, visit: Visit) -> list[dict[str, Any]]:
        """Ask, see, click; what is to be reported."""
        answer, refused = line.post("/v1/score", self._population.question(visit))
        score = np.asarray(answer["probability"])
        shown = np.argsort(-score, kind="stable")[: self._num_shown]
        clicked = visit.clicked(shown)
        self._note(visit, answer.get("arms") or {}, shown, len(clicked), refused)
        told = {"request_id": answer["request_id"], "unit": visit.unit}
        seen = [{**told, "row": row, "event": "shown"} for row in shown.tolist()]
        return [*seen, *({**told, "row": row, "event": "click"} for row in clicked.tolist())]

    def _note(self, visit: Visit, arms: dict[str, str], shown: NDArray[np.intp], clicks: int, refused: int) -> None:
        with self._lock:
            self.tally.visits += 1
            self.tally.clicks += clicks
            self.tally.refused += refused
            for pair in arms.items():
                arm = self.tally.arms.setdefault(pair, ArmTally())
                arm.visits += 1
                arm.clicks += clicks
                arm.expected += float(visit.probability[shown].sum())

    @staticmethod
    def _report(line: _Line, events: list[dict[str, Any]]) -> None:
        if events:
            line.post("/v1/feedback", {"events": events})
            events.clear()


class _Run(NamedTuple):
    """From when to when, and which visits."""

    started: float
    begin: int
    seconds: float | None
    end: int | None

    @property
    def until(self) -> float:
        return float("inf") if self.seconds is None else self.started + self.seconds


class _Line:
    """One connection that is kept open, and opened again when it was closed."""

    def __init__(self, host: str, port: int) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)

    def post(self, path: str, what: Any) -> tuple[Any, int]:
        """The answer, and how often the server was too busy before."""
        body = json.dumps(what).encode()
        for attempt in range(_TRIES):
            status, content = self._once(path, body)
            if status == 200:
                return json.loads(content), attempt
            if status not in (0, 503):
                raise EngineError(f"{path} must be answered with 200", received=f"{status} {content[:300]!r}")
            time.sleep(min(0.05 * (attempt + 1), 1.0))
        raise EngineError(f"{path} must be answered within {_TRIES} tries", received=f"{status} {content[:300]!r}")

    def close(self) -> None:
        self._connection.close()

    def _once(self, path: str, body: bytes) -> tuple[int, bytes]:
        try:
            self._connection.request("POST", path, body, {"content-type": "application/json"})
            response = self._connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            with suppress(OSError):
                self._connection.close()
            return 0, repr(error).encode()
