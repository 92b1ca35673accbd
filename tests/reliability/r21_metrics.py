"""R21: what clients count and what two workers count together is equal to the last one; and no client can make series."""

import socket
import time
from collections import Counter
from contextlib import ExitStack

import httpx
import pytest
from load import open_loop
from prometheus_client.parser import text_string_to_metric_families
from pushing import Adapters, new_store
from support import CANDIDATES, DOMAINS, infer_requests, say, serving

pytestmark = pytest.mark.reliability
SCORE, INFER = "/v1/score", "/v2/models/live/infer"
ROW = {f"f{n}": "v1" for n in range(5)}
OVERLOAD = 8_000.0  # requests a second
SERIES = ("toys", "books", "other", "other")  # of the three domains and a pushed one, where two may have their own


class Counted:
    """What the clients have seen, in the words of the metrics."""

    def __init__(self) -> None:
        self.requests, self.rejected, self.domains, self.rows, self.sums = (Counter() for _ in range(5))

    def note(self, route: str, status: int, reason: str = "", n: int = 1) -> None:
        self.requests[route, str(status)] += n
        if reason:
            self.rejected[reason] += n

    def scored(self, route: str, domain: str, rows: int, n: int = 1, total: float = 0.0) -> None:
        self.note(route, 200, n=n)
        self.domains[domain, "200"] += n
        self.rows[domain] += rows * n
        self.sums[domain] += total


def shown(server) -> dict[str, Counter]:
    """The series of /metrics by name, each a counter by its labels' values."""
    found: dict[str, Counter] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            labels = tuple(sample.labels[name] for name in sorted(sample.labels, key=_place))
            found.setdefault(sample.name, Counter())[labels if len(labels) > 1 else "".join(labels)] = sample.value
    return found


def _place(label: str) -> int:
    return ["route", "domain", "reason", "feature", "status", "le"].index(label)


def overload(server, counted: Counted, domain: str, series: str) -> None:
    requests = infer_requests(domains=(domain,))
    seen = open_loop(server.port, requests, OVERLOAD, 1.0, wait_s=60.0).count()
    assert set(seen) <= {200, 503}
    counted.scored("infer", series, CANDIDATES, n=seen[200])
    counted.note("refused", 503, "busy", n=seen[503])


def ask_all(clients: list[httpx.Client], counted: Counted) -> None:
    """Each kind of answer some times, by connections of both workers."""
    for client in clients:
        for domain, series in zip(DOMAINS, SERIES, strict=False):
            told = client.post(SCORE, json={"domain": domain, "rows": [ROW] * 3})
            assert told.status_code == 200
            counted.scored("score", series, 3, total=sum(told.json()["probability"]))
        refused = [
            ("score", 400, "invalid", client.post(SCORE, content=b"no JSON")),
            ("infer", 400, "invalid", client.post(INFER, json={"inputs": []})),
            ("infer", 404, "not_found", client.post("/v2/models/other/infer", json={})),
            ("infer", 404, "not_found", client.post("/v2/models/live.nowhere/infer", json={})),
            ("none", 404, "not_found", client.get("/nowhere")),
            ("score", 405, "", client.get(SCORE)),
            ("feedback", 413, "too_large", client.post("/v1/feedback", content=bytes(9 << 20))),
            ("refused", 413, "too_large", client.post(SCORE, content=bytes(9 << 20))),
            ("score", 503, "unavailable", client.post(SCORE, json={"domain": "lost", "rows": [ROW]})),
        ]
        for route, status, reason, told in refused:
            assert told.status_code == status, (route, told.status_code, told.text)
            counted.note(route, status, reason)


def test_counts_are_equal(exported, tmp_path):
    counted, adapters = Counted(), Adapters(exported)
    store = new_store(exported, tmp_path / "live")
    lost = store.put_adapter("lost", adapters.payload("lost", 1))
    settings = {"workers": 2, "metrics_domains": 2, "max_wait_s": 0.02}
    with ExitStack() as stack:
        server = stack.enter_context(serving(store.folder, tmp_path / "log", **settings))
        (store.folder / lost.file).unlink()
        ask_all([stack.enter_context(httpx.Client(base_url=server.url, timeout=30)) for _ in range(12)], counted)
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(b"no HTTP at all\r\n\r\n")
            assert b" 400 " in sock.recv(1000)
        counted.note("refused", 400, "malformed")
        time.sleep(1.0)  # the workers tell what they counted some times a second
        first = shown(server)
        check(first, counted, scrapes=0)
        assert dict(first["domlora_probability_sum_total"]) == pytest.approx(dict(counted.sums), rel=1e-6)
        for domain, series in zip(DOMAINS, SERIES, strict=False):
            overload(server, counted, domain, series)
        time.sleep(1.0)
        check(shown(server), counted, scrapes=1)
    say(
        f"{counted.requests.total()} answers of two workers counted alike by clients and /metrics: "
        f"{dict(status_counts(counted))}; rejected {dict(counted.rejected)}; rows {dict(counted.rows)}"
    )
    assert counted.rejected["busy"] > 0


def status_counts(counted: Counted) -> Counter:
    found = Counter()
    for (_, status), n in counted.requests.items():
        found[status] += n
    return found


def check(found: dict[str, Counter], counted: Counted, scrapes: int) -> None:
    expected = Counter(counted.requests)
    expected["metrics", "200"] += scrapes
    assert positive(found["domlora_requests_total"]) == positive(expected)
    assert positive(found["domlora_rejected_total"]) == positive(counted.rejected)
    assert positive(found["domlora_domain_requests_total"]) == positive(counted.domains)
    assert positive(found["domlora_rows_total"]) == positive(counted.rows)
    seconds = {(route, "+Inf"): n for (route, le), n in found["domlora_request_seconds_bucket"].items() if le == "+Inf"}
    measured = Counter()
    for (route, _), n in expected.items():
        measured[route, "+Inf"] += 0 if route == "refused" else n
    assert positive(Counter(seconds)) == positive(measured)


def positive(counts: Counter) -> dict:
    return {key: value for key, value in counts.items() if value > 0}


def test_no_client_makes_series(exported, tmp_path):
    settings = {"workers": 2, "metrics_domains": 2}
    with (
        serving(exported, tmp_path / "log", **settings) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        sizes = []
        for start in (0, 1_000, 2_000):
            for number in range(start, start + (20 if start == 0 else 300)):
                strange = f"strange-{number}"
                client.post(SCORE, json={"domain": strange, "rows": [{**ROW, "f0": strange}], "unit": strange})
                client.post(INFER, json={"inputs": [], "parameters": {"domain": strange}})
                client.get(f"/{strange}")
                client.get(f"/v2/models/{strange}")
                client.request(f"M{number}", SCORE)
            time.sleep(0.5)
            found = shown(server)
            sizes.append(sum(map(len, found.values())))
        assert {domain for domain, _ in found["domlora_domain_requests_total"]} <= {"toys", "books", "other", ""}
        unknown = found["domlora_unknown_domain_total"][""]
    say(f"{sizes[0]} series after 20 strange domains, paths and methods, {sizes[-1]} after 620")
    assert unknown == 620
    assert sizes[2] == sizes[1] <= sizes[0] + 20  # a second worker shows each series once more


def test_connections_are_counted(exported, tmp_path):
    with serving(exported, tmp_path / "log", workers=2, max_connections=8) as server, ExitStack() as stack:
        refused = 0
        for _ in range(60):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
            sock.settimeout(0.05)
            try:
                refused += b" 503 " in sock.recv(1000)
            except TimeoutError:
                continue
        stack.close()
        time.sleep(1.0)
        found = shown(server)
    say(f"{refused} of 60 connections refused and counted so")
    assert refused == found["domlora_rejected_total"]["connections"] > 0
