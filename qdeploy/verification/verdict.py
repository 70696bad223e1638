"""Whether outputs are the simulated ones: what was seen on some samples, and what follows from it.

Two things are asked of a runtime. The noise in each of its outputs stays within a budget, and few samples have another top-1. Both are
estimates from some samples, so a row fails only where the confidence interval lies beyond what is asked. Where the estimate alone does,
there are not enough samples to tell.

- Top-1: of n samples, d have another top-1 and no near-tie. The exact interval of Clopper and Pearson (Biometrika 26, 1934) for their
  share begins at the quantile `level` of Beta(d, n - d + 1) and ends at the quantile `1 - level` of Beta(d + 1, n - d).
- A near-tie is another top-1 where the simulation's margin between the two classes is within the runtime's measured error: the 0.95
  quantile, over all samples, of the most by which its errors move two classes apart, or one step of the output's scale. One sample's
  own error always explains its flip, so the others decide. No more is excused than the same quantile of the error that quantization
  makes, and the runtime's room above it: a fault cannot excuse itself by its size.
- Noise: R = sum n_i / sum s_i over samples, of the energies n_i of the error and s_i of the simulated output. The ratio estimate
  (Cochran, Sampling Techniques, ch. 6) has the standard error sqrt(m / (m - 1) sum (n_i - R s_i)^2) / sum s_i with m samples, and
  Student's quantile makes it a bound. Errors with a long tail make the bound careful. Below `FEW` samples the estimate decides.

The levels of all tests of a report add up to `ALARM`, so that is the chance that anything in a good artifact fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from qdeploy.core.errors import ArtifactError

Array = NDArray[Any]

ALARM = 0.01
"""The most chance that a report fails an artifact that meets all that is asked."""
MIN_SQNR = 20.0
"""dB, below which a runtime does not compute what was simulated, whatever its top-1 says."""
ENOUGH = 30.0
"""dB of quantization's own noise, below which a runtime that rounds in its own way need not come, but for its room."""
EXACT = 40.0
"""dB that are asked where a runtime computes every code as the file says: room for codes that flip in a few samples."""
QUIET = 1 / 25
"""Share of an output's peak, below which it counts as silent: its noise is compared with this, which is 10 steps of 8 bits."""
FEW = 8
"""Samples below which the spread among them says nothing."""
PASSED, FAILED, UNDECIDED = "passed", "failed", "not enough samples to tell"
_MOST = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What is known of an output before a runtime makes it.

    `step` is one step of its scale, `quantization` (dB) the SQNR of the simulation to the float model, `spread` the 0.95 quantile
    over samples of the most by which quantization moves two classes apart. `peak` is the largest value, at least what float32 resolves.
    `part` says that it is no output of its own but a part of one: its place, and the axis with the indices where the part begins and
    ends.
    """

    name: str
    step: float
    quantization: float
    spread: float
    peak: float
    part: tuple[int, int, int, int] | None = None

    def of(self, arrays: Sequence[Array], place: int) -> Array:
        """This output, the one at `place`, or this part of one, among those of all outputs."""
        if self.part is None:
            return arrays[place]
        whole, axis, start, stop = self.part
        return arrays[whole].take(range(start, stop), axis=axis)

    @classmethod
    def seen(cls, name: str, plain: Array, simulated: Array, scale: float | None, loudest: float) -> Output:
        """The output `name` from saved float and simulated values; `scale` is its encoding's, `loudest` the largest value of all."""
        exact, near = (values.astype(np.float64) for values in (simulated, plain))
        quantized = Comparison([cls(name=name, step=1.0, quantization=0.0, spread=0.0, peak=0.0)])
        quantized.add([exact], [near], None)
        exact = exact[np.isfinite(exact)]
        peak = max(float(np.abs(exact).max(initial=0.0)), loudest * 2.0**-20, 1e-30)
        step = scale or max(float(np.ptp(exact)) / 255 if exact.size else 0.0, 1e-12)
        finite = quantized.finite
        return cls(
            name=name,
            step=step,
            quantization=quantized.sqnr(0) if finite else 0.0,
            spread=quantized.spread if finite else 0.0,
            peak=peak,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked of a row.

    `min_agreement` is the share of samples with the simulation's top-1. `room` are the dB by which its noise may exceed that of
    quantization itself: where a runtime adds more, the simulation says little of what is deployed. `exact` asks for every code.
    """

    min_agreement: float
    room: float = 6.0
    exact: bool = False

    def sqnr(self, output: Output) -> float:
        """The least SQNR, in dB, of an output."""
        return EXACT if self.exact else max(MIN_SQNR, min(ENOUGH, output.quantization) - self.room)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a row comes to: `faults` fail it, `undecided` asks for more samples, `remarks` say what else there is to know."""

    faults: tuple[str, ...]
    remarks: tuple[str, ...]
    undecided: bool

    @property
    def word(self) -> str:
        """`PASSED`, `FAILED` or `UNDECIDED`."""
        return FAILED if self.faults else UNDECIDED if self.undecided else PASSED


@dataclass
class _Energies:
    """Of one output: its signal and its noise, sample by sample, and what it holds."""

    signal: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    values: int = 0
    worst: float = 0.0

    def ratio(self, least: float) -> tuple[float, float, int]:
        """Noise over signal, its standard error (infinite for one sample), and the number of samples.

        Where the mean square of the signal is below `least`, that takes its place.
        """
        signal, noise, count = np.array(self.signal), np.array(self.noise), len(self.noise)
        if signal.sum() <= least * self.values:
            signal = np.full(count, least * self.values / count)
        if not noise.any() or not signal.any():
            return (math.inf if noise.any() else 0.0), 0.0, count
        ratio = float(noise.sum() / signal.sum())
        if count < 2:
            return ratio, math.inf, count
        error = math.sqrt(count / (count - 1) * float(np.square(noise - ratio * signal).sum())) / float(signal.sum())
        return ratio, error, count


class Comparison:
    """Running comparison of outputs with simulated ones. What is kept of a sample are a few numbers."""

    def __init__(self, outputs: Sequence[Output], classes: bool = True):
        self.outputs = outputs
        self.samples = self.right = self.labelled = 0
        self.finite, self.ranked = True, classes
        self.energies = [_Energies() for _ in outputs]
        self.margins: list[float] = []
        """The simulation's margin between the two classes, of each sample with another top-1."""
        self.moved: list[float] = []
        """Of each sample, the most by which errors move two classes apart."""

    def add(self, simulated: Sequence[Array], made: Sequence[Array], labels: Array | None) -> None:
        """Compare one batch. Raises `ArtifactError` where `made` has other outputs, shapes or kinds of numbers than `simulated`."""
        if len(made) != len(simulated):
            raise ArtifactError("the runtime returned another number of outputs", found=len(made), allowed=len(simulated))
        whole = [output for output in self.outputs if output.part is None]
        arrays = [_same_kind(o.name, s, np.asarray(r)) for o, s, r in zip(whole, simulated, made, strict=True)]
        count = len(simulated[0]) if simulated[0].ndim else 1
        errors = []
        for place, (output, energies) in enumerate(zip(self.outputs, self.energies, strict=True)):
            s, r = output.of(simulated, place), output.of(arrays, place)
            wanted, found = s.astype(np.float64), r.astype(np.float64)
            with np.errstate(invalid="ignore"):
                error = np.where(wanted == found, 0.0, found - wanted)  # where both are infinite there is no error
            self.finite &= bool(np.isfinite(error).all())
            errors.append(error)
            rows = (count, -1) if s.ndim and len(s) == count and s.size else (1, -1)
            heard = np.where(np.isfinite(wanted), wanted, 0.0)
            energies.signal += np.square(heard).reshape(rows).sum(1).tolist()
            energies.noise += np.square(error).reshape(rows).sum(1).tolist()
            energies.values += s.size
            energies.worst = max(energies.worst, float(np.abs(error).max(initial=0.0)) / output.step)
        self.samples += count
        self._rank(simulated[0], arrays[0], errors[0], labels)

    def _rank(self, simulated: Array, made: Array, error: Array, labels: Array | None) -> None:
        """Compare the classes, where the first output has one number for each."""
        self.ranked &= simulated.ndim == 2 and simulated.shape[1] > 1 and simulated.dtype.kind == "f"
        if not self.ranked:
            return
        wanted, top, rows = simulated.argmax(1), made.argmax(1), np.arange(len(simulated))
        margins = simulated[rows, wanted].astype(np.float64) - simulated[rows, top]
        self.margins += margins[wanted != top].tolist()
        self.moved += np.ptp(np.nan_to_num(error), axis=1).tolist()
        if labels is not None:
            self.right += int((top == labels).sum())
            self.labelled += len(labels)

    @property
    def spread(self) -> float:
        """The 0.95 quantile over samples of the most by which errors move two classes apart; 0 where there are no classes."""
        return float(np.quantile(self.moved, 0.95)) if self.ranked and self.moved else 0.0

    @property
    def agreement(self) -> float | None:
        """The share of samples with the simulation's top-1, near-ties or not; None where there are no classes."""
        return (self.samples - len(self.margins)) / self.samples if self.ranked and self.samples else None

    @property
    def accuracy(self) -> float | None:
        """The share of labels that are top-1; None without labels or classes."""
        return self.right / self.labelled if self.ranked and self.labelled else None

    def disagreements(self, room: float) -> int:
        """The samples with another top-1 that is no near-tie; `room` is that of `Asked`."""
        excused = min(max(self.spread, self.outputs[0].step), 10 ** (room / 20) * self.outputs[0].spread)
        return sum(margin > excused for margin in self.margins) if self.ranked else 0

    @property
    def max_steps(self) -> float | None:
        """The largest error, in steps of its output; None where it is not finite."""
        return max((e.worst for e in self.energies), default=0.0) if self.finite else None

    @property
    def tests(self) -> int:
        """How many things are asked: one of each output, and one of the classes."""
        return len(self.outputs) + self.ranked

    def level(self, output: int) -> tuple[float, float]:
        """The SQNR of an output in dB, and what it may be with 95 % certainty; noise of a silent one is that to QUIET of its peak."""
        if not self.finite:
            return -999.0, -999.0
        ratio, error, count = self.energies[output].ratio((QUIET * self.outputs[output].peak) ** 2)
        least = ratio - _student(count, 0.05) * error if count >= FEW else ratio
        return tuple(999.0 if r <= 0 else max(-999.0, min(999.0, -10 * math.log10(r))) for r in (ratio, least))  # type: ignore[return-value]

    def sqnr(self, output: int) -> float:
        """10 log10(signal / noise) of an output, in dB, within [-999, 999]; 999 where both are the same."""
        if not self.finite:
            return -999.0
        signal, noise = sum(self.energies[output].signal), sum(self.energies[output].noise)
        ratio = math.inf if noise == 0 else max(signal, 1e-300) / noise
        return max(-999.0, min(10 * math.log10(ratio), 999.0)) if ratio > 0 else -999.0  # noise beyond all numbers

    def interval(self, room: float, level: float) -> tuple[float, float] | None:
        """The share of samples that agree or are near-ties: its bounds, each of which errs with the chance `level`."""
        return _interval(self.samples - self.disagreements(room), self.samples, level) if self.ranked and self.samples else None

    def judged(self, asked: Asked, level: float) -> Verdict:
        """The verdict where every test may give a false alarm with the chance `level`."""
        faults, doubts, remarks = [], [], []
        if self.ranked and self.samples:
            near = len(self.margins) - self.disagreements(asked.room)
            fault, doubt = self._judge_classes(asked, level)
            faults += fault
            doubts += doubt
            remarks += [f"{near} near-{'tie' if near == 1 else 'ties'}"] if near else []
        if not self.finite:
            faults.append("its outputs hold NaN or infinity")
        for place, output in enumerate(self.outputs):
            fault, doubt, remark = self._judge_noise(place, asked.sqnr(output), level)
            whose = f"output '{output.name}': " if len(self.outputs) > 1 else ""
            faults += [whose + text for text in fault]
            doubts += [whose + text for text in doubt]
            remarks += [f"output '{output.name}' {text}" for text in remark]
        told = [f"{UNDECIDED}: {'; '.join(doubts)}"] if doubts and not faults else doubts
        return Verdict(faults=tuple(faults), remarks=(*told, *remarks), undecided=bool(doubts))

    def _judge_classes(self, asked: Asked, level: float) -> tuple[list[str], list[str]]:
        count, others, least = self.samples, self.disagreements(asked.room), asked.min_agreement
        low, high = _interval(count - others, count, level)
        share = (count - others) / count
        if share >= least:
            return [], []
        if high < least:
            return [f"top-1 agreement {share:.2%} (at most {high:.1%}, near-ties left out) is below {least:.1%}"], []
        needed = _settles(lambda n: _interval(n - math.ceil(others / count * n), n, level)[1] < least, count)
        return [], [f"top-1 agreement {share:.2%} lies between {low:.1%} and {high:.1%}, {least:.1%} are asked; {needed} would tell"]

    def _judge_noise(self, place: int, least: float, level: float) -> tuple[list[str], list[str], list[str]]:
        energies = self.energies[place]
        if not self.finite or not energies.noise:
            return [f"SQNR {self.sqnr(place):.1f} dB is below {least:.0f} dB"] if not self.finite else [], [], []
        floor = (QUIET * self.outputs[place].peak) ** 2
        silent = sum(energies.signal) <= floor * energies.values and any(energies.noise)
        least = MIN_SQNR if silent else least  # of what is as loud as the floor: a step for 8 bits
        limit = 10 ** (-least / 10)
        ratio, error, count = energies.ratio(floor)
        remarks = ["is almost silent, and was compared in steps"] if silent and ratio <= limit else []
        if ratio <= limit:
            return [], [], remarks
        found = -10 * math.log10(ratio)
        if count < FEW or ratio - _student(count, level) * error > limit:
            return [f"SQNR {found:.1f} dB is below {least:.0f} dB"], [], []
        excess = ratio - limit
        needed = _settles(lambda n: _student(n, level) * error * math.sqrt(count / n) < excess, count)
        return [], [f"SQNR {found:.1f} dB comes from few samples, {least:.0f} dB are asked; {needed} would tell"], []


def _same_kind(name: str, simulated: Array, made: Array) -> Array:
    """`made`, which has the shape of `simulated` and numbers of its kind; `ArtifactError` otherwise."""
    if simulated.shape != made.shape:
        what = f"the runtime returned another shape for output '{name}'"
        raise ArtifactError(what, found=list(made.shape), allowed=list(simulated.shape))
    kinds = {"f": "f", "i": "iub", "u": "iub", "b": "iub"}  # runtimes have their own widths, and some no bool
    if made.dtype.kind not in kinds.get(simulated.dtype.kind, ""):
        what = f"the runtime returned other numbers for output '{name}'"
        raise ArtifactError(what, found=str(made.dtype), allowed=str(simulated.dtype))
    return made


def _interval(hits: int, count: int, level: float) -> tuple[float, float]:
    """Clopper and Pearson's bounds of a share, each of which errs with the chance `level`.

    >>> [round(bound, 4) for bound in _interval(64, 64, 0.025)]
    [0.944, 1.0]
    """
    low = float(special.betaincinv(hits, count - hits + 1, level)) if hits else 0.0
    high = float(special.betaincinv(hits + 1, count - hits, 1 - level)) if hits < count else 1.0
    return low, high


def _student(count: int, level: float) -> float:
    """The quantile 1 - `level` of Student's t for the mean of `count` samples."""
    return float(special.stdtrit(count - 1, 1 - level))


def _settles(tells: Any, count: int) -> str:
    """In words, how many samples it takes until `tells` of them is true, where they go on as the first `count` did."""
    low, high = count, 2 * count
    while not tells(high):
        low, high = high, 2 * high
        if high > _MOST:
            return "more than a million samples"
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if tells(middle) else (middle, high)
    digits = 10 ** max(0, len(str(high)) - 2)
    return f"about {-(-high // digits) * digits} samples"
