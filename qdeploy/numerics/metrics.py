"""What a user may judge outputs by besides SQNR: by name, or by a function of one's own.

Every metric compares the outputs of a simulation or a runtime with those of the float model, sample by sample, and more is better.

    top1             whether the largest number of the first output is at the same place, or at that of the label
    cosine           a . b / (|a| |b|), the mean over outputs
    iou              sum min(|a|, |b|) / sum max(|a|, |b|), the mean over outputs: of maps of scores, what both have of what one has
    relative_error   -|a - b| / |b|, the mean over outputs
    MODULE:FUNCTION  FUNCTION(outputs, wanted, labels), called once with all samples, as mean average precision or word error rates ask
                     for: two mappings from names to arrays `[N, ...]`, and the labels `[N]` or None. It returns one number.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.core.errors import InputError, OptionError, one_line, unknown_name

Array = NDArray[Any]
PerSample = Callable[[Sequence[Array], Sequence[Array], Array | None], Array]


@dataclass(frozen=True)
class Metric:
    """One way to judge. `per_sample` gives a number a sample; `whole` one number for all, where that is no mean of samples."""

    name: str
    per_sample: PerSample | None = None
    whole: Callable[..., Any] | None = None

    def scores(self, names: Sequence[str], made: Sequence[Array], wanted: Sequence[Array], labels: Array | None) -> Array:
        """The number of each sample `[N]`, or that of all `[1]`; `InputError` where the user's function fails or returns no number."""
        if self.per_sample is not None:
            return self.per_sample(made, wanted, labels)
        assert self.whole is not None
        try:
            value = float(self.whole(dict(zip(names, made, strict=True)), dict(zip(names, wanted, strict=True)), labels))
        except Exception as error:  # whatever the user's function raises
            raise InputError(f"the metric '{self.name}' failed", found=one_line(error), action="mend the function") from error
        if not math.isfinite(value):
            raise InputError(f"the metric '{self.name}' returned {value}", allowed="a finite number", action="mend the function")
        return np.array([value])


def _rows(arrays: Sequence[Array], others: Sequence[Array]) -> list[tuple[Array, Array]]:
    """The float outputs as float64 `[N, elements]`, with those of the others."""
    count = len(arrays[0])
    pairs = zip(arrays, others, strict=True)
    return [
        (a.astype(np.float64).reshape(count, -1), b.astype(np.float64).reshape(count, -1))
        for a, b in pairs
        if a.dtype.kind == "f" and a.ndim and len(a) == count and a.size
    ]


def _mean(values: Sequence[Array], count: int) -> Array:
    return np.mean(values, axis=0) if values else np.zeros(count)


def _cosine(made: Sequence[Array], wanted: Sequence[Array], _: Array | None) -> Array:
    found = []
    for a, b in _rows(made, wanted):
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        found.append(np.where(lengths > 0, (a * b).sum(1) / np.where(lengths > 0, lengths, 1), (a == b).all(1)))
    return _mean(found, len(made[0]))


def _iou(made: Sequence[Array], wanted: Sequence[Array], _: Array | None) -> Array:
    found = []
    for a, b in _rows([np.abs(o) for o in made], [np.abs(o) for o in wanted]):
        whole = np.maximum(a, b).sum(1)
        found.append(np.where(whole > 0, np.minimum(a, b).sum(1) / np.where(whole > 0, whole, 1), 1.0))
    return _mean(found, len(made[0]))


def _relative_error(made: Sequence[Array], wanted: Sequence[Array], _: Array | None) -> Array:
    found = []
    for a, b in _rows(made, wanted):
        found.append(-np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(b, axis=1), 1e-30))
    return _mean(found, len(made[0]))


def _top1(made: Sequence[Array], wanted: Sequence[Array], labels: Array | None) -> Array:
    classes = [outputs[0].reshape(len(outputs[0]), -1).argmax(1) for outputs in (made, wanted)]
    return np.asarray(classes[0] == (classes[1] if labels is None else labels), dtype=np.float64)


METRICS = {
    name: Metric(name, per_sample)
    for name, per_sample in (("top1", _top1), ("cosine", _cosine), ("iou", _iou), ("relative_error", _relative_error))
}


def find_metric(reference: str | Callable[..., Any] | None) -> Metric | None:
    """The metric called `reference`, `MODULE:FUNCTION` of the folder at hand or of an installed package, or a function; None for None.

    Importing a module runs its code. Raises `OptionError` for what there is not.
    """
    if reference is None or callable(reference):
        return None if reference is None else Metric(getattr(reference, "__name__", "own"), whole=reference)
    assert isinstance(reference, str)
    module, colon, function = reference.partition(":")
    if not colon:
        if reference not in METRICS:
            raise unknown_name("metric", reference, (*METRICS, "MODULE:FUNCTION"))
        return METRICS[reference]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"cannot find the metric '{reference}'", found=one_line(error), action="name MODULE:FUNCTION") from error
    if not callable(found):
        raise OptionError(f"the metric '{reference}' is no function", found=type(found).__name__, action="name MODULE:FUNCTION")
    return Metric(reference, whole=found)
