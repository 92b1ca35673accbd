"""Which of the lines in a study's folder are the study's as its file says now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from domlora.studies.reporting.cells import TRUTH, Line

__all__ = ["planned"]


def planned(results: Iterable[Line], facts: Mapping[str, Any]) -> list[Line]:
    """The lines of the datasets, seeds, models, arms and options that a study asks for; all, where it does not tell.

    A folder keeps what was run before a file changed, so that nothing is made twice. A report is of the file.

    Args:
        facts: of the study; ``runs`` holds by dataset its ``seeds`` and ``arms``, each a model, a name and a hash of its
            options.

    Example:
        >>> lines = [{"dataset": "d", "model": "m", "method": "base", "seed": 1, "config_hash": h} for h in ("old", "new")]
        >>> facts = {"runs": {"d": {"seeds": [1], "arms": [["m", "base", "new"]]}}}
        >>> [line["config_hash"] for line in planned(lines, facts)]
        ['new']
    """
    lines = list(results)
    runs = facts.get("runs")
    if runs is None:
        return lines
    asked = {name: (set(told["seeds"]), {tuple(arm) for arm in told["arms"]}) for name, told in runs.items()}
    return [line for line in lines if _is_asked(line, *asked.get(line["dataset"], (set(), set())))]


def _is_asked(line: Line, seeds: set[int], arms: set[tuple[str, ...]]) -> bool:
    of_an_arm = line["method"] == TRUTH or (line["model"], line["method"], line.get("config_hash")) in arms
    return of_an_arm and int(line["seed"]) in seeds
