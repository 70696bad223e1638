"""Steps of recipes: what helps is kept, what hurts is undone, all is logged, and an interrupted run goes on as if it had not been."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import networks
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qdeploy
from qdeploy import api
from qdeploy.core.errors import InputError, OptionError
from qdeploy.core.recipe import Choice, Recipe, StepChoice
from qdeploy.graph import query
from qdeploy.recipes import step
from qdeploy.recipes.calibration_pass import EARLY_SHARE, FEW, HELD, SHARE, KeptSamples
from qdeploy.recipes.judge import EXACT, Judge, Measure
from qdeploy.recipes.step import Declined, Step, Work
from qdeploy.recipes.step_runner import Samples
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

    long = True
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
SMALL = {"samples": 16, "iterations": 8, "batch": 8}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_works_alone_and_leaves_numbers_that_follow_from_each_other(name: str):
    options = {option: value for option, value in SMALL.items() if option in step.step_options(name)}
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
def test_a_step_that_changes_nothing_is_undone(step: str):
    (entry,) = qdeploy.calibrate(prepared((step, {})), networks.batches("plain")).log
    assert entry["decision"] == "undone" and entry["gain"] == 0 and entry["reason"] == "scaled" and entry["seconds"] >= 0


POOR = Recipe(
    name="poor",
    activation=Choice(observer="percentile", options={"percentile": 80.0}),
    steps=(StepChoice(step="ranges"), StepChoice(step="bias_correction")),
)


@pytest.mark.parametrize("batches", [1, 4, 8, 16])
def test_a_step_that_helps_is_kept_and_its_measure_is_of_samples_that_it_has_not_seen(batches: int):
    made = qdeploy.calibrate(networks.fresh("plain", "snpe", recipe=POOR), networks.batches("plain", count=batches))
    first, second = made.log
    assert first["decision"] == "kept" and first["gain"] > 3 and second["before"] == first["after"]
    if batches * 8 > FEW:
        wanted, got = (torch.cat([run(*inputs) for inputs in made.reference]) for run in (made.captured.module, made))
        final = second["after"] if second["decision"] == "kept" else second["before"]
        ratio = 10 * torch.log10(wanted.double().square().sum() / (wanted.double() - got).square().sum())
        assert float(ratio) == pytest.approx(final, abs=1e-3), "the saved samples are those that steps are judged by"


def test_of_the_ranges_that_a_recipe_names_the_best_are_where_its_steps_start():
    starts = (Choice(observer="minmax"), Choice(observer="percentile", options={"percentile": 70.0}))
    made = qdeploy.calibrate(networks.fresh("plain", "snpe", recipe=replace(POOR, steps=(), starts=starts)), networks.batches("plain"))
    best = qdeploy.calibrate(networks.fresh("plain", "snpe", recipe="minmax"), networks.batches("plain"))
    (entry,) = made.log
    assert entry["step"] == "start" and entry["decision"] == "kept" and entry["reason"].startswith("minmax is the best of minmax ")
    assert same(made, best)
    others = replace(POOR, steps=(), starts=(Choice(observer="percentile", options={"percentile": 99.9}),))
    (entry,) = qdeploy.calibrate(networks.fresh("plain", "snpe", recipe=others), networks.batches("plain")).log
    assert entry["gain"] > 3 and entry["reason"].startswith("percentile percentile=99.9 is the best of percentile percentile=80.0 ")


def test_every_step_starts_from_the_measure_that_the_last_one_left():
    log = qdeploy.calibrate(networks.fresh("residual", "snpe", recipe="default"), networks.batches("residual")).log
    assert [entry["step"] for entry in log] == ["start", "equalize", "ranges", "bias_correction"]
    for last, entry in pairwise(log):
        assert entry["before"] == (last["after"] if last["decision"] == "kept" else last["before"])


def test_a_step_of_the_float_graph_is_tried_on_each_graph_that_the_ones_before_may_leave():
    """The first one hurts, so the second starts from the model as it is."""
    made = qdeploy.calibrate(prepared(("shaped", {"factor": 3.0}), ("equalize", {}), name="plain"), networks.batches("plain"))
    alone = qdeploy.calibrate(prepared(("equalize", {}), name="plain"), networks.batches("plain"))
    assert made.log[0]["decision"] == "undone" and made.log[1]["after"] == alone.log[0]["after"]
    assert same(made, alone)


def test_too_many_steps_of_the_float_graph_are_refused_before_any_work():
    with pytest.raises(OptionError, match="4 steps that edit the float graph"):
        prepared(*[("shaped", {})] * 4)


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
    assert log[0]["metric"] == "top1" and 0 <= log[0]["before"] <= 1 and log[0]["decision"] == "undone"


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


def kept(batches: Iterable[Tensor], need: int = 10, unit: int | None = None, folds: bool = True) -> Samples:
    one = KeptSamples(need, unit, folds=folds)
    for batch in batches:
        one.add((batch,), batch.flatten(1)[:, 0])
    found = one.samples()
    assert found is not None
    return found


def test_held_samples_are_no_samples_of_the_steps():
    found = kept(torch.arange(320.0).view(5, 64, 1), need=100)
    (used,), (held,) = found.work, found.held
    assert len(used) == 100 and len(held) == 64 // EARLY_SHARE + 4 * 64 // SHARE and not found.few
    assert not set(used.flatten().tolist()) & set(held.flatten().tolist())
    assert found.labels is not None and torch.equal(found.labels, held.flatten())
    assert found.folds() == []


def test_what_is_held_back_does_not_grow_with_the_data():
    found = kept(torch.zeros(64, 1) for _ in range(100))
    assert (len(found.work[0]), len(found.held[0])) == (10, HELD)


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("batches", [1, 3, 20])
def test_of_batches_of_a_fixed_size_whole_ones_are_held_back(batches: int, folds: bool):
    found = kept((torch.full((2, 1), float(number)) for number in range(batches)), need=6, unit=2, folds=folds)
    few = folds and 2 * batches <= FEW
    assert found.few == few and len(found.work[0]) == (2 * batches if few else min(6, 2 * (batches - batches // EARLY_SHARE)))
    assert len(found.held[0]) % 2 == 0 and len(found.held[0])
    assert all(rows.start % 2 == 0 == rows.stop % 2 for rows in found.folds())


@pytest.mark.parametrize("count", [1, 2, 3, 7, FEW])
def test_a_few_samples_are_cut_into_folds_that_hold_each_of_them_once(count: int):
    found = kept(torch.arange(float(count)).view(count, 1, 1))
    places = [place for rows in found.folds() for place in range(count)[rows]]
    assert found.few and torch.equal(found.work[0], found.held[0]) and len(found.work[0]) == count
    assert places == (list(range(count)) if count > 1 else [])


def test_a_batch_of_a_fixed_size_is_kept_even_where_fewer_samples_are_needed():
    assert len(kept([torch.zeros(8, 1)], need=3, unit=8).work[0]) == 8


def test_without_steps_no_sample_is_kept():
    one = KeptSamples(need=0, unit=None)
    one.add((torch.zeros(64, 1),), None)
    assert one.samples() is None


def test_an_interrupted_run_goes_on_from_its_finished_parts(tmp_path: Path):
    Counted.fail = True
    with pytest.raises(KeyboardInterrupt):
        qdeploy.calibrate(prepared(("counted", {})), networks.batches("plain"), folder=tmp_path / "work")
    Counted.fail = False
    made = qdeploy.calibrate(prepared(("counted", {})), networks.batches("plain"), folder=tmp_path / "work", resume=True)
    assert Counted.computed == ["one", "two"] and made.log[0]["reason"] == "two parts"


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
    model, data = networks.uneven()
    several = api.prepare_all(model, data[0], ("snpe", "vitis"), recipe="default")
    api.calibrate_all(several, data)
    kept = [{entry["step"]: entry["decision"] for entry in one.log}["equalize"] for one in several]
    assert kept == ["kept", "kept"] and several[0].floating is several[1].floating is not several[0].captured.module


def measured(noise: Sequence[float], signal: float = 1.0, right: Sequence[bool] | None = None) -> Measure:
    energies = torch.tensor([list(noise)], dtype=torch.float64)
    scores = None if right is None else torch.tensor(right).double()
    return Measure(signal=torch.full_like(energies, signal), noise=energies, scores=scores, name="top1" if right else "")


def test_a_measure_is_signal_over_noise_in_decibels():
    assert measured([0.0]).value == EXACT and measured([float("nan")]).value == -EXACT
    assert measured([0.01, 0.01]).value == pytest.approx(20.0) and measured([0.01]).metric == "SQNR dB"


@pytest.mark.parametrize(
    ("before", "after", "helps"),
    [
        ([0.1, 0.1, 0.1, 0.1], [0.05, 0.05, 0.05, 0.05], True),
        ([0.1, 0.1, 0.1, 0.1], [0.0999, 0.0999, 0.0999, 0.0999], False),  # 0.004 dB
        ([0.1, 0.1, 0.1, 0.1], [0.02, 0.1, 0.11, 0.12], False),  # one sample tells nothing of the others
        ([0.1], [0.05], True),
        ([0.1], [0.095], False),
        ([float("nan")] * 4, [0.1] * 4, True),
        ([0.1] * 4, [float("nan")] * 4, False),
        ([1e-20] * 4, [0.0] * 4, False),
    ],
)
def test_what_helps_does_so_by_more_than_the_samples_may_deceive(before: list[float], after: list[float], helps: bool):
    assert measured(after).helps(measured(before)) is helps
    assert not (helps and measured(before).helps(measured(after)))


@pytest.mark.parametrize(
    ("won", "noise", "helps"), [(9, 0.2, True), (0, 0.05, True), (0, 0.2, False), (-9, 0.05, False), (1, 0.2, False)]
)
def test_with_labels_the_classes_decide_where_they_tell_and_the_noise_where_not(won: int, noise: float, helps: bool):
    before, after = [True] * 20 + [False] * 20, [True] * (20 + won) + [False] * (20 - won)
    assert measured([noise] * 40, right=after).helps(measured([0.1] * 40, right=before)) is helps
    assert measured([noise], right=[True]).metric == "top1"


def test_the_float_row_is_the_users_model_whatever_the_steps_have_changed(tmp_path: Path):
    made = qdeploy.calibrate(prepared(("equalize", {}), ("bias_correction", {})), networks.batches("plain"))
    artifact = qdeploy.convert(made, tmp_path / "out")
    batch = torch.cat([x for (x,) in networks.batches("plain")])
    labels = networks.network("plain")(batch).argmax(1)
    report = qdeploy.verify(artifact, [batch], "onnxruntime:none", labels, simulation=made)
    assert report.results[0].name == "float" and report.results[0].accuracy == 1
    with torch.no_grad():
        wanted = networks.network("plain")(torch.from_numpy(artifact.reference()["input.x"]))
    (name,) = artifact.outputs
    assert torch.allclose(torch.from_numpy(artifact.reference()[f"float.{name}"]), wanted, atol=1e-5)
    alone = qdeploy.verify(artifact, [batch], "onnxruntime:none", labels)
    assert alone.results[0].name == "model.onnx in float"


def test_an_output_of_a_softmax_is_judged_by_what_enters_it():
    """Less its mean over the classes, which changes nothing."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4), torch.nn.Softmax(1)).eval()
    x = torch.randn(20, 3, 4)
    for backend in ("snpe", "onnxruntime"):
        made = qdeploy.calibrate(qdeploy.prepare(model, x, backend, recipe="fast"), [x])
        measure = Judge(made, [x])()
        assert measure.metric == "SQNR dB of logits"
        wanted = model[:2](x).detach().double()
        seen: list[Tensor] = []
        with torch.no_grad(), softmax_seen(seen):
            made(x)
        (found,) = (logits.double() for logits in seen)
        wanted, found = (t - t.mean(1, keepdim=True) for t in (wanted, found))
        noise = (wanted - found).square().sum()
        assert measure.value == pytest.approx(float(10 * torch.log10(wanted.square().sum() / noise)), abs=1e-6), backend


@contextmanager
def softmax_seen(seen: list[Tensor]) -> Iterator[None]:
    """Keeps what enters every softmax within the block."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "softmax" in str(func):
                seen.append(args[0].clone())
            return func(*args, **(kwargs or {}))

    with Mode():
        yield
