"""The console of a moment as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from domlora.abtest.registry import Registry
from domlora.files import told
from domlora.serving.console.handlers import document
from domlora.serving.console.page import saved_page
from domlora.serving.http.metrics import Metrics
from domlora.serving.http.service import Service
from domlora.serving.live import Live
from domlora.serving.settings import Settings
from domlora.serving.source import open_store

__all__ = ["export_page"]


def export_page(source: Path | Service, out: Path) -> None:
    """Write the console as one HTML file with its figures in it, that needs no server and loads nothing.

    Args:
        source: a server's service, with what it counted; or what ``domlora serve`` takes, of which nothing was counted.
        out: the file; one that is there is replaced.

    Raises:
        BundleError: the folder cannot be served.
        DataError: the file cannot be written.
    """
    service = source if isinstance(source, Service) else _service_of(source)
    page = saved_page(_documents(service))
    with told(out):
        out.write_text(page, encoding="utf-8")


def _service_of(folder: Path) -> Service:
    settings = Settings(bundle=folder)
    store = open_store(folder).store
    live = Live(store, name=settings.model_name, max_adapters=1)
    registry = Registry.open(store.folder / "experiments")
    return Service(live=live, settings=settings, metrics=Metrics(), registry=registry, log=None)


def _documents(service: Service) -> dict[str, Any]:
    """What the page asks for, by the path it asks with."""
    found = {name: document(service, name) for name in ("overview", "domains", "experiments", "drift", "schema")}
    names = [each["name"] for each in found["experiments"]["experiments"]]
    found |= {f"experiments/{quote(name, safe='')}": document(service, f"experiments/{name}") for name in names}
    numbers = [each["version"] for each in found["overview"]["versions"] if each["judged_domains"]]
    return found | {f"versions/{number}": document(service, f"versions/{number}") for number in numbers}
