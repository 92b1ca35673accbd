"""The daily update: the vocabulary grows, embeddings and adapters learn the new rows, the dense backbone stands still."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from glob import escape
from pathlib import Path

import torch
from torch import Tensor, nn

from domlora.adapters.attach import freeze_, movable
from domlora.adapters.bank import adapter_parameters
from domlora.bundle import Bundle
from domlora.errors import DataError
from domlora.evaluation.evaluate import Predictions, predict
from domlora.evaluation.gate import Verdict, judge, remember
from domlora.features.growth import check_grown
from domlora.models.growth import Piece, grown, pieces_of
from domlora.training.checkpoint import flat, in_parts, read_checkpoint
from domlora.training.fit import Fit, OnProgress, Rows, Run
from domlora.training.new_rows import EncodedRows
from domlora.training.optimizers import OptimizerOptions, parameter_groups
from domlora.training.replay import WithReplay
from domlora.training.stages import Recipe, Updating, with_vectors

__all__ = ["REMEMBERED", "gate", "moved", "update"]

_SCORED = 16384  # rows of a batch that is not trained on

REMEMBERED = "auc"
"""Where a bundle's ``facts`` keep what :func:`domlora.evaluation.gate.remember` found when it was published."""


def update(
    bundle: Bundle,
    data: EncodedRows,
    recipe: Recipe,
    *,
    replay: EncodedRows | None = None,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Bundle, Fit]:
    """Learn the rows of a day.

    What moves: embedding tables, adapters, and what ``recipe.update.moving`` names. The model as it was is a candidate on
    the validation rows, so that a day without anything to learn changes nothing. With lazy rules a row of a table that no
    row of the day reads keeps its bits.

    Args:
        bundle: is not changed.
        data: rows prepared with ``--grow BUNDLE``, or with the bundle's own encoder.
        recipe: its ``update``.
        replay: earlier rows, encoded by the bundle's encoder, the data's, or one that they grew out of; ``replay_share`` of
            each batch.
        checkpoint, on_progress: as in :func:`domlora.training.fit.fit`.

    Returns:
        The bundle for the grown vocabulary, and what was found: ``best_epoch`` 0 is the model as it was.

    Raises:
        SchemaError: the data's encoder did not grow out of the bundle's, or out of that of the earlier rows; or the base has
            weights of each domain and the day brought a new one.

    Example:
        >>> from domlora.data.synthetic import World
        >>> from domlora.training.stages import pretrain
        >>> world = World(num_domains=3)
        >>> first, second = (world.dataset(2000, seed=seed)[0] for seed in (1, 2))
        >>> options = {"name": "mlp", "hidden_units": [8]}
        >>> model, _ = pretrain(first, options, Recipe())
        >>> day, found = update(Bundle(model, options, first.encoder), second, Recipe(), replay=first)
        >>> len(found.history)  # the start, and after the day
        2
    """
    check_grown(bundle.encoder, data.encoder)
    if replay is not None:
        check_grown(replay.encoder, data.encoder)
    rules = recipe.update
    options = with_vectors(bundle.model_options, data)
    torch.manual_seed(rules.fit.seed)
    model = grown(bundle.model, options, bundle.encoder.schema, data.encoder.schema)
    moves = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    freeze_(model, except_=[*map(escape, _tables(model)), *movable(model, rules.moving)])
    rows: Rows = data
    if replay is not None and rules.replay_share:
        rows = WithReplay(data, replay, rules.replay_share, rules.fit.batch_size)
    run = _Day(model, rows, rules, on_progress, checkpoint)
    before = moved(bundle.optimizer, pieces_of(bundle.model, model), model)
    if rules.optimizer_state == "carry":
        run.optimizer.load_named_state(
            model, {name: value.clone() for name, value in before.items()}
        )  # steps are in place
    found = run.go(start_is_candidate=True)
    state = run.optimizer.named_state(model) if found.best_epoch else before
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(moves[name])
    kept = state if rules.optimizer_state == "carry" else {}
    return replace(bundle, model=model, model_options=options, encoder=data.encoder, optimizer=kept), found


def gate(live: Bundle, candidate: Bundle, data: Rows, rules: Updating, split: str = "test") -> tuple[Bundle, Verdict]:
    """Judge an updated bundle against the live one on the newest held-out rows (:mod:`domlora.evaluation.gate`).

    Ids that the live bundle does not know are out-of-vocabulary to it, as they were when the rows were shown.

    Returns:
        The candidate with what the next day's gate needs among its ``facts``, and the verdict. A domain with too few rows
        today is remembered as it was.

    Raises:
        DataError: the split is empty.
    """
    if not data.num_rows(split):
        raise DataError(
            f"a gate needs rows of the {split} split",
            received=0,
            next_step="Prepare the day with a split that has some",
        )
    domains = candidate.encoder.schema.domains
    before = grown(live.model, live.model_options, live.encoder.schema, candidate.encoder.schema)
    old, new = (_say(model, data, split) for model in (before, candidate.model))
    known = live.facts.get(REMEMBERED, {})
    verdict = judge(old, new, domains, rules.gate, known)
    today = remember(new, domains)
    enough = {name for name, found in today.items() if found["rarer"] >= rules.gate.min_rarer or name not in known}
    remembered = {**known, **{name: today[name] for name in enough}}
    facts = {**candidate.facts, REMEMBERED: remembered, "gate": verdict.to_dict()}
    return replace(candidate, facts=facts), verdict


def _say(model: nn.Module, data: Rows, split: str) -> Predictions:
    return predict(model, data.batches(split, _SCORED))


def _tables(model: nn.Module) -> list[str]:
    """Names of the embedding tables that learn; given vectors that stand still are none of them."""
    tables = {id(parameter) for parameter in parameter_groups(model)["tables"]}
    return [name for name, parameter in model.named_parameters() if id(parameter) in tables]


class _Day(Run):
    """A run whose checkpoint tells days of another policy apart, and has the optimizer's state when it has ended too."""

    def __init__(
        self, model: nn.Module, rows: Rows, rules: Updating, on_progress: OnProgress | None, checkpoint: Path | None
    ) -> None:
        self.policy = rules.optimizer_state
        super().__init__(model, rows, rules.fit, rules.optimizer, on_progress, checkpoint)

    def identify(self, rules: OptimizerOptions) -> dict[str, str]:
        return {**super().identify(rules), "optimizer_state": self.policy}

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), **flat({"optimizer": self.optimizer.state()})}

    def restore(self, folder: Path) -> None:
        super().restore(folder)
        if self.ended:  # killed before its bundle was written
            self.optimizer.load_state(in_parts(read_checkpoint(folder)[0])["optimizer"])


def moved(state: Mapping[str, Tensor], pieces: Mapping[str, list[Piece]], model: nn.Module) -> dict[str, Tensor]:
    """What an optimizer remembers, with the rows of grown tables and banks where they are now; new ones remember nothing."""
    heights = {name: len(p) for name, p in model.named_parameters() if p.dim()}
    banks = {name for name, _ in adapter_parameters(model)}
    moved = {}
    for key, tensor in state.items():
        name = key.split("/")[1]
        if tensor.dim() == 0 or name not in heights or not (name in pieces or name in banks):
            moved[key] = tensor.clone()  # an optimizer goes on in it
            continue
        moved[key] = tensor.new_zeros(heights[name], *tensor.shape[1:])
        for piece in pieces.get(name, [Piece(0, 0, min(len(tensor), heights[name]))]):
            moved[key][piece.new : piece.new + piece.length] = tensor[piece.old : piece.old + piece.length]
    return moved
