"""Adapters of many domains in one batch: what they cost over the base, and what other ways of writing them cost.

A tower 384-256-128-64 with adapters of temperature 16 (ranks 16, 8, 4) and a bias a domain. Everything runs interleaved in
one process; before an arm is timed its numbers, and in training its gradients, are checked against a per-row computation.

    python benchmarks/adapters.py --quick
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import copy
import importlib.util
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from arms import BASELINES, Forward, Rows, Tower, adapted_tower, gather, ours, peft_tower
from checks import require_equal, require_equal_gradients
from page import Section, Target, show, with_threads, write
from rounds import Ratio, Timings, interleave
from torch import Tensor, nn

from domlora.adapters.attach import freeze_
from domlora.training.optimizers import Optimizer, OptimizerOptions, Rule

WIDTH = 384
POOL = 4  # batches that an arm takes in turn, so that nothing can be remembered from one call to the next
PRESENT = 30  # domains in a batch of the large bank
LR = 1e-6  # so small that no unit dies while the clock runs; a step costs the same
OTHERS = ("PEFT", "gather", "mask", "loop")
FORWARD_TARGETS = {10: 1.6, 100: 2.0, 1000: 3.0}
PEFT_TARGETS = {10: 3.0, 300: 10.0}
STEP_TARGETS = {10: 1.5, 100: 2.0}
BANK_TARGET, MEMORY_TARGET_GIB = 1.6, 4.0
Step = Callable[[Rows], object]


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run.

    ``seconds`` an interleaving of at least ``rounds``, ``batch`` rows, which numbers of ``domains`` in scoring, which are
    ``trained``, up to how many each other arm goes along (``most``), and the size of the large ``bank``.
    """

    seconds: float
    rounds: int
    batch: int
    domains: Sequence[int]
    trained: Sequence[int]
    most: Mapping[str, int]
    bank: int

    def run(self, calls: Mapping[str, Callable[[Rows], object]], batches: list[Rows], share: float = 1.0) -> Timings:
        """Each arm takes the batches in turn."""
        return interleave(
            {name: in_turn(call, batches) for name, call in calls.items()}, share * self.seconds, self.rounds
        )


PLANS = {
    "full": Plan(
        seconds=7.0,
        rounds=7,
        batch=4096,
        domains=(10, 30, 100, 300, 1000),
        trained=(10, 100),
        most={"PEFT": 300, "gather": 1000, "mask": 300, "loop": 1000},
        bank=10_000,
    ),
    "quick": Plan(
        seconds=1.0,
        rounds=4,
        batch=4096,
        domains=(10, 100, 300, 1000),
        trained=(10, 100),
        most={"PEFT": 300, "gather": 10, "mask": 10, "loop": 10},
        bank=10_000,
    ),
    "smoke": Plan(
        seconds=0.0,
        rounds=2,
        batch=64,
        domains=(10,),
        trained=(10,),
        most={"PEFT": 10, "gather": 10, "mask": 10, "loop": 10},
        bank=50,
    ),
}


def pool(size: int, num_domains: int, *, present: int = 0, ordered: bool = False) -> list[Rows]:
    """Batches with domains drawn uniformly from all, or from ``present`` of them that each batch draws anew."""
    made = []
    for _ in range(POOL):
        among = torch.randperm(num_domains)[: present or num_domains]
        domain = among[torch.randint(len(among), (size,))]
        domain = domain.sort().values if ordered else domain
        made.append(Rows(torch.randn(size, WIDTH), domain, [str(name) for name in domain.tolist()]))
    return made


def in_turn(call: Callable[[Rows], object], batches: list[Rows]) -> Callable[[], object]:
    source = cycle(batches)
    return lambda: call(next(source))


def cells(timings: Timings, over: str, names: Sequence[str]) -> list[str]:
    """How many times as long as ``over`` each arm took; a dash for one that did not run."""
    return [str(timings.ratio(name, over)) if name in timings.seconds else "-" for name in names]


def milliseconds(timings: Timings, decimals: int = 2) -> list[str]:
    return [f"{1e3 * timings.median(name):.{decimals}f}" for name in ("base", "domlora")]


# ---- scoring


def scoring(forward: Forward) -> Forward:
    def score(rows: Rows) -> Tensor:
        with torch.inference_mode():
            return forward(rows)

    return score


def forwards_of(model: Tower, rows: Rows, others: Sequence[str]) -> tuple[dict[str, Forward], float]:
    """The base, ours and the named others, checked; and the seconds PEFT took to add its adapters."""
    model.eval()
    forwards, seconds = {"domlora": ours(model)}, 0.0
    forwards |= {name: BASELINES[name](model) for name in others if name in BASELINES}
    if "PEFT" in others and importlib.util.find_spec("peft") is not None:
        forwards["PEFT"], seconds = peft_tower(model)
    expected = scoring(gather(model))(rows)
    for name, forward in forwards.items():
        require_equal(name, "numbers", scoring(forward)(rows), expected)
    forwards["base"] = ours(Tower().eval())
    return {name: scoring(forward) for name, forward in forwards.items()}, seconds


def forward_section(plan: Plan) -> Section:
    rows, targets, added = [], [], ""
    for number in plan.domains:
        own, ordered, compared, seconds = forward_timings(plan, number)
        over_base = [str(own.ratio("domlora", "base")), str(ordered.ratio("domlora", "base"))]
        rows.append([f"{number}", *milliseconds(own), *over_base, *cells(compared, "domlora", OTHERS)])
        targets += forward_targets(number, own, compared)
        added = f" Adding {number} adapters to PEFT took {seconds:.1f} s." if seconds else added
    text = (
        f"Milliseconds a batch of {plan.batch:,} rows whose domains are uniform and in no order; how many times as long as "
        "the base our tower takes, on such rows and on rows that come sorted by domain, as `Dataset.batches` delivers them; "
        "how many times as long as ours the others take: PEFT's mixed batches (`adapter_names`), matrices gathered for each "
        f"row, a one-hot mask over all domains, a loop over the domains in the batch. Median [10th, 90th percentile].{added}"
    )
    columns = [
        "domains",
        "base, ms",
        "domlora, ms",
        "domlora / base",
        "sorted rows",
        *(f"{name} / domlora" for name in OTHERS),
    ]
    return Section("Scoring a mixed batch", text, columns, rows, targets)


def forward_timings(plan: Plan, number: int) -> tuple[Timings, Timings, Timings, float]:
    """Ours against the base (mixed rows, sorted rows), then all; fast arms by themselves get more rounds."""
    model, batches = adapted_tower(number), pool(plan.batch, number)
    mine, _ = forwards_of(model, batches[0], ())
    own = plan.run(mine, batches)
    ordered = plan.run(mine, pool(plan.batch, number, ordered=True), share=0.5)
    forwards, seconds = forwards_of(model, batches[0], [name for name in OTHERS if number <= plan.most[name]])
    return own, ordered, plan.run(forwards, batches), seconds


def forward_targets(number: int, own: Timings, compared: Timings) -> list[Target]:
    made = []
    if number in FORWARD_TARGETS:
        text = f"forward of the adapted tower over the base, {number} domains"
        made.append(Target.of(text, own.ratio("domlora", "base"), FORWARD_TARGETS[number], at_most=True))
    if number in PEFT_TARGETS and "PEFT" in compared.seconds:
        text = f"forward of PEFT's mixed batch over ours, {number} domains"
        made.append(Target.of(text, compared.ratio("PEFT", "domlora"), PEFT_TARGETS[number], at_most=False))
    return made


def shapes_section(plan: Plan) -> Section:
    others, rows = ("PEFT", "gather", "loop"), []
    for size, number, present in ((256, 10, 10), (256, 100, 100), (1, 100, 1), (plan.batch, 100, 1)):
        batches = pool(size, number, present=present)
        joining = [name for name in others if number <= plan.most[name]]
        forwards, _ = forwards_of(adapted_tower(number), batches[0], joining)
        timings = plan.run(forwards, batches, share=0.5)
        ratios = [*cells(timings, "base", ["domlora"]), *cells(timings, "domlora", others)]
        rows.append([f"{size:,}", f"{number}", f"{present}", *milliseconds(timings, 3), *ratios])
    columns = ["rows", "bank", "in the batch", "base, ms", "domlora, ms", "domlora / base"]
    text = "As a server sees them: few rows, one row, many rows of one domain. Columns as above."
    return Section("Scoring other batches", text, [*columns, *(f"{name} / domlora" for name in others)], rows)


# ---- training


def adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=LR, fused=True)


def rules_for(num_domains: int, present: int) -> OptimizerOptions:
    """Lazy where a batch touches a part of the bank; where it touches all of it, lazy and dense Adam are the same."""
    rule = Rule(lr=LR)
    return OptimizerOptions(
        tables=rule, dense=rule, adapters=Rule("lazy_adam", lr=LR) if present < num_domains else rule
    )


def training(forward: Forward, optimizer: Optimizer | torch.optim.Optimizer, input_grad: bool) -> Step:
    """Forward, loss, backward, step; with ``input_grad`` back to the input too, where a click model has its embeddings."""

    def step(rows: Rows) -> None:
        optimizer.zero_grad()
        out = forward(rows._replace(x=rows.x.detach().requires_grad_(input_grad)))
        out.square().mean().backward()
        optimizer.step()

    return step


def own_steps(model: Tower, rules: OptimizerOptions) -> dict[str, Step]:
    """The base and ours, everything moving, with and without a gradient of the input. Takes the model over: it moves."""
    steps: dict[str, Step] = {}
    optimizer = Optimizer(model.train(), rules)
    for suffix, input_grad in (("", True), (", input fixed", False)):
        base = Tower()
        steps[f"base{suffix}"] = training(ours(base), adam(list(base.parameters())), input_grad)
        steps[f"domlora{suffix}"] = training(ours(model), optimizer, input_grad)
    return steps


def frozen_step(model: Tower, rules: OptimizerOptions) -> Step:
    freeze_(model.train())
    return training(ours(model), Optimizer(model, rules), False)


def other_steps(model: Tower, names: Sequence[str]) -> dict[str, Step]:
    models = {name: copied(model) for name in names}
    return {name: training(BASELINES[name](each), adam(list(each.parameters())), True) for name, each in models.items()}


def copied(model: Tower) -> Tower:
    return copy.deepcopy(model).train()


def training_section(plan: Plan) -> Section:
    rows, targets = [], []
    for number in plan.trained:
        model, batches = adapted_tower(number).train(), pool(plan.batch, number)
        others = [name for name in BASELINES if number <= plan.most[name]]
        require_equal_gradients(model, batches[0], ("domlora", *others))
        rules = rules_for(number, number)
        steps = own_steps(copied(model), rules)
        own = plan.run({**steps, "frozen": frozen_step(copied(model), rules)}, batches)
        compared = plan.run({"domlora": steps["domlora"], **other_steps(model, others)}, batches)
        frozen = str(own.ratio("frozen", "base"))
        rows.append(
            [f"{number:,}", f"{number}", *step_cells(own), frozen, *cells(compared, "domlora", list(BASELINES))]
        )
        targets += step_targets(f"{number} domains", own, STEP_TARGETS.get(number))
    own, over_base = bank_timings(plan)
    rows.append([f"{plan.bank:,}", f"{PRESENT}", *step_cells(own), str(over_base), *["-"] * len(BASELINES)])
    targets += step_targets(f"a bank of {plan.bank:,} domains, {PRESENT} in a batch", own, BANK_TARGET)
    text = (
        f"Milliseconds a step of {plan.batch:,} rows: forward, loss, backward to weights and input (a click model's "
        "embeddings), fused Adam on tower and banks; row-wise lazy Adam on a bank of which a batch touches a part. *Input "
        "fixed*: domlora / base with no gradient of the input. *Frozen base*: only the banks move, over a step of the whole "
        "base. The others train tower and banks with fused Adam. PEFT refuses to train on a mixed batch."
    )
    columns = ["bank", "in a batch", "base, ms", "domlora, ms", "domlora / base", "input fixed", "frozen base"]
    columns += [f"{name} / domlora" for name in BASELINES]
    return Section("Training on mixed batches", text, columns, rows, targets)


def bank_timings(plan: Plan) -> tuple[Timings, Ratio]:
    """The large bank: everything moves, then the banks alone. One model after the other, for the memory."""
    batches, rules = pool(plan.batch, plan.bank, present=PRESENT), rules_for(plan.bank, PRESENT)
    own = plan.run(own_steps(adapted_tower(plan.bank), rules), batches)
    base = Tower()
    steps = {"base": training(ours(base), adam(list(base.parameters())), True)}
    steps["frozen"] = frozen_step(adapted_tower(plan.bank), rules)
    return own, plan.run(steps, batches, share=0.5).ratio("frozen", "base")


def step_cells(own: Timings) -> list[str]:
    fixed = own.ratio("domlora, input fixed", "base, input fixed")
    return [*milliseconds(own), str(own.ratio("domlora", "base")), str(fixed)]


def step_targets(text: str, own: Timings, bound: float | None) -> list[Target]:
    """Judged on the worse of the two ways to count: with and without a gradient of the input."""
    if bound is None:
        return []
    both = own.ratio("domlora", "base"), own.ratio("domlora, input fixed", "base, input fixed")
    worse = max(both, key=lambda ratio: ratio.median)
    return [Target.of(f"training step over the base's, {text}", worse, bound, at_most=True)]


# ---- memory


def memory_of_a_bank(plan: Plan) -> None:
    """Train a few steps in this process and print its largest resident size, before the model and after."""
    before = peak_bytes()
    model = adapted_tower(plan.bank).train()
    step = training(ours(model), Optimizer(model, rules_for(plan.bank, PRESENT)), True)
    for rows in pool(plan.batch, plan.bank, present=PRESENT) * 2:
        step(rows)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"before": before, "peak": peak_bytes(), "weights": 4 * numbers}))


def peak_bytes() -> int:
    """The largest resident size of this process; ``ru_maxrss`` would begin with that of the process that started it."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
    return int(found.split()[1]) * 1024


def memory_section(plan: Plan, arguments: Sequence[str]) -> Section:
    command = [sys.executable, __file__, "--memory", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    weights, before, peak = (found[key] / 2**30 for key in ("weights", "before", "peak"))
    rows = [[f"{plan.bank:,}", f"{weights:.2f}", f"{before:.2f}", f"{peak:.2f}"]]
    text = "A process of its own: GiB resident at the most over eight steps, libraries included."
    target = Target(f"peak memory of training a bank of {plan.bank:,} domains", peak, MEMORY_TARGET_GIB, True, "GiB")
    columns = ["domains in the bank", "weights, GiB", "before the model, GiB", "peak, GiB"]
    return Section("Memory of training a large bank", text, columns, rows, [target])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="full", help="smoke: seconds, proves that it runs")
    parser.add_argument("--quick", dest="plan", action="store_const", const="quick", help="the same as --plan quick")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write what was found here")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    plan = PLANS[arguments.plan]
    if arguments.memory:
        return memory_of_a_bank(plan)
    again = ["--plan", arguments.plan, "--threads", str(arguments.threads)]
    makers = (forward_section, shapes_section, training_section, lambda plan: memory_section(plan, again))
    sections = []
    for make in makers:
        sections.append(with_threads(make(plan), arguments.threads))
        show(sections[-1])
    if arguments.json:
        write(arguments.json, sections)
    return None


if __name__ == "__main__":
    main()
