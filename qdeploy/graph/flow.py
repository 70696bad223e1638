"""Values of a graph on many samples, piece by piece: every node is computed once, and what nobody reads any more is dropped.

So an algorithm that goes through a network layer by layer, or block by block, costs as much as one pass over the samples, whatever
the depth. What is kept between two pieces are the tensors that cross the border, `[N, ...]` over all N samples; beyond a limit they
lie in files that the system pages in and out.

Nodes whose first dimension is not the batch (parameters, their quantizers, sizes, tuples of parts) are not kept: each piece that needs
one computes it anew from what is.
"""

from __future__ import annotations

import math
import tempfile
import weakref
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qdeploy.graph import query

LIMIT = 1 << 30
"""Bytes of values that are held in memory; the rest lies in files."""
BACKWARD = 1 << 26
"""Bytes that the values of one backward pass through a whole graph may take, as far as fewer samples at once help."""


class TensorStore:
    """Room for large tensors: in memory up to `limit` bytes, then in unnamed files of `folder` (the system's temporary one)."""

    def __init__(self, limit: int = LIMIT, folder: Path | None = None):
        self.limit = limit
        self.folder = folder
        self.used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor, images laid out channels_last; its room is free again when the tensor is gone."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if self.used + size <= self.limit or not size:
            made = _laid_out(torch.empty(count, dtype=dtype), shape)
            self.used += size
            weakref.finalize(made, self._free, size)
            return made
        with tempfile.NamedTemporaryFile(dir=self.folder) as file:  # the mapping outlives the name
            return _laid_out(torch.from_file(file.name, shared=True, size=count, dtype=dtype), shape)

    def _free(self, size: int) -> None:
        self.used -= size


def _laid_out(memory: Tensor, shape: Sequence[int]) -> Tensor:
    """Flat `memory` as a tensor of `shape`."""
    if len(shape) != 4:
        return memory.view(tuple(shape))
    n, c, h, w = shape
    return memory.view(n, h, w, c).permute(0, 3, 1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a graph as a graph: its placeholders take the values of `enters`, it returns the tuple of those of `leaves`.

    Parameters and submodules are those of the whole graph, not copies.
    """

    module: fx.GraphModule
    enters: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]


class Flow:
    """The values of `module` on samples, up to some node. `inputs` are one tensor `[N, ...]` a placeholder."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Tensor], store: TensorStore, batch: int = 64):
        self.module = module
        self.store = store
        self.batch = batch
        self.samples = len(inputs[0])
        placeholders = module.graph.find_nodes(op="placeholder")
        assert len(placeholders) == len(inputs)
        self._values: dict[fx.Node, Tensor] = dict(zip(placeholders, inputs, strict=True))
        self._order = {node: index for index, node in enumerate(module.graph.nodes)}
        self._kept = _kept_nodes(module)
        self._needs: dict[fx.Node, frozenset[fx.Node]] = {}
        self._last: dict[fx.Node, int] = {}
        for node in module.graph.nodes:
            self._needs[node] = self._sources(node)
            if node in self._kept or node.op == "output":
                for source in self._needs[node]:
                    self._last[source] = self._order[node]
        self._todo = [node for node in module.graph.nodes if node in self._kept and node.op != "placeholder"]
        self._done = 0
        self._by_name: dict[str, fx.Node] = {query.tensor_name(node): node for node in module.graph.nodes}

    def node(self, tensor: str) -> fx.Node:
        """The node that makes the tensor of this name."""
        return self._by_name[tensor]

    def __getitem__(self, node: fx.Node) -> Tensor:
        """The values of a node that is computed and still read, `[N, ...]`."""
        return self._values[node]

    def piece(self, last: fx.Node) -> Piece:
        """What is yet to be computed up to and with `last`."""
        return self._cut(self._until(self._order[last] + 1))

    def through(self, last: fx.Node) -> None:
        """Compute everything up to and with `last`."""
        self._run(self._until(self._order[last] + 1))

    def advance(self, stop: fx.Node) -> None:
        """Compute everything before `stop`."""
        self._run(self._until(self._order[stop]))

    def exits(self, lasts: Sequence[fx.Node]) -> list[fx.Node]:
        """The nodes, inputs too, whose values leave the pieces that end at `lasts`, which are in graph order."""
        ends = [self._order[last] for last in lasts]
        found = [(node, bisect_left(ends, position)) for node, position in self._order.items() if node in self._kept]
        return [node for node, piece in found if piece < len(ends) and self._last.get(node, -1) > ends[piece]]

    def _until(self, position: int) -> list[fx.Node]:
        end = self._done
        while end < len(self._todo) and self._order[self._todo[end]] < position:
            end += 1
        return self._todo[self._done : end]

    def _sources(self, node: fx.Node) -> frozenset[fx.Node]:
        """The kept nodes that `node` is computed from."""
        found: set[fx.Node] = set()
        for source in node.all_input_nodes:
            found |= {source} if source in self._kept else self._needs[source]
        return frozenset(found)

    def _cut(self, nodes: Sequence[fx.Node]) -> Piece:
        enters, order, leaves = self._needed(nodes)
        made = fx.Graph()
        copies = {node: made.placeholder(f"enter_{index}") for index, node in enumerate(enters)}
        for node, copy in copies.items():
            copy.meta = dict(node.meta)
        for node in order:
            copies[node] = made.node_copy(node, copies.__getitem__)
        made.output(tuple(copies[node] for node in leaves))
        return Piece(module=fx.GraphModule(self.module, made), enters=enters, leaves=leaves)

    def _needed(self, nodes: Sequence[fx.Node]) -> tuple[tuple[fx.Node, ...], list[fx.Node], tuple[fx.Node, ...]]:
        """To compute the kept `nodes`: what enters, all nodes that lead from there to what leaves, in order, and what leaves."""
        inside = set(nodes)
        end = self._order[nodes[-1]]
        enters = sorted({source for node in nodes for source in self._needs[node] if source not in inside}, key=self._order.__getitem__)
        leaves = tuple(node for node in nodes if self._last.get(node, -1) > end)
        given, wanted = set(enters), set[fx.Node]()
        waiting = list(leaves)
        while waiting:
            node = waiting.pop()
            if node not in wanted and node not in given:
                wanted.add(node)
                waiting += node.all_input_nodes
        return tuple(enters), sorted(wanted, key=self._order.__getitem__), leaves

    def _run(self, nodes: Sequence[fx.Node]) -> None:
        """Compute the next kept `nodes`, node by node: to make a module of a few would take longer than to run it."""
        if not nodes:
            return
        enters, order, leaves = self._needed(nodes)
        last = {source: node for node in order for source in node.all_input_nodes}
        leaving = set(leaves)
        done: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            if source not in leaving:
                done.setdefault(node, []).append(source)
        stores: list[Tensor] = []
        with torch.no_grad():
            for rows in self.rows():
                made: dict[fx.Node, Any] = {node: self._values[node][rows] for node in enters}
                for node in order:
                    made[node] = self._call(node, made)
                    for source in done.get(node, ()):
                        del made[source]
                if not stores:
                    stores = [self.store.empty((self.samples, *made[leaf].shape[1:]), made[leaf].dtype) for leaf in leaves]
                for store, leaf in zip(stores, leaves, strict=True):
                    store[rows] = made[leaf]
        self._values |= dict(zip(leaves, stores, strict=True))
        self._done += len(nodes)
        end = self._order[nodes[-1]]
        for node in [node for node in self._values if self._last.get(node, -1) <= end]:
            del self._values[node]

    def _call(self, node: fx.Node, made: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return query.parameter(self.module, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
        target = self.module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        assert callable(target)
        return target(*args, **kwargs)

    def rows(self, batch: int = 0) -> Iterator[slice]:
        """Batches of `batch` samples, or of as many as the flow takes at once."""
        for start in range(0, self.samples, batch or self.batch):
            yield slice(start, min(start + (batch or self.batch), self.samples))


def run(module: fx.GraphModule, inputs: Sequence[Tensor], batch: int = 64) -> list[Tensor]:
    """All output tensors of `module` on `inputs` `[N, ...]`, batch by batch, without gradients."""
    parts: list[list[Tensor]] = []
    with torch.no_grad():
        for start in range(0, len(inputs[0]), batch):
            made = module(*(tensor[start : start + batch] for tensor in inputs))
            parts.append([t for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, Tensor)])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def backward_batch(module: fx.GraphModule, most: int) -> int:
    """How many samples, at least 1 and at most `most`, to send back through all of `module` at once.

    A backward pass holds every tensor of the graph: with fewer samples for a deeper network, its memory does not grow with depth.
    """
    made = (value for node in module.graph.nodes if node.op != "get_attr" and isinstance(value := query.value(node), Tensor))
    size = sum(math.prod(s if isinstance(s, int) else s.node.hint for s in value.shape[1:]) for value in made)
    return max(1, min(most, BACKWARD // max(4 * size, 1)))


def _kept_nodes(module: fx.GraphModule) -> set[fx.Node]:
    """The nodes that make one tensor with the batch in front."""
    placeholders = module.graph.find_nodes(op="placeholder")
    batches = {str(value.shape[0]) for node in placeholders if isinstance(value := query.value(node), Tensor) and value.dim()}
    kept: set[fx.Node] = set(placeholders)
    moving: set[fx.Node] = set(placeholders)
    for node in module.graph.nodes:
        if node.op in ("call_function", "call_module") and any(source in moving for source in node.all_input_nodes):
            moving.add(node)  # what does not follow from an input is a constant, whatever its shape
            value = query.value(node)
            if isinstance(value, Tensor) and value.dim() and str(value.shape[0]) in batches:
                kept.add(node)
    return kept
