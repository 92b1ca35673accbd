"""A domain that comes late: what does its adapter reach with few rows and with many, and what else could one do with them?

    python studies/onboarding.py --dataset ebnerd --raw FOLDER --out runs/onboarding --rows 100 1000 10% all --seeds 1 2 3

For each held-out domain a base and its adapters are trained jointly on the other domains (DeepFM, options of the dataset's
own study, temperature 4); words that only the held-out domain has are unknown to it. Then the domain is onboarded with some
of its rows, clicks in proportion, and compared on all of its test rows with finetuning a copy of the base, and with joint
training of everything anew. Results are one line each in ``onboarding.jsonl``; what is there already is not run again.
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
from domlora.adapters.bank import base_state
from domlora.bundle import Bundle
from domlora.config import load_plan, parse, read_toml
from domlora.data.dataset import SPLITS, Dataset
from domlora.data.prepare import prepare
from domlora.evaluation.evaluate import predict
from domlora.evaluation.metrics import log_loss, wauc
from domlora.features.batch import Batch
from domlora.features.encode import Encoder
from domlora.features.schema import FIRST_ID, OOV_ID, Feature, Schema
from domlora.models.growth import grown
from domlora.studies.reporting.statistics import paired
from domlora.studies.study import Study
from domlora.training.fit import fit
from domlora.training.new_rows import NewRows
from domlora.training.onboard import onboard
from domlora.training.optimizers import OptimizerOptions, Rule
from domlora.training.stages import Recipe, Stage, pretrain, seeded

HERE = Path(__file__).parent
DATASETS = {  # name: the study whose options are taken, its dataset and its arm
    "ebnerd": ("ebnerd.toml", "random-split", "joint_t4"),
    "ebnerd-time": ("ebnerd.toml", "time-split", "joint_t4"),
    "amazon-5core": ("amazon.toml", "amazon-six", "joint_t4"),
    "movielens-occupation": ("movielens_groups.toml", "occupation", "joint_t4"),
}
SETTINGS: dict[str, dict[str, Any]] = {  # what an arm changes of the recipe's ``onboard``
    "onboard, untrained": {"starts": (), "new_words": False},
    "onboard, tables still": {"new_words": False},
    "onboard": {},
}
ARMS = ("base alone", *SETTINGS, "finetune a copy", "joint again")


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
        return NewRows(
            self.data, self.domain, replace(schema, domains=(*schema.domains, self.domain)), schema.num_domains
        )

    def seen_by(self, encoder: Encoder) -> NewRows:
        """As a bundle with this encoder sees them."""
        return NewRows(self.data, self.domain, encoder.schema, encoder.schema.num_domains - 1)


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
    train, label = _recipe(config.train), args.dataset
    if args.temperature:
        train = replace(train, adapter=replace(train.adapter, temperature=args.temperature))
        label += f"-t{args.temperature:g}"
    folder = args.out / "data" / args.dataset
    if not folder.exists():
        prepare(load_plan(str(spec.source), spec.settings), folder, folder=args.raw)
    data, results = Dataset.open(folder, in_memory=True), args.out / "onboarding.jsonl"
    done = {Key(*(line[name] for name in Key._fields)) for line in _lines(results)}
    for domain, seed in product(args.hold_out or data.schema.domains, args.seeds):
        held = held_out(data, domain)
        most = int((held.everything.read("train").domain == held.others.schema.num_domains).sum())
        sizes = [rows for rows in args.rows if _number(rows, most) <= most]
        wanted = [Key(label, domain, rows, seed, arm) for rows in sizes for arm in args.arms]
        todo = [key for key in wanted if key not in done]
        if not todo:
            continue
        recipe = seeded(train, seed)
        place = args.out / "bases" / f"{label}-{domain}-{seed}".replace("/", "_")
        bundle = _bundle(place, held, config.model, recipe)
        for key in todo:
            case = Case(with_rows(held, key.rows, seed), domain, bundle, recipe, config.model)
            _write(results, {**key._asdict(), **run(key.arm, case)})
    sys.stdout.write(table([line for line in _lines(results) if line["dataset"] == label]) + "\n")


def run(arm: str, case: Case) -> dict[str, Any]:
    """Train one arm and score the test rows of the held-out domain."""
    began = time.process_time()  # of the processor: other processes of a busy machine do not count
    found = _how(arm)(case)
    minutes = (time.process_time() - began) / 60
    said = predict(found.model, found.rows.batches("test", 16384))
    return {
        "auc": wauc(said.label, said.probability, said.domain, said.weight),
        "log_loss": log_loss(said.label, said.probability, said.weight),
        "minutes": minutes,
        "parameters": found.parameters,
        "chosen": found.chosen,
    }


def _how(arm: str) -> Callable[[Case], Outcome]:
    others = {"base alone": _base, "finetune a copy": _finetune, "joint again": _joint}
    return others.get(arm) or (lambda case: _onboard(case, SETTINGS[arm]))


def _base(case: Case) -> Outcome:
    return Outcome(detach_(copy.deepcopy(case.bundle.model)), case.rows, 0)


def _onboard(case: Case, settings: dict[str, Any]) -> Outcome:
    recipe = replace(case.recipe, onboard=replace(case.recipe.onboard, **settings))
    bundle, found = onboard(case.bundle, case.data, case.domain, recipe)
    adapter = sum(p[0].numel() for name, p in bundle.model.named_parameters() if "lora_" in name)
    trained = 0 if found.fit is None else adapter
    return Outcome(bundle.model, case.seen_by(bundle.encoder), trained + _moved(case.bundle, bundle), found.chosen)


def _moved(before: Bundle, after: Bundle) -> int:
    """Numbers of the base that are not as a grown but untrained one has them."""
    schema = before.encoder.schema
    untrained = grown(before.model, before.model_options, schema, replace(after.encoder.schema, domains=schema.domains))
    one, two = base_state(untrained), base_state(after.model)
    return sum(int((one[name] != two[name]).sum()) for name in one)


def _finetune(case: Case) -> Outcome:
    """Batches as ``onboard`` makes them: smaller where rows are few."""
    model, rows, stage = detach_(copy.deepcopy(case.bundle.model)), case.rows, case.recipe.finetune
    batch_size = min(stage.fit.batch_size, max(rows.num_rows("train") // 10, 32))
    options = replace(stage.fit, batch_size=batch_size, max_epochs=100, evaluations_per_epoch=1)
    fit(model, rows, options, stage.optimizer, start_is_candidate=True)
    return Outcome(model, rows, _size(model))


def _joint(case: Case) -> Outcome:
    model, _ = pretrain(case.data, case.options, case.recipe, method="joint")
    number = case.data.schema.domains.index(case.domain)
    return Outcome(model, NewRows(case.data, case.domain, case.data.schema, number), _size(model))


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def held_out(data: Dataset, domain: str) -> HeldOut:
    """Take a domain out, and make the words that nobody else's training rows have the last of each vocabulary."""
    schema, number = data.schema, data.schema.domains.index(domain)
    train = data.read("train")
    seen = train.ids[train.domain != number]
    slots, owners = _owners(schema), {f.name: f.share or f.name for f in schema.categorical}
    kept = {name: known[FIRST_ID:] for name, known in _seen(schema, seen).items()}
    orders = {name: torch.argsort(~known, stable=True) for name, known in kept.items()}  # new place -> old place
    words = {name: [data.encoder.vocabularies[name][place] for place in order] for name, order in orders.items()}
    sizes = {name: int(known.sum()) for name, known in kept.items()}
    names = tuple(name for name in schema.domains if name != domain)
    large = Encoder(replace(schema, domains=(*names, domain)), words)
    features = tuple(_cut(feature, owners, sizes) for feature in schema.features)
    small = Encoder(
        replace(schema, features=features, domains=names), {name: words[name][:size] for name, size in sizes.items()}
    )
    moved = [_places(orders[owner]) if owner in orders else None for owner in slots]
    ends = torch.tensor([feature.num_ids for feature in small.schema.slots])
    domains = torch.tensor([large.schema.domains.index(name) for name in schema.domains])
    whole = {split: _renamed(data.read(split), moved, domains) for split in SPLITS}
    rest = {split: rows.take(rows.domain < len(names)) for split, rows in whole.items()}
    cut = {split: rows._replace(ids=torch.where(rows.ids < ends, rows.ids, OOV_ID)) for split, rows in rest.items()}
    return HeldOut(
        Dataset.from_batches(small.schema, cut, small), Dataset.from_batches(large.schema, whole, large), domain
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
    """Everything, but of the held-out domain only so many training rows, with the same share of clicks.

    Words that no training row has then are out-of-vocabulary, as if the other rows had never been seen.
    """
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
    splits = {**{split: data.read(split) for split in SPLITS}, "train": train.take(torch.cat(picked).sort().values)}
    seen = _seen(data.schema, splits["train"].ids)
    owners = _owners(data.schema)
    for split, batch in splits.items():
        columns = [
            torch.where(seen[owner][column], column, OOV_ID) if owner in seen else column
            for column, owner in zip(batch.ids.unbind(1), owners, strict=True)
        ]
        splits[split] = batch._replace(ids=torch.stack(columns, 1))
    return Dataset.from_batches(data.schema, splits, data.encoder)


def _owners(schema: Schema) -> list[str]:
    """Of each id column the feature whose vocabulary it has."""
    owners = {f.name: f.share or f.name for f in schema.categorical}
    return [owners[feature.name] for feature in schema.slots]


def _seen(schema: Schema, ids: Tensor) -> dict[str, Tensor]:
    """By vocabulary: which of its ids there are; those that stand for no word count as seen."""
    owners, seen = _owners(schema), {}
    for feature in schema.features:
        if feature.has_vocabulary:
            its = [slot for slot, owner in enumerate(owners) if owner == feature.name]
            seen[feature.name] = torch.bincount(ids[:, its].flatten(), minlength=feature.num_ids) > 0
            seen[feature.name][:FIRST_ID] = True
    return seen


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
    """What each arm adds to the base alone over held-out domains and seeds, and what it takes of joint training again."""
    known = {tuple(line[name] for name in Key._fields): line for line in lines}
    out = ["| arm | rows | added to the base alone | less joint again | log loss | time | parameters |"]
    out.append("|---|---:|---:|---:|---:|---:|---:|")
    for rows in sorted({line["rows"] for line in lines}, key=_order):
        for arm in ARMS:
            mine = [line for line in lines if line["arm"] == arm and line["rows"] == rows]
            if mine:
                cells = " | ".join(_cells(mine, [known.get(_other(line, ARMS[-1])) for line in mine], known))
                out.append(f"| {arm} | {rows} | {cells} |")
    return "\n".join(out) + "\n\n" + _each(lines)


def _cells(
    mine: list[dict[str, Any]], joint: list[dict[str, Any] | None], known: dict[Any, dict[str, Any]]
) -> list[str]:
    """Points of AUC with intervals, mean log loss, and median shares of joint training's time and parameters."""
    both = [(line, other) for line, other in zip(mine, joint, strict=True) if other is not None]
    shares = [
        f"{100 * median(one[what] / other[what] for one, other in both):.1f} %" if both else ""
        for what in ("minutes", "parameters")
    ]
    added = [line["auc"] - known[_other(line, ARMS[0])]["auc"] for line in mine]
    less = [one["auc"] - other["auc"] for one, other in both]
    loss = sum(line["log_loss"] for line in mine) / len(mine)
    return [_cell(added), _cell(less), f"{loss:.4f}", *shares]


def _other(line: dict[str, Any], arm: str) -> tuple[Any, ...]:
    """The key of another arm on the same rows."""
    return tuple({**line, "arm": arm}[name] for name in Key._fields)


def _each(lines: list[dict[str, Any]]) -> str:
    """Mean AUC of each held-out domain, in points."""
    arms = [arm for arm in ARMS if any(line["arm"] == arm for line in lines)]
    out = [f"| domain | rows | seeds | {' | '.join(arms)} |", "|---|---:|---:|" + "---:|" * len(arms)]
    for domain, rows in dict.fromkeys((line["hold_out"], line["rows"]) for line in lines):
        own = [line for line in lines if (line["hold_out"], line["rows"]) == (domain, rows)]
        means = [[line["auc"] for line in own if line["arm"] == arm] for arm in arms]
        cells = [f"{100 * sum(values) / len(values):.2f}" if values else "" for values in means]
        out.append(f"| {domain} | {rows} | {len({line['seed'] for line in own})} | {' | '.join(cells)} |")
    return "\n".join(out)


def _order(rows: str) -> tuple[bool, bool, float]:
    return rows == "all", rows.endswith("%"), 0.0 if rows == "all" else float(rows.rstrip("%"))


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    found = paired(values)
    said = [format(100 * value, "+.2f") for value in (found.mean, found.low, found.high)]
    return said[0] if found.num_pairs < 2 else f"{said[0]} [{said[1]}, {said[2]}]"


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
    parser.add_argument("--temperature", type=float, help="of the adapters; the study's own by default")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
