"""The end of a worker whose event loop hangs: who waits is answered, and the process goes.

Scoring runs on the event loop, so a call that does not come back stops everything in this process. Only another thread can
still speak then.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from domlora.serving.http.logs import JsonLines
from domlora.serving.http.protocol import raw_answer

__all__ = ["BEAT_S", "HUNG", "Watchdog"]

BEAT_S = 0.05
HUNG = 75  # the exit code: try again (EX_TEMPFAIL)
_TOO_LATE = raw_answer(504, "the server did not answer in time", "Try again; it has been started anew")
_LAST_WORDS_S = 0.5


class Watchdog(threading.Thread):
    """A thread that ends the process when the event loop has not come by for a deadline.

    The sockets are taken from the event loop before anything is written (their numbers point to ``/dev/null`` from then
    on), so that a loop which wakes up at this very moment cannot write into the same answers.

    Args:
        connections: of the server: the live set of its protocols.
        deadline_s: how long the loop may be away.
        answered: told how many requests were answered 504, for the metrics; it gets half a second.
        end: ends the process, ``os._exit``.
    """

    def __init__(
        self,
        connections: Collection[Any],
        deadline_s: float,
        answered: Callable[[int], None],
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._connections = connections
        self._deadline_s = deadline_s
        self._answered = answered
        self._end = end
        self._beat = time.monotonic()
        self._stopped = threading.Event()

    def beat(self) -> None:
        """Called by the event loop each ``BEAT_S``."""
        self._beat = time.monotonic()

    def stop(self) -> None:
        """The loop ends of its own will."""
        self._stopped.set()

    def run(self) -> None:
        looked = time.monotonic()
        while not self._stopped.wait(BEAT_S):
            now = time.monotonic()
            if now - looked > 10 * BEAT_S:  # this thread was away too: a machine that slept is no loop that hangs
                self._beat = now
            looked = now
            if now - self._beat > self._deadline_s:
                self._finish(now - self._beat)
                return

    def _finish(self, away_s: float) -> None:
        count = _answer_all(self._connections)
        words = threading.Thread(target=self._last_words, args=(count, away_s), daemon=True)
        words.start()  # a thread, for locks that the hanging one may hold
        words.join(_LAST_WORDS_S)
        self._end(HUNG)

    def _last_words(self, count: int, away_s: float) -> None:
        fields = {"pid": os.getpid(), "away_s": round(away_s, 3), "answered_504": count}
        record = logging.makeLogRecord({"msg": "hung", "levelname": "CRITICAL", "fields": fields})
        os.write(
            sys.stderr.fileno(), f"{JsonLines().format(record)}\n".encode()
        )  # the log's own thread has no time left
        self._answered(count)


def _answer_all(connections: Collection[Any]) -> int:
    """Answer 504 to everybody who waits, close the rest; how many were answered."""
    taken = [(connection, sock) for connection in list(connections) if (sock := _take(connection)) is not None]
    return sum(_answer(connection, sock) for connection, sock in taken)


def _take(connection: Any) -> socket.socket | None:
    """The socket of a connection, for this thread alone."""
    with suppress(OSError, AttributeError, ValueError):
        number = connection.transport.get_extra_info("socket").fileno()
        mine = socket.socket(fileno=os.dup(number))
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, number)
        os.close(nothing)
        return mine
    return None


def _answer(connection: Any, sock: socket.socket) -> bool:
    with suppress(OSError):
        sock.setblocking(False)
        came = _drain(sock)
        begun = connection.cycle is not None and connection.cycle.response_started
        if came or (connection.waits() and not (begun and not connection.cycle.response_complete)):
            sock.sendall(_TOO_LATE)
            sock.shutdown(socket.SHUT_WR)
            return True
    return False


def _drain(sock: socket.socket) -> int:
    """Read what has come: closing a socket with unread bytes resets it, and the answer may be lost."""
    came = 0
    with suppress(BlockingIOError):
        while data := sock.recv(1 << 16):
            came += len(data)
            if came > 1 << 24:
                break
    return came
