"""The folder that all workers of a run read, and write into.

========================  ===================================================================================
``job.json``              fingerprints of base, start, recipe and data; a run goes on only with the same ones
``rows/``                 the rows cut by domain (:mod:`domlora.training.parallel.cut`)
``base/``                 schema, options of the model, weights, and the bundle's own adapters if it has any
``adapters/0000/toys@1/`` one domain's adapter as ``save_adapter`` writes it, and ``facts.json``
========================  ===================================================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from domlora.adapters.attach import AdapterOptions
from domlora.adapters.bank import adapter_parameters, base_state
from domlora.adapters.file import adapter_digests, base_fingerprint
from domlora.bundle import Bundle
from domlora.bundle.mapped import unshared
from domlora.bundle.names import adapter_folders
from domlora.errors import DataError
from domlora.files import new_folder
from domlora.models.build import stored_options
from domlora.training.checkpoint import check_same_run
from domlora.training.parallel.cut import cut
from domlora.training.rows import Rows
from domlora.training.stages import Onboarding, Recipe

__all__ = ["ADAPTERS", "BASE", "FACTS", "ROWS", "Job", "facts_at", "places_of", "prepare"]

ROWS, BASE, ADAPTERS, FACTS = "rows", "base", "adapters", "facts.json"
_JOB, _FOLDER_DOMAINS = "job.json", 256


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker must know; the rest it reads in the folder.

    Args:
        folder: of the run.
        adapter: options of the adapters.
        options: how one is trained.
        base, data: fingerprints.
    """

    folder: Path
    adapter: AdapterOptions
    options: Onboarding
    base: str
    data: str


def prepare(bundle: Bundle, data: Rows, recipe: Recipe, folder: Path) -> Job:
    """Write what workers need, as far as an earlier run with the same inputs did not.

    Raises:
        ConfigError: the folder is of a run with another base, start, recipe or data.
        DataError: the folder cannot be written, or what is there is damaged.
    """
    adapter, fingerprint, options = bundle.adapter or recipe.adapter, data.fingerprint(), recipe.onboard
    read = (options.fit, options.optimizer.adapters, options.prior_rows, options.min_steps, options.min_gain)
    job = Job(folder.absolute(), adapter, options, base_fingerprint(bundle.model), fingerprint)
    mine = {
        "base": job.base,
        "encoder": bundle.encoder.fingerprint(),
        "start": _digest(adapter_digests(bundle.model)) if bundle.adapter else "zero",
        "recipe": _digest([repr(adapter), repr(read)]),
        "data": fingerprint,
    }
    if (folder / _JOB).exists():
        check_same_run(folder, _read(folder / _JOB), mine)
    cut(data, folder / ROWS, fingerprint)
    if not (folder / BASE).exists():
        _write_base(bundle, folder / BASE)
    _write_job(folder, mine)
    return job


def places_of(folder: Path, domains: Sequence[str]) -> list[Path]:
    """Where each domain's adapter is, or will be; a few hundred in one folder, so that no folder is slow to list."""
    names = [Path(part).name for part in adapter_folders(domains).values()]
    return [folder / ADAPTERS / f"{n // _FOLDER_DOMAINS:04d}" / name for n, name in enumerate(names)]


def facts_at(place: Path) -> dict[str, Any]:
    """What is known of a domain that is done.

    Raises:
        DataError: the file is missing or damaged.
    """
    return _read(place / FACTS)


def _write_base(bundle: Bundle, folder: Path) -> None:
    with new_folder(folder) as fresh:
        (fresh / "schema.json").write_text(bundle.encoder.schema.to_json(), encoding="utf-8")
        (fresh / "model.json").write_text(json.dumps(stored_options(bundle.model_options)), encoding="utf-8")
        save_file(unshared(base_state(bundle.model)), fresh / "model.safetensors")
        if bundle.adapter is not None:
            banks = {name: bank.detach().contiguous() for name, bank in adapter_parameters(bundle.model)}
            save_file(banks, fresh / "adapters.safetensors")


def _write_job(folder: Path, identity: dict[str, str]) -> None:
    if not (folder / _JOB).exists():
        fresh = folder / f".{_JOB}"
        fresh.write_text(json.dumps(identity, indent=1), encoding="utf-8")
        fresh.replace(folder / _JOB)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"a file of a parallel run must be whole ({error})",
            received=str(path),
            next_step="Remove its folder, and what was in it is made again",
        ) from error
    return found
