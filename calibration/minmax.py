"""The smallest and the largest value ever seen: low = min over batches, high = max over batches.

Nothing is clipped, so one outlier costs every other value resolution; right for weights and for bounded activations.

>>> from qdeploy.numerics.histogram import as_batch
>>> seen = MinMax(QuantSpec(signed=False, symmetric=False))
>>> seen.update(*as_batch([[0.0, 2.0]]))
>>> seen.update(*as_batch([[-1.0, 1.0]]))
>>> seen.range()
(tensor([-1.], dtype=torch.float64), tensor([2.], dtype=torch.float64))
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdeploy.core.spec import QuantSpec
from qdeploy.numerics.observer import Observer, observer


@observer("minmax")
class MinMax(Observer):
    """Running union of the batches' extremes."""

    def __init__(self, spec: QuantSpec):
        super().__init__(spec)
        self._range: tuple[Tensor, Tensor] | None = None

    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        low, high = low.double(), high.double()
        if self._range is not None:
            low, high = torch.minimum(self._range[0], low), torch.maximum(self._range[1], high)
        self._range = low, high

    def range(self) -> tuple[Tensor, Tensor]:
        assert self._range is not None, "no batch was seen"
        return self._range
