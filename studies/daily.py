"""Seven days of news: a daily update beside retraining from scratch every day, and beside a model that stands still.

    python studies/daily.py --raw FOLDER --out runs/daily --seeds 2 3 4 5 6

EB-NeRD, cut by calendar day. The days before the first of the seven train one joint model (DeepFM, options of
studies/ebnerd.toml, temperature 4). Each day is then scored before anybody learns it, all of its rows, by the model as it
stood: updated once a day on the day before (`update`: tables and adapters move for one pass over that day), trained anew
on all days so far (`retrain`), or left alone (`still`). Words are those that each had seen by then; new ones are
out-of-vocabulary. At the end the last day comes once more with the labels of one scene shuffled, which the gate has to
stop. Seed 1 was used to choose between replay of earlier rows and none. Results are lines of ``daily.jsonl``; a seed that
is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from domlora.bundle import Bundle, versions
from domlora.config import load_plan, parse, read_toml
from domlora.data.dataset import SPLITS, Dataset
from domlora.data.prepare import prepare
from domlora.evaluation.evaluate import by_domain, predict
from domlora.models.growth import grown
from domlora.studies.reporting.statistics import paired
from domlora.studies.study import Study
from domlora.training.fit import FitOptions
from domlora.training.optimizers import OptimizerOptions, Rule
from domlora.training.stages import Recipe, Updating, pretrain
from domlora.training.update import gate, update

FIRST, DAYS = date(2023, 5, 25), 7
BEGIN = date(2023, 5, 18)
SPLIT = ["split.kind=random", "split.fractions=[0.7, 0.1, 0.2]"]
POISONED = "mobile/front"
LAZY = OptimizerOptions(tables=Rule("lazy_adam"), adapters=Rule("lazy_adam"))
UPDATE = Updating(
    FitOptions(max_epochs=1, batch_size=1024, evaluations_per_epoch=4, patience=4),
    LAZY,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="folder of the published Parquet files")
    parser.add_argument("--out", type=Path, default=Path("runs/daily"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--days", type=int, default=DAYS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = arguments.out / "daily.jsonl"
    known = read(results)
    for seed in arguments.seeds:
        if not any(line["seed"] == seed for line in known):
            lines = list(one_seed(arguments.raw, arguments.out / f"seed{seed}", seed, arguments.days))
            with results.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            known += lines
    print(table(known))


def one_seed(raw: Path, out: Path, seed: int, days: int) -> Iterator[dict[str, Any]]:
    """All arms over all days, and the poisoned one."""
    options, recipe = options_of(seed)
    cut = Days(raw, out, seed)
    first = cut.prepared("first", BEGIN, FIRST)
    began = time.perf_counter()
    Bundle(pretrain(first, options, recipe, method="joint")[0], options, first.encoder).save(
        out / "live", overwrite=True
    )
    print(f"seed {seed}: trained the first days in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    still = anew = Bundle.open(out / "live")
    live, spent = still, {"update": 0.0, "retrain": 0.0}
    written = {"update": 0, "retrain": 0}
    for number in range(days):
        today = FIRST + timedelta(number)
        if number:  # yesterday is learned overnight
            began = time.perf_counter()
            sofar = cut.prepared(f"until-{today}", BEGIN, today)
            anew = Bundle(pretrain(sofar, options, recipe, method="joint")[0], options, sofar.encoder)
            spent["retrain"] = time.perf_counter() - began
            anew.save(out / "anew", overwrite=True)
            written["retrain"] = versions(out / "anew")[0].size_bytes
        for arm, bundle in (("still", still), ("update", live), ("retrain", anew)):
            day = cut.prepared(f"{today}-{arm}", today, today + timedelta(1), grow=bundle)
            facts = {"seconds": spent.get(arm, 0.0), "bytes": written.get(arm, 0)}
            yield {"seed": seed, "day": str(today), "arm": arm, **score(bundle, day), **facts}
        day = cut.prepared(f"{today}-update", today, today + timedelta(1), grow=live)
        if number == days - 1:
            yield {"seed": seed, "day": str(today), "arm": "poisoned", **poisoned(live, day, recipe, seed)}
        began = time.perf_counter()
        candidate, _ = update(live, day, recipe)
        candidate, verdict = gate(live, candidate, day, recipe.update)
        spent["update"] = time.perf_counter() - began
        candidate.publish(out / "live", default=verdict.passed)
        written["update"] = versions(out / "live")[-1].size_bytes
        if not verdict.passed:
            print(f"seed {seed}, {today}: stopped by {'; '.join(verdict.reasons)}", file=sys.stderr)
        live = Bundle.open(out / "live")


def options_of(seed: int) -> tuple[dict[str, Any], Recipe]:
    """Those of the joint arm of the study."""
    study = parse(Study, read_toml(Path(__file__).parent / "ebnerd.toml"))
    config = study.config_of("time-split", "deepfm", "joint_t4")
    joint = replace(config.train.joint, fit=replace(config.train.joint.fit, seed=seed))
    return config.model, replace(config.train, joint=joint, update=replace(UPDATE, fit=replace(UPDATE.fit, seed=seed)))


class Days:
    """The log, cut by calendar day and prepared as the published one is."""

    def __init__(self, raw: Path, out: Path, seed: int) -> None:
        self.raw, self.out, self.seed = raw, out, seed
        self.logs = {part: pq.read_table(raw / f"behaviors_{part}.parquet") for part in ("train", "val")}

    def prepared(self, name: str, begin: date, end: date, grow: Bundle | None = None) -> Dataset:
        """The rows from a day to before another one."""
        folder, cut = self.out / "data" / name, self.out / "raw" / name
        cut.mkdir(parents=True, exist_ok=True)
        for part, log in self.logs.items():
            days = pc.cast(log["impression_time"], pa.date32())
            kept = pc.and_(pc.greater_equal(days, pa.scalar(begin)), pc.less(days, pa.scalar(end)))
            pq.write_table(log.filter(kept), cut / f"behaviors_{part}.parquet")
            history = cut / f"history_{part}.parquet"
            history.unlink(missing_ok=True)
            history.symlink_to((self.raw / f"history_{part}.parquet").resolve())
        known = None
        if grow is not None:
            known = self.out / "encoder"
            known.mkdir(exist_ok=True)
            grow.encoder.save(known)
        prepare(
            load_plan("ebnerd", [*SPLIT, f"split.seed={self.seed}"]), folder, folder=cut, grow=known, overwrite=True
        )
        return Dataset.open(folder)


def score(bundle: Bundle, day: Dataset) -> dict[str, Any]:
    """On all rows of a day, before it is learned."""
    model = grown(bundle.model, bundle.model_options, bundle.encoder.schema, day.encoder.schema)
    batches = (batch for split in SPLITS for batch in day.batches(split, 16384))
    found = by_domain(predict(model, batches), day.schema.domains)
    return {"wauc": 100 * found.summary["wauc"], "domains": {row.name: 100 * row.auc for row in found.domains}}


def poisoned(live: Bundle, day: Dataset, recipe: Recipe, seed: int) -> dict[str, Any]:
    """What the gate says of a day whose labels are shuffled in one scene."""
    scene, dice = day.schema.domains.index(POISONED), torch.Generator().manual_seed(seed)
    splits = {}
    for split in SPLITS:
        rows = day.read(split)
        label, at = rows.label.clone(), (rows.domain == scene).nonzero()[:, 0]
        label[at] = label[at[torch.randperm(len(at), generator=dice)]]
        splits[split] = rows._replace(label=label)
    spoiled = Dataset.from_batches(day.schema, splits, day.encoder)
    candidate, _ = update(live, spoiled, recipe)
    _, verdict = gate(live, candidate, spoiled, recipe.update)
    return {"stopped": not verdict.passed, "reasons": verdict.reasons}


def table(lines: list[dict[str, Any]]) -> str:
    """WAUC a day and arm, means over seeds; then differences from retraining, paired by seed, with 95 % intervals."""
    seeds = sorted({line["seed"] for line in lines})
    days = sorted({line["day"] for line in lines})

    def of(arm: str, what: str) -> Callable[[int, str], float]:
        found = {(line["seed"], line["day"]): line[what] for line in lines if line["arm"] == arm}
        return lambda seed, day: found[seed, day]

    shown = [f"| day | {' | '.join(('still', 'update', 'retrain'))} |", "| --- | ---: | ---: | ---: |"]
    for day in days:
        cells = [f"{mean(of(arm, 'wauc')(seed, day) for seed in seeds):.2f}" for arm in ("still", "update", "retrain")]
        shown.append(f"| {day} | {' | '.join(cells)} |")
    shown.append("")
    later = days[1:]
    for arm in ("still", "update"):
        ours = [mean(of(arm, "wauc")(seed, day) for day in later) for seed in seeds]
        theirs = [mean(of("retrain", "wauc")(seed, day) for day in later) for seed in seeds]
        shown.append(f"- {arm} less retrain, mean of the days after the first: {told(ours, theirs)}")
    for what, unit in (("seconds", "s"), ("bytes", "bytes")):
        each = {arm: mean(of(arm, what)(seed, day) for seed in seeds for day in later) for arm in ("update", "retrain")}
        share = each["update"] / each["retrain"]
        shown.append(
            f"- {what} a day: update {each['update']:,.1f} {unit}, retrain {each['retrain']:,.1f}: {share:.1%}"
        )
    spoiled = ((line["seed"], line["reasons"]) for line in lines if line["arm"] == "poisoned")
    shown += [
        f"- seed {seed}, labels of {POISONED} shuffled: {'; '.join(said) or 'not seen'}" for seed, said in spoiled
    ]
    return "\n".join(shown)


def told(ours: list[float], theirs: list[float]) -> str:
    """A paired difference; an interval takes two seeds."""
    found = paired(one - other for one, other in zip(ours, theirs, strict=True))
    spread = f"[{found.low:+.2f}, {found.high:+.2f}]" if len(ours) > 1 else "(one seed)"
    return f"{found.mean:+.2f} {spread}"


def mean(values: Iterator[float]) -> float:
    """Of at least one."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


def read(path: Path) -> list[dict[str, Any]]:
    """Lines that are there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
