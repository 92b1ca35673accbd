"""The model of costs counts what is there, and a fit finds the constants that made its points."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from torch.utils.flop_counter import FlopCounterMode

from domlora.training.optimizers import Optimizer, parameter_groups

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def costs() -> ModuleType:
    return loaded("costs")


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    return loaded("scale")


@pytest.fixture(scope="module")
def plan() -> ModuleType:
    return loaded("plan")


def loaded(name: str) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_numbers_are_those_of_the_model(costs: ModuleType, scale: ModuleType) -> None:
    for shape in (costs.Shape(ids=9, slots=3, dim=4, units=(32, 8), domains=5), costs.Shape(ids=7, slots=2, dim=8)):
        groups = parameter_groups(scale.model_of(shape))
        assert costs.parameters(shape) == {name: sum(p.numel() for p in each) for name, each in groups.items()}


def test_products_are_those_that_torch_counts(costs: ModuleType, scale: ModuleType) -> None:
    shape = costs.Shape(batch=64, ids=9, slots=3, dim=4, units=(32, 8))
    model, batch = scale.model_of(shape), next(scale.batches_of(shape))
    with FlopCounterMode(display=False) as counter:
        model(batch.ids, batch.dense, batch.domain).sum().backward()
    assert costs.counts(shape)["flops"] == counter.get_total_flops()


def test_counts_of_a_small_model_by_hand(costs: ModuleType) -> None:
    """Two slots of one id each, so that every rank's distinct rows are known: two, of 5 numbers (20 bytes)."""
    shape = costs.Shape(batch=10, slots=2, dim=4, units=(16,), ids=1, temperature=16, domains=1)
    dense = 8 * 16 + 16 + 16 + 1
    bank = 1 * (8 + 16) + 16
    assert costs.parameters(shape) == {"tables": 10, "dense": dense, "adapters": bank}
    assert costs.counts(shape) == {
        "steps": 1,
        "adapted_layers": 1,
        "flops": 6 * 10 * (8 * 16 + 16 + 24),
        "streamed_bytes": 4 * (10 * (8 * 8 + 10 * 16) + 7 * dense),
        "ids": 20,
        "row_bytes": 20 * (5 * 20 + 12 * 2),
        "bank_bytes": 0,  # a cache holds them
        "messages": 0,
        "message_bytes": 0,
    }
    many = costs.counts(replace(shape, domains=10**6))
    beyond = 1 - (32 << 20) / (4 * 3 * bank * 10**6)
    assert many["bank_bytes"] == pytest.approx(4 * 12 * bank * 10 * beyond, rel=1e-4)  # ten of them are touched
    all_touched = costs.counts(replace(shape, domains=10**6, batch=10**8))
    assert all_touched["bank_bytes"] == pytest.approx(4 * 7 * bank * 10**6 * beyond, rel=1e-4)
    two = costs.counts(replace(shape, ranks=2))
    assert two["messages"] == 5
    assert two["message_bytes"] == 4 * dense + 2 * (16 + 20) + 4 * bank
    assert two["ids"] == 10 + 2 * 2
    assert two["row_bytes"] == 20 * (5 * 10 + 2 * 4 + 12 * 2)


def test_bytes_of_rows_in_memory(costs: ModuleType, scale: ModuleType) -> None:
    """Weights, the best ones, and what the optimizer keeps, which is asked itself."""
    shape = costs.Shape(batch=16, ids=50, slots=2, dim=4, units=(16,), domains=3)
    model = scale.model_of(shape)
    optimizer, batch = Optimizer(model, scale.RULES), next(scale.batches_of(shape))
    model(batch.ids, batch.dense, batch.domain).sum().backward()
    optimizer.step()
    kept = sum(each.nbytes for each in optimizer.state().values() if each.dim())
    weights = sum(p.nbytes for p in model.parameters())
    assert sum(costs.memory(shape).values()) == 2 * weights + kept
    shard = costs.memory(replace(shape, ranks=4, sharded=True))
    assert shard["tables"] / costs.SHARD_COPIES == costs.memory(shape)["tables"] / 2 / 4


def test_a_fit_finds_the_constants_that_made_the_points(costs: ModuleType, scale: ModuleType) -> None:
    true = dict(zip(costs.TERMS, (2e-3, 1e-3, 1e-11, 1e-10, 5e-8, 2e-10, 3e-10, 4e-4, 1e-9), strict=True))
    shapes = [replace(shape, ranks=ranks) for shape in scale.FITTED for ranks in (1, 2)]
    found = costs.fit([(shape, costs.seconds(shape, true)) for shape in shapes])
    assert found == pytest.approx(true, rel=1e-5)
    assert all(each >= 0 for each in costs.fit([(shape, 1.0) for shape in shapes]).values())


def test_every_held_out_shape_is_beyond_the_fitted_ones(scale: ModuleType) -> None:
    def sizes(shape: object) -> list[int]:
        return [shape.batch, shape.slots, shape.dim, max(shape.units), shape.domains, shape.batch * shape.domains]  # type: ignore[attr-defined]

    most = [max(column) for column in zip(*map(sizes, scale.FITTED), strict=True)]
    for shape in scale.HELD_OUT:
        assert any(mine > theirs for mine, theirs in zip(sizes(shape), most, strict=True)), shape


def test_shards_need_less_and_keep_up_where_copies_do_not(costs: ModuleType, plan: ModuleType) -> None:
    facts = json.loads((BENCHMARKS.parent / "docs" / "results" / "scale.json").read_text(encoding="utf-8"))
    wishes = plan.Wishes()
    copied, sharded = (plan.ranks_for(wishes, facts["constants"], sharded=each) for each in (False, True))
    assert sharded[1] >= wishes.rows_per_s > copied[1]
    small = plan.Wishes(ids=1e6, dim=8, rows_per_day=1e8, domains=10, requests_per_second=100)
    broken = [need.what for need in plan.needs(small, facts) if need.load > 1]
    assert broken == []


def test_a_plan_is_printed_from_ones_own_numbers(
    scale: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["scale.py", "plan", "--ids", "1e10", "--units", "512", "256"])
    scale.main()
    loads = [float(line.split("|")[5].replace(",", "")) for line in capsys.readouterr().out.splitlines()[2:]]
    assert loads == sorted(loads, reverse=True)
    assert loads[0] > 1
