"""Several processes at one bundle, and processes that are killed. Forked: they need no import of torch each."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from domlora.adapters.bank import adapter_parameters, base_state
from domlora.bundle import Bundle, gc, set_default, verify, versions
from domlora.bundle.disk import locked
from domlora.bundle.names import parts_on_disk
from domlora.errors import BundleError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def started(work: Callable[..., None], *args: object) -> BaseProcess:
    process = FORK.Process(target=work, args=args)
    process.start()
    return process


def step(bundle: Bundle, number: float) -> None:
    """Something of every part."""
    bundle.optimizer = {"step": torch.tensor(number)}
    bundle.facts = {"step": number}
    with torch.no_grad():
        base_state(bundle.model)["embedding.weight"][3] = number
        for _, bank in adapter_parameters(bundle.model):
            bank.fill_(number)


def is_whole(bundle: Bundle) -> bool:
    """Whether all parts are of one step."""
    number = bundle.facts.get("step")
    tables = bool((base_state(bundle.model)["embedding.weight"][3] == number).all())
    banks = all(bool((bank == number).all()) for _, bank in adapter_parameters(bundle.model))
    return tables and banks and float(bundle.optimizer["step"]) == number


def publish_for_ever(folder: Path, first: int) -> None:
    bundle = Bundle.open(folder)
    for number in range(first, first + 1000):
        step(bundle, float(number))
        bundle.publish(folder)
        if number % 3 == 0:
            gc(folder, keep=[])


def publish_some(folder: Path, times: int, seed: int) -> None:
    bundle = Bundle.open(folder)
    for number in range(times):
        step(bundle, float(100 * seed + number))
        bundle.publish(folder)


def test_killed_at_any_moment(saved: Path) -> None:
    """The default is whole each time, and what was left goes."""
    bundle = Bundle.open(saved)
    step(bundle, 0.0)
    bundle.publish(saved)
    moments, last = random.Random(7), 2
    for attempt in range(15):
        process = started(publish_for_ever, saved, 1000 * (attempt + 1))
        time.sleep(moments.uniform(0.1, 0.5))
        process.kill()
        process.join()
        found = Bundle.open(saved)
        assert is_whole(found)
        assert found.version is not None
        assert found.version >= last
        last = found.version
        verify(saved)
    assert last > 5, "nobody got anywhere"
    gc(saved, keep=[])
    step(found, 1.0)
    found.publish(saved)
    gc(saved, keep=[])
    assert is_whole(Bundle.open(saved))
    assert len(verify(saved).versions) == 1
    assert sorted(path.name for path in saved.iterdir() if "@" not in path.name) == [
        "adapters",
        "manifest.json",
        "versions",
    ]


@pytest.mark.parametrize("moment", ["parts", "record", "staging"])
def test_what_a_killed_publisher_left_is_removed(saved: Path, moment: str) -> None:
    """Parts and a record under the names that the next version will have."""
    left = {"parts": "adapters/app@2", "record": "versions/2.json", "staging": ".new"}[moment]
    if moment == "record":
        shutil.copy(saved / "versions/1.json", saved / left)
    else:
        shutil.copytree(saved / "adapters/app@1", saved / left)
    verify(saved)
    bundle = Bundle.open(saved)
    step(bundle, 4.0)
    assert bundle.publish(saved) == 2
    assert is_whole(Bundle.open(saved))
    assert not (saved / ".new").exists()
    assert set(parts_on_disk(saved)) >= {"adapters/app@2", "base@2", "versions/2.json"}


def test_gc_removes_what_nobody_refers_to(saved: Path) -> None:
    shutil.copytree(saved / "base@1", saved / "base@2")
    shutil.copytree(saved / "adapters/app@1", saved / "adapters/gone@1")
    assert gc(saved, keep=[]) == ["adapters/gone@1", "base@2"]


def test_two_publishers(saved: Path) -> None:
    writers = [started(publish_some, saved, 6, seed) for seed in (1, 2)]
    while any(process.is_alive() for process in writers):
        Bundle.open(saved)  # a reader meanwhile
    assert [process.exitcode for process in writers] == [0, 0]
    found = versions(saved)
    assert [version.number for version in found] == list(range(1, 14))
    assert {version.facts["step"] for version in found[1:]} == {100 * s + k for s in (1, 2) for k in range(6)}
    assert all(is_whole(Bundle.open(saved, version=version.number)) for version in found[1:])
    verify(saved)


def test_a_second_one_waits_and_then_says_so(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("domlora.bundle.disk._WAIT_S", 0.1)
    bundle = Bundle.open(saved)
    with locked(saved):
        for work in (lambda: bundle.publish(saved), lambda: gc(saved, keep=[]), lambda: set_default(saved, 1)):
            with pytest.raises(BundleError, match="one process at a time"):
                work()
        with pytest.raises(BundleError, match="one process at a time"):
            bundle.save(saved, overwrite=True)
        assert Bundle.open(saved).version == 1
    assert bundle.publish(saved) == 2


def test_a_publisher_waits_for_another(saved: Path) -> None:
    with locked(saved):
        process = started(publish_some, saved, 1, 1)
        time.sleep(0.3)
        assert len(versions(saved)) == 1
    process.join()
    assert len(versions(saved)) == 2
