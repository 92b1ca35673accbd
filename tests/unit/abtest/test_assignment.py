"""Who gets which arm: sticky, exclusive within a layer, independent across layers, and the same everywhere."""

from __future__ import annotations

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from domlora.abtest.assignment import Assigner, Assignment, choice, position
from domlora.abtest.experiments import HOLDOUT, Arm, Experiment

ARMS = (Arm("now"), Arm("wide", weight=1, version=2))
UNITS = [f"user-{number}" for number in range(8_000)]


def running(name: str, **values: object) -> Experiment:
    told = {"arms": ARMS, "slot": (0.0, 1.0), "started_s": 0.0, "status": "running", **values}
    return Experiment(name, **told)  # type: ignore[arg-type]


def arms_of(assigner: Assigner, now_s: float = 0.0, domain: str = "toys") -> list[dict[str, str]]:
    return [{each.experiment: each.arm.name for each in assigner.assign(unit, domain, now_s)} for unit in UNITS]


def test_positions_are_known_numbers() -> None:
    assert position("layer\x1fdefault", "user-7") == 0.14228456154030034
    assert position("arm\x1fwide", "Zoë") == 0.556197002074805


def test_duckdb_computes_the_same_position() -> None:
    text = "('0x' || md5('arm' || chr(31) || 'wide' || chr(31) || u)[:13])::BIGINT / (1::BIGINT << 52)"
    found = duckdb.execute(f"SELECT {text} FROM (SELECT unnest(?) AS u)", [[*UNITS[:500], "Zoë", " x "]]).fetchall()
    assert [row[0] for row in found] == [position("arm\x1fwide", unit) for unit in [*UNITS[:500], "Zoë", " x "]]


@settings(deadline=None)
@given(unit=st.text(min_size=1), salt=st.text())
def test_any_text_has_a_place(unit: str, salt: str) -> None:
    assert 0.0 <= position(salt, unit) < 1.0


def test_positions_are_even() -> None:
    places = [position("layer\x1fdefault", unit) for unit in UNITS]
    assert stats.kstest(places, "uniform").pvalue > 0.001


@settings(max_examples=30, deadline=None)
@given(shares=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6).map(sorted), weight=st.floats(0.2, 5.0))
def test_a_ramp_only_adds_units_and_moves_nobody(shares: list[float], weight: float) -> None:
    arms = (Arm("now"), Arm("wide", weight=weight), Arm("deep"))
    ramp = tuple((float(day), share) for day, share in enumerate(shares))
    assigner = Assigner([running("wide", arms=arms, share=ramp, holdout=0.05)])
    before: dict[str, str] = {}
    for day in range(len(shares)):
        now = {u: found[0].arm.name for u in UNITS[:200] if (found := assigner.assign(u, "toys", float(day)))}
        assert before.items() <= now.items()
        before = now


def test_an_arm_stays_when_others_start_and_stop() -> None:
    alone = arms_of(Assigner([running("wide")]))
    other = running("deep", layer="second")
    among = arms_of(Assigner([other, running("wide"), running("old", status="stopped", stopped_s=5.0)]))
    assert [each["wide"] for each in alone] == [each["wide"] for each in among]
    assert all("old" not in each for each in among)


def test_experiments_of_one_layer_share_no_unit() -> None:
    slots = {"one": (0.0, 0.3), "two": (0.3, 0.7), "three": (0.7, 1.0)}
    found = arms_of(Assigner([running(name, slot=slot) for name, slot in slots.items()]))
    assert all(len(each) == 1 for each in found)
    counts = [sum(name in each for each in found) for name in slots]
    assert stats.chisquare(counts, np.array([0.3, 0.4, 0.3]) * len(UNITS)).pvalue > 0.001


def test_layers_and_salts_are_independent() -> None:
    found = arms_of(
        Assigner([running("one"), running("two", layer="second"), running("three", layer="third", salt="one")])
    )
    table = np.zeros((2, 2), int)
    for each in found:
        table[each["one"] == "wide", each["two"] == "wide"] += 1
    assert stats.chi2_contingency(table).pvalue > 0.001
    assert all(each["one"] == each["three"] for each in found), "the salt alone makes the split"


def test_weights_are_kept() -> None:
    arms = (Arm("now", weight=2), Arm("wide", weight=1), Arm("deep", weight=1))
    found = [each["wide"] for each in arms_of(Assigner([running("wide", arms=arms)]))]
    counts = [found.count(arm.name) for arm in arms]
    assert stats.chisquare(counts, np.array([0.5, 0.25, 0.25]) * len(UNITS)).pvalue > 0.001


def test_the_same_units_are_held_out_everywhere_and_get_the_control() -> None:
    arms = (Arm("now", version=7), Arm("wide", version=8))
    assigner = Assigner([running("one", arms=arms, holdout=0.1), running("two", layer="second", holdout=0.1)])
    found = arms_of(assigner)
    assert all((each["one"] == HOLDOUT) == (each["two"] == HOLDOUT) for each in found)
    held = next(unit for unit, each in zip(UNITS, found, strict=True) if each["one"] == HOLDOUT)
    assert assigner.assign(held, None, 0.0)[0] == Assignment("one", Arm(HOLDOUT, version=7))
    assert 0.08 < sum(each["one"] == HOLDOUT for each in found) / len(found) < 0.12


def test_domains_and_absent_units() -> None:
    assigner = Assigner([running("wide", domains=("toys",))])
    assert assigner.assign("user-7", "toys", 0.0)
    assert not assigner.assign("user-7", "books", 0.0)
    assert not assigner.assign("user-7", None, 0.0)
    assert not assigner.assign("", "toys", 0.0)
    assert not assigner.assign(None, "toys", 0.0)
    assert not assigner.assign("user-7", "toys", -1.0), "before the start"


@pytest.mark.parametrize(
    ("arms", "told"),
    [
        ((), (None, True)),
        ((Arm("a", version=3), Arm("b", adapters=False)), (3, False)),
        ((Arm("a"), Arm("b", version=4)), (4, True)),
    ],
)
def test_choice_joins_what_layers_ask_for(arms: tuple[Arm, ...], told: tuple[int | None, bool]) -> None:
    assert choice([Assignment("e", arm) for arm in arms]) == told
