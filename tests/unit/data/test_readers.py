from __future__ import annotations

import csv
import gzip
import io
import json
import math
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.data.engine import open_engine
from domlora.data.plan import Source
from domlora.data.readers import (
    check_parquet,
    delimited_to_parquet,
    find_files,
    format_of,
    json_lines_to_parquet,
    open_log,
)
from domlora.data.reading import delimited, json_lines, text_files
from domlora.data.reading.delimited import delimited_tables
from domlora.data.reading.dialect import Dialect, end_of_rows
from domlora.data.reading.json_lines import json_tables
from domlora.data.reading.text_files import Rejects, line_blocks
from domlora.errors import ConfigError, DataError, SchemaError
from domlora.features.encode import canonical_text
from domlora.files import sha256_of


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def rows_of(paths: list[Path]) -> list[dict]:
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def rejected(found) -> list[tuple[int, str]]:
    if found.rejected is None:
        assert found.rejected_rows == 0
        return []
    rows = pq.read_table(found.rejected)
    assert rows.schema == pa.schema(
        {"file": pa.string(), "line": pa.int64(), "reason": pa.string(), "text": pa.string()}
    )
    assert found.rejected_rows == rows.num_rows
    return [(row["line"], row["text"]) for row in rows.to_pylist()]


# fields of a row, rows of a file


FIELDS = st.text(alphabet='ab,"\n\r;é 1', max_size=5)


@given(
    st.lists(st.lists(FIELDS, min_size=2, max_size=2), min_size=1, max_size=20), st.sampled_from([",", ";", "::", "¦"])
)
@settings(max_examples=200, deadline=None)
def test_what_a_csv_writer_quotes_comes_back(scratch, rows, separator) -> None:
    def field(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = ["x" + separator + "y", *(separator.join(map(field, row)) for row in rows)]
    (scratch / "log.csv").write_bytes("\n".join(lines).encode())
    found = delimited_to_parquet([scratch / "log.csv"], scratch, separator=separator)
    assert [list(row.values()) for row in rows_of(found.paths)] == rows
    assert found.rejected is None


class Kept(Rejects):
    """Rejects in memory."""

    def __init__(self) -> None:
        super().__init__(Path("unused"))

    @property
    def rows(self) -> list[tuple[str, int, str, str]]:
        return self._rows


LINES = st.text(alphabet='a,"\n\r\0é', max_size=40)
START = "x,y\n1,2\n" + "7,8\n" * 20


@given(LINES, st.integers(1, 9), st.sampled_from([",", "::"]))
@settings(max_examples=150, deadline=None)
def test_blocks_do_not_show(scratch, text, size, separator) -> None:
    """The same rows and the same rejected lines, however the file is cut into blocks."""
    path = scratch / "log.csv"
    path.write_bytes((START + text).replace(",", separator).encode())
    found = []
    for block_bytes in (1 << 20, size):
        rejects = Kept()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(delimited, "line_blocks", partial(line_blocks, block_bytes=block_bytes))
            tables = delimited_tables(path, Dialect(separator), ["x", "y"], ["y", "x"], rejects)
            rows = [row for table in tables for row in table.to_pylist()]
        found.append((rows, rejects.rows))
    assert found[0] == found[1]


@given(LINES)
@settings(max_examples=150, deadline=None)
def test_both_ways_through_a_block_agree(text) -> None:
    """Lines looked at one by one give what pyarrow gives where it is trusted with a whole block."""
    found = []
    for trusted in (True, False):
        rejects = Kept()
        parser = delimited._Parser(Path("log.csv"), Dialect(), ["x", "y"], ["x", "y"], rejects)
        with pytest.MonkeyPatch.context() as patch:
            if not trusted:
                patch.setattr(delimited, "end_of_rows", lambda *_: 0)
            table, used = parser.rows(text.encode(), 1, last=True)
        assert used == len(text.encode())
        found.append((table.to_pylist(), rejects.rows))
    assert found[0] == found[1]


@given(st.text(alphabet="ab,é \n", max_size=60))
@settings(max_examples=100, deadline=None)
def test_lines_without_quotes_are_split_as_the_standard_library_splits_them(text) -> None:
    rejects = Kept()
    parser = delimited._Parser(Path("log.csv"), Dialect(), ["x", "y"], ["x", "y"], rejects)
    table, _ = parser.rows(text.encode(), 1, last=True)
    rows = list(csv.reader(io.StringIO(text)))
    assert [list(row.values()) for row in table.to_pylist()] == [row for row in rows if len(row) == 2]
    assert [row[1] for row in rejects.rows] == [n for n, row in enumerate(rows, 1) if row and len(row) != 2]


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (b'1,2\n"3",4\n', 10),
        (b'1,2\n"3\n",4\n5,"', 11),
        (b'1,2\n"3"",4\n5', 4),
        (b'"a\nb\n', 0),
        (b'1,2"\n', 0),
        (b'1,"2"3\n', 0),
    ],
)
def test_where_rows_surely_end(text, end) -> None:
    assert end_of_rows(text, Dialect()) == end


def test_line_numbers_count_the_lines_of_the_file(tmp_path) -> None:
    text = 'x,y\n\n1,"a\nb"\r\n1\n2,c\n\n"3",\xff\n4,5,6\n'
    (tmp_path / "log.csv").write_bytes(text.encode("latin-1"))
    found = delimited_to_parquet([tmp_path / "log.csv"], tmp_path / "new")
    assert rows_of(found.paths) == [{"x": "1", "y": "a\nb"}, {"x": "2", "y": "c"}]
    assert rejected(found) == [(5, "1"), (8, '"3",\\xff'), (9, "4,5,6")]


def test_every_row_is_there_and_a_bad_one_in_many_is_found(tmp_path) -> None:
    """Larger than a block; the text is in quotes and holds line ends, so lines and rows differ."""
    rows = 400_000
    lines = [f'{number},"a row, and\nits second line"\n' for number in range(rows)]
    lines[rows // 2] = '7,"stray\n'
    (tmp_path / "log.csv").write_text("id,text\n" + "".join(lines))
    assert (tmp_path / "log.csv").stat().st_size > text_files.BLOCK_BYTES
    found = delimited_to_parquet([tmp_path / "log.csv"], tmp_path, columns=["id"])
    kept = pq.read_table(found.paths[0]).column("id").to_pylist()
    assert kept == [str(number) for number in range(rows) if number != rows // 2]
    assert rejected(found) == [(2 + rows, '7,"stray')]


def test_names_for_files_without_a_header(tmp_path) -> None:
    (tmp_path / "movies.dat").write_bytes(
        '1::Amélie::Comedy|Romance\n2::Brother\'s "Kiss"::Drama\n3::x\n'.encode("latin-1")
    )
    found = delimited_to_parquet(
        [tmp_path / "movies.dat"],
        tmp_path,
        names=("movie", "title", "genres"),
        separator="::",
        quote=None,
        encoding="latin-1",
        columns=("title",),
    )
    assert rows_of(found.paths) == [{"title": "Amélie"}, {"title": 'Brother\'s "Kiss"'}]
    assert rejected(found) == [(3, "3::x")]


def test_a_control_character_cannot_pass_for_a_long_separator(tmp_path) -> None:
    (tmp_path / "log.csv").write_bytes(b"x::y\n1\x1f2\n3::4\n")
    found = delimited_to_parquet([tmp_path / "log.csv"], tmp_path, separator="::")
    assert rows_of(found.paths) == [{"x": "3", "y": "4"}]
    assert found.rejected_rows == 1


def test_two_conversions_share_a_folder(tmp_path) -> None:
    (tmp_path / "log.csv").write_text("x,y\n1,2\n")
    first, second = (delimited_to_parquet([tmp_path / "log.csv"], tmp_path / "work") for _ in range(2))
    assert first.paths != second.paths
    assert rows_of(first.paths) == rows_of(second.paths)


@pytest.mark.parametrize(
    "options",
    [
        {"separator": ""},
        {"separator": '"'},
        {"separator": "\n"},
        {"quote": "''"},
        {"encoding": "utf-16"},
        {"encoding": "morse"},
    ],
)
def test_a_dialect_that_cannot_be(options) -> None:
    with pytest.raises(ConfigError, match="Received"):
        Dialect(**options)


def test_the_limit_of_the_standard_library_is_put_back(tmp_path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "log.csv").write_text('x,y\n1,"2"3\n4,5\n')
    delimited_to_parquet([tmp_path / "log.csv"], tmp_path)
    assert csv.field_size_limit() == before


def test_a_missing_column_names_the_nearest(tmp_path) -> None:
    (tmp_path / "log.csv").write_text("item_id,y\n1,2\n")
    with pytest.raises(DataError, match="mean 'item_id'"):
        delimited_to_parquet([tmp_path / "log.csv"], tmp_path, columns=["itemid"])


# JSON lines

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)


def seen(value: object) -> str | None:
    """A value as a reader must hand it on: text as it is, anything else in its canonical form."""
    if value is None or value != value:
        return None
    return value if isinstance(value, str) else canonical_text(value)


@given(st.lists(st.tuples(VALUES, st.lists(VALUES, max_size=3)), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_json_values_become_their_canonical_text(scratch, rows) -> None:
    (scratch / "log.jsonl").write_text("\n".join(json.dumps({"x": x, "many": many}) for x, many in rows))
    found = json_lines_to_parquet([scratch / "log.jsonl"], scratch)
    assert rows_of(found.paths) == [{"x": seen(x), "many": [seen(each) for each in many]} for x, many in rows]


NARROW = st.one_of(st.integers(-(2**60), 2**60), st.floats(), st.booleans(), st.text('a\n"é', max_size=3), st.none())


@given(st.lists(NARROW, min_size=1, max_size=6), st.lists(NARROW, min_size=1, max_size=3), st.booleans())
@settings(max_examples=300, deadline=None)
def test_both_ways_through_json_agree(scratch, first, later, in_list) -> None:
    """pyarrow reads what looks like the first lines, the standard library all else; nobody can tell which it was."""
    path = scratch / "log.jsonl"
    values = [[each] for each in first + later] if in_list else first + later
    path.write_text("\n".join(json.dumps({"x": each, "other": {"y": 1}}) for each in values))
    kinds = {"x": "list" if in_list else "text"}
    found = []
    for native in (True, False):
        rejects = Kept()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_lines, "_first_objects", lambda _: [{"x": each} for each in values[: len(first)]])
            if not native:
                patch.setattr(json_lines, "_natively", lambda *_: None)
            found.append([row for table in json_tables(path, kinds, rejects) for row in table.to_pylist()])
        assert not rejects.rows
    assert found[0] == found[1] == [{"x": list(map(seen, each)) if in_list else seen(each)} for each in values]


@pytest.mark.parametrize(
    "text", ['{"x": 1}{"x": 2}\n{"x":\n3}\n', '{"x": 1}\n{"x": 2} {"x": 3}\n', '{"x": 1}\n{"x": 2},\n']
)
def test_one_object_a_line_and_nothing_else(tmp_path, text) -> None:
    (tmp_path / "log.jsonl").write_text('{"x": 0}\n' + text)
    found = json_lines_to_parquet([tmp_path / "log.jsonl"], tmp_path)
    lines = [line for line in text.splitlines() if line != '{"x": 1}']
    assert [line for _, line in rejected(found)] == lines


def test_parts_of_objects_are_columns(tmp_path) -> None:
    rows = [{"user": {"id": 7, "at": {"city": "Ulm"}}, "user.age": 3}, {"user": {"id": None}}, {"x": [{}]}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    whole = json_lines_to_parquet([tmp_path / "log.jsonl"], tmp_path)
    empty = {"user.id": None, "user.at.city": None, "user.age": None}
    assert rows_of(whole.paths) == [{"user.id": "7", "user.at.city": "Ulm", "user.age": "3"}, empty, empty]
    some = json_lines_to_parquet([tmp_path / "log.jsonl"], tmp_path, columns=["user.at.city", "user.age"])
    assert rows_of(some.paths)[0] == {"user.at.city": "Ulm", "user.age": "3"}


def test_a_list_where_the_first_lines_have_values_is_kept_aside(tmp_path) -> None:
    lines = [*['{"x": 1}'] * 200_000, '{"x": [1]}', '{"x": 2}']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    found = json_lines_to_parquet([tmp_path / "log.jsonl"], tmp_path)
    assert len(rows_of(found.paths)) == 200_001
    assert rejected(found) == [(200_001, '{"x": [1]}')]


def test_a_value_where_lists_are_expected_is_a_list_of_one(tmp_path) -> None:
    (tmp_path / "log.jsonl").write_text('{"x": [1, null]}\n{"x": 2}\n{"x": null}\n{"x": []}\n')
    found = json_lines_to_parquet([tmp_path / "log.jsonl"], tmp_path)
    assert [row["x"] for row in rows_of(found.paths)] == [["1", None], ["2"], None, []]


def test_numbers_that_floats_cannot_hold_keep_their_digits(tmp_path) -> None:
    large = 2**53 + 1
    (tmp_path / "log.jsonl").write_text("\n".join(f'{{"x": {value}}}' for value in (0.5, 1, large, 10**25)))
    found = json_lines_to_parquet([tmp_path / "log.jsonl"], tmp_path)
    assert [row["x"] for row in rows_of(found.paths)] == ["0.5", "1", str(large), str(10**25)]


# files


def test_files_by_globs_sorted_and_once(tmp_path) -> None:
    for name in ("b.csv", "a.csv", "[odd].csv", "day=1/c.csv", "day=1/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x\n1\n")

    def names(*patterns: str) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in find_files(patterns, tmp_path)]

    assert names("*.csv") == ["[odd].csv", "a.csv", "b.csv"]
    assert names("b.csv", "a.csv", "*.csv", str(tmp_path / "a.csv")) == ["[odd].csv", "a.csv", "b.csv"]
    assert names("[odd].csv") == ["[odd].csv"]
    assert names("**/*.csv") == ["[odd].csv", "a.csv", "b.csv", "day=1/c.csv"]
    assert names("day=*/*") == ["day=1/c.csv", "day=1/d.txt"]
    assert names("*") == ["[odd].csv", "a.csv", "b.csv"]
    with pytest.raises(DataError, match="day=1 is a folder"):
        names("day=?")


def test_a_folder_whose_name_looks_like_a_glob(tmp_path) -> None:
    folder = tmp_path / "logs [1]"
    folder.mkdir()
    (folder / "a.csv").write_text("x\n1\n")
    assert find_files(["*.csv"], folder) == [folder / "a.csv"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.parquet", "parquet"),
        ("a.snappy.parquet", "parquet"),
        ("a.parquet.brotli", "parquet"),
        ("A.CSV", "csv"),
        ("a.b.tsv.gz", "csv"),
        ("a.txt", "csv"),
        ("a.jsonl.gz", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("a.json", "jsonl"),
    ],
)
def test_formats_by_name(name, kind) -> None:
    assert format_of(Path(name), None) == kind
    assert format_of(Path("log"), kind) == kind


@pytest.mark.parametrize("name", ["log", "log.gz", "log.xlsx", ".csv.bak"])
def test_names_that_do_not_say(name) -> None:
    with pytest.raises(ConfigError, match=r"source\.format"):
        format_of(Path(name), None)


def test_parquet_of_many_writers_is_one_table(tmp_path) -> None:
    """Dictionaries, large texts and names of list elements differ between writers, and do not matter."""
    texts = pa.array(["a", "b"])
    lists = pa.array([[1], [2, 3]], pa.list_(pa.field("element", pa.int64())))
    pq.write_table(pa.table({"item": texts, "a.b": [1, 2], "many": lists}), tmp_path / "1.parquet")
    others = {"many": lists.cast(pa.large_list(pa.int64())), "item": texts.dictionary_encode(), "a.b": [3, 4]}
    pq.write_table(pa.table(others), tmp_path / "2.parquet")
    paths = sorted(tmp_path.glob("*.parquet"))
    check_parquet(paths, ["item", "a.b", "many"])
    with pytest.raises(SchemaError, match="mean 'many'"):
        check_parquet(paths, ["man"])


def test_parquet_checks_nested_columns_only_where_they_are_used(tmp_path) -> None:
    pq.write_table(pa.table({"x": [1], "y": [{"z": 1}], "w": [[[1]]]}), tmp_path / "a.parquet")
    check_parquet([tmp_path / "a.parquet"], ["x"])
    for name in "yw":
        with pytest.raises(DataError, match="values or lists of values"):
            check_parquet([tmp_path / "a.parquet"], [name])


# the log as a table


@pytest.mark.parametrize("kind", ["parquet", "csv", "csv.gz", "tsv", "jsonl", "jsonl.gz"])
def test_a_log_is_the_same_in_every_format(tmp_path, kind) -> None:
    rows = [{"click": i % 2, "item": f"i{i}", "price": i + 0.25, "unused": "x"} for i in range(100)]
    separator = "\t" if "tsv" in kind else ","
    for part in range(2):
        path, some = tmp_path / f"part-{part}.{kind}", rows[part::2]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(some), path)
            continue
        lines = [json.dumps(row) for row in some]
        if "json" not in kind:
            lines = [separator.join(some[0]), *(separator.join(map(str, row.values())) for row in some)]
        text = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    with open_engine("duckdb", tmp_path) as engine:
        log = open_log(engine, Source(files=("part-*",), key=("item",)), tmp_path, ["click", "price"])
        assert log.table.columns == ("click", "price", "item")
        found = {tuple(map(canonical_text, row.values())) for row in log.table.to_pyarrow().to_pylist()}
    assert found == {tuple(map(canonical_text, (row["click"], row["price"], row["item"]))) for row in rows}
    assert log.key == ("item",)
    assert log.inputs == {f"part-{part}.{kind}": sha256_of(tmp_path / f"part-{part}.{kind}") for part in range(2)}


def test_a_bar_is_shown_for_each_text_file(tmp_path) -> None:
    from rich.progress import Progress

    (tmp_path / "log.csv").write_text("x,y\n1,2\n")
    done: list[float] = []

    class Bar(Progress):
        def update(self, task_id, **options) -> None:
            super().update(task_id, **options)
            done.append(self.tasks[0].percentage)

    bar = Bar(disable=True)
    delimited_to_parquet([tmp_path / "log.csv"], tmp_path, progress=bar)
    assert math.isclose(done[-1], 100)
    assert not bar.tasks
