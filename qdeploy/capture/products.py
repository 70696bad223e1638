"""Products with a constant matrix become the linear layers that they are, so that targets take the matrix for a weight.

    x @ W + c     linear(x, W^T, c)         matmul, mm, bmm, mv, einsum and tensordot, with a matrix that is stored either way round
    W @ x + c     linear(x^T, W, c)^T       over the last two dimensions, with c a column

A matrix is turned once, here, and keeps its name where nothing else reads it. Batched matrices, one for each place of a dimension, are
no layer of any target: they stay operands of a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from qdeploy.graph import edit, query


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """What `node` multiplies: the tensor `x` and the matrix that `fetched` brings. `turned`: it is not stored as a layer has it.

    `left`: the matrix stands left of `x`. `vector`: it is one row, and what is made lacks the dimension for it.
    """

    node: fx.Node
    x: fx.Node
    fetched: fx.Node
    turned: bool
    left: bool = False
    vector: bool = False


def name_linear_layers(module: fx.GraphModule) -> int:
    """Make linear layers of products with constant matrices, a constant vector behind being the bias. Returns their number."""
    found = list(_products(module))
    stored = {path: query.parameter(module, path) for path in {str(one.fetched.target) for one in found}}
    changed = {id(one.node): one.turned for one in found if one.turned or stored[str(one.fetched.target)].dim() != 2}
    readers: dict[str, set[bool | None]] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        readers.setdefault(str(node.target), set()).update(changed.get(id(user)) for user in _readers(node))
    free = {path for path, ways in readers.items() if len(ways) == 1 and None not in ways}
    made: dict[tuple[str, bool], str] = {}
    replaced: dict[fx.Node, fx.Node] = {}
    for one in found:
        _replace(module, replace(one, x=replaced.get(one.x, one.x)), stored[str(one.fetched.target)], made, free, replaced)
    edit.finish(module)
    return len(found)


def _readers(fetched: fx.Node) -> Iterator[fx.Node]:
    """What reads a parameter, also behind transpositions."""
    for user in fetched.users:
        if _swaps(user):
            yield from _readers(user)
        else:
            yield user


def _products(module: fx.GraphModule) -> Iterator[_Product]:
    for node in module.graph.nodes:
        if node.op != "call_function" or not query.is_float(node):
            continue
        name, args = query.op_of(node).name, node.args
        if name in ("matmul", "mv"):
            right, left = _matrix(args[1]), _matrix(args[0])
            if right is not None and left is None:
                yield from _right(node, args[0], *right)
            elif left is not None and right is None:
                yield from _left(node, args[1], *left)
        elif name == "linear" and len(args) == 2:  # its bias may have been computed
            weight = _matrix(args[1])
            if weight is not None and not weight[1] and isinstance(args[0], fx.Node):
                alone = _Product(node=node, x=args[0], fetched=weight[0], turned=False)
                yield from [alone] if _added(alone, _sizes(weight[0])[0])[1] is not None else []
        elif name == "einsum" and isinstance(args[1], list | tuple) and len(args[1]) == 2:
            yield from _einsum(node, *args[1])
        elif name == "tensordot":
            matrix = _matrix(args[1])
            if matrix is not None and _rank(matrix[0]) == 2 and _last(args[0], args[2]):
                yield from _right(node, args[0], matrix[0], matrix[1] != (list(args[3]) in ([1], [-1])))


def _matrix(node: object) -> tuple[fx.Node, bool] | None:
    """The parameter that a node is, and whether its last two dimensions are swapped on the way."""
    swapped = False
    while isinstance(node, fx.Node) and _swaps(node):
        node, swapped = node.args[0], not swapped
    if not isinstance(node, fx.Node) or node.op != "get_attr" or not query.is_float(node):
        return None
    return node, swapped


def _right(node: fx.Node, x: object, fetched: fx.Node, swapped: bool) -> Iterator[_Product]:
    """x @ W, with W `[in, out]`, or `[in]`."""
    sizes = _sizes(fetched)
    if not isinstance(x, fx.Node) or _rank(x) < max(2, len(sizes)) or not query.is_float(x):
        return
    if all(size == 1 for size in sizes[:-2]):
        yield _Product(node=node, x=x, fetched=fetched, turned=not swapped and len(sizes) > 1, vector=len(sizes) == 1)


def _left(node: fx.Node, x: object, fetched: fx.Node, swapped: bool) -> Iterator[_Product]:
    """W @ x, with W `[out, in]` and x `[..., in, N]`."""
    sizes = _sizes(fetched)
    if not isinstance(x, fx.Node) or len(sizes) < 2 or _rank(x) < len(sizes) or not query.is_float(x):
        return
    if all(size == 1 for size in sizes[:-2]):
        yield _Product(node=node, x=x, fetched=fetched, turned=swapped, left=True)


def _einsum(node: fx.Node, a: object, b: object) -> Iterator[_Product]:
    """Of a tensor whose last letter is summed with a matrix of that letter and of the last that is made."""
    terms, arrow, made = str(node.args[0]).replace(" ", "").partition("->")
    names = terms.split(",")
    for x, letters, matrix, pair in ((a, names[0], _matrix(b), names[1]), (b, names[1], _matrix(a), names[0])):
        if not arrow or matrix is None or matrix[1] or len(pair) != 2 or not isinstance(x, fx.Node) or x.op == "get_attr":
            continue
        summed = letters[-1]
        other = pair.replace(summed, "")
        if (
            len(other) == 1
            and other not in letters
            and made == letters[:-1] + other
            and len(set(letters)) == len(letters.replace("...", "."))
        ):
            yield from _right(node, x, matrix[0], pair[1] == summed)
            return


def _replace(
    module: fx.GraphModule,
    one: _Product,
    stored: Tensor,
    made: dict[tuple[str, bool], str],
    free: set[str],
    replaced: dict[fx.Node, fx.Node],
) -> None:
    node, graph = one.node, module.graph
    matrix = stored.detach().reshape(stored.shape[-2:] if stored.dim() > 1 else (1, -1))
    weight = matrix.t().contiguous() if one.turned else matrix
    root, bias = (node, None) if one.vector else _added(one, len(weight))
    path, key = str(one.fetched.target), (str(one.fetched.target), one.turned)
    if one.turned or stored.dim() != 2:
        if key not in made:
            made[key] = _weight_path(module, path, bias, path in free)
            edit.set_parameter(module, made[key], weight.clone().requires_grad_(stored.requires_grad))
        path = made[key]
    inputs = [_swapped(one.x, root) if one.left else one.x, edit.parameter_node(graph, path, query.parameter(module, path), root)]
    if bias is not None:
        inputs.append(_bias(module, bias, len(weight), root))
    value = query.value(root)
    assert isinstance(value, Tensor)
    with graph.inserting_before(root):
        new = graph.call_function(torch.ops.aten.linear.default, tuple(inputs))
    new.meta = dict(node.meta) | {"val": value.transpose(-1, -2) if one.left else value.unsqueeze(-1) if one.vector else value}
    result = new
    if one.left:
        for user in [user for user in root.users if _swaps(user)]:
            user.replace_all_uses_with(new)
            replaced[user] = new
        result = _swapped(new, root)
    elif one.vector:
        with graph.inserting_before(root):
            result = graph.call_function(torch.ops.aten.squeeze.dim, (new, -1))
        result.meta = dict(node.meta) | {"val": value}
    root.replace_all_uses_with(result)
    replaced[root] = result
    for old in dict.fromkeys((root, node)):
        graph.erase_node(old)


def _weight_path(module: fx.GraphModule, path: str, bias: fx.Node | None, free: bool) -> str:
    """Where a weight goes that is made of the matrix at `path`: there, if nothing else reads that."""
    beside, dot, last = ("" if bias is None else str(bias.target)).rpartition(".")
    if free and "." not in path and not path.endswith("weight") and last == "bias" and dot:
        return edit.free_path(module, f"{beside}.weight")  # a file's own name may say nothing, as 'onnx__MatMul_23'
    return path if free else edit.free_path(module, f"{path}_transposed")


def _added(one: _Product, size: int) -> tuple[fx.Node, fx.Node | None]:
    """The sum of a product and a constant number or vector of `size`, where that alone reads the product, and the vector."""
    users = list(one.node.users)
    if len(users) == 1 and str(users[0].target) == "aten.add.Tensor" and users[0].kwargs.get("alpha", 1) == 1:
        for product, other in (users[0].args[:2], users[0].args[1::-1]):
            if product is one.node and isinstance(other, fx.Node) and other.op == "get_attr" and _is_bias(other, one, size):
                return users[0], other
    return one.node, None


def _is_bias(vector: fx.Node, one: _Product, size: int) -> bool:
    sizes = _sizes(vector)
    if not query.is_float(vector) or len(sizes) > _rank(one.node):
        return False
    across = sizes[-2:-1] + (() if sizes[-1:] in ((), (1,)) else (0,)) if one.left else sizes[-1:]
    return torch.Size(sizes).numel() == 1 or (torch.Size(sizes).numel() == size and across == (size,))


def _bias(module: fx.GraphModule, vector: fx.Node, size: int, before: fx.Node) -> fx.Node:
    """A node for the vector as layers have it."""
    path, stored = str(vector.target), query.parameter(module, str(vector.target))
    if list(stored.shape) != [size]:
        whole = stored.detach().reshape(-1).expand(size).clone().requires_grad_(stored.requires_grad)
        alone = sum(len(node.users) for node in module.graph.find_nodes(op="get_attr") if str(node.target) == path) == 1
        path = path if alone else edit.free_path(module, path)
        edit.set_parameter(module, path, whole)
    return edit.parameter_node(module.graph, path, query.parameter(module, path), before)


def _swapped(node: fx.Node, before: fx.Node) -> fx.Node:
    """A node with the last two dimensions of `node` swapped: the one that it was swapped from, if it was."""
    source = node.args[0] if _swaps(node) else None
    if isinstance(source, fx.Node):
        return source
    with before.graph.inserting_before(before):
        made = before.graph.call_function(torch.ops.aten.transpose.int, (node, -1, -2))
    value = query.value(node)
    assert isinstance(value, Tensor)
    made.meta = {key: node.meta[key] for key in ("nn_module_stack", "custom") if key in node.meta} | {"val": value.transpose(-1, -2)}
    return made


def _swaps(node: fx.Node) -> bool:
    """Whether a node swaps the last two dimensions of what it reads, and does nothing else."""
    if node.op != "call_function" or query.op_of(node).name != "transpose":
        return False
    rank = _rank(node.all_input_nodes[0])
    if rank < 2 or isinstance(node.target, str):
        return False
    sizes = tuple(range(2, rank + 2))  # all different
    turned = node.target(torch.empty(sizes, device="meta"), *node.args[1:], **node.kwargs)
    return tuple(turned.shape) == (*sizes[:-2], sizes[-1], sizes[-2])


def _last(node: object, dims: object) -> bool:
    """Whether `dims` is the last dimension of what `node` makes."""
    return isinstance(node, fx.Node) and isinstance(dims, list | tuple) and list(dims) in ([-1], [_rank(node) - 1])


def _sizes(node: fx.Node) -> tuple[int, ...]:
    """The shape of a parameter."""
    made = query.value(node)
    return tuple(made.shape) if isinstance(made, Tensor) else ()


def _rank(node: object) -> int:
    made = query.value(node) if isinstance(node, fx.Node) else None
    return made.dim() if isinstance(made, Tensor) else 0
