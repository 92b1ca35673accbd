"""R22: what the server answers over HTTP is what ``predict`` says offline of the rows that preparation has written.

Of a synthetic log with sequences, numbers, crossed and hashed columns and unseen values; and of MovieLens-1M, EB-NeRD and
six Amazon categories, with the non-clicks that preparation draws, where ``DOMLORA_DATA`` names the folder of their files.
"""

import json
import os
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import domlora, say, serving

from domlora.bundle import Bundle
from domlora.data.dataset import SPLITS, Dataset
from domlora.data.engine import open_engine
from domlora.data.sources import open_source, presets
from domlora.evaluation.evaluate import predict
from domlora.evaluation.metrics import auc
from domlora.features.batch import Batch
from domlora.features.schema import FIRST_ID
from domlora.features.text import domain_text
from domlora.serving.folder import read_facts

pytestmark = pytest.mark.reliability
ROWS, SLICE, CLOSE = 10_000, 500, 1e-5
SOME = 80_000  # raw rows of a published set, from which those are drawn
PUBLISHED = {"movielens-1m": "ml-1m", "ebnerd": "ebnerd-demo", "amazon-5core": "amazon-5core"}
FIT = {"batch_size": 4096, "max_epochs": 1, "evaluations_per_epoch": 1}
PLAN = """
[source]
files = ["log.parquet"]
[columns]
domain = "scene"
label = "click"
[features.item]
min_count = 2
[features.past]
kind = "sequence"
share = "item"
max_length = 5
[features.city]
[features.pair]
columns = ["city", "item"]
hash_buckets = 500
[features.query]
hash_buckets = 300
[features.price]
kind = "numeric"
transform = "log1p"
missing = true
[features.age]
kind = "bucketed"
buckets = 8
"""


class World(NamedTuple):
    """Raw rows, what preparation made of them, and a trained bundle."""

    raw: pa.Table
    data: Dataset
    bundle: Bundle
    exported: Path


def run(*words: object) -> None:
    done = domlora(*words)
    assert done.returncode == 0, done.stderr[-2000:]


def trained(folder: Path, raw: pa.Table) -> World:
    """From ``folder/data`` on, by the command line."""
    options = ["--set", "model.hidden_units=[32,16]", "--set", "model.embedding_dim=8"]
    for stage in ("pretrain", "adapt"):
        options += [word for name, value in FIT.items() for word in ("--set", f"train.{stage}.fit.{name}={value}")]
    data, base, bundle = ["--data", folder / "data"], folder / "base", folder / "adapted"
    run("pretrain", *data, "--out", base, *options)
    run("adapt", *data, "--bundle", base, "--out", bundle, *options)
    run("export", *data, "--bundle", bundle, "--out", folder / "exported")
    return World(raw, Dataset.open(folder / "data"), Bundle.open(bundle), folder / "exported")


def synthetic(folder: Path, rows: int = 40_000) -> World:
    """Items of a long tail, so that a split has values that no training row had; absent values everywhere."""
    draw = np.random.default_rng(22)
    item = np.minimum(draw.zipf(1.3, rows), 10**6)
    scene, price = draw.integers(3, size=rows), draw.lognormal(2, 2, rows)
    raw: dict[str, list[Any]] = {
        "item": [f"i{n}" for n in item],
        "past": [[f"i{n}" for n in draw.zipf(1.3, size=size) % 10**6] for size in draw.integers(0, 9, rows)],
        "city": [None if n == 0 else f"Ärø {n}" for n in draw.integers(12, size=rows)],
        "query": [None if n % 9 == 0 else f"q {n}" for n in draw.integers(2_000, size=rows)],
        "price": [None if n % 7 == 0 else value for n, value in enumerate(price.tolist())],
        "age": [None if n % 11 == 0 else n % 80 for n in range(rows)],
        "scene": np.array(["home", "cart", "app/2"])[scene].tolist(),
    }
    logit = np.sin(item % 50 + 2 * scene) + np.log(price) / 3 - 1
    raw["click"] = (draw.random(rows) < 1 / (1 + np.exp(-logit))).astype(int).tolist()
    pq.write_table(pa.table(raw), folder / "log.parquet")
    (folder / "plan.toml").write_text(PLAN, encoding="utf-8")
    run("prepare", folder / "plan.toml", "--out", folder / "data")
    return trained(folder, pa.table(raw))


def published(folder: Path, name: str, place: Path) -> World:
    run("prepare", name, "--raw", place, "--out", folder / "data")
    schema, draw = Dataset.open(folder / "data").schema, np.random.default_rng(3)
    wanted = dict.fromkeys([*schema.columns, *schema.domain.split("/")])
    source = tomllib.loads(presets()[name].read_text(encoding="utf-8"))["source"]
    with open_engine("duckdb") as engine:
        rows = open_source(engine, source["name"], place, source.get("options")).table
        kept = SOME / rows.count().execute()
        parts = [
            batch.filter(pa.array(draw.random(batch.num_rows) < kept)) for batch in engine.batches(rows.select(*wanted))
        ]
        made = [] if schema.label in rows.columns else [non_clicks(Dataset.open(folder / "data"))]
    raw = [pa.Table.from_batches(parts), *made]
    return trained(
        folder, pa.concat_tables([table.select(list(wanted)) for table in raw], promote_options="permissive")
    )


def non_clicks(data: Dataset) -> pa.Table:
    """Some that preparation has drawn, as the raw values that they stand for."""
    schema = data.schema
    batch = next(iter(data.batches("train", SOME)))
    ids, domain = batch.ids.numpy(), batch.domain.numpy()
    kept = (batch.label.numpy() == 0) & (ids >= FIRST_ID).all(axis=1)  # an unseen value stands for many
    values: dict[str, Any] = {schema.domain: np.array(schema.domains)[domain[kept]]}
    for slot, feature in enumerate(schema.slots):
        words = np.array([""] * FIRST_ID + list(data.encoder.vocabularies[feature.name]))
        values[feature.name] = words[ids[kept, slot]]
    return pa.table(values)


def matched(world: World) -> tuple[dict[str, list[Any]], Batch]:
    """Raw rows of all domains, drawn at random, and for each the one that preparation wrote."""
    schema, data = world.data.schema, world.data
    parts = [world.raw[part].to_pylist() for part in schema.domain.split("/")]
    domain = np.array([domain_text(values) for values in zip(*parts, strict=True)])
    order = np.random.default_rng(1).permutation(len(domain))
    share = -(-ROWS // schema.num_domains)
    some = np.concatenate([order[domain[order] == name][:share] for name in schema.domains])
    chosen = np.concatenate([some, np.setdiff1d(order, some)])[:ROWS]
    raw = world.raw.take(chosen).to_pydict()
    whole = [batch for split in SPLITS for batch in data.batches(split, 1 << 16)]
    columns = [np.concatenate([getattr(batch, name).numpy() for batch in whole]) for name in ("ids", "dense", "domain")]
    label = np.concatenate([batch.label.numpy() for batch in whole])
    place = {key: number for number, key in enumerate(keys(*columns))}
    found = data.encoder.encode_arrays({name: column for name, column in raw.items() if name != data.schema.label})
    rows = [place[key] for key in keys(found["ids"], found["dense"], found["domain"])]  # all of them are there
    ids, dense, number = (torch.from_numpy(column[rows]) for column in columns)
    return raw, Batch(ids, dense, number, torch.from_numpy(label[rows]))


def keys(ids: np.ndarray, dense: np.ndarray, domain: np.ndarray) -> list[bytes]:
    whole = np.concatenate([ids, dense.view(np.int32).astype(np.int64), domain[:, None]], axis=1)
    return [row.tobytes() for row in whole]


def score(client: httpx.Client, world: World, raw: dict[str, list[Any]]) -> np.ndarray:
    """``POST /v1/score`` with raw values, all domains mixed."""
    schema, found = world.data.schema, []
    names = [*dict.fromkeys([*schema.columns, *schema.domain.split("/")])]
    for start in range(0, len(raw[names[0]]), SLICE):
        rows = {name: raw[name][start : start + SLICE] for name in names}
        told = client.post("/v1/score", content=json.dumps({"candidates": rows}, default=str))
        assert told.status_code == 200, told.text
        found += told.json()["probability"]
    return np.array(found)


def infer(client: httpx.Client, batch: Batch, domain: str) -> np.ndarray:
    """``POST /v2/models/live/infer`` with binary tensors, all rows as rows of one domain."""
    found = []
    for start in range(0, batch.num_rows, SLICE):
        tensors = {"ids": ("INT64", batch.ids[start : start + SLICE].numpy().astype("<i8"))}
        if batch.dense.shape[1]:
            tensors["dense"] = ("FP32", batch.dense[start : start + SLICE].numpy().astype("<f4"))
        told = [
            {"name": name, "datatype": kind, "shape": array.shape, "parameters": {"binary_data_size": array.nbytes}}
            for name, (kind, array) in tensors.items()
        ]
        outputs = [{"name": "probability", "parameters": {"binary_data": True}}]
        head = json.dumps({"inputs": told, "outputs": outputs, "parameters": {"domain": domain}}).encode()
        answer = client.post(
            "/v2/models/live/infer",
            content=head + b"".join(array.tobytes() for _, array in tensors.values()),
            headers={"inference-header-content-length": str(len(head))},
        )
        assert answer.status_code == 200, answer.text
        found.append(np.frombuffer(answer.content[int(answer.headers["inference-header-content-length"]) :], "<f4"))
    return np.concatenate(found)


def compare(name: str, world: World, log: Path) -> None:
    raw, batch = matched(world)
    domains = world.data.schema.domains
    assert {*batch.domain.tolist()} == {*range(len(domains))}
    assert tuple(read_facts(world.exported)["domains"]) == domains
    offline = predict(world.bundle.model, [batch])
    with serving(world.exported, log, max_wait_s=30.0, deadline_s=30.0, unknown_domain="error") as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            scored = score(client, world, raw)
            inferred = {domain: infer(client, batch, domain) for domain in domains}
        unknown = sum(value for name, value in server.counts().items() if "unknown_ids" in name and "_total" in name)
    differences = [np.abs(scored - offline.probability).max()]
    for number, domain in enumerate(domains):
        moved = batch._replace(domain=torch.full_like(batch.domain, number))
        differences.append(np.abs(inferred[domain] - predict(world.bundle.model, [moved]).probability).max())
    found = abs(auc(batch.label.numpy(), scored) - auc(batch.label.numpy(), offline.probability))
    say(
        f"{name}: {batch.num_rows} rows, {unknown:.0f} unseen values, {len(domains)} domains: at most "
        f"{differences[0]:.0e} apart by /v1/score, {max(differences[1:]):.0e} by infer with every domain's adapter; "
        f"AUC {found:.0e} apart"
    )
    assert batch.num_rows == ROWS
    assert unknown > 0 or name in ("movielens-1m", "amazon-5core")  # whose test rows have no value that training lacks
    assert max(differences) <= CLOSE
    assert found <= 1e-6


def test_synthetic(tmp_path):
    compare("synthetic log", synthetic(tmp_path), tmp_path / "log")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name, tmp_path):
    place = Path(os.environ.get("DOMLORA_DATA", "nowhere")) / PUBLISHED[name]
    if not place.is_dir():
        pytest.skip("DOMLORA_DATA names no folder with its raw files")
    compare(name, published(tmp_path, name, place), tmp_path / "log")
