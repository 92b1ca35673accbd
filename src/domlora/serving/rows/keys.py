"""What lies under which key in Redis or Valkey, and how it is reached.

dr:tables            a hash: the sha256 of a table to what is known of it, JSON, see :class:`Told`
dr:SHA:N             row N of it, float32; SHA are the first 16 digits
dr:SHA:changed       of a table pushed after another: the numbers of the rows that it holds, int64
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from domlora.errors import BundleError, ConfigError, DataError, needing
from domlora.serving.rows.layout import Rows

__all__ = ["TABLES", "Told", "answering", "changed_key", "changed_rows", "connect", "keys_of", "prefix_of", "told_of"]

TABLES = "dr:tables"


class Told(NamedTuple):
    """A table in the store.

    Args:
        name: of it, for whoever looks.
        num_rows, width: its shape.
        complete: whether all of it is there.
        pushed: rows that are there, when it is not complete.
        after: the sha256 of the table that holds the rows which did not change.
        pieces: then ``(row there, row here, rows)``, in order of the second.
    """

    name: str
    num_rows: int
    width: int
    complete: bool = False
    pushed: int = 0
    after: str | None = None
    pieces: Sequence[Sequence[int]] = ()

    def to_json(self) -> str:
        """As it is kept."""
        return json.dumps(self._asdict())


def connect(url: str, timeout_s: float) -> Any:
    """A client that answers or fails within the time. A connection that was closed meanwhile is opened anew, once.

    Raises:
        ConfigError: no such address, or the client library is not installed.
    """
    with needing("rows", "a table in Redis or Valkey"):
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    once: Any = Retry(NoBackoff(), 1, (redis.ConnectionError,))
    times = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    try:
        return redis.Redis.from_url(url, retry=once, **times)
    except ValueError as error:
        raise ConfigError(
            f"rows must have an address that Redis clients know ({error})",
            received=url.rpartition("@")[2],
            next_step="Pass redis://HOST:PORT/0, rediss://... or unix:///PATH",
        ) from error


@contextmanager
def answering(client: Any) -> Iterator[None]:
    """Close the client at the end, and say what is wrong as an error of the user's.

    Raises:
        DataError: the store does not answer, or refuses.
    """
    import redis

    try:
        yield
    except (redis.RedisError, OSError) as error:
        raise DataError("the store of rows must answer", received=f"{type(error).__name__}: {error}") from error
    finally:
        client.close()


def keys_of(sha256: str, numbers: Iterable[int]) -> list[bytes]:
    """The keys of rows.

    >>> keys_of("0123456789abcdef" * 4, [7])
    [b'dr:0123456789abcdef:7']
    """
    prefix = prefix_of(sha256)
    return [b"%b%d" % (prefix, number) for number in numbers]


def prefix_of(sha256: str) -> bytes:
    """What the keys of a table's rows begin with."""
    return f"dr:{sha256[:16]}:".encode()


def changed_key(sha256: str) -> str:
    """The key of the numbers of rows that a table holds."""
    return f"dr:{sha256[:16]}:changed"


def told_of(client: Any, sha256: str) -> Told | None:
    """What the store says of a table; None if it knows none.

    Raises:
        BundleError: what it says is not of this form.
    """
    text = client.hget(TABLES, sha256)
    try:
        return None if text is None else Told(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise BundleError("what the store says of a table must be whole", received=sha256[:16]) from error


def changed_rows(client: Any, sha256: str) -> Rows:
    """The numbers of the rows that a table pushed after another holds.

    Raises:
        BundleError: they are not there.
    """
    content = client.get(changed_key(sha256))
    if content is None:
        raise BundleError("the numbers of changed rows are not in the store", received=sha256[:16])
    return np.frombuffer(content, np.int64)
