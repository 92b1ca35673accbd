"""Write a prepared dataset as the MLoRA authors' code reads it: CSV files of uid, pid, domain and label in ``domain_N``.

    python studies/authors_layout.py data/ml-1m THEIRS/dataset/Movielens/split_by_gender

so that their code (gaohaining/MLoRA on GitHub) can be run on the very rows that ``studies/legacy.toml`` trains on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from domlora.data.dataset import Dataset

_SPLITS = {"train": "train", "valid": "val", "test": "test"}
_FEATURES = {"uid": 0, "pid": 1}  # of MovieLens-1M, in the order of its plan


def write(data: Dataset, folder: Path) -> None:
    """Rows of each domain and split in an order drawn once, and the heights of the tables."""
    rng = np.random.default_rng(0)
    for ours, theirs in _SPLITS.items():
        rows = np.concatenate(
            [np.column_stack([b.ids[:, :2], b.domain, b.label.long()]) for b in data.batches(ours, 65536)]
        )
        for domain in range(data.schema.num_domains):
            place = folder / f"domain_{domain}"
            place.mkdir(parents=True, exist_ok=True)
            mine = rng.permutation(rows[rows[:, 2] == domain])
            np.savetxt(place / f"{theirs}.csv", mine, "%d", ",", header="uid,pid,domain,label", comments="")
            (place / "domain_property.json").write_text(json.dumps({"ctr_ratio": float(mine[:, 3].mean())}))
    (folder / "processed_data").mkdir(exist_ok=True)
    for name, feature in _FEATURES.items():
        height = {"id": data.schema.categorical[feature].num_ids}
        (folder / "processed_data" / f"{name}2id.json").write_text(json.dumps(height))


if __name__ == "__main__":
    write(Dataset.open(sys.argv[1]), Path(sys.argv[2]))
