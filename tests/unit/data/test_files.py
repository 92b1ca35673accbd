from __future__ import annotations

import hashlib
import threading
import zipfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.progress import Progress

from domlora.data.files import Archive, cache_folder, find_raw
from domlora.errors import DataError

ARCHIVE = Archive("Toys", "toys", (("a.txt", "b.txt"), ("c.bin",)), url="", md5="", inner=("deep/inside",))


@pytest.fixture(autouse=True)
def no_machine(tmp_path, monkeypatch) -> None:
    """No cache and no data folder of this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DOMLORA_DATA", raising=False)


@pytest.fixture
def served(tmp_path):
    """A folder and the address under which this machine serves it."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def pack(path: Path, members: dict[str, str]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return hashlib.md5(path.read_bytes()).hexdigest()


def put(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize(
    ("where", "names"),
    [(".", ("a.txt", "b.txt")), ("toys", ("a.txt", "b.txt")), (".", ("c.bin",)), ("deep/inside", ("c.bin",))],
)
def test_raw_may_be_the_folder_or_its_parent(tmp_path, where, names) -> None:
    put(tmp_path / "raw" / where, *names)
    found = find_raw(ARCHIVE, tmp_path / "raw")
    assert [path.resolve() for path in found] == [tmp_path / "raw" / where / name for name in names]


def test_raw_without_the_files_is_refused_whatever_else_there_is(tmp_path) -> None:
    put(cache_folder() / "toys", "a.txt", "b.txt")
    raw = put(tmp_path / "raw", "a.txt")
    with pytest.raises(DataError, match=r"needs a\.txt and b\.txt or c\.bin, and there is no b\.txt. Received: .*raw'"):
        find_raw(ARCHIVE, raw)


def test_the_variable_comes_before_the_cache(tmp_path, monkeypatch) -> None:
    put(cache_folder() / "toys", "a.txt", "b.txt")
    assert find_raw(ARCHIVE)[0].is_relative_to(cache_folder())
    monkeypatch.setenv("DOMLORA_DATA", str(put(tmp_path / "data", "c.bin")))
    assert find_raw(ARCHIVE)[0].is_relative_to(tmp_path / "data")
    monkeypatch.setenv("DOMLORA_DATA", str(tmp_path / "empty"))
    assert find_raw(ARCHIVE)[0].is_relative_to(cache_folder())


def test_without_a_variable_the_cache_is_in_the_home(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "domlora"


def test_a_download_is_checked_unpacked_and_kept(served) -> None:
    folder, address = served
    members = {
        "toys/a.txt": "A",
        "toys/b.txt": "B",
        "toys/README": "terms",
        "toys/more": "x",
        "../evil": "!",
        "/evil": "!",
    }
    md5 = pack(folder / "toys.zip", members)
    archive = replace(ARCHIVE, url=f"{address}/toys.zip", md5=md5)
    with Progress(disable=True) as progress:
        found = find_raw(archive, progress=progress)
        assert progress.tasks[0].completed == progress.tasks[0].total == (folder / "toys.zip").stat().st_size
    assert [path.read_text() for path in found] == ["A", "B"]
    kept = cache_folder() / "toys"
    assert sorted(path.name for path in kept.iterdir()) == ["README", "a.txt", "b.txt"]
    assert [path.name for path in cache_folder().iterdir()] == ["toys"]
    assert not list(folder.parent.rglob("evil"))
    (folder / "toys.zip").unlink()
    assert find_raw(archive) == found  # no second download


def test_a_download_with_another_checksum_is_thrown_away(served) -> None:
    folder, address = served
    md5 = pack(folder / "toys.zip", {"toys/a.txt": "A", "toys/b.txt": "B", "toys/README": ""})
    with pytest.raises(DataError, match=f"must have the md5 {'0' * 32}. Received: '{md5}'"):
        find_raw(replace(ARCHIVE, url=f"{address}/toys.zip", md5="0" * 32))
    assert list(cache_folder().iterdir()) == []


@pytest.mark.parametrize("members", [{"toys/a.txt": "A"}, None])
def test_a_download_that_is_not_the_archive(served, members) -> None:
    folder, address = served
    (folder / "toys.zip").write_text("no archive")
    md5 = hashlib.md5(b"no archive").hexdigest() if members is None else pack(folder / "toys.zip", members)
    with pytest.raises(DataError, match=r"Put a\.txt and b\.txt or c\.bin into"):
        find_raw(replace(ARCHIVE, url=f"{address}/toys.zip", md5=md5))
    assert list(cache_folder().iterdir()) == []


def test_without_a_network_the_message_says_what_to_do(served) -> None:
    _, address = served
    for url in (f"{address}/absent.zip", "http://127.0.0.1:9/toys.zip"):
        with pytest.raises(DataError) as caught:
            find_raw(replace(ARCHIVE, url=url))
        for part in (
            "Toys",
            url,
            "Put a.txt and b.txt or c.bin into",
            str(cache_folder() / "toys"),
            "DOMLORA_DATA",
            "--raw",
        ):
            assert part in str(caught.value)


def test_the_faster_of_two_downloads_wins(served, monkeypatch) -> None:
    folder, address = served
    md5 = pack(folder / "toys.zip", {"toys/a.txt": "A", "toys/b.txt": "B", "toys/README": ""})

    def unpack_while_another_finishes(*args: object) -> None:
        put(cache_folder() / "toys", "a.txt", "b.txt")
        raise OSError("Directory not empty")

    monkeypatch.setattr("domlora.data.files._unpack", unpack_while_another_finishes)
    assert len(find_raw(replace(ARCHIVE, url=f"{address}/toys.zip", md5=md5))) == 2


UNFETCHED = Archive("Toys", "toys", (("a.txt", "in/b.txt"), ("c.bin", "d.bin")), publisher="the toy maker")


def test_a_set_that_is_not_fetched_says_who_has_it() -> None:
    with pytest.raises(DataError) as caught:
        find_raw(UNFETCHED)
    for part in ("Toys is not on this machine", "Put a.txt and in/b.txt or c.bin and d.bin", "(from the toy maker)"):
        assert part in str(caught.value)
    assert str(cache_folder() / "toys") in str(caught.value)


def test_a_layout_may_have_folders(tmp_path) -> None:
    put(tmp_path / "raw" / "toys", "a.txt")
    put(tmp_path / "raw" / "toys" / "in", "b.txt")
    assert [path.name for path in find_raw(UNFETCHED, tmp_path / "raw")] == ["a.txt", "b.txt"]


def test_half_a_layout_is_told_what_is_missing(tmp_path) -> None:
    raw = put(tmp_path / "raw", "a.txt")
    with pytest.raises(DataError, match=r"d\.bin, and there is no in/b\.txt. Received: .*\(from the toy maker\)"):
        find_raw(UNFETCHED, raw)
