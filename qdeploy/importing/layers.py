"""ONNX operators that networks are built of: convolutions, normalizations, pools and resizing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qdeploy.capture.data_movement import last_border
from qdeploy.core.errors import CaptureError
from qdeploy.importing.table import operator
from qdeploy.importing.values import is_symbolic

Ints = Sequence[int] | None
_CONV = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAX: tuple[Callable[..., Any], ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_MEAN = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_ADAPTIVE: tuple[Callable[..., Tensor], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_ADAPTIVE_MAX: tuple[Callable[..., Any], ...] = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)


def _sides(x: Tensor) -> int:
    if not 3 <= x.dim() <= 5:
        raise CaptureError("the input has no one, two or three spatial dimensions", found=f"{x.dim()} dimensions", allowed="3 to 5")
    return x.dim() - 2


def _pads(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], pads: Ints, auto_pad: str) -> list[int]:
    """Begins, then ends, of every side."""
    if auto_pad in ("NOTSET", ""):
        return list(pads or [0] * 2 * len(kernel))
    if auto_pad == "VALID":
        return [0] * 2 * len(kernel)
    total = []
    for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True):
        total.append(max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0))
    return _halves(total, auto_pad)


def _halves(total: Sequence[int], auto_pad: str) -> list[int]:
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return small + large if auto_pad == "SAME_UPPER" else large + small


def _padded(x: Tensor, pads: Sequence[int], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """`x` padded by F.pad where the pads of a side differ, and what is left for the operator itself."""
    half = len(pads) // 2
    if list(pads[:half]) == list(pads[half:]):
        return x, list(pads[:half])
    return F.pad(x, _sideways(pads), value=value), [0] * half


def _sideways(pads: Sequence[int]) -> list[int]:
    """Begins, then ends, as F.pad takes them: the last side first."""
    half = len(pads) // 2
    return [amount for at in reversed(range(half)) for amount in (pads[at], pads[at + half])]


def _rounded_up(x: Tensor, spans: Sequence[int], stride: Sequence[int], pads: Sequence[int]) -> list[int]:
    """`pads` with the ends that the windows of `ceil_mode` take; what would start behind the side is left out."""
    half = len(pads) // 2
    ends = [last_border(*side) for side in zip(x.shape[2:], spans, stride, pads[:half], pads[half:], strict=True)]
    return [*pads[:half], *ends]


@operator("Conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints = None,
    group: int = 1,
    kernel_shape: Ints = None,
    pads: Ints = None,
    strides: Ints = None,
) -> Tensor:
    sides = _sides(x)
    stride, dilation = list(strides or [1] * sides), list(dilations or [1] * sides)
    amounts = _pads(x, weight.shape[2:], stride, dilation, pads, auto_pad)
    x, padding = _padded(x, amounts)
    return _CONV[sides - 1](x, weight, bias, stride, padding, dilation, group)


@operator("ConvTranspose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Ints = None,
    group: int = 1,
    kernel_shape: Ints = None,
    output_padding: Ints = None,
    output_shape: Ints = None,
    pads: Ints = None,
    strides: Ints = None,
) -> Tensor:
    sides = _sides(x)
    stride, dilation = list(strides or [1] * sides), list(dilations or [1] * sides)
    extra = list(output_padding or [0] * sides)
    kernel = [d * (k - 1) + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    amounts = list(pads or [0] * 2 * sides)
    if output_shape is not None or auto_pad.startswith("SAME"):
        wanted = output_shape or [size * s for size, s in zip(x.shape[2:], stride, strict=True)]
        sizes = zip(x.shape[2:], stride, extra, kernel, wanted, strict=True)
        total = [max(s * (size - 1) + e + k - want, 0) for size, s, e, k, want in sizes]
        amounts = _halves(total, auto_pad)
    elif auto_pad == "VALID":
        amounts = [0] * 2 * sides
    begin, end = amounts[:sides], amounts[sides:]
    padding = [min(b, e) for b, e in zip(begin, end, strict=True)]
    made = _TRANSPOSED[sides - 1](x, weight, bias, stride, padding, extra, group, dilation)
    for at in range(sides):  # what is cut off more at one end than at the other
        first, last = begin[at] - padding[at], end[at] - padding[at]
        if first or last:
            made = made.narrow(at + 2, first, made.shape[at + 2] - first - last)
    return made


@operator("BatchNormalization")
def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
) -> Tensor:
    if training_mode or not spatial:
        raise CaptureError("batch normalization in training mode", action="export the model in eval mode")
    return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, epsilon)


@operator("LayerNormalization")
def layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    return F.layer_norm(x, list(x.shape[axis:]), scale, bias, epsilon)


@operator("SpelledLayerNorm")
def spelled_layer_norm(
    x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *, axes: Sequence[int], epsilon: float
) -> Tensor:
    """Not of ONNX: what `fuse` makes of a normalization spelled with means; as layer norm where it is over the last dimensions."""
    trailing = sorted(a % x.dim() for a in axes) == list(range(x.dim() - len(axes), x.dim()))
    shape = list(x.shape[x.dim() - len(axes) :])
    if trailing and all(p is None or list(p.shape) == shape for p in (scale, bias)):
        return F.layer_norm(x, shape, scale, bias, epsilon)
    centred = x - x.mean(list(axes), keepdim=True)
    made = centred / torch.sqrt((centred * centred).mean(list(axes), keepdim=True) + epsilon)
    made = made if scale is None else made * scale
    return made if bias is None else made + bias


@operator("RMSNormalization")
def rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    return F.rms_norm(x, list(x.shape[axis:]), scale, epsilon)


@operator("InstanceNormalization")
def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@operator("GroupNormalization")
def group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1, opset: int = 21
) -> Tensor:
    """Before opset 21 there is one scale for each group, since then one for each channel."""
    if opset < 21:
        scale, bias = (t.repeat_interleave(x.shape[1] // num_groups) for t in (scale, bias))
    return F.group_norm(x, num_groups, scale, bias, epsilon)


@operator("LpNormalization")
def lp_norm(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    return F.normalize(x, p=p, dim=axis)


@operator("GlobalAveragePool")
def global_average(x: Tensor) -> Tensor:
    return _ADAPTIVE[_sides(x) - 1](x, [1] * _sides(x))


@operator("GlobalMaxPool")
def global_max(x: Tensor) -> Any:
    return _ADAPTIVE_MAX[_sides(x) - 1](x, [1] * _sides(x))


@operator("MaxPool")
def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Ints = None,
    pads: Ints = None,
    storage_order: int = 0,
    strides: Ints = None,
) -> Any:
    sides = _sides(x)
    stride, dilation = list(strides or [1] * sides), list(dilations or [1] * sides)
    amounts = _pads(x, kernel_shape, stride, dilation, pads, auto_pad)
    if ceil_mode and amounts[:sides] != amounts[sides:]:
        amounts, ceil_mode = _rounded_up(x, [d * (k - 1) + 1 for k, d in zip(kernel_shape, dilation, strict=True)], stride, amounts), 0
    if any(2 * amount > k for amount, k in zip(amounts, [*kernel_shape] * 2, strict=True)):
        x = F.pad(x, [v for at in reversed(range(sides)) for v in (amounts[at], amounts[at + sides])], value=-torch.inf)
        amounts = [0] * 2 * sides
    x, padding = _padded(x, amounts, -torch.inf)
    return _MAX[sides - 1](x, list(kernel_shape), stride, padding, dilation, bool(ceil_mode))


@operator("AveragePool")
def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Ints = None,
    pads: Ints = None,
    strides: Ints = None,
) -> Tensor:
    sides = _sides(x)
    if any(d != 1 for d in dilations or ()):
        raise CaptureError("average pooling with dilations is not supported", found=list(dilations or ()), allowed="1")
    kernel, stride = list(kernel_shape), list(strides or [1] * sides)
    amounts = _pads(x, kernel, stride, [1] * sides, pads, auto_pad)
    pool = _MEAN[sides - 1]
    if amounts[:sides] == amounts[sides:]:
        return pool(x, kernel, stride, amounts[:sides], bool(ceil_mode), bool(count_include_pad))
    ends = _rounded_up(x, kernel, stride, amounts) if ceil_mode else amounts
    inside = torch.ones_like(x[:1, :1])
    if count_include_pad:  # the border counts, and what windows take behind it does not
        inside = F.pad(inside, _sideways([min(pair) for pair in zip(amounts, ends, strict=True)]), value=1.0)
        if ends == [min(pair) for pair in zip(amounts, ends, strict=True)]:
            return pool(F.pad(x, _sideways(ends)), kernel, stride)
        inside = F.pad(inside, _sideways([max(end - amount, 0) for end, amount in zip(ends, amounts, strict=True)]))
    else:
        inside = F.pad(inside, _sideways(ends))
    return pool(F.pad(x, _sideways(ends)), kernel, stride) / pool(inside, kernel, stride)


@operator("Resize", settings=(1, 2, 3))
def resize(
    x: Tensor,
    *inputs: Any,
    mode: str = "nearest",
    antialias: int = 0,
    axes: Ints = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    nearest_mode: str = "round_prefer_floor",
    opset: int = 11,
) -> Tensor:
    """Inputs are scales before opset 11; since then a region, scales or sizes."""
    _, scales, sizes = [None, *inputs, None, None][:3] if opset < 11 else [*inputs, None, None, None][:3]
    if opset < 11:
        coordinate_transformation_mode, nearest_mode = "asymmetric", "floor"
    if antialias or keep_aspect_ratio_policy != "stretch" or exclude_outside or cubic_coeff_a != -0.75:
        raise CaptureError(
            "this kind of resizing is not supported",
            found=f"antialias {antialias}, keep_aspect_ratio_policy {keep_aspect_ratio_policy}, exclude_outside {exclude_outside}, "
            f"cubic_coeff_a {cubic_coeff_a}",
            allowed="0, stretch, 0, -0.75",
        )
    wanted, scale = _resized_sides(x, axes, scales, sizes)
    if mode == "nearest":
        return _nearest(x, wanted, scale, coordinate_transformation_mode, nearest_mode)
    return _smooth(x, wanted, scale, mode, coordinate_transformation_mode)


def _resized_sides(x: Tensor, axes: Ints, scales: Any, sizes: Any) -> tuple[list[Any], list[Any]]:
    """The length of every side of an image and the factor that it is resized by; a factor is None where no number is known."""
    along = list(range(x.dim())) if axes is None else [a % x.dim() for a in axes]
    factors: dict[int, Any] = {}
    lengths: dict[int, Any] = {}
    for at, axis in enumerate(along):
        before = x.shape[axis]
        if not sizes:
            lengths[axis], factors[axis] = _length(before, scales[at]), scales[at]
            continue
        known = axis >= 2 and not is_symbolic([sizes[at], before])
        lengths[axis], factors[axis] = sizes[at], sizes[at] / before if known else None
    if any(axis < 2 and not isinstance(lengths[axis], torch.SymInt) and lengths[axis] != x.shape[axis] for axis in lengths):
        raise CaptureError("resizing of batch or channels is not supported", found=[*lengths.values()])
    spatial = range(2, x.dim())
    return [lengths.get(axis, x.shape[axis]) for axis in spatial], [factors.get(axis, 1.0) for axis in spatial]


@operator("Upsample", settings=(1,))
def upsample(x: Tensor, given: Any = None, *, mode: str = "nearest", scales: Any = None) -> Any:
    return resize(x, scales if given is None else given, mode=mode, opset=10)


def _length(size: Any, scale: float) -> Any:
    """A size times a scale; a whole one leaves an open size open."""
    return size * int(scale) if scale == int(scale) else math.floor(size * scale)


def _smooth(x: Tensor, wanted: list[Any], scale: list[float | None], mode: str, how: str) -> Tensor:
    names = {"linear": ("linear", "bilinear", "trilinear"), "cubic": ("", "bicubic", "")}.get(mode, ("", "", ""))
    name = names[_sides(x) - 1]
    exact = all(f is None or w == s * f for w, s, f in zip(wanted, x.shape[2:], scale, strict=True))
    pixel = how == "half_pixel" or (how == "pytorch_half_pixel" and all(w > 1 for w in wanted))
    if not name or not (how == "align_corners" or (pixel and exact)):
        raise CaptureError(
            "this kind of resizing is not supported",
            found=f"mode {mode}, coordinate_transformation_mode {how}, {list(x.shape[2:])} to {wanted}",
            allowed="linear, or cubic in two dimensions, with half_pixel to whole sizes, or with align_corners",
        )
    return F.interpolate(x, size=wanted, mode=name, align_corners=how == "align_corners")


def _nearest(x: Tensor, wanted: list[Any], scale: list[float | None], how: str, rounding: str) -> Tensor:
    sides = list(zip(x.shape[2:], wanted, scale, strict=True))
    if all(_is_plain(size, want, f, how, rounding) for size, want, f in sides):
        return F.interpolate(x, size=wanted, mode="nearest")
    for axis, (size, want, f) in enumerate(sides, start=2):
        indices = _picked(size, want, want / size if f is None else f, how, rounding)
        if indices != list(range(x.shape[axis])):
            x = x.index_select(axis, torch.tensor(indices))
    return x


def _is_plain(size: Any, wanted: Any, scale: float | None, how: str, rounding: str) -> bool:
    """Whether torch's own nearest neighbours are meant: number `at * size // wanted` for each `at`."""
    if not is_symbolic([size, wanted]):
        picked = _picked(size, wanted, wanted / size if scale is None else scale, how, rounding)
        return picked == [at * size // wanted for at in range(wanted)]
    if scale is None:
        return how == "asymmetric" and rounding == "floor"
    # of a whole scale, the pattern of one element repeats
    return scale == int(scale) and how != "align_corners" and _is_plain(2, 2 * int(scale), scale, how, rounding)


_ROUND: dict[str, Callable[[float], int]] = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round_prefer_floor": lambda v: math.ceil(v - 0.5),
    "round_prefer_ceil": lambda v: math.floor(v + 0.5),
}


def _picked(size: int, wanted: int, scale: float, how: str, rounding: str) -> list[int]:
    """Which element of a side each new one is."""
    transforms: dict[str, Callable[[int], float]] = {
        "half_pixel": lambda at: (at + 0.5) / scale - 0.5,
        "pytorch_half_pixel": lambda at: (at + 0.5) / scale - 0.5 if wanted > 1 else 0.0,
        "asymmetric": lambda at: at / scale,
        "align_corners": lambda at: at * (size - 1) / (wanted - 1) if wanted > 1 else 0.0,
    }
    if how not in transforms or rounding not in _ROUND:
        found = f"coordinate_transformation_mode {how}, nearest_mode {rounding}"
        raise CaptureError("this kind of resizing is not supported", found=found, allowed=f"{list(transforms)}, {list(_ROUND)}")
    return [min(max(_ROUND[rounding](transforms[how](at)), 0), size - 1) for at in range(wanted)]
