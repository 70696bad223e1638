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

Power of two: the smallest scale 2^-k whose codes reach from low to high, so nothing is clipped. Both ends count: in full-range
signed 8 bits, -1 = -128 * 2^-7 takes k = 7 and +1 > 127 * 2^-7 takes k = 6.

>>> spec = QuantSpec.parse("int8 power-of-two")
>>> [choose_scale(torch.tensor([-1.0]), torch.tensor([high]), spec)[0].item() * 2**7 for high in (0.99, 1.0)]
[1.0, 2.0]

Log (HiSilicon NNIE; Li et al. 2021, MQBench): 16 steps an octave below the clip value c = 2^(k/16), -384 <= k <= 320, taken
at or above max|x|. With z = k - 127 the codes are sign and magnitude, and 0x00 is no zero:

    x >= 2^(z/16 - 1):        code m = clamp(round(16 log2 x) - z, 0, 127),            +2^((m + z)/16)
    x < -2^((z + 1)/16 - 1):  code 128 + m, m = clamp(round(16 log2 -x) - z, 1, 127),  -2^((m + z)/16)
    otherwise:                code 128,                                                0

The stored scale is 2^(z/16), the value of code 0. Worked: c = 4 has z = -95, and -0.3 lies nearest to -2^((67 - 95)/16):

>>> log8 = QuantSpec.parse("log8")
>>> scale, zero_point = choose_scale(torch.tensor([-4.0]), torch.tensor([1.0]), log8)
>>> codes = quantize(torch.tensor([1.0, -0.3, 0.0, 1e-9, 0.01]), scale, zero_point, log8)
>>> log_offset(scale).item(), [f"{code:02X}" for code in codes.tolist()]
(-95, ['5F', 'C3', '80', '80', '00'])
>>> [round(value, 6) for value in dequantize(codes, scale, zero_point, log8).tolist()]
[1.0, -0.297302, 0.0, 0.0, 0.016317]

Half precision: the code is the bit pattern of the nearest float16, halves to even; beyond 65519 it is infinite, as on the device.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from qdeploy.core.spec import LOG_STEPS, Grid, QuantSpec, Rounding

MIN_SCALE = 2.0**-64
"""No scale is smaller: products of two scales, as for a bias, stay far from float32's underflow."""
MAX_POWER = 2.0**127
"""No power of two is larger: the next is not a float32."""
DEAD_CHANNEL = 2.0**-15
"""A channel's scale is at least this share of the tensor's largest, so that an all-zero channel keeps a usable one."""
LOG_CLIPS = (-384, 320)
"""First and last k of the log grid's clip values 2^(k/16): the vendor's table has these, from 2^-24 to 2^20."""
LOG_TOP = 127
"""Largest magnitude code of the log grid."""
LOG_SIGN = 128
"""The sign bit of a log code. With magnitude 0, where the other codes would have -2^(z/16), it stands for zero."""
NORMAL = 2.0**-14
"""Smallest normal float16."""
AVERAGES = {(3, 3): (7, 6), (5, 5): (10, 8), (6, 6): (7, 8), (3, 6): (7, 7), (6, 3): (7, 7), (7, 7): (21, 10), (14, 14): (21, 12)}
"""Windows of DPU average pooling that do not follow the rule; see `shift_average`."""


def choose_scale(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale (float32 `[C]`) and zero_point (int64 `[C]`) for ranges `low`, `high` `[C]`.

    An all-zero tensor gets the scale of the range (0, 1). Raises ValueError on a range that is not finite.
    """
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise ValueError("the range is not finite")
    if spec.grid == "power_of_two":
        return _choose_power(low, high, spec)
    if not spec.linear:
        scale = _log_scale(torch.maximum(-low, high)) if spec.grid == "log" else torch.ones_like(low)
        return scale.float(), torch.zeros_like(low, dtype=torch.int64)
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


def _choose_power(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """`choose_scale` for scales 2^-k that clip nothing; `low` <= 0 <= `high`, float64 `[C]`."""
    if not (low.any() or high.any()):
        high = torch.ones_like(high)
    if spec.symmetric:
        scale = power_above(torch.maximum(low / spec.qmin, high / spec.qmax))
    else:
        scale = power_above((high - low) / (spec.qmax - spec.qmin))
        # 0 is a code: the codes left and right of it are whole numbers, and together may be one too many
        scale = torch.where((-low / scale).ceil() + (high / scale).ceil() > spec.qmax - spec.qmin, 2 * scale, scale)
    scale = scale.clamp(min=max(float(scale.max()) * DEAD_CHANNEL, MIN_SCALE), max=MAX_POWER)
    if spec.symmetric:
        return scale.float(), torch.zeros_like(scale, dtype=torch.int64)
    zero_point = spec.qmin + (-low / scale).ceil()
    return scale.float(), zero_point.clamp(spec.qmin, spec.qmax).to(torch.int64)


def power_above(x: Tensor) -> Tensor:
    """The smallest power of two that is at least `x`, float64; an exact power is its own, and 0 has 0.

    >>> power_above(torch.tensor([0.25, 0.26, 3.0, 0.0], dtype=torch.float64)).tolist()
    [0.25, 0.5, 4.0, 0.0]
    """
    x = x.double()
    fraction = torch.frexp(x)[0]  # x = fraction * 2^exponent, 1/2 <= fraction < 1
    return torch.where(fraction > 0.5, x / fraction, x)


def _log_scale(largest: Tensor) -> Tensor:
    """2^(z/16) of the smallest clip value 2^(k/16), as a float32, that is at least `largest`, float64 `[C]`."""
    largest = torch.where(largest > 0, largest, 1.0)
    k = torch.round(LOG_STEPS * torch.log2(largest))
    k += _log_powers(k).double() < largest
    return _log_powers(k.clamp(*LOG_CLIPS) - LOG_TOP)


def _log_powers(steps: Tensor) -> Tensor:
    """2^(steps/16), a float64 power that is rounded to float32 once: the model-local ONNX functions take the same steps."""
    return torch.pow(2.0, steps.double() / LOG_STEPS).float()


def log_offset(scale: Tensor) -> Tensor:
    """The integer z of log scales 2^(z/16), int64 of the same shape. Exact: neighbouring scales are 4 % apart.

    >>> log_offset(torch.tensor([2.0 ** (-95 / 16)])).item()
    -95
    """
    return torch.round(LOG_STEPS * torch.log2(scale.double())).to(torch.int64)


def bias_scale(input_scale: Tensor, weight_scale: Tensor, channels: int) -> Tensor:
    """The scale of an int32 bias, float32 `[channels]`, or `[1]` for a weight of one scale: the step of the accumulator it is added to.

    The groups of a transposed convolution share the scales of their channels: group g has channels g C to g C + C - 1 for C scales.
    """
    groups = channels // len(weight_scale) if len(weight_scale) > 1 else 1
    return (input_scale.double() * weight_scale.double()).float().repeat(groups)


def weight_scale_for_bias(bias: Tensor, input_scale: Tensor, weight_scale: Tensor, grid: Grid = "uniform") -> Tensor:
    """`weight_scale` `[C]`, raised where the `bias` `[n C]` would not fit in int32 at its `bias_scale`; `[n]` for one scale.

    Half of the int32 range is left for the accumulator itself. On a grid of powers of two it is raised to one; a log or float16
    grid adds no int32 biases, and its scale stays.
    """
    needed = bias.detach().double().abs() / (input_scale.double() * 2.0**30)
    if grid == "power_of_two":
        needed = power_above(needed)
    elif grid != "uniform":
        needed = torch.zeros_like(needed)
    if len(weight_scale) > 1:
        needed = needed.view(-1, len(weight_scale)).amax(0)
    return torch.maximum(weight_scale.double(), needed).float()


def shift_average(count_h: int, count_w: int) -> tuple[int, int]:
    """`(m, k)` with which the DPU averages a window of `count_h` x `count_w` elements: their sum times m / 2^k.

    AMD's quantizer multiplies the average by n m / 2^k, n = count_h count_w, from a table for seven windows and by a rule for all
    others: of k = 0 .. ceil(log2(128 n)) - 1 with m = round(2^k / n) the first pair that is nearest to 1/n. (Xilinx/Vitis-AI,
    vai_q_pytorch, nndct_shared/utils/dpu_utils.py.) The table's 36 * 7/256 for a 3 x 6 window, which has 18 elements, is 7/128.

    >>> shift_average(7, 7), shift_average(2, 2), shift_average(4, 3)
    ((21, 10), (1, 2), (85, 10))
    """
    if (count_h, count_w) in AVERAGES:
        return AVERAGES[count_h, count_w]
    count = count_h * count_w
    pairs = ((round(Fraction(1 << k, count)), k) for k in range((128 * count - 1).bit_length()))
    return min(pairs, key=lambda pair: abs(Fraction(pair[0], 1 << pair[1]) - Fraction(1, count)))


def round_codes(x: Tensor, rounding: Rounding) -> Tensor:
    """Round to integers, exact halves to the even neighbour; or away from zero; or to even from 0 up and upwards below (DPU).

    The last two are written as ONNX has to write them, to the sign of zeros. All are exact: a float minus its whole part rounds
    only next to 0, where all ways give 0.

    >>> [round_codes(torch.tensor([0.5, 1.5, -0.5, -2.5]), r).tolist() for r in ("half_even", "half_away", "dpu")]
    [[0.0, 2.0, -0.0, -2.0], [1.0, 2.0, -1.0, -3.0], [0.0, 2.0, -0.0, -2.0]]
    >>> [round_codes(torch.tensor([-1.5, -3.5]), r).tolist() for r in ("half_even", "dpu")]
    [[-2.0, -4.0], [-1.0, -3.0]]
    """
    if rounding == "half_even":
        return torch.round(x)
    if rounding == "dpu":
        rounded = torch.round(x)
        if rounded.numel() and not rounded.amin() >= 0:  # most tensors come from a relu
            ties = torch.eq(x - rounded, 0.5).logical_and_(rounded < 0)
            rounded[ties] += 1
        return rounded
    assert rounding == "half_away", rounding
    size = x.abs()
    whole = torch.floor(size)
    return torch.sign(x) * (whole + (size - whole >= 0.5).to(x.dtype))


def along_axis(values: Tensor, axis: int | None, rank: int) -> Tensor:
    """`values` `[C]` shaped to broadcast along `axis` of a tensor of `rank` dimensions."""
    if axis is None:
        return values.reshape(())
    return values.reshape([-1 if d == axis % rank else 1 for d in range(rank)])


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of `x`, int64. More than 16 bits are computed in float64, since float32 cannot hold the codes."""
    if spec.grid == "log":
        return _log_codes(x, scale)
    if not spec.linear:
        return _half(x, spec).view(torch.int16).to(torch.int64)
    wide = x.double() if spec.bits > 16 else x
    scale = along_axis(scale, spec.axis, x.dim()).to(wide.dtype)
    zero_point = along_axis(zero_point, spec.axis, x.dim())
    codes = round_codes(wide / scale, spec.rounding) + zero_point
    return codes.clamp(spec.qmin, spec.qmax).to(torch.int64)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Values of integer `codes`, float32; the product is rounded once, as ONNX DequantizeLinear does."""
    if spec.grid == "log":
        return _log_values(scale).take(codes)
    if not spec.linear:
        return codes.to(torch.int16).view(torch.float16).float()
    zero_point = along_axis(zero_point, spec.axis, codes.dim())
    return (codes - zero_point).float() * along_axis(scale, spec.axis, codes.dim())


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """`dequantize(quantize(x))` for float32 `x`, without leaving float for up to 16 bits."""
    if spec.grid.startswith("float16"):
        return _half(x, spec).float()
    if spec.bits > 16 or spec.grid == "log":
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
    if spec.grid == "log":
        return _log_steps(x.double()) > log_offset(scale) + LOG_TOP
    if not spec.linear:
        return torch.isinf(x.half())
    steps = round_codes(x / along_axis(scale, spec.axis, x.dim()), spec.rounding)
    zero = along_axis(zero_point, spec.axis, x.dim())
    return (steps < spec.qmin - zero) | (steps > spec.qmax - zero)


def _half(x: Tensor, spec: QuantSpec) -> Tensor:
    """The nearest float16; without subnormals, what is subnormal then becomes +0."""
    half = x.half()
    return half if spec.grid == "float16" else torch.where(half.abs() < NORMAL, 0.0, half)


def _log_steps(x: Tensor) -> Tensor:
    """round(16 log2 |x|) of float64 `x` `[...]`; -inf for 0.

    No float32 lies closer than 2^-26 steps to a tie, so whatever float64 logarithm is taken, the result is the same.
    """
    return x.abs().log2_().mul_(LOG_STEPS).round_()


def _log_codes(x: Tensor, scale: Tensor) -> Tensor:
    z = float(log_offset(scale).item())
    wide = x.double()
    code = _log_steps(wide).sub_(z).clamp_(0, LOG_TOP)
    below = torch.where(wide < -(2.0 ** ((z + 1) / LOG_STEPS - 1)), code.clamp(min=1).add_(LOG_SIGN), float(LOG_SIGN))
    return torch.where(wide >= 2.0 ** (z / LOG_STEPS - 1), code, below).to(torch.int64)


def _log_values(scale: Tensor) -> Tensor:
    """The values of all 256 log codes, float32."""
    positive = _log_powers(torch.arange(LOG_SIGN, device=scale.device) + log_offset(scale))
    negative = -positive
    negative[0] = 0
    return torch.cat((positive, negative))
