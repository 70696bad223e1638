"""Correct biases so that quantized layers make what the float ones do on average (Nagel et al. 2019, section 4.2; Banner et al. 2019).

Quantizing a weight by dW moves the mean of a layer's output by dW E[x], and so does what the layers before have done to its input.
That part of the error is the same for every sample, and a bias takes it away at no cost:

    b' = b - (E[y'] - E[y]),      y = W x + b,      y' = Q(W) x' + Q(b)

with means over samples and positions. How they are found is the option `statistics`:

data         From samples, layer by layer in graph order. Two flows, of the float graph and of the simulation, give y and y'; x' has the
             corrections of all layers before. What goes on behind the layer is y' with the new bias as it will be rounded.
batch_norm   From what batch norms knew of their outputs, without samples: they are taken as N(mean, std^2) in every channel, from which
             E[x] follows behind ReLU, and through all that only moves, averages or adds. Then E[y'] - E[y] = dW E[x], computed as the
             layer on the constant E[x], so with its padding. Layers behind anything else are left as they are.

For y ~ N(m, s^2) clipped to [0, u], with t(z) = z Phi(z) + phi(z), the mean of max(z', 0) for z' ~ N(z, 1) (Phi and phi are the normal
distribution and density):

    E[clip(y)] = s t(m / s) - s t((m - u) / s)

Worked: half of N(0, 1) lies below 0, and the mean of the rest is phi(0) = 0.3989; beyond 1 lies 0.0833 of that:

>>> normal = Moments(torch.zeros(1), torch.ones(1))
>>> [round(clipped(normal, top).mean.item(), 4) for top in (math.inf, 1.0)]
[0.3989, 0.3156]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qdeploy.core.errors import unknown_name
from qdeploy.core.ops import MEAN_POOL
from qdeploy.graph import query
from qdeploy.numerics import arith
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.recipes.step import Declined, Step, Work, count, step
from qdeploy.simulation.insert import on_lattice

STATISTICS = ("data", "batch_norm")
LINEAR = MEAN_POOL | {"add", "sub"}
"""Ops that make of means the mean of what they make, besides those that move."""
OCTAVES = (0.5, 2.0)


@step("bias_correction")
class BiasCorrection(Step):
    """Corrects the bias of every layer by statistics of `samples` samples ("data") or of batch norms ("batch_norm")."""

    needs_biases = True

    def __init__(self, samples: int = 128, statistics: str = "data"):
        self.samples = count("samples of step 'bias_correction'", samples)
        if statistics not in STATISTICS:
            raise unknown_name("statistics of step 'bias_correction':", str(statistics), STATISTICS)
        self.statistics = statistics

    def run(self, work: Work) -> str:
        layers = [node for node in work.float_module.graph.nodes if _is_layer(node)]
        done = _by_data(work, layers, self.samples) if self.statistics == "data" else _by_batch_norms(work, layers)
        work.make_consistent()
        return f"{done} biases corrected" + (f", {len(layers) - done} left as they are" if done < len(layers) else "")


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each element of a tensor over samples; the variance is None where it does not follow."""

    mean: Tensor
    variance: Tensor | None = None


def clipped(normal: Moments, top: float = math.inf) -> Moments:
    """Moments of normal values clipped to [0, `top`]; they must have a variance."""
    assert normal.variance is not None
    mean, square = _above(normal.mean, normal.variance, 0.0)
    if top < math.inf:
        excess, excess_square = _above(normal.mean, normal.variance, top)
        # where y > u, y^2 is more than u^2 by (y - u)^2 + 2 u (y - u)
        mean, square = mean - excess, square - excess_square - 2 * top * excess
    return Moments(mean, (square - mean * mean).clamp(min=0))


def _above(mean: Tensor, variance: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The first two moments of max(y - floor, 0) for normal y."""
    deviation = variance.sqrt().clamp(min=1e-30)
    distance = mean - floor
    z = distance / deviation
    inside = torch.special.ndtr(z)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    first = distance * inside + deviation * density
    return first, (distance * distance + variance) * inside + distance * deviation * density


def _is_layer(node: fx.Node) -> bool:
    """Whether `node` is a layer whose weight and bias are parameters."""
    if node.op != "call_function":
        return False
    op = query.op_of(node)
    return all((found := query.argument(node, place)) is not None and found.op == "get_attr" for place in (op.weight, op.bias))


def _by_data(work: Work, layers: list[fx.Node], samples: int) -> int:
    """Correct all layers in graph order by what both graphs make of samples; how many."""
    exact, quantized = work.flow(work.float_module, samples), work.flow(work.prepared.module, samples)
    for done, layer in enumerate(layers):
        twin = quantized.node(query.tensor_name(layer))
        exact.through(layer)
        quantized.through(twin)
        shift = _channel_means(layer, quantized[twin]) - _channel_means(layer, exact[layer])
        change = correct(work, layer, -shift, rounded=True)
        quantized[twin].add_(change.view([-1 if d == _channel_axis(layer) else 1 for d in range(quantized[twin].dim())]))
        work.progress(query.tensor_name(layer), done + 1, len(layers))
    return len(layers)


def _by_batch_norms(work: Work, layers: list[fx.Node]) -> int:
    """Correct the layers whose mean input follows from the statistics of batch norms; how many."""
    if not any("statistics" in layer.meta for layer in layers):
        raise Declined("no layer has a batch norm folded into it")
    known = propagate(work.float_module)
    done = 0
    for layer in layers:
        entering = known.get(layer.all_input_nodes[0])
        if entering is not None:
            correct(work, layer, -mean_shift(work, layer, entering.mean), rounded=False)
            done += 1
    return done


def mean_shift(work: Work, layer: fx.Node, entering: Tensor) -> Tensor:
    """How far a quantized weight moves the mean output of `layer`, float64 `[C]`, for the mean `entering` `[1, ...]` of its input."""
    op = query.op_of(layer)
    weight, bias = query.argument(layer, op.weight), query.argument(layer, op.bias)
    assert weight is not None and bias is not None and callable(layer.target)
    path = query.tensor_name(weight)
    simulated = query.parameter(work.prepared.module, path).detach()
    quantizer = work.prepared.quantizers.get(path)
    if quantizer is not None:
        simulated = arith.fake_quantize(simulated, quantizer.scale, quantizer.zero_point, quantizer.spec)
    exact = query.parameter(work.float_module, path).detach()
    put = {
        layer.all_input_nodes[0]: entering.double(),
        weight: simulated.double() - exact.double(),
        bias: torch.zeros_like(query.parameter(work.float_module, query.tensor_name(bias)), dtype=torch.float64),
    }
    args, kwargs = fx.map_arg((layer.args, layer.kwargs), put.__getitem__)
    with torch.no_grad():
        return _channel_means(layer, layer.target(*args, **kwargs))


def correct(work: Work, layer: fx.Node, change: Tensor, rounded: bool) -> Tensor:
    """Add `change` `[C]` to the bias of `layer`, as it is `rounded` or in float; by how much the rounded one has moved, float32 `[C]`.

    `work.make_consistent()` then makes the other numbers fit.
    """
    prepared = work.prepared
    bias = query.argument(layer, query.op_of(layer).bias)
    assert bias is not None
    path = query.tensor_name(bias)
    parameter = query.parameter(prepared.module, path)
    quantizer = prepared.quantizers.get(path)
    with torch.no_grad():
        before = _rounded(work, path)
        start = before if rounded else prepared.biases.get(path, parameter)
        parameter.copy_(start + change)
        if path in prepared.biases:
            prepared.biases[path] = parameter.detach().clone()
        elif quantizer is not None:
            prepared.chosen[quantizer] = _refit(quantizer, parameter)
            quantizer.set(*prepared.chosen[quantizer])
        return _rounded(work, path) - before


def _rounded(work: Work, path: str) -> Tensor:
    """What the simulation adds once its numbers are settled."""
    one = work.prepared
    bias = query.parameter(one.module, path).detach()
    quantizer = one.quantizers.get(path)
    if quantizer is not None:
        return arith.fake_quantize(bias, quantizer.scale, quantizer.zero_point, quantizer.spec)
    following = one.following.get(path)
    return on_lattice(bias, following, one.quantizers) if following is not None else bias.clone()


def _refit(quantizer: Quantizer, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The encoding for a changed bias with a range of its own: the present one unless another has less error."""
    spec, now = quantizer.spec, (quantizer.scale, quantizer.zero_point)
    if not spec.linear:
        return now
    low, high = (v.view(1) for v in torch.aminmax(bias.detach()))
    candidates = [now, arith.choose_scale(low, high, spec)]
    if spec.grid == "power_of_two":
        candidates += [(now[0] * factor, now[1]) for factor in OCTAVES]
    errors = [float((arith.fake_quantize(bias.detach(), *numbers, spec) - bias).square().sum()) for numbers in candidates]
    return candidates[errors.index(min(errors))]


def _channel_axis(layer: fx.Node) -> int:
    """That of the output."""
    made = query.value(layer)
    assert isinstance(made, Tensor)
    return made.dim() - 1 if query.op_of(layer).name == "linear" else 1


def _channel_means(layer: fx.Node, made: Tensor) -> Tensor:
    """Means of what `layer` has made over samples and positions, float64 `[C]`."""
    axis = _channel_axis(layer)
    inner = [d for d in range(1, made.dim()) if d != axis]
    # sums over positions are short enough for float32
    return (made.mean(inner) if inner else made).mean(0, dtype=torch.float64)


def propagate(module: fx.GraphModule) -> dict[fx.Node, Moments]:
    """Moments of the float tensors that follow from the statistics of batch norms, float64 `[1, ...]`; inputs count as N(0, 1)."""
    reach = _Propagation(module)
    with torch.no_grad():
        for node in module.graph.nodes:
            reach.visit(node)
    return {node: Moments(mean, reach.variances.get(node)) for node, mean in reach.means.items() if query.is_float(node)}


class _Propagation:
    """Means, and variances where they follow; sizes and tuples of parts stand in both.

    Tensors that are added are taken as independent, and their sum as normal where it is clipped.
    """

    def __init__(self, module: fx.GraphModule):
        self.module = module
        self.means: dict[fx.Node, Any] = {}
        self.variances: dict[fx.Node, Any] = {}

    def visit(self, node: fx.Node) -> None:
        """Find those of `node`, after all that it reads."""
        if node.op == "placeholder" and query.is_float(node):
            self.means[node] = torch.zeros(_shape(node), dtype=torch.float64)
            self.variances[node] = torch.ones_like(self.means[node])
        elif node.op == "get_attr" and query.is_float(node):
            self.means[node] = query.parameter(self.module, str(node.target)).detach().double()
            self.variances[node] = torch.zeros_like(self.means[node])
        elif "statistics" in node.meta:
            view = [-1 if d == _channel_axis(node) else 1 for d in range(len(_shape(node)))]
            mean, deviation = (v.double().view(view).expand(_shape(node)) for v in node.meta["statistics"])
            self.means[node], self.variances[node] = mean, deviation.square()
        elif node.op == "call_function" and all(source in self.means for source in node.all_input_nodes):
            self._call(node)

    def _call(self, node: fx.Node) -> None:
        op, made = query.op_of(node), query.value(node)
        sources = node.all_input_nodes
        certain = all(source in self.variances for source in sources)
        if op.name in ("relu", "relu6") and certain:
            entering = Moments(self.means[sources[0]], self.variances[sources[0]])
            leaving = clipped(entering, 6.0 if op.name == "relu6" else math.inf)
            self.means[node], self.variances[node] = leaving.mean, leaving.variance
        elif op.kind == "move" or not isinstance(made, Tensor | tuple | list):
            self.means[node] = _run(node, self.means)
            if certain and not (op.name == "pad" and any(isinstance(a, int | float) and a for a in node.args[2:])):
                self.variances[node] = _run(node, self.variances)
        elif op.name in LINEAR:
            self.means[node] = _run(node, self.means)
            terms = [a for a in node.args[:2] if isinstance(a, fx.Node)]
            if op.name in ("add", "sub") and certain and len(set(terms)) == len(terms) and not node.kwargs:
                self.variances[node] = sum(self.variances[a] for a in terms) + torch.zeros_like(self.means[node])


def _run(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    assert callable(node.target)
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)


def _shape(node: fx.Node) -> list[int]:
    """That of what `node` makes of one sample, or of a batch whose size is fixed."""
    made = query.value(node)
    assert isinstance(made, Tensor)
    return [size if isinstance(size, int) else 1 for size in made.shape]
