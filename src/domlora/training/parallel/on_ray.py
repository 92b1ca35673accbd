"""Many tasks on a Ray cluster."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from domlora.errors import ConfigError, EngineError, needing

__all__ = ["installed_ray", "join_ray", "on_ray"]

T = TypeVar("T")
R = TypeVar("R")


def on_ray(
    work: Callable[[T], R], tasks: Iterable[T], *, workers: int, tries: int = 3, address: str = ""
) -> Iterator[tuple[T, R | None]]:
    """As :func:`~domlora.training.parallel.processes.in_workers`, as Ray tasks of one core each.

    Ray starts a task again whose worker or machine died.

    Args:
        work: what it needs must be there on all machines: this library, and folders at the same path.
        workers: tasks at a time.
        address: of a cluster, such as ``10.0.0.1:6379`` or ``auto``; without one, Ray is started on this machine and ended
            afterwards. A program that has called ``ray.init`` itself keeps its cluster.

    Raises:
        ConfigError: Ray is not installed, or counts are below 1.
        EngineError: no cluster at the address.
    """
    if min(workers, tries) < 1:
        raise ConfigError("workers and tries must be at least 1", received=(workers, tries))
    ray = installed_ray()
    ours = not ray.is_initialized()
    if ours:
        join_ray(ray, address, workers)
    try:
        yield from _run(ray, work, deque(tasks), workers, tries)
    finally:
        if ours:
            ray.shutdown()


def _run(ray: Any, work: Callable[[T], R], waiting: deque[T], workers: int, tries: int) -> Iterator[tuple[T, R | None]]:
    def call(task: T) -> R:
        return work(task)

    remote = ray.remote(num_cpus=1, max_retries=tries - 1)(call)
    busy: dict[Any, T] = {}
    while waiting or busy:
        while waiting and len(busy) < workers:
            task = waiting.popleft()
            busy[remote.remote(task)] = task
        done, _ = ray.wait(list(busy), num_returns=1)
        for reference in done:
            task = busy.pop(reference)
            try:
                found = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError:  # of the system: worker, machine or memory are gone
                yield task, None
            else:
                yield task, found


def installed_ray() -> Any:
    """Ray, which is imported only by those who use it.

    Raises:
        ConfigError: it is not installed.
    """
    with needing("ray", "Ray"):
        import ray
    return ray


def join_ray(ray: Any, address: str, workers: int, *, log_to_driver: bool = False) -> None:
    """Join the cluster at an address; without one, start Ray on this machine, with so many cores.

    Raises:
        EngineError: no cluster at the address.
    """
    here = {"num_cpus": workers, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}  # for nobody else
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdigit() and "/" not in host:
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself waits for minutes
        ray.init(**({"address": address} if address else here), log_to_driver=log_to_driver)
    except OSError as error:  # Ray's own is one too
        raise EngineError(f"a Ray cluster must be at its address ({error})", received=address) from error
