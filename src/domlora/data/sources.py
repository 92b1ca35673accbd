"""Published data sets by name: their raw files as a lazy table of raw columns, and the plans that come with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domlora.data.engine import Engine
from domlora.data.published.aliccp import ali_ccp
from domlora.data.published.amazon import amazon
from domlora.data.published.ebnerd import ebnerd
from domlora.data.published.kuairand import kuairand
from domlora.data.published.movielens import movielens_1m, movielens_20m, movielens_25m, movielens_100k
from domlora.data.published.taobao import taobao_theme
from domlora.data.raw import RawTable
from domlora.errors import ConfigError, nearest

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["SOURCES", "open_source", "presets"]

SOURCES: dict[str, Callable[[Engine, Path | None, Mapping[str, Any], Progress | None], RawTable]] = {
    "ali-ccp": ali_ccp,
    "amazon": amazon,
    "ebnerd": ebnerd,
    "kuairand": kuairand,
    "movielens-100k": movielens_100k,
    "movielens-1m": movielens_1m,
    "movielens-20m": movielens_20m,
    "movielens-25m": movielens_25m,
    "taobao-theme": taobao_theme,
}
"""Every source by its exact name."""


def open_source(
    engine: Engine,
    name: str,
    raw: Path | None = None,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> RawTable:
    """The source of that name.

    Args:
        engine: where its table will be.
        name: a key of ``SOURCES``.
        raw: the folder of its files, or that folder's parent; by default ``$DOMLORA_DATA``, the cache or a download.
        options: of the source, see its docstring.
        progress: shows what is fetched and read.

    Raises:
        ConfigError: no such source or option.
        DataError: its files are nowhere or cannot be read.
    """
    if name not in SOURCES:
        raise ConfigError("unknown source", received=name, next_step=nearest(name, SOURCES))
    return SOURCES[name](engine, raw, options or {}, progress)


def presets() -> dict[str, Path]:
    """The plans that are installed with the library: name → TOML file."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.toml"))}
