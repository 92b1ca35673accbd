"""The process above the workers: starts them, starts them anew, and ends them.

It listens and holds the socket, so that nobody who connects is refused while a worker is replaced.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from domlora.errors import ConfigError, needing
from domlora.serving.http.logs import log_to
from domlora.serving.settings import Settings

__all__ = ["Task", "serve"]

_LOG = logging.getLogger("domlora.serving")
_WORKER = "domlora.serving.http.worker"
FACTORY = "domlora.serving.http.service:make"
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
_LIBRARIES = ("httptools", "msgspec", "onnxruntime", "prometheus_client", "uvicorn", "uvloop")
_TRACING = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
_LOOK_S = 0.25
_BACKLOG = 1024
_SILENT_S = 2.0  # beside twice deadline_s, within which the worker ends itself
_STARTING_S = 60.0
_SOON_S = 5.0  # a worker that ends sooner is started anew a little later each time
_PAUSES_S = (0.0, 0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Task:
    """What the supervisor tells a worker.

    Args:
        settings: as ``Settings.to_json`` gives them.
        factory: ``module:function``, which makes a ``worker.Served`` of settings and metrics.
        listening: number of the socket that all workers accept from.
        beating: number of a pipe; a byte now and then says that the event loop goes on.
        place: which of the workers this is.
        metrics: the folder where workers count together.
    """

    settings: str
    factory: str
    listening: int
    beating: int
    place: int
    metrics: str

    def to_json(self) -> str:
        """One line, for the pipe."""
        return json.dumps(asdict(self))


def serve(settings: Settings, *, factory: str = FACTORY) -> int:
    """Serve until SIGTERM or SIGINT; the exit code, 0 after a clean end.

    Args:
        settings: what was told.
        factory: ``module:function`` that makes the application in each worker; see ``worker.Served``.

    Raises:
        ConfigError: the address cannot be had, or libraries are missing.
    """
    _find("serve", "domlora serve", _LIBRARIES)
    if settings.otlp_endpoint is not None:
        _find("opentelemetry", "otlp_endpoint", _TRACING)
    listening = _listen(settings)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # before there are threads, which would take them
    listener = log_to()
    folder = Path(tempfile.mkdtemp(prefix="domlora-metrics-"))
    try:
        return _Supervisor(settings, factory, listening, folder).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        listener.stop()


class _Place:
    """One of the workers: who is there now, and how it has gone."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: subprocess.Popen[bytes] | None = None
        self.beating = -1
        self.started = self.heard = 0.0
        self.early_ends = 0
        self.start_at = 0.0

    def start(self, task: Task) -> None:
        self.beating, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        told = replace(task, beating=theirs, place=self.number)
        self.process = subprocess.Popen(
            [sys.executable, "-m", _WORKER],
            stdin=subprocess.PIPE,
            pass_fds=(task.listening, theirs),
            process_group=0,  # Ctrl-C is for the supervisor
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
        )
        os.close(theirs)
        self.started, self.heard = time.monotonic(), 0.0
        if self.process.stdin is not None:
            with suppress(OSError):  # it has died already; that is seen at the next look
                self.process.stdin.write(f"{told.to_json()}\n".encode())
                self.process.stdin.flush()  # and stays open: its end says that we are gone

    def listen(self) -> None:
        """Note whether its event loop has spoken."""
        with suppress(OSError):
            if os.read(self.beating, 4096):
                self.heard = time.monotonic()

    def silent(self, deadline_s: float) -> bool:
        now = time.monotonic()
        return now - self.heard > 2 * deadline_s + _SILENT_S if self.heard else now - self.started > _STARTING_S

    def ended(self) -> int | None:
        """The exit code if its process has ended, which is noted; then it may be started again from ``start_at`` on."""
        code = None if self.process is None else self.process.poll()
        if code is None or self.process is None:
            return None
        lived_s = time.monotonic() - self.started
        self.early_ends = self.early_ends + 1 if lived_s < _SOON_S else 0
        self.start_at = time.monotonic() + _PAUSES_S[min(self.early_ends, len(_PAUSES_S) - 1)]
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
        os.close(self.beating)
        self.process = None
        return code


class _Supervisor:
    def __init__(self, settings: Settings, factory: str, listening: socket.socket, folder: Path) -> None:
        self._settings = settings
        self._task = Task(settings.to_json(), factory, listening.fileno(), -1, -1, str(folder))
        self._listening = listening
        self._places = [_Place(number) for number in range(settings.workers)]

    def run(self) -> int:
        host, port = self._listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        _LOG.info("listening", extra={"fields": {"url": f"http://{shown}:{port}", "workers": len(self._places)}})
        for place in self._places:
            place.start(self._task)
        while self._next_signal(_LOOK_S) not in (signal.SIGTERM, signal.SIGINT):
            for place in self._places:
                self._look_after(place)
        return self._end()

    def _look_after(self, place: _Place) -> None:
        code = place.ended()
        if code is not None:
            _LOG.error("worker ended", extra={"fields": {"place": place.number, "exit_code": code}})
        if place.process is None:
            if time.monotonic() >= place.start_at:
                place.start(self._task)
            return
        place.listen()
        if place.silent(self._settings.deadline_s):
            _LOG.error("worker silent", extra={"fields": {"place": place.number, "pid": place.process.pid}})
            place.process.kill()

    def _end(self) -> int:
        """Let all workers drain; who does not end in time is killed."""
        _LOG.info("draining")
        running = [place.process for place in self._places if place.process is not None]
        for process in running:
            process.terminate()
        self._listening.close()
        until = time.monotonic() + self._settings.drain_s + self._settings.grace_s + 2.0
        again = False
        while any(process.poll() is None for process in running) and time.monotonic() < until:
            again = self._next_signal(_LOOK_S) in (signal.SIGTERM, signal.SIGINT) or again
            if again:
                break
        late = [process for process in running if process.poll() is None]
        for process in late:
            process.kill()
        codes = [process.wait() for process in running]
        _LOG.info("ended", extra={"fields": {"exit_codes": codes}})
        return 0 if all(code in (0, -signal.SIGTERM) for code in codes) else 1

    def _next_signal(self, timeout_s: float) -> int | None:
        """The next signal, a child's end among them; None if there was none in time."""
        found = signal.sigtimedwait(_SIGNALS, timeout_s)
        return None if found is None else found.si_signo


def _find(extra: str, what: str, libraries: Sequence[str]) -> None:
    """Look for what every worker imports: without it each would end at once, and be started anew for ever."""
    with needing(extra, what):
        for name in libraries:
            if find_spec(name) is None:
                raise ModuleNotFoundError(f"No module named {name!r}")


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"it must be possible to listen there ({error.strerror})",
            received=f"{settings.host}:{settings.port}",
            next_step="Choose another --port or --host",
        ) from error
