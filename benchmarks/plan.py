"""From wishes to machines: what a plan needs at each stage, what one machine has, and which switch answers where it breaks.

Pure, as ``costs.py``. Every figure is counted or comes from the measured facts that ``scale.py`` wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from costs import FLOAT, Shape, counts, memory, parameters, seconds

__all__ = ["Need", "Wishes", "needs", "ranks_for", "step_seconds"]

DAY_S = 86_400.0
MOST_RANKS = 4096
SHARDED_FACTOR = 2.0
"""docs/tables.md has 47 to 57 ms for a step of two ranks with shards where the counts give 28: one shape, so a factor."""
GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is to be done, and on what machines.

    Args:
        ids, dim, slots, units: of the model; ``ids`` are those of all slots together.
        rows_per_day: prepared and trained on once a day.
        domains: each with an adapter.
        requests_per_second, candidates: of serving, at the peak.
        batch: rows of a rank in a step.
        cores, memory, network, latency: of a machine: number, bytes, bytes a second, seconds a message.
        busy: share of its time that a core may work.
    """

    ids: float = 1e9
    dim: int = 32
    slots: int = 10
    units: tuple[int, ...] = (256, 128, 64)
    rows_per_day: float = 1e11
    domains: int = 10_000
    requests_per_second: float = 2e5
    candidates: int = 64
    batch: int = 4096
    cores: int = 32
    memory: float = 256e9
    network: float = 1.25e9
    latency: float = 50e-6
    busy: float = 0.6

    @property
    def shape(self) -> Shape:
        """The base, in one process."""
        return Shape(self.batch, self.slots, self.dim, self.units, ids=round(self.ids / self.slots))

    @property
    def rows_per_s(self) -> float:
        return self.rows_per_day / DAY_S


@dataclass(frozen=True, slots=True)
class Need:
    """One line of a plan.

    Args:
        stage, what: of the plan.
        needed, there: in ``unit``; what is needed, and what there is with the settings that a first try has.
        switch: what to do where more is needed than is there.
    """

    stage: str
    what: str
    needed: float
    there: float
    unit: str
    switch: str

    @property
    def load(self) -> float:
        return self.needed / self.there


def step_seconds(shape: Shape, wishes: Wishes, constants: Mapping[str, float]) -> float:
    """A step of ranks on machines of so many cores: what the model says, and the network beside it.

    The constants were fitted where messages never left a machine, so they hold the work of messages and no network.
    """
    found, here = counts(shape), min(shape.ranks, wishes.cores)
    wire = found["message_bytes"] * here / wishes.network + found["messages"] * wishes.latency
    work = seconds(shape, constants) * (SHARDED_FACTOR if shape.sharded else 1.0)
    return work + (wire if shape.ranks > wishes.cores else 0.0)


def rows_per_s(shape: Shape, wishes: Wishes, constants: Mapping[str, float]) -> float:
    return wishes.busy * shape.batch / step_seconds(shape, wishes, constants)


def ranks_for(wishes: Wishes, constants: Mapping[str, float], *, sharded: bool) -> tuple[int, float]:
    """The fewest ranks (a power of two) that keep up with the rows of a day, and their rows a second; else the best."""
    best = (1, 0.0)
    size = 1
    while size <= MOST_RANKS:
        shape = replace(wishes.shape, batch=wishes.batch * size, ranks=size, sharded=sharded and size > 1)
        rate = rows_per_s(shape, wishes, constants)
        if rate > best[1]:
            best = (size, rate)
        if rate >= wishes.rows_per_s:
            break
        size *= 2
    return best


def needs(wishes: Wishes, facts: Mapping[str, Any]) -> list[Need]:
    """All lines, the one that breaks first at the top: by how many times what is there each needs."""
    lines = [*_preparing(wishes, facts), *_training(wishes, facts), *_adapting(wishes, facts), *_serving(wishes, facts)]
    return sorted(lines, key=lambda line: -line.load)


def _preparing(wishes: Wishes, facts: Mapping[str, Any]) -> list[Need]:
    prepared = facts["preparing"]
    cores = wishes.rows_per_s * prepared["core_seconds_per_row"] / wishes.busy
    return [
        Need("prepare", "cores", cores, wishes.cores, "", "`--engine spark` on a cluster"),
        Need(
            "prepare",
            "memory of vocabularies",
            wishes.ids * prepared["vocabulary_bytes_per_id"] / GIB,
            wishes.memory / GIB,
            "GiB",
            "`hash_buckets`: no vocabulary",
        ),
    ]


def _training(wishes: Wishes, facts: Mapping[str, Any]) -> list[Need]:
    constants, shape, has = facts["constants"], wishes.shape, wishes.memory / GIB
    adam, adagrad = (sum(memory(shape, rule).values()) / GIB for rule in ("lazy_adam", "rowwise_adagrad"))
    copied, sharded = (ranks_for(wishes, constants, sharded=each) for each in (False, True))
    in_shards = replace(shape, ranks=max(sharded[0], 2), sharded=True)
    on_machine = sum(memory(in_shards, "rowwise_adagrad").values()) * min(in_shards.ranks, wishes.cores) / GIB
    reader = wishes.rows_per_s * facts["preparing"]["loader_core_seconds_per_row"]
    want = wishes.rows_per_s
    return [
        Need(
            "train",
            "rows/s of one process",
            want,
            rows_per_s(shape, wishes, constants),
            "",
            "ranks: torchrun, `launch`",
        ),
        Need("train", "memory of one process, lazy_adam", adam, has, "GiB", "`tables.name = rowwise_adagrad`"),
        Need("train", "the same, rowwise_adagrad", adagrad, has, "GiB", "sharded tables; smaller `embedding_dim`"),
        Need(
            "train",
            f"rows/s of {copied[0]} ranks with copies",
            want,
            copied[1],
            "",
            "sharded tables: ids and rows travel",
        ),
        Need(
            "train",
            f"rows/s of {sharded[0]} ranks with shards",
            want,
            sharded[1],
            "",
            "larger batches; a faster network",
        ),
        Need(
            "train", f"a machine's memory, {in_shards.ranks} ranks with shards", on_machine, has, "GiB", "more machines"
        ),
        Need("train", "a rank's core that reads all rows", reader, 1.0, "", "fewer, larger ranks"),
    ]


def _adapting(wishes: Wishes, facts: Mapping[str, Any]) -> list[Need]:
    constants, base = facts["constants"], wishes.shape
    joint = replace(base, domains=max(wishes.domains, 1))
    slower = seconds(joint, constants) / seconds(base, constants)
    banks = FLOAT * 4 * parameters(joint)["adapters"] / GIB
    hours = wishes.domains * facts["adapt_each_core_seconds"] / 3600
    return [
        Need(
            "adapt", "time of a step with all adapters, over without", slower, 2.0, "", "`adapt-each` on a frozen base"
        ),
        Need(
            "adapt",
            "memory of a rank's adapters",
            banks,
            wishes.memory / wishes.cores / GIB,
            "GiB",
            "larger `temperature`",
        ),
        Need("adapt", "core hours of adapt-each", hours, 24.0 * wishes.cores, "", "`adapt-each --engine ray`"),
    ]


def _serving(wishes: Wishes, facts: Mapping[str, Any]) -> list[Need]:
    serving, wanted = facts["serving"], wishes.requests_per_second
    request = serving["http_s"] + serving["request_s"] + wishes.candidates * serving["candidate_s"]
    cores = wanted * request / wishes.busy
    tables = FLOAT * parameters(wishes.shape)["tables"]
    rows = wanted * wishes.slots * wishes.candidates * serving["distinct_share"] * (1 - serving["cache_hits"])
    store = wishes.ids * (FLOAT * (wishes.dim + 1) + serving["row_overhead_bytes"])
    return [
        Need("serve", "cores", cores, wishes.cores, "", "more servers behind a balancer"),
        Need("serve", "memory of tables on each server", tables / GIB, wishes.memory / GIB, "GiB", "rows in Redis"),
        Need(
            "serve",
            "memory of one Redis",
            store / GIB,
            wishes.memory / GIB,
            "GiB",
            "`hash_buckets`, smaller `embedding_dim`",
        ),
        Need(
            "serve",
            "rows/s of one Redis",
            rows,
            serving["store_rows_per_s"],
            "",
            "tables in memory; `--rows-cache-bytes`",
        ),
    ]
