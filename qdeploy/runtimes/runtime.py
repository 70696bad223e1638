"""Real runtimes that can run an emitted ONNX file here: one file each, found by name in `runtimes`.

A runtime is a value that says which package it needs and how to open a model. `verify` opens the file that quantizes,
runs the same inputs, and compares with the simulation. Importing this package imports no runtime.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qdeploy.core.errors import NotInstalledError, unknown_name
from qdeploy.core.registry import Registry

Array = NDArray[np.generic]


class Session(Protocol):
    """An opened model."""

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """All outputs for one batch of `inputs`, both in the order of the ONNX graph."""

    def placement(self) -> Mapping[str, int]:
        """Where the nodes run, where the runtime says so: `{"accelerator": 57, "fallback": 0}`; empty otherwise.

        `fallback` counts the compute nodes that the accelerator left to the CPU.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """One runtime.

    `modules` is what it imports, `packages` what pip calls the packages that bring them. `open(path, batch, variant)` opens the
    ONNX file for batches of exactly `batch`, in one of the `variants` (ways to run, such as with and without graph
    optimizations) or of the `others`, which run only where they are named. `min_agreement` is the share of samples whose top-1 must be
    that of the simulation, near-ties left out, and `room` the dB by which its noise may exceed that of quantization. `exact` says that
    every code is the one of the file, wherever the sums are whole numbers and none is a tie of rounding. `any_size` says whether a
    session takes any size of what the file leaves open beyond the batch; others get files without such sizes. `inside` is False where
    the runtime builds its model from the float file and the scale file, so that no tensor of the file that quantizes can be asked for.
    `isolated` says that its libraries may crash or hang: `process.Host` opens it in a process of its own, which has `limit` seconds to
    open a file or to run a batch, and `open` has to be a function that can be imported by its name.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    min_agreement: float
    open: Callable[[Path, int, str], Session]
    variants: tuple[str, ...] = ("default",)
    max_batch: int = 64
    any_size: bool = False
    room: float = 6.0
    exact: bool = False
    inside: bool = True
    isolated: bool = False
    limit: float = 1200.0
    others: tuple[str, ...] = ()

    @property
    def install(self) -> str:
        """The pip command: of its packages, not of an extra of qdeploy, since that works wherever qdeploy came from."""
        return f"pip install {' '.join(self.packages)}"

    def reference(self, variant: str) -> str:
        """What `find_runtime` reads as this variant: `NAME:VARIANT`, or `NAME` where there is one only."""
        return self.name if len(self.variants) + len(self.others) == 1 else f"{self.name}:{variant}"

    def installed(self) -> bool:
        """Whether the runtime's modules can be imported here."""
        return all(importlib.util.find_spec(module) is not None for module in self.modules)

    def require(self) -> None:
        """Raise `NotInstalledError`, with the pip command, where the runtime is not installed."""
        if not self.installed():
            raise NotInstalledError(f"runtime '{self.name}' is not installed", action=self.install)


@contextmanager
def quiet() -> Iterator[None]:
    """Discard what native code writes to the stdout and stderr of the whole process inside the block.

    Exceptions pass through. Not for blocks in which another thread prints.
    """
    saved = [(fd, os.dup(fd)) for fd in (1, 2)]
    _flush()
    null = os.open(os.devnull, os.O_WRONLY)
    for fd, _ in saved:
        os.dup2(null, fd)
    try:
        yield
    finally:
        _flush()
        for fd, copy in saved:
            os.dup2(copy, fd)
            os.close(copy)
        os.close(null)


def _flush() -> None:
    """Empty the buffers of Python and of the C library, which would otherwise be written to the wrong side."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)


runtimes: Registry[Runtime] = Registry("runtime", "qdeploy.runtimes")


def find_runtime(reference: str) -> tuple[Runtime, tuple[str, ...]]:
    """The runtime `NAME` with its `variants`, or `NAME:VARIANT` with that one; `OptionError` for a name that there is not."""
    name, colon, variant = reference.partition(":")
    runtime = runtimes[name]
    if not colon:
        return runtime, runtime.variants
    known = (*runtime.variants, *runtime.others)
    if variant not in known:
        raise unknown_name(f"variant of runtime '{name}':", variant, known)
    return runtime, (variant,)
