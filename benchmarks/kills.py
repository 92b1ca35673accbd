"""Kill -9 at random moments, and whether the same command then ends with the bits of an uninterrupted run.

``python benchmarks/kills.py --kills 50`` runs the command line over and over on a small log: each process is killed at a
moment drawn from the time that an uninterrupted one takes, and the next one goes on from what it left. ``onboard`` and
``update`` are tried if the command line has them. Leaves with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from domlora.bundle import Bundle, versions
from domlora.training.checkpoint import read_checkpoint

__all__ = ["Trial", "prepared", "trials_of", "try_kills"]

PLAN = """
[source]
files = ["{log}"]
[columns]
domain = "scene"
label = "click"
[features.item]
[features.price]
kind = "numeric"
"""
DOMAINS = ("home", "cart", "app")
FINE = (0, 3)  # 3: an update that stays a candidate
FIT = {"batch_size": 256, "max_epochs": 12, "patience": 99, "evaluations_per_epoch": 2, "schedule": "cosine"}


@dataclass
class Trial:
    """A verb under fire, and what was found; ``start`` is a bundle that it changes in place, if it does."""

    verb: str
    words: list[str]
    out: Path
    start: Path | None = None
    seconds: float = 0.0
    kills: int = 0
    resumable: int = 0
    readable: int = 0
    ends: int = 0
    equal: int = 0
    lost: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.ends > 0 and self.equal == self.ends and self.readable == self.kills and not self.lost

    def reset(self) -> None:
        """As before the first try."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.start is not None:
            shutil.copytree(self.start, self.out)

    def ended(self) -> bool:
        """Whether the bundle is there, or has the version that was to come."""
        return self.out.exists() and (self.start is None or newest(self.out) != newest(self.start))


def newest(folder: Path) -> int:
    return max(version.number for version in versions(folder))


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", "from domlora.cli import main; main()", *map(str, words)]


def run(*words: object) -> str:
    done = subprocess.run(command(*words), capture_output=True, text=True, check=False)
    if done.returncode not in FINE:
        raise SystemExit(f"{' '.join(map(str, words))} failed: {done.stderr}")
    return done.stdout


def prepared(folder: Path, name: str, rows: int, domains: Sequence[str], *more: object) -> Path:
    """A prepared log of clicks that depend on item, price and scene."""
    draw = np.random.default_rng(len(domains))
    item, price, scene = draw.integers(500, size=rows), draw.random(rows), draw.integers(len(domains), size=rows)
    logit = np.sin(item * (1 + scene)) + 2 * price - 1
    table = {"item": item, "price": price, "scene": pa.array(np.array(domains)[scene])}
    table["click"] = (draw.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.int64)
    pq.write_table(pa.table(table), folder / f"{name}.parquet")
    (folder / f"{name}.toml").write_text(PLAN.format(log=f"{name}.parquet"), encoding="utf-8")
    run("prepare", folder / f"{name}.toml", "--out", folder / name, *more)
    return folder / name


def settings(*stages: str) -> list[str]:
    fits = [("--set", f"train.{stage}.fit.{name}={value}") for stage in stages for name, value in FIT.items()]
    return [word for pair in fits for word in pair]


def trials_of(folder: Path, verbs: Sequence[str], rows: int) -> Iterator[Trial]:
    """Each verb with what it needs, made by uninterrupted runs."""
    data, base, adapted = prepared(folder, "data", rows, DOMAINS[:2]), folder / "base", folder / "adapted"
    first, second = ["pretrain", "--data", str(data)], ["adapt", "--data", str(data), "--bundle", str(base)]
    first += ["--set", "model.hidden_units=[64,32]", "--set", "model.dropout=0.1", *settings("pretrain")]
    second += settings("adapt")
    run(*first, "--out", base)
    if "pretrain" in verbs:
        yield Trial("pretrain", [*first, "--out", str(folder / "pretrained")], folder / "pretrained")
    if "adapt" in verbs:
        yield Trial("adapt", [*second, "--out", str(folder / "kept")], folder / "kept")
    later = [verb for verb in ("onboard", "update") if verb in verbs and f" {verb} " in run("--help")]
    if later:
        run(*second, "--out", adapted)
        grown = prepared(folder, "grown", rows, DOMAINS, "--grow", adapted)
        added = {"onboard": ["--domain", DOMAINS[2]], "update": []}
        for verb in later:
            out = folder / f"{verb}ed"
            words = [verb, "--data", str(grown), "--bundle", str(out)]
            yield Trial(verb, [*words, *added[verb], *settings(verb)], out, adapted)


def try_kills(trial: Trial, kills: int, seed: int) -> Trial:
    """Kill it ``kills`` times; each time it comes to its end, compare and begin anew."""
    moments = random.Random(seed)
    trial.reset()
    began = time.perf_counter()
    run(*trial.words)
    trial.seconds, expected = time.perf_counter() - began, bits_of(trial.out)
    trial.reset()
    while trial.kills < kills:
        if kill(trial, trial.seconds * moments.uniform(0.3, 1.1)):
            look(trial)
        if trial.ended():
            compare(trial, expected)
            trial.reset()
    run(*trial.words)
    compare(trial, expected)
    return trial


def kill(trial: Trial, after_s: float) -> bool:
    """Whether it was killed and not sooner at its end."""
    with subprocess.Popen(command(*trial.words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            trial.kills += 1
            return True
        if process.returncode not in FINE:
            assert process.stderr is not None
            raise SystemExit(f"{trial.verb} after {trial.kills} kills: {process.stderr.read().decode()}")
    return False


def look(trial: Trial) -> None:
    """What a killed process has left must be whole."""
    try:
        if trial.out.exists():
            Bundle.open(trial.out)
        places = trial.out.parent.glob(f".{trial.out.name}*.checkpoint")
        checkpoints = [path.parent for place in places for path in place.rglob("checkpoint.json")]
        for checkpoint in checkpoints:
            read_checkpoint(checkpoint)
        trial.readable += 1
        trial.resumable += bool(checkpoints)
    except Exception as error:
        trial.lost.append(str(error))


def compare(trial: Trial, expected: str) -> None:
    trial.ends += 1
    trial.equal += bits_of(trial.out) == expected


def bits_of(folder: Path) -> str:
    """A sha256 over every weight of a bundle's newest version, be it the default or a candidate."""
    found = hashlib.sha256()
    for name, tensor in Bundle.open(folder, version=newest(folder)).model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each verb")
    parser.add_argument("--verbs", default="pretrain,adapt,onboard,update")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print("| verb | seconds | kills | left a checkpoint | all readable | ends | equal bits |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for trial in trials_of(Path(folder), options.verbs.split(","), options.rows):
            t = try_kills(trial, options.kills, options.seed)
            line = (t.verb, f"{t.seconds:.1f}", t.kills, t.resumable, t.readable, t.ends, t.equal)
            print("|", " | ".join(map(str, line)), "|", *t.lost[:1], flush=True)
            good &= t.good
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
