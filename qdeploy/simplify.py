"""Passes that make a captured graph plainer without changing what it computes. Each changes the graph and returns its changes."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qdeploy import graph

_NOTHING = ("alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "lift_fresh_copy")
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar")
"""What the exporter leaves of a cast to the same dtype: it makes nothing, but would count as a reader."""
_END = 2**63 - 1
"""What a slice to the end of a dimension has for its end."""


def drop_nothing_ops(module: fx.GraphModule) -> int:
    """Remove ops that return their input unchanged (dropout in inference, clone, a slice of everything) or nothing at all."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if _is_nothing(node):
            node.replace_all_uses_with(node.args[0])
        elif graph.op_of(node).name not in _CHECKS:
            continue
        module.graph.erase_node(node)
        count += 1
    graph.finish(module)
    return count


def loosen_views(module: fx.GraphModule) -> int:
    """Make reshapes of views: a view asks for one layout in memory, which a dropped clone made, and other layouts are faster."""
    count = 0
    for node in module.graph.nodes:
        if node.op == "call_function" and str(node.target) in ("aten.view.default", "aten._unsafe_view.default"):
            node.target = torch.ops.aten.reshape.default
            count += 1
    module.recompile()
    return count


def infer_batch(module: fx.GraphModule) -> int:
    """Write -1 for the one size of a reshape that is only known at run time, so that no size is computed in the graph."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or str(node.target) != "aten.reshape.default":
            continue
        made = graph.value(node)
        assert isinstance(made, Tensor)
        sizes = [size if isinstance(size, int) else -1 for size in made.shape]
        if sizes.count(-1) == 1 and any(isinstance(size, fx.Node) for size in node.args[1]):
            node.update_arg(1, sizes)
            count += 1
    graph.finish(module)
    return count


def _is_nothing(node: fx.Node) -> bool:
    name = graph.op_of(node).name
    if name == "slice":
        _, _, start, end, step = (*node.args, *(None,) * 5)[:5]
        return start in (None, 0) and end in (None, _END) and step in (None, 1)
    return name in _NOTHING and not ("dropout" in name and node.args[-1] is not False)
