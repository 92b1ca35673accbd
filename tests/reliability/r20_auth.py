"""R20: who has no token, or a wrong one, changes nothing; and no refusal tells a path, a trace or a name from the inside."""

import ast
import re
from pathlib import Path

import httpx
import pytest
from bodies import INFER, LENGTH, SCORE, WRONG_INFER, WRONG_SCORE
from pushing import Adapters, new_store
from support import say, serving

import domlora.serving

pytestmark = pytest.mark.reliability
TOKEN = "sesame-4711"
WRONG = [
    "Bearer sesame",
    "Bearer sesame-47110",
    "Bearer",
    "Basic sesame-4711",
    "sesame-4711",
    "bearer sesame-4711",
    "x",
]
INSIDE = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|/home/|/root|/tmp|/usr/|/work|0x[0-9a-f]{6}|<class|object at"
    r"|\b(domlora\.\w+\.\w+|onnxruntime|msgspec|uvicorn|httptools|numpy|prometheus_client|asyncio)\b",
    re.IGNORECASE,
)
ADMIN = [
    ("GET", "/v1/adapters"),
    ("GET", "/v1/adapters/toys"),
    ("PUT", "/v1/adapters/toys"),
    ("DELETE", "/v1/adapters/toys"),
    ("PATCH", "/v1/adapters/toys"),
    ("GET", "/v1/bundle"),
    ("POST", "/v1/bundle"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/live/load"),
    ("POST", "/v2/repository/models/live.toys/load"),
    ("POST", "/v2/repository/models/live.toys/unload"),
]
BODY = {"/v1/bundle": b'{"version": 1}', "/v2/repository/index": b"{}"}


@pytest.fixture
def store(exported, tmp_path):
    return new_store(exported, tmp_path / "live")


def ask_all(client, adapters, **headers):
    """The statuses of all admin routes, each with a body that would be taken."""
    for method, path in ADMIN:
        content = adapters.payload("toys", 1) if method == "PUT" else BODY.get(path, b"")
        yield client.request(method, path, content=content, headers=headers).status_code


def test_tokens(store, exported, tmp_path):
    adapters, before, asked = Adapters(exported), store.content(), 0
    with serving(store.folder, tmp_path / "log", host="0.0.0.0", token=TOKEN) as server:
        with httpx.Client(base_url=server.url, timeout=10) as client:
            assert set(ask_all(client, adapters)) == {401}
            for wrong in WRONG:
                assert set(ask_all(client, adapters, authorization=wrong)) == {403}, wrong
            assert store.content() == before
            assert client.post(SCORE, json={}).status_code == 400  # who scores needs no token
            allowed = list(ask_all(client, adapters, authorization=f"Bearer {TOKEN}"))
        assert TOKEN not in server.log.read_text()
    assert {200, 404} == set(allowed)  # 404: a method that there is not, and a domain that was deleted
    assert allowed[:4] == [200] * 4
    asked = len(ADMIN) * (1 + len(WRONG))
    say(f"{asked} of {asked} admin requests without the token refused with 401 or 403, the store as it was")


def test_without_a_token(store, exported, tmp_path):
    """Off when the server listens elsewhere; on loopback for this machine, and not for pages that a browser shows."""
    adapters, before = Adapters(exported), store.content()
    with serving(store.folder, tmp_path / "log", host="0.0.0.0") as server, httpx.Client(base_url=server.url) as client:
        for given in ({}, {"authorization": "Bearer x"}, {"host": "127.0.0.1"}):
            assert set(ask_all(client, adapters, **given)) == {403}
    with serving(store.folder, tmp_path / "log") as server, httpx.Client(base_url=server.url) as client:
        for given in ({"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "null"}):
            assert set(ask_all(client, adapters, **given)) == {403}
        assert store.content() == before
        assert client.get("/v1/adapters").status_code == 200
    say("without a token off beyond loopback, and on it for other hosts and origins")


def test_the_token_is_compared_in_constant_time():
    """With ``hmac.compare_digest``, and nowhere with ``==``."""
    places = sorted(Path(domlora.serving.__file__).parent.rglob("*.py"))
    nodes = [node for path in places for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]

    def names_token(node: ast.AST) -> bool:
        return any(isinstance(part, ast.Attribute) and part.attr == "token" for part in ast.walk(node))

    compared = [node for node in nodes if isinstance(node, ast.Compare) and names_token(node)]
    assert all(isinstance(op, ast.Is | ast.IsNot) for node in compared for op in node.ops)
    calls = [node for node in nodes if isinstance(node, ast.Call) and names_token(node)]
    assert [ast.unparse(node.func) for node in calls if len(node.args) == 2] == ["hmac.compare_digest"]


def wrong_requests(adapters: Adapters):
    """Method, path, body, headers: everything that can be refused."""
    for body, length in WRONG_INFER.values():
        yield "POST", INFER, body, {} if length is None else {LENGTH: str(length)}
    for body in WRONG_SCORE.values():
        yield from (("POST", path, body, {}) for path in (SCORE, "/v1/feedback", "/v1/bundle"))
    whole = adapters.payload("toys", 5)
    for body in (
        b"",
        whole[:-1],
        whole[:100],
        b"\x80\x04" + bytes(64),
        b"/etc/passwd",
        adapters.payload("toys", 5, 999),
    ):
        yield "PUT", "/v1/adapters/toys", body, {}
    for domain in ("..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "%ff", "a" * 5_000, "books", "%00"):
        yield "PUT", f"/v1/adapters/{domain}", whole, {}
        yield "DELETE", f"/v1/adapters/{domain}x", b"", {}
        yield "POST", f"/v2/repository/models/live.{domain}/load", b'{"parameters": {"file:1/a": "AAAA"}}', {}
    yield "POST", "/v1/bundle", b'{"version": 99}', {}
    yield "POST", "/v1/bundle", b'{"version": 2}', {}  # it is damaged
    for path in (
        "/console/../../etc/passwd",
        "/console/%2e%2e/%2e%2e/etc/passwd",
        "/v1/console/versions/2",
        "/nowhere",
    ):
        yield "GET", path, b"", {}
    for method in ("PATCH", "TRACE", "OPTIONS", "PUT", "GET"):
        yield from ((method, path, b"", {}) for path in (SCORE, INFER, "/v1/feedback", "/v2/models/other/infer"))
    yield "POST", SCORE, b"{}", {"content-encoding": "br"}
    yield "POST", SCORE, b"{}", {"content-encoding": "gzip"}
    yield "GET", "/v2", b"", {"x-long": "a" * 100_000}


def test_refusals_tell_nothing_of_the_inside(store, exported, tmp_path):
    adapters, refused = Adapters(exported), 0
    store.add_version(exported, 2)
    damaged = store.version_folder(2) / "tables.bin"
    content = bytearray(damaged.read_bytes())
    damaged.unlink()  # a link to the file of the export
    content[1000] ^= 1
    damaged.write_bytes(content)
    lost = store.put_adapter("books", adapters.payload("books", 6))
    with serving(store.folder, tmp_path / "log", max_adapters=1) as server:
        with httpx.Client(base_url=server.url, timeout=20) as client:
            row = {f"f{n}": "v1" for n in range(5)}
            for domain in ("toys", "games"):  # so that the one of books must be read again
                assert client.post(SCORE, json={"domain": domain, "rows": [row]}).status_code == 200
            (store.folder / lost.file).unlink()
            told = client.post(SCORE, json={"domain": "books", "rows": [row]})
            assert told.status_code == 503, told.text
            answers = [told]
            for method, path, body, headers in wrong_requests(adapters):
                answers.append(client.request(method, path, content=body, headers=headers))
        assert server.counts()["domlora_worker_starts_total"] == 1
    for told in answers:
        assert told.status_code != 500, (told.request.url, told.text)
        if told.status_code >= 400:
            refused += 1
            assert INSIDE.search(told.text) is None, (str(told.request.url)[:200], told.text)
            assert str(tmp_path) not in told.text
    say(f"{refused} refusals of {len(answers)} requests tell no path, trace or inner name")
    assert refused > 100
