"""ONNX operators that read shapes, move, pick and join elements. Most of them also work on numbers: that is how shapes are computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qdeploy.core.errors import CaptureError
from qdeploy.importing.table import operator
from qdeploy.importing.values import SMALL, Value, is_plain, is_symbolic, listed, plain, tensor

_END = 2**31 - 1
"""A bound of a slice from here on means the end of the dimension, whatever its length."""


@operator("Shape", mixed=True)
def shape(x: Value, *, start: int = 0, end: int | None = None) -> list[Any]:
    sizes = list(x.shape) if isinstance(x, Tensor) else [len(x)] if isinstance(x, list | tuple) else []
    return sizes[start:end]


@operator("Size", mixed=True)
def size(x: Value) -> Any:
    return math.prod(shape(x))


@operator("Reshape", settings=(1,), mixed=True)
def reshape(x: Value, sizes: Value, *, allowzero: int = 0, loose: bool = False) -> Value:
    """`loose` (not of ONNX): the file has a fixed batch, and a first size that keeps it may be any batch."""
    sizes = listed(sizes)
    if is_plain(x):
        whole = listed(x)
        if not sizes and len(whole) == 1:
            return whole[0]
        if len(sizes) == 1:
            return whole
        x = tensor(x)
    if not allowzero:
        sizes = [x.shape[at] if isinstance(v, int) and v == 0 else v for at, v in enumerate(sizes)]
    if loose and sizes and x.dim() and isinstance(sizes[0], int) and sizes[0] == x.shape[0]:
        open_size = math.prod(x.shape[1:]) // math.prod(v for v in sizes[1:] if v != -1)
        sizes = [-1, *(open_size if v == -1 else v for v in sizes[1:])]
    return x.reshape(sizes)


@operator("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operator("Transpose", mixed=True)
def transpose(x: Value, *, perm: Sequence[int] | None = None) -> Value:
    if is_plain(x):
        return x
    return x.permute(*(perm if perm is not None else range(x.dim() - 1, -1, -1)))


@operator("Squeeze", settings=(1,), mixed=True)
def squeeze(x: Value, given: Value = None, *, axes: Sequence[int] | None = None) -> Value:
    axes = axes if given is None else listed(given)
    if is_plain(x):
        return x[0] if isinstance(x, list | tuple) else x
    if axes is None:
        axes = [at for at, length in enumerate(x.shape) if isinstance(length, int) and length == 1]
    return torch.squeeze(x, axes[0] if len(axes) == 1 else tuple(axes))


@operator("Unsqueeze", settings=(1,), mixed=True)
def unsqueeze(x: Value, given: Value = None, *, axes: Sequence[int] | None = None) -> Value:
    axes = listed(given) if given is not None else axes
    assert axes is not None
    if is_plain(x) and not isinstance(x, list | tuple) and len(axes) == 1:
        return [x]
    x = tensor(x)
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Concat", mixed=True)
def concat(*values: Value, axis: int) -> Value:
    if all(is_plain(v) for v in values):
        return [number for v in values for number in listed(v)]
    return torch.cat([tensor(v) for v in values], dim=axis)


@operator("Split", settings=(1,), mixed=True, many=True)
def split(x: Value, given: Value = None, *, axis: int = 0, split: Sequence[int] | None = None, num_outputs: int) -> Value:
    """Sizes are an attribute before opset 13, an input since; without them the parts are equal, but for the last."""
    sizes = split if given is None else listed(given)
    length = len(listed(x)) if is_plain(x) else x.shape[axis]
    if sizes is None:
        part = -(-length // num_outputs)
        sizes = [part] * (num_outputs - 1) + [length - part * (num_outputs - 1)]
    if is_plain(x):
        starts = [sum(sizes[:at]) for at in range(len(sizes))]
        return [listed(x)[start : start + count] for start, count in zip(starts, sizes, strict=True)]
    return torch.split(x, list(sizes), dim=axis)


@operator("Slice", settings=(1, 2, 3, 4), mixed=True)
def slice_(x: Value, *inputs: Value, starts: Value = None, ends: Value = None, axes: Value = None) -> Value:
    """Attributes before opset 10, inputs since."""
    given = [*inputs, *(None,) * 4][:4] if inputs else [starts, ends, axes, None]
    begins, stops = listed(given[0]), listed(given[1])
    along = list(range(len(begins))) if given[2] is None else listed(given[2])
    steps = [1] * len(begins) if given[3] is None else listed(given[3])
    for start, end, axis, step in zip(begins, stops, along, steps, strict=True):
        x = listed(x)[_range(start, end, step)] if is_plain(x) else _slice(x, start, end, axis, step)
    return x


def _range(start: Any, end: Any, step: Any) -> slice:
    """The bounds of ONNX as Python has them: a stop at or before -2^31 or -length-1 goes through the first element."""
    return slice(start, None if step < 0 and end < -SMALL else end, step)


def _slice(x: Tensor, start: Any, end: Any, axis: int, step: Any) -> Tensor:
    axis = axis % x.dim()
    if step < 0:
        indices = range(x.shape[axis])[slice(start, None if end <= -_END else end, step)]
        if step == -1 and len(indices) == x.shape[axis]:
            return x.flip(axis)
        return x.index_select(axis, torch.tensor(list(indices)))
    stop = None if isinstance(end, int) and end >= _END else end
    return x[(*(slice(None),) * axis, slice(None if isinstance(start, int) and start == 0 else start, stop, step))]


@operator("Gather", mixed=True)
def gather(x: Value, indices: Value, *, axis: int = 0) -> Value:
    if is_plain(x) and is_plain(indices):
        numbers = listed(x)
        return [numbers[i] for i in indices] if isinstance(indices, list | tuple) else numbers[indices]
    x = tensor(x)
    axis = axis % x.dim()
    if is_plain(indices) and not isinstance(indices, list | tuple):
        return x.select(axis, indices)
    indices = tensor(indices)
    if axis == 0 and x.dim() == 2 and x.is_floating_point() and indices.dim() != 1:
        return F.embedding(indices, x)
    if indices.dim() == 1:
        return x.index_select(axis, indices)
    return x[(*(slice(None),) * axis, indices)]


@operator("GatherElements")
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


def _wrapped(indices: Tensor, length: int) -> Tensor:
    return torch.where(indices < 0, indices + length, indices)


@operator("GatherND")
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    if batch_dims:
        raise CaptureError("GatherND with batch_dims is not supported", found=batch_dims, allowed=0)
    return x[tuple(indices.unbind(-1))]


@operator("ScatterND")
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    return x.index_put(tuple(indices.unbind(-1)), updates, accumulate=_adds(reduction))


@operator("ScatterElements", "Scatter")
def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    indices = _wrapped(indices, x.shape[axis])
    return x.scatter_add(axis, indices, updates) if _adds(reduction) else x.scatter(axis, indices, updates)


def _adds(reduction: str) -> bool:
    if reduction not in ("none", "add"):
        raise CaptureError("a scatter with this reduction is not supported", found=reduction, allowed="none, add")
    return reduction == "add"


@operator("Expand", settings=(1,), mixed=True)
def expand(x: Value, sizes: Value) -> Value:
    sizes = listed(sizes)
    if is_plain(x) and len(sizes) == 1 and isinstance(sizes[0], int) and sizes[0] <= SMALL:
        return listed(x) * sizes[0] if len(listed(x)) == 1 else x
    x = tensor(x)
    fresh = max(len(sizes) - x.dim(), 0)
    sizes = [1] * (x.dim() - len(sizes)) + sizes
    return x.expand([*sizes[:fresh], *(-1 if _keeps(own, size) else size for own, size in zip(x.shape, sizes[fresh:], strict=True))])


def _keeps(own: Any, size: Any) -> bool:
    """Whether a dimension stays as it is, whatever its length."""
    return isinstance(size, int) and (size == 1 or (isinstance(own, int) and own == size))


@operator("Tile", settings=(1,), mixed=True)
def tile(x: Value, repeats: Value) -> Value:
    return listed(x) * listed(repeats)[0] if is_plain(x) and not is_symbolic(repeats) else tensor(x).repeat(listed(repeats))


@operator("ConstantOfShape", settings=(0,), mixed=True)
def constant_of_shape(sizes: Value, *, value: tuple[Any, torch.dtype] = (0.0, torch.float32)) -> Value:
    number, dtype = value
    sizes = listed(sizes)
    if dtype == torch.int64 and len(sizes) <= 1 and all(isinstance(s, int) and s <= SMALL for s in sizes):
        return [number] * sizes[0] if sizes else number
    return torch.full(sizes, number, dtype=dtype)


@operator("Range", settings=(0, 1, 2), mixed=True)
def range_(start: Value, limit: Value, delta: Value) -> Value:
    bounds = [start, limit, delta]
    if all(isinstance(b, int) for b in bounds) and len(range(*bounds)) <= SMALL:
        return list(range(*bounds))
    return torch.arange(start, limit, delta)


@operator("Pad", settings=(1, 2, 3), mixed=True)
def pad(
    x: Value,
    given: Value = None,
    fill: Value = None,
    axes: Value = None,
    *,
    mode: str = "constant",
    pads: Sequence[int] | None = None,
    value: float = 0.0,
) -> Tensor:
    """Amounts and the value are attributes before opset 11, inputs since."""
    x = tensor(x)
    amounts = listed(given) if given is not None else list(pads or ())
    along = [a % x.dim() for a in listed(axes)] if axes is not None else list(range(x.dim()))
    count = len(along)
    sides: list[Any] = [0, 0] * x.dim()
    for at, axis in enumerate(along):
        sides[2 * (x.dim() - 1 - axis)], sides[2 * (x.dim() - 1 - axis) + 1] = amounts[at], amounts[at + count]
    fill = value if fill is None else listed(fill)[0]
    if mode == "constant":
        while sides and sides[-1] == 0 and sides[-2] == 0 and len(sides) > 2:
            sides = sides[:-2]
        return F.pad(x, sides, value=fill)
    kind = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}.get(mode)
    moved = 2 * max((at // 2 + 1 for at, amount in enumerate(sides) if amount), default=1)
    sides = sides[: max(moved, 2 * (x.dim() - 2))]
    if kind is None or moved > 2 * min(3, x.dim() - 1):
        raise CaptureError("this padding is not supported", found=f"mode {mode} of {amounts}", allowed="constant, reflect, edge, wrap")
    return F.pad(x, sides, mode=kind)


@operator("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    n, c, h, w = x.shape
    parts = x.reshape(n, blocksize, blocksize, c // blocksize**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


@operator("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


@operator("Trilu", settings=(1,))
def trilu(x: Tensor, k: Value = 0, *, upper: int = 1) -> Tensor:
    return (torch.triu if upper else torch.tril)(x, diagonal=k or 0)


@operator("OneHot", settings=(1,), mixed=True)
def one_hot(indices: Value, depth: Value, values: Value, *, axis: int = -1) -> Tensor:
    depth = int(listed(depth)[0])
    off, on = tensor(values)
    indices = tensor(indices).to(torch.int64)
    grid = torch.arange(depth)
    hot = _wrapped(indices, depth).unsqueeze(-1) == grid
    made = torch.where(hot, on, off)
    return made if axis == -1 else made.movedim(-1, axis)


@operator("EyeLike")
def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    if dtype is not None or k:
        raise CaptureError("EyeLike with dtype or k is not supported", found=f"dtype {dtype}, k {k}")
    return torch.eye(plain(x.shape[0]), plain(x.shape[1]), dtype=x.dtype)
