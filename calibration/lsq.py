"""The range of the first step of LSQ (Esser et al. 2020, section 2.3), a few times the mean of |x|, with Q codes right of 0:

    step = 2 E|x| / sqrt(Q),    and the range ends at Q * step = 2 sqrt(Q) E|x|

LSQ takes the mean of the weights or of the first batch; here it is that of everything seen. Q is qmax for a symmetric spec. Otherwise
data of one sign have all qmax - qmin codes on their side, and data of both signs half of them on either side. The range is cut to the
extremes. Since it grows with sqrt(Q), that is what it comes to at 8 bits, 22 E|x|; the formula is for 2 to 4 bits.

Worked: E|x| = 1 and 3 codes right of 0 make a step of 2 / sqrt(3), and 3 steps are less than the largest value:

>>> from qdeploy.numerics.histogram import as_batch
>>> seen = FirstStep(QuantSpec(bits=3, signed=True, symmetric=True))
>>> seen.update(*as_batch([[0.0, 0.5, -0.5, -1.0, 0.0, 0.0, 5.0, -1.0]]))
>>> [round(v.item(), 4) for v in seen.range()]
[-1.0, 3.4641]
"""

from __future__ import annotations

import torch
from qdeploy.calibration.minmax import MinMax
from torch import Tensor

from qdeploy.core.spec import QuantSpec
from qdeploy.numerics.observer import observer


@observer("lsq")
class FirstStep(MinMax):
    """2 sqrt(Q) E|x|, cut to the extremes; for codes with even steps."""

    uniform_only = "'lsq' chooses a step, and codes of {} have no even steps"

    def __init__(self, spec: QuantSpec):
        super().__init__(spec)
        self._total: Tensor | float = 0.0
        self._count = 0

    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        super().update(rows, low, high)
        self._total = self._total + torch.linalg.vector_norm(rows, 1, dim=1, dtype=torch.float64)
        self._count += rows.shape[1]

    def range(self) -> tuple[Tensor, Tensor]:
        self.check()
        low, high = super().range()
        right = torch.full_like(low, self.spec.qmax)
        if not self.spec.symmetric:
            codes = torch.full_like(low, self.spec.qmax - self.spec.qmin)
            right = torch.where((low < 0) & (high > 0), codes / 2, codes)
        end = 2 * right.sqrt() * self._total / self._count
        return (-end).clamp(min=low, max=high), end.clamp(min=low, max=high)
