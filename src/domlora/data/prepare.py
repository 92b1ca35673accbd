"""A log → a prepared folder: usable rows, filters, negatives, splits, vocabularies, encoded shards, manifest.

One rule keeps offline and online alike: whatever gives a value its meaning (canonical text, label, id, user number) is done
by the same Python functions that the server calls, once for each distinct value; the engine only counts, joins, ranks and
samples, with expressions that every engine computes alike, so the same seed gives the same rows on each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ibis
import pyarrow as pa

from domlora.data.dataset import FORMAT, FORMAT_VERSION, SPLITS
from domlora.data.engine import Engine, open_engine
from domlora.data.expressions import cells, coded, coded_together, in_order, joined, plain, size
from domlora.data.plan import Plan
from domlora.data.preparing.checks import check_columns, check_item_columns, check_plan, needed
from domlora.data.preparing.columns import ColumnEncoder
from domlora.data.preparing.filters import filtered
from domlora.data.preparing.fitting import fit_encoder
from domlora.data.preparing.labels import LabelRule, zero_or_one
from domlora.data.preparing.negatives import sampled
from domlora.data.preparing.quarantine import NUMBER, Quarantine
from domlora.data.preparing.shuffle import ORDER_COLUMN, Piles
from domlora.data.preparing.split import with_split
from domlora.data.preparing.vectors import check_vectors, write_vectors
from domlora.data.preparing.workers import write_on_workers
from domlora.data.raw import RawTable
from domlora.data.readers import open_log
from domlora.data.sources import open_source
from domlora.errors import SchemaError
from domlora.features.encode import Encoder
from domlora.features.text import canonical_text, domain_text
from domlora.files import new_folder, sha256_of

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["prepare"]

Step = Callable[[str], None]
_LABEL = "label"  # the schema's name for the 0/1 column that a rule makes


def prepare(
    plan: Plan,
    out: Path | str,
    *,
    folder: Path | None = None,
    engine: str = "duckdb",
    grow: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Split, encode and write a log; the folder appears complete or not at all.

    Args:
        plan: what the log is and what is wanted of it.
        out: the folder to write.
        folder: of one's own log the folder that its paths start from; of a published source the folder of its raw files
            (else ``$DOMLORA_DATA``, the cache or a download).
        engine: ``duckdb`` or ``spark``; both give the same rows, splits and ids.
        grow: an earlier prepared folder or bundle whose ids, domains and scales stay as they are; new values get new ids.
        overwrite: replace a prepared folder.
        progress: shows the steps, and rows as they are written.

    Returns:
        The manifest: the plan, every row accounted for (``in + sampled = kept + dropped + quarantined``), rows of each
        split, domain and label, sha256 of every file, fingerprint of the encoder. It holds no time and no path, so equal
        inputs give equal bytes.

    Raises:
        ConfigError: the plan is not valid for this source.
        DataError: raw files are missing or damaged, too many rows are unusable, no row is left, or ``out`` exists.
        SchemaError: a column has a type that cannot be used.
    """
    plan = plan.complete()
    check_plan(plan)
    known = None if grow is None else Encoder.open(grow)
    step = _steps(progress, plan.source.name or "the log")
    with new_folder(Path(out), overwrite=overwrite) as fresh, open_engine(engine, fresh.parent) as opened:
        step("read")
        raw = _raw(opened, plan, folder, progress)
        check_vectors(plan, raw.folder)
        return _Preparation(opened, raw, plan, fresh, known, step, progress).run()


def _raw(engine: Engine, plan: Plan, folder: Path | None, progress: Progress | None) -> RawTable:
    source = plan.source
    if source.name is not None:
        return open_source(engine, source.name, folder, source.options, progress)
    return open_log(engine, source, folder or Path(), needed(plan), progress)


class _Preparation:
    """The steps of one :func:`prepare`, in the order of their methods."""

    def __init__(
        self,
        engine: Engine,
        raw: RawTable,
        plan: Plan,
        out: Path,
        known: Encoder | None,
        step: Step,
        progress: Progress | None,
    ) -> None:
        self.engine, self.raw, self.plan, self.out = engine, raw, plan, out
        self.known, self.step, self.progress = known, step, progress
        self.dropped: dict[str, int] = {}
        self.domains: tuple[str, ...] = ()
        self.label: Callable[[Any], int | None] = zero_or_one
        if plan.columns.label_rule is not None:
            self.label = LabelRule.parse(plan.columns.label_rule)

    def run(self) -> dict[str, Any]:
        rows = self.typed()
        rows, rows_in, quarantined = self.usable(rows)
        self.step("filter")
        rows = self.filtered(rows)
        rows, sampled_rows = self.divided(rows)
        self.step("count values")
        sizes, domains = self.sizes(rows)
        encoder = self.fitted(rows, sizes)
        self.step("write")
        encoder.save(self.out)
        files = self.written(rows, encoder, sizes)
        vectors = write_vectors(self.plan, encoder, self.raw.folder, self.out, self.engine.work)
        rows_of = {"in": rows_in, "quarantined": quarantined, "dropped": self.dropped, "sampled": sampled_rows}
        rows_of["kept"] = kept = sum(sizes.values())
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "library_version": version("domlora"),
            "source": self.raw.name,
            "inputs": dict(self.raw.inputs),
            "plan": asdict(self.plan),
            "rows": {
                "in": rows_in,
                "quarantined": quarantined,
                "dropped": self.dropped,
                "sampled": sampled_rows,
                "kept": kept,
            },
            "splits": {s: {"rows": sizes[s], "domains": domains[s], "files": files[s]} for s in SPLITS},
            "vectors": vectors,
            "encoder_fingerprint": encoder.fingerprint(),
            "files": _facts(self.out),
        }
        if rows_in + sampled_rows != kept + sum(self.dropped.values()) + sum(quarantined.values()):
            raise AssertionError(f"rows are not accounted for: {rows_of}")
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (self.out / "manifest.json").write_text(text, encoding="utf-8")
        return dict(json.loads(text))

    def typed(self) -> Any:
        """The needed columns in types that every engine treats alike, each row with its hash."""
        table = self.raw.table
        check_columns(self.plan, self.raw.name, table.schema())
        names = dict.fromkeys([*needed(self.plan), *self.raw.key])
        rows = _with_order(table.select(**{name: plain(table[name]) for name in names}), self.plan.columns.time)
        key = self._key(rows)
        text = joined([_text_of(rows[name]).fill_null("") for name in key], "|")
        repeat = ibis.literal("0")
        if not self._has_key:  # rows that are equal in their texts and integers are told apart by what else they hold
            rows = rows.mutate(__key=text)
            rows = rows.mutate(__repeat=ibis.row_number().over(group_by="__key", order_by=in_order(rows)))
            text, repeat = rows["__key"], rows["__repeat"].cast("string")
        seed = ibis.literal(str(self.plan.split.seed))
        rows = rows.mutate(__hash=joined([seed, text, repeat], ":").hexdigest("md5"))
        return rows if self._has_key else rows.drop("__key", "__repeat")

    @property
    def _has_key(self) -> bool:
        return bool(self.plan.source.key or self.raw.key)

    def _key(self, rows: Any) -> list[str]:
        """Engines print other types than these in different ways."""
        types = rows.schema()
        usable = [name for name in rows.columns if _has_text(types[name])]
        key = list(self.plan.source.key or self.raw.key or usable)
        for name in key:
            if name not in usable:
                raise SchemaError(f"key column {name!r} must be text, integer or boolean", received=str(types[name]))
        if not key:
            raise SchemaError("rows need a column of text, integers or booleans", received=list(rows.columns))
        return key

    def usable(self, rows: Any) -> tuple[Any, int, dict[str, int]]:
        """Rows with what they need, ``__label``, ``__domain`` and, where they are read, ``__user_text``, ``__item_text``."""
        columns, plan = self.plan.columns, self.plan
        out = Quarantine(self.raw, plan.max_quarantine, self.out / "quarantine")
        rows = self._labelled(rows, out)
        rows = self._in_domains(rows, out)
        pairs = plan.negatives is not None or plan.filters.k_core
        for name, column, is_read in (
            ("__user_text", columns.user, pairs or plan.split.kind == "user"),
            ("__item_text", columns.item, pairs),
        ):
            if column is not None and is_read:  # every distinct value goes through Python
                rows = _with_text(rows, column, name)
        if plan.split.kind == "user" or plan.negatives is not None:
            out.refuse(rows["__user_text"].fill_null("") == "", "user missing")
        if plan.negatives is not None:
            out.refuse(rows["__item_text"].fill_null("") == "", "item missing")
        if plan.split.kind == "time":
            out.refuse(rows[columns.time].isnull(), "time missing")
        for name in self._number_columns():
            if rows[name].type().is_string():
                bad = ~rows[name].lower().re_search(NUMBER)
                out.refuse(bad, f"column {name!r} must be a number")
        if columns.weight is not None:
            weight = rows[columns.weight]
            weight = (weight.strip().nullif("").try_cast if weight.type().is_string() else weight.cast)("float64")
            out.refuse(~((weight > 0) & (weight < 1e38)).fill_null(False), "weight must be a number above 0")
        rows, rows_in = out.kept(self.engine, rows)
        return rows, rows_in, out.counts

    def _number_columns(self) -> list[str]:
        specs = self.plan.features.items()
        names = [spec.sources(name)[0] for name, spec in specs if spec.kind in ("numeric", "bucketed")]
        return list(dict.fromkeys([*names, *([self.plan.columns.weight] if self.plan.columns.weight else [])]))

    def _labelled(self, rows: Any, out: Quarantine) -> Any:
        column = self.plan.columns.label
        if not column:
            return rows.mutate(__label=ibis.literal(1, "int32"))
        rows = coded(rows, cells(rows, [column]), column, "__label", self.label, pa.int32())
        rule = "label must be a number" if self.plan.columns.label_rule else "label must be 0 or 1"
        absent = rows[column].isnull() | ((rows[column].strip() == "") if rows[column].type().is_string() else False)
        out.refuse(absent, "label missing")
        out.refuse(rows["__label"].isnull(), rule)
        return rows

    def _in_domains(self, rows: Any, out: Quarantine) -> Any:
        names = list(self.plan.columns.domains)
        groups = cells(rows, names)
        found = {domain_text([cell[name] for name in names]) for cell in groups.to_pylist()} - {""}
        self.domains = _ordered(found, () if self.known is None else self.known.schema.domains)
        place = {name: number for number, name in enumerate(self.domains)}
        rows = coded_together(
            rows, groups, names, "__domain", lambda values: place.get(domain_text(values)), pa.int32()
        )
        out.refuse(rows["__domain"].isnull(), "domain missing")
        return rows

    def filtered(self, rows: Any) -> Any:
        rows, dropped = filtered(self.engine, rows, self.plan.filters, time=self.plan.columns.time)
        self.dropped |= dropped
        present = sorted(cells(rows, ["__domain"]).column("__domain").to_pylist())
        if len(present) == len(self.domains) or self.known is not None:
            return rows
        old, self.domains = self.domains, tuple(self.domains[number] for number in present)
        place = {old.index(name): number for number, name in enumerate(self.domains)}
        moved = pa.table({"__domain": pa.array(place, pa.int32()), "__moved": pa.array(place.values(), pa.int32())})
        rows = rows.join(ibis.memtable(moved), "__domain")
        return rows.drop("__domain").rename(__domain="__moved")

    def divided(self, rows: Any) -> tuple[Any, int]:
        """Rows with ``__split``, sampled non-clicks among them, as far as they are needed; and how many were sampled."""
        plan, sampled_rows = self.plan, 0
        after = plan.negatives is not None and plan.negatives.exclude == "train"
        rows = rows.mutate(**{ORDER_COLUMN: self.engine.integer(rows["__hash"])})
        if plan.negatives is not None and not after:
            self.step("sample")
            rows, sampled_rows = self._with_negatives(rows)
        self.step("split")
        rows, left_out = with_split(self.engine, rows if after else self._needed(rows), plan.split, plan.columns.time)
        if left_out:
            self.dropped["in no split"] = left_out
        if after:
            self.step("sample")
            rows, sampled_rows = self._with_negatives(rows)
            rows = self.engine.stored(self._needed(rows))
        return rows, sampled_rows

    def _needed(self, rows: Any) -> Any:
        """The columns that are encoded or that a split looks at."""
        columns, split = self.plan.columns, self.plan.split
        names: list[str | None] = [s for name, spec in self.plan.features.items() for s in spec.sources(name)]
        names += [columns.user, columns.weight, split.column, columns.time if split.kind == "time" else None]
        names += ["__user_text" if split.kind == "user" else None, "__split"]
        keep = dict.fromkeys([ORDER_COLUMN, "__domain", "__label", *names])
        return rows.select(*(name for name in keep if name in rows.columns))

    def _with_negatives(self, rows: Any) -> tuple[Any, int]:
        columns, negatives = self.plan.columns, self.plan.negatives
        assert negatives is not None  # check_plan saw to it
        assert columns.item is not None
        clicks = rows.filter(rows["__label"] == 1)
        check_item_columns(clicks, self.plan)
        drawn = sampled(self.engine, clicks, negatives, self.domains, columns.item_columns, item=columns.item)
        return rows.union(drawn.select(*rows.columns)), size(drawn)

    def sizes(self, rows: Any) -> tuple[dict[str, int], dict[str, dict[str, dict[str, int]]]]:
        """Rows of each split; and of each split and domain, with how many are clicks."""
        found = cells(rows, ["__split", "__domain"], rows["__label"] == 1).to_pylist()
        sizes = {split: sum(cell["__size"] for cell in found if cell["__split"] == n) for n, split in enumerate(SPLITS)}
        at = {(cell["__split"], cell["__domain"]): (cell["__size"], cell["__chosen"]) for cell in found}
        domains = {
            split: {
                name: dict(zip(("rows", "positives"), at.get((number, place), (0, 0)), strict=True))
                for place, name in enumerate(self.domains)
            }
            for number, split in enumerate(SPLITS)
        }
        return sizes, domains

    def fitted(self, rows: Any, sizes: Mapping[str, int]) -> Encoder:
        train = rows.filter(rows["__split"] == 0)
        label = self.plan.columns.label if self.label is zero_or_one else ""
        return fit_encoder(self.engine, train, self.plan, self.domains, label or _LABEL, self.known, sizes["train"])

    def written(self, rows: Any, encoder: Encoder, sizes: Mapping[str, int]) -> dict[str, list[str]]:
        total = sum(sizes.values())
        if self.engine.name == "spark":
            frame = self.engine.frame(rows)
            return write_on_workers(frame, encoder, sizes, self.plan.shard_rows, self.out)
        columns = ColumnEncoder(encoder)
        piles = Piles(encoder.schema, sizes, self.plan.shard_rows, self.engine.work)
        shown = _bar(self.progress, "Encode and shuffle", 2 * total)
        for batch in self.engine.batches(rows):
            piles.deal(columns.encode(batch), batch.column(ORDER_COLUMN), batch.column("__split"))
            shown(batch.num_rows)
        return piles.write(self.out, shown)


def _has_text(kind: Any) -> bool:
    if kind.is_array():
        return bool(kind.value_type.is_string() or kind.value_type.is_integer())
    return bool(kind.is_string() or kind.is_integer() or kind.is_boolean())


def _text_of(column: Any) -> Any:
    if not column.type().is_array():
        return column.cast("string")
    return (column if column.type().value_type.is_string() else column.map(lambda each: each.cast("string"))).join(",")


def _with_order(rows: Any, time: str | None) -> Any:
    """Times that are numbers written as text, as in a CSV, become numbers: "9" comes before "10"."""
    if time is None or not rows[time].type().is_string():
        return rows
    text = rows[time].strip().nullif("")
    for pattern, kind in (("^-?[0-9]{1,18}$", "int64"), (NUMBER, "float64")):
        others = rows.filter(text.notnull() & ~text.lower().re_search(pattern))
        if not size(others):
            return rows.mutate(**{time: plain(text.cast(kind))})
    return rows.mutate(**{time: text})  # a blank is no time


def _with_text(rows: Any, column: str, name: str) -> Any:
    """``name``: the canonical text of a column; the text of an integer is the same everywhere."""
    if rows[column].type().is_integer():
        return rows.mutate(**{name: rows[column].cast("string").fill_null("")})
    return coded(rows, cells(rows, [column]), column, name, canonical_text, pa.string())


def _ordered(names: set[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """Domains in the order of their numbers: known ones stay where they are; others by number, or by text."""
    fresh = names - set(known)
    by_number = all(re.fullmatch(r"-?[0-9]+", name) for name in fresh)
    return (*known, *(sorted(fresh, key=lambda name: (int(name), name)) if by_number else sorted(fresh)))


def _facts(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
        for path in files
    }


def _steps(progress: Progress | None, name: str) -> Step:
    if progress is None:
        return lambda _: None
    task = progress.add_task(f"Prepare {name}", total=6)

    def step(what: str) -> None:
        progress.update(task, description=f"Prepare {name}: {what}", advance=1)

    return step


def _bar(progress: Progress | None, what: str, total: int) -> Callable[[int], None]:
    if progress is None:
        return lambda _: None
    task = progress.add_task(what, total=total)
    return lambda rows: progress.advance(task, rows)
