"""Run the steps of a recipe: measure before and after each on samples that it does not see, keep what helps, undo the rest, log all.

The measure is that of `judge`, the same for all steps: one starts from where the last one left off. First come the ranges that steps
start from, the best of those that the recipe names. Then the steps that edit the float graph: each graph that they can come to is made
before the pass over the data, and observed in it, so that no data is passed twice. Then the others, in `tracks`: where there are
enough samples some are held back to judge by; where there are few, they are cut into FOLDS, and each fold is judged by a simulation
of its own, made without it, while the model itself is made with all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, fx

from qdeploy.core.errors import InputError, OptionError, QDeployError
from qdeploy.core.progress import StepProgress, no_step_progress
from qdeploy.core.recipe import EXTREMES, Choice, Recipe, StepChoice
from qdeploy.core.spec import QuantSpec, Role
from qdeploy.core.version import __version__
from qdeploy.graph import edit, query
from qdeploy.graph.observe import WidthTap
from qdeploy.numerics.metrics import Metric
from qdeploy.numerics.multi_observer import MultiObserver
from qdeploy.numerics.observer import Observer
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.recipes.judge import Judge, Measure
from qdeploy.recipes.step import Declined, Stage, Step, Work, make_step
from qdeploy.simulation.insert import Numbers
from qdeploy.simulation.plan import tail_concats
from qdeploy.simulation.prepared import Prepared

PREVIEW = 64
"""First samples, which steps of the float graph may look at."""
FOLDS = 4
"""How many parts a few samples are cut into."""
MOST_FLOAT_STEPS = 3
"""Each of them doubles the graphs that are observed."""
UNEVEN = 4.0
"""Parts of a concat whose ranges differ by more lose 2 of their bits in one encoding."""
FINGERPRINT = "run.json"


def made_steps(recipe: Recipe) -> list[Step]:
    """The steps of `recipe`, ready to run."""
    return [make_step(choice.step, choice.options) for choice in recipe.steps]


def samples_needed(prepared: Prepared) -> int:
    """How many samples the steps of its recipe work on."""
    return max((step.samples for step in made_steps(prepared.recipe)), default=0)


def is_judged(recipe: Recipe) -> bool:
    """Whether anything in `recipe` is tried and measured."""
    return bool(recipe.starts or recipe.steps)


def has_float_steps(prepared: Prepared) -> bool:
    """Whether its recipe has steps that edit the float graph."""
    return bool(_staged(prepared.recipe, "float"))


def has_simulation_steps(prepared: Prepared) -> bool:
    """Whether its recipe has steps that change the simulation."""
    return bool(_staged(prepared.recipe, "simulation"))


def check_steps(recipe: Recipe) -> None:
    """`OptionError` for a recipe with more steps of the float graph than can be tried in one pass."""
    steps = [choice.step for _, choice, _ in _staged(recipe, "float")]
    if len(steps) > MOST_FLOAT_STEPS:
        what, action = f"recipe '{recipe.name}' has {len(steps)} steps that edit the float graph", "leave some out"
        raise OptionError(what, found=", ".join(steps), allowed=f"up to {MOST_FLOAT_STEPS}", action=action)


def _staged(recipe: Recipe, stage: Stage) -> list[tuple[int, StepChoice, Step]]:
    """The steps of one stage, with their place in the recipe."""
    steps = enumerate(zip(recipe.steps, made_steps(recipe), strict=True))
    return [(number, choice, step) for number, (choice, step) in steps if step.stage == stage]


@dataclass
class FloatState:
    """A float graph that steps can come to, and what is observed of it. `graph` is None where the last of these steps declined."""

    graph: fx.GraphModule | None
    reason: str = ""
    seconds: float = 0.0
    observers: Mapping[str, Observer] = field(default_factory=dict)
    others: Mapping[str, Observer] = field(default_factory=dict)
    """Those of the alternative plan, where there is one."""
    widths: Mapping[str, WidthTap] = field(default_factory=dict)
    """How wide the parts of the concats behind the last layers are."""


States = dict[tuple[int, ...], FloatState]
"""By the places of the steps that were run, in their order."""


def float_states(several: Sequence[Prepared], preview: Sequence[Tensor], progress: StepProgress = no_step_progress) -> list[States]:
    """For each of `several`, the graphs that its steps of the stage `float` can come to. Equal graphs are one, whoever they are for."""
    shared: dict[bytes, fx.GraphModule] = {}
    found = []
    for one in several:
        original = one.floating
        states: States = {(): FloatState(original)}
        for number, _, step in _staged(one.recipe, "float"):
            for applied, state in list(states.items()):
                if state.graph is not None:
                    states[*applied, number] = _shaped(one, step, state.graph, preview, progress)
        one.set_floating(original)
        for state in states.values():
            if state.graph is not None and state.graph is not original:
                state.graph = shared.setdefault(_digest(state.graph), state.graph)
        found.append(states)
    return found


def _shaped(prepared: Prepared, step: Step, graph: fx.GraphModule, preview: Sequence[Tensor], progress: StepProgress) -> FloatState:
    start = time.monotonic()
    prepared.set_floating(edit.copy(graph, own_parameters=True))
    try:
        reason = step.run(Work(prepared, preview, progress=progress))
    except Declined as declined:
        return FloatState(None, str(declined), time.monotonic() - start)
    return FloatState(prepared.floating, reason, time.monotonic() - start)


def _digest(graph: fx.GraphModule) -> bytes:
    """Equal for graphs that compute and know the same."""
    digest = hashlib.sha256(graph.code.encode())
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            known: Sequence[object] = (query.parameter(graph, str(node.target)),)
        else:
            known = node.meta.get("statistics", ())
        for tensor in known:
            assert isinstance(tensor, Tensor)
            digest.update(tensor.detach().contiguous().view(-1).numpy().tobytes())
    return digest.digest()


@dataclass(frozen=True)
class Samples:
    """What steps work on and are judged by: one tensor `[N, ...]` an input, and labels `[N]` where they are known.

    Where `few` there are no others to judge by; they come in whole batches of `unit`.
    """

    work: tuple[Tensor, ...]
    held: tuple[Tensor, ...]
    labels: Tensor | None = None
    few: bool = False
    unit: int = 1

    def folds(self) -> list[slice]:
        """Where the parts of a few samples begin and end; none where there are not two."""
        units = len(self.held[0]) // self.unit
        count = min(FOLDS, units) if self.few else 0
        bounds = [units * place // count * self.unit for place in range(count + 1)] if count > 1 else []
        return [slice(start, stop) for start, stop in pairwise(bounds)]


@dataclass
class _Track:
    """One simulation that all steps go through: it works on `samples`, and is judged by the rows of the judge, if by any."""

    samples: tuple[Tensor, ...]
    rows: slice | None
    tag: str
    state: State


def settle(
    prepared: Prepared,
    states: States,
    samples: Samples | None,
    observer_of: Callable[[Role, QuantSpec], Observer],
    folder: Path | None = None,
    progress: StepProgress = no_step_progress,
    metric: Metric | None = None,
) -> None:
    """Fix all numbers of `prepared` by what was observed, and run the steps of its recipe, judged by `samples` (None: no steps).

    `metric` is that of `Judge`. Finished parts of long steps are kept in `folder`.
    """
    _choose_tail(prepared, states)
    if samples is None:
        _freeze(prepared, states[()], None, observer_of)
        return
    judge = Judge(prepared, samples.held, samples.labels, metric)
    now, start = _start(prepared, states[()], judge, observer_of)
    now = _choose_graph(prepared, states, start, now, judge, observer_of)
    _run_simulation_steps(prepared, samples, judge, now, folder, progress)


def _choose_tail(prepared: Prepared, states: States) -> None:
    """Take the alternative plan where one encoding of a concat behind the last layers would lose one of its parts."""
    if prepared.alternative is None:
        return
    lost = {}
    for concat, parts in tail_concats(prepared.captured.module).items():
        widths = {part: states[()].widths[part].width for part in parts if part in states[()].widths}
        least, most = min(widths.values(), default=0.0), max(widths.values(), default=0.0)
        if 0 < least < most / UNEVEN:
            lost[concat] = f"{concat} puts together " + " and ".join(
                f"{part} (a range of {width:.3g})" for part, width in widths.items()
            )
    if not lost:
        return
    prepared.take_plan(prepared.alternative)
    for state in states.values():
        state.observers = state.others
    where = "stays in float" if not prepared.plan.cuts else "is cut off"
    prepared.notes.append(f"the tail of the network {where}, since one encoding would lose a part: {'; '.join(lost.values())}")


def _freeze(prepared: Prepared, state: FloatState, start: Choice | None, observer_of: Callable[[Role, QuantSpec], Observer]) -> None:
    """Take the graph of `state` and the ranges by `start`, or those of the recipe, where a tensor has no such ones."""
    assert state.graph is not None
    prepared.set_floating(state.graph)
    prepared.take_parameters()
    prepared.observers = state.observers
    seen = state.observers
    if start is not None:
        seen = {group: one.named.get(start.label, one) if isinstance(one, MultiObserver) else one for group, one in seen.items()}
    prepared.freeze(seen, observer_of)


def _start(
    prepared: Prepared, state: FloatState, judge: Judge, observer_of: Callable[[Role, QuantSpec], Observer]
) -> tuple[Measure, Choice | None]:
    """Take the best ranges to start from; their measure, and where they are from (None: the recipe's own).

    Min-max goes first, if it is there, and others must be better by more than the samples may deceive: a sample that is rarer than all
    of them loses nothing in it.
    """
    begun = time.monotonic()
    own = prepared.recipe.activation
    order = sorted((own, *prepared.recipe.starts), key=lambda choice: choice != EXTREMES)
    first = best = None
    taken = own
    frozen: Choice | None = None
    tried: list[str] = []
    for choice in order:
        frozen = None
        try:
            _freeze(prepared, state, None if choice is own else choice, observer_of)
        except QDeployError:  # an observer that these specs do not have, such as KL below 8 bits
            if choice is own:
                raise
            continue
        made, frozen = judge(), choice
        tried.append(f"{choice.label} {made.value:.4g}")
        first = first or made
        if best is None or made.helps(best):
            best, taken = made, choice
    assert first is not None and best is not None  # one is the recipe's own
    start = None if taken is own else taken
    if frozen is not taken:
        _freeze(prepared, state, start, observer_of)
    if len(order) > 1:
        words = f"{taken.label} is the best of {', '.join(tried)}"
        _log(prepared, StepChoice(step="start"), first, best, "kept", words, begun)
    return best, start


def _choose_graph(
    prepared: Prepared,
    states: States,
    start: Choice | None,
    now: Measure,
    judge: Judge,
    observer_of: Callable[[Role, QuantSpec], Observer],
) -> Measure:
    """Go through the steps of the float graph, and keep the graph that is best; its measure."""
    applied: tuple[int, ...] = ()
    for number, choice, _ in _staged(prepared.recipe, "float"):
        state = states[*applied, number]
        begun = time.monotonic() - state.seconds
        if state.graph is None:
            _log(prepared, choice, now, now, "declined", state.reason, begun)
            continue
        _freeze(prepared, state, start, observer_of)
        after = judge()
        kept = after.helps(now)
        _log(prepared, choice, now, after, "kept" if kept else "undone", state.reason, begun)
        if kept:
            applied, now = (*applied, number), after
        else:
            _freeze(prepared, states[applied], start, observer_of)
    return now


def _run_simulation_steps(
    prepared: Prepared, samples: Samples, judge: Judge, now: Measure, folder: Path | None, progress: StepProgress
) -> None:
    """Run the steps of the stage `simulation`."""
    todo = _staged(prepared.recipe, "simulation")
    if not todo:
        return
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    tracks = _tracks(prepared, samples)
    for number, choice, step in todo:
        begun = time.monotonic()
        before = [track.state for track in tracks]
        name = f"{number}.{choice.step}"
        run = partial(_advance, prepared, step, folder=folder, progress=progress)
        after, decision = now, "declined"
        try:
            measures = []
            for track in tracks:
                if track.rows is not None:
                    reason = run(track, name=name + track.tag)
                    measures.append(judge(track.rows))
            after = Measure.joined(measures)
            decision = "kept" if after.helps(now) else "undone"
            for track in tracks:
                if track.rows is None and decision == "kept":
                    reason = run(track, name=name + track.tag)
        except Declined as declined:
            decision, reason = "declined", str(declined)
        if decision != "kept":
            for track, state in zip(tracks, before, strict=True):
                track.state = state
        _restore(prepared, tracks[-1].state)
        _log(prepared, choice, now, after if decision != "declined" else now, decision, reason, begun)
        now = after if decision == "kept" else now


def _tracks(prepared: Prepared, samples: Samples) -> list[_Track]:
    """The simulations that steps go through; the last one is the model itself."""
    state = _state(prepared)
    folds = samples.folds()
    if not folds:
        return [_Track(samples.work, slice(None), "", state)]
    tracks = []
    for place, rows in enumerate(folds):
        others = tuple(torch.cat([tensor[: rows.start], tensor[rows.stop :]]) for tensor in samples.held)
        tracks.append(_Track(others, rows, f".fold{place}", state))
    return [*tracks, _Track(samples.held, None, "", state)]


def _advance(prepared: Prepared, step: Step, track: _Track, *, name: str, folder: Path | None, progress: StepProgress) -> str:
    """Run `step` in one track; what was done, in words."""
    _restore(prepared, track.state)
    work = Work(prepared, track.samples, folder, progress)
    work.step = name
    reason = step.run(work)
    track.state = _state(prepared, track.state)
    return reason


def _log(prepared: Prepared, choice: StepChoice, before: Measure, after: Measure, decision: str, reason: str, begun: float) -> None:
    entry = {
        "step": choice.step,
        "options": dict(choice.options),
        "metric": before.metric,
        "before": _short(before.value),
        "after": _short(after.value),
        "gain": _short(after.gain(before)),
        "decision": decision,
        "reason": reason,
    }
    prepared.log.append(entry | {"seconds": round(time.monotonic() - begun, 2)})


def _short(value: float) -> float:
    return round(value, 4)


@dataclass(frozen=True)
class State:
    """All numbers of a simulation."""

    parameters: dict[str, Tensor]
    scales: dict[Quantizer, Numbers]
    chosen: dict[Quantizer, Numbers]
    biases: dict[str, Tensor]


def _state(prepared: Prepared, like: State | None = None) -> State:
    """The numbers as they are; tensors that are those of `like` are shared with it."""

    def kept(tensors: Iterable[tuple[str, Tensor]], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: known[name] if name in known and torch.equal(known[name], t) else t.detach().clone() for name, t in tensors}

    return State(
        parameters=kept(prepared.module.named_parameters(), like.parameters if like else {}),
        scales={q: (q.scale, q.zero_point) for q in prepared.quantizers.values()},
        chosen=dict(prepared.chosen),
        biases=kept(prepared.biases.items(), like.biases if like else {}),
    )


def _restore(prepared: Prepared, state: State) -> None:
    with torch.no_grad():
        for name, parameter in prepared.module.named_parameters():
            parameter.copy_(state.parameters[name])
    for quantizer in prepared.quantizers.values():
        quantizer.set(*state.scales[quantizer])
    prepared.chosen = dict(state.chosen)
    prepared.biases = {path: bias.clone() for path, bias in state.biases.items()}


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
