"""The formulas of quantization; every other file calls these and none repeats them.

    q  = clamp(round(x / scale) + zero_point, qmin, qmax)        quantize: round first, then add, as ONNX QuantizeLinear does
    x' = (q - zero_point) * scale                                dequantize

From a range (low, high), first widened to contain 0, so that 0 is exactly a code:

    symmetric:   scale = max(|low|, |high|) / qmax,        zero_point = 0
    asymmetric:  scale = (high - low) / (qmax - qmin),     zero_point = qmin - round(low / scale)

`x / scale` is a float32 division, like in ONNX Runtime; multiplying by 1/scale instead moves some codes by one step. Scales are
chosen in float64, as is the zero_point, and then rounded to float32 once. (Jacob et al. 2018, section 2.)

Worked: the range (-1, 1) on unsigned 8 bits has scale 2/255 and zero_point 128, since -1 lies 127.5 steps below 0:

>>> scale, zero_point = choose_scale(torch.tensor([-1.0]), torch.tensor([1.0]), QuantSpec(signed=False, symmetric=False))
>>> round(scale.item() * 255, 6), zero_point.item()
(2.0, 128)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdeploy.spec import QuantSpec, Rounding

MIN_SCALE = 2.0**-64
"""No scale is smaller: products of two scales, as for a bias, stay normal float32 numbers."""
DEAD_CHANNEL = 2.0**-15
"""A channel's scale is at least this share of the tensor's largest, so that an all-zero channel keeps a usable one."""


def choose_scale(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale (float32 `[C]`) and zero_point (int64 `[C]`) for ranges `low`, `high` `[C]`.

    An all-zero tensor gets the scale of the range (0, 1). Raises ValueError on a range that is not finite.
    """
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("the range is not finite")
    if spec.symmetric:
        scale = torch.maximum(-low, high) / spec.qmax
    else:
        scale = (high - low) / (spec.qmax - spec.qmin)
    largest = scale.max()
    floor = largest * DEAD_CHANNEL if largest > 0 else 1 / (spec.qmax - spec.qmin)
    scale = scale.clamp(min=max(float(floor), MIN_SCALE))
    if spec.symmetric:
        return scale.float(), torch.zeros_like(scale, dtype=torch.int64)
    zero_point = spec.qmin - round_codes(low / scale, spec.rounding)
    return scale.float(), zero_point.clamp(spec.qmin, spec.qmax).to(torch.int64)


def bias_scale(input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """The scale of an int32 bias, float32 `[C]`: the step of the accumulator it is added to."""
    return (input_scale.double() * weight_scale.double()).float()


def weight_scale_for_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """`weight_scale` `[C]`, raised where the bias `[C]` would not fit in int32 at `input_scale * weight_scale`.

    Half of the int32 range is left for the accumulator itself.
    """
    needed = bias.detach().double().abs() / (input_scale.double() * 2.0**30)
    return torch.maximum(weight_scale.double(), needed.expand_as(bias)).float()


def round_codes(x: Tensor, rounding: Rounding) -> Tensor:
    """Round to integers, exact halves to the even neighbour or away from zero.

    >>> [round_codes(torch.tensor([0.5, 1.5, -0.5, -2.5]), r).tolist() for r in ("half_even", "half_away")]
    [[0.0, 2.0, -0.0, -2.0], [1.0, 2.0, -1.0, -3.0]]
    """
    if rounding == "half_even":
        return torch.round(x)
    assert rounding == "half_away", rounding
    whole = torch.trunc(x)
    return whole + torch.where((x - whole).abs() >= 0.5, torch.sign(x), torch.zeros_like(x))


def along_axis(values: Tensor, axis: int | None, rank: int) -> Tensor:
    """`values` `[C]` shaped to broadcast along `axis` of a tensor of `rank` dimensions."""
    if axis is None:
        return values.reshape(())
    return values.reshape([-1 if d == axis % rank else 1 for d in range(rank)])


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of `x`, int64. More than 16 bits are computed in float64, since float32 cannot hold the codes."""
    wide = x.double() if spec.bits > 16 else x
    scale = along_axis(scale, spec.axis, x.dim()).to(wide.dtype)
    zero_point = along_axis(zero_point, spec.axis, x.dim())
    codes = round_codes(wide / scale, spec.rounding) + zero_point
    return codes.clamp(spec.qmin, spec.qmax).to(torch.int64)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Values of integer `codes`, float32; the product is rounded once, as ONNX DequantizeLinear does."""
    zero_point = along_axis(zero_point, spec.axis, codes.dim())
    return (codes - zero_point).float() * along_axis(scale, spec.axis, codes.dim())


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """`dequantize(quantize(x))` for float32 `x`, without leaving float for up to 16 bits."""
    if spec.bits > 16:
        return dequantize(quantize(x, scale, zero_point, spec), scale, zero_point, spec)
    scale = along_axis(scale, spec.axis, x.dim())
    zero = along_axis(zero_point, spec.axis, x.dim()).to(x.dtype)
    # (q - z) is clamped instead of q: integers of up to 17 bits are exact in float32, and it saves two passes over the data.
    steps = torch.div(x, scale)
    steps = steps.round_() if spec.rounding == "half_even" else round_codes(steps, spec.rounding)
    if spec.axis is None:
        return steps.clamp_(spec.qmin - zero.item(), spec.qmax - zero.item()).mul_(scale)
    return torch.minimum(torch.maximum(steps, spec.qmin - zero), spec.qmax - zero).mul_(scale)


def saturated(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Boolean mask of the elements of `x` that are clamped: where a straight-through gradient is zero."""
    steps = round_codes(x / along_axis(scale, spec.axis, x.dim()), spec.rounding)
    zero = along_axis(zero_point, spec.axis, x.dim())
    return (steps < spec.qmin - zero) | (steps > spec.qmax - zero)
