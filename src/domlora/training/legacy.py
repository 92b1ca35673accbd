"""The loop of the MLoRA authors' released code and the start of its two arms, each oddity as ``LegacyOptions`` say.

Everything else is this library's: rows, models, adapters, metrics, bundles.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from domlora.adapters.attach import AdapterOptions, attach_
from domlora.adapters.bank import distinct_layers
from domlora.errors import ConfigError, nearest
from domlora.evaluation.metrics import at_thresholds, macro_auc, wauc
from domlora.features.batch import Batch
from domlora.features.schema import Schema
from domlora.layers.dropout import Dropout
from domlora.layers.embedding import EmbeddingTable
from domlora.models.build import build_model
from domlora.training.fit import Fit, FitOptions, OnProgress, Rows, Run
from domlora.training.optimizers import Optimizer, OptimizerOptions, Rule
from domlora.training.quirks import TEMPERATURES, LegacyOptions
from domlora.training.rows import OneDomain
from domlora.training.validation import figures_of

__all__ = ["fit_legacy"]

_STD, _BASE_STD, _KERAS_RANGE, _L2, _EPSILON = 1e-2, 1e-4, 0.05, 1e-5, 1e-8


def fit_legacy(
    data: Rows,
    model_options: Mapping[str, Any],
    options: LegacyOptions,
    adapter: AdapterOptions | None = None,
    *,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[nn.Module, dict[str, Any], Fit]:
    """Build one arm and train it from scratch: the base, or base and adapters together if ``adapter`` is given.

    ``history`` of the result has ``threshold_wauc`` and ``threshold_macro_auc`` beside the exact figures.

    Args:
        model_options: ``name`` and options of ``build_model``; the name is a key of ``TEMPERATURES``.
        checkpoint, on_progress: as in :func:`domlora.training.fit.fit`.

    Returns:
        The model with the best weights, in evaluation mode; what ``build_model`` must be given to make its like; the fit.

    Raises:
        ConfigError: a backbone that the authors' code does not adapt, or a checkpoint of another run.
        EngineError: the loss is NaN or infinite.
        DataError: the validation split has no domain with two classes.
    """
    made, adapter = _as_released(model_options, options, adapter)
    torch.manual_seed(options.seed)
    model = build_model(schema=data.schema, **made)
    if adapter is not None:
        attach_(model, data.schema.num_domains, **asdict(adapter))
    keras = adapter is not None and made["name"] == "mlp"
    _start_(model, data.schema, options, keras=keras)
    run = _Legacy(model, data, options, _Adam(model, options, keras=keras), on_progress, checkpoint)
    with _dropout_of(model, options):
        return model, made, run.go(start_is_candidate=False)


def _as_released(
    model_options: Mapping[str, Any], options: LegacyOptions, adapter: AdapterOptions | None
) -> tuple[dict[str, Any], AdapterOptions | None]:
    """The options of the model and of its adapters, with the authors' temperature and their xDeepFM."""
    made, name = dict(model_options), model_options.get("name")
    if name not in TEMPERATURES:
        raise ConfigError(
            "the authors' code adapts nine backbones", received=name, next_step=nearest(str(name), TEMPERATURES)
        )
    if adapter is not None and options.temperature_of != "recipe":
        adapter = replace(adapter, temperature=float(TEMPERATURES[name][options.temperature_of]), rank=None)
    if name == "xdeepfm" and options.deepfm_for_xdeepfm:
        made = {key: value for key, value in made.items() if key not in ("cin_units", "split_half")}
        made["name"] = "deepfm"
    return made, adapter


# ------------------------------------------------------------------------------------------------------- the start


def _start_(model: Any, schema: Schema, options: LegacyOptions, *, keras: bool) -> None:
    adapters = distinct_layers(model)
    if options.embedding_start and isinstance(model.embedding, EmbeddingTable):
        _start_table_(model.embedding, schema, adapted=bool(adapters), keras=keras)
    if options.kernel_start:
        for layer in [*_linears(model.tower), model.head]:
            _glorot_(layer.weight, layer.in_features, layer.out_features, keras=keras)
    if options.adapter_start:
        for adapted in adapters.values():
            num_domains, fan_in, fan_out = adapted.lora_A.shape
            _glorot_(adapted.lora_A, num_domains * fan_in, num_domains * fan_out, keras=keras)


def _start_table_(table: EmbeddingTable, schema: Schema, *, adapted: bool, keras: bool) -> None:
    if keras:
        nn.init.uniform_(table.weight, -_KERAS_RANGE, _KERAS_RANGE)
        return
    nn.init.normal_(table.weight, 0.0, _STD if adapted else _BASE_STD)
    slot = 0
    for feature in schema.categorical:
        if feature.name == schema.domain:
            first = int(table.offsets[slot])
            nn.init.normal_(table.weight.detach()[first : first + feature.num_ids], 0.0, _BASE_STD)
        slot += feature.max_length


def _glorot_(weight: Tensor, fan_in: int, fan_out: int, *, keras: bool) -> None:
    if not weight.numel():  # an adapter of biases alone
        return
    std = math.sqrt(2.0 / (fan_in + fan_out))
    if keras:
        nn.init.uniform_(weight, -std * math.sqrt(3.0), std * math.sqrt(3.0))
    else:
        wide = std / 0.87962566103423978  # what is left of it when a normal is cut at two standard deviations
        nn.init.trunc_normal_(weight, std=wide, a=-2.0 * wide, b=2.0 * wide)


def _linears(tower: Any) -> list[nn.Linear]:
    """The shared layers of a tower, with adapters beside them or not."""
    return [getattr(layer, "base", layer) for layer in tower]


@contextmanager
def _dropout_of(model: Any, options: LegacyOptions) -> Iterator[None]:
    """Training inside the ``with`` block drops units as the authors' code does; the model is as before afterwards."""
    tower, handles = model.tower, []
    p: float = tower.dropout
    if distinct_layers(model) and (options.dead_dropout or options.dropout_before_activation):
        tower.dropout = 0.0
        if not options.dead_dropout:
            handles = [layer.register_forward_hook(_dropping(p)) for layer in _linears(tower)]
    try:
        yield
    finally:
        tower.dropout = p
        for handle in handles:
            handle.remove()


def _dropping(p: float) -> Any:
    dropout = Dropout(p)

    def hook(layer: nn.Module, _: Any, out: Tensor) -> Any:
        dropout.training = layer.training
        return dropout(out)

    return hook


# -------------------------------------------------------------------------------------------------------- the loop


class _Adam(Optimizer):
    """One Adam for all, with their L2: 1e-5 w² in the loss is 2e-5 w in the gradient, a ``weight_decay`` of torch."""

    def __init__(self, model: nn.Module, options: LegacyOptions, *, keras: bool) -> None:
        penalised = options.tables_l2 == "always" or (options.tables_l2 == "by_arm" and not keras)
        rule = Rule(lr=options.learning_rate)
        tables = replace(rule, weight_decay=2 * _L2 if penalised else 0.0)
        super().__init__(model, OptimizerOptions(tables=tables, dense=rule, adapters=rule))
        self.tensorflow = options.tensorflow_adam
        named = model.named_parameters() if penalised else ()
        self.kernels = [p for name, p in named if name.startswith("cross.kernels.")]

    def step(self, lr_factor: float = 1.0) -> None:
        """Move every parameter once."""
        (adam,) = self._parts.values()
        steps = 1 + next((int(state["step"]) for state in adam.state.values()), 0)
        for group in adam.param_groups:
            # torch adds epsilon to the corrected root: theirs, corrected alike, is the same
            group["eps"] = _EPSILON / math.sqrt(1.0 - group["betas"][1] ** steps) if self.tensorflow else _EPSILON
        for kernel in self.kernels:
            assert kernel.grad is not None
            kernel.grad.add_(kernel.detach(), alpha=2 * _L2)
        super().step(lr_factor)


class _Legacy(Run):
    """The authors' loop: an epoch over all domains, validation, patience, rollback."""

    def __init__(
        self,
        model: nn.Module,
        data: Rows,
        options: LegacyOptions,
        optimizer: _Adam,
        on_progress: OnProgress | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        self.legacy = options
        counts = (options.batch_size, options.max_epochs, options.patience)
        stage = FitOptions(*counts, monitor="macro_auc" if options.plain_mean else "wauc", seed=options.seed)
        super().__init__(model, data, stage, OptimizerOptions(), on_progress, checkpoint)
        self.optimizer = optimizer
        self.views: list[OneDomain] = []
        if options.domains_in_turn:
            views = [OneDomain(data, domain) for domain in range(-1, data.schema.num_domains)]
            self.views = [view for view in views if view.num_rows("train")]
            self.steps_per_epoch = sum(map(self.num_steps, self.views))

    def identify(self, rules: OptimizerOptions) -> dict[str, str]:
        """As any run, and the switches."""
        return {**super().identify(rules), "switches": repr(self.legacy)}

    def num_steps(self, view: OneDomain) -> int:
        """Batches of one domain."""
        return math.ceil(view.num_rows("train") / self.options.batch_size)

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """Batches of one domain, domain after domain in an order of seed and epoch alone, or mixed ones."""
        if not self.views:
            yield from super().batches(epoch, start)
        size, seed = self.options.batch_size, self.options.seed
        for view in random.Random(f"{seed}/{epoch}").sample(self.views, len(self.views)):
            done = min(start, self.num_steps(view))
            start -= done
            yield from view.batches("train", size, seed=seed, epoch=epoch, start=done)

    def advance(self) -> None:
        """An epoch; then weights go back to the best ones, and Adam's moments do not."""
        super().advance()
        if self.legacy.rollback:
            self.model.load_state_dict(self.best)

    @property
    def monitor(self) -> str:
        """The exact figure, or the one by thresholds."""
        return f"threshold_{self.options.monitor}" if self.legacy.threshold_auc else self.options.monitor

    def scores(self, model: nn.Module) -> dict[str, float]:
        """As any run, with figures by thresholds beside the exact ones."""
        said = self.say(model)
        rough = at_thresholds(said.probability)
        return {
            **figures_of(said),
            "threshold_wauc": wauc(said.label, rough, said.domain, said.weight),
            "threshold_macro_auc": macro_auc(said.label, rough, said.domain, said.weight),
        }
