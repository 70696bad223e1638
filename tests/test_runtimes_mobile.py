"""ncnn and MNN, each on the pair of float ONNX and scale file that it reads, against a float64 computation of the same codes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional

from qdeploy.core.errors import ArtifactError, NotInstalledError
from qdeploy.runtimes import ncnn as ncnn_runtime
from qdeploy.runtimes.runtime import Runtime, runtimes

Array = NDArray[Any]
SHAPE = (3, 9, 7)  # odd, so that rows and channels of a packed layout do not end on whole vectors


def installed(name: str) -> Runtime:
    runtime = runtimes[name]
    if not runtime.installed():
        pytest.skip(f"runtime '{name}' is not installed")
    if name == "ncnn":
        pytest.importorskip("pnnx", reason="pnnx, which converts for ncnn, is not installed")
    return runtime


def half_away(values: Array) -> Array:
    made: Array = np.trunc(values + np.copysign(0.5, values))
    return made


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product. `output` is its tensor after the activation that is fused into it."""

    name: str
    source: str
    output: str
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    stride: int = 1
    group: int = 1
    activation: str = ""

    @property
    def limit(self) -> int:
        """The largest weight code in ncnn: 31 for plain 3x3 convolutions of stride 1."""
        return 31 if self.weight.shape[2:] == (3, 3) and self.stride == 1 and self.group == 1 else 127

    def scales(self, limit: int) -> Array:
        return np.asarray(np.abs(self.weight).reshape(len(self.weight), -1).max(1) / limit, np.float32)

    def product(self, values: Array, weight: Array) -> Array:
        x, w = torch.from_numpy(np.asarray(values, np.float64)), torch.from_numpy(np.asarray(weight, np.float64))
        if w.ndim == 2:
            return (x @ w.T).numpy()
        return functional.conv2d(x, w, None, self.stride, w.shape[-1] // 2, 1, self.group).numpy()

    def activate(self, values: Array) -> Array:
        if self.activation == "Clip":
            return np.clip(values, 0, 6)
        return np.maximum(values, 0) if self.activation == "Relu" else values


def make_layers(group: int) -> list[Layer]:
    rng = np.random.default_rng(17)

    def numbers(*shape: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        fan = float(np.prod(shape[1:]))
        return rng.normal(size=shape).astype(np.float32) * np.float32(1.6 / fan**0.5), rng.normal(size=shape[0]).astype(np.float32)

    return [
        Layer("stem", "x", "a", *numbers(16, 3, 3, 3), activation="Relu"),
        Layer("inner", "a", "b", *numbers(16, 16 // group, 3, 3), group=group, activation="Relu"),
        Layer("depth", "s", "c", *numbers(16, 1, 3, 3), stride=2, group=16, activation="Clip"),
        Layer("point", "c", "d", *numbers(24, 16, 1, 1), activation="Relu"),
        Layer("head", "f", "y", *numbers(10, 24)),
    ]


class Network:
    """Two convolutions with a residual add, a depthwise and a pointwise one, global average pooling, a matrix product."""

    def __init__(self, group: int = 1) -> None:
        self.layers = make_layers(group)
        self.ranges: dict[str, float] = {}
        self.compute(self.data(64), self.watch)

    def data(self, batch: int) -> NDArray[np.float32]:
        return np.random.default_rng(batch).normal(size=(batch, *SHAPE)).astype(np.float32)

    def watch(self, layer: Layer, values: Array) -> Array:
        self.ranges[layer.source] = float(np.abs(values).max())
        made = layer.activate(layer.product(values, layer.weight) + shaped(layer.bias, layer))
        self.ranges[layer.output] = float(np.abs(made).max())
        return made

    def scale(self, tensor: str) -> Array:
        return np.array(self.ranges[tensor] / 127, np.float32)

    def compute(
        self, x: Array, run: Callable[[Layer, Array], Array], pool: Callable[[Array], Array] = lambda v: v.mean((2, 3))
    ) -> Array:
        stem, inner, depth, point, head = self.layers
        first = run(stem, x)
        return run(head, pool(run(point, run(depth, first + run(inner, first)))))

    def save(self, folder: Path) -> Path:
        """model.onnx, and the name of a simulation that no file needs to have."""
        nodes, tensors = [], []
        for layer in self.layers:
            if layer.name == "depth":
                nodes.append(helper.make_node("Add", ["a", "b"], ["s"], name="add"))
            if layer.name == "head":
                nodes.append(helper.make_node("GlobalAveragePool", ["d"], ["p"], name="pool"))
                nodes.append(helper.make_node("Flatten", ["p"], ["f"], name="flatten"))
            tensors += [numpy_helper.from_array(getattr(layer, part), f"{layer.name}.{part}") for part in ("weight", "bias")]
            inputs = [layer.source, f"{layer.name}.weight", f"{layer.name}.bias"]
            before = f"{layer.name}_raw" if layer.activation else layer.output
            if layer.name == "head":
                nodes.append(helper.make_node("Gemm", inputs, [before], name=layer.name, transB=1))
            else:
                pads = [layer.weight.shape[-1] // 2] * 4
                nodes.append(
                    helper.make_node(
                        "Conv", inputs, [before], name=layer.name, pads=pads, strides=[layer.stride] * 2, group=layer.group
                    )
                )
            if layer.activation:
                limits = ["low", "high"] if layer.activation == "Clip" else []
                nodes.append(helper.make_node(layer.activation, [before, *limits], [layer.output], name=f"{layer.name}_act"))
        tensors += [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in (("low", 0), ("high", 6))]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *SHAPE])
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 10])
        graph = helper.make_graph(nodes, "test", [x], [y], tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, folder / "model.onnx")
        return folder / "model.sim.onnx"


def shaped(values: NDArray[np.floating], layer: Layer) -> Array:
    return values.astype(np.float64).reshape(1, -1, *[1] * (layer.weight.ndim - 2))


def rows(values: NDArray[np.floating], layer: Layer) -> Array:
    return values.astype(np.float64).reshape(-1, *[1] * (layer.weight.ndim - 1))


def ncnn_table(network: Network) -> str:
    """A line of weight multipliers for each layer (of its groups, where it has some), then one of the input's."""
    weights, inputs = [], []
    for layer in network.layers:
        multipliers = 1 / layer.scales(layer.limit)
        if layer.group > 1:
            multipliers = multipliers.reshape(layer.group, -1).min(1)  # the scale that holds all channels of the group
        weights.append(f"{layer.name}_param_0 " + "".join(f"{value:.9g} " for value in multipliers))
        inputs.append(f"{layer.name} {1 / network.scale(layer.source):.9g} ")
    return "\n".join([*weights, *inputs]) + "\n"


def ncnn_reference(network: Network, x: Array) -> Array:
    table = {line.split()[0]: np.array(line.split()[1:], np.float32) for line in ncnn_table(network).splitlines()}

    def run(layer: Layer, values: Array) -> Array:
        multipliers = np.repeat(table[f"{layer.name}_param_0"], len(layer.weight) // len(table[f"{layer.name}_param_0"]))
        codes = np.clip(half_away(values * float(table[layer.name][0])), -127, 127)
        weight = np.clip(half_away(layer.weight * rows(multipliers, layer)), -127, 127)
        assert np.abs(weight).max() <= layer.limit
        sums = layer.product(codes, weight) / (float(table[layer.name][0]) * shaped(multipliers, layer))
        return layer.activate(sums + shaped(layer.bias, layer))

    return network.compute(x, run)


def mnn_parameters(network: Network) -> dict[str, object]:
    def entry(name: str, scales: Array, low: int) -> dict[str, object]:
        return {"name": name, "bits": 8, "scales": [float(value) for value in scales.ravel()], "clamp_min": low, "clamp_max": 127}

    layers = [
        {
            "input": [entry(layer.source, network.scale(layer.source), -128)],
            "weight": [entry(f"{layer.name}.weight", layer.scales(127), -127)],
            "output": [entry(layer.output, network.scale(layer.output), -128)],
            "method": 0,
        }
        for layer in network.layers
    ]
    return {"version": "0.0.0", "algo": [{"type": 0, "quant_params": {"round_mode": 1, "layer": layers}}]}


def mnn_reference(network: Network, x: Array) -> Array:
    """With MNN's own truncations: of the bias of a depthwise convolution, and of an average in the scale of its input."""

    def run(layer: Layer, values: Array) -> Array:
        step = float(network.scale(layer.source)) * layer.scales(127).astype(np.float64)
        codes = np.clip(half_away(values / float(network.scale(layer.source))), -128, 127)
        weight = np.clip(half_away(layer.weight / rows(layer.scales(127), layer)), -127, 127)
        bias = np.trunc(layer.bias / step) * step if layer.group > 1 else layer.bias
        made = layer.activate(layer.product(codes, weight) * shaped(step, layer) + shaped(bias, layer))
        scale = float(network.scale(layer.output))
        return np.clip(half_away(made / scale), -128, 127) * scale

    def pool(values: Array) -> Array:
        scale = float(network.scale("d"))
        sums = np.rint(values.sum((2, 3)) / scale).astype(np.int64)
        count = values[0, 0].size
        means = ((sums + 128 * count) * ((1 << 24) // count) >> 24) - 128  # unsigned codes, a reciprocal of 24 bits
        return np.asarray(means * scale)

    return network.compute(x, run, pool)


def write_ncnn(network: Network, folder: Path) -> Path:
    (folder / "model.table").write_text(ncnn_table(network))
    return network.save(folder)


def write_mnn(network: Network, folder: Path) -> Path:
    (folder / "model.mnn.json").write_text(json.dumps(mnn_parameters(network)))
    (folder / "qdeploy.json").write_text('{"schema": 1}')
    return network.save(folder)


def sqnr(expected: Array, made: Array) -> float:
    return float(10 * np.log10(np.square(expected).sum() / max(np.square(expected - made).sum(), 1e-300)))


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("variant", "least"), [("plain", 120.0), ("packed", 30.0)])
def test_ncnn_computes_what_the_table_says(variant: str, least: float, batch: int, tmp_path: Path) -> None:
    network = Network()
    x = network.data(batch)
    (y,) = installed("ncnn").open(write_ncnn(network, tmp_path), batch, variant).run([x])
    assert y.shape == (batch, 10) and y.dtype == np.float32
    assert sqnr(ncnn_reference(network, x), y) > least
    assert 10 < sqnr(network.compute(x, network.watch), y) < 60, "int8 codes, not the float model"


def test_ncnn_computes_grouped_convolutions_with_one_scale_a_group(tmp_path: Path) -> None:
    network = Network(group=2)
    x = network.data(3)
    (y,) = installed("ncnn").open(write_ncnn(network, tmp_path), 3, "plain").run([x])
    assert sqnr(ncnn_reference(network, x), y) > 120


def test_ncnn_leaves_a_layer_that_is_not_in_the_table_float(tmp_path: Path) -> None:
    network = Network()
    runtime = installed("ncnn")
    path = write_ncnn(network, tmp_path)
    lines = [line for line in ncnn_table(network).splitlines() if not line.startswith(("point", "head"))]
    (tmp_path / "model.table").write_text("\n".join(["# two layers stay float", *lines]))
    x = network.data(4)
    (y,) = runtime.open(path, 4, "plain").run([x])
    all_int8, none = ncnn_reference(network, x), network.compute(x, network.watch)
    assert sqnr(none, all_int8) < sqnr(none, y) < 60


def test_ncnn_says_which_node_lost_its_layer() -> None:
    table = {"conv_param_0": np.ones(2, np.float32), "conv": np.ones(1, np.float32)}
    param = "7767517\n2 2\nInput in0 0 1 in0\nConvolution c0 1 1 in0 out0 0=2 1=1 5=0 6=2\n"
    with pytest.raises(ArtifactError, match=r"weights of a node.*conv"):
        ncnn_runtime.quantize(param, bytes(16), [("conv", np.ones((2, 1, 1, 1), np.float32))], table)


def test_ncnn_without_its_converter_names_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = installed("ncnn")
    path = write_ncnn(Network(), tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotInstalledError, match=r"pnnx.*pip install pnnx"):
        runtime.open(path, 1, "plain")


def test_ncnn_names_a_layer_that_it_lacks(tmp_path: Path) -> None:
    runtime = installed("ncnn")
    path = write_ncnn(Network(), tmp_path)
    nodes = [helper.make_node("Slice", ["x", "starts", "ends", "axes", "steps"], ["y"])]
    numbers = {"starts": [0, 0], "ends": [9, 7], "axes": [2, 3], "steps": [2, 2]}
    tensors = [numpy_helper.from_array(np.array(value), name) for name, value in numbers.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *SHAPE])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 5, 4])
    graph = helper.make_graph(nodes, "test", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "model.onnx")
    (tmp_path / "model.table").write_text("")
    with pytest.raises(ArtifactError, match=r"ncnn cannot load the model that pnnx made; found: Tensor\.slice"):
        runtime.open(path, 1, "plain")


@pytest.mark.parametrize("batch", [1, 5])
def test_mnn_computes_what_the_parameters_say(batch: int, tmp_path: Path) -> None:
    network = Network()
    x = network.data(batch)
    (y,) = installed("mnn").open(write_mnn(network, tmp_path), batch, "default").run([x])
    assert y.shape == (batch, 10) and y.dtype == np.float32
    steps = np.abs(y - mnn_reference(network, x)) / network.scale("y")
    assert steps.max() < 1.001
    assert np.mean(steps > 0.001) < 0.1
    assert sqnr(network.compute(x, network.watch), y) > 20


def test_mnn_says_that_it_left_a_layer_float(tmp_path: Path) -> None:
    runtime = installed("mnn")
    network = Network()
    path = write_mnn(network, tmp_path)
    text = (tmp_path / "model.mnn.json").read_text()
    (tmp_path / "model.mnn.json").write_text(text.replace('"name": "d"', '"name": "nowhere"'))
    with pytest.raises(ArtifactError, match=r"did not quantize every layer.*found: 4; allowed: 5"):
        runtime.open(path, 1, "default")


def test_mnn_says_that_its_converter_failed(tmp_path: Path) -> None:
    runtime = installed("mnn")
    path = write_mnn(Network(), tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a\x3a\x00")  # a model with an empty graph
    with pytest.raises(ArtifactError):
        runtime.open(path, 1, "default")


@pytest.mark.parametrize("name", ["ncnn", "mnn"])
def test_a_folder_without_the_pair_is_refused(name: str, tmp_path: Path) -> None:
    runtime = installed(name)
    Network().save(tmp_path)
    with pytest.raises(
        ArtifactError, match=rf"'{name}' reads model\.onnx and .*found: model\.onnx; to do: quantize for backend {name}"
    ):
        runtime.open(tmp_path / "model.sim.onnx", 1, runtime.variants[0])


@pytest.mark.parametrize(("name", "write"), [("ncnn", write_ncnn), ("mnn", write_mnn)])
def test_a_session_runs_again_and_leaves_earlier_outputs_alone(
    name: str, write: Callable[[Network, Path], Path], tmp_path: Path
) -> None:
    runtime = installed(name)
    network = Network()
    session = runtime.open(write(network, tmp_path), 2, runtime.variants[0])
    x = network.data(2)
    first = session.run([x])[0]
    kept = first.copy()
    other = session.run([-x])[0]
    np.testing.assert_array_equal(first, kept)
    assert np.any(first != other)
    np.testing.assert_array_equal(session.run([x])[0], kept)
    assert session.placement() == {}


@pytest.mark.parametrize(("name", "write"), [("ncnn", write_ncnn), ("mnn", write_mnn)])
def test_opening_and_running_prints_nothing_and_asks_no_network(
    name: str, write: Callable[[Network, Path], Path], tmp_path: Path
) -> None:
    """In a process of its own: the libraries print and load in their first use only."""
    installed(name)
    path = write(Network(), tmp_path)
    code = f"""
import socket, sys, numpy as np
from pathlib import Path
from qdeploy.runtimes.runtime import runtimes
socket.getaddrinfo = lambda *args, **kwargs: print("network:", args)
runtime = runtimes[{name!r}]
session = runtime.open(Path({str(path)!r}), 2, runtime.variants[0])
session.run([np.zeros((2, *{SHAPE}), np.float32)])
if "MNN.tools" in sys.modules:
    print("MNN's logger is loaded")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
