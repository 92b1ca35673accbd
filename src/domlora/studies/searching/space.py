"""Spaces of options to search: what a study's ``[search]`` may say, and what of it an arm can tune."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from domlora.config import merged, parse
from domlora.errors import ConfigError, nearest
from domlora.training.methods import METHODS

__all__ = ["Options", "Range", "Search", "Space", "depends_on", "dotted", "nested", "read_space", "space_of"]

Options: TypeAlias = Mapping[str, Any]
"""Dotted key of ``Config`` -> value."""

Equal = Literal["trials", "total"]
Pruning = Literal["median", "halving", "none"]

_CHOSEN_BY, _NOT_AN_OPTION = ("seed", "monitor"), "model.name"


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; whole ones if both are whole and so is the step.

    Args:
        low, high: the ends.
        step: distance of neighbours, counted from ``low``; None for any number in between.
        log: whether each decade is as likely as the next, as for learning rates; not with a step.
    """

    low: int | float
    high: int | float
    step: int | float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        ends = (self.low, self.high, 1 if self.step is None else self.step)
        if not all(map(math.isfinite, ends)) or self.low >= self.high:
            raise ConfigError("a range needs low below high", received=self)
        if self.step is not None and (self.log or not 0 < self.step <= self.high - self.low):
            raise ConfigError("a step must be above 0, fit between low and high, and go without log", received=self)
        steps = (self.high - self.low) / (self.step or 1)
        if self.step is not None and abs(steps - round(steps)) > 1e-9 * steps:
            raise ConfigError("a whole number of steps must lead from low to high", received=self)
        if self.log and self.low <= 0:
            raise ConfigError("a range with log needs low above 0", received=self)

    @property
    def is_whole(self) -> bool:
        """Whether its numbers are whole."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))


Space: TypeAlias = Mapping[str, Range | tuple[Any, ...]]
"""Dotted key of ``Config`` -> a range or the values to choose from."""


@dataclass(frozen=True, slots=True)
class Search:
    """How each arm's options are tuned, on the validation split alone.

    Args:
        trials: option sets that each arm tries on each dataset and model.
        seed: of the sampler; equal seeds try the same.
        seeds: of the trainings of a trial, whose figure is their mean; by default 0, or the next after the largest seed of
            the study if that one is among them.
        equal: ``trials`` gives each arm ``trials``, the base too. An arm that starts from the tuned base then has the base's
            trials behind it besides. ``total`` counts those: the base, and every arm that does not start from it, gets
            twice the trials, and the others start from the best of the base's first half.
        pruning: how a trial that falls behind is ended early: ``median`` (worse than the median of the trials before it,
            after as many validations), ``halving`` (successive halving) or ``none``. It counts as a trial.
        space: what all arms tune as far as they depend on it: dotted keys or nested tables of ``Config``, and for each a
            list of choices, ``{low, high}``, ``{low, high, log = true}`` or ``{low, high, step}``.
        of: spaces on top by the name of a model, a method or an arm, in this order.
    """

    trials: int = 20
    seed: int = 0
    seeds: tuple[int, ...] = ()
    equal: Equal = "trials"
    pruning: Pruning = "median"
    space: dict[str, Any] = field(default_factory=dict)
    of: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError("a search needs trials of at least 1", received=self.trials)
        if min((self.seed, *self.seeds)) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError("a search needs seeds of at least 0 that differ", received=[self.seed, *self.seeds])
        for name, value, known in (("equal", self.equal, Equal), ("pruning", self.pruning, Pruning)):
            if value not in get_args(known):
                raise ConfigError(
                    f"unknown {name} of a search", received=value, next_step=nearest(value, get_args(known))
                )
        if not (self.space or any(self.of.values())):
            raise ConfigError("a search needs a space", next_step="Add [search.space]")
        for table in (self.space, *self.of.values()):
            read_space(table)


def dotted(table: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables as dotted keys.

    >>> dotted({"train": {"adapter": {"temperature": 4}}})
    {'train.adapter.temperature': 4}
    """
    return dict(_leaves(table, "", lambda value: not isinstance(value, Mapping)))


def nested(options: Options) -> dict[str, Any]:
    """Dotted keys as nested tables.

    >>> nested({"model.dropout": 0.1, "model.embedding_dim": 8})
    {'model': {'dropout': 0.1, 'embedding_dim': 8}}
    """
    result: dict[str, Any] = {}
    for key, value in options.items():
        table: Any = value
        for part in reversed(key.split(".")):
            table = {part: table}
        result = merged(result, table)
    return result


def read_space(table: Mapping[str, Any]) -> dict[str, Range | tuple[Any, ...]]:
    """A space as it was written, in dotted keys or nested tables, checked.

    >>> read_space({"model": {"dropout": [0.0, 0.2]}, "train.joint.optimizer.dense.lr": {"low": 1e-4, "high": 1e-2}})
    {'model.dropout': (0.0, 0.2), 'train.joint.optimizer.dense.lr': Range(low=0.0001, high=0.01, step=None, log=False)}

    Raises:
        ConfigError: values of another form, or an option that a search must leave alone or no method reads.
    """
    found: dict[str, Range | tuple[Any, ...]] = {}
    for key, value in _leaves(table, "", _is_leaf):
        if key == _NOT_AN_OPTION or key.rpartition(".")[2] in _CHOSEN_BY:
            raise ConfigError("a search must leave this option alone", received=key)
        if not any(depends_on(method, key) for method in METHODS):
            parts = {f"train.{part}" for method in METHODS.values() for part in method.parts}
            raise ConfigError("no method reads an option of the search", received=key, next_step=nearest(key, parts))
        found[key] = _values(key, value)
    return found


def depends_on(method: str, key: str) -> bool:
    """Whether an arm of a method can tune an option: its training reads it, and the base it starts from does not."""
    room, _, rest = key.partition(".")
    if METHODS[method].from_base:
        own = set(METHODS[method].parts) - set(METHODS["base"].parts)
        return room == "train" and rest.partition(".")[0] in own
    return room == "model" or (room == "train" and rest.partition(".")[0] in METHODS[method].parts)


def space_of(
    search: Search, model: str, method: str, arm: str, fixed: Iterable[str]
) -> dict[str, Range | tuple[Any, ...]]:
    """What one arm tunes on one model.

    Args:
        fixed: dotted keys that the arm itself sets; what an arm is made of is not tuned.

    Raises:
        ConfigError: nothing is left, or the space of the method or the arm holds what the arm cannot tune.
    """
    held = set(fixed)
    found: dict[str, Range | tuple[Any, ...]] = {}
    for table in (search.space, search.of.get(model, {})):
        found |= {key: values for key, values in read_space(table).items() if depends_on(method, key)}
    for name in dict.fromkeys((method, arm)):
        own = read_space(search.of.get(name, {}))
        for key in own:
            if not depends_on(method, key):
                raise ConfigError(
                    f"search.of.{name}: method {method!r} cannot tune this option",
                    received=key,
                    next_step=_tunable(method),
                )
            if name == arm != method and _is_held(key, held):
                raise ConfigError(f"arm {arm!r} sets an option and searches it too", received=key)
        found |= own
    found = {key: values for key, values in found.items() if not _is_held(key, held)}
    if not found:
        raise ConfigError(
            f"a search needs something to tune in every arm, and {arm!r} has nothing",
            received=sorted(read_space(search.space)),
            next_step=f"{_tunable(method)}. Add a space: [search.of.{arm}]",
        )
    return found


def _tunable(method: str) -> str:
    parts = METHODS[method].parts
    if METHODS[method].from_base:
        kept = [part for part in parts if part not in METHODS["base"].parts]
        return f"It starts from the tuned base, so it tunes {' and '.join(f'train.{part}' for part in kept)} alone"
    return f"It depends on model and {' and '.join(f'train.{part}' for part in parts)}"


def _is_held(key: str, held: set[str]) -> bool:
    """Whether a key, or a part of the table that it names, is among those."""
    return any(f"{one}.".startswith(f"{key}.") or f"{key}.".startswith(f"{one}.") for one in held)


def _values(key: str, value: Any) -> Range | tuple[Any, ...]:
    if isinstance(value, Mapping):
        try:
            return parse(Range, value)
        except ConfigError as error:
            raise ConfigError(f"space of {key}: {str(error).removesuffix('.')}") from error
    if not isinstance(value, list) or not value:
        rule = "a space needs a list of choices, or a table with low and high"
        raise ConfigError(f"{rule}, for {key}", received=value)
    texts = [json.dumps(choice, sort_keys=True) for choice in value]
    if len(set(texts)) < len(texts):
        raise ConfigError(f"choices must differ, for {key}", received=value)
    return tuple(value)


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, Mapping) or bool({"low", "high", "step", "log"} & value.keys())


def _leaves(table: Mapping[str, Any], path: str, is_leaf: Any) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        where = f"{path}.{key}" if path else key
        if is_leaf(value):
            yield where, value
        else:
            yield from _leaves(value, where, is_leaf)
