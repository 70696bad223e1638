"""Ops that `torch.export` keeps whole, in the ops that targets compute: attention, gates, products and norms.

What ONNX has no operator for is spelled in operators that it has: else an artifact has tensors inside of an op, without an encoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qdeploy.observer import MASK

_END = 2**63 - 1
"""What a slice to the end of a dimension has for its end."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """`scaled_dot_product_attention` in the ops that targets quantize: softmax((scale query) key^T + mask) value, in inference.

    The ones of a mask of booleans are seen. With fewer heads `[..., H, S, D]` of keys and values each serves as many of the queries.
    `softcap` bounds the scores before the mask, as the operator of ONNX does, which takes a mask and causality at once, too.
    """
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = (t.unsqueeze(-3).expand(*t.shape[:-2], times, *t.shape[-2:]).flatten(-4, -3) for t in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # the product of codes stays next to the mask and the softmax, which many targets compute in float
    scores = torch.matmul(query if factor == 1 else query * factor, key.transpose(-2, -1))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if is_causal:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if attn_mask is None or attn_mask.dtype == torch.bool:
            attn_mask = seen if attn_mask is None else attn_mask & seen
        else:
            attn_mask = torch.where(seen, attn_mask, MASK)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.where(attn_mask, scores, MASK)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)


def addmm(bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """A linear layer whose weight is stored the other way round, as in GPT-2; with factors a product and a sum."""
    if bias.dim() == 1 and beta == 1 and alpha == 1:
        return torch.nn.functional.linear(x, weight.t(), bias)
    return baddbmm(bias, x, weight, beta=beta, alpha=alpha)


def baddbmm(start: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """A sum and a matrix product."""
    product = torch.matmul(a, b)
    return (start if beta == 1 else start * beta) + (product if alpha == 1 else product * alpha)


def addcmul(start: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    """A sum and a product."""
    return start + (a * b if value == 1 else a * b * value)


def addcdiv(start: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    """A sum and a quotient."""
    return start + (a / b if value == 1 else a / b * value)


def lerp(start: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    """start + weight (end - start)."""
    return start + (end - start) * weight


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x): ONNX has no operator for it, so that targets meet the sigmoid as a tensor of its own."""
    return x * torch.sigmoid(x)


def glu(x: Tensor, dim: int = -1) -> Tensor:
    """One half of the channels, gated by the other."""
    half = x.shape[dim] // 2
    first, second = torch.split(x, half, dim)
    return first * torch.sigmoid(second)


def log_sigmoid(x: Tensor) -> Tensor:
    """By way of the sigmoid, as ONNX has it."""
    return torch.log(torch.sigmoid(x))


def rms_norm(x: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) times the weight."""
    squares = (x * x).mean(tuple(range(-len(normalized_shape), 0)), keepdim=True)
    made = x * rsqrt(squares + (torch.finfo(x.dtype).eps if eps is None else eps))
    return made if weight is None else made * weight


def rsqrt(x: Tensor) -> Tensor:
    """By way of the root, as ONNX has it."""
    return torch.reciprocal(torch.sqrt(x))


def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """log(1 + exp(beta x)) / beta, of the one with beta = 1, for which ONNX has an operator."""
    if beta == 1 or threshold < 15:  # below 15 it is another function: x itself from there on
        return NotImplemented
    return torch.nn.functional.softplus(x * beta) / beta


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1."""
    return torch.exp(x) - 1


def log1p(x: Tensor) -> Tensor:
    """log(x + 1)."""
    return torch.log(x + 1)


def erfc(x: Tensor) -> Tensor:
    """1 - erf(x)."""
    return 1 - torch.erf(x)


def logit(x: Tensor, eps: float | None = None) -> Tensor:
    """log(x / (1 - x)), of x in [eps, 1 - eps]."""
    x = x if eps is None else x.clamp(eps, 1 - eps)
    return torch.log(x / (1 - x))


def _log(base: float) -> Callable[[Tensor], Tensor]:
    """A logarithm by way of the natural one."""
    return lambda x: torch.log(x) * (1 / math.log(base))


def clamp(x: Tensor, lowest: Tensor | None = None, highest: Tensor | None = None) -> Tensor:
    """By the maximum with one tensor and the minimum with another."""
    x = x if lowest is None else torch.maximum(x, lowest)
    return x if highest is None else torch.minimum(x, highest)


def cosine_similarity(a: Tensor, b: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """The product of both over their norms, of which none is less than `eps`."""
    shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    a, b = (t if t.shape == shape else t.expand(shape) for t in (a, b))
    a, b = (t / torch.linalg.vector_norm(t, dim=dim, keepdim=True).clamp_min(eps) for t in (a, b))
    return (a * b).sum(dim)


def _moments(x: Tensor, dim: Sequence[int] | None, correction: float | None, keepdim: bool) -> Any:
    """Variance and mean: the mean of the squared distances from the mean, times n / (n - correction)."""
    correction = 1 if correction is None else correction
    dims = [d % x.dim() for d in dim] if dim else list(range(x.dim()))
    count = math.prod(x.shape[d] for d in dims)
    if not isinstance(count, int) or count <= correction:
        return NotImplemented
    mean = x.mean(dims, keepdim=True)
    apart = x - mean
    variance = (apart * apart).mean(dims, keepdim=keepdim) * (count / (count - correction))
    return variance, mean if keepdim else mean.squeeze(dims)


def _moment(root: bool, both: bool, unbiased: bool) -> Callable[..., Any]:
    """`var`, `std`, `var_mean` or `std_mean`, by an overload that says `unbiased`, or by one that says `correction`."""

    def made(x: Tensor, dim: Sequence[int] | None, correction: float | None, keepdim: bool) -> Any:
        found = _moments(x, dim, correction, keepdim)
        if found is NotImplemented:
            return found
        first = torch.sqrt(found[0]) if root else found[0]
        return (first, found[1]) if both else first

    def by_flag(x: Tensor, dim: Sequence[int] | None, unbiased: bool = True, keepdim: bool = False) -> Any:
        return made(x, dim, int(unbiased), keepdim)

    def by_number(x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None, keepdim: bool = False) -> Any:
        return made(x, dim, correction, keepdim)

    return by_flag if unbiased else by_number


def copy(into: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
    """What is written over the whole of another tensor."""
    return x.to(into.dtype).expand(into.shape)


def fill(into: Tensor, number: Tensor | float) -> Tensor:
    """One number everywhere."""
    return copy(into, number) if isinstance(number, Tensor) else torch.full_like(into, number)


def slice_scatter(x: Tensor, part: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    """What an assignment to a slice leaves: what stands before it, the new part, and what stands behind it."""
    size = x.shape[dim]
    if step == 1 and not start and (end is None or (isinstance(end, int) and end >= _END)):
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


DECOMPOSITIONS = {
    torch.ops.aten.scaled_dot_product_attention.default: attention,
    torch.ops.aten.addmm.default: addmm,
    torch.ops.aten.baddbmm.default: baddbmm,
    torch.ops.aten.addcmul.default: addcmul,
    torch.ops.aten.addcdiv.default: addcdiv,
    torch.ops.aten.lerp.Scalar: lerp,
    torch.ops.aten.lerp.Tensor: lerp,
    torch.ops.aten.expm1.default: expm1,
    torch.ops.aten.log1p.default: log1p,
    torch.ops.aten.log2.default: _log(2),
    torch.ops.aten.log10.default: _log(10),
    torch.ops.aten.erfc.default: erfc,
    torch.ops.aten.logit.default: logit,
    torch.ops.aten.clamp.Tensor: clamp,
    torch.ops.aten.cosine_similarity.default: cosine_similarity,
    **{
        getattr(getattr(torch.ops.aten, f"{kind}{end}"), overload): _moment(kind == "std", bool(end), overload == "dim")
        for kind in ("var", "std")
        for end in ("", "_mean")
        for overload in ("dim", "correction")
    },
    torch.ops.aten.copy.default: copy,
    torch.ops.aten.fill.Scalar: fill,
    torch.ops.aten.fill.Tensor: fill,
    torch.ops.aten.slice_scatter.default: slice_scatter,
    torch.ops.aten.select_scatter.default: select_scatter,
    torch.ops.aten.index.Tensor: index,
    torch.ops.aten.repeat_interleave.self_int: repeat_interleave,
    torch.ops.aten._upsample_nearest_exact2d.vec: nearest_exact,
    torch.ops.aten.silu.default: silu,
    torch.ops.aten.glu.default: glu,
    torch.ops.aten.log_sigmoid.default: log_sigmoid,
    torch.ops.aten.rms_norm.default: rms_norm,
    torch.ops.aten.rsqrt.default: rsqrt,
    torch.ops.aten.softplus.default: softplus,
    torch.ops.aten.unbind.int: unbind,
    torch.ops.aten.stack.default: stack,
    torch.ops.aten.upsample_linear1d.vec: upsample_linear1d,
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
"""For `ExportedProgram.run_decompositions`."""
