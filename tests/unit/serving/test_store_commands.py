"""The verbs of ``domlora store``, from a first version to a shared store that another machine pulls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from domlora.cli import app
from domlora.errors import BundleError, ConfigError, DataError, DomloraError, UnknownDomainError
from domlora.serving.live import Live
from domlora.serving.store import Store


def run(*words: object) -> str:
    """What ``domlora store`` prints; an error is raised."""
    found = CliRunner().invoke(app, ["store", *map(str, words)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def told(store: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("show", store, "--json"))
    return found


def test_versions_come_live_and_go(adapted: Any, next_day: Any, tmp_path: Path) -> None:
    store, delta = tmp_path / "store", tmp_path / "delta"
    assert f"version 1 is in {store}, live" in run("add", store, adapted.folder)
    said = run("delta", adapted.folder, next_day.folder, "--out", delta)
    assert f"wrote {delta}" in said
    with pytest.raises(DomloraError, match="overwrite"):
        run("delta", adapted.folder, next_day.folder, "--out", delta)
    assert "version 7 is in" in run("add", store, delta, "--number", 7)
    assert [(each["version"], each["live"]) for each in told(store)["versions"]] == [(1, True), (7, False)]
    assert f"version 7 of {store} is live" in run("set-live", store, 7)
    assert Live.open(Store.open(store), name="live").current.version == "7"
    assert "| 7 | True |" in run("show", store)
    with pytest.raises(DomloraError):
        run("drop", store, 7)  # it is live
    run("drop", store, 1)
    assert [each["version"] for each in told(store)["versions"]] == [7]


def test_an_adapter_is_packed_and_pushed(adapted: Any, tmp_path: Path) -> None:
    store, file = tmp_path / "store", tmp_path / "web.safetensors"
    adapted.bundle.save(tmp_path / "bundle")
    run("add", store, adapted.folder)
    assert f"wrote {file}" in run("pack", tmp_path / "bundle", "web", "--out", file, "--label", "v2")
    assert "version v2 of web is served" in run("push", store, file, "--pinned")
    [adapter] = told(store)["adapters"]
    assert (adapter["domain"], adapter["version"], adapter["pinned"]) == ("web", "v2", True)
    assert "version v3 of web" in run("push", store, file, "--label", "v3")
    Store.open(store).drop_adapter("app")
    assert "not served: app" in run("show", store)


def test_what_is_published_is_pulled_elsewhere(adapted: Any, tmp_path: Path) -> None:
    here, there, shared = tmp_path / "here", tmp_path / "there", tmp_path / "shared"
    run("add", here, adapted.folder)
    assert "generation 1: sent" in run("publish", here, shared)
    assert f"{there} knows generation 1" in run("pull", there, shared)
    assert told(there)["versions"] == told(here)["versions"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("show", "nowhere"), BundleError),
        (("add", "store", "nowhere"), BundleError),
        (("set-live", "nowhere", "1"), BundleError),
        (("push", "nowhere", "no-file"), DataError),
        (("publish", "nowhere", "shared"), BundleError),
    ],
)
def test_what_is_not_there_is_an_error_of_ours(
    tmp_path: Path, words: tuple[str, ...], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        run(*words)


def test_a_domain_without_an_adapter_cannot_be_packed(adapted: Any, plain: Any, tmp_path: Path) -> None:
    adapted.bundle.save(tmp_path / "bundle")
    plain.bundle.save(tmp_path / "plain")
    with pytest.raises(UnknownDomainError, match="'web'"):
        run("pack", tmp_path / "bundle", "wed", "--out", tmp_path / "file")
    with pytest.raises(ConfigError, match="must have adapters"):
        run("pack", tmp_path / "plain", "web", "--out", tmp_path / "file")
    assert not (tmp_path / "file").exists()
