"""The range of least error: minimise sum |x - Q(x)|^p over ranges, with x from a histogram, evenly spread in each bin.

Everything is exact for that density; no bin is replaced by its centre, so steps narrower than a bin do no harm. For p = 2 let
s be the scale, N the number of codes right of 0, and T(t) the integral of max(x - t, 0), by which the values exceed t. Since
(x - ns)^2 - (x - (n - 1)s)^2 = -2s (x - (n - 1/2)s), one more code lowers the error by twice s T at its lower border:

    error(s, N) = integral of x^2 - 2s * (T(s/2) + T(3s/2) + ... + T((N - 1/2)s))

T is a parabola in each bin, and the running sums give the error for every N at once. The negative values have the same sum with
their own T, so one scale yields the errors of all its zero_points, and the search is in one variable: a geometric series of
scales down to 2^-9 of the full one, then two finer ones around the best. Only grids whose range fits inside the data are taken.

For another p, or more than 10 bits, that range is improved by a local search over (low, high) with an antiderivative: with
n = Q(x) / s and u = x - ns, the integral of |x - Q(x)|^p from 0 to x is

    G(x) = n * 2 (s/2)^(p+1) / (p+1) + sign(u) |u|^(p+1) / (p+1)

p = 2.4, from BRECQ (Li et al. 2021, its code), weighs clipping a little more. A range that gains less than 1 percent over the
full one is not taken.

Scales that are powers of two are so few that all are compared, from the smallest that clips nothing to 2^-5 of it, each with the
zero_point that is best for p = 2. The range is then that of the grid itself, which may end beyond the data.

Worked: for N(0, 1) and 4 signed bits the best threshold is 2.47, by numerical integration of the normal density:

>>> from qdeploy.numerics.histogram import as_batch
>>> seen = MeanSquare(QuantSpec(bits=4, signed=True, symmetric=True))
>>> seen.update(*as_batch([torch.special.ndtri((torch.arange(10000) + 0.5) / 10000).tolist()]))
>>> round(seen.range()[1].item(), 1)
2.5
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from qdeploy.core.errors import OptionError
from qdeploy.core.spec import QuantSpec
from qdeploy.numerics.arith import choose_scale
from qdeploy.numerics.histogram import HistogramObserver
from qdeploy.numerics.observer import observer

EXACT_BITS = 10
"""Widest codes whose zero_points are all tried; beyond, a bin is about as wide as a step."""
COARSE = 52
"""Candidate scales of the first search, down to 2^-9 of the full one: 13 percent apart."""
HALVINGS = 5
"""How often the power of two that clips nothing is halved; MQBench's observers for Vitis go to 4."""
SPREADS = (0.12, 0.015)
"""Half widths of the finer searches."""
RATIOS = (1.3, 1.15, 1.08, 1.04, 1.02, 1.01)
"""Ratios between the thresholds of the local search, round by round."""
WORTH = 0.99
"""Share of the full range's error that a clipped range must come below."""
CHUNK = 1 << 19
"""Terms that are held at once, so that temporaries stay in the cache."""

Sides = tuple[Tensor, Tensor]
Candidates = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@observer("mse")
class MeanSquare(HistogramObserver):
    """Minimises the mean of |error|^`p`."""

    uniform_only = "'mse' compares evenly spaced codes, and those of {} are not"

    def __init__(self, spec: QuantSpec, p: float = 2.0):
        super().__init__(spec)
        if isinstance(p, bool) or not isinstance(p, int | float) or not 1 <= p <= 4:
            raise OptionError("p of observer 'mse'", found=repr(p), allowed="1 <= p <= 4, usually 2 or 2.4")
        self.p = p

    def range(self) -> tuple[Tensor, Tensor]:
        self.check()
        seen = self.histogram
        low, high = (v / seen.width for v in (seen.low.clamp(max=0), seen.high.clamp(min=0)))
        counts = seen.counts
        if self.spec.grid == "power_of_two":
            codes = 0 if self.spec.symmetric else self.spec.qmax - self.spec.qmin
            terms = 2 * HALVINGS * max(counts.shape[1], codes)
            low, high = _by_rows(_search_powers, counts, (low, high), (low, high), terms, self.spec, self.p)
            return low * seen.width, high * seen.width
        if self.spec.symmetric:
            counts, high = seen.negative() + seen.positive(), torch.maximum(-low, high)
            low = -high
        few = replace(self.spec, bits=min(self.spec.bits, EXACT_BITS))
        terms = COARSE * (few.qmax if few.symmetric else 2 * (few.qmax - few.qmin))
        best = _by_rows(_search_square, counts, (low, high), (low, high), terms, few, 2.0)
        if self.p != 2 or self.spec.bits > EXACT_BITS:
            terms = (4 if self.spec.symmetric else 16) * counts.shape[1]
            best = _by_rows(_search_power, counts, (low, high), best, terms, self.spec, self.p)
        low, high = (v * seen.width for v in best)
        return low.clamp(min=seen.low, max=seen.high), high.clamp(min=seen.low, max=seen.high)


def _by_rows(
    search: Callable[[Tensor, Sides, Sides, QuantSpec, float], Sides],
    counts: Tensor,
    full: Sides,
    start: Sides,
    terms: int,
    spec: QuantSpec,
    p: float,
) -> Sides:
    """`search` in groups of rows, of `terms` terms each. All lengths are in bins."""
    step = max(1, CHUNK // terms)
    found = []
    for first in range(0, counts.shape[0], step):
        rows = slice(first, first + step)
        found.append(search(counts[rows].double(), (full[0][rows], full[1][rows]), (start[0][rows], start[1][rows]), spec, p))
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


def _search_square(counts: Tensor, full: Sides, _: Sides, spec: QuantSpec, p: float) -> Sides:
    """The best `(low, high)` `[R]` for p = 2 of rows with `counts` `[R, B]` of |x| or `[R, 2B]` of x."""
    unit = float(choose_scale(torch.zeros(1), torch.ones(1), spec)[0])
    size = (full[1] if spec.symmetric else full[1] - full[0]).clamp(min=1e-9).unsqueeze(1)
    candidates = _candidates(counts, full, spec)
    factor = torch.logspace(-9, 0, COARSE, base=2, dtype=torch.float64).expand(len(size), -1)
    tried = candidates(size * factor * unit)
    whole = [v[:, -1:] for v in tried]
    best = _least(*tried, factor)
    for spread in SPREADS:
        around = 1 + torch.linspace(-spread, spread, 17, dtype=torch.float64)
        factor = (best[3] * around).clamp(max=1)
        best = _least(*candidates(size * factor * unit), factor)
    keep = (best[0] >= WORTH * whole[0]) & whole[0].isfinite()
    low, high = (torch.where(keep, w, b).squeeze(1) for w, b in zip(whole[1:], best[1:3], strict=True))
    return low, high


def _least(loss: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The entries `[R, 1]` of the smallest `loss` `[R, K]`."""
    index = loss.argmin(1, keepdim=True)
    return tuple(v.gather(1, index) for v in (loss, *others))


def _candidates(counts: Tensor, full: Sides, spec: QuantSpec) -> Candidates:
    """From scales `[R, K]` to the least errors with them, lows and highs `[R, K]`."""
    if spec.symmetric:
        return _fixed_candidates(counts, spec.qmax, -1)
    if not full[0].any():  # with nothing below 0 all codes lie above
        return _fixed_candidates(counts[:, counts.shape[1] // 2 :], spec.qmax - spec.qmin, 0)
    return _asymmetric_candidates(counts, full, spec)


def _fixed_candidates(counts: Tensor, codes: int, below: int) -> Candidates:
    """`_candidates` where 0 has `codes` codes above it, and as many below it (`below` = -1) or none (0)."""
    table, square = _excess_table(counts), _square(counts)

    def candidates(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gain = _excess(table, scale, codes).sum(2)
        return square - 2 * scale * gain, below * codes * scale, codes * scale

    return candidates


def _asymmetric_candidates(counts: Tensor, full: Sides, spec: QuantSpec) -> Candidates:
    """`_candidates` with each scale's best zero_point."""
    sides = counts[:, : counts.shape[1] // 2].flip(1), counts[:, counts.shape[1] // 2 :]
    tables, square = [_excess_table(side) for side in sides], _square(sides[0]) + _square(sides[1])
    codes = spec.qmax - spec.qmin
    left = torch.arange(codes + 1, dtype=torch.float64)

    def candidates(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        below, above = (pad(_excess(table, scale, codes).cumsum_(2), (1, 0)) for table in tables)
        # A grid with `left` codes below 0 has the rest above; its range may be moved by less than half a step to lie inside.
        grid = -left * scale.unsqueeze(2)
        first, last = full[0].view(-1, 1, 1), (full[1].unsqueeze(1) - codes * scale).unsqueeze(2)
        low = torch.minimum(torch.maximum(grid, first), last)
        moved = (low - grid).abs_() >= (0.5 - 1e-6) * scale.unsqueeze(2)
        gain, index = (below + above.flip(2)).masked_fill_(moved, -torch.inf).max(2, keepdim=True)
        low = low.gather(2, index).squeeze(2)
        return square - 2 * scale * gain.squeeze(2), low, low + codes * scale

    return candidates


def _square(counts: Tensor) -> Tensor:
    """Integral of x^2 for `counts` `[R, B]` of |x|, `[R, 1]`."""
    place = torch.arange(counts.shape[1], dtype=torch.float64)
    return (counts @ (place * place + place + 1 / 3)).unsqueeze(1)


def _excess_table(counts: Tensor) -> Tensor:
    """The coefficients of T(b + u) = t0 + t1 u + t2 u^2 in bin b, `[R, B + 1, 3]`; they are 0 in the last."""
    tail = counts.flip(1).cumsum(1).flip(1)
    beyond = pad(tail[:, 1:], (0, 1)) + counts / 2
    return pad(torch.stack((beyond.flip(1).cumsum(1).flip(1), -tail, counts / 2), dim=2), (0, 0, 0, 1))


def _excess(table: Tensor, scale: Tensor, codes: int) -> Tensor:
    """T((j - 1/2) * scale) for j = 1..codes and scales `[R, K]` in bins, `[R, K, codes]`."""
    rows, bins = table.shape[:2]
    point = scale.unsqueeze(2) * (torch.arange(codes, dtype=torch.float64) + 0.5)
    index = point.clamp(max=bins - 1).to(torch.int64)
    point -= index
    index += torch.arange(0, rows * bins, bins).view(-1, 1, 1)
    part = table.view(-1, 3).index_select(0, index.flatten()).view(*index.shape, 3)
    return (part[..., 2] * point).add_(part[..., 1]).mul_(point).add_(part[..., 0])


def _search_powers(counts: Tensor, full: Sides, _: Sides, spec: QuantSpec, p: float) -> Sides:
    """The limits `(low, high)` `[R]` of the best grid whose scale is a power of two, of rows with `counts` `[R, 2B]` of x."""
    # a histogram's bins fit its data, so that in bins no row is so small that its scale would be raised
    widest = choose_scale(*full, spec)[0].unsqueeze(1)
    scale = widest * 0.5 ** torch.arange(HALVINGS + 1, dtype=torch.float64)
    left = _codes_left(counts, scale, spec) if not spec.symmetric else torch.full_like(scale, -spec.qmin)
    loss = _grid_loss(counts, scale, spec.qmin + left, spec, p, counts.shape[1] // 2)
    scale, left = (v.squeeze(1) for v in _least(loss, scale, left)[1:])
    scale = scale.where(full[0] < full[1], 0)
    return -left * scale, (spec.qmax - spec.qmin - left) * scale


def _codes_left(counts: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """How many codes are best left of 0 with each scale `[R, K]`, float64 `[R, K]`; the fewest of equally good ones."""
    middle, codes = counts.shape[1] // 2, spec.qmax - spec.qmin
    sides = counts[:, :middle].flip(1), counts[:, middle:]
    below, above = (pad(_excess(_excess_table(side), scale, codes).cumsum_(2), (1, 0)) for side in sides)
    return (below + above.flip(2)).argmax(2).double()


def _search_power(counts: Tensor, full: Sides, start: Sides, spec: QuantSpec, p: float) -> Sides:
    """A better `(low, high)` `[R]` than `start` for any p; see `_search_square`."""
    low, high = (v.unsqueeze(1) for v in start)
    first, last = (v.unsqueeze(1) for v in full)
    for ratio in RATIOS:
        factor = torch.tensor([1 / ratio, 1, ratio], dtype=torch.float64)
        highs = torch.cat((torch.minimum(high * factor, last), last), 1)
        if spec.symmetric:
            lows = -highs
        else:
            lows = torch.cat((torch.maximum(low * factor, first), first), 1)
            lows, highs = lows.repeat_interleave(highs.shape[1], 1), highs.repeat(1, lows.shape[1])
        loss = _power_loss(counts, lows, highs, spec, p)
        least, low, high = _least(loss, lows, highs)
        keep = least >= WORTH * loss[:, -1:]
    return torch.where(keep, first, low).squeeze(1), torch.where(keep, last, high).squeeze(1)


def _power_loss(counts: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, p: float) -> Tensor:
    """Error of the encodings of ranges `low`, `high` `[R, K]` in bins, `[R, K]`."""
    size = torch.maximum(-low, high).amax(1, keepdim=True).clamp(min=1e-9)
    scale, zero_point = choose_scale((low / size).flatten(), (high / size).flatten(), spec)
    origin = 0 if spec.symmetric else counts.shape[1] // 2
    return _grid_loss(counts, scale.view_as(low) * size, zero_point.view_as(low), spec, p, origin)


def _grid_loss(counts: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, p: float, origin: int) -> Tensor:
    """Error of encodings `[R, K]`, the scales in bins, `[R, K]`; 0 is the left edge of bin `origin`."""
    s, zero = scale.unsqueeze(2), zero_point.unsqueeze(2)
    edges = torch.arange(counts.shape[1] + 1, dtype=torch.float64) - origin
    n = (edges / s).round_().clamp_(spec.qmin - zero, spec.qmax - zero)
    u = edges - n * s
    g = n.mul_(2 * (s / 2) ** (p + 1)).add_(u.abs().pow_(p + 1).copysign_(u))
    return torch.einsum("rke,re->rk", g, pad(counts, (1, 0)) - pad(counts, (0, 1))) / (p + 1)
