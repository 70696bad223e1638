"""Choose scales so that no runtime can round differently: what makes the simulated codes the deployed codes, bit for bit.

A layer's output code is round(v), v = acc * M, with an integer accumulator acc and the ratio M = s_x s_w / s_y. Runtimes compute
v in different orders, with errors of 1e-6 to 1e-5; whenever v lies that close to k + 1/2, one of them rounds the other way, and a
single such code changes thousands further down. But acc is an integer: if M = p / D with D odd, then v is a multiple of 1/D, k + 1/2
is not, and so v is at least 1/(2 D) away from every tie. Such an M lies close above any ratio: `tie_free` finds the one with the
smallest D within 1 + WIDEN, typically D = 1000 to 5000. So every layer's weight scales grow by less than 0.2 % (the codes are
rounded anew for it), and the margin is 1e-4 of a step, ten times what any float kernel errs.

Where there are no weights to adjust, the output scale grows: for pooling and products, M is a single ratio as well; for a sum the
widening is taken that keeps the largest distance over all 65 536 pairs of codes.

>>> tie_free(0.0123)                    # 4/325; 1/81 is 0.4 % above, and the fractions between them have larger denominators
(0.012307692307692308, 325)
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, fx

from qdeploy import graph
from qdeploy.ops import MEAN_POOL
from qdeploy.plan import Plan
from qdeploy.quantizer import Quantizer

WIDEN = 2.0**-9
"""How much a scale may grow, as a share of it: 0.017 dB of SQNR."""
_LARGEST = 2**17
"""Odd denominators beyond this keep a margin below the error of float kernels and are not worth a change."""
_CANDIDATES = 64


def tie_free(ratio: float) -> tuple[float, int]:
    """The fraction p / D with the smallest odd D in [ratio, ratio * (1 + WIDEN)], and D; `(ratio, 0)` where D would be too large."""
    start, stop = 1, 4096
    while start < _LARGEST:
        denominators = np.arange(start | 1, stop, 2, dtype=np.int64)
        numerators = np.ceil(ratio * denominators)
        fits = (numerators <= ratio * (1 + WIDEN) * denominators) & (numerators > 0)
        if fits.any():
            first = int(fits.argmax())
            return float(numerators[first] / denominators[first]), int(denominators[first])
        start, stop = stop, stop * 4
    return ratio, 0


def avoid_ties(module: fx.GraphModule, plan: Plan, serving: dict[str, Quantizer]) -> int:
    """Widen scales of a calibrated graph, outputs of sums, products and pools first, then weights. Returns how many grew."""
    producers: dict[str, int] = {}
    for planned in plan.quantized:
        producers[planned.group] = producers.get(planned.group, 0) + planned.observe
    alone = {planned.tensor for planned in plan.quantized if planned.observe and producers[planned.group] == 1}
    calls = [n for n in module.graph.nodes if n.op == "call_module" and n.args[1] in serving]
    count = 0
    for call in calls:
        if call.args[1] in alone:
            count += _widen_output(module, call, serving[call.args[1]])
    done: set[Quantizer] = set()
    for call in calls:
        count += _widen_weights(module, call, serving[call.args[1]], done)
    return count


def _origin(call: fx.Node) -> fx.Node:
    """The op that makes the tensor of a quantizer call, before a ReLU that is fused with it: where v is rounded, if not clipped."""
    node = call.args[0]
    assert isinstance(node, fx.Node)
    if node.op == "call_function" and graph.op_of(node).name in ("relu", "relu6"):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return node if source.op == "call_module" else source
    return node


def _quantizer(module: fx.GraphModule, node: object) -> Quantizer | None:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    found = module.get_submodule(str(node.target))
    return found if isinstance(found, Quantizer) else None


def _widen_weights(module: fx.GraphModule, call: fx.Node, output: Quantizer, done: set[Quantizer]) -> int:
    """Widen the weight scales of the layer whose output `call` quantizes, unless `done`: a shared weight serves its first layer."""
    layer = _origin(call)
    if layer.op != "call_function" or graph.op_of(layer).weight is None:
        return 0
    source = _quantizer(module, layer.args[0])
    weight = _quantizer(module, graph.argument(layer, graph.op_of(layer).weight))
    if source is None or weight is None or weight.role != "weight" or source.spec.axis is not None or weight in done:
        return 0
    done.add(weight)
    step = float(source.scale) / float(output.scale)
    ratios = [tie_free(float(s) * step)[0] / step for s in weight.scale]
    weight.set(torch.tensor(ratios, dtype=torch.float64), weight.zero_point)
    return 1


def _widen_output(module: fx.GraphModule, call: fx.Node, output: Quantizer) -> int:
    node = _origin(call)
    if node.op != "call_function":
        return 0
    name = graph.op_of(node).name
    sources = [_quantizer(module, n) for n in node.all_input_nodes]
    if any(s is None or s.spec.axis is not None for s in sources) or not 1 <= len(sources) <= 2:
        return 0
    scales = [float(s.scale) for s in sources if s is not None]
    old = float(output.scale)
    if name in ("add", "sub") and len(sources) == 2:
        if max(s.spec.bits for s in sources if s is not None) > 8:
            return 0
        new = _sum_scale(sources, old, 1 if name == "add" else -1)  # type: ignore[arg-type]
    elif name == "mul" and len(sources) == 2:
        new = _ratio_scale(scales[0] * scales[1], old)
    elif name in MEAN_POOL and len(sources) == 1 and (count := _pooled(node)):
        new = _ratio_scale(scales[0] / count, old)
    elif name in ("relu", "relu6") and len(sources) == 1 and sources[0] is not output:
        new = _ratio_scale(scales[0], old)
    else:
        return 0
    output.set(torch.tensor([new], dtype=torch.float64), output.zero_point)
    return 1


def _ratio_scale(accumulator: float, scale: float) -> float:
    """The output scale near above `scale` whose ratio to the accumulator's step is free of ties: 1/M grows, so M is sought below."""
    ratio, _ = tie_free(accumulator / (scale * (1 + WIDEN)))
    return accumulator / ratio


def _sum_scale(sources: list[Quantizer], scale: float, sign: int) -> float:
    """The output scale in [scale, scale * (1 + WIDEN)] that keeps all sums of two codes farthest from ties."""
    steps = []
    for quantizer in sources:
        spec, zero = quantizer.spec, int(quantizer.zero_point)
        steps.append(np.arange(spec.qmin - zero, spec.qmax - zero + 1) * float(quantizer.scale))
    sums = np.add.outer(steps[0], sign * steps[1]).ravel()
    best, best_distance = scale, -1.0
    for candidate in range(_CANDIDATES):
        # scales are stored in float32, so the candidate is judged as it will be stored
        tried = float(np.float32(scale * (1 + WIDEN * candidate / _CANDIDATES)))
        v = sums / tried
        distance = float(np.abs(v - np.floor(v) - 0.5).min())
        if distance > best_distance:
            best, best_distance = tried, distance
    return best


def _pooled(node: fx.Node) -> int:
    """How many elements an average takes together; 0 where that is not fixed."""
    made = [graph.value(n) for n in (node.all_input_nodes[0], node)]
    sizes = [t.shape if isinstance(t, Tensor) else () for t in made]
    if graph.op_of(node).name.startswith("avg_pool"):
        kernel = node.args[1]
        padded = len(node.args) > 3 and any(node.args[3])  # type: ignore[arg-type]
        return 0 if padded else math.prod(kernel)  # type: ignore[arg-type]
    if not all(isinstance(size, int) for shape in sizes for size in shape[1:]):
        return 0
    before, after = (math.prod(int(size) for size in shape[1:]) for shape in sizes)
    return before // after if after and before % after == 0 else 0
