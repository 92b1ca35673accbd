"""A bundle's model as ONNX graphs that onnxruntime runs without torch, and with adapters as inputs."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor, nn

from domlora.adapters.attach import options_of
from domlora.adapters.bank import adapter_layers, distinct_layers, rows_of
from domlora.adapters.file import base_fingerprint
from domlora.bundle import Bundle
from domlora.errors import BundleError, ConfigError, DataError
from domlora.features.batch import Batch
from domlora.files import new_folder
from domlora.models.build import stored_options
from domlora.serving.folder import MIXED, ONE, TABLES, adapter_file, seal
from domlora.serving.graph import layers_of, reads_domain, traced, with_banks
from domlora.serving.program import Program
from domlora.serving.rows.cut import cut
from domlora.serving.rows.folder import RowsFolder, folder_beside, write_rows
from domlora.serving.tables import move_weights

__all__ = ["Exported", "banks_of", "export"]

_TOLERANCE = 1e-5
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export was.

    Args:
        difference: the largest one between a logit of a graph and of the model.
        num_rows: how many were compared.
        seconds: that it took.
        size_bytes: of the folder.
    """

    difference: float
    num_rows: int
    seconds: float
    size_bytes: int


def export(
    bundle: Bundle,
    folder: Path,
    samples: Sequence[Batch],
    *,
    overwrite: bool = False,
    remote_tables: Sequence[str] = (),
    remote_from_bytes: int | None = None,
) -> Exported:
    """Write a bundle as a folder that :class:`domlora.serving.program.Program` opens, see :mod:`domlora.serving.folder`.

    The folder appears only after both graphs gave the model's logits, to ``1e-5`` (of the largest logit, where that is above
    one): for the samples as they are, and for the same rows shared out to all domains and to none.

    A model without adapters gives ``mixed.onnx`` alone. What a model of many domains does for a domain is in its graph, so
    only adapters can be added or swapped later.

    Tables that are named are left out: their rows are in ``FOLDER.rows``, see :mod:`domlora.serving.rows.push`.

    Args:
        bundle: what to export; it stays as it is.
        folder: where the folder will be.
        samples: rows to compare on, such as some hundred of the validation split.
        overwrite: replace an exported folder that is there.
        remote_tables: patterns of weights that are left out, such as ``embedding.*``.
        remote_from_bytes: tables of this size and more are left out.

    Raises:
        ConfigError: a model that ONNX cannot say, one that is not in float32, or one whose parts have adapters of their own;
            a pattern that names no table.
        DataError: no sample, or the folder exists.
        BundleError: the graphs do not give the model's logits.
    """
    start = time.perf_counter()
    model = _plain_copy(bundle.model)
    _check(model, samples)
    with ExitStack() as stack:
        fresh = stack.enter_context(new_folder(folder, overwrite=overwrite, marker=MIXED))
        graph = traced(model, bundle.encoder.schema)
        cuts = cut(graph, fresh, remote_tables, remote_from_bytes)
        beside = stack.enter_context(new_folder(folder_beside(folder), overwrite=overwrite)) if cuts else fresh
        tables = write_rows(cuts, beside) if cuts else []
        facts = {**_write(bundle, model, graph, fresh), "remote": [table._asdict() for table in tables]}
        seal(fresh, facts)
        difference, num_rows = _compare(model, Program.open(fresh, rows=RowsFolder(beside) if cuts else None), samples)
        seal(fresh, {**facts, "difference": difference, "compared_rows": num_rows})
        size = sum(path.stat().st_size for path in fresh.rglob("*") if path.is_file())
    return Exported(difference, num_rows, time.perf_counter() - start, size)


def banks_of(model: nn.Module, domain: int) -> dict[str, NDArray[np.float32]]:
    """One domain's adapter as a program takes it: named as ``rows_of`` names it, with each layer's scale in its ``B``.

    Raises:
        UnknownDomainError: no such row in the bank.
    """
    rows = rows_of(model, domain)
    for name, layer in distinct_layers(model).items():
        rows[f"{name}.lora_B"] *= layer.scale
    return {name: row.numpy(force=True) for name, row in rows.items()}


def _write(bundle: Bundle, model: nn.Module, graph: onnx_ir.Model, folder: Path) -> dict[str, Any]:
    """All files but the manifest, whose facts are returned."""
    schema, layers = bundle.encoder.schema, layers_of(model)
    bundle.encoder.save(folder)
    move_weights(graph, folder / TABLES)
    marked = onnx_ir.to_proto(graph)
    for name in (MIXED, ONE)[: 2 if layers else 1]:
        (folder / name).write_bytes(
            with_banks(marked, layers, mixed=name == MIXED).SerializeToString(deterministic=True)
        )
    if layers:
        (folder / adapter_file(0)).parent.mkdir()
        for number in range(schema.num_domains):
            save_file(banks_of(model, number), folder / adapter_file(number))
    return {
        "model": stored_options(bundle.model_options),
        "bundle_version": bundle.version,
        "facts": bundle.facts,
        "schema": schema.fingerprint(),
        "base": base_fingerprint(model),
        "domains": list(schema.domains),
        "layers": [layer._asdict() for layer in layers],
        "reads_domain": reads_domain(marked),
        "inputs": {name: _inputs(folder / name) for name in (MIXED, ONE) if (folder / name).exists()},
        "opset": {each.domain or "ai.onnx": each.version for each in marked.opset_import if each.domain != "domlora"},
        "tolerance": _TOLERANCE,
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
    }


def _inputs(file: Path) -> dict[str, list[Any]]:
    """The type and the shape of each input, names standing for sizes that a call chooses."""
    found: dict[str, list[Any]] = {}
    for each in onnx.load(file, load_external_data=False).graph.input:
        kind = each.type.tensor_type
        sizes = [size.dim_param or size.dim_value for size in kind.shape.dim]
        found[each.name] = [onnx.TensorProto.DataType.Name(kind.elem_type).lower(), sizes]
    return found


def _compare(model: nn.Module, program: Program, samples: Sequence[Batch]) -> tuple[float, int]:
    """The largest difference, after it was found small enough, and of how many rows."""
    num_domains = program.schema.num_domains
    ids = torch.cat([batch.ids for batch in samples]).cpu()
    dense = torch.cat([batch.dense for batch in samples]).cpu()
    domain = torch.cat([batch.domain for batch in samples]).cpu()
    row = torch.arange(max(len(domain), num_domains + 1))
    every = row % len(domain)
    ids, dense = torch.cat([ids, ids[every]]), torch.cat([dense, dense[every]])
    domain = torch.cat([domain, row % (num_domains + 1) - 1])
    worst = 0.0
    for rows in zip(*(torch.split(column, _CHUNK) for column in (ids, dense, domain)), strict=True):
        worst = max(worst, *_differences(model, program, rows))
    return worst, len(domain)


def _differences(model: nn.Module, program: Program, rows: tuple[Tensor, ...]) -> list[float]:
    with torch.no_grad():
        expected = model(*rows).numpy()
    arrays = [column.numpy() for column in rows]
    first = [column[:1] for column in arrays]
    found = [
        float(np.abs(program(*arrays, plan="mixed") - expected).max()),
        float(np.abs(program(*arrays, plan="by_domain") - expected).max()),
        float(np.abs(program(*first) - expected[:1]).max()),
    ]
    limit = _TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not all(difference <= limit for difference in found):  # false for NaN too
        raise BundleError(f"exported graphs must give the model's logits to {limit:.1e}", received=max(found))
    return found


def _plain_copy(model: nn.Module) -> nn.Module:
    """In evaluation mode and on the CPU; a model that is there shares its numbers with the copy."""
    here = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type == "cpu"]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in here}).cpu().eval()


def _check(model: nn.Module, samples: Sequence[Batch]) -> None:
    if not sum(batch.num_rows for batch in samples):
        raise DataError("an export needs rows to compare its graphs with the model", received=len(samples))
    kinds = {str(tensor.dtype) for tensor in model.parameters()}
    if kinds != {"torch.float32"}:
        raise ConfigError(
            "a model must hold float32 to be exported", received=sorted(kinds), next_step="Call model.float()"
        )
    if adapter_layers(model) and options_of(model) is None:
        raise ConfigError(
            "adapters must have been attached to the whole model to be exported", received=type(model).__name__
        )
