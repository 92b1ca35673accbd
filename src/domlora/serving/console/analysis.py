"""The analysis of an experiment in a process of its own: what scores must not wait for DuckDB, nor share its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from domlora.errors import DataError, DomloraError

__all__ = ["Analyses", "main"]

_FRESH_S = 15.0
_IDLE = 10  # times as long as it took
_LONGEST_S = 600.0
_NICE = 10


class _Known(NamedTuple):
    until_s: float
    analysis: Mapping[str, Any] | None
    reason: str


class Analyses:
    """The last analysis of each experiment; made anew when somebody asks and the last one is not fresh any more."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._known: dict[tuple[Path, str], _Known] = {}

    def of(self, store: Path, name: str) -> tuple[Mapping[str, Any] | None, str]:
        """An analysis, or why there is none. Where another thread is at one, the last one, or it waits for the first.

        Args:
            store: the folder.
            name: of an experiment that is there.
        """
        known = self._known.get((store, name))
        if known is None or time.monotonic() > known.until_s:
            known = self._made(store, name, known)
        return known.analysis, known.reason

    def _made(self, store: Path, name: str, last: _Known | None) -> _Known:
        if not self._turn.acquire(blocking=last is None):
            assert last is not None
            return last
        try:
            now = self._known.get((store, name))
            start = time.monotonic()
            if now is not last and now is not None:  # while this thread waited
                return now
            found, reason = _run(store, name)
            ended = time.monotonic()
            fresh = _Known(ended + max(_FRESH_S, _IDLE * (ended - start)), found, reason)
            self._known[store, name] = fresh
            return fresh
        finally:
            self._turn.release()


def _run(store: Path, name: str) -> tuple[Mapping[str, Any] | None, str]:
    command = [sys.executable, "-m", __name__, str(store), name]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LONGEST_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None, "The analysis takes too long for this page. Run it with: domlora ab analyze"
    if done.returncode == 2:
        return None, done.stderr.strip()
    if done.returncode:
        return None, "The analysis failed. Run it with: domlora ab analyze"
    found: Mapping[str, Any] = json.loads(done.stdout)
    return found, ""


def main(store: str, name: str) -> int:
    """Print an analysis as JSON; an error is one line on standard error, and exit code 2."""
    from domlora.abtest.analysis import analyze
    from domlora.abtest.registry import Registry

    os.nice(_NICE)
    folder = Path(store)
    try:
        experiment = Registry.open(folder / "experiments").get(name)
        if experiment.started_s is None:
            raise DataError("the experiment must be started to show anything", next_step="domlora ab start")
        sys.stdout.write(analyze(experiment, folder / "log").to_json())
    except DomloraError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
