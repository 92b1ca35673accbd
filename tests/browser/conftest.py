"""A real server with a small bundle, an experiment and traffic, and a Chromium that looks at it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright
from tests.unit.serving.conftest import make_bundle, make_rows

from domlora.abtest.experiments import Arm, Experiment
from domlora.abtest.registry import Registry
from domlora.serving.export import export
from domlora.serving.store import Store

CHROMIUM = Path(os.environ.get("DOMLORA_CHROMIUM", "/usr/bin/chromium"))
_START = "import sys; from domlora.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")  # and not longer: while it lives, asyncio has a loop that runs, and asyncio.run refuses
def browser() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"no browser at {CHROMIUM}; set DOMLORA_CHROMIUM to one")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    bundle = make_bundle(adapters={"temperature": 4.0, "include": ["tower.*"]})
    figures = {"auc": 0.7, "standard_error": 0.01, "rarer": 300.0, "mean_score": 0.4}
    bundle.facts = {"method": "joint", "data": "3f9a", "valid": 0.71, "auc": {"app": figures, "web": figures}}
    export(bundle, folder / "exported", [make_rows(50)])
    made = Store.create(folder / "store")
    made.add_version(folder / "exported")
    registry = Registry.open(folder / "store" / "experiments")
    registry.create(Experiment("no-adapters", (Arm("now"), Arm("base", adapters=False)), look_s=1.0))
    registry.start("no-adapters", now_s=time.time() - 30)
    return folder / "store"


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[str]:
    command = [sys.executable, "-c", _START, "serve", "--bundle", str(store), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        lines = (json.loads(line) for line in process.stdout)
        url = next(str(line["url"]) for line in lines if line.get("event") == "listening")
        _wait_until_ready(url)
        _visit(url)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=20)


def post(url: str, what: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(what).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def _wait_until_ready(url: str) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the server did not become ready")


def _visit(url: str) -> None:
    """Sixty people who look at three items each; every second one clicks on the first."""
    events = []
    for number in range(60):
        candidates = [{"item": f"i{number + place}"} for place in range(3)]
        shared = {"past": ["i1", "i2"], "city": "nowhere" if number % 4 == 0 else "c1", "age": 0.5}
        asked = {
            "domain": ("app", "web")[number % 2],
            "unit": f"u{number}",
            "request": shared,
            "candidates": candidates,
        }
        told = post(f"{url}/v1/score", asked)
        events += [
            {
                "request_id": told["request_id"],
                "row": row,
                "event": "click",
                "value": float(row == 0 and number % 4 < 2),
            }
            for row in range(3)
        ]
    post(f"{url}/v1/feedback", {"events": events})
