"""``launch``: another verb on many ranks, which Ray Train places."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from domlora.errors import ConfigError, nearest

__all__ = ["launch"]

_VERBS = ("pretrain", "adapt")


def launch(
    words: Annotated[list[str], typer.Argument(metavar="VERB ...", help="`pretrain` or `adapt` with its options.")],
    workers: Annotated[int, typer.Option("--workers", help="Ranks, of one core each, or one GPU each.")] = 1,
    ray_address: Annotated[
        str, typer.Option("--ray-address", help="Of a Ray cluster, such as auto; without one, Ray starts here.")
    ] = "",
    restarts: Annotated[int, typer.Option("--restarts", help="How often lost ranks are started again.")] = 3,
    storage: Annotated[
        str, typer.Option("--storage", help="Folder that all machines see, for Ray Train's own records.")
    ] = "",
    gpus: Annotated[bool, typer.Option("--gpus", help="Give each rank a GPU.")] = False,
) -> None:
    """Run `pretrain` or `adapt` on many ranks that Ray Train places, as torchrun does without Ray.

    domlora launch --workers 8 --ray-address auto pretrain --data data/week --out base
    """
    from domlora.training.parallel.on_ray_train import on_ray_train

    if words[0] not in _VERBS:
        raise ConfigError(
            "ranks share the work of some verbs alone", received=words[0], next_step=nearest(words[0], _VERBS)
        )
    on_ray_train(
        partial(_run, words), workers=workers, restarts=restarts, address=ray_address, storage=storage, gpus=gpus
    )


def _run(words: list[str]) -> None:
    from domlora.cli.program import app

    app(words, standalone_mode=False)
