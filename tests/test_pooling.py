"""Every option of pooling gives the numbers of torch's own op: in the simulation, and in the file with and without optimizations."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F

import qdeploy
from qdeploy.core.errors import CaptureError
from qdeploy.files.model import load_model

Pool = Callable[[Tensor], Tensor]


def deep(x: Tensor) -> Tensor:
    return x.unsqueeze(2).expand(-1, -1, 5, -1, -1)


POOLS: dict[str, Pool] = {
    f"avg2_{'with' if border else 'without'}_border_{padding}{'_ceil' if ceil else ''}{'_own' if divisor else ''}": (
        lambda x, border=border, ceil=ceil, padding=padding, divisor=divisor: F.avg_pool2d(x, 3, 2, padding, ceil, border, divisor)
    )
    for border, ceil, padding, divisor in itertools.product((True, False), (False, True), (0, 1), (None, 3))
}
POOLS |= {
    "avg2_sides": lambda x: F.avg_pool2d(x, (3, 2), (2, 3), (1, 0), True, True),
    "avg2_sides_own": lambda x: F.avg_pool2d(x, (3, 2), (2, 3), (1, 1), True, True, 5),
    "avg2_negative_divisor": lambda x: F.avg_pool2d(x, 2, 2, 0, True, True, -2),
    "avg2_no_stride": lambda x: F.avg_pool2d(x, 3),
    "avg2_wide": lambda x: F.avg_pool2d(x, 5, 3, 2, True, True),
    "avg2_left_out": lambda x: F.avg_pool2d(x, 2, 3, 1, True, True),
    "avg2_left_out_inside": lambda x: F.avg_pool2d(x, 2, 3, 1, True, False),
    "avg2_one_left_out": lambda x: F.avg_pool2d(x, (2, 3), (3, 2), 1, True, True),
    "avg2_one_left_out_inside": lambda x: F.avg_pool2d(x, (2, 3), (3, 2), 1, True, False),
    "avg2_one_left_out_own": lambda x: F.avg_pool2d(x, (2, 3), (3, 2), 1, True, True, 5),
    "avg1": lambda x: F.avg_pool1d(x.flatten(2), 3, 2, 1, True, True),
    "avg1_inside": lambda x: F.avg_pool1d(x.flatten(2), 3, 2, 1, True, False),
    "avg1_even": lambda x: F.avg_pool1d(x.flatten(2), 4, 3, 2, True, True),
    "avg3": lambda x: F.avg_pool3d(deep(x), 3, 2, 1, True, True),
    "avg3_own": lambda x: F.avg_pool3d(deep(x), 3, 2, 1, True, True, 7),
    "avg3_inside": lambda x: F.avg_pool3d(deep(x), 3, 2, 1, True, False),
    "max2_dilated": lambda x: F.max_pool2d(x, 3, 2, 1, 2, True),
    "max2_wide": lambda x: F.max_pool2d(x, 2, 1, 0, 3),
    "max2_ceil": lambda x: F.max_pool2d(x, 3, 2, 1, 1, True),
    "max2_left_out": lambda x: F.max_pool2d(x, 2, 3, 1, 1, True),
    "max2_one_left_out": lambda x: F.max_pool2d(x, (2, 3), (3, 2), 1, 1, True),
    "max1": lambda x: F.max_pool1d(x.flatten(2), 3, 2, 1, 2, True),
    "max3": lambda x: F.max_pool3d(deep(x), 3, 2, 1, 1, True),
    "adaptive_avg2": lambda x: F.adaptive_avg_pool2d(x, (3, 4)),
    "adaptive_avg2_one_side": lambda x: F.adaptive_avg_pool2d(x, (None, 2)),
    "adaptive_avg1": lambda x: F.adaptive_avg_pool1d(x.flatten(2), 7),
    "adaptive_max2": lambda x: F.adaptive_max_pool2d(x, (3, 5)),
    "lp2": lambda x: F.lp_pool2d(x, 2, 2),
    "lp2_ceil": lambda x: F.lp_pool2d(x, 3, 3, 2, True),
    "lp1": lambda x: F.lp_pool1d(x.flatten(2), 2, 3),
}


class Pooled(nn.Module):
    """A convolution, and behind it the poolings `names`, an output each."""

    def __init__(self, pools: dict[str, Pool]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.pools = nn.Conv2d(4, 4, 1), pools

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.conv(x) + 1
        return {name: pool(x) * 2.0 for name, pool in self.pools.items()}


def sqnr(exact: np.ndarray, other: np.ndarray) -> float:
    assert exact.shape == other.shape
    noise = float(((exact - other) ** 2).sum())
    return 200.0 if noise == 0 else 10 * float(np.log10((exact**2).sum() / noise))


def run(file: Path, inputs: dict[str, np.ndarray], optimized: bool) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs), strict=True))


def check(model: nn.Module, x: Tensor, exact: dict[str, np.ndarray], backend: str, folder: Path) -> None:
    """The simulation is near `exact`, model.sim.onnx computes the simulation, and a float model.onnx what is exact."""
    prepared = qdeploy.prepare(model, x, backend=backend, recipe="plain")
    qdeploy.calibrate(prepared, [x])
    qdeploy.convert(prepared, folder)
    with torch.no_grad():
        simulated = {name: values.numpy() for name, values in prepared(x).items()}
    float_file = (folder / "model.sim.onnx").exists()
    for optimized in (False, True):
        found = run(folder / ("model.sim.onnx" if float_file else "model.onnx"), {"x": x.numpy()}, optimized)
        plain = run(folder / "model.onnx", {"x": x.numpy()}, optimized) if float_file else {}
        for name, values in simulated.items():
            assert sqnr(exact[name], values) > 33, name
            assert sqnr(values, found[name]) > 100, (name, optimized)
            if plain:
                assert sqnr(exact[name], plain[name]) > 100, (name, optimized)


TARGETS = ["onnxruntime", "snpe", pytest.param("tensorrt", marks=pytest.mark.slow), pytest.param("openvino", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", [t if t == "snpe" else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS])
def test_every_pooling_of_torch_is_what_torch_computes(backend: str, tmp_path: Path) -> None:
    x = torch.randn(4, 4, 9, 10, generator=torch.Generator().manual_seed(1))
    model = Pooled(POOLS).eval()
    with torch.no_grad():
        exact = {name: values.numpy() for name, values in model(x).items()}
    check(model, x, exact, backend, tmp_path / "out")


def test_a_side_of_open_size_is_pooled_as_torch_does_at_every_size(tmp_path: Path) -> None:
    pools = {
        "avg": lambda x: F.avg_pool2d(x, 3, 2, 1, True, True),
        "own": lambda x: F.avg_pool2d(x, 3, 2, 1, True, True, 4),
        "inside": lambda x: F.avg_pool2d(x, 3, 2, 1, True, False),
        "max": lambda x: F.max_pool2d(x, 3, 2, 1, 1, True),
    }
    model = Pooled(pools).eval()
    x = torch.randn(2, 4, 9, 10, generator=torch.Generator().manual_seed(1))
    prepared = qdeploy.prepare(model, x, backend="onnxruntime", recipe="plain", dynamic={"x": {2: "height"}})
    qdeploy.calibrate(prepared, [x])
    qdeploy.convert(prepared, tmp_path / "out")
    for height in (8, 9, 11):
        other = torch.randn(3, 4, height, 10, generator=torch.Generator().manual_seed(height))
        with torch.no_grad():
            simulated, exact = prepared(other), model(other)
        for optimized in (False, True):
            found = run(tmp_path / "out" / "model.onnx", {"x": other.numpy()}, optimized)
            for name in pools:
                assert sqnr(simulated[name].numpy(), found[name]) > 100, (name, height)
                assert sqnr(exact[name].numpy(), simulated[name].numpy()) > 30, (name, height)


def test_a_last_window_that_depends_on_an_open_size_is_refused() -> None:
    model = Pooled({"avg": lambda x: F.avg_pool2d(x, 2, 3, 1, True, True)})
    with pytest.raises(CaptureError, match="whose last window may be left out"):
        qdeploy.prepare(model, torch.ones(2, 4, 9, 10), backend="onnxruntime", recipe="plain", dynamic={"x": {2: "height"}})


def pooling_nodes() -> dict[str, onnx.NodeProto]:
    """ONNX's pooling of `c` in every way to give the border: even, uneven, by name; rounded up, and counted."""
    nodes = {}
    borders = [{"pads": pads} for pads in ([0] * 4, [1] * 4, [0, 1, 1, 0], [1, 0, 1, 2])]
    named = [{"auto_pad": name} for name in ("SAME_UPPER", "SAME_LOWER", "VALID")]
    for op, border, ceil, counted, stride in itertools.product(("AveragePool", "MaxPool"), [*borders, *named], (0, 1), (0, 1), (2, 3)):
        if (op == "MaxPool" and counted) or (ceil and border in named):
            continue
        more = {"count_include_pad": counted} if op == "AveragePool" else {}
        name = f"{op}_{len(nodes)}"
        strides = [stride, 5 - stride]
        nodes[name] = helper.make_node(op, ["c"], [name], kernel_shape=[3, 3], strides=strides, ceil_mode=ceil, **border, **more)
    return nodes


def test_every_pooling_of_onnx_is_what_onnx_runtime_computes(tmp_path: Path) -> None:
    nodes = pooling_nodes()
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, None, None]) for name in nodes]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 9, 10])
    opsets = [helper.make_opsetid("", 21)]
    weight = onnx.numpy_helper.from_array(np.random.default_rng(0).normal(size=(3, 3, 1, 1)).astype(np.float32), "w")
    every = [helper.make_node("Conv", ["x", "w"], ["c"]), *nodes.values()]
    onnx.save(
        helper.make_model(helper.make_graph(every, "g", [given], made, [weight]), opset_imports=opsets, ir_version=10),
        tmp_path / "m.onnx",
    )
    x = torch.randn(4, 3, 9, 10, generator=torch.Generator().manual_seed(1))
    exact = run(tmp_path / "m.onnx", {"x": x.numpy()}, optimized=False)
    prepared = qdeploy.prepare(load_model(str(tmp_path / "m.onnx")), x, backend="onnxruntime", recipe="plain")
    qdeploy.calibrate(prepared, [x])
    qdeploy.convert(prepared, tmp_path / "out")
    for optimized in (False, True):
        found = run(tmp_path / "out" / "model.onnx", {"x": x.numpy()}, optimized)
        assert {name: value for name in nodes if (value := sqnr(exact[name], found[name])) < 28} == {}, optimized
