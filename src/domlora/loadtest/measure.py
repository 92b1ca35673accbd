"""A load test: what is to be sent, by how many processes, and what is reported of it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from domlora.errors import ConfigError
from domlora.loadtest.generator import OK, Load, Seen, generate

__all__ = ["Plan", "Report", "cpu_seconds", "run"]

_LEVELS = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p99.9": 99.9}
_SOON_S = 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """How a server is loaded.

    Args:
        url: of the server.
        rate: requests a second, at random moments whatever the server does (open loop). None for the closed loop, in which
            each client asks again when it is answered: good for how much a server can do, too kind for how long it takes.
        clients: of the closed loop; of the open one the most connections.
        seconds: that are measured.
        warmup_s: before them.
        timeout_s: a request that takes longer is given up.
        processes: that send.
        pid: of the server on this machine, whose processor time is measured, its children's too.
        seed: of the moments and of the order.

    Raises:
        ConfigError: a number out of range, or no such address.
    """

    url: str
    rate: float | None = None
    clients: int = 8
    seconds: float = 10.0
    warmup_s: float = 1.0
    timeout_s: float = 10.0
    processes: int = 1
    pid: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise ConfigError("a server's address must be like http://127.0.0.1:8000", received=self.url)
        least = {"seconds": 0.0, "timeout_s": 0.0, "rate": 0.0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value <= bound:
                raise ConfigError(f"{name} must be above 0", received=value)
        if not 1 <= self.processes <= self.clients or self.warmup_s < 0:
            raise ConfigError(
                "there must be a process, and a client for each", received=(self.processes, self.clients, self.warmup_s)
            )


@dataclass(frozen=True, slots=True)
class Report:
    """What became of the requests that were due while it was measured.

    Args:
        offered: requests a second that were due.
        answered: requests a second that were answered with 200.
        latency_ms: of those, from when they were due; ``mean``, ``p50`` to ``p99.9``, ``max``.
        statuses: how many of each status and reason.
        server_cpu_us: processor time of the server for each answer of any status; None where it was not measured.
        sent_late_ms: 99th percentile of how much later than due requests were sent.
        generator_cpu: the share of a core that each sending process was busy; near 1, it was the limit and not the server.
        seconds: that were measured.
    """

    offered: float
    answered: float
    latency_ms: dict[str, float]
    statuses: dict[str, int]
    server_cpu_us: float | None
    sent_late_ms: float
    generator_cpu: float
    seconds: float

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1)


def run(plan: Plan, requests: Sequence[bytes]) -> Report:
    """Send requests as planned.

    Args:
        plan: how. Several processes start anew, so a script that asks for them needs ``if __name__ == "__main__"``.
        requests: whole, as they go over the wire; see :mod:`domlora.loadtest.bodies`.
    """
    if plan.processes == 1:
        load = _load(plan, 0, time.monotonic() + _SOON_S)
        with _Watched(plan, load) as watched:
            seen = [generate(load, requests)]
        return _report(plan, seen, watched.cpu_s)
    context = get_context("spawn")
    together = context.Barrier(plan.processes)
    with ProcessPoolExecutor(plan.processes, mp_context=context, initializer=together.wait) as pool:
        list(pool.map(abs, range(plan.processes)))  # all of them have started
        start_at = time.monotonic() + _SOON_S
        loads = [_load(plan, number, start_at) for number in range(plan.processes)]
        with _Watched(plan, loads[0]) as watched:
            seen = list(pool.map(partial(generate, requests=requests), loads))
    return _report(plan, seen, watched.cpu_s)


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and all below it, to the nanosecond where the kernel tells it.

    Raises:
        ConfigError: there is no such process.
    """
    try:
        return sum(_own_cpu_seconds(each) for each in _tree(pid))
    except OSError as error:
        raise ConfigError("there must be a process of this number", received=pid) from error


class _Watched:
    """Measures the server's processor time while requests are noted, from a thread that sleeps but for two looks."""

    def __init__(self, plan: Plan, load: Load) -> None:
        self.cpu_s: float | None = None
        self._pid = plan.pid
        self._from, self._to = load.start_at + load.warmup_s, load.start_at + load.seconds
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if plan.pid is not None:
            cpu_seconds(plan.pid)  # says at once if there is none

    def __enter__(self) -> Self:
        if self._pid is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pid is not None:
            self._thread.join()

    def _watch(self) -> None:
        with suppress(ConfigError):  # the server ended
            before = self._at(self._from)
            self.cpu_s = self._at(self._to) - before

    def _at(self, moment: float) -> float:
        time.sleep(max(moment - time.monotonic(), 0))
        return cpu_seconds(self._pid or 0)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme == "http" and parts.hostname is not None and parts.port != 0
    except ValueError:  # a port that is no number, or too large a one
        return False


def _load(plan: Plan, number: int, start_at: float) -> Load:
    parts = urlsplit(plan.url)
    return Load(
        host=parts.hostname or "",
        port=parts.port or 80,
        start_at=start_at,
        seconds=plan.warmup_s + plan.seconds,
        warmup_s=plan.warmup_s,
        rate=None if plan.rate is None else plan.rate / plan.processes,
        clients=plan.clients // plan.processes + (number < plan.clients % plan.processes),
        timeout_s=plan.timeout_s,
        seed=plan.seed * 1000 + number,
    )


def _report(plan: Plan, seen: Sequence[Seen], cpu_s: float | None) -> Report:
    statuses = sum((each.statuses for each in seen), Counter[str]())
    seconds = np.concatenate([np.frombuffer(each.seconds) for each in seen])
    late = np.concatenate([np.frombuffer(each.late) for each in seen])
    answers = sum(number for said, number in statuses.items() if said[0].isdigit())
    busy = max(each.cpu_s for each in seen) / (plan.warmup_s + plan.seconds)
    return Report(
        offered=statuses.total() / plan.seconds,
        answered=statuses[str(OK)] / plan.seconds,
        latency_ms=_latency(seconds),
        statuses=dict(statuses.most_common()),
        server_cpu_us=None if cpu_s is None or not answers else 1e6 * cpu_s / answers,
        sent_late_ms=float(np.percentile(late, 99)) * 1e3 if len(late) else 0.0,
        generator_cpu=busy,
        seconds=plan.seconds,
    )


def _latency(seconds: NDArray[np.float64]) -> dict[str, float]:
    if not len(seconds):
        return {}
    levels = {name: float(np.percentile(seconds, level)) * 1e3 for name, level in _LEVELS.items()}
    return {"mean": float(seconds.mean()) * 1e3, **levels, "max": float(seconds.max()) * 1e3}


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):
                found += map(int, (task / "children").read_text().split())
    return found


def _own_cpu_seconds(pid: int) -> float:
    """Of all threads of a process."""
    spent_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            spent_ns += int((task / "schedstat").read_text().split()[0])
    if spent_ns:
        return spent_ns / 1e9
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
