"""What lies behind the last layers: a concat of boxes and scores keeps its parts, in float, or in a file that ends before it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import qdeploy
from qdeploy.capture.capture import capture
from qdeploy.cli.main import main
from qdeploy.core.backend import backends
from qdeploy.core.errors import OptionError, QualityError
from qdeploy.core.targets import find_backend
from qdeploy.export.artifact import Artifact
from qdeploy.graph import query
from qdeploy.graph.parts import Parts, output_parts
from qdeploy.recipes.judge import Judge
from qdeploy.runtimes.runtime import Runtime, runtimes
from qdeploy.simulation.plan import Tail, make_plan, tail_concats

FLOATS = ("onnxruntime", "tensorrt", "openvino", "tvm")
INTEGERS = tuple(name for name in backends.names() if backends[name].encodes_all)


class Detector(nn.Module):
    """Boxes of `size` beside probabilities in one output, and a second output of the backbone."""

    def __init__(self, size: float, features: bool = False):
        super().__init__()
        self.size, self.features = size, features
        self.backbone, self.boxes, self.scores = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1), nn.Conv2d(16, 20, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        known = self.backbone(x).relu()
        scores = (8 * self.scores(known)).permute(0, 2, 3, 1).softmax(3).permute(0, 3, 1, 2)
        found = torch.cat([self.boxes(known) * self.size, scores], 1)
        return (known, found) if self.features else found


class Joined(nn.Module):
    """A softmax that is concatenated with a tensor of about its range, and a layer behind, so that this is no tail."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        known = self.first(x)
        return self.last(torch.cat([known[:, :4], (4 * known[:, 4:]).softmax(1), known[:, :4].tanh()], 1))


def made(size: float, features: bool = False) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Detector(size, features).eval(), torch.randn(24, 3, 8, 8)


def decibels(wanted: np.ndarray, found: np.ndarray) -> float:
    return float(10 * np.log10(np.square(wanted).sum() / np.square(wanted - found).sum()))


@pytest.fixture(autouse=True)
def _onnxruntime_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "installed", lambda self: self.name in ("onnxruntime", "qnn_htp") and _there(self))


def _there(runtime: Runtime) -> bool:
    try:
        return all(__import__(module) for module in runtime.modules)
    except ImportError:
        return False


def run(path: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {v.name: feeds[v.name] for v in session.get_inputs()}), strict=True))


@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt", "openvino", "snpe", "qnn"])
def test_no_part_of_a_concat_of_boxes_and_scores_is_lost(backend: str, size: float, tmp_path: Path) -> None:
    model, x = made(size)
    artifact = qdeploy.quantize(model, [x], backend, tmp_path / "out")
    assert artifact.manifest["verify"]["passed"], artifact.manifest["verify"]
    arrays = artifact.reference()
    wanted, found = arrays["float.concat"], arrays["simulated.concat"]
    assert decibels(wanted[:, :4], found[:, :4]) > 30 and decibels(wanted[:, 4:], found[:, 4:]) > 28
    assert (artifact.tail is not None) == (size > 1 and backends[backend].encodes_all)


@pytest.mark.parametrize("features", [False, True])
def test_a_file_that_ends_before_the_model_makes_its_outputs_with_the_tail(features: bool, tmp_path: Path) -> None:
    model, x = made(100.0, features)
    artifact = qdeploy.quantize(model, [x], "snpe", tmp_path / "out")
    assert artifact.tail is not None and any("run tail.onnx on the host" in note for note in artifact.manifest["notes"])
    arrays = artifact.reference()
    device = run(artifact.simulation, {"x": arrays["input.x"]})
    assert list(device) == artifact.device_outputs and artifact.device_outputs[-2:] == ["transpose_1", "mul_1"]
    assert [value.name for value in onnx.load(artifact.model).graph.output] == artifact.device_outputs
    host = device | run(artifact.tail, device)
    for name in artifact.outputs:
        assert np.array_equal(host[name], arrays[f"simulated.{name}"]), name
    for path in (artifact.model, artifact.simulation, artifact.tail):
        onnx.checker.check_model(onnx.load(path), full_check=True)
    sizes = {value.name for value in onnx.load(artifact.tail).graph.input}
    assert sizes == {"transpose_1", "mul_1"} and "Conv" not in {node.op_type for node in onnx.load(artifact.tail).graph.node}
    assert qdeploy.verify(Artifact.open(tmp_path / "out")).passed


@pytest.mark.parametrize("backend", INTEGERS)
def test_every_target_of_integers_gets_a_file_that_it_can_compute_whole(backend: str) -> None:
    plan = make_plan(capture(*made(100.0)).module, find_backend(backend), tail="auto")
    assert plan.cuts == ("transpose_1", "mul_1") and plan.host == ("concat",)
    floats = {one.tensor for one in plan.tensors if one.spec is None and one.role == "activation"}
    assert floats <= {"backbone", "concat"} and not {"transpose_1", "mul_1"} & floats


@pytest.mark.parametrize("backend", FLOATS)
def test_a_target_that_computes_in_float_too_keeps_all_behind_the_last_layers_in_float(backend: str) -> None:
    plan = make_plan(capture(*made(100.0)).module, find_backend(backend), tail="float")
    readers = {reader for one in plan.quantized if one.role == "activation" for reader in one.readers}
    assert not plan.cuts and {one.tensor for one in plan.tensors if one.op in ("softmax", "mul", "concat")}.isdisjoint(
        one.tensor for one in plan.quantized
    )
    assert "concat" not in readers


@pytest.mark.parametrize(("tail", "concat"), [("quantized", True), ("float", False), ("auto", False)])
@pytest.mark.parametrize("backend", ["onnxruntime", "snpe"])
def test_the_user_may_say_what_becomes_of_the_tail(backend: str, tail: Tail, concat: bool) -> None:
    model, x = made(100.0)
    prepared = qdeploy.calibrate(qdeploy.prepare(model, x, backend, "fast", tail=tail), [x])
    assert ("concat" in {one.tensor for one in prepared.plan.quantized}) == concat
    assert bool(prepared.notes) == (tail == "auto")


def test_parts_of_like_ranges_share_one_encoding() -> None:
    model, x = made(1.0)
    prepared = qdeploy.calibrate(qdeploy.prepare(model, x, "onnxruntime", "fast"), [x])
    assert "concat" in {one.tensor for one in prepared.plan.quantized} and not prepared.notes


def test_a_tail_that_nobody_knows_is_refused() -> None:
    model, x = made(1.0)
    with pytest.raises(OptionError, match="unknown tail 'host'"):
        qdeploy.prepare(model, x, "snpe", tail="host")  # type: ignore[arg-type]


def test_concats_before_the_last_layer_are_no_tail() -> None:
    torch.manual_seed(0)
    assert tail_concats(capture(Joined().eval(), torch.randn(2, 3, 8, 8)).module) == {}
    assert tail_concats(capture(*made(2.0)).module) == {"concat": ("mul_1", "transpose_1")}


@pytest.mark.parametrize("backend", ["snpe", "qnn"])
def test_what_a_softmax_makes_keeps_an_encoding_of_its_own_through_a_concat(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Joined().eval(), torch.randn(24, 3, 8, 8)
    artifact = qdeploy.quantize(model, [x], backend, tmp_path / "out", recipe="fast")
    numbers = {e.tensor: (e.scale.tolist(), e.zero_point.tolist()) for e in artifact.encodings}
    assert numbers["softmax"][1] == [0], "with another zero point Hexagon computes other numbers"
    assert numbers["concat"] != numbers["softmax"] and numbers["concat"] != numbers["tanh"]
    assert artifact.manifest["verify"]["passed"], artifact.manifest["verify"]
    rows = {row["name"]: row for row in artifact.manifest["verify"]["results"]}
    assert rows["onnxruntime:none"]["sqnr"] == 999
    if "qnn_htp" in rows:
        assert rows["qnn_htp"]["sqnr"] > 30


def test_softmax_stays_in_float_where_the_runtime_only_approximates_it(tmp_path: Path) -> None:
    """Also with what only moves data to it; the user's own session, without any option, then computes what was simulated."""
    torch.manual_seed(0)
    model, x = Joined().eval(), torch.randn(24, 3, 8, 8)
    artifact = qdeploy.quantize(model, [x], "onnxruntime", tmp_path / "out", recipe="fast")
    session = ort.InferenceSession(str(artifact.model))
    (found,) = session.run(None, {"x": artifact.reference()["input.x"]})
    (name,) = artifact.outputs
    assert decibels(artifact.reference()[f"simulated.{name}"], found) > 90
    assert "qnn_htp" in runtimes


class Mixed(nn.Module):
    """A part of `size` beside one of 1, which a quantized concat loses, through a permutation and a reshape."""

    def __init__(self, size: float):
        super().__init__()
        self.size, self.layer = size, nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        known = self.layer(x)
        both = torch.cat([known[:, :2] * self.size, known[:, 2:]], 1)
        return torch.cat([both, both * 0.9], 2).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 6)


def test_the_parts_of_an_output_are_followed_through_what_leaves_them_whole() -> None:
    torch.manual_seed(0)
    (node,) = query.outputs(capture(Mixed(1.0).eval(), torch.randn(2, 3, 4, 4)).module.graph)
    parts = output_parts(node)
    assert parts is not None and (parts.axis, parts.edges) == (2, (0, 2, 6)) and len(parts.tensors) == 2
    (node,) = query.outputs(capture(*made(2.0)).module.graph)
    assert output_parts(node) == Parts(1, (0, 4, 24), ("mul_1", "transpose_1"))


@pytest.mark.parametrize("accept", [False, True])
def test_a_part_that_is_lost_while_the_whole_is_well_is_a_failed_check(accept: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Mixed(300.0).eval(), torch.randn(24, 3, 4, 4)
    quantize = partial(qdeploy.quantize, model, [x], "onnxruntime", tmp_path / "out", recipe="fast", tail="quantized")
    if not accept:
        with pytest.raises(QualityError, match=r"part .*\[.*\] of the simulation is .* dB from the float model, 10 dB are asked"):
            quantize()
        assert not list(tmp_path.iterdir())
        return
    report = qdeploy.verify(quantize(accept=True))
    assert report.passed and report.accepted and any(lost.startswith("part ") for lost in report.quality)
    assert [row.sqnr for row in report.results if row.name == "onnxruntime:none"] == [999.0]


@pytest.mark.parametrize("accept", [False, True])
def test_what_is_destroyed_is_written_on_the_command_line_only_if_it_is_accepted(
    accept: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Mixed(300.0).eval(), torch.randn(24, 3, 4, 4)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)), tmp_path / "m.pt2")
    np.save(tmp_path / "x.npy", x.numpy())
    command = [
        "qdeploy",
        "quantize",
        str(tmp_path / "m.pt2"),
        "--backend",
        "onnxruntime",
        "--data",
        str(tmp_path / "x.npy"),
        "--recipe",
        "fast",
    ]
    command += ["--tail", "quantized", "--out", str(tmp_path / "out"), *(["--accept"] if accept else [])]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().out
    assert (tmp_path / "out").exists() == accept and ended.value.code == (0 if accept else 1)
    assert ("not written" in told) != accept and "10 dB are asked" in " ".join(told.split())


def test_steps_are_judged_by_the_parts_of_an_output() -> None:
    torch.manual_seed(0)
    model, x = Mixed(300.0).eval(), torch.randn(24, 3, 4, 4)
    prepared = qdeploy.calibrate(qdeploy.prepare(model, x, "snpe", "fast", tail="quantized"), [x])
    measure = Judge(prepared, [x])()
    assert measure.noise.shape == (2, 24) and measure.metric == "mean SQNR dB"
    wanted, found = (run(x).detach().double() for run in (prepared.captured.module, prepared))
    levels = [
        10 * torch.log10(w.square().sum() / (w - f).square().sum())
        for w, f in ((wanted[..., :2], found[..., :2]), (wanted[..., 2:], found[..., 2:]))
    ]
    assert measure.value == pytest.approx(float(sum(levels)) / 2, abs=1e-3)


class States(nn.Module):
    """An input of two states, one a hundred times as wide as the other, which two layers read; the transposed input goes first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = x.transpose(1, 2)
        return self.one(both[..., 0]) + self.other(both[..., 1].tanh())


@pytest.mark.parametrize("backend", FLOATS)
def test_the_parts_of_an_input_have_encodings_of_their_own_where_they_are_read(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = States().eval(), torch.randn(24, 2, 6) * torch.tensor([0.5, 100.0])[:, None]
    prepared = qdeploy.calibrate(qdeploy.prepare(model, x, backend, "fast"), [x])
    specs = {one.tensor: one for one in prepared.plan.tensors}
    assert specs["x"].spec is None and "taken apart" in specs["x"].reason
    assert prepared.plan.tie_free == (backend == "onnxruntime"), "the others compute tanh in float"
    wanted, found = prepared.captured.module(x).detach(), prepared(x)
    assert decibels(wanted.numpy(), found.detach().numpy()) > 30
    report = qdeploy.verify(qdeploy.convert(prepared, tmp_path / "out"), runtime="onnxruntime")
    assert report.passed, report


def test_an_input_that_is_not_taken_apart_is_quantized_as_it_comes() -> None:
    torch.manual_seed(0)

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.permute(0, 3, 1, 2))

    plan = make_plan(capture(Turned().eval(), torch.randn(2, 4, 4, 3)).module, find_backend("onnxruntime"))
    assert "x" in {one.tensor for one in plan.quantized}
