from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from domlora.config import load_plan
from domlora.data.prepare import prepare
from domlora.data.published.aliccp import packed_fields
from domlora.data.sources import open_source
from domlora.errors import DataError


def packed(*entries: tuple[str, object] | tuple[str, object, float]) -> str:
    return "\x01".join(f"{field}\x02{value}\x03{(*rest, 1.0)[0]}" for field, value, *rest in entries)


def write(folder: Path, part: str, samples: int = 2) -> None:
    folder.mkdir(exist_ok=True)
    item = packed(("205", 4240), ("206", 45), ("210", 97, 0.5), ("210", 96), ("301", 9351665), ("853", 7), ("508", 3))
    lines = [f"{number},{number % 2},0,{'common' if number else 'absent'},7,{item}" for number in range(samples)]
    (folder / f"sample_skeleton_{part}.csv").write_text("\n".join(lines))
    user = packed(("101", 8), ("109_14", 11, 2.3), ("109_14", 12, 0.7), ("124", 2), ("150_14", 5))
    (folder / f"common_features_{part}.csv").write_text(f"common,5,{user}\nother,1,{packed(('101', 9))}\n")


@pytest.mark.parametrize("folders", [("", ""), ("train", "test"), ("sample_train", "sample_test")])
def test_samples_are_joined_with_their_users(each_engine, tmp_path, folders) -> None:
    for part, folder in zip(("train", "test"), folders, strict=True):
        write(tmp_path / "ali-ccp" if not folder else tmp_path / folder, part)
    raw = open_source(each_engine, "ali-ccp", tmp_path)
    rows = {row["sample_id"]: row for row in raw.table.filter(raw.table["split"] == "test").to_pyarrow().to_pylist()}
    assert (rows["1"]["click"], rows["1"]["buy"], rows["0"]["click"]) == ("1", "0", "0")
    fields = {
        name: rows["1"][name] for name in ("101", "124", "205", "206", "207", "301", "508", "109_14", "210", "853")
    }
    assert fields == {
        "101": "8",
        "124": "2",
        "205": "4240",
        "206": "45",
        "207": None,
        "301": "9351665",
        "508": "3",
        "109_14": ["11", "12"],
        "210": ["97", "96"],
        "853": ["7"],
    }
    assert (rows["1"]["110_14"], rows["0"]["101"], rows["0"]["205"]) == ([], None, "4240")
    assert raw.key == ("split", "sample_id")
    assert sum(name.startswith("__") for name in raw.table.columns) == 0


def test_a_tenth_of_the_training_file_validates(each_engine, tmp_path) -> None:
    write(tmp_path, "train", samples=2000)
    write(tmp_path, "test")
    table = open_source(each_engine, "ali-ccp", tmp_path).table
    rows = table.select("split", "sample_id").to_pyarrow().to_pylist()
    held_out = {str(n) for n in range(2000) if int(hashlib.md5(str(n).encode()).hexdigest()[:15], 16) % 10 == 0}
    assert {row["sample_id"] for row in rows if row["split"] == "valid"} == held_out
    assert 150 < len(held_out) < 250
    assert sum(row["split"] == "test" for row in rows) == 2


@given(
    st.lists(
        st.none()
        | st.lists(st.tuples(st.sampled_from(["1", "2", "22", "3_14"]), st.text("0123456789", min_size=1)), max_size=6),
        min_size=1,
        max_size=20,
    )
)
def test_packed_features_are_spread(rows) -> None:
    texts = pa.array([None if row is None else packed(*row) for row in rows], pa.string())
    found = packed_fields(texts, ("1", "22"), ("2", "3_14"))
    for name in ("1", "22"):
        firsts = [next((value for field, value in row or () if field == name), None) for row in rows]
        assert found[name].to_pylist() == firsts
    for name in ("2", "3_14"):
        assert found[name].to_pylist() == [[value for field, value in row or () if field == name] for row in rows]


def test_entries_that_are_none_are_passed_over() -> None:
    texts = pa.array(["", "\x01", "junk\x01205\x024\x031", "205\x02", "205\x028"])
    assert packed_fields(texts, ("205",), ())["205"].to_pylist() == [None, None, "4", "", "8"]


def test_missing_files_are_named(engine, tmp_path) -> None:
    write(tmp_path, "train")
    with pytest.raises(
        DataError, match=r"no sample_skeleton_test\.csv, no common_features_test\.csv.*Tianchi, data set 408"
    ):
        open_source(engine, "ali-ccp", tmp_path)


def test_the_plan_prepares(tmp_path) -> None:
    write(tmp_path, "train", samples=100)
    write(tmp_path, "test", samples=30)
    manifest = prepare(load_plan("ali-ccp"), tmp_path / "out", folder=tmp_path)
    assert list(manifest["splits"]["test"]["domains"]) == ["9351665"]
    assert manifest["splits"]["test"]["rows"] == 30
    assert manifest["splits"]["train"]["rows"] + manifest["splits"]["valid"]["rows"] == 100
