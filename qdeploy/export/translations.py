"""Ops that torch's exporter would spell with several ONNX nodes, though ONNX has one: what lies inside would have no encoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnxscript
import torch
from torch import fx

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
    return made


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
