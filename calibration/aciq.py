"""The threshold of least expected error for a Laplace or a normal density (ACIQ, Banner et al. 2019), found without a search.

With M bits, a threshold a and even steps, the expected squared error is that of clipping and that of rounding, step^2 / 12:

    Laplace, b = E|x - mean|:          2 b^2 exp(-a / b) + a^2 / (3 * 4^M),    least at a = b W(3 * 4^M), W Lambert's function
    normal, sigma^2 = E(x - mean)^2:   2 E max(x - mean - a, 0)^2 + a^2 / (3 * 4^M),    least at a = t sigma with

        t / (3 * 4^M) = 2 (phi(t) - t P(z > t)),    z ~ N(0, 1) with density phi

Of the two the one is taken whose threshold makes the smaller error on the values seen: clipping, as counted in a histogram, and
rounding. (Each formula by itself trusts its own density, and the normal one always promises less.) The range is mean -+ a, cut to the
extremes.

Data of one sign are half of a density that is symmetric about 0, with one bit more, unless a symmetric spec spends that bit on the
other sign. The zeros of a ReLU are no part of the density: bin 0 gets the count of bin 1, as for KL.

Worked: for N(0, 1) and 4 bits the best threshold is 2.559 (exactly 2.47, as 15 levels are not quite 16):

>>> from qdeploy.core.spec import QuantSpec
>>> from qdeploy.numerics.histogram import as_batch
>>> seen = Analytic(QuantSpec(bits=4, signed=True, symmetric=True))
>>> seen.update(*as_batch([torch.special.ndtri((torch.arange(10000) + 0.5) / 10000).tolist()]))
>>> round(seen.range()[1].item(), 2)
2.56
"""

from __future__ import annotations

import math
from functools import cache

import torch
from scipy.optimize import brentq
from scipy.special import lambertw
from torch import Tensor

from qdeploy.numerics.histogram import HistogramObserver
from qdeploy.numerics.observer import observer


@observer("aciq")
class Analytic(HistogramObserver):
    """Clips where a Laplace or a normal density of the same spread is best clipped."""

    uniform_only = "'aciq' presumes evenly spaced codes, and those of {} are not"

    def range(self) -> tuple[Tensor, Tensor]:
        self.check()
        seen = self.histogram
        both = (seen.low < 0) & (seen.high > 0)
        place = torch.arange(-seen.bins, seen.bins, dtype=torch.float64) + 0.5
        counts = torch.where(both.unsqueeze(1), seen.counts, _without_zeros(seen.counts)).double()
        total = counts.sum(1)
        mean = torch.where(both, counts @ place / total, 0)
        away = (place - mean.unsqueeze(1)).abs_()
        bits = torch.where(both, self.spec.bits, self.spec.bits + (not self.spec.symmetric))
        tried = []
        for spread, ratios in ((_mean(counts, away), laplace_ratio), (_mean(counts, away.square()).sqrt(), normal_ratio)):
            threshold = spread * torch.tensor([ratios(m) for m in bits.tolist()], dtype=torch.float64)
            clipped = _mean(counts, (away - threshold.unsqueeze(1)).clamp_(min=0).square_())
            tried.append((clipped + threshold.square() / (3 * 4.0 ** bits.double()), threshold))
        threshold = torch.where(tried[0][0] < tried[1][0], tried[0][1], tried[1][1])
        threshold = torch.where(total > 0, threshold, 2 * seen.bins)  # of zeros alone there is nothing to clip
        low, high = ((mean + side * threshold) * seen.width for side in (-1, 1))
        return low.clamp(min=seen.low, max=seen.high), high.clamp(min=seen.low, max=seen.high)


def _without_zeros(counts: Tensor) -> Tensor:
    """`counts` `[C, 2 * bins]` of values of one sign, with as many in the bin right of 0 as in its neighbours."""
    middle = counts.shape[1] // 2
    changed = counts.clone()
    changed[:, middle] = torch.maximum(counts[:, middle - 1], counts[:, middle + 1])
    return changed


def _mean(counts: Tensor, values: Tensor) -> Tensor:
    """The mean of `values` `[C, B]`, `[C]`; 0 of nothing."""
    return (counts * values).sum(1) / counts.sum(1).clamp(min=1)


@cache
def laplace_ratio(bits: int) -> float:
    """The best threshold in units of b.

    >>> round(laplace_ratio(4), 3)
    5.029
    """
    return float(lambertw(3 * 4.0**bits).real)


@cache
def normal_ratio(bits: int) -> float:
    """The best threshold in units of sigma.

    >>> round(normal_ratio(4), 3)
    2.559
    """

    def slope(t: float) -> float:
        density, beyond = math.exp(-t * t / 2) / math.sqrt(2 * math.pi), math.erfc(t / math.sqrt(2)) / 2
        return t / (3 * 4.0**bits) - 2 * (density - t * beyond)

    return float(brentq(slope, 0.01, 20))
