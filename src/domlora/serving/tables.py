"""Weights of graphs in a file of their own, which a runtime maps into memory: processes share its pages."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx_ir

__all__ = ["move_weights"]

_PAGE = 4096
_SMALL = 1024  # bytes; shapes and constants stay in the graph, where a runtime looks at them


def move_weights(model: onnx_ir.Model, file: Path) -> None:
    """Write the weights of a graph to ``file``, each at the beginning of a page, and leave references to it.

    Equal weights are written once.
    """
    places: dict[str, int] = {}
    with file.open("wb") as out:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _SMALL:
                continue
            content = np.ascontiguousarray(tensor.numpy())
            digest = hashlib.sha256(content.data.cast("B")).hexdigest()
            if digest not in places:
                places[digest] = out.seek(-(-out.tell() // _PAGE) * _PAGE)
                out.write(content.data)
            value.const_value = onnx_ir.ExternalTensor(
                file.name,
                places[digest],
                tensor.nbytes,
                tensor.dtype,
                shape=onnx_ir.Shape(content.shape),
                name=name,
                base_dir=file.parent,
            )
