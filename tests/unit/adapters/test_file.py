from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from domlora.adapters.attach import attach_, detach_, freeze_, merge_
from domlora.adapters.bank import adapter_layers, adapter_parameters, rows_of
from domlora.adapters.file import base_fingerprint, load_adapter_, save_adapter, write_adapter
from domlora.adapters.root import routed
from domlora.errors import BundleError, ConfigError, DataError, DomloraError, UnknownDomainError

CONFIG, TENSORS, SEAL = "adapter_config.json", "adapter_model.safetensors", "domlora.json"
KINDS: dict[str, dict[str, Any]] = {
    "rank by width": {"temperature": 4},
    "one rank": {"rank": 3},
    "bias only": {"rank": 0},
    "no bias": {"rank": 2, "bias": False},
    "scale of a power of two": {"rank": 2, "lora_alpha": 16},
    "any scale": {"rank": 3, "lora_alpha": 10},
    "a scale that is no fraction": {"temperature": 4, "lora_alpha": math.pi},
}


class Net(nn.Module):
    """Widths 32, 16 and 1, a layer without a bias, middle axes and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(3, 3, bias=False)
        self.norm = nn.BatchNorm1d(12)
        self.tower = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 4, 3) to (B,)
        logit: Tensor = self.head(self.tower(self.norm(self.query(x).flatten(1)))).squeeze(-1)
        return logit


def base(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def trained(model: nn.Module, **options: Any) -> nn.Module:
    """Adapters with all banks filled, as after training."""
    model = attach_(model, 3, domain=None, **options)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, bank in adapter_parameters(model):
            bank.copy_(torch.randn(bank.shape, generator=random) * 0.3)
    return model


def states(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def refused(model: nn.Module, folder: Path, match: str, domain: int = 1) -> None:
    """With one line, and the model is as before."""
    before = states(model)
    with pytest.raises(BundleError, match=match) as caught:
        load_adapter_(model, domain, folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert same_bits(before, states(model))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(trained(base(), temperature=4), 1, tmp_path / "one")
    return tmp_path / "one"


# ---------------------------------------------------------------- our own files


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_round_trip_bit_for_bit(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    ours = trained(base().to(dtype), **options)
    save_adapter(ours, 1, tmp_path / "one")
    theirs = attach_(base().to(dtype), 5, domain=None, **options)
    before = [rows_of(theirs, domain) for domain in range(5)]
    assert load_adapter_(theirs, 4, tmp_path / "one") is theirs
    assert same_bits(rows_of(theirs, 4), rows_of(ours, 1))
    assert all(same_bits(rows_of(theirs, domain), before[domain]) for domain in range(4)), "neighbours moved"


def test_an_untrained_adapter_comes_back_too(tmp_path: Path) -> None:
    """B is zero then, and A matters for the training to come."""
    ours, theirs = base(), base()
    attach_(ours, 2, domain=None)
    attach_(theirs, 2, domain=None)
    save_adapter(ours, 0, tmp_path / "one")
    assert not same_bits(rows_of(theirs, 0), rows_of(ours, 0))
    load_adapter_(theirs, 0, tmp_path / "one")
    assert same_bits(rows_of(theirs, 0), rows_of(ours, 0))


def test_the_same_adapter_is_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = attach_(base(), 3, temperature=4, domain=None)
    load_adapter_(again, 2, saved)
    save_adapter(again, 2, tmp_path / "again")
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, TENSORS, SEAL]
    for name in (CONFIG, TENSORS, SEAL):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()


def test_what_is_written(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": "Net", "parent_library": Net.__module__, "domlora": SEAL},
        "inference_mode": True,
        "r": 1,
        "lora_alpha": 1,
        "rank_pattern": {r"^tower\.0": 8, r"^tower\.2": 4},
        "alpha_pattern": {r"^tower\.0": 8, r"^tower\.2": 4},
        "target_modules": ["query", "tower.0", "tower.2", "head"],
        "lora_bias": True,
        "bias": "none",
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(saved / TENSORS).items()}
    assert shapes["base_model.model.tower.0.lora_A.weight"] == (8, 12)
    assert shapes["base_model.model.tower.0.lora_B.weight"] == (32, 8)
    assert shapes["base_model.model.tower.0.lora_B.bias"] == (32,)
    assert not load_file(saved / TENSORS)["base_model.model.query.lora_B.bias"].any(), (
        "there is one flag for all layers"
    )
    assert len(shapes) == 12
    seal = json.loads((saved / SEAL).read_text())
    digests = {name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in (CONFIG, TENSORS)}
    assert seal == {"format": 1, "base": base_fingerprint(base()), "files": digests}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_the_files_mean_what_the_model_computes(tmp_path: Path, options: dict[str, Any]) -> None:
    """By the formula of PEFT's documentation, from the files and the plain base alone."""
    ours, plain = trained(base(), **options), base()
    save_adapter(ours, 2, tmp_path / "one")
    config, tensors = json.loads((tmp_path / "one" / CONFIG).read_text()), load_file(tmp_path / "one" / TENSORS)
    for name in config["target_modules"]:
        rank = config["rank_pattern"].get("^" + name.replace(".", r"\."), config["r"])
        scale = config["alpha_pattern"].get("^" + name.replace(".", r"\."), config["lora_alpha"]) / rank
        part = {end: tensors[f"base_model.model.{name}.{end}"] for end in ("lora_A.weight", "lora_B.weight")}
        layer = plain.get_submodule(name)
        with torch.no_grad():
            layer.weight += scale * part["lora_B.weight"] @ part["lora_A.weight"]
            if config["lora_bias"] and layer.bias is not None:
                layer.bias += scale * tensors[f"base_model.model.{name}.lora_B.bias"]
    x = torch.randn(6, 4, 3)
    with routed(ours, torch.full((6,), 2)):
        assert torch.allclose(ours(x), plain(x), atol=1e-6, rtol=1e-6)


def test_a_copy_of_the_bias_is_kept_only_where_its_last_bit_would_go_lost(tmp_path: Path) -> None:
    for options, kept in (({"rank": 2, "lora_alpha": 16}, False), ({"rank": 3, "lora_alpha": 10}, True)):
        save_adapter(trained(base(), **options), 0, tmp_path / "one", overwrite=kept)
        assert any(name.startswith("domlora.") for name in load_file(tmp_path / "one" / TENSORS)) == kept


def test_a_whole_lora_alpha_is_written_as_one(tmp_path: Path) -> None:
    """PEFT declares it an int; in floats (1 / 49) * 49 is not 1."""
    save_adapter(trained(base(), rank=49, lora_alpha=1), 0, tmp_path / "one")
    config = json.loads((tmp_path / "one" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], type(config["lora_alpha"])) == (49, 1, int)


def test_another_scale_computes_the_same(tmp_path: Path) -> None:
    ours, theirs = trained(base(), rank=2, lora_alpha=10), trained(base(), rank=2, lora_alpha=3)
    save_adapter(ours, 0, tmp_path / "one")
    load_adapter_(theirs, 0, tmp_path / "one")
    x = torch.randn(6, 4, 3)
    with routed(ours, torch.zeros(6, dtype=torch.long)):
        expected = ours(x)
    with routed(theirs, torch.zeros(6, dtype=torch.long)):
        assert torch.allclose(theirs(x), expected, atol=1e-6)


def test_merging_what_was_loaded_is_the_routed_path(saved: Path) -> None:
    model = trained(base(), temperature=4)
    load_adapter_(model, 0, saved)
    x = torch.randn(6, 4, 3)
    with routed(model, torch.zeros(6, dtype=torch.long)):
        routed_path = model(x)
    assert torch.allclose(merge_(model, 0)(x), routed_path, atol=1e-6)


# ---------------------------------------------------------------- the base


def test_the_fingerprint_is_the_same_with_adapters_and_without(saved: Path) -> None:
    model = base()
    plain = base_fingerprint(model)
    assert plain == base_fingerprint(base())
    trained(model, temperature=4)
    assert base_fingerprint(model) == plain
    load_adapter_(model, 0, saved)
    freeze_(model)
    assert base_fingerprint(model) == plain
    assert base_fingerprint(detach_(model)) == plain
    assert len(plain) == 64


CHANGES: dict[str, Callable[[Net], Any]] = {
    "one bit of a weight": lambda net: net.head.weight.data.view(torch.int32)[0, 3].bitwise_xor_(1),
    "a statistic": lambda net: net.norm.running_mean.add_(1e-3),
    "a count": lambda net: net.norm.num_batches_tracked.add_(1),
    "a type": lambda net: net.double(),
    "a shape": lambda net: setattr(net.head, "weight", nn.Parameter(net.head.weight.T)),
    "a name": lambda net: setattr(net, "top", net.__dict__["_modules"].pop("head")),
    "two values exchanged": lambda net: net.head.bias.data.copy_(net.query.weight.data[0, :1]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_fingerprint_sees_every_change(change: Callable[[Net], Any]) -> None:
    net = base()
    change(net)
    assert base_fingerprint(net) != base_fingerprint(base())


def test_the_fingerprint_is_of_values_and_not_of_memory_or_order() -> None:
    one, two = nn.Linear(4, 6), nn.Linear(4, 6)
    two.load_state_dict(one.state_dict())
    two.weight = nn.Parameter(torch.stack([one.weight.detach()] * 2, dim=-1)[..., 0])
    assert not two.weight.is_contiguous()
    assert base_fingerprint(one) == base_fingerprint(two)
    assert base_fingerprint(nn.ModuleDict({"a": one, "b": nn.Tanh()})) == base_fingerprint(nn.ModuleDict({"a": two}))
    pair = {"a": one, "b": nn.LayerNorm(3)}
    assert base_fingerprint(nn.ModuleDict(pair)) == base_fingerprint(nn.ModuleDict(dict(reversed(pair.items()))))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_adapter_of_another_base_is_refused(saved: Path, change: Callable[[Net], Any]) -> None:
    net = base()
    change(net)
    refused(trained(net, temperature=4), saved, "belongs to another base")


def test_a_fingerprint_that_is_known_is_not_computed(saved: Path, tmp_path: Path) -> None:
    model = trained(base(), temperature=4)
    (tmp_path / "two").mkdir()
    write_adapter(model, 1, tmp_path / "two", base="f" * 64)
    load_adapter_(model, 1, tmp_path / "two", base="f" * 64)
    refused(model, tmp_path / "two", "another base")
    with pytest.raises(BundleError, match="another base"):
        load_adapter_(model, 1, saved, base="f" * 64)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("name", [CONFIG, TENSORS, SEAL])
@pytest.mark.parametrize("damage", ["missing", "truncated", "emptied", "grown", "a folder"])
def test_a_damaged_file_is_refused_by_name(saved: Path, name: str, damage: str) -> None:
    model, content = trained(base(), temperature=4), (saved / name).read_bytes()
    (saved / name).unlink()
    if damage == "a folder":
        (saved / name).mkdir()
    elif damage != "missing":
        (saved / name).write_bytes({"truncated": content[:-1], "emptied": b"", "grown": content + b"x"}[damage])
    refused(model, saved, name.replace(".", r"\."))


@pytest.mark.parametrize("name", [CONFIG, TENSORS, SEAL])
def test_any_flipped_bit_is_found(saved: Path, name: str) -> None:
    """But for white space of domlora.json, which says the same."""
    model, content = trained(base(), temperature=4), (saved / name).read_bytes()
    before, step = states(model), max(len(content) // 150, 1)
    for position in range(0, len(content), step):
        changed = content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]
        if name == SEAL and content[position : position + 1].isspace():
            continue
        (saved / name).write_bytes(changed)
        with pytest.raises(BundleError):
            load_adapter_(model, 0, saved)
    assert same_bits(states(model), before)


def test_the_two_files_of_peft_alone_are_not_enough(saved: Path) -> None:
    """They would be read as PEFT's own, and the base would not be checked."""
    (saved / SEAL).unlink()
    refused(trained(base(), temperature=4), saved, r"must have its domlora\.json")


def test_a_later_format_is_named(saved: Path) -> None:
    seal = json.loads((saved / SEAL).read_text())
    (saved / SEAL).write_text(json.dumps({**seal, "format": 9}))
    refused(trained(base(), temperature=4), saved, "format 9")


@pytest.mark.parametrize("path", ["nowhere", "file"])
def test_no_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("x")
    refused(trained(base()), tmp_path / path, r"readable adapter_config\.json.*save_adapter")


@pytest.mark.parametrize("domain", [-1, 3])
def test_no_such_domain(saved: Path, tmp_path: Path, domain: int) -> None:
    model = trained(base(), temperature=4)
    with pytest.raises(UnknownDomainError):
        load_adapter_(model, domain, saved)
    with pytest.raises(UnknownDomainError):
        save_adapter(model, domain, tmp_path / "two")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_model_without_adapters_is_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapters"):
        save_adapter(base(), 0, tmp_path / "two")
    with pytest.raises(ConfigError, match="no adapters"):
        load_adapter_(base(), 0, saved)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_that_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    model = trained(base())
    adapter_layers(model)["head"].lora_B.data[1, 0, 0] = value
    with pytest.raises(DataError, match=r"finite.*'domain': 1, 'bank': 'head\.lora_B'"):
        save_adapter(model, 1, tmp_path / "one")
    assert not list(tmp_path.iterdir())
    save_adapter(model, 0, tmp_path / "zero")


def test_a_folder_is_replaced_only_on_request(saved: Path) -> None:
    other = trained(base(), rank=1)
    before = (saved / TENSORS).read_bytes()
    with pytest.raises(DataError, match="must not exist"):
        save_adapter(other, 1, saved)
    assert (saved / TENSORS).read_bytes() == before
    save_adapter(other, 1, saved, overwrite=True)
    load_adapter_(other, 0, saved)


def test_only_our_own_folder_is_replaced(tmp_path: Path) -> None:
    """PEFT's may hold more: a model card, other adapters, a checkpoint of the trainer."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / CONFIG).write_text("{}")
    with pytest.raises(DataError, match=r"domlora\.json"):
        save_adapter(trained(base()), 0, tmp_path / "theirs", overwrite=True)
    assert (tmp_path / "theirs" / CONFIG).read_text() == "{}"


def test_another_choice_of_layers_is_refused(saved: Path, tmp_path: Path) -> None:
    save_adapter(trained(base(), temperature=4, include=["tower.*"]), 0, tmp_path / "tower")
    refused(trained(base(), temperature=4), tmp_path / "tower", "'missing': 'query'")
    refused(trained(base(), temperature=4, include=["tower.*"]), saved, "layers without an adapter here")


def test_a_smaller_rank_of_our_own_is_padded_and_a_larger_one_refused(tmp_path: Path) -> None:
    save_adapter(trained(base(), rank=2), 0, tmp_path / "two")
    save_adapter(trained(base(), rank=5), 0, tmp_path / "five")
    model = trained(base(), rank=4)
    refused(model, tmp_path / "five", "rank 4 here.*Received: 5.*rank=5")
    load_adapter_(model, 0, tmp_path / "two")
    row, small = rows_of(model, 0), rows_of(trained(base(), rank=2), 0)
    for layer in ("query", "tower.0", "head"):
        assert torch.equal(row[f"{layer}.lora_A"][:, :2], small[f"{layer}.lora_A"])
        assert torch.equal(row[f"{layer}.lora_B"][:2], small[f"{layer}.lora_B"])
        assert not row[f"{layer}.lora_B"][2:].any()


def test_a_bias_that_has_no_place_is_refused(tmp_path: Path) -> None:
    save_adapter(trained(base(), rank=2), 0, tmp_path / "bias")
    save_adapter(trained(base(), rank=2, bias=False), 0, tmp_path / "none")
    refused(trained(base(), rank=2, bias=False), tmp_path / "bias", "has no bias for each domain")
    model = load_adapter_(trained(base(), rank=2), 0, tmp_path / "none")
    assert not rows_of(model, 0)["head.lora_bias"].any()


def test_a_bias_alone_fits_every_rank(tmp_path: Path) -> None:
    chosen = ["tower.*", "head"]  # the layer without a bias has nothing to correct then
    ours = trained(base(), rank=0, include=chosen)
    save_adapter(ours, 1, tmp_path / "bias")
    model = load_adapter_(trained(base(), rank=3, lora_alpha=7, include=chosen), 1, tmp_path / "bias")
    x = torch.randn(4, 4, 3)
    with routed(ours, torch.ones(4, dtype=torch.long)):
        expected = ours(x)
    with routed(model, torch.ones(4, dtype=torch.long)):
        assert torch.allclose(model(x), expected, atol=1e-6)
    save_adapter(trained(base(), rank=1, include=chosen), 0, tmp_path / "low rank")
    refused(ours, tmp_path / "low rank", "has rank 0 here")


# ---------------------------------------------------------------- names


class Ends(nn.Module):
    """'b' is the end of 'other.b', and '+' means something in a pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(4, 4)
        self.other = nn.ModuleDict({"b": nn.Linear(4, 4), "b+": nn.Linear(4, 4)})


class Odd(nn.Module):
    """Names that end alike, names that mean something in a pattern, one layer in two places, one block in two."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.again = self.block
        self.tied = nn.Linear(4, 4)
        self.other = nn.ModuleDict({"tied": self.tied, "a+b (c)": nn.Linear(4, 4), "b": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.block, self.again, self.tied, *self.other.values()):
            x = layer(x)
        return x


def odd() -> Odd:
    torch.manual_seed(0)
    return Odd().eval()


def test_odd_names_come_back(tmp_path: Path) -> None:
    ours = trained(odd(), rank=2)
    save_adapter(ours, 1, tmp_path / "one")
    theirs = load_adapter_(attach_(odd(), 2, rank=2, domain=None), 0, tmp_path / "one")
    x = torch.randn(3, 4)
    with routed(ours, torch.ones(3, dtype=torch.long)):
        expected = ours(x)
    with routed(theirs, torch.zeros(3, dtype=torch.long)):
        assert torch.equal(theirs(x), expected)
    names = sorted(name for name in load_file(tmp_path / "one" / TENSORS) if name.endswith("lora_A.weight"))
    assert [name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in names] == [
        *("block.0", "other.a+b (c)", "other.b", "tied"),
    ]


def test_a_model_that_is_a_layer_comes_back(tmp_path: Path) -> None:
    """Its name is empty."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 2)
    plain = base_fingerprint(layer)
    ours = trained(layer, rank=2)
    save_adapter(ours, 1, tmp_path / "one")
    assert json.loads((tmp_path / "one" / SEAL).read_text())["base"] == plain
    assert "base_model.model.lora_A.weight" in load_file(tmp_path / "one" / TENSORS)
    load_adapter_(ours, 2, tmp_path / "one")
    assert same_bits(rows_of(ours, 1), rows_of(ours, 2))


def test_names_that_end_like_others_become_a_pattern(tmp_path: Path) -> None:
    """PEFT takes a list for ends of names: 'b' would be found in 'other.b' too."""
    for include, targets in ((["b", "other.b+"], r"(?:b|other\.b\+)"), (["other.*"], ["other.b", "other.b+"])):
        save_adapter(attach_(Ends(), 2, include=include, domain=None), 0, tmp_path / "one", overwrite=True)
        assert json.loads((tmp_path / "one" / CONFIG).read_text())["target_modules"] == targets


# ---------------------------------------------------------------- files that PEFT wrote


PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["0"], "bias": "none", "lora_bias": True}


def theirs(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """A folder as PEFT writes it, by hand (tests/foreign has the real ones)."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps({**PEFT, **config}))
    save_file(part("tower.0", 12, 32) if tensors is None else tensors, folder / TENSORS, metadata={"format": "pt"})
    return folder


def part(name: str, width: int, out: int, rank: int = 2, *, bias: bool = True) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(len(name))
    tensors = {"lora_A.weight": (rank, width), "lora_B.weight": (out, rank)} | ({"lora_B.bias": (out,)} if bias else {})
    made = {end: torch.randn(shape, generator=random) for end, shape in tensors.items()}
    return {f"base_model.model.{name}.{end}": tensor for end, tensor in made.items()}


def delta(model: nn.Module, name: str, domain: int = 1) -> tuple[Tensor, Tensor | None]:
    return adapter_layers(model)[name].correction(domain)


SCALES: dict[str, tuple[dict[str, Any], float]] = {
    "alpha by rank": ({}, 3.0),
    "rank stabilised": ({"use_rslora": True}, 6 / math.sqrt(2)),
    "a pattern of the end": ({"r": 8, "rank_pattern": {"0": 2}, "alpha_pattern": {"0": 5}}, 2.5),
    "a pattern of the whole": ({"alpha_pattern": {r"^tower\.0": 5, ".*": 7}}, 2.5),
    "the first of two patterns": ({"alpha_pattern": {r"tower\.\d": 7, "0": 5}}, 3.5),
    "a pattern of another layer": ({"alpha_pattern": {"^0": 5, "tower": 9, "head": 7}}, 3.0),
    "no patterns": ({"alpha_pattern": None, "rank_pattern": None}, 3.0),
    "zero": ({"lora_alpha": 0}, 0.0),
}


@pytest.mark.parametrize(("config", "scale"), SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("lora_alpha", [None, 7.0])
def test_their_scale_is_folded_in(
    tmp_path: Path, config: dict[str, Any], scale: float, lora_alpha: float | None
) -> None:
    tensors = part("tower.0", 12, 32)
    model = trained(base(), rank=2, lora_alpha=lora_alpha)
    load_adapter_(model, 1, theirs(tmp_path / "one", tensors, **config))
    a, b, bias = tensors.values()
    weight, shift = delta(model, "tower.0")
    assert torch.allclose(weight, scale * b @ a, atol=1e-5)
    assert torch.allclose(shift, scale * bias, atol=1e-5)


def test_what_they_leave_out_adds_nothing_and_can_still_be_trained(tmp_path: Path) -> None:
    model = trained(base(), rank=4)
    load_adapter_(model, 1, theirs(tmp_path / "one", part("tower.0", 12, 32, bias=False)))
    for name, layer in adapter_layers(model).items():
        weight, shift = layer.correction(1)
        assert bool(weight.any()) == (name == "tower.0")
        assert shift is None or not shift.any()
    assert torch.linalg.matrix_rank(delta(model, "tower.0")[0]) == 2
    with routed(model, torch.ones(4, dtype=torch.long)):
        model(torch.randn(4, 4, 3)).pow(2).sum().backward()
    assert all(layer.lora_B.grad[1].any() for layer in adapter_layers(model).values())
    assert adapter_layers(model)["tower.0"].lora_B.grad[1, 2:].any(), "the padding of A and B would never train"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in part("tower.0", 12, 32).items()}
    model = trained(base(), rank=2)
    load_adapter_(model, 1, theirs(tmp_path / "one", tensors))
    a, b, _ = (tensor.float() for tensor in tensors.values())
    assert torch.allclose(delta(model, "tower.0")[0], 3 * b @ a, atol=1e-5)


KEY = "base_model.model.tower.0"
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "LOHA"}, "peft_type LORA.*'LOHA'"),
    "no kind": ({"peft_type": None}, "peft_type LORA"),
    "DoRA": ({"use_dora": True}, "DoRA rescales the weights"),
    "whole layers": ({"modules_to_save": ["head"]}, "replaces whole layers.*modules_to_save"),
    "biases of the base": ({"bias": "all"}, "changes biases of the base"),
    "biases of its layers": ({"bias": "lora_only"}, "changes biases of the base"),
    "a base that was changed": ({"init_lora_weights": "pissa_niter_4"}, "this start had changed"),
    "tokens": ({"trainable_token_indices": [1]}, "rows of an embedding"),
    "parameters": ({"target_parameters": ["tower.0.weight"]}, "outside of linear layers"),
    "layers repeated": ({"layer_replication": [[0, 2]]}, "changes the layers of the base"),
    "of a later version": ({"use_wonder": True}, "this setting is not known here.*use_wonder"),
    "another rank": ({"r": 3}, "rank 3 .* tensors of rank 2"),
    "no number": ({"lora_alpha": "many"}, "rank and scale"),
    "not a number": ({"lora_alpha": math.nan}, "rank and scale"),
    "a pattern that is none": ({"alpha_pattern": {"(": 3}}, "rank and scale"),
    "patterns that are none": ({"alpha_pattern": [3]}, "rank and scale"),
}


@pytest.mark.parametrize(("config", "match"), SETTINGS.values(), ids=SETTINGS)
def test_settings_that_mean_more_than_lora_are_refused(tmp_path: Path, config: dict[str, Any], match: str) -> None:
    refused(trained(base(), rank=2), theirs(tmp_path / "one", **config), match)


FREE: list[dict[str, Any]] = [
    {"init_lora_weights": "gaussian"},
    {"target_modules": "all-linear"},
    {"lora_dropout": 0.1, "inference_mode": False},
    {"use_dora": False, "modules_to_save": None, "loftq_config": {}, "use_wonder": None},
    {"auto_mapping": {"base_model_class": "Net", "parent_library": "nets"}},
]


@pytest.mark.parametrize("config", FREE, ids=str)
def test_settings_that_change_nothing_are_read(tmp_path: Path, config: dict[str, Any]) -> None:
    load_adapter_(trained(base(), rank=2), 1, theirs(tmp_path / "one", **config))


def changed(**new: Tensor | None) -> dict[str, Tensor]:
    tensors: dict[str, Any] = part("tower.0", 12, 32)
    for end, tensor in new.items():
        tensors[f"{KEY}.{end.replace('__', '.')}"] = tensor
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "no B": (changed(lora_B__weight=None), "'tower.0' must fit"),
    "no A": (changed(lora_A__weight=None), "'tower.0' must fit"),
    "another width": (changed(lora_A__weight=torch.ones(2, 11)), "'tower.0' must fit it, 12 to 32"),
    "another output": (changed(lora_B__weight=torch.ones(31, 2)), "'tower.0' must fit it, 12 to 32"),
    "another bias": (changed(lora_B__bias=torch.ones(31)), "'tower.0' must fit it, 12 to 32"),
    "two ranks": (changed(lora_B__weight=torch.ones(32, 3)), "'tower.0' must fit"),
    "a convolution": (changed(lora_A__weight=torch.ones(2, 12, 1, 1)), "'tower.0' must fit"),
    "no rank": (changed(lora_A__weight=torch.ones(0, 12), lora_B__weight=torch.ones(32, 0)), "'tower.0' must fit"),
    "a number": (changed(lora_A__weight=torch.tensor(1.0)), "'tower.0' must fit"),
    "doubles": (changed(lora_A__weight=torch.ones(2, 12, dtype=torch.float64)), "16 or 32 bits.*float64"),
    "integers": (changed(lora_B__weight=torch.ones(32, 2, dtype=torch.int32)), "16 or 32 bits.*int32"),
    "NaN": (changed(lora_A__weight=torch.full((2, 12), math.nan)), r"finite.*tower\.0\.lora_A"),
    "infinity": (changed(lora_B__bias=torch.full((32,), math.inf)), r"finite.*tower\.0\.lora_bias"),
    "a magnitude": (changed(lora_magnitude_vector=torch.ones(32)), "layers without an adapter here.*magnitude"),
    "a saved layer": (changed(weight=torch.ones(32, 12)), "layers without an adapter here"),
    "an unknown layer": (changed() | part("tower.7", 4, 4), r"layers without an adapter here.*tower\.7.*include"),
    "an embedding": (changed() | {"base_model.model.table.lora_embedding_A": torch.ones(2, 5)}, "embeddings"),
    "a key without the prefix": (changed() | {"tower.0.lora_A.weight": torch.ones(2, 12)}, "layers without"),
    "a bias for a layer without": (part("query", 3, 3), "'query' has no bias for each domain here"),
    "a larger rank": (part("tower.0", 12, 32, rank=3), "rank 2 here.*Received: 3"),
}


@pytest.mark.parametrize(("tensors", "match"), BAD.values(), ids=BAD)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, Tensor], match: str) -> None:
    rank = 3 if "3" in match else 2
    refused(trained(base(), rank=2), theirs(tmp_path / "one", tensors, r=rank), match)


def test_a_value_that_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    tensors = changed(lora_B__weight=torch.full((32, 2), 1e5))
    refused(trained(base().half(), rank=2), theirs(tmp_path / "one", tensors), "finite")


@pytest.mark.parametrize("damage", ["truncated", "emptied", "not JSON", "a list", "nested"])
def test_a_damaged_file_of_theirs_is_refused(tmp_path: Path, damage: str) -> None:
    """What safetensors and JSON can see; a flipped bit of a weight has nothing that would show it."""
    folder = theirs(tmp_path / "one")
    content = (folder / TENSORS).read_bytes()
    if damage in ("truncated", "emptied"):
        (folder / TENSORS).write_bytes({"truncated": content[:-1], "emptied": b""}[damage])
    else:
        (folder / CONFIG).write_text({"not JSON": "{", "a list": "[]", "nested": "[" * 100_000}[damage])
    refused(trained(base(), rank=2), folder, "must be whole")


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    folder = theirs(tmp_path / "one")
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused(trained(base(), rank=2), folder, "never read from a pickle.*safe_serialization=True")


def test_a_layer_in_two_places_has_no_counterpart_in_peft(tmp_path: Path) -> None:
    """PEFT would correct the first of its places alone. A block in two places is one place for both."""
    model = trained(odd(), rank=2)
    refused(model, theirs(tmp_path / "layer", part("tied", 4, 4)), r"in one place alone.*\['tied', 'other.tied'\]")
    load_adapter_(model, 1, theirs(tmp_path / "block", part("block.0", 4, 4)))


def test_errors_say_what_to_do_next(tmp_path: Path) -> None:
    folder = theirs(tmp_path / "one", part("tower.7", 4, 4))
    shutil.copytree(folder, tmp_path / "two")
    for path in (folder, tmp_path / "two"):
        with pytest.raises(DomloraError, match=r"Attach to all layers"):
            load_adapter_(trained(base(), rank=2), 0, path)
