"""The adapter file against PEFT itself: both read what the other wrote, and compute the same logits."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domlora.adapters.attach import attach_, merge_
from domlora.adapters.bank import adapter_layers, adapter_parameters, rows_of
from domlora.adapters.file import load_adapter_, save_adapter
from domlora.adapters.root import routed
from domlora.bundle import Bundle, adapter_folders
from domlora.errors import BundleError
from domlora.features.encode import Encoder
from domlora.features.schema import Feature, Schema
from domlora.models.build import build_model

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model

ROWS, DOMAINS = 12, 3
Args = tuple[Tensor, ...]


# ---------------------------------------------------------------- models


class Attention(nn.Module):
    """Linear layers on (B, F, E), one without a bias, and a head on (B, E)."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.value, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        mixed = nn.functional.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        logit: Tensor = self.head(mixed.mean(dim=1)).squeeze(-1)
        return logit


class OneBlockTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.again = self.block
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        logit: Tensor = self.head(self.again(self.block(x))).squeeze(-1)
        return logit


class OneLayerTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu())
        return out


class AlikeNames(nn.Module):
    """'0' is the end of 'tower.0', which is no linear layer, and of 'deep.0', which is one."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(6, 6))
        self.tower = nn.Sequential(nn.BatchNorm1d(6))
        self.deep = nn.ModuleDict({"0": nn.Linear(6, 6), "a+b": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.deep["a+b"](self.deep["0"](self.tower(self.get_submodule("0")(x))))
        return out


def tower() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(24, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0)),
    )


def schema() -> Schema:
    features = (Feature("user", num_ids=9), Feature("item", num_ids=7), Feature("age", "numeric"))
    return Schema(features, domains=("a", "B", "b/c"))


DEEPFM: dict[str, Any] = {"name": "deepfm", "hidden_units": [32, 16], "embedding_dim": 4, "dropout": 0.2}


def rows() -> Args:
    ids = torch.stack([torch.randint(0, 9, (ROWS,)), torch.randint(0, 7, (ROWS,))], dim=1)
    return ids, torch.randn(ROWS, 1), torch.arange(ROWS) % DOMAINS


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Args]]] = {
    "tower": (tower, lambda: (torch.randn(ROWS, 24),)),
    "deepfm": (lambda: build_model(schema=schema(), **DEEPFM), rows),
    "attention": (Attention, lambda: (torch.randn(ROWS, 5, 8),)),
    "one block twice": (OneBlockTwice, lambda: (torch.randn(ROWS, 6),)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "rank by width": {"temperature": 16},
    "small temperature": {"temperature": 3},
    "one rank": {"rank": 3},
    "lora_alpha": {"rank": 3, "lora_alpha": 10},
    "lora_alpha and ranks by width": {"temperature": 4, "lora_alpha": 5.5},
    "bias only": {"rank": 0},
    "no bias": {"rank": 2, "bias": False},
}


def base(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name][0]().eval()


def inputs(name: str) -> Args:
    torch.manual_seed(2)
    return MODELS[name][1]()


def trained(model: nn.Module, **options: Any) -> nn.Module:
    """A copy with adapters whose corrections are as large as the base's own outputs."""
    adapted = attach_(copy.deepcopy(model), DOMAINS, domain=None, **options)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, bank in adapter_parameters(adapted):
            bank.copy_(torch.randn(bank.shape, generator=random) * 0.15)
    return adapted


@torch.no_grad()
def ours(model: nn.Module, args: Args, domain: Tensor) -> Tensor:
    with routed(model.eval(), domain):
        out: Tensor = model(*args)
    return out


def only(domain: int) -> Tensor:
    return torch.full((ROWS,), domain)


def opened(model: nn.Module, folder: Path, **options: Any) -> PeftModel:
    """PEFT's model, which must not have found anything missing or odd."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*targeted layer of type Linear has no bias.*")
        warnings.filterwarnings(
            "ignore", message=r"Found missing adapter keys.*\['base_model.model.again.0"
        )  # has 2 names
        return PeftModel.from_pretrained(copy.deepcopy(model), folder, **options).eval()


def close(one: Tensor, two: Tensor) -> bool:
    return bool((one - two).detach().abs().max() <= 1e-6)


# ---------------------------------------------------------------- from here to there


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_peft_computes_the_same_from_our_file(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    plain, args = base(name), inputs(name)
    model = trained(plain, **options)
    for domain in range(DOMAINS):
        save_adapter(model, domain, tmp_path / str(domain))
        expected = ours(model, args, only(domain))
        theirs = opened(plain, tmp_path / str(domain))
        assert close(theirs(*args), expected)
        assert not close(plain(*args), expected), "the correction must matter"
        with theirs.disable_adapter():
            assert torch.equal(theirs(*args), plain(*args))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_mixed_batch_is_the_same_on_both_sides(tmp_path: Path, name: str) -> None:
    """Several domains in one batch: PEFT's adapter_names and our domain of each row."""
    plain, args = base(name), inputs(name)
    model = trained(plain, temperature=4, lora_alpha=5)
    for domain in range(DOMAINS):
        save_adapter(model, domain, tmp_path / f"d{domain}")
    theirs = opened(plain, tmp_path / "d0", adapter_name="d0")
    for domain in range(1, DOMAINS):
        theirs.load_adapter(tmp_path / f"d{domain}", f"d{domain}")
    mixed = torch.tensor([0, 2, 1, -1] * (ROWS // 4))
    names = ["__base__" if number < 0 else f"d{number}" for number in mixed.tolist()]
    assert close(theirs.eval()(*args, adapter_names=names), ours(model, args, mixed))


@torch.no_grad()
def test_merged_in_peft_is_merged_here(tmp_path: Path) -> None:
    plain, args = base("tower"), inputs("tower")
    model = trained(plain, temperature=4, lora_alpha=5)
    save_adapter(model, 1, tmp_path / "one")
    theirs = opened(plain, tmp_path / "one").merge_and_unload()
    assert close(theirs(*args), ours(model, args, only(1)))
    for name, tensor in merge_(model, 1).state_dict().items():
        assert torch.allclose(tensor, theirs.state_dict()[name], atol=1e-6)


@torch.no_grad()
def test_an_adapter_copied_out_of_a_bundle_is_read(tmp_path: Path) -> None:
    plain, args = base("deepfm"), inputs("deepfm")
    words = {"user": [str(n) for n in range(7)], "item": [str(n) for n in range(5)]}
    bundle = Bundle(trained(plain, include=["tower.*"]), DEEPFM, Encoder(schema(), words))
    bundle.save(tmp_path / "bundle")
    for number, place in enumerate(adapter_folders(schema().domains).values()):
        theirs = opened(plain, tmp_path / "bundle" / place)
        assert close(theirs(*args), ours(bundle.model, args, only(number)))


@torch.no_grad()
def test_names_that_end_alike_are_not_confused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, args = AlikeNames().eval(), (torch.randn(ROWS, 6),)
    for number, include in enumerate((["0"], ["deep.0"], ["0", "deep.a+b"], ["*"])):
        model = trained(plain, rank=2, include=include)
        save_adapter(model, 0, tmp_path / str(number))
        theirs = opened(plain, tmp_path / str(number))
        assert close(theirs(*args), ours(model, args, only(0)))
        assert set(theirs.base_model.targeted_module_names) == set(adapter_layers(model))


def test_peft_goes_on_training_what_we_wrote(tmp_path: Path) -> None:
    """And we read it back: PEFT's own files, which say nothing of a base."""
    plain, args = base("tower"), inputs("tower")
    model = trained(plain, temperature=16, lora_alpha=4)
    save_adapter(model, 0, tmp_path / "ours")
    theirs = opened(plain, tmp_path / "ours", is_trainable=True)
    train(theirs, args)
    theirs.save_pretrained(tmp_path / "theirs")
    before = rows_of(model, 1)
    load_adapter_(model, 2, tmp_path / "theirs")
    assert close(theirs.eval()(*args), ours(model, args, only(2)))
    assert not close(ours(model, args, only(0)), ours(model, args, only(2)))
    assert all(torch.equal(row, before[name]) for name, row in rows_of(model, 1).items())


def test_our_own_file_does_not_disturb_peft(tmp_path: Path) -> None:
    """It reads the two of its own, and saves over them."""
    plain, args = base("tower"), inputs("tower")
    save_adapter(trained(plain), 0, tmp_path / "one")
    assert "domlora.json" in {path.name for path in (tmp_path / "one").iterdir()}
    expected = opened(plain, tmp_path / "one")(*args)
    (tmp_path / "one" / "domlora.json").unlink()
    assert torch.equal(opened(plain, tmp_path / "one")(*args), expected)


# ---------------------------------------------------------------- from there to here


def train(model: nn.Module, args: Args, steps: int = 5) -> None:
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(moving, lr=0.01)
    target = (torch.arange(ROWS) % 2).float()
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(*args).reshape(ROWS, -1).mean(dim=1), target).backward()
        optimizer.step()
    model.eval()


def made(name: str, folder: Path, **config: Any) -> Tensor:
    """Train an adapter with PEFT, save it, and say what it scores."""
    torch.manual_seed(7)
    theirs = get_peft_model(base(name), LoraConfig(**config))
    train(theirs, inputs(name))
    theirs.save_pretrained(folder)
    with torch.no_grad():
        out: Tensor = theirs(*inputs(name))
    return out


CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ends of names": ("tower", {"r": 4, "target_modules": ["0", "2", "6"]}, {"rank": 4}),
    "a pattern": ("tower", {"r": 4, "target_modules": r"[024]"}, {"rank": 4}),
    "all-linear": ("tower", {"r": 4, "target_modules": "all-linear", "lora_bias": True}, {"rank": 4}),
    "its scale": ("tower", {"r": 4, "lora_alpha": 7, "target_modules": ["0"]}, {"rank": 4}),
    "another scale here": ("tower", {"r": 4, "lora_alpha": 7, "target_modules": ["0"]}, {"rank": 4, "lora_alpha": 3}),
    "a scale for the bias": (
        "tower",
        {"r": 4, "lora_alpha": 7, "target_modules": "all-linear", "lora_bias": True},
        {"rank": 4, "lora_alpha": 3},
    ),
    "rank stabilised": ("tower", {"r": 4, "use_rslora": True, "target_modules": ["0", "4"]}, {"rank": 4}),
    "patterns": (
        "tower",
        {
            "r": 4,
            "target_modules": "all-linear",
            "rank_pattern": {"2": 3, "^4": 1},
            "alpha_pattern": {"^0": 5, "[26]": 9},
            "use_rslora": True,
        },
        {"rank": 4},
    ),
    "a smaller rank": ("tower", {"r": 2, "target_modules": "all-linear"}, {"rank": 5}),
    "ranks by width": ("tower", {"r": 1, "target_modules": "all-linear"}, {"temperature": 16}),
    "dropout": ("tower", {"r": 4, "lora_dropout": 0.3, "target_modules": ["2"]}, {"rank": 4}),
    "no bias here": ("tower", {"r": 4, "target_modules": ["2"]}, {"rank": 4, "bias": False}),
    "gaussian start": ("tower", {"r": 4, "init_lora_weights": "gaussian", "target_modules": ["2"]}, {"rank": 4}),
    "orthogonal start": ("tower", {"r": 4, "init_lora_weights": "orthogonal", "target_modules": ["2"]}, {"rank": 4}),
    "minor components": ("tower", {"r": 4, "init_lora_weights": "mica", "target_modules": ["2"]}, {"rank": 4}),
    "deepfm": ("deepfm", {"r": 4, "target_modules": "all-linear"}, {"rank": 4}),
    "a bias in deepfm": ("deepfm", {"r": 4, "target_modules": r"tower\.\d", "lora_bias": True}, {"rank": 4}),
    "attention": ("attention", {"r": 2, "target_modules": ["query", "value", "head"]}, {"rank": 2}),
    "one block twice": ("one block twice", {"r": 2, "target_modules": "all-linear"}, {"rank": 2}),
}


@pytest.mark.parametrize(("name", "config", "options"), CONFIGS.values(), ids=CONFIGS)
def test_we_compute_the_same_from_their_file(
    tmp_path: Path, name: str, config: dict[str, Any], options: dict[str, Any]
) -> None:
    expected = made(name, tmp_path / "theirs", **config)
    model = trained(base(name), **options)
    load_adapter_(model, 1, tmp_path / "theirs")
    assert close(ours(model, inputs(name), only(1)), expected)
    save_adapter(model, 1, tmp_path / "ours")
    with torch.no_grad():
        assert close(opened(base(name), tmp_path / "ours")(*inputs(name)), expected), "and back again"


def test_several_adapters_of_one_peft_model(tmp_path: Path) -> None:
    """PEFT saves each but the default one in a folder of its name."""
    torch.manual_seed(7)
    args = inputs("tower")
    theirs = get_peft_model(base("tower"), LoraConfig(r=4, target_modules=["0", "2"]), adapter_name="d0")
    theirs.add_adapter("d1", LoraConfig(r=2, lora_alpha=3, target_modules=["2", "4"]))
    for name in ("d0", "d1"):
        theirs.set_adapter(name)
        train(theirs, args)
    theirs.save_pretrained(tmp_path)
    model = trained(base("tower"), rank=4)
    for domain in range(2):
        load_adapter_(model, domain, tmp_path / f"d{domain}")
    mixed = torch.arange(ROWS) % 2
    with torch.no_grad():
        expected = theirs(*args, adapter_names=[f"d{number}" for number in mixed.tolist()])
    assert close(ours(model, args, mixed), expected)


NOT_LORA: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True, "target_modules": ["tower.0"]}, "DoRA"),
    "whole layers": ({"modules_to_save": ["tower.0"], "target_modules": ["tower.3"]}, "whole layers"),
    "biases": ({"bias": "lora_only", "target_modules": ["tower.0"]}, "biases of the base"),
    "all biases": ({"bias": "all", "target_modules": ["tower.0"]}, "biases of the base"),
    "pissa": ({"init_lora_weights": "pissa", "target_modules": ["tower.0"]}, "this start had changed"),
    "olora": ({"init_lora_weights": "olora", "target_modules": ["tower.0"]}, "this start had changed"),
    "another layer": ({"target_modules": ["tower.0", "head"]}, "layers without an adapter"),
    "a larger rank": ({"r": 9, "target_modules": ["tower.0"]}, "the adapter needs more"),
    "embeddings": ({"target_modules": ["table"]}, "embeddings"),
    "a convolution": ({"target_modules": ["mix"]}, "layers without an adapter"),
}


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(9, 4), nn.Conv1d(2, 2, 1)
        self.tower = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 8))
        self.head = nn.Linear(8, 1)

    def forward(self, ids: Tensor) -> Tensor:  # (B, 2)
        logit: Tensor = self.head(self.tower(self.mix(self.table(ids)).flatten(1))).squeeze(-1)
        return logit


@pytest.mark.parametrize(("config", "match"), NOT_LORA.values(), ids=NOT_LORA)
def test_what_is_not_plain_lora_is_refused(tmp_path: Path, config: dict[str, Any], match: str) -> None:
    torch.manual_seed(0)
    plain = Wide()
    theirs = get_peft_model(copy.deepcopy(plain), LoraConfig(**{"r": 2, **config}))
    train(theirs, (torch.randint(0, 9, (ROWS, 2)),))
    theirs.save_pretrained(tmp_path)
    model = trained(plain, rank=4, include=["tower.*"])
    before = rows_of(model, 0)
    with pytest.raises(BundleError, match=match) as caught:
        load_adapter_(model, 0, tmp_path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(row, before[name]) for name, row in rows_of(model, 0).items())


def test_another_method_and_a_pickle_are_refused(tmp_path: Path) -> None:
    from peft import LoHaConfig

    get_peft_model(tower(), LoHaConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path / "loha")
    lora = get_peft_model(tower(), LoraConfig(r=2, target_modules=["0"]))
    lora.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    for folder, match in (("loha", "peft_type LORA"), ("pickle", "never read from a pickle")):
        with pytest.raises(BundleError, match=match):
            load_adapter_(trained(base("tower"), rank=2), 0, tmp_path / folder)


def test_every_setting_that_peft_writes_is_known(tmp_path: Path) -> None:
    """One that is not, and says something, is refused; so a new PEFT shows here first."""
    made("tower", tmp_path, r=2, target_modules=["0"])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key for key, value in config.items() if value} <= {
        *("auto_mapping", "bias", "inference_mode", "init_lora_weights", "lora_alpha", "megatron_core", "peft_type"),
        *("peft_version", "qalora_group_size", "r", "target_modules"),
    }


# ---------------------------------------------------------------- what PEFT cannot do


@torch.no_grad()
def test_a_layer_in_two_places(tmp_path: Path) -> None:
    """PEFT corrects the first of its places alone, so the logits differ: said in save_adapter, refused in load_adapter_."""
    torch.manual_seed(0)
    plain, args = OneLayerTwice().eval(), (torch.randn(ROWS, 6),)
    model = trained(plain, rank=2)
    save_adapter(model, 0, tmp_path / "ours")
    theirs = opened(plain, tmp_path / "ours")
    assert not close(theirs(*args), ours(model, args, only(0)))
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(BundleError, match="one place alone"):
        load_adapter_(model, 0, tmp_path / "theirs")


@torch.no_grad()
def test_a_layer_without_a_bias_is_read_but_not_merged_by_peft(tmp_path: Path) -> None:
    """Its one flag gives every layer a bias; ours for a layer without one is zero."""
    plain, args = base("attention"), inputs("attention")
    model = trained(plain, rank=2)
    save_adapter(model, 0, tmp_path / "one")
    theirs = opened(plain, tmp_path / "one")
    assert close(theirs(*args), ours(model, args, only(0)))
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        theirs.merge_and_unload()
    assert list(merge_(model, 0).state_dict()) == list(plain.state_dict())


def test_a_bias_beside_a_layer_without_one_is_refused(tmp_path: Path) -> None:
    """PEFT can train one and never merge it; here merging keeps the keys of the base, so there is none."""
    made("deepfm", tmp_path, r=4, target_modules=["head"], lora_bias=True)
    with pytest.raises(BundleError, match="'head' has no bias for each domain here"):
        load_adapter_(trained(base("deepfm"), rank=4), 0, tmp_path)


def test_a_model_that_is_a_layer_is_nothing_for_peft(tmp_path: Path) -> None:
    plain = nn.Linear(4, 4)
    save_adapter(trained(plain, rank=2), 0, tmp_path / "one")
    with pytest.raises(ValueError, match="No modules were targeted"):
        PeftModel.from_pretrained(plain, tmp_path / "one")
