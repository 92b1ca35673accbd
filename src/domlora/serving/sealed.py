"""Small JSON objects that say what they are and carry their own sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["opened", "sealed"]


def sealed(raw: Mapping[str, Any], kind: str) -> str:
    """An object as JSON, with its format and sha256.

    Args:
        kind: of object, and its version.

    Example:
        >>> opened(sealed({"live": 3}, "a store 1"), "a store 1")
        {'live': 3}
    """
    text = _text({**raw, "format": kind})
    return f'{text[:-1]}, "sha256": "{_sha256(text)}"}}'


def opened(content: str | bytes, kind: str) -> dict[str, Any]:
    """What :func:`sealed` was given.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: damaged, or of another kind.
    """
    raw: dict[str, Any] = json.loads(content)
    if raw.pop("sha256") != _sha256(_text(raw)):
        raise ValueError("it has another sha256 than it says")
    if raw.pop("format") != kind:
        raise ValueError(f"its format is not {kind!r}")
    return raw


def _text(raw: Mapping[str, Any]) -> str:
    """On one line: indented text goes through the slow encoder, which tells at a thousand adapters."""
    return json.dumps(raw, sort_keys=True, allow_nan=False)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
