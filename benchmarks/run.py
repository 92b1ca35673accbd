"""Every benchmark in one go, and the page that says what was found.

    python benchmarks/run.py --movielens data/raw/movielens-100k-package

The full run takes about 30 minutes on two idle cores, ``--quick`` about 5. Each script is a process of its own and
interleaves its arms inside; adapters are timed on each number of threads, peers on the first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from page import Section, markdown, of_this_machine, read

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
TEXT = (
    "Written by `make bench`, figures and verdicts alike; run it to get them for your machine. Arms are interleaved in "
    "rounds within one process. A time is a median over rounds; a ratio is the median over rounds of the ratio within a "
    "round, with the 10th and 90th percentile of those ratios in brackets. Base, adapters and peers always have the same "
    "number of threads."
)
SHARES = (
    "step.py",
    "A training step beside its bare matrix products",
    "Rows a second of a training step as a share of those of the tower's matrix products alone: `base`; with adapters over "
    "without (`adapted_over_base`); and of the step written in plain PyTorch. Batches of 1,024 rows, two domains.",
)
TABLES = (
    "optimizers.py",
    "What a table's optimizer costs",
    "How many times as long as with `lazy_adam` a training step of a DeepFM takes, by values a feature; 8 features of 16 "
    "numbers.",
)


def run(script: str, *arguments: str) -> str:
    """A script's output, shown as it comes."""
    print(f"== {script} {' '.join(arguments)}", flush=True)
    command = [sys.executable, str(HERE / script), *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        raise SystemExit(f"{script} ended with {process.returncode}")
    return "".join(lines)


def measured(script: str, *arguments: str) -> list[Section]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        run(script, *arguments, "--json", str(path))
        return read(path)


def told(script: str, title: str, text: str) -> Section:
    """The ratios that a script prints as its last line, as a table."""
    found = json.loads(run(script, "--quick").splitlines()[-1])
    rows = found if all(isinstance(value, dict) for value in found.values()) else {"": found}
    columns = list(next(iter(rows.values())))
    cells = [[name, *(f"{values[column]:.2f}" for column in columns)] for name, values in rows.items()]
    return Section(f"{title}, 1 thread", text, ["", *columns], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="measured one after the other")
    parser.add_argument("--movielens", type=Path, help="folder of ml-1m or ml-100k; without it no table of quality")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    threads = arguments.threads
    plan = ["--plan", "quick" if arguments.quick else "full"]
    raw = ["--movielens", str(arguments.movielens)] if arguments.movielens else []
    started, sections = time.perf_counter(), []
    for number in threads:
        sections += measured("adapters.py", *plan, "--threads", str(number))
    sections += measured("peers.py", *plan, "--threads", str(threads[0]), *raw)
    if not arguments.quick:
        sections += [told(*SHARES), told(*TABLES)]
    facts = of_this_machine()
    facts["command"] = (
        "`make bench`" if not arguments.quick else "`python benchmarks/run.py --quick`: a short look, not a measurement"
    )
    facts["took"] = f"{(time.perf_counter() - started) / 60:.0f} minutes"
    arguments.page.write_text(markdown("Benchmarks", TEXT, facts, sections), encoding="utf-8")
    print(f"\n{arguments.page.name} is written")


if __name__ == "__main__":
    main()
