"""A program whose tables lie in a store answers as the one that has them; what happens when a row cannot be had."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from domlora.errors import BundleError, ConfigError
from domlora.features.schema import OOV_ID
from domlora.serving.folder import read_facts
from domlora.serving.graph import traced
from domlora.serving.live import Live
from domlora.serving.program import Program
from domlora.serving.rows.cut import cut
from domlora.serving.rows.folder import RowsFolder
from domlora.serving.rows.keys import keys_of
from domlora.serving.rows.layout import RemoteTable, RowsMissingError
from domlora.serving.rows.push import push
from domlora.serving.rows.store import RowStore
from domlora.serving.store import Store

TIMEOUT_S = 5.0  # a machine that is busy must not fail a test


@pytest.fixture
def url(server: Any, versions: Any) -> str:
    """Of a store that has the first version."""
    push(RowsFolder.of(versions.old.folder), server.url)
    return str(server.url)


def missing_key(versions: Any, number: int) -> bytes:
    """Of a row of the first table."""
    return keys_of(read_facts(versions.old.folder)["remote"][0]["sha256"], [number])[0]


def test_an_export_holds_no_row_of_a_table_that_is_left_out(versions: Any, adapted: Any) -> None:
    facts, whole = read_facts(versions.old.folder), read_facts(adapted.folder)
    assert [(told["name"], told["num_rows"], told["columns"]) for told in facts["remote"]] == [
        ("embedding.weight", 606, {"embedding.weight": 4})
    ]
    assert whole["remote"] == []
    assert facts["base"] == whole["base"]
    assert (adapted.folder / "tables.bin").stat().st_size - (versions.old.folder / "tables.bin").stat().st_size > 9_000
    graph = onnx.load(versions.old.folder / "mixed.onnx", load_external_data=False).graph
    assert "embedding.weight" not in {each.name for each in graph.initializer}


@pytest.mark.parametrize("plan", [None, "mixed", "by_domain"])
@pytest.mark.parametrize("cache_bytes", [0, 20_000, 1 << 20])
def test_answers_are_those_of_the_tables_in_the_graph(
    url: str, versions: Any, arrays: Any, plan: Any, cache_bytes: int
) -> None:
    program = Program.open(versions.old.folder, rows=RowStore(url, timeout_s=TIMEOUT_S, cache_bytes=cache_bytes))
    for _ in range(2):  # cold, and with what the cache has
        found = program(*arrays, plan=plan)
        np.testing.assert_allclose(found, versions.old.whole(*arrays, plan=plan), rtol=0, atol=1e-6)
    one = program(arrays[0][:3], arrays[1][:3], 1)
    np.testing.assert_allclose(one, versions.old.whole(arrays[0][:3], arrays[1][:3], 1), rtol=0, atol=1e-6)


def test_a_row_is_asked_for_once(url: str, versions: Any, arrays: Any) -> None:
    rows = RowStore(url, timeout_s=TIMEOUT_S)
    program = Program.open(versions.old.folder, rows=rows)
    program(*arrays, plan="mixed")
    distinct = len({(slot == 4, each) for row in arrays[0].tolist() for slot, each in enumerate(row)})
    first = rows.take_counts()
    assert first[:5] == (0, distinct, 0, 0, 0)
    assert len(first.seconds) == 1
    program(*arrays, plan="mixed")
    assert rows.take_counts() == (distinct, 0, 0, 0, 0, [])
    again = RowStore(url, timeout_s=TIMEOUT_S)
    Program.open(versions.old.folder, rows=again)(*arrays, plan="by_domain")  # four domains, one question
    assert len(again.take_counts().seconds) == 1


def test_a_missing_row_is_scored_as_out_of_vocabulary_and_counted(
    server: Any, url: str, versions: Any, arrays: Any
) -> None:
    ids, dense, domain = arrays
    item, city = int(ids[0, 0]), int(ids[1, 4])
    server.client.delete(missing_key(versions, item))
    server.client.set(missing_key(versions, 600 + city), b"short")
    rows = RowStore(url, timeout_s=TIMEOUT_S)
    instead = ids.copy()
    instead[:, :4][ids[:, :4] == item] = OOV_ID
    instead[:, 4][ids[:, 4] == city] = OOV_ID
    found = Program.open(versions.old.folder, rows=rows)(ids, dense, domain, plan="mixed")
    np.testing.assert_allclose(found, versions.old.whole(instead, dense, domain, plan="mixed"), rtol=0, atol=1e-6)
    hurt = int((instead != ids).any(axis=1).sum())
    assert 0 < hurt < 200
    assert rows.take_degraded() == hurt
    assert rows.take_degraded() == 0
    assert rows.take_counts()[2:4] == (2, hurt)


def test_a_missing_row_is_an_error_where_that_is_the_policy(server: Any, url: str, versions: Any, arrays: Any) -> None:
    server.client.delete(missing_key(versions, int(arrays[0][0, 0])))
    program = Program.open(versions.old.folder, rows=RowStore(url, timeout_s=TIMEOUT_S, missing="error"))
    with pytest.raises(RowsMissingError, match=r"rows of table 'embedding.weight' cannot be had now"):
        program(*arrays)


def test_a_store_that_is_away_costs_one_wait_and_comes_back(server: Any, url: str, versions: Any, arrays: Any) -> None:
    ids, dense, domain = arrays
    rows = RowStore(url, timeout_s=TIMEOUT_S)
    program = Program.open(versions.old.folder, rows=rows)
    half = program(ids[:100], dense[:100], domain[:100], plan="mixed")
    rows.take_counts()
    server.stop()
    try:
        np.testing.assert_array_equal(program(ids[:100], dense[:100], domain[:100], plan="mixed"), half)  # from memory
        assert rows.take_degraded() == 0
        start = time.perf_counter()
        for _ in range(20):
            assert np.isfinite(program(*arrays, plan="mixed")).all()
        assert time.perf_counter() - start < TIMEOUT_S
        assert rows.take_counts().failures < 20
        assert rows.take_degraded() > 0
        strange = np.full_like(ids[:5], OOV_ID)
        program(strange, dense[:5], domain[:5])
        assert rows.take_degraded() == 0  # these rows are in the export
        cold = Program.open(versions.old.folder, rows=RowStore(url, timeout_s=TIMEOUT_S))  # no reason not to start
        assert np.isfinite(cold(*arrays)).all()
    finally:
        server.start()
    push(RowsFolder.of(versions.old.folder), server.url)
    wanted = versions.old.whole(*arrays, plan="mixed")
    for each in (program, cold):
        for _ in range(100):
            if np.allclose(each(*arrays, plan="mixed"), wanted, rtol=0, atol=1e-6):
                break
            time.sleep(0.05)
        else:
            raise AssertionError("the store is back, and its rows are not")


def test_versions_are_swapped_whole_under_load(
    server: Any, url: str, versions: Any, arrays: Any, tmp_path: Any
) -> None:
    store = Store.create(tmp_path / "store")
    store.add_version(versions.old.folder, 1)
    rows = RowStore(url, timeout_s=TIMEOUT_S, cache_bytes=30_000)
    live = Live(store, name="m", rows=rows)
    ids, dense, _ = arrays
    expected = [each.whole(ids, dense, 0) for each in (versions.old, versions.new)]
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    answers: list[list[float]] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            found = live.ensure("app").logits(ids, dense, 0)
            answers.append([float(np.abs(found - each).max()) for each in expected])

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        store.add_version(versions.new.folder, 2)
        store.set_live(2)
        with pytest.raises(BundleError, match="are not all there"):
            live.refresh()  # nobody has pushed its rows
        assert live.current.version == "1"
        sent = push(RowsFolder.of(versions.new.folder), url, after=RowsFolder.of(versions.old.folder))
        assert [(each.sent, each.num_rows) for each in sent] == [(3, 611)]  # new words begin as copies of a row
        live._retry_at = 0.0
        live.refresh()
        assert live.current.version == "2"
        for number in (1, 2, 1, 2):
            store.set_live(number)
            live.refresh()
            time.sleep(0.02)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    best = [min(each) for each in answers]
    assert max(best) <= 1e-6  # each answer is one version's, whole
    assert {each.index(min(each)) for each in answers} == {0, 1}
    assert rows.take_counts().degraded == 0


def test_an_export_without_its_tables_does_not_answer_alone(versions: Any, arrays: Any) -> None:
    with pytest.raises(BundleError, match=r"nobody said where.*--rows"):
        Program.open(versions.old.folder)(*arrays)
    with pytest.raises(BundleError, match="must be that of the export"):
        Program.open(versions.old.folder, rows=RowsFolder.of(versions.new.folder))


def test_weights_that_are_read_together_are_one_table(bundle_of: Callable[..., Any], tmp_path: Any) -> None:
    bundle = bundle_of("deepfm")
    graph = traced(bundle.model.eval(), bundle.encoder.schema)
    with pytest.raises(ConfigError, match="no table of the model is called so"):
        cut(graph, tmp_path, ["tower.*"])
    made = cut(graph, tmp_path, from_bytes=2_000)
    assert [each.table.columns for each in made] == [{"embedding.weight": 4, "linear.table.weight": 1}]
    both = [bundle.model.embedding.weight, bundle.model.linear.table.weight]
    np.testing.assert_array_equal(made[0].rows(slice(3, 9)), np.hstack([each.detach().numpy()[3:9] for each in both]))
    assert cut(graph, tmp_path, from_bytes=1 << 30) == []


def test_where_rows_lie_is_forgotten_when_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("redis")
    clock = [0.0]
    monkeypatch.setattr("domlora.serving.rows.store.time.monotonic", lambda: clock[0])
    rows = RowStore("unix:///no/such/socket", timeout_s=TIMEOUT_S)
    read: list[str] = []
    monkeypatch.setattr(rows, "_levels", lambda table: read.append(table.sha256) or [])
    tables = {day: RemoteTable("item", 4, {"item": 2}, ["at"], day) for day in ("mon", "tue", "wed")}
    for clock[0], day in ((0.0, "mon"), (1000.0, "tue"), (3000.0, "mon"), (5000.0, "wed")):
        rows.check([tables[day]])
    assert read == ["mon", "tue", "wed"]
    rows.check([tables["mon"], tables["wed"]])
    assert read == ["mon", "tue", "wed"], "it was asked for since"
    rows.check([tables["tue"]])
    assert read == ["mon", "tue", "wed", "tue"], "it was not, and is read again"
    assert rows._chains.keys() == {"mon", "wed", "tue"}
