from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from domlora.serving.http.metrics import Metrics

COUNT = """
import sys
from pathlib import Path
from domlora.serving.http.metrics import Metrics
metrics = Metrics(folder=Path(sys.argv[1]), place=int(sys.argv[2]))
metrics.know(["toys"])
metrics.started()
for _ in range(int(sys.argv[3])):
    metrics.answered("score", 200, "toys", 64, 0.002)
metrics.serves("7")
metrics.logged(10, 2)
metrics.logged(6, 3)
print(metrics.expose().decode())
"""


def samples(text: bytes | str) -> dict[tuple[str, tuple[str, ...]], float]:
    whole = text if isinstance(text, str) else text.decode()
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(whole)
        for sample in family.samples
    }


def test_every_answer_is_counted_once() -> None:
    metrics = Metrics()
    metrics.know(["toys", "books"])
    for domain, status in (("toys", 200), ("toys", 200), ("books", 200), ("toys", 400)):
        metrics.answered("score", status, domain, 64 if status == 200 else 0, 0.004)
    metrics.answered("score", 200, None, 10, 0.02)
    metrics.answered("ready", 200, None, 0, 0.001)
    found = samples(metrics.expose())
    assert found["domlora_requests_total", ("score", "200")] == 4
    assert found["domlora_requests_total", ("score", "400")] == 1
    assert found["domlora_domain_requests_total", ("toys", "200")] == 2
    assert found["domlora_domain_requests_total", ("", "200")] == 1
    assert found["domlora_rows_total", ("toys",)] == 128
    assert found["domlora_request_seconds_count", ("score",)] == 5
    assert found["domlora_request_seconds_bucket", ("0.005", "score")] == 4


def test_latency_by_domain_is_that_of_answers_with_scores() -> None:
    metrics = Metrics(max_domains=2)
    metrics.know(["toys", "books", "late"])
    answers = [("score", 200, "toys", 64, 0.0015), ("score", 200, "toys", 8, 0.2), ("infer", 200, "books", 1, 0.004)]
    refused = [("score", 400, "toys", 0, 9.0), ("feedback", 200, None, 0, 9.0)]
    strange = [("score", 200, name, 1, 0.004) for name in ("late", "made up", "another")]
    several = [("score", 200, None, 10, 0.02)]
    metrics.answered_all([*answers, *refused, *strange, *several])
    found = samples(metrics.expose())
    counts = {labels[0]: n for (name, labels), n in found.items() if name == "domlora_domain_request_seconds_count"}
    assert counts == {"toys": 2, "books": 1, "other": 3, "": 1}
    assert found["domlora_domain_request_seconds_sum", ("toys",)] == pytest.approx(0.2015)
    assert found["domlora_domain_request_seconds_bucket", ("toys", "0.005")] == 1
    assert found["domlora_domain_requests_total", ("toys", "400")] == 1


def test_many_answers_at_once_count_as_one_by_one() -> None:
    one, all_ = Metrics(), Metrics()
    answers = [("score", (200, 503)[n % 3 == 0], ("toys", "tv", None)[n % 3], n % 4, 0.001 * n) for n in range(60)]
    for metrics in (one, all_):
        metrics.know(["toys"])
    for answer in answers:
        one.answered(*answer)
    all_.answered_all(answers)
    known = [name for name in samples(one.expose()) if not name[0].endswith("_created")]
    found = [{name: samples(metrics.expose())[name] for name in known} for metrics in (one, all_)]
    assert found[0] == pytest.approx(found[1])


def test_what_was_predicted_and_what_happened() -> None:
    metrics = Metrics()
    metrics.know(["toys"])
    metrics.scored("toys", 1.5, 10)
    metrics.scored("toys", 0.5, 10)
    metrics.observed("toys", 0.4, 1.0, 2)
    metrics.unknown_ids("item", 3)
    metrics.unknown_domain(2)
    metrics.refused("busy", 503, 5)
    metrics.rejected("rows")
    metrics.swapped()
    metrics.loaded("ok")
    found = samples(metrics.expose())
    assert found["domlora_probability_sum_total", ("toys",)] == 2.0
    assert found["domlora_predicted_sum_total", ("toys",)] == 0.4
    assert found["domlora_observed_sum_total", ("toys",)] == 1.0
    assert found["domlora_observed_rows_total", ("toys",)] == 2
    assert found["domlora_unknown_ids_total", ("item",)] == 3
    assert found["domlora_unknown_domain_total", ()] == 2
    assert found["domlora_rejected_total", ("busy",)] == 5
    assert found["domlora_rejected_total", ("rows",)] == 1
    assert found["domlora_requests_total", ("refused", "503")] == 5
    assert found["domlora_swaps_total", ()] == 1
    assert found["domlora_adapter_loads_total", ("ok",)] == 1


def test_a_client_cannot_make_series() -> None:
    metrics = Metrics(max_domains=3)
    metrics.know(f"known-{number}" for number in range(10))
    for number in range(1_000):
        metrics.answered("score", 200, f"made-up-{number}", 1, 0.001)
        metrics.scored(f"made-up-{number}", 0.5, 1)
        metrics.answered("score", 200, f"known-{number % 10}", 1, 0.001)
    found = samples(metrics.expose())
    domains = {labels[0] for name, labels in found if name == "domlora_rows_total"}
    assert domains == {"known-0", "known-1", "known-2", "other"}
    assert found["domlora_rows_total", ("other",)] == 1_700
    assert found["domlora_probability_sum_total", ("other",)] == 500.0


def test_a_domain_that_is_known_later_has_its_own_series_from_then_on() -> None:
    metrics = Metrics()
    metrics.answered("score", 200, "tv", 1, 0.001)
    metrics.know(["tv"])
    metrics.answered("score", 200, "tv", 1, 0.001)
    found = samples(metrics.expose())
    assert (found["domlora_rows_total", ("other",)], found["domlora_rows_total", ("tv",)]) == (1, 1)


def test_workers_count_together_and_a_new_one_goes_on(tmp_path: Path) -> None:
    said = ""
    for place, number in ((0, 3), (1, 4), (0, 5)):  # the third process takes the place of the first
        command = [sys.executable, "-c", COUNT, str(tmp_path), str(place), str(number)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = samples(said)
    assert found["domlora_requests_total", ("score", "200")] == 12
    assert found["domlora_rows_total", ("toys",)] == 12 * 64
    assert found["domlora_worker_starts_total", ()] == 3
    assert found["domlora_bundle_version", ()] == 7
    assert found["domlora_events_waiting", ()] == 2 * 6  # the third process counts in place of the first
    assert found["domlora_events_dropped_total", ()] == 3 * 3
    assert found["domlora_domain_request_seconds_count", ("toys",)] == 12
    assert found["domlora_domain_request_seconds_bucket", ("toys", "0.005")] == 12
    assert len(list(tmp_path.iterdir())) == 2 * 4  # counter, histogram and two kinds of gauge, of two places
