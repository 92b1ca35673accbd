"""R8: kill -9 at 50 random moments of pushes and of versions that come: the store is whole each time, and nothing is lost.

What training leaves when it is killed is tried by ``benchmarks/kills.py``.
"""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from pushing import Adapters, copy_of, new_store
from support import ROOT, say

from domlora.serving.folder import read_facts, read_manifest, seal
from domlora.serving.live import Live
from domlora.serving.store import Store

pytestmark = pytest.mark.reliability
KILLS, LONGEST_S = 50, 0.5
WRITER = Path(__file__).with_name("writing_store.py")


@pytest.fixture
def world(exported, tmp_path):
    """A store, four adapters and two versions to put into it."""
    adapters = Adapters(exported)
    place = tmp_path / "adapters"
    place.mkdir()
    for seed, domain in enumerate(("toys", "toys", "new", "new")):
        (place / f"{domain}@v{seed}.safetensors").write_bytes(adapters.payload(domain, seed))
    for name in ("a", "b"):
        other = copy_of(exported, tmp_path / "exports" / name)
        facts = {key: value for key, value in read_facts(other).items() if key not in ("files", "format")}
        seal(other, {**facts, "note": name})
    new_store(exported, tmp_path / "store")
    return tmp_path


def killed(world: Path, start: int, after_s: float) -> list[list[str]]:
    """What the writer said before it was killed: ``begin`` or ``done``, of what, and its version."""
    words = [world / "store", world / "exports", world / "adapters", start]
    with subprocess.Popen(
        [sys.executable, WRITER, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    ) as process:
        first = process.stdout.readline()
        time.sleep(after_s)
        process.kill()
        told, failed = process.communicate()
    assert failed == "", failed
    return [line.split() for line in [first, *told.splitlines()]]


def check_whole(store: Store, allowed: dict[str, set[str]]) -> None:
    """All that is there is so bit for bit; what is served is what was done last, or what was begun then."""
    state = store.state()
    for number in store.versions():
        read_manifest(store.version_folder(number))
    live = Live(store, name="live")
    for domain in live.known():
        live.ensure(domain)  # compares its file's sha256
    assert str(state.live) in allowed["live"]
    for domain in ("toys", "new"):
        adapter = state.adapters.get(domain)
        assert (None if adapter is None else adapter.version) in allowed[domain]


def orphans(store: Store) -> list[str]:
    """Files that nobody refers to."""
    wanted = {"lock", "lock.versions", "state.json", "versions", "adapters", "experiments", "log"}
    wanted |= {each.file for each in store.state().adapters.values()}
    places = [*store.folder.iterdir(), *(store.folder / "adapters").iterdir()]
    found = [str(path.relative_to(store.folder)) for path in places]
    return [name for name in found if name not in wanted] + [
        path.name for path in (store.folder / "versions").iterdir() if not path.name.isdecimal()
    ]


def test_killed_writers(world):
    moments, store = random.Random(8), Store.open(world / "store")
    steps, left = 0, Counter()
    served = {"live": "1", "toys": None, "new": None}
    for _ in range(KILLS):
        told = killed(world, steps, moments.uniform(0, LONGEST_S))
        served |= {what: version for word, what, version in told if word == "done"}
        word, what, version = told[-1]
        allowed = {name: {done} for name, done in served.items()}
        allowed[what].add(version)
        moment = "between two changes" if word == "done" else "in a version" if what == "live" else "in a push"
        left[moment] += 1
        check_whole(store, allowed)
        left["files left behind"] += len(orphans(store))
        state = Store.open(store.folder).state()
        served = {name: None if name not in state.adapters else state.adapters[name].version for name in served}
        served["live"] = str(state.live)
        steps += 1 + sum(word == "done" for word, _, _ in told)
    prune(store, world)
    behind = left.pop("files left behind")
    say(
        f"{KILLS} of {KILLS} stores whole after kill -9 in {steps} changes ({dict(left)}); "
        f"{behind} files left behind, {len(orphans(store))} after the next changes"
    )
    assert orphans(store) == []


def prune(store: Store, world: Path) -> None:
    """Push and add once more: the next writer removes what one before has left."""
    store.set_live(1)
    for number in range(2, 7):
        if number not in store.versions():
            store.add_version(world / "exports" / "a", number)
        store.drop_version(number)
    for path in sorted((world / "adapters").iterdir()):
        store.put_adapter(path.stem.partition("@")[0], path.read_bytes())
