"""ONNX operators that take many elements together: reductions, products of matrices, sorting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qdeploy.capture import decompose
from qdeploy.core.errors import CaptureError
from qdeploy.importing.table import operator
from qdeploy.importing.values import Value, is_plain, listed, tensor


def _reduce(
    name: str,
    tensors: Callable[..., Tensor],
    numbers: Callable[[Sequence[Any]], Any] | None = None,
    single: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """Axes are an attribute at first and an input later; without any, all are reduced, unless `noop_with_empty_axes`.

    `single` is the reduction of each element alone.
    """

    def run(
        x: Value, given: Value = None, *, axes: Sequence[int] | None = None, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Value:
        along = list(axes or ()) if given is None else listed(given)
        if not along and noop_with_empty_axes:
            return single(tensor(x))
        if is_plain(x) and numbers is not None:
            made = numbers(listed(x))
            return [made] if keepdims and isinstance(x, list | tuple) else made
        x = tensor(x)
        return tensors(x, dim=along or list(range(x.dim())), keepdim=bool(keepdims))

    run.__name__ = f"onnx_{name.lower()}"
    operator(name, settings=(1,), mixed=True)(run)


def _product(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((d % x.dim() for d in dim), reverse=True):
        x = torch.prod(x, dim=axis, keepdim=keepdim)
    return x


_reduce("ReduceMean", torch.mean)
_reduce("ReduceSum", torch.sum, sum)
_reduce("ReduceMax", torch.amax, max)
_reduce("ReduceMin", torch.amin, min)
_reduce("ReduceProd", _product, math.prod)
_reduce("ReduceL1", lambda x, dim, keepdim: torch.sum(torch.abs(x), dim=dim, keepdim=keepdim), single=torch.abs)
_reduce("ReduceL2", lambda x, dim, keepdim: torch.sqrt(torch.sum(x * x, dim=dim, keepdim=keepdim)), single=torch.abs)
_reduce("ReduceSumSquare", lambda x, dim, keepdim: torch.sum(x * x, dim=dim, keepdim=keepdim), single=torch.square)
_reduce("ReduceLogSumExp", torch.logsumexp)


@operator("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@operator("Gemm")
def gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
) -> Tensor:
    """The factors go to the matrix and the summand, since those are constants in a layer."""
    b = b if alpha == 1 else b * alpha
    made = torch.matmul(a.t() if transA else a, b.t() if transB else b)
    if c is None:
        return made
    return made + (c if beta == 1 else c * beta)


@operator("Einsum")
def einsum(*values: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *values)


@operator("CumSum", settings=(1,))
def cumsum(x: Tensor, axis: Value, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    axis = listed(axis)[0]
    made = torch.cumsum(x.flip(axis) if reverse else x, axis)
    if exclusive:
        made = made - (x.flip(axis) if reverse else x)
    return made.flip(axis) if reverse else made


@operator("ArgMax")
def argmax(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _argument(torch.argmax, x, axis, keepdims, select_last_index)


@operator("ArgMin")
def argmin(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return _argument(torch.argmin, x, axis, keepdims, select_last_index)


def _argument(function: Callable[..., Tensor], x: Tensor, axis: int, keepdims: int, last: int) -> Tensor:
    if not last:
        return function(x, dim=axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=bool(keepdims))


@operator("TopK", settings=(1,), many=True)
def topk(x: Tensor, count: Value = None, *, k: int | None = None, axis: int = -1, largest: int = 1, sorted: int = 1) -> Any:
    number: Any = k if count is None else listed(count)[0]
    return torch.topk(x, number, dim=axis, largest=bool(largest), sorted=bool(sorted))


@operator("Attention")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int = 0,
    q_num_heads: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int = 1,
    qk_matmul_output_mode: int = 0,
) -> Tensor:
    """Spelled out, so that both products and the softmax are tensors that can be quantized."""
    packed = q.dim() == 3
    if packed:
        q, k, v = (_heads(t, count) for t, count in ((q, q_num_heads), (k, kv_num_heads), (v, kv_num_heads)))
    made = decompose.attention(q, k, v, mask, is_causal=bool(is_causal), scale=scale, enable_gqa=True, softcap=softcap)
    return made.transpose(1, 2).flatten(2) if packed else made


def _heads(x: Tensor, count: int) -> Tensor:
    if not count:
        raise CaptureError("attention over three dimensions without its number of heads", action="set q_num_heads and kv_num_heads")
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)
