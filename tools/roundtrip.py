"""A model through ONNX and back: torch.onnx.export, ONNX Runtime, and `qdeploy.importing`, whose results must be the same."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

CLOSE = 1e-4
"""Largest difference between ONNX Runtime and the imported model, in largest absolute values of an output."""


def round_trip(model: nn.Module, batch: tuple[Tensor, ...], at: Callable[[str], None]) -> dict[str, Any]:
    """What came of one model. `at` is told of every step.

    batch: whether it is open in the file. difference: the largest one between ONNX Runtime and the imported model. rounding: the one
    between ONNX Runtime and the model itself, which no import can be better than. Both in largest absolute values of an output.
    """
    from qdeploy.files.model import load_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        at("export to ONNX")
        how = _written(model, batch, path)
        at("ONNX Runtime")
        wanted = _run(path, batch)
        at("import from ONNX")
        program: Any = load_model(path)
        with torch.no_grad():
            made, original = program.module()(*batch), model(*batch)
    return {"batch": how, "difference": _difference(made, wanted), "rounding": _difference(original, wanted)}


def _written(model: nn.Module, batch: tuple[Tensor, ...], path: Path) -> str:
    """Export with an open batch, or with a fixed one, or by torch's older exporter, whichever is the first to work; which it is."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for how, shapes in (("open", tuple({0: Dim("batch")} for _ in batch)), ("fixed", None)):
            try:
                torch.onnx.export(model, batch, str(path), dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False)
            except torch.onnx.OnnxExporterError:
                continue
            return how
        names = [f"input_{place}" for place in range(len(batch))]
        axes = {name: {0: "batch"} for name in names}
        torch.onnx.export(model, batch, str(path), dynamo=False, opset_version=17, input_names=names, dynamic_axes=axes)
    return "open, by the older exporter"


def _run(path: Path, batch: tuple[Tensor, ...]) -> list[NDArray[Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    made: list[NDArray[Any]] = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), batch, strict=True)})
    return made


def _difference(made: object, wanted: list[NDArray[Any]]) -> float:
    """The largest one of all outputs."""
    got = [t.numpy() for t in torch.utils._pytree.tree_leaves(made) if isinstance(t, Tensor)]
    if [a.shape for a in got] != [a.shape for a in wanted]:
        raise AssertionError(f"shapes {[a.shape for a in got]} where ONNX Runtime has {[a.shape for a in wanted]}")
    if not all(np.isfinite(a).all() for a in got):
        return float("inf")
    sizes = [float(np.abs(theirs).max(initial=0.0)) or 1.0 for theirs in wanted]
    apart = [float(np.abs(a.astype(np.float64) - b).max(initial=0.0)) for a, b in zip(got, wanted, strict=True)]
    return max(d / size for d, size in zip(apart, sizes, strict=True))
