"""What exporters take apart comes out of the importer as one op, and what only looks like it is left as it is."""

from __future__ import annotations

from pathlib import Path

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_networks import written
from torch.export import ExportedProgram

from qdeploy.capture.capture import capture
from qdeploy.files.model import load_model
from qdeploy.graph import query

RANDOM = np.random.default_rng(3)


def f(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


CONSTANTS = {
    "half": np.float32(0.5),
    "one": np.float32(1),
    "two": np.float32(2),
    "three": np.float32(3),
    "third": np.array([3], np.int64),
    "six": np.float32(6),
    "zero": np.float32(0),
    "sixth": np.float32(1 / 6),
    "root2": np.float32(np.sqrt(2)),
    "inverse": np.float32(np.sqrt(0.5)),
    "wrong": np.float32(1.3),
    "pi": np.float32(np.sqrt(2 / np.pi)),
    "cube": np.float32(0.044715),
    "eps": np.float32(1e-3),
    "last": np.array([-1], np.int64),
    "middle": np.array([1], np.int64),
    "w": f(4),
    "b": f(4),
    "column": f(6, 1),
    "matrix": f(4, 5),
    "square": f(4, 4),
    "bias5": f(5),
    "row5": f(1, 5),
}
GATE = "d = Div(x, root2)\n e = Erf(d)\n g = Add(e, one)\n "
CENTRE = "m = ReduceMean(x, {axis})\n d = Sub(x, m)\n p = Pow(d, two)\n v = ReduceMean(p, {axis})\n a = Add(v, eps)\n s = Sqrt(a)\n "
NORM = CENTRE.format(axis="last")

FUSED = {
    "gelu, halved at last": (GATE + "h = Mul(x, g)\n y = Mul(h, half)", ["gelu"]),
    "gelu, halved first": (GATE + "h = Mul(half, x)\n y = Mul(h, g)", ["gelu"]),
    "gelu, with a halved gate": ("d = Mul(inverse, x)\n e = Erf(d)\n g = Add(one, e)\n h = Mul(half, g)\n y = Mul(h, x)", ["gelu"]),
    "gelu, divided by two": (GATE + "h = Mul(x, g)\n y = Div(h, two)", ["gelu"]),
    "gelu of a sum": ("x = Add(x0, wrong)\n " + GATE + "h = Mul(x, g)\n y = Mul(h, half)", ["add", "gelu"]),
    "gelu of twice the input": ("x = Mul(x0, two)\n " + GATE + "h = Mul(x, g)\n y = Mul(h, half)", ["mul", "gelu"]),
    "gelu and more": (GATE + "h = Mul(x, g)\n k = Mul(h, half)\n y = Mul(k, x)", ["gelu", "mul"]),
    "gelu with tanh": (
        "p = Pow(x, three)\n q = Mul(p, cube)\n r = Add(x, q)\n t = Mul(r, pi)\n u = Tanh(t)\n g = Add(u, one)\n "
        "h = Mul(x, g)\n y = Mul(half, h)",
        ["gelu"],
    ),
    "gelu with tanh, by whole powers": (
        "p = Pow(x, third)\n q = Mul(cube, p)\n r = Add(q, x)\n t = Mul(pi, r)\n u = Tanh(t)\n g = Add(one, u)\n "
        "h = Mul(half, x)\n y = Mul(h, g)",
        ["gelu"],
    ),
    "gelu with tanh, without powers": (
        "c = Mul(cube, x)\n q = Mul(c, x)\n r = Add(q, one)\n k = Mul(x, pi)\n t = Mul(k, r)\n u = Tanh(t)\n g = Add(one, u)\n "
        "h = Mul(half, x)\n y = Mul(h, g)",
        ["gelu"],
    ),
    "silu": ("s = Sigmoid(x)\n y = Mul(x, s)", ["silu", "silu"]),
    "silu, turned": ("s = Sigmoid(x)\n y = Mul(s, x)", ["silu", "silu"]),
    "mish": ("s = Softplus(x)\n t = Tanh(s)\n y = Mul(x, t)", ["mish"]),
    "hardswish": ("a = Add(x, three)\n c = Clip(a, zero, six)\n p = Mul(x, c)\n y = Div(p, six)", ["hardswish"]),
    "hardswish, divided first": ("a = Add(three, x)\n c = Clip(a, zero, six)\n p = Div(c, six)\n y = Mul(p, x)", ["hardswish"]),
    "hardswish, times a sixth": ("a = Add(x, three)\n c = Clip(a, zero, six)\n p = Mul(c, sixth)\n y = Mul(x, p)", ["hardswish"]),
    "hardswish of hardsigmoid": ("s = HardSigmoid<alpha=0.1666667, beta=0.5>(x)\n y = Mul(x, s)", ["hardswish"]),
    "layer norm": (NORM + "n = Div(d, s)\n q = Mul(n, w)\n y = Add(q, b)", ["layer_norm"]),
    "layer norm, turned": (NORM + "n = Div(d, s)\n q = Mul(w, n)\n y = Add(b, q)", ["layer_norm"]),
    "layer norm without a bias": (NORM + "n = Div(d, s)\n y = Mul(n, w)", ["layer_norm"]),
    "layer norm alone": (NORM + "y = Div(d, s)", ["layer_norm"]),
    "layer norm by a reciprocal": (NORM + "i = Reciprocal(s)\n n = Mul(d, i)\n q = Mul(n, w)\n y = Add(q, b)", ["layer_norm"]),
    "layer norm by a product": (
        "m = ReduceMean(x, last)\n d = Sub(x, m)\n p = Mul(d, d)\n v = ReduceMean(p, last)\n a = Add(eps, v)\n s = Sqrt(a)\n "
        "i = Div(one, s)\n y = Mul(i, d)",
        ["layer_norm"],
    ),
    "layer norm, centred twice": (
        "m = ReduceMean(x, last)\n d = Sub(x, m)\n m2 = ReduceMean(x, last)\n d2 = Sub(x, m2)\n p = Pow(d2, two)\n "
        "v = ReduceMean(p, last)\n a = Add(v, eps)\n s = Sqrt(a)\n y = Div(d, s)",
        ["layer_norm"],
    ),
    "linear": ("p = MatMul(x, matrix)\n y = Add(p, bias5)", ["linear"]),
    "linear, turned": ("p = MatMul(x, matrix)\n y = Add(bias5, p)", ["linear"]),
    "linear without a bias": ("y = MatMul(x, matrix)", ["linear"]),
    "linear with one more reader": ("p = MatMul(x, matrix)\n q = Add(p, bias5)\n y = Mul(q, p)", ["linear", "add", "mul"]),
    "linear twice": ("p = MatMul(x, square)\n y = MatMul(p, square)", ["linear", "linear"]),
    "linear of a transposed weight": ("t = Transpose(matrix)\n u = Transpose(t)\n y = MatMul(x, u)", ["linear"]),
}  # fmt: skip

LEFT = {
    "a gelu of another argument": ("d = Div(x, wrong)\n e = Erf(d)\n g = Add(e, one)\n h = Mul(x, g)\n y = Mul(h, half)", "gelu"),
    "a gelu that is not halved": (GATE + "y = Mul(x, g)", "gelu"),
    "a gate of another tensor": ("o = Neg(x)\n s = Sigmoid(o)\n y = Mul(x, s)", "silu"),
    "a swish that is not divided": ("a = Add(x, three)\n c = Clip(a, zero, six)\n y = Mul(x, c)", "hardswish"),
    "a clip at another limit": ("a = Add(x, three)\n c = Clip(a, zero, three)\n p = Mul(x, c)\n y = Div(p, six)", "hardswish"),
    "a norm over the middle": (CENTRE.format(axis="middle") + "n = Div(d, s)\n q = Mul(n, w)\n y = Add(q, b)", "layer_norm"),
    "a norm with a scale for rows": (NORM + "n = Div(d, s)\n y = Mul(n, column)", "layer_norm"),
    "a norm of another variance": (
        "m = ReduceMean(x, last)\n d = Sub(x, m)\n p = Pow(x, two)\n v = ReduceMean(p, last)\n a = Add(v, eps)\n s = Sqrt(a)\n "
        "y = Div(d, s)",
        "layer_norm",
    ),
}


def ops_and_check(path: Path, body: str) -> list[str]:
    """The names of the ops of the captured import, after its values were compared with those of ONNX Runtime."""
    name = "x0" if "x0" in body else "x"
    read = {word.strip("(),") for word in body.replace("(", " ").split()}
    written(path, f"float[N, 6, 4] {name}", "float[A, B, C] y", body, **{k: v for k, v in CONSTANTS.items() if k in read})
    x = 2 * f(3, 6, 4)
    (wanted,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {name: x})
    loaded = load_model(path)
    assert isinstance(loaded, ExportedProgram)
    captured = capture(loaded, None)
    (got,) = networks.flat(captured.module(torch.from_numpy(x)))
    np.testing.assert_allclose(got.detach().numpy(), wanted, rtol=1e-4, atol=1e-5)
    return [query.op_of(node).name for node in captured.module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("name", FUSED)
def test_a_spelling_becomes_one_op(tmp_path: Path, name: str):
    body, wanted = FUSED[name]
    assert ops_and_check(tmp_path / "m.onnx", body) == wanted


@pytest.mark.parametrize("name", LEFT)
def test_what_only_looks_like_a_spelling_is_left(tmp_path: Path, name: str):
    body, op = LEFT[name]
    assert op not in ops_and_check(tmp_path / "m.onnx", body)


@pytest.mark.parametrize("sizes", [np.array([0, 3, -1]), np.array([0, 2, -1])])
def test_group_norm_between_two_reshapes_becomes_one_op(tmp_path: Path, sizes: np.ndarray):
    groups = int(sizes[1])
    constants = {"ones": np.ones(groups, np.float32), "zeros": np.zeros(groups, np.float32), "sizes": sizes}
    body = (
        "r = Reshape(x, sizes)\n i = InstanceNormalization(r, ones, zeros)\n t = Shape(x)\n u = Reshape(i, t)\n "
        "m = Mul(u, scale)\n y = Add(m, bias)"
    )
    path = written(
        tmp_path / "m.onnx", "float[N, 6, 4, 4] x", "float[A, B, C, D] y", body, scale=f(6, 1, 1), bias=f(6, 1, 1), **constants
    )
    loaded, x = load_model(path), f(2, 6, 4, 4)
    assert isinstance(loaded, ExportedProgram)
    captured = capture(loaded, None)
    assert [query.op_of(node).name for node in captured.module.graph.nodes if node.op == "call_function"] == ["group_norm"]
    (wanted,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_allclose(networks.flat(captured.module(torch.from_numpy(x)))[0].detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("straight", "bias", "factors"), [(0, "bias5", (1, 1)), (1, "row5", (0.5, 2.0)), (0, "half", (2.0, 1.0))])
def test_gemm_with_constants_becomes_linear_with_its_factors_in_the_weights(
    tmp_path: Path, straight: int, bias: str, factors: tuple[float, float]
):
    matrix = CONSTANTS["matrix"].T.copy() if straight else CONSTANTS["matrix"]
    body = f"y = Gemm<transB={straight}, alpha={float(factors[0])}, beta={float(factors[1])}>(x, matrix, {bias})"
    path = written(tmp_path / "m.onnx", "float[N, 4] x", "float[N, 5] y", body, matrix=matrix, **{bias: CONSTANTS[bias]})
    loaded, x = load_model(path), f(3, 4)
    assert isinstance(loaded, ExportedProgram)
    captured = capture(loaded, None)
    (node,) = captured.module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert [made.op for made in node.args] == ["placeholder", "get_attr", "get_attr"]
    assert list(query.parameter(captured.module, str(node.args[1].target)).shape) == [5, 4]
    (wanted,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_allclose(networks.flat(captured.module(torch.from_numpy(x)))[0].detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_slopes_of_channels_are_those_of_torch(tmp_path: Path):
    path = written(tmp_path / "m.onnx", "float[N, 6, 4, 4] x", "float[N, 6, 4, 4] y", "y = PRelu(x, slope)", slope=f(6, 1, 1))
    loaded = load_model(path)
    assert isinstance(loaded, ExportedProgram)
    captured = capture(loaded, None)
    assert [query.op_of(node).name for node in captured.module.graph.nodes if node.op == "call_function"] == ["prelu"]
    slope = onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0])
    np.testing.assert_array_equal(query.parameter(captured.module, "slope").detach().numpy(), slope.ravel())
