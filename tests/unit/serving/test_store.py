"""A store: what is refused, what a change leaves behind, and who may write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from domlora.abtest.experiments import Arm, Experiment
from domlora.abtest.registry import Registry
from domlora.bundle import set_default
from domlora.bundle.records import _FORMAT
from domlora.errors import BundleError, ConfigError, DataError, DomloraError, UnknownDomainError
from domlora.serving import source
from domlora.serving.folder import MANIFEST, TABLES, read_facts
from domlora.serving.live import Live
from domlora.serving.pack import adapter_payload
from domlora.serving.payload import read_payload
from domlora.serving.source import FolderFollower, open_store
from domlora.serving.state import STATE, State
from domlora.serving.store import Store
from domlora.serving.writing import turn


def files(folder):
    return sorted(path.name for path in folder.rglob("*.safetensors"))


def refused(served, content, domain="toys", **options):
    """The one line; nothing is written."""
    before = served.store.content(), files(served.store.folder)
    with pytest.raises(DomloraError) as told:
        served.store.put_adapter(domain, content, **options)
    assert (served.store.content(), files(served.store.folder)) == before
    return str(told.value)


def test_it_needs_no_torch():
    code = "import sys, domlora.serving.live, domlora.serving.delta; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_pushed_adapter_is_there_for_who_opens_the_store_next(served):
    adapter = served.store.put_adapter("toys", served.payload("toys", 1, rank=3), pinned=True)
    assert (adapter.domain, adapter.version, adapter.rank, adapter.pinned, adapter.since) == ("toys", "1", 3, True, 1)
    assert Store.open(served.store.folder).state().adapters == {"toys": adapter}
    assert (served.store.folder / adapter.file).read_bytes() == served.payload("toys", 1, rank=3)


def test_the_same_adapter_again_is_no_change(served):
    first = served.store.put_adapter("toys", served.payload("toys", 1))
    before = served.store.content(), (served.store.folder / first.file).stat().st_ino
    assert served.store.put_adapter("toys", served.payload("toys", 1)) == first
    assert (served.store.content(), (served.store.folder / first.file).stat().st_ino) == before


def test_the_next_adapter_takes_the_place_of_the_one_before(served):
    served.store.put_adapter("toys", served.payload("toys", 1))
    served.store.put_adapter("toys", served.payload("toys", 2), "2026-05-26")
    assert served.store.state().adapters["toys"].version == "2026-05-26"
    (name,) = {*files(served.store.folder / "adapters")}
    assert name.startswith("toys@2026-05-26-")


def test_a_version_of_an_adapter_never_changes(served):
    served.store.put_adapter("toys", served.payload("toys", 1))
    assert "must not change" in refused(served, served.payload("toys", 2), version="1")


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.9, 0.999])
def test_a_truncated_adapter_is_refused(served, share):
    content = served.payload("toys", 1)
    assert "must be whole" in refused(served, content[: int(share * len(content))])


def test_no_flipped_bit_passes(served):
    content = bytearray(served.payload("toys", 1))
    header = 8 + int.from_bytes(content[:8], "little")
    for place in [*range(header), *range(header, len(content), 97)]:
        for bit in (0, 5):
            content[place] ^= 1 << bit
            with pytest.raises(BundleError):
                read_payload(bytes(content))
            content[place] ^= 1 << bit
    assert read_payload(bytes(content)).domain == "toys"


def changed(served, **banks):
    """A whole and honest payload with other banks."""
    told = served.banks(1)
    for name, change in banks.items():
        told[name.replace("__", ".")] = change(told.get(name.replace("__", ".")))
    return served.payload("toys", 1, banks={name: bank for name, bank in told.items() if bank is not None})


@pytest.mark.parametrize(
    ("banks", "word"),
    [
        ({"tower__0__lora_A": lambda bank: bank[:-1]}, "must fit layer 'tower.0'"),
        ({"tower__0__lora_B": lambda bank: np.concatenate([bank, bank])}, "must fit layer 'tower.0'"),
        ({"tower__1__lora_bias": lambda bank: np.full_like(bank, np.nan)}, "finite numbers of type float32"),
        ({"tower__1__lora_A": lambda bank: np.full_like(bank, np.inf)}, "finite numbers of type float32"),
        ({"tower__1__lora_A": lambda bank: bank.astype(np.float64)}, "finite numbers of type float32"),
        ({"tower__7__lora_A": lambda _: np.ones((2, 2), np.float32)}, "banks of every adapted layer"),
        ({"tower__0__lora_A": lambda _: None}, "banks of every adapted layer"),
    ],
    ids=["shape", "ranks", "nan", "inf", "float64", "unknown", "missing"],
)
def test_banks_that_do_not_fit_are_refused(served, banks, word):
    assert word in refused(served, changed(served, **banks))


def test_an_adapter_of_another_base_domain_or_rank_is_refused(served):
    assert "another base" in refused(served, served.payload("toys", 1, base="0" * 64))
    assert "is another one's" in refused(served, served.payload("books", 1))
    assert "rank must be at most 4" in refused(served, served.payload("toys", 1, rank=5), max_rank=4)


@pytest.mark.parametrize(
    "name", ["", " ", "..", "../toys", "toys/../../x", "/etc/passwd", "a\\b", "a\0b", "a\nb", "x" * 201, "\ud800"]
)
def test_names_that_are_none_are_refused(served, name):
    assert "domain's name" in refused(served, served.payload("toys", 1), domain=name)


@pytest.mark.parametrize("version", ["", "../2", "a/b", "-x", "x" * 65, "a\n"])
def test_versions_that_are_none_are_refused(served, version):
    assert "adapter's version" in refused(served, served.payload("toys", 1), version=version)


@pytest.mark.parametrize(
    "name", ["home/kitchen", "Toys", "toys", "con", "käse", "a@b", "x" * 200, "ä" * 200, "a.b", "%2e%2e"]
)
def test_every_other_name_has_a_file_of_its_own(served, name):
    for domain in (name, "other"):
        served.store.put_adapter(domain, served.payload(domain, 1))
    state = served.store.state()
    assert len(files(served.store.folder / "adapters")) == 2
    assert all(
        (served.store.folder / each.file).resolve().parent.name == "adapters" for each in state.adapters.values()
    )


def test_a_model_without_adapters_takes_none(plain, tmp_path, served):
    store = Store.create(tmp_path / "plain")
    store.add_version(plain.folder)
    with pytest.raises(ConfigError, match="cannot take any adapter"):
        store.put_adapter("app", served.payload("app", 1))


def test_a_dropped_domain_stays_away(served, next_day):
    store = served.store
    store.put_adapter("toys", served.payload("toys", 1))
    store.drop_adapter("toys")
    store.drop_adapter("web")
    assert store.state().removed == {"web"}
    assert files(store.folder / "adapters") == []
    for domain in ("toys", "web"):
        with pytest.raises(UnknownDomainError, match=domain):
            store.drop_adapter(domain)
    store.put_adapter("web", served.payload("web", 1))
    assert store.state().removed == frozenset()


def test_what_is_unloaded_can_be_loaded_again(served):
    store = served.store
    adapter = store.put_adapter("toys", served.payload("toys", 1))
    store.unload("toys")
    assert store.state().removed == {"toys"}
    store.load("toys")
    assert store.state().adapters["toys"] == adapter
    assert store.state().removed == frozenset()
    with pytest.raises(UnknownDomainError, match="no adapter for this domain"):
        store.load("books")


def test_versions_are_added_made_live_and_dropped(served, next_day):
    store = served.store
    assert store.add_version(next_day.folder) == 2
    assert (store.versions(), store.state().live) == ([1, 2], 1)
    with pytest.raises(BundleError, match="no such version"):
        store.set_live(3)
    store.set_live(2)
    with pytest.raises(ConfigError, match="live version must stay"):
        store.drop_version(2)
    store.drop_version(1)
    assert store.versions() == [2]
    assert Live(store, name="m").current.version == "2"


def test_a_version_that_an_experiment_answers_with_stays(served, next_day):
    store = served.store
    store.add_version(next_day.folder)
    registry = Registry.open(store.folder / "experiments")
    registry.create(Experiment("wide", (Arm("now"), Arm("new", version=2))))
    registry.start("wide")
    with pytest.raises(ConfigError, match=r"experiment's version must stay.*ab stop .* wide"):
        store.drop_version(2)
    registry.stop("wide")
    store.drop_version(2)
    assert store.versions() == [1]


def test_a_number_that_is_used_again_has_the_facts_of_what_is_there(served, adapted, next_day):
    reader = Store.open(served.store.folder)
    served.store.add_version(adapted.folder, 2)
    assert reader.facts(2) == reader.facts(1)
    served.store.drop_version(2)
    served.store.add_version(next_day.folder, 2)
    assert reader.facts(2) == read_facts(next_day.folder)


def test_a_version_never_changes(served, adapted, next_day):
    assert served.store.add_version(adapted.folder, 1) == 1
    with pytest.raises(BundleError, match="another one of this number"):
        served.store.add_version(next_day.folder, 1)


@pytest.mark.parametrize("name", [TABLES, "mixed.onnx", "vocabularies.json", "adapters/00001.safetensors"])
def test_a_damaged_version_is_not_taken(served, next_day, tmp_path, name):
    shutil.copytree(next_day.folder, tmp_path / "damaged")
    content = bytearray((tmp_path / "damaged" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "damaged" / name).write_bytes(content)
    with pytest.raises(BundleError, match=name):
        served.store.add_version(tmp_path / "damaged")
    assert served.store.versions() == [1]


def test_a_version_that_was_damaged_does_not_become_live(served, next_day):
    store = served.store
    store.add_version(next_day.folder)
    place = store.version_folder(2) / TABLES
    content = place.read_bytes()
    place.unlink()  # it has the bytes of the exported folder, and those stay
    place.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=TABLES):
        store.set_live(2)
    assert store.state().live == 1


@pytest.mark.parametrize("change", [b"", b"{", b"[]", b'{"format": 1}', None])
def test_a_damaged_state_is_refused(served, change):
    whole = served.store.content()
    content = whole.replace(b'"live": 1', b'"live": 2') if change is None else change
    (served.store.folder / STATE).write_bytes(content)
    with pytest.raises(BundleError, match=STATE):
        Store.open(served.store.folder)


def test_a_state_that_leads_out_of_the_store_is_refused(served):
    served.store.put_adapter("toys", served.payload("toys", 1))
    state = served.store.state()
    object.__setattr__(state.adapters["toys"], "file", "adapters/../../secret.safetensors")
    with pytest.raises(BundleError, match="names files that no store has"):
        State.from_json(state.to_json().encode())


def test_writers_wait_for_each_other(served):
    """In threads of two processes: every adapter is there, and no file too many."""
    code = (
        "import sys; from pathlib import Path; from domlora.serving.store import Store;"
        "s = Store.open(Path(sys.argv[1]));"
        "[s.put_adapter(p.stem, p.read_bytes()) for p in sorted(Path(sys.argv[2]).glob('*'))]"
    )
    there = served.store.folder.parent / "theirs"
    there.mkdir()
    for number in range(8):
        (there / f"theirs{number}.bin").write_bytes(served.payload(f"theirs{number}", number))
    other = subprocess.Popen([sys.executable, "-c", code, str(served.store.folder), str(there)])
    ours = [
        threading.Thread(target=served.store.put_adapter, args=(f"ours{n}", served.payload(f"ours{n}", n)))
        for n in range(8)
    ]
    for thread in ours:
        thread.start()
    for thread in ours:
        thread.join()
    assert other.wait(30) == 0
    assert served.store.state().adapters.keys() == {f"{who}{n}" for who in ("ours", "theirs") for n in range(8)}
    assert len(files(served.store.folder / "adapters")) == 16


def test_what_a_killed_writer_left_goes(served):
    left = served.store.folder / "adapters" / "toys@1-00000000.safetensors"
    left.write_bytes(b"half")
    served.store.put_adapter("toys", served.payload("toys", 1))
    assert not left.exists()


def test_a_full_disk_leaves_the_store_as_it_was(adapted, small_disk, served):
    store = Store.create(small_disk / "store")
    store.add_version(adapted.folder)
    store.put_adapter("toys", served.payload("toys", 1))
    before = store.content()
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
    with pytest.raises(DataError, match="disk must have room"):
        store.put_adapter("toys", served.payload("toys", 2, rank=256))
    assert store.content() == before
    assert Live(store, name="m").ensure("toys").adapters["toys"] == "1"
    assert not [path for path in store.folder.rglob(".*") if path.is_file()]


def test_a_bundles_domain_is_pushed_as_one_file(served, adapted):
    content = adapter_payload(adapted.bundle, "web", version="7")
    assert content == adapter_payload(adapted.bundle, "web", version="7")
    live = Live(served.store, name="m")
    before = served.logits(live, "web")
    served.store.put_adapter("web", content)
    live.refresh()
    assert (served.logits(live, "web") == before).all()
    assert live.current.adapters["web"] == "7"
    with pytest.raises(UnknownDomainError, match="no such domain"):
        adapter_payload(adapted.bundle, "toys")
    with pytest.raises(ConfigError, match="has no version"):
        adapter_payload(replace(adapted.bundle, version=None), "web")


def test_an_exported_folder_is_served_from_a_store_beside_it(adapted, next_day, tmp_path):
    place = tmp_path / "program"
    shutil.copytree(adapted.folder, place)
    store, follower = open_store(place)
    assert (store.folder.name, store.versions(), store.state().live) == ("program.store", [1], 1)
    assert isinstance(follower, FolderFollower)
    assert os.stat(place / TABLES).st_ino == os.stat(store.version_folder(1) / TABLES).st_ino
    shutil.rmtree(place)
    shutil.copytree(next_day.folder, place)
    assert open_store(place).store.state().live == 2
    store.set_live(1)
    assert open_store(place).store.state().live == 1  # what somebody chose since stays
    assert open_store(store.folder).store.state().live == 1


def test_a_changed_exported_folder_is_served_a_moment_later(adapted, next_day, tmp_path):
    """By all processes, of which one takes it over; and not again after somebody chose another version."""
    place = tmp_path / "program"
    shutil.copytree(adapted.folder, place)
    one, other = (opened(place) for _ in range(2))
    shutil.rmtree(place)
    assert not one.refresh()  # nothing is there for a moment
    shutil.copytree(next_day.folder, place)
    with turn(one.store.folder / "lock.follow", 1):
        one.refresh()
        assert one.store.state().live == 1
    assert [one.refresh(), one.refresh(), other.refresh()] == [False, True, True]
    assert (one.current.version, other.current.version, one.store.versions()) == ("2", "2", [1, 2])
    one.store.set_live(1)
    again = opened(place)
    for live in (one, other, again, one):
        live.refresh()
    assert [live.current.version for live in (one, other, again)] == ["1", "1", "1"]


def test_an_exported_folder_that_is_not_whole_is_tried_again(adapted, next_day, tmp_path, monkeypatch):
    place = tmp_path / "program"
    shutil.copytree(adapted.folder, place)
    live = opened(place)
    shutil.copytree(next_day.folder, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("vocab*"))
    with pytest.raises(BundleError, match=r"vocabularies\.json"):
        live.refresh()
    live.refresh()  # not at once: the same folder is read whole each time
    shutil.copy(next_day.folder / "vocabularies.json", place)
    monkeypatch.setattr(source, "_SOON_S", 0.0)
    monkeypatch.setattr(live._follower, "_retry_at", 0.0)
    live.refresh()
    assert live.refresh()
    assert live.current.version == "2"


def test_a_dropped_version_may_come_again(adapted, next_day, tmp_path):
    place = tmp_path / "program"
    shutil.copytree(adapted.folder, place)
    store = open_store(place).store
    store.add_version(next_day.folder, 2)
    store.set_live(2)
    store.drop_version(1)
    shutil.rmtree(place)
    shutil.copytree(next_day.folder, place)
    assert open_store(place).store.state().live == 3
    shutil.rmtree(place)
    shutil.copytree(adapted.folder, place)
    assert open_store(place).store.state().live == 4  # and not what it was when it came first


def opened(place):
    store, follower = open_store(place)
    return Live(store, name="m", follower=follower)


def test_what_is_none_of_the_three_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps({"format": "a dataset"}))
    for place in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(BundleError, match="an exported folder, a store or a bundle"):
            open_store(place)


def test_the_bundles_format_is_known():
    assert source._BUNDLE_FORMAT == _FORMAT


@pytest.fixture
def followed(adapted, next_day, tmp_path):
    """A bundle of two versions, and a store that has taken over both."""
    for made in (adapted, next_day):
        made.bundle.version = None
    adapted.bundle.save(tmp_path / "live")
    next_day.bundle.publish(tmp_path / "live")
    raw = json.loads((tmp_path / "live" / MANIFEST).read_bytes())
    store = Store.create(tmp_path / "live.store")
    for number, made in enumerate((adapted, next_day), 1):
        store.add_version(made.folder, number)
        store.set_live(number, followed=f"{number}:{raw['versions'][str(number)]}")
        made.bundle.version = None
    return tmp_path / "live"


def test_a_bundles_default_is_followed(followed):
    store, follower = open_store(followed)
    live = Live(store, name="live", follower=follower)
    assert live.current.version == "2"
    set_default(followed, 1)
    assert [live.refresh(), live.refresh()] == [False, True]
    assert live.current.version == "1"


def test_what_somebody_made_live_stays_until_the_bundle_changes(followed):
    store, follower = open_store(followed)
    live = Live(store, name="live", follower=follower)
    store.set_live(1)
    for _ in range(3):
        live.refresh()
    again = Live(open_store(followed).store, name="live", follower=open_store(followed).follower)
    again.refresh()
    assert (live.current.version, again.current.version) == ("1", "1")


def test_one_process_at_a_time_follows(followed):
    store, follower = open_store(followed)
    set_default(followed, 1)
    with turn(store.folder / "lock.follow", 1):
        follower.step()
        assert store.state().live == 2
    follower.step()
    assert store.state().live == 1
