"""Reconstruction of whole networks: better than nearest rounding, exactly what is emitted, and the same after an interruption."""

from __future__ import annotations

from functools import partial, update_wrapper
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qdeploy
from qdeploy.core.errors import OptionError
from qdeploy.core.recipe import Recipe, StepChoice
from qdeploy.graph import query, regions
from qdeploy.graph.flow import run
from qdeploy.numerics import arith
from qdeploy.recipes import blockwise
from qdeploy.recipes.reconstruct import Settings
from qdeploy.recipes.step import Declined, Work, make_step
from qdeploy.simulation.prepared import Prepared

STEPS = ("adaround", "brecq", "qdrop")
FEW: dict[str, object] = {"iterations": 60, "batch": 8, "samples": 28}
LOW = {"weight_bits": 3, "activation_bits": 4}


def recipe(step: str, **options: object) -> Recipe:
    few = FEW | ({"step_iterations": 40} if step == "brecq" else {})
    return Recipe(name="test", by_grid=True, steps=(StepChoice(step=step, options=few | options),))


def prepared(step: str, name: str = "residual", backend: str = "academic", seed: int = 0, **options: object) -> Prepared:
    bits = LOW if backend == "academic" else {}
    return networks.fresh(name, backend, recipe=recipe(step, **options), seed=seed, **bits)


def made(step: str, name: str = "residual", backend: str = "academic", seed: int = 0, **options: object) -> Prepared:
    return qdeploy.calibrate(prepared(step, name, backend, seed, **options), networks.batches(name))


def weights(one: Prepared) -> dict[str, Tensor]:
    """The codes of all weights."""
    found = {}
    for planned in one.plan.quantized:
        if planned.role == "weight":
            q = one.quantizers[planned.tensor]
            found[planned.tensor] = arith.quantize(query.parameter(one.module, planned.tensor), q.scale, q.zero_point, q.spec)
    return found


@pytest.mark.parametrize(
    ("step", "name"),
    [*((step, "mobile") for step in STEPS), *(pytest.param("qdrop", name, marks=pytest.mark.slow) for name in ("residual", "plain"))],
)
def test_it_brings_the_outputs_nearer_to_the_float_ones(step: str, name: str):
    one = made(step, name, iterations=200 if name == "mobile" else 400)
    (entry,) = one.log
    assert entry["decision"] == "kept" and entry["gain"] > 0.3, entry


@pytest.mark.parametrize("name", ["concat", "several"])
def test_branches_and_several_inputs_and_outputs_are_reconstructed(name: str):
    (entry,) = made("qdrop", name).log
    assert entry["decision"] in ("kept", "undone") and "blocks" in entry["reason"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("backend", ["academic", "snpe", "vitis", "openvino", "tensorrt"])
def test_what_onnxruntime_computes_is_the_simulation(step: str, backend: str, tmp_path: Path):
    one = made(step, "residual", backend, iterations=20)
    report = qdeploy.verify(qdeploy.convert(one, tmp_path / "out"), runtime="onnxruntime:none")
    assert report.passed, report.faults


@pytest.mark.parametrize("step", STEPS)
def test_weights_are_rounded_within_one_code_of_nearest(step: str):
    """In units of the scales from which the learned ones start."""
    floating = networks.fresh("residual", "academic").floating
    fixed = {"learn_weight_steps": False} if step == "qdrop" else {}
    one = made(step, iterations=100, **fixed)
    changed = 0
    for name, codes in weights(one).items():
        q = one.quantizers[name]
        nearest = arith.quantize(query.parameter(floating, name), q.scale, q.zero_point, q.spec)
        assert (codes - nearest).abs().max() <= 1, name
        changed += int((codes != nearest).sum())
    assert changed or one.log[0]["decision"] == "undone"


def test_fisher_weights_are_of_mean_one_and_vanish_where_the_output_does_not_look():
    one = networks.settled("residual", "academic")
    data = [torch.cat(column) for column in zip(*networks.batches("residual"), strict=True)]
    work = Work(one, data)
    found = blockwise._importance(work, work.flow(one.floating, 32), regions.blocks(one.floating))
    for values in found.values():
        assert values.mean().item() == pytest.approx(1, rel=1e-4) and (values >= 0).all()
    # the last block makes the scores themselves: their gradient is the probability less the drawn class
    last = list(found)[-1]
    (scores,) = run(one.floating, data)
    bounds = torch.maximum(scores.softmax(1), 1 - scores.softmax(1)).square()
    relative = found[last] / bounds
    assert (relative <= relative.max() + 1e-6).all() and found[last].shape == scores.shape


def test_fisher_weights_change_what_is_learned():
    plain, weighed = (weights(made("qdrop", fisher=fisher, iterations=20)) for fisher in (False, True))
    assert any(not torch.equal(plain[name], weighed[name]) for name in plain)


class Crossing(nn.Module):
    """In its block, what the second layer makes is read on both sides of its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.second, self.third = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        start = self.first(x).relu()
        made = self.second(start)
        return self.fc((self.third(made.sigmoid()) + made + start).mean((2, 3)))


def test_fisher_weights_reach_every_tensor_that_leaves_a_region():
    data = [torch.cat(column) for column in zip(*networks.batches("residual"), strict=True)]
    torch.manual_seed(0)
    one = qdeploy.calibrate(qdeploy.prepare(Crossing().eval(), (data[0][:4],), "academic", recipe="plain", **LOW), [data])
    single = update_wrapper(partial(regions.blocks, largest=1), regions.blocks)
    work = Work(one, data)
    found = blockwise._importance(work, work.flow(one.floating, 32), single(one.floating))
    assert {"second", "sigmoid"} <= set(found), "the region of the second layer has two exits"
    assert "blocks" in blockwise.reconstruct_all(work, single, [Settings(iterations=8, batch=8)], 32, fisher=True)


def test_the_seed_decides_alone():
    first, again, other = (weights(made("qdrop", seed=seed, iterations=20)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("step", STEPS)
def test_a_run_that_is_resumed_after_any_block_ends_in_the_same_bytes(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = networks.batches("residual")
    whole = qdeploy.convert(qdeploy.calibrate(prepared(step, iterations=20), data), tmp_path / "whole")
    parts = 0

    def interrupted(self: Work, key: str, compute: object) -> dict[str, Tensor]:
        nonlocal parts
        parts += 1
        if parts == 3:
            raise KeyboardInterrupt
        return checkpoint(self, key, compute)  # type: ignore[arg-type]

    checkpoint = Work.checkpoint
    monkeypatch.setattr(Work, "checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qdeploy.calibrate(prepared(step, iterations=20), data, folder=tmp_path / "work")
    monkeypatch.undo()
    assert len(list((tmp_path / "work").rglob("*.safetensors"))) == 2
    resumed = qdeploy.convert(
        qdeploy.calibrate(prepared(step, iterations=20), data, folder=tmp_path / "work", resume=True), tmp_path / "resumed"
    )
    for name in whole.manifest["files"]:
        assert whole.manifest["files"][name] == resumed.manifest["files"][name], name
    assert whole.manifest["encodings"] == resumed.manifest["encodings"]


def test_progress_tells_block_iteration_and_loss():
    told: list[tuple[str, int, int, float | None]] = []
    one = prepared("qdrop", iterations=100)
    qdeploy.calibrate(
        one, networks.batches("residual"), step_progress=lambda what, done, total, loss=None: told.append((what, done, total, loss))
    )
    assert told and all(done <= total and loss is not None and loss >= 0 for _, done, total, loss in told)
    assert [done for _, done, _, _ in told] == sorted(done for _, done, _, _ in told)
    assert told[0][0].startswith("qdrop 1/")


@pytest.mark.parametrize("step", STEPS)
def test_a_target_without_linear_weights_declines(step: str):
    one = made(step, "plain", "nnie")
    assert one.log[0]["decision"] == "declined" and "linear" in one.log[0]["reason"]


def test_a_model_of_fixed_batch_is_reconstructed_in_batches_of_its_size():
    program = torch.export.export(networks.network("plain"), (torch.zeros(4, 3, 8, 8),))
    one = qdeploy.prepare(program, None, "academic", recipe=recipe("qdrop"), **LOW)
    data = [x for (x,) in networks.batches("plain", count=8, batch=4)]
    qdeploy.calibrate(one, data)
    assert one.log[0]["decision"] != "declined"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("option", "value"), [("iterations", 0), ("iterations", 1.5), ("samples", -1), ("batch", "many")])
def test_a_bad_option_is_refused(step: str, option: str, value: object):
    with pytest.raises(OptionError, match=option):
        make_step(step, {option: value})


def test_an_unknown_option_gets_the_nearest_name():
    with pytest.raises(OptionError, match="did you mean 'iterations'"):
        make_step("qdrop", {"iteration": 3})


def test_without_layers_there_is_nothing_to_reconstruct():
    one = networks.settled("plain", "academic")
    work = Work(one, [torch.zeros(8, 3, 8, 8)])
    with pytest.raises(Declined):
        blockwise.reconstruct_all(work, lambda module: [], (), 8)


def test_the_float_graph_is_left_as_it_was():
    one = prepared("qdrop")
    before = {name: np.array(p.detach()) for name, p in one.floating.named_parameters()}
    qdeploy.calibrate(one, networks.batches("residual"))
    assert all((before[name] == p.detach().numpy()).all() for name, p in one.floating.named_parameters())
