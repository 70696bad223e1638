"""The runtimes, each against an integer computation in numpy of the same small network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdeploy.core.errors import ArtifactError, NotInstalledError
from qdeploy.runtimes.runtime import Runtime, Session, quiet, runtimes

FLOAT_READERS = ("mnn", "ncnn")
"""They read a float model and a scale file of their own: see test_runtimes_mobile.py."""
READERS = [runtime for runtime in runtimes if runtime.name not in FLOAT_READERS]
OPENINGS = [(runtime.name, variant) for runtime in READERS for variant in (*runtime.variants, *runtime.others)]


def installed(name: str) -> Runtime:
    runtime = runtimes[name]
    if not runtime.installed():
        pytest.skip(f"runtime '{name}' is not installed")
    return runtime


class Graph:
    """An ONNX file in the making, of which every initializer gets a name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def constant(self, value: np.ndarray) -> str:
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, inputs: list[str], output: str | None = None, **attributes: object) -> str:
        output = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def qdq(self, value: str, scale: float, zero_point: int, output: str | None = None) -> str:
        encoding = [self.constant(np.float32(scale)), self.constant(np.uint8(zero_point))]
        codes = self.node("QuantizeLinear", [value, *encoding])
        return self.node("DequantizeLinear", [codes, *encoding], output)

    def stored(self, codes: np.ndarray, scale: np.ndarray) -> str:
        scale = np.asarray(scale, np.float32)
        zero_point = np.zeros(scale.shape, codes.dtype)
        parts = [self.constant(codes), self.constant(scale), self.constant(zero_point)]
        return self.node("DequantizeLinear", parts, **({"axis": 0} if scale.ndim else {}))

    def save(self, path: Path, input_shape: list[int], output_shape: list[int]) -> Path:
        source = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *input_shape])
        target = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *output_shape])
        graph = helper.make_graph(self.nodes, "test", [source], [target], self.tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        return path


def requantize(sums: np.ndarray, factor: np.ndarray | float, zero_point: int) -> np.ndarray:
    return np.clip(np.rint(sums * factor) + zero_point, 0, 255).astype(np.int64)


class Network:
    """conv 3x3 (int8 per channel, int32 bias), relu, global average pool, flatten, gemm; activations uint8."""

    x_scale, x_zero = 0.031, 119
    conv_scale, pool_scale, y_scale, y_zero = 0.043, 0.021, 0.034, 121
    w2_scale = 0.0041

    def numbers(self) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng(11)
        w1 = rng.integers(-127, 128, (8, 3, 3, 3)).astype(np.int8)
        w1_scale = rng.uniform(0.002, 0.009, 8).astype(np.float32)
        b1 = rng.integers(-9000, 9000, 8).astype(np.int32)
        w2 = rng.integers(-127, 128, (10, 8)).astype(np.int8)
        b2 = rng.integers(-20000, 20000, 10).astype(np.int32)
        return w1, w1_scale, b1, w2, b2

    def save(self, path: Path) -> Path:
        w1, w1_scale, b1, w2, b2 = self.numbers()
        graph = Graph()
        value = graph.qdq("x", self.x_scale, self.x_zero)
        weight = graph.stored(w1, w1_scale)
        bias = graph.stored(b1, np.float32(self.x_scale) * w1_scale)
        value = graph.node("Relu", [graph.node("Conv", [value, weight, bias], pads=[1, 1, 1, 1])])
        value = graph.node("GlobalAveragePool", [graph.qdq(value, self.conv_scale, 0)])
        value = graph.node("Flatten", [graph.qdq(value, self.pool_scale, 0)])
        value = graph.qdq(value, self.pool_scale, 0)
        bias = graph.stored(b2, np.float32(self.pool_scale) * np.float32(self.w2_scale))
        value = graph.node("Gemm", [value, graph.stored(w2, np.float32(self.w2_scale)), bias], transB=1)
        graph.qdq(value, self.y_scale, self.y_zero, output="y")
        return graph.save(path, [3, 12, 12], [10])

    def reference(self, codes: np.ndarray) -> np.ndarray:
        """The output codes for input codes `[batch, 3, 12, 12]`: integer sums, one multiplication, one rounding each."""
        w1, w1_scale, b1, w2, b2 = (value.astype(np.float64 if value.dtype.kind == "f" else np.int64) for value in self.numbers())
        padded = np.pad(codes.astype(np.int64) - self.x_zero, ((0, 0), (0, 0), (1, 1), (1, 1)))
        sums = np.zeros((len(codes), 8, 12, 12), np.int64)
        for row in range(12):
            for column in range(12):
                patch = padded[:, :, row : row + 3, column : column + 3]
                sums[:, :, row, column] = np.tensordot(patch, w1, axes=([1, 2, 3], [1, 2, 3])) + b1
        hidden = requantize(sums, (self.x_scale * w1_scale / self.conv_scale)[None, :, None, None], 0)
        pooled = requantize(hidden.sum((2, 3)), self.conv_scale / 144 / self.pool_scale, 0)
        return requantize(pooled @ w2.T + b2, self.pool_scale * self.w2_scale / self.y_scale, self.y_zero)


NETWORK = Network()


@cache
def opened(name: str, path: Path, batch: int, variant: str) -> Session:
    """A session of the network for several tests, since a runtime may compile for seconds."""
    return installed(name).open(path, batch, variant)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return NETWORK.save(tmp_path_factory.mktemp("runtimes") / "network.onnx")


@pytest.mark.parametrize(("name", "variant"), OPENINGS)
@pytest.mark.parametrize("batch", [1, 5])
def test_outputs_are_those_of_the_integer_reference(name: str, variant: str, batch: int, network: Path) -> None:
    codes = np.random.default_rng(5).integers(0, 256, (batch, 3, 12, 12))
    codes = codes // np.arange(1, batch + 1)[:, None, None, None]  # so that the samples differ in their pooled values
    x = ((codes - NETWORK.x_zero) * np.float32(NETWORK.x_scale)).astype(np.float32)

    outputs = opened(name, network, batch, variant).run([x])

    assert [output.shape for output in outputs] == [(batch, 10)]
    assert outputs[0].dtype == np.float32
    expected = NETWORK.reference(codes)
    assert np.mean((expected > 0) & (expected < 255)) > 0.3, "the reference must not saturate"
    got = np.rint(outputs[0] / np.float32(NETWORK.y_scale)) + NETWORK.y_zero
    steps = np.abs(got - expected)
    assert steps.max() <= (2 if name == "qnn_htp" else 1)
    assert np.mean(steps > 0) <= 0.25


@pytest.mark.parametrize(("name", "variant"), OPENINGS)
def test_a_session_runs_again_and_leaves_earlier_outputs_alone(name: str, variant: str, network: Path) -> None:
    session = opened(name, network, 5, variant)
    x = np.random.default_rng(6).normal(size=(5, 3, 12, 12)).astype(np.float32)
    first = session.run([x])[0]
    kept = first.copy()
    other = session.run([-3 * x])[0]
    np.testing.assert_array_equal(first, kept)
    assert np.any(first != other)
    np.testing.assert_array_equal(session.run([x])[0], kept)


@pytest.mark.parametrize("name", runtimes.names())
def test_a_missing_runtime_names_the_pip_command(name: str) -> None:
    runtime = replace(runtimes[name], modules=("qdeploy_has_no_such_module",))
    assert not runtime.installed()
    with pytest.raises(NotInstalledError) as error:
        runtime.require()
    assert f"pip install {' '.join(runtime.packages)}" in str(error.value)
    assert name in str(error.value)


def test_the_pip_commands_name_what_the_extras_bring() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = {re.split("[<>=]", line)[0] for line in sum(project["optional-dependencies"].values(), project["dependencies"])}
    assert {package for runtime in runtimes for package in runtime.packages} <= known


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **environment},
    )


def test_the_registry_imports_no_runtime() -> None:
    libraries = ["torch", "onnx", *sorted({module for runtime in runtimes for module in runtime.modules})]
    code = f"import sys, qdeploy.runtimes.runtime as r; r.runtimes.names(); print([m for m in {libraries} if m in sys.modules])"
    done = run_python(code)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("name", [runtime.name for runtime in READERS])
def test_opening_and_running_prints_nothing_and_asks_no_network(name: str, network: Path) -> None:
    """In a process of its own: the libraries print and load in their first use only."""
    installed(name)
    code = f"""
import socket, sys, numpy as np
from pathlib import Path
from qdeploy.runtimes.runtime import runtimes
socket.getaddrinfo = lambda *args, **kwargs: print("network:", args)
runtime = runtimes[{name!r}]
session = runtime.open(Path({str(network)!r}), 2, runtime.variants[0])
session.run([np.zeros((2, 3, 12, 12), np.float32)])
if "openvino_telemetry" in sys.modules:
    print("telemetry is loaded")
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_qnn_leaves_no_compute_node_to_the_cpu(network: Path) -> None:
    counts = opened("qnn_htp", network, 1, "default").placement()
    assert counts["fallback"] == 0
    assert counts["accelerator"] >= 3  # Conv, GlobalAveragePool and Gemm; Relu may be merged into the quantizer after it


def test_qnn_counts_a_compute_node_on_the_cpu(tmp_path: Path) -> None:
    graph = Graph()
    value = graph.qdq(graph.node("Relu", [graph.qdq("x", 0.05, 128)]), 0.05, 0)
    graph.node("Det", [value], output="y")
    path = graph.save(tmp_path / "det.onnx", [3, 3], [])
    counts = installed("qnn_htp").open(path, 1, "default").placement()
    assert counts["fallback"] == 1


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "tvm"])
def test_processors_have_no_placement(name: str, network: Path) -> None:
    assert opened(name, network, 1, installed(name).variants[-1]).placement() == {}


@pytest.mark.parametrize("variant", ["faithful", "none"])
def test_onnxruntime_keeps_a_float_bias(variant: str, tmp_path: Path) -> None:
    """With `scale_x * scale_w = 1` and biases below 0.5, an int32 bias would be 0 everywhere."""
    rng = np.random.default_rng(3)
    weight = rng.integers(-1, 2, (8, 3, 1, 1)).astype(np.int8)
    bias = np.linspace(-0.45, 0.45, 8).astype(np.float32)
    graph = Graph()
    inputs = [graph.qdq("x", 4.0, 128), graph.stored(weight, np.full(8, 0.25)), graph.constant(bias)]
    graph.qdq(graph.node("Conv", inputs), 0.0625, 100, output="y")
    path = graph.save(tmp_path / "bias.onnx", [3, 4, 4], [8, 4, 4])
    codes = rng.integers(-2, 3, (2, 3, 4, 4))

    (y,) = installed("onnxruntime").open(path, 2, variant).run([(codes * 4).astype(np.float32)])

    exact = np.einsum("oc,nchw->nohw", weight[:, :, 0, 0].astype(np.int64), codes) + bias[None, :, None, None]
    expected = np.rint(exact / 0.0625) * 0.0625
    np.testing.assert_array_equal(y, np.clip(expected, -6.25, 155 * 0.0625))


@pytest.mark.parametrize("variant", ["faithful", "none"])
def test_onnxruntime_keeps_both_of_two_requantizations(variant: str, tmp_path: Path) -> None:
    graph = Graph()
    graph.qdq(graph.qdq(graph.qdq("x", 0.05, 117), 0.0713, 90), 0.05, 117, output="y")
    path = graph.save(tmp_path / "twice.onnx", [64], [64])
    codes = np.random.default_rng(4).integers(40, 200, (2, 64)) - 117

    (y,) = installed("onnxruntime").open(path, 2, variant).run([(codes * 0.05).astype(np.float32)])

    middle = np.clip(np.rint(codes * 0.05 / 0.0713), -90, 165)
    np.testing.assert_allclose(y, np.rint(middle * 0.0713 / 0.05) * 0.05, atol=1e-5)
    assert np.any(np.rint(y / 0.05) != codes)


@pytest.mark.parametrize("kind", ["INT8", "UINT8", "INT4", "UINT4"])
def test_onnxruntime_opens_what_its_own_optimizers_fail_on(kind: str, tmp_path: Path) -> None:
    """4-bit codes after a Clip, and int8 codes that are carried through pooling and a reshape to an op in float."""
    codes, low = getattr(TensorProto, kind), -4 if kind.startswith("I") else 0
    tensors = [numpy_helper.from_array(np.float32(0.5), "s"), helper.make_tensor("z", codes, [], [0])]
    tensors += [numpy_helper.from_array(np.float32(v), n) for n, v in (("low", low / 2), ("high", 3.0))]
    tensors.append(numpy_helper.from_array(np.eye(4, dtype=np.float32)[:, :3].copy(), "w"))
    nodes = [
        helper.make_node("Clip", ["x", "low", "high"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MaxPool", ["d"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w"], ["y"]),
    ]
    source = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 4, 4])
    target = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph(nodes, "test", [source], [target], tensors)
    path = tmp_path / "quirk.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    x = np.random.default_rng(8).normal(size=(2, 1, 4, 4)).astype(np.float32)
    expected = np.clip(np.rint(np.clip(x, low / 2, 3) / 0.5) * 0.5, low / 2, 3).reshape(2, 2, 2, 2, 2).max((2, 4)).reshape(2, 4)[:, :3]
    for variant in ("faithful", "none"):
        (y,) = installed("onnxruntime").open(path, 2, variant).run([x])
        np.testing.assert_array_equal(y, expected)


def test_all_of_onnxruntime_is_the_session_of_whoever_says_nothing(tmp_path: Path) -> None:
    """Also where its own optimizers change numbers: a softmax between codes, and two requantizations in a row."""
    import onnxruntime as ort

    graph = Graph()
    value = graph.qdq(graph.qdq(graph.qdq("x", 0.05, 117), 0.0713, 90), 0.05, 117)
    graph.qdq(graph.node("Softmax", [value], axis=-1), 1 / 256, 0, output="y")
    path = graph.save(tmp_path / "changed.onnx", [64], [64])
    x = np.random.default_rng(4).normal(size=(16, 64)).astype(np.float32)

    made = {variant: installed("onnxruntime").open(path, 16, variant).run([x])[0] for variant in ("all", "faithful", "none")}

    np.testing.assert_array_equal(made["all"], ort.InferenceSession(str(path)).run(None, {"x": x})[0])
    np.testing.assert_array_equal(made["faithful"], made["none"])
    assert np.any(made["all"] != made["none"])


def test_tvm_names_an_operator_that_it_lacks(tmp_path: Path) -> None:
    graph = Graph()
    graph.node("Det", ["x"], output="y")
    path = graph.save(tmp_path / "det.onnx", [3, 3], [])
    with pytest.raises(ArtifactError, match=r"TVM cannot import 'det\.onnx'.*Det"):
        installed("tvm").open(path, 1, "default")


def test_openvino_says_why_it_cannot_open_a_file_and_not_where_in_its_source(tmp_path: Path) -> None:
    graph = Graph()
    pads = graph.constant(np.array([0, 0, 1, 0, 0, 1], np.int64))
    graph.qdq(graph.node("Pad", [graph.qdq("x", 0.05, 128), pads], mode="wrap"), 0.05, 128, output="y")
    path = graph.save(tmp_path / "wrap.onnx", [3, 8], [3, 10])
    with pytest.raises(ArtifactError) as error:
        installed("openvino").open(path, 1, "int8")
    assert str(error.value).startswith("OpenVINO cannot open 'wrap.onnx'; found: ") and "Unsupported padding mode: [wrap]" in str(
        error.value
    )
    assert ".cpp" not in str(error.value) and "\n" not in str(error.value)


def test_quiet_discards_native_output_only_inside(capfd: pytest.CaptureFixture[str]) -> None:
    print("before")
    with quiet():
        os.write(1, b"native\n")
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"


def test_quiet_lets_exceptions_pass_and_restores_the_output(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="passes"), quiet():
        raise ValueError("passes")
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"


def test_onnxruntime_opens_a_file_whose_weight_has_two_readers(tmp_path: Path) -> None:
    import torch

    import qdeploy

    layer = torch.nn.Conv2d(3, 3, 3, padding=1)
    twice = torch.nn.Sequential(layer, torch.nn.ReLU(), layer)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prepared = qdeploy.calibrate(qdeploy.prepare(twice, x, "openvino", recipe="fast"), [x])
    assert qdeploy.verify(qdeploy.convert(prepared, tmp_path / "out"), runtime="onnxruntime").passed
