"""Verification: a good artifact passes on every runtime, and every way in which one can be bad is found."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import qdeploy
from qdeploy.core.backend import backends
from qdeploy.core.errors import ArtifactError, InputError, NotInstalledError, OptionError
from qdeploy.export.artifact import Artifact
from qdeploy.export.manifest import MANIFEST, SCHEMA, render, sealed, sha256
from qdeploy.runtimes.runtime import Runtime, find_runtime, runtimes
from qdeploy.verification.verdict import FAILED, PASSED, UNDECIDED, Asked, Output
from qdeploy.verification.verify import INEXACT, Report, Result, _asked, _Row, verify_artifact

SLOW = {("onnxruntime", "tvm"), ("openvino", "tvm"), ("tensorrt", "tvm")}
"""TVM compiles for seconds, and files like theirs for other targets: `tvm` and `snpe` are both ways to place quantizers."""
PAIRS = [
    pytest.param(backend.name, runtime, marks=[pytest.mark.slow] if (backend.name, runtime) in SLOW else [])
    for backend in backends
    for runtime in backend.runtimes
]


UNREADABLE = {("mnn", "onnxruntime:all")}
"""ONNX Runtime's own optimizers stop at int8 tensors that they carry through a pooling in float."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact of the plain network for SNPE, to be spoilt."""
    return Path(shutil.copytree(networks.artifact_path("plain", "snpe"), tmp_path / "out"))


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, and seal it anew."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(render(sealed(manifest)))


def scale_tensor(folder: Path, tensor: str, factor: float) -> None:
    """Multiply the scale of one tensor in the simulation file, and make the manifest's hash fit."""
    path = folder / "model.sim.onnx"
    model = onnx.load(path)
    (found,) = [t for t in model.graph.initializer if t.name == f"{tensor}_scale"]
    found.CopyFrom(numpy_helper.from_array(np.asarray(numpy_helper.to_array(found) * np.float32(factor)), found.name))
    onnx.save(model, path)
    edit(folder, lambda manifest: manifest["files"].update({path.name: sha256(path.read_bytes())}))


@pytest.mark.parametrize(("backend", "runtime"), PAIRS)
def test_a_good_artifact_passes_on_every_runtime_of_its_backend(backend: str, runtime: str, tmp_path: Path) -> None:
    way, variants = find_runtime(runtime)
    if not way.installed():
        pytest.skip(f"runtime '{way.name}' is not installed")
    shutil.copytree(networks.artifact_path("plain", backend), tmp_path / "out")
    report = qdeploy.verify(tmp_path / "out", runtime=runtime)
    plain, simulated, *rows = report.results
    failed = {(backend, row.name) for row in rows if row.faults}
    assert failed == {(backend, row.name) for row in rows} & UNREADABLE and report.passed is not bool(failed), report
    assert (plain.name, simulated.name, simulated.sqnr) == ("float", "simulated", 999.0)
    assert len(rows) == len(variants)
    for row in rows:
        assert row.name.split(":")[0] == way.name and row.decides
        if row.faults:
            continue
        assert row.samples == 32
        asked = way.min_agreement if Artifact.open(tmp_path / "out").manifest["tie_free"] else INEXACT
        assert row.agreement is not None and row.sqnr is not None and row.agreement >= asked - 1 / 32
        assert row.bytes == Artifact.open(tmp_path / "out").simulation.stat().st_size
        assert row.placement.get("fallback", 0) == 0
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["verify"] == json.loads(json.dumps(report.to_json()))


@pytest.mark.parametrize(("tensor", "factor"), [("relu", 0.25), ("fc.weight", 1.5)])
def test_a_tampered_scale_is_found(folder: Path, tensor: str, factor: float) -> None:
    scale_tensor(folder, tensor, factor)
    report = qdeploy.verify(folder, runtime="onnxruntime")
    assert not report.passed
    for row in report.results[2:]:
        assert any("agreement" in fault or "SQNR" in fault for fault in row.faults), row


def test_a_scale_that_is_a_little_off_is_found_though_the_outputs_are_close(folder: Path) -> None:
    scale_tensor(folder, "relu", 1.0001)
    report = qdeploy.verify(folder, runtime="onnxruntime")
    assert report.faults == ("encoding 'relu' has other numbers than model.sim.onnx",) and not report.passed
    assert not any(row.faults for row in report.results)


def test_a_tampered_scale_does_not_stand_for_the_simulation_on_new_data(folder: Path) -> None:
    scale_tensor(folder, "relu", 0.25)
    report = qdeploy.verify(folder, networks.batches("plain", seed=5), runtime="onnxruntime")
    assert any(fault.startswith("model.sim.onnx does not compute the saved simulation: ") for fault in report.faults)
    assert not report.passed


def test_a_missing_encoding_and_one_that_names_no_tensor_are_reported(folder: Path) -> None:
    edit(folder, lambda manifest: manifest["encodings"][0].update(tensor="nobody"))
    named = json.loads((folder / MANIFEST).read_text())["planned"][0]
    report = qdeploy.verify(folder, runtime="onnxruntime")
    assert report.faults == (f"planned tensor '{named}' has no encoding", "encoding 'nobody' names no tensor of model.onnx")
    assert not report.passed


def test_a_changed_file_is_refused_before_anything_runs(folder: Path) -> None:
    (folder / "model.encodings").write_text("{}")
    with pytest.raises(ArtifactError, match=r"model\.encodings' was changed"):
        qdeploy.verify(folder)


@pytest.mark.parametrize(("count", "words"), [(0, "fewer"), (15, "fewer"), (17, "more"), (40, "more")])
def test_labels_must_be_as_many_as_samples(folder: Path, count: int, words: str) -> None:
    data = networks.batches("plain", count=2)
    with pytest.raises(InputError, match=f"there are {words} labels than samples; found: {count} labels"):
        qdeploy.verify(folder, data, runtime="onnxruntime", labels=np.zeros(count, np.int64))


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor])
def test_accuracy_is_the_share_of_right_labels(folder: Path, kind: Callable[[list[int]], Any]) -> None:
    saved = Artifact.open(folder).reference()["simulated.fc"].argmax(1)
    labels = saved.copy()
    labels[:8] = (labels[:8] + 1) % 5  # 24 of 32 are right
    report = qdeploy.verify(folder, runtime="onnxruntime", labels=kind(labels.tolist()))
    assert [row.accuracy for row in report.results[1:]] == [0.75] * (len(report.results) - 1)


def test_the_comparison_is_the_one_worked_by_hand() -> None:
    simulated = np.array([[3.0, 1.0], [0.0, 2.0], [4.0, 0.0]])
    made = np.array([[3.0, 1.0], [2.0, 0.0], [4.0, 1.0]])  # top-1 differs in the second sample
    row = _Row("row", lambda _: [made], 10, Asked(min_agreement=0.999), lambda: {"fallback": 2})
    row.add([made], [simulated], np.array([0, 0, 1]), [Output(name="y", step=0.5, quantization=30.0, spread=10.0, peak=4.0)])
    result = row.result(0.01)
    assert (result.samples, result.agreement, result.accuracy, result.max_steps) == (3, 2 / 3, 2 / 3, 4.0)
    assert result.sqnr == pytest.approx(10 * np.log10(30 / 9))  # 9 + 1 + 4 + 16 against 4 + 4 + 1
    assert result.faults == ("SQNR 5.2 dB is below 24 dB", "2 compute nodes fell back to the CPU")


@pytest.mark.parametrize(
    ("backend", "asked"), [("onnxruntime", 0.999), ("vitis", 0.999), ("nnie", 0.995), ("adreno_fp16", 0.995), ("ncnn", 0.995)]
)
def test_less_agreement_is_asked_where_sums_cannot_be_kept_off_the_ties(backend: str, asked: float) -> None:
    artifact = networks.artifact("mixed", backend)
    assert _asked(artifact, runtimes["onnxruntime"]).min_agreement == asked
    assert _asked(artifact, runtimes["qnn_htp"]).min_agreement == runtimes["qnn_htp"].min_agreement < 0.995


@pytest.mark.parametrize(("backend", "exact", "least"), [("snpe", True, 40.0), ("openvino", False, 30.0), ("nnie", False, 24.0)])
def test_every_code_is_asked_of_an_exact_runtime_where_all_sums_are_whole_numbers(backend: str, exact: bool, least: float) -> None:
    asked = _asked(networks.artifact("mixed", backend), runtimes["onnxruntime"])
    known = Output(name="y", step=1.0, quantization=35.0, spread=1.0, peak=4.0)
    assert (asked.exact, asked.sqnr(known)) == (exact, least)
    assert not _asked(networks.artifact("mixed", "snpe"), runtimes["openvino"]).exact


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_a_fault_and_plain_json(value: float) -> None:
    row = _Row("row", lambda _: [], 0, Asked(min_agreement=0.999), dict)
    row.add([np.full((2, 3), value)], [np.ones((2, 3))], None, [Output(name="y", step=1.0, quantization=30.0, spread=1.0, peak=4.0)])
    result = row.result(0.01)
    assert "its outputs hold NaN or infinity" in result.faults and not result.passed
    assert json.dumps([result.sqnr, result.max_steps], allow_nan=False) == "[-999.0, null]"


class Normalized(nn.Module):
    """What linear attention ends in: a division by a sum that is far smaller than what shares its scale."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.fc.weight.data, self.fc.bias.data = torch.diag(torch.tensor([9.0, 9.0, -9.0, 1e-4])), torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.relu(self.fc(x))
        return made[:, :3] / made[:, 3:]


def test_a_divisor_that_is_rounded_to_zero_is_named_in_the_notes(tmp_path: Path) -> None:
    x = torch.rand(16, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    prepared = qdeploy.calibrate(qdeploy.prepare(Normalized(), x, "snpe", recipe="plain"), [x])
    artifact = qdeploy.convert(prepared, tmp_path / "out")
    assert any("first in 'div' (div)" in note for note in artifact.manifest["notes"])
    assert not qdeploy.verify(artifact, runtime="onnxruntime").passed


class Recorder:
    """A runtime that takes batches of 4 and tells what it is given."""

    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        self.seen.append(inputs[0].copy())
        return [inputs[0].reshape(4, -1)[:, :5]]

    def placement(self) -> dict[str, int]:
        return {}


def test_batches_are_cut_to_the_runtimes_size_and_the_rest_filled_with_its_last_sample(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    runtime = Runtime(name="four", title="", modules=("json",), packages=(), min_agreement=0, open=lambda *_: recorder, max_batch=4)
    monkeypatch.setitem(runtimes._values, "four", runtime)
    data = networks.batches("plain", count=2, batch=6)
    done: list[int] = []
    report = verify_artifact(Artifact.open(folder), data, "four", progress=done.append)
    assert done == [6, 12] and report.results[-1].samples == 12
    assert [len(piece) for piece in recorder.seen] == [4, 4, 4, 4]
    for (batch,), first, second in zip(data, recorder.seen[::2], recorder.seen[1::2], strict=True):
        np.testing.assert_array_equal(np.concatenate([first, second]), torch.cat([batch, batch[5:], batch[5:]]))


def test_new_data_without_a_simulation_is_compared_with_the_literal_run_and_says_so(folder: Path) -> None:
    report = qdeploy.verify(folder, networks.batches("plain", seed=5), runtime="onnxruntime")
    assert [row.name for row in report.results[:2]] == ["float", "simulated (ONNX, node by node)"]
    assert report.passed and report.results[0].accuracy is None


def test_new_data_with_the_prepared_model_is_compared_with_its_simulation(folder: Path) -> None:
    prepared, data = networks.prepared("plain", "snpe"), networks.batches("plain", seed=5)
    report = qdeploy.verify(folder, data, runtime="onnxruntime", simulation=prepared)
    assert [row.name for row in report.results[:2]] == ["float", "simulated"] and report.passed
    literal = [row for row in report.results if row.name == "onnxruntime:none"]
    assert [row.sqnr for row in literal] == [999.0], "the literal run is the simulation, code for code"


def test_a_qdq_artifact_has_no_float_row_for_new_data(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(networks.artifact_path("plain", "onnxruntime"), tmp_path / "out"))
    report = qdeploy.verify(folder, networks.batches("plain", seed=5), runtime="onnxruntime")
    assert report.results[0].name == "simulated (ONNX, node by node)" and report.passed


def test_a_static_batch_is_kept(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        """The product of neighbouring samples: a batch of 3 cannot be another."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x * torch.roll(x, 1, 0))

    torch.manual_seed(2)
    x = torch.randn(3, 4)
    program = torch.export.export(Fixed().eval(), (x,))
    prepared = qdeploy.calibrate(qdeploy.prepare(program, None, "onnxruntime", recipe="fast"), [x, -x])
    artifact = qdeploy.convert(prepared, tmp_path / "out")
    assert artifact.inputs[0]["shape"] == [3, 4]
    for given in ([2 * x], None):
        report = qdeploy.verify(artifact, given, runtime="onnxruntime")
        assert report.passed, (given, report)
    with pytest.raises(InputError, match=r"input 'x' has the wrong shape; found: \[2, 4\]; allowed: \[3, 4\]"):
        qdeploy.verify(artifact, [x[:2]], runtime="onnxruntime")


def test_mistaken_arguments_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match=r"unknown runtime 'onnxrutime'.*did you mean 'onnxruntime'"):
        qdeploy.verify(folder, runtime="onnxrutime")
    with pytest.raises(InputError, match="there is no data to verify with"):
        qdeploy.verify(folder, [], runtime="onnxruntime")
    with pytest.raises(InputError, match="wrong number of inputs; found: 2; allowed: 1"):
        qdeploy.verify(folder, [(torch.zeros(1, 3, 8, 8),) * 2], runtime="onnxruntime")
    monkeypatch.setattr(Runtime, "installed", lambda self: False)
    with pytest.raises(NotInstalledError, match="runtime 'tvm' is not installed"):
        qdeploy.verify(folder, runtime="tvm")


def test_a_manifest_without_what_verify_reads_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(render(sealed({"schema": SCHEMA, "files": {}})))
    with pytest.raises(ArtifactError, match="no whole manifest; found: without runtimes"):
        qdeploy.verify(tmp_path)


class Failing:
    """A session of a vendor's library that raises what it likes."""

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        raise RuntimeError("No suitable implementations\nfor convolution")

    def placement(self) -> dict[str, int]:
        return {}


def _cannot_open(*_: object) -> Failing:
    raise NotImplementedError("weights of 1e-20")


@dataclass
class Returning:
    """A session that returns whatever `make` makes of the batch."""

    make: Callable[[np.ndarray], Any]
    lost: bool = False

    def run(self, inputs: list[np.ndarray]) -> Any:
        return self.make(inputs[0])

    def placement(self) -> dict[str, int]:
        if self.lost:
            raise OSError("the driver is gone")
        return {}


OTHERS: dict[str, tuple[Callable[[np.ndarray], Any], str]] = {
    "another shape": (lambda x: [np.zeros((len(x), 7), np.float32)], "another shape for output 'fc'; found: [32, 7]; allowed: [32, 5]"),
    "two outputs": (lambda x: [np.zeros((len(x), 5), np.float32)] * 2, "another number of outputs; found: 2; allowed: 1"),
    "no output": (lambda x: [], "another number of outputs; found: 0"),
    "words": (lambda x: [np.full((len(x), 5), "a")], "other numbers for output 'fc'; found: <U1; allowed: float32"),
    "whole numbers": (lambda x: [np.zeros((len(x), 5), np.int64)], "found: int64; allowed: float32"),
    "a list": (lambda x: [[0.0] * 5], "could not be compared"),
    "nothing": (lambda x: None, "could not"),
}


def add_runtime(monkeypatch: pytest.MonkeyPatch, name: str, opened: Callable[..., Any], **options: Any) -> None:
    runtime = Runtime(name=name, title="", modules=("json",), packages=(), open=opened, **{"min_agreement": 0} | options)
    monkeypatch.setitem(runtimes._values, name, runtime)


def _says_much(*_: object) -> None:
    raise ArtifactError("cannot convert 'model.onnx'", found="\x1b[31mone\n   two\x07\n")


CASES = {
    "it says much": (_says_much, "could not run: cannot convert 'model.onnx'; found: [31mone two"),
    "it raises": (lambda *_: Failing(), "No suitable implementations for convolution"),
    "it cannot be opened": (_cannot_open, "1e-20"),
    "it cannot say where it ran": (
        lambda *_: Returning(lambda x: [np.zeros((len(x), 5), np.float32)], lost=True),
        "the driver is gone",
    ),
} | {case: (lambda *_, make=make: Returning(make), said) for case, (make, said) in OTHERS.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_runtime_that_fails_is_a_row_and_costs_neither_the_artifact_nor_the_other_rows(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, said = CASES[case]
    add_runtime(monkeypatch, "broken", opened)
    report = verify_artifact(Artifact.open(folder), None, ["broken", "onnxruntime:none"])
    *_, row, other = report.results
    assert not report.passed and row.faults[0].startswith("could not ") and said in row.faults[0] and row.samples == 0
    assert row.verdict == FAILED
    assert other.passed and other.samples > 0


def spoil(folder: Path, monkeypatch: pytest.MonkeyPatch, runtimes: list[str], deciding: list[str]) -> None:
    """A runtime that cannot open anything, for an artifact that these runtimes check and decide."""
    add_runtime(monkeypatch, "broken", _cannot_open)
    edit(folder, lambda manifest: manifest.update(runtimes=runtimes, deciding=deciding))


def test_a_runtime_that_is_not_the_targets_own_does_not_fail_the_artifact(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(folder, monkeypatch, ["broken", "onnxruntime"], ["onnxruntime:none"])
    report = qdeploy.verify(folder)
    assert report.passed and json.loads((folder / MANIFEST).read_text())["verify"]["passed"]
    assert {row.name: (row.decides, row.passed) for row in report.results[2:]} == {
        "broken": (False, False),
        "onnxruntime:all": (False, True),
        "onnxruntime:none": (True, True),
    }
    assert report.notes == ("the check follows onnxruntime:none; what failed elsewhere does not decide: broken",)


@pytest.mark.parametrize("deciding", [["broken", "onnxruntime:none"], ["broken:default"]])
def test_the_targets_own_runtime_fails_the_artifact(deciding: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(folder, monkeypatch, ["broken", "onnxruntime"], deciding)
    report = qdeploy.verify(folder)
    assert not report.passed and report.notes == ()


def test_whatever_the_user_names_decides(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(folder, monkeypatch, ["onnxruntime"], ["onnxruntime:none"])
    assert not qdeploy.verify(folder, runtime="broken").passed
    assert all(row.decides for row in qdeploy.verify(folder, runtime=["onnxruntime:all", "onnxruntime:none"]).results)


def test_where_no_runtime_that_decides_ran_all_decide(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(folder, monkeypatch, ["broken", "onnxruntime:all"], ["onnxruntime:none"])
    report = qdeploy.verify(folder)
    assert not report.passed and all(row.decides for row in report.results)


def test_a_simulation_that_cannot_run_is_a_fault_of_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    literal = runtimes["onnxruntime"]
    monkeypatch.setitem(runtimes._values, "onnxruntime", replace(literal, open=_cannot_open))
    report = verify_artifact(Artifact.open(folder), networks.batches("plain", seed=5), "onnxruntime:none")
    assert not report.passed and any("could not run: NotImplementedError: weights of 1e-20" in fault for fault in report.faults)


def a_report(*rows: tuple[str, str, tuple[str, ...]], faults: tuple[str, ...] = ()) -> Report:
    """A report with rows of these names, verdicts and faults."""
    made = [Result(name=name, samples=64, bytes=1, checked=True, faults=wrong, verdict=verdict) for name, verdict, wrong in rows]
    return Report(results=(Result(name="simulated", samples=64, bytes=1), *made), faults=faults)


def test_the_next_steps_fit_what_failed() -> None:
    good, odd = ("onnxruntime:none", PASSED, ()), ("qnn_htp", FAILED, ("SQNR 3.0 dB is below 20 dB",))
    assert a_report(good).next_steps("out") == ()
    assert a_report(good, odd).next_steps("out", ("--data", "my images")) == (
        "to see which tensor parts first: qdeploy debug out --runtime qnn_htp --data 'my images'",
        "the file is usable on onnxruntime:none",
    )
    undecided = ("tvm", UNDECIDED, ())
    assert a_report(good, undecided).passed
    assert a_report(good, undecided).next_steps("out") == (
        "to settle tvm: qdeploy verify out --runtime tvm --data PATH, with more samples",
    )
    fallen = ("qnn_htp", FAILED, ("3 compute nodes fell back to the CPU",))
    assert a_report(fallen).next_steps("out") == ("the file passed on no runtime that was tried",)
    outside = ("ncnn:plain", FAILED, ("SQNR 3.0 dB is below 20 dB",))
    assert a_report(good, outside).next_steps("out") == ("the file is usable on onnxruntime:none",), "it shows no tensor inside"
    assert a_report(good, faults=("encoding 'x' names no tensor of model.onnx",)).next_steps("out") == (
        "the artifact itself is at fault, whatever runs it: quantize the model again",
    )


def test_more_samples_settle_nothing_where_all_agree_and_the_report_says_how_sure_it_is(folder: Path) -> None:
    report = qdeploy.verify(folder, runtime="onnxruntime:none")
    row = report.to_json()["results"][-1]
    assert (row["verdict"], row["near_ties"], row["disagreements"], row["remarks"]) == (PASSED, 0, 0, ())
    low, high = row["interval"]
    assert high == 1 and low == pytest.approx(0.005 ** (1 / 32))  # 1 - low agree in no sample of 32 but once in 200
    assert row["outputs"] == {"fc": 999.0}


def test_an_artifact_that_cannot_be_written_is_verified_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Artifact, "record", refuse)
    report = verify_artifact(Artifact.open(folder), runtime="onnxruntime:none")
    assert report.passed and "cannot be written: Read-only file system" in report.unrecorded
