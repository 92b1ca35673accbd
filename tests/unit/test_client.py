"""The client, and a load test, before a real server; the client before one that refuses, comes late or goes away."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from domlora.cli import app
from domlora.client import AsyncClient, Client, Event, UnavailableError
from domlora.errors import BundleError, ConfigError, DataError, UnknownDomainError
from domlora.serving.folder import adapter_file, read_facts
from domlora.serving.payload import Payload, write_payload

SERVE = "from domlora.cli import main; main()"
ROWS = [{"item": f"i{n}"} for n in range(3)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    from domlora.adapters.attach import attach_
    from domlora.bundle import Bundle
    from domlora.features.batch import Batch
    from domlora.features.encode import Encoder
    from domlora.features.schema import Feature, Schema
    from domlora.models.build import build_model
    from domlora.serving.export import export

    torch.manual_seed(0)
    schema = Schema((Feature("item", num_ids=22), Feature("age", "numeric")), domains=("toys", "books"))
    options = {"name": "mlp", "embedding_dim": 4, "hidden_units": [8]}
    model = build_model(schema=schema, **options)
    bank = attach_(model, 2, temperature=4.0, include=["tower.*"])
    with torch.no_grad():
        for parameter in [*model.parameters(), *bank.parameters()]:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    rows = Batch(torch.randint(0, 22, (20, 1)), torch.randn(20, 1), torch.arange(20) % 2, torch.zeros(20))
    place = tmp_path_factory.mktemp("client") / "live"
    export(Bundle(model, options, Encoder(schema, {"item": [f"i{n}" for n in range(20)]})), place, [rows])
    return place


@pytest.fixture(scope="session")
def url(folder: Path) -> Iterator[str]:
    """A server in processes of its own; its admin routes ask for a token."""
    command = [sys.executable, "-c", SERVE, "serve", "--bundle", str(folder), "--port", "0", "--token", "secret"]
    process = subprocess.Popen([*command, "--drain", "0", "--flush", "0.1"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        found = ""
        for line in process.stderr:
            told = json.loads(line)
            found = told.get("url", found)
            if told["event"] == "ready":
                break
        threading.Thread(target=process.stderr.read, daemon=True).start()  # or the pipe is full some day
        yield found
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, model="live", token="secret") as found:
        yield found


def payload(folder: Path, domain: str, scale: float = 1.0) -> bytes:
    banks = {name: scale * bank for name, bank in load_file(folder / adapter_file(0)).items()}
    return write_payload(Payload(domain, read_facts(folder)["base"], "7", banks))


def test_rows_and_columns_are_scored_alike(client: Client) -> None:
    rows = client.score(ROWS, domain="toys", request={"age": np.float32(3)}, request_id="mine")
    columns = client.score({"item": np.array(["i0", "i1", "i2"])}, domain="toys", request={"age": 3})
    assert rows.request_id == "mine"
    assert rows.adapters == {"toys": rows.bundle}
    assert rows.arms == {}
    assert rows.explain is None
    np.testing.assert_array_equal(rows.probability, columns.probability)
    assert len(set(rows.probability.tolist())) == 3


def test_an_explanation_adds_up(client: Client) -> None:
    scored = client.score(ROWS, domain="toys", request={"age": 1}, explain=True)
    assert scored.explain is not None
    added = np.add(scored.explain.base_logit, scored.explain.adapter_logit)
    np.testing.assert_allclose(added, scored.explain.logit, atol=1e-6)


def test_infer_answers_as_score_does(client: Client) -> None:
    scored = client.score(ROWS, domain="books", request={"age": 0})
    inferred = client.infer(np.array([[2], [3], [4]]), np.zeros((3, 1)), domain="books")
    np.testing.assert_allclose(inferred.probability, scored.probability, atol=1e-6)
    np.testing.assert_allclose(1 / (1 + np.exp(-inferred.logit)), inferred.probability, atol=1e-6)
    assert inferred.adapter == scored.bundle == inferred.bundle
    assert inferred.request_id


def test_rows_of_several_domains(client: Client) -> None:
    ids, dense = np.array([[2], [2]], dtype=np.int32), np.zeros((2, 1))
    mixed = client.infer(ids, dense, domain=["toys", "books"], unit="user-7", version=1)
    alone = [client.infer(ids[:1], dense[:1], domain=name).logit[0] for name in ("toys", "books")]
    np.testing.assert_allclose(mixed.logit, alone, atol=1e-6)
    assert mixed.adapter is None


def test_feedback_counts_once(client: Client) -> None:
    scored = client.score(ROWS, domain="toys", request={"age": 1}, unit="user-7", items=["a", "b", "c"])
    events = [Event(scored.request_id, 1), Event(scored.request_id, 1, "purchase", value=9.5, time_s=time.time())]
    assert client.feedback(events) == (2, 0)
    assert client.feedback(events) == (0, 2)


def test_the_life_of_an_adapter(client: Client, folder: Path) -> None:
    pushed = client.put_adapter("new domain/1", payload(folder, "new domain/1"), version="v2", pinned=True)
    assert (pushed.domain, pushed.version, pushed.pinned) == ("new domain/1", "v2", True)
    listed = {each.domain: each for each in client.adapters()}
    assert listed.keys() == {"toys", "books", "new domain/1"}
    assert listed["new domain/1"].sha256 == pushed.sha256
    assert not listed["toys"].pushed
    assert client.score(ROWS, domain="new domain/1", request={"age": 1}).adapters == {"new domain/1": "v2"}
    client.delete_adapter("new domain/1")
    assert {each.domain for each in client.adapters()} == {"toys", "books"}
    with pytest.raises(UnknownDomainError):
        client.delete_adapter("new domain/1")


def test_health_metadata_and_versions(client: Client) -> None:
    assert client.health()
    assert {each["name"] for each in client.metadata()["inputs"]} == {"ids", "dense", "domain"}
    assert client.set_live(1) == 1


def load(url: str, file: Path, *options: str) -> dict[str, Any]:
    """What the command line's load test found."""
    told = [url, "--clients", "2", "--seconds", "0.3", "--warmup", "0.1", "--token", "secret", "--json", str(file)]
    done = CliRunner().invoke(app, ["loadtest", *told, *options], catch_exceptions=False)
    assert done.exit_code == 0
    return dict(json.loads(file.read_text()))


def test_a_load_test_with_requests_of_a_file(url: str, tmp_path: Path) -> None:
    good, bad = (
        {"domain": "toys", "candidates": [{"item": "i1", "age": 3}]},
        {"domain": "toys", "candidates": [{"age": 3}]},
    )
    (tmp_path / "asked.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    found = load(url, tmp_path / "found.json", "--requests", str(tmp_path / "asked.jsonl"))
    assert found["statuses"].keys() == {"200", "400 invalid"}
    assert 0 < found["latency_ms"]["p50"] < 1000


@pytest.mark.parametrize("form", ["binary", "json"])
def test_a_load_test_with_random_ids(url: str, tmp_path: Path, form: str) -> None:
    found = load(url, tmp_path / "found.json", "--format", form, "--rows", "5", "--zipf", "1", "--rate", "50")
    assert found["statuses"].keys() == {"200"}
    with pytest.raises(ConfigError, match="called 'live'"):
        load(url, tmp_path / "found.json", "--model", "other")


def test_errors_are_told_in_the_servers_words(client: Client, folder: Path, url: str) -> None:
    with pytest.raises(DataError, match="a row must have every feature"):
        client.score(ROWS, domain="toys")
    with pytest.raises(DataError, match="ids of slot 0"):
        client.infer([[999]], [[0.0]], domain="toys")
    with pytest.raises((BundleError, DataError), match="must be whole"):
        client.put_adapter("toys", payload(folder, "toys")[:-9])
    with pytest.raises(ConfigError, match=r"no such model.*'live'"), Client(url, model="other") as other:
        other.metadata()
    with pytest.raises(ConfigError, match="not the server's token"), Client(url, token="wrong") as other:
        other.adapters()
    with pytest.raises(ConfigError, match="needs a token"), Client(url) as other:
        other.adapters()


def test_what_cannot_be_right_is_not_sent() -> None:
    with Client("http://127.0.0.1:9") as nowhere:
        with pytest.raises(ConfigError, match="name of a model"):
            nowhere.infer([[1]])
        with pytest.raises(DataError, match="whole numbers"):
            nowhere.infer([[1.5]])
        with pytest.raises(DataError, match="must be texts"):
            nowhere.score([{"item": {1}}])
    with pytest.raises(ConfigError, match="address"):
        Client("localhost:8000")


def test_the_asynchronous_client_answers_alike(url: str, client: Client) -> None:
    async def ask() -> list[np.ndarray]:
        async with AsyncClient(url, model="live", token="secret") as other:
            scored = await asyncio.gather(*(other.score(ROWS, domain=d, request={"age": 1}) for d in ("toys", "books")))
            assert len(await other.adapters()) == 2
            with pytest.raises(DataError):
                await other.score(ROWS, domain="toys")
            return [each.probability for each in scored]

    for domain, found in zip(("toys", "books"), asyncio.run(ask()), strict=True):
        np.testing.assert_array_equal(found, client.score(ROWS, domain=domain, request={"age": 1}).probability)


class Refusing:
    """A server that answers each connection with the next thing of a list: bytes, or None to close without a word."""

    def __init__(self, answers: list[bytes | None]) -> None:
        self.answers, self.asked = answers, list[float]()
        self.bodies: list[bytes] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        for answer in self.answers:
            connection, _ = self.listening.accept()
            with connection:
                self.bodies.append(connection.recv(1 << 16))
                self.asked.append(time.monotonic())
                if answer is not None:
                    connection.sendall(answer)


def answer(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


BUSY = answer("503 Busy", b'{"error": "the server is at its limit.", "next_step": "Try again."}', "retry-after: 1")
TAKEN = answer("200 OK", b'{"accepted": 1, "duplicates": 0}')


@pytest.fixture
def refusing() -> Iterator[Callable[[list[bytes | None]], Refusing]]:
    made: list[Refusing] = []

    def make(answers: list[bytes | None]) -> Refusing:
        made.append(Refusing(answers))
        return made[-1]

    yield make
    for each in made:
        each.listening.close()


def test_it_waits_as_long_as_it_is_told(refusing: Callable[..., Refusing]) -> None:
    server = refusing([BUSY, TAKEN])
    with Client(server.url) as client:
        assert client.feedback([Event("r", 0)]).accepted == 1
    assert 1.0 <= server.asked[1] - server.asked[0] < 1.6


def test_it_gives_up_in_the_end(refusing: Callable[..., Refusing]) -> None:
    soon = BUSY.replace(b"retry-after: 1", b"retry-after: 0")
    with Client(refusing([soon, soon]).url, tries=2) as client, pytest.raises(UnavailableError) as caught:
        client.feedback([Event("r", 0)])
    assert caught.value.status == 503
    assert str(caught.value) == "the server is at its limit. Try again."


def test_it_does_not_wait_longer_than_it_may(refusing: Callable[..., Refusing]) -> None:
    server = refusing([BUSY])
    start = time.monotonic()
    with Client(server.url, longest_wait_s=0.5) as client, pytest.raises(UnavailableError):
        client.feedback([Event("r", 0)])
    assert time.monotonic() - start < 0.5


def test_what_was_lost_is_sent_again_under_the_same_id(refusing: Callable[..., Refusing]) -> None:
    scored = b'{"request_id": "r", "probability": [0.5], "bundle": "1", "adapters": {}, "arms": {}}'
    server = refusing([None, None, answer("200 OK", scored)])
    with Client(server.url) as client:
        assert client.score([{"item": "a"}]).probability.tolist() == [0.5]
    ids = {body.split(b"x-request-id: ")[1].split(b"\r\n")[0] for body in server.bodies}
    assert len(server.bodies) == 3
    assert len(ids) == 1


def test_a_deletion_is_not_sent_again(refusing: Callable[..., Refusing]) -> None:
    server = refusing([None, answer("200 OK", b"{}")])
    with Client(server.url) as client, pytest.raises(UnavailableError, match="reachable"):
        client.delete_adapter("toys")
    assert len(server.bodies) == 1


def test_a_late_answer_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(address, timeout_s=0.1, tries=1) as client, pytest.raises(UnavailableError, match="in time"):
            client.score([{"item": "a"}])


@pytest.mark.parametrize(("more", "degraded"), [({}, 0), ({"degraded": 2}, 2), ({"degraded": 1, "newer": "yes"}, 1)])
def test_rows_that_were_answered_with_fallbacks_are_told(
    refusing: Callable[..., Refusing], more: dict[str, Any], degraded: int
) -> None:
    told = {"request_id": "r", "probability": [0.5, 0.25], "bundle": "3", "adapters": {}, "arms": {}, **more}
    with Client(refusing([answer("200 OK", json.dumps(told).encode())]).url) as client:
        scored = client.score([{"item": "a"}, {"item": "b"}])
    assert (scored.degraded, scored.probability.tolist()) == (degraded, [0.5, 0.25])


def test_an_answer_that_is_no_json_is_told(refusing: Callable[..., Refusing]) -> None:
    page = answer("502 Bad Gateway", b"<html>proxy</html>")
    with Client(refusing([page]).url) as client, pytest.raises(UnavailableError, match=r"502.*proxy"):
        client.score([{"item": "a"}])


def test_reasons_choose_the_error(refusing: Callable[..., Refusing]) -> None:
    told = b'{"error": "no.", "next_step": "", "reason": "unknown_domain"}'
    with Client(refusing([answer("404 No", told)]).url, model="m") as client, pytest.raises(UnknownDomainError):
        client.infer([[1]])
