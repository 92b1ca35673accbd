"""The Open Inference Protocol: Triton's own client, right answers, and no body that breaks the server."""

from __future__ import annotations

import json
import socket
import threading
import time

import numpy as np
import pytest
import torch
import tritonclient.http as triton
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

URL = "/v2/models/ads/infer"
HUGE = 2**63
LENGTH = "inference_header_content_length"


def eager(made, batch):
    with torch.no_grad():
        return made.bundle.model.eval()(batch.ids, batch.dense, batch.domain).numpy()


def inputs_of(ids, dense, domain=None, *, binary=True):
    found = [triton.InferInput("ids", ids.shape, "INT64"), triton.InferInput("dense", dense.shape, "FP32")]
    for each, array in zip(found, (ids, dense), strict=True):
        each.set_data_from_numpy(array, binary_data=binary)
    if domain is not None:
        names = np.array([name.encode() for name in domain], dtype=object)
        found.append(triton.InferInput("domain", names.shape, "BYTES"))
        found[-1].set_data_from_numpy(names, binary_data=binary)
    return found


def tensors(num_rows=2, **changes):
    """The inputs of a request in JSON, with changes to one of them."""
    found = {
        "ids": {"shape": [num_rows, 5], "datatype": "INT64", "data": [2] * 5 * num_rows},
        "dense": {"shape": [num_rows, 1], "datatype": "FP32", "data": [0.5] * num_rows},
        "domain": {"shape": [1], "datatype": "BYTES", "data": ["web"]},
    }
    for name, change in changes.items():
        found[name] = {**found[name], **change}
    return [{"name": name, **each} for name, each in found.items()]


@pytest.fixture(scope="module")
def server(client):
    """The application in a real server on a free port."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(client.app, log_config=None, lifespan="off", http="httptools")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    while not running.started:
        time.sleep(0.01)
    asked = triton.InferenceServerClient(f"127.0.0.1:{listening.getsockname()[1]}")
    yield asked
    asked.close()
    running.should_exit = True
    thread.join()


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("num_rows", [1, 64, 700])
def test_tritons_client_gets_the_models_scores(server, adapted, rows, binary, compression, num_rows):
    batch = rows(num_rows, seed=1)._replace(domain=torch.full((num_rows,), 1))
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("logit", "probability")]
    found = server.infer(
        "ads",
        inputs_of(batch.ids.numpy(), batch.dense.numpy(), ["web"], binary=binary),
        outputs=wanted,
        request_id="r-7",
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    expected = eager(adapted, batch)
    assert np.abs(found.as_numpy("logit") - expected).max() <= 1e-5
    assert np.abs(found.as_numpy("probability") - 1 / (1 + np.exp(-expected))).max() <= 1e-6
    told = found.get_response()
    assert (told["id"], told["model_name"], told["model_version"]) == ("r-7", "ads", "1")


def test_each_row_may_have_its_own_domain(server, adapted, rows):
    batch = rows(40, seed=2)
    names = [("app", "web", "mail", "")[number] for number in batch.domain.tolist()]
    found = server.infer("ads", inputs_of(batch.ids.numpy(), batch.dense.numpy(), names))
    assert np.abs(found.as_numpy("logit") - eager(adapted, batch)).max() <= 1e-5


@pytest.mark.parametrize("how", ["input", "parameter", "model", "none"])
def test_the_domain_is_told_in_one_of_three_ways(server, adapted, rows, how):
    batch = rows(9, seed=3)._replace(domain=torch.full((9,), -1 if how == "none" else 2))
    inputs = inputs_of(batch.ids.numpy(), batch.dense.numpy(), ["mail"] if how == "input" else None)
    parameters = {"domain": "mail"} if how == "parameter" else None
    found = server.infer("ads.mail" if how == "model" else "ads", inputs, parameters=parameters)
    assert np.abs(found.as_numpy("logit") - eager(adapted, batch)).max() <= 1e-5


def test_what_there_is_can_be_asked(server):
    assert server.is_server_live()
    assert server.is_server_ready()
    assert server.is_model_ready("ads")
    assert server.is_model_ready("ads", "1")
    assert server.is_model_ready("ads.web")
    assert not server.is_model_ready("ads", "9")
    assert not server.is_model_ready("ads.tv")
    assert not server.is_model_ready("other")
    assert "binary_tensor_data" in server.get_server_metadata()["extensions"]
    told = server.get_model_metadata("ads")
    assert [(each["name"], each["datatype"], each["shape"]) for each in told["inputs"]] == [
        ("ids", "INT64", [-1, 5]),
        ("dense", "FP32", [-1, 1]),
        ("domain", "BYTES", [-1]),
    ]
    assert [each["name"] for each in told["outputs"]] == ["probability", "logit"]


def test_an_answer_says_what_made_it(client):
    status, headers, body = client.ask("POST", URL, {"inputs": tensors()}, x_request_id="from-a-proxy")
    assert status == 200
    assert "id" not in json.loads(body)
    said = {name: headers[f"x-domlora-{name}"] for name in ("bundle", "adapter", "domain")}
    assert said == {"bundle": "1", "adapter": "1", "domain": "web"}
    assert headers["x-request-id"] == "from-a-proxy"
    _, headers, _ = client.ask("POST", URL, {"inputs": tensors(domain={"data": [""]})})
    assert headers["x-domlora-adapter"] == "none"


def test_an_id_cannot_forge_a_header(client):
    status, headers, body = client.ask("POST", URL, {"inputs": tensors(), "id": "x\r\nset-cookie: a=b"})
    assert status == 200
    assert "x-request-id" not in headers
    assert json.loads(body)["id"] == "x\r\nset-cookie: a=b"


def test_data_may_be_flat_or_in_rows(client):
    flat = client.json("POST", URL, {"inputs": tensors()})[1]
    nested = {"ids": {"data": [[2] * 5] * 2}, "dense": {"data": [[0.5], [0.5]]}}
    assert client.json("POST", URL, {"inputs": tensors(**nested)})[1] == flat


@pytest.mark.parametrize(
    ("policy", "status", "adapter"), [("base", 200, "none"), ("error", 404, None), ("mail", 200, "1")]
)
@pytest.mark.parametrize("name", ["tv", "", "x" * 200])
def test_a_domain_that_is_not_known_is_answered_as_the_policy_says(client_of, policy, status, adapter, name):
    client = client_of(unknown_domain=policy)
    found, headers, body = client.ask("POST", URL, {"inputs": tensors(domain={"data": [name]})})
    assert (found, headers.get("x-domlora-adapter")) == (status, adapter)
    as_mail = client.ask("POST", URL, {"inputs": tensors(domain={"data": ["mail"]})})[2]
    assert (body == as_mail) == (policy == "mail")


def test_ids_out_of_the_vocabulary_are_counted_or_refused(client_of):
    client = client_of()
    asked = {"inputs": tensors(ids={"data": [1, 2, 2, 1, 2, 2, 2, 2, 2, 1]})}
    assert client.json("POST", URL, asked)[0] == 200
    told = client.ask("GET", "/metrics")[2].decode()
    assert 'domlora_unknown_ids_total{feature="item"} 1.0' in told
    assert 'domlora_unknown_ids_total{feature="past"} 1.0' in told
    assert 'domlora_unknown_ids_total{feature="city"} 1.0' in told
    status, refused = client_of(unknown_ids="error").json("POST", URL, asked)
    assert (status, "item" in refused["error"]) == (400, True)


def test_answers_are_counted_exactly(client_of):
    client = client_of()
    for _ in range(70):
        client.ask("POST", URL, {"inputs": tensors(3)})
    client.ask("POST", URL, {"inputs": []})
    told = client.ask("GET", "/metrics")[2].decode().splitlines()
    assert 'domlora_requests_total{route="infer",status="200"} 70.0' in told
    assert 'domlora_requests_total{route="infer",status="400"} 1.0' in told
    assert 'domlora_rows_total{domain="web"} 210.0' in told
    assert 'domlora_rejected_total{reason="invalid"} 1.0' in told


def test_a_score_that_is_no_number_is_not_answered(served, client_of):
    """An adapter of finite numbers, and a row of finite numbers, whose product no float32 holds."""
    banks = {name: bank * np.float32(1e30) for name, bank in served.banks(1).items()}
    served.store.put_adapter("web", served.payload("web", 1, banks=banks))
    status, told = client_of(store=served.store).json("POST", URL, {"inputs": tensors()})
    assert (status, "not a number" in told["error"]) == (400, True)


BAD = {
    "no inputs": {"inputs": []},
    "inputs of another type": {"inputs": {}},
    "not told": {},
    "extra field": {"inputs": tensors(), "more": 1},
    "extra field of an input": {"inputs": tensors(ids={"more": 1})},
    "int32": {"inputs": tensors(ids={"datatype": "INT32"})},
    "float ids": {"inputs": tensors(ids={"data": [2.5] * 10})},
    "text ids": {"inputs": tensors(ids={"data": ["2"] * 10})},
    "boolean ids": {"inputs": tensors(ids={"data": [True] * 10})},
    "id -1": {"inputs": tensors(ids={"data": [-1, *[2] * 9]})},
    "id V": {"inputs": tensors(ids={"data": [600, *[2] * 9]})},
    "id V of a small feature": {"inputs": tensors(ids={"data": [2] * 9 + [6]})},
    "id 2^63": {"inputs": tensors(ids={"data": [HUGE, *[2] * 9]})},
    "id -2^63": {"inputs": tensors(ids={"data": [-HUGE, *[2] * 9]})},
    "id 2^64": {"inputs": tensors(ids={"data": [2 * HUGE, *[2] * 9]})},
    "a wide row": {"inputs": tensors(ids={"shape": [2, 6], "data": [2] * 12})},
    "rows of different length": {"inputs": tensors(ids={"data": [[2] * 5, [2] * 4]})},
    "one axis": {"inputs": tensors(ids={"shape": [10]})},
    "no axes": {"inputs": tensors(ids={"shape": []})},
    "negative shape": {"inputs": tensors(ids={"shape": [-2, -5]})},
    "shape whose product overflows": {"inputs": tensors(ids={"shape": [2**62, 2**62]})},
    "shape of zeros": {"inputs": tensors(0)},
    "too many rows": {"inputs": tensors(60)},
    "fewer numbers": {"inputs": tensors(dense={"data": [0.5]})},
    "no numbers": {"inputs": [tensors()[0], tensors()[2]]},
    "numbers for other rows": {"inputs": [tensors()[0], tensors(3)[1]]},
    "float64": {"inputs": tensors(dense={"datatype": "FP64"})},
    "a number that no float32 holds": {"inputs": tensors(dense={"data": [1e39, 0.0]})},
    "an input twice": {"inputs": [*tensors(), tensors()[0]]},
    "an input that is not there": {
        "inputs": [*tensors(), {"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]
    },
    "no data": {"inputs": [{"name": "ids", "shape": [2, 5], "datatype": "INT64"}, *tensors()[1:]]},
    "three domains for two rows": {"inputs": tensors(domain={"shape": [3], "data": ["web"] * 3})},
    "a domain that is a number": {"inputs": tensors(domain={"data": [1]})},
    "a domain told twice": {"inputs": tensors(), "parameters": {"domain": "web"}},
    "a long domain": {"inputs": tensors(domain={"data": ["d" * 201]})},
    "a long domain of one row": {"inputs": tensors(domain={"shape": [2], "data": ["web", "d" * 201]})},
    "a long id": {"inputs": tensors(), "id": "i" * 201},
    "many rows of nothing": {"inputs": tensors(ids={"shape": [2**62, 0], "data": []})},
    "no rows of much": {"inputs": tensors(ids={"shape": [0, 2**62], "data": []})},
    "a unit that is a number": {"inputs": tensors(), "parameters": {"unit": 7}},
    "an output that is not there": {"inputs": tensors(), "outputs": [{"name": "x"}]},
    "an output twice": {"inputs": tensors(), "outputs": [{"name": "logit"}, {"name": "logit"}]},
    "classes": {"inputs": tensors(), "outputs": [{"name": "logit", "parameters": {"classification": 2}}]},
    "a flag that is none": {"inputs": tensors(), "parameters": {"binary_data_output": "yes"}},
    "binary data that is not there": {"inputs": tensors(dense={"data": None, "parameters": {"binary_data_size": 8}})},
    "a size that is no number": {"inputs": tensors(ids={"parameters": {"binary_data_size": "80"}})},
    "a size below zero": {"inputs": tensors(ids={"parameters": {"binary_data_size": -8}})},
    "deep": b'{"inputs": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "deep data": json.dumps({"inputs": tensors()}).encode().replace(b"[2, 2", b"[" * 10_000 + b"2, 2", 1),
    "a huge integer": json.dumps({"inputs": tensors()}).encode().replace(b"[2, 5]", b"[2, " + b"9" * 10_000 + b"]"),
    "a field twice": b'{"inputs": [], "inputs": ' + json.dumps(tensors()).encode() + b"}",
    "no UTF-8": b'{"inputs": [], "id": "\xff\xfe"}',
    "half a surrogate pair": b'{"inputs": [], "id": "\\ud800"}',
    "nothing": b"",
    "no JSON": b"ids=1",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_valid_is_refused_with_a_reason(strict, name):
    status, told = strict.json("POST", URL, BAD[name])
    assert 400 <= status < 500, told
    assert told["error"]


def binary(ids=None, dense=None, domain=b"\x03\0\0\0web", sizes=()):
    """A request with binary data, and the length of its JSON; sizes that are told may be others."""
    parts = {
        "ids": np.full((2, 5), 2, "<i8").tobytes() if ids is None else ids,
        "dense": np.zeros((2, 1), "<f4").tobytes() if dense is None else dense,
        "domain": domain,
    }
    told = [{key: value for key, value in each.items() if key != "data"} for each in tensors()]
    for each in told:
        each["parameters"] = {"binary_data_size": dict(sizes).get(each["name"], len(parts[each["name"]]))}
    text = json.dumps({"inputs": told}).encode()
    return text + b"".join(parts.values()), len(text)


@pytest.mark.parametrize(
    "parts",
    [
        {"ids": b""},
        {"ids": b"\0" * 79},
        {"ids": b"\xff" * 80},
        {"ids": np.full(10, 600, "<i8").tobytes()},
        {"ids": np.full(10, 2, ">i8").tobytes()},
        {"dense": np.array([np.nan, 0], "<f4").tobytes()},
        {"dense": np.array([0, np.inf], "<f4").tobytes()},
        {"domain": b""},
        {"domain": b"\x09\0\0\0web"},
        {"domain": b"\xff\xff\xff\xffweb"},
        {"domain": b"\x02\0\0\0\xff\xfe"},
        {"domain": b"\x01\0\0\0a\x01\0\0\0b"},
        {"domain": b"\x01\0"},
        {"sizes": {"ids": 72}},
        {"sizes": {"dense": 10**18}},
        {"sizes": {"domain": 8}},
    ],
)
def test_binary_data_that_is_not_what_is_told_is_refused(strict, parts):
    body, length = binary(**parts)
    status, told = strict.json("POST", URL, body, **{LENGTH: str(length)})
    assert status == 400, told


@pytest.mark.parametrize("length", ["-1", "1e3", "", "99999999", "9" * 400, "10", "0", "\u0663"])
def test_a_length_of_the_json_that_cannot_be_is_refused(strict, length):
    body, _ = binary()
    status, told = strict.json("POST", URL, body, **{LENGTH: length})
    assert status == 400, told


@pytest.mark.parametrize("more", [b"x", b"\0" * 80])
def test_a_body_ends_where_its_inputs_end(strict, more):
    body, length = binary()
    assert strict.ask("POST", URL, body, **{LENGTH: str(length)})[0] == 200
    for wrong in (body + more, body[: -len(more)]):
        assert strict.ask("POST", URL, wrong, **{LENGTH: str(length)})[0] == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", URL, 405),
        ("PUT", URL, 405),
        ("POST", "/v2/models/ads", 405),
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v2/models/ads.tv/infer", 404),
        ("POST", "/v2/models/ads/versions/2/infer", 404),
        ("POST", "/v2/models/ads/versions//infer", 404),
        ("POST", "/v2/models/ads/versions/-1/infer", 404),
        ("GET", "/v2/models/", 404),
        ("GET", "/v2/models/" + "x" * 9_000, 404),
        ("GET", "/v2/nothing", 404),
        ("GET", "/", 404),
    ],
)
def test_other_addresses(strict, method, path, status):
    found, _, body = strict.ask(method, path, {"inputs": tensors()})
    assert found == status, body


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.just("web")
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(["name", "x", "data"]), inner, max_size=3)
    ),
    max_leaves=8,
)
CHANGES = st.dictionaries(
    st.sampled_from(["name", "shape", "datatype", "parameters", "data", "more"]),
    VALUES | st.sampled_from(["ids", "INT64", [2, 5], {"binary_data_size": 80}]),
    max_size=2,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["ids", "dense", "domain"]), CHANGES, st.dictionaries(st.sampled_from(["id", "outputs"]), VALUES)
)
def test_no_json_breaks_the_server(strict, name, changes, more):
    body = json.dumps({"inputs": tensors(**{name: changes}), **more}).encode()
    assert strict.ask("POST", URL, body)[0] < 500


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_bytes_break_the_server(strict, data):
    """A valid binary request with some bytes changed, and a length that may be wrong."""
    body, length = binary()
    changed = bytearray(body)
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255)), max_size=6)):
        changed[place] = byte
    cut = data.draw(st.integers(0, len(body)) | st.just(len(body)))
    told = data.draw(st.integers(0, len(body) + 1) | st.just(length))
    assert strict.ask("POST", URL, bytes(changed[:cut]), **{LENGTH: str(told)})[0] < 500


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=300))
def test_no_noise_breaks_the_server(strict, body):
    assert 400 <= strict.ask("POST", URL, body)[0] < 500
