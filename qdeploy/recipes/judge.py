"""What a simulation is worth: measured against the float model on samples, and compared sample by sample.

The measure is the SQNR of the outputs against those of the float model, its mean where there are several, or the share of right classes
where labels are given, or what the user's metric says. An output that a concat puts together counts as its parts: beside boxes, scores
would not be heard. Of an output that a softmax makes what enters it is measured, less its mean, which no softmax feels: most samples
have a class of probability 1, and the noise of the others, which are few, would decide alone. Whether one simulation is better than
another is told from the same samples in both: of each, the gain is

    d = mean over outputs of  10 log10( noise before / noise after )      in dB

and the mean of d over samples must be above its standard error. So what a few samples cannot tell is no gain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from qdeploy.capture import outputs
from qdeploy.graph import edit, query
from qdeploy.graph.flow import run
from qdeploy.graph.parts import Parts, output_parts
from qdeploy.numerics.metrics import METRICS, Metric
from qdeploy.simulation.prepared import Prepared

SQNR, MEAN_SQNR = "SQNR dB", "mean SQNR dB"
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
    """What was found on n samples: energies of `signal` and `noise`, float64 `[outputs, n]`, and `scores` by another metric `[n]`."""

    signal: Tensor
    noise: Tensor
    scores: Tensor | None = None
    name: str = ""
    """Of the metric that `scores` are by."""

    @classmethod
    def joined(cls, parts: Sequence[Measure]) -> Measure:
        """One measure of the samples of all."""
        signal, noise = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("signal", "noise"))
        scores = [part.scores for part in parts if part.scores is not None]
        return cls(signal=signal, noise=noise, scores=torch.cat(scores) if scores else None, name=parts[0].name)

    @property
    def metric(self) -> str:
        """The name of `value`."""
        return self.name or (SQNR if len(self.noise) == 1 else MEAN_SQNR)

    @property
    def value(self) -> float:
        """The mean of the scores, or that of the SQNR of the outputs in dB."""
        return self.sqnr if self.scores is None else float(self.scores.mean())

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

        Where the scores by another metric tell neither, the SQNR does.
        """
        if self.scores is not None and before.scores is not None:
            gains = self.scores - before.scores
            error = float(gains.norm()) / len(gains) if len(gains) > 1 else 0.0  # of a mean of 0
            if abs(float(gains.mean())) > error:
                return float(gains.mean()) > 0
        if self.sqnr - before.sqnr < LEAST or not len(self.noise):
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
    """Measures a simulation on `samples`, one tensor `[N, ...]` an input, by the float outputs.

    `metric` is another measure that decides, before the SQNR; where `labels` `[N]` are known, by default the right classes.
    """

    def __init__(self, prepared: Prepared, samples: Sequence[Tensor], labels: Tensor | None = None, metric: Metric | None = None):
        self.prepared = prepared
        self.samples = tuple(samples)
        self.labels = labels
        self.metric = METRICS["top1"] if metric is None and labels is not None else metric
        self._logits = [_softmax(node) for node in query.outputs(prepared.captured.module.graph)]
        self._float, self._module = (_with_logits(module) for module in (prepared.captured.module, prepared.module))
        self._wanted = run(self._float, samples, prepared.batch_size)
        self._parts = [output_parts(node) for node in query.outputs(prepared.captured.module.graph)]

    def __call__(self, rows: slice = slice(None)) -> Measure:
        """The measure of the simulation as it is, on these samples."""
        inputs = [tensor[rows] for tensor in self.samples]
        made = run(self._module, inputs, self.prepared.batch_size)
        count, everything = len(inputs[0]), len(self.samples[0])
        pairs = []
        logits = iter(zip(self._wanted[len(self._parts) :], made[len(self._parts) :], strict=True))
        for place, parts in enumerate(self._parts):
            want, got, softmax = self._wanted[place], made[place], self._logits[place]
            if softmax is not None:
                want, got = (_centered(t, softmax) for t in next(logits))
            if want.is_floating_point() and want.numel():
                whole = want.dim() and len(want) == everything
                wanted = want[rows] if whole else want
                pairs += [_energies(w, g, count) for w, g in zip(_cut(wanted, parts), _cut(got, parts), strict=True)]
        signal, noise = (torch.stack(column) for column in zip(*pairs, strict=True)) if pairs else (torch.zeros(0, count),) * 2
        scores = None if self.metric is None else torch.from_numpy(self._scores(self.metric, made, rows)).double().expand(count)
        return Measure(signal=signal, noise=noise, scores=scores, name=self.metric.name if self.metric else self._name(len(signal)))

    def _name(self, count: int) -> str:
        """What the SQNR is of, where not of the outputs alone."""
        plain = SQNR if count == 1 else MEAN_SQNR
        return f"{plain} of logits" if any(one is not None for one in self._logits) else plain

    def _scores(self, metric: Metric, made: Sequence[Tensor], rows: slice) -> NDArray[Any]:
        everything = len(self.samples[0])
        wanted = [want[rows] if want.dim() and len(want) == everything else want for want in self._wanted]
        labels = None if self.labels is None else self.labels[rows].numpy()
        names = outputs.names(self.prepared.captured.module)
        count = len(names)
        return metric.scores(names, [t.numpy() for t in made[:count]], [t.numpy() for t in wanted[:count]], labels)


def _softmax(output: fx.Node) -> fx.Node | None:
    """The softmax that makes an output, if others only move its values; quantizers are looked through."""
    node = output
    while node.op == "call_module" or query.op_of(node).name in ("reshape", "transpose", "squeeze", "unsqueeze"):
        if len(node.all_input_nodes) != 1:
            return None
        (node,) = node.all_input_nodes
    return node if node.op == "call_function" and query.op_of(node).name == "softmax" else None


def _with_logits(module: fx.GraphModule) -> fx.GraphModule:
    """`module` with what enters each softmax that makes an output behind its outputs; parameters and quantizers are the same."""
    copy = edit.copy(module)
    made = query.outputs(copy.graph)
    logits = [softmax.args[0] for node in made if (softmax := _softmax(node)) is not None]
    if not logits:
        return module
    (output,) = copy.graph.find_nodes(op="output")
    output.args = ([*made, *logits],)
    copy.graph.set_codegen(fx.graph.CodeGen())  # that of an exported graph puts outputs into the structure of the model's
    copy.recompile()
    return copy


def _centered(logits: Tensor, softmax: fx.Node) -> Tensor:
    """`logits` in float64, less their mean along the dimension of the softmax."""
    dim = softmax.args[1] if len(softmax.args) > 1 else softmax.kwargs.get("dim", -1)
    assert isinstance(dim, int)
    return logits.double() - logits.double().mean(dim, keepdim=True)


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
