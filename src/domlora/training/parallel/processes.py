"""Many tasks in local processes, each of which may die without harm to the others."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from typing import Any, TypeVar

from domlora.errors import ConfigError

__all__ = ["in_workers"]

T = TypeVar("T")
R = TypeVar("R")


def in_workers(
    work: Callable[[T], R], tasks: Iterable[T], *, workers: int, tries: int = 3
) -> Iterator[tuple[T, R | None]]:
    """What ``work`` gives for each task, in the order in which they end, ``workers`` at a time.

    Each worker is a pool of one process, so that a process that dies (out of memory, ``kill -9``) names the task it was at.
    That one is tried again by another. If this process dies, however it does, its workers end too.

    Args:
        work: a function of a module, so that another process finds it. What it raises is raised here and ends all.
        tries: workers that a task may take with it before it is given up: then its result is None.

    Raises:
        ConfigError: counts below 1.

    Example:
        >>> import math
        >>> sorted(in_workers(math.factorial, [3, 4], workers=2))
        [(3, 6), (4, 24)]
    """
    if min(workers, tries) < 1:
        raise ConfigError("workers and tries must be at least 1", received=(workers, tries))
    waiting = deque((task, tries) for task in tasks)
    idle = [_worker() for _ in range(min(workers, len(waiting)))]
    busy: dict[Future[R], tuple[ProcessPoolExecutor, T, int]] = {}
    try:
        while waiting or busy:
            while waiting and idle:
                worker, (task, left) = idle.pop(), waiting.popleft()
                busy[worker.submit(work, task)] = worker, task, left
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                worker, task, left = busy.pop(future)
                try:
                    found = future.result()
                except BrokenProcessPool:
                    worker.shutdown(wait=False)
                    worker = _worker()
                    if left > 1:
                        waiting.appendleft((task, left - 1))
                    else:
                        yield task, None
                else:
                    yield task, found
                idle.append(worker)
    finally:
        for worker in (*idle, *(worker for worker, _, _ in busy.values())):
            worker.shutdown(wait=False, cancel_futures=True)


def _worker() -> ProcessPoolExecutor:
    """Forked off a server that has imported the library: a new process is there at once, and shares its code."""
    context: Any = get_context("forkserver")
    context.set_forkserver_preload(["domlora.training.parallel.worker"])
    return ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """A pool's process waits for work for ever if its parent is killed."""
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)
