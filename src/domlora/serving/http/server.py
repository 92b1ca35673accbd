"""What runs in a worker: uvicorn's server on a shared socket, and the application that says whether it is ready."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
import time
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from domlora.serving.http.logs import App, Receive, Scope, Send
from domlora.serving.http.protocol import Protocol, ServerConfig, Shared

__all__ = ["Door", "Server"]

_NO_FILES_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE_S = 0.1
_MANY = 32
_LAST_S = 0.1  # for who came in the last moment
_ALL_CLOSED_S = 0.3  # within which all workers have stopped to listen


class Door:
    """The application of a process: says whether it lives and is ready, and lets everything else through.

    Args:
        shared: of the connections.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.app: App | None = None
        self.reason = "the model is being loaded"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/v2/health/live":
            await _say(send, 200, {"live": True})
        elif self.app is None:
            await _say(send, 503, {"error": self.reason, "next_step": "Try again when /v2/health/ready is 200"})
        elif self._shared.draining and path == "/v2/health/ready":
            await _say(send, 503, {"error": "the server is shutting down", "next_step": "Ask another one"})
        else:
            await self.app(scope, receive, send)


class Server(uvicorn.Server):
    """uvicorn's server on a socket that workers share: whoever is idle accepts.

    Args:
        config: with what connections share.
        listening: bound and listening.
    """

    def __init__(self, config: ServerConfig, listening: socket.socket) -> None:
        super().__init__(config)
        self._shared = config.shared
        self._listening = listening
        self._accepting: set[asyncio.Task[Any]] = set()
        self._exit_at = float("inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - we have our own
        await super().startup(sockets=[])
        self._listening.setblocking(False)
        self._listen()

    async def on_tick(self, counter: int) -> bool:
        if time.monotonic() >= self._exit_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002
        """Stop to listen, and only then send clients away: one that comes back while another worker stops would be lost."""
        asyncio.get_running_loop().remove_reader(self._listening.fileno())
        until = time.monotonic() + _LAST_S
        while self._accept() and time.monotonic() < until:
            await asyncio.sleep(0)
        self._listening.close()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        if self.server_state.connections:
            await asyncio.sleep(_ALL_CLOSED_S)
        self._shared.closing = True
        await super().shutdown(sockets=[])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to drain, another one ends at once."""
        if self._shared.draining:
            super().handle_exit(sig, frame)
            self._captured_signals.clear()  # uvicorn raises them again, and the exit code would not be 0
            self.should_exit = self.force_exit = True
        self.drain()

    def drain(self) -> None:
        """Be not ready from now on, and end after ``drain_s``."""
        self._shared.draining = True
        self._exit_at = min(self._exit_at, time.monotonic() + self._shared.settings.drain_s)

    def sweep(self) -> None:
        """Close the connections of slow clients."""
        now = time.perf_counter()
        for connection in list(self.server_state.connections):
            connection.sweep(now)  # type: ignore[union-attr]

    def _listen(self) -> None:
        if self._listening.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listening.fileno(), self._accept_some)

    def _accept_some(self) -> None:
        """One, so that other idle workers get theirs; many where all are busy, whose passes take milliseconds."""
        most = _MANY if self._shared.admission.going else 1
        while most and self._accept():
            most -= 1

    def _accept(self) -> bool:
        loop = asyncio.get_running_loop()
        try:
            sock, _ = self._listening.accept()
        except OSError as error:
            if error.errno in _NO_FILES_LEFT:  # the connection waits; look again later and not at once
                loop.remove_reader(self._listening.fileno())
                loop.call_later(_PAUSE_S, self._listen)
            return False  # else another worker was faster
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        make = partial(Protocol, self.config, self.server_state, {})
        task = loop.create_task(loop.connect_accepted_socket(make, sock))
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)
        return True


async def _say(send: Send, status: int, what: dict[str, Any]) -> None:
    body = json.dumps(what).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
