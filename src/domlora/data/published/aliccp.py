"""Ali-CCP: impressions in Taobao with clicks and purchases; field 301, where the item was shown, is the domain.

Source: Ma et al., Entire Space Multi-Task Model, SIGIR 2018, which released the data on Alibaba's Tianchi as data set 408.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from domlora.data.engine import Engine
from domlora.data.files import Archive, find_raw
from domlora.data.published.tables import Reading, check_listed_once, options_of
from domlora.data.raw import RawTable

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["ali_ccp", "packed_fields"]

_FILES = (
    "sample_skeleton_train.csv",
    "common_features_train.csv",
    "sample_skeleton_test.csv",
    "common_features_test.csv",
)
ALI_CCP = Archive(
    title="Ali-CCP",
    folder="ali-ccp",
    layouts=(
        _FILES,
        tuple(f"{'train' if 'train' in name else 'test'}/{name}" for name in _FILES),
        tuple(f"{'sample_train' if 'train' in name else 'sample_test'}/{name}" for name in _FILES),
    ),
    publisher="Tianchi, data set 408",
)

_SAMPLE = ("sample_id", "click", "buy", "__common", "__count", "__features")
_COMMON = ("__index", "__count", "__features")
_OF_SAMPLE = ("205", "206", "207", "216", "301", "508", "509", "702")
_LISTS_OF_SAMPLE = ("210", "853")
_OF_USER = ("101", "121", "122", "124", "125", "126", "127", "128", "129")
_LISTS_OF_USER = ("109_14", "110_14", "127_14", "150_14")
# id \x02 value \x03 weight; the weight of most is 1
_ENTRY = r"^(?P<field>[^\x02]*)\x02(?P<id>[^\x03]*)"


def ali_ccp(engine: Engine, raw: Path | None, options: Mapping[str, Any], progress: Progress | None = None) -> RawTable:
    """Impressions joined with what is known of their users; a column for each published field, called by its number.

    * user: 101 user, 121 and 122 profile, 124 gender, 125 age, 126 and 127 spending, 128 occupation, 129 place;
      lists of what the user dealt with before: 109_14 categories, 110_14 shops, 127_14 brands, 150_14 intentions
    * item: 205 item, 206 category, 207 shop, 216 brand; list 210 intentions
    * both: 508, 509, 702 and list 853, the user's dealings with the item's category, shop, brand and intentions
    * 301: where it was shown

    ``click`` and ``buy`` are 0 or 1. ``split`` is ``test`` for the published test file; of the published training file a
    tenth, by a hash of ``sample_id``, is ``valid`` and the rest ``train``. Weights of the lists' elements are left out.
    """
    options_of("ali-ccp", options)
    paths = find_raw(ALI_CCP, raw, progress)
    reading = Reading(engine, paths, progress)
    train, test = (_impressions(reading, *pair) for pair in (paths[:2], paths[2:]))
    held_out = engine.number(train["sample_id"].fill_null("")) % 10 == 0
    train = train.mutate(split=ibis.ifelse(held_out, "valid", "train"))
    table = train.union(test.mutate(split=ibis.literal("test")))
    return reading.finished("ali-ccp", table, ("split", "sample_id"))


def _impressions(reading: Reading, skeleton: Path, common: Path) -> Any:
    samples = _table(reading, skeleton, _SAMPLE, partial(packed_fields, single=_OF_SAMPLE, lists=_LISTS_OF_SAMPLE))
    users = _table(reading, common, _COMMON, partial(packed_fields, single=_OF_USER, lists=_LISTS_OF_USER))
    check_listed_once(users, "__index", common)
    rows = samples.left_join(users, samples["__common"] == users["__index"])
    return rows.drop("__common", "__index")


def _table(
    reading: Reading, path: Path, names: tuple[str, ...], fields: Callable[[pa.Array], dict[str, pa.Array]]
) -> Any:
    """A file with its packed features spread over columns."""
    kept = [name for name in names if name not in ("__count", "__features")]

    def spread(batch: pa.RecordBatch) -> pa.Table:
        return pa.table({**{name: batch.column(name) for name in kept}, **fields(batch.column("__features"))})

    texts = reading.delimited([path], names=names, quote=None)
    return reading.table(reading.rewritten(texts, spread, [*kept, "__features"]))


def packed_fields(packed: pa.Array, single: tuple[str, ...], lists: tuple[str, ...]) -> dict[str, pa.Array]:
    r"""Texts ``field \x02 id \x03 weight \x01 field ...`` as a column a field.

    Args:
        packed: a text a row.
        single: fields with one id; the first counts.
        lists: fields with several.
    """
    entries = pc.split_pattern(packed.cast(pa.string()).fill_null(""), "\x01")
    row = pc.list_parent_indices(entries).to_numpy()
    parts = pc.extract_regex(entries.flatten(), _ENTRY)
    field, value = (pc.struct_field(parts, name) for name in ("field", "id"))
    columns = {}
    for name in (*single, *lists):
        place = np.flatnonzero(pc.equal(field, name).fill_null(False).to_numpy(zero_copy_only=False))
        if name in lists:
            ends = np.cumsum(np.bincount(row[place], minlength=len(packed)))
            offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
            columns[name] = pa.ListArray.from_arrays(offsets, value.take(pa.array(place)))
        else:
            rows, first = np.unique(row[place], return_index=True)
            at = np.full(len(packed), -1)
            at[rows] = place[first]
            columns[name] = value.take(pa.array(at, mask=at < 0))
    return columns
