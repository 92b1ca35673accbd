"""Sending requests, and sending them again: the two clients."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar
from urllib.parse import quote

import httpx

from domlora.client import requests
from domlora.client.requests import Call
from domlora.errors import BundleError, ConfigError, DataError, DomloraError, UnknownDomainError

__all__ = ["AsyncClient", "Client", "UnavailableError"]

T = TypeVar("T")
P = ParamSpec("P")
_FIRST_WAIT_S, _SPREAD = 0.1, 0.25
_BUSY = 503
_NOT_TAKEN = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_REASONS: dict[str, type[DomloraError]] = {
    "unknown_domain": UnknownDomainError,
    "not_found": ConfigError,
    "bundle": BundleError,
    "invalid": DataError,
}


class UnavailableError(DomloraError):
    """The server cannot be reached, did not answer in time, or said 5xx; ``status`` is 0 where it said nothing."""

    status = 0


def _now(call: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], T]:
    """A method that sends the request and waits."""

    @wraps(call)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(call(*args, **kwargs))

    return method


def _later(call: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    """A method that sends the request when it is awaited."""

    @wraps(call)
    def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        return self.send(call(*args, **kwargs))

    return method


class _Settings:
    """What both clients are told, and what they make of an answer.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``.
        model: its name in URLs; ``infer`` and ``metadata`` need it.
        token: that admin routes ask for.
        timeout_s: of one try, until the next byte.
        tries: at the most. What is safe to repeat is sent again after a lost connection or a timeout; everything after 503.
        longest_wait_s: between two tries; a Retry-After that is longer ends them.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        token: str | None = None,
        timeout_s: float = 5.0,
        tries: int = 4,
        longest_wait_s: float = 5.0,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError("a server's address must be like http://127.0.0.1:8000", received=url)
        if tries < 1 or timeout_s <= 0:
            raise ConfigError("tries must be at least 1 and timeout_s above 0", received=(tries, timeout_s))
        self.url, self.model = url.rstrip("/"), model
        self._tries, self._longest_wait_s = tries, longest_wait_s
        # probabilities are random bits: compressing them costs the server more than it saves
        headers = {"accept-encoding": "identity"} | ({} if token is None else {"authorization": f"Bearer {token}"})
        self._open({"base_url": self.url, "headers": headers, "timeout": timeout_s})

    def _open(self, options: dict[str, Any]) -> None:
        raise NotImplementedError

    def _request(self, call: Call[Any]) -> dict[str, Any]:
        """What httpx takes."""
        if "{model}" in call.path and self.model is None:
            raise ConfigError("this request needs the name of a model", next_step="Pass model=, such as model='live'")
        path = call.path.replace("{model}", quote(self.model or "", safe=""))
        told = {"method": call.method, "url": path, "headers": call.headers, "content": call.body}
        return {**told, "params": call.query} if call.query else told

    def _wait_s(self, call: Call[Any], attempt: int, found: httpx.Response | httpx.TransportError) -> float | None:
        """How long to wait before the next try; None where there is none, because it is over or would be of no use."""
        if attempt >= (call.tries or self._tries):
            return None
        wait_s = _FIRST_WAIT_S * 2.0 ** (attempt - 1) * random.uniform(0.5, 1.0)
        if isinstance(found, httpx.Response):
            if found.status_code != _BUSY:
                return None
            wait_s = max(wait_s, _retry_after_s(found))
        elif not call.repeatable and not isinstance(found, _NOT_TAKEN):
            return None
        # those who were refused together must not come back together
        return wait_s * random.uniform(1.0, 1.0 + _SPREAD) if wait_s <= self._longest_wait_s else None

    def _meaning(self, call: Call[T], found: httpx.Response | httpx.TransportError) -> T:
        if isinstance(found, httpx.TransportError):
            raise _unreachable(self.url, found) from found
        if found.is_success:
            return call.read(found)
        raise _error_of(call, found)


class Client(_Settings):
    """One server, asked and waited for. Threads may share it.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``.
        model: its name in URLs; ``infer`` and ``metadata`` need it.
        token: that admin routes ask for.
        timeout_s: of one try, until the next byte.
        tries: at the most. What is safe to repeat is sent again after a lost connection or a timeout; everything after 503.
        longest_wait_s: between two tries; a Retry-After that is longer ends them.

    Raises:
        ConfigError: no such address. Methods raise UnavailableError, and what the functions of
            :mod:`domlora.client.requests` say.

    Example:
        >>> with Client("http://127.0.0.1:9", tries=1) as client:
        ...     client.score([{"item": "a"}], domain="toys")
        Traceback (most recent call last):
        domlora.client.sending.UnavailableError: the server must be reachable. Received: 'http://127.0.0.1:9 (ConnectError)'.
    """

    def _open(self, options: dict[str, Any]) -> None:
        self._http = httpx.Client(**options)

    def send(self, call: Call[T]) -> T:
        """Send a request, again if need be, and give what its answer means."""
        request, attempt = self._request(call), 1
        while True:
            found = self._once(request)
            wait_s = self._wait_s(call, attempt, found)
            if wait_s is None:
                return self._meaning(call, found)
            time.sleep(wait_s)
            attempt += 1

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _once(self, request: dict[str, Any]) -> httpx.Response | httpx.TransportError:
        try:
            return self._http.request(**request)
        except httpx.TransportError as error:
            return error

    score, infer, feedback = _now(requests.score), _now(requests.infer), _now(requests.feedback)
    adapters, put_adapter = _now(requests.adapters), _now(requests.put_adapter)
    delete_adapter, set_live = _now(requests.delete_adapter), _now(requests.set_live)
    metadata, health = _now(requests.metadata), _now(requests.health)


class AsyncClient(_Settings):
    """As :class:`Client`, its methods to be awaited.

    Example:
        >>> async def ask() -> None:
        ...     async with AsyncClient("http://127.0.0.1:8000", model="live") as client:
        ...         scored = await client.score([{"item": "a"}], domain="toys", unit="user-7")
        ...         await client.feedback([Event(scored.request_id, row=0)])
    """

    def _open(self, options: dict[str, Any]) -> None:
        self._http = httpx.AsyncClient(**options)

    async def send(self, call: Call[T]) -> T:
        """Send a request, again if need be, and give what its answer means."""
        request, attempt = self._request(call), 1
        while True:
            found = await self._once(request)
            wait_s = self._wait_s(call, attempt, found)
            if wait_s is None:
                return self._meaning(call, found)
            await asyncio.sleep(wait_s)
            attempt += 1

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _once(self, request: dict[str, Any]) -> httpx.Response | httpx.TransportError:
        try:
            return await self._http.request(**request)
        except httpx.TransportError as error:
            return error

    score, infer, feedback = _later(requests.score), _later(requests.infer), _later(requests.feedback)
    adapters, put_adapter = _later(requests.adapters), _later(requests.put_adapter)
    delete_adapter, set_live = _later(requests.delete_adapter), _later(requests.set_live)
    metadata, health = _later(requests.metadata), _later(requests.health)


def _retry_after_s(response: httpx.Response) -> float:
    """As the server says, in seconds; a date is left to the back-off."""
    told = response.headers.get("retry-after", "")
    return float(told) if told.isdigit() else 0.0


def _unreachable(url: str, error: httpx.TransportError) -> UnavailableError:
    late = isinstance(error, httpx.TimeoutException) and not isinstance(error, _NOT_TAKEN)
    rule = "the server must answer in time" if late else "the server must be reachable"
    return UnavailableError(rule, received=f"{url} ({type(error).__name__})")


def _error_of(call: Call[Any], response: httpx.Response) -> DomloraError:
    """The error that an answer means, in the server's words."""
    status = response.status_code
    try:
        told = json.loads(response.content)
        said, next_step = str(told["error"]), str(told.get("next_step", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        told, next_step = {}, ""
        said = f"the server answered {status}: {response.text[:200]!r}"
    if status >= 500:
        failed = UnavailableError(said.removesuffix("."), next_step=next_step)
        failed.status = status
        return failed
    kinds: dict[int, type[DomloraError]] = {401: ConfigError, 403: ConfigError, 404: call.missing, 405: ConfigError}
    kind = _REASONS.get(str(told.get("reason")), kinds.get(status, DataError))
    return kind(said.removesuffix("."), next_step=next_step)
