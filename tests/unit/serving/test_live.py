"""What is served changes while it is served: adapters come, go and make room, versions are swapped, files break."""

from __future__ import annotations

import shutil
import threading
import time

import numpy as np
import pytest

from domlora.errors import BundleError, UnknownDomainError
from domlora.serving.folder import TABLES
from domlora.serving.live import Live
from domlora.serving.program import Program
from domlora.serving.store import Store


def same(ours, theirs):
    return np.abs(ours - theirs).max() <= 1e-5


@pytest.fixture
def live(served):
    return Live(served.store, name="m")


def in_threads(count, work):
    failures = []

    def run(number):
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_it_answers_as_the_exported_folder(live, served, adapted):
    program = Program.open(adapted.folder)
    for number, domain in enumerate(program.domains):
        assert (served.logits(live, domain) == program(*served.rows, np.full(8, number))).all()
    assert (served.logits(live, None) == program(*served.rows, np.full(8, -1))).all()


def test_adapters_are_read_when_they_are_asked_for(live):
    assert live.current.adapters == {}
    assert live.known().keys() == {"app", "web", "mail"}
    assert live.ensure("web").adapters == {"web": "1"}
    assert live.current.adapters == {"web": "1"}
    assert live.loads == 1
    assert live.ensure("web") is live.current
    assert live.loads == 1


def test_an_unknown_domain_is_named(live):
    with pytest.raises(UnknownDomainError, match="toys"):
        live.ensure("toys")


def test_a_pushed_adapter_answers_and_a_former_snapshot_stays(live, served):
    before = live.ensure("web")
    old = before.logits(*served.rows, np.full(8, before.number_of("web")))
    served.store.put_adapter("web", served.payload("web", 5, rank=7))
    assert live.refresh()
    assert not live.refresh()
    assert live.current.adapters == {"web": "5"}
    assert same(served.logits(live, "web"), served.expected(5, rank=7))
    assert (before.logits(*served.rows, np.full(8, before.number_of("web"))) == old).all()


def test_new_domains_are_in_memory_at_once_where_there_is_room(served):
    live = Live(served.store, name="m", max_adapters=2)
    for number, domain in enumerate(("a", "b", "c")):
        served.store.put_adapter(domain, served.payload(domain, number))
    live.refresh()
    assert live.current.adapters == {"a": "0", "b": "1"}
    assert same(served.logits(live, "c"), served.expected(2))


def test_dropped_and_unloaded_domains_are_unknown(live, served):
    served.store.put_adapter("toys", served.payload("toys", 1))
    for domain in ("toys", "web"):
        live.refresh()
        live.ensure(domain)
        served.store.unload(domain)
        live.refresh()
        assert domain not in live.current.adapters
        with pytest.raises(UnknownDomainError):
            live.ensure(domain)
        served.store.load(domain)
        live.refresh()
        assert domain in live.ensure(domain).adapters


def test_the_one_unused_for_longest_makes_room(served):
    live = Live(served.store, name="m", max_adapters=2)
    for domain in ("app", "web", "app", "mail"):
        live.ensure(domain)
    assert live.current.adapters.keys() == {"app", "mail"}
    assert served.logits(live, "web") is not None
    assert live.current.adapters.keys() == {"mail", "web"}


def test_pinned_adapters_stay(served):
    served.store.put_adapter("toys", served.payload("toys", 1), pinned=True)
    live = Live(served.store, name="m", max_adapters=2)
    assert live.current.adapters == {"toys": "1"}
    for domain in ("app", "web", "mail", "app"):
        assert domain in live.ensure(domain).adapters
        assert len(live.current.adapters) <= 2
    assert "toys" in live.current.adapters


def test_where_all_are_pinned_others_are_served_nevertheless(served):
    for number, domain in enumerate(("a", "b")):
        served.store.put_adapter(domain, served.payload(domain, number), pinned=True)
    live = Live(served.store, name="m", max_adapters=1)
    for domain in ("app", "web", "a", "b"):
        assert domain in live.ensure(domain).adapters
    assert {"a", "b"} <= live.current.adapters.keys()
    assert len(live.current.adapters) <= 3


def test_a_request_of_many_domains_has_all_of_them_in_one_snapshot(served):
    live = Live(served.store, name="m", max_adapters=1)
    snapshot = live.ensure_all(["app", "web", "mail", "app"])
    assert snapshot.adapters.keys() == {"app", "web", "mail"}
    live.ensure("app")
    with pytest.raises(UnknownDomainError):
        live.ensure_all(["app", "toys"])
    served.store.put_adapter("toys", served.payload("toys", 1))
    live.refresh()
    live.ensure("toys")
    assert len(live.current.adapters) == 1


def test_many_who_ask_for_one_adapter_read_it_once(served):
    live = Live(served.store, name="m")
    in_threads(30, lambda _: live.ensure("web"))
    assert live.loads == 1


def test_many_who_ask_for_many_get_their_own(served):
    for number in range(30):
        served.store.put_adapter(f"d{number}", served.payload(f"d{number}", number))
    live = Live(served.store, name="m", max_adapters=5)
    expected = [served.expected(number) for number in range(30)]

    def ask(number):
        for each in range(number, number + 30):
            assert same(served.logits(live, f"d{each % 30}"), expected[each % 30])

    in_threads(6, ask)
    assert len(live.current.adapters) <= 5


def test_a_missing_file_is_looked_for_again(served):
    """Another process has pushed the next one, and this one has not seen it yet."""
    served.store.put_adapter("toys", served.payload("toys", 1))
    live = Live(served.store, name="m")
    served.store.put_adapter("toys", served.payload("toys", 2))
    assert same(served.logits(live, "toys"), served.expected(2))


def test_a_damaged_adapter_is_refused_and_others_answer(served):
    adapter = served.store.put_adapter("toys", served.payload("toys", 1))
    live = Live(served.store, name="m")
    place = served.store.folder / adapter.file
    place.write_bytes(place.read_bytes()[:-1] + b"\1")
    with pytest.raises(BundleError, match=r"damaged.*toys@1"):
        live.ensure("toys")
    assert served.logits(live, "web") is not None
    with pytest.raises(BundleError, match=r"damaged.*toys@1"):
        Live(served.store, name="m")


def test_a_damaged_state_leaves_what_is_served(served, live):
    expected = served.logits(live, "web")
    whole = served.store.content()
    (served.store.folder / "state.json").write_bytes(whole[:-20])
    with pytest.raises(BundleError, match=r"state\.json"):
        live.refresh()
    assert (served.logits(live, "web") == expected).all()
    (served.store.folder / "state.json").write_bytes(whole)
    assert not live.refresh()


def test_a_version_is_swapped_and_warm(served, next_day):
    live = Live(served.store, name="m")
    live.ensure("web")
    served.store.put_adapter("toys", served.payload("toys", 1))
    served.store.set_live(served.store.add_version(next_day.folder))
    assert live.refresh()
    assert live.current.version == "2"
    assert live.current.adapters == {"web": "2"}
    assert live.known().keys() == {"app", "web", "mail", "tv"}
    served.store.set_live(1)
    live.refresh()
    assert live.known().keys() == {"app", "web", "mail", "toys"}
    assert same(served.logits(live, "toys"), served.expected(1))


def test_a_later_version_of_the_same_base_has_its_own_adapter_again(served, adapted):
    served.store.put_adapter("web", served.payload("web", 1))
    served.store.set_live(served.store.add_version(adapted.folder, 2))
    live = Live(served.store, name="m")
    assert live.current.version == "2"
    assert live.ensure("web").adapters == {"web": "2"}
    assert live.ensure("web", 1).adapters == {"web": "1"}


def test_versions_of_experiments_stay_in_memory(served, next_day):
    served.store.add_version(next_day.folder)
    live = Live(served.store, name="m")
    live.hold({2})
    held = live.of(2)
    assert held is live.of(2)
    assert (held.version, live.current.version, live.of().version) == ("2", "1", "1")
    assert "tv" in live.ensure("tv", 2).adapters
    assert live.resident(2) == {"tv"}
    served.store.set_live(2)
    live.refresh()
    assert live.current.adapters == {"tv": "2"}
    live.hold({1, 2})
    assert live.of(1).version == "1"
    live.hold(())
    with pytest.raises(BundleError, match="no such version"):
        live.of(7)


def test_a_number_that_is_used_again_is_opened_again(served, adapted, next_day):
    """This process read version 2, which was dropped; another one has its number, and answers with what is its own."""
    served.store.add_version(adapted.folder, 2)
    live = Live(served.store, name="m")
    live.hold({2})
    elsewhere = Store.open(served.store.folder)
    elsewhere.drop_version(2)
    live.hold({2})
    assert "tv" not in live.known(2)
    elsewhere.add_version(next_day.folder, 2)
    live.hold({2})
    assert "tv" in live.ensure("tv", 2).adapters
    assert live.of(2).encoder.schema.num_domains == 4
    elsewhere.set_live(2)
    live.refresh()
    assert live.known().keys() == {"app", "web", "mail", "tv"}


def test_a_damaged_version_does_not_become_live_here(served, next_day):
    """It was whole when it was made live, and is not when this process reads it."""
    live = Live(served.store, name="m")
    served.store.set_live(served.store.add_version(next_day.folder))
    place = served.store.version_folder(2) / TABLES
    content = place.read_bytes()
    place.unlink()
    place.write_bytes(content[:-1])
    with pytest.raises(BundleError, match=TABLES):
        live.refresh()
    assert live.current.version == "1"
    served.store.put_adapter("toys", served.payload("toys", 1, base=served.store.facts(2)["base"]))
    assert live.refresh()  # other changes still arrive
    assert served.logits(live, "web") is not None


def test_a_store_without_a_version_or_with_a_missing_one_is_refused(served, tmp_path):
    with pytest.raises(BundleError, match="no version yet"):
        Live(Store.create(tmp_path / "new"), name="m")
    shutil.rmtree(served.store.folder / "versions" / "1")
    with pytest.raises(BundleError, match="no such version"):
        Live(Store.open(served.store.folder), name="m")


def test_networks_that_read_the_domain_have_all_adapters(star, tmp_path, served):
    store = Store.create(tmp_path / "star")
    store.add_version(star.folder)
    live = Live(store, name="m", max_adapters=1)
    program = Program.open(star.folder)
    for number, domain in enumerate(program.domains):
        snapshot = live.ensure(domain)
        assert (snapshot.logits(*served.rows, np.full(8, number)) == program(*served.rows, np.full(8, number))).all()
    store.unload("web")
    live.refresh()
    with pytest.raises(UnknownDomainError):
        live.ensure("web")
    store.load("web")
    live.refresh()
    assert live.ensure("web").number_of("web") == 1


def test_models_without_adapters_answer_for_their_domains(plain, tmp_path, served):
    store = Store.create(tmp_path / "plain")
    store.add_version(plain.folder)
    live = Live(store, name="m")
    program = Program.open(plain.folder)
    snapshot = live.ensure("web")
    assert (snapshot.adapters, snapshot.number_of("web")) == ({}, 1)
    assert (snapshot.logits(*served.rows, np.full(8, 1)) == program(*served.rows, np.full(8, 1))).all()


def test_swaps_under_load_lose_nothing(served, next_day):
    """Two readers, adapters and versions swapped: every answer is that of one adapter of one version."""
    served.store.add_version(next_day.folder)
    live = Live(served.store, name="m")
    tv = Program.open(next_day.folder)
    expected = {("1", str(seed)): served.expected(seed) for seed in range(2)}
    expected["2", "2"] = tv(*served.rows, np.full(8, 1))
    stopped, seen, bad = threading.Event(), set(), []

    def read():
        while not stopped.is_set():
            snapshot = live.ensure("web")
            found = snapshot.logits(*served.rows, np.full(8, snapshot.number_of("web")))
            key = (snapshot.version, snapshot.adapters["web"])
            seen.add(key)
            if not same(found, expected[key]):
                bad.append(key)

    served.store.put_adapter("web", served.payload("web", 0))
    live.refresh()
    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 3
    while time.monotonic() < until:
        for seed in range(2):
            served.store.put_adapter("web", served.payload("web", seed))
            live.refresh()
        for version in (2, 1):
            served.store.set_live(version)
            live.refresh()
    stopped.set()
    for thread in threads:
        thread.join()
    assert bad == []
    assert seen == expected.keys()
