"""Sampled negatives and splits: the loop of MLoRA's authors beside ours, rows a second.

    python benchmarks/prepare.py --raw FOLDER --quick

``--raw`` holds one Parquet file a category with ``reviewerID`` and ``asin``. Without it a log of the sizes of the paper's
Amazon-6 is made: six domains, 445,789 users, 172,653 items, 4.3 million clicks; an item's share falls off as 1/rank.

* ``loop``: written anew from a description of the authors' code, in plain pandas. For each user of a domain, the domain's
  items without the user's own as a set difference, and a random sample of what is left; for the split the negatives of each
  user are shuffled and cut in three, parts rounded up, while clicks are cut once a domain. It is timed on some users of each
  domain (``--users``, evenly taken from all, with all of the domain's items to draw from) and scaled by the row.
* ``ours``: ``domlora.data.preparing.negatives.sampled`` on DuckDB for the whole log with the rule ``paper``, all columns;
  or that and ``domlora.data.preparing.split.with_split`` of clicks and non-clicks, the columns that preparing goes on with.
  Each ends in Parquet files.

Arms take turns within one process. The loop starts from frames in memory, ours from a Parquet file that has each row's hash,
as preparing has at that point. The loop has one core (the authors run one process for each domain), ours all that the
process may use; the ratio a core is printed too. What a user costs the loop grows with the items of its domain, what a row
costs ours does not, so the ratio hangs on the log. The last line is one JSON object of ratios, by the row.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from rounds import digits, take_turns

from domlora.data.engine import Engine, open_engine
from domlora.data.expressions import size
from domlora.data.plan import Negatives, Split
from domlora.data.preparing.negatives import click_shares, sampled
from domlora.data.preparing.shuffle import ORDER_COLUMN
from domlora.data.preparing.split import with_split

CLICKS = (231_392, 800_357, 798_415, 137_788, 1_828_971, 497_577)  # reviews of the six 5-core categories of 2018
USERS, ITEMS = 445_789, 172_653
PLAN, SPLIT = Negatives("paper"), Split("random")
PHASES = ("sampling", "sampling and split")


def log_of(folder: Path) -> dict[str, pd.DataFrame]:
    """By category, each pair once."""
    logs = {}
    for path in sorted(folder.glob("*.parquet")):
        rows = pq.read_table(path, columns=["reviewerID", "asin"]).rename_columns(["user", "item"])
        logs[path.stem] = rows.to_pandas().astype(object).drop_duplicates(ignore_index=True)
    if not logs:
        raise SystemExit(f"{folder} holds no Parquet files")
    return logs


def made_log(scale: float) -> dict[str, pd.DataFrame]:
    """Users and items shared out as clicks are; a user has five clicks at least."""
    draw = np.random.default_rng(0)
    logs = {}
    for domain, clicks in enumerate(CLICKS):
        share = clicks / sum(CLICKS) * scale
        users, items, rows = round(USERS * share), round(ITEMS * share), round(clicks * scale)
        weights = 1 / np.arange(1, items + 1)
        user = np.concatenate([np.repeat(np.arange(users), 5), draw.integers(users, size=max(rows - 5 * users, 0))])
        item = draw.choice(items, size=len(user), p=weights / weights.sum())
        frame = pd.DataFrame({"user": user, "item": item}).drop_duplicates(ignore_index=True)
        texts = {"user": frame["user"].map("A{:012d}".format), "item": frame["item"].map("B{:09d}".format)}
        logs[f"domain {domain}"] = pd.DataFrame(texts, dtype=object)
    return logs


# --- the loop -----------------------------------------------------------------------------------------------------------


def three_parts(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """Shuffled, then train, valid and test in 0.6, 0.2 and 0.2, where the later parts round up."""
    rows = rows.sample(frac=1, random_state=PLAN.seed)
    held_out = math.ceil(0.4 * len(rows))
    test, train = math.ceil(held_out / 2), len(rows) - held_out
    return [rows.iloc[:train], rows.iloc[train : len(rows) - test], rows.iloc[len(rows) - test :]]


def looped(clicks: pd.DataFrame, items: set[str], share: float, split: bool) -> int:
    """Negatives of one domain, user by user; returns the rows that came out."""
    parts: list[list[pd.DataFrame]] = [[], [], []]
    found = []
    for user, own in clicks.groupby("user"):
        left = list(items - set(own["item"]))
        chosen = random.sample(left, min(math.floor(len(own) / share), len(left)))
        if not split:
            found += [(user, item, 0) for item in chosen]
        elif chosen:
            negatives = pd.DataFrame({"user": user, "item": chosen, "label": 0})
            for part, rows in zip(parts, three_parts(negatives), strict=True):
                part.append(rows)
    if not split:
        return len(pd.DataFrame(found, columns=["user", "item", "label"]))
    for part, rows in zip(parts, three_parts(clicks.assign(label=1)), strict=True):
        part.append(rows)
    return sum(len(pd.concat(part).sample(frac=1, random_state=PLAN.seed)) for part in parts)


def loop(logs: dict[str, pd.DataFrame], users: int, split: bool) -> float:
    """Seconds a row. Rows of each domain weigh as they do in the whole log."""
    shares = click_shares(PLAN, list(logs))
    seconds, total = 0.0, 0
    for share, clicks in zip(shares, logs.values(), strict=True):
        items, names = set(clicks["item"]), clicks["user"].unique()
        chosen = clicks[clicks["user"].isin(set(names[:: max(1, len(names) // users)]))]
        started = time.perf_counter()
        rows = looped(chosen, items, share, split)
        scale = len(clicks) / len(chosen)
        seconds += (time.perf_counter() - started) * scale
        total += round(rows * scale)
    return seconds / total


# --- ours ---------------------------------------------------------------------------------------------------------------


def stored_log(engine: Engine, logs: dict[str, pd.DataFrame]) -> Any:
    """What preparing has when it comes to negatives."""
    paths = []
    for domain, clicks in enumerate(logs.values()):
        table = pa.table({name: pa.array(clicks[name], pa.string()) for name in ("user", "item")})
        table = table.append_column("__domain", pa.array(np.full(len(clicks), domain), pa.int32()))
        paths.append(engine.work / f"log-{domain}.parquet")
        pq.write_table(table, paths[-1])
    rows = engine.read(paths)
    digest = (ibis.literal("0:") + rows["user"] + "|" + rows["item"] + ":0").hexdigest("md5")
    texts = {"__user_text": rows["user"], "__item_text": rows["item"]}
    return engine.stored(rows.mutate(__label=ibis.literal(1, "int32"), __hash=digest, **texts))


def ours(engine: Engine, clicks: Any, domains: list[str], split: bool) -> float:
    """Seconds a row."""
    started = time.perf_counter()
    clicks = clicks.mutate(**{ORDER_COLUMN: engine.integer(clicks["__hash"])})
    rows = sampled(engine, clicks, PLAN, domains, item="item")
    if split:
        columns = ["user", "item", "__domain", "__label", ORDER_COLUMN]  # what preparing goes on with
        rows = with_split(engine, clicks.union(rows).select(*columns), SPLIT)[0]
    else:
        rows = engine.stored(rows)
    return (time.perf_counter() - started) / size(rows)


# A further phase, such as the whole of domlora.data.prepare.prepare, is one more pair of arms here and a name in PHASES.
def arms_of(logs: dict[str, pd.DataFrame], users: int, engine: Engine, clicks: Any) -> dict[str, Callable[[], float]]:
    arms: dict[str, Callable[[], float]] = {}
    for phase in PHASES:
        split = phase.endswith("split")
        arms[f"loop, {phase}"] = partial(loop, logs, users, split)
        arms[f"ours, {phase}"] = partial(ours, engine, clicks, list(logs), split)
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="a folder of one Parquet file a category")
    parser.add_argument(
        "--quick", action="store_true", help="one round, fewer users in the loop, a made log of a tenth"
    )
    parser.add_argument("--users", type=int, help="of each domain in the loop; 1,000 by default, 300 if quick")
    arguments = parser.parse_args()
    logs = log_of(arguments.raw) if arguments.raw else made_log(0.1 if arguments.quick else 1)
    users, rounds = arguments.users or (300 if arguments.quick else 1000), 1 if arguments.quick else 3
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    items = sum(clicks["item"].nunique() for clicks in logs.values())
    print(
        f"{len(logs)} domains, {sum(map(len, logs.values())):,} clicks, {items:,} items; {cores} cores; {rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as folder, open_engine("duckdb", Path(folder)) as engine:
        clicks = stored_log(engine, logs)
        timings = take_turns(arms_of(logs, users, engine, clicks), seconds=0, min_rounds=rounds)
    found = {}
    for phase in PHASES:
        ratio = timings.ratio(f"loop, {phase}", over=f"ours, {phase}")
        speeds = [f"{arm} {1 / timings.median(f'{arm}, {phase}'):,.0f} rows/s" for arm in ("loop", "ours")]
        print(f"{phase}: {', '.join(speeds)}, ratio {ratio}, a core {digits(ratio.median / (cores or 1))}")
        found[phase] = ratio.median
    print(json.dumps(found))


if __name__ == "__main__":
    main()
