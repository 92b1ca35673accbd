"""A cross-fitted second stage: adapters learn from rows whose labels the embeddings have not seen.

Embeddings of ids remember the labels of the rows they were trained on. Adapters that are trained on the same rows learn
to trust that memory, and on new rows it is not there. So the training rows are cut into folds, every fold gets tables of
its own that are trained on the rows of the others, and each row is scored with those of its fold while adapters train.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from domlora.adapters.attach import freeze_
from domlora.adapters.bank import base_state
from domlora.errors import ConfigError, DataError
from domlora.features.batch import Batch
from domlora.features.schema import Schema
from domlora.layers.domain_linear import DomainRows
from domlora.models.build import build_model
from domlora.training.each_domain import adapt_each
from domlora.training.fit import Fit, OnProgress, Rows, fit
from domlora.training.optimizers import parameter_groups
from domlora.training.rows import batches_of
from domlora.training.stages import CrossFit, Recipe, with_vectors

__all__ = ["crossfit", "fold_of"]

_LOW_BITS = (1 << 32) - 1
_PLACE, _FACTOR = 0x9E3779B9, 0x45D9F3B  # odd; 32 bits times the 27 of the factor do not overflow


def crossfit(
    base: nn.Module,
    data: Rows,
    model_options: Mapping[str, Any],
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> Fit:
    """Give a trained base adapters, in place, and train them on rows that are scored with tables of other rows.

    1. Training rows are cut into folds by :func:`fold_of`.
    2. For each fold ``k`` fresh tables, drawn with the seed of their stage plus ``k``, are trained on the rows of all other
       folds under the frozen rest of the base, whose coordinates they share by that; they stop early on the validation rows.
       Given vectors that are not learned stay as they are.
    3. Adapters are trained on the frozen base as ``auto`` trains them: each domain stops by itself, with the base as a
       candidate. A training row is scored with the tables of its fold, a validation row with the base's.

    The result is the base, bit for bit, with adapters; nothing of the folds is left. Unknown domains get the base. The rest
    of the base has seen all labels, but holds few numbers to remember them with. Training rows are kept in memory while
    tables are trained, and the tables of all folds until the end. A fold takes about as long as a base.

    Args:
        base: as ``build_model`` makes it of ``model_options``; changed in place.
        recipe: its ``crossfit``, ``adapter``, ``adapt`` and ``auto``.

    Returns:
        The fit of the adapters, in whose seconds are those of the tables.

    Raises:
        ConfigError: the base has no tables to learn, or ``recipe.adapt.moving`` is not empty.
        DataError: all training rows are in one fold.

    Source: our own; cross-fitting as in Chernozhukov et al. 2018, "Double/debiased machine learning for treatment and
    structural parameters", where what is estimated first never sees the rows that it is used on.
    """
    fits: list[Fit] = []

    def crossed(model: nn.Module) -> nn.Module:
        tables, found = _fit_tables(model, data, model_options, recipe.crossfit, checkpoint, on_progress)
        fits.extend(found)
        return _Crossed(model, recipe.crossfit.folds, tables)

    folder = None if checkpoint is None else checkpoint / "adapters"
    result = adapt_each(base, data, recipe, stepped=crossed, checkpoint=folder, on_progress=on_progress)
    result.seconds += sum(each.seconds for each in fits)
    return result


def fold_of(ids: Tensor, num_folds: int) -> Tensor:
    """The fold of each row: a hash of all its ids, so that rows of equal ids share one, in any split and order.

    ``m(sum_s m(ids_s + s c)) mod num_folds``; ``m`` mixes 32 bits: twice ``h = (h ^ h >> 16) f``, then ``h ^ h >> 16``.

    **Shape**: ``ids (B, S)`` int64 to ``(B,)`` int64.

    Example:
        >>> fold_of(torch.tensor([[2, 7], [7, 2], [2, 7]]), num_folds=3).tolist()
        [2, 1, 2]
    """
    places = torch.arange(ids.shape[1], device=ids.device) * _PLACE
    return _mixed(_mixed(ids + places).sum(1)) % num_folds


def _mixed(h: Tensor) -> Tensor:
    h = h & _LOW_BITS
    for _ in range(2):
        h = ((h ^ (h >> 16)) * _FACTOR) & _LOW_BITS
    return h ^ (h >> 16)


def _fit_tables(
    model: nn.Module,
    data: Rows,
    model_options: Mapping[str, Any],
    options: CrossFit,
    checkpoint: Path | None,
    on_progress: OnProgress | None,
) -> tuple[dict[int, dict[str, Tensor]], list[Fit]]:
    """Tables for each fold that holds rows, by the names they have in the model, and how they were found."""
    made, stage, device = with_vectors(model_options, data), options.tables, next(model.parameters()).device
    rows, fold = _folded(data, options.folds)
    tables: dict[int, dict[str, Tensor]] = {}
    fits = []
    for k in np.unique(fold.numpy()).tolist():
        other = _OtherFolds(data, rows.take(fold != k), f"all but fold {k} of {options.folds}")
        fresh = _with_fresh_tables(base_state(model), data.schema, made, stage.fit.seed + k).to(device)
        folder = None if checkpoint is None else checkpoint / f"fold-{k}"
        fits.append(fit(fresh, other, stage.fit, stage.optimizer, checkpoint=folder, on_progress=on_progress))
        tables[k] = {name: p.detach() for name, p in fresh.named_parameters() if p.requires_grad}
    return tables, fits


def _folded(data: Rows, num_folds: int) -> tuple[Batch, Tensor]:
    """All training rows, and the fold of each."""
    rows = next(iter(data.batches("train", max(data.num_rows("train"), 1))), None)
    if rows is None:
        raise DataError("the train split needs at least one row", received=0)
    fold = fold_of(rows.ids, num_folds)
    if bool((fold == fold[0]).all()):
        raise DataError(
            "training rows must fall into two folds at least",
            received=f"{len(fold)} rows in one",
            next_step="Rows of equal ids share a fold: take another method where ids are few",
        )
    return rows, fold


def _with_fresh_tables(
    base: Mapping[str, Tensor], schema: Schema, model_options: Mapping[str, Any], seed: int
) -> nn.Module:
    """The base without adapters, frozen but for the tables, which start anew."""
    torch.manual_seed(seed)
    model = build_model(schema=schema, **model_options)
    learned = {id(parameter) for parameter in parameter_groups(model)["tables"]}
    fresh = {name: p.detach().clone() for name, p in model.named_parameters() if id(p) in learned}
    if not fresh:
        raise ConfigError("crossfit needs a model with tables to learn", received=type(model).__name__)
    for name, table in fresh.items():
        if not table.isfinite().all():
            raise ConfigError(
                "crossfit needs the vectors that learned tables start from",
                received=f"the width of {name} alone",
                next_step="Give model.pretrained, or prepare the data with them",
            )
    model.load_state_dict({**base, **fresh})
    return freeze_(model, except_=list(fresh))


class _OtherFolds:
    """The training rows outside a fold, with all validation rows."""

    def __init__(self, data: Rows, train: Batch, name: str) -> None:
        self.data, self.train, self.name = data, train, name

    @property
    def schema(self) -> Schema:
        return self.data.schema

    def num_rows(self, split: str) -> int:
        return self.train.num_rows if split == "train" else self.data.num_rows(split)

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int | None = None,
        epoch: int = 0,
        sort_by_domain: bool = True,
        start: int = 0,
    ) -> Iterator[Batch]:
        if split != "train":
            return self.data.batches(
                split, batch_size, seed=seed, epoch=epoch, sort_by_domain=sort_by_domain, start=start
            )
        return batches_of(self.train, batch_size, seed=seed, epoch=epoch, start=start)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.data.fingerprint()} {self.name}".encode()).hexdigest()


class _Crossed(nn.Module):
    """A model whose rows are scored with the tables of their folds: ``logit = model(row; tables[fold_of(row)])``.

    Shares the model's parameters; the tables are none of its own, so that no optimizer moves them.
    """

    def __init__(self, model: nn.Module, num_folds: int, tables: Mapping[int, dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self.num_folds, self.tables = model, num_folds, tables

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Crossed:
        """Tables go where the model goes."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tables = {fold: {name: fn(each) for name, each in its.items()} for fold, its in self.tables.items()}
        return self

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        rows = DomainRows()
        rows.group_(fold_of(ids, self.num_folds))
        parts = zip(*map(rows.split, (ids, dense, domain)), strict=True)
        tables = [self.tables[fold] for fold in rows.places]
        return rows.join([functional_call(self.model, its, part) for its, part in zip(tables, parts, strict=True)])
