"""The range that holds `percentile` percent of the values, from a histogram.

With q = percentile / 100, a symmetric spec clips |x| at its quantile q. Otherwise data of both signs lose (1 - q) / 2 at
either end, and data of one sign lose 1 - q at their own end. In a bin the values count as spread evenly, so that the quantile
is exact up to one bin, and it never lies beyond the exact extremes.

Worked: of 1..1000 with an outlier of 5000, the upper 1 percent, that is the last 10 of 1001 values, lie above 991:

>>> from qdeploy.numerics.histogram import as_batch
>>> seen = Percentile(QuantSpec(signed=False, symmetric=False), percentile=99)
>>> seen.update(*as_batch([[*range(1, 1001), 5000.0]]))
>>> low, high = seen.range()
>>> low.item(), round(high.item() / 4) * 4  # a bin is 4 wide: 8192 / 2048
(1.0, 992)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdeploy.core.errors import OptionError
from qdeploy.core.spec import QuantSpec
from qdeploy.numerics.histogram import HistogramObserver
from qdeploy.numerics.observer import observer


@observer("percentile")
class Percentile(HistogramObserver):
    """Clips the outermost 100 - `percentile` percent."""

    def __init__(self, spec: QuantSpec, percentile: float = 99.99):
        super().__init__(spec)
        if isinstance(percentile, bool) or not isinstance(percentile, int | float) or not 50 < percentile <= 100:
            raise OptionError("percentile of observer 'percentile'", found=repr(percentile), allowed="50 < percentile <= 100")
        self.percentile = percentile

    def check(self) -> None:
        if self.spec.grid.startswith("float16"):
            reason = f"observer 'percentile' chooses a range, and {self.spec.describe()} has a fixed one"
            raise OptionError(reason, action="use minmax")

    def range(self) -> tuple[Tensor, Tensor]:
        self.check()
        seen = self.histogram
        tail = seen.counts.sum(1) * (1 - self.percentile / 100)
        if self.spec.symmetric:
            return self.clipped(_cut(seen.negative() + seen.positive(), tail) * seen.width)
        tail = torch.where((seen.low < 0) & (seen.high > 0), tail / 2, tail)
        low = (seen.bins - _cut(seen.counts.flip(1), tail)) * seen.width
        high = (_cut(seen.counts, tail) - seen.bins) * seen.width
        low = torch.where(seen.low < 0, low, seen.low)
        high = torch.where(seen.high > 0, high, seen.high)
        return low.clamp(min=seen.low, max=seen.high), high.clamp(min=seen.low, max=seen.high)


def _cut(counts: Tensor, tail: Tensor) -> Tensor:
    """Where, in bins from the left end of `counts` `[C, M]`, the upper `tail` `[C]` of the counts begins, float64 `[C]`."""
    counts = counts.flip(1).double()
    passed = counts.cumsum(1)
    index = torch.searchsorted(passed, tail.unsqueeze(1), right=True).clamp(max=counts.shape[1] - 1)
    inside, end = counts.gather(1, index), passed.gather(1, index)
    into = (tail.unsqueeze(1) - (end - inside)) / inside.clamp(min=1)
    return counts.shape[1] - (index + into.clamp(0, 1)).squeeze(1)
