"""One worker: a process that loads, listens, answers, and ends well.

The supervisor starts it with a line of JSON on standard input, which it keeps open: when that ends, the supervisor has died,
and the worker goes too.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import importlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import uvloop

from domlora.errors import DomloraError
from domlora.files import allow_open_files
from domlora.serving.http.exchange import Scorer
from domlora.serving.http.logs import App, Logged, log_to
from domlora.serving.http.metrics import Metrics
from domlora.serving.http.protocol import ServerConfig, Shared
from domlora.serving.http.server import Door, Server
from domlora.serving.http.supervisor import Task
from domlora.serving.http.tracing import Traced, tracer_to
from domlora.serving.http.watchdog import BEAT_S, Watchdog
from domlora.serving.settings import Settings

__all__ = ["Served", "main"]

_LOG = logging.getLogger("domlora.serving")
_LOADING_S = 1.0  # a worker that loads longer than this listens meanwhile, and says that it is not ready
_SWITCH_S = 0.0005  # which threads that read adapters let the event loop wait for the interpreter; 0.005 without
_OTHER_FILES = 256  # of a worker, beside its connections
_RETRY_S, _LONG_RETRY_S = 1.0, 60.0  # twice as long each time


class Served(NamedTuple):
    """What a factory makes of the settings.

    Args:
        app: the application.
        refresh: looks whether there is something new to serve; called by a thread each ``poll_s``.
        close: writes what is not written yet.
        scorer: answers requests to score; without one the application does.
    """

    app: App
    refresh: Callable[[], object]
    close: Callable[[], object]
    scorer: Scorer | None = None


class _Worker:
    def __init__(self, task: Task) -> None:
        self.task = task
        self.settings = Settings.from_json(task.settings)
        _make_room(self.settings.max_connections)
        self.metrics = Metrics(self.settings.metrics_domains, Path(task.metrics), task.place)
        self.metrics.started()
        self.shared = Shared(self.settings, self.metrics)
        self.door = Door(self.shared)
        app: Logged | Traced = Logged(self.door, self.settings.log_share)
        self.around = [app.around]
        if self.settings.otlp_endpoint is not None:
            app = Traced(app, tracer_to(self.settings.otlp_endpoint, self.settings.model_name))
            self.around.append(app.around)
        self.server = Server(ServerConfig(app, self.shared), socket.socket(fileno=task.listening))
        self.watchdog = Watchdog(
            self.server.server_state.connections, self.settings.deadline_s, self._answered_too_late
        )
        self.served: Served | None = None
        self.stopped = threading.Event()

    async def run(self) -> None:
        """Load, serve, and write what is to be written."""
        self.watchdog.start()
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin.fileno(), self._supervisor_spoke)
        pulse = loop.create_task(self._pulse())
        loading = loop.create_task(self._load())
        await asyncio.wait([loading], timeout=_LOADING_S)
        await self.server.serve()
        self.stopped.set()
        self.watchdog.stop()
        for task in (pulse, loading):
            task.cancel()
        self.shared.count()
        if self.served is not None:
            self.served.close()

    async def _load(self) -> None:
        """Make the application; what cannot be read is tried again, for somebody may repair it."""
        pause_s = _RETRY_S
        while self.served is None:
            try:
                self.served = await asyncio.to_thread(self._make)
            except (DomloraError, OSError) as error:
                self._not_loaded(str(error).replace(f"{self.settings.bundle.absolute().parent}{os.sep}", ""))
            except Exception:
                _LOG.exception("not loaded")
                self._not_loaded("the model cannot be loaded; the log says why")
            if self.served is None:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONG_RETRY_S)
        self.door.app = self.served.app
        scorer = self.served.scorer
        for around in self.around:
            scorer = None if scorer is None else around(scorer)
        self.shared.scorer = scorer
        gc.collect()
        gc.freeze()  # what is loaded stays: later collections need not look at it
        threading.Thread(target=self._follow, args=(self.served.refresh,), name="follow", daemon=True).start()
        _LOG.info("ready", extra={"fields": {"pid": os.getpid(), "place": self.task.place}})

    def _make(self) -> Served:
        module, _, name = self.task.factory.partition(":")
        made: Served = getattr(importlib.import_module(module), name)(self.settings, self.metrics)
        return made

    def _not_loaded(self, reason: str) -> None:
        if reason != self.door.reason:
            _LOG.error("not ready", extra={"fields": {"reason": reason}})
        self.door.reason = reason

    def _follow(self, refresh: Callable[[], object]) -> None:
        failure = ""
        while not self.stopped.wait(self.settings.poll_s):
            try:
                refresh()
                failure = ""
            except Exception as error:  # what is served stays
                if str(error) != failure:
                    _LOG.exception("not refreshed")
                failure = str(error)

    async def _pulse(self) -> None:
        """Tell that the loop goes on, to the watchdog and now and then to the supervisor; close slow connections."""
        count = 0
        while True:
            self.watchdog.beat()
            self.shared.count()
            if count % 2 == 0:
                self.server.sweep()
            if count % 10 == 0:
                with suppress(OSError):
                    os.write(self.task.beating, b".")
            count += 1
            await asyncio.sleep(BEAT_S)

    def _supervisor_spoke(self) -> None:
        """It never does: its end of the pipe is closed, so it has died."""
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        self.server.drain()

    def _answered_too_late(self, count: int) -> None:
        self.metrics.refused("hung", 504, count)
        self.shared.count()


def _make_room(connections: int) -> None:
    """Have the kernel's table of open files for so many connections now.

    Linux lets a process with threads wait 5 to 15 ms each time that the table doubles, at the 64th, 128th, 256th
    connection: just when many come at once.
    """
    allow_open_files()
    with suppress(ValueError, OSError):
        os.close(fcntl.fcntl(sys.stdin.fileno(), fcntl.F_DUPFD_CLOEXEC, connections + _OTHER_FILES))


def main() -> None:
    """Run the worker that standard input describes."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # the supervisor has blocked what it waits for
    sys.setswitchinterval(_SWITCH_S)
    listener = log_to()
    try:
        worker = _Worker(Task(**json.loads(sys.stdin.buffer.readline())))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(worker.run())
    finally:
        listener.stop()


if __name__ == "__main__":
    main()
