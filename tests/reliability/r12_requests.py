"""R12: every kind of wrong request is refused with 4xx, and of 10,000 drawn ones none is answered 5xx or ends a worker."""

import http.client
import json
from collections import Counter

import numpy as np
import pytest
from bodies import (
    INFER,
    LENGTH,
    MAX_ROWS,
    SCORE,
    WRONG_INFER,
    WRONG_SCORE,
    binary,
    fuzzed_infer,
    fuzzed_score,
    row,
    score,
)
from hypothesis import HealthCheck, given, settings
from pushing import varied_export
from support import say, serving

pytestmark = pytest.mark.reliability
EXAMPLES = 5_000  # of each route
ROUTES = {SCORE: fuzzed_score(), INFER: fuzzed_infer()}


class Asked:
    """One connection, kept; and what came back."""

    def __init__(self, port: int) -> None:
        self.client, self.seen = http.client.HTTPConnection("127.0.0.1", port, timeout=20), Counter()

    def __call__(self, path: str, body: bytes, length: int | None = None) -> tuple[int, bytes]:
        self.client.request("POST", path, body, {} if length is None else {LENGTH: str(length)})
        answer = self.client.getresponse()
        told = answer.read()
        self.seen[answer.status] += 1
        return answer.status, told


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("varied") / "live"
    varied_export(folder)
    return folder


@pytest.fixture
def asked_of(varied, tmp_path):
    def make(**told):
        return serving(varied, tmp_path / "log", max_rows=MAX_ROWS, max_wait_s=5.0, deadline_s=20.0, **told)

    return make


def whole(server) -> bool:
    """No worker was started anew, and nothing was answered 5xx."""
    counts = server.counts()
    failed = [name for name in counts if name.startswith("domlora_requests_total") and 'status="5' in name]
    return failed == [] and counts["domlora_worker_starts_total"] == 1


def test_listed_requests(asked_of):
    with asked_of(unknown_domain="error") as server:
        asked = Asked(server.port)
        wrong = {("infer", name): asked(INFER, *each) for name, each in WRONG_INFER.items()}
        wrong |= {("score", name): asked(SCORE, body) for name, body in WRONG_SCORE.items()}
        for case, (status, told) in wrong.items():
            expected = 404 if case[1] == "unknown domain" else 400
            assert (case, status, b'"error":"' in told) == (case, expected, True), told
        assert whole(server)
    say(f"{len(wrong)} of {len(wrong)} listed requests refused with 4xx")


def test_unknown_values(asked_of):
    with asked_of() as server:
        asked = Asked(server.port)
        unseen, absent = (json.loads(asked(SCORE, row(item=item))[1])["probability"] for item in ("no such", None))
        assert unseen != absent
        assert server.counts()['domlora_unknown_ids_total{feature="item"}'] == 1
    with asked_of(unknown_ids="error") as server:
        asked = Asked(server.port)
        assert [asked(SCORE, row(item=item, past=[]))[0] for item in ("no such", "i7")] == [400, 200]
    say("an unknown value is counted, or refused with 400 by --unknown-ids error")


def test_drawn_requests(asked_of):
    with asked_of() as server:
        asked = Asked(server.port)
        before = asked(INFER, *binary()), json.loads(asked(SCORE, score())[1])["probability"]
        assert before[0][0] == 200
        asked.seen.clear()
        for path, bodies in ROUTES.items():
            _fuzz(asked, path, bodies)
        seen = Counter(asked.seen)
        assert whole(server)
        assert asked(INFER, *binary())[1] == before[0][1]
        assert np.array_equal(json.loads(asked(SCORE, score())[1])["probability"], before[1])
    say(f"{seen.total()} drawn requests: {dict(sorted(seen.items()))}, no worker started anew")
    assert seen.total() >= 2 * EXAMPLES


def _fuzz(asked, path, bodies):
    """At least ``EXAMPLES`` of them: hypothesis stops earlier where it finds no new ones."""

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(bodies)
    def fuzz(each):
        status, told = asked(path, *each)
        assert status == 200 or 400 <= status < 500, told
        assert status == 200 or json.loads(told)["error"]

    fuzz()
