"""Ranks of one training, placed and watched by Ray Train: what torchrun does, on a Ray cluster."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from domlora.errors import ConfigError, DomloraError, EngineError
from domlora.training.parallel.on_ray import installed_ray, join_ray

__all__ = ["on_ray_train"]

R = TypeVar("R")


def on_ray_train(
    work: Callable[[], R],
    *,
    workers: int,
    restarts: int = 3,
    address: str = "",
    storage: str = "",
    gpus: bool = False,
) -> R:
    """Run ``work`` on each of some workers that are the ranks of one process group; gives what the first one returns.

    Args:
        work: such as a training inside :func:`~domlora.training.distributed.ranks.joined`. This library and folders at the
            same paths must be on all machines.
        workers: ranks, of one core each, or one GPU each.
        restarts: how often all ranks are started again when one was lost; ``work`` then goes on from its checkpoint. Not
            where one is lost in its first second: Ray Train takes that for an error of its own.
        address: as :func:`~domlora.training.parallel.on_ray.on_ray` has it.
        storage: a folder that all machines see, for Ray Train's own records; one of this machine's without.
        gpus: give each rank a GPU and use NCCL, else gloo.

    Raises:
        ConfigError: Ray is not installed, or there are fewer than one rank.
        DomloraError: what a rank raised.
        EngineError: no cluster at the address, or ranks were lost more often than ``restarts``.
    """
    if workers < 1 or restarts < 0:
        raise ConfigError("workers must be at least 1 and restarts at least 0", received=(workers, restarts))
    ray, ours = installed_ray(), False
    if not ray.is_initialized():
        join_ray(ray, address, workers, log_to_driver=True)
        ours = True
    try:
        with tempfile.TemporaryDirectory(prefix="domlora-ray-") as here:
            return _fitted(work, workers, restarts, storage or here, gpus)
    finally:
        if ours:
            ray.shutdown()


def _fitted(work: Callable[[], R], workers: int, restarts: int, storage: str, gpus: bool) -> R:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    folder = os.getcwd()

    def rank() -> R:
        with suppress(FileNotFoundError):
            os.chdir(folder)  # paths mean what they mean to whoever started it
        return work()

    trainer = TorchTrainer(
        rank,
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus),
        run_config=RunConfig(storage_path=storage, failure_config=FailureConfig(max_failures=restarts)),
    )
    try:
        found: R = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _told(error) from error
    return found


def _told(error: Any) -> DomloraError:
    """What one of the ranks said, or that ranks were lost."""
    failures = dict(getattr(error, "worker_failures", {}))
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, DomloraError):
                return cause
            cause = getattr(cause, "base_exc", None) or cause.__cause__
    last = str(error).strip().splitlines()[-1].split(". ")[0]
    return EngineError("ranks must live until the training has ended", received=last)
