"""Everything that ``domlora serve`` can be told, checked once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, get_type_hints

from domlora.errors import ConfigError, nearest

__all__ = ["Settings"]

PREFIX = "DOMLORA_"
_LOOPBACK = ("127.", "::1", "localhost")
_FLOATS = (float, float | None)
_LEAST: dict[str, float] = {
    "port": 0,
    "workers": 1,
    "max_rows": 1,
    "max_rank": 1,
    "max_adapters": 1,
    "max_body_bytes": 1024,
    "max_adapter_bytes": 1024,
    "max_connections": 1,
    "header_timeout_s": 0.1,
    "body_timeout_s": 0.1,
    "keep_alive_s": 0.1,
    "max_wait_s": 0.001,
    "deadline_s": 0.1,
    "drain_s": 0,
    "grace_s": 0.1,
    "poll_s": 0.001,
    "look_s": 0.05,
    "flush_s": 0.01,
    "keep_days": 0.01,
    "log_share": 0,
    "metrics_domains": 0,
    "rows_timeout_s": 0.001,
    "rows_cache_bytes": 0,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server runs. Times are seconds, sizes bytes; limits are those of one worker.

    Args:
        bundle: an exported folder, a store, or a bundle, which is exported beside itself. With ``store_url``, the folder
            where this machine keeps its copy of the shared store.
        name: of the model in URLs; the name of the folder without one.
        host, port: where to listen; port 0 takes a free one. TLS is for a proxy in front.
        workers: processes, each with one thread of inference; as many as cores answer most.
        token: what admin routes ask for as ``Authorization: Bearer``. Without one they are there on a loopback host only.
        unknown_domain: ``base`` answers without an adapter, ``error`` refuses, a name takes that domain's adapter.
        unknown_ids: ``count`` scores a value that no row of training had as out-of-vocabulary, ``error`` refuses it.
        max_rows: of one request.
        max_rank: of an adapter that is pushed.
        max_adapters: how many are in memory; the one unused for longest makes room.
        max_body_bytes: of a request, also once it is decompressed.
        max_adapter_bytes: of a pushed adapter.
        max_connections: open ones; one more is answered 503 and closed.
        header_timeout_s: a request's headers must be there so soon after its first byte, the first byte of a connection
            as soon.
        body_timeout_s: likewise for the body; 100 kB received buy another second.
        keep_alive_s: an idle connection is closed after this; longer than the proxy's, so that the proxy closes first.
        max_wait_s: a request that would wait longer for its turn is answered 503 with Retry-After at once.
        deadline_s: a worker that cannot go on for so long answers all who wait with 504, ends, and is started anew.
        drain_s: after SIGTERM, ``ready`` is 503 and requests are still taken for so long; a balancer needs it to see it.
        grace_s: then running requests have this long to end.
        poll_s: how often a worker looks for a new version or adapter.
        store_url: of a store that several machines share: a folder, or ``s3://BUCKET/PATH``. It is changed by publishing to
            it; admin routes of a server that has one change nothing.
        look_s: how often one worker of a machine looks there.
        flush_s: how often exposures and feedback go to disk.
        keep_days: files of them that were written before are removed, once a minute; None keeps them all. An experiment is
            analyzed from its start on, and CUPED asks for 14 days before.
        log_share: of the answers that are logged, between 0 and 1; failures (5xx but overload) always are.
        metrics_domains: domains with series of their own; later ones are counted as ``other``.
        console: whether the web page is served.
        otlp_endpoint: where traces go; none are made without one.
        rows: address of the Redis or Valkey that has the rows of tables which an export leaves out.
        rows_timeout_s: that one answer of it may take; all requests of a worker wait meanwhile.
        rows_cache_bytes: of memory, for the rows used last.
        rows_missing: ``degrade`` scores a row that cannot be had as out-of-vocabulary and says so, ``error`` answers 503.

    Raises:
        ConfigError: a value of the wrong type or out of range.

    Example:
        >>> Settings(bundle=Path("live"), workers=2).admin_allowed
        True
        >>> Settings(bundle=Path("live"), workers=0)
        Traceback (most recent call last):
        domlora.errors.ConfigError: workers must be at least 1. Received: 0.
    """

    bundle: Path
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    token: str | None = None
    unknown_domain: str = "base"
    unknown_ids: str = "count"
    max_rows: int = 10_000
    max_rank: int = 256
    max_adapters: int = 1_000
    max_body_bytes: int = 8 << 20
    max_adapter_bytes: int = 256 << 20
    max_connections: int = 4_096
    header_timeout_s: float = 5.0
    body_timeout_s: float = 5.0
    keep_alive_s: float = 75.0
    max_wait_s: float = 0.05
    deadline_s: float = 2.0
    drain_s: float = 1.0
    grace_s: float = 5.0
    poll_s: float = 0.05
    store_url: str | None = None
    look_s: float = 0.5
    flush_s: float = 1.0
    keep_days: float | None = None
    log_share: float = 0.0
    metrics_domains: int = 1_000
    console: bool = True
    otlp_endpoint: str | None = None
    rows: str | None = None
    rows_timeout_s: float = 0.05
    rows_cache_bytes: int = 256 << 20
    rows_missing: str = "degrade"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            _check(name, kind, getattr(self, name))
        if self.unknown_ids not in ("count", "error"):
            raise ConfigError("unknown_ids must be 'count' or 'error'", received=self.unknown_ids)
        if self.rows_missing not in ("degrade", "error"):
            raise ConfigError("rows_missing must be 'degrade' or 'error'", received=self.rows_missing)
        if self.port > 65_535:
            raise ConfigError("port must be at most 65535", received=self.port)
        if self.log_share > 1:
            raise ConfigError("log_share must be between 0 and 1", received=self.log_share)
        if self.token is not None and not self.token.strip():
            raise ConfigError("the token must not be blank", next_step="Leave it out to have none")

    @property
    def admin_allowed(self) -> bool:
        """Whether there are admin routes at all: with a token everywhere, without one for this machine only."""
        return self.token is not None or self.host.startswith(_LOOPBACK)

    @property
    def model_name(self) -> str:
        """The name of the model in URLs."""
        return self.name or self.bundle.absolute().name

    @classmethod
    def told(cls, options: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Self:
        """Options first, then ``DOMLORA_`` variables, then defaults.

        Args:
            options: by name; None is as if left out.
            environment: where the variables are; one of a name that no setting has is somebody else's.

        Raises:
            ConfigError: an unknown option, no bundle, or a value that cannot be used.

        Example:
            >>> settings = Settings.told({"bundle": "live", "port": None}, {"DOMLORA_PORT": "9000", "DOMLORA_CONSOLE": "no"})
            >>> settings.port, settings.console
            (9000, False)
        """
        kinds = get_type_hints(cls)
        for name in options:
            if name not in kinds:
                raise ConfigError("no such setting", received=name, next_step=nearest(name, kinds))
        found = {
            name: _read(name, kinds[name], environment[PREFIX + name.upper()])
            for name in kinds
            if PREFIX + name.upper() in environment
        }
        given = {name: value for name, value in options.items() if value is not None}
        values = {**found, **given}
        if "bundle" not in values:
            raise ConfigError("there must be something to serve", next_step="Pass --bundle, or set DOMLORA_BUNDLE")
        return cls(**{**values, "bundle": Path(values["bundle"])})

    def to_json(self) -> str:
        """All settings, the token too: for a pipe, not for a log."""
        return json.dumps({**asdict(self), "bundle": str(self.bundle)})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What :meth:`to_json` gave."""
        return cls.told(json.loads(text), {})


def _check(name: str, kind: Any, value: Any) -> None:
    expected = kind | int if kind in _FLOATS else kind
    if not isinstance(value, expected) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{name} must be of type {getattr(kind, '__name__', kind)}", received=value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be finite", received=value)
    if name in _LEAST and value is not None and value < _LEAST[name]:
        raise ConfigError(f"{name} must be at least {_LEAST[name]}", received=value)


def _read(name: str, kind: Any, text: str) -> Any:
    """A variable's text as what the setting is."""
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    try:
        if kind is bool:
            return words[text.strip().lower()]
        return int(text) if kind is int else float(text) if kind in _FLOATS else text
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{PREFIX}{name.upper()} must be of type {getattr(kind, '__name__', kind)}", received=text
        ) from error
