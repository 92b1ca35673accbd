"""The console's documents and files; what a browser makes of them is in tests/browser."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from scipy import stats

from domlora.abtest.experiments import Arm, Experiment
from domlora.abtest.registry import Registry
from domlora.bundle import Bundle
from domlora.errors import BundleError, DataError
from domlora.serving.console import export_page, routes
from domlora.serving.console.calibration import calibration
from domlora.serving.console.figures import Figures
from domlora.serving.console.handlers import document
from domlora.serving.console.page import STATIC, policy
from domlora.serving.export import export
from domlora.serving.http.answers import Answer, NotFoundError, Request
from domlora.serving.http.metrics import Metrics
from domlora.serving.http.service import Service
from domlora.serving.live import Live
from domlora.serving.pack import adapter_payload
from domlora.serving.settings import Settings
from domlora.serving.store import Store

JUDGED = {"auc": 0.71, "standard_error": 0.01, "rarer": 400.0, "mean_score": 0.2}


class World(NamedTuple):
    """A bundle of four versions, the third of which is served."""

    bundle: Path
    store: Store
    service: Service


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.unit.serving.conftest import make_bundle, make_rows

    folder = tmp_path_factory.mktemp("console")
    place = folder / "live"
    bundle = make_bundle(adapters={"temperature": 4.0, "include": ["tower.*"]})
    bundle.facts = {"method": "joint", "data": "3f9a", "valid": 0.71, "auc": {"app": JUDGED, "web": JUDGED}}
    bundle.save(place)
    bundle.facts |= {"onboarded": {"mail": {"chosen": "base"}}}
    bundle.publish(place)
    gate = {"passed": True, "reasons": [], "warnings": ["mail: 3 clicks"], "domains": [], "wauc": [0.1, 0.2]}
    bundle.facts |= {"method": "update", "data": "77ab", "gate": gate}
    bundle.publish(place)
    bundle.facts |= {"data": "90bb", "gate": {**gate, "passed": False, "reasons": ["app: AUC falls"]}}
    bundle.publish(place, default=False)
    served = Bundle.open(place, version=3)
    export(served, folder / "exported", [make_rows(50)])
    store = Store.create(folder / "live.store")
    store.add_version(folder / "exported")
    return folder


@pytest.fixture
def world(made: Path) -> World:
    store = Store.open(made / "live.store")
    live = Live(store, name="live")
    service = Service(live=live, settings=Settings(bundle=made / "live"), metrics=Metrics())
    return World(made / "live", store, service)


def ask(service: Service, path: str, **headers: str) -> Answer:
    table = routes()
    handler = table.get(path) or next(table[each] for each in table if each.endswith("/") and path.startswith(each))
    told = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return handler(service, Request("GET", path, {}, told, b"", 0.0))


def count(metrics: Metrics) -> None:
    for _ in range(10):
        metrics.answered("score", 200, "app", 40, 0.002)
        metrics.scored("app", 8.0, 40)
    metrics.answered("score", 400, "web", 0, 0.001)
    metrics.observed("app", 130.0, 100.0, 400)
    metrics.unknown_ids("city", 20)
    metrics.unknown_ids("past", 60)
    metrics.unknown_domain(3)


def test_lineage_says_what_each_version_added(world: World) -> None:
    told = document(world.service, "overview")
    assert (told["bundle"], told["model"], told["backbone"], told["num_domains"]) == ("3", "live", "mlp", 3)
    one, two, three, four = told["versions"]
    assert [each["parent"] for each in (one, two, three, four)] == [None, 1, 2, 3]
    assert [each["live"] for each in (one, two, three, four)] == [False, False, True, False]
    assert [each["exported"] for each in (one, two, three, four)] == [False, False, True, False]
    assert (two["method"], two["onboarded"], two["gate"]) == ("onboard", ["mail"], None)
    assert (three["method"], three["onboarded"], three["gate"]["warnings"]) == ("update", [], ["mail: 3 clicks"])
    assert three["default"]
    assert not four["default"]
    assert four["gate"]["reasons"] == ["app: AUC falls"]
    assert one["written"] == {"adapters": 3, "base": 1, "encoder": 1}


def test_versions_of_a_store_without_its_bundle(world: World) -> None:
    settings = dataclasses.replace(world.service.settings, bundle=world.store.folder)
    service = Service(live=world.service.live, settings=settings, metrics=Metrics())
    (only,) = document(service, "overview")["versions"]
    assert (only["version"], only["live"], only["method"], only["data"], only["parent"]) == (
        3,
        True,
        "update",
        "77ab",
        None,
    )
    assert [line["name"] for line in document(service, "versions/3")["auc"]] == ["app", "web"]


def test_a_damaged_record_is_left_out(world: World, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "versions").mkdir(parents=True)
    (bundle / "manifest.json").write_bytes((world.bundle / "manifest.json").read_bytes())
    for number in (1, 3):
        text = (world.bundle / "versions" / f"{number}.json").read_text()
        (bundle / "versions" / f"{number}.json").write_text(text.replace("joint", "forged") if number == 1 else text)
    settings = dataclasses.replace(world.service.settings, bundle=bundle)
    service = Service(live=world.service.live, settings=settings, metrics=Metrics())
    assert [line["version"] for line in document(service, "overview")["versions"]] == [3]


def test_figures_of_a_version(world: World) -> None:
    assert document(world.service, "versions/1")["auc"] == [{"name": name, **JUDGED} for name in ("app", "web")]
    assert document(world.service, "versions/9")["auc"] == []


def test_domains_have_their_adapters_and_counters(world: World) -> None:
    count(world.service.metrics)
    lines = {line["name"]: line for line in document(world.service, "domains")["domains"]}
    assert list(lines) == ["app", "web", "mail"]
    app = lines["app"]
    assert (app["version"], app["rank"], app["pinned"]) == ("3", 4, False)
    assert (app["requests"], app["rows"], app["failed"]) == (10, 400, 0)
    assert app["mean_score"] == pytest.approx(0.2)
    assert (app["predicted"], app["observed"], app["matched"]) == (130, 100, 400)
    assert (lines["web"]["requests"], lines["web"]["failed"], lines["web"]["mean_score"]) == (1, 1, None)


def test_a_pushed_adapter_shows_at_once(made: Path, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    store.add_version(made / "exported")
    service = Service(live=Live(store, name="m"), settings=Settings(bundle=store.folder), metrics=Metrics())
    store.put_adapter("app", adapter_payload(Bundle.open(made / "live"), "app", version="new"), pinned=True)
    assert service.refresh()
    lines = {line["name"]: line for line in document(service, "domains")["domains"]}
    assert (lines["app"]["version"], lines["app"]["pinned"], lines["app"]["rank"]) == ("new", True, 4)
    assert (lines["web"]["version"], lines["web"]["pinned"]) == ("3", False)


def test_drift(world: World) -> None:
    count(world.service.metrics)
    told = document(world.service, "drift")
    app, web, mail = told["domains"]
    assert (app["verdict"], app["ratio"], app["reference"]) == ("high", 1.3, 0.2)
    assert (web["verdict"], web["ratio"]) == ("few", None)
    assert mail["reference"] is None
    features = {line["name"]: line for line in told["features"]}
    assert set(features) == {"item", "past", "city"}
    assert (features["city"]["share"], features["city"]["exact"]) == (0.05, True)
    assert (features["past"]["share"], features["past"]["exact"], features["past"]["num_words"]) == (0.05, False, 598)
    assert told["unknown_domain_rows"] == 3


def test_the_form_has_a_field_for_each_column(world: World) -> None:
    told = document(world.service, "schema")
    columns = {column["name"]: column for column in told["columns"]}
    assert {name: column["kind"] for name, column in columns.items()} == {
        "item": "text",
        "past": "list",
        "city": "text",
        "age": "number",
    }
    assert [name for name, column in columns.items() if column["varies"]] == ["item"]
    assert (columns["item"]["num_words"], len(columns["item"]["words"])) == (598, 100)
    assert columns["city"]["words"] == ["c0", "c1", "c2", "c3"]
    assert told["domains"] == ["app", "mail", "web"]


def test_experiments_are_listed_with_those_that_run_first(world: World, tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "experiments")
    for name in ("a", "b"):
        registry.create(Experiment(name, (Arm("now"), Arm("base", adapters=False)), share=((0.0, 0.5),)))
    registry.start("b", now_s=1e9)
    service = dataclasses.replace(world.service, registry=registry)
    one, two = document(service, "experiments")["experiments"]
    assert (one["name"], one["status"], one["share"], two["name"], two["status"]) == ("b", "running", 0.5, "a", "draft")
    assert one["arms"][1] == {"name": "base", "weight": 1.0, "version": None, "adapters": False}
    assert document(service, "experiments/a")["experiment"]["name"] == "a"
    for unknown in ("c", "../b", ""):
        with pytest.raises(NotFoundError):
            document(service, f"experiments/{unknown}")
    assert document(world.service, "experiments")["experiments"] == []


@pytest.mark.parametrize("observed", [5, 20, 100, 10_000])
def test_intervals_are_those_of_exact_poisson_counts(observed: int) -> None:
    found = calibration(50.0, observed)
    low, high = stats.chi2.ppf(0.005, 2 * observed) / 2, stats.chi2.ppf(0.995, 2 * observed + 2) / 2
    assert found.low == pytest.approx(50 / high, rel=0.01)
    assert found.high == pytest.approx(50 / low, rel=0.03)


def test_calibration_without_events() -> None:
    assert calibration(0.0, 0.0) == (None, 0.0, None, "few")
    assert calibration(40.0, 0.0)[:3] == (None, pytest.approx(40 / stats.chi2.ppf(0.995, 2) * 2, rel=0.02), None)
    assert calibration(40.0, 0.0).verdict == "high"
    assert calibration(1e6, 1.05e6).verdict == "fine"
    assert calibration(100.0, 200.0).verdict == "low"


def test_figures_read_any_name() -> None:
    names = ['a "b" {c} \\n', "line\nbreak", "käse, 1", 'x"} 7']
    metrics = Metrics()
    metrics.know(names)
    for number, name in enumerate(names, start=1):
        metrics.answered("score", 200, name, number, 0.001)
    assert Figures.read(metrics.expose().decode()).by("rows", "domain") == dict(zip(names, [1, 2, 3, 4], strict=True))


def test_quantiles_lie_within_their_buckets() -> None:
    metrics = Metrics()
    for seconds in [0.0008] * 50 + [0.004] * 45 + [9.0] * 5:
        metrics.answered("score", 200, None, 1, seconds)
    metrics.answered("metrics", 200, None, 0, 5.0)
    figures = Figures.read(metrics.expose().decode())
    found = figures.quantiles(["score"], {"p25": 0.25, "p90": 0.9, "p99": 0.99})
    assert found == {"p25": pytest.approx(0.00075), "p90": pytest.approx(0.0047, abs=1e-4), "p99": 2.5}
    assert figures.quantiles(["infer"], {"p50": 0.5}) is None


def test_every_file_of_the_page_has_an_address(world: World) -> None:
    index = ask(world.service, "/console/").body.decode()
    modules = json.loads(re.findall(r'<script type="importmap">(.*?)</script>', index, re.DOTALL)[0])["imports"]
    assert set(modules.values()) == {f"./{path.relative_to(STATIC).as_posix()}" for path in STATIC.rglob("*.js")}
    for place in ["console.css", *(name.removeprefix("./") for name in modules.values())]:
        answer = ask(world.service, f"/console/{place}")
        assert (answer.status, answer.body) == (200, (STATIC / place).read_bytes())
        assert answer.content_type == ("text/css" if place.endswith("css") else "text/javascript") + "; charset=utf-8"


def test_the_page_is_guarded_and_kept(world: World) -> None:
    answer = ask(world.service, "/console/")
    headers = dict(answer.headers)
    rules = headers[b"content-security-policy"].decode()
    assert rules.startswith("default-src 'none'")
    assert "unsafe" not in rules
    for script in re.findall(r"<script[^>]*>(.*?)</script>", answer.body.decode(), re.DOTALL):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in rules
    again = ask(world.service, "/console/", if_none_match=headers[b"etag"].decode())
    assert (again.status, again.body) == (304, b"")
    assert dict(ask(world.service, "/console").headers)[b"location"] == b"console/"


@pytest.mark.parametrize(
    "path", ["/console/none.js", "/console/../page.py", "/v1/console/none", "/v1/console/versions/x"]
)
def test_what_is_not_there(world: World, path: str) -> None:
    assert ask(world.service, path).status == 404


def test_no_file_names_another_host() -> None:
    for path in STATIC.rglob("*.*"):
        if path.suffix != ".LICENSE" and path.suffix != ".md":
            hosts = re.findall(r"https?://([a-z0-9.-]+)", path.read_text(encoding="utf-8"))
            assert set(hosts) <= {"www.w3.org"}, path.name


def test_a_saved_page_holds_all_and_loads_nothing(world: World, tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "experiments")
    registry.create(Experiment("wide", (Arm("now"), Arm("base", adapters=False))))
    service = dataclasses.replace(world.service, registry=registry)
    export_page(service, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    saved = json.loads(re.findall(r'<script type="application/json" id="saved">(.*?)</script>', page)[0])
    assert {"overview", "domains", "drift", "schema", "experiments", "experiments/wide", "versions/1"} <= set(saved)
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)
    rules = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[0]
    assert "connect-src" not in rules
    assert "default-src 'none'" in rules


def test_a_saved_page_escapes_what_it_holds(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nasty = "</script><script>alert(1)</script>"
    live = world.service.live
    monkeypatch.setattr(live, "_name", nasty)
    object.__setattr__(live.current, "name", nasty)
    export_page(world.service, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert nasty not in page
    saved = re.findall(r'<script type="application/json" id="saved">(.*?)</script>', page)[0]
    assert json.loads(saved)["overview"]["model"] == nasty


def test_a_saved_page_of_a_folder(made: Path, tmp_path: Path) -> None:
    export_page(made / "live.store", tmp_path / "page.html")
    assert b'"bundle":"3"' in (tmp_path / "page.html").read_bytes()
    with pytest.raises(BundleError):
        export_page(tmp_path / "nowhere", tmp_path / "page.html")
    with pytest.raises(DataError, match="No such file"):
        export_page(made / "live.store", tmp_path / "nowhere" / "page.html")


def test_the_console_needs_no_torch() -> None:
    code = "import sys, domlora.serving.console; print(sorted({'torch', 'numba', 'duckdb', 'pyarrow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_policy_of_a_page_is_made_once() -> None:
    assert policy() is policy()
