"""Where the figures of a run go beside the screen: MLflow or TensorBoard, by one small interface.

Tracking may never cost a run: what fails after the start is told once, as a warning, and the run goes on untracked. What
fails at the start is an error, because nothing is lost yet.
"""

from __future__ import annotations

import math
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, get_args

from domlora.errors import ConfigError, DomloraError, nearest, needing
from domlora.evaluation.evaluate import Predictions, Table, by_domain

if TYPE_CHECKING:
    from domlora.training.progress import Fit, OnProgress, Progress

__all__ = ["Tracker", "TrackerKind", "Watching", "log_fit", "log_table", "open_tracker"]

TrackerKind = Literal["mlflow", "tensorboard"]

_MOST_AT_ONCE = 1000  # figures that MLflow takes in one call


class Tracker(Protocol):
    """A run as a tracking system sees it; a context manager that closes it."""

    def parameters(self, values: Mapping[str, Any]) -> None:
        """What the run was given: a flat mapping."""
        ...

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        """One more point of each of these curves; those that are no finite numbers are left out."""
        ...

    def artefact(self, path: Path) -> None:
        """A file or folder that the run wrote."""
        ...

    def bundle(self, folder: Path, name: str, version: int, aliases: Sequence[str] = ()) -> None:
        """A version of a bundle, under the name of a model; an alias is taken from the version that had it."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """The run has ended."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


def open_tracker(kind: TrackerKind, where: str | Path | None, run_name: str) -> Tracker:
    """Begin a run.

    Args:
        kind: ``mlflow`` or ``tensorboard``; both are extras of this package.
        where: of MLflow an SQLite file (``mlflow.db`` without one) or the URI of a server, of TensorBoard a folder
            (``tensorboard`` without one).
        run_name: for people; MLflow tells runs of one name apart, TensorBoard draws them as one.

    Raises:
        ConfigError: another kind, a library that is not installed, or a place that cannot be written or reached.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, open_tracker("tensorboard", folder, "base") as tracker:
        ...     tracker.figures(1, {"valid/wauc": 0.7})
    """
    if kind not in get_args(TrackerKind):
        raise ConfigError("unknown kind of tracking", received=kind, next_step=nearest(kind, get_args(TrackerKind)))
    opened: Callable[[str | Path | None, str], Tracker] = _MLflow if kind == "mlflow" else _TensorBoard
    try:
        with needing(kind, f"tracking with {kind}"):
            return _Careful(opened(where, run_name))
    except DomloraError:
        raise
    except Exception as error:  # each system has errors of its own
        raise ConfigError(f"tracking must be able to start ({error})", received=str(where or kind)) from error


def log_fit(tracker: Tracker, found: Fit, prefix: str = "") -> None:
    """All validations of a training that has ended, and its best."""
    for step, entry in enumerate(found.history):
        tracker.figures(step, {f"{prefix}{name}": value for name, value in entry.items()})
    best = {"best_value": found.best_value, "best_epoch": found.best_epoch, "seconds": found.seconds}
    tracker.figures(len(found.history), {f"{prefix}{name}": value for name, value in best.items()})


def log_table(tracker: Tracker, table: Table, step: int = 0, prefix: str = "") -> None:
    """Totals as ``wauc``, ``log_loss``, ...; each domain's as ``domain/NAME/auc``, ``.../log_loss``, ``.../pcoc``, ..."""
    values = {f"{prefix}{name}": value for name, value in table.summary.items()}
    for number, row in enumerate(table.domains):
        name = _as_key(row.name, number)
        figures = {key: value for key, value in asdict(row).items() if key != "name"}
        values |= {f"{prefix}domain/{name}/{key}": float(value) for key, value in figures.items()}
    tracker.figures(step, values)


class Watching:
    """An ``on_progress`` of ``fit`` that tells a tracker of each validation: its figures, and those of each domain.

    A method that trains one fit after another gives curves whose names begin with ``2.``, ``3.``, ... from the second on. A
    fit that goes on from a checkpoint gives its figures from the start; those of each domain begin where it goes on.

    Args:
        tracker: told of validations; its runs are not closed.
        domains: names, ``schema.domains``.
        then: called with each progress, such as a bar on the screen.
    """

    def __init__(self, tracker: Tracker, domains: Sequence[str], then: OnProgress | None = None) -> None:
        self.tracker, self.domains, self.then = tracker, domains, then
        self.history: list[dict[str, float]] = []
        self.fits = self.told = 0

    def __call__(self, progress: Progress) -> None:
        """Pass it on."""
        if self.then is not None:
            self.then(progress)

    def validated(self, history: list[dict[str, float]], said: Predictions) -> None:
        """Tell of what is new."""
        if history is not self.history:
            self.history, self.fits, self.told = history, self.fits + 1, 0
        prefix = "" if self.fits == 1 else f"{self.fits}."
        for step in range(self.told, len(history)):
            self.tracker.figures(step, {f"{prefix}{name}": value for name, value in history[step].items()})
        self.told = len(history)
        log_table(self.tracker, by_domain(said, self.domains), self.told - 1, f"{prefix}valid/")


def _as_key(name: str, number: int) -> str:
    """A domain's name in the letters that every system takes; where that changes it, with its number, so it stays unique."""
    plain = re.sub(r"[^A-Za-z0-9_\-. ]", "_", name)[:100]
    return plain if plain == name and plain.strip(". ") else f"{plain.strip('. ')}-{number}"


class _Careful(Tracker):
    """A tracker that warns once when it fails, and from then on does nothing."""

    def __init__(self, inner: Tracker) -> None:
        self.inner, self.failed = inner, False

    def parameters(self, values: Mapping[str, Any]) -> None:
        self.tried(self.inner.parameters, values)

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        self.tried(self.inner.figures, step, {name: float(v) for name, v in values.items() if math.isfinite(v)})

    def artefact(self, path: Path) -> None:
        self.tried(self.inner.artefact, path)

    def bundle(self, folder: Path, name: str, version: int, aliases: Sequence[str] = ()) -> None:
        self.tried(self.inner.bundle, folder, name, version, aliases)

    def close(self, *, failed: bool = False) -> None:
        self.tried(partial(self.inner.close, failed=failed))

    def tried(self, call: Callable[..., None], *values: Any) -> None:
        if self.failed:
            return
        try:
            call(*values)
        except Exception as error:
            self.failed = True
            warnings.warn(f"tracking has failed, and the run goes on without it: {error}", stacklevel=4)


class _MLflow(Tracker):
    """A run of the experiment ``domlora``. Its statistics of use, which it sends home, are off unless the user set them."""

    def __init__(self, where: str | Path | None, run_name: str) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        place = None if "://" in str(where) else Path(where or "mlflow.db").absolute()
        uri = str(where) if place is None else f"sqlite:///{place}"
        self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        found = self.client.get_experiment_by_name("domlora")
        if found is None:
            artefacts = None if place is None else (place.parent / "mlruns").as_uri()
            number = self.client.create_experiment("domlora", artifact_location=artefacts)
        else:
            number = found.experiment_id
        self.run = self.client.create_run(number, run_name=run_name).info

    def parameters(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            self.client.log_param(self.run.run_id, name, value)

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(name, value, now, step) for name, value in values.items()]
        for first in range(0, len(points), _MOST_AT_ONCE):
            self.client.log_batch(self.run.run_id, metrics=points[first : first + _MOST_AT_ONCE])

    def artefact(self, path: Path) -> None:
        self.client.log_artifact(self.run.run_id, str(path))

    def bundle(self, folder: Path, name: str, version: int, aliases: Sequence[str] = ()) -> None:
        from mlflow.exceptions import MlflowException

        place = f"{name}@{version}"
        self.client.log_artifacts(self.run.run_id, str(folder), place)
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source, tags = f"{self.run.artifact_uri}/{place}", {"domlora.version": str(version)}
        made = self.client.create_model_version(name, source, self.run.run_id, tags=tags)
        for alias in aliases:
            self.client.set_registered_model_alias(name, alias, made.version)

    def close(self, *, failed: bool = False) -> None:
        self.client.set_terminated(self.run.run_id, "FAILED" if failed else "FINISHED")


class _TensorBoard(Tracker):
    """Event files in a folder a run. It keeps no files and no versions: those are told as text."""

    def __init__(self, where: str | Path | None, run_name: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(Path(where or "tensorboard") / run_name))

    def parameters(self, values: Mapping[str, Any]) -> None:
        lines = [f"| {name} | {value} |" for name, value in values.items()]
        self.text("parameters", "\n".join(["| parameter | value |", "| --- | --- |", *lines]))

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def artefact(self, path: Path) -> None:
        self.text("artefacts", str(path))

    def bundle(self, folder: Path, name: str, version: int, aliases: Sequence[str] = ()) -> None:
        self.text(f"bundle/{name}", f"version {version} in {folder}" + "".join(f", {alias}" for alias in aliases))

    def text(self, name: str, value: str) -> None:
        self.writer.add_text(name, value)
        self.writer.flush()

    def close(self, *, failed: bool = False) -> None:  # noqa: ARG002 - event files know no end
        self.writer.close()
