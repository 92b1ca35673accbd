"""``--track``: what a training verb tells MLflow or TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from domlora.terminal import training_bar

if TYPE_CHECKING:
    from domlora.tracking import Tracker
    from domlora.training.fit import OnProgress

__all__ = ["Track", "TrackTo", "Tracked", "silent", "tracked"]

Track = Annotated[
    str, typer.Option("--track", help="Tell `mlflow` or `tensorboard` of options, curves and bundle versions.")
]
TrackTo = Annotated[
    str,
    typer.Option(
        "--track-to", help="An SQLite file or a server's URI for MLflow (mlflow.db without), a folder for TensorBoard."
    ),
]


@dataclass(frozen=True, slots=True)
class Tracked:
    """A run that is shown and, if asked for, told of.

    Args:
        show: an ``on_progress`` of training.
    """

    show: OnProgress | None
    tracker: Tracker | None

    def wrote(self, folder: Path, version: int = 1, *, default: bool = True) -> None:
        """A version of a bundle; the default one has the alias ``live``."""
        if self.tracker is not None:
            self.tracker.bundle(folder, folder.name, version, ("live",) if default else ("candidate",))


def silent() -> AbstractContextManager[Tracked]:
    """A run that another process shows and tells of."""
    return nullcontext(Tracked(None, None))


@contextmanager
def tracked(
    kind: str, where: str, run_name: str, domains: Sequence[str], options: Callable[[], Mapping[str, Any]]
) -> Iterator[Tracked]:
    """A bar, and a tracker beside it that is told of the options by their dotted names.

    Raises:
        ConfigError: another kind, a library that is not installed, or a place that cannot be reached.
    """
    if not kind:
        with training_bar() as show:
            yield Tracked(show, None)
        return
    from domlora.studies.searching.space import dotted
    from domlora.tracking import Watching, open_tracker

    with open_tracker(kind, where or None, run_name) as tracker, training_bar() as show:  # type: ignore[arg-type]
        tracker.parameters(dotted(options()))
        yield Tracked(Watching(tracker, domains, show), tracker)
