"""For scales 2^-f: the f that just clips nothing, or one of the four finer ones, by squared error (MinMaxFloor of MQBench, for Vitis).

    f0 = floor(-log2 of the least scale that covers),    f = argmin over f0 .. f0 + 4 of sum (x - Q(x))^2

The sum runs over everything seen, by a histogram with x evenly spread in each bin, and is exact for that: with n = Q(x) / s and
u = x - ns the integral of (x - Q(x))^2 from 0 to x is n s^3 / 12 + u^3 / 3. (MQBench keeps the choice of the last batch.) Unlike `mse`,
the zero_point of an asymmetric spec is that of f0, so that a finer scale clips both ends in proportion.

Worked: with 3 bits, 1.9 is covered by the scale 1, as 3 * 1/2 is not enough, which makes 0 of every +-0.1; 1/8 keeps them:

>>> from qdeploy.numerics.histogram import as_batch
>>> seen = PowerFloor(QuantSpec.parse("int3 power-of-two"))
>>> seen.update(*as_batch([[-0.1, 0.1] * 5000 + [1.9]]))
>>> [v.item() * 2**3 for v in seen.range()]
[-4.0, 3.0]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from qdeploy.core.errors import OptionError
from qdeploy.core.spec import QuantSpec
from qdeploy.numerics.arith import choose_scale
from qdeploy.numerics.histogram import Histogram, HistogramObserver
from qdeploy.numerics.observer import observer

FINER = 4
"""How often the scale that clips nothing is halved."""
CHUNK = 1 << 22
"""Terms that are held at once."""


@observer("pot_floor")
class PowerFloor(HistogramObserver):
    """The fraction length of least squared error over everything seen; for scales that are powers of two."""

    def check(self) -> None:
        check_powers("pot_floor", self.spec)

    def range(self) -> tuple[Tensor, Tensor]:
        self.check()
        return limits(best_scale(self.histogram, self.spec), self.histogram, self.spec)


def check_powers(name: str, spec: QuantSpec) -> None:
    """`OptionError` where the observer `name` has no powers of two to choose from."""
    if spec.grid != "power_of_two":
        action = "use mse" if spec.linear else "use minmax"
        reason = f"observer '{name}' chooses a power of two, and the scale of {spec.describe()} is none"
        raise OptionError(reason, allowed="power-of-two schemes", action=action)


def best_scale(seen: Histogram, spec: QuantSpec) -> Tensor:
    """The scale of least squared error on `seen`, float64 `[C]`; of equally good ones the largest."""
    widest, zero_point = _covering(seen, spec)
    scale = widest.unsqueeze(1) * 0.5 ** torch.arange(FINER + 1, dtype=torch.float64)
    step = max(1, CHUNK // (seen.counts.shape[1] * (FINER + 1)))
    parts = [slice(first, first + step) for first in range(0, len(scale), step)]
    loss = torch.cat([_loss(seen.counts[rows], scale[rows], zero_point[rows], spec) for rows in parts])
    return scale.where(loss <= loss.amin(1, keepdim=True), 0).amax(1) * seen.width


def limits(scale: Tensor, seen: Histogram, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The range, float64 `[C]`, of grids with `scale` `[C]` and the zero_point for the extremes; (0, 0) for zeros alone."""
    zero_point = _covering(seen, spec)[1]
    scale = scale.where(seen.absmax > 0, 0)
    return (spec.qmin - zero_point) * scale, (spec.qmax - zero_point) * scale


def _covering(seen: Histogram, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The smallest scale, in bins, that clips nothing, and its zero_point, float64 `[C]` each."""
    # a histogram's bins fit its data, so that in bins no row is so small that its scale would be raised
    scale, zero_point = choose_scale(seen.low / seen.width, seen.high / seen.width, spec)
    return scale.double(), zero_point.double()


def _loss(counts: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Squared error of `counts` `[R, 2 * bins]` with `scale` `[R, K]` in bins and `zero_point` `[R]`, `[R, K]`."""
    s, zero = scale.unsqueeze(2), zero_point.view(-1, 1, 1)
    edges = torch.arange(counts.shape[1] + 1, dtype=torch.float64) - counts.shape[1] // 2
    n = (edges / s).round_().clamp_(spec.qmin - zero, spec.qmax - zero)
    u = edges - n * s
    integral = n * (s**3 / 12) + u.pow(3) / 3
    counts = counts.double()
    return torch.einsum("rke,re->rk", integral, pad(counts, (1, 0)) - pad(counts, (0, 1)))
