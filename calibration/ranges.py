"""Choose each range by the error behind the tensor: in what the ops that read it make, as far as the network's outputs feel it.

One walk of the float graph on a few samples. Where an op f reads a quantized tensor x, f is computed again for every candidate encoding
Q of x, with all else in float; an activation that alone reads f belongs to f. To first order an error at y = f(x) changes an output z
by J (f(Q(x)) - y), so that errors at different places are compared, and summed over the readers of all tensors of one encoding, by

    loss(Q) = sum over readers of  sum over elements of  g (f(Q(x)) - f(x))^2,      g = E[(J^T v)^2] / |z|^2

with random signs v: one backward pass a batch. g is averaged over the samples. It is the diagonal of the Fisher matrix of a squared
error, as BRECQ weighs blocks by one (Li et al. 2021, section 3.2). The least loss wins.

Candidates of an activation are the ranges of several observers; of a weight the full range, and the one at hand times FACTORS, chosen
channel by channel where each has a scale. Scales that are powers of two have three candidates: now, half and twice. There the input
and the weight of a layer are chosen together from the table of nine pairs: steps of 2^k are coarse, and one depends on the other.

    loss(i) = sum over layers of min over w of loss(i, w),      then w is the best for the chosen i

A candidate is taken where its loss is below the share WORTH of that of the range at hand; less is but noise of few samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qdeploy.core.errors import OptionError
from qdeploy.core.recipe import Choice
from qdeploy.graph import query
from qdeploy.graph.flow import backward_batch
from qdeploy.numerics import arith
from qdeploy.numerics.multi_observer import MultiObserver
from qdeploy.numerics.observer import as_rows, finite_minmax
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.recipes.step import Declined, Step, Work, count, generator, step
from qdeploy.simulation.insert import Numbers
from qdeploy.simulation.plan import TensorPlan

OBSERVED = (
    Choice(observer="mse"),
    Choice(observer="minmax"),
    Choice(observer="percentile", options={"percentile": 99.99}),
    Choice(observer="percentile", options={"percentile": 99.999}),
)
FACTORS = (0.95, 0.9, 0.85, 0.8, 1.1)
"""Of a weight's range at hand; never beyond the full one."""
OCTAVES = (0.5, 2.0)
"""Of a power of two at hand."""
WORTH = {"activation": 0.9, "weight": 0.99}
"""Share of the present loss that another range must come below; outliers of activations are rare among few samples."""
BATCH = 16
"""Samples at once: few, as every op is computed many times and its tensors should stay in the cache."""


@step("ranges")
class Ranges(Step):
    """Takes each tensor's range from several candidates by the error of the ops that read it, measured on `samples` samples."""

    def __init__(self, samples: int = 32, weights: bool = True):
        self.samples = count("samples of step 'ranges'", samples)
        if not isinstance(weights, bool):
            raise OptionError("weights of step 'ranges'", found=repr(weights), allowed="true or false")
        self.weights = weights
        """Whether ranges of weights are chosen too, or only those of activations."""

    def observers(self) -> tuple[Choice, ...]:
        return OBSERVED

    def run(self, work: Work) -> str:
        activations = _activations(work)
        weights = _weights(work) if self.weights else {}
        if not activations and not weights:
            raise Declined("no range has another candidate")
        batches = _batches(work, self.samples)
        walk = _Walk(work, activations, weights, gains(work.float_module, _pieces(work, batches), work.seed))
        with torch.no_grad():
            for done, batch in enumerate(batches):
                walk.run(*batch)
                work.progress("ranges", done + 1, len(batches))
        counts = {"activation": walk.decide_activations(work), "weight": walk.decide_weights(work)}
        work.make_consistent()
        present = (("activation", activations), ("weight", weights))
        return "changed " + " and ".join(f"{counts[role]} of {len(all_)} {role} ranges" for role, all_ in present if all_)


@dataclass(eq=False)
class Contest:
    """The encodings that a quantizer may get; the first is the one that it has."""

    quantizer: Quantizer
    candidates: list[Numbers]
    taken: int = 0
    """Which one won, where the whole tensor has one scale."""

    @property
    def paired(self) -> bool:
        """Whether it is decided together with the other operand of a layer."""
        return self.quantizer.spec.grid == "power_of_two"

    def decide(self, loss: Tensor) -> Numbers | None:
        """The encoding of least `loss` `[K, C]`, C = 1 for one of the whole tensor; None where the present one stays."""
        best, index = loss.min(0)
        index = torch.where(best < WORTH[self.quantizer.role] * loss[0], index, 0)
        self.taken = int(index[0])
        if not index.any():
            return None
        scales, zeros = (torch.stack(column) for column in zip(*self.candidates, strict=True))
        return scales.gather(0, index.view(1, -1)).squeeze(0), zeros.gather(0, index.view(1, -1)).squeeze(0)


@dataclass(frozen=True)
class Operand:
    """Something that an op reads: `name` is that of the group or of the weight."""

    node: fx.Node
    name: str
    contest: Contest

    def tried(self, value: Tensor) -> Iterable[dict[fx.Node, Tensor]]:
        """What to put in its place, for each candidate in turn."""
        spec = self.contest.quantizer.spec
        return ({self.node: arith.fake_quantize(value, *numbers, spec)} for numbers in self.contest.candidates)


@dataclass
class Reading:
    """Losses at one op, `[I, W, C]` for I candidates of a tensor that it reads and W of its weight; "" and 1 where there is none."""

    group: str
    weight: str
    loss: Tensor


def _batches(work: Work, samples: int) -> list[tuple[Tensor, ...]]:
    size = BATCH if work.prepared.captured.dynamic_batch else work.prepared.batch_size
    stop = min(samples, len(work.samples[0]))
    if work.prepared.captured.dynamic_batch:
        return [tuple(t[start : min(start + size, stop)] for t in work.samples) for start in range(0, stop, size)]
    return [tuple(t[start : start + size] for t in work.samples) for start in range(0, stop, size)]


def _pieces(work: Work, batches: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """The same samples, as many at once as a backward pass may hold."""
    if not work.prepared.captured.dynamic_batch:
        return list(batches)
    size = backward_batch(work.float_module, BATCH)
    return [piece for batch in batches for piece in zip(*(torch.split(t, size) for t in batch), strict=True)]


def _activations(work: Work) -> dict[str, Contest]:
    """The contests of all groups of activations with more than one candidate."""
    prepared = work.prepared
    found: dict[str, Contest] = {}
    for planned in _linear(prepared.plan.quantized, "activation"):
        quantizer = prepared.quantizers[planned.tensor]
        if planned.group in found or quantizer not in prepared.chosen:
            continue
        seen = work.observer(planned.group).seen_as(quantizer.spec)
        ranges = seen.ranges().values() if isinstance(seen, MultiObserver) else [seen.range()]
        found[planned.group] = _contest(quantizer, prepared.chosen[quantizer], ranges)
    return {group: contest for group, contest in found.items() if len(contest.candidates) > 1}


def _weights(work: Work) -> dict[str, Contest]:
    """The contests of all weights with more than one candidate. Those that are rounded already keep the scale that this was for."""
    prepared = work.prepared
    found: dict[str, Contest] = {}
    for planned in _linear(prepared.plan.quantized, "weight"):
        quantizer = prepared.quantizers[planned.tensor]
        weight = query.parameter(work.float_module, planned.tensor).detach()
        if torch.equal(weight, query.parameter(prepared.module, planned.tensor)):
            now = prepared.chosen[quantizer]
            rows = as_rows(weight, quantizer.spec.axis)
            found[planned.tensor] = _contest(quantizer, now, _scaled(quantizer, now, *finite_minmax(rows, planned.tensor)))
    return {tensor: contest for tensor, contest in found.items() if len(contest.candidates) > 1}


def _linear(planned: Iterable[TensorPlan], role: str) -> Iterable[TensorPlan]:
    return (one for one in planned if one.role == role and one.spec is not None and one.spec.linear)


def _scaled(quantizer: Quantizer, now: Numbers, low: Tensor, high: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The full range, and the present one times FACTORS."""
    spec, (scale, zero_point) = quantizer.spec, now
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    first, last = ((code - zero_point) * scale.double() for code in (spec.qmin, spec.qmax))
    if spec.symmetric:  # the code that only one side has is no part of the range
        low, high, first = -torch.maximum(-low, high), torch.maximum(-low, high), -last
    return [(low, high), *((torch.maximum(first * factor, low), torch.minimum(last * factor, high)) for factor in FACTORS)]


def _contest(quantizer: Quantizer, now: Numbers, ranges: Iterable[tuple[Tensor, Tensor]]) -> Contest:
    """The encoding `now`, and those of `ranges` or the neighbours of a power of two, without doublets."""
    if quantizer.spec.grid == "power_of_two":
        # with the same zero point, a grid twice or half as wide keeps the share of its codes on either side of 0
        others = [(_octave(now[0] * factor), now[1]) for factor in OCTAVES]
    else:
        others = [arith.choose_scale(low, high, quantizer.spec) for low, high in ranges]
    candidates = [now]
    for scale, zero_point in others:
        if not any(torch.equal(scale, s) and torch.equal(zero_point, z) for s, z in candidates):
            candidates.append((scale, zero_point))
    return Contest(quantizer, candidates)


def _octave(scale: Tensor) -> Tensor:
    return scale.clamp(min=max(float(scale.max()) * arith.DEAD_CHANNEL, arith.MIN_SCALE), max=arith.MAX_POWER)


def gains(module: fx.GraphModule, batches: Sequence[Sequence[Tensor]], seed: int) -> dict[fx.Node, Tensor]:
    """g of every tensor that an output depends on, `[1, ...]`: how much a squared error of each element adds to that of the outputs.

    That of an output counts relative to its energy, so all outputs have the same weight.
    """
    found: dict[fx.Node, Tensor] = {}
    for index, batch in enumerate(batches):
        values = _Differentiable(module, found)
        with torch.enable_grad():
            values.run(*batch)
            random = generator(seed, index)
            outputs = [made for node in query.outputs(module.graph) if (made := values.outputs.get(node)) is not None]
            signs = [torch.randint(0, 2, z.shape, generator=random) * 2.0 - 1 for z in outputs]
            sizes = [z.detach().norm().clamp(min=1e-30) / math.sqrt(z.shape[0] if z.dim() else 1) for z in outputs]
            total = torch.stack([(z * v).sum() / size for z, v, size in zip(outputs, signs, sizes, strict=True)]).sum()
        torch.autograd.grad(total, values.starts, allow_unused=True)
    samples = sum(len(batch[0]) for batch in batches)
    return {node: gain / samples**2 for node, gain in found.items()}


class _Differentiable(fx.Interpreter):
    """Adds up the squared gradients of all float tensors of a graph as a backward pass comes by, so that it holds none of them."""

    def __init__(self, module: fx.GraphModule, found: dict[fx.Node, Tensor]):
        super().__init__(module)
        self.starts: list[Tensor] = []
        """The tensors that follow from no other; parameters have no gradients here."""
        self.outputs: dict[fx.Node, Tensor] = {}
        self._found = found
        self._wanted = set(query.outputs(module.graph))

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if n.op not in ("placeholder", "call_function") or not query.is_float(n):
            return made.detach() if n.op == "get_attr" else made
        if not made.requires_grad:
            made = made.detach().requires_grad_()
            self.starts.append(made)
        made.register_hook(partial(self._add, n))
        if n in self._wanted:
            self.outputs[n] = made
        return made

    def _add(self, node: fx.Node, slope: Tensor) -> None:
        self._found[node] = self._found.get(node, 0) + slope.square().sum(0, keepdim=True)


class _Walk(fx.Interpreter):
    """The float graph, which at each op measures the candidates of what the op reads."""

    def __init__(self, work: Work, activations: dict[str, Contest], weights: dict[str, Contest], gain: Mapping[fx.Node, Tensor]):
        super().__init__(work.float_module)
        self.activations = activations
        self.weights = weights
        self.gain = gain
        self.readings: dict[tuple[str, str], Reading] = {}
        """By the op and what it reads."""
        planned = {one.tensor: one for one in work.prepared.plan.quantized}
        carried = {name: one.group for name, one in planned.items() if not one.observe}
        # what an op only carries through is measured at the readers behind it
        self.edges = {
            (name, reader): one.group
            for name, one in planned.items()
            for reader in one.readers
            if one.group in activations and carried.get(reader) != one.group
        }

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if n.op == "call_function" and query.is_float(n):
            self._measure(n, made)
        elif n.op in ("call_function", "output"):
            for source in self._sources(n):  # n hands on what it reads
                self._compare(n, source.node, self.env[source.node], source, None)
        return made

    def _measure(self, node: fx.Node, made: Tensor) -> None:
        """Add the losses of `node` in this batch, for every candidate of what it reads."""
        sources = self._sources(node)
        parameter = query.argument(node, query.op_of(node).weight)
        tensor = query.tensor_name(parameter) if parameter is not None else ""
        weight = Operand(parameter, tensor, self.weights[tensor]) if parameter is not None and tensor in self.weights else None
        if not sources and weight is None:
            return
        end = _activation_behind(node)
        wanted = self._through(node, end, made)
        for source in sources:
            paired = weight is not None and weight.contest.paired and source.contest.paired
            self._compare(node, end, wanted, source, weight if paired else None)
            weight = None if paired else weight
        if weight is not None:
            self._compare(node, end, wanted, None, weight)

    def _sources(self, node: fx.Node) -> list[Operand]:
        """The tensors that `node` reads that have candidates."""
        groups = {source: self.edges.get((query.tensor_name(source), query.reader_name(node))) for source in node.all_input_nodes}
        return [Operand(source, group, self.activations[group]) for source, group in groups.items() if group is not None]

    def _compare(self, node: fx.Node, end: fx.Node, wanted: Tensor, source: Operand | None, weight: Operand | None) -> None:
        """Compute from `node` to `end` for every candidate of a tensor with every one of a weight, and add up the losses."""
        if end not in self.gain:
            return
        root = self.gain[end].sqrt()
        weights = list(weight.tried(self.env[weight.node])) if weight is not None else [{}]
        channels = len(weight.contest.quantizer.scale) if weight is not None else 1
        losses = []
        for put in source.tried(self.env[source.node]) if source is not None else [{}]:
            for other in weights:
                made = put[end] if end in put else self._again(node, end, put | other)
                losses.append(_squares((made - wanted).mul_(root), channels, query.op_of(node).name))
        loss = torch.stack(losses).view(-1, len(weights), channels)
        names = source.name if source is not None else "", weight.name if weight is not None else ""
        key = query.reader_name(node), query.tensor_name(source.node) if source is not None else ""
        if key in self.readings:
            loss += self.readings[key].loss
        self.readings[key] = Reading(*names, loss)

    def _again(self, node: fx.Node, end: fx.Node, put: Mapping[fx.Node, Tensor]) -> Tensor:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: put.get(n, self.env.get(n)))
        assert callable(node.target)
        return self._through(node, end, node.target(*args, **kwargs))

    def _through(self, node: fx.Node, end: fx.Node, made: Tensor) -> Tensor:
        """What `end` makes of `made`, which `node` has made."""
        if end is node:
            return made
        args, kwargs = fx.map_arg((end.args, end.kwargs), lambda n: made)
        assert callable(end.target)
        behind: Tensor = end.target(*args, **kwargs)
        return behind

    def decide_activations(self, work: Work) -> int:
        """Take the winners; how many are new."""
        losses: dict[str, Tensor] = {}
        for reading in self.readings.values():
            if reading.group:
                loss = reading.loss.amin(1).sum(1, keepdim=True)
                losses[reading.group] = losses[reading.group] + loss if reading.group in losses else loss
        return _take(work, self.activations, losses)

    def decide_weights(self, work: Work) -> int:
        """The same for weights, once activations are decided."""
        losses: dict[str, Tensor] = {}
        for reading in self.readings.values():
            if reading.weight:
                loss = reading.loss[self.activations[reading.group].taken if reading.group else 0]
                losses[reading.weight] = losses[reading.weight] + loss if reading.weight in losses else loss
        return _take(work, self.weights, losses)


def _take(work: Work, contests: Mapping[str, Contest], losses: Mapping[str, Tensor]) -> int:
    winners = {contests[name].quantizer: contests[name].decide(loss) for name, loss in losses.items()}
    taken = {quantizer: numbers for quantizer, numbers in winners.items() if numbers is not None}
    work.prepared.chosen.update(taken)
    return len(taken)


def _activation_behind(node: fx.Node) -> fx.Node:
    """The activation that alone reads `node`; else `node`."""
    for user in list(node.users)[:1]:
        if len(node.users) == 1 and user.op == "call_function" and user.all_input_nodes == [node]:
            op = query.op_of(user)
            return user if op.kind == "activation" and op.name != "softmax" else node
    return node


def _squares(error: Tensor, channels: int, op: str) -> Tensor:
    """The sum of squares for each of the `channels` of the op's weight, float64 `[C]`."""
    squares = error.square_()
    if channels == 1:
        return squares.sum().double().view(1)
    axis = squares.dim() - 1 if op == "linear" else 1
    squares = squares.sum([d for d in range(squares.dim()) if d != axis])
    # the groups of a transposed convolution share the scales of their channels
    return squares.view(-1, channels).sum(0).double()
