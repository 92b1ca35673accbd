"""The figures of ``experiments.py`` as a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["write_page"]

COMMAND = "python benchmarks/experiments.py --out runs/experiments.json --page docs/results/experiments.md"
Figures = Mapping[str, Any]


def write_page(figures: Mapping[str, Figures], path: Path) -> None:
    """Write what is known; parts that were not run are left out."""
    seconds = sum(each["cpu_s"] for each in figures.values())
    parts = [
        "# Do the statistics of experiments hold?",
        f"Made by `{COMMAND}`, which took {seconds / 60:.0f} minutes of one core. What is promised is in "
        "[experiments](../experiments.md). Shares have 95 % intervals (Wilson).",
        *_lifts(figures),
        *_nulls(figures),
        *_splits(figures.get("split")),
        *_rest(figures),
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _lifts(figures: Mapping[str, Figures]) -> list[str]:
    names = ("found", "interval_holds_it", "both", "found_and_its_bounds_hold_it")
    rows = [
        (
            name.rpartition(" ")[2],
            f"{each['units']:,}",
            f"{each['found']['runs']:,}",
            *(_share(each[key]) for key in names),
        )
        for name, each in figures.items()
        if name.startswith("lift")
    ]
    head = (
        "planned for",
        "units",
        "runs",
        "found",
        "95 % interval at the end holds it",
        "both",
        "found, and its bounds hold it",
    )
    text = (
        "A true lift of 1.5 % of a CTR of 10 %, at the planned size, looked at after each of 30 days. *Found*: the lift "
        'is claimed at some look. *Its bounds*: those "at all looks together" of that look, which `ab analyze` decides by. '
        "Both at once need a plan for more than the share that is asked for: 95 % of 95 % are 90 %."
    )
    return ["## A lift is found", text, _table(head, rows)] if rows else []


def _nulls(figures: Mapping[str, Figures]) -> list[str]:
    nulls = {name.partition(": ")[2]: each for name, each in figures.items() if name.startswith("no lift")}
    rows = [
        (
            name,
            " + ".join(f"{units:,}" for units in each["units"]),
            f"{each['looks']}",
            f"{each['alarms']['runs']:,}",
            _share(each["alarms"]),
            f"{100 * each['alarms_upwards']['share']:.1f} %",
            f"{100 * each['single_test_each_look']['share']:.0f} %",
        )
        for name, each in nulls.items()
    ]
    if not rows:
        return []
    looked = [each["alarms"] for each in nulls.values() if each["alarms"]["share"] > 0]
    runs, alarms = sum(each["runs"] for each in looked), sum(round(each["share"] * each["runs"]) for each in looked)
    head = ("no lift", "units", "looks", "runs", "a lift is claimed", "upwards", "with 1.96 at every look")
    text = (
        "Both arms alike, the plan's end at the last look or just before, at most 5 % allowed. "
        f"{alarms:,} false alarms in {runs:,} runs: {100 * alarms / max(runs, 1):.2f} %. Where not all of the plan was "
        "reached, less than 5 % was spent. The last setting never has purchases enough for a first look, and is not counted."
    )
    return ["## No lift, and continuous peeking", text, _table(head, rows)]


def _splits(split: Figures | None) -> list[str]:
    if split is None:
        return []
    cells = [each for each in split.values() if isinstance(each, dict)]
    sizes, losses = (sorted({each[name] for each in cells}) for name in ("units", "lost"))
    by = {(each["units"], each["lost"]): each for each in cells}
    head = ("units at the plan", *(f"{100 * lost:g} % lost" if lost else "fair" for lost in losses))
    rows = [(f"{units:,}", *(_both(by[units, lost]) for lost in losses)) for units in sizes]
    text = (
        "So many units in two equal arms over 30 looks, some of the treated ones lost: the share of "
        f"{cells[0]['called']['runs']:,} experiments that end as `broken split`; in brackets, with one chi-square test "
        "of 0.001 at the end. A loss is seen from about `(7 / loss)²` units on (half a million for 1 %, 5,000 for 10 %); no "
        "test of counts alone sees less without crying wolf."
    )
    return ["## A broken split", text, _table(head, rows)]


def _rest(figures: Mapping[str, Figures]) -> list[str]:
    lines = []
    if "ratio, unequal units" in figures:
        each = figures["ratio, unequal units"]
        lines.append(
            f"- Units of very unequal size (10 rows or 400), {each['units']:,} of them: {_share(each['by_unit'])} of 95 % "
            f"intervals hold the truth; as if rows were independent, {_share(each['by_row'])} would."
        )
    if "log" in figures:
        each = figures["log"]
        lines.append(
            f"- {each['runs']} logs through DuckDB: the same {each['looks']} looks as from the sums that were drawn in "
            f"{each['same_looks']} of them, at most {each['largest_difference']:.0e} standard errors apart."
        )
    if "time" in figures:
        each = figures["time"]
        lines.append(
            f"- A log of {each['rows']:,} exposures of {each['units']:,} units: {each['seconds']} s and "
            f"{each['peak_mb']:,} MB on {each['cores']} cores."
        )
    return ["## And besides", "\n".join(lines)] if lines else []


def _both(each: Figures) -> str:
    return f"{_percent(each['called']['share'])} ({_percent(each['one_test']['share'])})"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _share(told: Figures) -> str:
    return f"{100 * told['share']:.1f} % ({100 * told['low']:.1f} to {100 * told['high']:.1f})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
