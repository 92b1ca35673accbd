"""Rows that were asked for lately, in this process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

__all__ = ["Cache"]

_OVERHEAD = 190  # bytes of a row beside its numbers: the objects and their place in the dictionary, as measured


class Cache:
    """The rows used last, up to a number of bytes. Rows never change, so none has to be taken back. For many threads.

    Args:
        size_bytes: of memory; 0 for no cache.

    Example:
        >>> cache = Cache(440)
        >>> cache.put([(1, b"one"), (2, b"two")])
        >>> cache.get([1]), cache.put([(3, b"three")])
        ([b'one'], None)
        >>> cache.get([1, 2, 3])
        [b'one', None, b'three']
    """

    def __init__(self, size_bytes: int) -> None:
        self._most, self.size_bytes = size_bytes, 0
        self._rows: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, codes: Sequence[int]) -> list[bytes | None]:
        """The rows of these codes, None for those that are not here."""
        with self._lock:
            found = [*map(self._rows.get, codes)]
            use = self._rows.move_to_end
            for code, row in zip(codes, found, strict=True):
                if row is not None:
                    use(code)
        return found

    def put(self, rows: Iterable[tuple[int, bytes]]) -> None:
        """Keep these rows; those unused for longest make room."""
        if not self._most:
            return
        with self._lock:
            for code, row in rows:
                if code not in self._rows:
                    self.size_bytes += len(row) + _OVERHEAD
                    self._rows[code] = row
            while self.size_bytes > self._most:
                _, gone = self._rows.popitem(last=False)
                self.size_bytes -= len(gone) + _OVERHEAD
