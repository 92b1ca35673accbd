"""A model as ONNX graphs: traced once, corrections put in afterwards.

The trace leaves a mark where an adapted layer stands, and each graph gets its own way of computing the corrections in that
place. So both are one model, and the domains and ranks of the banks, which are inputs, are not in the trace.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor, nn

from domlora.adapters.attach import with_layer
from domlora.adapters.bank import adapter_layers, distinct_layers
from domlora.adapters.lowrank import LowRankLinear
from domlora.adapters.root import close_route
from domlora.errors import ConfigError
from domlora.features.schema import Schema
from domlora.serving.folder import AdaptedLayer

__all__ = ["layers_of", "reads_domain", "traced", "with_banks"]

_MARK, _DOMAIN = "Correction", "domain"


class _Marked(nn.Module):
    """An adapted layer in a trace: the base's answer goes through a mark."""

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__()
        self.base, self.name = base, name

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        marked: Tensor = torch.onnx.ops.symbolic(
            f"domlora::{_MARK}",
            (out, x),
            {"layer": self.name, "middle": x.dim() - 2},
            dtype=out.dtype,
            shape=out.shape,
            version=1,
        )
        return marked


def layers_of(model: nn.Module) -> list[AdaptedLayer]:
    """The adapted layers, each once."""
    return [
        AdaptedLayer(name, layer.in_features, layer.out_features, layer.lora_bias is not None, layer.scale)
        for name, layer in distinct_layers(model).items()
    ]


def traced(model: nn.Module, schema: Schema) -> onnx_ir.Model:
    """The graph of ``ids``, ``dense`` and ``domain`` to ``logits``, with marks where adapters stand.

    Raises:
        ConfigError: the model has something in it that ONNX cannot say.
    """
    model = _marked(model)
    rows = (torch.zeros(4, schema.num_slots, dtype=torch.int64), torch.zeros(4, schema.num_dense))
    size = torch.export.Dim("rows")
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(
                model, (*rows, rows[0].new_zeros(4)), dynamic_shapes=({0: size},) * 3, strict=False
            )
            found = torch.onnx.export(program, dynamo=True, verbose=False, output_names=["logits"])
    except Exception as error:  # torch's exporter raises errors of many kinds
        raise ConfigError(
            "this model cannot be exported", received=f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    if found is None:
        raise ConfigError("this model cannot be exported", received=type(model).__name__)
    return _without_remarks(found.model)


def reads_domain(graph: ModelProto) -> bool:
    """Whether the network itself looks at the domain, its adapters aside."""
    return any(_DOMAIN in node.input for node in graph.graph.node)


def with_banks(marked: ModelProto, layers: Sequence[AdaptedLayer], *, mixed: bool) -> ModelProto:
    """The graph with corrections in the places of the marks, and banks among its inputs.

    Args:
        marked: as :func:`traced` made it.
        layers: what the marks stand for.
        mixed: banks ``(D, ...)`` of all domains, each row taking those of its own and a row of -1 none; or the banks of
            one domain, and no input ``domain`` unless the network itself reads it.
    """
    model = ModelProto()
    model.CopyFrom(marked)
    graph = model.graph
    known = {layer.name: layer for layer in layers}
    nodes: list[NodeProto] = list(_rows_of_banks()) if mixed and layers else []
    for node in graph.node:
        if node.op_type != _MARK:
            nodes.append(node)
            continue
        told = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        layer = known[told["layer"].decode()]
        make = _of_each_row if mixed else _of_one
        nodes += make(layer, int(told["middle"]), node.input[0], node.input[1], node.output[0])
    if not mixed and not reads_domain(marked):
        graph.input.remove(next(each for each in graph.input if each.name == _DOMAIN))
    for layer in layers:
        for name, shape in layer.shapes.items():
            sizes = [f"rank_of_{layer.name}" if size is None else size for size in shape]
            sizes = ["domains", *sizes] if mixed else sizes
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))
    del graph.node[:], graph.value_info[:]  # a runtime infers what is in between
    graph.node.extend(nodes)
    _name_rows(model)
    opsets = [each for each in model.opset_import if each.domain != "domlora"]
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    return model


def _name_rows(model: ModelProto) -> None:
    """``rows`` for the size that torch gave a number."""
    ends = [*model.graph.input, *model.graph.output]
    sizes = [each.type.tensor_type.shape.dim[0] for each in ends if each.name in ("ids", "dense", _DOMAIN, "logits")]
    for size in sizes:
        size.dim_param = "rows"


def _of_one(layer: AdaptedLayer, _: int, out: str, x: str, result: str) -> Iterator[NodeProto]:
    """``out + (x A) B + c``"""
    name, last = layer.name, result + "_low" if layer.bias else result
    yield helper.make_node("MatMul", [x, f"{name}.lora_A"], [f"{result}_hidden"])
    yield helper.make_node("MatMul", [f"{result}_hidden", f"{name}.lora_B"], [f"{result}_product"])
    yield helper.make_node("Add", [out, f"{result}_product"], [last])
    if layer.bias:
        yield helper.make_node("Add", [last, f"{name}.lora_bias"], [result])


def _of_each_row(layer: AdaptedLayer, middle: int, out: str, x: str, result: str) -> Iterator[NodeProto]:
    """``out + (x A_d) B_d + c_d`` where the row has a domain; axes in the middle count as one."""
    name, flat = layer.name, f"{result}_flat"
    if middle:
        yield _integers(f"{result}_flatten", [0, -1, layer.in_features])
        yield helper.make_node("Reshape", [x, f"{result}_flatten"], [flat])
    else:
        yield helper.make_node("Unsqueeze", [x, "one_axis"], [flat])
    for bank in layer.shapes:
        yield helper.make_node("Gather", [bank, "row_of_bank"], [f"{result}_{bank}"])
    yield helper.make_node("MatMul", [flat, f"{result}_{name}.lora_A"], [f"{result}_hidden"])
    yield helper.make_node("MatMul", [f"{result}_hidden", f"{result}_{name}.lora_B"], [f"{result}_product"])
    total = f"{result}_product"
    if layer.bias:
        yield helper.make_node("Unsqueeze", [f"{result}_{name}.lora_bias", "one_axis"], [f"{result}_bias"])
        yield helper.make_node("Add", [total, f"{result}_bias"], [f"{result}_sum"])
        total = f"{result}_sum"
    yield helper.make_node("Where", ["has_domain", total, "nothing"], [f"{result}_known"])
    yield helper.make_node("Shape", [out], [f"{result}_shape"])
    yield helper.make_node("Reshape", [f"{result}_known", f"{result}_shape"], [f"{result}_correction"])
    yield helper.make_node("Add", [out, f"{result}_correction"], [result])


def _rows_of_banks() -> Iterator[NodeProto]:
    """What all layers share: which row of a bank each row takes, and whether it takes one."""
    yield _integers("one_axis", [1])
    yield _integers("two_axes", [1, 2])
    yield helper.make_node("Constant", [], ["no_domain"], value=helper.make_tensor("", TensorProto.INT64, [], [0]))
    yield helper.make_node("Constant", [], ["nothing"], value=helper.make_tensor("", TensorProto.FLOAT, [], [0.0]))
    yield helper.make_node("Max", [_DOMAIN, "no_domain"], ["row_of_bank"])
    yield helper.make_node("GreaterOrEqual", [_DOMAIN, "no_domain"], ["with_domain"])
    yield helper.make_node("Unsqueeze", ["with_domain", "two_axes"], ["has_domain"])


def _integers(name: str, values: list[int]) -> NodeProto:
    return helper.make_node("Constant", [], [name], value_ints=values)


def _marked(model: nn.Module) -> nn.Module:
    """A copy whose adapted layers are marks; it shares all numbers with the model."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    layers = adapter_layers(twin)
    if layers:
        close_route(twin)
    marks: dict[int, nn.Module] = {}  # a layer in two places is marked as one
    for name, layer in layers.items():
        marks.setdefault(id(layer), _mark(layer, name))
        twin = with_layer(twin, name, marks[id(layer)])
    return twin


def _mark(layer: LowRankLinear, name: str) -> nn.Module:
    return _Marked(layer.base, name).train(layer.training)


def _without_remarks(model: onnx_ir.Model) -> onnx_ir.Model:
    """Without what torch notes of the machine and of its own code, so that equal models give equal bytes."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings that torchvision, which nothing here needs, is not installed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
