"""KuaiRand: videos shown in 15 places of the Kuaishou app, each place ("tab") a domain; some were shown at random.

Source: Gao et al., KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos, CIKM 2022.
CC BY-SA 4.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domlora.data.engine import Engine
from domlora.data.files import Archive, find_raw
from domlora.data.published.tables import Reading, check_listed_once, options_of
from domlora.data.raw import RawTable
from domlora.errors import ConfigError, nearest

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["kuairand"]

_OF_LOG = (
    *("user_id", "video_id", "date", "hourmin", "time_ms", "tab", "is_rand", "duration_ms", "is_click"),
    # what the user did with the video
    *("is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "play_time_ms"),
    *("profile_stay_time", "comment_stay_time", "is_profile_enter"),
)
_OF_USER = (
    *("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"),
    *("follow_user_num", "follow_user_num_range", "fans_user_num", "fans_user_num_range"),
    *("friend_user_num", "friend_user_num_range", "register_days", "register_days_range"),
    *(f"onehot_feat{number}" for number in range(18)),
)
_OF_VIDEO = (
    *("author_id", "video_type", "upload_dt", "upload_type", "visible_status", "video_duration"),
    *("server_width", "server_height", "music_id", "music_type", "tag"),
)
_FOLDERS = {"pure": "KuaiRand-Pure", "1k": "KuaiRand-1K", "27k": "KuaiRand-27K"}
_LOGS = {"standard": ("standard",), "random": ("random",), "both": ("standard", "random")}


def kuairand(
    engine: Engine, raw: Path | None, options: Mapping[str, Any], progress: Progress | None = None
) -> RawTable:
    """Shown videos with what is known of their users and of themselves; columns are called as published.

    ``hour`` is that of ``hourmin``; ``time_ms`` is a number. Daily counts of videos (``video_features_statistic``) are left
    out, since they are taken over the month of the log itself.

    Options:
        version: ``pure``, ``1k`` or ``27k``; by default the first of these that is there.
        logs: ``standard`` (what the app recommended), ``random`` (what was put in at random: the unbiased test) or ``both``;
            column ``is_rand`` tells them apart.
    """
    chosen = options_of("kuairand", options, version="", logs="standard")
    version, logs = chosen["version"], chosen["logs"]
    for option, known in (("version", ["", *_FOLDERS]), ("logs", list(_LOGS))):
        if chosen[option] not in known:
            raise ConfigError(
                f"unknown {option} of kuairand",
                received=chosen[option],
                next_step=nearest(str(chosen[option]), filter(None, known)),
            )
    archive = _archive([version] if version else list(_FOLDERS), _LOGS[logs])
    *of_log, of_user, of_video = find_raw(archive, raw, progress)
    reading = Reading(engine, [*of_log, of_user, of_video], progress)
    rows = _text(reading, of_log, _OF_LOG)
    rows = _joined(rows, _text(reading, [of_user], ("user_id", *_OF_USER)), "user_id", of_user)
    rows = _joined(rows, _text(reading, [of_video], ("video_id", *_OF_VIDEO)), "video_id", of_video)
    rows = rows.mutate(time_ms=rows["time_ms"].try_cast("int64"), hour=rows["hourmin"].try_cast("int64") // 100)
    return reading.finished("kuairand", rows, ("user_id", "video_id", "time_ms", "tab"))


def _archive(versions: list[str], logs: tuple[str, ...]) -> Archive:
    return Archive(
        title="KuaiRand",
        folder="KuaiRand",
        layouts=tuple(_files(version, logs) for version in versions),
        publisher="its authors, on Zenodo, record 10439422",
        inner=("data", *(f"{_FOLDERS[version]}{end}" for version in versions for end in ("/data", ""))),
    )


def _files(version: str, logs: tuple[str, ...]) -> tuple[str, ...]:
    parts = ("_part1", "_part2") if version == "27k" else ("",)
    dates = {"standard": ("4_08_to_4_21", "4_22_to_5_08"), "random": ("4_22_to_5_08",)}
    return (
        *(
            f"log_{log}_{date}_{version}{part}.csv"
            for log in logs
            for date in dates[log]
            for part in (parts if log == "standard" else ("",))
        ),
        f"user_features_{version}.csv",
        f"video_features_basic_{version}.csv",
    )


def _text(reading: Reading, paths: list[Path], columns: tuple[str, ...]) -> Any:
    return reading.table(reading.delimited(paths, columns))


def _joined(rows: Any, table: Any, key: str, path: Path) -> Any:
    """Rows with what a file says of one of their keys; rows whose key is not listed keep empty columns."""
    check_listed_once(table, key, path)
    table = table.rename(__key=key)
    return rows.left_join(table, rows[key] == table["__key"]).drop("__key")
