"""Who may change what is served over HTTP, what is changed, and what is refused how."""

from __future__ import annotations

import base64
import json
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import tritonclient.http

from domlora.serving.folder import TABLES
from domlora.serving.http import admin
from domlora.serving.http.answers import Request
from domlora.serving.http.metrics import Metrics
from domlora.serving.http.service import Service
from domlora.serving.live import Live
from domlora.serving.settings import Settings
from domlora.serving.store import Store


class Admin:
    """Asks a service as an HTTP server would."""

    def __init__(self, served, **settings):
        self.served = served
        told = Settings(bundle=served.store.folder, name="ads", **settings)
        live = Live(served.store, name="ads", max_adapters=told.max_adapters)
        self.service = Service(live=live, settings=told, metrics=Metrics(told.metrics_domains))

    def ask(self, method, path, body=b"", query=None, **headers):
        told = {b"host": b"127.0.0.1:8000", **{name.encode(): value.encode() for name, value in headers.items()}}
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = admin.handle(self.service, Request(method, path, query or {}, told, content, time.perf_counter()))
        return answer.status, json.loads(answer.body)

    def push(self, domain, seed, **query):
        return self.ask("PUT", f"/v1/adapters/{domain}", self.served.payload(domain, seed), query)


@pytest.fixture
def ads(served):
    return Admin(served)


@pytest.fixture
def made(served):
    def make(**settings):
        return Admin(served, **settings)

    return make


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/adapters"),
        ("PUT", "/v1/adapters/toys"),
        ("DELETE", "/v1/adapters/web"),
        ("POST", "/v1/bundle"),
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/ads.web/unload"),
    ],
)
def test_only_who_has_the_token_may(made, method, path):
    before = (service := made(token="sesame", host="0.0.0.0").service).live.store.content()
    ads = made(token="sesame", host="0.0.0.0")
    assert ads.ask(method, path)[0] == 401
    for wrong in ("Bearer sesam", "Bearer ", "sesame", "Basic sesame", "Bearer sesame2"):
        status, told = ads.ask(method, path, authorization=wrong)
        assert (status, "sesame" in json.dumps(told)) == (403, False)
    assert ads.ask(method, path, b"x", authorization="Bearer sesame")[0] not in (401, 403)
    assert made(host="0.0.0.0").ask(method, path, authorization="Bearer sesame")[0] == 403
    assert service.live.store is ads.service.live.store
    assert "removed" in json.loads(before)


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"host": "localhost:8000"}, True),
        ({"host": "[::1]:8000", "origin": "http://[::1]:8000"}, True),
        ({"host": "localhost.evil.example"}, False),
        ({"host": "127.0.0.1.evil.example:8000"}, False),
        ({"host": "ads.example"}, False),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "null"}, False),
    ],
)
def test_without_a_token_no_page_of_another_site_may(ads, headers, allowed):
    assert (ads.ask("GET", "/v1/adapters", **headers)[0] == 200) is allowed


def test_an_adapter_is_pushed_listed_and_dropped(ads):
    status, told = ads.push("toys", 3, version="2026-05-26", pinned="true")
    assert (status, told["domain"], told["version"], told["pinned"], told["rank"]) == (
        200,
        "toys",
        "2026-05-26",
        True,
        2,
    )
    assert np.abs(ads.served.logits(ads.service.live, "toys") - ads.served.expected(3)).max() <= 1e-5
    _, listed = ads.ask("GET", "/v1/adapters")
    assert (listed["bundle"], listed["removed"]) == ("1", [])
    by_name = {each["domain"]: each for each in listed["adapters"]}
    assert by_name.keys() == {"app", "web", "mail", "toys"}
    assert (by_name["toys"]["in_memory"], by_name["toys"]["pushed"], by_name["web"]["in_memory"]) == (True, True, False)
    assert ads.ask("GET", "/v1/adapters/toys")[1] == by_name["toys"]
    assert ads.ask("DELETE", "/v1/adapters/toys") == (200, {"domain": "toys", "served": False})
    assert ads.ask("DELETE", "/v1/adapters/toys")[0] == 404
    assert ads.ask("GET", "/v1/adapters/toys")[0] == 404


def test_names_with_slashes_are_names(ads):
    assert ads.push("home/kitchen", 1)[0] == 200
    assert ads.ask("GET", "/v1/adapters/home/kitchen")[1]["version"] == "1"
    assert ads.push("../kitchen", 1)[0] == 400


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda content: content[:-1], "whole"),
        (lambda content: content[:0], "whole"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "sha256"),
    ],
    ids=["truncated", "empty", "bit"],
)
def test_a_bad_adapter_is_refused_and_nothing_changes(ads, change, word):
    ads.push("toys", 1)
    before = ads.served.logits(ads.service.live, "toys")
    status, told = ads.ask("PUT", "/v1/adapters/toys", change(ads.served.payload("toys", 2)))
    assert status == 400
    assert word in told["error"]
    assert str(ads.served.store.folder) not in json.dumps(told)
    assert (ads.served.logits(ads.service.live, "toys") == before).all()


def test_wrong_parameters_are_refused(ads):
    assert ads.push("toys", 1, pinned="perhaps")[0] == 400
    assert ads.push("toys", 1, version="a/b")[0] == 400
    assert ads.ask("PATCH", "/v1/adapters/toys")[0] == 404
    for body in (
        b"",
        b"{}",
        b"[]",
        b'{"version": "1"}',
        b'{"version": 1, "version": 1}',
        b'{"version": 1, "path": "/"}',
    ):
        assert ads.ask("POST", "/v1/bundle", body)[0] == 400


def test_no_more_are_pinned_than_have_room(made):
    ads = made(max_adapters=1)
    assert ads.push("a", 1, pinned="true")[0] == 200
    assert ads.push("a", 2, pinned="true")[0] == 200
    assert ads.push("b", 1, pinned="true")[0] == 400
    assert ads.push("b", 1)[0] == 200


def test_larger_ranks_than_allowed_are_refused(made):
    status, told = made(max_rank=1).push("a", 1)
    assert (status, "rank must be at most 1" in told["error"]) == (400, True)


def test_another_version_is_made_live(ads, next_day):
    ads.served.store.add_version(next_day.folder)
    assert ads.ask("GET", "/v1/bundle") == (200, {"version": 1, "versions": [1, 2]})
    assert ads.ask("POST", "/v1/bundle", {"version": 2}) == (200, {"version": 2, "versions": [1, 2]})
    assert ads.service.live.current.version == "2"
    assert ads.ask("POST", "/v1/bundle", {"version": 3})[0] == 400
    place = ads.served.store.version_folder(1) / TABLES
    content = place.read_bytes()
    place.unlink()
    place.write_bytes(content[:-1])
    assert ads.ask("POST", "/v1/bundle", {"version": 1})[0] == 400
    assert ads.service.live.current.version == "2"


def test_the_repository_extension(ads, next_day):
    ads.served.store.add_version(next_day.folder)
    ads.push("toys", 1)
    _, models = ads.ask("POST", "/v2/repository/index")
    assert [(model["name"], model["version"], model["state"]) for model in models[:2]] == [
        ("ads", "1", "READY"),
        ("ads", "2", "UNAVAILABLE"),
    ]
    assert {model["name"] for model in models[2:]} == {"ads.app", "ads.web", "ads.mail", "ads.toys"}
    assert (
        ads.ask("POST", "/v2/repository/models/ads.toys/unload", {"parameters": {"unload_dependents": False}})[0] == 200
    )
    _, models = ads.ask("POST", "/v2/repository/index", {"ready": True})
    assert "ads.toys" not in {model["name"] for model in models}
    assert ads.ask("POST", "/v2/repository/models/ads.toys/unload")[0] == 404
    assert ads.ask("POST", "/v2/repository/models/ads.toys/load")[0] == 200
    assert ads.ask("GET", "/v1/adapters/toys")[0] == 200
    for name in ("ads.books", "other", "other.toys", "ads"):
        assert ads.ask("POST", f"/v2/repository/models/{name}/unload")[0] in (400, 404)
    assert ads.ask("POST", "/v2/repository/models/ads/load")[0] == 200
    assert ads.ask("POST", "/v2/repository/models/ads.toys/sell")[0] == 404


@pytest.fixture
def url(ads):
    """A small HTTP server before the handlers."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            status, told = ads.ask("POST", self.path, body)
            content = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_tritons_client_pushes_an_adapter(ads, url):
    content = ads.served.payload("toys", 4)
    with tritonclient.http.InferenceServerClient(url) as client:
        client.load_model("ads.toys", config="{}", files={"file:1/adapter.safetensors": content})
        assert ads.ask("GET", "/v1/adapters/toys")[1]["version"] == "4"
        assert {
            "name": "ads.toys",
            "version": "4",
            "state": "READY",
            "reason": "",
        } in client.get_model_repository_index()
        client.unload_model("ads.toys")
        with pytest.raises(tritonclient.http.InferenceServerException, match="no such domain"):
            client.unload_model("ads.toys")
        client.load_model("ads.toys")
    assert ads.ask("GET", "/v1/adapters/toys")[1]["version"] == "4"


def test_a_load_must_hold_one_whole_file(ads):
    two = {f"file:{n}": base64.b64encode(ads.served.payload("toys", 4)).decode() for n in range(2)}
    for parameters in (two, {"file:1": "%%%"}, {"file:1": 7}, []):
        assert ads.ask("POST", "/v2/repository/models/ads.toys/load", {"parameters": parameters})[0] == 400


def test_a_full_disk_is_not_the_clients_fault(adapted, served, small_disk):
    store = Store.create(small_disk / "store")
    store.add_version(adapted.folder)
    served.store = store
    ads = Admin(served)
    before = served.logits(ads.service.live, "web")
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
    status, told = ads.ask("PUT", "/v1/adapters/web", served.payload("web", 1, rank=256))
    assert (status, "disk" in told["next_step"]) == (503, True)
    assert (served.logits(ads.service.live, "web") == before).all()
