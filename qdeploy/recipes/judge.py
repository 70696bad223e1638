"""What a simulation is worth: measured against the float model on samples, and compared sample by sample.

The measure is the SQNR of the outputs against those of the float model, its mean where there are several, or the share of right classes
where labels are given. An output that a concat puts together counts as its parts: beside boxes, scores would not be heard. Whether one
simulation is better than another is told from the same samples in both: of each, the gain is

    d = mean over outputs of  10 log10( noise before / noise after )      in dB

and the mean of d over samples must be above its standard error. So what a few samples cannot tell is no gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from qdeploy.graph import query
from qdeploy.graph.flow import run
from qdeploy.graph.parts import Parts, output_parts
from qdeploy.simulation.prepared import Prepared

SQNR, MEAN_SQNR, TOP1 = "SQNR dB", "mean SQNR dB", "top-1"
EXACT = 999.0
"""SQNR in dB of outputs that are equal."""
LEAST = 0.01
"""dB below which a gain is none, whatever its error."""
ALONE = 0.5
"""dB that are asked of a gain on one sample, which has no error."""
FLOOR = 1e-12
"""Noise over signal, 120 dB, below which there is nothing more to gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What was found on n samples: energies of `signal` and `noise`, float64 `[outputs, n]`, and which are `right`, bool `[n]`."""

    signal: Tensor
    noise: Tensor
    right: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[Measure]) -> Measure:
        """One measure of the samples of all."""
        signal, noise = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("signal", "noise"))
        right = [part.right for part in parts if part.right is not None]
        return cls(signal=signal, noise=noise, right=torch.cat(right) if right else None)

    @property
    def metric(self) -> str:
        """The name of `value`."""
        return TOP1 if self.right is not None else SQNR if len(self.noise) == 1 else MEAN_SQNR

    @property
    def value(self) -> float:
        """The share of right classes, or the mean of the SQNR of the outputs in dB."""
        return self.sqnr if self.right is None else float(self.right.double().mean())

    @property
    def sqnr(self) -> float:
        """The mean of the SQNR of the outputs in dB; `EXACT` for one that is equal, and less `EXACT` where it is not finite."""
        ratios = [_decibels(float(s), float(n)) for s, n in zip(self.signal.sum(1), self.noise.sum(1), strict=True)]
        return sum(ratios) / len(ratios) if ratios else EXACT

    def gain(self, before: Measure) -> float:
        """By how much `value` is above that of `before`."""
        return self.value - before.value

    def helps(self, before: Measure) -> bool:
        """Whether this is better than `before` by more than the samples may deceive; both are of the same ones.

        With labels, where the right classes tell neither, the SQNR does.
        """
        if self.right is not None and before.right is not None:
            won, lost = int((self.right & ~before.right).sum()), int((before.right & ~self.right).sum())
            if abs(won - lost) > math.sqrt(won + lost):
                return won > lost
        if self.sqnr - before.sqnr < LEAST:
            return False
        gains = self._gains(before)
        if len(gains) < 2:
            return float(gains.mean()) > ALONE
        return float(gains.mean()) > max(LEAST, float(gains.std()) / math.sqrt(len(gains)))

    def _gains(self, before: Measure) -> Tensor:
        """d of each sample, float64 `[n]`."""
        floor = (torch.maximum(self.signal, before.signal) * FLOOR).clamp(min=1e-300)
        after, earlier = (torch.where(m.noise.isfinite(), m.noise, 1e300).maximum(floor) for m in (self, before))
        return 10 * (earlier / after).log10().mean(0)


def _decibels(signal: float, noise: float) -> float:
    if not math.isfinite(noise):
        return -EXACT
    return EXACT if noise == 0 else max(-EXACT, min(EXACT, 10 * math.log10(max(signal, 1e-300) / noise)))


class Judge:
    """Measures a simulation on `samples`, one tensor `[N, ...]` an input, by the float outputs, or by `labels` `[N]` too."""

    def __init__(self, prepared: Prepared, samples: Sequence[Tensor], labels: Tensor | None = None):
        self.prepared = prepared
        self.samples = tuple(samples)
        self.labels = labels
        self._wanted = run(prepared.captured.module, samples, prepared.batch_size)
        self._parts = [output_parts(node) for node in query.outputs(prepared.captured.module.graph)]

    def __call__(self, rows: slice = slice(None)) -> Measure:
        """The measure of the simulation as it is, on these samples."""
        inputs = [tensor[rows] for tensor in self.samples]
        made = run(self.prepared.module, inputs, self.prepared.batch_size)
        count, everything = len(inputs[0]), len(self.samples[0])
        pairs = []
        for want, got, parts in zip(self._wanted, made, self._parts, strict=True):
            if want.is_floating_point() and want.numel():
                whole = want.dim() and len(want) == everything
                wanted = want[rows] if whole else want
                pairs += [_energies(w, g, count) for w, g in zip(_cut(wanted, parts), _cut(got, parts), strict=True)]
        signal, noise = (torch.stack(column) for column in zip(*pairs, strict=True)) if pairs else (torch.zeros(0, count),) * 2
        right = None if self.labels is None else made[0].flatten(1).argmax(1) == self.labels[rows]
        return Measure(signal=signal, noise=noise, right=right)


def _cut(tensor: Tensor, parts: Parts | None) -> Sequence[Tensor]:
    """The parts of an output."""
    return [tensor] if parts is None else torch.split(tensor, [stop - start for start, stop in pairwise(parts.edges)], parts.axis)


def _energies(wanted: Tensor, made: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Energies of signal and noise by sample, float64 `[count]`; an output without a batch counts as alike in all of them."""
    wanted = wanted.double()
    error = torch.where(wanted == made, 0.0, made.double() - wanted)  # where both are infinite there is none
    heard = torch.where(wanted.isfinite(), wanted, 0.0)
    rows = count if wanted.dim() and len(wanted) == count else 1
    signal, noise = (t.square().reshape(rows, -1).sum(1) for t in (heard, error))
    return (signal, noise) if rows == count else (signal.div(count).expand(count), noise.div(count).expand(count))
