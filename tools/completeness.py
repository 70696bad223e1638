"""Does everything that a target computes in integers have an encoding? Asked of a written artifact, without the plan that made it.

The ONNX file says what is computed, the backend what of that is done in integers and what is computed as one op, the scale file (or the
nodes that quantize, or the manifest where the format names no tensors) which tensors have numbers. Left out are integers, shapes,
bounds and other single numbers, which are attributes of an op on the target, and the matrix product with the sum of its bias, which is
one layer to every converter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from qdeploy.core.backend import Backend, Geometry, OpRule, backends
from qdeploy.core.ops import OPS

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
QUANTIZE = ("QuantizeLinear", "QuantizeHalfAway", "QuantizeDpu", "LogQuantize")
DEQUANTIZE = ("DequantizeLinear", "LogDequantize")
SETTINGS = {"Resize": (1, 2), "Clip": (1, 2), "Pad": (2,), "Upsample": (1,), "ThresholdedRelu": (), "Dropout": (1,)}
"""Inputs of ONNX operators that are settings of the op, by position."""
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand", "Slice")
"""What may stand between a stored parameter and the layer that reads it, without a change to its values."""
BY_SIDES = {"Conv": "conv{}d", "ConvTranspose": "conv_transpose{}d", "MaxPool": "max_pool{}d", "AveragePool": "avg_pool{}d"}
CALLED: dict[str, tuple[str, ...]] = {
    "Gemm": ("linear",),
    "GlobalAveragePool": ("adaptive_avg_pool2d", "mean"),
    "GlobalMaxPool": ("adaptive_max_pool2d",),
    "ReduceMean": ("mean",),
    "Max": ("maximum",),
    "Min": ("minimum",),
    "Flatten": ("reshape",),
    "Tile": ("expand",),
    "DepthToSpace": ("pixel_shuffle",),
    "Resize": ("interpolate",),
    "BatchNormalization": ("batch_norm",),
    "LayerNormalization": ("layer_norm",),
    "GroupNormalization": ("group_norm",),
    "InstanceNormalization": ("instance_norm",),
    "LeakyRelu": ("leaky_relu",),
    **{op: (op.lower(),) for op in ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad", "Expand", "Concat")},
    **{op: (op.lower(),) for op in ("Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Tanh", "Gelu", "HardSwish", "HardSigmoid", "Elu")},
    **{op: (op.lower(),) for op in ("PRelu", "Mish", "Softmax", "Where")},
}
"""ONNX operators in the words of backends; what is not here has no word of its own, and only a rule for every op names it."""


@dataclass
class Model:
    """A written ONNX file, and what of its tensors is known."""

    path: Path
    encoded: frozenset[str]
    known: frozenset[str]
    proto: onnx.ModelProto = field(init=False)

    def __post_init__(self) -> None:
        self.proto = onnx.shape_inference.infer_shapes(onnx.load(self.path))
        self.made = {name: node for node in self.proto.graph.node for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.proto.graph.node:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self.stored = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        self.outputs = {value.name for value in self.proto.graph.output}

    @cached_property
    def types(self) -> dict[str, tuple[int, tuple[int | None, ...] | None]]:
        """Element type and shape by tensor."""
        known: dict[str, tuple[int, tuple[int | None, ...] | None]] = {}
        for value in (*self.proto.graph.input, *self.proto.graph.value_info, *self.proto.graph.output):
            made = value.type.tensor_type
            sizes = tuple(d.dim_value if d.HasField("dim_value") else None for d in made.shape.dim) if made.HasField("shape") else None
            known[value.name] = made.elem_type, sizes
        return known | {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in self.proto.graph.initializer}

    def is_float(self, name: str) -> bool:
        """Whether `name` is a float tensor, or one of unknown type."""
        return bool(name) and self.types.get(name, (TensorProto.FLOAT, None))[0] in FLOATS

    def is_number(self, name: str) -> bool:
        """Whether `name` is a single stored number, or one that the exporter repeats, as the scale of a norm that has none."""
        maker = self.made.get(name)
        if maker is not None and maker.op_type == "ConstantOfShape":
            return name not in self.known
        stored = maker.attribute[0].t if maker is not None and maker.op_type == "Constant" else self.stored.get(name)
        if stored is None:
            return False
        values = onnx.numpy_helper.to_array(stored)
        return values.size == 1 or (name not in self.known and bool((values == values.flat[0]).all()))

    def source(self, name: str) -> str:
        """The stored parameter that `name` is, however it was turned; `name` itself where it is none."""
        found = name
        while (maker := self.made.get(found)) is not None and maker.op_type in MOVES:
            found = maker.input[0]
        return found if self._is_parameter(found) else name

    def is_stored(self, name: str) -> bool:
        """Whether `name` is a parameter, turned or not."""
        return self._is_parameter(self.source(name))

    def _is_parameter(self, name: str) -> bool:
        maker = self.made.get(name)
        return name in self.stored or (maker is not None and maker.op_type in DEQUANTIZE and maker.input[0] in self.stored)

    def enters_encoded(self, name: str) -> bool:
        """Whether a reader of `name` sees the values of a grid."""
        found = self.source(name)
        maker = self.made.get(found)
        return found in self.encoded or (maker is not None and maker.op_type in (*DEQUANTIZE, "FlushSubnormals"))

    def leaves_encoded(self, name: str) -> bool:
        """Whether the values of `name` are put on a grid before anything reads them."""
        readers = self.readers.get(name, [])
        if name in self.encoded:
            return True
        if name in self.outputs or not readers:
            return False
        return all(node.op_type in QUANTIZE or self.is_limit(node) for node in readers)

    def is_limit(self, node: onnx.NodeProto) -> bool:
        """Whether `node` is the clip to the limits of a grid that belongs to the quantizer behind it."""
        return node.op_type == "Clip" and node.output[0].endswith("_clipped") and self.leaves_encoded(node.output[0])


def missing(folder: Path) -> list[str]:
    """The tensors of the artifact in `folder` that its target computes in integers and that have no encoding, each with its place."""
    manifest = json.loads((folder / "qdeploy.json").read_text())
    backend = backends[manifest["backend"]]
    if backend.activation.grid.startswith("float16"):
        return []
    known = frozenset(manifest["float"]) | {entry["tensor"] for entry in manifest["encodings"]}
    model = Model(folder / "model.onnx", encoded_names(folder, manifest), known)
    return list(dict.fromkeys(_missing(model, backend, dict(manifest["float"]))))


def encoded_names(folder: Path, manifest: dict[str, Any]) -> frozenset[str]:
    """The tensors with an encoding: none by name where the model quantizes itself, and else those of the scale file."""
    if any(node.op_type == "DequantizeLinear" for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node):
        return frozenset()
    for name, read in _READERS.items():
        if (folder / name).is_file():
            return frozenset(read(json.loads((folder / name).read_text())))
    return frozenset(entry["tensor"] for entry in manifest["encodings"])


def _qualcomm(content: Any) -> Iterator[str]:
    for part in ("activation_encodings", "param_encodings", "encodings"):
        for entry in content.get(part, ()):
            yield entry if isinstance(entry, str) else entry["name"]


_READERS: dict[str, Callable[[Any], Iterator[str]]] = {
    "model.encodings": _qualcomm,
    "encodings.json": lambda content: (entry["name"] for entry in content["tensors"]),
}


def _missing(model: Model, backend: Backend, in_float: dict[str, str]) -> Iterator[str]:
    for node in model.proto.graph.node:
        if node.op_type in (*QUANTIZE, *DEQUANTIZE, "Constant", "ConstantOfShape") or _is_preparation(model, node):
            continue
        head = _head(model, backend, node)
        rule = _rule(model, backend, node if head is None else head)
        if rule is None:
            yield from _without_reason(model, node, in_float)
            continue
        if _stays(model, backend, node):
            continue
        if head is None and _needs_inputs(model, node, rule):
            for name in _data(model, node):
                if not model.enters_encoded(name) and not _excused(model, backend, node, name):
                    yield f"{name}, read by {node.op_type} {node.name}"
        if rule.output and not _is_tail_ahead(model, backend, node):
            for name in node.output:
                read = model.is_float(name) and (name in model.readers or name in model.outputs)
                read &= name in model.outputs or not all(_stays(model, backend, reader) for reader in model.readers.get(name, []))
                if read and not model.leaves_encoded(name) and not model.enters_encoded(name):
                    yield f"{name}, made by {node.op_type} {node.name}"


def _stays(model: Model, backend: Backend, node: onnx.NodeProto) -> bool:
    """Whether `node` reads floats, whatever makes them: a logarithm and the like without integers, or an op that stays in float, also
    behind others that only move its values."""
    rule = _rule(model, backend, node)
    if rule is None:
        return node.op_type in ("Log", "Reciprocal") and not backend.encodes_all
    readers = [reader for name in node.output for reader in model.readers.get(name, [])]
    moves = rule.share and node.op_type in MOVES and bool(readers) and not set(node.output) & model.outputs
    return rule.stay_float or (moves and all(_stays(model, backend, reader) for reader in readers))


def _needs_inputs(model: Model, node: onnx.NodeProto, rule: OpRule) -> bool:
    """Whether the target computes `node` on integers: always, or where it only hands them on to the next op that does."""
    hands_on = rule.share and not _adds_a_number(model, node)
    return rule.inputs or (hands_on and any(map(model.leaves_encoded, node.output)))


def _adds_a_number(model: Model, node: onnx.NodeProto) -> bool:
    """Whether `node` pads with another number than 0, for which the range of its input may have no room."""
    value = model.stored.get(node.input[2]) if node.op_type == "Pad" and len(node.input) > 2 else None
    return value is not None and 0 < abs(float(onnx.numpy_helper.to_array(value).item())) < 1e9


def _is_preparation(model: Model, node: onnx.NodeProto) -> bool:
    """Whether `node` is part of a quantizer, or turns a parameter."""
    return model.is_limit(node) or all(map(model.is_stored, node.output))


def _without_reason(model: Model, node: onnx.NodeProto, in_float: dict[str, str]) -> Iterator[str]:
    """The results of an op that is left in float, as far as an integer op or the user reads them, must say why."""
    for name in node.output:
        known = name in model.known or model.leaves_encoded(name) or model.enters_encoded(name)
        if model.is_float(name) and name in model.outputs and not known and not in_float.get(name.removesuffix("_output")):
            yield f"{name}, made by {node.op_type} {node.name} in float for no reason that the manifest gives"


def _data(model: Model, node: onnx.NodeProto) -> Iterator[str]:
    """The float tensors that enter `node`, without settings and single numbers."""
    for position, name in enumerate(node.input):
        if (
            model.is_float(name)
            and position not in SETTINGS.get(node.op_type, ())
            and (not model.is_number(model.source(name)) or model.source(name) in model.encoded)
        ):
            yield name


def _excused(model: Model, backend: Backend, node: onnx.NodeProto, name: str) -> bool:
    """Whether `name` is a bias that the target adds in float, a product that its bias is yet to be added to, or a fused branch."""
    is_bias = (node.op_type in ("Conv", "ConvTranspose", "Gemm") and name == node.input[-1] and len(node.input) == 3) or (
        node.op_type == "Add" and _is_bias_sum(model, node) and model.is_stored(name)
    )
    if is_bias:
        return backend.bias == "float" or _is_bias_sum(model, node)
    if node.op_type == "Add" and _is_bias_sum(model, node):
        return True
    if backend.residual == "skip" and node.op_type == "Add":
        if any(_layer(model, one) in ("Gemm", "MatMul") for one in node.input):
            return True
        return _layer(model, name) is not None and any(model.enters_encoded(other) for other in node.input if other != name)
    return False


def _layer(model: Model, name: str) -> str | None:
    """The operator of the layer that makes `name` for one reader."""
    maker = model.made.get(name)
    if maker is None or len(model.readers[name]) > 1:
        return None
    made = (n.op_type for n in (maker, *_made_from(model, maker)))
    return next((op for op in made if op in ("Conv", "ConvTranspose", "Gemm", "MatMul")), None)


def _made_from(model: Model, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    if node.op_type == "Add" and _is_bias_sum(model, node):
        yield from (model.made[name] for name in node.input if name in model.made)


def _is_bias_sum(model: Model, node: onnx.NodeProto) -> bool:
    """Whether `node` adds a stored vector to a product with a stored matrix."""
    if node.op_type != "Add":
        return False
    products = [n for name in node.input if (n := model.made.get(name)) is not None and n.op_type == "MatMul" and _has_weight(model, n)]
    return bool(products) and any(map(model.is_stored, node.input))


def _has_weight(model: Model, node: onnx.NodeProto) -> bool:
    return any(map(model.is_stored, node.input[:2]))


def _is_tail_ahead(model: Model, backend: Backend, node: onnx.NodeProto) -> bool:
    """Whether the one reader of what `node` makes is computed together with it."""
    readers = model.readers.get(node.output[0], [])
    if len(readers) != 1 or node.output[0] in model.outputs:
        return False
    if node.op_type == "MatMul" and _is_bias_sum(model, readers[0]):
        return True
    return _fuses(model, backend, node, readers[0])


def _head(model: Model, backend: Backend, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The op that `node` is computed together with, and that it reads."""
    for name in node.input:
        maker = model.made.get(name)
        if maker is not None and len(model.readers[name]) == 1 and name not in model.outputs and _fuses(model, backend, maker, node):
            return maker
    return None


def _fuses(model: Model, backend: Backend, head: onnx.NodeProto, tail: onnx.NodeProto) -> bool:
    return any(backend.fuses(a, b) for a in names(model, head) for b in names(model, tail))


def _rule(model: Model, backend: Backend, node: onnx.NodeProto) -> OpRule | None:
    return next((r for name in names(model, node) if (r := backend.rule(name, _geometry(model, node))) is not None), None)


def names(model: Model, node: onnx.NodeProto) -> Sequence[str]:
    """What backends call the op of `node`."""
    if _is_bias_sum(model, node):
        return ("linear",)
    if _is_silu(model, node):
        return ("silu",)
    if node.op_type == "Gather":
        return (
            ("embedding",) if model.is_stored(node.input[0]) else ("select",) if model.is_number(node.input[1]) else ("index_select",)
        )
    if node.op_type in BY_SIDES:
        at = 1 if "Conv" in node.op_type else 0
        sides = len(model.types.get(node.input[at], (0, None))[1] or (0, 0, 0, 0)) - 2
        found = BY_SIDES[node.op_type].format(sides)
        return (found, f"adaptive_{found}") if "Pool" in node.op_type else (found,)
    if node.op_type == "MatMul":
        return ("linear",) if _has_weight(model, node) else ("matmul",)
    if node.op_type == "Clip":
        bounds = [_number(model, name) for name in (*node.input[1:], "", "")[:2]]
        return ("relu6",) if bounds == [0, 6] else ("relu",) if bounds == [0, None] else ("clamp",)
    return CALLED.get(node.op_type, (f"onnx.{node.op_type}",))


def _is_silu(model: Model, node: onnx.NodeProto) -> bool:
    """Whether `node` is one of the two ops of x sigmoid(x), which are one to some targets, as to OpenVINO by its SwishFusion."""
    if node.op_type == "Sigmoid":
        readers = model.readers.get(node.output[0], [])
        return len(readers) == 1 and readers[0].op_type == "Mul" and node.input[0] in readers[0].input
    gates = [n for name in node.input if (n := model.made.get(name)) is not None and n.op_type == "Sigmoid"]
    return node.op_type == "Mul" and any(_is_silu(model, gate) for gate in gates)


def _number(model: Model, name: str) -> float | None:
    if name in model.stored:
        return float(onnx.numpy_helper.to_array(model.stored[name]).reshape(-1)[0])
    maker = model.made.get(name)
    if maker is not None and maker.op_type == "Constant":
        return float(onnx.numpy_helper.to_array(maker.attribute[0].t).reshape(-1)[0])
    return None


def _geometry(model: Model, node: onnx.NodeProto) -> Geometry | None:
    if node.op_type not in ("Conv", "ConvTranspose"):
        return None
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    kernel = tuple(int(size or 0) for size in (model.types[node.input[1]][1] or ())[2:])
    ones = (1,) * len(kernel)
    strides, dilations = tuple(given.get("strides", ones)), tuple(given.get("dilations", ones))
    return Geometry(kernel=kernel, stride=strides, dilation=dilations, grouped=int(given.get("group", 1)) > 1)


assert {name for found in CALLED.values() for name in found} <= {op.name for op in OPS.values()}
