"""Run the steps of a recipe: measure before and after each on samples that no step sees, keep what helps, undo what hurts, log all.

The measure is the SQNR of the outputs against those of the float model, or the share of right classes where labels are given.
Steps that edit the float graph come before ranges are observed. To measure them, ranges are found by min-max on a few first samples,
once with and once without the step; no other data is passed twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qdeploy.core.errors import InputError
from qdeploy.core.progress import StepProgress, no_step_progress
from qdeploy.core.recipe import EXTREMES, Recipe, StepChoice
from qdeploy.core.spec import QuantSpec, Role
from qdeploy.core.version import __version__
from qdeploy.graph import edit
from qdeploy.graph.flow import run
from qdeploy.graph.observe import insert_observers
from qdeploy.numerics.observer import Observer, make_observer
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.recipes.step import Declined, Stage, Step, Work, make_step
from qdeploy.simulation.insert import Numbers, observed_tensors
from qdeploy.simulation.prepared import Prepared

PREVIEW = 64
"""First samples, by which steps of the float graph are judged."""
HARM = 0.01
"""Loss of SQNR in dB up to which a step counts as no harm: below what samples can tell."""
SQNR, TOP1 = "SQNR dB", "top-1"
EXACT = 999.0
"""SQNR in dB of outputs that are equal."""
FINGERPRINT = "run.json"


class Judge:
    """Measures a simulation on held-back samples, by the float outputs `wanted` or by labels."""

    def __init__(self, prepared: Prepared, held: Sequence[Tensor], labels: Tensor | None = None):
        self.prepared = prepared
        self.held = held
        self.labels = labels
        self.metric = SQNR if labels is None else TOP1
        self.wanted = [t.double() for t in run(prepared.captured.module, held, prepared.batch_size)] if labels is None else []

    def __call__(self) -> float:
        made = run(self.prepared.module, self.held, self.prepared.batch_size)
        if self.labels is not None:
            return float((made[0].flatten(1).argmax(1) == self.labels).double().mean())
        ratios = [_sqnr(want, got) for want, got in zip(self.wanted, made, strict=True) if want.is_floating_point()]
        return sum(ratios) / len(ratios)


def _sqnr(wanted: Tensor, made: Tensor) -> float:
    noise = float((made.double() - wanted).square().sum())
    signal = float(wanted.square().sum())
    if not math.isfinite(noise):
        return -EXACT
    return EXACT if noise == 0 else max(-EXACT, 10 * math.log10(max(signal, 1e-300) / noise))


def made_steps(recipe: Recipe) -> list[Step]:
    """The steps of `recipe`, ready to run."""
    return [make_step(choice.step, choice.options) for choice in recipe.steps]


def samples_needed(prepared: Prepared) -> int:
    """How many samples the steps of its recipe work on."""
    return max((step.samples for step in made_steps(prepared.recipe)), default=0)


def has_float_steps(prepared: Prepared) -> bool:
    """Whether its recipe has steps that edit the float graph."""
    return bool(_staged(prepared, "float"))


def has_simulation_steps(prepared: Prepared) -> bool:
    """Whether its recipe has steps that change the simulation."""
    return bool(_staged(prepared, "simulation"))


def _staged(prepared: Prepared, stage: Stage) -> list[tuple[int, StepChoice, Step]]:
    """The steps of one stage, with their place in the recipe."""
    steps = enumerate(zip(prepared.recipe.steps, made_steps(prepared.recipe), strict=True))
    return [(number, choice, step) for number, (choice, step) in steps if step.stage == stage]


def run_float_steps_for_all(several: Sequence[Prepared], preview: Sequence[Tensor], progress: StepProgress = no_step_progress) -> None:
    """`run_float_steps` for each; targets for which the same steps helped have one float graph."""
    graphs: dict[tuple[str, ...], torch.fx.GraphModule] = {}
    for one in several:
        run_float_steps(one, preview, progress)
        kept = tuple(str(entry["step"]) for entry in one.log if entry["decision"] == "kept")
        one.set_floating(graphs.setdefault(kept, one.floating))


def run_float_steps(prepared: Prepared, preview: Sequence[Tensor], progress: StepProgress = no_step_progress) -> None:
    """Run the steps of the stage `float`, judged on the first samples `preview`."""
    todo = _staged(prepared, "float")
    if not todo:
        return
    judge = Judge(prepared, preview)

    def measure() -> float:
        _glimpse(prepared, preview)
        return judge()

    before = measure()
    work = Work(prepared, preview, progress=progress)
    for _, choice, step in todo:
        original = prepared.floating
        prepared.set_floating(edit.copy(original, own_parameters=True))
        prepared.take_parameters()

        def undo(original: torch.fx.GraphModule = original) -> None:
            prepared.set_floating(original)
            prepared.take_parameters()

        before = _attempt(prepared, choice, partial(step.run, work), measure, undo, before, judge.metric)
    prepared.take_parameters()
    prepared.chosen, prepared.biases = {}, {}
    prepared.set_mode("float")


def _glimpse(prepared: Prepared, preview: Sequence[Tensor]) -> None:
    """Quantize with ranges by min-max on a few samples."""
    prepared.take_parameters()
    groups = observed_tensors(prepared.plan)
    specs = {planned.group: planned.spec for planned in prepared.plan.quantized if planned.spec is not None}
    seen = {group: make_observer(EXTREMES.observer, specs[group], {}) for group in groups}
    tensors: dict[str, list[Observer]] = {}
    for group, names in groups.items():
        for name in names:
            tensors.setdefault(name, []).append(seen[group])
    run(insert_observers(prepared.floating, tensors), preview, prepared.batch_size)

    def extremes(role: Role, spec: QuantSpec) -> Observer:
        return make_observer(EXTREMES.observer, spec, {})

    prepared.freeze(seen, extremes)


def run_simulation_steps(
    prepared: Prepared,
    samples: Sequence[Tensor],
    held: Sequence[Tensor],
    labels: Tensor | None = None,
    folder: Path | None = None,
    progress: StepProgress = no_step_progress,
) -> None:
    """Run the steps of the stage `simulation` on a calibrated model.

    They work on `samples` and are judged by `held`, and their `labels` if these are known. Finished parts of long steps are kept in
    `folder`.
    """
    todo = _staged(prepared, "simulation")
    if not todo:
        return
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    work = Work(prepared, samples, folder, progress)
    judge = Judge(prepared, held, labels)
    before = judge()
    for number, choice, step in todo:
        work.step = f"{number}.{choice.step}"
        state = _state(prepared)
        undo = partial(_restore, prepared, state)
        before = _attempt(prepared, choice, partial(step.run, work), judge, undo, before, judge.metric)


def _attempt(
    prepared: Prepared,
    choice: StepChoice,
    act: Callable[[], str],
    measure: Callable[[], float],
    undo: Callable[[], None],
    before: float,
    metric: str,
) -> float:
    """Do one step, keep it where it does no harm, and log it. Returns the measure of what is now."""
    start = time.monotonic()
    entry = {"step": choice.step, "options": dict(choice.options), "metric": metric, "before": _short(before)}
    after = before
    try:
        reason = act()
        after = measure()
        decision = "kept"
        if after < before - (0 if metric == TOP1 else HARM):
            undo()
            decision = "undone"
    except Declined as declined:
        undo()
        decision, reason = "declined", str(declined)
    gain = after - before if decision != "declined" else 0.0
    entry |= {"after": _short(after), "gain": _short(gain), "decision": decision, "reason": reason}
    prepared.log.append(entry | {"seconds": round(time.monotonic() - start, 2)})
    return after if decision == "kept" else before


def _short(value: float) -> float:
    return round(value, 4)


Scales = dict[Quantizer, Numbers]
State = tuple[dict[str, Tensor], Scales, Scales, dict[str, Tensor]]


def _state(prepared: Prepared) -> State:
    """All numbers of the simulation."""
    parameters = {name: p.detach().clone() for name, p in prepared.module.named_parameters()}
    scales: Scales = {q: (q.scale, q.zero_point) for q in prepared.quantizers.values()}
    return parameters, scales, dict(prepared.chosen), {path: bias.clone() for path, bias in prepared.biases.items()}


def _restore(prepared: Prepared, state: State) -> None:
    parameters, scales, chosen, biases = state
    with torch.no_grad():
        for name, parameter in prepared.module.named_parameters():
            parameter.copy_(parameters[name])
    for quantizer in prepared.quantizers.values():
        quantizer.set(*scales[quantizer])
    prepared.chosen, prepared.biases = dict(chosen), dict(biases)


def open_folder(folder: Path, several: Sequence[Prepared], resume: bool) -> None:
    """Make `folder` ready for finished parts: empty, or with those of the same run, to `resume` it.

    `InputError` where it holds parts of another run.
    """
    found = folder / FINGERPRINT
    wanted = _fingerprint(several)
    if resume and found.is_file():
        if found.read_text() != wanted:
            action = "give the same model, data and options as before, or leave out --resume to begin anew"
            raise InputError(f"'{folder}' holds the work of another run", action=action)
        return
    if folder.exists() and not found.is_file() and any(folder.iterdir()):
        raise InputError(f"cannot keep finished parts in '{folder}'", found="a folder with other files", action="move it away")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found.write_text(wanted)


def _fingerprint(several: Sequence[Prepared]) -> str:
    """What must be the same for finished parts to fit."""
    first = several[0]
    digest = hashlib.sha256()
    for name, parameter in sorted(first.captured.module.state_dict().items()):
        digest.update(name.encode() + parameter.detach().cpu().contiguous().numpy().tobytes())
    content = {
        "qdeploy": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": digest.hexdigest(),
        "recipe": first.recipe.digest,
        "seed": first.seed,
        "samples": first.samples_seen,
        "data": hashlib.sha256(b"".join(t.numpy().tobytes() for batch in first.reference for t in batch)).hexdigest(),
        "targets": [[one.backend.name, [asdict(t) | {"reason": ""} for t in one.plan.tensors]] for one in several],
    }
    return json.dumps(content, sort_keys=True, default=str)
