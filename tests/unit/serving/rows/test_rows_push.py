from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from domlora.errors import BundleError, ConfigError, DataError
from domlora.serving.rows.folder import RowsFolder
from domlora.serving.rows.layout import RemoteTable
from domlora.serving.rows.push import drop, listed, push
from domlora.serving.rows.store import RowStore

Make = Callable[[np.ndarray], RowsFolder]


def numbers(num_rows: int, seed: int = 0, width: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_rows, width)).astype(np.float32)


def table_of(folder: RowsFolder) -> RemoteTable:
    place = folder.tables["t"]
    return RemoteTable("t", place.num_rows, {"t": place.width}, ["t.at0"], place.sha256)


def read(url: str, folder: RowsFolder) -> np.ndarray:
    """All rows of a table, as a server reads them."""
    table = table_of(folder)
    found = RowStore(url, timeout_s=5.0).fetch([(table, np.arange(table.num_rows))])[0]
    assert None not in found
    return np.frombuffer(b"".join(found), np.float32).reshape(-1, table.width)  # type: ignore[arg-type]


def test_pushed_rows_are_those_of_the_table_and_twice_is_no_change(server: Any, rows_folder: Make) -> None:
    content = numbers(10_000)
    folder = rows_folder(content)
    assert [each.sent for each in push(folder, server.url)] == [10_000]
    np.testing.assert_array_equal(read(server.url, folder), content)
    assert [each.sent for each in push(folder, server.url)] == [0]
    assert [told.complete for told in listed(server.url).values()] == [True]


def test_a_push_that_was_stopped_goes_on(server: Any, rows_folder: Make) -> None:
    content = numbers(20_000)
    folder = rows_folder(content)
    server.client.config_set("maxmemory", server.client.info("memory")["used_memory"] + 1_500_000)
    with pytest.raises(DataError, match="the store of rows must answer"):
        push(folder, server.url)
    begun = next(iter(listed(server.url).values()))
    assert 0 < begun.pushed < 20_000
    assert not begun.complete
    with pytest.raises(BundleError, match="are not all there"):
        RowStore(server.url).check([table_of(folder)])
    server.client.config_set("maxmemory", 0)
    assert push(folder, server.url)[0].sent == 20_000 - begun.pushed
    np.testing.assert_array_equal(read(server.url, folder), content)


def test_an_update_sends_what_changed_and_the_version_before_stays(server: Any, rows_folder: Make) -> None:
    before = numbers(5_000)
    after = np.insert(before, 3_000, numbers(7, 1), axis=0)  # new words in the middle of a table move all that follow
    after[[5, 4_000]] += 1.0
    last = after.copy()
    last[[5, 17]] -= 2.0
    old, new, newest = rows_folder(before), rows_folder(after), rows_folder(last)
    push(old, server.url)
    assert push(new, server.url, after=old)[0].sent == 9
    assert push(newest, server.url, after=new)[0].sent == 2
    for folder, content in ((old, before), (new, after), (newest, last)):
        np.testing.assert_array_equal(read(server.url, folder), content)
    assert server.client.dbsize() == 5_000 + 9 + 2 + 2 + 1  # rows, the numbers of changed ones, and the list of tables


def test_many_updates_end_in_a_whole_table(server: Any, rows_folder: Make) -> None:
    content = numbers(200)
    before = rows_folder(content)
    push(before, server.url)
    sent = []
    for day in range(9):
        content = content.copy()
        content[day] += 1.0
        folder = rows_folder(content)
        sent.append(push(folder, server.url, after=before)[0].sent)
        before = folder
    assert sent == [1] * 7 + [200, 1]
    np.testing.assert_array_equal(read(server.url, before), content)


def test_an_update_of_most_rows_or_of_an_unknown_table_is_whole(server: Any, rows_folder: Make) -> None:
    old, other = rows_folder(numbers(300)), rows_folder(numbers(300, 1))
    assert push(other, server.url, after=old)[0].after is None  # the old one is not there
    push(old, server.url)
    assert push(rows_folder(numbers(300, 2)), server.url, after=old)[0].sent == 300


def test_a_table_goes_when_no_other_needs_it(server: Any, rows_folder: Make) -> None:
    content = numbers(500)
    changed = content.copy()
    changed[3] += 1.0
    old, new = rows_folder(content), rows_folder(changed)
    push(old, server.url)
    push(new, server.url, after=old)
    before, after = old.tables["t"].sha256, new.tables["t"].sha256
    with pytest.raises(ConfigError, match="another table needs these rows"):
        drop(before[:12], server.url)
    assert drop(after[:12], server.url) == 1
    np.testing.assert_array_equal(read(server.url, old), content)
    assert drop(before[:12], server.url) == 500
    assert server.client.dbsize() == 0
    with pytest.raises(ConfigError, match="the digits must be those of one table"):
        drop("", server.url)


def test_damaged_rows_are_not_pushed(server: Any, rows_folder: Make, tmp_path: Any) -> None:
    folder = rows_folder(numbers(100))
    place = next(tmp_path.rglob("rows.bin"))
    content = bytearray(place.read_bytes())
    content[50] ^= 1
    place.write_bytes(content)
    with pytest.raises(BundleError, match="rows of a table are damaged"):
        push(RowsFolder(place.parent), server.url)
    assert server.client.dbsize() == 0
    del folder


def test_a_store_that_throws_rows_away_is_refused(server: Any, rows_folder: Make) -> None:
    server.client.config_set("maxmemory", 1 << 30)
    server.client.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(ConfigError, match="must not throw rows away"):
        push(rows_folder(numbers(10)), server.url)


def test_what_is_wrong_with_an_address_or_a_folder_is_said(tmp_path: Any, rows_folder: Make) -> None:
    pytest.importorskip("redis")
    with pytest.raises(ConfigError, match=r"address that Redis clients know.*Received: 'host:1'"):
        push(rows_folder(numbers(3)), "http://name:secret@host:1")
    with pytest.raises(DataError, match="the store of rows must answer"):
        push(rows_folder(numbers(3)), f"unix://{tmp_path}/none")
    with pytest.raises(BundleError, match="a folder of rows must be whole"):
        RowsFolder.of(tmp_path)
    with pytest.raises(ConfigError, match="must 'degrade'"):
        RowStore("redis://127.0.0.1:1", missing="ignore")
