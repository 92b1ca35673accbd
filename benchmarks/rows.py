"""What rows in Redis or Valkey cost: a DeepFM of five features, 64 candidates a request, beside the graph with its tables.

    python benchmarks/rows.py --plan full --json rows.json

Needs ``domlora[export,rows]`` and ``valkey-server`` or ``redis-server``, which it starts by itself on a free port and a
socket. One process asks, as a worker of the server does; arms take turns. Processor time is what a busy machine disturbs
least; the latency of a store is that of this machine, not of a network.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import redis
from page import Section, show, write
from rounds import Timings, digits, take_turns

from domlora.serving.program import Program
from domlora.serving.rows.folder import RowsFolder, write_rows
from domlora.serving.rows.layout import RemoteTable
from domlora.serving.rows.push import push
from domlora.serving.rows.store import RowStore

ROWS, FEATURES, REQUESTS = 64, 5, 200
REMOTE = ["embedding.*", "linear.table.*"]
SKEWED = "new skewed ids each time, cache of a tenth of the rows"


class Size(NamedTuple):
    """How much is measured."""

    num_ids: int
    seconds: float
    rounds: int


PLANS = {"smoke": Size(2_000, 0.1, 2), "quick": Size(50_000, 10.0, 5), "full": Size(200_000, 60.0, 15)}
Requests = Sequence[tuple[np.ndarray, np.ndarray, int]]


@dataclass(slots=True)
class Arm:
    """A program and what it is asked; its figures are processor seconds of this process a request."""

    program: Program
    requests: Callable[[], Requests]
    store: RowStore | None = None
    walls: list[float] = field(default_factory=list)
    counts: np.ndarray = field(default_factory=lambda: np.zeros(3, np.int64))

    def __call__(self) -> float:
        requests = self.requests()
        start = time.process_time()
        for request in requests:
            before = time.perf_counter()
            self.program(*request)
            self.walls.append(time.perf_counter() - before)
        took = (time.process_time() - start) / len(requests)
        if self.store is not None:
            self.counts += self.store.take_counts()[:3]
        return took

    @property
    def hits(self) -> str:
        return f"{100 * self.counts[0] / self.counts.sum():.0f} %" if self.counts.sum() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="quick")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    size = PLANS[arguments.plan]
    with tempfile.TemporaryDirectory(prefix="dr") as name, running(Path(name)) as urls:
        folder = Path(name)
        exported(folder, size.num_ids)
        sections = [pushes(folder, urls["socket"]), lookups(folder, urls, size), chains(folder, urls["socket"], size)]
    for section in sections:
        show(section)
    if arguments.json is not None:
        write(arguments.json, sections)


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """A server, until the block ends; its addresses."""
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        raise SystemExit("neither valkey-server nor redis-server is installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    told = ["--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(folder / "s"), "--save", ""]
    process = subprocess.Popen([binary, *told], stdout=subprocess.DEVNULL)
    try:
        for _ in range(500):
            with suppress(redis.RedisError):
                redis.Redis(port=port).ping()
                break
            time.sleep(0.01)
        yield {"TCP": f"redis://127.0.0.1:{port}/0", "socket": f"unix://{folder / 's'}"}
    finally:
        process.kill()
        process.wait()


def exported(folder: Path, num_ids: int) -> None:
    """The same DeepFM with its tables (``whole``) and without them (``remote``)."""
    import torch

    from domlora.bundle import Bundle
    from domlora.features.encode import Encoder
    from domlora.features.schema import Feature, Schema
    from domlora.models.build import build_model
    from domlora.serving.export import export
    from domlora.serving.pack import random_rows

    torch.manual_seed(0)
    features = tuple(Feature(f"f{i}", num_ids=num_ids, hash_buckets=num_ids - 2) for i in range(FEATURES))
    schema = Schema(features, ("all",))
    options: dict[str, Any] = {"name": "deepfm", "embedding_dim": 16, "hidden_units": [256, 128, 64]}
    model = build_model(schema=schema, **options)
    with torch.no_grad():
        model.linear.table.weight.normal_(0.0, 0.1)
    bundle = Bundle(model, options, Encoder(schema, {}))
    export(bundle, folder / "whole", [random_rows(schema)])
    export(bundle, folder / "remote", [random_rows(schema)], remote_tables=REMOTE)


def requests_of(num_ids: int, zipf: bool, seed: int) -> Requests:
    """Two features of who asks, the same for all candidates, and three of each candidate."""
    random = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, num_ids - 1)
    chance = weights / weights.sum() if zipf else None
    ids = random.choice(num_ids - 2, (REQUESTS, ROWS, FEATURES), p=chance) + 2
    ids[:, :, :2] = ids[:, :1, :2]
    return [(each, np.zeros((ROWS, 0), np.float32), -1) for each in ids]


def pushes(folder: Path, url: str) -> Section:
    """All rows, and an update of one in a hundred."""
    client, rows = redis.Redis.from_url(url), RowsFolder.of(folder / "remote")
    name = next(iter(rows.tables))
    used, start = client.info("memory")["used_memory"], time.perf_counter()
    push(rows, url)
    took, each = time.perf_counter() - start, (client.info("memory")["used_memory"] - used) / len(rows.rows(name))
    changed = next_day(folder / "day", rows, name, 1)
    start = time.perf_counter()
    sent = push(changed, url, after=rows)[0].sent
    update_s = time.perf_counter() - start
    lines = [
        ["rows", f"{len(rows.rows(name)):,}"],
        ["numbers in a row", f"{rows.tables[name].width}"],
        ["pushed rows/s", digits(len(rows.rows(name)) / took)],
        ["bytes of the store for a row of " + f"{4 * rows.tables[name].width}", digits(each)],
        ["rows of an update", f"{sent:,}"],
        ["seconds of an update, finding what changed among them", digits(update_s)],
    ]
    return Section("Pushing", "", ("what", "figure"), lines)


def next_day(folder: Path, before: RowsFolder, name: str, seed: int) -> RowsFolder:
    """The same table with one row in a hundred changed."""
    place, content = before.tables[name], np.array(before.rows(name))
    random = np.random.default_rng(seed)
    content[random.choice(len(content), len(content) // 100, replace=False)] += 1.0
    table = RemoteTable(name, place.num_rows, {name: place.width}, [])
    folder.mkdir()
    write_rows([_Content(table, content)], folder)
    return RowsFolder(folder)


class _Content(NamedTuple):
    table: RemoteTable
    content: np.ndarray

    def rows(self, numbers: slice) -> np.ndarray:
        return self.content[numbers]


def lookups(folder: Path, urls: dict[str, str], size: Size) -> Section:
    """What a request costs with rows from the graph, from the store, and from memory."""
    same = requests_of(size.num_ids, False, 1)
    uniform = partial(tuple, same)
    seeds = count(2)
    arms = {"tables in the graph": Arm(Program.open(folder / "whole"), uniform)}
    for way, url in urls.items():
        arms[f"store by {way}, no cache"] = remote(folder, url, uniform, 0)
    arms["all rows in the cache"] = remote(folder, urls["socket"], uniform, 1 << 30)
    tenth = size.num_ids * FEATURES // 10 * 250
    arms[SKEWED] = remote(folder, urls["socket"], lambda: requests_of(size.num_ids, True, next(seeds)), tenth)
    check_parity(arms["tables in the graph"].program, list(arms.values())[1:])
    for _ in range(2 * size.rounds):  # the requests that are measured are others
        arms[SKEWED]()
    for arm in arms.values():
        arm()
        arm.walls.clear()
        arm.counts[:] = 0
    timings = take_turns(arms, size.seconds, size.rounds)
    lines = [line(name, arm, timings) for name, arm in arms.items()]
    head = ("rows from", "processor time, us", "times the graph", "p50, us", "p99, us", "from the cache")
    distinct = np.mean([sum(len(np.unique(slot)) for slot in ids.T) for ids, _, _ in same])
    return Section("A request of 64 candidates", f"{distinct:.0f} distinct rows a request.", head, lines)


def remote(folder: Path, url: str, requests: Callable[[], Requests], cache_bytes: int) -> Arm:
    store = RowStore(url, timeout_s=5.0, cache_bytes=cache_bytes)
    return Arm(Program.open(folder / "remote", rows=store), requests, store)


def check_parity(whole: Program, arms: Sequence[Arm]) -> None:
    for arm in arms:
        worst = max(float(np.abs(whole(*each) - arm.program(*each)).max()) for each in arm.requests()[:50])
        if worst > 1e-6:
            raise SystemExit(f"logits differ by {worst}")


def line(name: str, arm: Arm, timings: Timings) -> list[str]:
    p50, p99 = np.quantile(arm.walls, (0.5, 0.99)) * 1e6
    over = str(timings.ratio(name, "tables in the graph"))
    return [name, digits(timings.median(name) * 1e6), over, digits(p50), digits(p99), arm.hits]


def chains(folder: Path, url: str, size: Size) -> Section:
    """Finding where the rows of a request lie, the more updates stand above a whole table."""
    rows = RowsFolder.of(folder / "remote")
    name = next(iter(rows.tables))
    numbers = np.unique(np.random.default_rng(0).integers(0, rows.tables[name].num_rows, ROWS * 3 + 2))
    lines = []
    for depth in range(8):
        if depth:
            before, rows = rows, next_day(folder / f"day{depth}", rows, name, depth)
            push(rows, url, after=before)
        place, store = rows.tables[name], RowStore(url, timeout_s=5.0, cache_bytes=1 << 30)
        table = RemoteTable(name, place.num_rows, {name: place.width}, [], place.sha256)
        store.fetch([(table, numbers)])
        took = min(_seconds(store, table, numbers) for _ in range(20 * size.rounds))
        lines.append([f"{depth}", digits(took * 1e6)])
    return Section("Updates above a whole table", "Fetching from the cache.", ("updates", "us"), lines)


def _seconds(store: RowStore, table: RemoteTable, numbers: np.ndarray) -> float:
    start = time.perf_counter()
    store.fetch([(table, numbers)])
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
