"""Steps of recipes: what helps is kept, what hurts is undone, all is logged, and an interrupted run goes on as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import networks
import pytest
import torch
from torch import Tensor

import qdeploy
from qdeploy import api
from qdeploy.core.errors import InputError, OptionError
from qdeploy.core.recipe import Recipe, StepChoice
from qdeploy.graph import query
from qdeploy.recipes import step, step_runner
from qdeploy.recipes.calibration_pass import HELD, SHARE, KeptSamples
from qdeploy.recipes.step import Declined, Step, Work
from qdeploy.simulation.prepared import Prepared


class Scaled(Step):
    """Multiplies the first weight of the simulation by `factor`: 1 changes nothing, others hurt."""

    samples = 8

    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def run(self, work: Work) -> str:
        path = next(t.tensor for t in work.prepared.plan.quantized if t.role == "weight")
        with torch.no_grad():
            query.parameter(work.prepared.module, path).mul_(self.factor)
        return "scaled"


class Shaped(Scaled):
    """The same, on the float graph."""

    stage = "float"

    def run(self, work: Work) -> str:
        path = next(t.tensor for t in work.prepared.plan.quantized if t.role == "weight")
        with torch.no_grad():
            query.parameter(work.float_module, path).mul_(self.factor)
        return "scaled"


class Unwilling(Step):
    """Has nothing to do."""

    samples = 8

    def run(self, work: Work) -> str:
        raise Declined("there is nothing to do")


class Counted(Step):
    """Two parts with a checkpoint each; fails after the first where asked."""

    samples = 8
    computed: ClassVar[list[str]] = []
    fail = False

    def run(self, work: Work) -> str:
        for part in ("one", "two"):
            if part == "two" and Counted.fail:
                raise KeyboardInterrupt
            work.checkpoint(part, lambda part=part: self._compute(part))
        return "two parts"

    def _compute(self, part: str) -> dict[str, Tensor]:
        Counted.computed.append(part)
        return {"x": torch.ones(2)}


@pytest.fixture(autouse=True)
def _steps(monkeypatch: pytest.MonkeyPatch) -> None:
    step.steps.names()
    for name, cls in {"scaled": Scaled, "shaped": Shaped, "unwilling": Unwilling, "counted": Counted}.items():
        monkeypatch.setitem(step.steps._values, name, cls)
    Counted.computed, Counted.fail = [], False


def prepared(*steps: tuple[str, dict[str, object]], name: str = "plain", **options: object) -> Prepared:
    chosen = tuple(StepChoice(step=step, options=given) for step, given in steps)
    recipe = Recipe(name="test", by_grid=True, steps=chosen)
    return networks.fresh(name, "snpe", recipe=recipe, **options)


def parameters(one: Prepared) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in one.module.named_parameters()}


def same(one: Prepared, other: Prepared) -> bool:
    ours, theirs = parameters(one), parameters(other)
    equal = all(torch.equal(ours[name], theirs[name]) for name in ours)
    scales = zip(one.encodings(), other.encodings(), strict=True)
    return equal and all((a.scale == b.scale).all() and (a.zero_point == b.zero_point).all() for a, b in scales)


STEPS = [name for name in step.steps.names() if name not in ("scaled", "shaped", "unwilling", "counted")]
FEW = {"samples": 16, "iterations": 8, "batch": 8}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_works_alone_and_leaves_numbers_that_follow_from_each_other(name: str):
    options = {option: value for option, value in FEW.items() if option in step.step_options(name)}
    made = qdeploy.calibrate(prepared((name, options), name="residual"), networks.batches("residual"))
    assert [entry["step"] for entry in made.log] == [name] and made.log[0]["reason"]
    left = made.encodings()
    made.make_consistent()
    for ours, again in zip(left, made.encodings(), strict=True):
        assert (ours.scale == again.scale).all() and (ours.zero_point == again.zero_point).all(), ours.tensor


@pytest.mark.parametrize("name", STEPS)
def test_a_step_refuses_an_option_that_it_does_not_have_and_values_of_another_kind(name: str):
    with pytest.raises(OptionError, match="option of step"):
        step.make_step(name, {"no_such_option": 1})
    for option in step.step_options(name):
        with pytest.raises(OptionError):
            step.make_step(name, {option: object()})


@pytest.mark.parametrize("step", ["scaled", "shaped"])
def test_a_step_that_hurts_is_undone_and_leaves_nothing_behind(step: str):
    made = qdeploy.calibrate(prepared((step, {"factor": 3.0})), networks.batches("plain"))
    without = qdeploy.calibrate(prepared(), networks.batches("plain"))
    (entry,) = made.log
    assert entry["decision"] == "undone" and entry["gain"] < -1 and entry["metric"] == "SQNR dB"
    assert entry["after"] == pytest.approx(entry["before"] + entry["gain"], abs=1e-3)
    assert same(made, without)


@pytest.mark.parametrize("step", ["scaled", "shaped"])
def test_a_step_that_does_no_harm_is_kept(step: str):
    (entry,) = qdeploy.calibrate(prepared((step, {})), networks.batches("plain")).log
    assert entry["decision"] == "kept" and entry["gain"] == 0 and entry["reason"] == "scaled" and entry["seconds"] >= 0


def test_a_step_with_nothing_to_do_says_why():
    (entry,) = qdeploy.calibrate(prepared(("unwilling", {})), networks.batches("plain")).log
    assert entry["decision"] == "declined" and entry["reason"] == "there is nothing to do" and entry["gain"] == 0


def test_the_next_step_starts_from_what_the_last_one_left():
    log = qdeploy.calibrate(prepared(("scaled", {"factor": 1.01}), ("scaled", {"factor": 3.0})), networks.batches("plain")).log
    left = log[0]["after"] if log[0]["decision"] == "kept" else log[0]["before"]
    assert log[1]["before"] == left


def test_with_labels_steps_are_judged_by_right_classes():
    data = networks.batches("plain")
    made = networks.network("plain")(torch.cat([x for (x,) in data])).argmax(1)
    log = qdeploy.calibrate(prepared(("scaled", {"factor": -1.0})), data, labels=made).log
    assert log[0]["metric"] == "top-1" and 0 <= log[0]["before"] <= 1 and log[0]["decision"] == "undone"


def test_too_few_labels_are_refused():
    with pytest.raises(InputError, match="fewer labels than samples"):
        qdeploy.calibrate(prepared(("scaled", {})), networks.batches("plain"), labels=[0, 1, 2])


def test_the_manifest_lists_every_step(tmp_path: Path):
    made = qdeploy.calibrate(prepared(("scaled", {}), ("unwilling", {}), ("bias_correction", {})), networks.batches("plain"))
    qdeploy.convert(made, tmp_path / "out")
    steps = json.loads((tmp_path / "out/qdeploy.json").read_text())["steps"]
    assert [entry["step"] for entry in steps] == ["scaled", "unwilling", "bias_correction"]
    assert {"options", "metric", "before", "after", "gain", "decision", "reason"} <= steps[0].keys()
    assert "seconds" not in steps[0] and "seconds" in made.log[0], "the same run makes the same bytes"


def test_held_samples_are_no_samples_of_the_steps():
    kept = KeptSamples(need=100, dynamic=True)
    rows = torch.arange(320.0).view(5, 64, 1)
    for batch in rows:
        kept.add((batch,), batch.flatten())
    (used,), (held,) = kept.samples(), kept.held()
    assert len(used) == 100 and len(held) == 5 * 64 // SHARE
    assert not set(used.flatten().tolist()) & set(held.flatten().tolist())
    labels = kept.labels()
    assert labels is not None and torch.equal(labels, held.flatten())


def test_what_is_held_back_does_not_grow_with_the_data():
    kept = KeptSamples(need=10, dynamic=True)
    for _ in range(100):
        kept.add((torch.zeros(64, 1),), None)
    assert kept.counts == {"steps": 10, "held": HELD}


@pytest.mark.parametrize("batches", [1, 3, 20])
def test_of_batches_of_a_fixed_size_whole_ones_are_held_back(batches: int):
    kept = KeptSamples(need=6, dynamic=False)
    for number in range(batches):
        kept.add((torch.full((2, 1), float(number)),), None)
    (used,), (held,) = kept.samples(), kept.held()
    assert len(used) == min(6, 2 * batches) and len(held) % 2 == 0 and len(held)


def test_a_batch_of_a_fixed_size_is_kept_even_where_fewer_samples_are_needed():
    kept = KeptSamples(need=3, dynamic=False)
    kept.add((torch.zeros(8, 1),), None)
    assert len(kept.samples()[0]) == 8


def test_without_steps_no_sample_is_kept():
    kept = KeptSamples(need=0, dynamic=True)
    kept.add((torch.zeros(64, 1),), None)
    assert kept.counts == {"steps": 0, "held": 0}


def test_an_interrupted_run_goes_on_from_its_finished_parts(tmp_path: Path):
    Counted.fail = True
    with pytest.raises(KeyboardInterrupt):
        qdeploy.calibrate(prepared(("counted", {})), networks.batches("plain"), folder=tmp_path / "work")
    Counted.fail = False
    made = qdeploy.calibrate(prepared(("counted", {})), networks.batches("plain"), folder=tmp_path / "work", resume=True)
    assert Counted.computed == ["one", "two"] and made.log[0]["decision"] == "kept"


def test_without_resume_finished_parts_are_computed_anew(tmp_path: Path):
    for _ in range(2):
        qdeploy.calibrate(prepared(("counted", {})), networks.batches("plain"), folder=tmp_path / "work")
    assert Counted.computed == ["one", "two"] * 2


CHANGES: dict[str, dict[str, object]] = {
    "seed": {"seed": 1},
    "another network": {"name": "mobile"},
}


@pytest.mark.parametrize("change", [*CHANGES, "other data", "other options"])
def test_the_work_of_another_run_is_not_taken_up(change: str, tmp_path: Path):
    qdeploy.calibrate(prepared(("counted", {})), networks.batches("plain"), folder=tmp_path / "work")
    steps: list[tuple[str, dict[str, object]]] = [("counted", {}), *([("scaled", {})] if change == "other options" else [])]
    other = prepared(*steps, **CHANGES.get(change, {}))
    data = networks.batches("plain", seed=9 if change == "other data" else 1)
    with pytest.raises(InputError, match="work of another run"):
        qdeploy.calibrate(other, data, folder=tmp_path / "work", resume=True)


def test_a_damaged_part_is_refused(tmp_path: Path):
    qdeploy.calibrate(prepared(("counted", {})), networks.batches("plain"), folder=tmp_path / "work")
    (part,) = (tmp_path / "work").rglob("*one.safetensors")
    part.write_bytes(b"nothing")
    with pytest.raises(InputError, match="leave out --resume"):
        qdeploy.calibrate(prepared(("counted", {})), networks.batches("plain"), folder=tmp_path / "work", resume=True)


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work/mine.txt").write_text("mine")
    with pytest.raises(InputError, match="other files"):
        qdeploy.calibrate(prepared(("counted", {})), networks.batches("plain"), folder=tmp_path / "work")
    assert (tmp_path / "work/mine.txt").read_text() == "mine"


def test_targets_for_which_the_same_steps_helped_share_one_float_graph():
    recipe = Recipe(name="test", by_grid=True, steps=(StepChoice(step="shaped"),))
    several = api.prepare_all(networks.network("plain"), networks.batches("plain")[0], ("snpe", "tensorrt"), recipe=recipe)
    api.calibrate_all(several, networks.batches("plain"))
    assert several[0].floating is several[1].floating is not several[0].captured.module


def test_the_judge_measures_signal_over_noise():
    wanted = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert step_runner._sqnr(wanted, wanted.float()) == step_runner.EXACT
    assert step_runner._sqnr(wanted, torch.tensor([3.0, 4.5])) == pytest.approx(20.0)
    assert step_runner._sqnr(wanted, torch.tensor([3.0, float("nan")])) == -step_runner.EXACT


def test_the_float_row_is_the_users_model_whatever_the_steps_have_changed(tmp_path: Path):
    made = qdeploy.calibrate(prepared(("scaled", {}), ("equalize", {}), ("bias_correction", {})), networks.batches("plain"))
    artifact = qdeploy.convert(made, tmp_path / "out")
    (batch,) = networks.batches("plain")[0]
    labels = networks.network("plain")(batch).argmax(1)
    report = qdeploy.verify(artifact, [batch], "onnxruntime:none", labels, simulation=made)
    assert report.results[0].name == "float" and report.results[0].accuracy == 1
    with torch.no_grad():
        wanted = networks.network("plain")(torch.from_numpy(artifact.reference()["input.x"]))
    (name,) = artifact.outputs
    assert torch.allclose(torch.from_numpy(artifact.reference()[f"float.{name}"]), wanted, atol=1e-5)
    alone = qdeploy.verify(artifact, [batch], "onnxruntime:none", labels)
    assert alone.results[0].name == "model.onnx in float"
