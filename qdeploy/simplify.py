"""Passes that make a captured graph plainer without changing what it computes. Each changes the graph and returns its changes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, fx

from qdeploy import graph
from qdeploy.observer import MASK
from qdeploy.ops import MOVE

_NOTHING = ("alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "lift_fresh_copy")
_RESHAPES = frozenset({"reshape", "squeeze", "expand"})
"""They do nothing where the shape stays."""
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
_FILLED = frozenset({"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"})
"""They take no value of their first argument, its shape or its dtype only."""
_BROADCASTS = frozenset({"add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "where"})
_END = 2**63 - 1
"""What a slice to the end of a dimension has for its end."""


def drop_nothing_ops(module: fx.GraphModule) -> int:
    """Remove ops that return their input unchanged (dropout in inference, clone, a slice of everything) or nothing at all."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if _is_nothing(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
        elif graph.op_of(node).name not in _CHECKS:
            continue
        module.graph.erase_node(node)
        count += 1
    graph.finish(module)
    return count


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
            elif node.op == "call_function" and all(source in known for source in _decisive(node)) and _repeats(node):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: known[source] if source in known else _blank(source))
                known[node] = node.target(*args, **kwargs)
    fetched: dict[tuple[object, ...], fx.Node] = {}
    for node, made in known.items():
        if node.op == "get_attr" or not isinstance(made, Tensor) or all(user in known for user in node.users):
            continue
        key = made.dtype, made.shape, hashlib.sha256(made.detach().contiguous().cpu().numpy().tobytes()).digest()
        if key not in fetched:  # every layer may compute the same
            path = _constant_path(node)
            graph.set_constant(module, path, made.detach().clone())
            with module.graph.inserting_before(node):
                fetched[key] = module.graph.get_attr(path)
            fetched[key].meta = {"val": made.detach()}
        node.replace_all_uses_with(fetched[key])
    graph.finish(module)
    return len(fetched)


def _decisive(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values decide what `node` makes."""
    made, sources = node.meta.get("val"), node.all_input_nodes
    if graph.op_of(node).name in _FILLED and isinstance(made, Tensor) and all(isinstance(size, int) for size in made.shape):
        return [source for source in sources if source is not node.args[0]]
    return sources


def _blank(node: fx.Node) -> Tensor:
    """A tensor of the shape and dtype of `node`, without values; of size 0 where it is open."""
    made = graph.value(node)
    assert isinstance(made, Tensor)
    return torch.empty([size if isinstance(size, int) else 0 for size in made.shape], dtype=made.dtype)


def drop_expands(module: fx.GraphModule) -> int:
    """Remove an `expand` whose readers all broadcast by themselves to the same shape, as exporters do: it is no tensor of a target."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op == "call_function" and graph.op_of(node).name == "expand" and all(_widens(user, node) for user in node.users):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            count += 1
    graph.finish(module)
    return count


def _widens(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` makes the shape of `node` also out of its other tensors."""
    if user.op != "call_function" or graph.op_of(user).name not in _BROADCASTS:
        return False
    return any(_same_shape(other, node) for other in user.all_input_nodes if other is not node)


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes make tensors of one shape, with the same symbols where it is open."""
    shapes = [made.shape if isinstance(made := graph.value(node), Tensor) else None for node in (one, other)]
    return None not in shapes and str(shapes[0]) == str(shapes[1])


def _in_order(node: fx.Node) -> bool:
    """Whether a permutation leaves all dimensions where they are."""
    given = node.args[1:]
    if str(node.target) == "aten.permute.default" and isinstance(given[0], list | tuple):
        return list(given[0]) == list(range(len(given[0])))
    return str(node.target) == "aten.transpose.int" and given[0] == given[1]


def _constant_path(node: fx.Node) -> str:
    """Where a computed constant is kept: beside the one parameter that it is turned from, if it is no more than that."""
    sources = node.all_input_nodes
    turned = len(sources) == 1 and sources[0].op == "get_attr" and len(sources[0].users) == 1 and graph.op_of(node).name == "transpose"
    return f"{sources[0].target}_transposed" if turned else f"constants.{node.name}"


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


def plain_averages(module: fx.GraphModule) -> int:
    """Count no border where there is none: an average whose last window ends outside is over what is inside, also in ONNX."""
    count = 0
    for node in module.graph.nodes:
        if graph.op_of(node).name.startswith("avg_pool") and len(node.args) > 4 and node.args[4] and not any(node.args[3]):
            node.args = (*node.args[:5], False, *node.args[6:])
            count += 1
    module.recompile()
    return count


def name_gates(module: fx.GraphModule) -> int:
    """Tell the sigmoid of a silu apart by a name of its own, so that the product keeps that of its module."""
    count = 0
    for node in module.graph.nodes:
        if str(node.target) == "aten.sigmoid.default" and graph.op_of(node).name == "silu":
            path, _ = graph.scope(node)
            node.meta["custom"] = (node.meta.get("custom") or {}) | {"scope": (f"{path or 'silu'}.sigmoid", "torch.nn.Sigmoid")}
            count += 1
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
    if name == "transpose":
        return _in_order(node)
    if name in _RESHAPES:
        return _same_shape(node, node.all_input_nodes[0])
    if name in _NEUTRAL and len(node.args) == 2 and not node.kwargs and not isinstance(node.args[1], fx.Node | bool):
        same = [getattr(graph.value(n), "dtype", None) for n in (node, *node.all_input_nodes)]
        return bool(node.args[1] == _NEUTRAL[name]) and len(set(same)) == 1
    return name in _NOTHING and not ("dropout" in name and node.args[-1] is not False)
