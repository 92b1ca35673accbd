"""One DeepFM in four libraries, behind one interface.

``logit = bias + sum_s w_s + sum_{i<j} x_i · x_j + head(tower(x))``, 16 numbers a vector, tower 256-128-64 with relu and
dropout 0.5, Adam 1e-3, no L2 anywhere (their defaults on embeddings are set to 0). Each is built from its own library's
parts and takes over the weights of ours, so that all compute the same function before the first step. Where one differs:

* torch-rechub puts a batch norm into every tower and has no switch for it: it is replaced by ``nn.Identity`` here, which
  makes its step faster. Its first-order term is linear in the embeddings instead of a table of its own: fewer numbers.
* FuxiCTR's wheel lacks its model zoo: its DeepFM is put together from its blocks as the zoo does. Its step clips the norm of
  all gradients at 10. Its head has a bias beside the global one, and so has torch-rechub's.
* DeepCTR-Torch sums the loss over a batch where the others take the mean; Adam does not see the difference.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from domlora.adapters.attach import attach_
from domlora.data.dataset import Dataset
from domlora.features.batch import Batch
from domlora.features.schema import Schema
from domlora.models.build import build_model
from domlora.training.fit import FitOptions, fit, loss_of
from domlora.training.optimizers import Optimizer, OptimizerOptions, Rule

__all__ = ["DeepCTRTorch", "Domlora", "FuxiCTR", "TorchRechub", "Trained", "deepfm"]

DIM, UNITS, DROPOUT, LR = 16, (256, 128, 64), 0.5, 1e-3
WORKERS = min(3, os.cpu_count() or 1)  # of FuxiCTR's loader: 3 in its configurations, and it warns above the cores
Ready = Any


class Trained(Protocol):
    """A model with its optimizer."""

    def ready(self, batch: Batch) -> Ready:
        """A batch as this library's step takes it; making it is not timed."""

    def step(self, batch: Ready) -> None:
        """Forward, loss, backward, optimizer."""

    def probability(self, batch: Batch) -> Tensor:
        """Scores in evaluation mode, ``(B,)``."""

    def epoch(self, data: Dataset, batch_size: int, folder: Path) -> float:
        """Seconds of one pass over the training split in the library's own loop with its own loader."""


def deepfm(schema: Schema) -> nn.Module:
    """Ours; the weights that all start from."""
    return build_model("deepfm", schema, embedding_dim=DIM, hidden_units=UNITS, dropout=DROPOUT)


def names_of(schema: Schema) -> list[str]:
    return [feature.name for feature in schema.categorical]


def vectors_of(start: nn.Module) -> Iterator[Tensor]:
    """The rows of each feature in our one table."""
    table: Any = start.embedding
    ends = [*table.offsets.tolist()[1:], table.weight.shape[0]]
    return (table.weight[begin:end] for begin, end in zip(table.offsets.tolist(), ends, strict=True))


def layers_of(start: nn.Module) -> list[nn.Linear]:
    return [*start.tower, start.head]  # type: ignore[misc]


@torch.no_grad()
def take_over_(
    vectors: list[nn.Embedding], zeros: list[nn.Parameter], layers: list[nn.Linear], start: nn.Module
) -> None:
    for mine, given in zip(vectors, vectors_of(start), strict=True):
        mine.weight.copy_(given)
    for parameter in zeros:
        parameter.zero_()
    for layer, given_layer in zip(layers, layers_of(start), strict=True):
        layer.weight.copy_(given_layer.weight)
        if layer.bias is not None:
            layer.bias.zero_()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def timed(run: Callable[[], object]) -> float:
    with silence():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class Domlora:
    """Ours: ``fit`` over ``Dataset``. With ``adapters`` every layer of the tower has one a domain."""

    def __init__(self, start: nn.Module, schema: Schema, rule: str = "adam", adapters: bool = False) -> None:
        self.model = deepfm(schema)
        self.model.load_state_dict(start.state_dict())
        if adapters:
            attach_(self.model, schema.num_domains, temperature=16, include=["tower.*"])
        self.rules = OptimizerOptions(tables=Rule(rule, lr=LR), dense=Rule(lr=LR), adapters=Rule(lr=LR))  # type: ignore[arg-type]
        self.optimizer = Optimizer(self.model, self.rules)

    def ready(self, batch: Batch) -> Batch:
        return batch

    def step(self, batch: Batch) -> None:
        self.model.train()
        self.optimizer.zero_grad()
        loss_of(self.model(batch.ids, batch.dense, batch.domain), batch).backward()
        self.optimizer.step()

    @torch.inference_mode()
    def probability(self, batch: Batch) -> Tensor:
        return torch.sigmoid(self.model.eval()(batch.ids, batch.dense, batch.domain))

    def epoch(self, data: Dataset, batch_size: int, folder: Path) -> float:  # noqa: ARG002 - the others write files
        # a fit makes its optimizer anew while the others keep theirs: two epochs, of which it reports the speed of the last
        found = fit(self.model, data, FitOptions(batch_size=batch_size, max_epochs=2), self.rules)
        return data.num_rows("train") / found.rows_per_second  # of training; like the others without validation


class DeepCTRTorch:
    """``model.fit`` on a dict of numpy columns."""

    def __init__(self, start: nn.Module, schema: Schema) -> None:
        # importing the package starts a thread that asks a registry for news and prints what it hears
        with mock.patch.object(threading.Thread, "start"):
            from deepctr_torch.inputs import SparseFeat
            from deepctr_torch.models import DeepFM

        columns = [SparseFeat(f.name, f.num_ids, embedding_dim=DIM) for f in schema.categorical]
        model = DeepFM(
            columns,
            columns,
            dnn_hidden_units=UNITS,
            dnn_dropout=DROPOUT,
            l2_reg_linear=0,
            l2_reg_embedding=0,
        )
        model.compile("adam", "binary_crossentropy")
        names = names_of(schema)
        take_over_(
            [model.embedding_dict[name] for name in names],
            [*(model.linear_model.embedding_dict[name].weight for name in names), model.out.bias],
            [*model.dnn.linears, model.dnn_linear],
            start,
        )
        self.model, self.names = model, names

    def ready(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.ids.float(), batch.label

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        model, (x, y) = self.model, batch
        model.train()
        predicted = model(x).squeeze(-1)
        model.optim.zero_grad()
        loss = model.loss_func(predicted, y, reduction="sum") + model.get_regularization_loss() + model.aux_loss
        loss.backward()
        model.optim.step()

    @torch.no_grad()
    def probability(self, batch: Batch) -> Tensor:
        return self.model.eval()(batch.ids.float()).squeeze(-1)

    def epoch(self, data: Dataset, batch_size: int, folder: Path) -> float:  # noqa: ARG002
        rows = data.read("train")
        x = {name: rows.ids[:, slot].numpy().copy() for slot, name in enumerate(self.names)}
        y = rows.label.numpy()
        return timed(lambda: self.model.fit(x, y, batch_size=batch_size, epochs=1, verbose=0))


class TorchRechub:
    """``CTRTrainer.train_one_epoch`` over the loader of ``DataGenerator``."""

    def __init__(self, start: nn.Module, schema: Schema) -> None:
        from torch_rechub.basic.features import SparseFeature
        from torch_rechub.models.ranking import DeepFM
        from torch_rechub.trainers import CTRTrainer

        features = [SparseFeature(f.name, f.num_ids, embed_dim=DIM) for f in schema.categorical]
        tower = {"dims": list(UNITS), "dropout": DROPOUT, "activation": "relu"}
        model = DeepFM(features, features, tower)
        for number, layer in enumerate(model.mlp.mlp):
            if isinstance(layer, nn.BatchNorm1d):
                model.mlp.mlp[number] = nn.Identity()
        self.trainer = CTRTrainer(model, optimizer_params={"lr": LR})
        take_over_(
            [model.embedding.embed_dict[name] for name in names_of(schema)],
            list(model.linear.parameters()),
            [layer for layer in model.mlp.mlp if isinstance(layer, nn.Linear)],
            start,
        )
        self.model, self.names = model, names_of(schema)

    def ready(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        return {name: batch.ids[:, slot].contiguous() for slot, name in enumerate(self.names)}, batch.label

    def step(self, batch: tuple[dict[str, Tensor], Tensor]) -> None:
        trainer, (x, y) = self.trainer, batch
        self.model.train()
        loss = trainer.criterion(self.model(x), y) + trainer.reg_loss_fn(self.model)
        self.model.zero_grad()
        loss.backward()
        trainer.optimizer.step()

    @torch.no_grad()
    def probability(self, batch: Batch) -> Tensor:
        return self.model.eval()(self.ready(batch)[0])

    def epoch(self, data: Dataset, batch_size: int, folder: Path) -> float:  # noqa: ARG002
        from torch_rechub.utils.data import DataGenerator

        rows = data.read("train")
        x = {name: rows.ids[:, slot].numpy().copy() for slot, name in enumerate(self.names)}
        y = rows.label.numpy()
        loader = DataGenerator(x, y).generate_dataloader(x, y, x, y, batch_size=batch_size)[0]
        return timed(lambda: self.trainer.train_one_epoch(loader))


class FuxiCTR:
    """``BaseModel.train_epoch`` over its loader of ``.npz`` files, which has worker processes beside the training one."""

    def __init__(self, start: nn.Module, schema: Schema) -> None:
        from fuxictr.features import FeatureMap

        features = FeatureMap("bench", "")
        for each in schema.categorical:
            features.features[each.name] = {"type": "categorical", "source": "", "vocab_size": each.num_ids}
        features.labels, features.num_fields, features.default_emb_dim = ["label"], schema.num_fields, DIM
        features.set_column_index()
        self.features, self.names = features, names_of(schema)
        self.model = model = _fuxictr_deepfm(features)
        take_over_(
            [model.embedding_layer.embedding_layer.embedding_layers[name] for name in self.names],
            list(model.fm.lr_layer.parameters()),
            [layer for layer in model.mlp.mlp if isinstance(layer, nn.Linear)],
            start,
        )

    def ready(self, batch: Batch) -> dict[str, Tensor]:
        columns = {name: batch.ids[:, slot].contiguous() for slot, name in enumerate(self.names)}
        return {**columns, "label": batch.label}

    def step(self, batch: dict[str, Tensor]) -> None:
        self.model.train()
        self.model.train_step(batch)

    @torch.no_grad()
    def probability(self, batch: Batch) -> Tensor:
        return self.model.eval()(self.ready(batch))["y_pred"].squeeze(-1)

    def epoch(self, data: Dataset, batch_size: int, folder: Path) -> float:
        from fuxictr.pytorch.dataloaders import RankDataLoader

        path = folder / f"{data.num_rows('train')}.npz"
        if not path.exists():
            np.savez(path, **{name: column.numpy() for name, column in self.ready(data.read("train")).items()})
        # an epoch is short here: worker processes that take long to start would weigh more than in a real one
        workers = WORKERS if data.num_rows("train") >= 20 * batch_size else 0
        loader, _ = RankDataLoader(
            self.features, "train", train_data=str(path), batch_size=batch_size, num_workers=workers, data_format="npz"
        )
        return timed(lambda: self.model.train_epoch(loader))


def _fuxictr_deepfm(features: Any) -> Any:
    from fuxictr.pytorch.layers import FactorizationMachine, FeatureEmbedding, MLP_Block
    from fuxictr.pytorch.models import BaseModel

    class DeepFM(BaseModel):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(features, model_root="", metrics=["AUC"], verbose=0)
            self.embedding_layer = FeatureEmbedding(features, DIM)
            self.fm = FactorizationMachine(features)
            self.mlp = MLP_Block(features.sum_emb_out_dim(), list(UNITS), output_dim=1, dropout_rates=DROPOUT)
            self.compile("adam", "binary_crossentropy", LR)
            # what fit sets before its first epoch; no evaluation inside one
            self._max_gradient_norm, self._eval_steps, self._total_steps, self._stop_training = 10.0, 1 << 60, 0, False

        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            columns = self.get_inputs(inputs)
            vectors = self.embedding_layer(columns)
            logit = self.fm(columns, vectors) + self.mlp(vectors.flatten(1))
            return {"y_pred": self.output_activation(logit)}

    return DeepFM()
