"""Bad files, one a case: each is made for real, then read as a user's own log.

A case says which files there are and what must come of it: the words of the error, or the rows and the lines kept aside.
"""

from __future__ import annotations

import gzip
import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from domlora.data.engine import open_engine
from domlora.data.plan import Source
from domlora.data.readers import open_log
from domlora.errors import DataError, DomloraError

GOOD = b"click,item\n1,a\n0,b\n"
ROWS = [("1", "a"), ("0", "b")]
LINES = b'{"click": 1, "item": "a"}\n{"click": 0, "item": "b"}\n'


@dataclass(frozen=True)
class Case:
    """Files by name, and what reading them must give: words of an error, or rows (in any order) and rejected lines."""

    name: str
    files: dict[str, bytes | Callable[[Path], object]]
    error: tuple[str, ...] = ()
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    rejected: list[tuple[int, str]] = field(default_factory=list)
    columns: tuple[str, ...] = ("click", "item")
    source: dict[str, Any] = field(default_factory=dict)


def table(**columns: Any) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table(columns), path)


def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"click": [1, 0], "item": ["a", "b"]}), sink)
    return sink.getvalue()


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("log.csv", GOOD)
    return sink.getvalue()


def twice_named(path: Path) -> None:
    columns = [pa.array([1]), pa.array([2])]
    pq.write_table(pa.Table.from_arrays(columns, ["click", "click"]), path)


def locked(path: Path) -> None:
    path.write_bytes(GOOD)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")


LONG = "x" * 1_000_000

REFUSED = [
    Case("no such file", {"other.csv": GOOD}, ("files", "log.csv", "other.csv")),
    Case("no such folder", {}, ("no folder", "TOML file"), source={"files": ("logs/*.csv",)}),
    Case("a folder", {"log.csv": Path.mkdir}, ("log.csv is a folder", "/*")),
    Case("may not be read", {"log.csv": locked}, ("log.csv", "Permission denied")),
    Case("a dangling link", {"log.csv": lambda path: path.symlink_to("gone")}, ("log.csv", "No such file")),
    Case("empty", {"log.csv": b""}, ("log.csv is empty",)),
    Case("blank", {"log.csv": b"\n\n  \n"}, ("log.csv is empty but for blanks",)),
    Case("empty in gzip", {"log.csv.gz": gzip.compress(b"")}, ("log.csv.gz is empty",)),
    Case("header only", {"log.csv": b"click,item\n"}, ("must have rows", "only a header")),
    Case("no header", {"log.csv": b"1,a\n0,b\n"}, ("first line", "log.csv", "looks like data", "line of names")),
    Case("no header and no numbers", {"log.csv": b"yes,a\nno,b\n"}, ("no such column", "'click'", "'yes'")),
    Case("semicolons", {"log.csv": GOOD.replace(b",", b";")}, ("header", "';'", 'source.separator = ";"')),
    Case("tabs in a .csv", {"log.csv": GOOD.replace(b",", b"\t")}, ('source.separator = "\\t"',)),
    Case("commas in a .tsv", {"log.tsv": GOOD}, ('source.separator = ","',)),
    Case(
        "header with commas, rows with tabs", {"log.csv": b"click,item\n1\ta\n0\tb\n"}, ("line 2", "1 field", "'\\t'")
    ),
    Case("a column twice", {"log.csv": b"click,item,item\n1,a,b\n"}, ("different names", "'item', 'item'")),
    Case("a column twice but for case", {"log.csv": b"click,item,Item\n1,a,b\n"}, ("case", "'item', 'Item'")),
    Case("a column is not there", {"log.csv": b"clicks,item\n1,a\n"}, ("no such column", "'click'", "mean 'clicks'")),
    Case("every line too long", {"log.csv": b"click,item\n1,a,\n0,b,\n"}, ("line 2", "3 fields instead of 2")),
    Case("UTF-16", {"log.csv": GOOD.decode().encode("utf-16")}, ("UTF-16", "iconv")),
    Case("UTF-16 without a mark", {"log.csv": GOOD.decode().encode("utf-16-be")}, ("UTF-16", "UTF-8")),
    Case("header in Latin-1", {"log.csv": "click,münze\n1,a\n".encode("latin-1")}, ("header", "UTF-8")),
    Case("header with a stray quote", {"log.csv": b'click,"item\n1,a\n'}, ("header", "does not end")),
    Case("gzip cut short", {"log.csv.gz": gzip.compress(GOOD * 999)[:-20]}, ("log.csv.gz is cut short", "again")),
    Case("gzip damaged", {"log.csv.gz": gzip.compress(GOOD)[:-6] + b"\0" * 6}, ("log.csv.gz is damaged",)),
    Case("named .gz", {"log.csv.gz": GOOD}, ("named .gz, but is no gzip",)),
    Case("gzip, not named so", {"log.csv": gzip.compress(GOOD)}, ("is a gzip file, but is not named so",)),
    Case("zip", {"log.csv": zipped()}, ("zip", "Unpack")),
    Case("zip in gzip", {"log.csv.gz": gzip.compress(zipped())}, ("zip", "Unpack")),
    Case("Parquet named .csv", {"log.csv": parquet_bytes()}, ("is Parquet", ".parquet")),
    Case("a web page", {"log.csv": b"<!DOCTYPE html>\n<html>"}, ("web page",)),
    Case("name says nothing", {"log.dat": GOOD}, ("log.dat", "source.format")),
    Case("two formats", {"log.csv": GOOD, "log.jsonl": LINES}, ("one format", "log.csv", "log.jsonl")),
    Case("other columns in a second file", {"log.1.csv": GOOD, "log.2.csv": b"click,id\n1,a\n"}, ("log.2.csv", "'id'")),
    Case("CSV named .parquet", {"log.parquet": GOOD}, ("log.parquet must be a whole Parquet file",)),
    Case("Parquet cut short", {"log.parquet": parquet_bytes()[:-9]}, ("log.parquet", "whole Parquet file", "again")),
    Case("empty Parquet file", {"log.parquet": b""}, ("log.parquet is empty",)),
    Case("Parquet without rows", {"log.parquet": table(click=pa.array([], pa.int64()), item=[])}, ("must have rows",)),
    Case("Parquet with a column twice", {"log.parquet": twice_named}, ("different names", "click")),
    Case("Parquet lacks a column", {"log.parquet": table(click=[1], itm=["a"])}, ("'item'", "mean 'itm'")),
    Case(
        "Parquet of other types",
        {"log.1.parquet": table(click=[1], item=["a"]), "log.2.parquet": table(click=["1"], item=["a"])},
        ("'click' of", "log.2.parquet", "INT64", "BYTE_ARRAY (String)"),
    ),
    Case(
        "Parquet of other columns",
        {"log.1.parquet": table(click=[1], item=["a"]), "log.2.parquet": table(click=[1], item=["a"], x=[1])},
        ("log.2.parquet", "same columns", "'new': ['x']"),
    ),
    Case("Parquet with objects", {"log.parquet": table(click=[1], item=[{"id": 1}])}, ("'item'", "struct<id: int64>")),
    Case("Parquet with bytes", {"log.parquet": table(click=[1], item=[b"a"])}, ("'item'", "text instead of bytes")),
    Case("JSON array", {"log.json": b'[{"click": 1, "item": "a"}]'}, ("begins with an array", "jq -c '.[]'")),
    Case(
        "JSON over several lines", {"log.json": b'{\n"click": 1,\n"item": "a"\n}\n'}, ("line 1", "not JSON", "jq -c .")
    ),
    Case("JSON lines with commas", {"log.jsonl": b'{"click": 1, "item": "a"},\n' * 3}, ("line 1", "Extra data")),
    Case("JSON lines of values", {"log.jsonl": b"1\n2\n"}, ("line 1", "not a JSON object")),
    Case("JSON lines lack a column", {"log.jsonl": LINES.replace(b"item", b"itm")}, ("'item'", "mean 'itm'")),
    Case("JSON lines of objects", {"log.jsonl": b'{"click": 1, "item": {"id": 1}}\n'}, ("'item'", "'column.part'")),
    Case("JSON lines of lists of objects", {"log.jsonl": b'{"click": 1, "item": [{"id": 1}]}\n'}, ("'item'", "lists")),
    Case("CSV named .jsonl", {"log.jsonl": GOOD}, ("line 1", "not JSON")),
]

HANDLED = [
    Case("plain", {"log.csv": GOOD}, rows=ROWS),
    Case("mark at the start", {"log.csv": b"\xef\xbb\xbf" + GOOD}, rows=ROWS),
    Case("Windows line ends", {"log.csv": GOOD.replace(b"\n", b"\r\n")}, rows=ROWS),
    Case("old Mac line ends", {"log.csv": GOOD.replace(b"\n", b"\r")}, rows=ROWS),
    Case("no line end at the end", {"log.csv": GOOD[:-1]}, rows=ROWS),
    Case("blank lines", {"log.csv": b"\n" + GOOD.replace(b"\n", b"\n\n")}, rows=ROWS),
    Case("blanks in the header", {"log.csv": GOOD.replace(b"click,item", b" click, item ")}, rows=ROWS),
    Case("separator at the end of every line", {"log.csv": GOOD.replace(b"\n", b",\n")}, rows=ROWS),
    Case("the index of pandas", {"log.csv": b",click,item\n0,1,a\n1,0,b\n"}, rows=ROWS),
    Case("gzip", {"log.csv.gz": gzip.compress(GOOD)}, rows=ROWS),
    Case("gzip in two members", {"log.csv.gz": gzip.compress(GOOD[:15]) + gzip.compress(GOOD[15:])}, rows=ROWS),
    Case("tabs", {"log.tsv": GOOD.replace(b",", b"\t")}, rows=ROWS),
    Case("two colons", {"log.csv": GOOD.replace(b",", b"::")}, rows=ROWS, source={"separator": "::"}),
    Case(
        "other order in a second file", {"log.1.csv": GOOD, "log.2.csv": b"item,click\nc,1\n"}, rows=[*ROWS, ("1", "c")]
    ),
    Case("a file without rows among others", {"log.1.csv": b"click,item\n", "log.2.csv": GOOD}, rows=ROWS),
    Case("separator in quotes", {"log.csv": b'click,item\n"1","a,b"\n'}, rows=[("1", "a,b")]),
    Case(
        "line end in quotes", {"log.csv": b'click,item\n1,"a\nb"\n0,c,d\n'}, rows=[("1", "a\nb")], rejected=[(4, "3 f")]
    ),
    Case("quotes in quotes", {"log.csv": b'click,item\n1,"5"" disk"\n'}, rows=[("1", '5" disk')]),
    Case("quote inside a field", {"log.csv": b'click,item\n1,5" disk\n0,"b"\n'}, rows=[("1", '5" disk'), ("0", "b")]),
    Case("a million characters", {"log.csv": f"click,item\n1,{LONG}\n".encode()}, rows=[("1", LONG)]),
    Case(
        "a million quoted",
        {"log.csv": f'click,item\n1,"{LONG}"x\n0,"{LONG}"\n'.encode()},
        rows=[("0", LONG)],
        rejected=[(2, "after a closing quote")],
    ),
    Case(
        "too few fields", {"log.csv": b"click,item\n1,a\n0\n0,b\n"}, rows=ROWS, rejected=[(3, "1 field instead of 2")]
    ),
    Case("too many fields", {"log.csv": GOOD + b"1,a,c\n"}, rows=ROWS, rejected=[(4, "3 fields instead of 2")]),
    Case("cut in the middle of a line", {"log.csv": GOOD + b"1"}, rows=ROWS, rejected=[(4, "1 field")]),
    Case("quote not closed", {"log.csv": b'click,item\n1,"a\n1,a\n0,b\n'}, rows=ROWS, rejected=[(2, "does not end")]),
    Case(
        "text after a quote",
        {"log.csv": b'click,item\n1,"a"b\n1,a\n0,b\n'},
        rows=ROWS,
        rejected=[(2, "after a closing")],
    ),
    Case("NUL", {"log.csv": b"click,item\n1,a\n1,\0\n0,b\n"}, rows=ROWS, rejected=[(3, "NUL")]),
    Case("Latin-1", {"log.csv": b"click,item\n1,a\n1,\xe9t\xe9\n0,b\n"}, rows=ROWS, rejected=[(3, "not utf-8")]),
    Case(
        "Latin-1 after blank lines",
        {"log.csv": b"click,item\n\n1,a\n\n1,\xe9\n0,b\n"},
        rows=ROWS,
        rejected=[(5, "not")],
    ),
    Case("a header that begins like ORC", {"log.csv": b"orc,click,item\n,1,a\n,0,b\n"}, rows=ROWS),
    Case("a header that begins like Parquet", {"log.csv": b"PAR1,click,item\n,1,a\n,0,b\n"}, rows=ROWS),
    Case("a second header", {"log.csv": GOOD + GOOD}, rows=[*ROWS, ("click", "item"), *ROWS]),
    Case("no value", {"log.csv": b"click,item\n,\n"}, rows=[("", "")]),
    Case("Parquet", {"log.parquet": parquet_bytes()}, rows=[(1, "a"), (0, "b")]),
    Case(
        "Parquet in another order",
        {"log.1.parquet": parquet_bytes(), "log.2.parquet": table(item=["c"], click=[1])},
        rows=[(1, "a"), (0, "b"), (1, "c")],
    ),
    Case("JSON lines", {"log.jsonl": LINES}, rows=ROWS),
    Case("JSON lines named .json, in gzip", {"log.json.gz": gzip.compress(LINES)}, rows=ROWS),
    Case(
        "JSON lines with a mark and Windows ends",
        {"log.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n")},
        rows=ROWS,
    ),
    Case("JSON, a line that is none", {"log.jsonl": LINES + b"\n{\n"}, rows=ROWS, rejected=[(4, "not JSON")]),
    Case("JSON, a line of a list", {"log.jsonl": LINES + b"[1]\n"}, rows=ROWS, rejected=[(3, "not a JSON object")]),
    Case("JSON, Latin-1", {"log.jsonl": LINES + b'{"item": "\xe9"}\n'}, rows=ROWS, rejected=[(3, "not UTF-8")]),
    Case("JSON, half a pair", {"log.jsonl": LINES + b'{"item": "\\ud800"}\n'}, rows=ROWS, rejected=[(3, "surrogate")]),
    Case("JSON, nested without end", {"log.jsonl": LINES + b"[" * 200_000}, rows=ROWS, rejected=[(3, "nested")]),
    Case(
        "JSON, an integer without end",
        {"log.jsonl": LINES + b'{"item": ' + b"9" * 5000 + b"}"},
        rows=ROWS,
        rejected=[(3, "not JSON")],
    ),
    Case(
        "JSON, absent and null",
        {"log.jsonl": b'{"click": null, "item": NaN}\n{"item": 1}'},
        rows=[(None, None), (None, "1")],
    ),
    Case(
        "JSON, a key that comes late",
        {"log.jsonl": b'{"click": 1}\n' * 99_999 + LINES},
        rows=[("1", None)] * 99_999 + ROWS,
    ),
]


def made(case: Case, folder: Path) -> Source:
    for name, content in case.files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            content(folder / name)
    names = tuple(name for name in case.files if name != "other.csv") or ("log.csv",)
    return Source(**{"files": names, **case.source})


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused_with_one_clear_line(case: Case, tmp_path: Path) -> None:
    source = made(case, tmp_path)
    with open_engine("duckdb", tmp_path) as engine, pytest.raises(DomloraError) as caught:
        open_log(engine, source, tmp_path, case.columns)
    message = str(caught.value)
    assert "\n" not in message
    for word in case.error:
        assert word in message


@pytest.mark.parametrize("case", HANDLED, ids=lambda case: case.name)
def test_handled(case: Case, tmp_path: Path) -> None:
    source = made(case, tmp_path)
    with open_engine("duckdb", tmp_path) as engine:
        log = open_log(engine, source, tmp_path, case.columns)
        found = [tuple(row.values()) for row in log.table.to_pyarrow().to_pylist()]
        aside = [] if log.rejected is None else pq.read_table(log.rejected).to_pylist()
    assert sorted(found, key=str) == sorted(case.rows, key=str)
    assert log.rejected_rows == len(aside) == len(case.rejected)
    for row, (line, reason) in zip(aside, case.rejected, strict=True):
        assert row["file"] == str(tmp_path / source.files[0])
        assert row["line"] == line
        assert reason in row["reason"]
        assert len(row["text"]) <= 1000


def test_errors_are_of_the_kind_that_the_command_line_shows() -> None:
    assert issubclass(DataError, DomloraError)
