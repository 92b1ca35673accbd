"""``adapt-each``: every domain's adapter by itself, many at the same time."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from domlora.cli.options import ConfigFile, Data, Out, Overwrite, Settings, check_same_encoder, refuse_existing
from domlora.errors import ConfigError, nearest
from domlora.terminal import STDOUT, bar

if TYPE_CHECKING:
    from domlora.training.parallel.run import Engine

__all__ = ["adapt_each"]

_ENGINES = ("processes", "ray")


def adapt_each(
    data: Data,
    bundle: Annotated[Path, typer.Option("--bundle", help="Bundle of a trained base.")],
    out: Out,
    config: ConfigFile = None,
    domains: Annotated[
        list[str] | None, typer.Option("--domain", help="Only this domain; repeatable. All without.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="Domains at the same time, each on one core.")] = 1,
    engine: Annotated[str, typer.Option("--engine", help="`processes` of this machine, or `ray`.")] = "processes",
    ray_address: Annotated[
        str, typer.Option("--ray-address", help="Of a Ray cluster, such as auto; without one, Ray starts here.")
    ] = "",
    tries: Annotated[int, typer.Option("--tries", help="Workers that a domain may cost before it is given up.")] = 3,
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Folder that all workers see, and that is kept; without it one beside --out."),
    ] = None,
    settings: Settings = None,
    overwrite: Overwrite = False,
) -> None:
    """Freeze a trained base and train each domain's adapter alone, many at the same time.

    Trains as `onboard` does, by [train.onboard], from the bundle's own adapters if it has some. Killed and started again,
    it does what is missing; results do not depend on workers or engine.
    """
    from domlora.bundle import Bundle
    from domlora.config import load_config
    from domlora.data.dataset import Dataset
    from domlora.training.parallel.run import adapt_apart

    refuse_existing(out, overwrite)
    runs = _engine(engine, workers, tries, ray_address)
    recipe, folder = load_config(config, settings or ()).train, work or out.parent / f".{out.name}.work"
    opened, rows = Bundle.open(bundle), Dataset.open(data)
    check_same_encoder(opened, rows)
    with bar() as shown:
        line = shown.add_task("domains", total=len(domains or rows.schema.domains))
        adapted, found = adapt_apart(
            opened, rows, recipe, folder, runs, domains=domains or (), on_outcome=lambda *_: shown.advance(line)
        )
    adapted.save(out, overwrite=overwrite)
    if work is None:
        shutil.rmtree(folder)
    STDOUT.print(f"{found}; wrote {out}", markup=False, highlight=False, soft_wrap=True)


def _engine(name: str, workers: int, tries: int, address: str) -> Engine:
    from domlora.training.parallel.on_ray import installed_ray, on_ray
    from domlora.training.parallel.processes import in_workers

    if name not in _ENGINES:
        raise ConfigError("unknown engine", received=name, next_step=nearest(name, _ENGINES))
    if address and name != "ray":
        raise ConfigError("--ray-address is for --engine ray", received=address)
    if name == "ray":
        installed_ray()
        return partial(on_ray, workers=workers, tries=tries, address=address)
    return partial(in_workers, workers=workers, tries=tries)
