"""One version with its adapters: names to numbers, and logits that do not depend on how the domain is told."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from domlora.errors import UnknownDomainError
from domlora.features.encode import Encoder
from domlora.serving.program import Program
from domlora.serving.snapshot import Snapshot


def snapshot_of(made, **options):
    program = Program.open(made.folder, **options)
    adapters = dict.fromkeys(program.domains, "1")
    return Snapshot(program=program, encoder=Encoder.open(made.folder), name="ads", version="1", adapters=adapters)


def test_a_domain_has_a_number_only_while_its_adapter_is_in_memory(adapted):
    assert [snapshot_of(adapted).number_of(name) for name in ("app", "web", "mail", "tv")] == [0, 1, 2, None]
    assert snapshot_of(adapted, domains=("mail",)).number_of("mail") == 0
    assert snapshot_of(adapted, domains=("mail",)).number_of("app") is None


def test_it_does_not_change(adapted):
    with pytest.raises(FrozenInstanceError):
        snapshot_of(adapted).version = "2"


@pytest.mark.parametrize("kind", ["adapted", "star", "plain"])
@pytest.mark.parametrize("domain", [-1, 0, 2])
def test_one_number_for_all_rows_is_that_number_in_each(kind, domain, rows, request):
    snapshot = snapshot_of(request.getfixturevalue(kind))
    batch = rows(33, seed=5)
    ids, dense = batch.ids.numpy(), batch.dense.numpy()
    each = snapshot.logits(ids, dense, np.full(33, domain))
    assert np.array_equal(snapshot.logits(ids, dense, domain), each)
    assert np.abs(snapshot.program(ids, dense, domain, plan="mixed") - each).max() <= 1e-5


@pytest.mark.parametrize("domain", [-2, 3])
def test_a_number_out_of_range_is_refused(adapted, rows, domain):
    batch = rows(3)
    with pytest.raises(UnknownDomainError):
        snapshot_of(adapted).logits(batch.ids.numpy(), batch.dense.numpy(), domain)


def test_rows_of_many_domains_stack_no_adapter_that_they_do_not_need(adapted, rows):
    """A thousand adapters of another rank, of which the rows need two: the answers are those of the two alone."""
    program = Program.open(adapted.folder)
    few = program.without("mail")
    shapes = {name: shape for layer in program.layers for name, shape in layer.shapes.items()}
    wide = {name: np.ones([30 if n is None else n for n in shape], np.float32) for name, shape in shapes.items()}
    many = few
    for number in range(50):
        many = many.with_adapter(f"d{number}", wide)
    batch = rows(12, seed=1, num_domains=2)
    arrays = batch.ids.numpy(), batch.dense.numpy(), batch.domain.numpy()
    assert np.array_equal(many(*arrays, plan="mixed"), few(*arrays, plan="mixed"))


def test_a_server_needs_neither_torch_nor_what_reads_datasets():
    code = (
        "import sys, domlora.serving.http.service, domlora.serving.http.app, domlora.serving.http.worker;"
        "unwanted = ('torch', 'numba', 'duckdb', 'ibis', 'onnx', 'domlora.data', 'domlora.models', 'domlora.layers',"
        " 'domlora.adapters', 'domlora.training', 'domlora.bundle');"
        "print([name for name in unwanted if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
