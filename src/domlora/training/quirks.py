"""The oddities of the MLoRA authors' released code, each a switch; :mod:`domlora.training.legacy` obeys them.

The published gains compare a base and an adapted model that differ in more than adapters. Here each difference, and each
oddity of the authors' loop, can be turned off by itself, so that a reader sees which of them makes which part of a gain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from domlora.errors import ConfigError, nearest

__all__ = ["TEMPERATURES", "LegacyOptions"]

TablesL2 = Literal["by_arm", "always", "never"]
TemperatureOf = Literal["movielens", "amazon-6", "taobao-10", "recipe"]

_TUNED = {
    "mlp": (16, 16, 256),
    "wdl": (16, 16, 16),
    "nfm": (4, 256, 16),
    "autoint": (4, 16, 16),
    "pnn": (16, 16, 16),
    "dcn": (16, 128, 16),
    "fibinet": (32, 16, 256),
    "deepfm": (32, 16, 256),
    "xdeepfm": (32, 16, 16),
}
TEMPERATURES: dict[str, dict[str, int]] = {
    name: dict(zip(get_args(TemperatureOf)[:3], values, strict=True)) for name, values in _TUNED.items()
}
"""The temperature in the authors' configuration of each backbone and data set (``lora_reduce`` there)."""


@dataclass(frozen=True, slots=True)
class LegacyOptions:
    """Every default is what the authors' code does; a switch that is off leaves what this library does.

    Their *DeepCTR family* holds all base models and all adapted ones but the MLP; their *Keras family* the adapted MLP.

    Args:
        dead_dropout: units are dropped in the base alone. In theirs the adapted layer loses Keras' learning-phase mark, so
            that its dropout never acts, while the base drops 0.5.
        dropout_before_activation: where it acts in the adapted arm, dropout stands before the activation and on the shared
            branch alone, ``relu(dropout(x W + b) + (x A_d) B_d + c_d)``; off, behind the activation as in the base.
        domains_in_turn: an epoch goes through whole domains, one after another in a random order, in batches of one domain;
            off, batches are mixed. Holds the rows of the training split in memory.
        rollback: after an epoch that did not improve, weights go back to the best ones while Adam's state stays, so that
            patience counts attempts from the best point.
        embedding_start: vectors start from N(0, 1e-4²) in base models; in adapted ones from N(0, 1e-2²), the domain's from
            N(0, 1e-4²); in the adapted MLP from U(-0.05, 0.05). Off, all from N(0, ``init_std``²). Only where one table
            holds all vectors.
        kernel_start: tower and head start glorot normal, cut at two standard deviations, in the DeepCTR family and glorot
            uniform in the Keras family; off, glorot normal.
        adapter_start: ``A`` has the fans of the whole bank, which makes it smaller by sqrt(D); off, those of one domain's.
        tables_l2: 1e-5 times the sum of squares of whole tables (and of DCN's cross kernels) is in the loss ``by_arm``, that
            is in the DeepCTR family alone, or ``always`` or ``never``. Adam draws rows that no batch holds to zero by it.
        tensorflow_adam: Adam adds its epsilon to the root of the uncorrected second moment, as TensorFlow 1 does.
        threshold_auc: the AUC that selects is a trapezoid over 500 thresholds; off, exact.
        plain_mean: the AUC that selects is the plain mean of the domains'; off, weighted by their rows.
        temperature_of: the data set whose tuned temperature of the backbone counts, or ``recipe`` for that of the recipe.
        deepfm_for_xdeepfm: ``xdeepfm`` builds a DeepFM, because they look for "deepfm" in the name first.
        batch_size, max_epochs, patience, learning_rate: theirs.
        seed: order of rows and domains, start, dropout. Theirs are not seeded.

    Source: the code at github.com/gaohaining/MLoRA, read and, where behaviour was in doubt, run under TensorFlow 1.12.
    Intended differences that are no switches: their initialisers draw the same numbers in every run, ours depend on the
    seed; their rows pass a shuffle buffer of 10,000, ours are permuted; a domain of one class counts as 0 in their mean and
    not at all in ours. Their heads, a map without a bias and a global one, are the same function as ours.
    """

    dead_dropout: bool = True
    dropout_before_activation: bool = True
    domains_in_turn: bool = True
    rollback: bool = True
    embedding_start: bool = True
    kernel_start: bool = True
    adapter_start: bool = True
    tables_l2: TablesL2 = "by_arm"
    tensorflow_adam: bool = True
    threshold_auc: bool = True
    plain_mean: bool = True
    temperature_of: TemperatureOf = "movielens"
    deepfm_for_xdeepfm: bool = True
    batch_size: int = 1024
    max_epochs: int = 99_999
    patience: int = 3
    learning_rate: float = 1e-3
    seed: int = 1

    def __post_init__(self) -> None:
        if min(self.batch_size, self.max_epochs, self.patience) < 1 or self.seed < 0:
            raise ConfigError("legacy needs counts of at least 1 and seed >= 0", received=self)
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError("learning_rate must be above 0", received=self.learning_rate)
        for value, kind in ((self.tables_l2, TablesL2), (self.temperature_of, TemperatureOf)):
            if value not in get_args(kind):
                raise ConfigError("unknown option of legacy", received=value, next_step=nearest(value, get_args(kind)))
