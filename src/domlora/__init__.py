"""Many domains, one click model, a small low-rank adapter for each domain.

The names below are what a program needs; they load when first used, so that importing the package is instant.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Spinning OpenMP threads make a step several times slower on a busy machine; the library reads this when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from domlora.adapters.attach import AdapterOptions as AdapterOptions
    from domlora.adapters.attach import attach_ as attach_
    from domlora.adapters.attach import detach_ as detach_
    from domlora.adapters.attach import freeze_ as freeze_
    from domlora.adapters.attach import merge_ as merge_
    from domlora.adapters.bank import add_domain_ as add_domain_
    from domlora.adapters.bank import load_rows_ as load_rows_
    from domlora.adapters.bank import remove_domain_ as remove_domain_
    from domlora.adapters.bank import rows_of as rows_of
    from domlora.adapters.bank import trainable_report as trainable_report
    from domlora.adapters.file import load_adapter_ as load_adapter_
    from domlora.adapters.file import save_adapter as save_adapter
    from domlora.adapters.root import disabled as disabled
    from domlora.adapters.root import routed as routed
    from domlora.bundle import Bundle as Bundle
    from domlora.data.dataset import Dataset as Dataset
    from domlora.data.prepare import prepare as prepare
    from domlora.data.synthetic import World as World
    from domlora.errors import DomloraError as DomloraError
    from domlora.evaluation.evaluate import by_domain as by_domain
    from domlora.evaluation.evaluate import predict as predict
    from domlora.features.batch import Batch as Batch
    from domlora.features.encode import Encoder as Encoder
    from domlora.features.schema import Feature as Feature
    from domlora.features.schema import Schema as Schema
    from domlora.models.build import MODELS as MODELS
    from domlora.models.build import build_model as build_model
    from domlora.training.fit import fit as fit
    from domlora.training.stages import Recipe as Recipe
    from domlora.training.stages import adapt as adapt
    from domlora.training.stages import pretrain as pretrain

_FACE = {
    "AdapterOptions": "adapters.attach",
    "Batch": "features.batch",
    "Bundle": "bundle",
    "Dataset": "data.dataset",
    "DomloraError": "errors",
    "Encoder": "features.encode",
    "Feature": "features.schema",
    "MODELS": "models.build",
    "Recipe": "training.stages",
    "Schema": "features.schema",
    "World": "data.synthetic",
    "adapt": "training.stages",
    "add_domain_": "adapters.bank",
    "attach_": "adapters.attach",
    "build_model": "models.build",
    "by_domain": "evaluation.evaluate",
    "detach_": "adapters.attach",
    "disabled": "adapters.root",
    "fit": "training.fit",
    "freeze_": "adapters.attach",
    "load_adapter_": "adapters.file",
    "load_rows_": "adapters.bank",
    "merge_": "adapters.attach",
    "predict": "evaluation.evaluate",
    "prepare": "data.prepare",
    "pretrain": "training.stages",
    "remove_domain_": "adapters.bank",
    "routed": "adapters.root",
    "rows_of": "adapters.bank",
    "save_adapter": "adapters.file",
    "trainable_report": "adapters.bank",
}

__all__ = sorted(_FACE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'domlora' has no attribute {name!r}")
    return getattr(import_module(f"domlora.{_FACE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
