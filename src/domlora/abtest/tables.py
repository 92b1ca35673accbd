"""An analysis as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

__all__ = ["markdown_of"]

Rows = Iterable[Sequence[str]]

_SINGLE = (
    "*interval* and *p* are those of a single look at the end; who looks before decides by the looks below. "
    "*variance saved* is what the period before the start explains."
)
_TOGETHER = (
    "*information* is the share of the data that the plan asks for. *crossed*: the lift is further from 0 than chance gets "
    "at any look (*z*, in standard errors, beyond the *boundary*)."
)


def markdown_of(analysis: Mapping[str, Any]) -> str:
    """Tables of what :meth:`domlora.abtest.analysis.Analysis.to_dict` holds, the decision first."""
    decision, split = analysis["decision"], analysis["sample_ratio"]
    verdict = decision["verdict"] + (f" {decision['arm']}" if decision["arm"] else "")
    until = datetime.fromtimestamp(analysis["until_s"], UTC).isoformat(" ", "seconds")
    parts = [
        f"# {analysis['experiment']}: {verdict}",
        "\n".join(f"- {reason}" for reason in decision["reasons"]),
        f"**Next:** {decision['next_step']}.",
        f"What was shown until {until}.",
        _table(("arm", *next(iter(analysis["totals"].values()))), _totals(analysis["totals"])),
        _split(split),
    ]
    if analysis["overall"]:
        primary = [each for each in analysis["domains"] if each["metric"] == analysis["primary"]]
        parts += [
            _table(
                ("arm", "metric", "control", "treatment", "lift", "interval", "p", "variance saved"), _overall(analysis)
            ),
            _SINGLE,
            *(
                f"## {arm}: {analysis['primary']}, looks\n\n{_looks(looks)}\n\n{_TOGETHER}"
                for arm, looks in analysis["looks"].items()
                if looks
            ),
            *(_rails(arm, rails) for arm, rails in analysis["guardrails"].items() if rails),
            f"## By domain: {analysis['primary']}\n\n{_domains(primary)}",
        ]
    return "\n\n".join(parts) + "\n"


def _totals(totals: Mapping[str, Mapping[str, float]]) -> Rows:
    return ((arm, *(f"{value:,.10g}" for value in sums.values())) for arm, sums in totals.items())


def _split(split: Mapping[str, Any]) -> str:
    fits = "does not fit its weights" if split["broken"] else "fits its weights"
    text = f"The split {fits} (p = {split['p_value']:.3g})."
    if split["crossed"]:
        text += f" {split['crossed']:,} units were seen in several arms and are left out."
    if split["held_out"]:
        text += f" {split['held_out']:,} units are kept out."
    return text


def _overall(analysis: Mapping[str, Any]) -> Rows:
    return (
        (
            each["arm"],
            each["metric"],
            *(_figure(each[name]) for name in ("control", "treatment")),
            _percent(each["lift"]),
            _between(each["low"], each["high"]),
            _short(each["p_value"]),
            _percent(each["reduction"], sign=""),
        )
        for each in analysis["overall"]
        if each["control"] or each["treatment"]  # else nothing of the kind was reported
    )


def _looks(looks: Sequence[Mapping[str, Any]]) -> str:
    rows = (
        (
            f"{look['number'] + 1}",
            f"{look['fraction']:.0%}",
            f"{look['z']:.2f}",
            f"{look['critical']:.2f}",
            _percent(look["lift"]),
            _between(look["low"], look["high"]),
            "yes" if look["crossed"] else "",
        )
        for look in looks
    )
    return _table(("look", "information", "z", "boundary", "lift", "interval at all looks together", "crossed"), rows)


def _rails(arm: str, rails: Sequence[Mapping[str, Any]]) -> str:
    rows = (
        (each["metric"], _percent(-each["margin"]), _between(each["low"], each["high"]), each["state"])
        for each in rails
    )
    return f"## {arm}: guardrails\n\n" + _table(("metric", "margin", "interval at all looks together", "state"), rows)


def _domains(lifts: Sequence[Mapping[str, Any]]) -> str:
    rows = (
        (
            each["domain"] or "-",
            each["arm"],
            f"{each['control_units'] + each['treatment_units']:,}",
            _percent(each["lift"]),
            _between(each["low"], each["high"]),
            _short(each["p_value"]),
            _short(each["adjusted"]),
        )
        for each in lifts
    )
    return _table(("domain", "arm", "units", "lift", "interval", "p", "p of all domains"), rows)


def _table(head: Sequence[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _percent(value: float | None, sign: str = "+") -> str:
    return "-" if value is None else f"{100 * value:{sign}.2f} %"


def _between(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{_percent(low)} to {_percent(high)}"


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
