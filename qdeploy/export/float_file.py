"""How far the float model.onnx of an artifact, run without its encodings, is from the model that was given.

Its parameters are those of the simulation: biases that were corrected for the errors of quantization, weights that were rounded or
clipped to their grid. Together with the encodings they are right; alone, in float, they compute something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qdeploy.core.backend import Format
from qdeploy.core.spec import Encoding
from qdeploy.export.emit import confined
from qdeploy.graph import edit, query
from qdeploy.graph.flow import run
from qdeploy.simulation.prepared import Prepared

Arrays = Mapping[str, NDArray[Any]]

SAME = 999.0
"""SQNR in dB of outputs that are equal."""
WORTH_A_NOTE = 60.0
"""From here on, in dB, nobody sees the difference."""


def distances(
    prepared: Prepared, form: Format, encodings: Sequence[Encoding], reference: Arrays, names: Sequence[str]
) -> dict[str, float]:
    """The SQNR in dB of every float output of the float file against the given model, on the saved samples in `reference`.

    10 log10(sum f^2 / sum (f - m)^2), with f of the given model and m of the file; `names` are the outputs.
    """
    module = edit.copy(prepared.captured.module, own_parameters=True)
    clip = {e.tensor: e for e in encodings if e.role != "activation"} if form.clip_weights else {}
    for path in {str(node.target) for node in module.graph.find_nodes(op="get_attr")}:
        values = query.parameter(prepared.module, path).detach()
        if path in clip:
            values = torch.from_numpy(confined(values.cpu().numpy(), clip[path]))
        edit.set_constant(module, path, values)
    inputs = [torch.from_numpy(reference[f"input.{spec.name}"]) for spec in prepared.captured.inputs]
    made = run(module, inputs, prepared.batch_size)
    pairs = {name: (reference[f"float.{name}"], m.numpy()) for name, m in zip(names, made, strict=True)}
    return {name: _sqnr(given, found) for name, (given, found) in pairs.items() if given.dtype.kind == "f"}


def note(found: Mapping[str, float]) -> list[str]:
    """What whoever runs the file in float should know; empty where there is nothing to say."""
    least = min(found.values(), default=SAME)
    if least >= WORTH_A_NOTE:
        return []
    which = f", of output '{min(found, key=lambda name: found[name])}'" if len(found) > 1 else ""
    return [
        f"model.onnx alone, run in float without its encodings, is {least:.1f} dB from the given model (SQNR on the saved "
        f"samples{which}): it has the weights and biases of the simulation; to run in float, take the given model"
    ]


def _sqnr(given: NDArray[Any], found: NDArray[Any]) -> float:
    with np.errstate(all="ignore"):
        noise = float(np.square(given.astype(np.float64) - found).sum())
        signal = float(np.square(given.astype(np.float64)).sum())
    if noise == 0:
        return SAME
    if not np.isfinite(noise) or not signal:
        return -SAME
    return round(float(10 * np.log10(signal / noise)), 2)
