"""``loadtest``: how much a running server answers, and how fast."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from domlora.cli.options import write_text
from domlora.errors import ConfigError, needing
from domlora.terminal import STDOUT

if TYPE_CHECKING:
    from domlora.loadtest import Plan, Report

__all__ = ["loadtest"]

_CLIENTS, _CONNECTIONS, _REQUESTS = 8, 512, 2_000
_BUSY = 0.8  # of a core: from here on the generator may be the limit


def loadtest(
    url: Annotated[str, typer.Argument(help="Of the server, such as http://127.0.0.1:8000.")],
    model: Annotated[str, typer.Option("--model", help="Its name in URLs.")] = "live",
    rate: Annotated[
        float | None, typer.Option("--rate", help="Requests a second at random moments, whatever the server does.")
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(
            "--clients", help="Each asks again when it is answered (8); with --rate the most connections (512)."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="That are measured.")] = 10.0,
    warmup_s: Annotated[float, typer.Option("--warmup", help="Seconds before them.")] = 1.0,
    rows: Annotated[int, typer.Option("--rows", help="Of a request.")] = 64,
    form: Annotated[str, typer.Option("--format", help="`binary` or `json`, for random requests.")] = "binary",
    requests: Annotated[
        Path | None, typer.Option("--requests", help="JSON lines of bodies, or Parquet of features; else random ids.")
    ] = None,
    domains: Annotated[
        str, typer.Option("--domains", help="Names with commas, most asked first; else all that the server tells.")
    ] = "",
    zipf: Annotated[float, typer.Option("--zipf", help="Domain k is asked 1/k^ZIPF as often; 0: all alike.")] = 0.0,
    processes: Annotated[int, typer.Option("--processes", help="That send.")] = 1,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds until a request is given up.")] = 10.0,
    pid: Annotated[
        int | None, typer.Option("--pid", help="Of the server on this machine, to measure its processor time.")
    ] = None,
    token: Annotated[str | None, typer.Option("--token", envvar="DOMLORA_TOKEN", help="Of the server.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is random.")] = 0,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Load a running server, and tell how much it answered, how fast, and what it refused.

    With `--rate` a request's time counts from when it was due, not from when it could be sent: what users feel. Without, it
    is how much the server can do with so many clients.
    """
    from domlora.loadtest import Plan, run

    most = clients or (_CLIENTS if rate is None else _CONNECTIONS)
    plan = Plan(url, rate, most, seconds, warmup_s, timeout_s, processes, pid, seed)
    if requests is None:
        sent = _random(plan, model, token, _Shape(rows, form, domains, zipf))
    else:
        sent = _from_file(plan, model, requests, rows)
    report = run(plan, sent)
    _show(report)
    if json_ is not None:
        write_text("--json", json_, report.to_json())


class _Shape(NamedTuple):
    """What random requests are like."""

    rows: int
    form: str
    domains: str
    zipf: float


def _random(plan: Plan, model: str, token: str | None, shape: _Shape) -> list[bytes]:
    """Requests with random ids, after the server has said what its model is like."""
    with needing("client", "a load test with random ids"):
        from domlora.client import Client
    from domlora.loadtest import draw_domains, http_request, random_requests

    if shape.form not in ("binary", "json") or shape.rows < 1:
        raise ConfigError("--format must be binary or json, --rows at least 1", received=(shape.form, shape.rows))
    with Client(plan.url, model=model, token=token) as client:
        metadata = client.metadata()
        names = shape.domains.split(",") if shape.domains else [each.domain for each in client.adapters()]
    drawn = draw_domains(names, _REQUESTS, zipf=shape.zipf, seed=plan.seed)
    made = random_requests(metadata, drawn, _REQUESTS, rows=shape.rows, form=shape.form, seed=plan.seed)
    return [http_request(path, body, plan.url, header_length=length) for path, body, length in made]


def _from_file(plan: Plan, model: str, file: Path, rows: int) -> list[bytes]:
    from domlora.loadtest import from_file, http_request

    return [http_request(path, body, plan.url) for path, body, _ in from_file(file, model, rows=rows)]


def _show(report: Report) -> None:
    for name, value in _lines(report):
        STDOUT.print(f"{name:>22}  {value}", markup=False, highlight=False, soft_wrap=True)
    if report.generator_cpu > _BUSY:
        STDOUT.print("the load generator was busy all the time: add --processes, or ask for less", markup=False)


def _lines(report: Report) -> Iterator[tuple[str, str]]:
    yield "offered", f"{report.offered:,.1f}/s"
    yield "answered with 200", f"{report.answered:,.1f}/s"
    for name, value in report.latency_ms.items():
        yield name, f"{value:.2f} ms"
    for said, number in report.statuses.items():
        yield said, f"{number:,}"
    if report.server_cpu_us is not None:
        yield "server, CPU a request", f"{report.server_cpu_us:,.0f} us"
    yield "sent late, p99", f"{report.sent_late_ms:.2f} ms"
    yield "generator, of a core", f"{report.generator_cpu:.0%}"
