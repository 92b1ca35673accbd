"""The files of ``deploy/`` say what this server understands: its settings, its routes, its times."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from domlora.serving.settings import PREFIX, Settings

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
DEPLOYMENT, KSERVE = DEPLOY / "kubernetes/server.yaml", DEPLOY / "kserve/inference_service.yaml"
KUBERNETES = "1.33"  # whose schemas
SUPERVISOR_S = 2.0  # what the supervisor waits beside drain and grace


def documents(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def pod_specs() -> Iterator[tuple[str, Any]]:
    deployment = next(each for each in documents(DEPLOYMENT) if each["kind"] == "Deployment")
    yield "kubernetes", deployment["spec"]["template"]["spec"]
    yield "kserve", documents(KSERVE)[0]["spec"]["predictor"]


SPECS = dict(pod_specs())
KSERVE_OWN = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "timeout"}


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> Any:
    return SPECS[request.param]


def told(spec: Any) -> dict[str, str]:
    return {each["name"]: each.get("value", "from a secret") for each in spec["containers"][0]["env"]}


@pytest.mark.parametrize("document", documents(DEPLOYMENT), ids=lambda document: document["kind"])
def test_kubernetes_takes_it(document: Any) -> None:
    from kubernetes_validate import validate

    validate(document, KUBERNETES, strict=True)


def test_kubernetes_takes_the_pod_of_kserve() -> None:
    """KServe hands on all but its own fields; those were compared with its resource definition by hand."""
    from kubernetes_validate import ValidationError, validate

    spec = {name: value for name, value in SPECS["kserve"].items() if name not in KSERVE_OWN}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "live"}, "spec": spec}
    validate(pod, KUBERNETES, strict=True)
    with pytest.raises(ValidationError):
        validate({**pod, "spec": {**spec, "containerz": []}}, KUBERNETES, strict=True)


def test_variables_are_settings(spec: Any) -> None:
    ours = {name: value for name, value in told(spec).items() if name.startswith(PREFIX)}
    known = {PREFIX + name.upper() for name in Settings.__dataclass_fields__}
    assert ours.keys() <= known
    settings = Settings.told({}, {**ours, "DOMLORA_HOST": "0.0.0.0"})
    assert settings.store_url is not None
    assert settings.admin_allowed, "by a token, that is"


def test_probes_ask_routes_on_the_port(spec: Any, client_of: Any) -> None:
    container = spec["containers"][0]
    port = int(told(spec)["DOMLORA_PORT"])
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert set(ports.values()) == {port}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[name]["httpGet"]
        assert ports.get(asked["port"], asked["port"]) == port
        assert client_of().ask("GET", asked["path"])[0] == 200
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"


def test_a_pod_has_time_to_drain(spec: Any) -> None:
    settings = Settings.told({}, {name: value for name, value in told(spec).items() if name.startswith(PREFIX)})
    assert spec["terminationGracePeriodSeconds"] > settings.drain_s + settings.grace_s + SUPERVISOR_S
    probe = spec["containers"][0]["readinessProbe"]
    assert settings.drain_s > probe["periodSeconds"] * probe["failureThreshold"], "it must be seen that it is not ready"


def test_what_is_written_lies_on_volumes(spec: Any) -> None:
    """The root is read-only: the copy of the store, and the workers' counters in /tmp."""
    container = spec["containers"][0]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert set(mounts.values()) == {each["name"] for each in spec["volumes"]}
    assert {"/tmp", str(Path(told(spec)["DOMLORA_BUNDLE"]).parent)} == set(mounts)


def test_services_choose_the_pods() -> None:
    by_kind = {each["kind"]: each for each in documents(DEPLOYMENT)}
    labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert by_kind["Service"]["spec"]["selector"] == labels
    for kind in ("PodDisruptionBudget", "Deployment"):
        assert by_kind[kind]["spec"]["selector"]["matchLabels"] == labels
    assert by_kind["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert (
        by_kind["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
        == by_kind["Deployment"]["metadata"]["name"]
    )


def test_the_image_sets_what_there_is() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    variables = re.findall(rf"({PREFIX}[A-Z_]+)=", text)
    assert variables
    assert {name.removeprefix(PREFIX).lower() for name in variables} <= set(Settings.__dataclass_fields__)
    for name in re.findall(r"-r /source/(\S+)", text):
        assert (ROOT / name).is_file()
    uid = re.search(r"USER (\d+):", text)
    assert uid
    assert {spec["securityContext"]["runAsUser"] for spec in SPECS.values()} == {int(uid[1])}


@pytest.mark.parametrize("name", ["nginx/nginx.conf", "haproxy/haproxy.cfg"])
def test_balancers_know_routes_and_times(name: str, client_of: Any) -> None:
    """Which requests are sent again, and that a balancer waits longer than a server and lets go sooner."""
    text, settings = (DEPLOY / name).read_text(), Settings(bundle=Path("live"))
    again = re.search(r"(?:~|-m reg) (\^\S+)", text)
    assert again
    assert all(re.search(again[1], path) for path in ("/v1/score", "/v2/models/live/infer", "/v2/models/m.toys/infer"))
    assert not any(re.search(again[1], path) for path in ("/v1/feedback", "/v1/adapters/toys", "/v1/bundle"))
    kept = re.search(r"(?:keepalive_timeout|timeout http-keep-alive) +(\d+)s", text)
    answer = re.search(r"(?:proxy_read_timeout|timeout server) +(\d+)s", text)
    assert kept
    assert answer
    assert int(kept[1]) < settings.keep_alive_s
    assert int(answer[1]) > settings.deadline_s
    for path in re.findall(r"uri (\S+)", text):
        assert client_of().ask("GET", path)[0] == 200


@pytest.mark.parametrize(
    ("program", "name", "check"), [("nginx", "nginx/nginx.conf", "-t -c"), ("haproxy", "haproxy/haproxy.cfg", "-c -f")]
)
def test_balancers_take_their_files(program: str, name: str, check: str, tmp_path: Path) -> None:
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin")
    if found is None:
        pytest.skip(f"no {program} on this machine")
    text = re.sub(r"replica-\d:8000", "127.0.0.1:8000", (DEPLOY / name).read_text())
    (tmp_path / "config").write_text(text.replace("/run/nginx.pid", str(tmp_path / "pid")))
    ended = subprocess.run([found, *check.split(), tmp_path / "config"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
