"""``ab``: experiments of a store, from a draft to a decision."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from domlora.errors import ConfigError, needing
from domlora.terminal import STDOUT, print_json

if TYPE_CHECKING:
    from domlora.abtest.experiments import Experiment
    from domlora.abtest.registry import Registry

__all__ = ["ab_app", "create", "list_", "power", "ramp", "read", "start", "stop"]

_DAY_S = 86_400.0
_NEXT = {"draft": "; let it run with: domlora ab start", "running": "; see it with: domlora ab analyze"}

ab_app = typer.Typer(
    no_args_is_help=True, help="Compare versions of a bundle, or adapters on and off, on live traffic."
)

Store = Annotated[Path, typer.Argument(help="Folder of a store that is served.")]
Name = Annotated[str, typer.Argument(help="Name of an experiment.")]
Json = Annotated[bool, typer.Option("--json", help="As JSON, with all facts.")]
Metric = Annotated[str, typer.Option("--metric", help="`ctr`, `cvr`, `payers` or `value`: what decides.")]
Effect = Annotated[float, typer.Option("--effect", help="Smallest relative lift that is worth finding.")]
Power = Annotated[float, typer.Option("--power", help="The chance of finding it.")]
Alpha = Annotated[float, typer.Option("--alpha", help="The chance of a false alarm, all looks together.")]
Domains = Annotated[list[str] | None, typer.Option("--domain", help="Only here; may be given again.")]


@ab_app.command()
def create(
    store: Store,
    name: Name,
    arm: Annotated[
        list[str],
        typer.Option("--arm", help="`NAME`, `NAME,version=4,weight=2` or `NAME,adapters=off`; the control first."),
    ],
    metric: Metric = "ctr",
    effect: Effect = 0.01,
    power: Power = 0.8,
    alpha: Alpha = 0.05,
    share: Annotated[
        list[str] | None,
        typer.Option("--share", help="Of all units; `0.1` from the start, `0.5@2` from day 2 on; may be given again."),
    ] = None,
    holdout: Annotated[float, typer.Option("--holdout", help="Share of units that no experiment gets.")] = 0.0,
    layer: Annotated[str, typer.Option("--layer", help="Where units come from.")] = "default",
    domains: Domains = None,
    guardrail: Annotated[
        list[str] | None,
        typer.Option("--guardrail", help="`cvr=0.02`: must not fall by more than 2 %; may be given again."),
    ] = None,
    look_s: Annotated[
        float, typer.Option("--look-s", help="Seconds from one look to the next; a day, as a rule.")
    ] = _DAY_S,
    cuped_s: Annotated[
        float,
        typer.Option(
            "--cuped-s", help="Seconds before the start whose behaviour explains units' differences; 0 for none."
        ),
    ] = 14 * _DAY_S,
    salt: Annotated[
        str, typer.Option("--salt", help="Of the split into arms, which another salt deals anew; else the name.")
    ] = "",
) -> None:
    """Write a draft."""
    from domlora.abtest.experiments import Experiment

    raw: dict[str, Any] = {
        "name": name,
        "arms": [_arm(text) for text in arm],
        "primary": metric,
        "effect": effect,
        "power": power,
        "alpha": alpha,
        "share": [_step(text) for text in share or ["1"]],
        "holdout": holdout,
        "layer": layer,
        "domains": domains,
        "guardrails": [_guardrail(text) for text in guardrail or ()],
        "look_s": look_s,
        "cuped_s": cuped_s,
        "salt": salt,
    }
    _say(_registry(store).create(Experiment.from_dict(raw)))


@ab_app.command()
def start(store: Store, name: Name) -> None:
    """Let a draft run. From now on only its share may rise."""
    _say(_registry(store).start(name))


@ab_app.command()
def ramp(store: Store, name: Name, share: Annotated[float, typer.Argument(help="Of all units.")]) -> None:
    """Let more units take part, from now on."""
    _say(_registry(store).ramp(name, share))


@ab_app.command()
def stop(store: Store, name: Name) -> None:
    """Let all units go."""
    _say(_registry(store).stop(name))


@ab_app.command("list")
def list_(store: Store, json_: Json = False) -> None:
    """All experiments of a store."""
    found = _registry(store).all()
    if json_:
        import json

        print_json([json.loads(each.to_json()) for each in found])
        return
    STDOUT.print("| experiment | status | layer | share | arms | decides |", highlight=False)
    STDOUT.print("| --- | --- | --- | ---: | --- | --- |", highlight=False)
    for each in found:
        now = each.share_at(time.time())
        cells = (
            each.name,
            each.status,
            each.layer,
            f"{now:.0%}",
            ", ".join(arm.name for arm in each.arms),
            each.primary,
        )
        STDOUT.print(f"| {' | '.join(cells)} |", markup=False, highlight=False, soft_wrap=True)


@ab_app.command("analyze")
def read(
    store: Store,
    name: Name,
    log: Annotated[Path | None, typer.Option("--log", help="Folder of the event log; else the store's own.")] = None,
    json_: Json = False,
) -> None:
    """Lifts with intervals, the split, the looks so far, and what follows."""
    with needing("ab", "an analysis"):
        from domlora.abtest.analysis import analyze

    found = analyze(_registry(store).get(name), log or store, until_s=time.time())
    if json_:
        print_json(found.to_dict())
        return
    STDOUT.print(found.to_markdown(), markup=False, highlight=False, soft_wrap=True)


@ab_app.command()
def power(
    store: Store,
    metric: Metric = "ctr",
    effect: Effect = 0.01,
    power: Power = 0.8,
    alpha: Alpha = 0.05,
    share: Annotated[float, typer.Option("--share", help="Of all units that take part.")] = 1.0,
    part: Annotated[float, typer.Option("--part", help="Of these in the treatment.")] = 0.5,
    domains: Domains = None,
    json_: Json = False,
) -> None:
    """Units and days that a lift needs, from the store's event log."""
    from dataclasses import asdict

    with needing("ab", "a plan"):
        from domlora.abtest.power import needed

    found = needed(
        store, metric=metric, effect=effect, power=power, alpha=alpha, share=share, part=part, domains=domains
    )
    if json_:
        print_json(asdict(found))
        return
    what = f"a lift of {effect:.2%} of {metric} ({found.value:.5g} now)"
    if found.units is None:
        STDOUT.print(f"{what} is never found on this traffic", markup=False, highlight=False)
    else:
        STDOUT.print(f"{what}: {found.units:,} units, {found.days:.1f} days", markup=False, highlight=False)
    for days, lift in found.detectable.items():
        STDOUT.print(f"{days:>4} days find {lift:.2%}", markup=False, highlight=False)


def _registry(store: Path) -> Registry:
    from domlora.abtest.registry import Registry
    from domlora.serving.state import STATE

    if not store.is_dir():
        raise ConfigError("a store must be a folder", received=str(store))
    if not (store / STATE).is_file():
        beside = store.absolute().with_name(f"{store.absolute().name}.store")
        known = f"Pass the store beside it: {beside}" if (beside / STATE).is_file() else ""
        raise ConfigError(
            f"experiments are in a store, and this folder has no {STATE}",
            received=str(store),
            next_step=known or "Make a store with: domlora store add STORE EXPORT",
        )
    return Registry.open(store / "experiments")


def _say(experiment: Experiment) -> None:
    share = f"{experiment.share_at(time.time()):.0%} of all units"
    line = f"{experiment.name}: {experiment.status}, {share}{_NEXT.get(experiment.status, '')}"
    STDOUT.print(line, markup=False, highlight=False, soft_wrap=True)


def _arm(text: str) -> dict[str, Any]:
    """What one ``--arm`` says."""
    name, *words = text.split(",")
    values: dict[str, Any] = {"name": name}
    for word in words:
        key, _, value = word.partition("=")
        if key == "adapters" and value in ("on", "off"):
            values[key] = value == "on"
        elif key in ("version", "weight"):
            values[key] = _whole(value, text) if key == "version" else _number(value, text)
        else:
            raise ConfigError("an arm is NAME and then version=, weight= or adapters=on|off", received=text)
    return values


def _step(text: str) -> tuple[float, float]:
    """What one ``--share`` says."""
    share, _, day = text.partition("@")
    return _DAY_S * _number(day or "0", text), _number(share, text)


def _guardrail(text: str) -> dict[str, Any]:
    metric, _, margin = text.partition("=")
    return {"metric": metric, **({"margin": _number(margin, text)} if margin else {})}


def _whole(text: str, option: str) -> int:
    if not text.isdecimal():
        raise ConfigError("a version takes a whole number", received=option)
    return int(text)


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError("this option takes a number", received=option) from error
