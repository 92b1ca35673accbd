"""When a value of the label column is a click."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from domlora.errors import ConfigError
from domlora.features.text import canonical_text

__all__ = ["LabelRule", "zero_or_one"]

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_RULE = re.compile(r"\s*(==|!=|>=|<=|>|<)\s*(-?\d+(?:\.\d+)?)\s*", re.ASCII)
_WORDS = {
    "0": 0,
    "1": 1,
    "false": 0,
    "true": 1,
    "0.0": 0,
    "1.0": 1,
}  # the last two as pandas writes them beside absent ones


@dataclass(frozen=True, slots=True)
class LabelRule:
    """1 where ``value OP threshold`` holds.

    The paper's code takes ``== 5`` of a rating; many others take ``>= 4``.

    Example:
        >>> rule = LabelRule.parse(">= 4")
        >>> [rule(rating) for rating in (5, "4.0", "3", None, "?")], str(rule)
        ([1, 1, 0, None, None], '>=4')
    """

    comparison: str
    threshold: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``OP number``.

        Raises:
            ConfigError: the text has another form.
        """
        match = _RULE.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"a label rule must be 'OP number' with OP one of {' '.join(_COMPARISONS)}",
                received=text,
                next_step="For example: == 5",
            )
        return cls(match[1], float(match[2]))

    def __call__(self, value: object) -> int | None:
        """The label, or None for a value that is missing or not a finite number."""
        try:
            number = float(canonical_text(value))
        except ValueError:
            return None
        if number - number != 0:  # infinities and NaN
            return None
        return int(_COMPARISONS[self.comparison](number, self.threshold))

    def __str__(self) -> str:
        return f"{self.comparison}{canonical_text(self.threshold)}"


def zero_or_one(value: object) -> int | None:
    """The label of a column without a rule, or None for a value that is neither.

    >>> [zero_or_one(value) for value in (1, "0", True, "false", 1.0, "1.0", 2, None)]
    [1, 0, 1, 0, 1, 1, None, None]
    """
    return _WORDS.get(canonical_text(value).lower())
