"""What an experiment is: arms, who takes part and when, and what it is to show. Frozen, and JSON both ways."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal, Self, TypeVar

from domlora.errors import ConfigError, DataError, nearest

__all__ = ["HOLDOUT", "METRICS", "Arm", "Experiment", "Guardrail", "Status", "check_metric", "check_within"]

Status = Literal["draft", "running", "stopped"]

HOLDOUT = "holdout"
"""The arm of units that are kept out: answered like the control, and not analysed."""
METRICS = ("ctr", "cvr", "payers", "value")
"""Clicks by exposed rows, conversions by clicks, units with a conversion by units, value by units."""

_FORMAT = "domlora experiment 1"
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Arm:
    """One of the things that are compared.

    Args:
        name: as answers, headers and the log have it.
        weight: its share of the experiment's units, over the sum of all arms' weights.
        version: of the bundle; None is the live one.
        adapters: whether domains are scored with their adapters.
    """

    name: str
    weight: float = 1.0
    version: int | None = None
    adapters: bool = True

    def __post_init__(self) -> None:
        _check_name(self.name, "an arm")
        if not _is_number(self.weight) or self.weight <= 0:
            raise ConfigError("an arm's weight must be above 0", received=self.weight)
        if self.version is not None and (type(self.version) is not int or self.version < 1):
            raise ConfigError("an arm's version must be the number of one", received=self.version)
        if type(self.adapters) is not bool:
            raise ConfigError("an arm's adapters must be true or false", received=self.adapters)


@dataclass(frozen=True, slots=True)
class Guardrail:
    """A metric that must not fall by more than a margin.

    Args:
        metric: one of :data:`METRICS`.
        margin: the relative fall that is still accepted, 0.02 for 2 %.
    """

    metric: str
    margin: float = 0.02

    def __post_init__(self) -> None:
        check_metric(self.metric)
        check_within(self.margin, "a guardrail's margin", 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Experiment:
    """Arms that share the units of a slot of a layer.

    A layer deals all units out once; experiments of one layer have slots of it that do not overlap, layers are independent
    of each other, and so is the split into arms. See :mod:`domlora.abtest.assignment`.

    Args:
        name: of the experiment and its file: small letters, digits, dots, dashes and underscores.
        arms: the control first.
        layer: where it takes its units from.
        salt: of the split into arms; empty for the name. Another salt is another split.
        domains: where it applies; None is everywhere.
        share: the ramp, as steps of (seconds after the start, share of all units), never downwards. Units come in from
            outside, to all arms alike: the arms' shares of the experiment stay what they are, so that days add up.
        holdout: share of all units that are kept out; the same units in every experiment, whatever its layer.
        slot: from where to where in its layer, given at the start.
        status, started_s, stopped_s: where its life stands, times in seconds since 1970.
        primary: the metric that decides.
        guardrails: metrics that must not fall.
        effect: the smallest relative lift of the primary metric that is worth finding; with ``power`` and ``alpha`` it is
            the plan, and says when there is enough data. A lift twice as large needs a quarter of it.
        power: the chance of finding that lift.
        alpha: the chance of a false alarm, all looks together.
        look_s: how often the boundary is looked at; a day holds what returns daily.
        cuped_s: length of the period before the start whose behaviour is taken out of the units' variance; 0 for none.

    Raises:
        ConfigError: a value that makes no sense.

    Example:
        >>> experiment = Experiment("wide", (Arm("now"), Arm("wide", version=4)), share=((0.0, 0.1), (86400.0, 1.0)))
        >>> [experiment.share_at(second) for second in (0.0, 3600.0, 90000.0)]
        [0.0, 0.0, 0.0]
        >>> running = experiment.with_(status="running", started_s=0.0, slot=(0.0, 1.0))
        >>> [running.share_at(second) for second in (0.0, 3600.0, 90000.0)]
        [0.1, 0.1, 1.0]
        >>> Experiment.from_json(running.to_json()) == running
        True
    """

    name: str
    arms: tuple[Arm, ...]
    layer: str = "default"
    salt: str = ""
    domains: tuple[str, ...] | None = None
    share: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    holdout: float = 0.0
    slot: tuple[float, float] | None = None
    status: Status = "draft"
    started_s: float | None = None
    stopped_s: float | None = None
    primary: str = "ctr"
    guardrails: tuple[Guardrail, ...] = ()
    effect: float = 0.01
    power: float = 0.8
    alpha: float = 0.05
    look_s: float = 86_400.0
    cuped_s: float = 14 * 86_400.0

    def __post_init__(self) -> None:
        for name, what in ((self.name, "an experiment"), (self.layer, "a layer"), (self.salt or "a", "a salt")):
            _check_name(name, what)
        _check_arms(self.arms)
        _check_share(self.share)
        check_metric(self.primary)
        check_within(self.holdout, "the holdout", -1e-9, 1.0)
        for name in ("effect", "power", "alpha"):
            check_within(getattr(self, name), name, 0.0, 1.0)
        if not (_is_number(self.look_s) and self.look_s > 0 and _is_number(self.cuped_s) and self.cuped_s >= 0):
            raise ConfigError("times must be seconds", received=(self.look_s, self.cuped_s))
        if self.domains is not None and (not self.domains or not all(isinstance(name, str) for name in self.domains)):
            raise ConfigError("domains must be names, or none for all", received=self.domains)
        _check_life(self)

    @property
    def control(self) -> Arm:
        """What the others are compared with."""
        return self.arms[0]

    @property
    def largest_share(self) -> float:
        """Where the ramp ends."""
        return self.share[-1][1]

    def share_at(self, now_s: float) -> float:
        """The share of all units that take part at a moment."""
        if self.started_s is None or (self.stopped_s is not None and now_s >= self.stopped_s):
            return 0.0
        passed = now_s - self.started_s
        return next((share for after_s, share in reversed(self.share) if after_s <= passed), 0.0)

    def steers(self) -> frozenset[str]:
        """What its arms choose: ``version``, ``adapters``, both or nothing."""
        names = {"version" for arm in self.arms if arm.version is not None}
        return frozenset(names | {"adapters" for arm in self.arms if not arm.adapters})

    def with_(self, **changes: Any) -> Self:
        """A copy with other values."""
        return replace(self, **changes)

    def to_json(self) -> str:
        """Its text."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, content: str | bytes) -> Self:
        """Read it.

        Raises:
            DataError: not JSON, or of another format.
            ConfigError: an unknown key, or a value that makes no sense.
        """
        try:
            raw = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"an experiment must be JSON ({error})") from error
        if not isinstance(raw, dict) or raw.pop("format", _FORMAT) != _FORMAT:
            raise DataError(f"an experiment must have the format {_FORMAT!r}")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Of plain values, as JSON has them; what is not named keeps its default.

        Raises:
            ConfigError: an unknown key, or a value that makes no sense.
        """
        values = dict(raw)
        for name, read in _READ.items():
            if values.get(name) is not None:
                values[name] = _told(name, read, values[name])
        return _made(cls, values)


def _pair(raw: Any) -> tuple[float, float]:
    one, two = raw
    return float(one), float(two)


_READ: dict[str, Callable[[Any], Any]] = {
    "arms": lambda raw: tuple(_made(Arm, each) for each in raw),
    "guardrails": lambda raw: tuple(_made(Guardrail, each) for each in raw),
    "share": lambda raw: tuple(_pair(each) for each in raw),
    "slot": _pair,
    "domains": lambda raw: tuple(raw) if isinstance(raw, list | tuple) else (raw,),
}


def _made(cls: type[_T], values: Mapping[str, Any]) -> _T:
    known: tuple[str, ...] = tuple(getattr(cls, "__dataclass_fields__", ()))
    for name in values:
        if name not in known:
            raise ConfigError(
                f"unknown key of an {cls.__name__.lower()}", received=name, next_step=nearest(name, known)
            )
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"an {cls.__name__.lower()} must be whole ({error})", received=dict(values)) from error


def _told(name: str, read: Callable[[Any], Any], raw: Any) -> Any:
    try:
        return read(raw)
    except (TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name} cannot be read ({error})", received=raw) from error


def _check_name(name: str, what: str) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"the name of {what} must be 1 to 64 small letters, digits, dots, dashes or underscores", received=name
        )


def _check_arms(arms: tuple[Arm, ...]) -> None:
    names = [arm.name for arm in arms]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(
            "an experiment must have two or more arms of different names",
            received=names,
            next_step="The first one is the control",
        )
    if HOLDOUT in names:
        raise ConfigError("no arm may be called like the units that are kept out", received=HOLDOUT)


def check_metric(name: str) -> None:
    """Refuse a metric that nobody knows."""
    if name not in METRICS:
        raise ConfigError("unknown metric", received=name, next_step=nearest(str(name), METRICS))


def _check_share(share: tuple[tuple[float, float], ...]) -> None:
    rising = all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(share))
    if not share or not rising or not all(after >= 0 and 0 < part <= 1 for after, part in share):
        raise ConfigError(
            "a ramp must be steps of (seconds after the start, share of all units up to 1) that never go down",
            received=share,
            next_step="Stop the experiment to take units out of it",
        )


def _check_life(experiment: Experiment) -> None:
    begun, ended = experiment.started_s is not None, experiment.stopped_s is not None
    whole = {"draft": (False, False), "running": (True, False), "stopped": (True, True)}
    if whole.get(experiment.status) != (begun, ended) or (begun and experiment.slot is None):
        raise ConfigError("an experiment's status must agree with its times and its slot", received=experiment.status)
    if experiment.slot is not None and not 0 <= experiment.slot[0] < experiment.slot[1] <= 1:
        raise ConfigError("a slot must lie within 0 and 1", received=experiment.slot)


def check_within(value: float, what: str, low: float, high: float) -> None:
    """Refuse what is not a number strictly between two."""
    if not _is_number(value) or not low < value < high:
        raise ConfigError(f"{what} must be between {max(low, 0):g} and {high:g}", received=value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)
