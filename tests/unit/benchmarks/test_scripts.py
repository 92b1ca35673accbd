"""The benchmarks run, without the peers too, and the page says of its numbers what they say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    return loaded("page")


@pytest.fixture(scope="module")
def rounds() -> ModuleType:
    return loaded("rounds")


def loaded(name: str) -> ModuleType:
    """A module that stands beside the scripts, which import each other as scripts do."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("script", ["adapters.py", "peers.py"])
def test_script_runs(script: str, tmp_path: Path, page: ModuleType) -> None:
    found = tmp_path / "found.json"
    command = [sys.executable, str(BENCHMARKS / script), "--plan", "smoke", "--threads", "1", "--json", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    sections = page.read(found)
    assert sections
    for section in sections:
        assert section.title in done.stdout
        assert section.rows
        assert all(len(row) == len(section.columns) for row in section.rows)
    written = page.markdown("Benchmarks", "Text.", page.of_this_machine(), sections)
    assert all(section.title in written for section in sections)
    assert str(Path.home()) not in written


def test_verdicts_follow_from_the_numbers(page: ModuleType, rounds: ModuleType) -> None:
    ratio = rounds.Ratio(1.5, 1.4, 1.7, 9)
    assert str(page.Target.of("it", ratio, 1.6, at_most=True)) == (
        "**met**: it: 1.50 [1.40, 1.70] times; asked for at most 1.6, but the spread crosses the bound"
    )
    assert str(page.Target.of("it", ratio, 1.2, at_most=True)).startswith("**missed**")
    assert str(page.Target.of("it", ratio, 1.2, at_most=False)).startswith("**met**")
    assert str(page.Target("peak", 4.5, 4.0, True, "GiB")) == "**missed**: peak: 4.50 GiB; asked for at most 4"


@pytest.mark.parametrize(("low", "high", "verdict"), [(-2.0, 0.5, "met"), (-2.0, -0.5, "missed"), (0.1, 0.5, "met")])
def test_noise_counts_where_it_is_asked_for(page: ModuleType, low: float, high: float, verdict: str) -> None:
    target = page.Target("difference", (low + high) / 2, 0.0, False, "thousandths", low, high, True)
    assert str(target).startswith(f"**{verdict}**")


def test_a_page_counts_its_targets(page: ModuleType) -> None:
    targets = [page.Target("a", 1.0, 2.0, True, "times"), page.Target("b", 3.0, 2.0, True, "times")]
    section = page.with_threads(page.Section("Speed", "What.", ["", "x"], [["row", "1"]], targets), 2)
    written = page.markdown("Title", "Text.", {"cores": "2"}, [section])
    assert "1 of 2 met." in written
    assert written.count("b, 2 threads: 3.00 times; asked for at most 2") == 1
    assert "## Speed, 2 threads" in written
    assert "| cores | 2 |" in written


def test_ratios_are_taken_within_rounds(rounds: ModuleType) -> None:
    """A machine that slows down tenfold halfway through changes the times and not the ratio."""
    slow = [1.0, 10.0]
    timings = rounds.Timings(
        {"ours": [2.0 * each for each in slow for _ in range(5)], "base": [e for e in slow for _ in range(5)]}
    )
    assert timings.ratio("ours", "base") == rounds.Ratio(2.0, 2.0, 2.0, 10)


def test_an_interleaving_visits_every_arm_once_a_round(rounds: ModuleType) -> None:
    called: list[str] = []
    arms = {name: (lambda name=name: called.append(name)) for name in "abc"}
    timings = rounds.interleave(arms, 0.0, min_rounds=3)
    assert {name: len(values) for name, values in timings.seconds.items()} == {"a": 3, "b": 3, "c": 3}
    visits = called[6:]  # two calls of each arm before the first round
    assert [sorted(visits[start : start + 3]) for start in (0, 3, 6)] == [["a", "b", "c"]] * 3
    assert len(visits) == 9
