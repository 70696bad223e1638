"""One encoding as ONNX nodes: QuantizeLinear and DequantizeLinear where they say it all, model-local functions where they do not.

    full integer range, half to even    QuantizeLinear, DequantizeLinear
    narrower range                      Clip to the grid's limits before them: on a grid, clipping and rounding commute
    half away from zero, DPU            QuantizeHalfAway or QuantizeDpu, after a Clip, instead of QuantizeLinear
    log                                 LogQuantize, LogDequantize
    float16                             Cast there and back, and FlushSubnormals

Parameters are stored as codes, in the narrowest ONNX type that holds them, with the second half of the pair only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from qdeploy.core.names import Names
from qdeploy.core.spec import Encoding, QuantSpec
from qdeploy.export.onnx_functions import DOMAIN
from qdeploy.numerics import arith
from qdeploy.numerics.quantizer import Average

_WIDTHS = (4, 8, 16, 32)
_FUNCTIONS = {"half_away": "QuantizeHalfAway", "dpu": "QuantizeDpu"}


def onnx_type(spec: QuantSpec) -> ir.DataType:
    """The ONNX type that stores the codes of `spec`: the next wider integer for odd widths."""
    if spec.grid == "log":
        return ir.DataType.UINT8
    if not spec.linear:
        return ir.DataType.FLOAT16
    width = next(width for width in _WIDTHS if spec.bits <= width)
    return ir.DataType[f"{'' if spec.signed else 'U'}INT{width}"]


def fills_type(spec: QuantSpec) -> bool:
    """Whether QuantizeLinear saturates where the codes of a linear spec end."""
    return spec.bits in _WIDTHS and not spec.narrow


class Lowering:
    """Makes the nodes for one model. `taken` are its names; `functions` becomes the names of the functions that the nodes call.

    `literal` is False for a model.onnx that a toolchain reads, which has standard operators only.
    """

    def __init__(self, model: ir.Model, taken: Iterable[str], literal: bool):
        self.model = model
        self.taken = Names(taken)
        self.literal = literal
        self.functions: set[str] = set()

    def fresh(self, name: str) -> str:
        """`name`, with a number where it is taken; from now on it is."""
        return self.taken.free(name)

    def activation(self, raw: ir.Value, encoding: Encoding, on_grid: bool, average: Average | None) -> list[ir.Node]:
        """The nodes from a float value to its dequantized one, which is the output of the last.

        Values that are `on_grid` already need neither a Clip nor a way of rounding.
        """
        spec = encoding.spec
        nodes: list[ir.Node] = []
        if average is not None and self.literal:
            nodes += self._averaged(raw, encoding.tensor, average)
        if not spec.linear:
            return nodes + self._other_grid(_last(nodes, raw), encoding)
        rounding = _FUNCTIONS.get(spec.rounding) if self.literal and not on_grid else None
        if not on_grid and (rounding or not fills_type(spec)):
            nodes.append(self._clip(_last(nodes, raw), encoding))
        numbers = self._numbers(encoding)
        kind = rounding or "QuantizeLinear"
        attributes = {} if rounding or spec.axis is None else {"axis": spec.axis}
        q = self._node(kind, [_last(nodes, raw), *numbers], encoding.tensor, "quantized", onnx_type(spec), attributes)
        return [*nodes, q, self._dequantize(q.outputs[0], numbers, encoding)]

    def parameter(self, values: NDArray[Any], encoding: Encoding) -> list[ir.Node]:
        """The nodes from the stored codes of a parameter to its dequantized value."""
        spec = encoding.spec
        scale, zero = torch.from_numpy(encoding.scale.copy()), torch.from_numpy(encoding.zero_point.copy())
        given = torch.from_numpy(np.array(values))
        name = self.fresh(f"{encoding.tensor}_quantized")
        if spec.grid == "log" or spec.linear:
            codes = arith.quantize(given, scale, zero, spec).numpy()
            stored = self._constant(name, codes, onnx_type(spec))
            if spec.grid == "log":
                return [self._node("LogDequantize", [stored, self._scale(encoding)], encoding.tensor, "dequantized")]
            return [self._dequantize(stored, self._numbers(encoding), encoding)]
        halves = arith.fake_quantize(given, scale, zero, spec).numpy()
        stored = self._constant(name, halves, ir.DataType.FLOAT16)
        return [self._cast(stored, ir.DataType.FLOAT, encoding.tensor, "dequantized")]

    def _other_grid(self, raw: ir.Value, encoding: Encoding) -> list[ir.Node]:
        tensor = encoding.tensor
        if encoding.spec.grid == "log":
            scale = self._scale(encoding)
            q = self._node("LogQuantize", [raw, scale], tensor, "quantized", ir.DataType.UINT8)
            return [q, self._node("LogDequantize", [q.outputs[0], scale], tensor, "dequantized", like=raw)]
        half = self._cast(raw, ir.DataType.FLOAT16, tensor, "quantized")
        back = self._cast(half.outputs[0], ir.DataType.FLOAT, tensor, "dequantized")
        if encoding.spec.grid == "float16":
            return [half, back]
        return [half, back, self._node("FlushSubnormals", [back.outputs[0]], tensor, "flushed", like=raw)]

    def _averaged(self, raw: ir.Value, tensor: str, average: Average) -> list[ir.Node]:
        """Recover the integer sum of an average pooling, and divide it as the target does."""
        units, step = (
            self._constant(self.fresh(f"{tensor}_{part}"), np.array(number), ir.DataType.FLOAT)
            for part, number in zip(("units", "step"), average, strict=True)
        )
        sums = self._node("Mul", [raw, units], tensor, "sum", like=raw)
        whole = self._node("Round", [sums.outputs[0]], tensor, "codes", like=raw)
        return [sums, whole, self._node("Mul", [whole.outputs[0], step], tensor, "shifted", like=raw)]

    def _clip(self, raw: ir.Value, encoding: Encoding) -> ir.Node:
        limits = [
            self._constant(self.fresh(f"{encoding.tensor}_{part}"), np.float32(limit[0]), ir.DataType.FLOAT)
            for part, limit in (("low", encoding.low), ("high", encoding.high))
        ]
        return self._node("Clip", [raw, *limits], encoding.tensor, "clipped", like=raw)

    def _dequantize(self, codes: ir.Value, numbers: Sequence[ir.Value], encoding: Encoding) -> ir.Node:
        attributes = {} if encoding.spec.axis is None else {"axis": encoding.spec.axis}
        return self._node("DequantizeLinear", [codes, *numbers], encoding.tensor, "dequantized", attributes=attributes, like=codes)

    def _numbers(self, encoding: Encoding) -> tuple[ir.Value, ir.Value]:
        """Scale and zero_point as initializers: scalars, or vectors for a per-channel encoding."""
        shape = () if encoding.spec.axis is None else (-1,)
        zeros = encoding.zero_point.reshape(shape)
        return self._scale(encoding), self._constant(self.fresh(f"{encoding.tensor}_zero_point"), zeros, onnx_type(encoding.spec))

    def _scale(self, encoding: Encoding) -> ir.Value:
        shape = () if encoding.spec.axis is None else (-1,)
        return self._constant(self.fresh(f"{encoding.tensor}_scale"), encoding.scale.reshape(shape), ir.DataType.FLOAT)

    def _cast(self, raw: ir.Value, to: ir.DataType, tensor: str, part: str) -> ir.Node:
        return self._node("Cast", [raw], tensor, part, to, {"to": to.value}, like=raw)

    def _constant(self, name: str, array: Any, dtype: ir.DataType) -> ir.Value:
        stored = np.asarray(array)
        tensor = ir.tensor(stored.astype(dtype.numpy()), dtype=dtype, name=name)
        value = ir.Value(name=name, shape=ir.Shape(stored.shape), type=ir.TensorType(dtype), const_value=tensor)
        self.model.graph.register_initializer(value)
        return value

    def _node(
        self,
        op: str,
        inputs: Sequence[ir.Value],
        tensor: str,
        part: str,
        dtype: ir.DataType = ir.DataType.FLOAT,
        attributes: dict[str, Any] | None = None,
        like: ir.Value | None = None,
    ) -> ir.Node:
        """A node of `op`, or a call of the function with that name; its output is `<tensor>_<part>`, of the shape of `like`."""
        ours = op in (*_FUNCTIONS.values(), "LogQuantize", "LogDequantize", "FlushSubnormals")
        if ours:
            self.functions.add(op)
        name = self.fresh(f"{tensor}_{op}")
        node = ir.node(op, inputs, attributes=attributes or {}, domain=DOMAIN if ours else "", name=name)
        output = node.outputs[0]
        output.name, output.dtype, output.shape = self.fresh(f"{tensor}_{part}"), dtype, (like or inputs[0]).shape
        return node


def _last(nodes: Sequence[ir.Node], raw: ir.Value) -> ir.Value:
    return nodes[-1].outputs[0] if nodes else raw
