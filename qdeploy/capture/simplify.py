"""Passes that make a captured graph plainer without changing what it computes. Each changes the graph and returns its changes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qdeploy.capture.data_movement import END
from qdeploy.capture.masks import bound_masks
from qdeploy.capture.products import name_linear_layers
from qdeploy.graph import edit, query

_NOTHING = ("alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "lift_fresh_copy")
_RESHAPES = frozenset({"reshape", "squeeze", "expand"})
"""They do nothing where the shape stays."""
_CASTS = frozenset({"to", "_to_copy", "type_as"})
"""They do nothing where the dtype stays."""
_CHECKS = ("_assert_tensor_metadata", "_assert_scalar")
"""What the exporter leaves of a cast to the same dtype: it makes nothing, but would count as a reader."""
_NEUTRAL = {"mul": 1, "div": 1, "add": 0, "sub": 0}
"""The number that an op with it leaves everything as it is."""
_MADE_FROM_ONE = {"transpose": "transposed", "mul": "scaled"}
_FILLED = frozenset({"new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like"})
"""They take no value of their first argument, its shape or its dtype only."""
_BROADCASTS = frozenset({"add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "where"})


def simplify(module: fx.GraphModule) -> None:
    """All passes, in the order in which one makes work for the next."""
    name_linear_layers(module)  # before a matrix that is read transposed becomes one more constant
    fold_constants(module)
    name_linear_layers(module)
    fold_sample_constants(module)
    drop_no_ops(module)
    drop_expands(module)
    views_to_reshapes(module)
    average_inside_only(module)
    name_silu_gates(module)
    infer_batch(module)
    bound_masks(module)


def drop_no_ops(module: fx.GraphModule) -> int:
    """Remove ops that return their input unchanged (dropout in inference, clone, a slice of everything) or nothing at all."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        count += _drop_empty_parts(node)
        if _is_nothing(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
        elif query.op_of(node).name not in _CHECKS:
            continue
        module.graph.erase_node(node)
        count += 1
    edit.finish(module)
    return count


def _drop_empty_parts(node: fx.Node) -> bool:
    """Leave out what a concat joins nothing of, which has no range; False where there is no such part, or no other one."""
    if str(node.target) != "aten.cat.default" or not isinstance(node.args[0], list | tuple):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    made = [query.value(part) if isinstance(part, fx.Node) else None for part in node.args[0]]
    kept = [
        part
        for part, tensor in zip(node.args[0], made, strict=True)
        if not (isinstance(tensor, Tensor) and isinstance(dim, int) and tensor.shape[dim if tensor.dim() > 1 else 0] == 0)
    ]
    if not kept or len(kept) == len(made):
        return False
    node.update_arg(0, kept)
    return True


def fold_constants(module: fx.GraphModule) -> int:
    """Compute what follows from parameters and plain numbers alone, such as standardized weights and tables of positions."""
    known = _computed(module, {})
    fetched: dict[tuple[object, ...], fx.Node] = {}
    for node, made in known.items():
        if node.op == "get_attr" or not isinstance(made, Tensor) or all(user in known for user in node.users):
            continue
        key = made.dtype, made.shape, hashlib.sha256(made.detach().contiguous().cpu().numpy().tobytes()).digest()
        if key not in fetched:  # every layer may compute the same
            fetched[key] = _store(module, node, made)
        node.replace_all_uses_with(fetched[key])
    edit.finish(module)
    return len(fetched)


def fold_sample_constants(module: fx.GraphModule) -> int:
    """Make one stored sample, expanded to the batch, of what takes nothing but its size from the inputs: positions, masks.

    Exporters compute these anew for every sample, in ops that no target quantizes well. Proven by computing them for two batches.
    """
    opened = [n for n in module.graph.find_nodes(op="placeholder") if _open_batch(n)]
    if not opened:
        return 0
    batch = _open_batch(opened[0])
    two, three = (_computed(module, {batch: size}) for size in (2, 3))
    found = [node for node in two if _repeated(two[node], three.get(node)) and any(user not in two for user in node.users)]
    with module.graph.inserting_after(list(module.graph.find_nodes(op="placeholder"))[-1]):
        size = module.graph.call_function(torch.ops.aten.sym_size.int, (opened[0], 0))
    size.meta = {"val": opened[0].meta["val"].shape[0]}
    count = 0
    for node in found:
        if query.op_of(node).name == "expand" and node.all_input_nodes[0].op == "get_attr":
            continue
        fetched = _store(module, node, two[node][:1])
        with module.graph.inserting_before(node):
            sizes: list[Any] = [size, *(-1 for _ in range(two[node].dim() - 1))]
            expanded = module.graph.call_function(torch.ops.aten.expand.default, (fetched, sizes))
        expanded.meta = dict(node.meta)
        node.replace_all_uses_with(expanded)
        count += 1
    edit.finish(module)
    return count


def _computed(module: fx.GraphModule, sizes: Mapping[str, int]) -> dict[fx.Node, Any]:
    """What follows from parameters, plain numbers and the open `sizes` alone, by node."""
    known: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "get_attr":
                known[node] = query.parameter(module, str(node.target))
            elif node.op == "call_function" and isinstance(query.value(node), torch.SymInt) and str(query.value(node)) in sizes:
                known[node] = sizes[str(query.value(node))]
            elif node.op == "call_function" and all(source in known for source in _decisive(node, sizes)) and _repeats(node):
                args, kwargs = fx.map_arg(
                    (node.args, node.kwargs), lambda source: known[source] if source in known else _blank(source, sizes)
                )
                known[node] = node.target(*args, **kwargs)
    return known


def _open_batch(node: fx.Node) -> str:
    """The symbol of an input's first size; empty where it is fixed."""
    made = query.value(node)
    return str(made.shape[0]) if isinstance(made, Tensor) and made.dim() and not isinstance(made.shape[0], int) else ""


def _repeated(two: Any, three: Any) -> bool:
    """Whether two and three samples are all the same."""
    if not isinstance(two, Tensor) or not isinstance(three, Tensor) or not two.dim() or two.shape != (2, *three.shape[1:]):
        return False
    return len(three) == 3 and torch.equal(two, two[:1].expand_as(two)) and torch.equal(three, two[:1].expand_as(three))


def _store(module: fx.GraphModule, node: fx.Node, made: Tensor) -> fx.Node:
    """A node that fetches `made`, stored under a name after `node`, which it stands in front of."""
    path = _constant_path(node)
    edit.set_constant(module, path, made.detach().clone())
    with module.graph.inserting_before(node):
        fetched = module.graph.get_attr(path)
    fetched.meta = {"val": made.detach()}
    return fetched


def _decisive(node: fx.Node, sizes: Mapping[str, int]) -> list[fx.Node]:
    """The nodes whose values decide what `node` makes."""
    made, sources = node.meta.get("val"), node.all_input_nodes
    known = isinstance(made, Tensor) and all(isinstance(size, int) or str(size) in sizes for size in made.shape)
    if known and query.op_of(node).name in _FILLED:
        return [source for source in sources if source is not node.args[0]]
    return sources


def _blank(node: fx.Node, sizes: Mapping[str, int]) -> Tensor:
    """A tensor of the shape and dtype of `node`, without values; of size 0 where it is open and not of `sizes`."""
    made = query.value(node)
    assert isinstance(made, Tensor)
    return torch.empty([size if isinstance(size, int) else sizes.get(str(size), 0) for size in made.shape], dtype=made.dtype)


def drop_expands(module: fx.GraphModule) -> int:
    """Remove an `expand` whose readers all broadcast by themselves to the same shape, as exporters do: it is no tensor of a target."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op == "call_function" and query.op_of(node).name == "expand" and all(_widens(user, node) for user in node.users):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            count += 1
    edit.finish(module)
    return count


def _widens(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` makes the shape of `node` also out of its other tensors."""
    if user.op != "call_function" or query.op_of(user).name not in _BROADCASTS:
        return False
    return any(_same_shape(other, node) for other in user.all_input_nodes if other is not node)


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes make tensors of one shape, with the same symbols where it is open."""
    shapes = [made.shape if isinstance(made := query.value(node), Tensor) else None for node in (one, other)]
    return None not in shapes and str(shapes[0]) == str(shapes[1])


def _in_order(node: fx.Node) -> bool:
    """Whether a permutation leaves all dimensions where they are."""
    given = node.args[1:]
    if str(node.target) == "aten.permute.default" and isinstance(given[0], list | tuple):
        return list(given[0]) == list(range(len(given[0])))
    return str(node.target) == "aten.transpose.int" and given[0] == given[1]


def _constant_path(node: fx.Node) -> str:
    """Where a computed constant is kept: beside the one parameter that it is turned or scaled from, if it is no more than that."""
    sources, done = node.all_input_nodes, _MADE_FROM_ONE.get(query.op_of(node).name)
    alone = len(sources) == 1 and sources[0].op == "get_attr" and len(sources[0].users) == 1
    return f"{sources[0].target}_{done}" if alone and done else f"constants.{node.name}"


def _repeats(node: fx.Node) -> bool:
    """Whether an op makes the same whenever it is called."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags


def views_to_reshapes(module: fx.GraphModule) -> int:
    """Make reshapes of views: a view asks for one layout in memory, which a dropped clone made, and other layouts are faster."""
    count = 0
    for node in module.graph.nodes:
        if node.op == "call_function" and str(node.target) in ("aten.view.default", "aten._unsafe_view.default"):
            node.target = torch.ops.aten.reshape.default
            count += 1
    module.recompile()
    return count


def average_inside_only(module: fx.GraphModule) -> int:
    """Count no border where there is none: an average whose last window ends outside is over what is inside, also in ONNX."""
    count = 0
    for node in module.graph.nodes:
        if query.op_of(node).name.startswith("avg_pool") and len(node.args) > 4 and node.args[4] and not any(node.args[3]):
            node.args = (*node.args[:5], False, *node.args[6:])
            count += 1
    module.recompile()
    return count


def name_silu_gates(module: fx.GraphModule) -> int:
    """Tell the sigmoid of a silu apart by a name of its own, so that the product keeps that of its module."""
    count = 0
    for node in module.graph.nodes:
        if str(node.target) == "aten.sigmoid.default" and query.op_of(node).name == "silu":
            path, _ = query.scope(node)
            node.meta["custom"] = (node.meta.get("custom") or {}) | {"scope": (f"{path or 'silu'}.sigmoid", "torch.nn.Sigmoid")}
            count += 1
    return count


def infer_batch(module: fx.GraphModule) -> int:
    """Write -1 for the one size of a reshape that is only known at run time, so that no size is computed in the graph."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or str(node.target) != "aten.reshape.default":
            continue
        made = query.value(node)
        assert isinstance(made, Tensor)
        sizes = [size if isinstance(size, int) else -1 for size in made.shape]
        if sizes.count(-1) == 1 and any(isinstance(size, fx.Node) for size in node.args[1]):
            node.update_arg(1, sizes)
            count += 1
    edit.finish(module)
    return count


def _is_nothing(node: fx.Node) -> bool:
    name = query.op_of(node).name
    if name == "slice":
        _, _, start, end, step = (*node.args, *(None,) * 5)[:5]
        return step in (None, 1) and ((start in (None, 0) and end in (None, END)) or _same_shape(node, node.all_input_nodes[0]))
    if name == "concat" and str(node.target) == "aten.cat.default":
        return len(node.all_input_nodes) == 1 and isinstance(node.args[0], list | tuple) and len(node.args[0]) == 1
    if name == "transpose":
        return _in_order(node)
    if name in _CASTS:
        return len({getattr(query.value(n), "dtype", None) for n in (node, node.all_input_nodes[0])}) == 1
    if name in _RESHAPES:
        return _same_shape(node, node.all_input_nodes[0])
    if name in _NEUTRAL and len(node.args) == 2 and not node.kwargs and not isinstance(node.args[1], fx.Node | bool):
        same = [getattr(query.value(n), "dtype", None) for n in (node, *node.all_input_nodes)]
        return bool(node.args[1] == _NEUTRAL[name]) and len(set(same)) == 1
    return name in _NOTHING and not ("dropout" in name and node.args[-1] is not False)
