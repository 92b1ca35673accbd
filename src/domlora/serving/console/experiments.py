"""Experiments and what they say so far, as the console shows them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from domlora.serving.console.analysis import Analyses
from domlora.serving.http.answers import NotFoundError
from domlora.serving.http.service import Service

if TYPE_CHECKING:
    from domlora.abtest.experiments import Experiment

__all__ = ["every", "one", "shown"]

_FIRST = {"running": 0, "draft": 1, "stopped": 2}
_KINDS = {"ship": "good", "stop": "bad", "broken split": "bad"}
_RATES = {
    "ctr": ("clicks", "shown"),
    "cvr": ("conversions", "clicks"),
    "payers": ("payers", "units"),
    "value": ("value", "units"),
}
_ANALYSES = Analyses()


def every(service: Service) -> dict[str, Any]:
    """All experiments, those that run first."""
    ordered = sorted(_all(service), key=lambda each: (_FIRST[each.status], -(each.started_s or 0), each.name))
    return {"now_s": time.time(), "experiments": [_line(each) for each in ordered]}


def one(service: Service, name: str) -> dict[str, Any]:
    """An experiment and its analysis, or why there is none yet.

    Raises:
        NotFoundError: no experiment of this name.
    """
    experiment = next((each for each in _all(service) if each.name == name), None)
    if experiment is None:
        raise NotFoundError("no experiment of this name", received=name[:100])
    analysis, reason = None, "It has not been started."
    if experiment.started_s is not None:
        analysis, reason = _ANALYSES.of(service.live.store.folder, name)
    told = None if analysis is None else shown(experiment, analysis)
    return {"now_s": time.time(), "experiment": _line(experiment), "analysis": told, "reason": reason}


def shown(experiment: Experiment, analysis: Mapping[str, Any]) -> dict[str, Any]:
    """What the page draws, of what :meth:`domlora.abtest.analysis.Analysis.to_dict` gives."""
    primary, split = analysis["primary"], analysis["sample_ratio"]
    units = sum(split["units"].values())
    return {
        "primary": primary,
        "control": experiment.control.name,
        "until_s": analysis["until_s"],
        "arms": [_arm(name, sums, primary) for name, sums in analysis["totals"].items()],
        "lifts": [{"arm": arm, **_bounds(looks[-1])} for arm, looks in analysis["looks"].items() if looks],
        "sequence": _sequence(experiment, analysis["looks"]),
        "progress": {arm: looks[-1]["fraction"] for arm, looks in analysis["looks"].items() if looks},
        "metrics": [{**each, "value": each["lift"]} for each in analysis["overall"]],
        "guardrails": [{"arm": arm, **each} for arm, rails in analysis["guardrails"].items() for each in rails],
        "domains": [_domain(each) for each in analysis["domains"] if each["metric"] == primary],
        "sample_ratio": {
            "passed": not split["broken"],
            "p": split["p_value"],
            "crossed": split["crossed"],
            "held_out": split["held_out"],
            "arms": [
                {"name": name, "observed": seen, "expected": units * split["expected"][name]}
                for name, seen in split["units"].items()
            ],
        },
        "decision": _decision(analysis["decision"]),
    }


def _all(service: Service) -> list[Experiment]:
    return [] if service.registry is None else service.registry.all()


def _line(experiment: Experiment) -> dict[str, Any]:
    names = ("name", "status", "layer", "primary", "domains", "started_s", "stopped_s", "effect")
    return {
        **{name: getattr(experiment, name) for name in names},
        "share": experiment.share_at(time.time()) if experiment.status == "running" else experiment.largest_share,
        "arms": [asdict(arm) for arm in experiment.arms],
    }


def _arm(name: str, sums: Mapping[str, float], metric: str) -> dict[str, Any]:
    over, under = _RATES[metric]
    rate = sums[over] / sums[under] if sums[under] else None
    return {"name": name, "units": sums["units"], "rows": sums["shown"], "rate": rate}


def _bounds(look: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": look["lift"], "low": look["low"], "high": look["high"]}


def _sequence(experiment: Experiment, looks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The looks of each arm at their times; those that say nothing yet are left out."""
    begun = experiment.started_s or 0.0
    found = [
        {
            "arm": arm,
            "points": [
                {"time_s": begun + (look["number"] + 1) * experiment.look_s, **_bounds(look)}
                for look in each
                if None not in (look["lift"], look["low"], look["high"])
            ],
        }
        for arm, each in looks.items()
    ]
    return [line for line in found if line["points"]]


def _domain(lift: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": lift["domain"] or "no domain",
        "arm": lift["arm"],
        "value": lift["lift"],
        "low": lift["low"],
        "high": lift["high"],
        "p": lift["adjusted"],
        "units": lift["control_units"] + lift["treatment_units"],
    }


def _decision(decision: Mapping[str, Any]) -> dict[str, Any]:
    titles = {
        "ship": f"Ship {decision['arm']}.",
        "stop": "Stop: there is nothing to ship.",
        "broken split": "The split is broken: nothing can be said.",
        "not enough data yet": "Not enough data yet: go on.",
    }
    verdict = decision["verdict"]
    return {
        "kind": _KINDS.get(verdict, "plain"),
        "title": titles[verdict],
        "words": [*decision["reasons"], f"{decision['next_step']}."],
    }
