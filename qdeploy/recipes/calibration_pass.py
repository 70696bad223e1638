"""The one pass over the data: every observer of every target sees its tensor, and steps get the samples that they work on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain

import torch
from torch import Tensor, fx

from qdeploy.capture.inputs import Batch
from qdeploy.core.errors import InputError, OptionError
from qdeploy.core.progress import SampleProgress, StepProgress
from qdeploy.core.recipe import Choice, Recipe
from qdeploy.core.spec import QuantSpec, Role
from qdeploy.graph.flow import TensorStore
from qdeploy.graph.observe import WidthTap, insert_observers
from qdeploy.numerics.multi_observer import MultiObserver
from qdeploy.numerics.observer import Observer, make_observer
from qdeploy.recipes import step_runner
from qdeploy.recipes.step_runner import Samples, States
from qdeploy.simulation.insert import observed_tensors
from qdeploy.simulation.plan import Plan, tail_concats
from qdeploy.simulation.prepared import Prepared

HELD = 256
"""Most samples that are held back to judge steps by."""
SHARE, EARLY_SHARE = 8, 4
"""One sample of so many is held back, up to `HELD`; of the first EARLY samples more, so that a few tell something."""
EARLY = 64
FEW = 32
"""Up to so many samples are few: then none is held back, but they are judged in folds."""


class KeptSamples:
    """The samples of a stream that steps work on: up to `need` for the steps, and one in `SHARE` more to judge them by.

    unit: how many samples there are at once, where the model fixes it; None where it does not. folds: whether few samples are cut into
    folds, for which each step runs several times.
    """

    def __init__(self, need: int, unit: int | None, alike: bool = True, folds: bool = True):
        self.need = need
        self.unit = unit
        self.alike = alike
        """Whether all samples must have one size."""
        self.folds = folds
        self.store = TensorStore()
        self.counts = {"steps": 0, "held": 0}
        self.seen = 0
        self._parts: dict[str, list[tuple[Tensor, ...]]] = {"steps": [], "held": [], "first": []}
        self._labels: dict[str, list[Tensor]] = {"held": [], "first": []}
        self._batches = 0
        self._shapes: list[list[int]] = []

    def check(self, batch: Sequence[Tensor]) -> None:
        """`InputError` where steps are to work on samples of several sizes: they compute all of them at once."""
        shapes = [list(tensor.shape[1:]) for tensor in batch]
        self._shapes = self._shapes or shapes
        if self.alike and shapes != self._shapes:
            found = f"samples of {shapes} behind some of {self._shapes}"
            action = "pad or cut all samples to one size, or use a recipe without steps, such as 'plain' or 'fast'"
            raise InputError("the steps of this recipe need samples of one size", found=found, action=action)

    def add(self, batch: Sequence[Tensor], labels: Tensor | None) -> None:
        """Take from the next batch what is wanted."""
        self._batches += 1
        if not self.need:
            return
        size = len(batch[0])
        if self.folds and self.seen + size <= FEW:
            self._keep("first", tuple(batch), size)
            if labels is not None:
                self._labels["first"].append(labels)
        elif self._parts["first"]:
            self._parts["first"], self._labels["first"] = [], []  # they are not few
        share = EARLY_SHARE if self.seen < EARLY else SHARE
        self.seen += size
        if self.unit is None and size >= share:
            held = min(size // share, HELD - self.counts["held"])
        else:
            held = size if self._batches % share == 0 and self.counts["held"] < HELD else 0
        used = min(size - held, max(0, self.need - self.counts["steps"]))
        if self.unit is not None and used:
            used = size - held  # whole batches, of which there is at least one
        self._keep("steps", tuple(t[:used] for t in batch), used)
        self._keep("held", tuple(t[size - held :] for t in batch), held)
        if labels is not None and held:
            self._labels["held"].append(labels[size - held :])

    def _keep(self, what: str, batch: tuple[Tensor, ...], size: int) -> None:
        if not size:
            return
        copies = []
        for tensor in batch:
            copy = self.store.empty(tensor.shape, tensor.dtype)
            copies.append(copy.copy_(tensor.detach()))
        self._parts[what].append(tuple(copies))
        if what in self.counts:
            self.counts[what] += size

    def samples(self) -> Samples | None:
        """What steps work on, and what they are judged by; None where nothing was to be kept."""
        if not self.need:
            return None
        first = self._joined("first")
        if first:
            return Samples(first, first, self._labelled("first"), few=True, unit=self.unit or 1)
        steps, held = self._joined("steps"), self._joined("held")
        return Samples(steps or held, held or steps, self._labelled("held") if held else None, unit=self.unit or 1)

    def _labelled(self, what: str) -> Tensor | None:
        return torch.cat(self._labels[what]) if self._labels[what] else None

    def _joined(self, what: str) -> tuple[Tensor, ...]:
        parts = self._parts[what]
        if len(parts) > 1:
            whole = []
            for column in zip(*parts, strict=True):
                room = self.store.empty((sum(map(len, column)), *column[0].shape[1:]), column[0].dtype)
                whole.append(torch.cat(column, out=room))
            self._parts[what] = parts = [tuple(whole)]
        return parts[0] if parts else ()


def make_observers(plan: Plan, recipe: Recipe, shared: dict[object, Observer]) -> dict[str, Observer]:
    """One observer a group of activations; groups of the same tensors with the same statistics have one in `shared`.

    `shared` is for the targets that are observed in one graph: the tensors of another have the same names, and other values.
    """
    specs = {planned.group: planned.spec for planned in plan.quantized if planned.spec is not None}
    wanted = [*recipe.starts, *(choice for step in step_runner.made_steps(recipe) for choice in step.observers())]
    observers: dict[str, Observer] = {}
    for group, tensors in observed_tensors(plan).items():
        choices = (recipe.choice("activation", specs[group]), *wanted)
        key = (repr(choices), specs[group].axis, frozenset(tensors))
        if key not in shared:
            shared[key] = _observers(choices, specs[group])
        observers[group] = shared[key]
    return observers


def observer_of(recipe: Recipe, role: Role, spec: QuantSpec) -> Observer:
    """The observer that `recipe` has for tensors of a role and spec."""
    choice = recipe.choice(role, spec)
    return make_observer(choice.observer, spec, choice.options)


def _observers(choices: Sequence[Choice], spec: QuantSpec) -> Observer:
    """The observer of the first choice, or one that has them all; a choice is left out that refuses the spec."""
    made = make_observer(choices[0].observer, spec, choices[0].options)
    if len(choices) == 1:
        return made
    named = {choices[0].label: made}
    for choice in choices[1:]:
        with suppress(OptionError):
            named.setdefault(choice.label, make_observer(choice.observer, spec, choice.options))
    return MultiObserver(spec, named)


def observe(
    several: Sequence[Prepared], stream: Iterator[Batch], progress: SampleProgress, labels: Tensor | None, step_progress: StepProgress
) -> tuple[list[States], Samples | None]:
    """Make the float graphs that steps can come to, and show all data to all observers of each.

    Returns these graphs with what was observed, for each of `several`, and the samples that steps work on.
    """
    first = several[0]
    kept = _kept_samples(several)
    checked = (_checked(first, kept, item) for item in stream)
    head: list[tuple[Tensor, ...]] = []
    preview: Sequence[Tensor] = ()
    if any(map(step_runner.has_float_steps, several)):
        for batch in checked:
            head.append(batch)
            if sum(len(part[0]) for part in head) >= step_runner.PREVIEW:
                break
        preview = [torch.cat(column)[: step_runner.PREVIEW] for column in zip(*head, strict=True)]
    if not head:
        begun = next(checked, None)
        head = [] if begun is None else [begun]
    if not head:
        raise InputError("there is no calibration data", action="give at least one batch")
    states = step_runner.float_states(several, preview, step_progress)
    observing = _observing(several, states)
    with torch.no_grad():
        for batch in chain(head, checked):
            for module in observing:
                _show(module, batch)
            first.remember(batch)
            here = slice(first.samples_seen, first.samples_seen + len(batch[0]))
            first.samples_seen = here.stop
            if labels is not None and len(labels) < here.stop:
                raise InputError("there are fewer labels than samples", found=len(labels), action="give one label a sample")
            kept.add(batch, None if labels is None else labels[here])
            progress(first.samples_seen)
    return states, kept.samples()


def _kept_samples(several: Sequence[Prepared]) -> KeptSamples:
    """What is to be kept for the steps of all."""
    first = several[0]
    need = max(max(step_runner.samples_needed(one), FEW) if step_runner.is_judged(one.recipe) else 0 for one in several)
    folds = not any(step.long for one in several for step in step_runner.made_steps(one.recipe))
    return KeptSamples(need, None if first.captured.dynamic_batch else first.batch_size, alike=need > 0, folds=folds)


def _observing(several: Sequence[Prepared], states: Sequence[States]) -> list[fx.GraphModule]:
    """Give every state its observers, and make each graph with all that hang on it."""
    graphs: dict[int, fx.GraphModule] = {}
    shared: dict[int, dict[object, Observer]] = {}
    shown: dict[int, dict[str, list[Observer]]] = {}
    widths: dict[int, dict[str, WidthTap]] = {}
    for one, own in zip(several, states, strict=True):
        for applied, state in own.items():
            if state.graph is None:
                continue
            key = id(state.graph)
            graphs[key] = state.graph
            state.observers = make_observers(one.plan, one.recipe, shared.setdefault(key, {}))
            _add_by_tensor(shown.setdefault(key, {}), one.plan, state.observers)
            if one.alternative is None:
                continue
            state.others = make_observers(one.alternative, one.recipe, shared[key])
            _add_by_tensor(shown[key], one.alternative, state.others)
            if not applied:  # what a concat puts together in the model as it is
                found = widths.setdefault(key, {})
                parts = [part for parts in tail_concats(state.graph).values() for part in parts]
                state.widths = {part: found.setdefault(part, WidthTap()) for part in parts}
    return [insert_observers(graph, shown[key], widths.get(key)) for key, graph in graphs.items()]


def _add_by_tensor(found: dict[str, list[Observer]], plan: Plan, observers: Mapping[str, Observer]) -> None:
    """Add to `found` the observers that each tensor is shown to, every one once."""
    for group, tensors in observed_tensors(plan).items():
        for tensor in tensors:
            if all(observers[group] is not other for other in found.setdefault(tensor, [])):
                found[tensor].append(observers[group])


def _checked(prepared: Prepared, kept: KeptSamples, item: Batch) -> tuple[Tensor, ...]:
    batch = prepared.batch(item)
    kept.check(batch)
    return batch


def _show(module: fx.GraphModule, batch: Sequence[Tensor]) -> None:
    """Run `module` on a batch, whose open sizes may be none that it computes at, such as an odd height."""
    try:
        module(*batch)
    except (RuntimeError, IndexError) as error:
        found = f"{[list(tensor.shape) for tensor in batch]}: {str(error).splitlines()[0]}"
        action = "give batches of sizes that the model itself computes"
        raise InputError("the model cannot compute a batch", found=found, action=action) from error
