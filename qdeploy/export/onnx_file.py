"""What is done to, and read from, a finished ONNX file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
from numpy.typing import NDArray

from qdeploy.core.backend import Emitted, Node
from qdeploy.core.spec import Encoding
from qdeploy.core.version import __version__

_INT64 = onnx.TensorProto.INT64


_SKIPPED = [
    *("fuse_matmul_add_bias_into_gemm", "fuse_matmul_add_bias_into_gemm_batched"),  # reshapes around, whose results have no encoding
    *("fuse_consecutive_slices", "fuse_pad_into_conv", "fuse_pad_into_pool"),  # one op for two, of which each has an encoding
    *("eliminate_common_subexpression", "eliminate_duplicate_initializer"),  # one name for two
]
"""Passes of onnxsim that change tensors which have encodings."""


def simplify_float(data: bytes, names: Sequence[str]) -> tuple[bytes, str]:
    """`data` as onnxsim simplifies it, and a note.

    Unchanged where that would lose the name of a tensor in `names`, or make tensors that nobody has an encoding for.
    """
    import onnxsim

    before = onnx.load_from_string(data)
    simplified, equal = onnxsim.simplify(before, skipped_optimizers=_SKIPPED)
    lost = sorted(set(names) - tensor_names(simplified))
    new = sorted(_made(simplified) - tensor_names(before))
    if not equal:
        return data, "onnxsim was undone: its result did not compute the same"
    if lost:
        return data, f"onnxsim was undone: it lost the names of encoded tensors: {', '.join(lost)}"
    if new:
        return data, f"onnxsim was undone: it made tensors that have no encoding: {', '.join(new)}"
    simplified.producer_name, simplified.producer_version = "qdeploy", __version__
    return simplified.SerializeToString(deterministic=True), "simplified by onnxsim; every encoded tensor kept its name"


def half_precision(data: bytes) -> bytes:
    """`data` with half-precision tensors and operators; its inputs and outputs stay in float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted = ir.from_proto(convert_float_to_float16(onnx.load_from_string(data), keep_io_types=True, disable_shape_infer=True))
    converted.graph.sort()  # the casts of the inputs come last
    model = ir.to_proto(converted)
    model.producer_name, model.producer_version = "qdeploy", __version__
    text: bytes = model.SerializeToString(deterministic=True)
    return text


def emitted(data: bytes, encodings: Sequence[Encoding]) -> Emitted:
    """What a writer sees of the model.onnx `data`."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
    shapes: dict[str, tuple[int | None, ...]] = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        sizes = value.type.tensor_type.shape.dim
        shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in sizes)
    nodes = tuple(
        Node(
            name=node.name,
            op=node.op_type,
            inputs=tuple(node.input),
            outputs=tuple(node.output),
            attributes={a.name: _plain(onnx.helper.get_attribute_value(a)) for a in node.attribute},
        )
        for node in model.graph.node
    )
    inputs, outputs = (tuple(v.name for v in values) for values in (model.graph.input, model.graph.output))
    return Emitted(encodings=tuple(encodings), nodes=nodes, shapes=shapes, inputs=inputs, outputs=outputs)


def _plain(attribute: Any) -> object:
    if isinstance(attribute, bytes):
        return attribute.decode()
    return tuple(attribute) if isinstance(attribute, Sequence) and not isinstance(attribute, str) else attribute


def with_sizes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """`model` for one number each in place of the open sizes named; what it computes from shapes alone becomes constant."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in sizes:
                dimension.dim_value = sizes[dimension.dim_param]
    while True:
        del fixed.graph.value_info[:]
        for value in fixed.graph.output:
            value.type.tensor_type.ClearField("shape")
        inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
        if not _fold_shapes(inferred):
            return inferred
        fixed = inferred


def _fold_shapes(model: onnx.ModelProto) -> int:
    """Compute every node that only depends on known shapes. Returns their number."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*model.graph.input, *model.graph.value_info)}
    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.data_type == _INT64}
    made: dict[str, NDArray[Any]] = {}
    left = []
    for node in model.graph.node:
        asked = shapes.get(node.input[0]) if node.op_type == "Shape" else None
        if asked is not None:
            attributes = {a.name: a.i for a in node.attribute}
            asked = asked[attributes.get("start", 0) : attributes.get("end", len(asked))]
        if asked is not None and all(dimension.HasField("dim_value") for dimension in asked):
            made[node.output[0]] = np.array([dimension.dim_value for dimension in asked], np.int64)
        elif any(name in made for name in node.input) and all(name in made or name in known for name in node.input):
            values = {name: made[name] if name in made else known[name] for name in node.input}
            made |= dict(zip(node.output, onnx.reference.ReferenceEvaluator(node).run(None, values), strict=True))
        else:
            left.append(node)
    count = len(model.graph.node) - len(left)
    read = {name for node in left for name in node.input}
    del model.graph.node[:]
    model.graph.node.extend(left)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in made.items() if name in read)
    return count


def _made(model: onnx.ModelProto) -> set[str]:
    """Every name of a tensor that a node computes."""
    return {name for node in model.graph.node if node.op_type != "Constant" for name in node.output if name}


def tensor_names(model: onnx.ModelProto) -> set[str]:
    """Every name of a tensor in the main graph."""
    g = model.graph
    names = {value.name for value in (*g.input, *g.output)} | {tensor.name for tensor in g.initializer}
    return names | {name for node in g.node for name in (*node.input, *node.output)}
