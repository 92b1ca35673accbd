"""The documents that the console shows: what a server is, serves and counts, read and never changed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from domlora.features.schema import Feature, Schema
from domlora.serving.console.calibration import CONFIDENCE, TOLERANCE, calibration
from domlora.serving.console.figures import Figures
from domlora.serving.console.lineage import facts_of, lineage, remembered
from domlora.serving.http.service import Service
from domlora.serving.live import Source

__all__ = ["domains", "drift", "figures_of", "overview", "schema", "version_of"]

_SCORING = ("score", "infer")
_LEVELS = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_WORDS = 100  # of a vocabulary, offered where a value is typed
_HEADER = 8  # bytes that tell how long the header of a safetensors file is
NONE, OTHER = "", "other"  # as Metrics names what is of several domains or none, and of domains without series


def figures_of(service: Service) -> Figures:
    """What all workers counted so far."""
    return Figures.read(service.metrics.expose().decode())


def overview(service: Service, figures: Figures) -> dict[str, Any]:
    """What is served, how much it is asked, and where it comes from."""
    snapshot, settings, store = service.live.current, service.settings, service.live.store
    facts = store.facts(int(snapshot.version))
    known = snapshot.program.schema
    return {
        "now_s": figures.now_s,
        "model": snapshot.name,
        "bundle": snapshot.version,
        "backbone": facts["model"].get("name"),
        "library_version": version("domlora"),
        "num_domains": len(service.live.known()),
        "num_features": len(known.features),
        "adapted_layers": len(facts["layers"]),
        "settings": {name: getattr(settings, name) for name in ("unknown_domain", "unknown_ids", "max_rows")},
        "traffic": _traffic(figures, settings.workers),
        "versions": lineage(settings.bundle, store, snapshot.version),
    }


def domains(service: Service, figures: Figures) -> dict[str, Any]:
    """Each domain that is served: its adapter, and what was counted of it."""
    snapshot, resident = service.live.current, set(service.live.resident())
    pushed = service.live.store.state().adapters
    counted = _by_domain(figures)
    lines = []
    for name, source in service.live.known().items():
        rank = pushed[name].rank if source.pushed and name in pushed else _rank(source)
        lines.append(
            {
                "name": name,
                "version": source.version if snapshot.program.layers else None,
                "rank": rank,
                "pinned": source.pinned,
                "resident": name in resident,
                **counted(name),
            }
        )
    shared, mixed = counted(OTHER), counted(NONE)
    return {
        "now_s": figures.now_s,
        "bundle": snapshot.version,
        "domains": lines,
        "shared": shared if shared["requests"] else None,
        "mixed": mixed if mixed["requests"] else None,
    }


def drift(service: Service, figures: Figures) -> dict[str, Any]:
    """Whether clicks come as predicted, values are known, and scores are what they were in training."""
    snapshot = service.live.current
    facts = facts_of(service.settings.bundle, service.live.store, int(snapshot.version))
    reference = {line["name"]: line["mean_score"] for line in remembered(facts) if "mean_score" in line}
    counted, rows = _by_domain(figures), figures.total("rows")
    lines = []
    for name in service.live.known():
        line = counted(name)
        found = calibration(line["predicted"], line["observed"])
        lines.append({"name": name, **line, **found._asdict(), "reference": reference.get(name)})
    return {
        "now_s": figures.now_s,
        "bundle": snapshot.version,
        "confidence": CONFIDENCE,
        "tolerance": TOLERANCE,
        "rows": rows,
        "has_reference": bool(reference),
        "domains": lines,
        "features": _unknown(snapshot.encoder.schema, snapshot.encoder.vocabularies, figures, rows),
        "unknown_domain_rows": figures.total("unknown_domain"),
    }


def schema(service: Service) -> dict[str, Any]:
    """The columns that a request has, for a form."""
    snapshot = service.live.current
    known, words = snapshot.encoder.schema, snapshot.encoder.vocabularies
    columns: dict[str, dict[str, Any]] = {}
    for feature in known.features:
        for column in feature.sources:
            columns.setdefault(column, _column(column, feature, words))
    item = next((feature.sources[0] for feature in known.features if _is_of_item(feature, known)), None)
    for each in columns.values():
        each["varies"] = each["name"] == item
    columns.pop(known.domain, None)
    return {
        "now_s": time.time(),
        "bundle": snapshot.version,
        "model": snapshot.name,
        "domains": sorted(service.live.known()),
        "unknown_domain": service.settings.unknown_domain,
        "columns": list(columns.values()),
    }


def version_of(service: Service, number: int) -> dict[str, Any]:
    """The figures of each domain that a version was written with."""
    return {"version": number, "auc": remembered(facts_of(service.settings.bundle, service.live.store, number))}


def _traffic(figures: Figures, workers: int) -> dict[str, Any]:
    statuses = figures.by("requests", "status")
    return {
        "requests": figures.total("domain_requests"),
        "refused": sum(number for status, number in statuses.items() if status.startswith("4")),
        "failed": sum(number for status, number in statuses.items() if status.startswith("5")),
        "rows": figures.total("rows"),
        "unknown_domain_rows": figures.total("unknown_domain"),
        "latency": figures.quantiles(_SCORING, _LEVELS),
        "rejected": figures.by("rejected", "reason"),
        "swaps": figures.total("swaps"),
        "adapter_loads": figures.by("adapter_loads", "result"),
        "workers": workers,
        "worker_starts": figures.total("worker_starts"),
    }


def _by_domain(figures: Figures) -> Any:
    """The function from a domain to what was counted of it."""
    names = {
        "rows": "rows",
        "score_sum": "probability_sum",
        "matched": "observed_rows",
        "predicted": "predicted_sum",
        "observed": "observed_sum",
    }
    sums = {key: figures.by(name, "domain") for key, name in names.items()}
    requests, failed = figures.by("domain_requests", "domain"), dict[str, float]()
    for labels, value in figures.of("domain_requests"):
        if labels["status"] >= "4":
            failed[labels["domain"]] = failed.get(labels["domain"], 0) + value

    def counted(domain: str) -> dict[str, Any]:
        line: dict[str, Any] = {key: by.get(domain, 0.0) for key, by in sums.items()}
        line |= {"requests": requests.get(domain, 0.0), "failed": failed.get(domain, 0.0)}
        return {**line, "mean_score": line["score_sum"] / line["rows"] if line["rows"] else None}

    return counted


def _unknown(
    known: Schema, words: Mapping[str, tuple[str, ...]], figures: Figures, rows: float
) -> list[dict[str, Any]]:
    """The share of unknown values of each feature with a vocabulary; of a sequence at least of all its places."""
    unknown = figures.by("unknown_ids", "feature")
    lines = []
    for feature in known.categorical:
        if feature.kind == "bucketed" or feature.hash_buckets:
            continue
        found = unknown.get(feature.name, 0.0)
        lines.append(
            {
                "name": feature.name,
                "kind": feature.kind,
                "num_words": len(words[feature.share or feature.name]),
                "unknown": found,
                "share": found / (rows * feature.max_length) if rows else None,
                "exact": feature.kind != "sequence",
            }
        )
    return lines


def _column(name: str, feature: Feature, words: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    crossed = len(feature.sources) > 1
    vocabulary = () if crossed else words.get(feature.share or feature.name, ())
    kinds = {"numeric": "number", "bucketed": "number", "sequence": "list"}
    return {
        "name": name,
        "kind": kinds.get(feature.kind, "text"),
        "words": list(vocabulary[:_WORDS]),
        "num_words": len(vocabulary),
    }


def _is_of_item(feature: Feature, known: Schema) -> bool:
    """Whether a feature is likely one that candidates differ in; the form lets people say so of any."""
    return feature.kind == "categorical" and feature.name not in (known.user, known.domain)


def _rank(source: Source) -> int | None:
    try:
        return _rank_in(source.file, source.sha256)
    except (OSError, ValueError):  # removed meanwhile
        return None


@lru_cache(maxsize=100_000)
def _rank_in(file: Path, sha256: str) -> int | None:
    """The largest rank of an adapter, from the header of its file; a file of this name and sha256 never changes."""
    del sha256
    with file.open("rb") as content:
        size = int.from_bytes(content.read(_HEADER), "little")
        header = json.loads(content.read(min(size, 1 << 20)))
    ranks = [each["shape"][1] for name, each in header.items() if name.endswith(".lora_A")]
    return max(ranks, default=None)
