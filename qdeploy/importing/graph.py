"""From an ONNX graph to an `fx.GraphModule`: a placeholder for every input, a call of the table's function for every node.

What depends on constants only is computed here, by the same functions. Tensors that remain are parameters and buffers of the module,
under the names that they have in the file.
"""

from __future__ import annotations

import operator as python
import re
from collections import Counter
from collections.abc import Container
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from qdeploy.capture.inputs import NAMES
from qdeploy.core.errors import InputError, QDeployError
from qdeploy.core.names import free_attribute, reserved
from qdeploy.importing.elementwise import torch_dtype
from qdeploy.importing.read import where
from qdeploy.importing.table import OPERATORS, Operator
from qdeploy.importing.values import Value, constant, is_plain, tensor

_BUFFERS = {"BatchNormalization": (3, 4)}
"""Inputs that are statistics: a module has them as buffers."""
_TAKEN = frozenset(dir(fx.GraphModule)) | {"graph", "code"}
"""Names that a module of a graph has for itself."""


def identifier(name: str) -> str:
    """`name` as a name of Python.

    >>> identifier("input.1"), identifier("images"), identifier("class")
    ('input_1', 'images', 'class_')
    """
    made = re.sub(r"\W", "_", name, flags=re.ASCII) or "_"
    made = f"_{made}" if made[0].isdigit() else made
    return f"{made}_" if reserved(made) else made


def _name(name: str, node: ir.Node, at: int) -> str:
    """The name of a constant that `node` reads as input `at`: its own, or after the module of the node where it has only a number."""
    if name and not re.fullmatch(r"onnx::.*|.*Constant(_\d+)?_output_0|_?val_\d+|_to_copy.*|t(_\d+)?|\d+|constant", name):
        return name
    place = _module(node)
    role = "bias" if at == 2 or (node.op_type == "Add" and at) else "weight"
    return f"{place}.{role}" if place else identifier(name or "constant")


def _module(node: ir.Node) -> str:
    """The path of the module that a node comes from, as torch's exporters note it: in metadata, or in the node's name.

    >>> _module(ir.node("Conv", [], name="/layer1/layer1.0/conv/Conv"))
    'layer1.0.conv'
    """
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    if len(scopes) > 1:
        return str(scopes[-2])
    parts = (node.name or "").split("/")[1:-1]
    followers = [*parts[1:], ""][: len(parts)]  # a part that holds others is repeated in them
    return ".".join(part for part, after in zip(parts, followers, strict=True) if not after.startswith(f"{part}."))


class Builder:
    """The graph of one ONNX model; `module` makes it. `loose`: the batch of the file is fixed, see `shaping.reshape`."""

    def __init__(self, model: ir.Model, *, loose: bool):
        self.model = model
        self.loose = loose
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.made: dict[ir.Value, Value] = {}
        self.origin: dict[ir.Value, str] = {}
        self.paths: dict[int, str] = {}
        self.kept: list[Tensor] = []  # so that no id in `paths` is used again
        self.names: set[str] = set()
        self.inputs: dict[str, str] = {}
        self.outside = frozenset(value.name or "" for value in (*model.graph.inputs, *model.graph.outputs))
        """What no parameter may be called: outside of the graph, inputs and outputs keep their names."""
        self.crowd = Counter(_module(node) for node in model.graph if node.op_type != "Constant")

    def module(self) -> fx.GraphModule:
        """The whole graph as a module that returns its outputs by their names in the file."""
        graph = self.model.graph
        for value in graph.inputs:
            if value.name not in graph.initializers:
                self.made[value] = self._placeholder(value)
        for value in graph.initializers.values():
            assert value.const_value is not None
            self.made[value] = constant(self._tensor(value.const_value, f"the tensor '{value.name}'"), learned=True)
        for node in graph:
            self._node(node)
        self.graph.output({(value.name or f"output_{at}"): self._output(value) for at, value in enumerate(graph.outputs)})
        module = fx.GraphModule(self.root, self.graph)
        module.meta[NAMES] = dict(self.inputs)
        module.meta["outside"] = self.outside
        module.meta["given"] = {".".join(_parts(name)) for name in graph.initializers}
        return module.eval()

    def _output(self, value: ir.Value) -> fx.Node:
        node = value.producer()
        made = self._tensor_node(self.made[value], value.name or "output")
        computed = made.op == "call_function" and node is not None and OPERATORS[node.op_type].mixed
        return self.graph.call_function(tensor, (made,)) if computed else made  # what is returned may be a shape

    def _placeholder(self, value: ir.Value) -> fx.Node:
        name = identifier(value.name or "input")
        while name in self.names:
            name += "_"
        self.names.add(name)
        self.inputs[name] = value.name or name
        return self.graph.placeholder(name)

    def _tensor(self, found: ir.TensorProtocol, what: str) -> Tensor:
        try:
            torch_dtype(found.dtype)
            array = found.numpy()
            if array.dtype.kind == "V" or found.dtype == ir.DataType.BFLOAT16:
                return torch.from_numpy(array.astype(np.float32)).to(torch_dtype(found.dtype))
            return torch.from_numpy(np.array(array))
        except Exception as error:  # data that is too short, or of a type that torch does not have
            raise InputError(f"cannot read {what}", found=str(error), action="export the file again") from error

    def _node(self, node: ir.Node) -> None:
        opset = self.model.opset_imports.get(node.domain)
        try:
            if node.op_type == "Constant":
                self.made[node.outputs[0]] = self._constant(node)
                return
            found = OPERATORS[node.op_type]
            inputs = [None if value is None else self.made[value] for value in node.inputs]
            while inputs and inputs[-1] is None:
                inputs.pop()
            attributes = self._attributes(node, found, opset)
            self._check_outputs(node, found)
            self._call(node, found, inputs, attributes)
        except QDeployError as error:
            raise type(error)(f"{where(node, opset)}: {error}") from error
        except Exception as error:  # a constant that an operator cannot take
            raise InputError(f"{where(node, opset)} cannot be computed", found=" ".join(str(error).split())[:300]) from error

    def _call(self, node: ir.Node, found: Operator, inputs: list[Value], attributes: dict[str, Any]) -> None:
        known = [self._setting(v) if at in found.settings else v for at, v in enumerate(inputs)]
        if not any(isinstance(v, fx.Node) for v in known):
            with torch.no_grad():
                result = found.run(*known, **attributes)
            results = list(result) if found.many else [result]
            self._give(node, [constant(r) if isinstance(r, Tensor) else r for r in results])
            tensors = [value for value, v in zip(node.inputs, known, strict=False) if value is not None and isinstance(v, Tensor)]
            if len(tensors) == 1:  # a weight that is transposed or cast is still that weight
                self.origin[node.outputs[0]] = self.origin.get(tensors[0], tensors[0].name or "constant")
            return
        arguments = []
        for at, (given, value) in enumerate(zip(known, node.inputs, strict=False)):
            number = at in found.settings or (found.mixed and is_plain(given))
            name = _name("" if value is None else self.origin.get(value, value.name or ""), node, at)
            arguments.append(given if given is None or number else self._tensor_node(given, name, at in _BUFFERS.get(node.op_type, ())))
        call = self._make(found, tuple(arguments), attributes, node)
        if not found.many:
            self._give(node, [call])
            return
        self._give(node, [self.graph.call_function(python.getitem, (call, at)) for at in range(len(node.outputs))])

    def _make(self, found: Operator, arguments: tuple[Any, ...], attributes: dict[str, Any], node: ir.Node) -> fx.Node:
        scope = self._scope(node)
        call = self.graph.call_function(found.run, arguments, attributes | ({"scope": scope} if scope else {}))
        call.meta["onnx"] = node.op_type
        call.meta["where"] = where(node, self.model.opset_imports.get(node.domain))
        return call

    def _scope(self, node: ir.Node) -> tuple[str, str] | None:
        """The module that a node comes from, and its class; of one that makes one node only, the class does not matter.

        None for layers with weights, which are named after these: exporters note a batch norm where they folded one.
        """
        weight = node.inputs[1] if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") else None
        if weight is not None and not isinstance(self.made[weight], fx.Node):
            return None
        path = _module(node)
        classes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.class_hierarchy", ""))
        kind = classes[-2] if len(classes) > 1 else "torch.nn.Module" if self.crowd[path] == 1 else ""
        return (path, kind) if path else None

    def _setting(self, value: Value) -> Value:
        """A constant that must be numbers; a larger tensor of them becomes a list."""
        return value.tolist() if isinstance(value, Tensor) else value

    def _give(self, node: ir.Node, results: list[Value]) -> None:
        for output, result in zip(node.outputs, results, strict=False):
            self.made[output] = result

    def _tensor_node(self, value: Value, name: str, buffer: bool = False) -> fx.Node:
        """The node of a tensor; a constant becomes a parameter, or a buffer where it is no float or a statistic."""
        if isinstance(value, fx.Node):
            return value
        whole: Tensor = tensor(value)
        if id(whole) not in self.paths:
            self.paths[id(whole)] = keep(self.root, name, whole, buffer, refused=self.outside)
            self.kept.append(whole)
        return self.graph.get_attr(self.paths[id(whole)])

    def _constant(self, node: ir.Node) -> Value:
        ((name, attribute),) = node.attributes.items()
        value = attribute.value
        if name == "value":
            return constant(self._tensor(value, "the value"))
        if name in ("value_int", "value_float", "value_ints"):
            return list(value) if name == "value_ints" else value
        if name == "value_floats":
            return torch.tensor(list(value), dtype=torch.float32)
        raise InputError("a constant of this kind is not supported", found=name, allowed="value, value_int(s), value_float(s)")

    def _attributes(self, node: ir.Node, found: Operator, opset: int | None) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, attribute in node.attributes.items():
            if name not in found.attributes:
                allowed = ", ".join(sorted(found.attributes)) or "none"
                raise InputError("an attribute is not supported", found=name, allowed=allowed, action="export the model without it")
            value = attribute.value
            if attribute.type == ir.AttributeType.TENSOR:
                tensor_value = self._tensor(value, f"the attribute '{name}'")
                value = (tensor_value.reshape(-1)[0].item(), tensor_value.dtype)  # one number: only ConstantOfShape has it
            made[name] = list(value) if isinstance(value, list | tuple) else value
        extra = {"opset": opset, "num_outputs": len(node.outputs), "loose": self.loose}
        return {name: value for name, value in extra.items() if name in found.attributes and name not in made} | made

    def _check_outputs(self, node: ir.Node, found: Operator) -> None:
        used = [at for at, output in enumerate(node.outputs) if at and (output.uses() or output.is_graph_output())]
        if used and not found.many:
            raise InputError("an output beyond the first is used", found=f"output {used[0]}", allowed="output 0")
        count = found.inputs
        if count is not None and len(node.inputs) > count:
            beyond = [at for at, value in enumerate(node.inputs) if at >= count and value is not None]
            if beyond:
                raise InputError("an input is not supported", found=f"input {beyond[0]}", allowed=f"inputs 0 to {count - 1}")


def _parts(name: str) -> list[str]:
    """A name in the file as a path of modules."""
    parts = [re.sub(r"\W", "_", part, flags=re.ASCII) for part in re.split(r"[./]", name) if part] or ["constant"]
    return [f"{part}_" if reserved(part) else part for part in parts]


def keep(root: nn.Module, name: str, value: Tensor, buffer: bool = False, *, refused: Container[str]) -> str:
    """Give `root` a parameter or buffer under `name`, or one near to it that is free and not `refused`; returns the path."""
    parts = _parts(name)
    while ".".join(parts) in refused:
        parts[-1] += "_"
    owner = root
    for at, part in enumerate(parts[:-1]):
        while part not in owner._modules and (hasattr(owner, part) or part in _TAKEN):
            part += "_"
        parts[at] = part
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    last = free_attribute(owner, parts[-1], _TAKEN)
    while ".".join([*parts[:-1], last]) in refused:
        last = free_attribute(owner, f"{last}_", _TAKEN)
    if buffer or not value.is_floating_point():
        owner.register_buffer(last, value)
    else:
        owner.register_parameter(last, nn.Parameter(value))
    return ".".join([*parts[:-1], last])
