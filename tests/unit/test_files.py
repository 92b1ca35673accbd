from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from domlora.errors import DataError
from domlora.files import new_folder, sha256_of


def write(folder: Path, text: str, *, overwrite: bool = True) -> None:
    with new_folder(folder, overwrite=overwrite) as fresh:
        (fresh / "sub").mkdir()
        (fresh / "sub" / "data.txt").write_text(text)
        (fresh / "manifest.json").write_text("{}")


def read(folder: Path) -> str:
    return (folder / "sub" / "data.txt").read_text()


def test_sha256(tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_folder_appears_whole_with_its_parents(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with new_folder(out) as fresh:
        (fresh / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_others_may_read_it(tmp_path: Path) -> None:
    """Not the 0700 of a temporary folder."""
    plain = tmp_path / "plain"
    plain.mkdir()
    write(tmp_path / "out", "x")
    assert (tmp_path / "out").stat().st_mode == plain.stat().st_mode


def test_overwrite_replaces_all_of_it(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "extra").write_text("x")
    write(tmp_path / "out", "new")
    assert read(tmp_path / "out") == "new"
    assert not (tmp_path / "out" / "extra").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_overwrite_nothing_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(DataError, match="must not exist"):
        write(tmp_path / "out", "new", overwrite=False)
    assert read(tmp_path / "out") == "old"


def test_a_folder_without_the_marker_is_never_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters").write_text("dear")
    with pytest.raises(DataError, match=r"only a folder with a manifest\.json is replaced"):
        write(home, "new")
    assert [path.name for path in home.iterdir()] == ["letters"]


def test_the_marker_is_the_callers(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with (
        pytest.raises(DataError, match=r"checkpoint\.json"),
        new_folder(tmp_path / "out", overwrite=True, marker="checkpoint.json"),
    ):
        pass
    assert read(tmp_path / "out") == "old"


def test_a_file_in_the_way_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(DataError):
        write(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_inside_leaves_the_old_folder_and_no_litter(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path / "out", "old")

    def fail() -> None:
        with new_folder(tmp_path / "out", overwrite=True) as fresh:
            (fresh / "manifest.json").write_text("{}")
            raise error

    with pytest.raises(error):
        fail()
    assert read(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, MemoryError])
def test_an_error_between_the_two_renames_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    write(tmp_path / "out", "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(error):
        write(tmp_path / "out", "new")
    monkeypatch.undo()
    assert read(tmp_path / "out") == "old"


KILLED = """
import sys, time
from pathlib import Path
from domlora.files import new_folder
with new_folder(Path(sys.argv[1]), overwrite=True) as fresh:
    (fresh / "manifest.json").write_text("{}")
    print("inside", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"inside\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert read(tmp_path / "out") == "old"
    write(tmp_path / "out", "new")  # and the litter is in nobody's way
    assert read(tmp_path / "out") == "new"


def test_two_writers_leave_one_whole_folder(tmp_path: Path) -> None:
    write(tmp_path / "out", "first")
    with new_folder(tmp_path / "out", overwrite=True) as slow:
        (slow / "sub").mkdir()
        (slow / "sub" / "data.txt").write_text("slow")
        (slow / "manifest.json").write_text("{}")
        write(tmp_path / "out", "quick")
        assert read(tmp_path / "out") == "quick"
    assert read(tmp_path / "out") == "slow"
