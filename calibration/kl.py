"""The threshold whose clipped, 8-bit histogram of |x| tells the least apart from the full one (Migacz, GTC 2017, TensorRT).

For every number i of kept bins, from L levels up: P is the first i bins, with all that lies beyond added to the last; Q spreads
the counts of each group of bins, one group per level, evenly over the group's bins that are not empty, without what lies
beyond. The i of the smallest KL(P || Q) = sum P log(P / Q), both normalised, gives the threshold (i + 1/2) * width.

    bin k belongs to group floor(k L / i);    L = 128 for 8 bits, and 256 where codes are spent on one sign only

Bin 0 is given the count of bin 1, because the exact zeros after a ReLU would outweigh everything else. An i whose last bin is
empty but for what lies beyond is skipped, as Q is zero there. With n the number of values, m the number kept, and M_g and
Z_g the count and the filled bins of group g, all i are evaluated from running sums:

    n KL = sum P log P - sum M_g log(M_g / Z_g) - (n - m) log(Q of the last bin) - n log(n / m)

Worked: of 10000 values of N(0, 1) and one 30 the threshold keeps the normal part and drops most of the way to 30:

>>> from qdeploy.core.spec import QuantSpec
>>> from qdeploy.numerics.histogram import as_batch
>>> seen = Entropy(QuantSpec(signed=True, symmetric=True))
>>> seen.update(*as_batch([[*torch.special.ndtri((torch.arange(10000) + 0.5) / 10000).tolist(), 30.0]]))
>>> 2 < seen.range()[1].item() < 6
True
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from qdeploy.core.errors import OptionError
from qdeploy.numerics.histogram import BINS, HistogramObserver
from qdeploy.numerics.observer import observer


@observer("kl")
class Entropy(HistogramObserver):
    """Minimises the Kullback-Leibler divergence of the clipped histogram; for 8 bits only."""

    uniform_only = "'kl' compares evenly spaced codes, and those of {} are not"

    def check(self) -> None:
        super().check()
        bits = self.spec.bits
        if bits != 8:
            reason = "KL is not meaningful below 8 bits" if bits < 8 else "KL has no more levels than bins only at 8 bits"
            raise OptionError(f"observer 'kl': {reason}", found=f"{bits} bits", allowed="8 bits", action="use mse")

    def range(self) -> tuple[Tensor, Tensor]:
        self.check()
        seen = self.histogram
        counts = (seen.negative() + seen.positive()).double()
        used = (seen.absmax / seen.width).to(torch.int64) + 1
        one_sided = (seen.low >= 0) | (seen.high <= 0)
        kept = []
        for row, bins, one in zip(counts, used.tolist(), one_sided.tolist(), strict=True):
            levels = 1 << self.spec.bits - (self.spec.symmetric or not one)
            kept.append(_kept_bins(row[:bins], levels))
        threshold = (torch.tensor(kept, dtype=torch.float64) + 0.5) * seen.width
        return self.clipped(torch.minimum(threshold, seen.absmax))


def _kept_bins(counts: Tensor, levels: int) -> int:
    """How many of the `counts` `[B]` of |x| to keep; all, where there is nothing to choose from."""
    bins = counts.shape[0]
    if bins <= levels:
        return bins
    counts = torch.cat((counts[1:2], counts[1:]))
    kept = torch.arange(levels, bins + 1)
    before, filled = pad(counts.cumsum(0), (1, 0)), pad((counts > 0).double().cumsum(0), (1, 0))
    total, inside = before[-1], before[kept]
    beyond, last = total - inside, counts[kept - 1]
    border = _borders(levels)[: len(kept)].flatten()
    # float32 holds running sums below 2^24 exactly, and is twice as fast
    exact = torch.float32 if total < 1 << 24 else torch.float64
    tables = before.to(exact), filled.to(exact)
    mass, spread = (running.index_select(0, border).view(len(kept), -1).diff(dim=1) for running in tables)
    level = mass / spread.clamp_(min=1)
    loss = pad(torch.xlogy(counts, counts).cumsum(0), (1, 0))[kept - 1] + torch.xlogy(last + beyond, last + beyond)
    # what a level without mass would add is 0 times a finite logarithm
    loss -= (
        (mass * level.clamp(min=1e-30).log_()).sum(1, dtype=torch.float64)
        + torch.xlogy(beyond, level[:, -1].double())
        + total * torch.log(total / inside)
    )
    loss[(inside == 0) | ((last == 0) & (beyond > 0))] = torch.inf
    least = (loss <= loss.min()).nonzero()[-1]
    return int(kept[least]) if bool(loss[least].isfinite()) else bins


@cache
def _borders(levels: int) -> Tensor:
    """Where group g begins for each number i of kept bins from `levels` up, `[K, levels + 1]`: the first k with k * levels >= g * i."""
    return -(-torch.arange(levels + 1) * torch.arange(levels, BINS + 1).unsqueeze(1) // levels)
