"""``serve``: answer over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["serve"]

_LISTEN, _MODEL, _LIMITS, _TIMES, _SEEN, _ROWS = (
    "Where",
    "What",
    "Limits of a worker",
    "Times in seconds",
    "What is seen",
    "Tables that lie elsewhere",
)


def _option(flag: str, panel: str, text: str, default: object) -> typer.models.OptionInfo:
    shown = False if default is None else str(default)
    option: typer.models.OptionInfo = typer.Option(flag, help=text, rich_help_panel=panel, show_default=shown)
    return option


_StoreUrl = Annotated[
    str | None,
    _option(
        "--store-url",
        _MODEL,
        "A store that machines share, a folder or `s3://BUCKET/PATH`; `--bundle` is the folder of this one's copy.",
        None,
    ),
]
_UnknownDomain = Annotated[
    str | None,
    _option("--unknown-domain", _MODEL, "`base` scores without an adapter, `error` refuses, or a domain.", "base"),
]
_RowsMissing = Annotated[
    str | None,
    _option("--rows-missing", _ROWS, "`degrade` scores as out-of-vocabulary, `error` answers 503.", "degrade"),
]
_Rows = Annotated[
    str | None,
    _option("--rows", _ROWS, "Redis or Valkey with their rows: `redis://`, `rediss://`, `unix://`.", None),
]
_Drain = Annotated[
    float | None,
    _option("--drain", _TIMES, "After SIGTERM: not ready, still answering, so that balancers see it.", 1.0),
]


def serve(
    bundle: Annotated[
        Path | None,
        _option("--bundle", _MODEL, "An exported folder, a store, or a bundle (exported beside itself).", None),
    ] = None,
    name: Annotated[str | None, _option("--name", _MODEL, "Of the model in URLs; else the folder's.", None)] = None,
    store_url: _StoreUrl = None,
    unknown_domain: _UnknownDomain = None,
    unknown_ids: Annotated[
        str | None, _option("--unknown-ids", _MODEL, "`count` scores as out-of-vocabulary, `error` refuses.", "count")
    ] = None,
    host: Annotated[str | None, _option("--host", _LISTEN, "Address; `0.0.0.0` is every one.", "127.0.0.1")] = None,
    port: Annotated[int | None, _option("--port", _LISTEN, "0 takes a free one and logs it.", 8000)] = None,
    workers: Annotated[int | None, _option("--workers", _LISTEN, "Processes; as many as cores answer most.", 1)] = None,
    token: Annotated[
        str | None,
        _option("--token", _LISTEN, "Asked for by admin routes, which need one unless the host is loopback.", None),
    ] = None,
    console: Annotated[bool | None, _option("--console/--no-console", _LISTEN, "The web page.", "console")] = None,
    max_rows: Annotated[int | None, _option("--max-rows", _LIMITS, "Rows of a request.", 10_000)] = None,
    max_body_bytes: Annotated[int | None, _option("--max-body-bytes", _LIMITS, "Of a request.", 8 << 20)] = None,
    max_adapter_bytes: Annotated[
        int | None, _option("--max-adapter-bytes", _LIMITS, "Of a pushed adapter.", 256 << 20)
    ] = None,
    max_rank: Annotated[int | None, _option("--max-rank", _LIMITS, "Of a pushed adapter.", 256)] = None,
    max_adapters: Annotated[int | None, _option("--max-adapters", _LIMITS, "In memory.", 1_000)] = None,
    max_connections: Annotated[int | None, _option("--max-connections", _LIMITS, "Open at a time.", 4_096)] = None,
    max_wait_s: Annotated[
        float | None, _option("--max-wait", _TIMES, "Who would wait longer for a turn gets 503 at once.", 0.05)
    ] = None,
    deadline_s: Annotated[
        float | None, _option("--deadline", _TIMES, "A worker that hangs so long answers 504 and is replaced.", 2.0)
    ] = None,
    header_timeout_s: Annotated[
        float | None, _option("--header-timeout", _TIMES, "For a request's headers.", 5.0)
    ] = None,
    body_timeout_s: Annotated[
        float | None, _option("--body-timeout", _TIMES, "For its body; 100 kB buy another second.", 5.0)
    ] = None,
    keep_alive_s: Annotated[
        float | None, _option("--keep-alive", _TIMES, "Of an idle connection; more than the proxy's.", 75.0)
    ] = None,
    drain_s: _Drain = None,
    grace_s: Annotated[float | None, _option("--grace", _TIMES, "Then for requests that are running.", 5.0)] = None,
    poll_s: Annotated[float | None, _option("--poll", _TIMES, "Between looks for a newer version.", 0.05)] = None,
    look_s: Annotated[float | None, _option("--look", _TIMES, "Between looks at `--store-url`.", 0.5)] = None,
    flush_s: Annotated[
        float | None, _option("--flush", _TIMES, "Between writes of exposures and feedback.", 1.0)
    ] = None,
    keep_days: Annotated[
        float | None, _option("--keep-days", _TIMES, "Exposures and feedback written before are removed.", None)
    ] = None,
    log_share: Annotated[
        float | None, _option("--log-share", _SEEN, "Of the answers that are logged; failures always are.", 0.0)
    ] = None,
    metrics_domains: Annotated[
        int | None, _option("--metrics-domains", _SEEN, "Domains with counters of their own.", 1_000)
    ] = None,
    otlp_endpoint: Annotated[
        str | None, _option("--otlp-endpoint", _SEEN, "Where OpenTelemetry traces go.", None)
    ] = None,
    rows: _Rows = None,
    rows_timeout_s: Annotated[float | None, _option("--rows-timeout", _ROWS, "Seconds for one answer.", 0.05)] = None,
    rows_cache_bytes: Annotated[
        int | None, _option("--rows-cache-bytes", _ROWS, "Memory of a worker for the rows used last.", 256 << 20)
    ] = None,
    rows_missing: _RowsMissing = None,
) -> None:
    """Answer over HTTP: scores, adapters, experiments, metrics.

    Each option can also be a variable: `DOMLORA_TOKEN`, `DOMLORA_MAX_WAIT_S` and so on (times end in `_S`). The log is one
    JSON object a line on standard error. SIGTERM ends the server well, with exit code 0.

    Ask it with `curl localhost:8000/v2`, look at it at http://localhost:8000/console/.
    """
    options = locals()  # before anything else has a name here; each option is called as its setting is
    from domlora.serving.http.supervisor import serve as run
    from domlora.serving.settings import Settings

    sys.exit(run(Settings.told(options)))
