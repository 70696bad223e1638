"""Ops that move values, resize images or pool windows, in those that ONNX has an operator for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qdeploy.core.errors import CaptureError

END = 2**63 - 1
"""What a slice to the end of a dimension has for its end."""


def copy(into: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
    """What is written over the whole of another tensor."""
    return x.to(into.dtype).expand(into.shape)


def fill(into: Tensor, number: Tensor | float) -> Tensor:
    """One number everywhere."""
    return copy(into, number) if isinstance(number, Tensor) else torch.full_like(into, number)


def slice_scatter(x: Tensor, part: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    """What an assignment to a slice leaves: what stands before it, the new part, and what stands behind it."""
    size = x.shape[dim]
    if step == 1 and not start and (end is None or (isinstance(end, int) and end >= END)):
        return copy(x, part)
    if step != 1 or not all(number is None or isinstance(number, int) for number in (size, start, end)):
        return NotImplemented
    first, last, _ = slice(start, end).indices(size)
    pieces = [x.narrow(dim, 0, first), copy(x.narrow(dim, first, last - first), part), x.narrow(dim, last, size - last)]
    return torch.cat([piece for piece in pieces if piece.shape[dim]], dim)


def select_scatter(x: Tensor, part: Tensor, dim: int, index: int) -> Any:
    """What an assignment to one place along a dimension leaves."""
    if not isinstance(index, int) or not isinstance(x.shape[dim], int):
        return NotImplemented
    first = index % x.shape[dim]
    return slice_scatter(x, part.unsqueeze(dim), dim, first, first + 1)


def index(x: Tensor, indices: Sequence[Tensor | None]) -> Any:
    """A table of places along one dimension, which ONNX takes as they are."""
    places = [(dim, found) for dim, found in enumerate(indices) if found is not None]
    if len(places) != 1:
        return NotImplemented
    dim, found = places[0]
    if found.dtype == torch.bool or found.dim() != 1 or not isinstance(x.shape[dim], int):
        return NotImplemented
    return x.index_select(dim, torch.where(found < 0, found + x.shape[dim], found))


def repeat_interleave(x: Tensor, repeats: int, dim: int | None = None, *, output_size: int | None = None) -> Any:
    """Every part along a dimension `repeats` times."""
    if dim is None or not isinstance(repeats, int):
        return NotImplemented
    dim %= x.dim()
    parts = x.unsqueeze(dim + 1)
    return parts.expand(*(-1 if d != dim + 1 else repeats for d in range(parts.dim()))).flatten(dim, dim + 1)


def rot90(x: Tensor, k: int = 1, dims: Sequence[int] = (0, 1)) -> Tensor:
    """Quarter turns: a mirror and an exchange of two dimensions, or two mirrors."""
    first, second = dims
    turned = {0: (), 1: (second,), 2: (first, second), 3: (first,)}[k % 4]
    x = x.flip(turned) if turned else x
    return x.transpose(first, second) if k % 2 else x


def unfold(x: Tensor, dimension: int, size: int, step: int) -> Any:
    """Windows along one dimension, which stands for their number afterwards; their insides are the last one."""
    if not x.dim():
        return NotImplemented
    dim = dimension % x.dim()
    length = x.shape[dim]
    if not all(isinstance(number, int) for number in (length, size, step)):
        return NotImplemented
    if step == size and length % size == 0:
        return x.reshape(*x.shape[:dim], length // size, size, *x.shape[dim + 1 :]).movedim(dim + 1, -1)
    starts = range(0, length - size + 1, step)
    return torch.cat([x.narrow(dim, start, size).unsqueeze(dim) for start in starts], dim).movedim(dim + 1, -1)


def im2col(x: Tensor, kernel_size: list[int], dilation: list[int], padding: list[int], stride: list[int]) -> Any:
    """The pixels that each place of a kernel meets: slices with steps, side by side; windows that touch without a gap are reshaped."""
    if x.dim() != 4 or not all(isinstance(size, int) for size in x.shape[1:]):
        return NotImplemented
    x = torch.nn.functional.pad(x, [padding[1], padding[1], padding[0], padding[0]]) if any(padding) else x
    channels, *sides = x.shape[1:]
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, d, s in zip(sides, kernel_size, dilation, stride, strict=True)]
    (rows, columns), (height, width) = sizes, kernel_size
    if kernel_size == stride and dilation == [1, 1] and sides == [rows * height, columns * width]:
        parts = x.reshape(-1, channels, rows, height, columns, width).permute(0, 1, 3, 5, 2, 4)
        return parts.reshape(-1, channels * height * width, rows * columns)

    def part(i: int, j: int) -> Tensor:
        top, left = i * dilation[0], j * dilation[1]
        bottom, right = top + stride[0] * (rows - 1) + 1, left + stride[1] * (columns - 1) + 1
        return x[:, :, top : bottom : stride[0], left : right : stride[1]].unsqueeze(2)

    met = torch.cat([part(i, j) for i in range(height) for j in range(width)], 2)
    return met.reshape(-1, channels * height * width, rows * columns)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """The channels of all groups in turn, by moving alone."""
    batch, channels, *sides = x.shape
    return x.reshape(batch, groups, channels // groups, *sides).transpose(1, 2).reshape(batch, channels, *sides)


def unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
    """Every part along one dimension."""
    return [x.select(dim, index) for index in range(x.shape[dim])]


def roll(x: Tensor, shifts: list[int], dims: list[int] | None = None) -> Any:
    """The end of every dimension in `dims` before its beginning, where their sizes are known."""
    if not all(isinstance(size, int) for size in (x.shape[dim] for dim in dims or range(x.dim()))):
        return NotImplemented
    if not dims:
        return roll(x.reshape(-1), shifts, [0]).reshape(x.shape)
    for shift, dim in zip(shifts, dims, strict=True):
        size = x.shape[dim]
        start = (size - shift) % size
        x = torch.cat([x.narrow(dim, start, size - start), x.narrow(dim, 0, start)], dim) if start else x
    return x


def stack(tensors: list[Tensor], dim: int = 0) -> Tensor:
    """Along a new dimension."""
    return torch.cat([tensor.unsqueeze(dim) for tensor in tensors], dim)


def nearest_exact(x: Tensor, output_size: list[int] | None, scale_factors: list[float] | None) -> Any:
    """To a multiple of the size it is what `nearest` is, which targets have."""
    sides = x.shape[2:]
    known = all(isinstance(size, int) for size in (*sides, *(output_size or ())))
    ratios = scale_factors if output_size is None else [a / b for a, b in zip(output_size, sides, strict=True)] if known else None
    if ratios is None or any(ratio != int(ratio) for ratio in ratios):
        return NotImplemented
    return torch.ops.aten.upsample_nearest2d.vec(x, output_size, scale_factors)


def upsample_linear1d(x: Tensor, output_size: list[int] | None, align_corners: bool, scale_factors: list[float] | None) -> Tensor:
    """By the resizing of an image that is one pixel high."""
    sizes, factors = (None if given is None else [1, *given] for given in (output_size, scale_factors))
    made: Tensor = torch.ops.aten.upsample_bilinear2d.vec(x.unsqueeze(2), sizes, align_corners, factors)
    return made.squeeze(2)


def _avg_pool(sides: int) -> Callable[..., Any]:
    """Pooling whose every divisor is that of ONNX and of all kernels of its runtimes.

    A divisor of the user's own becomes a factor behind the pooling. A border that is counted, beside a last window that ends outside of
    it, becomes zeros before the pooling: kernels divide by what is inside, by the whole window, or by the wrong one of both.
    """

    def pool(
        x: Tensor,
        kernel_size: list[int],
        stride: list[int] | None = None,
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        kernel, stride, padding = (each_side(given, sides) for given in (kernel_size, stride or kernel_size, padding))
        own = divisor_override is not None
        if not own and not (ceil_mode and count_include_pad and any(padding)):
            return NotImplemented
        sizes = x.shape[-sides:]
        after = [last_border(*side) if ceil_mode else side[-1] for side in zip(sizes, kernel, stride, padding, strict=True)]
        functional: Any = torch.nn.functional
        average = getattr(functional, f"avg_pool{sides}d")
        if all(end <= amount for end, amount in zip(after, padding, strict=True)):  # no window ends outside
            made = average(x, kernel, stride, padding, False, True)
        else:
            ends = after if own else padding
            padded = functional.pad(x, [amount for at in reversed(range(sides)) for amount in (padding[at], ends[at])])
            made = average(padded, kernel, stride, 0, not own, False)
        for dim, size, k, s, begin, end in zip(range(-sides, 0), sizes, kernel, stride, padding, after, strict=True):
            count = (size + begin + end - k) // s + 1
            if isinstance(size, int) and made.shape[dim] != count:
                made = made.narrow(dim, 0, count)
        return made * (math.prod(kernel) / divisor_override) if divisor_override is not None else made

    return pool


def each_side(given: int | Sequence[int], sides: int) -> list[int]:
    """A number for every side, of one that stands for all or of a list."""
    numbers = [given] if isinstance(given, int) else list(given)
    return numbers * sides if len(numbers) == 1 else numbers


def last_border(size: Any, kernel: int, stride: int, padding: int, end: int | None = None) -> int:
    """How far behind a side its last window ends in `ceil_mode`, where torch leaves out what would start behind it.

    `end` is the padding at its end, where that is another one.

    Of an open size it is what the longest takes; `CaptureError` where it depends on the size whether there is a window more.
    """
    end = padding if end is None else end
    if isinstance(size, int):
        steps = -(-(size + padding + end - kernel) // stride)
        steps -= steps * stride >= size + padding
        return max(steps * stride + kernel - size - padding, 0)
    if end + stride > kernel:
        raise CaptureError(
            "pooling with ceil_mode over a side of open size, whose last window may be left out",
            found=f"kernel {kernel}, stride {stride}, padding {end}",
            allowed="padding + stride up to the kernel",
            action="fix the size, or leave out ceil_mode",
        )
    return end + stride - 1


def _adaptive_avg_pool(sides: int) -> Callable[[Tensor, list[int]], Any]:
    """Pooling by equal windows, the resizing that a pooling to a multiple is, or a mean of every window, one side after the other.

    ONNX has an operator for the first alone.
    """

    def pool(x: Tensor, output_size: list[int]) -> Any:
        functional: Any = torch.nn.functional
        if sides == 1 and list(output_size) == [1]:
            return x.mean(-1, keepdim=True)
        before = x.shape[-sides:]
        if not all(isinstance(size, int) for size in before):
            return NotImplemented
        if (kernel := _windows(x, output_size)) is not None:
            return functional.avg_pool1d(x, kernel) if sides == 1 else NotImplemented  # of images it is an op of the vocabulary
        if all(after % size == 0 for size, after in zip(before, output_size, strict=True)) and x.dim() == sides + 2:
            return functional.interpolate(x, size=list(output_size), mode="nearest")
        for dim, after in zip(range(-sides, 0), output_size, strict=True):
            size = x.shape[dim]
            spans = [(i * size // after, -(-(i + 1) * size // after)) for i in range(after)]
            parts = [x.narrow(dim, start, end - start) for start, end in spans]
            x = torch.cat([part if part.shape[dim] == 1 else part.mean(dim, keepdim=True) for part in parts], dim)
        return x

    return pool


def _adaptive_max_pool(sides: int) -> Callable[[Tensor, list[int]], Any]:
    """Pooling by windows of one size, where they divide the whole; it has places as a second result."""

    def pool(x: Tensor, output_size: list[int]) -> Any:
        kernel = _windows(x, output_size)
        if kernel is None:
            return NotImplemented
        functional: Any = torch.nn.functional
        plain, placed = (getattr(functional, f"max_pool{sides}d{end}") for end in ("", "_with_indices"))
        return plain(x, kernel), placed(x, kernel)[1]

    return pool


def _windows(x: Tensor, output_size: list[int]) -> list[int] | None:
    """The windows of an adaptive pooling; None where they differ, or where the size of the input is open."""
    before = x.shape[x.dim() - len(output_size) :]
    if not all(isinstance(size, int) for size in before) or any(b % a for b, a in zip(before, output_size, strict=True)):
        return None
    return [int(b) // a for b, a in zip(before, output_size, strict=True)]


def pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor:
    """Squares of pixels become channels, by moving alone; the operator of ONNX has them in another order."""
    r = downscale_factor
    *lead, channels, height, width = x.shape
    parts = x.reshape(*lead, channels, height // r, r, width // r, r)
    axes = [parts.dim() + axis for axis in (-5, -3, -1, -4, -2)]
    return parts.permute(*range(len(lead)), *axes).reshape(*lead, channels * r * r, height // r, width // r)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.copy.default: copy,
    torch.ops.aten.fill.Scalar: fill,
    torch.ops.aten.fill.Tensor: fill,
    torch.ops.aten.slice_scatter.default: slice_scatter,
    torch.ops.aten.select_scatter.default: select_scatter,
    torch.ops.aten.index.Tensor: index,
    torch.ops.aten.repeat_interleave.self_int: repeat_interleave,
    torch.ops.aten.rot90.default: rot90,
    torch.ops.aten.unfold.default: unfold,
    torch.ops.aten.im2col.default: im2col,
    torch.ops.aten._upsample_nearest_exact2d.vec: nearest_exact,
    torch.ops.aten.unbind.int: unbind,
    torch.ops.aten.stack.default: stack,
    torch.ops.aten.upsample_linear1d.vec: upsample_linear1d,
    torch.ops.aten.avg_pool1d.default: _avg_pool(1),
    torch.ops.aten.avg_pool2d.default: _avg_pool(2),
    torch.ops.aten.avg_pool3d.default: _avg_pool(3),
    torch.ops.aten.adaptive_avg_pool1d.default: _adaptive_avg_pool(1),
    torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_avg_pool(2),
    torch.ops.aten.adaptive_avg_pool3d.default: _adaptive_avg_pool(3),
    torch.ops.aten.adaptive_max_pool1d.default: _adaptive_max_pool(1),
    torch.ops.aten.adaptive_max_pool2d.default: _adaptive_max_pool(2),
    torch.ops.aten.adaptive_max_pool3d.default: _adaptive_max_pool(3),
    torch.ops.aten.roll.default: roll,
    torch.ops.aten.channel_shuffle.default: channel_shuffle,
    torch.ops.aten.pixel_unshuffle.default: pixel_unshuffle,
}
"""Part of the table in `decompose`."""
