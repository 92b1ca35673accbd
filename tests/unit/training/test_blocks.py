"""Tables kept elsewhere, and their blocks in a checkpoint: what can be seen without TorchRec."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 - what stands in for ranks

from domlora.data.synthetic import World
from domlora.errors import ConfigError, DataError
from domlora.models.build import build_model
from domlora.training.checkpoint import read_checkpoint, write_checkpoint
from domlora.training.distributed.blocks import best_of, read_blocks_, write_blocks
from domlora.training.distributed.fused import FusedRun
from domlora.training.distributed.spool import spooled
from domlora.training.fit import FitOptions, fit
from domlora.training.negotiation import negotiate
from domlora.training.optimizers import FUSED, OptimizerOptions, Rule
from domlora.training.stages import Negotiation

BLOCKS = {"best/t.weight": torch.randn(5, 3), "sums/t.weight": torch.rand(5)}
FUSED_TABLES = OptimizerOptions(tables=Rule(FUSED))


def written(folder: Path) -> Path:
    tensors = {"best/t.weight": torch.empty(0, 3), "best/bias": torch.ones(2)}
    write_checkpoint(folder, tensors, {"position": 1}, lambda fresh: write_blocks(fresh, BLOCKS))
    return folder


def test_blocks_come_back(tmp_path: Path) -> None:
    folder, found = written(tmp_path / "run"), {name: torch.empty_like(block) for name, block in BLOCKS.items()}
    read_blocks_(folder, found)
    for name, block in BLOCKS.items():
        assert torch.equal(found[name], block), name
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_best_weights_are_whole(tmp_path: Path) -> None:
    best = best_of(written(tmp_path / "run"))
    assert torch.equal(best["t.weight"], BLOCKS["best/t.weight"])
    assert torch.equal(best["bias"], torch.ones(2))
    assert best.keys() == {"t.weight", "bias"}


def test_best_weights_of_a_run_without_blocks(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", {"best/bias": torch.ones(2)}, {})
    assert torch.equal(best_of(tmp_path / "run")["bias"], torch.ones(2))
    write_checkpoint(tmp_path / "run", {"model/bias": torch.ones(2)}, {})
    with pytest.raises(DataError, match="before the first validation"):
        best_of(tmp_path / "run")


def test_a_damaged_block_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "run")
    block, *_ = (folder / "rows").iterdir()
    content = bytearray(block.read_bytes())
    content[-1] ^= 1
    block.write_bytes(content)
    with pytest.raises(DataError, match="another sha256"):
        read_checkpoint(folder)
    block.unlink()
    with pytest.raises(DataError, match="must be whole"):
        read_checkpoint(folder)


def test_blocks_that_end_half_leave_the_old_checkpoint(tmp_path: Path) -> None:
    def half(fresh: Path) -> None:
        write_blocks(fresh, {"best/t.weight": torch.zeros(5, 3)})
        raise KeyboardInterrupt

    folder = written(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(folder, {"best/bias": torch.zeros(2)}, {}, half)
    assert torch.equal(best_of(folder)["t.weight"], BLOCKS["best/t.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("group", ["dense", "adapters"])
def test_only_tables_are_fused(group: str) -> None:
    with pytest.raises(ConfigError, match=r"lazy one|tables alone"):
        OptimizerOptions(**{group: Rule(FUSED)})


def test_a_method_with_steps_of_its_own_refuses_fused_tables() -> None:
    data = World(num_domains=2).dataset(400, seed=1)[0]
    with pytest.raises(ConfigError, match="methods base, joint"):
        negotiate(data, {"name": "mlp"}, Negotiation(optimizer=FUSED_TABLES))


@pytest.mark.parametrize("options", [{"average_decay": 0.9}, {"device": "meta"}])
def test_what_fused_tables_cannot_do_is_refused(options: dict) -> None:
    data = World(num_domains=2).dataset(400, seed=1)[0]
    with pytest.raises(ConfigError, match="fused tables are on the CPU"):
        fit(build_model(schema=data.schema, name="mlp"), data, FitOptions(**options), FUSED_TABLES, kind=FusedRun)


def test_without_the_libraries_a_line_says_how_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fbgemm_gpu.split_table_batched_embeddings_ops_common", None)
    data = World(num_domains=2).dataset(400, seed=1)[0]
    with pytest.raises(ConfigError, match=r"domlora\[torchrec\]"):
        fit(build_model(schema=data.schema, name="mlp"), data, FitOptions(), FUSED_TABLES, kind=FusedRun)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_a_table_goes_through_a_file_that_has_no_name_afterwards(tmp_path: Path) -> None:
    rows = torch.randn(200_003, 3)
    (tmp_path / ".run.rows.0").write_bytes(b"of one that was killed")
    whole = spooled(rows[:, :2], 200_003, tmp_path / "run")
    assert torch.equal(whole, rows[:, :2])
    assert not list(tmp_path.iterdir())
    whole += 1  # it is memory like any other
    assert torch.equal(whole, rows[:, :2] + 1)
    assert torch.equal(spooled(rows, 200_003, None), rows)


@pytest.mark.usefixtures("one_rank")
def test_a_disk_that_takes_no_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must be possible to write"):
        spooled(torch.zeros(2, 2), 2, tmp_path / "missing" / "run")


def test_best_weights_may_lie_on_another_disk(tmp_path: Path) -> None:
    folder = written(tmp_path / "there" / "run")
    with pytest.raises(DataError, match="must be possible to write"):
        best_of(folder, tmp_path / "missing")
    assert torch.equal(best_of(folder, tmp_path)["t.weight"], BLOCKS["best/t.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
