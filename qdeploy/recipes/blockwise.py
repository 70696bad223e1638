"""Reconstruct a whole network, region by region: what AdaRound, BRECQ and QDrop have in common.

Two flows go through the network side by side, one of the float graph and one of the simulation. Before a region, both have the values
that enter it; the float one then gives the targets, and after the region is reconstructed the simulation goes on with its final
numbers. So the cost grows linearly with depth, and only the values at one border are held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx

from qdeploy.graph import edit, query
from qdeploy.graph.flow import Flow, Piece, backward_batch
from qdeploy.graph.regions import Region, is_layer
from qdeploy.numerics import arith
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.recipes.reconstruct import Settings, apply, reconstruct
from qdeploy.recipes.step import Changed, Declined, Step, Work

Partition = Callable[[fx.GraphModule], list[Region]]


class Reconstruction(Step):
    """A step that reconstructs all regions of a network."""

    long = True
    partition: Partition
    phases: tuple[Settings, ...]
    fisher: bool = False

    def run(self, work: Work) -> str:
        return reconstruct_all(work, self.partition, self.phases, self.samples, self.fisher)


def reconstruct_all(work: Work, partition: Partition, phases: Sequence[Settings], samples: int, fisher: bool = False) -> str:
    """Reconstruct every region of the simulation, in each of `phases` in turn; returns in words what was done.

    `fisher` weighs the squared errors of a region by the squared gradient of the network's loss there.
    """
    regions = [region for region in partition(work.prepared.floating) if any(_rounds(work, node) for node in region.nodes)]
    if not regions:
        raise Declined("no layer has weights on a linear grid")
    walk = _Walk(work, regions, [_fitting(work, settings) for settings in phases], samples, fisher)
    for number, region in enumerate(regions):
        walk.step(number, region)
    work.make_consistent()
    _on_grid(work)
    iterations = sum(settings.iterations for settings in phases)
    return f"{len(regions)} {partition.__name__}, {iterations} iterations each, on {walk.simulated.samples} samples"


class _Walk:
    """The two flows on their way through the network."""

    def __init__(self, work: Work, regions: Sequence[Region], phases: Sequence[Settings], samples: int, fisher: bool):
        self.work = work
        self.regions = regions
        self.phases = phases
        self.floating, self.simulated = (work.flow(m, samples) for m in (work.prepared.floating, work.prepared.module))
        self.importance = _importance(work, self.floating, regions) if fisher else None
        self.total = len(regions) * sum(settings.iterations for settings in phases)
        self.done = 0
        self.fixed: set[Quantizer] = set()
        """Those of finished regions, which later ones may share."""

    def step(self, number: int, region: Region) -> None:
        """Reconstruct one region and go on behind it."""
        floating, simulated = self.floating, self.simulated
        last = query.tensor_name(region.nodes[-1])
        piece = simulated.piece(simulated.node(last))
        inputs = [simulated[node] for node in piece.enters]
        float_inputs = [floating[floating.node(_origin(node))] for node in piece.enters]
        floating.through(floating.node(last))
        targets = [floating[floating.node(_origin(node))] for node in piece.leaves]
        importance = None if self.importance is None else [self.importance[_origin(node)] for node in piece.leaves]
        for phase, settings in enumerate(self.phases):
            seed = self.work.seed * 1_000_003 + number * len(self.phases) + phase
            values = (inputs, float_inputs, targets, settings, seed, importance, self._progress(number, region, settings), self.fixed)
            changed = self.work.checkpoint(f"{number}.{phase}.{region.name}", partial(reconstruct, piece.module, *values))
            apply(piece.module, changed)
            _choose(self.work, piece, changed)
            self.done += settings.iterations
        self.fixed |= {module for module in piece.module.modules() if isinstance(module, Quantizer)}
        simulated.through(simulated.node(last))

    def _progress(self, number: int, region: Region, settings: Settings) -> Callable[[int, float], None]:
        label = f"{self.work.step.partition('.')[2]} {number + 1}/{len(self.regions)} {region.name}"

        def progress(iteration: int, loss: float) -> None:
            self.work.progress(f"{label} {iteration}/{settings.iterations}", self.done + iteration, self.total, loss)

        return progress


def _fitting(work: Work, settings: Settings) -> Settings:
    """`settings` for this model: batches of a fixed size where it has one, and no learned steps where a target adds a skip branch
    inside a layer, since the scales there must keep their ratios."""
    if not work.prepared.captured.dynamic_batch:
        settings = replace(settings, batch=work.prepared.batch_size)
    if work.prepared.backend.residual != "skip":
        return settings
    return replace(settings, learn_weight_steps=False, learn_activation_steps=False)


def _rounds(work: Work, node: fx.Node) -> bool:
    """Whether `node` is a layer whose weight is on a linear grid."""
    weight = query.argument(node, query.op_of(node).weight)
    quantizer = work.prepared.quantizers.get(query.tensor_name(weight)) if is_layer(node) and weight is not None else None
    return quantizer is not None and quantizer.spec.linear


def _origin(node: fx.Node) -> str:
    """The name of the tensor that a node of the simulation makes, or quantizes."""
    if node.op == "call_module":
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return query.tensor_name(source)
    return query.tensor_name(node)


def _choose(work: Work, piece: Piece, changed: Changed) -> None:
    """Let `make_consistent` start from what was learned."""
    for key, value in changed.items():
        kind, _, path = key.partition(":")
        if kind == "scale":
            quantizer = piece.module.get_submodule(path)
            assert isinstance(quantizer, Quantizer)
            work.prepared.chosen[quantizer] = quantizer.scale, quantizer.zero_point
        elif kind == "bias" and path in work.prepared.biases:
            work.prepared.biases[path] = value.clone()


def _on_grid(work: Work) -> None:
    """Move the weights to their settled grids: a scale may have grown by less than what would change a code."""
    for planned in work.prepared.plan.quantized:
        if planned.role == "weight" and planned.spec is not None and planned.spec.linear:
            quantizer = work.prepared.quantizers[planned.tensor]
            weight = query.parameter(work.prepared.module, planned.tensor)
            with torch.no_grad():
                weight.copy_(arith.fake_quantize(weight, quantizer.scale, quantizer.zero_point, quantizer.spec))


def _importance(work: Work, floating: Flow, regions: Sequence[Region]) -> dict[str, Tensor]:
    """The squared gradient of the network's loss at every tensor that leaves a region, `[N, ...]`, of mean 1 for each.

    For class scores `[N, K]` the loss is the cross-entropy of a class drawn from the network's own probabilities, whose expected
    squared gradient is the diagonal of the Fisher matrix; for other outputs it is their product with normal noise (Gauss-Newton).
    """
    exits = floating.exits([floating.node(query.tensor_name(region.nodes[-1])) for region in regions])
    wanted = [query.tensor_name(node) for node in exits]
    module = edit.copy(work.prepared.floating)
    named = {query.tensor_name(node): node for node in module.graph.nodes}
    (end,) = module.graph.find_nodes(op="output")
    outputs = query.outputs(module.graph)
    end.args = ((tuple(outputs), tuple(named[name] for name in wanted)),)
    module.graph._codegen = fx.graph.CodeGen()
    module.recompile()
    random = torch.Generator().manual_seed(work.seed)
    found: dict[str, Tensor] = {}
    batch = backward_batch(module, floating.batch) if work.prepared.captured.dynamic_batch else floating.batch
    for rows in floating.rows(batch):
        given = [t[rows].detach().clone().requires_grad_(t.is_floating_point()) for t in work.samples]
        with torch.enable_grad():
            made, ends = module(*given)
            loss = torch.stack([_loss(output, random) for output in made if output.requires_grad]).sum()
        reached = [position for position, value in enumerate(ends) if value.requires_grad]
        slopes = torch.autograd.grad(loss, [ends[position] for position in reached], allow_unused=True)
        by_position = dict(zip(reached, slopes, strict=True))
        for position, (name, value) in enumerate(zip(wanted, ends, strict=True)):
            if name not in found:
                found[name] = work.store.empty((floating.samples, *value.shape[1:]), torch.float32)
            slope = by_position.get(position)
            found[name][rows] = torch.zeros(value.shape) if slope is None else slope.square()
    for values in found.values():
        mean = float(values.mean())
        values.div_(mean) if mean > 0 else values.fill_(1.0)
    return found


def _loss(output: Tensor, random: torch.Generator) -> Tensor:
    if output.dim() == 2 and output.shape[1] > 1:
        drawn = torch.multinomial(output.detach().softmax(1), 1, generator=random).flatten()
        return torch.nn.functional.cross_entropy(output, drawn, reduction="sum")
    return (output * torch.randn(output.shape, generator=random)).sum()
