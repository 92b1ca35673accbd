from __future__ import annotations

from pathlib import Path

import pytest

from domlora.config import load_plan
from domlora.data.prepare import prepare
from domlora.data.sources import open_source
from domlora.errors import ConfigError, DataError

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,play_time_ms,"
    "duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
USERS = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,follow_user_num_range,"
    "fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,register_days_range,"
) + ",".join(f"onehot_feat{number}" for number in range(18))
VIDEOS = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,music_id,"
    "music_type,tag"
)


def shown(user: int, video: int, time: int, tab: int, rand: int = 0) -> str:
    return f"{user},{video},20220421,{time},165048580{time:04d},1,0,0,0,0,0,1,900,17200,0,0,0,{rand},{tab}"


def write(folder: Path, version: str = "pure", parts: tuple[str, ...] = ("",)) -> Path:
    folder.mkdir(parents=True)
    for number, part in enumerate(parts):
        early, late = (shown(1, 5 + number, 400, 1), shown(2, 6 + number, 2359, 0)), (shown(1, 5 + number, 5, 14),)
        (folder / f"log_standard_4_08_to_4_21_{version}{part}.csv").write_text("\n".join([LOG, *early]))
        (folder / f"log_standard_4_22_to_5_08_{version}{part}.csv").write_text("\n".join([LOG, *late]))
    (folder / f"log_random_4_22_to_5_08_{version}.csv").write_text("\n".join([LOG, shown(2, 5, 1200, 1, 1)]))
    user = '1,full_active,0,0,1,5,"(0,10]",312,"[100,1k)",0,0,3624,730+,' + ",".join(["1"] * 17) + ","
    (folder / f"user_features_{version}.csv").write_text(f"{USERS}\n{user}\n")
    video = '5,441,NORMAL,2020-07-08,ShortImport,1.0,17200.0,720,1280,989206467,4.0,"12,65"'
    (folder / f"video_features_basic_{version}.csv").write_text(f"{VIDEOS}\n{video}\n")
    return folder


def test_logs_are_joined_with_users_and_videos(each_engine, tmp_path) -> None:
    raw = open_source(each_engine, "kuairand", write(tmp_path / "KuaiRand-Pure" / "data"))
    rows = {row["time_ms"] % 10_000: row for row in raw.table.to_pyarrow().to_pylist()}
    assert {time: (row["user_id"], row["video_id"], row["tab"], row["hour"]) for time, row in rows.items()} == {
        400: ("1", "5", "1", 4),
        2359: ("2", "6", "0", 23),
        5: ("1", "5", "14", 0),
    }
    known, unknown = rows[400], rows[2359]
    assert (known["follow_user_num_range"], known["onehot_feat17"], known["author_id"]) == ("(0,10]", "", "441")
    assert (known["tag"], known["duration_ms"], known["is_click"]) == ("12,65", "17200", "1")
    assert (unknown["user_active_degree"], unknown["tag"]) == (None, None)
    assert raw.key == ("user_id", "video_id", "time_ms", "tab")
    assert len(raw.inputs) == 4


@pytest.mark.parametrize(("logs", "rows"), [("standard", 3), ("random", 1), ("both", 4)])
def test_logs_can_be_chosen(engine, tmp_path, logs, rows) -> None:
    write(tmp_path / "KuaiRand-Pure" / "data")
    table = open_source(engine, "kuairand", tmp_path, {"logs": logs}).table
    assert table.count().to_pyarrow().as_py() == rows
    assert (
        set(table.to_pyarrow()["is_rand"].to_pylist()) == {"standard": {"0"}, "random": {"1"}, "both": {"0", "1"}}[logs]
    )


def test_the_version_is_found_or_chosen(engine, tmp_path) -> None:
    write(tmp_path / "KuaiRand-27K" / "data", "27k", ("_part1", "_part2"))
    assert open_source(engine, "kuairand", tmp_path).table.count().to_pyarrow().as_py() == 6
    write(tmp_path / "KuaiRand-1K" / "data", "1k")
    assert "user_features_1k.csv" in open_source(engine, "kuairand", tmp_path).inputs
    assert "user_features_27k.csv" in open_source(engine, "kuairand", tmp_path, {"version": "27k"}).inputs
    with pytest.raises(DataError, match=r"KuaiRand needs log_standard_4_08_to_4_21_pure\.csv.*Zenodo"):
        open_source(engine, "kuairand", tmp_path, {"version": "pure"})


@pytest.mark.parametrize(("option", "value"), [("version", "1K"), ("version", 1), ("logs", "rand")])
def test_options_must_be_known(engine, tmp_path, option, value) -> None:
    with pytest.raises(ConfigError, match=rf"unknown {option} of kuairand. Received: {value!r}.*Known: "):
        open_source(engine, "kuairand", tmp_path, {option: value})


def test_a_video_listed_twice_is_refused(engine, tmp_path) -> None:
    path = write(tmp_path / "data") / "video_features_basic_pure.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(DataError, match=r"video_id must be listed once in video_features_basic_pure\.csv"):
        open_source(engine, "kuairand", tmp_path)


def test_the_plan_prepares(tmp_path) -> None:
    folder = write(tmp_path / "data")
    shows = [shown(1, 5, time, tab, 0) for time in range(30) for tab in range(3)]
    path = folder / "log_standard_4_08_to_4_21_pure.csv"
    path.write_text("\n".join([LOG, *shows]))
    manifest = prepare(load_plan("kuairand"), tmp_path / "out", folder=tmp_path)
    domains = manifest["splits"]["train"]["domains"]
    assert list(domains) == ["0", "1", "2", "14"]
    assert [domains[name]["rows"] for name in "012"] == [24, 24, 24]
    assert manifest["rows"]["kept"] == 91
