"""``simulate``: users whose click probabilities are known, in front of a running server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from domlora.terminal import STDOUT

if TYPE_CHECKING:
    from domlora.simulation.population import Population
    from domlora.simulation.traffic import Tally

__all__ = ["simulate"]


def simulate(
    url: Annotated[str, typer.Option("--url", help="Of the server.")] = "http://127.0.0.1:8000",
    users: Annotated[int, typer.Option("--users", help="Who visit.")] = 20_000,
    seconds: Annotated[float | None, typer.Option("--seconds", help="How long; 60 if --visits is not given.")] = None,
    visits: Annotated[int | None, typer.Option("--visits", help="How many, in place of --seconds.")] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help="Visits a second; all that are answered without.")
    ] = None,
    connections: Annotated[int, typer.Option("--connections", help="Open at a time.")] = 2,
    seed: Annotated[int, typer.Option("--seed", help="The same one brings the same visits and the same luck.")] = 0,
    first: Annotated[int, typer.Option("--first", help="Number of the first visit, to go on where a run ended.")] = 0,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="What the server serves, if it is here: to analyze its log beside the truth."),
    ] = None,
) -> None:
    """Send visits to a running server: they get scores, see the best, click with known probabilities and report it.

    The model must be one of the same population, such as that of `python -m domlora.simulation.demo`.
    """
    from domlora.simulation.population import Population
    from domlora.simulation.traffic import Traffic

    population = Population(num_users=users, seed=seed)
    traffic = Traffic(url, population, rate=rate, connections=connections, first=first)
    tally = traffic.run(seconds=60.0 if seconds is None and visits is None else seconds, visits=visits)
    _say(tally)
    if store is not None:
        _compare(store, population)


def _say(tally: Tally) -> None:
    per_second = tally.visits / max(tally.seconds, 1e-9)
    line = f"{tally.visits:,} visits in {tally.seconds:.1f} s ({per_second:.0f}/s), {tally.clicks:,} clicks"
    STDOUT.print(f"{line}, {tally.refused:,} refused at first", highlight=False)
    for (experiment, arm), each in sorted(tally.arms.items()):
        clicks = f"{each.clicks / each.visits:.4f} clicks a visit, {each.expected / each.visits:.4f} expected"
        STDOUT.print(f"{experiment} {arm}: {each.visits:,} visits, {clicks}", markup=False, highlight=False)


def _compare(store: Path, population: Population) -> None:
    """Each running experiment of the store, what the clicks say and the truth."""
    from domlora.abtest.registry import Registry
    from domlora.serving.store import Store
    from domlora.simulation.demo import compare_with_truth
    from domlora.simulation.exact import true_lifts

    for experiment in Registry.open(store / "experiments").all():
        if experiment.status == "running":
            said = compare_with_truth(store, experiment.name, true_lifts(Store.open(store), experiment, population))
            STDOUT.print(f"{experiment.name}: {said}", markup=False, highlight=False, soft_wrap=True)
