"""GPTQ: round a layer's weights one input after the other, and let those still to come make up for each error.

A layer's output error for a change dW of its weight `[O, K]` is tr(dW H dW^T), H = sum x x^T over its inputs x `[K]`: those that the
quantized network makes, so that layers are rounded in graph order and each sees what the rounding before it has done. With H^-1 =
U^T U (Cholesky), column i is rounded to q_i and the error spread over the columns behind it (Frantar et al. 2022, after Hassibi and
Stork 1993, and Frantar and Alistarh 2022, OBQ):

    e = (w_i - q_i) / U_ii,    w_j -= e U_ij  for j > i

which is the least-squares answer for the columns that are left. Errors reach the columns beyond a block of 128 as one product. H gets
`damp` times its mean diagonal added; columns go by falling H_ii, each group of a convolution in an order of its own. An input that is
always 0 is rounded to nearest, and so is every row that would not come out better.

What counts is the output of the float network, W x' with its input x', not W x. So first the weight makes up for what the quantized
layers before have done, as far as a linear map can, and then that is rounded:

    D = sum (x' - x) x^T,    W <- W + W D H^-1,    error = tr(dW H dW^T) - 2 tr(W D dW^T), dW from the given W

A convolution is a linear layer of patches: K = channels of a group x kernel, a row for each position of the output. Of large outputs
some positions are drawn at random, others in each batch, as neighbouring patches tell much the same: for a ResNet-20 with int4 weights
four times as many are worth 0.2 dB of SQNR, and D is worth 1.5 dB.

Worked: two inputs that are always equal. Rounding both weights of 0.4 to 0 errs by 0.8; rounding one up makes up for it:

>>> spec, one, zero = QuantSpec.parse("int4"), torch.ones(1), torch.zeros(1, dtype=torch.int64)
>>> gptq(torch.tensor([[0.4, 0.4]]), one, zero, spec, torch.ones(1, 2, 2, dtype=torch.float64)).tolist()
[[0.0, 1.0]]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from qdeploy.core.spec import QuantSpec
from qdeploy.graph import query
from qdeploy.graph.flow import Flow
from qdeploy.numerics import arith
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.recipes.step import Changed, Declined, Step, Work, count, fraction, generator, step

BLOCK = 128
"""Columns between two updates of all that are behind."""
ROWS = 1 << 14
"""Rows that are enough to tell H from."""
ROWS_PER_INPUT = 32
"""Rows for every column, where that is more."""


def gptq(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    hessian: Tensor,
    damp: float = 0.01,
    drift: Tensor | None = None,
) -> Tensor:
    """Values `[O, K]` on the grid of `spec`, exactly as `arith.dequantize` makes them, for float32 `weight` `[O, K]`.

    scale, zero_point: `[O]`, or `[1]` per-tensor. hessian: float64 `[G, K, K]`; the rows are G groups of O / G, one after the other.
    drift: D above, `[G, K, K]`; without it the weight's own output is the aim.
    """
    rows, size = weight.shape
    by_row = replace(spec, axis=0)
    scale, zero_point = scale.expand(rows), zero_point.expand(rows)
    order = hessian.diagonal(dim1=1, dim2=2).argsort(stable=True, dim=1, descending=True).unsqueeze(1)

    def in_order(square: Tensor) -> Tensor:
        return square.gather(1, order.mT.expand_as(square)).gather(2, order.expand_as(square))

    groups = weight.double().view(len(hessian), -1, size)
    columns = groups.gather(2, order.expand_as(groups)).mT.contiguous()
    root = torch.linalg.cholesky(_damped(in_order(hessian), damp))
    if drift is not None:
        columns += torch.cholesky_solve(in_order(drift).mT @ columns, root)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
    made = _spread(columns, factor, lambda column: arith.fake_quantize(column, scale, zero_point, by_row))
    made = torch.empty_like(groups).scatter_(2, order.expand_as(groups), made.mT).view(rows, size).float()
    nearest = arith.fake_quantize(weight, scale, zero_point, by_row)
    better = output_error(weight, made, hessian, drift) < output_error(weight, nearest, hessian, drift)
    codes = arith.quantize(torch.where(better.unsqueeze(1), made, nearest), scale, zero_point, by_row)
    return arith.dequantize(codes, scale, zero_point, by_row)


def output_error(weight: Tensor, made: Tensor, hessian: Tensor, drift: Tensor | None = None) -> Tensor:
    """The error of each output, float64 `[O]`, with `made` `[O, K]` instead of `weight`; with a `drift`, less that of `weight`."""
    groups = weight.double().view(len(hessian), -1, weight.shape[1])
    change = made.double().view_as(groups) - groups
    pull = change @ hessian if drift is None else change @ hessian - 2 * groups @ drift
    return (pull * change).sum(2).view(-1)


def _damped(hessian: Tensor, damp: float) -> Tensor:
    """H `[G, K, K]` with a share of its mean diagonal added: the mean of the inputs that are not always 0."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    used = (diagonal > 0).sum(1, keepdim=True)
    mean = torch.where(used > 0, diagonal.sum(1, keepdim=True) / used.clamp(min=1), 1.0)
    return hessian + torch.diag_embed((damp * mean).expand_as(diagonal))


def _spread(columns: Tensor, factor: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """`columns` `[G, K, O / G]` in their order `rounded`, float32 `[O]` at a time; `columns` is used up. `factor`: U, `[G, K, K]`."""
    groups, size, width = columns.shape
    made, errors = torch.empty_like(columns), torch.empty_like(columns)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        for index in range(start, stop):
            column = columns[:, index]
            made[:, index] = rounded(column.float().reshape(-1)).view(groups, width)
            error = errors[:, index] = (column - made[:, index]) / factor[:, index, index, None]
            columns[:, index + 1 : stop] -= factor[:, index, index + 1 : stop, None] * error.unsqueeze(1)
        columns[:, stop:] -= factor[:, start:stop, stop:].mT @ errors[:, start:stop]
    return made


def patches(layer: fx.Node, x: Tensor, positions: int, random: torch.Generator) -> Tensor:
    """What `layer` multiplies its weight with for an input `[N, ...]`: rows `[G, N * P, K]`, the same P positions of every sample.

    P is `positions` at most, drawn at `random`. Raises `Declined` for a layer that is no such product.
    """
    windows, kernel = _windows(layer, x)
    samples, channels = windows.shape[:2]
    sides = windows.shape[2 : windows.dim() - kernel]
    if math.prod(sides) > positions:
        drawn = torch.randperm(math.prod(sides), generator=random)[:positions]
        where: list[Any] = [slice(None), slice(None), *torch.unravel_index(drawn, sides)]
        windows = windows[tuple(where)]
    weight = query.argument(layer, 1)
    assert weight is not None
    size = math.prod(weight.meta["val"].shape[1:])
    taken = windows.reshape(samples, channels, -1, math.prod(windows.shape[-kernel:]))
    groups = channels * taken.shape[3] // size
    return taken.view(samples, groups, channels // groups, *taken.shape[2:]).permute(1, 0, 3, 2, 4).reshape(groups, -1, size)


def _windows(layer: fx.Node, x: Tensor) -> tuple[Tensor, int]:
    """A view `[N, C, *sides, *kernel]` of what `layer` multiplies its weight with, and the rank of the kernel."""
    name, found = query.op_of(layer).name, query.geometry(layer)
    if name == "linear":
        return x.reshape(len(x), 1, -1, x.shape[-1]), 1
    if found is None or "transpose" in name:
        raise Declined(f"{name} does not multiply patches")
    assert found.kernel is not None and found.stride is not None and found.dilation is not None
    reach = [d * (k - 1) for k, d in zip(found.kernel, found.dilation, strict=True)]
    given: Any = layer.args[4] if len(layer.args) > 4 else layer.kwargs.get("padding", 0)
    if isinstance(given, str):
        padding = [(r // 2, r - r // 2) if given == "same" else (0, 0) for r in reach]
    else:
        padding = [(p, p) for p in (given if isinstance(given, Sequence) else [given])]
        padding *= len(reach) // len(padding)
    windows = F.pad(x, [p for side in reversed(padding) for p in side])
    for side, (r, s) in enumerate(zip(reach, found.stride, strict=True), 2):
        windows = windows.unfold(side, r + 1, s)
    dilated: list[Any] = [..., *(slice(None, None, d) for d in found.dilation)]
    return windows[tuple(dilated)], len(reach)


@step("gptq")
class GPTQ(Step):
    """Rounds every weight with evenly spaced codes by what enters its layer, in the quantized and in the float network."""

    def __init__(self, samples: int = 512, damp: float = 0.01):
        self.samples = count("samples of step 'gptq'", samples)
        self.damp = fraction("damp of step 'gptq'", damp, 1e-6)

    def run(self, work: Work) -> str:
        module = work.prepared.module
        flows = work.flow(module, self.samples), work.flow(work.float_module, self.samples)
        todo = _layers(module)
        codes = moved = done = 0
        left = []
        for number, (path, (layer, quantizer)) in enumerate(todo.items(), 1):
            work.progress(path, number, len(todo))
            weight = query.parameter(module, path)
            compute = partial(self._round, flows, layer, weight.detach(), quantizer, generator(work.seed, number))
            try:
                made = work.checkpoint(path, compute)["weight"]
            except Declined as declined:
                left.append(f"{path}, as {declined}")
                continue
            nearest = arith.fake_quantize(weight.detach(), quantizer.scale, quantizer.zero_point, quantizer.spec)
            codes, moved, done = codes + made.numel(), moved + int((made != nearest).sum()), done + 1
            with torch.no_grad():
                weight.copy_(made)
        if not done:
            raise Declined("; ".join(left) or "no layer has a weight with evenly spaced codes")
        words = f"rounded {done} weights by their layers' inputs: {moved / codes:.0%} of the codes are not the nearest"
        return "; left: ".join((words, *left))

    def _round(self, flows: Sequence[Flow], layer: fx.Node, weight: Tensor, quantizer: Quantizer, random: torch.Generator) -> Changed:
        """The new `weight` of a layer, from its inputs in the simulation and in the float graph."""
        inputs = [_input(flow, flow.node(query.tensor_name(layer))) for flow in flows]
        rows = weight.flatten(1)
        positions = math.ceil(max(ROWS, ROWS_PER_INPUT * rows.shape[1]) / flows[0].samples)
        hessian = drift = torch.zeros((), dtype=torch.float64)
        for batch in flows[0].rows():
            x, aim = patches(layer, torch.cat([values[batch] for values in inputs]), positions, random).chunk(2, 1)
            hessian = hessian + (x.mT @ x).double()
            drift = drift + ((aim - x).mT @ x).double()
        made = gptq(rows, quantizer.scale, quantizer.zero_point, quantizer.spec, hessian, self.damp, drift)
        return {"weight": made.view_as(weight)}


def _input(flow: Flow, layer: fx.Node) -> Tensor:
    """The values that enter `layer`, `[N, ...]`; `Declined` where they do not come sample by sample."""
    flow.advance(layer)
    try:
        return flow[layer.all_input_nodes[0]]
    except KeyError as error:
        raise Declined("its input is not one of each sample") from error


def _layers(module: fx.GraphModule) -> dict[str, tuple[fx.Node, Quantizer]]:
    """The weights with evenly spaced codes, by their paths in graph order: the first layer that each serves, and its quantizer."""
    found: dict[str, tuple[fx.Node, Quantizer]] = {}
    for layer in module.graph.nodes:
        weight = query.argument(layer, query.op_of(layer).weight) if layer.op == "call_function" else None
        if weight is None or weight.op != "call_module":
            continue
        quantizer, source = module.get_submodule(str(weight.target)), weight.args[0]
        assert isinstance(quantizer, Quantizer) and isinstance(source, fx.Node)
        if source.op == "get_attr" and quantizer.spec.linear:
            found.setdefault(str(source.target), (layer, quantizer))
    return found
