"""The parts of an output: what a concat has put together in it, such as boxes and scores.

They are followed from the output up through ops that leave the axis of the concat as it is: those that go element by element, reshapes
of other axes, permutations, and concats of tensors that have the same parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, fx

from qdeploy.core.ops import ACTIVATION, ARITHMETIC
from qdeploy.graph import query


@dataclass(frozen=True, slots=True)
class Parts:
    """Where an output is put together: along `axis`, from one of `edges` to the next, of `tensors` `[len(edges) - 1]`."""

    axis: int
    edges: tuple[int, ...]
    tensors: tuple[str, ...]


def output_parts(node: fx.Node) -> Parts | None:
    """The parts of the tensor that `node` makes; None where it has none, or their sizes are open."""
    made = query.value(node)
    if node.op != "call_function" or not isinstance(made, Tensor) or not made.dim():
        return None
    name = query.op_of(node).name
    sources = [source for source in node.all_input_nodes if isinstance(query.value(source), Tensor)]
    if name == "concat" and str(node.target) == "aten.cat.default":
        return _of_concat(node, sources, made)
    known = name in ("reshape", "transpose") or name in ARITHMETIC | ACTIVATION
    below = output_parts(sources[0]) if len(sources) == 1 and known else None
    if below is None:
        return None
    before = query.value(sources[0])
    assert isinstance(before, Tensor)
    if name not in ("reshape", "transpose"):
        return below if before.dim() == made.dim() else None
    axis = _permuted(node, below.axis, made.dim()) if name == "transpose" else _reshaped(before, made, below.axis)
    return None if axis is None else replace(below, axis=axis)


def _of_concat(node: fx.Node, sources: list[fx.Node], made: Tensor) -> Parts | None:
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(given, int)
    axis = given % made.dim()
    inner = [output_parts(source) for source in sources]
    if inner and inner[0] is not None and inner[0].axis != axis and all(_alike(inner[0], part) for part in inner):
        return inner[0]
    if axis == 0 or len(sources) < 2:  # the batch is no part
        return None
    edges, tensors = [0], []
    for source, part in zip(sources, inner, strict=True):
        value = query.value(source)
        size = value.shape[axis] if isinstance(value, Tensor) else None
        if not isinstance(size, int):
            return None
        start = edges[-1]
        ends, names = ([size], [query.tensor_name(source)])
        if part is not None and part.axis == axis:
            ends, names = list(part.edges[1:]), list(part.tensors)
        edges += [start + end for end in ends]
        tensors += names
    return Parts(axis, tuple(edges), tuple(tensors))


def _alike(one: Parts, other: Parts | None) -> bool:
    return other is not None and (one.axis, one.edges) == (other.axis, other.edges)


def _permuted(node: fx.Node, axis: int, rank: int) -> int | None:
    """Where a transpose puts `axis`."""
    if str(node.target) == "aten.permute.default":
        order = node.args[1]
        assert isinstance(order, list | tuple)
        return [int(place) % rank for place in order].index(axis)  # type: ignore[arg-type]
    if str(node.target) == "aten.transpose.int":
        one, other = (int(place) % rank for place in node.args[1:3])  # type: ignore[arg-type]
        return {one: other, other: one}.get(axis, axis)
    return None


def _reshaped(before: Tensor, made: Tensor, axis: int) -> int | None:
    """Where a reshape leaves `axis`: as many elements, if known, lie before it, and as many behind it."""
    size, behind = before.shape[axis], list(before.shape[axis + 1 :])
    for place in range(made.dim()):
        if str(made.shape[place]) == str(size) and _count(made.shape[place + 1 :]) == _count(behind) is not None:
            return place
    return None


def _count(sizes: object) -> int | None:
    """The product of `sizes`; None where one of them is open."""
    product = 1
    for size in sizes:  # type: ignore[attr-defined]
        if not isinstance(size, int):
            return None
        product *= size
    return product
