"""A store that machines share: what is published is served by every copy, and by none what is damaged."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import numpy as np
import pytest

from domlora.abtest.experiments import Arm, Experiment
from domlora.abtest.registry import Registry
from domlora.errors import BundleError, ConfigError
from domlora.files import sha256_of
from domlora.serving.folder import MANIFEST
from domlora.serving.http.metrics import Metrics
from domlora.serving.live import Live
from domlora.serving.shared import sweep as sweeping
from domlora.serving.shared.mirror import Mirror
from domlora.serving.shared.place import Place
from domlora.serving.shared.publishing import publish, pull
from domlora.serving.shared.record import Record, Version
from domlora.serving.shared.sweep import sweep
from domlora.serving.state import State
from domlora.serving.store import Store

DAY_S = 86_400.0


def s3_server(monkeypatch: pytest.MonkeyPatch, bucket: str) -> Any:
    server = pytest.importorskip("moto.server", reason="no moto: pip install 'moto[s3,server]' s3fs").ThreadedMotoServer
    pytest.importorskip("s3fs")
    running = server(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    told = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in {**told, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    httpx.put(f"http://{host}:{port}/{bucket}").raise_for_status()
    return running


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder, and a real server that speaks S3 where one is installed."""
    if request.param == "folder":
        yield Place(str(tmp_path / "place"))
        return
    import fsspec

    bucket = f"bucket-{uuid4().hex}"  # moto keeps what it holds, whatever server is asked
    server = s3_server(monkeypatch, bucket)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield Place(f"s3://{bucket}/live")
    server.stop()


def write(place: Place, name: str, content: bytes) -> None:
    place._files.pipe_file(f"{place._root}/{name}", content)


class Copy:
    """A replica: its store, its mirror, what a process of it answers with."""

    def __init__(self, place: Place, folder: Path, metrics: Metrics | None = None) -> None:
        self.store = Store.create(folder)
        self.mirror = Mirror(place, self.store, 0.01, None if metrics is None else metrics.looked)
        self.mirror.first()
        self.live = Live.open(self.store, name="live", follower=self.mirror)

    def look(self) -> None:
        self.mirror._look()
        self.live.refresh()

    def serves(self) -> tuple[str, str]:
        return self.live.current.version, self.live.known()["web"].version


def test_all_copies_serve_what_is_published(served: Any, next_day: Any, place: Place, tmp_path: Path) -> None:
    assert publish(served.store, place).generation == 1
    copies = [Copy(place, tmp_path / name) for name in "ab"]
    assert [copy.serves() for copy in copies] == [("1", "1")] * 2
    served.store.put_adapter("web", served.payload("web", 5), "five")
    told = publish(served.store, place)
    assert (told.generation, told.files) == (2, 1), "versions are not sent again"
    served.store.add_version(next_day.folder, 2)
    served.store.set_live(2)
    for copy in copies:
        copy.look()
        assert copy.serves() == ("1", "five")
        np.testing.assert_array_equal(served.logits(copy.live, "web"), served.expected(5))
    assert publish(served.store, place).generation == 3
    assert publish(served.store, place).generation == 3, "nothing has changed"
    for copy in copies:
        copy.look()
        assert copy.serves()[0] == "2"
        assert copy.store.state() == served.store.state()
        assert sha256_of(copy.store.version_folder(2) / MANIFEST) == sha256_of(next_day.folder / MANIFEST)
        assert copy.store.versions() == [1, 2], "the one before stays, to go back"


def test_two_publishers_at_once(served: Any, place: Place, tmp_path: Path) -> None:
    """The second one is refused, pulls, and then both changes are there; the same thing changed twice is refused."""
    publish(served.store, place)
    other = Store.create(tmp_path / "other")
    pull(other, place)
    served.store.put_adapter("web", served.payload("web", 1), "ours")
    other.put_adapter("app", served.payload("app", 2), "theirs")
    publish(served.store, place)
    with pytest.raises(BundleError, match="has changed since"):
        publish(other, place)
    pull(other, place)
    publish(other, place)
    pull(served.store, place)
    assert {name: each.version for name, each in served.store.state().adapters.items()} == {
        "web": "ours",
        "app": "theirs",
    }
    assert served.store.state() == other.state()
    served.store.put_adapter("web", served.payload("web", 3), "mine")
    other.put_adapter("web", served.payload("web", 4), "yours")
    publish(served.store, place)
    with pytest.raises(BundleError, match=r"same thing.*adapter web"):
        pull(other, place)
    assert other.state().adapters["web"].version == "yours"


def test_the_race_for_a_generation_has_one_winner(place: Place) -> None:
    """Both have seen the same generation; this is what a look before the write cannot prevent."""
    lost: list[str] = []
    start = threading.Barrier(4)

    def put(number: int) -> None:
        start.wait()
        try:
            place.put(Record(1, State(followed=str(number))))
        except BundleError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lost) == 3
    assert all("somebody else" in each for each in lost)
    assert place.newest().generation == 1


@pytest.mark.parametrize("harm", ["bit", "half", "gone"])
def test_a_damaged_file_is_refused_by_name(served: Any, place: Place, harm: str, tmp_path: Path) -> None:
    publish(served.store, place)
    copy = Copy(place, tmp_path / "copy")
    adapter = served.store.put_adapter("web", served.payload("web", 5), "five")
    publish(served.store, place)
    name = f"files/{adapter.sha256}"
    content = place._files.cat_file(f"{place._root}/{name}")
    if harm == "gone":
        place._files.rm_file(f"{place._root}/{name}")
    else:
        write(place, name, content[:-1] + bytes([content[-1] ^ 1]) if harm == "bit" else content[: len(content) // 2])
    copy.look()
    assert name in copy.mirror._failure
    assert copy.serves() == ("1", "1")
    assert publish(served.store, place, again=True).generation == 2
    copy.look()
    assert copy.serves() == ("1", "five")


def test_a_half_written_record_is_refused_by_name(served: Any, place: Place, tmp_path: Path) -> None:
    publish(served.store, place)
    copy = Copy(place, tmp_path / "copy")
    half = Record(2, served.store.state(), {1: Version("0" * 64)}).to_json()[:-20]
    write(place, "generations/000000000002.json", half)
    copy.look()
    assert "generations/000000000002.json" in copy.mirror._failure
    assert copy.serves() == ("1", "1")
    with pytest.raises(BundleError, match="000000000002"):
        publish(served.store, place)
    with pytest.raises(BundleError, match="000000000002"):
        Copy(place, tmp_path / "new")


def test_a_place_that_is_away(served: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is here is served, also after a restart, and the metrics say since when."""
    place, metrics = Place(str(tmp_path / "place")), Metrics()
    publish(served.store, place)
    copy = Copy(place, tmp_path / "copy", metrics)
    seen_at = [line for line in metrics.expose().decode().splitlines() if "seen_timestamp_seconds 1" in line]
    (tmp_path / "place").rename(tmp_path / "away")
    (tmp_path / "place").write_text("no folder")
    for _ in range(3):
        copy.look()
    again = Copy(place, tmp_path / "copy", metrics)
    assert copy.serves() == again.serves() == ("1", "1")
    told = metrics.expose().decode().splitlines()
    assert seen_at[0] in told, "it was not seen since"
    assert 'domlora_shared_looks_total{result="failed"} 4.0' in told
    assert "domlora_shared_generation 1.0" in told
    assert [each.message for each in caplog.records].count("shared store not read") == 2, "once for each process"
    with pytest.raises(BundleError, match="reachable"):
        Copy(place, tmp_path / "new")
    (tmp_path / "place").unlink()
    (tmp_path / "away").rename(tmp_path / "place")
    served.store.put_adapter("web", served.payload("web", 5), "five")
    publish(served.store, place)
    copy.look()
    assert copy.serves() == ("1", "five")


def test_a_step_follows_by_itself(served: Any, tmp_path: Path) -> None:
    place = Place(str(tmp_path / "place"))
    publish(served.store, place)
    copies = [Copy(place, tmp_path / "copy") for _ in range(2)]
    served.store.put_adapter("web", served.payload("web", 5), "five")
    publish(served.store, place)
    until = time.monotonic() + 10
    while {copy.serves() for copy in copies} != {("1", "five")}:
        assert time.monotonic() < until
        for copy in copies:
            copy.live.refresh()
        time.sleep(0.005)
    assert sum(copy.mirror._leads is not None for copy in copies) == 1, "one process of a machine looks"


def test_a_copy_changed_by_hand_is_taken_back(served: Any, tmp_path: Path) -> None:
    place = Place(str(tmp_path / "place"))
    served.store.put_adapter("web", served.payload("web", 5), "five")
    publish(served.store, place)
    copy = Copy(place, tmp_path / "copy")
    copy.store.drop_adapter("web")
    copy.look()
    assert copy.serves() == ("1", "five")
    damaged = copy.store.folder / copy.store.state().adapters["web"].file
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert Copy(place, tmp_path / "copy").serves() == ("1", "five"), "brought anew at a start"


def test_delta_in_place_of_a_version(
    served: Any, next_day: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(str(tmp_path / "place"))
    publish(served.store, place)
    copy = Copy(place, tmp_path / "copy")
    served.store.add_version(next_day.folder, 2)
    served.store.set_live(2)
    publish(served.store, place, delta=True)
    fetched: list[str] = []
    get_file = place.get_file
    monkeypatch.setattr(place, "get_file", lambda digest, path: (fetched.append(digest), get_file(digest, path)))
    copy.look()
    assert copy.serves()[0] == "2"
    tables = json.loads((next_day.folder / MANIFEST).read_bytes())["files"]["tables.bin"]
    assert fetched
    assert tables not in fetched
    assert Copy(place, tmp_path / "new").serves()[0] == "2", "who has no version takes the whole"
    assert tables in fetched


def test_experiments_and_their_versions_are_everywhere(served: Any, next_day: Any, tmp_path: Path) -> None:
    place = Place(str(tmp_path / "place"))
    served.store.add_version(next_day.folder, 2)
    served.store.add_version(next_day.folder, 7)
    registry = Registry.open(served.store.folder / "experiments")
    registry.create(Experiment("wide", (Arm("now"), Arm("wide", version=2))))
    started = registry.start("wide", 10.0)
    publish(served.store, place)
    copy = Copy(place, tmp_path / "copy")
    copied = Registry.open(copy.store.folder / "experiments")
    assert copied.all() == [started]
    assert copy.store.versions() == [1, 2], "7 answers nobody"
    stopped = registry.stop("wide", 20.0)
    publish(served.store, place)
    copy.look()
    assert copied.all() == [stopped]
    assert copy.store.versions() == [1]


def test_admin_routes_of_a_copy_change_nothing(served: Any, client_of: Any, tmp_path: Path) -> None:
    place = Place(str(tmp_path / "place"))
    publish(served.store, place)
    copy = Copy(place, tmp_path / "copy")
    client = client_of(copy.store, store_url=place.url)
    before = copy.store.content()
    model = "/v2/repository/models/ads.web"
    for method, path, body in (
        ("PUT", "/v1/adapters/web", served.payload("web", 5)),
        ("DELETE", "/v1/adapters/web", b""),
        ("POST", "/v1/bundle", {"version": 1}),
        ("POST", f"{model}/load", b"{}"),
        ("POST", f"{model}/load", {"parameters": {"file:1/adapter": "YQ=="}}),
        ("POST", f"{model}/unload", b"{}"),
    ):
        status, told = client.json(method, path, body)
        assert (status, "domlora store publish" in told["next_step"]) == (400, True), path
    assert copy.store.content() == before
    assert client.json("GET", "/v1/adapters")[0] == 200


def test_records_that_lead_out_are_refused(served: Any) -> None:
    good = Record(1, served.store.state(), {1: Version("0" * 64)})
    for bad in (
        replace(good, versions={}),
        replace(good, versions={1: Version("../" + "0" * 61)}),
        replace(good, versions={1: Version("0" * 64, "1" * 64, {"../x": "0" * 64})}),
        replace(good, versions={1: Version("0" * 64, "1" * 64, {"files/../../x": "0" * 64})}),
        replace(good, experiments={"../x": Experiment("x", (Arm("a"), Arm("b", version=1))).to_json()}),
    ):
        with pytest.raises(BundleError, match="must be whole"):
            Record.from_json(bad.to_json())
    with pytest.raises(BundleError, match="sha256"):
        Record.from_json(good.to_json().replace(b'"generation": 1', b'"generation": 2'))


def test_only_places_that_keep_the_promise() -> None:
    with pytest.raises(ConfigError, match="folder or s3"):
        Place("ftp://host/x")


def test_one_shared_store_for_a_store(served: Any, tmp_path: Path) -> None:
    publish(served.store, Place(str(tmp_path / "one")))
    with pytest.raises(BundleError, match="stay with one"):
        publish(served.store, Place(str(tmp_path / "two")))
    assert not (tmp_path / "two").exists()


def test_a_store_and_a_copy_are_not_mistaken(served: Any, tmp_path: Path) -> None:
    """A copy lacks versions, and takes back what is changed in it: neither may stand in for the other."""
    place = Place(str(tmp_path / "place"))
    publish(served.store, place)
    copy = Copy(place, tmp_path / "copy")
    for refused in (publish, pull):
        with pytest.raises(ConfigError, match="server's copy"):
            refused(copy.store, place)
    with pytest.raises(ConfigError, match="folder of its own"):
        Mirror(place, served.store)


@pytest.fixture
def week_later(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a sweep begin eight days after now."""
    return lambda: monkeypatch.setattr(sweeping, "time", SimpleNamespace(time=lambda: time.time() + 8 * DAY_S))


def test_a_sweep_removes_what_nobody_asks_for(
    served: Any, next_day: Any, place: Place, tmp_path: Path, week_later: Any
) -> None:
    publish(served.store, place)
    served.store.put_adapter("web", served.payload("web", 5), "five")
    publish(served.store, place)
    write(place, "files/" + "0" * 64, b"sent by a publisher that was killed")
    served.store.put_adapter("web", served.payload("web", 6), "six")
    publish(served.store, place)
    assert sweep(place, keep_s=7 * DAY_S).files == 0, "all of it is young"
    week_later()
    before = place.listed("files")
    told = sweep(place, keep_s=7 * DAY_S, dry_run=True)
    assert place.listed("files") == before
    assert sweep(place, keep_s=7 * DAY_S) == told
    gone = {each.name for each in before} - {each.name for each in place.listed("files")}
    assert "0" * 64 in gone
    assert (len(gone), len(before) - len(gone)) == (told.files, told.kept)
    assert Copy(place, tmp_path / "late").serves() == ("1", "six")
    served.store.add_version(next_day.folder, 2)
    served.store.set_live(2)
    publish(served.store, place)
    assert Copy(place, tmp_path / "later").serves()[0] == "2"


def test_what_was_live_within_the_week_stays(
    served: Any, place: Place, monkeypatch: pytest.MonkeyPatch, week_later: Any
) -> None:
    """Generation 2 came a day ago, so generation 1, nine days old, was live until then."""
    publish(served.store, place)
    old = {each.name for each in place.listed("files")}
    served.store.put_adapter("web", served.payload("web", 5), "five")
    publish(served.store, place)
    week_later()
    written = {1: time.time() - DAY_S, 2: time.time() + 7 * DAY_S}
    monkeypatch.setattr(Place, "generations", lambda _: written)
    sweep(place, keep_s=7 * DAY_S)
    assert old <= {each.name for each in place.listed("files")}


def test_a_sweep_that_cannot_know_removes_nothing(served: Any, place: Place, week_later: Any) -> None:
    publish(served.store, place)
    served.store.put_adapter("web", served.payload("web", 5), "five")
    publish(served.store, place)
    week_later()
    manifest = next(iter(place.newest().versions.values())).manifest
    write(place, f"files/{manifest}", b"{}")
    before = place.listed("files")
    with pytest.raises(BundleError, match="damaged"):
        sweep(place, keep_s=7 * DAY_S)
    assert place.listed("files") == before
    with pytest.raises(ConfigError, match="last hour"):
        sweep(place, keep_s=60)


def test_a_publisher_that_was_too_slow_is_told_of(
    served: Any, place: Place, monkeypatch: pytest.MonkeyPatch, week_later: Any
) -> None:
    """Its files were sent a week ago, and the generation that names them comes while they are removed."""
    publish(served.store, place)
    served.store.put_adapter("web", served.payload("web", 5), "five")
    late, put = place.newest(), Place.put
    monkeypatch.setattr(Place, "put", lambda *_: None)
    publish(served.store, place)
    week_later()
    remove, state = Place.remove, served.store.state()

    def removed_meanwhile(self: Place, names: list[str]) -> None:
        remove(self, names)
        put(self, replace(late, generation=2, state=state))

    monkeypatch.setattr(Place, "remove", removed_meanwhile)
    with pytest.raises(BundleError, match=r"longer than a sweep.*--again"):
        sweep(place, keep_s=7 * DAY_S)
