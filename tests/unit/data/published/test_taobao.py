from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domlora.config import load_plan
from domlora.data.engine import open_engine
from domlora.data.prepare import prepare
from domlora.data.sources import open_source
from domlora.errors import ConfigError, DataError

CLICKS = [  # user, item, theme; in the order of the log
    (1, 10, 88),
    (2, 10, 7),
    (9, 10, 55),  # user 9 has no vector
    (2, 11, 88),
    (1, 19, 7),  # nor has item 19
    (2, 12, 40),
    (1, 10, 88),
]


def write(folder: Path, clicks=CLICKS, users=(1, 2, 3), items=(10, 11, 12)) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [f"{u},{t},{i},{i + 500},{i + 900},2019-01-0{n % 9 + 1} 10:00:00" for n, (u, i, t) in enumerate(clicks)]
    header = "user_id,theme_id,item_id,leaf_cate_id,cate_level1_id,reach_time"
    (folder / "theme_click_log.csv").write_text("\n".join([header, *lines, ""]))
    for name, ids in (("user", users), ("item", items)):
        numbers = " ".join(["0.25", "-1e-3"] * 64)
        rows = [f"{name}_id,{name}_emb", *(f"{each},{numbers}" for each in ids)]
        (folder / f"{name}_embedding.csv").write_text("\n".join(rows))
    return folder


def found(raw) -> list[tuple]:
    rows = raw.table.to_pyarrow().to_pylist()
    return sorted((int(row["user_id"]), int(row["item_id"]), int(row["theme_id"]), row["theme"]) for row in rows)


def expected(clicks, users, items, themes) -> list[tuple]:
    """The authors' steps on plain lists: number themes, drop clicks without vectors, keep the first themes."""
    number: dict[int, int] = {}
    for _, _, theme in clicks:
        number.setdefault(theme, len(number))
    kept = [click for click in clicks if click[0] in users and click[1] in items]
    first = sorted({number[theme] for _, _, theme in kept})[:themes]
    return sorted((u, i, t, number[t]) for u, i, t in kept if number[t] in first)


def test_clicks_without_vectors_are_left_out_and_themes_keep_their_numbers(each_engine, tmp_path) -> None:
    raw = open_source(each_engine, "taobao-theme", write(tmp_path / "raw"))
    assert found(raw) == [(1, 10, 88, 0), (1, 10, 88, 0), (2, 10, 7, 1), (2, 11, 88, 0), (2, 12, 40, 3)]
    assert raw.key == ("user_id", "item_id", "theme_id", "time")
    assert raw.folder == tmp_path / "raw"
    assert {"leaf_cate_id", "cate_level1_id", "time"} < set(raw.table.columns)
    assert raw.table.schema()["theme"].is_integer()


def test_the_first_themes_are_those_with_a_click_left(engine, tmp_path) -> None:
    raw = open_source(engine, "taobao-theme", write(tmp_path / "raw"), {"themes": 3})
    assert {row[3] for row in found(raw)} == {0, 1, 3}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_themes_are_the_authors(tmp_path, seed, themes) -> None:
    draw = random.Random(seed)
    clicks = [(draw.randint(1, 6), draw.randint(10, 15), draw.randint(1, 9)) for _ in range(draw.randint(5, 60))]
    users, items = set(draw.sample(range(1, 7), 4)) | {clicks[0][0]}, set(draw.sample(range(10, 16), 4))
    folder = write(tmp_path / "raw", clicks, users, items)
    with open_engine("duckdb", tmp_path) as engine:
        assert found(open_source(engine, "taobao-theme", folder, {"themes": themes})) == expected(
            clicks, users, items, themes
        )


def test_a_vector_listed_twice_does_not_double_its_clicks(each_engine, tmp_path) -> None:
    raw = open_source(each_engine, "taobao-theme", write(tmp_path / "raw", users=(1, 2, 2, 1)))
    assert len(found(raw)) == 5


@pytest.mark.parametrize("themes", [0, -1, "10", 2.5, True])
def test_the_number_of_themes_must_be_one(engine, tmp_path, themes) -> None:
    with pytest.raises(ConfigError, match="themes must be a whole number above 0"):
        open_source(engine, "taobao-theme", tmp_path, {"themes": themes})


def test_missing_files_are_named(engine, tmp_path) -> None:
    write(tmp_path / "raw")
    (tmp_path / "raw" / "item_embedding.csv").unlink()
    with pytest.raises(DataError, match=r"there is no item_embedding\.csv. Received: .*Tianchi, data set 9716"):
        open_source(engine, "taobao-theme", tmp_path / "raw")


@pytest.mark.parametrize("themes", [10, 20, 30])
def test_plans_prepare_with_the_published_vectors(tmp_path, monkeypatch, themes) -> None:
    draw = random.Random(9)
    clicks = [(draw.randint(1, 9), draw.randint(10, 60), n % 33 + 100) for n in range(1000)]
    write(tmp_path / "taobao-theme", clicks, range(1, 9), range(10, 60))
    monkeypatch.setenv("DOMLORA_DATA", str(tmp_path))
    manifest = prepare(load_plan(f"taobao-{themes}"), tmp_path / "out")
    assert list(manifest["splits"]["train"]["domains"]) == [str(number) for number in range(themes)]
    assert manifest["rows"]["sampled"] > 0
    assert manifest["rows"]["dropped"]  # the same click twice
    for feature in ("user_id", "item_id"):
        assert manifest["vectors"][feature] == {"width": 128, "trainable": False, "words_without": 0}
