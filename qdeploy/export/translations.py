"""Ops that torch's exporter would spell with several ONNX nodes, though ONNX has one: what lies inside would have no encoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnxscript
import torch
from torch import Tensor, fx

from qdeploy.capture.data_movement import each_side, last_border
from qdeploy.graph import query

op: Any = onnxscript.opset21
LINEAR = 15.0
"""From here on softplus(x) is x to float32's precision, so that a threshold above it changes nothing."""


def table(module: fx.GraphModule) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations for the exporter of the ops in `module`."""
    made: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.softplus.default: _softplus,
        torch.ops.aten.squeeze.dims: _squeeze,
    }
    pools = [n for n in module.graph.nodes if str(n.target) == "aten.adaptive_avg_pool2d.default"]
    if pools and all(list(n.args[1]) == [1, 1] for n in pools):
        made[torch.ops.aten.adaptive_avg_pool2d.default] = _global_average_pool
    for sides in (1, 2, 3):
        for kind, translate in (("max", _max_pool), ("avg", _avg_pool)):
            target = getattr(torch.ops.aten, f"{kind}_pool{sides}d").default
            if any(node.target is target and _ends_early(node, sides) for node in module.graph.nodes):
                made[target] = translate(sides)
    return made


def _ends_early(pool: fx.Node, sides: int) -> bool:
    """Whether torch leaves out a window that would start behind the side: in ONNX, it depends on the runtime whether it is there."""
    before, after = (query.value(node) for node in (pool.all_input_nodes[0], pool))
    average = "avg" in str(pool.target)
    named = ("kernel", "stride", "padding", "ceil") if average else ("kernel", "stride", "padding", "dilation", "ceil")
    given = dict(zip(named, pool.args[1:], strict=False))
    if not given.pop("ceil", False) or not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    window = _Window(sides, **given)
    lengths = zip(before.shape[-sides:], after.shape[-sides:], window.spans, window.stride, window.padding, strict=True)
    return any(isinstance(b, int) and -(-(b + 2 * p - k) // s) + 1 != a for b, a, k, s, p in lengths)


class _Window:
    """The arguments of a pooling, a number for every side."""

    def __init__(self, sides: int, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1):
        given = kernel, stride or kernel, padding, dilation
        self.kernel, self.stride, self.padding, self.dilation = (each_side(numbers, sides) for numbers in given)
        self.spans = [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilation, strict=True)]

    def attributes(self, x: Any, ceil_mode: bool) -> dict[str, Any]:
        """Those of ONNX, over `x`: where its sides are known, with as much border at each end as the windows take."""
        sizes = list(x.shape)[-len(self.kernel) :]
        ends, known = self.padding, all(isinstance(size, int) for size in sizes)
        if ceil_mode and known:
            ends = [last_border(*side) for side in zip(sizes, self.spans, self.stride, self.padding, strict=True)]
        return {
            "kernel_shape": self.kernel,
            "strides": self.stride,
            "pads": [*self.padding, *ends],
            "ceil_mode": int(ceil_mode and not known),
        }


def _max_pool(sides: int) -> Callable[..., Any]:
    """Nothing is rounded up, so no window is left out: what is behind the side is no maximum."""

    def pool(x: Any, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False) -> Any:
        window = _Window(sides, kernel_size, stride, padding, dilation)
        made, _ = op.MaxPool(x, dilations=window.dilation, **window.attributes(x, ceil_mode))
        return made

    return pool


def _avg_pool(sides: int) -> Callable[..., Any]:
    """The same of averages of what is inside; `data_movement` leaves no others that are rounded up."""

    def pool(
        x: Any,
        kernel_size: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        window = _Window(sides, kernel_size, stride, padding)
        inside = ceil_mode and not count_include_pad
        return op.AveragePool(x, count_include_pad=int(count_include_pad), **window.attributes(x, inside))

    return pool


def _global_average_pool(x: Any, output_size: Any) -> Any:
    return op.GlobalAveragePool(x)


def _squeeze(x: Any, dim: Sequence[int]) -> Any:
    """Of several axes at once; those that are longer than 1 stay, as in torch."""
    sizes = x.shape
    axes = sorted({axis % len(sizes) for axis in dim if sizes[axis] == 1})
    return op.Squeeze(x, op.Constant(value_ints=axes)) if axes else op.Identity(x)


def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    if beta == 1 and threshold >= LINEAR:
        return op.Softplus(x)
    scaled = op.Mul(x, op.CastLike(beta, x))
    smooth = op.Div(op.Softplus(scaled), op.CastLike(beta, x))
    return op.Where(op.Greater(scaled, op.CastLike(threshold, x)), x, smooth)
