"""Cross-layer equalization: rescale channels between layers, so that all use a grid alike, and the float network stays the same.

Where only ops that commute with a positive factor lie between two layers, the first may divide channel i of its output by s_i if the
second multiplies its weights for that input by s_i. With r1_i = max |W1[i, :]| and r2_i = max |W2[:, i]| (Nagel et al. 2019, DFQ)

    s_i = sqrt(r1_i / r2_i)     makes both     sqrt(r1_i r2_i)

Channels that must share a factor, as by a residual sum, are one *class* (see `channels`), and r1, r2 the largest over all rows that
make it and all columns that read it. Sweeps go over the *regions*, the classes that one layer makes, in graph order, each with what
the others have become: a depthwise layer between two regions ends, with both neighbours, at the geometric mean of the three ranges. A
region that a layer both reads and makes takes half steps, since its ranges move along. A class that has no row or no column above 0
is left alone.

`absorb` takes the mean c of a layer's output out of its bias where all that follows is linear up to the next layers, and adds W2 c to
their biases. That is exact; behind an activation it would not be (DFQ, section 4.1.3), and nothing is done.

Worked: ranges of 8 and 2 meet at 4.

>>> from qdeploy.capture.capture import capture
>>> net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU(), torch.nn.Linear(1, 1))
>>> module = capture(net, torch.zeros(2, 1)).module
>>> first, second = (query.parameter(module, name).detach() for name in ("0.weight", "2.weight"))
>>> _ = first.fill_(8), second.fill_(2)
>>> equalize(module), first.item(), second.item()
(1, 4.0, 4.0)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qdeploy.core import ops
from qdeploy.core.errors import OptionError
from qdeploy.core.ops import MEAN_POOL, MOVE
from qdeploy.graph import query
from qdeploy.graph.channels import Channels, Weight, channel_axis, components, evaluate, padding, reads_sizes, shape
from qdeploy.recipes.step import Declined, Step, Work, count, fraction, step

LARGEST = 2.0**16
"""Bound of a factor and of its inverse: channels that differ by more are dead."""
SAME = 1e-10
"""Relative difference up to which a shift is the same at every position: far above the rounding of float64 sums."""

Table = tuple[Tensor, Tensor, Tensor]


def equalize(module: fx.GraphModule, sweeps: int = 20, tolerance: float = 1e-3) -> int:
    """Rescale the parameters of a folded float graph in place; returns how many regions changed by more than `tolerance`.

    Sweeps end when no factor changes by more than `tolerance`, relatively, or after `sweeps`. What batch norms knew of the outputs of
    layers (`meta["statistics"]`) is rescaled too.
    """
    channels = Channels(module)
    factors = torch.ones(channels.join(), dtype=torch.float64)
    regions = _regions(channels, len(factors))
    for _ in range(sweeps):
        if max((region.balance(factors) for region in regions), default=0.0) <= tolerance:
            break
    scaled = 0
    for region in regions:
        own = factors[region.start : region.stop]
        if bool((own.log().abs() > tolerance).any()):
            scaled += 1
        else:
            own.fill_(1)
    if scaled:
        _apply(channels, factors)
    return scaled


@dataclass(slots=True)
class _Region:
    """The classes `start` to `stop`, with the tables `(ranges, rows, columns)` of the weights that make them and that read them."""

    start: int
    stop: int
    made: list[Table] = field(default_factory=list)
    read: list[Table] = field(default_factory=list)
    looped: bool = False

    def balance(self, factors: Tensor) -> float:
        """Set the region's `factors` to what is best with those of all others; returns the largest relative change."""
        source, sink = (torch.zeros(self.stop - self.start + 1, dtype=torch.float64) for _ in range(2))
        for ranges, rows, columns in self.made:
            self._raise(source, rows, (ranges * factors[columns].unsqueeze(1)).amax(2) / factors[rows])
        for ranges, rows, columns in self.read:
            self._raise(sink, columns, (ranges / factors[rows].unsqueeze(2)).amax(1) * factors[columns])
        ratio = (source / sink)[:-1]
        usable = (ratio > 0) & ratio.isfinite()
        old = factors[self.start : self.stop].clone()
        new = old * ratio.pow(0.25 if self.looped else 0.5).where(usable, 1)
        factors[self.start : self.stop] = new.clamp(1 / LARGEST, LARGEST)
        return float((factors[self.start : self.stop] / old - 1).abs().max())

    def _raise(self, largest: Tensor, classes: Tensor, ranges: Tensor) -> None:
        """Take `ranges` into the largest of each class; a last entry is for other regions."""
        inside = (classes >= self.start) & (classes < self.stop)
        place = (classes - self.start).where(inside, len(largest) - 1)
        largest.scatter_reduce_(0, place.flatten(), ranges.flatten(), "amax")


def _regions(channels: Channels, total: int) -> list[_Region]:
    """The regions in graph order; renumbers the classes so that those of a region are next to each other."""
    made = [_distinct(weight.out)[0] for weight in channels.weights.values()]
    made = [classes[classes > 0] for classes in made]
    groups, group = components(total, [(classes[:-1], classes[1:]) for classes in made])
    order = list(dict.fromkeys(int(group[classes[0]]) for classes in made if len(classes)))
    place = torch.full((groups,), len(order) + 1)  # behind all: classes that no layer makes
    place[order] = torch.arange(1, len(order) + 1)
    place[group[0]] = 0
    channels.renumber(torch.argsort(torch.argsort(place[group], stable=True)))
    ends = place[group].bincount(minlength=len(order) + 2).cumsum(0)
    regions = [_Region(start, stop) for start, stop in zip(ends[:-2].tolist(), ends[1:-1].tolist(), strict=True)]

    def touched(ids: Tensor) -> list[_Region]:
        found = _distinct(torch.bucketize(ids, ends, right=True) - 1)[0].tolist()
        return [regions[i] for i in found if 0 <= i < len(regions)]

    for weight in channels.weights.values():
        makes, reads = touched(weight.out), touched(weight.into)
        if not makes and not reads:
            continue
        ranges, into = _ranges(weight)
        for region in makes:
            region.made.append((ranges, weight.out, into))
            region.looped |= region in reads
        for region in reads:
            inside = ((into >= region.start) & (into < region.stop)).any(0)
            few = (ranges, weight.out, into) if inside.all() else (ranges[..., inside], weight.out, into[:, inside])
            region.read.append(few)
    return regions


def _ranges(weight: Weight) -> tuple[Tensor, Tensor]:
    """The largest |weight| for every output channel and class of inputs, float64 `[G, O / G, J]`, and these classes `[G, J]`."""
    sizes = weight.grouped(weight.parameter.detach().abs().contiguous())
    sizes = sizes.amax(3) if sizes.shape[3] > 1 else sizes[..., 0]
    into, place = _distinct(weight.into)
    if len(weight.into) == 1 and len(into) < place.numel():  # behind a flatten a channel has many columns
        merged = torch.zeros(sizes.shape[1], len(into), dtype=sizes.dtype)
        return merged.scatter_reduce_(1, place.expand_as(sizes[0]), sizes[0], "amax").double().unsqueeze(0), into.unsqueeze(0)
    return sizes.double(), weight.into


def _distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct `ids`, ascending, and which of them each is."""
    found, place = ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return found, place


@torch.no_grad()
def _apply(channels: Channels, factors: Tensor) -> None:
    """Divide what makes each class by its factor, and multiply what reads it."""
    for weight in channels.weights.values():
        out, into = factors[weight.out], factors[weight.into]
        if bool((out == 1).all()) and bool((into == 1).all()):
            continue
        new = weight.parameter.clone(memory_format=torch.contiguous_format).double()
        weight.grouped(new).mul_(into[:, None, :, None]).div_(out[:, :, None, None])
        weight.parameter.copy_(new)
        for layer in weight.layers:
            if "statistics" in layer.meta:
                mean, std = layer.meta["statistics"]
                layer.meta["statistics"] = (mean / out.flatten(), std / out.flatten())
    for bias, ids in channels.biases.values():
        bias.copy_(bias.double() / factors[ids])


def absorb(module: fx.GraphModule) -> int:
    """Move the mean of outputs into the biases of the layers behind, in place, where that is exact. Returns how many were moved.

    The mean is that of the batch norm that was folded into a layer, else the layer's bias. Biases that several layers share stay.
    """
    constants = [n for n in module.graph.find_nodes(op="get_attr") if isinstance(query.value(n), Tensor)]
    readers = Counter(id(query.parameter(module, str(n.target))) for n in constants for _ in n.users)

    def own_bias(layer: fx.Node) -> Tensor | None:
        bias = query.argument(layer, query.op_of(layer).bias) if layer.op == "call_function" else None
        found = query.parameter(module, str(bias.target)).detach() if bias is not None and bias.op == "get_attr" else None
        return found if bias is not None and readers[id(query.parameter(module, str(bias.target)))] == 1 else None

    moved = 0
    for layer in module.graph.nodes:
        bias = own_bias(layer)
        if bias is None:
            continue
        mean, std = layer.meta.get("statistics", (bias.double(), None))
        changes = _absorbed(module, layer, mean, own_bias) if bool(mean.any()) else []
        for other, change in changes:
            other.copy_(other.double() + change)
        if changes:
            bias.copy_(bias.double() - mean)
            moved += 1
            if std is not None:
                layer.meta["statistics"] = (torch.zeros_like(mean), std)
    return moved


def _absorbed(
    module: fx.GraphModule, layer: fx.Node, mean: Tensor, own_bias: Callable[[fx.Node], Tensor | None]
) -> Sequence[tuple[Tensor, Tensor]]:
    """The biases behind `layer` with what each has to gain when its output loses `mean`; none where that is not exact."""
    made = shape(query.value(layer))
    if made is None:
        return ()
    axis = channel_axis(layer)
    shifts: dict[fx.Node, Any] = {layer: mean.view([-1 if a == axis else 1 for a in range(len(made))]).expand(made)}
    changes = []
    ahead, node = set(layer.users), layer
    while ahead:
        node = node.next
        if node not in ahead:
            continue
        ahead.remove(node)
        bias = own_bias(node)
        if bias is not None:
            change = _response(module, node, shifts)
            if change is None:
                return ()
            changes.append((bias, change))
        elif not reads_sizes(node):
            shifts[node] = _shifted(node, shifts)
            if shifts[node] is None:
                return ()
            ahead |= set(node.users)
    return changes


def _response(module: fx.GraphModule, layer: fx.Node, shifts: dict[fx.Node, Any]) -> Tensor | None:
    """What the layer makes of the shift of its input, float64 `[O]`; None where that is not the same at all positions."""
    weight = query.argument(layer, query.op_of(layer).weight)
    if weight is None or weight.op != "get_attr" or [n for n in layer.all_input_nodes if n in shifts] != [layer.args[0]]:
        return None
    assert callable(layer.target)
    matrix = query.parameter(module, str(weight.target)).detach().double()
    others = {name: value for name, value in layer.kwargs.items() if name not in ("weight", "bias")}
    made = layer.target(shifts[layer.args[0]], matrix, None, *layer.args[3:], **others)  # type: ignore[index]
    made = made.movedim(channel_axis(layer), 0).flatten(1)
    low, high = made.aminmax(dim=1)
    return made[:, 0] if bool((high - low).max() <= SAME * made.abs().max()) else None


def _shifted(node: fx.Node, shifts: dict[fx.Node, Any]) -> Any:
    """What a linear op makes of the shifts of its inputs; None for any other op."""
    op = query.op_of(node)
    both = all(isinstance(n, fx.Node) for n in node.args[:2])
    linear = op.name in MEAN_POOL | MOVE or (op.name in ("add", "sub") and both)
    if node.op != "call_function" or str(node.target) not in ops.OPS or not linear or (op.name == "pad" and padding(node)[1]):
        return None
    values = dict(shifts)
    for source in node.all_input_nodes:
        made = shape(query.value(source))
        if source not in values and made is not None:
            values[source] = torch.zeros((), dtype=torch.float64).expand(made)
    return evaluate(node, values)


@step("equalize")
class Equalize(Step):
    """Rescales channels between layers in up to `sweeps`, until no factor changes by more than `tolerance`; then `absorb`s biases."""

    stage = "float"

    def __init__(self, sweeps: int = 20, tolerance: float = 1e-3, absorb: bool = True):
        self.sweeps = count("sweeps of step 'equalize'", sweeps)
        self.tolerance = fraction("tolerance of step 'equalize'", tolerance)
        if not isinstance(absorb, bool):
            raise OptionError("absorb of step 'equalize'", found=repr(absorb), allowed="true, false")
        self.absorb = absorb

    def run(self, work: Work) -> str:
        scaled = equalize(work.float_module, self.sweeps, self.tolerance)
        absorbed = absorb(work.float_module) if self.absorb else 0
        if not scaled and not absorbed:
            raise Declined("no pair of layers to equalize")
        return f"{scaled} regions scaled, {absorbed} biases absorbed"
