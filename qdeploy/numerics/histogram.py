"""A histogram of a stream whose width doubles when the values outgrow it: bounded memory, and no count is ever split.

Each row has 2 * bins bins of one width w = 2^e / bins, anchored at 0: a value x is counted in bin floor(x / w) + bins. Here e
is the smallest integer with max|x| < 2^e over everything seen, so that the larger side always uses at least half of its bins.
When e grows by one, each pair of adjacent bins becomes one bin, and that is exact, since

    floor(x / 2w) = floor(floor(x / w) / 2)

So the counts depend on the values alone and not on their order or on how they were cut into batches, and two histograms merge
exactly. Batches with more than `LIMIT` elements are thinned, to every k-th run of `RUN` elements; RUN is a prime larger than
the usual strides of images, so that the runs start in every column and channel in turn. Row extremes are kept of all values.

Worked: with max|x| = 5 the bins are 8/2048 wide, and 1 falls in bin 256 right of 0. After a 9 they are twice as wide:

>>> histogram = Histogram(1)
>>> histogram.update(*as_batch([[1.0, 5.0, -1.0]]))
>>> histogram.width.item() * 2048, histogram.counts[0].nonzero().flatten().tolist() == [2048 - 256, 2048 + 256, 2048 + 1280]
(8.0, True)
>>> histogram.update(*as_batch([[9.0]]))
>>> histogram.width.item() * 2048, histogram.counts[0].nonzero().flatten().tolist() == [1920, 2176, 2688, 3200]
(16.0, True)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qdeploy.core.spec import QuantSpec
from qdeploy.numerics.observer import Observer

BINS = 2048
"""Bins per side of 0."""
LIMIT = 1 << 15
"""Elements that one update counts, of one row or of all rows together; larger batches are thinned to about that."""
ROW_LIMIT = 1 << 14
"""Elements that are counted of each row even where that is more than `LIMIT` in total."""
RUN = 37
"""Adjacent elements that thinning keeps together."""
MIN_EXPONENT = -100
"""Values below 2^-100 share one bin, far below any scale; this keeps 1/w a normal float32 number."""
MANY_ROWS = 1024
"""Above so many channels, a quarter of the bins have to do."""
CHUNK = 1 << 22
"""Elements that are counted at once, so that temporaries stay small."""


class Histogram:
    """Counts of `channels` rows of values. Instances are changed by `update` and `merge`."""

    counts: Tensor
    """int64 `[C, 2 * bins]`."""
    exponent: Tensor
    """int64 `[C]`, the e above."""
    low: Tensor
    """float64 `[C]`, exact row minima; +inf before the first update."""
    high: Tensor
    """float64 `[C]`, exact row maxima."""

    def __init__(self, channels: int, bins: int = BINS):
        assert bins > 1 == bins.bit_count(), f"{bins} bins is not a power of two"
        self.bins = bins
        self.counts = torch.zeros(channels, 2 * bins, dtype=torch.int64)
        self.exponent = torch.full((channels,), MIN_EXPONENT)
        self.low = torch.full((channels,), torch.inf, dtype=torch.float64)
        self.high = torch.full((channels,), -torch.inf, dtype=torch.float64)

    @property
    def width(self) -> Tensor:
        """Bin width w of each row, float64 `[C]`, a power of two."""
        return _power_of_two(self.exponent) / self.bins

    @property
    def absmax(self) -> Tensor:
        """Largest |x| of each row, float64 `[C]`; 0 before the first update."""
        return torch.maximum(self.low.abs(), self.high.abs()).nan_to_num(posinf=0)

    def negative(self) -> Tensor:
        """Counts by |x| of the negative values, `[C, bins]`."""
        return self.counts[:, : self.bins].flip(1)

    def positive(self) -> Tensor:
        """Counts of the values from 0 up, `[C, bins]`."""
        return self.counts[:, self.bins :]

    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        """Count float32 `rows` `[C, N]`, finite, with the row extremes `low` and `high` `[C]`."""
        self._include(low.double(), high.double())
        rows = _thinned(rows)
        inverse = (1 / self.width).float().reshape(-1, *[1] * (rows.dim() - 1))
        step = max(1, CHUNK // max(1, rows.shape[1]))
        for start in range(0, rows.shape[0], step):
            self._count(slice(start, start + step), rows[start : start + step], inverse[start : start + step])

    def merge(self, other: Histogram) -> None:
        """Count everything that `other` has counted; `other` stays as it is."""
        assert other.counts.shape == self.counts.shape, f"{other.counts.shape} merged into {self.counts.shape}"
        self._include(other.low, other.high)
        counts = other.counts.clone()
        _fold(counts, self.exponent - other.exponent)
        self.counts += counts

    def _include(self, low: Tensor, high: Tensor) -> None:
        """Widen extremes and bins."""
        if len(low) == 1 and self.low.item() <= low.item() and high.item() <= self.high.item():
            return
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        exponent = torch.frexp(self.absmax.clamp(min=2.0 ** (MIN_EXPONENT - 1)))[1].to(torch.int64)
        _fold(self.counts, exponent - self.exponent)
        self.exponent = exponent

    def _count(self, which: slice, rows: Tensor, inverse: Tensor) -> None:
        """Add `rows` `[c, ...]` to the rows `which` of the counts."""
        # Beyond w = 1 the product of a tiny negative value can round to -0 in float32, which is not its bin.
        place = rows * inverse if (inverse >= 1).all() else rows.double() * inverse
        index = place.floor_().add_(self.bins).to(torch.int32).flatten(1)
        channels, bins = index.shape[0], 2 * self.bins
        if channels > 1:
            index += torch.arange(0, channels * bins, bins, dtype=torch.int32).unsqueeze(1)
        self.counts[which] += torch.bincount(index.flatten(), minlength=channels * bins).view(channels, bins)


class HistogramObserver(Observer):
    """An observer that keeps one `Histogram`."""

    def __init__(self, spec: QuantSpec):
        super().__init__(spec)
        self._histogram: Histogram | None = None

    @property
    def histogram(self) -> Histogram:
        """What was seen so far."""
        assert self._histogram is not None, "no batch was seen"
        return self._histogram

    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        if self._histogram is None:
            self._histogram = Histogram(rows.shape[0], BINS if rows.shape[0] <= MANY_ROWS else BINS // 4)
        self._histogram.update(rows, low, high)

    def share(self, other: HistogramObserver) -> None:
        """Look at the histogram of `other`, which alone counts."""
        self._histogram = other._histogram

    def clipped(self, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """The exact extremes, cut off at |x| = `threshold`, float64 `[C]`."""
        seen = self.histogram
        return (-threshold).clamp(min=seen.low, max=seen.high), threshold.clamp(min=seen.low, max=seen.high)


def as_batch(values: list[list[float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Lists as the arguments of `update`, for examples."""
    rows = torch.tensor(values)
    return rows, *torch.aminmax(rows, dim=1)


def _thinned(rows: Tensor) -> Tensor:
    """`rows` `[C, N]`, or every k-th run of them `[C, M, RUN]`, so that about `LIMIT` elements remain."""
    limit = max(LIMIT // rows.shape[0], ROW_LIMIT)
    every = -(-rows.shape[1] // limit)
    if every <= 1:
        return rows
    whole = rows.shape[1] // (every * RUN)
    return rows[:, : whole * every * RUN].view(-1, whole, every * RUN)[:, :, :RUN]


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, float64, exactly."""
    return torch.from_numpy(np.ldexp(1.0, exponent.numpy()))


def _fold(counts: Tensor, times: Tensor) -> None:
    """Halve the resolution of the rows of `counts` `[C, 2 * bins]` `times` `[C]` times each, in place."""
    bins = counts.shape[1] // 2
    # After bit_length folds all that there is lies in the two bins next to 0, and another fold changes nothing.
    for done in range(min(int(times.max()), bins.bit_length())):
        which = times > done
        pairs = counts[which].view(-1, bins, 2).sum(2)
        counts[which] = torch.nn.functional.pad(pairs, (bins // 2, bins // 2))
