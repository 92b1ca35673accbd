"""The same work on many things, in this process or in several."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

__all__ = ["alone", "in_processes"]

T = TypeVar("T")
R = TypeVar("R")


def in_processes(work: Callable[[T], Iterator[R]], tasks: Iterable[T], jobs: int) -> Iterator[R]:
    """What ``work`` gives for each task: one after another here, or ``jobs`` at a time in processes, in any order.

    Args:
        work: a function of a module, so that another process finds it.
    """
    if jobs == 1:
        for task in tasks:
            yield from work(task)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_listed, work, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield from future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Only one process at a time is inside; others wait. However a process ends, it lets go."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _listed(work: Callable[[T], Iterator[R]], task: T) -> list[R]:
    return list(work(task))
