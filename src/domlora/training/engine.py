"""What runs a training: one process with all rows of each batch, or several that share them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from domlora.evaluation.evaluate import Predictions, predict
from domlora.features.batch import Batch
from domlora.training.rows import Rows

__all__ = ["Engine", "engine", "set_engine"]


class Engine:
    """One process by itself. :class:`domlora.training.distributed.ranks.Ranks` is the other kind.

    Attributes:
        rank: which of the processes this is; the first writes and tells.
        size: how many there are.
        validation_rows: rows that are scored at once.
    """

    rank = 0
    size = 1
    validation_rows = 16384

    def called(self, model: nn.Module, apart: Sequence[nn.Parameter]) -> nn.Module:  # noqa: ARG002
        """What is called in a step instead of the model; :meth:`add_up` sees to the gradients of ``apart``."""
        return model

    def share(self, batch: Batch) -> tuple[Batch, float]:
        """The rows of this process, and by what their mean loss counts in that of the batch."""
        return batch, 1.0

    def begin_step(self, seed: int, step: int) -> None:
        """Before each step: what is random in it."""

    def add_up(self, apart: Sequence[nn.Parameter]) -> None:
        """Make the gradients of these parameters those of the whole batch."""

    def mean(self, value: float) -> float:
        """Of what each process found."""
        return value

    def first_says(self, value: bool) -> bool:
        """What the first process finds, for all to do the same."""
        return value

    def check_same(self, facts: Mapping[str, str]) -> None:
        """See to it that all processes were given the same, fact by fact.

        Raises:
            ConfigError: they were not.
        """

    def say(self, model: nn.Module, data: Rows) -> Predictions:
        """What a model says about the validation split, rows in the order of the data."""
        return predict(model, data.batches("valid", self.validation_rows))


_engine = Engine()


def engine() -> Engine:
    """What runs trainings of this process."""
    return _engine


def set_engine(new: Engine | None) -> None:
    """Say what runs trainings from here on; None for this process by itself."""
    global _engine
    _engine = new or Engine()
