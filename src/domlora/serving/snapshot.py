"""What answers are made of: one version of a model with the adapters that are in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from domlora.features.encode import Encoder
from domlora.serving.program import Program

__all__ = ["Snapshot"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Immutable: a request that took one has the same model from its first row to its last.

    Args:
        program: ids to logits, with the adapters in memory.
        encoder: raw values to ids.
        name: of the model, as URLs have it.
        version: of the bundle, such as ``"3"``.
        adapters: domain to the version of its adapter; those of the export have the bundle's version.
    """

    program: Program
    encoder: Encoder
    name: str
    version: str
    adapters: Mapping[str, str]
    _numbers: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        numbers = {domain: number for number, domain in enumerate(self.program.domains)}
        object.__setattr__(self, "_numbers", numbers)

    def number_of(self, domain: str) -> int | None:
        """The number of a domain in ``program``; None where its adapter is not in memory."""
        return self._numbers.get(domain)

    def logits(self, ids: NDArray[Any], dense: NDArray[Any], domain: NDArray[Any] | int) -> NDArray[np.float32]:
        """The logit of each row; see :class:`~domlora.serving.program.Program`.

        Args:
            ids, dense: the rows.
            domain: each row's number, or one for all of them; -1 for none, which the base answers.
        """
        return self.program(ids, dense, domain)
