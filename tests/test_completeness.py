"""Nothing that a target computes in integers is without an encoding, as `tools/completeness.py` finds from the written files alone."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import networks
import onnx
import pytest

from qdeploy.core.backend import backends
from qdeploy.core.ops import EVERY

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import completeness

ALL = tuple(b.name for b in backends if any(rule.ops == EVERY for rule in b.rules) and b.activation.linear)
"""Backends that compute every op with integers."""


@pytest.mark.parametrize(("name", "backend"), networks.matrix())
def test_no_tensor_of_an_integer_op_is_without_an_encoding(name: str, backend: str):
    assert completeness.missing(networks.artifact_path(name, backend)) == []


def copied(name: str, backend: str, folder: Path) -> Path:
    return Path(shutil.copytree(networks.artifact_path(name, backend), folder / "out"))


def without(folder: Path, tensor: str) -> None:
    """Take one encoding out of all the places that may have it."""
    for file in ("qdeploy.json", "model.encodings", "encodings.json"):
        if not (folder / file).is_file():
            continue
        content = json.loads((folder / file).read_text())
        for part in ("encodings", "activation_encodings", "param_encodings", "tensors"):
            entries = content.get(part)
            if isinstance(entries, list):
                content[part] = [entry for entry in entries if tensor not in (entry.get("tensor"), entry.get("name"))]
        (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("role", ["activation", "weight", "bias"])
def test_the_check_finds_each_encoding_that_is_removed(backend: str, role: str, tmp_path: Path):
    folder = copied("mixed", backend, tmp_path)
    gone = [e["tensor"] for e in json.loads((folder / "qdeploy.json").read_text())["encodings"] if e["role"] == role]
    if onnx.load(folder / "model.onnx").graph.node[0].op_type in completeness.DEQUANTIZE:
        pytest.skip("the model itself has the numbers")
    for tensor in gone:
        fresh = tmp_path / tensor
        shutil.copytree(folder, fresh)
        without(fresh, tensor)
        found = completeness.missing(fresh)
        assert found and all(text.startswith(f"{tensor}, ") for text in found)


@pytest.mark.parametrize("backend", ["tensorrt", "openvino", "vitis", "onnxruntime", "rknn"])
@pytest.mark.parametrize("role", ["activation", "weight"])
def test_the_check_finds_each_quantizer_that_is_removed_from_the_model(backend: str, role: str, tmp_path: Path):
    folder = copied("mixed", backend, tmp_path)
    gone = [e["tensor"] for e in json.loads((folder / "qdeploy.json").read_text())["encodings"] if e["role"] == role]
    original = onnx.load(folder / "model.onnx")
    assert gone
    for tensor in gone:
        model = onnx.ModelProto.FromString(original.SerializeToString())
        bypass(model.graph, tensor)
        onnx.save(model, folder / "model.onnx")
        assert completeness.missing(folder), tensor


def bypass(graph: onnx.GraphProto, tensor: str) -> None:
    """Readers of the dequantized `tensor` read what it was quantized from; a parameter becomes a float one."""
    nodes = {node.name: node for node in graph.node}
    last = nodes[f"{tensor}_DequantizeLinear"]
    first = nodes.get(f"{tensor}_QuantizeLinear")
    if first is None:
        stored = next(t for t in graph.initializer if t.name == last.input[0])
        graph.initializer.append(onnx.helper.make_tensor(f"{tensor}_plain", 1, stored.dims, [0.0, 1.0] * (_size(stored) // 2)))
    source = first.input[0] if first is not None else f"{tensor}_plain"
    for node in graph.node:
        for at, name in enumerate(node.input):
            if name == last.output[0]:
                node.input[at] = source
    for output in graph.output:
        if output.name == last.output[0]:
            output.name = source
    for node in (first, last):
        if node is not None:
            graph.node.remove(node)


def _size(tensor: onnx.TensorProto) -> int:
    size = 1
    for length in tensor.dims:
        size *= length
    return size
