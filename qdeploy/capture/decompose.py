"""Ops that `torch.export` keeps whole, in the ops that targets compute: attention, gates, products and norms.

What ONNX has no operator for is spelled in operators that it has: else an artifact has tensors inside of an op, without an encoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qdeploy.capture import data_movement
from qdeploy.numerics.observer import MASK


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


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Any:
    """The one op for all convolutions, of programs that were decomposed before, by the name of what it computes."""
    functions = torch.nn.functional
    sides = weight.dim() - 2
    if transposed:
        call = getattr(functions, f"conv_transpose{sides}d")
        return call(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return getattr(functions, f"conv{sides}d")(x, weight, bias, stride, padding, dilation, groups)


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


def divided(x: Tensor, y: Tensor | float, *, rounding_mode: str | None = None) -> Any:
    """A quotient that is rounded down, or not at all; towards 0 as the exporter has it."""
    if rounding_mode == "trunc" or not x.is_floating_point():
        return NotImplemented
    return x / y if rounding_mode is None else torch.floor(x / y)


def remainder(x: Tensor, y: Tensor | float) -> Any:
    """x - floor(x / y) y, of floats."""
    return x - torch.floor(x / y) * y if x.is_floating_point() else NotImplemented


def lstm_cell(
    x: Tensor,
    state: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of a long short-term memory."""
    h, c = state
    enter, forget, new, leave = (torch.nn.functional.linear(x, w_ih, b_ih) + torch.nn.functional.linear(h, w_hh, b_hh)).chunk(4, 1)
    cell = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(cell), cell


def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None) -> Tensor:
    """One step of a gated recurrent unit."""
    reset, update, new = torch.nn.functional.linear(x, w_ih, b_ih).chunk(3, 1)
    reset_h, update_h, new_h = torch.nn.functional.linear(h, w_hh, b_hh).chunk(3, 1)
    made = torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
    return made + torch.sigmoid(update + update_h) * (h - made)


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


DECOMPOSITIONS = {
    torch.ops.aten.scaled_dot_product_attention.default: attention,
    torch.ops.aten.convolution.default: convolution,
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
    torch.ops.aten.div.Tensor_mode: divided,
    torch.ops.aten.div.Scalar_mode: divided,
    torch.ops.aten.remainder.Tensor: remainder,
    torch.ops.aten.remainder.Scalar: remainder,
    torch.ops.aten.lstm_cell.default: lstm_cell,
    torch.ops.aten.gru_cell.default: gru_cell,
    torch.ops.aten.cosine_similarity.default: cosine_similarity,
    **{
        getattr(getattr(torch.ops.aten, f"{kind}{end}"), overload): _moment(kind == "std", bool(end), overload == "dim")
        for kind in ("var", "std")
        for end in ("", "_mean")
        for overload in ("dim", "correction")
    },
    torch.ops.aten.silu.default: silu,
    torch.ops.aten.glu.default: glu,
    torch.ops.aten.log_sigmoid.default: log_sigmoid,
    torch.ops.aten.rms_norm.default: rms_norm,
    torch.ops.aten.rsqrt.default: rsqrt,
    torch.ops.aten.softplus.default: softplus,
    **data_movement.DECOMPOSITIONS,
}
"""For `ExportedProgram.run_decompositions`."""
