"""Rows into Redis or Valkey: all of a table, or those that an update changed. Needs ``redis``, and no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domlora.errors import ConfigError
from domlora.serving.delta import difference
from domlora.serving.rows.folder import RowsFolder
from domlora.serving.rows.keys import TABLES, Told, answering, changed_key, changed_rows, connect, keys_of, told_of
from domlora.serving.rows.layout import Rows

__all__ = ["Pushed", "drop", "listed", "push"]

_CHUNK = 4096  # rows that are sent at once
_TIMEOUT_S = 30.0
_DEEPEST = 8  # tables that hold each other's rows; more cost more at each lookup


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was done for a table.

    Args:
        name: of it.
        sha256: of its rows.
        num_rows: it has.
        sent: now; 0 where the store had all.
        after: the table that holds the others.
    """

    name: str
    sha256: str
    num_rows: int
    sent: int
    after: str | None


def push(rows: RowsFolder, url: str, after: RowsFolder | None = None) -> list[Pushed]:
    """Put the rows of an export into the store. Done twice, it does nothing; stopped, it goes on where it was.

    What servers read meanwhile does not change: a table of other numbers has other keys. Nothing expires.

    Args:
        rows: what ``export`` wrote beside the folder.
        url: of the store.
        after: the rows of the version before, which the store has: then only rows that changed are sent, if they are less
            than half and no more than 8 tables then hold each other's rows.

    Raises:
        BundleError: rows are damaged.
        ConfigError: no such store, or one that throws rows away when it is full.
    """
    client = connect(url, _TIMEOUT_S)
    with answering(client):
        _check_keeps(client)
        return [_push_one(client, rows, name, after) for name in rows.tables]


def listed(url: str) -> dict[str, Told]:
    """The tables in the store, by their sha256.

    Raises:
        ConfigError: no such store.
    """
    client = connect(url, _TIMEOUT_S)
    with answering(client):
        names = sorted(each.decode() for each in client.hkeys(TABLES))
        found = {name: told_of(client, name) for name in names}
    return {name: told for name, told in found.items() if told is not None}


def drop(sha256: str, url: str) -> int:
    """Remove a table that no version served any more needs; the number of its rows.

    Args:
        sha256: its first digits.
        url: of the store.

    Raises:
        ConfigError: no such store or table, or another table needs its rows.
    """
    known = listed(url)
    found = [name for name in known if name.startswith(sha256)]
    if len(found) != 1 or not sha256:
        raise ConfigError("the digits must be those of one table", received=sha256, next_step=f"Known: {_short(known)}")
    needed = [name for name, told in known.items() if told.after == found[0]]
    if needed:
        raise ConfigError("another table needs these rows", received=sha256, next_step=f"Drop first: {_short(needed)}")
    client = connect(url, _TIMEOUT_S)
    with answering(client):
        return _drop_one(client, found[0], known[found[0]])


def _push_one(client: Any, rows: RowsFolder, name: str, after: RowsFolder | None) -> Pushed:
    place, content = rows.tables[name], rows.rows(name)
    told = told_of(client, place.sha256)
    if told is not None and told.complete:
        return Pushed(name, place.sha256, place.num_rows, 0, told.after)
    rows.verify(name)
    told, changed = _plan(client, rows, name, after, told)
    count = len(changed) if changed is not None else place.num_rows
    sent = 0
    if changed is not None:
        client.set(changed_key(place.sha256), np.ascontiguousarray(changed, np.int64).tobytes())
    for start in range(told.pushed, count, _CHUNK):
        end = min(start + _CHUNK, count)
        numbers = np.arange(start, end) if changed is None else changed[start:end]
        told = told._replace(pushed=end)
        with client.pipeline(transaction=True) as pipe:  # what is said to be there is there
            pipe.mset(dict(zip(keys_of(place.sha256, numbers.tolist()), _values(content[numbers]), strict=True)))
            pipe.hset(TABLES, place.sha256, told.to_json())
            pipe.execute()
        sent += end - start
    client.hset(TABLES, place.sha256, told._replace(complete=True).to_json())
    return Pushed(name, place.sha256, place.num_rows, sent, told.after)


def _plan(
    client: Any, rows: RowsFolder, name: str, after: RowsFolder | None, told: Told | None
) -> tuple[Told, Rows | None]:
    """What will be told of the table, and which rows are sent; None for all. One that was begun whole is ended so."""
    place = rows.tables[name]
    whole = Told(name, place.num_rows, place.width)
    if told is not None and told.after is None:
        return told, None
    before = None if after is None else after.tables.get(name)
    if after is None or before is None or before.width != place.width or not _room_after(client, before.sha256):
        return whole, None
    pieces, changed, _ = difference(_bytes(after.rows(name)), _bytes(rows.rows(name)))
    if not pieces or len(changed) > place.num_rows // 2:
        return whole, None
    done = told.pushed if told is not None and told.after == before.sha256 else 0
    return whole._replace(after=before.sha256, pieces=pieces, pushed=done), changed.astype(np.int64)


def _room_after(client: Any, sha256: str) -> bool:
    """Whether a table is there whole, and few others stand below it."""
    for _ in range(_DEEPEST - 1):
        told = told_of(client, sha256)
        if told is None or not told.complete:
            return False
        if told.after is None:
            return True
        sha256 = told.after
    return False


def _drop_one(client: Any, sha256: str, told: Told) -> int:
    client.hset(TABLES, sha256, told._replace(complete=False, pushed=0).to_json())
    numbers = np.arange(told.num_rows) if told.after is None else changed_rows(client, sha256)
    for start in range(0, len(numbers), _CHUNK):
        client.unlink(*keys_of(sha256, numbers[start : start + _CHUNK].tolist()))
    client.unlink(changed_key(sha256))
    client.hdel(TABLES, sha256)
    return len(numbers)


def _values(rows: NDArray[np.float32]) -> Iterator[bytes]:
    content, size = np.ascontiguousarray(rows).tobytes(), rows.shape[1] * 4
    return (content[start : start + size] for start in range(0, len(content), size))


def _bytes(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    return rows.view(np.uint8).reshape(len(rows), -1)


def _check_keeps(client: Any) -> None:
    memory = client.info("memory")
    policy = str(memory.get("maxmemory_policy", "noeviction"))
    if memory.get("maxmemory", 0) and policy.startswith("allkeys"):
        raise ConfigError(
            "a store of rows must not throw rows away when it is full",
            received=f"maxmemory-policy {policy}",
            next_step="Set maxmemory-policy to noeviction",
        )


def _short(names: Any) -> str:
    return ", ".join(name[:16] for name in names) or "none"
