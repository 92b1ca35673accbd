"""Rows in, logits out; bad rows and damaged folders refused; adapters come and go under load."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from domlora.adapters.attach import attach_, detach_
from domlora.adapters.bank import add_domain_, load_rows_, remove_domain_, rows_of
from domlora.errors import BundleError, ConfigError, DataError, UnknownDomainError
from domlora.serving.export import banks_of
from domlora.serving.program import Program


def arrays(batch):
    return batch.ids.numpy(), batch.dense.numpy(), batch.domain.numpy()


def eager(model, batch):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(batch.ids, batch.dense, batch.domain).numpy()


def close(ours, theirs):
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max(initial=0) <= 1e-5


@pytest.fixture(scope="module")
def program(adapted):
    return Program.open(adapted.folder)


def test_it_needs_no_torch():
    code = "import sys, domlora.serving.program; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_it_scores_without_torch(adapted, rows, tmp_path):
    code = (
        "import sys, numpy as np; from pathlib import Path; from domlora.serving.program import Program;"
        "p = Program.open(Path(sys.argv[1])); n = len(p.domains);"
        "y = p(np.ones((4, 5), np.int64), np.ones((4, 1), np.float32), np.arange(-1, 3));"
        "assert y.shape == (4,) and len(set(y)) == 4; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(adapted.folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("num_rows", [0, 1, 2, 64, 1000])
@pytest.mark.parametrize("plan", [None, "mixed", "by_domain"])
def test_it_scores_as_the_model(program, adapted, rows, num_rows, plan):
    batch = rows(num_rows, seed=7)
    close(program(*arrays(batch), plan=plan), eager(adapted.bundle.model, batch))


def test_rows_of_no_domain_get_the_base(program, adapted, rows):
    batch = rows(40)._replace(domain=torch.full((40,), -1))
    base = eager(detach_(copy.deepcopy(adapted.bundle.model)), batch)
    for plan in ("mixed", "by_domain"):
        assert np.abs(program(*arrays(batch), plan=plan) - base).max() <= 1e-6


def test_a_domain_is_added_without_an_export(program, adapted, rows):
    model = copy.deepcopy(adapted.bundle.model)
    number = add_domain_(model)
    with torch.no_grad():
        rows_new = {name: 0.2 * torch.randn_like(row) for name, row in rows_of(model, number).items()}
    load_rows_(model, number, rows_new)
    grown = program.with_adapter("shop", banks_of(model, number))
    assert grown.domains == ("app", "web", "mail", "shop")
    assert program.domains == ("app", "web", "mail")
    batch = rows(300, seed=2, num_domains=4)
    expected = eager(model, batch)
    for plan in ("mixed", "by_domain"):
        close(grown(*arrays(batch), plan=plan), expected)
    with pytest.raises(UnknownDomainError):
        program(*arrays(batch))


@pytest.mark.parametrize("rank", [0, 1, 32])
def test_an_adapter_of_another_rank(program, adapted, rows, rank):
    """In place of a known domain's; the others keep theirs, which are of a smaller rank."""
    wide = attach_(detach_(copy.deepcopy(adapted.bundle.model)), 1, rank=rank, lora_alpha=5.0, include=["tower.*"])
    with torch.no_grad():
        for name, parameter in wide.named_parameters():
            if "lora" in name:
                parameter.normal_(std=0.2)
    swapped = program.with_adapter("web", banks_of(wide, 0))
    batch = rows(200, seed=3)
    expected = eager(adapted.bundle.model, batch)
    there = batch.domain == 1
    own = batch.take(there)
    expected[there] = eager(wide, own._replace(domain=torch.zeros_like(own.domain)))
    for plan in ("mixed", "by_domain"):
        close(swapped(*arrays(batch), plan=plan), expected)
    close(program(*arrays(batch)), eager(adapted.bundle.model, batch))


def test_a_domain_is_taken_away(program, adapted, rows):
    model = remove_domain_(copy.deepcopy(adapted.bundle.model), 0)
    less = program.without("app")
    assert less.domains == ("web", "mail")
    batch = rows(100, num_domains=2)
    close(less(*arrays(batch)), eager(model, batch))
    none = less.without("web").without("mail")
    batch = rows(10, num_domains=0)
    close(none(*arrays(batch), plan="by_domain"), eager(detach_(copy.deepcopy(model)), batch))
    with pytest.raises(UnknownDomainError, match="Known: 'mail', 'web'"):
        less.without("app")


def test_zeros_are_the_base(program, rows):
    zeros = {name: np.zeros_like(bank) for name, bank in zip_names(program).items()}
    batch = rows(50)._replace(domain=torch.full((50,), 1))
    base = program(*arrays(batch._replace(domain=torch.full((50,), -1))))
    assert np.array_equal(program.with_adapter("web", zeros)(*arrays(batch)), base)


def zip_names(program, rank=3):
    shapes = {name: shape for layer in program.layers for name, shape in layer.shapes.items()}
    random = np.random.default_rng(0)
    return {
        name: random.normal(size=[rank if size is None else size for size in shape]).astype(np.float32)
        for name, shape in shapes.items()
    }


def changed(banks, name, value):
    return {**banks, name: value}


def test_bad_adapters_are_refused(program, rows):
    good = zip_names(program)
    name = next(iter(good))
    nan = good[name].copy()
    nan[0, 0] = np.nan
    bad = [
        {},
        {key: bank for key, bank in good.items() if key != name},
        {**good, "tower.9.lora_A": good[name]},
        changed(good, name, nan),
        changed(good, name, np.where(np.isnan(nan), np.inf, nan)),
        changed(good, name, good[name].astype(np.float64)),
        changed(good, name, good[name][:, :2]),
        changed(good, name, good[name][:-1]),
        changed(good, name, good[name].reshape(-1)),
        changed(good, name, good[name].T.copy()),
    ]
    before = program(*arrays(rows(20)))
    for banks in bad:
        with pytest.raises(BundleError):
            program.with_adapter("web", banks)
    assert np.array_equal(program(*arrays(rows(20))), before)


def rows_with(batch, column, row, slot, value):
    found = [array.copy() for array in arrays(batch)]
    place = ("ids", "dense", "domain").index(column)
    found[place][(row, slot) if place < 2 else row] = value
    return found


@pytest.mark.parametrize(
    ("column", "slot", "value", "error"),
    [
        ("ids", 0, -1, DataError),
        ("ids", 0, 600, DataError),
        ("ids", 3, 600, DataError),
        ("ids", 4, 6, DataError),
        ("ids", 4, 2**63 - 1, DataError),
        ("ids", 4, -(2**63), DataError),
        ("dense", 0, np.nan, DataError),
        ("dense", 0, np.inf, DataError),
        ("domain", 0, -2, UnknownDomainError),
        ("domain", 0, 3, UnknownDomainError),
        ("domain", 0, 2**62, UnknownDomainError),
    ],
)
def test_rows_out_of_range_are_refused(program, star, plain, rows, column, slot, value, error):
    for each in (program, Program.open(star.folder), Program.open(plain.folder)):
        for row in (0, 7):
            with pytest.raises(error, match=r"Received"):
                each(*rows_with(rows(8), column, row, slot, value))


def test_arrays_of_another_kind_are_refused(program, rows):
    ids, dense, domain = arrays(rows(8))
    bad = [
        (ids.astype(np.int32), dense, domain),
        (ids.astype(np.float32), dense, domain),
        (ids[:, :-1], dense, domain),
        (ids[:-1], dense, domain),
        (ids[0], dense, domain),
        (ids.tolist(), dense, domain),
        (ids, dense.astype(np.float64), domain),
        (ids, dense[:, :0], domain),
        (ids, dense, domain.astype(np.int32)),
        (ids, dense, domain[:, None]),
        (ids, dense, domain[:-1]),
        (ids, dense, [0] * 8),
        (ids, dense, 3.0),
        (ids, dense, None),
    ]
    for each in bad:
        with pytest.raises(DataError):
            program(*each)


def test_a_network_that_reads_the_domain(star, rows):
    """No domain can be added to it; without its adapter a domain keeps its own weights."""
    program, model = Program.open(star.folder), star.bundle.model
    batch = rows(200, seed=4)
    for plan in ("mixed", "by_domain"):
        close(program(*arrays(batch), plan=plan), eager(model, batch))
    with pytest.raises(ConfigError, match="none can be added"):
        program.with_adapter("shop", banks_of(model, 0))
    swapped = program.with_adapter("web", banks_of(model, 0))
    twin = load_rows_(copy.deepcopy(model), 1, rows_of(model, 0))
    close(swapped(*arrays(batch)), eager(twin, batch))
    less = program.without("web")
    assert less.domains == program.domains
    own = batch.take(batch.domain == 1)
    close(less(*arrays(own)), eager(detach_(copy.deepcopy(model)), own))


def test_a_model_without_adapters(plain, rows):
    program = Program.open(plain.folder)
    batch = rows(100)
    close(program(*arrays(batch)), eager(plain.bundle.model, batch))
    assert program.domains == ("app", "web", "mail")
    for change in (lambda: program.with_adapter("web", {}), lambda: program.without("web")):
        with pytest.raises(ConfigError, match="no adapters"):
            change()


def test_swaps_under_load_give_no_wrong_answer(program, rows):
    """Two adapters take turns while four threads score; every answer is that of one of the two."""
    banks = [zip_names(program), {name: -bank for name, bank in zip_names(program).items()}]
    batch = rows(64, seed=9)
    programs = [program.with_adapter("web", each) for each in banks]
    right = {plan: [p(*arrays(batch), plan=plan) for p in programs] for plan in ("mixed", "by_domain")}
    holder, wrong, done, stop = [programs[0]], [], [0] * 4, threading.Event()

    def score(number):
        while not stop.is_set():
            plan = ("mixed", "by_domain")[done[number] % 2]
            found = holder[0](*arrays(batch), plan=plan)
            if not any(np.array_equal(found, each) for each in right[plan]):
                wrong.append(found)
            done[number] += 1

    threads = [threading.Thread(target=score, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for swap in range(300):
        holder[0] = holder[0].with_adapter("web", banks[swap % 2])
        stop.wait(0.003)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert min(done) > 20


@pytest.fixture
def damaged(adapted, tmp_path) -> Path:
    shutil.copytree(adapted.folder, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


FILES = ["mixed.onnx", "one.onnx", "tables.bin", "adapters/00001.safetensors", "schema.json", "vocabularies.json"]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("how", ["bit", "short", "empty", "gone"])
def test_damage_is_found(damaged, name, how):
    path = damaged / name
    if how == "bit":
        flip(path, path.stat().st_size // 2)
    elif how == "short":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(BundleError, match=name if name in FILES else r"whole manifest|format"):
        Program.open(damaged)


def test_a_file_too_many_and_another_format_are_refused(damaged):
    (damaged / "more").write_bytes(b"x")
    with pytest.raises(BundleError, match="more"):
        Program.open(damaged)
    (damaged / "more").unlink()
    manifest = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps({**manifest, "format": "domlora export 99"}))
    with pytest.raises(BundleError, match="export 99"):
        Program.open(damaged)


def test_two_sessions_map_the_tables(adapted):
    """Not read: the file is among what the system maps for this process, once for each graph."""
    programs = [Program.open(adapted.folder) for _ in range(2)]
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line for line in maps if str(adapted.folder / "tables.bin") in line]
    assert len(mapped) >= 2 * len(programs)
