"""From the simulation to ONNX: one export, and two views of it.

`torch.onnx.export` translates every fake-quantizer into a marker node `qdeploy::FakeQuantize` that carries its tensor's name. The
float view drops the markers; the QDQ view turns each into QuantizeLinear and DequantizeLinear with the numbers of its `Encoding`,
and a marked parameter into stored integers and DequantizeLinear. In both an encoded tensor has the name of its encoding; where a
graph output is quantized, that name is the output's and the tensor before quantization is `<name>_float`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch import fx
from torch.export import Dim

from qdeploy import __version__, arith, graph
from qdeploy.errors import CaptureError
from qdeploy.prepared import Prepared
from qdeploy.spec import Encoding, QuantSpec

DOMAIN = "qdeploy"
_IR_VERSION = 10
_Opset = onnxscript.values.Opset(DOMAIN, 1)
_schema = onnx.defs.OpSchema
_MARKER = onnxscript.values.Op(
    _Opset,
    "FakeQuantize",
    _schema(
        "FakeQuantize",
        DOMAIN,
        1,
        inputs=[_schema.FormalParameter("x", "T")],
        outputs=[_schema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[_schema.Attribute("tensor", _schema.AttrType.STRING, "the name of x")],
    ),
)


def export(prepared: Prepared) -> ir.Model:
    """The simulation as ONNX with markers, all names in place, nothing in it of where it was made."""
    module = prepared.module
    shapes = tuple({0: Dim("batch")} if spec.shape and spec.shape[0] is None else None for spec in prepared.captured.inputs)
    with prepared.mode("quantize"), _quiet():
        try:
            program = torch.onnx.export(
                module,
                prepared.captured.example,
                dynamo=True,
                dynamic_shapes=shapes if any(shapes) else None,
                opset_version=prepared.backend.opset,
                custom_translation_table=_translations(module),
                input_names=[spec.name for spec in prepared.captured.inputs],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise CaptureError("torch.onnx.export cannot translate the model", found=f"{type(cause).__name__}: {cause}") from error
    assert program is not None
    model = program.model
    _clean(model)
    _untie(model)
    _name(model, output_names(module))
    return model


def output_names(module: fx.GraphModule) -> list[str]:
    """Names of the model outputs: those of the tensors returned, or new ones for what is returned twice or is an input as well."""
    taken = {graph.tensor_name(node) for node in module.graph.nodes}
    names: list[str] = []
    for node in graph.outputs(module.graph):
        source = node.args[0] if node.op == "call_module" else node
        assert isinstance(source, fx.Node)
        name = graph.tensor_name(source)
        alias = name in names or source.op != "call_function"
        names.append(_fresh(f"{name}_output", taken) if alias else name)
    return names


def float_view(model: ir.Model) -> ir.Model:
    """A copy of an exported model without its markers: the float model."""
    copy = model.clone()
    outputs = {id(value): position for position, value in enumerate(copy.graph.outputs)}
    for marker in _markers(copy):
        raw, result = marker.inputs[0], marker.outputs[0]
        assert raw is not None
        if id(result) in outputs:
            raw.name, raw.shape = result.name, result.shape
            copy.graph.outputs[outputs[id(result)]] = raw
        result.replace_all_uses_with(raw)
        copy.graph.remove(marker, safe=True)
    _finish(copy)
    return copy


def qdq_view(model: ir.Model, encodings: Sequence[Encoding]) -> ir.Model:
    """A copy of an exported model with the encodings as QuantizeLinear and DequantizeLinear: the simulation in standard ONNX."""
    copy = model.clone()
    taken = {str(value.name) for value in _values(copy)}
    by_name = {encoding.tensor: encoding for encoding in encodings}
    for marker in _markers(copy):
        encoding = by_name[marker.attributes["tensor"].as_string()]
        raw = marker.inputs[0]
        assert raw is not None
        if raw.name in copy.graph.initializers:
            _lower_parameter(copy, marker, encoding, taken)
        else:
            _lower_activation(copy, marker, encoding, taken)
    _finish(copy)
    return copy


def tensor_names(model: onnx.ModelProto) -> set[str]:
    """Every name of a tensor in the main graph."""
    g = model.graph
    names = {value.name for value in (*g.input, *g.output)} | {tensor.name for tensor in g.initializer}
    return names | {name for node in g.node for name in (*node.input, *node.output)}


def onnx_type(spec: QuantSpec) -> ir.DataType:
    """The ONNX integer type that stores the codes of `spec`: the next wider one for odd widths."""
    width = next(width for width in (8, 16, 32) if spec.bits <= width)
    return ir.DataType[f"{'' if spec.signed else 'U'}INT{width}"]


def _translations(module: fx.GraphModule) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What the exporter must translate our way: the marker, and adaptive pooling, which it would spell with strides and Gather."""
    table: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.qdeploy.fake_quantize.default: _marker}
    pools = [n for n in module.graph.nodes if str(n.target) == "aten.adaptive_avg_pool2d.default"]
    if pools and all(list(n.args[1]) == [1, 1] for n in pools):
        table[torch.ops.aten.adaptive_avg_pool2d.default] = _global_average_pool
    return table


def _marker(x: Any, scale: Any, zero_point: Any, bits: int, signed: bool, narrow: bool, axis: int, rounding: str, tensor: str) -> Any:
    return _MARKER(x, tensor=tensor)


def _global_average_pool(x: Any, output_size: Any) -> Any:
    return onnxscript.opset21.GlobalAveragePool(x)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages and of its own internals; failures are exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _clean(model: ir.Model) -> None:
    """Drop metadata: stack traces name files of the machine at hand."""
    model.producer_name, model.producer_version, model.ir_version = "qdeploy", __version__, _IR_VERSION
    model.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name, model.graph.doc_string = "main", None
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in _values(model):
        value.metadata_props.clear()
        value.doc_string = None


def _markers(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == DOMAIN]


def _untie(model: ir.Model) -> None:
    """Part again what the exporter merged because it is equal, where the parts have encodings of their own."""
    owners: dict[int, str] = {}
    for marker in _markers(model):
        raw, name = marker.inputs[0], marker.attributes["tensor"].as_string()
        assert raw is not None and raw.name is not None
        if owners.setdefault(id(raw), name) == name:
            continue
        if raw.name in model.graph.initializers:
            assert raw.const_value is not None
            own = ir.Value(name=f"{raw.name}/{name}", shape=raw.shape, type=raw.type, const_value=raw.const_value)
            model.graph.register_initializer(own)
        else:
            copy = ir.node("Identity", [raw])
            model.graph.insert_before(marker, [copy])
            own = copy.outputs[0]
            own.name, own.shape, own.type = f"{raw.name}/{name}", raw.shape, raw.type
        marker.replace_input_with(0, own)


def _values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)]


def _fresh(name: str, taken: set[str]) -> str:
    """`name`, with a number where it is taken; from now on it is."""
    free, count = name, 0
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    taken.add(free)
    return free


def _name(model: ir.Model, outputs: Sequence[str]) -> None:
    """Give marked tensors the names of their encodings and the outputs theirs; move others out of the way."""
    targets = {id(value): value.name or "" for value in model.graph.inputs}
    targets |= {id(value): name for value, name in zip(model.graph.outputs, outputs, strict=True)}
    markers = [(marker.attributes["tensor"].as_string(), marker.inputs[0], marker.outputs[0]) for marker in _markers(model)]
    taken = {*targets.values(), *(name for name, _, _ in markers)}
    for name, raw, made in markers:
        is_output = id(made) in targets
        targets[id(raw)] = _fresh(f"{name}_float", taken) if is_output else name
        if not is_output:
            targets[id(made)] = _fresh(f"{name}_dequantized", taken)
    values = _values(model)
    for value in values:
        if id(value) not in targets and value.name in taken:
            targets[id(value)] = _fresh(f"{value.name}_unquantized", taken)
    for value in values:
        if id(value) in targets and value.name != targets[id(value)]:
            _rename(model, value, targets[id(value)])


def _rename(model: ir.Model, value: ir.Value, name: str) -> None:
    if value.name is not None and model.graph.initializers.get(value.name) is value:
        del model.graph.initializers[value.name]
        value.name = name
        model.graph.initializers[name] = value
    else:
        value.name = name


def _constant(model: ir.Model, name: str, array: np.ndarray[Any, Any], dtype: ir.DataType) -> ir.Value:
    tensor = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _numbers(model: ir.Model, encoding: Encoding, taken: set[str]) -> tuple[ir.Value, ir.Value]:
    """Scale and zero_point as initializers: scalars, or vectors for a per-channel encoding."""
    shape = () if encoding.spec.axis is None else (-1,)
    names = [_fresh(f"{encoding.tensor}_{part}", taken) for part in ("scale", "zero_point")]
    scale = _constant(model, names[0], encoding.scale.reshape(shape), ir.DataType.FLOAT)
    zero = _constant(model, names[1], encoding.zero_point.reshape(shape), onnx_type(encoding.spec))
    return scale, zero


def _axis(encoding: Encoding) -> dict[str, int]:
    return {} if encoding.spec.axis is None else {"axis": encoding.spec.axis}


def _lower_activation(model: ir.Model, marker: ir.Node, encoding: Encoding, taken: set[str]) -> None:
    spec = encoding.spec
    dtype = onnx_type(spec)
    assert (spec.qmin, spec.qmax) == (dtype.min, dtype.max), f"{encoding.tensor}: QuantizeLinear saturates elsewhere"
    raw, result = marker.inputs[0], marker.outputs[0]
    assert raw is not None
    scale, zero = _numbers(model, encoding, taken)
    q = ir.node("QuantizeLinear", [raw, scale, zero], attributes=_axis(encoding), name=f"{encoding.tensor}_QuantizeLinear")
    q.outputs[0].name = _fresh(f"{encoding.tensor}_quantized", taken)
    q.outputs[0].dtype, q.outputs[0].shape = dtype, raw.shape
    dq = _dequantize(q.outputs[0], scale, zero, encoding)
    _take_place(model, marker, result, [q, dq])


def _lower_parameter(model: ir.Model, marker: ir.Node, encoding: Encoding, taken: set[str]) -> None:
    raw, result = marker.inputs[0], marker.outputs[0]
    assert raw is not None and raw.const_value is not None
    values = torch.from_numpy(np.array(raw.const_value.numpy()))
    scale, zero = torch.from_numpy(encoding.scale.copy()), torch.from_numpy(encoding.zero_point.copy())
    codes = arith.quantize(values, scale, zero, encoding.spec).numpy()
    stored = _constant(model, _fresh(f"{encoding.tensor}_quantized", taken), codes, onnx_type(encoding.spec))
    dq = _dequantize(stored, *_numbers(model, encoding, taken), encoding)
    _take_place(model, marker, result, [dq])
    if not raw.uses():
        del model.graph.initializers[encoding.tensor]
        dq.outputs[0].name = encoding.tensor


def _dequantize(codes: ir.Value, scale: ir.Value, zero: ir.Value, encoding: Encoding) -> ir.Node:
    node = ir.node("DequantizeLinear", [codes, scale, zero], attributes=_axis(encoding), name=f"{encoding.tensor}_DequantizeLinear")
    node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, codes.shape
    return node


def _take_place(model: ir.Model, marker: ir.Node, result: ir.Value, nodes: Sequence[ir.Node]) -> None:
    last = nodes[-1].outputs[0]
    last.name = result.name
    model.graph.insert_before(marker, nodes)
    for position, output in enumerate(model.graph.outputs):
        if output is result:
            model.graph.outputs[position] = last
    result.replace_all_uses_with(last)
    model.graph.remove(marker, safe=True)


def _finish(model: ir.Model) -> None:
    model.opset_imports.pop(DOMAIN, None)
    for index, node in enumerate(model.graph):
        if node.name is None or not node.name.endswith("Linear"):
            node.name = f"{node.op_type}_{index}"


def to_bytes(model: ir.Model) -> bytes:
    """The serialized ONNX model."""
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data


def simplify_float(data: bytes, names: Sequence[str]) -> tuple[bytes, str]:
    """`data` as onnxsim simplifies it, and a note; unchanged where that would lose the name of a tensor in `names`."""
    import onnxsim

    before = onnx.load_from_string(data)
    simplified, equal = onnxsim.simplify(before)
    lost = sorted(set(names) - tensor_names(simplified))
    if not equal:
        return data, "onnxsim was undone: its result did not compute the same"
    if lost:
        return data, f"onnxsim was undone: it lost the names of encoded tensors: {', '.join(lost)}"
    simplified.producer_name, simplified.producer_version = "qdeploy", __version__
    return simplified.SerializeToString(deterministic=True), "simplified by onnxsim; every encoded tensor kept its name"
