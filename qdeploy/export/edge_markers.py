"""The marker on every edge of a float tensor, and what is made of a fresh export by it: names of ours, and nothing of its origin.

The export has a node `qdeploy::edge` on every edge, with the names of the tensor and of its reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch import Tensor

from qdeploy.core.names import Names
from qdeploy.core.version import __version__
from qdeploy.export.onnx_functions import DOMAIN

_IR_VERSION = 10
_Opset = onnxscript.values.Opset(DOMAIN, 1)
_schema = onnx.defs.OpSchema
_MARKER = onnxscript.values.Op(
    _Opset,
    "edge",
    _schema(
        "edge",
        DOMAIN,
        1,
        inputs=[_schema.FormalParameter("x", "T")],
        outputs=[_schema.FormalParameter("y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            _schema.Attribute("tensor", _schema.AttrType.STRING, "the name of x"),
            _schema.Attribute("reader", _schema.AttrType.STRING, "who reads it"),
        ],
    ),
)


@torch.library.custom_op("qdeploy::edge", mutates_args=())
def edge(x: Tensor, tensor: str, reader: str) -> Tensor:
    """A marker: `x`, the tensor called `tensor`, on its way to `reader`."""
    return x.clone()


@edge.register_fake
def _(x: Tensor, tensor: str, reader: str) -> Tensor:
    return torch.empty_like(x)


def translate(x: Any, tensor: str, reader: str) -> Any:
    """The marker in ONNX."""
    return _MARKER(x, tensor=tensor, reader=reader)


def restore_names(model: ir.Model, outputs: Sequence[str]) -> None:
    """Give everything in a fresh export its name: marked tensors theirs, the outputs `outputs`."""
    _clean(model)
    _untie(model)
    _name(model, outputs)
    _name_nodes(model)


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
    for value in values(model):
        value.metadata_props.clear()
        value.doc_string = None


def find(model: ir.Model) -> list[ir.Node]:
    """All markers."""
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type == "edge"]


def text(marker: ir.Node, attribute: str) -> str:
    """The name of the `tensor` of a marker, or of its `reader`."""
    return marker.attributes[attribute].as_string()


def _untie(model: ir.Model) -> None:
    """Part again what the exporter merged because it is equal, where the parts have encodings of their own.

    What a marker makes belongs to the tensor before it: a marker behind it is of an op that the exporter left out, as x + 0.
    """
    owners: dict[int, str] = {id(marker.outputs[0]): "" for marker in find(model)}
    parts: dict[tuple[int, str], ir.Value] = {}
    for marker in find(model):
        raw, name = marker.inputs[0], text(marker, "tensor")
        assert raw is not None and raw.name is not None
        if owners.setdefault(id(raw), name) == name:
            continue
        if (id(raw), name) not in parts:
            parts[id(raw), name] = _part(model, marker, raw, f"{raw.name}/{name}")
        marker.replace_input_with(0, parts[id(raw), name])


def _part(model: ir.Model, marker: ir.Node, raw: ir.Value, name: str) -> ir.Value:
    """A copy of `raw` called `name`, made before `marker`."""
    if raw.name in model.graph.initializers:
        assert raw.const_value is not None
        own = ir.Value(name=name, shape=raw.shape, type=raw.type, const_value=raw.const_value)
        model.graph.register_initializer(own)
        return own
    copy = ir.node("Identity", [raw])
    model.graph.insert_before(marker, [copy])
    own = copy.outputs[0]
    own.name, own.shape, own.type = name, raw.shape, raw.type
    return own


def values(model: ir.Model) -> list[ir.Value]:
    """Everything that has a name in the graph: inputs, parameters, results."""
    return [*model.graph.inputs, *model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)]


def _name(model: ir.Model, outputs: Sequence[str]) -> None:
    """Give marked tensors their names and the outputs theirs; move others out of the way."""
    targets = {id(value): value.name or "" for value in model.graph.inputs}
    made = {id(value): name for value, name in zip(model.graph.outputs, outputs, strict=True)}
    marked = [(text(marker, "tensor"), text(marker, "reader"), marker.inputs[0], marker.outputs[0]) for marker in find(model)]
    taken = Names((*targets.values(), *outputs, *(tensor for tensor, _, _, _ in marked)))
    for tensor, reader, raw, result in marked:
        targets.setdefault(id(raw), tensor)
        targets[id(result)] = made.get(id(result)) or taken.free(f"{tensor}>{reader}")
    for value in model.graph.outputs:  # what is no float tensor, or returned twice
        targets.setdefault(id(value), made[id(value)])
    every = values(model)
    for value in every:
        if id(value) not in targets and value.name in taken:
            targets[id(value)] = taken.free(f"{value.name}_unnamed")
    for value in every:
        if id(value) in targets and value.name != targets[id(value)]:
            _rename(model, value, targets[id(value)])


def _rename(model: ir.Model, value: ir.Value, name: str) -> None:
    if value.name is not None and model.graph.initializers.get(value.name) is value:
        del model.graph.initializers[value.name]
        value.name = name
        model.graph.initializers[name] = value
    else:
        value.name = name


def _name_nodes(model: ir.Model) -> None:
    """Name every node after its tensor, where that has a name of ours, or by its op and place."""
    ours = {text(marker, "tensor") for marker in find(model)}
    taken = Names(ours)
    for index, node in enumerate(model.graph):
        made = str(node.outputs[0].name)
        node.name = made if made in ours else taken.free(f"{node.op_type}_{index}")
