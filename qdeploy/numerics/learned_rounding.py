r"""What reconstruction learns of a quantized layer: which way every weight is rounded, and the steps of weights and activations.

A weight w with step s and codes qmin..qmax, less the zero_point lo..hi, becomes

    w' = s (B + h),    B = clamp(floor(w / s0), lo, hi - 1),    h = clamp(1.2 sigmoid(V) - 0.1, 0, 1)

s0 is the step at the start, and B stays as it is when s is learned (Jeon et al. 2023, Genie). V starts where w' = w, for a w inside
the range, and a regularizer pushes every h to 0 or 1 (Nagel et al. 2020, AdaRound):

    R = sum of 1 - |2h - 1|^beta,    dR/dh = -2 beta |2h - 1|^(beta - 1) sign(2h - 1)

In the end h >= 1/2 is 1, so that every code is at most one away from the nearest. Steps are learned as s = s0 exp(t): they stay
positive, and a rate means the same for every tensor. For a weight dw'/dt = w'. An activation has the gradient of LSQ (Esser et al.
2020): with lo <= round(x / s) <= hi

    x' = s round(x / s),    dx'/dx = 1,    dx'/dt = x' - x

and outside x' = s lo or s hi, dx'/dx = 0, dx'/dt = x'. Both cases are dx'/dt = x' - x dx'/dx, and so is an element that is dropped,
which is let through as it is (Wei et al. 2022, QDrop): x' = x, dx'/dx = 1, dx'/dt = 0.

>>> from qdeploy.core.spec import QuantSpec
>>> spec, scale, zero = QuantSpec.parse("int2"), torch.tensor([0.5]), torch.tensor([0])
>>> learned = LearnedRounding([torch.tensor([[0.3, -0.9, 0.6]])], [(scale, zero, spec)])
>>> [round(w, 6) for w in learned.soft[0].flatten().tolist()], learned.harden()[0].tolist()
([0.3, -0.9, 0.5], [[0.5, -1.0, 0.5]])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qdeploy.core.spec import QuantSpec
from qdeploy.numerics import arith

STRETCH, SHIFT = 1.2, -0.1
"""zeta - gamma and gamma of the rectified sigmoid."""
EDGE = 1e-4
"""So far beyond 0 and 1 the rectified sigmoid still has a gradient: weights that start on the border are free to move."""
CHUNK = 1 << 16
"""Elements of an activation that are worked on at once: they stay in the cache, and are enough for two threads."""
RENEW = 4
"""Iterations from one computation of the regularizer's slope to the next: it changes slowly."""

Grid = tuple[Tensor, Tensor, QuantSpec]
"""scale `[C]`, zero_point `[C]` and spec of a weight."""


class LearnedRounding:
    """The rounding of all weights of a unit, side by side in flat tensors, with gradients by hand: most time goes into calls.

    `soft` are the weights w' as leaves that require gradients, in the layout channels_last where they have four dimensions;
    `logits` are the V and `log_steps` the t of all weights, parameters for an optimizer.
    """

    def __init__(self, weights: Sequence[Tensor], grids: Sequence[Grid]):
        self._grids = list(grids)
        sizes = [w.numel() for w in weights]
        starts = [along(scale, spec, w) for w, (scale, _, spec) in zip(weights, grids, strict=True)]
        parts = [_split(w, start, zero, spec) for w, start, (_, zero, spec) in zip(weights, starts, grids, strict=True)]
        self._base = torch.cat([torch.empty(0), *(_flat(base) for base, _ in parts)])
        rest = torch.cat([torch.empty(0), *(_flat(rest) for _, rest in parts)])
        self.logits = torch.logit((rest - SHIFT) / STRETCH)
        self.log_steps = torch.zeros(sum(len(scale) for scale, _, _ in grids))
        self._sigmoid, self._stretched, self._codes = (torch.empty_like(rest) for _ in range(3))
        self._gradient = torch.empty_like(rest)
        self._slope = torch.empty_like(rest)
        self._age = 0
        values = torch.empty_like(rest)
        self._code_views, self.soft, self._gradients = (
            [_shaped(part, w) for part, w in zip(torch.split(flat, sizes), weights, strict=True)]
            for flat in (self._codes, values, self._gradient)
        )
        for leaf in self.soft:
            leaf.requires_grad_()
        self._steps: list[Tensor] = []
        self.logits.grad, self.log_steps.grad = torch.empty_like(rest), torch.zeros_like(self.log_steps)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute `soft` anew from the parameters."""
        torch.sigmoid(self.logits, out=self._sigmoid)
        torch.mul(self._sigmoid, STRETCH, out=self._stretched).add_(SHIFT)
        torch.clamp(self._stretched, 0, 1, out=self._codes).add_(self._base)
        self._steps = [along(s, spec, leaf) for s, leaf, (_, _, spec) in zip(self.scales(), self.soft, self._grids, strict=True)]
        for codes, step, leaf in zip(self._code_views, self._steps, self.soft, strict=True):
            torch.mul(codes, step, out=leaf.detach())

    def scales(self) -> list[Tensor]:
        """The steps s, `[C]` each."""
        factors = torch.split(self.log_steps.exp(), [len(scale) for scale, _, _ in self._grids])
        return [scale * factor for (scale, _, _), factor in zip(self._grids, factors, strict=True)]

    @torch.no_grad()
    def backward(self, gradients: Sequence[Tensor], strength: float, beta: float) -> None:
        """Set the gradients of the parameters, from those of the loss by `soft`, with `strength` R added to the loss."""
        into = self.log_steps.grad
        assert into is not None
        position = 0
        for gradient, step, leaf, view, (scale, _, spec) in zip(
            gradients, self._steps, self.soft, self._gradients, self._grids, strict=True
        ):
            if spec.grid == "uniform":
                dims = [d for d in range(leaf.dim()) if spec.axis is None or d != spec.axis % leaf.dim()]
                into[position : position + len(scale)] = (gradient * leaf).sum(dims)
            position += len(scale)
            torch.mul(gradient, step, out=view)
        if strength:
            if self._age % RENEW == 0:
                side = (self._codes - self._base).mul_(2).sub_(1)
                torch.abs(side, out=self._slope).log_().mul_(beta - 1).exp_().copysign_(side)  # four times as fast as a power
            self._age += 1
            self._gradient.sub_(self._slope, alpha=2 * beta * strength)
        assert self.logits.grad is not None
        inside = torch.ops.aten.hardtanh_backward(self._gradient, self._stretched, -EDGE, 1 + EDGE)
        torch.ops.aten.sigmoid_backward.grad_input(inside, self._sigmoid, grad_input=self.logits.grad).mul_(STRETCH)

    @torch.no_grad()
    def harden(self) -> list[Tensor]:
        """The weights rounded for good, each of the shape it came in: exactly the values of `scales` and their codes."""
        torch.ge(self.logits, 0, out=self._codes).add_(self._base)
        return [
            (codes * along(scale, spec, codes)).contiguous()
            for codes, scale, (_, _, spec) in zip(self._code_views, self.scales(), self._grids, strict=True)
        ]


def along(values: Tensor, spec: QuantSpec, x: Tensor) -> Tensor:
    """`values` `[C]` shaped to broadcast to `x`."""
    return arith.along_axis(values, spec.axis, x.dim())


def _split(w: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """B and the rest, w / s - B, which is clamped to 0..1."""
    offset = along(zero, spec, w).double()
    steps = w.detach().double() / scale.double()
    base = torch.minimum(torch.maximum(steps.floor(), spec.qmin - offset), spec.qmax - 1 - offset)
    return base.float(), (steps - base).clamp(0, 1).float()


def _flat(x: Tensor) -> Tensor:
    return (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).reshape(-1)


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_flat`, a view."""
    if like.dim() != 4:
        return flat.view(like.shape)
    n, c, h, w = like.shape
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


class RandomDrop:
    """Random masks at little cost: slices at random places of one small pool of decisions, which are 1 at probability `keep`."""

    def __init__(self, keep: float, generator: torch.Generator):
        self.keep, self._generator = keep, generator
        self._pool = (torch.rand(4 * CHUNK, generator=generator) < keep).float()
        self._places: list[int] = []

    def mask(self, size: int) -> Tensor:
        """`size` decisions, at most CHUNK, float32 0 or 1."""
        if not self._places:
            self._places = torch.randint(3 * CHUNK, (1024,), generator=self._generator).tolist()
        place = self._places.pop()
        return self._pool[place : place + size]

    def mix(self, base: Tensor, other: Tensor) -> Tensor:
        """The elements of `other` with probability `keep`, else those of `base`; both have the same dense layout."""
        assert _alike(base, other)
        made = torch.empty_like(base)
        for into, start, end in zip(*(_chunks(x) for x in (made, base, other)), strict=True):
            torch.lerp(start, end, self.mask(len(into)), out=into)
        return made


class _Step(torch.autograd.Function):
    """x' of one activation with one step s.

    What is outside is found again in the backward pass: x' and x differ by more than s / 2 there, and nowhere else. So nothing has
    to be kept but both, and chunk by chunk all other tensors stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_step: Tensor, scale: Tensor, zero_point: int, spec: QuantSpec, chance: RandomDrop) -> Tensor:
        low, high = spec.qmin - zero_point, spec.qmax - zero_point
        x = x if _alike(x) else x.contiguous()
        made = torch.empty_like(x)
        for part, into in zip(_chunks(x), _chunks(made), strict=True):
            steps = torch.div(part, scale, out=into if chance.keep >= 1 else None)
            steps = steps.round_() if spec.rounding == "half_even" else arith.round_codes(steps, spec.rounding)
            torch.mul(steps.clamp_(low, high), scale, out=into if chance.keep >= 1 else steps)
            if chance.keep < 1:
                torch.lerp(part, steps, chance.mask(len(part)), out=into)
        ctx.half = float(scale) * (0.5 + 2.0**-23 * max(-low, high))
        ctx.save_for_backward(x, made)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, made = ctx.saved_tensors
        by_x, by_step = ctx.needs_input_grad[:2]
        gradient = gradients[0] if _alike(gradients[0], x) else torch.empty_like(x).copy_(gradients[0])
        passed, slope = torch.empty_like(x), torch.zeros(())
        for g, part, new, into in zip(*(_chunks(t) for t in (gradient, x, made, passed)), strict=True):
            change = new - part
            torch.ops.aten.hardtanh_backward.grad_input(g, change, -ctx.half, ctx.half, grad_input=into)
            if by_step:
                slope += torch.dot(g, change)
                slope += torch.dot(torch.sub(g, into, out=change), part)
        return passed if by_x else None, slope if by_step else None, None, None, None, None


def step_quantize(x: Tensor, log_step: Tensor, scale: Tensor, zero_point: int, spec: QuantSpec, chance: RandomDrop) -> Tensor:
    """`x` fake-quantized with the step `scale`, a scalar, which is s0 exp(`log_step`), but for elements that `chance` drops."""
    made: Tensor = _Step.apply(x, log_step, scale, zero_point, spec, chance)  # type: ignore[no-untyped-call]
    return made


def _alike(*tensors: Tensor) -> bool:
    """Whether tensors of one shape have one dense layout."""
    formats = (torch.contiguous_format, torch.channels_last)
    return any(all(x.is_contiguous(memory_format=layout) for x in tensors) for layout in formats)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """The memory of a dense `x` in chunks."""
    return torch.split(torch.as_strided(x, (x.numel(),), (1,)), CHUNK)
