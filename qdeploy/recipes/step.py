"""What a step of a recipe is, and what it works on.

A step changes the numbers of one prepared model: weights, biases, scales. The steps themselves are files of `calibration/`, found by
name in `steps`. None of them judges itself: `step_runner` measures the model before and after each, and keeps what helps.
"""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx

from qdeploy.core.errors import InputError, OptionError
from qdeploy.core.progress import StepProgress, no_step_progress
from qdeploy.core.recipe import Choice
from qdeploy.core.registry import Registry
from qdeploy.graph.flow import Flow, TensorStore
from qdeploy.numerics.observer import Observer, check_options
from qdeploy.simulation.prepared import Prepared

Stage = Literal["float", "simulation"]
Changed = dict[str, Tensor]


class Declined(Exception):
    """A step has nothing to do on this model; the text says why."""


class Work:
    """One prepared model while the steps of its recipe run.

    samples: kept calibration samples, one tensor `[N, ...]` an input. folder: where finished parts of long steps are kept.
    """

    def __init__(
        self, prepared: Prepared, samples: Sequence[Tensor], folder: Path | None = None, progress: StepProgress = no_step_progress
    ):
        self.prepared = prepared
        self.samples = tuple(samples)
        self.folder = folder
        self.progress = progress
        self.store = TensorStore()
        self.step = ""
        """A name of the running step that no other of the recipe has."""

    @property
    def float_module(self) -> fx.GraphModule:
        """The float graph with the parameters before quantization: what steps of the stage `float` edit."""
        return self.prepared.floating

    @property
    def seed(self) -> int:
        """Of everything random."""
        return self.prepared.seed

    def observer(self, group: str) -> Observer:
        """What was seen of a group of activations."""
        return self.prepared.observers[group]

    def flow(self, module: fx.GraphModule, samples: int) -> Flow:
        """The values of `module`, the simulation or the float graph, on up to so many of the kept samples."""
        batch = self.prepared.batch_size
        count = min(samples, len(self.samples[0]))
        count -= count % batch if not self.prepared.captured.dynamic_batch else 0
        return Flow(module, [tensor[:count] for tensor in self.samples], self.store, batch)

    def make_consistent(self) -> None:
        """Make all numbers fit each other again, after chosen scales or biases have changed."""
        self.prepared.make_consistent()

    def checkpoint(self, key: str, compute: Callable[[], Changed]) -> Changed:
        """What `compute` returns, kept in the folder under `key`; after an interruption it is read there instead."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{self.step}.{key.replace('/', '_')}.safetensors"
        if path.is_file():
            try:
                return load_file(path)
            except Exception as error:  # safetensors raises its own kinds
                action = "leave out --resume to begin anew"
                raise InputError(f"cannot read '{path}'", found=str(error), action=action) from error
        made = compute()
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file({name: tensor.detach().contiguous() for name, tensor in made.items()}, temporary)
        temporary.replace(path)
        return made


class Step(ABC):
    """One step. Subclasses take their options as keyword arguments with defaults, and register with `@step(name)`."""

    stage: ClassVar[Stage] = "simulation"
    """`float` steps keep what the network computes and run before ranges are observed; the others change the simulation."""
    needs_biases: ClassVar[bool] = False
    """Whether every layer must have a bias, if only of zeros."""
    long: ClassVar[bool] = False
    """Whether it takes so long that it is not run for every fold of a few samples, but judged by a share of them."""
    samples: int = 0
    """How many calibration samples it wants to be kept."""

    def observers(self) -> tuple[Choice, ...]:
        """What it wants to have observed of every activation, besides the recipe's own choice."""
        return ()

    @abstractmethod
    def run(self, work: Work) -> str:
        """Change the model in place; returns in words what was done. `Declined` where there is nothing to do."""


steps: Registry[type[Step]] = Registry("step", "qdeploy.calibration")


def step(name: str) -> Any:
    """Class decorator: register a `Step` under `name`."""
    return lambda cls: steps.add(name, cls)


def step_options(name: str) -> dict[str, object]:
    """The options of the step `name` with their defaults."""
    parameters = inspect.signature(steps[name].__init__).parameters
    return {p.name: p.default for p in parameters.values() if p.name != "self"}


def make_step(name: str, options: Mapping[str, object]) -> Step:
    """The step `name`; `OptionError` for an option that it does not have or a value that it refuses."""
    check_options(f"step '{name}'", options, step_options(name))
    return steps[name](**options)


def fraction(name: str, value: object, low: float = 0.0, high: float = 1.0) -> float:
    """`value` as an option between `low` and `high`; `OptionError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise OptionError(name, found=repr(value), allowed=f"{low:g} to {high:g}")
    return float(value)


def count(name: str, value: object, low: int = 1, high: int = 2**31) -> int:
    """`value` as an option that is a whole number between `low` and `high`; `OptionError` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise OptionError(name, found=repr(value), allowed=f"whole numbers from {low} to {high}")
    return value


def flag(name: str, value: object) -> bool:
    """`value` as an option that is true or false; `OptionError` otherwise."""
    if not isinstance(value, bool):
        raise OptionError(name, found=repr(value), allowed="true or false")
    return value


def generator(seed: int, *parts: int) -> torch.Generator:
    """Random numbers of their own for one part of the work, so that it comes out the same when others were done before."""
    mixed = seed
    for part in parts:
        mixed = (mixed * 1_000_003 + part + 1) % (2**63)
    return torch.Generator().manual_seed(mixed)
