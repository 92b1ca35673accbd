"""A run that goes wrong: found within one step, and told with the batch it happened on."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from domlora.errors import EngineError
from domlora.features.batch import Batch
from domlora.features.schema import Schema

__all__ = ["Place", "check_finite", "explodes", "lost_in"]

_BOUND, _FACTOR = 50.0, 100.0


class Place(NamedTuple):
    """A batch of a run: ``epoch`` and ``batch`` of it count from 0 as seeds do, ``step`` over all epochs."""

    epoch: int
    batch: int
    step: int

    def __str__(self) -> str:
        return f"step {self.step} (epoch {self.epoch}, batch {self.batch} of it)"


def explodes(loss: float, usual: float) -> bool:
    """Whether a loss is not finite, or above 50 and 100 times the usual one.

    A model that knows nothing has a loss of 0.7 where clicks are as frequent as none; weights of rows, or dense columns that
    nobody scaled, may make a loss of hundreds, which then is the usual one.

    Args:
        usual: mean of the steps before; NaN where there is none.

    Example:
        >>> explodes(0.7, math.nan), explodes(300.0, 250.0), explodes(300.0, 0.5), explodes(math.nan, 0.5)
        (False, False, True, True)
    """
    return not math.isfinite(loss) or (loss > _BOUND and loss > _FACTOR * usual)


def lost_in(place: Place, loss: float, usual: float, model: nn.Module, batch: Batch, schema: Schema) -> EngineError:
    """The error of a loss that explodes. Reads every weight: the run has ended."""
    rule = "must be finite" if not math.isfinite(loss) else f"must not explode (the mean before was {usual:.4g})"
    odd = "; ".join(_odd_in(model, batch, schema))
    return EngineError(
        f"the loss of {place} {rule}{': ' if odd else ''}{odd}",
        received=loss,
        next_step="Lower the learning rate, or look at these rows; a checkpoint holds the state before",
    )


def check_finite(tensors: Mapping[str, Tensor], place: Place, infinite: Collection[str] = ()) -> None:
    """Refuse weights and moments that are no numbers any more, before they are kept.

    One sum a tensor, which is not finite if an element is not: the cost of reading it once.

    Args:
        tensors: by name, a part of the run before the first ``/``.
        place: the step before which they were made.
        infinite: names, without their part, that may hold infinities, as masks do; NaN is refused there too.

    Raises:
        EngineError: which of them.
    """
    bad = [name for name, tensor in tensors.items() if _is_bad(tensor, name.partition("/")[2] in infinite)]
    if bad:
        raise EngineError(
            f"weights must be finite before {place}",
            received=", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if bad[5:] else ""),
            next_step="Lower the learning rate; a checkpoint holds the state before",
        )


def _is_bad(tensor: Tensor, infinite: bool) -> bool:
    if not tensor.is_floating_point():
        return False
    if infinite:
        return bool(tensor.isnan().any())
    # of numbers so large that only their sum is infinite, each is asked
    return not math.isfinite(tensor.detach().sum().item()) and not bool(tensor.isfinite().all())


def _odd_in(model: nn.Module, batch: Batch, schema: Schema) -> Iterator[str]:
    """What could be the reason: numbers of the batch, else weights that the steps before broke."""
    names = [f.name for f in schema.numeric for _ in range(f.num_dense)]
    found = False
    for name, column in zip(names, batch.dense.unbind(1), strict=False):
        if _is_bad(column, False):
            found = True
            yield _told(f"dense feature {name!r}", column, ~column.isfinite())
    for name, values in (("label", batch.label), ("weight", batch.weight)):
        if values is not None and _is_bad(values, False):
            found = True
            yield _told(f"the {name}", values, ~values.isfinite())
    broken = [name for name, p in model.named_parameters() if _is_bad(p, False)]
    if broken:
        yield f"weights that the steps before broke: {', '.join(broken[:5])}"
    elif not found and batch.dense.numel():
        row, place = divmod(int(batch.dense.abs().argmax()), batch.dense.shape[1])
        name = names[place] if place < len(names) else str(place)
        yield f"the largest dense value is {float(batch.dense[row, place]):.4g}, feature {name!r} of row {row}"


def _told(what: str, values: Tensor, mask: Tensor) -> str:
    row = int(mask.nonzero()[0])
    return f"{what} is not finite in {int(mask.sum())} of {len(values)} rows, the first is {float(values[row])} in row {row}"
