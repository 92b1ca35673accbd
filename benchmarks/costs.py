"""What a training step costs, counted: products, bytes of rows, messages; and constants that turn counts into seconds.

Pure: no clock, no process. ``scale.py`` measures, fits and plans with it; docs/scale.md is what came of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

__all__ = ["TERMS", "UNITS", "Shape", "counts", "fit", "memory", "parameters", "seconds"]

FLOAT, INT = 4, 8  # bytes
ADAM_MOMENTS, GLOO_MESSAGES = 2, 5
SHARD_COPIES = 1.9
"""Of a rank's rows when it starts: the most that docs/tables.md has."""
CACHE_BYTES = 32 << 20
"""Of a processor: adapters with their moments that fit it cost nothing to stream."""
EMBEDDING_PASSES, UNIT_PASSES, DENSE_PASSES = 8, 10, 7
"""How often a number of an embedded row, of a unit's output and of a dense weight is read or written in a step."""
GATHER_PASSES, SUM_PASSES, MOVE_PASSES = 5, 2, 12
"""The same of a table's row: for each id (read, put together, its gradient, twice to be added up); for each id that came
from the other ranks; for each distinct row (weight and two moments are copied out, moved and copied back)."""

TERMS = (
    "steps",
    "adapted_layers",
    "flops",
    "streamed_bytes",
    "ids",
    "row_bytes",
    "bank_bytes",
    "messages",
    "message_bytes",
)
UNITS = {
    "steps": "ms a step",
    "adapted_layers": "ms an adapted layer",
    "flops": "Gflop/s",
    "streamed_bytes": "GB/s of activations and dense weights",
    "ids": "ns an id sorted",
    "row_bytes": "GB/s of table rows",
    "bank_bytes": "GB/s of adapters beyond the cache",
    "messages": "ms a message",
    "message_bytes": "GB/s of messages",
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A DeepFM and how it is trained.

    Args:
        batch: rows of a step, of all ranks together.
        slots: ids of a row; each slot has a table of its own of ``ids`` rows.
        dim: numbers of a vector; one more is the first-order weight.
        units: widths of the tower.
        domains: rows of every bank of adapters, all of equal frequency; 0 for no adapters.
        temperature: rank of a layer is ``max(out // temperature, 1)``.
        ranks: processes that share a batch; each has a whole copy of everything.
        sharded: each rank has a part of each table instead, and asks the others for rows.
    """

    batch: int = 4096
    slots: int = 8
    dim: int = 16
    units: tuple[int, ...] = (256, 128, 64)
    domains: int = 0
    ids: int = 50_000
    temperature: int = 16
    ranks: int = 1
    sharded: bool = False

    @property
    def layers(self) -> list[tuple[int, int]]:
        """Of the tower: inputs and outputs."""
        return list(pairwise((self.slots * self.dim, *self.units)))

    @property
    def adapted(self) -> list[tuple[int, int, int]]:
        """Of each layer with adapters: inputs, outputs and rank."""
        return [(i, o, max(o // self.temperature, 1)) for i, o in self.layers] if self.domains else []


def distinct(values: float, draws: float) -> float:
    """Values that are drawn at least once, each as likely as any."""
    return -values * float(np.expm1(draws * np.log1p(-1 / values))) if values > 1 else min(values, draws)


def parameters(shape: Shape) -> dict[str, int]:
    """Numbers of the model, as ``domlora.training.optimizers.parameter_groups`` divides them."""
    dense = sum(i * o + o for i, o in shape.layers) + shape.units[-1] + 1  # the head has no bias, the linear part has
    of_domain = sum(rank * (i + o) + o for i, o, rank in shape.adapted)
    tables = shape.slots * shape.ids * (shape.dim + 1)
    return {"tables": tables, "dense": dense, "adapters": shape.domains * of_domain}


def counts(shape: Shape) -> dict[str, float]:
    """What one rank does in one step under lazy Adam for tables and adapters, by :data:`TERMS`."""
    size, sizes, rows = shape.ranks, parameters(shape), shape.batch / shape.ranks
    width = FLOAT * (shape.dim + 1)
    mine = shape.slots * distinct(shape.ids, rows)  # distinct rows of this rank's part of the batch
    whole = shape.slots * distinct(shape.ids, shape.batch)
    products = sum(i * o for i, o in shape.layers) + shape.units[-1]
    products += sum(rank * (i + o) for i, o, rank in shape.adapted)
    of_domain = sizes["adapters"] / max(shape.domains, 1)
    banks_mine, banks = (of_domain * distinct(max(shape.domains, 1), n) for n in (rows, shape.batch))
    streamed = rows * (EMBEDDING_PASSES * shape.slots * shape.dim + UNIT_PASSES * sum(shape.units))
    streamed += DENSE_PASSES * sizes["dense"]
    uncached = max(0.0, 1 - CACHE_BYTES / (FLOAT * (1 + ADAM_MOMENTS) * max(sizes["adapters"], 1)))
    # a bank whose rows are all touched moves in place
    passes = DENSE_PASSES if sizes["adapters"] - banks < 0.5 * of_domain else MOVE_PASSES
    others = size - 1
    found = {
        "steps": 1.0,
        "adapted_layers": float(len(shape.adapted)),
        "flops": 6.0 * rows * products,  # forward, gradient of the input, gradient of the weight
        "streamed_bytes": FLOAT * streamed,
        "ids": shape.slots * rows,
        "row_bytes": width * (GATHER_PASSES * shape.slots * rows + MOVE_PASSES * whole),
        "bank_bytes": FLOAT * passes * banks * uncached,
        "messages": 0.0,
        "message_bytes": 0.0,
    }
    if not others:
        return found
    found["messages"] = GLOO_MESSAGES
    found["message_bytes"] = 2 * others / size * FLOAT * sizes["dense"]  # ring all-reduce, sent and added up
    if shape.sharded:  # ids and vectors of the rows that others have, and their gradients; the owner moves them
        found["messages"] += 4
        found["message_bytes"] += others / size * mine * (INT + 2 * width)
        found["ids"] += mine
        found["row_bytes"] += width * (SUM_PASSES * mine + MOVE_PASSES * (mine - whole))
    else:  # distinct rows of all others, with an id for the vector and one for the weight; sorted and added up again
        found["message_bytes"] += others * mine * (2 * INT + width)
        found["ids"] += size * mine
        found["row_bytes"] += width * SUM_PASSES * size * mine
    found["message_bytes"] += others * FLOAT * banks_mine
    found["bank_bytes"] += FLOAT * SUM_PASSES * size * banks_mine * uncached
    return found


def memory(shape: Shape, rule: str = "lazy_adam") -> dict[str, float]:
    """Bytes of one rank while it trains: weights, the best ones so far, and what the rule remembers.

    Of tables that ranks share the best rows are on disk; what such a rank takes is measured.
    """
    sizes, share = parameters(shape), shape.ranks if shape.sharded else 1
    rows = shape.slots * shape.ids
    state = ADAM_MOMENTS * sizes["tables"] if rule == "lazy_adam" else 2 * rows  # one number a row of each table
    return {
        "tables": FLOAT * (SHARD_COPIES if shape.sharded else 2) * sizes["tables"] / share,
        "table_state": FLOAT * state / share,
        "dense": FLOAT * (2 + ADAM_MOMENTS) * sizes["dense"],
        "adapters": FLOAT * (2 + ADAM_MOMENTS) * sizes["adapters"],
    }


def fit(points: Sequence[tuple[Shape, float]]) -> dict[str, float]:
    """Seconds a unit of each term, none below zero, with the least squares of relative errors."""
    table = np.array([[counts(shape)[term] for term in TERMS] for shape, _ in points])
    scale: NDArray[np.float64] = table.max(0)
    scale[scale == 0] = 1.0
    relative = table / scale / np.array([took for _, took in points])[:, None]
    found, _ = nnls(relative, np.ones(len(points)))
    return dict(zip(TERMS, (found / scale).tolist(), strict=True))


def seconds(shape: Shape, constants: Mapping[str, float]) -> float:
    """What the model says of a step."""
    found = counts(shape)
    return sum(found[term] * constants[term] for term in TERMS)
