"""Raw rows → a prepared folder: splits, vocabularies, encoded shards, manifest.

One rule keeps offline and online alike: whatever gives a value its meaning (canonical text, label, id, user number) is done
by the same Python functions that the server calls, once for each *distinct* value; the engine only counts, joins, ranks and
sorts. It needs nothing but grouping, joins, ``row_number``, ``md5`` and text concatenation, which every engine has and
computes alike, so the same seed gives the same rows on each.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from domlora.data.dataset import DOMAIN_COLUMN, FORMAT, FORMAT_VERSION, LABEL_COLUMN, SPLITS, USER_COLUMN
from domlora.data.expressions import cells, coded, engine_errors, join, joined, plain, stored
from domlora.data.sources import LabelRule, RawTable, open_source
from domlora.errors import ConfigError, DataError, SchemaError, nearest
from domlora.features.encode import (
    ABSENT_USER,
    Encoder,
    canonical_text,
    fit_numeric,
    fit_vocabulary,
    standardise,
    user_number,
)
from domlora.features.schema import FIRST_ID, OOV_ID, PAD_ID, Feature, Schema
from domlora.files import new_folder, sha256_of

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Split", "prepare"]

Split = Literal["random", "time"]
Step = Callable[[str], None]

_HASH, _SPLIT, _POSITION, _KEY = "__hash", "__split", "__position", "__key"
_LABEL = "label"  # the schema's name for the 0/1 column that a label rule makes


@dataclass(frozen=True, slots=True)
class _Options:
    """What was asked for, checked; goes into the manifest as it is."""

    domain: str
    features: tuple[str, ...]
    numeric: tuple[str, ...]
    label_rule: str
    split: Split
    fractions: tuple[float, float, float]
    seed: int
    shard_rows: int

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise ConfigError("unknown split", received=self.split, next_step=nearest(str(self.split), get_args(Split)))
        shares = tuple(self.fractions)
        if (
            len(shares) != 3
            or not all(0 <= share <= 1 for share in shares)
            or abs(sum(shares) - 1) > 1e-9
            or not shares[0]
        ):
            raise ConfigError("fractions must be three shares (train, valid, test) that sum to 1", received=shares)
        if self.shard_rows < 1:
            raise ConfigError("shard_rows must be at least 1", received=self.shard_rows)

    @property
    def categorical(self) -> tuple[str, ...]:
        return tuple(name for name in self.features if name not in self.numeric)


def prepare(
    source: str | RawTable,
    out: Path | str,
    *,
    domain: str,
    label_rule: str = "rating==5",
    split: Split = "random",
    fractions: tuple[float, float, float] = (0.6, 0.2, 0.2),
    seed: int = 0,
    features: Sequence[str] | None = None,
    numeric: Sequence[str] = (),
    raw: Path | None = None,
    shard_rows: int = 1 << 20,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Split, encode and write a data set; the folder appears complete or not at all.

    * **order**: rows are ordered by ``md5(f"{seed}:{key}:{k}")``, with ``key`` the texts of the key columns joined by ``|``
      and ``k`` counting rows with the same key from 0.
    * **random split**: within each (domain, label) the first rows of that order train, the next validate, the last test;
      cuts at ``floor(n * share + 0.5)``.
    * **time split**: the same cuts within each domain, ordered by time.
    * **vocabularies** hold the values of the training split, frequent first.

    Args:
        source: a name in ``SOURCES`` or a raw table of your own.
        out: the folder to make.
        domain: the raw column whose values are the domains. Each value with rows is one; order by text, or by number
            when all are integers.
        label_rule: ``rating OP number``.
        split: ``random`` (the paper's) or ``time`` (closer to production: no row is older than the ones trained on).
        fractions: shares of train, valid and test.
        seed: changes the split and the order of rows, nothing else.
        features: input columns; by default the source's own and the domain.
        numeric: those features that are numbers to standardise and not names.
        raw: the folder of the raw files of a named source.
        shard_rows: rows a file; also the most rows held in memory by Python.
        overwrite: replace a prepared folder.
        progress: shows the steps.

    Returns:
        The manifest: options, rows in and out (for each split, domain and label), dropped rows by rule, sha256 of
        every file, fingerprint of the encoder. It holds no time and no path, so equal inputs give equal bytes.

    Raises:
        ConfigError: an option is not valid for this source.
        DataError: raw files are missing or damaged, no row is left, or ``out`` exists.
        SchemaError: a column has a type that cannot be used.
    """
    rule = LabelRule.parse(label_rule)
    table = source if isinstance(source, RawTable) else open_source(source, raw, progress)
    options = _Options(
        domain=domain,
        features=tuple(features if features is not None else dict.fromkeys((*table.features, domain))),
        numeric=tuple(numeric),
        label_rule=str(rule),
        split=split,
        fractions=fractions,
        seed=seed,
        shard_rows=shard_rows,
    )
    _check(table, options)
    step = _steps(progress, table.name)
    with engine_errors(table.name), new_folder(Path(out), overwrite=overwrite) as folder:
        return _Preparation(table, options, rule, folder, step).run()


class _Preparation:
    """The steps of one :func:`prepare`, in the order of their methods."""

    def __init__(self, raw: RawTable, options: _Options, rule: LabelRule, folder: Path, step: Step) -> None:
        self.raw, self.options, self.rule, self.folder, self.step = raw, options, rule, folder, step
        self.dropped = {"rating missing or not a number": 0, "domain missing": 0}
        if options.split == "time":
            self.dropped["time missing"] = 0

    def run(self) -> dict[str, Any]:
        self.step("read")
        rows = self.hashed()
        self.step("split")
        groups = cells(rows, [self.raw.rating, self.options.domain], rows[self.time].notnull() if self.time else None)
        rows, domains = self.divided(rows, groups)
        self.step("encode")
        rows, encoder = self.encoded(rows, domains)
        self.step("write")
        encoder.save(self.folder)
        splits = self.written(rows, encoder)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "library_version": version("domlora"),
            "source": self.raw.name,
            "inputs": dict(self.raw.inputs),
            "options": asdict(self.options),
            "rows_in": sum(groups.column("__size").to_pylist()),
            "dropped": self.dropped,
            "splits": splits,
            "encoder_fingerprint": encoder.fingerprint(),
            "files": _facts(self.folder),
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (self.folder / "manifest.json").write_text(text, encoding="utf-8")
        return dict(json.loads(text))

    def hashed(self) -> Any:
        """The needed columns, each row with its hash."""
        raw, options = self.raw, self.options
        names = dict.fromkeys([*raw.key, *options.features, options.domain, raw.rating, raw.user, raw.time])
        rows = raw.table.select(**{name: plain(raw.table[name]) for name in names if name is not None})
        # rows with one key are told apart by their other columns; rows equal in all columns are interchangeable
        order = list(rows.columns)
        rows = rows.mutate(**{_KEY: joined([rows[name].cast("string").fill_null("") for name in raw.key], "|")})
        rows = rows.mutate(__repeat=ibis.row_number().over(group_by=_KEY, order_by=order))
        text = joined([ibis.literal(str(options.seed)), rows[_KEY], rows["__repeat"].cast("string")], ":")
        return stored(rows.mutate(**{_HASH: text.hexdigest("md5")}).drop(_KEY, "__repeat"))

    @property
    def time(self) -> str | None:
        """The column to split by, if that is asked for."""
        return self.raw.time if self.options.split == "time" else None

    def divided(self, rows: Any, groups: pa.Table) -> tuple[Any, tuple[str, ...]]:
        """The usable rows, each with label, domain, split and its position there; and the names of the domains."""
        sizes = self.sizes(groups)
        names = {name for name, _ in sizes}
        domains = tuple(sorted(names, key=_by_number if all(map(_is_integer, names)) else str))
        position = {name: position for position, name in enumerate(domains)}
        rows = coded(rows, groups, self.raw.rating, LABEL_COLUMN, self.rule, pa.int32())
        number = _number_of(position, None)
        rows = coded(rows, groups, self.options.domain, DOMAIN_COLUMN, number, pa.int32())
        rows = rows.filter(rows[LABEL_COLUMN].notnull(), rows[DOMAIN_COLUMN].notnull())
        stratum, order = [DOMAIN_COLUMN, LABEL_COLUMN], [_HASH]
        if self.time:
            rows = rows.filter(rows[self.time].notnull())
            stratum, order = [DOMAIN_COLUMN], [self.time, _HASH]
        rows = rows.mutate(__rank=ibis.row_number().over(group_by=stratum, order_by=order))
        strata = Counter[tuple[int, ...]]()
        for (name, label), size in sizes.items():
            strata[(position[name], label)[: len(stratum)]] += size
        rows = join(rows, self.cuts(stratum, strata), stratum)
        passed = [(rows["__rank"] >= rows[cut]).cast("int32") for cut in ("__cut_1", "__cut_2")]
        rows = rows.mutate(**{_SPLIT: passed[0] + passed[1]}).drop("__rank", "__cut_1", "__cut_2")
        place = ibis.row_number().over(group_by=_SPLIT, order_by=_HASH)
        return stored(rows.mutate(**{_POSITION: place})), domains

    def sizes(self, groups: pa.Table) -> Counter[tuple[str, int]]:
        """Usable rows of each domain and label; counts the others."""
        sizes = Counter[tuple[str, int]]()
        for group in groups.to_pylist():
            label, name = self.rule(group[self.raw.rating]), canonical_text(group[self.options.domain])
            usable = group["__chosen"]
            if label is None:
                self.dropped["rating missing or not a number"] += group["__size"]
                continue
            if self.time:
                self.dropped["time missing"] += group["__size"] - usable
            if not name:
                self.dropped["domain missing"] += usable
            elif usable:
                sizes[name, label] += usable
        if not sizes:
            raise DataError("no row is left", received=self.dropped, next_step="Check the domain and the rating column")
        return sizes

    def cuts(self, stratum: list[str], strata: Counter[tuple[int, ...]]) -> Any:
        """For each stratum the ranks at which valid and test begin; integers, so that no engine rounds by itself."""
        train, valid, _ = self.options.fractions
        columns = {name: pa.array([key[part] for key in strata], pa.int32()) for part, name in enumerate(stratum)}
        for cut, share in (("__cut_1", train), ("__cut_2", train + valid)):
            columns[cut] = pa.array([math.floor(size * share + 0.5) for size in strata.values()], pa.int64())
        if not any(columns["__cut_1"].to_pylist()):
            raise DataError(
                "no row trains", received=dict(strata), next_step="Use more rows or a larger first fraction"
            )
        return ibis.memtable(pa.table(columns))

    def encoded(self, rows: Any, domains: tuple[str, ...]) -> tuple[Any, Encoder]:
        """Rows of ids, raw numbers, domain, label and user; and the encoder that any later row goes through."""
        options, user = self.options, self.raw.user
        names = dict.fromkeys([*options.features, *([] if user is None else [user])])
        keys = {name: cells(rows, [name], rows[_SPLIT] == 0) for name in names}
        sizes = {name: _sizes(keys[name], name) for name in options.features}
        vocabularies = {name: fit_vocabulary(name, sizes[name]) for name in options.categorical}
        features = tuple(
            fit_numeric(name, sizes[name])
            if name in options.numeric
            else Feature(name, num_ids=FIRST_ID + len(vocabularies[name]))
            for name in options.features
        )
        schema = Schema(features, domains, domain=options.domain, label=_LABEL, user=user, time=self.raw.time)
        codes = {}
        for slot, name in enumerate(options.categorical):
            ids = {"": PAD_ID, **{word: FIRST_ID + place for place, word in enumerate(vocabularies[name])}}
            rows = coded(rows, keys[name], name, f"__ids_{slot}", _number_of(ids, OOV_ID), pa.int32())
            codes[name] = rows[f"__ids_{slot}"].fill_null(PAD_ID)
        if user is not None:
            rows = coded(rows, keys[user], user, USER_COLUMN, lambda v: user_number(canonical_text(v)), pa.int64())
            codes[USER_COLUMN] = rows[USER_COLUMN].fill_null(ABSENT_USER)
        numbers = {name: rows[name].cast("float64") for name in options.numeric}
        rows = rows.select(_SPLIT, _POSITION, DOMAIN_COLUMN, LABEL_COLUMN, **codes, **numbers)
        return stored(rows), Encoder(schema, vocabularies)

    def written(self, rows: Any, encoder: Encoder) -> dict[str, Any]:
        """Writes the shards; returns rows, domains, labels and files of each split."""
        by = [_SPLIT, DOMAIN_COLUMN, LABEL_COLUMN]
        sizes = {tuple(cell[name] for name in by): cell["__size"] for cell in cells(rows, by).to_pylist()}
        splits: dict[str, Any] = {}
        for split_number, split in enumerate(SPLITS):
            domains = {}
            for position, domain in enumerate(encoder.schema.domains):
                negatives, positives = (sizes.get((split_number, position, label), 0) for label in (0, 1))
                domains[domain] = {"rows": negatives + positives, "positives": positives}
            num_rows = sum(facts["rows"] for facts in domains.values())
            files = self.shards(rows.filter(rows[_SPLIT] == split_number), num_rows, split, encoder.schema)
            splits[split] = {"rows": num_rows, "domains": domains, "files": files}
        return splits

    def shards(self, rows: Any, num_rows: int, split: str, schema: Schema) -> list[str]:
        (self.folder / split).mkdir()
        files: list[str] = []
        for start in range(0, num_rows, self.options.shard_rows):
            files.append(f"{split}/part-{len(files):05d}.parquet")
            position = rows[_POSITION]
            shard = rows.filter(position >= start, position < start + self.options.shard_rows).order_by(_POSITION)
            _write(shard.drop(_SPLIT, _POSITION).to_pyarrow(), schema, self.folder / files[-1])
        return files


def _write(table: pa.Table, schema: Schema, path: Path) -> None:
    """One shard: int32 ids, float32 numbers, then domain, label and user."""
    columns = {}
    for feature in schema.features:
        column = table.column(feature.name)
        columns[feature.name] = (
            pa.array(standardise(column.to_numpy(), feature)) if feature.kind == "numeric" else column.cast(pa.int32())
        )
    columns[DOMAIN_COLUMN] = table.column(DOMAIN_COLUMN).cast(pa.int32())
    columns[LABEL_COLUMN] = table.column(LABEL_COLUMN).cast(pa.float32())
    if schema.user is not None:
        columns[USER_COLUMN] = table.column(USER_COLUMN).cast(pa.int64())
    pq.write_table(pa.table(columns), path, compression="zstd")


def _facts(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
        for path in files
    }


def _check(raw: RawTable, options: _Options) -> None:
    types = raw.table.schema()
    if options.domain not in raw.domains:
        raise ConfigError(
            f"{raw.name} has no such domain", received=options.domain, next_step=nearest(options.domain, raw.domains)
        )
    if options.split == "time" and raw.time is None:
        raise ConfigError(f"{raw.name} holds no usable times", received="time", next_step="Use the random split")
    for name in (*options.features, *raw.key, raw.rating, raw.user, raw.time):
        if name is not None and name not in types:
            raise ConfigError(f"{raw.name} has no such column", received=name, next_step=nearest(name, types))
    for name in options.features:
        if name == raw.rating or name == _LABEL or name.startswith("__"):
            raise ConfigError(
                f"a feature may not be the rating, be called {_LABEL!r} or begin with two underscores", received=name
            )
    for name in options.numeric:
        if name not in options.features:
            raise ConfigError(
                "a numeric column must be a feature", received=name, next_step=nearest(name, options.features)
            )
    _check_types(raw, options, types)


def _check_types(raw: RawTable, options: _Options, types: Any) -> None:
    for name in raw.key:
        if not (types[name].is_string() or types[name].is_integer() or types[name].is_boolean()):
            # engines print other types in different ways
            raise SchemaError(f"key column {name!r} must be text, integer or boolean", received=str(types[name]))
    for name in (*options.categorical, options.domain, raw.rating, raw.user or raw.rating):
        if not (types[name].is_string() or types[name].is_numeric() or types[name].is_boolean()):
            raise SchemaError(f"column {name!r} must hold text, numbers or booleans", received=str(types[name]))
    for name in options.numeric:
        if not types[name].is_numeric():
            raise SchemaError(f"numeric feature {name!r} must be a column of numbers", received=str(types[name]))


def _steps(progress: Progress | None, name: str) -> Step:
    if progress is None:
        return lambda _: None
    task = progress.add_task(f"Prepare {name}", total=4)

    def step(what: str) -> None:
        progress.update(task, description=f"Prepare {name}: {what}", advance=1)

    return step


def _sizes(keys: pa.Table, name: str) -> list[tuple[Any, int]]:
    """The values of a column and the training rows that have each."""
    return list(zip(keys.column(name).to_pylist(), keys.column("__chosen").to_pylist(), strict=True))


def _number_of(numbers: Mapping[str, int], other: int | None) -> Callable[[Any], int | None]:
    return lambda value: numbers.get(canonical_text(value), other)


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()


def _by_number(text: str) -> tuple[int, str]:
    return int(text), text
