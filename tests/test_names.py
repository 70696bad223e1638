"""Inputs and outputs of an ONNX file have their own names in every file that is written, and users name them so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import qdeploy
from qdeploy.cli.main import main
from qdeploy.core.errors import InputError, OptionError
from qdeploy.export.artifact import Artifact
from qdeploy.files.model import load_model

RANDOM = np.random.default_rng(4)
NAMES = {
    "numbers": ("input.1", "0", "w", "758", "output/Sigmoid:0"),
    "keywords": ("class", "in", "x.w", "return", "None"),
    "spaces": ("a b", "x/y", "w", "my out", 'z"q'),
    "names of parameters": ("weight", "self", "weight_", "bias", "c.weight"),
    "names that become the same": ("a.b", "a", "a/b", "b.a", "c_"),
}


def numbers(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def written(path: Path, first: str, second: str, weight: str, logits: str, gate: str, height: int | str = 8) -> Path:
    """Two inputs, a convolution, a sigmoid of it, and a product of its mean."""
    nodes = [
        helper.make_node("Conv", [first, weight], ["made"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["made"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Add", ["flat", second], ["sum"]),
        helper.make_node("MatMul", ["sum", "matrix"], [logits]),
        helper.make_node("Sigmoid", ["made"], [gate]),
    ]
    shapes = {first: ["N", 3, height, 8], second: ["N", 4], logits: ["N", 5], gate: ["N", 4, height, 8]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    constants = [numpy_helper.from_array(numbers(4, 3, 3, 3), weight), numpy_helper.from_array(numbers(4, 5), "matrix")]
    graph = helper.make_graph(nodes, "g", [values[first], values[second]], [values[logits], values[gate]], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def data(first: str, second: str) -> dict[str, torch.Tensor]:
    return {first: torch.from_numpy(numbers(8, 3, 8, 8)), second: torch.from_numpy(numbers(8, 4))}


QUICK = (("numbers", "h"), ("spaces", 8))
CASES = [(kind, height) for kind in NAMES for height in (8, "h")]


@pytest.mark.parametrize(("kind", "height"), [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES])
def test_inputs_and_outputs_keep_their_names_in_every_file(kind: str, height: int | str, tmp_path: Path) -> None:
    first, second, _, logits, gate = NAMES[kind]
    model = load_model(written(tmp_path / "m.onnx", *NAMES[kind], height))
    for artifact in qdeploy.quantize(model, [data(first, second)], ["snpe", "onnxruntime"], tmp_path / "out", recipe="fast"):
        assert artifact.manifest["verify"]["passed"], artifact.manifest["verify"]
        assert ([spec.name for spec in artifact.specs], artifact.outputs) == ([first, second], [logits, gate])
        assert "renamed" not in artifact.manifest
        for file in artifact.path.glob("*.onnx"):
            graph = onnx.load(file).graph
            assert [value.name for value in graph.input] == [first, second]
            assert [value.name for value in graph.output] == [logits, gate]
        assert {first, second, logits, gate} <= {encoding.tensor for encoding in artifact.encodings}
    encodings = json.loads((tmp_path / "out" / "snpe" / "model.encodings").read_text())
    assert {first, second, logits, gate} <= {entry["name"] for entry in encodings["activation_encodings"]}


@pytest.mark.parametrize("target", ["ncnn", "tengine"])
def test_a_target_that_splits_names_at_spaces_gets_others_and_the_manifest_has_both(target: str, tmp_path: Path) -> None:
    model = load_model(written(tmp_path / "m.onnx", *NAMES["spaces"]))
    artifact = qdeploy.quantize(model, [data("a b", "x/y")], target, tmp_path / "out", recipe="fast")
    assert artifact.manifest["renamed"] == {"a b": "a_b", "my out": "my_out"}
    assert any("'a b' is 'a_b', 'my out' is 'my_out'" in note for note in artifact.manifest["notes"])
    assert ([spec.name for spec in artifact.specs], artifact.outputs) == (["a b", "x/y"], ["my out", 'z"q'])
    assert artifact.manifest["verify"]["passed"], artifact.manifest["verify"]
    graph = onnx.load(artifact.model).graph
    assert not [name for node in graph.node for name in (node.name, *node.input, *node.output) if " " in name]
    (table,) = [path for path in artifact.path.iterdir() if path.suffix in (".table", ".scale")]
    assert all(all(_is_number(word) for word in line.split()[1:]) for line in table.read_text().splitlines())


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def test_names_with_spaces_never_become_one_name(tmp_path: Path) -> None:
    model = load_model(written(tmp_path / "m.onnx", "a b", "a_b", "w", "y", "z"))
    artifact = qdeploy.quantize(model, [data("a b", "a_b")], "tengine", tmp_path / "out", recipe="fast")
    assert artifact.manifest["renamed"] == {"a b": "a__b"}
    assert [value.name for value in onnx.load(artifact.model).graph.input] == ["a__b", "a_b"]


def test_the_command_line_takes_the_names_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "m.onnx", *NAMES["numbers"], "h")
    np.savez(tmp_path / "x.npz", **{name: tensor.numpy() for name, tensor in data("input.1", "0").items()})
    options = ["--data", str(tmp_path / "x.npz"), "--recipe", "fast", "--quiet"]
    for more in ([], ["--dynamic", "input.1:2=height"]):
        out = tmp_path / f"out{len(more)}"
        assert command("quantize", path, "--backend", "onnxruntime", "--out", out, *options, *more) == 0, capsys.readouterr()
        assert [spec.name for spec in Artifact.open(out).specs] == ["input.1", "0"]
    assert command("verify", out, "--data", tmp_path / "x.npz", "--runtime", "onnxruntime", "--quiet") == 0, capsys.readouterr()


def command(*words: object) -> object:
    """The exit status of a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qdeploy", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
    return stopped.value.code or 0


@pytest.mark.parametrize("height", [8, "h"])
def test_messages_have_the_names_of_the_file(height: int | str, tmp_path: Path) -> None:
    model = load_model(written(tmp_path / "m.onnx", *NAMES["numbers"], height))
    given = data("input.1", "0")
    with pytest.raises(InputError, match=r"unknown 'input_1' and missing 'input\.1'.*allowed: input\.1, 0"):
        qdeploy.prepare(model, {"input_1": given["input.1"], "0": given["0"]}, backend="snpe")
    with pytest.raises(OptionError, match=r"'input_1'.*did you mean 'input\.1'"):
        qdeploy.prepare(model, given, backend="snpe", dynamic={"input_1": {2: "height"}})
    prepared = qdeploy.prepare(model, given, backend="snpe")
    with pytest.raises(InputError, match=r"input '0' has the wrong shape"):
        qdeploy.calibrate(prepared, [{"input.1": given["input.1"], "0": given["0"][:, :2]}])
