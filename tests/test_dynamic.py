"""Dimensions beyond the batch that stay open, from the caller's words to the emitted file, and inputs and outputs by name."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import networks
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import qdeploy
from qdeploy import api
from qdeploy.capture.capture import capture
from qdeploy.cli.main import main
from qdeploy.core.errors import CaptureError, InputError, OptionError, QDeployError
from qdeploy.export.artifact import Artifact
from qdeploy.export.onnx_file import with_sizes
from qdeploy.files.model import load_model
from qdeploy.simulation.prepared import Prepared

Named = dict[str, Tensor]
BACKENDS = ("snpe", "tensorrt", "openvino", "onnxruntime")
everywhere = pytest.mark.parametrize("backend", BACKENDS)


class Words(nn.Module):
    """A transformer over words with learned positions; what it does not use stands between what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.position = nn.Parameter(torch.randn(1, 32, 16))
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(
        self, input_ids: Tensor, extra: Tensor | None = None, attention_mask: Tensor | None = None, *, gain: Tensor | None = None
    ) -> dict[str, object]:
        x = self.table(input_ids) + self.position[:, : input_ids.shape[1]]
        x = self.layer(x, src_key_padding_mask=None if attention_mask is None else attention_mask == 0)
        x = x if gain is None else x * gain[:, None, None]
        return {"logits": self.head(x), "extra": extra, "more": [x]}


class Few(nn.Module):
    """Takes what `Words` takes, and computes little."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 8), nn.Linear(8, 5)

    def forward(
        self, input_ids: Tensor, extra: Tensor | None = None, attention_mask: Tensor | None = None, *, gain: Tensor | None = None
    ) -> dict[str, object]:
        x = self.table(input_ids)
        x = x if attention_mask is None else x * attention_mask[:, :, None]
        x = x if gain is None else x * gain[:, None, None]
        return {"logits": self.head(x), "extra": extra, "more": [x]}


class Picture(nn.Module):
    """Two strides, an upsampling to the size of another tensor and one by a factor, and a pooling of whatever size there is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.second = nn.Conv2d(8, 8, 3, 2, 1)
        self.point = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Mapping[str, Tensor]:
        y = F.relu(self.first(x))
        z = F.relu(self.second(y))
        up = F.interpolate(z, size=y.shape[-2:], mode="bilinear") + y
        wide = F.interpolate(self.point(up), scale_factor=2, mode="nearest")
        return collections.OrderedDict(out=wide, label=self.head(F.adaptive_avg_pool2d(z, 1).flatten(1)))


class Unet(nn.Module):
    """Joins what came down with what goes up, so that sides must be multiples of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        return self.last(torch.cat([F.interpolate(F.relu(self.second(y)), scale_factor=2), y], 1))


def words(batch: int, length: int) -> Named:
    random = torch.Generator().manual_seed(batch * 100 + length)
    mask = torch.ones((batch, length), dtype=torch.int64)
    mask[0, -1] = 0
    return {"attention_mask": mask, "input_ids": torch.randint(0, 11, (batch, length), generator=random)}


def picture(batch: int, height: int, width: int | None = None) -> Named:
    random = torch.Generator().manual_seed(batch * 1000 + height)
    return {"x": torch.randn((batch, 3, height, width or height + 4), generator=random)}


SEQUENCE = {"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}}
SIDES = {"x": {2: "height", 3: "width"}}
# network, samples of a size, what is open, sizes to run at, names of the outputs
MODELS: dict[
    str, tuple[Callable[[], nn.Module], Callable[[int, int], Named], dict[str, dict[int, str]], tuple[int, ...], list[str]]
] = {
    "words": (Words, words, SEQUENCE, (3, 13, 32), ["logits", "more.0"]),
    "picture": (Picture, picture, SIDES, (9, 31, 40), ["out", "label"]),
    "unet": (Unet, picture, SIDES, (8, 20, 36), ["last"]),
}
FILED = {"few": (Few, words, SEQUENCE, (3, 13, 32), ["logits", "more.0"])} | MODELS


def network(name: str) -> nn.Module:
    return seeded(FILED[name][0])


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().eval()


@cache
def _calibrated(name: str) -> dict[str, Prepared]:
    _, samples, dynamic, _, _ = MODELS[name]
    together = api.prepare_all(network(name), samples(2, 16), BACKENDS, recipe="fast", dynamic=dynamic)
    return {one.backend.name: one for one in api.calibrate_all(together, [samples(4, 16)] * 2)}


def calibrated(name: str, backend: str) -> Prepared:
    """Made once a process with those of all other backends: not to be changed."""
    return _calibrated(name)[backend]


@cache
def converted(name: str, backend: str) -> Artifact:
    """Its artifact: not to be changed."""
    path = networks.FOLDER / f"open-{name}-{backend}"
    return Artifact.open(networks.once(path, lambda: qdeploy.convert(calibrated(name, backend), path).path))


def literal(path: Path, inputs: Named) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})


def flat(outputs: object) -> list[Tensor]:
    return [leaf.detach() for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def dims(path: Path) -> dict[str, list[str | int]]:
    graph = onnx.load(path).graph
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}


def assert_same(made: list[np.ndarray], wanted: list[Tensor]) -> None:
    assert [list(m.shape) for m in made] == [list(w.shape) for w in wanted]
    for m, w in zip(made, wanted, strict=True):
        assert np.abs(m - w.numpy()).max() <= 1e-6 * np.abs(w.numpy()).max()


@everywhere
@pytest.mark.parametrize("name", MODELS)
def test_the_emitted_file_computes_the_simulation_at_sizes_other_than_the_examples(name: str, backend: str) -> None:
    _, samples, dynamic, sizes, outputs = MODELS[name]
    prepared, artifact = calibrated(name, backend), converted(name, backend)
    for path in {artifact.model, artifact.simulation}:
        found = dims(path)
        assert [found[spec.name][0] for spec in prepared.captured.inputs] == ["batch"] * len(dynamic)
        assert {i: {d: found[i][d] for d in named} for i, named in dynamic.items()} == dynamic
    assert artifact.outputs == outputs
    for size in sizes:
        inputs = samples(3, size)
        assert_same(literal(artifact.simulation, inputs), flat(prepared(**inputs)))


@pytest.mark.slow
@everywhere
def test_an_artifact_with_open_sizes_passes_its_checks_on_the_runtimes_at_hand(backend: str, tmp_path: Path) -> None:
    artifact = qdeploy.convert(calibrated("words", backend), tmp_path / "out")
    report = qdeploy.verify(artifact)
    assert report.passed, [result.faults for result in report.results]
    sizes = qdeploy.verify(artifact, [words(2, 5), words(3, 20)], runtime="onnxruntime")
    assert sizes.passed and all(result.samples == 5 for result in sizes.results)
    assert artifact.inputs[0] == {"name": "input_ids", "shape": [None, None], "dtype": "int64", "open": ["batch", "sequence"]}


def test_runtimes_of_one_size_get_a_file_of_that_size_in_which_shapes_are_constants(tmp_path: Path) -> None:
    prepared, path = calibrated("words", "onnxruntime"), converted("words", "onnxruntime").simulation
    assert "Shape" in {node.op_type for node in onnx.load(path).graph.node}
    fixed = with_sizes(onnx.load(path), {"batch": 3, "sequence": 7})
    onnx.checker.check_model(fixed, full_check=True)
    assert "Shape" not in {node.op_type for node in fixed.graph.node}
    onnx.save(fixed, tmp_path / "fixed.onnx")
    assert all(isinstance(d, int) for shape in dims(tmp_path / "fixed.onnx").values() for d in shape)
    assert_same(literal(tmp_path / "fixed.onnx", words(3, 7)), flat(prepared(**words(3, 7))))


QUICK = {("few", "pt2"), ("few", "onnx"), ("unet", "pt2")}
"""Both kinds of files, sizes that two inputs share, and sizes that are multiples in the file that can say so."""


@pytest.mark.parametrize(
    ("name", "kind"),
    [pytest.param(n, k, marks=() if (n, k) in QUICK else pytest.mark.slow) for n in FILED for k in ("pt2", "onnx")],
)
def test_what_a_file_leaves_open_is_open_in_the_emitted_file(name: str, kind: str, tmp_path: Path) -> None:
    _, samples, dynamic, sizes, _ = FILED[name]
    model, example = network(name), samples(2, 16)
    if name == "unet":
        sizes_of = {"x": {0: Dim("n"), 2: 4 * Dim("quarter_height"), 3: 4 * Dim("quarter_width")}}
    else:
        sizes_of = {i: {0: Dim.DYNAMIC} | dict.fromkeys(named, Dim.DYNAMIC) for i, named in dynamic.items()}
    if kind == "pt2":
        torch.export.save(torch.export.export(model, (), example, dynamic_shapes=sizes_of), tmp_path / "model.pt2")
    else:
        open_names = {i: {0: "batch"} | named for i, named in dynamic.items()}
        torch.onnx.export(
            model, (), tmp_path / "model.onnx", kwargs=example, dynamo=True, dynamic_shapes=open_names, input_names=list(example)
        )
    loaded = load_model(tmp_path / f"model.{kind}")
    prepared = qdeploy.prepare(loaded, example, "onnxruntime", "fast")
    assert not prepared.captured.notes
    artifact = qdeploy.convert(qdeploy.calibrate(prepared, [example]), tmp_path / "out")
    found = dims(artifact.model)
    assert all(isinstance(found[i][d], str) for i, named in dynamic.items() for d in (0, *named))
    if kind == "onnx":
        assert {i: {d: found[i][d] for d in named} for i, named in dynamic.items()} == dynamic
    for size in sizes:
        assert_same(literal(artifact.simulation, samples(3, size)), flat(prepared(**samples(3, size))))
        assert_same(
            [t.numpy() for t in flat(prepared.captured.module(*ordered_inputs(prepared, samples(3, size))))],
            flat(model(**samples(3, size))),
        )


def ordered_inputs(prepared: Prepared, inputs: Named) -> list[Tensor]:
    return [inputs[spec.name] for spec in prepared.captured.inputs]


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 4)
        self.table = nn.Parameter(torch.ones(1, 3, 8))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.fc((x + self.table if y is None else x + y).flatten(1))


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x + y)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


ROWS = torch.ones(2, 3, 8)
REFUSED: dict[str, tuple[nn.Module, object, object, type[QDeployError], str]] = {
    "unknown input": (Sum(), (ROWS, ROWS), {"xx": {1: "rows"}}, OptionError, "unknown input 'xx'.*allowed: x, y.*did you mean 'x'"),
    "beyond the last": (Sum(), (ROWS, ROWS), {"x": {3: "rows"}}, OptionError, "no dimension 3 of input 'x'.*allowed: 1 to 2"),
    "before the first": (Sum(), (ROWS, ROWS), {"x": {-1: "rows"}}, OptionError, "no dimension -1 of input 'x'"),
    "the batch": (Sum(), (ROWS, ROWS), {"x": {0: "rows"}}, OptionError, "dimension 0 of input 'x' is the batch"),
    "no name": (Sum(), (ROWS, ROWS), {"x": {1: "a row"}}, OptionError, "no usable name; found: 'a row'"),
    "the batch's name": (Sum(), (ROWS, ROWS), {"x": {1: "batch"}}, OptionError, "no usable name; found: 'batch'"),
    "two sizes": (Sum(), (ROWS, ROWS), {"x": {1: "a", 2: "a"}}, InputError, "two sizes for 'a'; found: 3 in dimension 1.*8 in dim"),
    "a size of 1": (Sum(), (ROWS[:, :1], ROWS[:, :1]), {"x": {1: "a"}}, InputError, "'a', dimension 1 .* found: a size of 1"),
    "in a parameter": (Rows(), ROWS, {"x": {1: "rows"}}, CaptureError, r"'rows' open \(dimension 1 of input 'x'\).*constant \(3\)"),
    "in a layer": (Rows(), (ROWS, ROWS), {"x": {1: "rows"}, "y": {1: "rows"}}, CaptureError, r"'rows' open.*constant \(3\)"),
    "in a product": (Flat(), torch.ones(2, 3, 8, 8), {"x": {2: "a", 3: "b"}}, CaptureError, "'a' open.* at 8 only: Guard failed.*192"),
    "equal to another": (Sum(), (ROWS, ROWS), {"x": {1: "a"}, "y": {1: "b"}}, CaptureError, "'a' open.* at 3 only.*name it like"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_open_dimensions_are_refused_with_input_dimension_and_reason(case: str) -> None:
    model, example, dynamic, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        capture(model.eval(), example, dynamic)  # type: ignore[arg-type]


def test_a_program_is_asked_for_what_it_has_open_and_refuses_the_rest() -> None:
    program = torch.export.export(network("picture"), (picture(2, 16)["x"],), dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC},))
    assert capture(program, None, {"x": {2: "rows"}}).inputs[0].names == {0: "batch", 2: "rows"}
    with pytest.raises(CaptureError, match=r"does not leave 'width' open \(dimension 3 of input 'x'\)"):
        capture(program, None, SIDES)


def test_calibration_takes_batches_of_several_sizes_and_steps_refuse_them_before_they_begin() -> None:
    batches = [words(4, 9), words(2, 16), words(4, 9)]
    model = seeded(Few)
    for recipe in ("plain", "fast"):
        prepared = qdeploy.calibrate(qdeploy.prepare(model, batches[0], "snpe", recipe, dynamic=SEQUENCE), batches)
        assert prepared.samples_seen == 10 and [part[0].shape[1] for part in prepared.reference] == [9, 9]
    prepared = qdeploy.prepare(model, batches[0], "snpe", "default", dynamic=SEQUENCE)
    with pytest.raises(InputError, match=r"need samples of one size.*pad or cut.*'plain' or 'fast'"):
        qdeploy.calibrate(prepared, batches)


def test_a_batch_is_refused_that_the_model_cannot_compute_or_whose_inputs_differ() -> None:
    prepared = qdeploy.prepare(network("unet"), picture(2, 16), "snpe", "fast", dynamic=SIDES)
    with pytest.raises(InputError, match=r"cannot compute a batch; found: \[\[2, 3, 18, 16\]\]"):
        qdeploy.calibrate(prepared, [picture(2, 18, 16)])
    prepared = qdeploy.prepare(seeded(Few), words(2, 9), "snpe", "fast", dynamic=SEQUENCE)
    with pytest.raises(InputError, match="different sizes for 'sequence'; found: 9 in 'input_ids', 8 in 'attention_mask'"):
        qdeploy.calibrate(prepared, [words(2, 9) | {"attention_mask": words(2, 8)["attention_mask"]}])


def test_inputs_are_taken_by_name_in_any_order_also_behind_what_is_left_out() -> None:
    model, inputs = seeded(Few), words(2, 9) | {"gain": torch.tensor([2.0, 3.0])}
    for example in (inputs, collections.UserDict(inputs), dict(reversed(inputs.items()))):
        captured = capture(model, example)  # type: ignore[arg-type]
        assert [spec.name for spec in captured.inputs] == ["input_ids", "attention_mask", "gain"]
        given = words(3, 9) | {"gain": torch.ones(3)}
        assert_same([t.numpy() for t in flat(captured.module(*(given[s.name] for s in captured.inputs)))], flat(model(**given)))
    prepared = qdeploy.calibrate(qdeploy.prepare(model, inputs, "snpe", "fast"), [dict(reversed(inputs.items())), inputs])
    by_place = prepared(*ordered_inputs(prepared, inputs))
    assert all(torch.equal(a, b) for a, b in zip(flat(by_place), flat(prepared(**inputs)), strict=True))


@cache
def few() -> Prepared:
    return qdeploy.prepare(seeded(Few), words(2, 9), "snpe", "fast")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"atention_mask": ROWS, "attention_mask": None}, "unknown 'atention_mask'.*did you mean 'attention_mask'"),
        ({"input_ids": None}, "missing 'input_ids'; allowed: .*give what is missing"),
        ({"labels": ROWS}, "unknown 'labels'; allowed: input_ids, attention_mask"),
    ],
    ids=["unknown", "missing", "of no model"],
)
def test_unknown_and_missing_names_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    given = {name: tensor for name, tensor in (words(2, 9) | change).items() if tensor is not None}
    with pytest.raises(InputError, match=f"a batch has wrong input names; found: {message}"):
        qdeploy.calibrate(few(), [given])
    with pytest.raises(InputError, match=f"the example has wrong input names; found: {message.partition(';')[0]}"):
        qdeploy.prepare(seeded(Few), given, "snpe", "fast")


class Keys(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.fc(self.out(x))
        return {"x": self.out(x).relu(), "logits": y, "same": y, "input": x, "best": y.argmax(1), "past": (None, [y * 2])}


@cache
def keyed() -> dict[str, Prepared]:
    torch.manual_seed(0)
    together = api.prepare_all(Keys().eval(), {"x": torch.randn(2, 4)}, BACKENDS, recipe="fast")
    return {one.backend.name: one for one in api.calibrate_all(together, [torch.randn(8, 4)])}


@everywhere
def test_outputs_have_the_keys_of_the_model_in_file_manifest_and_encodings(backend: str, tmp_path: Path) -> None:
    prepared = keyed()[backend]
    artifact = qdeploy.convert(prepared, tmp_path / "out")
    names = ["x_output", "logits", "same", "input", "best", "past.1.0"]
    assert artifact.outputs == names == [value.name for value in onnx.load(artifact.simulation).graph.output]
    x = torch.randn(5, 4)
    for made, wanted in zip(literal(artifact.simulation, {"x": x}), flat(prepared(x)), strict=True):
        np.testing.assert_allclose(made, wanted.numpy(), rtol=1e-6, atol=1e-6)
    assert {"x", "logits"} <= {encoding.tensor for encoding in Artifact.open(tmp_path / "out").encodings} | {"logits"}
    assert qdeploy.verify(artifact, runtime="onnxruntime").passed


ZOO = """
import torch
from torch import nn

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
    def forward(self, left, right=None, gain=None):
        return {"scores": self.fc(left * 2) if gain is None else self.fc(left * gain)}

def make():
    torch.manual_seed(0)
    return Pair()
"""


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Exit status and errors of `qdeploy quantize` on the model above, in this process."""

    def run(arrays: Mapping[str, np.ndarray], *more: str) -> tuple[int, str]:
        (tmp_path / "zoo.py").write_text(ZOO)
        np.savez(tmp_path / "data.npz", **arrays)
        words = ["quantize", "zoo.py:make", "--backend", "onnxruntime", "--data", "data.npz", "--recipe", "fast", "--out", "out", *more]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", ["qdeploy", *words, "--runtime", "onnxruntime:none"])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0), capsys.readouterr().err

    return run


def test_the_command_line_takes_arrays_by_name_and_leaves_sizes_open(command: Command, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {"gain": random.random((6, 1, 4), np.float32), "left": random.random((6, 5, 4), np.float32)}
    status, errors = command(arrays, "--dynamic", "left:1=rows")
    assert status == 0, errors
    artifact = Artifact.open(tmp_path / "out")
    assert dims(artifact.model) == {"left": ["batch", "rows", 4], "gain": ["batch", 1, 4], "scores": ["batch", "rows", 3]}
    assert any("rows is dimension 1 of 'left'" in note for note in artifact.manifest["notes"])
    torch.manual_seed(0)
    wanted = nn.Linear(4, 3)(torch.from_numpy(arrays["left"] * arrays["gain"])).detach()  # by place, gain would be right
    assert_same([artifact.reference()["float.scores"]], [wanted])


@pytest.mark.parametrize(
    ("names", "dynamic", "message"),
    [
        (("left", "gain"), "left=rows", "--dynamic is wrong; found: 'left=rows'; allowed: INPUT:DIMENSION=NAME"),
        (("left", "gain"), "lefft:1=rows", "unknown input 'lefft'; allowed: left, gain; to do: did you mean 'left'?"),
        (("left", "gain"), "left:7=rows", "no dimension 7 of input 'left'; found: 7; allowed: 1 to 2"),
        (("left", "wrong"), "left:1=rows", "not named as the model's inputs; found: left, wrong; allowed: left, right, gain"),
    ],
    ids=["no dimension", "unknown", "out of range", "arrays"],
)
def test_the_command_line_refuses_names_that_there_are_not(
    names: tuple[str, str], dynamic: str, message: str, command: Command
) -> None:
    status, errors = command({name: np.ones((4, 5, 4), np.float32) for name in names}, "--dynamic", dynamic)
    assert status == 2 and errors.startswith("error: ") and message in errors
