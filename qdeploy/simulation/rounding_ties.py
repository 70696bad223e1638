"""Choose scales so that no runtime can round differently: what makes the simulated codes the deployed codes, bit for bit.

A layer's output code is round(v), v = acc * M, with an integer accumulator acc and the ratio M = s_x s_w / s_y. Runtimes compute
v in different orders, with errors of 1e-6 to 1e-5; whenever v lies that close to k + 1/2, one of them rounds the other way, and a
single such code changes thousands further down. But acc is an integer: if M = p / D with D odd, then v is a multiple of 1/D, k + 1/2
is not, and so v is at least 1/(2 D) away from every tie. Such an M lies close above any ratio: `tie_free` finds the one with the
smallest D within 1 + WIDEN, typically D = 1000 to 5000. So every layer's weight scales grow by less than 0.2 % (the codes are
rounded anew for it), and the margin is 1e-4 of a step, ten times what any float kernel errs.

Powers of two need none of this: their accumulators are exact in float32, and ties are rounded alike everywhere.

Where there are no weights to adjust, the output scale grows: for pooling and products, M is a single ratio as well; for a sum the
widening is taken that keeps the largest distance over all 65 536 pairs of codes. Where a target adds a skip branch inside a layer,
v = acc * M + q * s_skip / s_y, and all channels and the skip get fractions of one common D; their numerators are small, so these
weight scales may grow by FUSED_WIDEN and keep a smaller margin.

An average of n elements that keeps the scale of its input has M = 1 / n, whose ties for an even n cannot be avoided. There the scale
gets a mantissa of SHORT bits: sums of up to 64 codes of 8 bits are then exact in float32, so that a tie is one for every runtime.

>>> tie_free(0.0123)                    # 4/325; 1/81 is 0.4 % above, and the fractions between them have larger denominators
(0.012307692307692308, 325)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from qdeploy.core.ops import MEAN_POOL
from qdeploy.graph import query
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.simulation.plan import Plan

WIDEN = 2.0**-9
"""How much a scale may grow, as a share of it: 0.017 dB of SQNR."""
FUSED_WIDEN = 2.0**-4
"""The same for the weights of a layer with a fused residual add: 0.5 dB at the most, half of that on average."""
SHORT = 10
"""Bits of a scale that an average shares with its input; it grows by 2^-9 of itself at the most."""
_LARGEST = 2**17
"""Odd denominators beyond this keep a margin below the error of float kernels and are not worth a change."""
_BLOCKS = (1, 9, 129, 2049, 32769)
"""Numerators are tried in these blocks, each only for the ratios that are still open."""
_CANDIDATES = 16
_WIDEST = 8
"""Bits beyond which float32 accumulators err by more than a margin can be, and tables of code pairs grow large."""


def tie_free(ratio: float) -> tuple[float, int]:
    """The fraction p / D with the smallest odd D in [ratio, ratio * (1 + WIDEN)], and D; `(ratio, 0)` where D would be too large."""
    fractions, denominators = tie_free_all(np.array([ratio]))
    return float(fractions[0]), int(denominators[0])


def tie_free_all(ratios: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """`tie_free` of many ratios `[C]`: fractions `[C]` and denominators `[C]`."""
    fractions, found = ratios.copy(), np.zeros(len(ratios), dtype=np.int64)
    for start, stop in pairwise(_BLOCKS):
        # p fits with the D in [p / (ratio * (1 + WIDEN)), p / ratio]; both ends grow with p, so the first p with an odd D has the least
        rows = np.flatnonzero((found == 0) & (start / ratios < _LARGEST))
        numerators = np.arange(start, stop, dtype=np.int64)
        denominators = np.ceil(numerators / (ratios[rows, None] * (1 + WIDEN))).astype(np.int64) | 1
        fits = denominators * ratios[rows, None] <= numerators
        first = fits.argmax(1)
        which = np.flatnonzero(fits.any(1) & (denominators[np.arange(len(rows)), first] <= _LARGEST))
        found[rows[which]] = denominators[which, first[which]]
        fractions[rows[which]] = numerators[first[which]] / found[rows[which]]
    return fractions, found


def avoid_ties(module: fx.GraphModule, plan: Plan, serving: dict[str, Quantizer]) -> int:
    """Widen scales of a calibrated graph, outputs of sums, products and pools first, then weights. Returns how many grew."""
    producers: dict[str, int] = {}
    for planned in plan.quantized:
        producers[planned.group] = producers.get(planned.group, 0) + planned.observe
    alone = {planned.tensor for planned in plan.quantized if planned.observe and producers[planned.group] == 1}
    calls = [n for n in module.graph.nodes if n.op == "call_module" and n.args[1] in serving and _adjustable(serving[n.args[1]])]
    averaged = {serving[planned.tensor] for planned in plan.quantized if not planned.observe and planned.op in MEAN_POOL}
    for quantizer in averaged:
        if _adjustable(quantizer):
            quantizer.set(torch.tensor([_shorten(float(quantizer.scale))], dtype=torch.float64), quantizer.zero_point)
    count = 0
    fused: dict[fx.Node, int] = {}
    for call in calls:
        if call.args[1] in alone and (denominator := _fused_denominator(module, call, serving[call.args[1]])):
            fused[call] = denominator
            count += 1
        elif call.args[1] in alone:
            output = serving[call.args[1]]
            count += _widen_output(module, call, output, _shorten if output in averaged else _stored)
    done: set[Quantizer] = set()
    for call in calls:
        count += _widen_weights(module, call, serving[call.args[1]], done, fused.get(call, 0))
    return count


def _origin(call: fx.Node) -> fx.Node:
    """The op that makes the tensor of a quantizer call, before a ReLU that is fused with it: where v is rounded, if not clipped."""
    node = call.args[0]
    assert isinstance(node, fx.Node)
    if node.op == "call_function" and query.op_of(node).name in ("relu", "relu6"):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return node if source.op == "call_module" else source
    return node


def _quantizer(module: fx.GraphModule, node: object) -> Quantizer | None:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    found = module.get_submodule(str(node.target))
    return found if isinstance(found, Quantizer) and _adjustable(found) else None


def _adjustable(quantizer: Quantizer) -> bool:
    """Whether the scale may be any number, and float kernels are exact enough for its codes to care."""
    return quantizer.spec.grid == "uniform" and quantizer.spec.bits <= _WIDEST


def _layer_quantizers(module: fx.GraphModule, layer: fx.Node) -> tuple[Quantizer, Quantizer] | None:
    """The quantizers of a layer's input and weight, where its accumulator has one step a channel."""
    source = _quantizer(module, layer.args[0])
    weight = _quantizer(module, query.argument(layer, query.op_of(layer).weight))
    if source is None or weight is None or weight.role != "weight" or source.spec.axis is not None:
        return None
    return source, weight


def _fused_parts(module: fx.GraphModule, call: fx.Node) -> tuple[Quantizer, fx.Node] | None:
    """The quantizer of the skip branch and the layer, where `call` quantizes their sum and the layer's own output stays float."""
    node = _origin(call)
    if node.op != "call_function" or query.op_of(node).name != "add" or len(node.all_input_nodes) != 2:
        return None
    skip, layer = sorted(node.all_input_nodes, key=lambda n: n.op != "call_module")
    quantizer = _quantizer(module, skip)
    if quantizer is None or layer.op != "call_function" or query.op_of(layer).weight is None:
        return None
    return quantizer, layer


def _fused_denominator(module: fx.GraphModule, call: fx.Node, output: Quantizer) -> int:
    """Make s_skip / s_y a fraction of one D that suits the layer's channels too, by widening s_y; D, or 0 where nothing is fused."""
    parts = _fused_parts(module, call)
    if parts is None:
        return 0
    skip, layer = parts
    quantizers = _layer_quantizers(module, layer)
    if quantizers is None:
        return 0
    source, weight = quantizers
    typical = float(weight.scale.double().median()) * float(source.scale) / float(output.scale)
    denominator = int(min(2 / FUSED_WIDEN / typical, _LARGEST - 1)) | 1
    numerator = math.floor(float(skip.scale) / float(output.scale) * denominator)
    if numerator < 1 / WIDEN:
        return 0
    output.set(torch.tensor([float(skip.scale) * denominator / numerator], dtype=torch.float64), output.zero_point)
    return denominator


def _widen_weights(module: fx.GraphModule, call: fx.Node, output: Quantizer, done: set[Quantizer], fused: int) -> int:
    """Widen the weight scales of the layer whose output `call` quantizes, unless `done`: a shared weight serves its first layer.

    `fused` is the common denominator where the layer's output is quantized after a fused residual add, else 0.
    """
    parts = _fused_parts(module, call) if fused else None
    layer = _origin(call) if parts is None else parts[1]
    if layer.op != "call_function" or query.op_of(layer).weight is None:
        return 0
    quantizers = _layer_quantizers(module, layer)
    if quantizers is None or quantizers[1] in done:
        return 0
    source, weight = quantizers
    done.add(weight)
    step = float(source.scale) / float(output.scale)
    ratios = weight.scale.double().numpy() * step
    widened = _multiples(ratios, fused) if fused else tie_free_all(ratios)[0]
    weight.set(torch.from_numpy(widened / step), weight.zero_point)
    return 1


def _multiples(ratios: NDArray[np.float64], denominator: int) -> NDArray[np.float64]:
    """The next multiples of 1/D from `ratios` up; a ratio itself where that is more than FUSED_WIDEN away."""
    above = np.ceil(ratios * denominator) / denominator
    return np.where(above <= ratios * (1 + FUSED_WIDEN), above, ratios)


def _shorten(scale: float) -> float:
    """The next number from `scale` up with SHORT bits."""
    fraction, exponent = math.frexp(scale)
    return math.ldexp(math.ceil(fraction * 2**SHORT), exponent - SHORT)


def _stored(scale: float) -> float:
    """`scale` as it is stored."""
    return float(np.float32(scale))


def _widen_output(module: fx.GraphModule, call: fx.Node, output: Quantizer, store: Callable[[float], float]) -> int:
    node = _origin(call)
    if node.op != "call_function":
        return 0
    name = query.op_of(node).name
    sources = [_quantizer(module, n) for n in node.all_input_nodes]
    if any(s is None or s.spec.axis is not None for s in sources) or not 1 <= len(sources) <= 2:
        return 0
    scales = [float(s.scale) for s in sources if s is not None]
    old = float(output.scale)
    if name in ("add", "sub") and len(sources) == 2:
        new = _sum_scale(sources, old, 1 if name == "add" else -1, store)  # type: ignore[arg-type]
    elif name == "mul" and len(sources) == 2:
        new = _ratio_scale(scales[0] * scales[1], old)
    elif (kernel := query.pooled(node)) is not None:
        new = _ratio_scale(scales[0] / math.prod(kernel), old)
    elif name in ("relu", "relu6") and len(sources) == 1 and sources[0] is not output:
        new = _ratio_scale(scales[0], old)
    else:
        return 0
    output.set(torch.tensor([store(new)], dtype=torch.float64), output.zero_point)
    return 1


def _ratio_scale(accumulator: float, scale: float) -> float:
    """The output scale near above `scale` whose ratio to the accumulator's step is free of ties: 1/M grows, so M is sought below."""
    ratio, _ = tie_free(accumulator / (scale * (1 + WIDEN)))
    return accumulator / ratio


def _sum_scale(sources: list[Quantizer], scale: float, sign: int, store: Callable[[float], float] = _stored) -> float:
    """The output scale in [scale, scale * (1 + WIDEN)], as `store` makes it, that keeps all sums of two codes farthest from ties."""
    steps = []
    for quantizer in sources:
        spec, zero = quantizer.spec, int(quantizer.zero_point)
        steps.append(np.arange(spec.qmin - zero, spec.qmax - zero + 1) * float(quantizer.scale))
    sums = np.add.outer(steps[0], sign * steps[1]).ravel()
    best, best_distance = scale, -1.0
    for candidate in range(_CANDIDATES):
        tried = store(scale * (1 + WIDEN * candidate / _CANDIDATES))
        v = sums / tried
        distance = float(np.abs(v - np.floor(v) - 0.5).min())
        if distance > best_distance:
            best, best_distance = tried, distance
    return best
