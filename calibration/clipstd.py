"""The mean and k standard deviations to either side, cut to the extremes (weights in DSQ, Gong et al. 2019, take k = 2.6):

    low = max(min x, mean - k sigma),    high = min(max x, mean + k sigma)

Mean and sum of squares M about it are float64 and merge without cancellation (Chan et al. 1979), a and b two sets of values:

    mean = mean_a + d n_b / n,    M = M_a + M_b + d^2 n_a n_b / n,    d = mean_b - mean_a,    n = n_a + n_b,    sigma^2 = M / n

Worked: 99 times -1 and 1 and one 20 have mean 0.1005 and sigma 1.7306, so that 20 is clipped:

>>> from qdeploy.numerics.histogram import as_batch
>>> seen = ClipDeviation(QuantSpec(signed=False, symmetric=False))
>>> seen.update(*as_batch([[-1.0, 1.0] * 99 + [20.0]]))
>>> [round(v.item(), 3) for v in seen.range()]
[-1.0, 4.6]
"""

from __future__ import annotations

import torch
from qdeploy.calibration.minmax import MinMax
from torch import Tensor

from qdeploy.core.errors import OptionError
from qdeploy.core.spec import QuantSpec
from qdeploy.numerics.observer import observer

PART = 1 << 20
"""Elements that are turned into float64 at once."""


@observer("clipstd")
class ClipDeviation(MinMax):
    """The mean and `k` standard deviations to either side."""

    uniform_only = "'clipstd' clips, and the codes of {} need no clipping"

    def __init__(self, spec: QuantSpec, k: float = 2.6):
        super().__init__(spec)
        if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k <= 100:
            raise OptionError("k of observer 'clipstd'", found=repr(k), allowed="0 < k <= 100, usually 2.6")
        self.k = k
        self._count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        super().update(rows, low, high)
        for part in torch.split(rows, max(1, PART // rows.shape[0]), dim=1):
            variance, mean = torch.var_mean(part.double(), dim=1, correction=0)
            self._merge(part.shape[1], mean, variance * part.shape[1])

    def range(self) -> tuple[Tensor, Tensor]:
        self.check()
        low, high = super().range()
        assert self._mean is not None and self._squares is not None
        away = self.k * (self._squares / self._count).sqrt()
        return (self._mean - away).clamp(min=low, max=high), (self._mean + away).clamp(min=low, max=high)

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if self._mean is None or self._squares is None:
            self._count, self._mean, self._squares = count, mean, squares
            return
        total = self._count + count
        away = mean - self._mean
        self._squares = self._squares + squares + away.square() * (self._count * count / total)
        self._mean = self._mean + away * (count / total)
        self._count = total
