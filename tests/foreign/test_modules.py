"""Shapes of modules that a stranger may bring: the laws where they hold, one clear line where they cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domlora.adapters.attach import attach_, detach_, freeze_, merge_
from domlora.adapters.bank import adapter_layers, adapter_parameters, base_state
from domlora.adapters.root import routed
from domlora.errors import ConfigError

ROWS = 48
DOMAIN = (torch.arange(ROWS) % 3)[torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))]


def wide(model: nn.Module) -> nn.Module:
    """Answers that differ from row to row."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def in_the_last_column(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1)[:, -1].long()


def rows_with_domain(*shape: int) -> Tensor:
    """Rows whose last number is their domain."""
    x = torch.randn(ROWS, *shape)
    x.view(ROWS, -1)[:, -1] = DOMAIN
    return x


# plain containers


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Linear(16, 1))


class Nested(nn.Module):
    """A ModuleDict of ModuleLists, a block used twice, and one layer that two blocks share."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(8, 8)
        self.blocks = nn.ModuleDict(
            {"a": nn.Sequential(shared, nn.Tanh()), "b": nn.ModuleList([nn.Linear(8, 8), shared])}
        )
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks["a"](self.blocks["a"](self.first(x)))
        for layer in self.blocks["b"]:
            x = x + layer(x).tanh()
        return self.head(x)


class Tied(nn.Module):
    """Embedding and output share one weight, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.output = nn.Linear(8, 10, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.middle(self.embedding(x.long() + 3)).mean(1))


class Encoder(nn.Module):
    """torch's own transformer block, which reads the weights of its layers in evaluation mode."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)).mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


# as on the model hubs


@dataclass
class Config:
    width: int = 8
    num_labels: int = 2
    return_dict: bool = True


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor
    loss: Tensor | None = None


class PretrainedLike(nn.Module):
    """A config, keywords with defaults, and an object as the answer."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.body = nn.Sequential(nn.Linear(6, config.width), nn.GELU(), nn.LayerNorm(config.width))
        self.classifier = nn.Linear(config.width, config.num_labels)

    @property
    def dtype(self) -> torch.dtype:
        return self.classifier.weight.dtype

    def forward(
        self, features: Tensor | None = None, *, labels: Tensor | None = None, return_dict: bool | None = None
    ) -> Output | tuple[Tensor, ...]:
        assert features is not None
        hidden = self.body(features.to(self.dtype))
        logits = self.classifier(hidden)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return Output(logits, hidden, loss) if return_dict else (logits, hidden)


def of_features(features: Any = None, **_: Any) -> Tensor:
    return in_the_last_column(features["features"] if isinstance(features, dict) else features)


def logits(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    return model(**x).logits


CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "sequential": lambda: (perceptron(), rows_with_domain(6), in_the_last_column),
    "nested and shared": lambda: (Nested(), rows_with_domain(6), in_the_last_column),
    "tied": lambda: (Tied(), rows_with_domain(5).clamp(-3, 3), in_the_last_column),
    "attention": lambda: (Attention(), rows_with_domain(3, 4), in_the_last_column),
    "encoder": lambda: (Encoder(), rows_with_domain(3, 4), in_the_last_column),
    "encoder norm first": lambda: (Encoder(norm_first=True), rows_with_domain(3, 4), in_the_last_column),
    "hub": lambda: (PretrainedLike(Config()), {"features": rows_with_domain(6)}, of_features, logits),
}


@pytest.mark.parametrize("name", CASES)
def test_law(law: Callable[..., None], name: str) -> None:
    model, *rest = CASES[name]()
    law(wide(model), *rest)


# real ones from transformers


def by_first_token(input_ids: Any = None, **_: Any) -> Tensor:
    ids = input_ids["input_ids"] if isinstance(input_ids, dict) else input_ids
    return ids[:, 0]


def bert(kind: str) -> tuple[Any, ...]:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        num_labels=2,
    )
    ids = torch.randint(3, 20, (ROWS, 5))
    ids[:, 0] = DOMAIN
    mask = torch.ones_like(ids)
    mask[::4, 3:] = 0
    model = getattr(transformers, f"BertFor{kind}")(config)
    return model, {"input_ids": ids, "attention_mask": mask}, by_first_token, logits


@pytest.mark.parametrize("kind", ["SequenceClassification", "MaskedLM"])
def test_bert_law(law: Callable[..., None], kind: str) -> None:
    law(*bert(kind))


def test_bert_keeps_its_ties() -> None:
    model, *_ = bert("MaskedLM")
    embedding = model.get_input_embeddings().weight
    assert model.cls.predictions.decoder.weight is embedding  # so this model does tie
    before = embedding.detach().clone()
    plain = merge_(_filled(attach_(copy.deepcopy(model), 3, domain=by_first_token)), 1)
    assert torch.equal(plain.get_input_embeddings().weight, before)
    assert not torch.equal(plain.cls.predictions.decoder.weight, before)
    assert model.cls.predictions.decoder.weight is embedding


# the root itself


def test_a_bare_linear_comes_back_as_a_new_root() -> None:
    base = nn.Linear(4, 2)
    x = torch.randn(ROWS, 4)
    expected, kept = base(x), copy.deepcopy(base.state_dict())
    root = attach_(base, 3, domain=None)
    with routed(root, DOMAIN):
        assert torch.equal(root.eval()(x), expected)
    _filled(root)
    with routed(root, DOMAIN):
        mixed = root(x)
    for number in range(3):
        plain = merge_(copy.deepcopy(root), number)
        assert type(plain) is nn.Linear
        assert list(plain.state_dict()) == ["weight", "bias"]
        rows = number == DOMAIN
        assert (plain(x)[rows] - mixed[rows]).abs().max() <= 1e-6
    plain = detach_(root)
    assert type(plain) is nn.Linear
    assert all(torch.equal(tensor, kept[name]) for name, tensor in plain.state_dict().items())


def test_forward_called_by_name_is_routed_too() -> None:
    """Training loops exist that call ``model.forward(batch)``, where hooks do not run."""
    model = _filled(attach_(perceptron(), 3, domain=in_the_last_column)).eval()
    x = rows_with_domain(6)
    assert torch.equal(model.forward(x), model(x))


def test_ties_are_kept_until_a_merge() -> None:
    model = attach_(Tied(), 3, domain=in_the_last_column)
    assert model.output.base.weight is model.embedding.weight
    assert list(base_state(model)) == list(Tied().state_dict())
    before = model.embedding.weight.detach().clone()
    plain = merge_(_filled(model), 0)
    assert torch.equal(plain.embedding.weight, before)  # one domain's output must not change what words mean
    assert plain.output.weight is not plain.embedding.weight


def test_merging_keeps_the_parameters_that_others_hold() -> None:
    """Optimizers and regularisers keep references to parameters."""
    model = perceptron()
    held = list(model.parameters())
    merge_(_filled(attach_(model, 3, domain=in_the_last_column)), 2)
    assert [id(p) for p in model.parameters()] == [id(p) for p in held]


# attention


@pytest.mark.parametrize("glob", ["attention.*", "attention.out_proj", "*.out_proj"])
def test_parts_of_attention_are_refused_in_one_line(glob: str) -> None:
    model = Attention()
    with pytest.raises(ConfigError, match=r"MultiheadAttention.*around it") as caught:
        attach_(model, 3, include=[glob], domain=in_the_last_column)
    assert "\n" not in str(caught.value)
    assert not adapter_layers(model)


def test_attention_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="MultiheadAttention"):
        attach_(nn.MultiheadAttention(8, 2), 3, domain=None)


def test_attention_is_left_out_of_a_broad_glob() -> None:
    assert list(adapter_layers(attach_(Attention(), 3, domain=None))) == ["embed", "head"]
    names = list(adapter_layers(attach_(Encoder(), 3, domain=None)))
    assert names == ["embed", "head", "block.linear1", "block.linear2"]


@pytest.mark.parametrize("masked", [False, True])
def test_the_fast_path_of_an_encoder_does_not_pass_the_adapters_by(masked: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = freeze_(_filled(attach_(nn.TransformerEncoder(layer, 2), 3, domain=None)))
    x = torch.randn(ROWS, 3, 8)
    padding = torch.zeros(ROWS, 3, dtype=torch.bool)
    padding[:, 2] = masked
    answers = []
    for mode in (True, False):
        with torch.no_grad(), routed(model.train(mode), DOMAIN):
            answers.append(model(x, src_key_padding_mask=padding if masked else None)[:, :2])
    assert (answers[0] - answers[1]).abs().max() <= 1e-5
    assert (answers[1] - detach_(model)(x)[:, :2]).abs().max() > 1e-2


def test_who_computes_with_an_adapted_weight_is_told_so() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.to(self.layer.weight.dtype), self.layer.weight)

    model = attach_(Reader(), 3, domain=in_the_last_column)
    with pytest.raises(ConfigError, match="must be called"):
        model(rows_with_domain(4))


# layers that are not quite linear layers


def test_a_computed_weight_is_adapted_and_not_merged() -> None:
    model = perceptron()
    nn.utils.parametrizations.weight_norm(model[0])
    expected = model.eval()(x := rows_with_domain(6))
    attach_(model, 3, domain=in_the_last_column)
    assert torch.equal(model(x), expected)
    _filled(model)
    assert (model(x) - expected).abs().max() > 1e-2
    names = list(model.state_dict())
    with pytest.raises(ConfigError, match=r"merged.*parametrisation"):
        merge_(model, 0)
    assert list(model.state_dict()) == names
    assert torch.equal(detach_(model)(x), expected)


def test_the_old_weight_norm_is_not_merged_either() -> None:
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(4, 4)), nn.Tanh())
    expected = model(x := rows_with_domain(4))
    attach_(model, 3, domain=in_the_last_column)
    assert torch.equal(model.eval()(x), expected)
    with pytest.raises(ConfigError, match="merged"):
        merge_(model, 0)


def test_a_lazy_layer_is_refused_until_it_has_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(ConfigError, match=r"lazy.*'0'.*batch"):
        attach_(model, 3, domain=in_the_last_column)
    assert not adapter_layers(model)
    expected = model(x := rows_with_domain(6))
    assert torch.equal(attach_(model, 3, domain=in_the_last_column).eval()(x), expected)


class Gated(nn.Linear):
    """A subclass whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


class GatedPlain(Gated):
    def plain(self, domain: int) -> nn.Linear:  # noqa: ARG002 - the same in all domains
        found = nn.Linear(self.in_features, self.out_features)
        with torch.no_grad():
            found.weight.copy_(self.weight * 0.5)
            found.bias.copy_(self.bias * 0.5)
        return found


class Noted(nn.Linear):
    """A subclass that only carries something more."""

    def __init__(self, *args: Any, note: str) -> None:
        super().__init__(*args)
        self.note = note


def test_a_forward_of_its_own_is_corrected_and_not_merged() -> None:
    model = nn.Sequential(Gated(6, 4))
    expected = model(x := rows_with_domain(6))
    attach_(model, 3, domain=in_the_last_column)
    assert torch.equal(model.eval()(x), expected)
    with pytest.raises(ConfigError, match=r"merged.*Gated.*plain"):
        merge_(_filled(model), 1)


@pytest.mark.parametrize("layer", [GatedPlain(6, 4), Noted(6, 4, note="kept")], ids=["plain", "noted"])
def test_subclasses_that_can_be_merged(layer: nn.Linear) -> None:
    model = _filled(attach_(nn.Sequential(copy.deepcopy(layer)), 3, domain=in_the_last_column)).eval()
    x = rows_with_domain(6)
    rows = DOMAIN == 1
    mixed = model(x)[rows]
    plain = merge_(model, 1)
    assert (plain(x)[rows] - mixed).abs().max() <= 1e-6
    assert getattr(plain[0], "note", "kept") == "kept"


def test_in_place_activations_after_an_adapted_layer_train() -> None:
    """On rows that are sorted by domain, and on rows of one domain, too."""
    model = attach_(nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 1)), 3, domain=None).train()
    for domain in (DOMAIN, DOMAIN.sort().values, torch.ones_like(DOMAIN)):
        with routed(model, domain):
            model(torch.randn(ROWS, 6)).sum().backward()
    assert all(bank.grad is not None for _, bank in adapter_parameters(model))


def _filled(model: nn.Module) -> nn.Module:
    """As after training."""
    with torch.no_grad():
        for _, bank in adapter_parameters(model):
            bank.normal_(std=0.3)
    return model
