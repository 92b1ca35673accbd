"""The analysis of an experiment in a process of its own: what scores must not wait for DuckDB, nor share its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from domlora.errors import DataError, DomloraError

__all__ = ["Analyses", "end", "main"]

_FRESH_S = 15.0
_IDLE = 10  # times as long as it took
_LONGEST_S = 600.0
_NICE = 10
_BEING_MADE = "It is being analysed. Look again in a moment."
_COMMAND = (sys.executable, "-m", __name__)


class _Known(NamedTuple):
    until_s: float
    analysis: Mapping[str, Any] | None
    reason: str


_ALL: weakref.WeakSet[Analyses] = weakref.WeakSet()


class Analyses:
    """The last analysis of each experiment; made anew when somebody asks and the last one is not fresh any more."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._known: dict[tuple[Path, str], _Known] = {}
        self._process: subprocess.Popen[str] | None = None
        _ALL.add(self)

    def of(self, store: Path, name: str) -> tuple[Mapping[str, Any] | None, str]:
        """An analysis, or why there is none. Where another thread is at one, of any experiment, the last one at once.

        Args:
            store: the folder.
            name: of an experiment that is there.
        """
        known = self._known.get((store, name))
        if known is None or time.monotonic() > known.until_s:
            known = self._made(store, name, known)
        return known.analysis, known.reason

    def end(self) -> None:
        """End the process of the one that is being made, if any: who waits for it is told that it failed."""
        process = self._process
        if process is not None:
            process.terminate()

    def _made(self, store: Path, name: str, last: _Known | None) -> _Known:
        if not self._turn.acquire(blocking=False):
            return _Known(0.0, None, _BEING_MADE) if last is None else last
        try:
            now = self._known.get((store, name))
            if now is not None and now is not last:  # another thread has just made it
                return now
            start = time.monotonic()
            found, reason = self._run(store, name)
            ended = time.monotonic()
            fresh = _Known(ended + max(_FRESH_S, _IDLE * (ended - start)), found, reason)
            self._known[store, name] = fresh
            return fresh
        finally:
            self._process = None
            self._turn.release()

    def _run(self, store: Path, name: str) -> tuple[Mapping[str, Any] | None, str]:
        command = [*_COMMAND, str(store), name]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as process:
            self._process = process
            try:
                out, said = process.communicate(timeout=_LONGEST_S)
            except subprocess.TimeoutExpired:
                process.kill()
                return None, "The analysis takes too long for this page. Run it with: domlora ab analyze"
        if process.returncode == 2:
            return None, said.strip()
        if process.returncode:
            return None, "The analysis failed. Run it with: domlora ab analyze"
        found: Mapping[str, Any] = json.loads(out)
        return found, ""


def end() -> None:
    """End what this process is analysing, before it ends itself."""
    for each in list(_ALL):
        each.end()


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
