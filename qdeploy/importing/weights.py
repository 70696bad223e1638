"""Constant weights in the layout that torch has them in: linear layers from Gemm and MatMul, slopes, vectors of channels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from qdeploy.importing.graph import keep
from qdeploy.importing.table import OPERATORS


def attribute(module: fx.GraphModule, value: object) -> Tensor | None:
    """The constant tensor that a node stands for, if it does."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    return attribute_at(module, str(value.target))


def linears(module: fx.GraphModule) -> None:
    """Gemm and MatMul with a constant matrix become linear, with the Add of a constant vector as bias."""
    made: dict[tuple[str, bool, float], str] = {}
    fetched: dict[str, list[fx.Node]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        fetched.setdefault(str(node.target), []).append(node)
    for node in list(module.graph.nodes):
        operator = node.meta.get("onnx")
        if operator not in ("Gemm", "MatMul"):
            continue
        matrix = attribute(module, node.args[1])
        if matrix is None or matrix.dim() != 2 or not matrix.is_floating_point() or node.kwargs.get("transA"):
            continue
        root, bias = (node, _gemm_bias(module, node, matrix)) if operator == "Gemm" else _added(module, node, matrix)
        if bias is False:
            continue
        straight, factor = bool(node.kwargs.get("transB")), float(node.kwargs.get("alpha", 1.0))
        path = _linear_weight(module, node, matrix, straight, factor, bias, made, fetched)
        with node.graph.inserting_before(root):
            inputs = (node.args[0], node.graph.get_attr(path), *([node.graph.get_attr(bias)] if isinstance(bias, str) else []))
            new = node.graph.call_function(OPERATORS["Linear"].run, inputs)
        new.meta = dict(node.meta) | {"onnx": "Linear"}
        root.replace_all_uses_with(new)
        for constant in new.all_input_nodes[1:]:
            fetched.setdefault(str(constant.target), []).append(constant)
        for old in dict.fromkeys((root, node)):
            read = old.all_input_nodes
            module.graph.erase_node(old)
            for constant in read:
                if constant.op == "get_attr" and not constant.users:
                    module.graph.erase_node(constant)
    module.graph.eliminate_dead_code()


def _linear_weight(
    module: fx.GraphModule,
    node: fx.Node,
    matrix: Tensor,
    straight: bool,
    factor: float,
    bias: object,
    made: dict[tuple[str, bool, float], str],
    fetched: Mapping[str, Sequence[fx.Node]],
) -> str:
    """The path of the weight as torch has it: the file's own where it has that layout, else a new one of the best name."""
    given: Any = node.args[1]
    path = str(given.target)
    if straight and factor == 1:
        return path
    key = (path, straight, factor)
    if key not in made:
        weight = (matrix if straight else matrix.t().contiguous()) * factor
        named = path.endswith("weight") or not isinstance(bias, str) or not bias.endswith(".bias")
        name = path if named else bias.removesuffix("bias") + "weight"  # type: ignore[attr-defined]
        if name == path and not any(user is not node for other in fetched[path] for user in other.users):
            _drop(module, path)
        made[key] = keep(module, name, weight)
    return made[key]


def _drop(module: fx.GraphModule, path: str) -> None:
    owner, _, name = path.rpartition(".")
    delattr(module.get_submodule(owner), name)


def _gemm_bias(module: fx.GraphModule, node: fx.Node, matrix: Tensor) -> str | bool | None:
    """The path of a constant bias; None without one, False where it is no vector of the outputs."""
    given = node.args[2] if len(node.args) > 2 else None
    if given is None:
        return None
    vector = attribute(module, given)
    size = matrix.shape[0 if node.kwargs.get("transB") else 1]
    if vector is None or vector.numel() not in (1, size) or (vector.dim() > 1 and vector.shape[-1] != vector.numel()):
        return False
    path = str(given.target)  # type: ignore[union-attr]
    factor = float(node.kwargs.get("beta", 1.0))  # type: ignore[arg-type]
    if list(vector.shape) == [size] and factor == 1:
        return path
    return keep(module, path, (vector.reshape(-1).expand(size) * factor).contiguous())


def _added(module: fx.GraphModule, node: fx.Node, matrix: Tensor) -> tuple[fx.Node, str | None]:
    """The Add of a constant vector after a product, where that alone reads it; else the product itself."""
    users = list(node.users)
    if len(users) == 1 and users[0].meta.get("onnx") == "Add":
        other = next((a for a in users[0].args if a is not node), None)
        vector = attribute(module, other)
        if vector is not None and list(vector.shape) == [matrix.shape[1]]:
            return users[0], str(other.target)  # type: ignore[union-attr]
    return node, None


def reshaped(module: fx.GraphModule, before: fx.Node, parameter: fx.Node, *sizes: int) -> fx.Node:
    """A node before `before` for a constant in another shape."""
    found = attribute(module, parameter)
    assert found is not None
    path = keep(module, str(parameter.target), found.reshape(sizes))
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
        if wanted == path or hasattr(module.get_submodule(owner), name):
            continue
        made, buffer = attribute_at(module, path), path in buffers
        _drop(module, path)
        new = keep(module, wanted, made, buffer)
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
