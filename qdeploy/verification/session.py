"""Batches of any size on a session of a runtime, which takes one size."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qdeploy.core.backend import LITERAL_RUN
from qdeploy.core.errors import ArtifactError
from qdeploy.export.artifact import Artifact
from qdeploy.export.onnx_file import with_sizes
from qdeploy.runtimes.process import Host
from qdeploy.runtimes.runtime import Session, runtimes

Array = NDArray[Any]

REFERENCE, _, LITERAL = LITERAL_RUN.partition(":")
"""The reference runtime, and its variant that computes node by node what the file says."""


class BatchedSession:
    """Run batches of any size on a session, which takes one size: in pieces, the last one filled up with its last sample.

    Where other sizes are open too, runtimes that take only fixed ones get a copy of the file for the sizes at hand. To be closed, since
    the session may be in a process of its own.
    """

    def __init__(self, artifact: Artifact, path: Path, runtime: str, variant: str):
        self.path, self.runtime, self.variant = path, runtimes[runtime], variant
        self.host = Host(self.runtime)
        self.specs = artifact.specs
        self.tail = _Tail(artifact) if artifact.tail is not None else None
        fixed = [spec.shape[0] for spec in self.specs if spec.shape]
        self.fixed: int | None = fixed[0] if fixed else 1
        self.session: Session | None = None
        self.batch = 0
        self.sizes: dict[str, int] = {}

    def _open(self, inputs: Sequence[Array]) -> Session:
        """The session that is open, or a new one where the open sizes are others."""
        pairs = [(spec.names, array.shape) for spec, array in zip(self.specs, inputs, strict=True)]
        sizes = {name: shape[d] for names, shape in pairs for d, name in names.items() if d}
        if self.session is not None and (sizes == self.sizes or self.runtime.any_size):
            return self.session
        self.batch, self.sizes = self.batch or self.fixed or min(self.runtime.max_batch, len(inputs[0])), sizes
        if not sizes or self.runtime.any_size:
            return self.host.open(self.path, self.batch, self.variant)
        with tempfile.TemporaryDirectory() as folder:
            every = sizes | {spec.names[0]: self.batch for spec in self.specs if 0 in spec.names}
            copy = Path(folder) / self.path.name
            for file in self.path.parent.iterdir():  # some runtimes read model.onnx and the scale file, for samples one by one
                if file.suffix == ".onnx":
                    fixed = with_sizes(onnx.load(file), every if file == self.path else sizes)
                    onnx.save(fixed, copy.with_name(file.name))
                else:
                    copy.with_name(file.name).symlink_to(file.absolute())
            return self.host.open(copy, self.batch, self.variant)

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
        made = self._run(inputs)
        return self.tail(inputs, made) if self.tail is not None else made

    def _run(self, inputs: Sequence[Array]) -> list[Array]:
        """The outputs of the file."""
        count = len(inputs[0])
        self.session = self._open(inputs)
        if count == self.batch:
            return self.session.run(inputs)
        pieces = []
        for start in range(0, count, self.batch):
            piece = [a[start : start + self.batch] for a in inputs]
            short = self.batch - len(piece[0])
            filled = [np.concatenate([a, np.repeat(a[-1:], short, axis=0)]) if short else a for a in piece]
            made = self.session.run(filled)
            if any(o.ndim == 0 or len(o) != self.batch for o in made):
                shapes = [list(o.shape) for o in made]
                raise ArtifactError("an output has no batch dimension, so that batches cannot be split", found=f"shapes {shapes}")
            pieces.append([o[: self.batch - short] for o in made])
        return [np.concatenate(parts) for parts in zip(*pieces, strict=True)]

    def placement(self) -> dict[str, int]:
        assert self.session is not None
        return dict(self.session.placement())

    def close(self) -> None:
        """Give back what the session holds."""
        self.session = None
        self.host.close()


class _Tail:
    """What an artifact's host computes behind the device: from the outputs of the file, those of the model."""

    def __init__(self, artifact: Artifact):
        assert artifact.tail is not None
        self.inputs = [spec.name for spec in artifact.specs]
        self.device, self.outputs = artifact.device_outputs, artifact.outputs
        self.session = runtimes[REFERENCE].open(artifact.tail, 0, "all")
        graph = onnx.load(artifact.tail).graph
        self.reads, self.makes = ([value.name for value in values] for values in (graph.input, graph.output))

    def __call__(self, inputs: Sequence[Array], made: Sequence[Array]) -> list[Array]:
        if len(made) != len(self.device):
            raise ArtifactError("the runtime returned another number of outputs", found=len(made), allowed=len(self.device))
        known = dict(zip(self.inputs, inputs, strict=True)) | dict(zip(self.device, made, strict=True))
        known |= dict(zip(self.makes, self.session.run([known[name] for name in self.reads]), strict=True))
        return [known[name] for name in self.outputs]
