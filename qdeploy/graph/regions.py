"""Partition a captured float graph into the units that are reconstructed one after the other: blocks, or single layers.

Walk the ops in graph order with the set of live values: inputs and results that an op behind, or the caller, still reads. Where only
an op's own result is live, all that follows depends on that one tensor, and all that came before has ended in it: the op dominates
what is behind it and post-dominates what is before. Between two such cut points lies a unit with one entry and one exit, such as a
residual, inception or squeeze-and-excite block. One walk finds all of them, in time linear in the ops.

A unit without a weighted layer belongs to a neighbour: activations, sums and norms to the unit before, up to the last of them; what
comes behind (pools, reshapes) to the unit after. On a plain chain units of one layer are merged, as larger units are reconstructed
better (Ma et al. 2023, MRECG, merge units of different capacity), but not past a linear bottleneck: a layer without an activation
behind it (Sandler et al. 2018) ends its region, so that expansion, depthwise and projection are one. First and last layer stay alone:
many targets give them other widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from qdeploy.graph import query

TRAILING = frozenset({"activation", "arithmetic", "norm"})
"""Kinds of ops that belong to the layer before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Ops next to each other in graph order; `name` is the tensor of the last. Together, regions are all `call_function` nodes."""

    name: str
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """Ops between cut points; `plain` where they are part of a chain."""

    nodes: tuple[fx.Node, ...]
    plain: bool

    @property
    def layers(self) -> int:
        return sum(map(is_layer, self.nodes))

    @property
    def linear(self) -> bool:
        """Whether no activation comes after the last layer."""
        last = max((index for index, node in enumerate(self.nodes) if is_layer(node)), default=0)
        return not any(query.op_of(node).kind == "activation" for node in self.nodes[last:])


def blocks(module: fx.GraphModule, merge: int = 3, largest: int = 8) -> list[Region]:
    """Blocks with one entry and one exit, and layers of plain chains merged up to `merge` a region.

    A block of more than `largest` weighted layers is cut into its layers: regions that other values may enter and leave.
    """
    following = set(_following_from_inputs(module))
    units = [_unit(nodes, following) for nodes in _cut(_calls(module), _cut_points(module, following))]
    parts = [part for unit in _join(units) for part in ([unit] if unit.layers <= largest else _layer_units(unit.nodes))]
    return [_region(unit.nodes) for unit in _merge(parts, merge)]


def layers(module: fx.GraphModule) -> list[Region]:
    """One region for every weighted layer, with the ops that belong to it."""
    return [_region(unit.nodes) for unit in _layer_units(_calls(module))]


def is_layer(node: fx.Node) -> bool:
    """Whether `node` is a layer with a weight that is a parameter."""
    weight = query.argument(node, query.op_of(node).weight)
    return weight is not None and weight.op == "get_attr"


def _region(nodes: tuple[fx.Node, ...]) -> Region:
    return Region(name=query.tensor_name(nodes[-1]), nodes=nodes)


def _calls(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "call_function"]


def _following_from_inputs(module: fx.GraphModule) -> dict[fx.Node, None]:
    """Inputs, and what is computed from them; the rest is constant. Plain numbers, such as sizes, are left out."""
    found: dict[fx.Node, None] = {}
    for node in module.graph.nodes:
        follows = node.op == "placeholder" or (node.op == "call_function" and any(n in found for n in node.all_input_nodes))
        if follows and isinstance(query.value(node), Tensor | tuple | list):
            found[node] = None
    return found


def _cut_points(module: fx.GraphModule, following: set[fx.Node]) -> set[fx.Node]:
    """The ops that make one tensor, and behind which nothing else is live."""
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    last = {node: max((order[user] for user in node.users), default=-1) for node in following}
    live = {node for node in following if node.op == "placeholder" and last[node] >= 0}
    found = set()
    for node in _calls(module):
        live -= {source for source in node.all_input_nodes if last.get(source) == order[node]}
        if last.get(node, -1) > 0:
            live.add(node)
        if len(live) == 1 and node in live and query.is_float(node):
            found.add(node)
    return found


def _cut(nodes: Sequence[fx.Node], behind: set[fx.Node]) -> list[tuple[fx.Node, ...]]:
    """`nodes` in pieces that end at the nodes `behind` which is cut, and at the last."""
    pieces: list[tuple[fx.Node, ...]] = []
    start = 0
    for index, node in enumerate(nodes, 1):
        if node in behind or index == len(nodes):
            pieces.append(tuple(nodes[start:index]))
            start = index
    return pieces


def _unit(nodes: tuple[fx.Node, ...], following: set[fx.Node]) -> _Unit:
    """On a chain every op is a cut point: a layer in a unit with others is in a branch or beside one."""
    return _Unit(nodes=nodes, plain=sum(node in following for node in nodes) <= 1 or not any(map(is_layer, nodes)))


def _layer_units(nodes: Sequence[fx.Node]) -> list[_Unit]:
    """Units of one layer each. They are not merged."""
    return _join([_Unit(nodes=(node,), plain=False) for node in nodes])


def _join(units: Sequence[_Unit]) -> list[_Unit]:
    """Units with a weighted layer each: the others go to the one before, up to the last that trails it, and then to the one after."""
    joined: list[_Unit] = []
    waiting: list[_Unit] = []
    for unit in units:
        if unit.layers:
            joined.append(_together([*waiting, unit]))
            waiting = []
        elif joined and all(query.op_of(node).kind in TRAILING for node in unit.nodes):
            joined[-1] = _together([joined[-1], *waiting, unit])
            waiting = []
        else:
            waiting.append(unit)
    if waiting:
        joined[-1:] = [_together([*joined[-1:], *waiting])]
    return joined


def _together(units: Sequence[_Unit]) -> _Unit:
    return _Unit(nodes=tuple(node for unit in units for node in unit.nodes), plain=all(unit.plain for unit in units))


def _merge(units: Sequence[_Unit], most: int) -> list[_Unit]:
    """Neighbours on a chain as one, up to `most` layers, without the first and the last unit."""
    merged: list[list[_Unit]] = []
    for index, unit in enumerate(units):
        before = merged[-1] if merged else []
        fits = before and 1 < index < len(units) - 1 and unit.plain and before[-1].plain and not before[-1].linear
        if fits and sum(one.layers for one in before) + unit.layers <= most:
            before.append(unit)
        else:
            merged.append([unit])
    return [_together(group) for group in merged]
