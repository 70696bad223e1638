"""Small questions about FX nodes, and the few edits that every pass needs."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from qdeploy import ops
from qdeploy.ops import Op


def op_of(node: fx.Node) -> Op:
    """The canonical op of a call node. A clamp to (0, 6) is `relu6`, one to (0, nothing) is `relu`, whichever overload says it."""
    op = ops.find(str(node.target))
    if op.name != "clamp":
        return op
    bounds = dict(zip(("min", "max"), node.args[1:], strict=False)) | node.kwargs
    if "hardtanh" in str(node.target):
        bounds = {"min": -1.0, "max": 1.0} | dict(zip(("min", "max"), node.args[1:], strict=False))
    limits = (bounds.get("min"), bounds.get("max"))
    if limits == (0, 6):
        return ops.find("aten.relu6.default")
    return ops.find("aten.relu.default") if limits == (0, None) else op


def value(node: fx.Node) -> object:
    """The fake tensor (or other value) that `node` makes, with its shape and dtype."""
    return node.meta.get("val")


def is_float(node: fx.Node) -> bool:
    """Whether `node` makes one floating-point tensor."""
    made = value(node)
    return isinstance(made, Tensor) and made.dtype.is_floating_point


def tensor_name(node: fx.Node) -> str:
    """The stable, readable name of the tensor that `node` makes: its name in the emitted ONNX."""
    name: str = node.meta.get("tensor_name", node.name)
    return name


def reader_name(node: fx.Node) -> str:
    """The name of `node` as the reader of a tensor: that of the tensor it makes; the graph's output has one that no tensor has."""
    return "<output>" if node.op == "output" else tensor_name(node)


def argument(node: fx.Node, position: int | None) -> fx.Node | None:
    """The node at an argument position of `node`, if there is one. Exporters may pass it by keyword."""
    if position is None:
        return None
    found: object = node.args[position] if position < len(node.args) else None
    if found is None:
        found = node.kwargs.get({1: "weight", 2: "bias"}.get(position, ""))
    return found if isinstance(found, fx.Node) else None


def parameter(module: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    owner, _, name = path.rpartition(".")
    found = getattr(module.get_submodule(owner), name)
    assert isinstance(found, Tensor), path
    return found


def set_parameter(module: nn.Module, path: str, tensor: Tensor) -> None:
    """Put a new parameter at a dotted path, making the modules on the way."""
    owner, _, name = path.rpartition(".")
    for part in owner.split(".") if owner else ():
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if name in module._buffers:
        del module._buffers[name]
    setattr(module, name, nn.Parameter(tensor, requires_grad=tensor.requires_grad))


def parameter_node(graph: fx.Graph, path: str, tensor: Tensor, before: fx.Node) -> fx.Node:
    """A `get_attr` node for the parameter at `path`, inserted before `before`."""
    with graph.inserting_before(before):
        node = graph.get_attr(path)
    node.meta["val"] = tensor.detach()
    node.meta["tensor_name"] = path
    return node


def finish(module: fx.GraphModule) -> None:
    """After a pass: drop what nobody reads, and renew the code."""
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()


def outputs(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that the graph returns, in order."""
    (output,) = graph.find_nodes(op="output")
    return [node for node in torch.utils._pytree.tree_leaves(output.args) if isinstance(node, fx.Node)]
