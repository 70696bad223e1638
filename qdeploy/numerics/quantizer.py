"""The one module in a prepared graph: it fake-quantizes, or lets its input pass.

All tensors that share an encoding share one `Quantizer`, which the graph then calls at several places. The gradient passes straight
through where a value is not clipped (Bengio et al. 2013), so that a prepared model can be trained.

Average pooling on a target that multiplies and shifts: with an input of step s_x averaged over n elements, and m / 2^k for 1 / n,
the sum of codes is recovered exactly, round(x * n / s_x), and what leaves is that times s_x * m / 2^k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qdeploy.core.spec import Encoding, QuantSpec, Role
from qdeploy.numerics import arith

Mode = Literal["float", "quantize"]
Average = tuple[float, float]
"""`(n / s_x, s_x * m / 2^k)` above; both are exact in float32, since s_x is a power of two."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
        ctx.save_for_backward(~arith.saturated(x, scale, zero_point, spec))
        return arith.fake_quantize(x, scale, zero_point, spec)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


class Quantizer(nn.Module):
    """One encoding at work. `mode` is set by the `Prepared` that owns it; `scale` `[C]` and `zero_point` `[C]` once frozen."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, role: Role):
        super().__init__()
        self.spec = spec
        self.role = role
        self.mode: Mode = "float"
        self.averages: dict[str, Average] = {}
        """For the tensors that are made by such a pooling."""
        self.learned: Callable[[Tensor], Tensor] | None = None
        """What takes the place of fake-quantization while numbers are learned."""
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0, dtype=torch.int64))

    def forward(self, x: Tensor, tensor: str) -> Tensor:
        """`x`, the tensor called `tensor`, quantized and dequantized in mode `quantize`."""
        if self.mode != "quantize":
            return x
        if tensor in self.averages:
            units, step = self.averages[tensor]
            x = x + (torch.round(x * units) * step - x).detach() if x.requires_grad else torch.round(x * units) * step
        return self.quantize(x) if self.learned is None else self.learned(x)

    def quantize(self, x: Tensor) -> Tensor:
        """`x` quantized and dequantized."""
        if x.requires_grad and torch.is_grad_enabled():
            result: Tensor = _StraightThrough.apply(x, self.scale, self.zero_point, self.spec)  # type: ignore[no-untyped-call]
            return result
        return arith.fake_quantize(x, self.scale, self.zero_point, self.spec)

    def set(self, scale: Tensor, zero_point: Tensor) -> None:
        """Use these numbers from now on."""
        self.scale, self.zero_point = scale.float(), zero_point.to(torch.int64)

    def encoding(self, tensor: str) -> Encoding:
        """The `Encoding` of `tensor`, one of those that this quantizer serves."""
        return Encoding(
            tensor=tensor,
            role=self.role,
            spec=self.spec,
            scale=self.scale.detach().cpu().numpy(),
            zero_point=self.zero_point.cpu().numpy(),
        )
