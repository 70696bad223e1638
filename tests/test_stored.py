"""Parameters are stored as their readers have them, every tensor of the file has its encoding, and `verify` says where one has none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import networks
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import qdeploy
from qdeploy.core.backend import backends
from qdeploy.export.artifact import Artifact
from qdeploy.verification.encoded import without_encoding

TARGETS = ("snpe", "qnn", "onnxruntime", "tensorrt")


class Layers(nn.Module):
    """Layers on tensors of several ranks, and slopes: the exporter turns their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.slope = nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(8)
        self.rows, self.flat, self.bare = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.slope(self.conv(x))
        rows = self.rows(x.flatten(2).transpose(1, 2))
        return self.flat(rows.mean(1)), self.bare(x.mean((2, 3), keepdim=True).squeeze((2, 3))), self.bare(x.permute(0, 2, 3, 1))


class Tied(nn.Module):
    """A table of words, read as it is and as the weight of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(12, 8), nn.Linear(8, 8)

    def forward(self, words: Tensor) -> Tensor:
        return F.linear(self.inner(self.words(words)), self.words.weight)


class Cells(nn.Module):
    """Steps of recurrent layers, and quotients that are rounded down."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.gated, self.last = nn.LSTMCell(8, 6), nn.GRUCell(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h, c = self.long(x)
        return self.last(h), c, self.last(self.gated(x)), torch.remainder(x, 0.5), torch.div(x, 0.5, rounding_mode="floor")


def batch() -> list[tuple[Tensor]]:
    return [(torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1)),)]


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = networks.several(Layers().eval(), batch(), TARGETS)
    folder = tmp_path_factory.mktemp("layers")
    return {name: qdeploy.convert(one, folder / name) for name, one in made.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_a_layer_reads_its_weight_under_the_name_of_the_encoding_along_its_channels(layers: dict[str, Artifact], target: str) -> None:
    artifact = layers[target]
    graph = onnx.load(artifact.model).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    encodings = {encoding.tensor: encoding for encoding in artifact.encodings}
    read = {}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "PRelu"):
            encoding = encodings.get(node.input[1])
            if target in ("snpe", "qnn") or node.op_type != "PRelu":
                assert encoding is not None, node
                read[node.input[1]] = encoding
            stored = made[node.input[1]].input[0] if node.input[1] in made else node.input[1]
            straight = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            if encoding is not None and encoding.spec.axis is not None:
                assert encoding.spec.axis == (0 if straight else 1)
                assert shapes[stored][encoding.spec.axis] == len(encoding.scale)
                (axis,) = [a.i for a in made[node.input[1]].attribute if a.name == "axis"]
                assert axis == encoding.spec.axis
    assert {"rows.weight", "flat.weight", "bare.weight"} <= read.keys()
    parameters = {encoding.tensor for encoding in artifact.encodings if encoding.role != "activation"}
    assert not [node for node in graph.node if node.op_type in ("Transpose", "Reshape") and node.input[0] in parameters]
    report = qdeploy.verify(artifact)
    assert report.passed, (report.faults, report.results)


def test_a_parameter_that_is_read_in_two_forms_has_an_encoding_in_each(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = networks.several(Tied().eval(), [(torch.randint(0, 12, (8, 5)),)], ("snpe", "onnxruntime"))
    for target, prepared in made.items():
        artifact = qdeploy.convert(prepared, tmp_path / target)
        encodings = {encoding.tensor: encoding for encoding in artifact.encodings}
        plain, turned = encodings["words.weight"], encodings["words.weight_transpose"]
        np.testing.assert_array_equal(plain.scale, turned.scale)
        assert (plain.spec.axis, turned.spec.axis) == ((0, 1) if target == "onnxruntime" else (None, None))
        if target == "snpe":
            stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(artifact.model).graph.initializer}
            np.testing.assert_array_equal(stored["words.weight"].T, stored["words.weight_transpose"])
        report = qdeploy.verify(artifact)
        assert report.passed, (report.faults, report.results)


@pytest.mark.parametrize("target", ["snpe", "qnn"])
def test_onnxsim_is_kept_where_layers_read_their_weights_directly(layers: dict[str, Artifact], target: str) -> None:
    (note,) = [note for note in layers[target].manifest["notes"] if "onnxsim" in note]
    assert note.startswith("simplified")


def test_several_axes_are_squeezed_at_once(layers: dict[str, Artifact]) -> None:
    for artifact in layers.values():
        assert [node.op_type for node in onnx.load(artifact.model).graph.node].count("Squeeze") == 1


@pytest.mark.parametrize("role", ["activation", "weight", "bias", "constant"])
@pytest.mark.parametrize("target", ["snpe", "qnn"])
def test_the_check_finds_every_encoding_that_is_taken_away(layers: dict[str, Artifact], target: str, role: str) -> None:
    artifact = layers[target]
    model, in_float = onnx.load(artifact.model), artifact.manifest["float"]
    assert without_encoding(model, artifact.encodings, in_float) == {}
    taken = [encoding.tensor for encoding in artifact.encodings if encoding.role == role]
    assert taken
    for tensor in taken:
        faults = without_encoding(model, [e for e in artifact.encodings if e.tensor != tensor], in_float)
        assert tensor in faults


@pytest.mark.parametrize("backend", [b.name for b in backends if b.encodes_all])
def test_nothing_is_without_an_encoding_in_the_files_of_targets_that_encode_all(backend: str) -> None:
    artifact = networks.artifact("mixed", backend)
    assert artifact.manifest["encodes_all"]
    assert without_encoding(onnx.load(artifact.model), artifact.encodings, artifact.manifest["float"]) == {}


@pytest.mark.parametrize("target", ["snpe", "qnn"])
def test_verify_fails_for_a_tensor_without_an_encoding_and_names_it(layers: dict[str, Artifact], target: str, tmp_path: Path) -> None:
    artifact = Artifact.open(shutil.copytree(layers[target].path, tmp_path / "out"))
    left = [entry for entry in artifact.manifest["encodings"] if entry["tensor"] != "transpose"]
    planned = [name for name in artifact.manifest["planned"] if name != "transpose"]
    artifact.manifest |= {"encodings": left, "planned": planned}
    report = qdeploy.verify(artifact, runtime="onnxruntime:none")
    assert not report.passed
    assert report.faults == ("tensor 'transpose', made by Transpose 'transpose', has no encoding",)


def test_steps_of_recurrent_layers_and_rounded_quotients_have_encodings_inside(tmp_path: Path) -> None:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    model = Cells().eval()
    (prepared,) = networks.several(model, [(x,)], ("qnn",)).values()
    for ours, wanted in zip(networks.flat(prepared.captured.module(x)), networks.flat(model(x)), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    artifact = qdeploy.convert(prepared, tmp_path / "out")
    assert without_encoding(onnx.load(artifact.model), artifact.encodings, artifact.manifest["float"]) == {}


def test_the_manifest_says_how_far_the_float_file_is_from_the_given_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)
    model = nn.Sequential(*layers).eval()
    data = [(torch.randn(32, 3, 6, 6),)]
    for recipe, worse in (("fast", True), ("plain", False)):
        prepared = qdeploy.calibrate(qdeploy.prepare(model, data[0], backend="qnn", recipe=recipe, weight_bits=4), data)
        if recipe == "fast":  # as a step does that corrects biases
            with torch.no_grad():
                prepared.module.get_parameter("0.bias").add_(0.1)
        artifact = qdeploy.convert(prepared, tmp_path / recipe)
        saved, (name,) = artifact.reference(), artifact.outputs
        made = _run(artifact, saved)
        noise = np.square(saved[f"float.{name}"].astype(np.float64) - made).sum()
        wanted = 10 * np.log10(np.square(saved[f"float.{name}"].astype(np.float64)).sum() / noise)
        assert artifact.manifest["float_file_sqnr"][name] == pytest.approx(wanted, abs=0.05) or wanted > 100
        notes = [note for note in artifact.manifest["notes"] if "run in float without its encodings" in note]
        assert len(notes) == worse
        assert not notes or f"{wanted:.1f} dB" in notes[0]
    assert json.loads((tmp_path / "fast" / "qdeploy.json").read_text())["float_file_sqnr"][name] < 60


def _run(artifact: Artifact, saved: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(artifact.model, providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {spec.name: saved[f"input.{spec.name}"] for spec in artifact.specs})
    return np.asarray(made)
