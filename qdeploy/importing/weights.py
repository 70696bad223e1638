"""Constant weights in the layout that torch has them in: slopes, vectors of channels."""

from __future__ import annotations

import re

from torch import Tensor, fx

from qdeploy.importing.graph import keep
from qdeploy.importing.table import OPERATORS


def attribute(module: fx.GraphModule, value: object) -> Tensor | None:
    """The constant tensor that a node stands for, if it does."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    return attribute_at(module, str(value.target))


def _drop(module: fx.GraphModule, path: str) -> None:
    owner, _, name = path.rpartition(".")
    delattr(module.get_submodule(owner), name)


def reshaped(module: fx.GraphModule, before: fx.Node, parameter: fx.Node, *sizes: int) -> fx.Node:
    """A node before `before` for a constant in another shape."""
    found = attribute(module, parameter)
    assert found is not None
    path = keep(module, str(parameter.target), found.reshape(sizes), refused=module.meta["outside"])
    with before.graph.inserting_before(before):
        return before.graph.get_attr(path)


def tidy(module: fx.GraphModule) -> None:
    """Drop constants that nobody reads any more, and give their names to those that were made from them."""
    used: dict[str, list[fx.Node]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        used.setdefault(str(node.target), []).append(node)
    buffers = {path for path, _ in module.named_buffers()}
    for path in {name for name, _ in [*module.named_parameters(), *module.named_buffers()]} - used.keys():
        _drop(module, path)
    for path in sorted(used.keys() - module.meta["given"]):
        wanted = re.sub(r"(_\d+)+$", "", path)
        owner, _, name = wanted.rpartition(".")
        if wanted == path or wanted in module.meta["outside"] or hasattr(module.get_submodule(owner), name):
            continue
        made, buffer = attribute_at(module, path), path in buffers
        _drop(module, path)
        new = keep(module, wanted, made, buffer, refused=module.meta["outside"])
        for node in used[path]:
            node.target = new


def attribute_at(module: fx.GraphModule, path: str) -> Tensor:
    """The parameter or buffer at a path."""
    owner, _, name = path.rpartition(".")
    found = getattr(module.get_submodule(owner), name)
    assert isinstance(found, Tensor), path
    return found.detach()


def slopes(module: fx.GraphModule) -> None:
    """The constant slopes of PRelu, one for each channel, as torch has them."""
    for node in list(module.graph.nodes):
        slope = attribute(module, node.args[1]) if node.meta.get("onnx") == "PRelu" else None
        if slope is None or slope.dim() < 2:
            continue
        sizes = list(slope.shape)
        sizes = sizes[1:] if len(sizes) > 3 and sizes[0] == 1 else sizes
        if slope.numel() == 1 or all(size == 1 for size in sizes[1:]):
            with node.graph.inserting_before(node):
                inputs = (node.args[0], reshaped(module, node, node.args[1], -1))
                new = node.graph.call_function(
                    OPERATORS["PReluChannels"].run, inputs, {"sides": len(sizes) - 1, "scope": node.kwargs.get("scope")}
                )
            new.meta = dict(node.meta) | {"onnx": "PReluChannels"}
            node.replace_all_uses_with(new)
    module.graph.eliminate_dead_code()
