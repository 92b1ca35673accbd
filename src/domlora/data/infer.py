"""A first plan for one's own log: a TOML text with comments on what was found, to be corrected by hand."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from domlora.data.drafts.facts import Facts, facts_of
from domlora.data.drafts.feature_guesses import FeatureGuess, guess_features, names_each_row
from domlora.data.drafts.guesses import Roles, guess_roles, plausible_domains, told_by_item
from domlora.data.drafts.sample import Sample, sample_of
from domlora.data.plan import FeaturePlan
from domlora.data.readers import find_files

__all__ = ["draft"]

_SHOWN = 3
_SUGGESTED = 6
_SHOWN_CHARACTERS = 30
_DEFAULTS = {each.name: each.default for each in fields(FeaturePlan)}


def draft(paths: Sequence[Path], *, sample_rows: int = 200_000, folder: Path = Path()) -> str:
    """A plan for a log, as TOML with comments.

    What columns are for is guessed from the names and values of a sample; beside each guess stands what it was made of.

    Args:
        paths: files of one log, or globs.
        sample_rows: rows to look at, about; see :func:`domlora.data.drafts.sample.sample_of`.
        folder: where the plan will lie, which is where it looks for relative paths.

    Raises:
        DataError: a file that cannot be used.
    """
    sample = sample_of(find_files([str(path) for path in paths], Path()), sample_rows)
    columns = {name: facts_of(name, column) for name, column in sample.columns.items()}
    roles = guess_roles(columns)
    features, left_out = guess_features(columns, roles)
    parts = [
        _opening(sample),
        _source(paths, folder, sample, columns),
        _columns(columns, roles),
        *(_feature(columns[name], guess) for name, guess in features.items()),
        _left_out(columns, {**left_out, **sample.unusable}),
        _split(roles),
        _negatives(columns, roles),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _opening(sample: Sample) -> list[str]:
    lines = [
        f"# A first plan, guessed from {sample.origin}. Correct it, [columns] above all; then:",
        "#     domlora prepare THIS.toml --out FOLDER",
    ]
    return [*lines, f"# {_plain(sample.note)}"] if sample.note else lines


def _source(paths: Sequence[Path], folder: Path, sample: Sample, columns: Mapping[str, Facts]) -> list[str]:
    files = [_text(str(path) if path.is_absolute() else os.path.relpath(path, folder)) for path in paths]
    lines = ["[source]", f"files = [{', '.join(files)}]  # relative to the folder of this file"]
    if len(files) > 1:
        lines[1:] = ["files = [  # relative to the folder of this file", *(f"    {file}," for file in files), "]"]
    if sample.separator:
        lines.append(f"separator = {_text(sample.separator)}")
    for name, facts in columns.items():
        if names_each_row(facts):
            return [*lines, f"key = [{_text(name)}]  # another value in each row, so that it tells rows apart"]
    return lines


def _columns(columns: Mapping[str, Facts], roles: Roles) -> list[str]:
    lines = ["[columns]", *_label(columns, roles), *_domain(columns, roles)]
    for role, found in (("user", roles.user), ("item", roles.item), ("time", roles.time), ("weight", roles.weight)):
        if found is None:
            lines.append(f'# {role} = "..."  # no column is called so')
        else:
            lines.append(f"{role} = {_text(found)}  # {_described(columns[found])}")
    if roles.item is not None and _is_clicks_alone(columns, roles):
        told = [_text(name) for name in told_by_item(columns, roles.item) if name not in (roles.domain, roles.user)]
        if told:
            lines.append(f"item_columns = [{', '.join(told)}]  # one value for each item; a non-click takes its item's")
    if roles.forbidden:
        lines += ["# probably not known before the click, so that no feature may read them", "forbidden = ["]
        lines += [f"    {_text(name)},  # {_plain(reason)}" for name, reason in roles.forbidden.items()]
        lines.append("]")
    return lines


def _label(columns: Mapping[str, Facts], roles: Roles) -> list[str]:
    if roles.label is not None:
        lines = [f"label = {_text(roles.label)}  # {_described(columns[roles.label])}"]
        if roles.label_rule is not None:
            lines.append(f"label_rule = {_text(roles.label_rule)}  # when the label is 1")
        return lines
    lists = _lists_of_clicks(columns)
    if lists:
        return [
            f"# {_plain(lists[0])} holds lists: a row seems to be a page with several items. Make a row of each item that",
            "# was shown, with a label that says whether it was clicked, and draft again.",
            '# label = "..."',
        ]
    candidates = _binary(columns)
    if candidates:
        lines = ["# no column is called label or click; these hold 0 and 1:"]
        return lines + [f"# label = {_text(name)}" for name in candidates]
    return ['label = ""  # no column holds 0 and 1: taken as a log of clicks alone, see [negatives]']


def _lists_of_clicks(columns: Mapping[str, Facts]) -> list[str]:
    return [
        name for name, facts in columns.items() if facts.kind == "list" and {"clicked", "clicks"} & set(facts.words)
    ]


def _binary(columns: Mapping[str, Facts]) -> list[str]:
    return [name for name, facts in columns.items() if facts.is_binary and facts.lengths is None]


def _is_clicks_alone(columns: Mapping[str, Facts], roles: Roles) -> bool:
    return roles.label is None and not _binary(columns) and not _lists_of_clicks(columns)


def _domain(columns: Mapping[str, Facts], roles: Roles) -> list[str]:
    flat = {name: facts for name, facts in columns.items() if facts.lengths is None}
    others = [name for name in plausible_domains(flat, roles) if name != roles.domain]
    if roles.domain is not None:
        lines = [
            f"domain = {_text(roles.domain)}  # {_shares(columns[roles.domain])}",
            "# domain_is_feature = false  # by default the model sees the domain as a feature too",
        ]
        possible = ", ".join(f"{_plain(name)} ({columns[name].distinct})" for name in others[:_SUGGESTED])
        return [*lines, f"# others with a few values: {possible}; several names make one domain"] if others else lines
    if others:
        lines = ["# no name says where a row was shown; these have a few values:"]
        return lines + [f"# domain = {_text(name)}  # {_shares(columns[name])}" for name in others[:_SUGGESTED]]
    return [
        "# no column has a few values: add one that says where a row was shown, or which file it is of",
        '# domain = "..."',
    ]


def _feature(facts: Facts, guess: FeatureGuess) -> list[str]:
    lines = [f"[features.{_key(facts.name)}]  # {_described(facts)}"]
    lines += [f"# {_plain(hint)}" for hint in guess.hints]
    lines.append(f"kind = {_text(guess.plan.kind)}")
    for each in fields(FeaturePlan):
        value = getattr(guess.plan, each.name)
        always = each.name == "max_length" and guess.plan.kind == "sequence"
        if each.name != "kind" and (always or value != _DEFAULTS[each.name]):
            lines.append(f"{each.name} = {_value(value)}")
    return lines


def _left_out(columns: Mapping[str, Facts], reasons: Mapping[str, str]) -> list[str]:
    if not reasons:
        return []
    lines = ["# No features, as it seems:"]
    for name, reason in reasons.items():
        what = f" ({_described(columns[name])})" if name in columns else ""
        lines.append(f"# {_plain(name)}: {_plain(reason)}{what}")
    return lines


def _split(roles: Roles) -> list[str]:
    kind = "random" if roles.time is None else "time"
    how = "the latest rows of each domain test" if kind == "time" else "of each domain and label"
    others = [other for other in ("random", "time", "user") if other != kind]
    known = {"random": True, "time": roles.time is not None, "user": roles.user is not None}
    possible = " or ".join(f'"{other}"' for other in others if known[other])
    return [
        "[split]",
        f'kind = "{kind}"  # {how}' + (f"; or {possible}" if possible else ""),
        "fractions = [0.8, 0.1, 0.1]  # train, valid, test",
    ]


def _negatives(columns: Mapping[str, Facts], roles: Roles) -> list[str]:
    if not _is_clicks_alone(columns, roles):
        return []
    return [
        "[negatives]  # needs columns.domain, user and item",
        'rule = "uniform"  # items of the domain that a user did not click',
        "ratio = 4.0  # this many for each click",
    ]


def _described(facts: Facts) -> str:
    """What a sample tells of a column, in a line."""
    kind = {"integer": "integers", "float": "numbers", "text": "texts", "time": "times"}.get(facts.kind, "lists")
    told = [f"{kind}, {facts.distinct:,} different"]
    if facts.lengths is not None and (facts.lengths >= 0).any():
        told.append(f"{np.median(facts.lengths[facts.lengths >= 0]):.0f} elements at the median")
    if facts.is_binary and facts.lengths is None:
        ones = sum(
            int(size)
            for value, size in zip(facts.values, facts.sizes, strict=True)
            if value.lower() in ("1", "1.0", "true")
        )
        told.append(f"{_percent(ones / max(facts.sizes.sum(), 1))} are 1")
    elif facts.kind in ("integer", "float", "time") and facts.distinct:
        order = np.argsort(facts.value_numbers)
        told.append(f"from {_shown(facts.values[order[0]])} to {_shown(facts.values[order[-1]])}")
    elif facts.distinct:
        told.append(f"such as {_examples(facts)}")
    if facts.absent:
        told.append(f"{_percent(facts.absent)} absent")
    return ", ".join(told)


def _examples(facts: Facts) -> str:
    quote = '"' if facts.kind == "text" else ""
    return ", ".join(f"{quote}{_shown(facts.values[place])}{quote}" for place in facts.most_frequent[:_SHOWN])


def _shares(facts: Facts) -> str:
    total = facts.sizes.sum()
    shown = [
        f"{_shown(facts.values[place])} {_percent(facts.sizes[place] / total)}" for place in facts.most_frequent[:5]
    ]
    return ", ".join(shown) + (f", and {facts.distinct - 5} more" if facts.distinct > 5 else "")


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 or share == 1 else f"{100 * share:.4g} %"


def _shown(text: str) -> str:
    """A value, short, as a comment can hold it."""
    return _plain(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…")


def _plain(text: str) -> str:
    """Text without characters that end a line or that TOML refuses."""
    return "".join(each if each.isprintable() else " " for each in text)


def _value(value: Any) -> str:
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _text(text: str) -> str:
    """A basic string of TOML; JSON escapes the same but for one character."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)
