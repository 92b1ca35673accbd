"""Whether a plan makes sense, by itself and for the columns of a log."""

from __future__ import annotations

import json
from typing import Any

from domlora.data.expressions import size
from domlora.data.plan import Plan
from domlora.errors import ConfigError, SchemaError, nearest

__all__ = ["check_columns", "check_item_columns", "check_plan", "needed"]


def needed(plan: Plan) -> list[str]:
    """The raw columns that a plan reads."""
    columns = plan.columns
    names: list[str | None] = [source for name, spec in plan.features.items() for source in spec.sources(name)]
    names += [*columns.domains, columns.label, columns.user, columns.item, columns.time, columns.weight]
    names += [*columns.item_columns, plan.split.column, *plan.filters.unique, *plan.source.key]
    return list(dict.fromkeys(name for name in names if name))


def check_plan(plan: Plan) -> None:
    """What can be said of a plan before its files are read.

    Raises:
        ConfigError: parts that do not go together.
    """
    columns = plan.columns
    if not plan.features:
        raise ConfigError(
            "a plan needs features", next_step="Add [features.NAME] tables, or draft them: domlora schema infer"
        )
    for name, spec in plan.features.items():
        for source in spec.sources(name):
            if source in columns.forbidden or source == columns.label:
                raise ConfigError(
                    f"feature {name!r} reads a column that tells what happened after the click", received=source
                )
        if name.startswith("__"):
            raise ConfigError("names of features must not begin with two underscores", received=name)
        _check_shared(plan, name)
    for what, value, key in (
        ("a time split", plan.split.kind != "time" or columns.time, "columns.time"),
        ("a user split", plan.split.kind != "user" or columns.user, "columns.user"),
        (
            "sampling negatives",
            plan.negatives is None or (columns.user and columns.item),
            "columns.user and columns.item",
        ),
        ("a k-core", not plan.filters.k_core or (columns.user and columns.item), "columns.user and columns.item"),
        ("a log without labels", columns.label or plan.negatives, "negatives"),
    ):
        if not value:
            raise ConfigError(f"{what} needs {key}", next_step=f"Say which in the plan: {key}")


def _check_shared(plan: Plan, name: str) -> None:
    spec = plan.features[name]
    owners = [n for n, s in plan.features.items() if s.share is None and s.kind in ("categorical", "sequence")]
    if spec.share is not None and (spec.share not in owners or spec.kind not in ("categorical", "sequence")):
        raise ConfigError(
            f"feature {name!r} must share with a feature of ids that itself shares with none",
            received=spec.share,
            next_step=nearest(spec.share, owners),
        )
    if spec.vectors is not None and (name not in owners or spec.hash_buckets):
        raise ConfigError(
            f"feature {name!r} has pretrained vectors, so it needs a vocabulary of its own",
            next_step="Leave out share and hash_buckets, and let it be categorical or a sequence",
        )


def check_columns(plan: Plan, name: str, types: Any) -> None:
    """Whether a log has the columns, in types that can be used.

    Args:
        plan: names the columns.
        name: of the source, for messages.
        types: the schema of an Ibis table.

    Raises:
        ConfigError: a column is not there; the message names the nearest.
        SchemaError: a column has a type that cannot be used.
    """
    for column in needed(plan):
        if column not in types:
            raise ConfigError(f"{name} has no such column", received=column, next_step=nearest(column, types))
    columns = plan.columns
    for name, spec in plan.features.items():
        for source in spec.sources(name):
            kind = types[source]
            single = kind.is_string() or kind.is_numeric() or kind.is_boolean()
            if not single and not (spec.kind == "sequence" and kind.is_array()):
                wanted = "lists, text" if spec.kind == "sequence" else "text, numbers"
                raise SchemaError(f"column {source!r} must hold {wanted} or booleans", received=str(kind))
    for plain_name in (*columns.domains, columns.label, columns.user, columns.item, columns.weight):
        kind = types[plain_name] if plain_name else None
        if kind is not None and not (kind.is_string() or kind.is_numeric() or kind.is_boolean()):
            raise SchemaError(f"column {plain_name!r} must hold text, numbers or booleans", received=str(kind))


def check_item_columns(clicks: Any, plan: Plan) -> None:
    """Whether all that an item tells goes with the item that is drawn for a non-click.

    A sampled non-click keeps its click's columns but for the item's, so that the category of the clicked item beside
    another item would tell the label.

    Args:
        clicks: an Ibis table of the rows that non-clicks are drawn for.
        plan: names the item and what goes with it.

    Raises:
        ConfigError: a feature has one value for each item and is none of ``columns.item_columns``.
    """
    columns = plan.columns
    read = {source for name, spec in plan.features.items() for source in spec.sources(name)}
    rows, items = size(clicks), size(clicks.select(columns.item).distinct())
    if 2 * items >= rows:  # most items have one row, and so one value of everything
        return
    for name in sorted(read - {columns.item, columns.user, *columns.item_columns, *columns.domains}):
        values, pairs = (size(clicks.select(*names).distinct()) for names in ((name,), (columns.item, name)))
        if pairs == items and values > 1:
            raise ConfigError(
                "a column that has one value for each item must go with the item that is drawn, or it tells the label",
                received=name,
                next_step=f"Add it to columns.item_columns: {json.dumps([*columns.item_columns, name])}",
            )
