from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from domlora.adapters.attach import attach_, detach_
from domlora.adapters.bank import adapter_parameters, base_state, rows_of
from domlora.adapters.file import load_adapter_
from domlora.bundle import Bundle, adapters_of, diff, gc, set_default, verify, versions
from domlora.errors import BundleError, DataError
from domlora.features.encode import Encoder
from domlora.models.build import build_model

Make = Callable[..., Bundle]
Grow = Callable[[Bundle, int, Sequence[str]], Bundle]


def states(bundle: Bundle) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}


def same(one: Bundle, two: Bundle) -> bool:
    """In every bit, the sign of a zero and the kind of a NaN too."""
    first, second = states(one), states(two)
    bits = [(first[name].reshape(-1).view(torch.uint8), second[name].reshape(-1).view(torch.uint8)) for name in first]
    return first.keys() == second.keys() and all(torch.equal(a, b) for a, b in bits)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def moved(bundle: Bundle, *, rows: Sequence[int] = (3,), bias: float = 0.25) -> Bundle:
    """As after a day: some rows of the tables and a dense parameter."""
    with torch.no_grad():
        for name, tensor in base_state(bundle.model).items():
            if name.endswith(("table.weight", "embedding.weight")):
                tensor[list(rows)] += bias
        next(p for name, p in bundle.model.named_parameters() if name.endswith("base.bias")).add_(bias)
    return bundle


def retrained(bundle: Bundle, domain: int) -> Bundle:
    with torch.no_grad():
        for _, bank in adapter_parameters(bundle.model):
            bank[domain] += 0.125
    return bundle


# ---------------------------------------------------------------- publish


def test_a_new_bundle_has_version_one(saved: Path) -> None:
    (version,) = versions(saved)
    assert (version.number, version.parent, version.default, version.domains) == (1, None, True, 3)
    assert version.written == {"encoder": 1, "base": 1, "adapters": 3}
    assert version.facts == {"seed": 0}
    assert version.created.endswith("+00:00")
    assert Bundle.open(saved).version == 1


def test_nothing_changed_and_nothing_is_written_but_a_record(saved: Path) -> None:
    before = files(saved)
    opened = Bundle.open(saved)
    assert opened.publish(saved) == opened.version == 2
    after = files(saved)
    assert after.keys() - before.keys() == {"versions/2.json"}
    assert [name for name in before if before[name] != after[name]] == ["manifest.json"]
    assert versions(saved)[1].size_bytes == 0
    assert same(Bundle.open(saved), opened)


def test_what_differs_is_written_and_opens_with_the_same_bits(saved: Path) -> None:
    ours = retrained(moved(Bundle.open(saved)), 1)
    ours.facts = {"day": 2}
    before = files(saved)
    ours.publish(saved)
    assert files(saved).keys() - before.keys() == {
        "versions/2.json",
        "base@2/delta.json",
        "base@2/delta.safetensors",
        "adapters/web@2/adapter_config.json",
        "adapters/web@2/adapter_model.safetensors",
        "adapters/web@2/domlora.json",
    }
    theirs = Bundle.open(saved)
    assert same(theirs, ours)
    assert (theirs.version, theirs.facts, theirs.adapter) == (2, {"day": 2}, ours.adapter)
    assert not same(Bundle.open(saved, version=1), ours)
    assert versions(saved)[1].size_bytes < versions(saved)[0].size_bytes / 2


def test_bits_count_and_not_values(saved: Path) -> None:
    ours = Bundle.open(saved)
    weight = base_state(ours.model)["embedding.weight"]
    weight[4], weight[5] = 0.0, float("nan")
    ours.publish(saved)
    weight[4] = -0.0
    ours.publish(saved)
    assert same(Bundle.open(saved), ours)
    assert torch.signbit(base_state(Bundle.open(saved).model)["embedding.weight"][4]).all()
    assert versions(saved)[2].written == {"base": 1}


def test_onboarding_writes_one_adapter_and_the_new_words(saved: Path, grow: Grow) -> None:
    opened = Bundle.open(saved)
    ours = grow(opened, 32, ("app", "web", "tv", "radio"))
    ours.publish(saved)
    written = versions(saved)[1].written
    assert written == {"encoder": 1, "base": 1, "adapters": 1}
    theirs = Bundle.open(saved)
    assert same(theirs, ours)
    assert theirs.encoder.fingerprint() == ours.encoder.fingerprint()
    assert [place.name for place in adapters_of(saved).values()] == ["app@1", "web@1", "tv@1", "radio@2"]
    assert not (saved / "base@2/model.safetensors").exists()


@pytest.mark.parametrize("domain", [0, 3])
def test_an_adapter_alone_stands_beside_the_base_it_was_written_for(saved: Path, grow: Grow, domain: int) -> None:
    """Its folder names that base, whichever version uses it, and is refused by another."""
    grow(Bundle.open(saved), 32, ("app", "web", "tv", "radio")).publish(saved)
    place = list(adapters_of(saved).values())[domain]
    for version in (1, 2):
        bundle = Bundle.open(saved, version=version)
        plain = detach_(bundle.model)
        attach_(plain, 1, temperature=4.0, include=("tower.*",))
        if place.name.endswith(f"@{version}"):
            load_adapter_(plain, 0, place)
            row = rows_of(Bundle.open(saved).model, domain)
            assert all(torch.equal(row[name], tensor) for name, tensor in rows_of(plain, 0).items())
        else:
            with pytest.raises(BundleError, match="another base"):
                load_adapter_(plain, 0, place)


def test_ten_days(saved: Path, grow: Grow) -> None:
    """Tables that grow, rows that move, an adapter a day; every version stays what it was."""
    days = [Bundle.open(saved)]
    for day in range(10):
        ours = Bundle.open(saved)
        if day % 3 == 0:
            ours = grow(ours, 31 + day, ours.encoder.schema.domains)
        retrained(moved(ours, rows=[day, day + 9], bias=0.1 * (day + 1)), day % 3)
        assert ours.publish(saved) == day + 2
        days.append(ours)
    assert all(same(Bundle.open(saved, version=number), day) for number, day in enumerate(days, 1))
    record = json.loads((saved / "versions/11.json").read_text())
    assert record["base"] == ["base@1", *(f"base@{number}" for number in range(2, 12))]
    assert verify(saved).versions == tuple(range(1, 12))


def test_a_long_chain_begins_anew(saved: Path) -> None:
    bundle = Bundle.open(saved)
    lengths = []
    for _ in range(18):
        moved(bundle, rows=[1]).publish(saved)
        lengths.append(len(json.loads((saved / f"versions/{bundle.version}.json").read_text())["base"]))
    assert lengths == [*range(2, 18), 1, 2]
    assert same(Bundle.open(saved), bundle)


def test_a_large_delta_is_a_whole_base(saved: Path) -> None:
    bundle = moved(Bundle.open(saved), rows=range(60))
    bundle.publish(saved)
    assert (saved / "base@2/model.safetensors").is_file()
    assert same(Bundle.open(saved), bundle)


def test_another_model_is_written_whole(saved: Path, make: Make) -> None:
    opened = Bundle.open(saved)
    options = {**opened.model_options, "hidden_units": [8, 6]}
    model = attach_(build_model(schema=opened.encoder.schema, **options), 3, temperature=2.0, include=("tower.*",))
    other = Bundle(model.eval(), options, opened.encoder, version=opened.version)
    other.publish(saved)
    assert versions(saved)[1].written == {"base": 1, "adapters": 3}
    assert same(Bundle.open(saved), other)


def test_other_options_of_adapters_are_written(saved: Path) -> None:
    """Equal rows mean something else with another scale."""
    opened = Bundle.open(saved)
    rows = [rows_of(opened.model, domain) for domain in range(3)]
    attach_(detach_(opened.model), 3, temperature=4.0, lora_alpha=2.0, include=("tower.*",))
    with torch.no_grad():
        for name, bank in adapter_parameters(opened.model):
            bank.copy_(torch.stack([row[name] for row in rows]))
    opened.publish(saved)
    assert versions(saved)[1].written == {"adapters": 3}
    assert same(Bundle.open(saved), opened)


def test_adapters_taken_off(saved: Path) -> None:
    bundle = Bundle.open(saved)
    detach_(bundle.model)
    bundle.publish(saved)
    assert Bundle.open(saved).adapter is None
    assert versions(saved)[1].domains == 0
    assert same(Bundle.open(saved), bundle)


def test_an_optimizer_is_kept(saved: Path) -> None:
    bundle = Bundle.open(saved)
    assert bundle.optimizer == {}
    bundle.optimizer = {"step": torch.tensor(7), "embedding.weight/moment": torch.rand(5, 2)}
    bundle.publish(saved)
    again = Bundle.open(saved)
    assert again.optimizer.keys() == bundle.optimizer.keys()
    assert all(torch.equal(again.optimizer[name], tensor) for name, tensor in bundle.optimizer.items())
    again.publish(saved)
    assert versions(saved)[2].written == {}
    again.optimizer["step"] += 1
    again.publish(saved)
    assert versions(saved)[3].written == {"optimizer": 1}
    again.optimizer = {}
    again.publish(saved)
    assert Bundle.open(saved).optimizer == {}


def test_a_bundle_that_was_never_opened_has_no_parent(saved: Path, make: Make) -> None:
    make(seed=5).publish(saved)
    assert versions(saved)[1].parent is None
    assert versions(saved)[1].written == {"encoder": 1, "base": 1, "adapters": 3}


def test_a_failed_publish_changes_nothing(saved: Path) -> None:
    before = files(saved)
    for fault in ("facts", "adapter"):
        bundle = Bundle.open(saved)
        if fault == "facts":
            bundle.facts = {"valid": float("nan")}
        else:
            next(bank for _, bank in adapter_parameters(bundle.model)).data[0] = float("inf")
        with pytest.raises((ValueError, DataError)):
            bundle.publish(saved)
        assert files(saved) == before
        assert bundle.version == 1


def test_a_damaged_parent_is_no_ground_for_a_delta(saved: Path) -> None:
    bundle = moved(Bundle.open(saved))
    path = saved / "base@1/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"base@1/model\.safetensors"):
        bundle.publish(saved)
    assert len(versions(saved)) == 1


def test_no_bundle_to_publish_to(make: Make, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BundleError, match="domlora pretrain"):
            make().publish(place)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the default, and what goes


def test_a_candidate_waits(saved: Path) -> None:
    bundle = retrained(Bundle.open(saved), 0)
    assert bundle.publish(saved, default=False) == 2
    assert Bundle.open(saved).version == 1
    assert same(Bundle.open(saved, version=2), bundle)
    set_default(saved, 2)
    assert Bundle.open(saved).version == 2
    set_default(saved, 1)
    assert [version.default for version in versions(saved)] == [True, False]


def test_the_encoder_of_a_folder_is_the_default_version_s(saved: Path, grow: Grow) -> None:
    grow(Bundle.open(saved), 40, ("app", "web", "tv")).publish(saved)
    assert len(Encoder.open(saved).vocabularies["item"]) == 40
    set_default(saved, 1)
    assert len(Encoder.open(saved).vocabularies["item"]) == 30
    retrained(Bundle.open(saved), 0).publish(saved)
    assert len(Encoder.open(saved).vocabularies["item"]) == 30


def test_a_default_must_be_there_and_whole(saved: Path) -> None:
    retrained(Bundle.open(saved), 0).publish(saved, default=False)
    with pytest.raises(BundleError, match=r"no such version\. Received: 3\. Known: 1, 2"):
        set_default(saved, 3)
    (saved / "adapters/app@2/domlora.json").write_bytes(b"{}")
    with pytest.raises(BundleError, match=r"adapters/app@2/domlora\.json"):
        set_default(saved, 2)
    assert Bundle.open(saved).version == 1


def test_a_damaged_version_leaves_the_others_alone(saved: Path) -> None:
    retrained(Bundle.open(saved), 0).publish(saved)
    (saved / "adapters/app@2/domlora.json").unlink()
    with pytest.raises(BundleError, match=r"adapters/app@2/domlora\.json"):
        verify(saved)
    with pytest.raises(BundleError, match=r"adapters/app@2/domlora\.json"):
        Bundle.open(saved)
    assert Bundle.open(saved, version=1).version == 1
    set_default(saved, 1)


def test_gc_keeps_what_is_needed(saved: Path) -> None:
    kept = {}
    for day in range(1, 5):
        bundle = retrained(moved(Bundle.open(saved), rows=[day]), day % 3)
        kept[bundle.publish(saved)] = bundle
    removed = gc(saved, keep=[3])
    assert removed == ["adapters/tv@1", "adapters/web@1", "versions/1.json", "versions/2.json", "versions/4.json"]
    assert [version.number for version in versions(saved)] == [3, 5]
    assert all(same(Bundle.open(saved, version=number), kept[number]) for number in (3, 5))
    left = {part for number in (3, 5) for part in json.loads((saved / f"versions/{number}.json").read_text())["files"]}
    assert files(saved).keys() == left | {"manifest.json", "versions/3.json", "versions/5.json"}
    assert verify(saved).versions == (3, 5)
    assert gc(saved, keep=[3]) == []


def test_gc_keeps_the_default_and_gives_no_number_twice(saved: Path) -> None:
    for domain in range(2):
        retrained(Bundle.open(saved), domain).publish(saved, default=False)
    gc(saved, keep=[])
    assert [version.number for version in versions(saved)] == [1]
    assert retrained(Bundle.open(saved), 2).publish(saved) == 4


def test_gc_of_a_version_that_is_not_there_removes_nothing(saved: Path) -> None:
    retrained(Bundle.open(saved), 0).publish(saved)
    before = files(saved)
    with pytest.raises(BundleError, match="no such version"):
        gc(saved, keep=[7])
    assert files(saved) == before


def test_a_parent_that_is_gone_costs_space_alone(saved: Path) -> None:
    bundle = Bundle.open(saved)
    retrained(Bundle.open(saved), 0).publish(saved)
    gc(saved, keep=[])
    bundle.publish(saved)
    assert versions(saved)[1].parent is None
    assert same(Bundle.open(saved), bundle)


def test_diff(saved: Path, grow: Grow) -> None:
    ours = retrained(grow(Bundle.open(saved), 32, ("app", "web", "tv", "radio")), 1)
    ours.facts = {"seed": 0, "day": 2}
    base_state(ours.model)["embedding.weight"][5] += 1
    next(p for name, p in ours.model.named_parameters() if name.endswith("base.bias")).data[0] += 0.5
    ours.publish(saved)
    found = diff(saved, 1, 2)
    assert (found.domains_added, found.domains_removed, found.adapters) == (("radio",), (), ("web",))
    assert found.num_ids == {"user": (32, 34), "item": (32, 34)}
    assert found.tables["embedding.weight"].rows == (64, 68)
    assert found.tables["embedding.weight"].changed == 5
    assert list(found.dense.values()) == [0.5]
    assert (found.model, found.facts) == ({}, {"day": (None, 2)})
    back = diff(saved, 2, 1)
    assert (back.domains_added, back.domains_removed) == ((), ("radio",))
    same_one = diff(saved, 1, 1)
    assert not any((same_one.adapters, same_one.tables, same_one.dense, same_one.num_ids, same_one.facts))


def test_a_full_disk_is_one_line_and_the_default_stays(make: Make, small_disk: Path) -> None:
    folder = small_disk / "bundle"
    make().save(folder)
    before = files(folder)
    (small_disk / "ballast").write_bytes(bytes(1024 * (shutil.disk_usage(small_disk).free // 1024)))
    with pytest.raises(DataError, match="the disk must have room"):
        moved(Bundle.open(folder)).publish(folder)
    assert {name: data for name, data in files(folder).items() if name in before} == before
    (small_disk / "ballast").unlink()
    assert moved(Bundle.open(folder)).publish(folder) == 2
