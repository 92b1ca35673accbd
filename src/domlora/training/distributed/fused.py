"""A run whose tables FBGEMM keeps and, on ranks, TorchRec cuts: each rank keeps, moves and saves its own rows."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from domlora.bundle.mapped import on_disk
from domlora.errors import ConfigError
from domlora.features.batch import Batch
from domlora.layers.rows import cut_tables
from domlora.training.checkpoint import flat, write_checkpoint
from domlora.training.distributed.blocks import agreed, read_blocks_, write_blocks
from domlora.training.distributed.tables import Tables
from domlora.training.engine import engine
from domlora.training.fit import Fit, Run
from domlora.training.guard import check_finite
from domlora.training.optimizers import OptimizerOptions

__all__ = ["FusedRun"]


class FusedRun(Run):
    """A run as any, with ``tables`` in place of the rows of its model's tables and ``best_rows`` in place of their best.

    A checkpoint has them in blocks, and any number of ranks goes on from those of any other.

    Raises:
        ConfigError: an average of the weights, which would cost as much as the tables are long in each step; or as
            :class:`~domlora.training.distributed.tables.Tables`.
    """

    def rules_left(self, rules: OptimizerOptions) -> OptimizerOptions:
        """All but the rule of the tables, whose rows are taken out of the model here."""
        if self.options.average_decay or self.options.device not in ("", "cpu"):
            raise ConfigError(
                "fused tables are on the CPU, and weights have no average with them",
                received=f"average_decay={self.options.average_decay}, device={self.options.device!r}",
                next_step="Leave both out, or set tables.name to 'rowwise_adagrad', which has the same formula",
            )
        self.rules, self.best_rows = rules, dict[str, Tensor]()
        self.tables = Tables(self.model, rules.tables)
        return replace(rules, tables=replace(rules.tables, name="rowwise_adagrad"))

    @staticmethod
    def building() -> AbstractContextManager[None]:
        """Tables are cut from the start: a rank has its own rows alone."""
        return cut_tables(engine().rank, engine().size)

    def identify(self, rules: OptimizerOptions) -> dict[str, str]:
        """With what was given, and the rows that were taken out of the model."""
        found = super().identify(rules)
        return {**found, "optimizer": repr(self.rules), "start": f"{found['start']} {self.tables.digest()}"}

    def run(self, start_is_candidate: bool) -> Fit:
        found = super().run(start_is_candidate)
        self.tables.give_back(self.best_rows, self.checkpoint)
        self.best_rows = {}
        return found

    def step(self, batch: Batch) -> float:
        self.tables.set_lr_factor(self.lr_factor())  # rows move while gradients are found
        return super().step(batch)

    def remember(self, model: nn.Module) -> None:
        super().remember(model)
        self.keep_best()

    def keep_best(self) -> None:
        """Take the rows as the best: on disk where checkpoints are, because memory has enough with those that move."""
        moving, folder = self.tables.sums(), None if self.checkpoint is None else self.checkpoint.parent
        for name, rows in self.tables.rows().items():
            if name not in self.best_rows:
                self.best_rows[name] = torch.empty_like(rows) if folder is None else on_disk(rows.shape, folder)
            elif name not in moving:
                continue
            self.best_rows[name].copy_(rows)

    def blocks(self) -> dict[str, Tensor]:
        """This rank's rows of what a checkpoint holds, the memory that moves."""
        going_on = {} if self.ended else {"model": self.tables.rows(), "sums": self.tables.sums()}
        return flat({"best": self.best_rows, **going_on})

    def wholes(self) -> dict[str, Tensor]:
        """The same as the ranks have it together; blocks that are not contiguous are copied."""
        return {name: self.tables.whole(name.partition("/")[2], block) for name, block in self.blocks().items()}

    def is_older(self, seconds: float) -> bool:
        """What the first rank's clock says, because all of them write."""
        return self.checkpoint is not None and self.engine.first_says(super().is_older(seconds))

    def check(self) -> None:
        super().check()
        check_finite(self.blocks(), self.place)

    def save(self) -> None:
        if self.checkpoint is None:
            return
        self.check()
        wholes = self.wholes()
        if self.engine.rank:
            write_blocks(Path(agreed("")), wholes)
        else:
            write_checkpoint(
                self.checkpoint,
                self.tensors(),
                self.facts(),
                lambda fresh: write_blocks(Path(agreed(str(fresh))), wholes),
            )
        self.saved = time.perf_counter()

    def restore(self, folder: Path) -> None:
        super().restore(folder)
        if self.best:
            self.keep_best()
        wholes = self.wholes()
        read_blocks_(folder, wholes)
        for name, block in self.blocks().items():
            block.copy_(getattr(wholes[name], "_local_tensor", wholes[name]))
