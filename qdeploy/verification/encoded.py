"""Has every tensor its encoding? Asked of a model.onnx whose target computes all of it with integers, without the plan that made it.

An encoding is found by the name of its tensor. Left out are integers and booleans, settings of an op such as the bounds of a Clip, the
statistics of a batch norm, and single numbers: a toolchain takes them as attributes, or makes their encoding itself without an error.
Between two ops that the target computes as one there is no encoding, nor between a matrix product and the sum of its bias, which is one
layer to every toolchain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from qdeploy.core.spec import Encoding

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
_SETTINGS = {
    "Resize": (1, 2),
    "Upsample": (1,),
    "Clip": (1, 2),
    "Pad": (2,),
    "Dropout": (1,),
    "BatchNormalization": (3, 4),
    "OneHot": (2,),
}
"""Inputs that are settings, by position."""
_CONSTANT = ("Constant", "ConstantOfShape")
_FUSED = "fused: "
"""How the manifest begins the reason of a tensor that only exists inside of an op of the target."""


def without_encoding(model: onnx.ModelProto, encodings: Sequence[Encoding], in_float: Mapping[str, str]) -> dict[str, str]:
    """The float tensors of `model` without an encoding, with a sentence on each; empty when all is well.

    `in_float` has a reason for every tensor that was planned without an encoding. In a model that quantizes itself the nodes of the
    encodings are looked through.
    """
    known = _Known(onnx.shape_inference.infer_shapes(model), {e.tensor: e for e in encodings}, in_float)
    return dict(known.faults())


class _Known:
    """A model, and what of its tensors is known."""

    def __init__(self, model: onnx.ModelProto, encodings: Mapping[str, Encoding], in_float: Mapping[str, str]):
        graph = model.graph
        self.graph, self.encodings, self.in_float = graph, encodings, in_float
        self.types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.types |= {name: tensor.data_type for name, tensor in self.stored.items()}
        self.made = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}

    def faults(self) -> Iterator[tuple[str, str]]:
        """Tensors and sentences."""
        for node in self.graph.node:
            if node.op_type in (*_CONSTANT, "Identity") or self._of_an_encoding(node):
                continue  # what an Identity copies is looked at where it is made
            settings = _SETTINGS.get(node.op_type, ())
            for position, name in enumerate(node.input):
                maker = self.made.get(name)
                if node.op_type.endswith("Normalization") and position and self._is_repeated(name):
                    continue  # what a norm without parameters has in their place
                if (maker is None or maker.op_type in _CONSTANT) and position not in settings and self._lacks(name):
                    yield name, f"tensor '{name}', read by {node.op_type} '{node.name}', has no encoding"
            for name in node.output:
                if (name in self.readers or name in self.outputs) and self._lacks(name) and not self._is_inside(name):
                    yield name, f"tensor '{name}', made by {node.op_type} '{node.name}', has no encoding"

    def _lacks(self, name: str) -> bool:
        """Whether `name` is a float tensor without an encoding that has more than one number."""
        if not name or self.types.get(name, TensorProto.FLOAT) not in _FLOATS:
            return False
        return not self._is_encoded(name) and not self._is_number(name)

    def _is_encoded(self, name: str) -> bool:
        """Whether `name` has an encoding, or what it is a copy of has one, or only the nodes of an encoding read it."""
        maker, readers = self.made.get(name), self.readers.get(name, [])
        if name in self.encodings or (maker is not None and maker.op_type == "Identity" and self._is_encoded(maker.input[0])):
            return True
        return bool(readers) and name not in self.outputs and all(map(self._of_an_encoding, readers))

    def _is_number(self, name: str) -> bool:
        """Whether `name` is a single stored number, or what an op is filled with."""
        values = self._values(name)
        filled = name in self.made and self.made[name].op_type == "ConstantOfShape"
        return filled or (values is not None and values.size == 1)

    def _is_repeated(self, name: str) -> bool:
        """Whether `name` is stored, and one number over and over."""
        values = self._values(name)
        return self._is_number(name) or (values is not None and bool((values == values.flat[0]).all()))

    def _values(self, name: str) -> NDArray[Any] | None:
        maker = self.made.get(name)
        if maker is not None and maker.op_type == "Constant" and maker.attribute[0].name == "value":
            return numpy_helper.to_array(maker.attribute[0].t)
        return numpy_helper.to_array(self.stored[name]) if name in self.stored else None

    def _is_inside(self, name: str) -> bool:
        """Whether `name` only exists inside of an op of the target."""
        if self.in_float.get(name, "").startswith(_FUSED):
            return True
        readers = self.readers.get(name, [])
        if self.made[name].op_type != "MatMul" or len(readers) != 1 or readers[0].op_type != "Add" or name in self.outputs:
            return False
        others = (self.encodings.get(other) for other in readers[0].input if other != name)
        return any(other is not None and other.role == "bias" for other in others)

    def _of_an_encoding(self, node: onnx.NodeProto) -> bool:
        """Whether `node` is one of those that an encoding is made of in a model that quantizes."""
        tensor, mark, _ = node.name.removesuffix("_1").rpartition(f"_{node.op_type}")
        return bool(mark) and tensor in self.encodings
