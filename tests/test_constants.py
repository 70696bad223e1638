"""A number that meets a quantized tensor keeps its value: the ranges of what they make include it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qdeploy
from qdeploy.core.backend import backends

THIRD = torch.arange(8) % 3 == 0


def assigned(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 0] = 5.0
    return x


MEETINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "pad_above": lambda x: F.pad(x, (1, 2, 0, 1), value=10.0),
    "pad_below": lambda x: F.pad(x, (1, 2, 0, 1), value=-2.0),
    "pad_inside": lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
    "pad_with_zero": lambda x: F.pad(x, (1, 2, 0, 1)),
    "pad_and_crop": lambda x: F.pad(x, (-1, 2), value=5.0),
    "two_pads": lambda x: F.pad(F.pad(x, (1, 1), value=3.0)[..., 1:], (0, 1), value=-4.0),
    "pad_between_moves": lambda x: F.pad(x.transpose(2, 3), (1, 1), value=6.0).transpose(2, 3),
    "pad_before_maximum": lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 2),
    "where_above": lambda x: torch.where(THIRD, x, 4.0),
    "where_below": lambda x: torch.where(THIRD, -3.0, x),
    "fill": lambda x: x.masked_fill(THIRD, 5.0),
    "concat": lambda x: torch.cat([x, torch.full_like(x, 5.0)], 1)[:, 2:6],
    "maximum": lambda x: torch.maximum(x, torch.tensor(4.0)) + x,
    "minimum": lambda x: torch.minimum(x, torch.tensor(-1.0)) - x,
    "limits": lambda x: x.clamp(3, 5) + x,
    "sum": lambda x: x + 7.0,
    "difference": lambda x: 9.0 - x,
    "assignment": assigned,
}


class Meeting(nn.Module):
    """For every one of `MEETINGS` a convolution with a relu before it and one behind it, an output each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.ModuleDict({name: nn.Conv2d(4, 4, 1) for name in MEETINGS})
        self.behind = nn.ModuleDict({name: nn.Conv2d(4, 4, 1) for name in MEETINGS})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: self.behind[name](meet(torch.relu(self.before[name](x)))) for name, meet in MEETINGS.items()}


def sqnr(exact: Tensor, other: Tensor) -> float:
    noise = float(((exact - other) ** 2).sum())
    return 200.0 if noise == 0 else 10 * float(torch.log10((exact**2).sum() / noise))


FAST = ("snpe", "tensorrt")


@pytest.mark.parametrize("backend", [pytest.param(b.name, marks=() if b.name in FAST else pytest.mark.slow) for b in backends])
def test_no_number_is_cut_off_at_the_range_of_the_tensor_that_it_meets(backend: str, tmp_path: Path) -> None:
    x = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    model = Meeting().eval()
    prepared = qdeploy.prepare(model, x, backend=backend, recipe="plain")
    qdeploy.calibrate(prepared, [x])
    qdeploy.convert(prepared, tmp_path / "out")
    with torch.no_grad():
        exact, simulated = model(x), prepared(x)
    least = 20 if prepared.backend.activation.grid != "uniform" else 28
    found = {name: round(sqnr(exact[name], values), 1) for name, values in simulated.items()}
    assert {name: value for name, value in found.items() if value < least} == {}
    file = next(f for f in (tmp_path / "out" / "model.sim.onnx", tmp_path / "out" / "model.onnx") if f.exists())
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    for output, values in zip(session.get_outputs(), session.run(None, {"x": x.numpy()}), strict=True):
        assert sqnr(simulated[output.name], torch.from_numpy(np.asarray(values))) > 60, output.name


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt", "openvino"])
def test_a_logarithm_in_float_of_a_sum_with_a_small_number_is_finite_on_silence(backend: str) -> None:
    class Loudness(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv1d(4, 8, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            made = self.conv(x)
            return torch.log(made * made + 1e-10) + torch.rsqrt(made * made + 1e-10)

    x = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(1))
    x[0] = 0
    model = Loudness().eval()
    prepared = qdeploy.prepare(model, x, backend=backend, recipe="plain")
    qdeploy.calibrate(prepared, [x])
    with torch.no_grad():
        assert torch.isfinite(prepared(x)).all()
