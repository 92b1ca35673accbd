"""The same DeepFM in DeepCTR-Torch, torch-rechub, FuxiCTR and domlora: how fast each trains, and what it learns.

Speed: 8 features of 1e4 and of 1e6 values, ids drawn uniformly (the worst case for row-wise optimizers: hardly one comes
twice in a batch). Once through the library's own loop and loader, as its users run it, and once the step alone on tensors
that are ready. Quality: test AUC on MovieLens after the same epochs on the same batches in the same order, from the same
weights.

    python benchmarks/peers.py --quick --movielens data/raw/movielens-100k-package

Libraries that are not installed are left out. A million values a feature want 7 GB of memory.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import importlib.util
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from page import Section, Target, show, with_threads, write
from peer_models import DeepCTRTorch, Domlora, FuxiCTR, TorchRechub, Trained, deepfm
from rounds import Ratio, Timings, interleave, take_turns
from torch import nn

from domlora.config import load_plan
from domlora.data.dataset import Dataset
from domlora.data.prepare import prepare
from domlora.evaluation.metrics import auc
from domlora.features.batch import Batch
from domlora.features.schema import Feature, Schema

FIELDS, DOMAINS = 8, 10
LARGE = 10**6  # values a feature from which one model at a time stands beside ours, for the memory
POOL, LARGE_POOL = (
    8,
    64,
)  # batches that a step takes in turn; large tables want many, or the rows would stay in the caches
DENSE, LAZY, ADAPTED = "domlora, dense Adam", "domlora, lazy Adam", "domlora, lazy Adam, adapters"
SPEED_TARGETS = {10_000: 2.0, 1_000_000: 20.0}
TOLERANCE = 1e-5
Make = Callable[[nn.Module, Schema], Trained]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run.

    ``seconds`` an interleaving of at least ``rounds``, or ``large_rounds`` where tables are large; ``batch`` rows; ``steps``
    an epoch of the slow arms' own loops and of the fast ones', by values a feature; arms ``beside`` the peers and the
    reference where tables are large; ``seeds`` of quality, each for ``quality_steps`` rounded up to whole epochs.
    """

    seconds: float
    rounds: int
    large_rounds: int
    batch: int
    steps: Mapping[int, tuple[int, int]]
    beside: Sequence[str]
    seeds: Sequence[int]
    quality_steps: int


PLANS = {
    "full": Plan(20.0, 7, 4, 4096, {10**4: (25, 50), 10**6: (3, 50)}, (DENSE, ADAPTED), (1, 2, 3, 4, 5), 200),
    "quick": Plan(2.0, 3, 2, 4096, {10**4: (8, 16), 10**6: (1, 10)}, (), (1, 2, 3), 19),
    "smoke": Plan(0.0, 2, 1, 64, {100: (2, 2)}, (), (1, 2, 3), 1),
}


def makers() -> dict[str, Make]:
    """Ours, then whatever is installed."""
    found: dict[str, Make] = {
        DENSE: Domlora,
        LAZY: partial(Domlora, rule="lazy_adam"),
        ADAPTED: partial(Domlora, rule="lazy_adam", adapters=True),
    }
    peers: dict[str, tuple[str, Make]] = {
        "DeepCTR-Torch": ("deepctr_torch", DeepCTRTorch),
        "torch-rechub": ("torch_rechub", TorchRechub),
        "FuxiCTR": ("fuxictr", FuxiCTR),
    }
    return found | {name: make for name, (package, make) in peers.items() if importlib.util.find_spec(package)}


def is_ours(name: str) -> bool:
    return name.startswith("domlora")


def require_same_function(makes: Mapping[str, Make], schema: Schema, batch: Batch) -> None:
    """With embeddings so large that every term counts, all libraries give one probability for one row."""
    start = deepfm(schema)
    with torch.no_grad():
        start.embedding.weight.mul_(50)  # type: ignore[union-attr, operator]
    expected = next(iter(makes.values()))(start, schema).probability(batch)
    for name, make in makes.items():
        gap = float((make(start, schema).probability(batch) - expected).abs().max())
        if not gap <= TOLERANCE:
            raise SystemExit(f"{name} is another model: probabilities differ by {gap:.1e}")


# ---- speed


def drawn(num_values: int, num_rows: int) -> Batch:
    return Batch(
        ids=torch.randint(num_values, (num_rows, FIELDS)),
        dense=torch.zeros(num_rows, 0),
        domain=torch.randint(DOMAINS, (num_rows,)),
        label=(torch.rand(num_rows) < 0.25).float(),
    )


def dataset(schema: Schema, num_values: int, num_rows: int) -> Dataset:
    """Rows to train on, and both classes of each domain to validate on, which our loop asks for and does not time."""
    valid = drawn(num_values, 2 * DOMAINS)
    valid.domain.copy_(torch.arange(2 * DOMAINS) % DOMAINS)
    valid.label.copy_(torch.arange(2 * DOMAINS) < DOMAINS)
    return Dataset.from_batches(schema, {"train": drawn(num_values, num_rows), "valid": valid})


class Speed:
    """The rows of one number of values, and how arms run on them."""

    def __init__(self, plan: Plan, num_values: int, folder: Path) -> None:
        features = tuple(Feature(f"f{number}", num_ids=num_values) for number in range(FIELDS))
        self.schema = Schema(features, domains=tuple(f"d{number}" for number in range(DOMAINS)))
        self.plan, self.folder, self.start = plan, folder, deepfm(self.schema)
        self.rows, self.fast_rows = (
            dataset(self.schema, num_values, plan.batch * steps) for steps in plan.steps[num_values]
        )
        large = num_values >= LARGE
        batches = drawn(num_values, plan.batch * (LARGE_POOL if large else POOL))
        self.pool = list(Dataset.from_batches(self.schema, {"train": batches}).batches("train", plan.batch))
        self.fast = (LAZY, ADAPTED) if large else (DENSE, LAZY, ADAPTED)

    def made(self, makes: Mapping[str, Make]) -> dict[str, Trained]:
        models = {name: make(self.start, self.schema) for name, make in makes.items()}
        for name in models.keys() & set(self.fast):  # the moments of a row are there from its first step on
            for batch in self.pool:
                models[name].step(models[name].ready(batch))
        return models

    def both(self, models: Mapping[str, Trained], seconds: float, rounds: int) -> tuple[Timings, Timings]:
        """Seconds a row: in the own loops, and of the steps alone."""
        steps = {name: self.step_of(model) for name, model in models.items()}
        alone = interleave(steps, seconds, rounds)
        loops = {name: partial(self.loop, model, name in self.fast) for name, model in models.items()}
        own = take_turns(loops, seconds, rounds)
        per_row = {name: [each / self.plan.batch for each in values] for name, values in alone.seconds.items()}
        return own, Timings(per_row)

    def step_of(self, model: Trained) -> Callable[[], object]:
        source = cycle([model.ready(batch) for batch in self.pool])
        return lambda: model.step(next(source))

    def loop(self, model: Trained, fast: bool) -> float:
        data = self.fast_rows if fast else self.rows
        return model.epoch(data, self.plan.batch, self.folder) / data.num_rows("train")


def speed_section(plan: Plan, num_values: int) -> Section:
    makes = makers()
    reference = LAZY if num_values >= LARGE else DENSE  # dense Adam, as the peers have it, as long as it is affordable
    with tempfile.TemporaryDirectory() as folder:
        speed = Speed(plan, num_values, Path(folder))
        first = speed.made({reference: makes.pop(reference)})
        if num_values < LARGE:
            rest = speed.made(makes)
            require_same_function(makers(), speed.schema, speed.pool[0])
            timed = [speed.both({**first, **rest}, plan.seconds, plan.rounds)]
        else:
            others = {name: make for name, make in makes.items() if name in plan.beside or not is_ours(name)}
            pairs = ({**first, **speed.made({name: make})} for name, make in others.items())
            timed = [speed.both(pair, plan.seconds / 4, plan.large_rounds) for pair in pairs]
    return speed_table(plan, num_values, reference, timed)


def speed_table(plan: Plan, num_values: int, reference: str, timed: Sequence[tuple[Timings, Timings]]) -> Section:
    ratios: dict[str, list[Ratio]] = {}
    rows = []
    for name in dict.fromkeys(name for own, _ in timed for name in own.seconds):
        pair = next(pair for pair in timed if name in pair[0].seconds)
        ratios[name] = [timings.ratio(name, reference) for timings in pair]
        speeds = [f"{1 / timings.median(name):,.0f}" for timings in pair]
        times = ["1" if name == reference else str(ratio) for ratio in ratios[name]]
        rows.append([name, speeds[0], times[0], speeds[1], times[1]])
    text = (
        f"Rows a second in batches of {plan.batch:,} over {FIELDS} features of {num_values:,} values, and how many times as "
        f"long as *{reference}* each takes for a row. *Own loop*: `fit` of DeepCTR-Torch, `CTRTrainer` of torch-rechub, "
        "`train_epoch` of FuxiCTR and `fit` of domlora, each with its own loader, without validation. *Step*: forward, "
        "loss, backward and optimizer on tensors that are ready. Optimizers are there and warm in both. "
        f"*Adapters*: for each of {DOMAINS} domains. Median [10th, 90th percentile]."
    )
    columns = ["", "own loop, rows/s", "its time", "step, rows/s", "its time"]
    targets = speed_targets(num_values, reference, ratios)
    return Section(f"Training speed, {num_values:,} values a feature", text, columns, rows, targets)


def speed_targets(num_values: int, reference: str, ratios: Mapping[str, Sequence[Ratio]]) -> list[Target]:
    """Over the fastest peer, in both ways to count."""
    peers = [name for name in ratios if not is_ours(name)]
    if num_values not in SPEED_TARGETS or not peers:
        return []
    made = []
    for place, what in enumerate(("own loops", "the step alone")):
        fastest = min(peers, key=lambda name: ratios[name][place].median)
        text = (
            f"rows/s of {reference} over those of the fastest peer ({fastest}), {what}, {num_values:,} values a feature"
        )
        made.append(Target.of(text, ratios[fastest][place], SPEED_TARGETS[num_values], at_most=False))
    return made


# ---- quality

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by values


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half width of its 95 % interval (Student's t)."""
    return statistics.mean(values), T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5


def movielens(folder: Path, out: Path) -> tuple[Dataset, str]:
    """The task: is a rating a 5, from user, film, gender, age, occupation and zip code; the domain is the gender."""
    source = "movielens-1m" if any(folder.rglob("ratings.dat")) else "movielens-100k"
    features = [f"features.{name}={{}}" for name in ("user_id", "item_id", "gender", "age", "occupation", "zip")]
    prepare(load_plan(source, ["split.fractions=[0.8, 0.1, 0.1]", *features]), out, folder=folder)
    return Dataset.open(out), source


def learned(make: Make, data: Dataset, plan: Plan, epochs: int, seed: int) -> float:
    """Test AUC after the epochs; start, batches and their order hang on the seed alone."""
    torch.manual_seed(seed)
    model = make(deepfm(data.schema), data.schema)
    for epoch in range(epochs):
        for batch in data.batches("train", plan.batch, seed=seed, epoch=epoch):
            model.step(model.ready(batch))
    test = [(batch.label, model.probability(batch)) for batch in data.batches("test", 16384)]
    label, probability = (torch.cat(column).numpy() for column in zip(*test, strict=True))
    return auc(label, probability)


def quality_section(plan: Plan, folder: Path) -> Section:
    with tempfile.TemporaryDirectory() as out:
        data, source = movielens(folder, Path(out) / "prepared")
        sizes = data.num_rows("train"), data.num_rows("test")
        epochs = -(-plan.quality_steps * plan.batch // sizes[0])
        makes = makers()
        found = {name: [learned(make, data, plan, epochs, seed) for seed in plan.seeds] for name, make in makes.items()}
    rows = []
    for name, values in found.items():
        mean, half = interval(values)
        gaps = [difference(found[ours], values) for ours in (DENSE, LAZY)]
        told = [f"{gap:+.2f} ± {width:.2f}" if gap or width else "-" for gap, width in gaps]
        rows.append([name, f"{mean:.4f} ± {half:.4f}", *told])
    text = (
        f"Test AUC on {source} (is a rating a 5; six features; domain gender; {sizes[0]:,} training and {sizes[1]:,} test "
        f"rows) after {epochs} epochs in batches of {plan.batch:,}. All start from the same weights and see the same "
        f"batches in the same order; dropout differs. Means over {len(plan.seeds)} seeds with 95 % intervals; the last two "
        "columns are paired differences in thousandths: ours with dense and with lazy Adam, minus this."
    )
    columns = ["", "test AUC", "dense Adam minus this", "lazy Adam minus this"]
    return Section("What is learned in the same epochs", text, columns, rows, quality_targets(found))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Paired by seed, in thousandths: mean and half of the interval."""
    return interval([1e3 * (mine - other) for mine, other in zip(ours, theirs, strict=True)])


def quality_targets(found: Mapping[str, Sequence[float]]) -> list[Target]:
    """Within noise or better: the 95 % interval of the paired difference reaches 0."""
    made = []
    for ours in (DENSE, LAZY):
        for name in [each for each in found if not is_ours(each)]:
            gap, half = difference(found[ours], found[name])
            target = Target(
                f"test AUC of {ours} minus {name}'s", gap, 0.0, False, "thousandths", gap - half, gap + half, True
            )
            made.append(target)
    return made


def sections(plan: Plan, folder: Path | None) -> Iterator[Section]:
    for num_values in plan.steps:
        yield speed_section(plan, num_values)
    if folder is not None:
        yield quality_section(plan, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="full", help="smoke: seconds, proves that it runs")
    parser.add_argument("--quick", dest="plan", action="store_const", const="quick", help="the same as --plan quick")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--movielens", type=Path, help="folder of ml-1m or ml-100k; without it no table of quality")
    parser.add_argument("--json", type=Path, help="also write what was found here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # that dense Adam is slow on large tables is the point
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    found = []
    for section in sections(PLANS[arguments.plan], arguments.movielens):
        found.append(with_threads(section, arguments.threads))
        show(section)
    if arguments.json:
        write(arguments.json, found)


if __name__ == "__main__":
    main()
