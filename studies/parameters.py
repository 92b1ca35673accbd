"""How many numbers each way of telling domains apart needs: adapters beside STAR, MMoE and PLE.

    python studies/parameters.py > docs/results/parameters.md

Models have shapes and no numbers here, so that a thousand domains cost nothing. The sizes of vocabularies are those that
preparation finds (rows for absent and for unknown values included), dimensions and towers those of the studies. The domain
is a feature too where the study has it so; its table grows with the domains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch

from domlora.adapters.attach import AdapterOptions, attach_
from domlora.features.schema import FIRST_ID, Feature, Schema
from domlora.studies.parameters import build_on_meta, count_parameters

MOVIELENS = {"user_id": 6042, "item_id": 3649}
AMAZON = {"user_id": 99_377, "item_id": 53_622}
EBNERD = {"user_id": 1937, "item_id": 3496, "hour": 26, "weekday": 9, "is_subscriber": 4, "is_sso_user": 4, "gender": 4}
EBNERD |= {"postcode": 7, "age": 9, "device": 5, "page": 4}
SHARED = {"article_id": "item_id", "history": "item_id"}
SETS = {"MovieLens-1M": (MOVIELENS, 32), "Amazon, six categories": (AMAZON, 16), "EB-NeRD, random split": (EBNERD, 16)}
TOWER = {"hidden_units": [256, 128, 64], "dropout": 0.2}
COUNTS = (10, 1000)

WAYS: dict[str, tuple[str, AdapterOptions | None]] = {
    "one `mlp` for all": ("mlp", None),
    "adapters, temperature 4": ("mlp", AdapterOptions(temperature=4)),
    "adapters, temperature 16": ("mlp", AdapterOptions(temperature=16)),
    "adapters, temperature 64": ("mlp", AdapterOptions(temperature=64)),
    "adapters in the first layer, rank 2, no bias": ("mlp", AdapterOptions(rank=2, bias=False, include=("tower.0",))),
    "`star`": ("star", None),
    "`mmoe`": ("mmoe", None),
    "`ple`": ("ple", None),
}
WHOLE = "an `mlp` for each domain (`separate`, `finetune`)"


def main() -> None:
    print(__doc__.split("\n")[0].replace("How many", "# How many", 1) + "\n")
    print("    python studies/parameters.py > docs/results/parameters.md\n")
    print(
        "Learned numbers with the tower 256-128-64 and the dimensions of the studies. *Without tables* leaves out\n"
        "embedding tables. *A domain's own* is what one domain more adds, without its row in the table of the domain\n"
        "feature; *of the network* is that over the network for all, without tables. A model for each domain has tables\n"
        "of its own, which the share leaves out.\n"
    )
    for name, (sizes, dims) in SETS.items():
        print(f"## {name}, {dims} dimensions\n")
        print("\n".join(table(sizes, dims)) + "\n")


def table(sizes: Mapping[str, int], dims: int) -> Iterator[str]:
    """A row for each way, in Markdown."""
    head = [f"{what}, {count:,} domains" for count in COUNTS for what in ("all", "without tables")]
    yield f"| way | a domain's own | of the network | {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (2 + len(head))}"
    shared = {count: counted("mlp", None, schema_of(sizes, count), dims) for count in COUNTS}
    network = dense(shared[COUNTS[0]])
    for way, (model, adapter) in WAYS.items():
        found = {count: counted(model, adapter, schema_of(sizes, count), dims) for count in COUNTS}
        more = counted(model, adapter, schema_of(sizes, COUNTS[0] + 1), dims)
        own = dense(more) - dense(found[COUNTS[0]])
        yield row(
            way, own, own / network, {count: (each["params_total"], dense(each)) for count, each in found.items()}
        )
    whole = {count: (count * each["params_total"], count * dense(each)) for count, each in shared.items()}
    yield row(WHOLE, shared[COUNTS[0]]["params_total"], 1.0, whole)


def row(way: str, own: int, share: float, sizes: Mapping[int, tuple[int, int]]) -> str:
    """One line: what a domain owns, and for each number of domains all numbers and those outside tables."""
    cells = [f"{own:,}", f"{100 * share:.1f} %", *(f"{number:,}" for both in sizes.values() for number in both)]
    return f"| {way} | {' | '.join(cells)} |"


def dense(counts: Mapping[str, int]) -> int:
    return counts["params_total"] - counts["params_tables"]


def schema_of(sizes: Mapping[str, int], num_domains: int) -> Schema:
    """The features of a dataset for so many domains."""
    features = [Feature(name, num_ids=size) for name, size in sizes.items()]
    if sizes is EBNERD:  # its domains are pairs of two features that are there
        shared = {name: {"num_ids": sizes[other], "share": other} for name, other in SHARED.items()}
        features.append(Feature("article_id", **shared["article_id"]))
        features.append(Feature("history", "sequence", max_length=20, **shared["history"]))
    else:
        features.append(Feature("domain", num_ids=FIRST_ID + num_domains))
    return Schema(tuple(features), tuple(f"d{number}" for number in range(num_domains)))


def counted(model: str, adapter: AdapterOptions | None, schema: Schema, dims: int) -> dict[str, int]:
    """All numbers, those of tables and those of adapters."""
    options: dict[str, Any] = {"name": model, "embedding_dim": dims, **TOWER}
    built = build_on_meta(options, schema)
    if adapter is not None:
        with torch.device("meta"):
            attach_(built, schema.num_domains, **asdict(adapter))
    return count_parameters(built)


if __name__ == "__main__":
    main()
