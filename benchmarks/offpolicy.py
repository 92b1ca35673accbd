"""Off-policy estimates on real logs of two policies, and what an event costs; no file is imported from the package it reads.

    pip download --no-deps obp==0.4.1 && unzip obp-0.4.1-*.whl -d OBP
    python benchmarks/offpolicy.py --obp OBP

Open Bandit Data (ZOZOTOWN): 10,000 shown items for each of three campaigns and two policies, uniform and Bernoulli Thompson
sampling (BTS). Each log estimates the other policy's click rate, which the other log tells. BTS went on learning: its logged
probabilities are no longer those of the published priors, so ``bts`` is what it chose on average, and ``bts at its start``
what obp compares.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from domlora.abtest.assignment import Assignment
from domlora.abtest.experiments import Arm
from domlora.abtest.interleaving import credit, preference, team_draft
from domlora.abtest.log import EventLog
from domlora.abtest.offpolicy import Estimate, direct, doubly_robust, importance_weights, ips, snips

CAMPAIGNS = ("all", "men", "women")
POSITIONS = 3


class Log(NamedTuple):
    """Shown items: which, where, clicked or not, and how probable the choice was."""

    item: Any
    position: Any
    reward: Any
    logged: Any


def read_log(folder: Path, policy: str, campaign: str) -> Log:
    with (folder / policy / campaign / f"{campaign}.csv").open(encoding="utf-8") as file:
        rows = [
            (int(r["item_id"]), int(r["position"]), int(r["click"]), float(r["propensity_score"]))
            for r in csv.DictReader(file)
        ]
    item, position, reward, logged = (np.array(column) for column in zip(*rows, strict=True))
    return Log(item, position - 1, reward.astype(float), logged)


def priors(path: Path) -> dict[str, dict[str, list[float]]]:
    """The published beta distributions of BTS: a file of three levels and numbers."""
    found: dict[str, dict[str, list[float]]] = {}
    campaign = name = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if key := re.fullmatch(r"(\w+):", line):
            campaign = key[1]
        elif key := re.fullmatch(r"\s+(\w+):", line):
            name = key[1]
            found.setdefault(campaign, {})[name] = []
        elif value := re.fullmatch(r"\s+- ([\d.]+)", line):
            found[campaign][name].append(float(value[1]))
    return found


def bts(prior: dict[str, list[float]], draws: int = 200_000) -> Any:
    """Chance of each item at each position, ``(items, positions)``: the three largest of one draw an item."""
    random = np.random.default_rng(12345)
    alpha, beta = np.array(prior["alpha"]), np.array(prior["beta"])
    counts = np.zeros((len(alpha), POSITIONS))
    for _ in range(draws // 10_000):
        drawn = random.beta(alpha, beta, (10_000, len(alpha)))
        best = np.argsort(-drawn, axis=1)[:, :POSITIONS]
        for position in range(POSITIONS):
            counts[:, position] += np.bincount(best[:, position], minlength=len(alpha))
    return counts / draws


def as_logged(log: Log, num_items: int) -> Any:
    """What a policy that went on learning chose on the average of its log, ``(items, positions)``."""
    counts = np.zeros((num_items, POSITIONS))
    np.add.at(counts, (log.item, log.position), 1)
    return counts / counts.sum(axis=0)


def fitted(log: Log, num_items: int, folds: int = 5, strength: float = 200.0) -> tuple[Any, Any]:
    """Click rates of items, drawn to the mean; of a row those of the other folds, ``(B, items)``. And of the chosen item."""
    fold = np.arange(len(log.item)) % folds
    rates = np.empty((folds, num_items))
    for number in range(folds):
        rest = fold != number
        mean = log.reward[rest].mean()
        clicks = np.bincount(log.item[rest], log.reward[rest], num_items)
        rates[number] = (clicks + strength * mean) / (np.bincount(log.item[rest], minlength=num_items) + strength)
    return rates[fold], rates[fold, log.item]


def estimates(log: Log, policy: Any) -> dict[str, Estimate]:
    """All estimators, the plain ones compared with obp 0.4.1's formulas (obp/ope/estimators.py) written out."""
    target = policy[log.item, log.position]
    weight = importance_weights(target, log.logged)
    clipped = importance_weights(target, log.logged, clip=20.0)
    everywhere, chosen = fitted(log, len(policy))
    at = policy[:, log.position].T
    expected = (everywhere * at).sum(axis=1) / at.sum(axis=1)
    found = {
        "IPS": ips(log.reward, weight),
        "IPS, w <= 20": ips(log.reward, clipped),
        "SNIPS": snips(log.reward, weight),
        "SNIPS, w <= 20": snips(log.reward, clipped),
        "DM": direct(expected),
        "DR": doubly_robust(log.reward, weight, chosen, expected),
    }
    iw = target / log.logged
    published = {
        "IPS": np.mean(log.reward * iw),
        "SNIPS": np.mean(log.reward * iw / iw.mean()),
        "DM": np.mean(np.average(everywhere, weights=at, axis=1)),
        "DR": np.mean(np.average(everywhere, weights=at, axis=1) + iw * (log.reward - chosen)),
    }
    for name, value in published.items():
        assert math.isclose(found[name].value, value, rel_tol=1e-12), name
    return found


def wilson(log: Log) -> tuple[float, float, float]:
    n, p, z = len(log.reward), float(log.reward.mean()), 1.959964
    middle, reach = (
        (p + z * z / (2 * n)) / (1 + z * z / n),
        z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n),
    )
    return p, middle - reach, middle + reach


def compare(folder: Path) -> None:
    """A table: each log's estimate of the other policy, in clicks of 10,000."""
    known = priors(folder / "policy" / "conf" / "prior_bts.yaml")
    print("| campaign | log of | policy | estimator | clicks of 10,000 | 95 % | effective rows | the policy itself |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: |")
    for campaign in CAMPAIGNS:
        logs = {name: read_log(folder / "dataset" / "obd", name, campaign) for name in ("random", "bts")}
        start = bts(known[campaign])
        policies = {"bts": as_logged(logs["bts"], len(start)), "bts at its start": start}
        policies["random"] = np.full_like(start, 1 / len(start))
        for log, target in (("random", "bts"), ("random", "bts at its start"), ("bts", "random")):
            truth = wilson(logs["bts" if log == "random" else "random"])
            said = f"{truth[0] * 1e4:.0f} [{truth[1] * 1e4:.0f}, {truth[2] * 1e4:.0f}]"
            for name, found in estimates(logs[log], policies[target]).items():
                span = f"[{found.low * 1e4:.1f}, {found.high * 1e4:.1f}]"
                value = f"{found.value * 1e4:.1f} | {span} | {found.effective_rows:,.0f}"
                print(f"| {campaign} | {log} | {target} | {name} | {value} | {said} |")


def interleaved(units: int, runs: int = 200) -> None:
    """How often 50 to 800 users tell a slightly better ranking: interleaved lists beside two arms."""
    random = np.random.default_rng(0)
    rates = np.array([0.3, 0.25, 0.2, 0.15, 0.12, 0.1, 0.08, 0.06, 0.05, 0.04])
    good, other = list(range(10)), [1, 0, 3, 2, 5, 4, 7, 6, 9, 8]
    seen = 1 / (1 + np.arange(6))
    found = {"interleaving": 0, "two arms": 0}
    for _ in range(runs):
        scores = []
        for _ in range(units):
            draft = team_draft(other, good, 6, random)
            clicked = np.flatnonzero(random.random(6) < rates[list(draft.items)] * seen)
            scores.append(credit(draft, clicked.tolist()))
        found["interleaving"] += preference(list(range(units)), scores).p_value < 0.05
        arms = [(random.random((units // 2, 6)) < rates[ranking[:6]] * seen).sum(axis=1) for ranking in (other, good)]
        error = math.sqrt(sum(arm.var(ddof=1) / len(arm) for arm in arms))
        found["two arms"] += abs(arms[1].mean() - arms[0].mean()) > 1.96 * error
    print(f"| {units} | {found['interleaving'] / runs:.0%} | {found['two arms'] / runs:.0%} |")


def cost(rows: int = 64, requests: int = 20_000) -> None:
    """What an exposure costs whoever answers, and the thread behind."""
    probability = np.random.default_rng(0).random((200, rows)).astype(np.float32)
    assigned = (Assignment("adapters", Arm("on")),)
    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(Path(folder), max_pending_rows=10**8)
        taken = np.empty(requests)
        cpu = time.process_time()
        own = time.thread_time()
        for number in range(requests):
            start = time.perf_counter()
            log.exposed(f"request-{number:010d}", 0.0, "user-7", "toys", assigned, "3", "3", probability[number % 200])
            taken[number] = time.perf_counter() - start
        log.close()
        own = time.thread_time() - own
        cpu = time.process_time() - cpu - own
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet"))
    median, high = np.quantile(taken * 1e6, [0.5, 0.99])
    print(f"exposure of {rows} rows: {median:.1f} us on the request (p99 {high:.0f})")
    print(f"threads behind: {cpu / requests * 1e6:.0f} us of CPU, {size / requests:.0f} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--obp", type=Path, required=True, help="The unpacked wheel.")
    told = parser.parse_args()
    if not (told.obp / "obp" / "dataset" / "obd").is_dir():
        sys.exit("--obp must hold obp/dataset/obd")
    compare(told.obp / "obp")
    print("\n| users | found by interleaving | found by two arms |\n| ---: | ---: | ---: |")
    for units in (50, 100, 200, 400, 800):
        interleaved(units)
    print()
    cost()


if __name__ == "__main__":
    main()
