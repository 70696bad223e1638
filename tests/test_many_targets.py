"""Several targets in one go: what each gets is what it would get alone, and the model is captured, the data passed and the graph
exported once for all.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qdeploy
from qdeploy import api
from qdeploy.capture.capture import Captured, capture
from qdeploy.cli.main import main
from qdeploy.core.backend import Backend, backends
from qdeploy.core.errors import InputError, OptionError, QDeployError
from qdeploy.core.spec import QuantSpec
from qdeploy.core.targets import find_backends, with_schemes
from qdeploy.export import emit
from qdeploy.export.artifact import Artifact
from qdeploy.export.manifest import MANIFEST
from qdeploy.graph.observe import insert_observers
from qdeploy.numerics.observer import Observer, make_observer
from qdeploy.recipes import calibration_pass
from qdeploy.recipes.calibration_pass import make_observers
from qdeploy.runtimes.runtime import Runtime
from qdeploy.simulation.insert import observed_tensors
from qdeploy.simulation.prepared import Prepared

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
MODEL, CALIBRATION = str(SAMPLES / "digits.pt2"), str(SAMPLES / "digits_calibration.npz")
KINDS = networks.distinct()


@pytest.fixture
def onnxruntime_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other runtimes take long and have tests of their own."""
    monkeypatch.setattr(Runtime, "installed", lambda self: self.name == "onnxruntime")


def numbers(prepared: Prepared) -> list[dict[str, object]]:
    return [encoding.to_json() for encoding in prepared.encodings()]


@pytest.mark.parametrize("backend", KINDS)
def test_a_target_among_others_has_the_encodings_it_has_alone(backend: str) -> None:
    together, alone = networks.prepared("mixed", backend), networks.settled("mixed", backend)
    assert together.plan == alone.plan
    assert numbers(together) == numbers(alone)
    for one, other in zip(together.reference, alone.reference, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    (inputs, *_) = networks.batches("mixed", seed=4)
    assert all(torch.equal(a, b) for a, b in zip(together.flat(inputs), alone.flat(inputs), strict=True))


def test_the_order_of_the_targets_does_not_matter() -> None:
    model, data = networks.network("plain"), networks.batches("plain")
    with networks.captured_once("plain"):
        several = networks.several(model, data, KINDS[::-1])
    assert all(numbers(several[name]) == numbers(networks.prepared("plain", name)) for name in KINDS)


class Counted:
    """Batches that can be passed once, and count it."""

    def __init__(self, data: list[tuple[Tensor, ...]]):
        self.data = data
        self.given = 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        assert not self.given, "the data is passed twice"
        for batch in self.data:
            self.given += 1
            yield batch


@pytest.mark.usefixtures("onnxruntime_alone")
def test_model_and_data_are_passed_once_for_all_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, int] = {}

    def count(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def counting(*args: object, **kwargs: object) -> object:
            calls[name] = calls.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(torch.onnx, "export")
    count(api, "capture")
    count(calibration_pass, "insert_observers")
    data = Counted(networks.batches("plain"))
    names = ["snpe", "tensorrt", "vitis", "nnie"]
    artifacts = qdeploy.quantize(networks.network("plain"), data, names, tmp_path / "out", recipe="fast", seed=5)
    assert calls == {"export": 1, "capture": 1, "insert_observers": 1} and data.given == 4
    assert isinstance(artifacts, tuple) and [a.manifest["backend"] for a in artifacts] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for name, made in zip(names, artifacts, strict=True):
        opened = Artifact.open(tmp_path / "out" / name)
        assert opened.path == made.path and opened.manifest["verify"]["passed"], opened.manifest["verify"]
        assert (opened.manifest["seed"], opened.manifest["calibration_samples"]) == (5, 32)
        assert opened.manifest["recipe"]["name"] == "fast"


@pytest.mark.usefixtures("onnxruntime_alone")
def test_the_bytes_are_those_that_each_target_has_alone(tmp_path: Path) -> None:
    model, data = networks.network("plain"), networks.batches("plain")
    several = qdeploy.quantize(model, data, ["vitis", "snpe"], tmp_path / "several")
    for made in several:
        alone = qdeploy.quantize(model, data, made.manifest["backend"], tmp_path / made.manifest["backend"])
        assert alone.manifest["files"] == made.manifest["files"]
        ours, theirs = ((one.path / MANIFEST).read_bytes() for one in (alone, made))
        assert ours == theirs


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.usefixtures("onnxruntime_alone")
def test_a_step_that_is_kept_for_one_target_and_undone_for_another_spoils_neither(tmp_path: Path) -> None:
    """Their float graphs differ: what is observed in one says nothing of the other."""
    model, data = networks.uneven()
    names = ["onnxruntime", "snpe"]
    several = qdeploy.quantize(model, data, names, tmp_path / "several")
    steps = [{entry["step"]: entry["decision"] for entry in made.manifest["steps"]}["equalize"] for made in several]
    assert steps == ["undone", "kept"]
    for name in names:
        qdeploy.quantize(model, data, name, tmp_path / name)
        assert files(tmp_path / "several" / name) == files(tmp_path / name)


RECIPES = ("default", "plain", "fast", "percentile", "gptq", "data_free")


@pytest.mark.slow
@pytest.mark.usefixtures("onnxruntime_alone")
@pytest.mark.parametrize("seed", range(50))
def test_the_artifacts_of_a_joint_run_are_those_of_single_runs(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    kinds = [*networks.NETWORKS, "uneven"]
    name, recipe = kinds[seed % len(kinds)], RECIPES[int(random.integers(len(RECIPES)))]
    targets = [str(target) for target in random.permutation(backends.names())[: int(random.integers(2, 5))]]
    model, data = networks.uneven() if name == "uneven" else (networks.network(name), networks.batches(name))
    qdeploy.quantize(model, data, targets, tmp_path / "several", recipe=recipe)
    for target in targets:
        qdeploy.quantize(model, data, target, tmp_path / target, recipe=recipe)
        assert files(tmp_path / "several" / target) == files(tmp_path / target), (name, recipe, target)


@pytest.mark.usefixtures("onnxruntime_alone")
def test_one_target_in_a_list_gets_a_folder_as_well(tmp_path: Path) -> None:
    model, data = networks.network("plain"), networks.batches("plain")
    with networks.captured_once("plain"):
        (made,) = qdeploy.quantize(model, data, ["tvm"], tmp_path / "out", recipe="fast")
        single = qdeploy.quantize(model, data, backends["tvm"], tmp_path / "single", recipe="fast")
    assert made.path == tmp_path / "out" / "tvm"
    assert isinstance(single, Artifact) and single.path == tmp_path / "single"


def test_nothing_is_begun_where_one_target_has_no_place(tmp_path: Path) -> None:
    (tmp_path / "out" / "tvm").mkdir(parents=True)
    (tmp_path / "out" / "tvm" / "thesis.txt").touch()
    data = Counted(networks.batches("plain"))
    with pytest.raises(InputError, match=r"cannot write to '.*tvm'; found: a folder with other files"):
        qdeploy.quantize(networks.network("plain"), data, ["snpe", "tvm"], tmp_path / "out")
    assert not data.given and [path.name for path in (tmp_path / "out").iterdir()] == ["tvm"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("snpe, tvm,snpe", "backend 'snpe' is named twice; to do: name it once"),
        (["snpe", backends["snpe"]], "backend 'snpe' is named twice"),
        (["snpe", "tvmm"], "unknown backend 'tvmm'.*did you mean 'tvm'"),
        ("snpe,,tvm", "unknown backend ''"),
        ([], "no backend is named"),
    ],
)
def test_a_list_of_targets_that_is_wrong_is_an_error(given: object, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        find_backends(given)  # type: ignore[arg-type]


def test_names_and_values_and_files_make_a_list(tmp_path: Path) -> None:
    own = tmp_path / "npu.py"
    own.write_text(
        "from dataclasses import replace\nfrom qdeploy.core.backend import backends, register\n"
        "MINE = register(replace(backends['tvm'], name='mine'))\n"
    )
    assert [b.name for b in find_backends(f" snpe ,{own},tvm")] == ["snpe", "mine", "tvm"]
    assert find_backends((backends["snpe"], "tvm")) == (backends["snpe"], backends["tvm"])
    twice = [str(own), str(own)]
    with pytest.raises(OptionError, match="backend 'mine' is named twice"):
        find_backends(twice)


def test_only_what_was_prepared_together_is_calibrated_together() -> None:
    model, data = networks.network("plain"), networks.batches("plain")
    one, other = (qdeploy.prepare(model, data[0], name, "fast") for name in ("snpe", "tvm"))
    with pytest.raises(OptionError, match="were not prepared together"):
        api.calibrate_all([one, other], data)
    with pytest.raises(OptionError, match="were not prepared together"):
        api.calibrate_all([], data)
    qdeploy.calibrate(one, data)
    with pytest.raises(OptionError, match="calibrated already"):
        api.calibrate_all([one], data)


def test_training_one_changes_no_other() -> None:
    with networks.captured_once("plain"):
        several = networks.several(
            networks.network("plain"), networks.batches("plain"), ("onnxruntime", "tensorrt", "vitis"), recipe="fast"
        )
    (x,) = networks.batches("plain")[0]
    one, *others = several.values()
    before = [(copy.deepcopy(other.module.state_dict()), other.flat((x,))) for other in others]
    start = one.flat((x,))[0]
    optimizer = torch.optim.SGD(one.parameters(), lr=0.05)
    nn.functional.cross_entropy(one.train()(x), torch.arange(len(x)) % 5).backward()
    optimizer.step()
    assert not torch.equal(one.flat((x,))[0], start)
    for other, (state, outputs) in zip(others, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in other.module.state_dict().items())
        assert all(torch.equal(a, b) for a, b in zip(other.flat((x,)), outputs, strict=True))
        shared = {id(p) for p in other.parameters()} & {id(p) for p in one.parameters()}
        assert not shared


def test_a_trained_target_is_exported_with_its_own_parameters(tmp_path: Path) -> None:
    with networks.captured_once("plain"):
        several = networks.several(networks.network("plain"), networks.batches("plain"), ("onnxruntime", "tvm"), recipe="fast")
    with torch.no_grad():
        several["tvm"].module.get_parameter("fc.bias").add_(1.0)
    made = {name: qdeploy.convert(prepared, tmp_path / name, accept=True) for name, prepared in several.items()}
    first, second = (made[name].reference()["simulated.fc"] for name in ("onnxruntime", "tvm"))
    assert np.abs(first - second).max() > 0.5
    assert all(qdeploy.verify(artifact, runtime="onnxruntime:none").passed for artifact in made.values())


def test_the_users_model_is_not_changed_by_many_targets() -> None:
    net = networks.network("plain")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    networks.several(net, networks.batches("plain"), KINDS, recipe="fast")
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


# what is watched


class Kept(Observer):
    """Keeps what it is shown."""

    def __init__(self, spec: QuantSpec):
        super().__init__(spec)
        self.rows: list[Tensor] = []

    def update(self, rows: Tensor, low: Tensor, high: Tensor) -> None:
        assert torch.equal(low, rows.amin(1)) and torch.equal(high, rows.amax(1))
        self.rows.append(rows.clone())

    def range(self) -> tuple[Tensor, Tensor]:
        raise AssertionError


def test_every_observer_sees_its_tensor_once_a_batch_and_nothing_is_changed() -> None:
    prepared = networks.fresh("plain", "snpe", recipe="fast")
    captured = prepared.captured.module
    nodes = len(captured.graph.nodes)
    whole, channels = Kept(QuantSpec.parse("uint8")), Kept(replace(QuantSpec.parse("int8 per-channel"), axis=1))
    watching = insert_observers(captured, {"relu": [whole, channels], "x": [whole]})
    for (x,) in networks.batches("plain", count=2):
        assert torch.equal(watching(x), captured(x))
    assert len(captured.graph.nodes) == nodes
    assert [tuple(rows.shape) for rows in channels.rows] == [(8, 8 * 64)] * 2
    assert [tuple(rows.shape) for rows in whole.rows] == [(1, 8 * 3 * 64), (1, 8 * 8 * 64)] * 2
    assert torch.equal(channels.rows[0].sort(1).values.flatten().sort().values, whole.rows[1].flatten().sort().values)


def test_targets_with_the_same_statistics_share_an_observer_and_others_do_not() -> None:
    model, data = networks.network("plain"), networks.batches("plain")
    with networks.captured_once("plain"):
        several = api.prepare_all(model, data[0], ("snpe", "onnxruntime", "openvino"), recipe="fast")
        others = api.prepare_all(model, data[0], ("onnxruntime", "nnie"), recipe="plain")
    shared: dict[object, Observer] = {}
    one, same, other = (make_observers(prepared.plan, prepared.recipe, shared) for prepared in several)
    assert one["relu"] is same["relu"] is other["relu"]
    assert len({id(o) for observers in (one, same) for o in observers.values()}) == len(one)
    assert observed_tensors(several[0].plan)["relu"] == ("pool",), "what max pooling leaves of it"
    mse, least = (make_observers(prepared.plan, prepared.recipe, shared) for prepared in others)
    assert type(mse["relu"]) is not type(least["relu"]), "log codes are never clipped, so theirs is min-max"
    elsewhere = make_observers(several[0].plan, several[0].recipe, {})
    assert elsewhere["relu"] is not one["relu"], "in another graph a tensor of the same name is another"


def test_the_range_of_shared_statistics_is_that_of_each_spec() -> None:
    spec = QuantSpec.parse("uint8")
    for name in ("minmax", "mse", "percentile", "kl", "ema"):
        shown, alone = make_observer(name, spec, {}), make_observer(name, QuantSpec.parse("int8 narrow"), {})
        rows = torch.randn((1, 4096), generator=torch.Generator().manual_seed(3))
        for observer in (shown, alone):
            observer.update(rows, rows.amin(1), rows.amax(1))
        seen = shown.seen_as(QuantSpec.parse("int8 narrow"))
        assert all(torch.equal(a, b) for a, b in zip(seen.range(), alone.range(), strict=True)), name
        assert shown.spec == spec


# schemes that the user chooses


@cache
def free() -> Backend:
    return replace(
        backends["onnxruntime"], name="free", any_scheme=True, weight_bits=(2, 4, 8), activation_bits=(4, 8), first_last_bits=8
    )


@pytest.mark.parametrize(
    ("weight", "activation", "specs"),
    [
        ("int4 per-channel", None, ("int4 symmetric per-channel", "uint8 asymmetric per-tensor")),
        (None, "INT6 narrow", ("int8 symmetric per-channel narrow", "int6 symmetric per-tensor narrow")),
        ("uint3", "int8 power_of_two dpu", ("uint3 asymmetric per-tensor", "int8 symmetric per-tensor power-of-two dpu")),
        ("log8", "float16", ("log8", "float16")),
        ("float16-normal", "half_away int8", ("float16-normal", "int8 symmetric per-tensor half-away")),
    ],
)
def test_schemes_are_chosen_in_words(weight: str | None, activation: str | None, specs: tuple[str, str]) -> None:
    chosen = with_schemes(free(), weight, activation)
    assert (chosen.weight.describe(), chosen.activation.describe()) == specs
    data = networks.batches("plain")
    prepared = networks.fresh("plain", free(), recipe="fast", weight_scheme=weight, activation_scheme=activation)
    qdeploy.calibrate(prepared, data)
    described = {encoding.role: encoding.spec for encoding in prepared.encodings()}
    ends = chosen.first_last_bits
    for role, spec in (("weight", chosen.weight), ("activation", chosen.activation)):
        assert described[role] in (spec, replace(spec, bits=ends) if ends else spec)
    assert all(torch.isfinite(t).all() for t in prepared.flat(data[0]))


@pytest.mark.parametrize(
    ("target", "weight", "activation", "words"),
    [
        (
            "snpe",
            "int4",
            None,
            "'snpe' has no such weight scheme; found: int4 .*; allowed: uint8 asymmetric per-tensor; to do: .*academic",
        ),
        ("snpe", None, "uint4", "'snpe' has no such activation scheme; found: uint4 .*; allowed: uint8 asymmetric per-tensor;"),
        ("qnn", "int4", None, "found: int4 .*; allowed: int4 symmetric per-channel, int8 symmetric per-channel;"),
        ("tensorrt_fp16", "float16-normal", None, "found: float16-normal; allowed: float16;"),
        (
            "free",
            "int1",
            None,
            r"weight scheme 'int1'; found: 1 bits are not in 2\.\.16; to do: write it as 'int4 symmetric per-channel'",
        ),
        ("free", "", None, "weight scheme ''"),
        ("free", "int8 int8", None, "weight scheme 'int8 int8'"),
        ("free", "int8 octal", None, r"'octal' is not one of int2\.\.int16"),
        ("free", "int8 symmetric asymmetric", None, "the words contradict each other"),
        ("free", None, "uint8 symmetric", "unsigned codes are asymmetric"),
        ("free", None, "log8 narrow", "activation scheme 'log8 narrow'"),
        ("free", None, "int8 per-channel", "activation scheme; found: per-channel; allowed: per-tensor"),
    ],
)
def test_a_scheme_that_there_is_not_is_an_error(target: str, weight: str | None, activation: str | None, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        with_schemes(free() if target == "free" else backends[target], weight, activation)


@pytest.mark.parametrize("backend", [b.name for b in backends if not b.any_scheme])
def test_every_scheme_of_a_target_can_be_chosen_and_is_what_the_error_lists(backend: str) -> None:
    target = backends[backend]
    widths = target.weight_bits if target.weight.linear else (target.weight.bits,)
    schemes = [replace(spec, bits=bits) if spec.linear else spec for spec in (target.weight, *target.weight_schemes) for bits in widths]
    for spec in schemes:
        assert with_schemes(target, spec.describe(), target.activation.describe()).weight == spec
    other = next(spec for spec in map(QuantSpec.parse, ("int13 power-of-two", "int13 dpu")) if spec not in schemes)
    with pytest.raises(OptionError) as caught:
        with_schemes(target, other.describe(), None)
    assert f"allowed: {', '.join(spec.describe() for spec in schemes)};" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_scheme": "float16", "weight_bits": 8}, "has no 8-bit weights; allowed: 16;"),
        ({"weight_scheme": "log8", "first_last_bits": 4}, "has no 4-bit weights; allowed: 8;"),
        ({"activation_scheme": "float16", "activation_bits": 8}, "has no 8-bit activations; allowed: 16;"),
    ],
)
def test_a_grid_of_one_width_has_no_other(options: dict[str, object], words: str) -> None:
    with pytest.raises(QDeployError, match=words):
        networks.fresh("plain", free(), recipe="fast", **options)


# the command line


def run(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["qdeploy", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


_digits: list[Captured] = []


@pytest.fixture
def digits_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample model is captured, and so exported, once for all tests of the command line here."""

    def once(*arguments: Any) -> Captured:
        if not _digits:
            _digits.append(capture(*arguments))
        return _digits[0]

    monkeypatch.setattr(api, "capture", once)


QUICK = ["--data", CALIBRATION, "--recipe", "fast", "--samples", "64", "--runtime", "onnxruntime:none"]


@pytest.mark.usefixtures("digits_captured_once")
def test_the_command_line_makes_a_folder_a_target_and_one_list_of_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("quantize", MODEL, "--backend", "snpe,tensorrt", *QUICK, "--out", out, "--json") == 0
    shown, err = capfd.readouterr()
    assert err == ""
    rows = json.loads(shown)
    assert [row["backend"] for row in rows] == ["snpe", "tensorrt"]
    for row in rows:
        assert row["out"] == str(out / row["backend"]) and row["verify"]["passed"] and row["out"] in row["command"]
        assert Artifact.open(row["out"]).manifest["backend"] == row["backend"]
    assert sorted(path.name for path in out.iterdir()) == ["snpe", "tensorrt"]
    assert run("verify", out / "snpe", "--runtime", "onnxruntime:none", "--quiet") == 0


@pytest.mark.usefixtures("digits_captured_once")
def test_the_command_line_shows_a_table_and_a_next_command_for_each_target(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("quantize", MODEL, "--backend", "snpe, tvm", *QUICK, "--out", out, "--weight-bits", "8") == 0
    shown, err = capfd.readouterr()
    assert err == ""
    for name in ("snpe", "tvm"):
        assert f"write ONNX for {name}" in shown and f"written to {out / name}: model." in shown
        command = backends[name].formats[0].command.replace("{out}", str(out / name))
        assert not command or f"next: {command}" in shown
    assert shown.count("onnxruntime:none") == 2


@pytest.mark.parametrize("names", ["snpe,tvm,snpe", "snpe,tvmm"])
def test_the_command_line_refuses_a_wrong_list_before_it_begins(names: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("quantize", MODEL, "--backend", names, *QUICK, "--out", tmp_path / "out") == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("digits_captured_once")
@pytest.mark.parametrize("command", ["inspect", "quantize"])
def test_the_command_line_takes_schemes(command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "npu.py"
    own.write_text(
        "from dataclasses import replace\nfrom qdeploy.core.backend import backends, register\n"
        "MINE = register(replace(backends['onnxruntime'], name='mine', any_scheme=True))\n"
    )
    given = ["--backend", own, "--weight-scheme", "int5 per-channel", "--activation-scheme", "int9", "--json"]
    if command == "inspect":
        assert run("inspect", MODEL, *given) == 0
        tensors = json.loads(capfd.readouterr().out)["tensors"]
        schemes = {row["role"]: row["scheme"] for row in tensors if row["scheme"] != "float"}
        assert (schemes["weight"], schemes["activation"]) == ("int5 symmetric per-channel", "int9 symmetric per-tensor")
    else:
        assert run("quantize", MODEL, *given, *QUICK, "--out", tmp_path / "out") == 0
        specs = {e.role: e.spec.describe() for e in Artifact.open(tmp_path / "out").encodings}
        assert (specs["weight"], specs["activation"]) == ("int5 symmetric per-channel", "int9 symmetric per-tensor")


def test_exports_are_kept_by_graph_and_opset() -> None:
    prepared = networks.prepared("plain", "snpe")
    opset = prepared.backend.opset
    first = emit.export(prepared.captured, opset)
    assert emit.export(networks.prepared("plain", "tvm").captured, opset) is first
    before = emit.to_bytes(first)
    emit.float_view(first, prepared)
    emit.qdq_view(first, prepared, prepared.encodings())
    assert emit.to_bytes(first) == before, "a view is a copy"
