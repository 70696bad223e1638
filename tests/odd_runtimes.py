"""Runtimes that crash, hang, refuse or work, for processes of their own: light to import, since each of these does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdeploy.core.errors import ArtifactError
from qdeploy.runtimes.runtime import Runtime, Session


@dataclass
class Working:
    """Adds one, and says in which process."""

    crash: Callable[[], object] | None = None

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        if self.crash is not None:
            self.crash()
        return [value + 1 for value in inputs]

    def placement(self) -> dict[str, int]:
        return {"accelerator": os.getpid(), "fallback": 0}


def segfault() -> None:
    os.write(2, b"loading kernels\nvector::_M_range_check\n")
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    time.sleep(600)


def works(path: Path, batch: int, variant: str) -> Session:
    return Working()


def crashes_at_work(path: Path, batch: int, variant: str) -> Session:
    return Working(segfault)


def hangs_at_work(path: Path, batch: int, variant: str) -> Session:
    return Working(hang)


def crashes(path: Path, batch: int, variant: str) -> Session:
    segfault()
    return Working()


def exits(path: Path, batch: int, variant: str) -> Session:
    os._exit(7)


def hangs(path: Path, batch: int, variant: str) -> Session:
    hang()
    return Working()


def refuses(path: Path, batch: int, variant: str) -> Session:
    raise ArtifactError(f"cannot read '{path.name}'", found=variant, action="choose another runtime")


def raises(path: Path, batch: int, variant: str) -> Session:
    raise NotImplementedError("weights\nof 1e-20")


def runtime(opened: Callable[[Path, int, str], Session], limit: float = 60) -> Runtime:
    return Runtime(name="own", title="", modules=("json",), packages=(), min_agreement=0, open=opened, isolated=True, limit=limit)
