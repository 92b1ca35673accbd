"""Feedback through the handler, into the log and the metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from domlora.abtest.log import Feedback
from domlora.errors import ConfigError
from domlora.serving.http.answers import Answer, Request
from domlora.serving.http.feedback import feedback, open_log
from domlora.serving.http.metrics import Metrics
from domlora.serving.http.service import Service
from domlora.serving.live import Live
from domlora.serving.settings import Settings
from domlora.serving.store import Store

CLICK = {"request_id": "r1", "row": 0, "event": "click"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, adapted: Any) -> Store:
    made = Store.create(tmp_path_factory.mktemp("feedback") / "store")
    made.add_version(adapted.folder)
    return made


@pytest.fixture
def service(store: Store, tmp_path: Path) -> Iterator[Service]:
    settings = Settings(store.folder, flush_s=3600.0)
    metrics = Metrics()
    log = open_log(tmp_path / "log", settings, metrics)
    yield Service(Live.open(store, name="m"), settings, metrics, None, log)
    log.close()


def post(service: Service, body: Any) -> Answer:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return feedback(service, Request("POST", "/v1/feedback", {}, {}, raw, 0.0))


def logged(service: Service) -> list[dict[str, Any]]:
    assert service.log is not None
    assert service.log.flush()
    assert service.log.folder is not None
    return pq.read_table(service.log.folder / "feedback").to_pylist()


def test_old_files_of_the_log_are_removed_and_what_waits_is_a_metric(store: Store, tmp_path: Path) -> None:
    settings, metrics = Settings.told({"bundle": store.folder, "keep_days": 7}, {}), Metrics()
    assert Settings.told({"bundle": "live"}, {"DOMLORA_KEEP_DAYS": "0.5"}).keep_days == 0.5
    assert Settings.from_json(settings.to_json()) == settings
    assert Settings(store.folder).keep_days is None, "nothing is removed unless it is asked for"
    for wrong in ({"keep_days": 0.0}, {"keep_days": "7"}):
        with pytest.raises(ConfigError, match="keep_days must be"):
            Settings(store.folder, **wrong)
    log = open_log(tmp_path / "log", settings, metrics)
    log.happened(Feedback("r1", 0, "click", 1.0, 0.0))
    log.flush()
    [path] = (tmp_path / "log" / "feedback").glob("*.parquet")
    old = f"{time.time_ns() - 8 * 86_400 * 10**9:020d}{path.name[20:]}"
    path.rename(path.with_name(old))
    log.happened(Feedback("r2", 0, "click", 1.0, 0.0))
    log.flush()
    log._tidied = -1e9  # a minute has passed
    log._tidy()
    log.close()
    assert [row["request_id"] for row in pq.read_table(tmp_path / "log" / "feedback").to_pylist()] == ["r2"]
    assert b"domlora_events_waiting 0.0" in metrics.expose()


def test_events_reach_the_log(service: Service) -> None:
    bought = {"request_id": "order-1", "event": "conversion", "value": 30.5, "time_s": 12.5, "unit": "u7"}
    answer = post(service, {"events": [CLICK, bought]})
    assert (answer.status, json.loads(answer.body)) == (200, {"accepted": 2, "duplicates": 0})
    first, second = logged(service)
    assert (first["row"], first["value"], first["unit"], first["time_s"] > 1e9) == (0, 1.0, None, True)
    assert second == {**bought, "row": None}


def test_sent_again_it_counts_once(service: Service) -> None:
    post(service, {"events": [CLICK]})
    answer = post(service, {"events": [CLICK, {**CLICK, "row": 1}, {**CLICK, "value": 9.0}]})
    assert json.loads(answer.body) == {"accepted": 1, "duplicates": 2}
    assert [(row["row"], row["value"]) for row in logged(service)] == [(0, 1.0), (1, 1.0)]


@pytest.mark.parametrize(
    "bad",
    [
        {**CLICK, "row": -1}, {**CLICK, "row": 10_000}, {**CLICK, "row": 2**70}, {**CLICK, "row": "0"},
        {**CLICK, "row": 0.5}, {**CLICK, "row": True}, {**CLICK, "request_id": ""}, {**CLICK, "request_id": "x" * 201},
        {**CLICK, "request_id": 7},
        {**CLICK, "event": "Click!"}, {**CLICK, "event": ""}, {**CLICK, "value": "1"}, {**CLICK, "value": None},
        {**CLICK, "time_s": 1e18}, {**CLICK, "time_s": -1.0}, {**CLICK, "unit": ""}, {**CLICK, "more": 1},
        {"request_id": "r1", "event": "click"}, {"row": 0, "event": "click"}, {"request_id": "r1", "row": 0},
    ],
)  # fmt: skip
def test_one_bad_event_and_none_is_taken(service: Service, bad: dict[str, Any]) -> None:
    answer = post(service, {"events": [CLICK, bad]})
    assert answer.status == 400
    assert set(json.loads(answer.body)) == {"error", "next_step", "reason"}
    assert service.log is not None
    assert service.log.pending == 0


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"events": []}', b'{"events": [1]}', b'{"events": null}', b"\xff", b"[" * 100_000,
     b'{"events": [{"request_id": "r", "row": 0, "event": "click", "value": NaN}]}',
     b'{"events": [{"request_id": "r", "row": 0, "event": "click", "value": 1e999}]}',
     b'{"events": [{"request_id": "r", "row": 0, "row": 1, "event": "click"}]}',
     b'{"events": [{"request_id": "\\ud800", "row": 0, "event": "click"}]}'],
)  # fmt: skip
def test_bad_bodies_are_refused(service: Service, body: bytes) -> None:
    assert post(service, body).status == 400


def test_no_room_is_no_loss(service: Service) -> None:
    assert service.log is not None
    service.log._most = 1
    answer = post(service, {"events": [CLICK, {**CLICK, "row": 1}]})
    assert (answer.status, dict(answer.headers)[b"retry-after"]) == (503, b"1")
    assert post(service, {"events": [CLICK]}).status == 200


def test_without_a_log_it_says_so(service: Service) -> None:
    log, service.log = service.log, None
    assert post(service, {"events": [CLICK]}).status == 404
    service.log = log


def test_predicted_stands_beside_observed(service: Service) -> None:
    service.metrics.know(["web"])
    assert service.log is not None
    probability = np.array([0.5, 0.25], np.float32)
    service.log.exposed("r1", 0.0, "u1", "web", (), "1", "1", probability)  # long ago: its window has passed
    post(service, {"events": [CLICK]})
    service.log.flush()
    text = service.metrics.expose().decode()
    for line in ("predicted_sum_total", "observed_sum_total", "observed_rows_total"):
        assert f'domlora_{line}{{domain="web"}}' in text
    assert 'domlora_predicted_sum_total{domain="web"} 0.75' in text
    assert 'domlora_observed_sum_total{domain="web"} 1.0' in text
    assert 'domlora_observed_rows_total{domain="web"} 2.0' in text
