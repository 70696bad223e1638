"""What is emitted computes what was captured: no number is taken for another, and no planned tensor is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnxscript import rewriter
from torch import Tensor, nn
from torch.nn import functional as F

import qdeploy
from qdeploy.export.onnx_file import tensor_names

NEARLY_NOTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "tiny_sum": lambda x: (x * x + 1e-10).log(),
    "tiny_sum_reversed": lambda x: (1e-9 + x * x).log(),
    "tiny_difference": lambda x: (x * x - -1e-8).log(),
    "root": lambda x: (x * x + 1e-12) ** 0.5,
    "nearly_one": lambda x: x * 1.000008,
    "divided_by_nearly_one": lambda x: x / 0.999993,
    "zero": lambda x: x + 0.0,
    "scaled_zero": lambda x: torch.add(x, 0, alpha=2),
    "limits_apart": lambda x: x.clamp(0, 1).clamp(2, 3),
    "relu_of_negative": lambda x: F.relu(x.clamp(-3, -1)),
    "maximum_and_minimum": lambda x: torch.maximum(x, torch.tensor(0.5)).minimum(torch.tensor(0.25)),
    "size_as_it_is": lambda x: F.interpolate(x, scale_factor=1),
    "one_pixel": lambda x: F.avg_pool2d(F.max_pool2d(x, 1), 1),
    "empty_part": lambda x: torch.cat([x, x[:, :0]], 1),
    "there_and_back": lambda x: x.transpose(1, 2).transpose(1, 2),
    "one_summand": lambda x: x.unsqueeze(1).sum(1),
}


class Nearly(nn.Module):
    """Every op of `NEARLY_NOTHING` behind one convolution, an output each; parameters that are nearly 1 and 0 as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        self.one, self.none = nn.Parameter(torch.tensor(1 + 1e-6)), nn.Parameter(torch.tensor(1e-9))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.conv(x)
        made = {name: make(x) * 3.0 for name, make in NEARLY_NOTHING.items()}
        return made | {"parameters": (x * x * self.one + self.none).log()}


def literal(file: Path, x: Tensor) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, {"x": x.numpy()}), strict=True))


@pytest.mark.parametrize("backend", ["snpe", "tensorrt", "onnxruntime"])
def test_numbers_near_0_and_1_stay_what_they_are_and_planned_tensors_stay_in_the_file(backend: str, tmp_path: Path) -> None:
    x = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    x[0] = 0  # silence
    model = Nearly().eval()
    prepared = qdeploy.prepare(model, x, backend=backend, recipe="plain")
    qdeploy.calibrate(prepared, [x])
    qdeploy.convert(prepared, tmp_path / "out")
    file = tmp_path / "out" / "model.onnx"
    names = tensor_names(onnx.load(file))
    assert [t.tensor for t in prepared.plan.quantized if t.tensor not in names] == []
    simulation = file.with_name("model.sim.onnx")
    found = literal(simulation if simulation.exists() else file, x)
    with torch.no_grad():
        expected, exact = prepared(x), model(x)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values.numpy(), rtol=1e-6, atol=1e-6, err_msg=name)
    if simulation.exists():  # model.onnx is the float model
        for name, values in literal(file, x).items():
            np.testing.assert_allclose(values, exact[name].numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


def test_an_export_leaves_the_rules_of_the_exporter_as_they_were() -> None:
    def state() -> list[object]:
        rules = rewriter._DEFAULT_REWRITE_RULES
        return [rules, *(vars(g).get("_abs_tol") for r in rules for n in r._matcher.pattern for g in n.inputs)]

    before = state()
    prepared = qdeploy.prepare(nn.Conv2d(2, 2, 1), torch.ones(1, 2, 4, 4), backend="tensorrt", recipe="plain")
    qdeploy.calibrate(prepared, [torch.ones(1, 2, 4, 4)])
    qdeploy.export.emit.export(prepared.captured, prepared.backend.opset)
    assert state() == before
