"""For scales 2^-f: every batch votes for the f that is best for it, as in `pot_floor`, and the f with most votes wins (as PoTMode of
MQBench, for Vitis). So a batch with an outlier has one vote, however large the outlier; of equal votes the smaller f is taken.

Votes depend on the spec, and what is gathered must not, so each batch leaves a small histogram. There are at most `BATCHES` of them:
when all are used, neighbours are merged in pairs, exactly, and from then on twice as many batches have one vote together.

Worked: three batches within 1 outvote one that reaches 100:

>>> from qdeploy.numerics.histogram import as_batch
>>> seen = PowerMode(QuantSpec.parse("int8 power-of-two"))
>>> for largest in (0.9, 100.0, 0.8, 0.7):
...     seen.update(*as_batch([torch.linspace(-largest, largest, 1000).tolist()]))
>>> [v.item() for v in seen.range()]
[-1.0, 0.9921875]
"""

from __future__ import annotations

import torch
from qdeploy.calibration.pot_floor import best_scale, check_powers, limits
from torch import Tensor

from qdeploy.core.spec import QuantSpec
from qdeploy.numerics.histogram import Histogram
from qdeploy.numerics.observer import Observer, observer

BATCHES = 64
"""Histograms of one row that are kept."""
FEWEST = 8
"""Histograms that are kept however many rows they have."""
BINS = 512
"""Bins of each, right of 0."""


@observer("pot_mode")
class PowerMode(Observer):
    """The fraction length that is best for most batches; for scales that are powers of two."""

    def __init__(self, spec: QuantSpec):
        super().__init__(spec)
        self._together = 1
        self._last = 0
        self._votes: list[Histogram] = []

    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        if not self._votes or self._last == self._together:
            if len(self._votes) >= max(FEWEST, BATCHES // (2 * rows.shape[0]) * 2):
                self._pair()
            else:
                self._open(rows.shape[0])
        self._votes[-1].update(rows, low, high)
        self._last += 1

    def check(self) -> None:
        check_powers("pot_mode", self.spec)

    def range(self) -> tuple[Tensor, Tensor]:
        self.check()
        assert self._votes, "no batch was seen"
        whole = Histogram(len(self._votes[0].low), BINS)
        for one in self._votes:
            whole.merge(one)
        scales = torch.stack([best_scale(one, self.spec) for one in self._votes])
        filled = torch.stack([one.absmax > 0 for one in self._votes])
        return limits(_mode(scales, filled), whole, self.spec)

    def _open(self, channels: int) -> None:
        self._votes.append(Histogram(channels, BINS))
        self._last = 0

    def _pair(self) -> None:
        """Merge neighbours and open the next histogram."""
        for left, right in zip(self._votes[::2], self._votes[1::2], strict=True):
            left.merge(right)
        self._votes = self._votes[::2]
        self._together *= 2
        self._open(len(self._votes[0].low))


def _mode(scales: Tensor, filled: Tensor) -> Tensor:
    """The most frequent of `scales` `[T, C]` where `filled` `[T, C]`, `[C]`; of equally frequent ones the largest."""
    votes = ((scales.unsqueeze(0) == scales.unsqueeze(1)) & filled.unsqueeze(0)).sum(1)
    return scales.where(votes == votes.amax(0), 0).amax(0)
