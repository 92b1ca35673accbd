"""A domain that comes late: what does its adapter reach with few rows and with many, and what else could one do with them?

    python studies/onboarding.py --dataset ebnerd --raw FOLDER --out runs/onboarding --rows 100 1000 10% all --seeds 1 2 3

For each held-out domain a base and its adapters are trained jointly on the other domains (DeepFM, options of the dataset's
own study, temperature 4); words that only the held-out domain has are unknown to it. Then the domain is onboarded with some
of its rows, clicks in proportion, and compared on all of its test rows with training from scratch on the same rows, with
finetuning a copy of the base, and with joint training of everything anew. Results are one line each in
``onboarding.jsonl``; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from domlora.adapters.attach import detach_
from domlora.bundle import Bundle
from domlora.config import load_plan, parse, read_toml
from domlora.data.dataset import SPLITS, Dataset
from domlora.data.prepare import prepare
from domlora.evaluation.evaluate import predict
from domlora.evaluation.metrics import log_loss, wauc
from domlora.features.batch import Batch
from domlora.features.encode import Encoder
from domlora.features.schema import FIRST_ID, OOV_ID, Feature
from domlora.models.build import build_model
from domlora.studies.reporting.statistics import paired
from domlora.studies.study import Study
from domlora.training.fit import fit
from domlora.training.new_rows import NewRows
from domlora.training.onboard import onboard
from domlora.training.optimizers import OptimizerOptions, Rule
from domlora.training.stages import Recipe, Stage, Start, pretrain, seeded

HERE = Path(__file__).parent
DATASETS = {  # name: the study whose options are taken, its dataset and its arm
    "ebnerd": ("ebnerd.toml", "random-split", "joint_t4"),
    "ebnerd-time": ("ebnerd.toml", "time-split", "joint_t4"),
    "amazon-5core": ("amazon.toml", "amazon-six", "joint_t4"),
    "movielens-1m": ("movielens_gen.toml", "ml-1m-gender", "joint"),
}
STARTS: dict[str, tuple[Start, ...]] = {
    "onboard, untrained": (),
    "onboard from zero": ("zero",),
    "onboard from mean": ("mean",),
    "onboard from nearest": ("nearest",),
    "onboard from mix": ("mix",),
    "onboard, chosen": ("zero", "mean", "nearest", "mix"),
}
ARMS = ("base alone", *STARTS, "from scratch", "finetune a copy", "joint again")


class Key(NamedTuple):
    """What makes a result the same."""

    dataset: str
    hold_out: str
    rows: str
    seed: int
    arm: str


class HeldOut(NamedTuple):
    """The rows of the other domains, and those of all with an encoder that grew out of theirs; the domain is the last."""

    others: Dataset
    everything: Dataset
    domain: str


@dataclass(frozen=True)
class Case:
    """One training set: so many rows of the held-out domain, beside all rows of the others."""

    data: Dataset
    domain: str
    bundle: Bundle
    recipe: Recipe
    options: dict[str, Any]

    @property
    def rows(self) -> NewRows:
        """The domain's rows as the bundle sees them."""
        schema = self.bundle.encoder.schema
        grown = replace(schema, domains=(*schema.domains, self.domain))
        return NewRows(self.data, self.domain, grown, schema.num_domains)


class Outcome(NamedTuple):
    """A model, the rows it scores, what moved, and what was chosen."""

    model: nn.Module
    rows: Any
    parameters: int
    chosen: str = ""


def main() -> None:
    """Run what is not there yet, then print the table."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    study_file, name, arm = DATASETS[args.dataset]
    study = parse(Study, read_toml(HERE / study_file))
    config, spec = study.config_of(name, "deepfm", arm), study.datasets[name]
    folder = args.out / "data" / args.dataset
    if not folder.exists():
        prepare(load_plan(str(spec.source), spec.settings), folder, folder=args.raw)
    data, results = Dataset.open(folder, in_memory=True), args.out / "onboarding.jsonl"
    done = {Key(*(line[name] for name in Key._fields)) for line in _lines(results)}
    for domain, seed in product(args.hold_out or data.schema.domains, args.seeds):
        held = held_out(data, domain)
        most = int((held.everything.read("train").domain == held.others.schema.num_domains).sum())
        sizes = [rows for rows in args.rows if _number(rows, most) <= most]
        wanted = [Key(args.dataset, domain, rows, seed, arm) for rows in sizes for arm in args.arms]
        todo = [key for key in wanted if key not in done]
        if not todo:
            continue
        recipe = seeded(_recipe(config.train), seed)
        place = args.out / "bases" / f"{args.dataset}-{domain}-{seed}".replace("/", "_")
        bundle = _bundle(place, held, config.model, recipe)
        for key in todo:
            case = Case(with_rows(held, key.rows, seed), domain, bundle, recipe, config.model)
            _write(results, {**key._asdict(), **run(key.arm, case)})
    sys.stdout.write(table([line for line in _lines(results) if line["dataset"] == args.dataset]) + "\n")


def run(arm: str, case: Case) -> dict[str, Any]:
    """Train one arm and score the test rows of the held-out domain."""
    began = time.perf_counter()
    found = _how(arm)(case)
    minutes = (time.perf_counter() - began) / 60
    said = predict(found.model, found.rows.batches("test", 16384))
    return {
        "auc": wauc(said.label, said.probability, said.domain, said.weight),
        "log_loss": log_loss(said.label, said.probability, said.weight),
        "minutes": minutes,
        "parameters": found.parameters,
        "chosen": found.chosen,
    }


def _how(arm: str) -> Callable[[Case], Outcome]:
    others = {"base alone": _base, "from scratch": _scratch, "finetune a copy": _finetune, "joint again": _joint}
    return others.get(arm) or (lambda case: _onboard(case, STARTS[arm]))


def _base(case: Case) -> Outcome:
    return Outcome(_copy_of_base(case), case.rows, 0)


def _onboard(case: Case, starts: tuple[Start, ...]) -> Outcome:
    recipe = replace(case.recipe, onboard=replace(case.recipe.onboard, starts=starts))
    bundle, found = onboard(case.bundle, case.data, case.domain, recipe)
    row = sum(p[0].numel() for name, p in bundle.model.named_parameters() if "lora_" in name)
    return Outcome(bundle.model, case.rows, row if found.fit is not None else 0, found.chosen)


def _scratch(case: Case) -> Outcome:
    rows, stage = case.rows, case.recipe.pretrain
    torch.manual_seed(stage.fit.seed)
    model = build_model(schema=rows.schema, **case.options)
    return _trained(model, rows, stage, start_is_candidate=False)


def _finetune(case: Case) -> Outcome:
    return _trained(_copy_of_base(case), case.rows, case.recipe.finetune, start_is_candidate=True)


def _joint(case: Case) -> Outcome:
    model, _ = pretrain(case.data, case.options, case.recipe, method="joint")
    number = case.data.schema.domains.index(case.domain)
    return Outcome(model, NewRows(case.data, case.domain, case.data.schema, number), _size(model))


def _trained(model: nn.Module, rows: NewRows, stage: Stage, *, start_is_candidate: bool) -> Outcome:
    """Batches as ``onboard`` makes them: smaller where rows are few."""
    batch_size = min(stage.fit.batch_size, max(rows.num_rows("train") // 10, 32))
    options = replace(stage.fit, batch_size=batch_size, max_epochs=100, evaluations_per_epoch=1)
    fit(model, rows, options, stage.optimizer, start_is_candidate=start_is_candidate)
    return Outcome(model, rows, _size(model))


def _copy_of_base(case: Case) -> nn.Module:
    return detach_(copy.deepcopy(case.bundle.model))


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def held_out(data: Dataset, domain: str) -> HeldOut:
    """Take a domain out, and make the words that nobody else's training rows have the last of each vocabulary."""
    schema, number = data.schema, data.schema.domains.index(domain)
    train = data.read("train")
    seen = train.ids[train.domain != number]
    owners = {f.name: f.share or f.name for f in schema.categorical}
    slots = [owners[feature.name] for feature in schema.slots]
    kept: dict[str, Tensor] = {}
    for feature in schema.features:
        if feature.has_vocabulary:
            its = [slot for slot, owner in enumerate(slots) if owner == feature.name]
            kept[feature.name] = torch.bincount(seen[:, its].flatten(), minlength=feature.num_ids)[FIRST_ID:] > 0
    orders = {name: torch.argsort(~known, stable=True) for name, known in kept.items()}  # new place -> old place
    words = {name: [data.encoder.vocabularies[name][place] for place in order] for name, order in orders.items()}
    sizes = {name: int(known.sum()) for name, known in kept.items()}
    names = tuple(name for name in schema.domains if name != domain)
    grown = Encoder(replace(schema, domains=(*names, domain)), words)
    features = tuple(_cut(feature, owners, sizes) for feature in schema.features)
    small = Encoder(
        replace(schema, features=features, domains=names), {name: words[name][:size] for name, size in sizes.items()}
    )
    moved = [_places(orders[owner]) if owner in orders else None for owner in slots]
    ends = torch.tensor([feature.num_ids for feature in small.schema.slots])
    domains = torch.tensor([grown.schema.domains.index(name) for name in schema.domains])
    whole = {split: _renamed(data.read(split), moved, domains) for split in SPLITS}
    rest = {split: rows.take(rows.domain < len(names)) for split, rows in whole.items()}
    cut = {split: rows._replace(ids=torch.where(rows.ids < ends, rows.ids, OOV_ID)) for split, rows in rest.items()}
    return HeldOut(
        Dataset.from_batches(small.schema, cut, small), Dataset.from_batches(grown.schema, whole, grown), domain
    )


def _cut(feature: Feature, owners: dict[str, str], sizes: dict[str, int]) -> Feature:
    owner = owners.get(feature.name, "")
    return replace(feature, num_ids=FIRST_ID + sizes[owner]) if owner in sizes else feature


def _places(order: Tensor) -> Tensor:
    """Old id to new id."""
    found = torch.arange(FIRST_ID + len(order))
    found[FIRST_ID + order] = FIRST_ID + torch.arange(len(order))
    return found


def _renamed(rows: Batch, moved: list[Tensor | None], domains: Tensor) -> Batch:
    ids = [column if new is None else new[column] for column, new in zip(rows.ids.unbind(1), moved, strict=True)]
    known = torch.where(rows.domain < 0, -1, domains[rows.domain.clamp(min=0)])
    return rows._replace(ids=torch.stack(ids, 1), domain=known)


def with_rows(held: HeldOut, rows: str, seed: int) -> Dataset:
    """Everything, but of the held-out domain only so many training rows, with the same share of clicks."""
    data = held.everything
    if rows == "all":
        return data
    train = data.read("train")
    own = train.domain == data.schema.domains.index(held.domain)
    share = _number(rows, int(own.sum())) / int(own.sum())
    generator = torch.Generator().manual_seed(seed)
    picked = [torch.nonzero(~own).flatten()]
    for clicked in (True, False):
        places = torch.nonzero(own & ((train.label > 0.5) == clicked)).flatten()
        picked.append(places[torch.randperm(len(places), generator=generator)[: max(round(share * len(places)), 1)]])
    splits = {split: data.read(split) for split in SPLITS}
    return Dataset.from_batches(
        data.schema, {**splits, "train": train.take(torch.cat(picked).sort().values)}, data.encoder
    )


def _number(rows: str, most: int) -> int:
    """``all``, a share as ``10%``, or a number."""
    if rows.endswith("%"):
        return round(most * float(rows[:-1]) / 100)
    return most if rows == "all" else int(rows)


def _bundle(place: Path, held: HeldOut, options: dict[str, Any], recipe: Recipe) -> Bundle:
    """Base and adapters of the other domains, trained once."""
    if not place.exists():
        model, _ = pretrain(held.others, options, recipe, method="joint")
        Bundle(model, options, held.others.encoder).save(place)
    return Bundle.open(place)


def _recipe(recipe: Recipe) -> Recipe:
    slow = Rule(lr=3e-4)
    finetune = Stage(recipe.adapt.fit, OptimizerOptions(tables=slow, dense=slow))
    return replace(recipe, finetune=finetune)


def table(lines: list[dict[str, Any]]) -> str:
    """Mean AUC in points and its 95 % interval over seeds, a line an arm, a column a number of rows; all domains first."""
    sizes = sorted({line["rows"] for line in lines}, key=_order)
    out = [over_all(lines, sizes)]
    for domain in dict.fromkeys(line["hold_out"] for line in lines):
        own = [line for line in lines if line["hold_out"] == domain]
        seeds = len({line["seed"] for line in own})
        out += [
            f"\n**{domain}**, {seeds} seed{'s' * (seeds > 1)}\n",
            f"| AUC | {' | '.join(sizes)} | minutes | parameters |",
        ]
        out.append("|---|" + "---:|" * (len(sizes) + 2))
        for arm in ARMS:
            if mine := [line for line in own if line["arm"] == arm]:
                cells = [_cell([line["auc"] for line in mine if line["rows"] == rows]) for rows in sizes]
                last = [line for line in mine if line["rows"] == mine[-1]["rows"]]
                minutes = paired(line["minutes"] for line in last).mean
                out.append(f"| {arm} | {' | '.join(cells)} | {minutes:.2f} | {mine[-1]['parameters']:,} |")
    return "\n".join(out)


def over_all(lines: list[dict[str, Any]], sizes: list[str]) -> str:
    """What each arm adds to the base alone: points of AUC, mean over held-out domains and seeds with its 95 % interval."""
    bases = {(line["hold_out"], line["rows"], line["seed"]): line for line in lines if line["arm"] == ARMS[0]}
    out = [
        f"\n| added to the base alone | {' | '.join(sizes)} | median minutes, {sizes[-2]} |",
        "|---|" + "---:|" * (len(sizes) + 1),
    ]
    for arm in ARMS[1:]:
        if mine := [line for line in lines if line["arm"] == arm]:
            gains = {
                rows: [
                    each["auc"] - bases[each["hold_out"], rows, each["seed"]]["auc"]
                    for each in mine
                    if each["rows"] == rows
                ]
                for rows in sizes
            }
            minutes = [line["minutes"] for line in mine if line["rows"] == sizes[-2]]
            cells = [_cell(gains[rows], "+.2f") for rows in sizes]
            out.append(f"| {arm} | {' | '.join(cells)} | {f'{median(minutes):.2f}' if minutes else ''} |")
    return "\n".join(out)


def _order(rows: str) -> tuple[bool, bool, float]:
    return rows == "all", rows.endswith("%"), 0.0 if rows == "all" else float(rows.rstrip("%"))


def _cell(values: list[float], form: str = ".2f") -> str:
    found = paired(values)
    said = [format(100 * value, form) for value in (found.mean, found.low, found.high)]
    if found.num_pairs < 2:
        return said[0] if values else ""
    return f"{said[0]} [{said[1]}, {said[2]}]"


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _write(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    sys.stderr.write(json.dumps(line) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DATASETS, default="ebnerd")
    parser.add_argument("--raw", type=Path, help="folder of the published files")
    parser.add_argument("--out", type=Path, default=Path("runs/onboarding"))
    parser.add_argument("--hold-out", nargs="+", metavar="NAME", help="domains; all of them by default")
    parser.add_argument("--rows", nargs="+", default=["100", "1000", "10%", "all"], help="numbers, shares as 10%%, all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
