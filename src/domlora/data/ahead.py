"""Work that a thread does ahead of its reader."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["ahead"]

T = TypeVar("T")
_END: Any = object()


def ahead(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The same items in the same order, up to ``depth`` of them made in advance by a thread.

    An error that making an item raises reaches the reader in its turn. The thread begins when the first item is asked for,
    and ends with the items or when the reader closes or drops this iterator.

    Args:
        items: asked by one thread at a time, so a generator will do.
        depth: finished items that may wait for the reader, at the most.

    Example:
        >>> list(ahead(iter("abc"), depth=2))
        ['a', 'b', 'c']
    """
    worker = ThreadPoolExecutor(1, thread_name_prefix="domlora-ahead")
    try:
        waiting: deque[Future[T]] = deque(worker.submit(next, items, _END) for _ in range(depth))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(worker.submit(next, items, _END))
            yield item
    finally:
        # not waited for: the garbage collector may close this from any thread, the worker's own included
        worker.shutdown(wait=False, cancel_futures=True)
