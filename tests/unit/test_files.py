from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from domlora.errors import ConfigError, DataError
from domlora.files import new_folder, only_one, sha256_of


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


@pytest.mark.parametrize("error", [OSError, DataError, KeyboardInterrupt, MemoryError])
def test_an_error_between_the_two_renames_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    write(tmp_path / "out", "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise error("no")
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


# disks that refuse


def test_a_full_disk_is_one_line_and_the_old_folder_stays(small_disk: Path) -> None:
    write(small_disk / "out", "old")
    with pytest.raises(DataError, match=r"must have room.*No space left on device.*MB are free in.*is as it was"):
        write(small_disk / "out", "x" * 2_000_000)
    assert read(small_disk / "out") == "old"
    assert [path.name for path in small_disk.iterdir()] == ["out"]
    write(small_disk / "out", "new")
    assert read(small_disk / "out") == "new"


def test_a_disk_that_is_full_to_its_last_byte(small_disk: Path) -> None:
    write(small_disk / "out", "old")
    filling = ["dd", "if=/dev/zero", f"of={small_disk / 'filler'}"]
    assert b"No space left" in subprocess.run(filling, capture_output=True, check=False).stderr
    with pytest.raises(DataError, match="must have room"):
        write(small_disk / "out", "new")
    with pytest.raises(DataError, match="must have room"), only_one(small_disk / "out"):
        pass
    assert read(small_disk / "out") == "old"


LIMITED = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from domlora.errors import DataError
from domlora.files import new_folder
try:
    with new_folder(Path(sys.argv[1]), overwrite=True) as fresh:
        (fresh / "manifest.json").write_text("x" * 200_000)
except DataError as error:
    print(error)
"""


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    words = [sys.executable, "-c", LIMITED, str(tmp_path / "out")]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "must have room for the output (File too large)" in said
    assert said.count("\n") == 1
    assert read(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_may_only_be_read(small_disk: Path) -> None:
    write(small_disk / "out", "old")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(DataError, match=r"must be possible to write the output \(Read-only file system\)"):
        write(small_disk / "out", "new")
    with pytest.raises(DataError, match="Read-only"), only_one(small_disk / "out"):
        pass
    assert read(small_disk / "out") == "old"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DataError, match="Permission denied"):
        write(tmp_path / "locked" / "out", "new")


def test_a_file_where_the_parent_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"must be possible to write the output \((Not a directory|File exists)\)"):
        write(tmp_path / "file" / "out", "new")


def test_what_a_block_reads_is_not_about_the_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
        (tmp_path / "missing").read_text()


def test_a_library_that_quotes_the_system_is_understood_and_our_own_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must have room"), new_folder(tmp_path / "out"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(ConfigError, match="No space left on device"), new_folder(tmp_path / "out"):
        raise ConfigError("No space left on device")


# two processes at one output

HOLDING = """
import sys, time
from pathlib import Path
from domlora.files import only_one
with only_one(Path(sys.argv[1])):
    print("inside", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_at_once_until_the_first_ends(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "out"
    process = subprocess.Popen([sys.executable, "-c", HOLDING, str(out)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"inside\n"
    with pytest.raises(DataError, match=rf"process {process.pid} is writing this one.*{out}"), only_one(out):
        pass
    with only_one(tmp_path / "runs" / "other"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with only_one(out):  # the system let it go
        assert [path.name for path in out.parent.iterdir()] == [".out.lock"]
    assert not list(out.parent.iterdir())


def test_a_process_is_its_own_rival(tmp_path: Path) -> None:
    with only_one(tmp_path / "out"):
        with pytest.raises(DataError, match=rf"process {os.getpid()}"), only_one(tmp_path / "out"):
            pass
        with pytest.raises(DataError), only_one(tmp_path / "out"):  # refusing did not let it go
            pass


RACE = """
import sys
from pathlib import Path
from domlora.errors import DataError
from domlora.files import only_one
inside = Path(sys.argv[1]) / "inside"
done = 0
while done < 200:
    try:
        with only_one(Path(sys.argv[1]) / "out"):
            inside.mkdir()  # fails if another one is inside
            inside.rmdir()
            done += 1
    except DataError:
        pass
"""


def test_processes_that_race_are_never_inside_together(tmp_path: Path) -> None:
    racing = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in racing] == [0, 0, 0]
    assert not list(tmp_path.iterdir())
