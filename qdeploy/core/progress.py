"""Progress callbacks: how long work says where it is. A caller that wants to know gives a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

SampleProgress = Callable[[int], None]
"""Called with the number of samples done so far."""


class StepProgress(Protocol):
    """Called with what a step works on, how much of how much is done, and the loss, if there is one."""

    def __call__(self, what: str, done: int, total: int, loss: float | None = None) -> None: ...


def no_progress(samples: int) -> None:
    """A `SampleProgress` that nobody reads."""


def no_step_progress(what: str, done: int, total: int, loss: float | None = None) -> None:
    """A `StepProgress` that nobody reads."""
