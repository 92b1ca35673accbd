"""The same work on many things, in this process or in several."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from domlora.errors import EngineError
from domlora.training.parallel.processes import in_workers

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
    for task, found in in_workers(partial(_listed, work), tasks, workers=jobs, tries=1):
        if found is None:
            raise EngineError(
                "a process must live until its work is done", received=str(task), next_step="Run fewer jobs at a time"
            )
        yield from found


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
