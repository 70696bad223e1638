"""Which channels must share a factor, so that dividing by it where they are made and multiplying where they are read changes nothing.

What commutes with a positive factor a channel (ReLU, pools, sums, moves of data) hands it on. Every element of a tensor has an *id*,
and ids that must share a factor are joined to a *class*: those of both operands of a sum, or of all positions that a convolution reads.
Moves of data are run on the ids themselves, so that a concat, shuffle or flatten needs no map of its own. What reads or makes values
that cannot be scaled (inputs, outputs, sigmoid, ReLU6, matrix products) puts them into class 0, which is never scaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from qdeploy.core import ops
from qdeploy.core.ops import MAX_POOL, MEAN_POOL, MOVE, Op
from qdeploy.graph import query

HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu"})
SPATIAL = (MAX_POOL | MEAN_POOL | {"interpolate"}) - {"mean"}
SIZES = frozenset({"sym_size", "sym_numel", "sym_stride"})
"""Ops that read the shape of a tensor, not its values."""


@dataclass(slots=True, eq=False)
class Weight:
    """A weight with the ids of its output and input channels, `[G, O / G]` and `[G, I / G]`, and the layers that read it."""

    parameter: Tensor
    out: Tensor
    into: Tensor
    transposed: bool
    layers: list[fx.Node] = field(default_factory=list)

    def grouped(self, tensor: Tensor) -> Tensor:
        """`tensor` of the weight's shape, contiguous, as `[G, O / G, I / G, K]`, a view."""
        (groups, rows), columns = self.out.shape, self.into.shape[1]
        if self.transposed:
            return tensor.view(groups, columns, rows, -1).transpose(1, 2)
        return tensor.view(groups, rows, columns, -1)


class Channels:
    """The channels of a folded float graph. After `join` the ids in `weights` and `biases` (by `id` of the parameter) are classes.

    An id tensor is int64 of the tensor's shape, with stride 0 where all elements are the same, and one sample where the batch may vary.
    """

    def __init__(self, module: fx.GraphModule):
        self.module = module
        self.weights: dict[int, Weight] = {}
        self.biases: dict[int, tuple[Tensor, Tensor]] = {}
        self._count = 1
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._ids: dict[fx.Node, Any] = {}
        elsewhere: set[int] = set()
        for node in module.graph.nodes:
            made = self._follow(node, query.op_of(node)) if self._can_follow(node) else None
            elsewhere |= self._read_elsewhere(node, made is not None)
            if made is None and not reads_sizes(node):
                for source in node.all_input_nodes:
                    self._fix(self._ids.get(source))
            self._ids[node] = _fixed(query.value(node)) if made is None else made
        for key in elsewhere:
            if key in self.weights:
                self._fix([self.weights[key].out, self.weights[key].into])
            if key in self.biases:
                self._fix(self.biases[key][1])

    def join(self) -> int:
        """Turn ids into classes; returns their number, with class 0."""
        zero = torch.zeros(1, dtype=torch.int64)
        total, labels = components(self._count, [(zero, zero), *self._pairs])
        self.renumber((labels - labels[0]) % total)
        return total

    def renumber(self, new: Tensor) -> None:
        """Replace every id by `new[id]`."""
        for weight in self.weights.values():
            weight.out, weight.into = new[weight.out], new[weight.into]
        self.biases = {key: (bias, new[ids]) for key, (bias, ids) in self.biases.items()}

    def _can_follow(self, node: fx.Node) -> bool:
        """Whether `node` is a known op, and the shapes of its tensors are known but for the batch."""
        if node.op != "call_function" or str(node.target) not in ops.OPS or not node.args:
            return False
        made = [query.value(n) for n in (node, *node.all_input_nodes)]
        return all(_integer(value) is not None or _fixed(value) is not None for value in made)

    def _follow(self, node: fx.Node, op: Op) -> Any:
        """The ids of what `node` makes; None where it cannot make scaled values from scaled ones."""
        if op.weight is not None:
            return self._layer(node, op)
        if op.name in ("add", "sub", "maximum", "minimum"):
            return self._sum(node)
        if op.name in ("mul", "div"):
            return self._product(node, op)
        if op.name == "concat":
            return _concat(node, self._ids)
        if op.name in MOVE - {"pad"}:
            made = evaluate(node, self._ids)
            return None if made is None else pytree.tree_map(_collapsed, made)
        return self._keep(node, op, *(self._ids[n] for n in node.all_input_nodes[:1]))

    def _keep(self, node: fx.Node, op: Op, ids: Tensor) -> Tensor | None:
        """The ids behind an op that keeps channels apart."""
        if op.name == "pad":
            return self._pad(node, ids)
        if op.name in HOMOGENEOUS:
            return ids if all(self._never_scaled(n) for n in node.args[1:]) else None
        if op.name in SPATIAL:
            first = 2 if op.name == "interpolate" else ids.dim() - int(op.name[-2])
            return self._tie_along(ids, range(first, ids.dim())).expand(_shape(node))
        axes = node.args[1] if op.name == "mean" and len(node.args) > 1 else None
        if not isinstance(axes, Sequence):
            return None
        return self._tie_along(ids, [int(axis) % ids.dim() for axis in axes]).reshape(_shape(node))  # type: ignore[arg-type]

    def _layer(self, node: fx.Node, op: Op) -> Tensor | None:
        source, constant, bias = node.args[0], query.argument(node, op.weight), query.argument(node, op.bias)
        if not isinstance(source, fx.Node) or constant is None or constant.op != "get_attr":
            return None
        parameter, made, axis = query.parameter(self.module, str(constant.target)), _shape(node), channel_axis(node)
        transposed = op.channel_axis == 1
        outputs, inputs = made[axis], int(self._ids[source].shape[axis])
        groups = (outputs if transposed else inputs) // parameter.shape[1]
        weight = self.weights.get(id(parameter))
        if weight is None:
            out, into = (self._fresh(count).view(groups, -1) for count in (outputs, inputs))
            weight = self.weights[id(parameter)] = Weight(parameter, out, into, transposed)
        if (len(weight.out), weight.transposed) != (groups, transposed) or (bias is not None and bias.op != "get_attr"):
            return None
        weight.layers.append(node)
        out = weight.out.flatten()
        others = [a for a in range(len(made)) if a != axis]
        self._pairs.append((self._tie_along(self._ids[source], others).flatten(), weight.into.flatten()))
        if bias is not None:
            tensor = query.parameter(self.module, str(bias.target))
            self._pairs.append((self.biases.setdefault(id(tensor), (tensor, out))[1], out))
        return _along(out, axis, len(made)).expand(made)

    def _sum(self, node: fx.Node) -> Tensor | None:
        """Both operands must have one factor; a number has none."""
        operands = [self._ids[n] for n in node.args[:2] if isinstance(n, fx.Node)]
        if len(operands) < 2:
            return None
        left, right = torch.broadcast_tensors(*operands)  # type: ignore[no-untyped-call]
        axes = [a for a in range(left.dim()) if _same(left, a) and _same(right, a)]
        self._pairs.append((_narrow(left, axes).flatten(), _narrow(right, axes).flatten()))
        return left  # type: ignore[no-any-return]

    def _product(self, node: fx.Node, op: Op) -> Tensor | None:
        """A product with values that are never scaled has the factor of the other operand."""
        left, right = node.args[:2]
        if op.name == "mul" and not self._never_scaled(right):
            left, right = right, left
        if not self._never_scaled(right) or not isinstance(left, fx.Node):
            return None
        ids: Tensor = self._ids[left]
        return ids.expand(_shape(node))

    def _pad(self, node: fx.Node, ids: Tensor) -> Tensor | None:
        """Zeros may have any factor: that of their neighbours where these have one, else ids of their own."""
        mode, fill = padding(node)
        widths = node.args[1]
        if (mode == "constant" and fill) or not isinstance(widths, Sequence) or not all(isinstance(w, int) for w in widths):
            return None
        for axis, low, high in zip(range(ids.dim() - 1, -1, -1), widths[::2], widths[1::2], strict=False):
            assert isinstance(low, int) and isinstance(high, int)
            if _same(ids, axis):
                ids = _narrow(ids, [axis]).expand(_resized(ids, axis, ids.shape[axis] + low + high))
            elif mode != "constant" or low < 0 or high < 0:
                return None
            else:
                fresh = [_along(self._fresh(width), axis, ids.dim()).expand(_resized(ids, axis, width)) for width in (low, high)]
                ids = _joined([fresh[0], ids, fresh[1]], axis)
        return ids

    def _tie_along(self, ids: Tensor, axes: Sequence[int]) -> Tensor:
        """One id for all elements along `axes`, which have the size 1 in what is returned."""
        first = _narrow(ids, axes)
        if not all(_same(ids, a) for a in axes):
            few, firsts = torch.broadcast_tensors(_compact(ids), _compact(first))  # type: ignore[no-untyped-call]
            self._pairs.append((few.flatten(), firsts.flatten()))
        return first

    def _never_scaled(self, value: object) -> bool:
        return not isinstance(value, fx.Node) or not bool(_compact(self._ids[value]).any())

    def _fresh(self, count: int) -> Tensor:
        self._count += count
        return torch.arange(self._count - count, self._count)

    def _fix(self, ids: Any) -> None:
        for one in pytree.tree_leaves(ids):
            if isinstance(one, Tensor):
                few = _compact(one).flatten()
                self._pairs.append((few, torch.zeros_like(few)))

    def _read_elsewhere(self, node: fx.Node, followed: bool) -> set[int]:
        """The parameters that `node` reads in another way than as weight or bias of a layer that is followed."""
        op = query.op_of(node) if followed else None
        own = [] if op is None or op.weight is None else [query.argument(node, position) for position in (op.weight, op.bias)]
        read = [n for n in node.all_input_nodes if n.op == "get_attr" and isinstance(query.value(n), Tensor)]
        return {id(query.parameter(self.module, str(n.target))) for n in read if n not in own or n is node.args[0]}


def components(size: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[int, Tensor]:
    """How many sets `pairs` join `size` numbers to, and the set of each number, int64 `[size]`."""
    left, right = (torch.cat([pair[side] for pair in pairs] or [torch.zeros(0)]).numpy() for side in (0, 1))
    joined = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(size, size))
    found, labels = connected_components(joined, directed=False)
    return int(found), torch.from_numpy(labels).long()


def evaluate(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What `node` makes of `values`, in which a batch that may vary has one sample; None where the shape is not as it should be."""

    def known(source: fx.Node) -> Any:
        return _integer(query.value(source)) if values.get(source) is None else values[source]

    if any(known(source) is None for source in node.all_input_nodes):
        return None
    assert callable(node.target)
    try:
        made = node.target(*fx.node.map_arg(node.args, known), **fx.node.map_arg(node.kwargs, known))
    except RuntimeError:  # what is written for a whole batch may not fit one sample
        return None
    wanted = [shape(value) for value in pytree.tree_leaves(query.value(node))]
    return made if wanted == [tuple(tensor.shape) for tensor in pytree.tree_leaves(made)] else None


def shape(value: object) -> tuple[int, ...] | None:
    """The shape of a tensor with one sample where the batch may vary; None where other sizes vary, or something is empty."""
    if not isinstance(value, Tensor) or not all(isinstance(size, int) for size in value.shape[1:]):
        return None
    sizes = tuple(_integer(size) or 0 for size in value.shape)
    return sizes if all(sizes) else None


def padding(node: fx.Node) -> tuple[str, float]:
    """Mode of a `pad`, and the value of a constant one."""
    given = [*node.args[2:], *node.kwargs.values()]
    mode = next((value for value in given if isinstance(value, str)), "constant")
    return mode, next((float(value) for value in given if isinstance(value, int | float)), 0.0)


def channel_axis(layer: fx.Node) -> int:
    """The axis of the channels in the input and the output of a convolution or linear layer."""
    op = query.op_of(layer)
    made, weight = query.value(layer), query.value(query.argument(layer, op.weight))  # type: ignore[arg-type]
    assert isinstance(made, Tensor) and isinstance(weight, Tensor)
    return made.dim() - 1 if op.name == "linear" else made.dim() - weight.dim() + 1


def reads_sizes(node: fx.Node) -> bool:
    """Whether `node` reads the shape of a tensor, not its values."""
    return node.op == "call_function" and query.op_of(node).name in SIZES


def _shape(node: fx.Node) -> tuple[int, ...]:
    made = shape(query.value(node))
    assert made is not None
    return made


def _integer(value: object) -> int | None:
    """A number of the graph, for one sample."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression.xreplace(dict.fromkeys(expression.free_symbols, 1)))
    return value if isinstance(value, int) else None


def _fixed(value: object) -> Any:
    """Ids of values that are never scaled; None where a shape is not known."""
    if isinstance(value, list | tuple):
        parts = [_fixed(part) for part in value]
        return None if any(part is None for part in parts) else parts
    made = shape(value)
    return None if made is None else torch.zeros((), dtype=torch.int64).expand(made)


def _concat(node: fx.Node, ids: Mapping[fx.Node, Any]) -> Tensor:
    parts: list[Tensor] = [ids[n] for n in node.args[0]]  # type: ignore[union-attr, index]
    axis = int(node.kwargs.get("dim", (*node.args, 0)[1]))  # type: ignore[arg-type]
    if "stack" in str(node.target):
        parts = [part.unsqueeze(axis) for part in parts]
    return _joined(parts, axis % parts[0].dim())


def _joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """A concat that copies only what differs."""
    axes = [a for a in range(parts[0].dim()) if a != axis and all(_same(part, a) for part in parts)]
    few = torch.cat([_narrow(part, axes) for part in parts], axis)
    return _collapsed(few.expand(_resized(parts[0], axis, few.shape[axis])))


def _collapsed(ids: Tensor) -> Tensor:
    """The same ids, with stride 0 wherever they are the same."""
    few = _compact(ids)
    for axis in range(few.dim()):
        first = _narrow(few, [axis])
        few = first if bool((few == first).all()) else few
    return few.expand(ids.shape)


def _same(ids: Tensor, axis: int) -> bool:
    return ids.shape[axis] == 1 or ids.stride(axis) == 0


def _narrow(ids: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in axes:
        ids = ids.narrow(axis, 0, 1)
    return ids


def _compact(ids: Tensor) -> Tensor:
    """The ids without their repetitions."""
    return _narrow(ids, [axis for axis in range(ids.dim()) if _same(ids, axis)])


def _along(ids: Tensor, axis: int, rank: int) -> Tensor:
    return ids.view([-1 if a == axis else 1 for a in range(rank)])


def _resized(ids: Tensor, axis: int, size: int) -> list[int]:
    return [size if a == axis else old for a, old in enumerate(ids.shape)]
