"""Raw values in, the model's probabilities out, whatever the form; experiments; and no body that breaks the server."""

from __future__ import annotations

import copy
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domlora.abtest.experiments import Arm, Experiment
from domlora.abtest.log import EventLog
from domlora.abtest.registry import Registry
from domlora.adapters.attach import detach_
from domlora.bundle import Bundle
from domlora.features.encode import Encoder
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model
from domlora.serving.export import export
from domlora.serving.pack import random_rows
from domlora.serving.store import Store

URL = "/v1/score"
REQUEST = {"past": ["i1", "i2", "never seen", "i4"], "city": "c1"}
CANDIDATES = [{"item": f"i{number}", "age": number / 2} for number in range(10)]
ASKED = {"domain": "web", "request": REQUEST, "candidates": CANDIDATES}


def logits_of(made, rows, *, base=False):
    """What the model says of raw rows, encoded as preparation encodes them."""
    batch = made.bundle.encoder.encode({name: [row[name] for row in rows] for name in rows[0]})
    model = detach_(copy.deepcopy(made.bundle.model)) if base else made.bundle.model
    with torch.no_grad():
        return model.eval()(batch.ids, batch.dense, batch.domain).numpy()


def probability_of(made, rows, **options):
    return 1 / (1 + np.exp(-logits_of(made, rows, **options)))


def whole(domain="web"):
    """Each candidate as a row of its own."""
    return [{**REQUEST, **candidate, "domain": domain} for candidate in CANDIDATES]


FORMS = {
    "candidates": ASKED,
    "columns": {**ASKED, "candidates": {name: [each[name] for each in CANDIDATES] for name in ("item", "age")}},
    "rows": {"rows": whole()},
    "rows of one domain": {
        "domain": "web",
        "rows": [{k: v for k, v in row.items() if k != "domain"} for row in whole()],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gets_the_models_probabilities(client, adapted, form):
    status, told = client.json("POST", URL, FORMS[form])
    assert status == 200, told
    assert np.abs(np.array(told["probability"]) - probability_of(adapted, whole())).max() <= 1e-6
    assert (told["bundle"], told["adapters"], told["arms"]) == ("1", {"web": "1"}, {})


def test_an_answer_says_what_made_it(client):
    _, headers, body = client.ask("POST", URL, ASKED, x_request_id="r-7")
    said = {name: headers[f"x-domlora-{name}"] for name in ("bundle", "adapter", "domain")}
    assert said == {"bundle": "1", "adapter": "1", "domain": "web"}
    assert json.loads(body)["request_id"] == headers["x-request-id"] == "r-7"
    ids = {client.json("POST", URL, ASKED)[1]["request_id"] for _ in range(20)}
    assert len(ids) == 20


def test_rows_of_many_domains(client, adapted):
    rows = [{**row, "domain": name} for row, name in zip(whole(), ["app", "web", None, "mail", "tv"] * 2, strict=True)]
    status, told = client.json("POST", URL, {"rows": rows})
    assert status == 200
    assert np.abs(np.array(told["probability"]) - probability_of(adapted, rows)).max() <= 1e-6
    assert told["adapters"] == {"app": "1", "web": "1", "mail": "1"}


@pytest.mark.parametrize("domain", ["web", None])
def test_explained_is_the_adapters_share(client, adapted, domain):
    told = client.json("POST", URL, {**ASKED, "domain": domain, "explain": True})[1]["explain"]
    own, base = logits_of(adapted, whole(domain)), logits_of(adapted, whole(), base=True)
    assert np.abs(np.array(told["logit"]) - own).max() <= 1e-5
    assert np.abs(np.array(told["base_logit"]) - base).max() <= 1e-5
    assert np.abs(np.array(told["adapter_logit"]) - (own - base)).max() <= 2e-5
    assert (np.abs(told["adapter_logit"]).max() > 0.01) == (domain is not None)


@pytest.mark.parametrize(
    ("value", "same"), [("7", 7), (" i7 ", "i7"), (None, ""), (True, 1), (7.0, 7), ("\u00e9", "never seen")]
)
def test_values_are_those_of_preparation(client, adapted, value, same):
    rows = [{**whole()[0], "item": each} for each in (value, same)]
    found = client.json("POST", URL, {"rows": rows})[1]["probability"]
    assert found[0] == found[1]
    assert np.abs(np.array(found) - probability_of(adapted, rows)).max() <= 1e-6


def made_with(tmp_path, schema, words):
    bundle = Bundle(
        build_model(schema=schema, name="mlp", hidden_units=[8]),
        {"name": "mlp", "hidden_units": [8]},
        Encoder(schema, words),
    )
    export(bundle, tmp_path / "program", [random_rows(schema, 20)])
    store = Store.create(tmp_path / "store")
    store.add_version(tmp_path / "program")
    return bundle, store


def test_a_domain_that_is_a_feature_and_a_cross_of_both_sides(tmp_path, client_of):
    """The domain is told once and is a feature too; a crossed feature takes one column of the request, one of the rows."""
    schema = Schema(
        (Feature("item", num_ids=4), Feature("pair", columns=("city", "item"), num_ids=12, hash_buckets=10)),
        domains=("app", "web"),
        domain="place",
    )
    schema = Schema((*schema.features, Feature("place", num_ids=4)), schema.domains, "place")
    bundle, store = made_with(tmp_path, schema, {"item": ["a", "b"], "place": ["app", "web"]})
    client = client_of(store)
    rows = [{"item": item, "city": "x", "place": "web"} for item in "abc"]
    arrays = bundle.encoder.encode({name: [row[name] for row in rows] for name in rows[0]})
    with torch.no_grad():
        logit = bundle.model.eval()(arrays.ids, arrays.dense, arrays.domain).numpy()
    candidates = {"item": ["a", "b", "c"]}
    forms = [
        {"domain": "web", "request": {"city": "x"}, "candidates": candidates},
        {"request": {"city": "x", "place": "web"}, "candidates": candidates},
        {"rows": rows},
    ]
    for form in forms:
        status, told = client.json("POST", URL, form)
        assert status == 200, told
        assert np.abs(np.array(told["probability"]) - 1 / (1 + np.exp(-logit))).max() <= 1e-6


def test_a_domain_of_two_columns(tmp_path, client_of):
    schema = Schema((Feature("item", num_ids=4),), domains=("home/1", "home/2"), domain="page/slot")
    _, store = made_with(tmp_path, schema, {"item": ["a", "b"]})
    client = client_of(store, unknown_domain="error")
    for form in (
        {"rows": [{"item": "a", "page": "home", "slot": 2}]},
        {"domain": "home/2", "rows": [{"item": "a"}]},
        {"request": {"page": "home", "slot": 2}, "candidates": {"item": ["a"]}},
    ):
        assert client.ask("POST", URL, form)[1]["x-domlora-domain"] == "home/2"
    assert client.json("POST", URL, {"rows": [{"item": "a", "page": "home", "slot": 3}]})[0] == 404


@pytest.mark.parametrize(("policy", "status"), [("base", 200), ("error", 404), ("mail", 200)])
@pytest.mark.parametrize("domain", ["tv", None, ""])
def test_a_domain_that_is_not_known_is_answered_as_the_policy_says(client_of, adapted, policy, status, domain):
    found, told = client_of(unknown_domain=policy).json("POST", URL, {**ASKED, "domain": domain})
    assert found == status
    if status == 200:
        expected = probability_of(adapted, whole("mail" if policy == "mail" else None))
        assert np.abs(np.array(told["probability"]) - expected).max() <= 1e-6


def test_values_that_training_did_not_have_are_counted_or_refused(client_of):
    client = client_of()
    client.ask("POST", URL, ASKED)
    assert 'domlora_unknown_ids_total{feature="past"} 10.0' in client.ask("GET", "/metrics")[2].decode()
    status, told = client_of(unknown_ids="error").json("POST", URL, ASKED)
    assert (status, "past" in told["error"]) == (400, True)


def row(**changes):
    return {"rows": [{**whole()[0], **changes}]}


def without(name):
    return {"rows": [{key: value for key, value in whole()[0].items() if key != name}]}


BAD = {
    "nothing": {},
    "no object": [],
    "no rows": {"rows": []},
    "no candidates": {**ASKED, "candidates": []},
    "candidates without columns": {**ASKED, "candidates": {}},
    "too many": {**ASKED, "candidates": CANDIDATES * 6},
    "rows and candidates": {**ASKED, "rows": whole()},
    "request and rows": {"request": REQUEST, "rows": whole()},
    "a field that is not there": {**ASKED, "more": 1},
    "a feature that is not there": row(colour="red"),
    "a feature missing": without("city"),
    "a feature missing in one row": {"rows": [whole()[0], *without("city")["rows"]]},
    "a feature more in one row": {"rows": [whole()[0], *row(colour="red")["rows"]]},
    "a feature on both sides": {**ASKED, "request": {**REQUEST, "item": "i1"}},
    "columns of different length": {**ASKED, "candidates": {"item": ["i1", "i2"], "age": [1]}},
    "a list in place of a value": row(city=["c1"]),
    "an object in place of a value": row(city={"c": 1}),
    "an object in a sequence": row(past=[{"a": 1}]),
    "text in place of a number": row(age="old"),
    "a list in place of a number": row(age=[1]),
    "a number too long to be written": json.dumps(row(city=1))
    .encode()
    .replace(b'"city": 1', b'"city": ' + b"1" * 5_000),
    "a number that no float64 holds": json.dumps(row(age=1)).encode().replace(b'"age": 1', b'"age": 1e999'),
    "not a number": json.dumps(row(age=float("nan"))).encode(),
    "a domain that is a list": {**ASKED, "domain": ["web"]},
    "a row's long domain": {"rows": [{**each, "domain": "d" * 201} for each in whole()]},
    "a row's domain that is a list": row(domain=["web"]),
    "a unit that is a list": {**ASKED, "unit": ["u"]},
    "a long unit": {**ASKED, "unit": "u" * 1_000},
    "a long domain": {**ASKED, "domain": "d" * 201},
    "too few items": {**ASKED, "items": ["i1"]},
    "a feature twice": json.dumps(ASKED).encode().replace(b'"city": "c1"', b'"city": "c1", "city": "c2"'),
    "a feature twice in a candidate": json.dumps(ASKED)
    .encode()
    .replace(b'"item": "i1"', b'"item": "i1", "item": "i2"'),
    "deep": b'{"rows": [{"item": ' + b"[" * 10_000 + b"]" * 10_000 + b"}]}",
    "no UTF-8": b'{"rows": [{"item": "\xff"}]}',
    "half a surrogate pair": json.dumps(row(city="\ud800")).encode(),
    "empty": b"",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_valid_is_refused_with_a_reason(strict, name):
    status, told = strict.json("POST", URL, BAD[name])
    assert status == 400, told
    assert told["error"]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6) | st.just("i7"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.fixed_dictionaries(dict.fromkeys(("item", "past", "city", "age"), VALUES), optional={"domain": VALUES})


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(st.sampled_from(["domain", "unit", "request", "items", "explain", "candidates", "rows"]), VALUES),
    st.lists(ROWS, max_size=3),
)
def test_no_json_breaks_the_server(strict, changes, rows):
    for asked in ({"rows": rows, **changes}, {**ASKED, **changes}):
        assert strict.ask("POST", URL, json.dumps(asked).encode())[0] < 500


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 370), st.integers(0, 255)), max_size=6), st.integers(0, 500))
def test_no_bytes_break_the_server(strict, changes, cut):
    body = bytearray(json.dumps(ASKED).encode())
    for place, byte in changes:
        body[place] = byte
    assert strict.ask("POST", URL, bytes(body[: max(cut, 100)]))[0] < 500


@pytest.fixture
def tested(ads_store, client_of, tmp_path):
    """Serves with experiments and a log."""

    def make(*experiments):
        registry = Registry.open(tmp_path / "experiments")
        for experiment in experiments:
            registry.create(experiment)
            registry.start(experiment.name)
        log = EventLog(tmp_path / "log", flush_s=60.0)
        return client_of(registry=registry, log=log)

    return make


def exposures(client, tmp_path):
    assert client.service.log.flush()
    return pq.read_table(tmp_path / "log" / "exposures").to_pylist()


def units_of(client, arms, experiment="e"):
    """A unit of each arm."""
    found = {}
    for number in range(200):
        told = client.json("POST", URL, {**ASKED, "unit": f"u{number}"})[1]
        found.setdefault(told["arms"][experiment], f"u{number}")
        if len(found) == arms:
            return found
    raise AssertionError(found)


def test_an_arm_without_adapters_is_the_base(tested, adapted, tmp_path):
    client = tested(Experiment("e", (Arm("now"), Arm("plain", adapters=False))))
    units = units_of(client, 2)
    for arm, domain in (("now", "web"), ("plain", None)):
        _, headers, body = client.ask("POST", URL, {**ASKED, "unit": units[arm], "items": list(range(10))})
        told = json.loads(body)
        assert np.abs(np.array(told["probability"]) - probability_of(adapted, whole(domain))).max() <= 1e-6
        assert (headers["x-domlora-arm"], told["arms"]) == (f"e={arm}", {"e": arm})
        logged = [line for line in exposures(client, tmp_path) if line["request_id"] == told["request_id"]]
        assert [line["row"] for line in logged] == list(range(10))
        assert [line["item"] for line in logged] == [str(number) for number in range(10)]
        said = [{"unit": units[arm], "domain": "web", "experiment": "e", "arm": arm, "bundle": "1"}]
        assert [{key: line[key] for key in said[0]} for line in logged] == said * 10
        assert np.allclose([line["probability"] for line in logged], told["probability"])


def test_an_arm_of_another_version_is_that_version_with_its_own_words(tested, adapted, next_day):
    client = tested(Experiment("e", (Arm("now"), Arm("next", version=2))))
    units = units_of(client, 2)
    candidates = [{"item": item, "age": 1.0} for item in ("new3", "i298", "i5")]
    rows = [{**REQUEST, **each, "domain": "web"} for each in candidates]
    for arm, made, bundle in (("now", adapted, "1"), ("next", next_day, "2")):
        _, told = client.json("POST", URL, {**ASKED, "candidates": candidates, "unit": units[arm]})
        assert told["bundle"] == bundle
        assert np.abs(np.array(told["probability"]) - probability_of(made, rows)).max() <= 1e-6
    assert client.json("GET", "/v2/models/ads")[1]["versions"] == ["1", "2"]
    assert client.json("GET", "/v2/models/ads/versions/2")[0] == 200


def test_rows_of_many_domains_in_an_experiment_on_one(tested, adapted, next_day, tmp_path):
    """Rows of that domain are answered by the arm's version, the others by the live one, each logged at its place."""
    client = tested(Experiment("e", (Arm("now"), Arm("next", version=2)), domains=("web",)))
    unit = units_of(client, 2)["next"]
    rows = [{**row, "domain": name} for row, name in zip(whole(), ["app", "web", "mail", "web", None] * 2, strict=True)]
    _, told = client.json("POST", URL, {"rows": rows, "unit": unit})
    of_next = np.array([row["domain"] == "web" for row in rows])
    expected = np.where(of_next, probability_of(next_day, rows), probability_of(adapted, rows))
    assert np.abs(np.array(told["probability"]) - expected).max() <= 1e-6
    assert (told["bundle"], told["arms"]) == ("1, 2", {"e": "next"})
    logged = [line for line in exposures(client, tmp_path) if line["request_id"] == told["request_id"]]
    by_row = {line["row"]: line for line in logged}
    assert sorted(by_row) == list(range(10))
    for number, row in enumerate(rows):
        line = by_row[number]
        in_it = row["domain"] == "web"
        assert (line["domain"], line["arm"], line["bundle"]) == (
            row["domain"],
            "next" if in_it else "",
            "2" if in_it else "1",
        )
        assert line["probability"] == pytest.approx(told["probability"][number], abs=1e-6)


def test_who_has_no_unit_is_in_no_experiment(tested, tmp_path):
    client = tested(Experiment("e", (Arm("now"), Arm("plain", adapters=False))))
    for unit in ({}, {"unit": None}, {"unit": ""}):
        assert client.json("POST", URL, {**ASKED, **unit})[1]["arms"] == {}
    assert client.service.log.pending == 0


def test_an_experiment_is_followed_when_it_starts_and_when_it_stops(tested):
    client = tested()
    asked = {**ASKED, "unit": "u1"}
    assert client.json("POST", URL, asked)[1]["arms"] == {}
    registry = client.service.registry
    registry.create(Experiment("e", (Arm("now"), Arm("plain", adapters=False))))
    registry.start("e")
    client.service.refresh()
    assert client.json("POST", URL, asked)[1]["arms"]
    registry.stop("e")
    client.service.refresh()
    assert client.json("POST", URL, asked)[1]["arms"] == {}


def test_a_version_is_let_go_when_no_request_is_led_to_it_any_more(tested):
    """Else a request in between would open it again, and all others wait for that."""
    client = tested(Experiment("e", (Arm("now"), Arm("next", version=2))))
    unit, service = units_of(client, 2)["next"], client.service
    let_go, routes = service.live.hold, []

    def hold(versions):
        routes.append(service.route("web", unit))
        let_go(versions)

    service.live.hold = hold
    service.registry.stop("e")
    service.refresh()
    assert [route.version for route in routes] == [None]


def test_an_experiment_of_a_version_that_cannot_be_read_is_left_out(tested):
    client = tested(
        Experiment("e", (Arm("now"), Arm("next", version=9))), Experiment("f", (Arm("a"), Arm("b")), layer="l")
    )
    told = client.json("POST", URL, {**ASKED, "unit": "u1"})[1]
    assert told["arms"].keys() == {"f"}
