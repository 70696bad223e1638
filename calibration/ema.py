"""Exponential moving average of the batches' extremes (Jacob et al. 2018, section 3.1), m the momentum:

    low = m * low + (1 - m) * (low of the batch),    and high likewise; the first batch sets both

It forgives a rare outlier batch, but depends on the order of the batches, and the range does not cover all that was seen.

>>> from qdeploy.numerics.histogram import as_batch
>>> seen = MovingAverage(QuantSpec(signed=False, symmetric=False), momentum=0.75)
>>> seen.update(*as_batch([[0.0, 2.0]]))
>>> seen.update(*as_batch([[-1.0, 1.0]]))
>>> seen.range()
(tensor([-0.2500], dtype=torch.float64), tensor([1.7500], dtype=torch.float64))
"""

from __future__ import annotations

from torch import Tensor

from qdeploy.core.errors import OptionError
from qdeploy.core.spec import QuantSpec
from qdeploy.numerics.observer import Observer, observer


@observer("ema")
class MovingAverage(Observer):
    """Moving average of the batches' extremes; `momentum` is the weight of the past."""

    def __init__(self, spec: QuantSpec, momentum: float = 0.9):
        super().__init__(spec)
        if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 <= momentum < 1:
            raise OptionError("momentum of observer 'ema'", found=repr(momentum), allowed="0 <= momentum < 1")
        self.momentum = momentum
        self._range: tuple[Tensor, Tensor] | None = None

    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        low, high = low.double(), high.double()
        if self._range is not None:
            m = self.momentum
            low, high = m * self._range[0] + (1 - m) * low, m * self._range[1] + (1 - m) * high
        self._range = low, high

    def range(self) -> tuple[Tensor, Tensor]:
        assert self._range is not None, "no batch was seen"
        return self._range
