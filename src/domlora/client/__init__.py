"""A client of a running server: :class:`Client`, and :class:`AsyncClient` with the same methods to be awaited."""

from domlora.client.answers import Adapter, Explained, Inferred, Scored, Taken
from domlora.client.requests import Event
from domlora.client.sending import AsyncClient, Client, UnavailableError

__all__ = [
    "Adapter",
    "AsyncClient",
    "Client",
    "Event",
    "Explained",
    "Inferred",
    "Scored",
    "Taken",
    "UnavailableError",
]
