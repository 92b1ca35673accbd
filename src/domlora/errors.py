"""Every error a user can cause, as one tree.

DomloraError
├── ConfigError          an option, a key or a name that is not valid
├── SchemaError          data and schema do not agree
├── DataError            a file or a row that cannot be used
├── UnknownDomainError   a domain that has no row in the bank
├── BundleError          a bundle that is incomplete, damaged or of another base
└── EngineError          training cannot go on (NaN loss, lost worker)

The command line prints one of these as a single line and exits with 2; any other exception is a bug and
keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "BundleError",
    "ConfigError",
    "DataError",
    "DomloraError",
    "EngineError",
    "SchemaError",
    "UnknownDomainError",
    "nearest",
    "needing",
]

_NOTHING = object()


class DomloraError(Exception):
    """One line for the user: the rule, what was received, what to do next.

    Args:
        rule: what must hold, as a short sentence without a full stop.
        received: the value that broke it (shown with ``repr``); leave it out when there is none.
        next_step: what the user can do now.
    """

    next_step = ""

    def __init__(self, rule: str, *, received: object = _NOTHING, next_step: str = "") -> None:
        parts = [f"{rule}."]
        if received is not _NOTHING:
            parts.append(f"Received: {received!r}.")
        if next_step:
            self.next_step = next_step if next_step.endswith((".", "?")) else f"{next_step}."
            parts.append(self.next_step)
        super().__init__(" ".join(parts))

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), str(self))  # worker processes send errors home; __init__ would add a full stop


class ConfigError(DomloraError, ValueError):
    """An option, a key or a name that is not valid."""


class SchemaError(DomloraError, ValueError):
    """Data and schema do not agree."""


class DataError(DomloraError, ValueError):
    """A file or a row that cannot be used."""


class UnknownDomainError(DomloraError, LookupError):
    """A domain that has no row in the bank."""


class BundleError(DomloraError, ValueError):
    """A bundle that is incomplete, damaged or made for another base."""


class EngineError(DomloraError, RuntimeError):
    """Training cannot go on."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the valid key nearest to ``name`` and, when there are few, all of them.

    >>> nearest("depfm", ["deepfm", "dcn"])
    "Did you mean 'deepfm'? Known: 'dcn', 'deepfm'."
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    listed = ", ".join(map(repr, names[:30])) or "none"
    return f"{guess}Known: {listed}{', ...' if len(names) > 30 else ''}."


@contextmanager
def needing(extra: str, what: str) -> Iterator[None]:
    """Imports inside the block are of libraries that an extra brings.

    Args:
        extra: its name.
        what: needs them, for the message.

    Raises:
        ConfigError: one is missing.

    >>> with needing("spark", "the engine 'spark'"):
    ...     import no_such_library
    Traceback (most recent call last):
    domlora.errors.ConfigError: the engine 'spark' needs more libraries (No module named 'no_such_library'). Install them \
with: pip install 'domlora[spark]'.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{what} needs more libraries ({error})", next_step=f"Install them with: pip install 'domlora[{extra}]'"
        ) from error


def _again(kind: type[DomloraError], text: str) -> DomloraError:
    return kind.__new__(kind, text)
