"""Events reach the disk whole, once and in order, whatever happens to disk, process and reader."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from domlora.abtest import segments as module
from domlora.abtest.assignment import Assignment
from domlora.abtest.experiments import Arm
from domlora.abtest.log import EventLog, Exposure, Feedback
from domlora.abtest.observed import Observer
from domlora.abtest.segments import EXPOSURES, FEEDBACK, SegmentFiles, compact, reading, retain, segments, whole_ones
from domlora.errors import ConfigError, DataError

WIDE = Assignment("wide", Arm("b"))
DEEP = Assignment("deep", Arm("c"))


def some(number: int, size: int = 4) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.linspace(0.1, 0.9, size, dtype=np.float32) + np.float32(number / 1e6)


def expose(log: EventLog, number: int, *assignments: Assignment, size: int = 4, **more: Any) -> None:
    log.exposed(
        f"r{number}", float(number), f"u{number % 7}", "toys", assignments, "3", "5", some(number, size), **more
    )


def all_of(folder: Path, kind: Any = "exposures") -> list[dict[str, Any]]:
    with reading(folder) as found:
        return [row for path in found[kind] for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def quiet(tmp_path: Path) -> EventLog:
    """Writes when it is told to, and not before."""
    return EventLog(tmp_path / "log", flush_s=3600.0)


def test_columns_are_the_schema(quiet: EventLog) -> None:
    expose(quiet, 1, WIDE, items=["a", "b", None, 7])
    quiet.happened(Feedback("r1", 2, "click", 1.0, 9.0, "u1"), Feedback("o1", None, "conversion", 30.0, 9.5, "u1"))
    quiet.close()
    with reading(quiet.folder or Path()) as found:
        assert pq.read_schema(found["exposures"][0]).equals(EXPOSURES)
        assert pq.read_schema(found["feedback"][0]).equals(FEEDBACK)
    rows = all_of(quiet.folder or Path())
    assert rows[1] == {
        "time_s": 1.0, "request_id": "r1", "row": 1, "unit": "u1", "domain": "toys", "experiment": "wide", "arm": "b",
        "bundle": "3", "adapter": "5", "item": "b", "probability": pytest.approx(some(1)[1]),
    }  # fmt: skip
    assert [row["item"] for row in rows] == ["a", "b", None, "7"]
    assert all_of(quiet.folder or Path(), "feedback")[1] == {
        "time_s": 9.5, "request_id": "o1", "row": None, "unit": "u1", "event": "conversion", "value": 30.0
    }  # fmt: skip


def test_each_experiment_has_rows_of_its_own_and_none_has_one_block(quiet: EventLog) -> None:
    expose(quiet, 1, WIDE, DEEP, size=3)
    expose(quiet, 2, size=2, rows=np.array([5, 9], np.int32))
    expose(quiet, 3, DEEP, size=1)
    quiet.close()
    rows = all_of(quiet.folder or Path())
    assert [(row["request_id"], row["experiment"], row["arm"], row["row"]) for row in rows] == [
        *(("r1", "wide", "b", row) for row in range(3)),
        *(("r1", "deep", "c", row) for row in range(3)),
        ("r2", "", "", 5), ("r2", "", "", 9),
        ("r3", "deep", "c", 0),
    ]  # fmt: skip
    assert [row["probability"] for row in rows[:3]] == [row["probability"] for row in rows[3:6]]


def test_items_and_places_are_one_a_row(quiet: EventLog) -> None:
    with pytest.raises(DataError, match="one item and one place"):
        expose(quiet, 1, items=["a"])
    with pytest.raises(DataError, match="one item and one place"):
        expose(quiet, 1, rows=np.array([1], np.int32))
    assert quiet.pending == 0
    quiet.close()


def test_events_are_written_each_interval_or_when_there_are_many(tmp_path: Path) -> None:
    log = EventLog(tmp_path, flush_s=0.05)
    expose(log, 1)
    wait_until(lambda: log.pending == 0)
    assert len(all_of(tmp_path)) == 4
    log.close()
    log = EventLog(tmp_path, flush_s=3600.0, max_rows=40)
    for number in range(10):
        expose(log, number)
    wait_until(lambda: log.pending == 0)
    log.close()


def test_the_same_event_counts_once(quiet: EventLog) -> None:
    click = Feedback("r1", 0, "click", 1.0, 5.0)
    assert quiet.happened(click, click, click._replace(row=1), click._replace(event="shown")) == 3
    assert quiet.happened(click._replace(time_s=8.0)) == 0
    quiet.close()
    assert len(all_of(quiet.folder or Path(), "feedback")) == 3


def test_what_no_column_holds_costs_nobody_else(quiet: EventLog, caplog: pytest.LogCaptureFixture) -> None:
    expose(quiet, 1)
    quiet.exposed("half \ud800", 0.0, "u", "toys", (), "3", "5", some(2))
    expose(quiet, 3)
    quiet.happened(Feedback("r", 2**40, "click", 1.0, 0.0))
    assert quiet.flush()
    assert {row["request_id"] for row in all_of(quiet.folder or Path())} == {"r1", "r3"}
    assert (quiet.dropped, quiet.pending) == (5, 0)
    quiet.flush()
    assert "events dropped" in caplog.messages
    quiet.close()


def test_a_full_disk_delays_and_does_not_lose(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(os.urandom(1 << 19))
    log = EventLog(small_disk / "log", flush_s=3600.0)
    expose(log, 0)
    assert log.flush()
    with pytest.raises(OSError, match="No space"):
        ballast.write_bytes(bytes(2 << 20))
    expose(log, 1, size=2000)
    assert not log.flush()
    assert log.failure
    assert log.pending == 2000
    assert sum("not written" in message for message in caplog.messages) == 1
    assert not list((small_disk / "log").rglob("*.tmp"))
    expose(log, 2)  # whoever answers goes on
    ballast.unlink()
    assert log.flush()
    assert [row["request_id"] for row in all_of(small_disk / "log")] == ["r0"] * 4 + ["r1"] * 2000 + ["r2"] * 4
    log.close()


class Queue:
    """A sink that can refuse."""

    def __init__(self) -> None:
        self.tables: list[tuple[str, pa.Table]] = []
        self.open = self.closed = False

    def write(self, kind: str, table: pa.Table) -> None:
        if not self.open:
            raise ConnectionError("nobody there")
        self.tables.append((kind, table))

    def close(self) -> None:
        self.closed = True


def test_a_queue_in_place_of_files_and_a_bound_on_what_waits(caplog: pytest.LogCaptureFixture) -> None:
    sink, told = Queue(), []
    log = EventLog(sink=sink, flush_s=3600.0, max_pending_rows=10, tell=lambda *counts: told.append(counts))
    for number in range(4):
        expose(log, number)
    assert (log.pending, log.dropped) == (8, 8)
    assert log.happened(*(Feedback("r", row, "click", 1.0, 0.0) for row in range(3))) is None
    assert log.happened(Feedback("r", 1, "click", 1.0, 0.0)) == 1
    assert not log.flush()
    assert "events dropped" in caplog.messages
    assert told == [(9, 11)], "eight rows and three of the feedback were dropped"
    sink.open = True
    assert log.flush()
    assert told[-1] == (0, 11)
    assert [(kind, len(table)) for kind, table in sink.tables] == [("exposures", 8), ("feedback", 1)]
    assert log.happened(Feedback("r", 0, "click", 1.0, 0.0)) == 1, "what was refused was not remembered"
    log.close()
    assert sink.closed


def test_it_needs_a_place() -> None:
    with pytest.raises(ConfigError, match="folder or a sink"):
        EventLog()


def test_what_cannot_be_written_at_the_end_is_said(caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(sink=Queue(), flush_s=3600.0)
    expose(log, 1)
    log.close()
    lost = [record for record in caplog.records if record.message == "events lost"]
    assert lost
    assert lost[0].levelno == logging.ERROR
    assert lost[0].fields["rows"] == 4  # type: ignore[attr-defined]


def test_many_threads_lose_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path, flush_s=0.01)
    work = [threading.Thread(target=lambda n=n: [expose(log, n * 500 + i) for i in range(500)]) for n in range(4)]  # type: ignore[misc]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    log.close()
    assert sorted({row["request_id"] for row in all_of(tmp_path)}) == sorted(f"r{i}" for i in range(2000))
    assert len(all_of(tmp_path)) == 8000


def broken(place: Path, how: str) -> str:
    """A segment as a power cut leaves it; its name."""
    path = sorted(place.glob("*.parquet"))[7]
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "short": content[: len(content) // 2], "zeros": bytes(len(content))}[how])
    return path.name


@pytest.mark.parametrize("how", ["empty", "short", "zeros"])
def test_a_damaged_segment_is_set_aside_and_the_others_are_merged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    before = len(fill(tmp_path, 61))
    name = broken(tmp_path / "exposures", how)
    with reading(tmp_path) as found, caplog.at_level(logging.WARNING):
        assert len(whole_ones(found["exposures"])) == 60
    assert [record.getMessage() for record in caplog.records] == [f"1 damaged segments of the log are left out: {name}"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert [compact(tmp_path, settle_s=0.0) for _ in range(3)] == [0, 1, 0]
    assert [record.getMessage() for record in caplog.records] == ["segment damaged"]
    assert len(all_of(tmp_path)) == before - 4
    assert (tmp_path / "exposures" / f"{name}.damaged").exists()
    assert retain(tmp_path, days=0.0) == 2
    assert not list((tmp_path / "exposures").glob("*.*"))


def test_old_segments_go_also_where_merging_fails(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    log = EventLog(tmp_path, flush_s=0.01, tidy_s=0.0, keep_days=0.0)
    with mock.patch("domlora.abtest.log.compact", side_effect=OSError("full")):
        wait_until(lambda: not segments(tmp_path, "exposures"))
    log.close()


WRITER = """
import sys, time, numpy as np
from pathlib import Path
from domlora.abtest.log import EventLog
log = EventLog(Path(sys.argv[1]), flush_s=0.001)
print("ready", flush=True)
i = 0
while True:
    log.exposed(f"r{i}", float(i), "u", "toys", (), "1", "1", np.full(50, 0.5, np.float32))
    i += 1
    if i % 20 == 0:
        log.flush()
        time.sleep(0.01)
"""


def test_a_killed_writer_leaves_whole_segments(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        wait_until(lambda: len(segments(tmp_path, "exposures")) > 20)
        for _ in range(3):  # a reader beside the writer
            assert len(ids_of(tmp_path)) % 50 == 0
        writer.send_signal(signal.SIGKILL)
    ids = ids_of(tmp_path)
    numbers = sorted({int(each[1:]) for each in ids})
    assert numbers == list(range(len(numbers))), "a hole"
    assert len(ids) == 50 * len(numbers)


def ids_of(folder: Path) -> list[str]:
    with reading(folder) as found:
        tables = [pq.read_table(path, columns=["request_id"]) for path in found["exposures"]]
    ids: list[str] = pa.concat_tables(tables)["request_id"].to_pylist()
    return ids


def fill(folder: Path, count: int, kind: Any = "exposures") -> list[dict[str, Any]]:
    log = EventLog(folder, flush_s=3600.0)
    for number in range(count):
        if kind == "exposures":
            expose(log, number)
        else:
            log.happened(Feedback(f"r{number}", 0, "click", 1.0, float(number)))
        log.flush()
    log.close()
    return all_of(folder, kind)


@pytest.mark.parametrize("kind", ["exposures", "feedback"])
def test_merging_keeps_every_row_in_order(tmp_path: Path, kind: Any) -> None:
    with mock.patch.object(module, "_FAN_IN", 4):
        before = fill(tmp_path, 21, kind)
        assert compact(tmp_path) == 0, "others may not have read them yet"
        assert compact(tmp_path, settle_s=-1.0) == 6
    assert all_of(tmp_path, kind) == before
    levels = sorted(path.name.split(".")[1] for path in segments(tmp_path, kind))
    assert levels == ["L0", "L1", "L2"]
    assert not list(tmp_path.rglob(".*"))


def test_nothing_is_merged_or_removed_under_a_reader(tmp_path: Path) -> None:
    before = fill(tmp_path, 8)
    with mock.patch.object(module, "_FAN_IN", 4), reading(tmp_path) as found:
        assert compact(tmp_path, settle_s=-1.0) == 0
        assert retain(tmp_path, days=-1.0) == 0
        assert [row for path in found["exposures"] for row in pq.read_table(path).to_pylist()] == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_merge_that_was_killed_shows_no_row_twice(tmp_path: Path) -> None:
    before = fill(tmp_path, 4)
    with mock.patch.object(module, "_FAN_IN", 4):
        with mock.patch.object(module, "_finish", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            compact(tmp_path, settle_s=-1.0)
        assert len(list((tmp_path / "exposures").glob("*.parquet"))) == 5
        assert all_of(tmp_path) == before
        compact(tmp_path, settle_s=-1.0)
    assert len(list((tmp_path / "exposures").iterdir())) == 1
    assert all_of(tmp_path) == before


def test_old_segments_go(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    old = segments(tmp_path, "exposures")[0]
    older = old.with_name(f"{int(1e9 * (time.time() - 3 * 86_400)):020d}-{old.name.split('-', 1)[1]}")
    old.rename(older)
    assert retain(tmp_path, days=2) == 1
    assert len(segments(tmp_path, "exposures")) == 2


def test_segments_come_to_disk_before_their_name_if_wanted(tmp_path: Path) -> None:
    with mock.patch.object(module, "sync_one") as synced:
        SegmentFiles(tmp_path, sync=True).write("feedback", FEEDBACK.empty_table())
        assert [call.args[0].suffix for call in synced.call_args_list] == [".tmp", ""]


def told_to(sums: list[Any]) -> Callable[..., None]:
    return lambda *each: sums.append(each)


def test_rows_are_judged_once_their_window_has_passed() -> None:
    sums: list[Any] = []
    observer = Observer(told_to(sums), window_s=10.0)
    observer.saw("exposures", [Exposure("r1", 0.0, "u", "toys", (), "1", "1", np.array([0.5, 0.25], np.float32))])
    observer.saw("exposures", [Exposure("r2", 5.0, "u", None, (), "1", "1", np.array([0.125], np.float32))])
    observer.saw("feedback", [Feedback("r1", 0, "click", 1.0, 1.0), Feedback("r1", 0, "click", 1.0, 2.0)])
    observer.saw("feedback", [Feedback("r1", 7, "click", 1.0, 1.0), Feedback("none", 0, "click", 1.0, 1.0)])
    observer.tell(9.0)
    assert sums == []
    observer.tell(11.0)
    observer.saw("feedback", [Feedback("r1", 1, "click", 1.0, 12.0)])  # too late
    observer.tell(16.0)
    assert sums == [("toys", 0.75, 1.0, 2), (None, 0.125, 0.0, 1)]


def test_only_rows_that_were_seen_count_where_that_is_told() -> None:
    sums: list[Any] = []
    observer = Observer(told_to(sums), window_s=10.0)
    probability = np.array([0.5, 0.25, 0.125], np.float32)
    observer.saw("exposures", [Exposure("r1", 0.0, "u", "toys", (), "1", "1", probability, None, np.array([4, 6, 8]))])
    observer.saw("exposures", [Exposure("r2", 0.0, "u", "toys", (), "1", "1", probability)])
    observer.saw("feedback", [Feedback("r1", 8, "shown", 1.0, 1.0), Feedback("r1", 4, "click", 1.0, 1.0)])
    observer.saw("feedback", [Feedback("r1", 6, "click", 0.0, 1.0)])
    observer.tell(11.0)
    assert sums == [("toys", 0.875, 1.0, 3)]


def test_a_request_that_is_sent_again_is_judged_once() -> None:
    sums: list[Any] = []
    observer = Observer(told_to(sums), window_s=10.0)
    first, part = Exposure("r1", 0.0, "u", "toys", (), "1", "1", some(1)), np.array([0.25], np.float32)
    observer.saw("exposures", [first, first._replace(time_s=1.0)])
    parts = [Exposure("r2", 2.0, "u", name, (), "1", "1", part, None, np.array([row])) for row, name in enumerate("ab")]
    observer.saw("exposures", parts)
    observer.saw("feedback", [Feedback("r1", 0, "click", 1.0, 1.0)])
    observer.tell(20.0)
    assert [each[0::2] + each[3:] for each in sums] == [("toys", 1.0, 4), ("a", 0.0, 1), ("b", 0.0, 1)]


def test_memory_is_bounded() -> None:
    sums: list[Any] = []
    observer = Observer(told_to(sums), window_s=1e9, max_rows=10)
    observer.saw("exposures", [Exposure(f"r{i}", 0.0, "u", "toys", (), "1", "1", some(i)) for i in range(5)])
    observer.tell(0.0)
    assert sums[0][3] == 12


def test_feedback_that_another_process_received_is_heard(tmp_path: Path) -> None:
    sums: list[Any] = []
    other = EventLog(tmp_path, flush_s=3600.0)
    other.happened(Feedback("old", 0, "click", 1.0, 0.0))
    other.flush()
    files = SegmentFiles(tmp_path)
    observer = Observer(told_to(sums), window_s=1e-9, others=tmp_path, writer=files.writer)
    log = EventLog(tmp_path, sink=files, flush_s=3600.0, observer=observer)
    other.happened(Feedback("r1", 3, "click", 1.0, 0.0))
    other.close()
    expose(log, 1)
    log.happened(Feedback("r1", 0, "click", 1.0, 0.0))
    log.close()
    assert sums == [("toys", pytest.approx(float(some(1).sum())), 2.0, 4)]


class Slow(Queue):
    """While it writes, requests are answered and clicked, here and by another process."""

    def __init__(self, other: EventLog) -> None:
        super().__init__()
        self.open, self.other, self.log = True, other, None

    def write(self, kind: str, table: pa.Table) -> None:
        super().write(kind, table)
        if self.log is not None and kind == "exposures":
            log, self.log = self.log, None
            for number in (2, 3):
                expose(log, number)
            log.happened(Feedback("r2", 0, "click", 1.0, 0.0))
            self.other.happened(Feedback("r3", 0, "click", 1.0, 0.0))
            self.other.flush()


def test_what_is_clicked_while_a_file_is_written_is_not_forgotten(tmp_path: Path) -> None:
    sums: list[Any] = []
    sink = Slow(EventLog(tmp_path, flush_s=3600.0))
    observer = Observer(told_to(sums), window_s=1e12, others=tmp_path, writer="mine")
    sink.log = log = EventLog(sink=sink, flush_s=3600.0, observer=observer)
    expose(log, 1)
    log.flush()
    log.flush()
    observer.tell(1e13)
    assert sums == [("toys", pytest.approx(3 * float(some(2).sum())), 2.0, 12)]
    log.close()
    sink.other.close()


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
