"""Passes that make a captured graph plainer without changing what it computes. Each changes the graph and returns its changes."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor, fx

from qdeploy import graph
from qdeploy.observer import MASK
from qdeploy.ops import MOVE

_NOTHING = ("alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "lift_fresh_copy")
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar")
"""What the exporter leaves of a cast to the same dtype: it makes nothing, but would count as a reader."""
_NEUTRAL = {"mul": 1, "div": 1, "add": 0, "sub": 0}
"""The number that an op with it leaves everything as it is."""
_LEAST = -1e9
"""From here down a number is no value but a mask."""
_MAKES_MASKS = frozenset({"full", "full_like", "scalar_tensor", "masked_fill", "where", "mul", "fill"})
_HANDS_ON_MASKS = (
    frozenset({"add", "where", "masked_fill", "mul", "minimum", "maximum", "to", "_to_copy", "index", "triu", "tril"}) | MOVE
)
_END = 2**63 - 1
"""What a slice to the end of a dimension has for its end."""


def drop_nothing_ops(module: fx.GraphModule) -> int:
    """Remove ops that return their input unchanged (dropout in inference, clone, a slice of everything) or nothing at all."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if _is_nothing(node):
            (source,) = node.all_input_nodes
            node.replace_all_uses_with(source)
        elif graph.op_of(node).name not in _CHECKS:
            continue
        module.graph.erase_node(node)
        count += 1
    graph.finish(module)
    return count


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` in the ops that targets quantize: softmax((scale query) key^T + mask) value, in inference.

    The ones of a mask of booleans are seen. With fewer heads `[..., H, S, D]` of keys and values each serves as many of the queries.
    """
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = (t.unsqueeze(-3).expand(*t.shape[:-2], times, *t.shape[-2:]).flatten(-4, -3) for t in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # the product of codes stays next to the mask and the softmax, which many targets compute in float
    scores = torch.matmul(query if factor == 1 else query * factor, key.transpose(-2, -1))
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.where(attn_mask, scores, MASK)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)


DECOMPOSITIONS = {torch.ops.aten.scaled_dot_product_attention.default: attention}


def soften_masks(module: fx.GraphModule) -> int:
    """Write MASK where attention masks have -inf or the least number of float32, and mark the tensors that carry it.

    A softmax makes 0 of either, but arithmetic on the others ends in inf and NaN, and no range can be found for them. `meta["masked"]`
    stands at every tensor up to the softmax, so that the masked places are left out of its range.
    """
    count = 0
    for node in module.graph.nodes:
        if node.op == "get_attr" and graph.is_float(node):
            tensor = graph.parameter(module, str(node.target))
            if bool((tensor <= _LEAST).any()):
                with torch.no_grad():
                    tensor.clamp_(min=MASK)
                node.meta["masked"] = True
                count += 1
        elif node.op == "call_function" and graph.is_float(node):
            name = graph.op_of(node).name
            hidden = [position for position, argument in enumerate(node.args) if _hides(argument)] if name in _MAKES_MASKS else []
            for position in hidden:
                node.update_arg(position, MASK)
            count += bool(hidden)
            if hidden or (name in _HANDS_ON_MASKS and any("masked" in source.meta for source in node.all_input_nodes)):
                node.meta["masked"] = True
    module.recompile()
    return count


def _hides(argument: object) -> bool:
    return isinstance(argument, float | int) and not isinstance(argument, bool) and (argument <= _LEAST or argument == MASK)


def fold_constants(module: fx.GraphModule) -> int:
    """Compute what follows from parameters and plain numbers alone, such as standardized weights and tables of positions."""
    known: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "get_attr":
                known[node] = graph.parameter(module, str(node.target))
            elif node.op == "call_function" and all(source in known for source in node.all_input_nodes) and _repeats(node):
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)
    fetched: dict[tuple[object, ...], fx.Node] = {}
    for node, made in known.items():
        if node.op == "get_attr" or not isinstance(made, Tensor) or all(user in known for user in node.users):
            continue
        key = made.dtype, made.shape, hashlib.sha256(made.detach().contiguous().cpu().numpy().tobytes()).digest()
        if key not in fetched:  # every layer may compute the same
            graph.set_constant(module, f"constants.{node.name}", made.detach().clone())
            with module.graph.inserting_before(node):
                fetched[key] = module.graph.get_attr(f"constants.{node.name}")
            fetched[key].meta = {"val": made.detach()}
        node.replace_all_uses_with(fetched[key])
    graph.finish(module)
    return len(fetched)


def _repeats(node: fx.Node) -> bool:
    """Whether an op makes the same whenever it is called."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags


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
    if name == "concat" and str(node.target) == "aten.cat.default":
        return len(node.all_input_nodes) == 1 and isinstance(node.args[0], list | tuple) and len(node.args[0]) == 1
    if name in _NEUTRAL and len(node.args) == 2 and not node.kwargs and not isinstance(node.args[1], fx.Node | bool):
        same = [getattr(graph.value(n), "dtype", None) for n in (node, *node.all_input_nodes)]
        return bool(node.args[1] == _NEUTRAL[name]) and len(set(same)) == 1
    return name in _NOTHING and not ("dropout" in name and node.args[-1] is not False)
