"""The one module in a prepared graph: it observes, fake-quantizes, or lets its input pass.

All tensors that share an encoding share one `Quantizer`, which the graph then calls at several places. In a traced graph the
quantizer is the single op `qdeploy::fake_quantize`, which carries the tensor's name to the emitter.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from qdeploy import arith
from qdeploy.observer import Observer, as_rows, finite_minmax
from qdeploy.spec import Encoding, QuantSpec, Role

Mode = Literal["float", "observe", "quantize"]


def _spec(bits: int, signed: bool, narrow: bool, axis: int, rounding: str) -> QuantSpec:
    return QuantSpec(
        bits=bits,
        signed=signed,
        symmetric=False,
        narrow=narrow,
        axis=None if axis < 0 else axis,
        rounding=rounding,  # type: ignore[arg-type]
    )


@torch.library.custom_op("qdeploy::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, signed: bool, narrow: bool, axis: int, rounding: str, tensor: str
) -> Tensor:
    """`arith.fake_quantize` as an op; `axis` -1 means per-tensor, `tensor` is the name of `x`."""
    return arith.fake_quantize(x, scale, zero_point, _spec(bits, signed, narrow, axis, rounding))


@fake_quantize.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _keep_mask(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, *rest = inputs
    ctx.save_for_backward(~arith.saturated(x, scale, zero_point, _spec(*rest[:5])))


def _straight_through(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (inside,) = ctx.saved_tensors
    return (gradient * inside, *[None] * 8)


fake_quantize.register_autograd(_straight_through, setup_context=_keep_mask)


class Quantizer(nn.Module):
    """One encoding at work. `mode` is set by the `Prepared` that owns it; `scale` `[C]` and `zero_point` `[C]` once frozen."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: QuantSpec, role: Role, observer: Observer | None):
        super().__init__()
        self.spec = spec
        self.role = role
        self.observer = observer
        self.mode: Mode = "float"
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0, dtype=torch.int64))

    def forward(self, x: Tensor, tensor: str, observe: bool = True) -> Tensor:
        """`x`, quantized and dequantized in mode `quantize`; in mode `observe` its statistics are taken first, if `observe`."""
        if self.mode == "observe" and observe and self.observer is not None:
            rows = as_rows(x, self.spec.axis)
            self.observer.update(rows, *finite_minmax(rows, tensor))
        if self.mode != "quantize":
            return x
        s = self.spec
        axis = -1 if s.axis is None else s.axis
        op = torch.ops.qdeploy.fake_quantize
        result: Tensor = op(x, self.scale, self.zero_point, s.bits, s.signed, s.narrow, axis, s.rounding, tensor)
        return result

    def freeze(self) -> None:
        """Turn what was observed into scale and zero_point, and drop the observer."""
        assert self.observer is not None
        self.set(*arith.choose_scale(*self.observer.range(), self.spec))
        self.observer = None

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
