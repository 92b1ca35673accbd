"""Where what is served comes from: the versions of the bundle, or of the store where there is no bundle."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from domlora.serving.store import Store

__all__ = ["facts_of", "lineage", "remembered"]

_MOST = 50  # versions that are shown, the newest


def lineage(bundle: Path, store: Store, live: str) -> list[dict[str, Any]]:
    """A line for each version, oldest first.

    A bundle's records are read here as JSON and not by :mod:`domlora.bundle`, which needs torch; one that is not what the
    manifest says is left out, as it would be refused.

    Args:
        bundle: what the server was told to serve: a bundle, a store, or an exported folder.
        store: what it made of it.
        live: the version that answers.
    """
    manifest = _manifest(bundle)
    exported: set[int | None] = set(store.versions())
    answers: int | None = int(live)
    if manifest is None:
        lines = [_of_export(number, store.facts(number)) for number in store.versions()[-_MOST:]]
    else:  # the store may count otherwise than the bundle
        exported = {store.facts(number)["bundle_version"] for number in store.versions()}
        answers = store.facts(int(live))["bundle_version"]
        digests = sorted((int(number), digest) for number, digest in manifest["versions"].items())[-_MOST:]
        lines = [line for number, digest in digests if (line := _of_record(bundle, number, digest)) is not None]
    default = None if manifest is None else manifest["default"]
    return [
        {
            **_told_apart(line, lines),
            "live": line["version"] == answers,
            "default": line["version"] == default,
            "exported": line["version"] in exported,
        }
        for line in lines
    ]


def facts_of(bundle: Path, store: Store, version: int) -> Mapping[str, Any]:
    """What a version remembers of its training; empty where nothing is known."""
    manifest = _manifest(bundle)
    if manifest is None:
        return dict(store.facts(version).get("facts", {})) if version in store.versions() else {}
    digest = manifest["versions"].get(str(version))
    return {} if digest is None else _facts(bundle, version, digest)


def remembered(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of each domain that a version was written with, as :func:`domlora.evaluation.gate.remember` gave them."""
    return [{"name": name, **figures} for name, figures in sorted((facts.get("auc") or {}).items())]


@lru_cache(maxsize=_MOST)
def _of_record(bundle: Path, number: int, digest: str) -> dict[str, Any] | None:
    record = _record(bundle, number, digest)
    if record is None:
        return None
    last = [record["optimizer"]] if record["optimizer"] else []
    parts = {record["encoder"], *record["base"], *record["adapters"].values(), *last}
    own = [part for part in parts if part.endswith(f"@{number}")]
    return {
        **_story(record["facts"]),
        "version": number,
        "parent": record["parent"],
        "created": record["created"],
        "library_version": record["library_version"],
        "domains": len(record["adapters"]) or None,
        "written": dict(Counter(part.partition("@")[0].partition("/")[0] for part in own)),
    }


@lru_cache(maxsize=2)
def _facts(bundle: Path, number: int, digest: str) -> Mapping[str, Any]:
    record = _record(bundle, number, digest)
    return {} if record is None else dict(record["facts"])


def _of_export(number: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_story(facts.get("facts", {})),
        "version": number,
        "parent": None,
        "created": None,
        "library_version": None,
        "domains": len(facts["domains"]),
        "written": {},
    }


def _story(facts: Mapping[str, Any]) -> dict[str, Any]:
    gate = facts.get("gate")
    return {
        "method": facts.get("method"),
        "onboarded": sorted(facts.get("onboarded") or {}),
        "data": facts.get("data"),
        "valid": facts.get("valid"),
        "judged_domains": len(facts.get("auc") or {}),
        "gate": None if not gate else {key: gate[key] for key in ("passed", "reasons", "warnings")},
    }


def _told_apart(line: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A version without what it has from its parent: it remembers all domains that were ever added."""
    before: list[str] = next((each["onboarded"] for each in lines if each["version"] == line["parent"]), [])
    new = [name for name in line["onboarded"] if name not in before]
    added = {"method": "onboard", "gate": None} if new and line["parent"] is not None else {}
    return {**line, **added, "onboarded": new}


def _manifest(bundle: Path) -> dict[str, Any] | None:
    """A bundle's manifest, or None if this is no bundle."""
    try:
        manifest = json.loads((bundle / "manifest.json").read_bytes())
        return manifest if isinstance(manifest["versions"], dict) and "default" in manifest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _record(bundle: Path, number: int, digest: str) -> dict[str, Any] | None:
    """A version's record, if it is the one that the manifest means."""
    try:
        content = (bundle / "versions" / f"{number}.json").read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            return None
        record: dict[str, Any] = json.loads(content)
        return record
    except (OSError, ValueError):
        return None
