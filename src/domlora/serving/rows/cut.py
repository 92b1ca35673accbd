"""Tables out of a graph: what the graph then takes in their place, and the graph that says which rows. Needs onnx."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir
import onnxruntime  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx_ir.convenience import extract
from onnx_ir.passes.common import RemoveUnusedNodesPass
from safetensors.numpy import save_file

from domlora.errors import ConfigError
from domlora.features.schema import OOV_ID, PAD_ID
from domlora.serving.rows.layout import FALLBACK, LOOKUPS, RemoteTable

__all__ = ["Cut", "cut"]

_IDS = "ids"


class Cut(NamedTuple):
    """A table that was taken out.

    Args:
        table: what it is, still without its sha256.
        weights: ``(num_rows, width)`` each, as ``table.columns`` names them.
    """

    table: RemoteTable
    weights: tuple[NDArray[np.float32], ...]

    def rows(self, numbers: NDArray[np.int64] | slice) -> NDArray[np.float32]:
        """Some rows of all weights, side by side."""
        return np.concatenate([weight[numbers] for weight in self.weights], axis=1)


def cut(model: onnx_ir.Model, folder: Path, names: Sequence[str] = (), from_bytes: int | None = None) -> list[Cut]:
    """Take tables out of a graph, which is changed: each becomes an input, and so do the places of a batch's rows in it.

    Weights that are read at the same rows, such as vectors and first-order weights of one id, become one table.

    Args:
        model: as :func:`domlora.serving.graph.traced` made it.
        folder: where the lookups and the fallback rows are written.
        names: patterns of weights, such as ``embedding.*``.
        from_bytes: weights of this size and more are taken out too.

    Raises:
        ConfigError: a pattern that names no table, or a table that is read by something else than ids.
    """
    graph = model.graph
    tables = _tables_of(graph)
    chosen = [name for name, value in tables.items() if _wanted(value, names, from_bytes)]
    for pattern in names:
        if not any(fnmatch(name, pattern) for name in tables):
            raise ConfigError("no table of the model is called so", received=pattern, next_step=f"Known: {[*tables]}")
    groups: dict[tuple[onnx_ir.Value, ...], list[str]] = {}
    for name in chosen:
        groups.setdefault(_indices_of(tables[name]), []).append(name)
    if not groups:
        return []
    made = [_described(graph, weights, len(indices)) for indices, weights in groups.items()]
    places = [value for indices in groups for value in indices]
    _write_lookups(model, places, [name for each in made for name in each.table.at], folder / LOOKUPS)
    for each, indices in zip(made, groups, strict=True):
        _rewire(graph, each.table, indices)
    RemoveUnusedNodesPass()(model)
    _write_fallback(made, folder)
    return made


def _tables_of(graph: onnx_ir.Graph) -> dict[str, onnx_ir.Value]:
    """Weights that are only ever read by rows."""
    return {
        name: value
        for name, value in graph.initializers.items()
        if value.shape is not None
        and len(value.shape) == 2
        and value.dtype == onnx_ir.DataType.FLOAT
        and value.uses()
        and all(_reads_rows(node, place) for node, place in value.uses())
    }


def _reads_rows(node: onnx_ir.Node, place: int) -> bool:
    if node.op_type != "Gather" or place != 0 or node.inputs[1] is None:
        return False
    axis = node.attributes.get("axis")
    return (axis is None or axis.as_int() == 0) and _of_ids_alone(node.inputs[1])


def _of_ids_alone(value: onnx_ir.Value) -> bool:
    """Whether ids and constants are all that a value is made of."""
    open_, seen, found = [value], set[onnx_ir.Value](), False
    while open_:
        each = open_.pop()
        if each in seen:
            continue
        seen.add(each)
        if each.is_graph_input():
            if each.name != _IDS:
                return False
            found = True
        elif (node := each.producer()) is not None:
            open_ += [given for given in node.inputs if given is not None]
    return found


def _indices_of(table: onnx_ir.Value) -> tuple[onnx_ir.Value, ...]:
    """The rows that a graph reads of a table, once each."""
    return tuple(dict.fromkeys(index for node, _ in table.uses() if (index := node.inputs[1]) is not None))


def _wanted(value: onnx_ir.Value, names: Sequence[str], from_bytes: int | None) -> bool:
    size = 0 if value.const_value is None else value.const_value.nbytes
    return any(fnmatch(str(value.name), pattern) for pattern in names) or (
        from_bytes is not None and size >= from_bytes
    )


def _described(graph: onnx_ir.Graph, names: Sequence[str], places: int) -> Cut:
    weights = tuple(np.ascontiguousarray(_content(graph.initializers[name])) for name in names)
    columns = {name: weight.shape[1] for name, weight in zip(names, weights, strict=True)}
    at = [f"{names[0]}.at{number}" for number in range(places)]
    return Cut(RemoteTable(names[0], len(weights[0]), columns, at), weights)


def _content(value: onnx_ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None
    content: NDArray[np.float32] = value.const_value.numpy()
    return content


def _write_lookups(model: onnx_ir.Model, places: Sequence[onnx_ir.Value], names: Sequence[str], file: Path) -> None:
    """The part of the graph from ids to the rows that they name."""
    graph = extract(model.graph, [_IDS], [str(place.name) for place in places])
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name
    graph.inputs[0].shape = onnx_ir.Shape(["rows", *list(graph.inputs[0].shape or ())[1:]])
    graph.name = "lookups"
    proto = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=model.ir_version))
    del proto.graph.value_info[:]
    file.write_bytes(proto.SerializeToString(deterministic=True))


def _rewire(graph: onnx_ir.Graph, table: RemoteTable, indices: Sequence[onnx_ir.Value]) -> None:
    places = {}
    for value, name in zip(indices, table.at, strict=True):
        inner = list(value.shape or ())[1:]
        shape = onnx_ir.Shape([f"size_of_{name}", *inner])
        places[value] = onnx_ir.Value(name=name, type=value.type, shape=shape)
        graph.inputs.append(places[value])
    for name, width in table.columns.items():
        old = graph.initializers.pop(name)
        shape = onnx_ir.Shape([f"rows_of_{table.name}", width])
        fresh = onnx_ir.Value(name=name, type=old.type, shape=shape)
        for node, _ in [*old.uses()]:
            index = node.inputs[1]
            assert index is not None
            node.replace_input_with(0, fresh)
            node.replace_input_with(1, places[index])
        graph.inputs.append(fresh)


def _write_fallback(cuts: Sequence[Cut], folder: Path) -> None:
    """What stands for a row that cannot be had: that of a value which training did not have."""
    session = onnxruntime.InferenceSession(str(folder / LOOKUPS), providers=["CPUExecutionProvider"])
    slots = session.get_inputs()[0].shape[1]
    found: dict[str, NDArray[np.generic]] = {}
    for each in cuts:
        numbers = np.unique(np.concatenate([*_numbers(session, each.table, slots)]))
        found |= {f"{each.table.name}.at": numbers, f"{each.table.name}.rows": each.rows(numbers)}
    save_file(found, folder / FALLBACK)


def _numbers(session: onnxruntime.InferenceSession, table: RemoteTable, slots: int) -> Iterator[NDArray[np.int64]]:
    for number in (PAD_ID, OOV_ID):
        for found in session.run(list(table.at), {_IDS: np.full((1, slots), number, np.int64)}):
            yield found.ravel()
