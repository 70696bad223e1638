"""The one pass over the data: every observer of every target sees its tensor, and steps get the samples that they work on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from qdeploy.graph.observe import insert_observers
from qdeploy.numerics.multi_observer import MultiObserver
from qdeploy.numerics.observer import Observer, make_observer
from qdeploy.recipes import step_runner
from qdeploy.simulation.insert import observed_tensors
from qdeploy.simulation.plan import Plan
from qdeploy.simulation.prepared import Prepared

HELD = 256
"""Most samples that are held back to judge steps by."""
SHARE = 8
"""One sample of so many is held back, up to `HELD`."""


class KeptSamples:
    """The samples of a stream that steps work on: up to `need` for the steps, and one in `SHARE` more to judge them by."""

    def __init__(self, need: int, dynamic: bool, alike: bool = True):
        self.need = need
        self.dynamic = dynamic
        self.alike = alike
        """Whether all samples must have one size."""
        self.store = TensorStore()
        self.counts = {"steps": 0, "held": 0}
        self._parts: dict[str, list[tuple[Tensor, ...]]] = {"steps": [], "held": []}
        self._labels: list[Tensor] = []
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
        if self.dynamic and size >= SHARE:
            held = min(size // SHARE, HELD - self.counts["held"])
        else:
            held = size if self._batches % SHARE == 0 and self.counts["held"] < HELD else 0
        used = min(size - held, max(0, self.need - self.counts["steps"]))
        if not self.dynamic and used:
            used = size - held  # whole batches, of which there is at least one
        self._keep("steps", tuple(t[:used] for t in batch), used)
        self._keep("held", tuple(t[size - held :] for t in batch), held)
        if labels is not None and held:
            self._labels.append(labels[size - held :])

    def _keep(self, what: str, batch: tuple[Tensor, ...], size: int) -> None:
        if not size:
            return
        copies = []
        for tensor in batch:
            copy = self.store.empty(tensor.shape, tensor.dtype)
            copies.append(copy.copy_(tensor.detach()))
        self._parts[what].append(tuple(copies))
        self.counts[what] += size

    def samples(self) -> tuple[Tensor, ...]:
        """What the steps work on, one tensor an input; where nothing else is left, what they are judged by."""
        return self._joined("steps") or self._joined("held")

    def held(self) -> tuple[Tensor, ...]:
        """What the steps are judged by; of too few samples to hold some back, those that they work on."""
        return self._joined("held") or self._joined("steps")

    def labels(self) -> Tensor | None:
        """The classes of `held`, if they are known."""
        return torch.cat(self._labels) if self._labels and self.counts["held"] else None

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
    """One observer a group of activations; groups of the same tensors with the same statistics have one in `shared`."""
    specs = {planned.group: planned.spec for planned in plan.quantized if planned.spec is not None}
    wanted = [choice for step in step_runner.made_steps(recipe) for choice in step.observers()]
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
    named = {_name(choices[0]): made}
    for choice in choices[1:]:
        with suppress(OptionError):
            named.setdefault(_name(choice), make_observer(choice.observer, spec, choice.options))
    return MultiObserver(spec, named)


def _name(choice: Choice) -> str:
    return " ".join([choice.observer, *(f"{name}={value}" for name, value in sorted(choice.options.items()))])


def observe(
    several: Sequence[Prepared], stream: Iterator[Batch], progress: SampleProgress, labels: Tensor | None, step_progress: StepProgress
) -> KeptSamples:
    """Shape the float graphs by the first samples, then show all data to all observers. Returns the samples that steps work on."""
    first = several[0]
    need, shaped = max(step_runner.samples_needed(one) for one in several), any(step_runner.has_float_steps(one) for one in several)
    kept = KeptSamples(need, first.captured.dynamic_batch, alike=need > 0 or shaped)
    checked = (_checked(first, kept, item) for item in stream)
    head: list[tuple[Tensor, ...]] = []
    if shaped:
        for batch in checked:
            head.append(batch)
            if sum(len(part[0]) for part in head) >= step_runner.PREVIEW:
                break
        preview = [torch.cat(column)[: step_runner.PREVIEW] for column in zip(*head, strict=True)]
        if head:
            step_runner.run_float_steps_for_all(several, preview, step_progress)
    graphs = {id(one.floating): one.floating for one in several}
    observing = [insert_observers(module, _by_tensor([one for one in several if one.floating is module])) for module in graphs.values()]
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
    if not first.samples_seen:
        raise InputError("there is no calibration data", action="give at least one batch")
    return kept


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


def _by_tensor(several: Sequence[Prepared]) -> dict[str, list[Observer]]:
    """The observers that each tensor is shown to, every one once."""
    found: dict[str, list[Observer]] = {}
    for one in several:
        for group, tensors in observed_tensors(one.plan).items():
            for tensor in tensors:
                if all(one.observers[group] is not other for other in found.setdefault(tensor, [])):
                    found[tensor].append(one.observers[group])
    return found
