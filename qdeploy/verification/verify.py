"""Prove an artifact: run what was written, on real runtimes, and compare with what was simulated.

Everything is read from the folder. Per runtime: the share of samples with the simulation's top-1, the SQNR

    10 log10( sum s^2 / sum (s - r)^2 )   in dB, of runtime outputs r against simulated outputs s

and the largest |s - r| in steps of the output's scale (of its range / 255 where the output is float). With labels, accuracy too.
The simulated outputs are those saved in the folder; for other data they come from the `Prepared` at hand, or else from the literal
run of the ONNX file (ONNX Runtime without any optimization), which the saved outputs are compared with first.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import fx

from qdeploy.capture.inputs import Batch, checked
from qdeploy.core.errors import ArtifactError, InputError, QDeployError, one_line
from qdeploy.core.progress import SampleProgress, no_progress
from qdeploy.core.spec import TensorSpec
from qdeploy.export.artifact import Artifact, missing_names
from qdeploy.export.onnx_file import tensor_names, with_sizes
from qdeploy.graph.flow import run
from qdeploy.runtimes.runtime import Runtime, Session, find_runtime, runtimes
from qdeploy.simulation.prepared import Prepared

Array = NDArray[Any]
Outputs = Callable[[Sequence[Array]], list[Array]]

MIN_SQNR = 20.0
"""dB, below which a runtime does not compute what was simulated, whatever its top-1 says."""
INEXACT = 0.995
"""Share of samples with the simulation's top-1 that is asked where no choice of scales keeps all sums off the ties of rounding: with
logarithmic, half-precision and wide codes, and where ops between layers stay in float."""
LITERAL = "none"
"""The variant of ONNX Runtime that computes node by node what the file says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row: a runtime in one variant, or the float model or the simulation."""

    name: str
    samples: int
    bytes: int
    agreement: float | None = None
    sqnr: float | None = None
    max_steps: float | None = None
    accuracy: float | None = None
    placement: dict[str, int] = field(default_factory=dict)
    checked: bool = False
    faults: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the row meets its thresholds."""
        return not self.faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All rows, and what is wrong with the folder itself."""

    results: tuple[Result, ...]
    faults: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the artifact meets all its checks."""
        return not self.faults and all(result.passed for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the manifest and `--json`."""
        return {"passed": self.passed, "faults": list(self.faults), "results": [asdict(r) for r in self.results]}


class _Score:
    """Running comparison of outputs with simulated ones; memory does not grow with the samples."""

    def __init__(self, steps: Sequence[float]):
        self.steps = steps
        self.samples = self.same = self.right = self.labelled = 0
        self.signal = self.noise = self.worst = 0.0
        self.ranked = True

    def add(self, simulated: Sequence[Array], made: Sequence[Array], labels: Array | None) -> None:
        for s, r, step in zip(simulated, made, self.steps, strict=True):
            if s.shape != r.shape:
                raise ArtifactError("a runtime returned another shape", found=list(r.shape), allowed=list(s.shape))
            difference = s.astype(np.float64) - r.astype(np.float64)
            self.signal += float(np.square(s, dtype=np.float64).sum())
            self.noise += float(np.square(difference).sum())
            self.worst = max(self.worst, float(np.abs(difference).max(initial=0.0)) / step)
        first, ours = simulated[0], made[0]
        self.samples += len(first) if first.ndim else 1
        self.ranked &= first.ndim == 2 and first.shape[1] > 1
        if self.ranked:
            top = ours.argmax(1)
            self.same += int((first.argmax(1) == top).sum())
            if labels is not None:
                self.right += int((top == labels).sum())
                self.labelled += len(labels)

    def result(self, name: str, size: int, runtime: Runtime | None, placement: dict[str, int]) -> Result:
        agreement = self.same / self.samples if self.ranked and self.samples else None
        finite = math.isfinite(self.noise)
        sqnr = -math.inf if not finite else math.inf if self.noise == 0 else 10 * math.log10(max(self.signal, 1e-300) / self.noise)
        faults = [] if finite else ["its outputs hold NaN or infinity"]
        if runtime is not None:
            # one sample may always sit on the edge between two classes
            if agreement is not None and self.samples - self.same > max(1, (1 - runtime.min_agreement) * self.samples):
                faults.append(f"top-1 agreement {agreement:.2%} is below {runtime.min_agreement:.1%}")
            if not sqnr >= MIN_SQNR:
                faults.append(f"SQNR {sqnr:.1f} dB is below {MIN_SQNR:.0f} dB")
            if placement.get("fallback", 0):
                faults.append(f"{placement['fallback']} compute nodes fell back to the CPU")
        return Result(
            name=name,
            samples=self.samples,
            bytes=size,
            agreement=agreement,
            sqnr=max(-999.0, min(sqnr, 999.0)),
            max_steps=round(self.worst, 3) if finite else None,
            accuracy=self.right / self.labelled if self.labelled else None,
            placement=placement,
            checked=runtime is not None,
            faults=tuple(faults),
        )


class _Row:
    """One way to compute outputs, and its score. `size` is that of the file it runs."""

    def __init__(self, name: str, outputs: Outputs, size: int, runtime: Runtime | None, placement: Callable[[], dict[str, int]]):
        self.name = name
        self.outputs = outputs
        self.size = size
        self.runtime = runtime
        self.placement = placement
        self.score: _Score | None = None
        self.failure = ""

    def run(self, inputs: Sequence[Array]) -> list[Array] | None:
        """The outputs, or None where they cannot be computed: that is a result, and no reason to lose the artifact or other rows."""
        try:
            return None if self.failure else self.outputs(inputs)
        except Exception as error:  # a vendor's library may raise anything
            self.failure = f"could not run: {error if isinstance(error, QDeployError) else one_line(error)}"
            return None

    def add(self, made: Sequence[Array], simulated: Sequence[Array], labels: Array | None, steps: Sequence[float]) -> None:
        self.score = self.score or _Score(steps)
        self.score.add(simulated, made, labels)

    def result(self) -> Result:
        if self.failure:
            return Result(name=self.name, samples=0, bytes=self.size, checked=True, faults=(self.failure,))
        assert self.score is not None
        return self.score.result(self.name, self.size, self.runtime, self.placement())


def verify_artifact(
    artifact: Artifact,
    batches: Iterable[Batch] | None = None,
    runtime: str | Sequence[str] | None = None,
    labels: Array | None = None,
    simulation: Prepared | None = None,
    progress: SampleProgress = no_progress,
) -> Report:
    """Check `artifact`, on its saved samples or on `batches`, in `runtime` (default: all of its backend's that are installed).

    `labels` `[N]` are class numbers. `simulation` is the prepared model, where it is still at hand. All runtimes see each batch in
    turn, so the data is passed once; `progress` is told the samples done. The report also goes into qdeploy.json.
    """
    artifact.check_whole()
    chosen = _choose(artifact, runtime)
    faults = missing_names(artifact.encodings, artifact.manifest["planned"], tensor_names(artifact.load(artifact.model)))
    faults += _number_faults(artifact)
    saved = _saved(artifact)
    steps = _steps(artifact, saved.simulated)
    references, data = _references(artifact, batches, simulation, saved)
    rows = [_runtime_row(artifact, way, variant) for way, variant in chosen]
    if batches is not None and simulation is None:
        faults += _literal_faults(artifact, saved, steps)
    _compare(references, rows, data, labels, steps, progress)
    report = Report(results=tuple(row.result() for row in (*references, *rows)), faults=tuple(faults))
    artifact.record("verify", report.to_json())
    return report


def _compare(
    references: Sequence[_Row],
    rows: Sequence[_Row],
    data: Iterable[list[Array]],
    labels: Array | None,
    steps: Sequence[float],
    progress: SampleProgress,
) -> None:
    """Show all data to all rows, which are compared with the last of `references`."""
    done = 0
    for inputs in data:
        count = len(inputs[0])
        part = None if labels is None else labels[done : done + count]
        if labels is not None and len(labels) < done + count:
            raise InputError("there are fewer labels than samples", found=f"{len(labels)} labels", action="give one label per sample")
        simulated = references[-1].outputs(inputs)
        for row in (*references, *rows):
            made = simulated if row is references[-1] else row.run(inputs)
            if made is not None:
                row.add(made, simulated, part, steps)
        done += count
        progress(done)
    if done == 0:
        raise InputError("there is no data to verify with", action="give at least one sample")
    if labels is not None and len(labels) != done:
        raise InputError("there are more labels than samples", found=f"{len(labels)} labels, {done} samples")


def _choose(artifact: Artifact, names: str | Sequence[str] | None) -> list[tuple[Runtime, str]]:
    """The ways to run: every variant of the named runtimes, or the named variant of `NAME:VARIANT`."""
    chosen = []
    for name in artifact.manifest["runtimes"] if names is None else (names,) if isinstance(names, str) else names:
        runtime, variants = find_runtime(name)
        if names is None and not runtime.installed():
            continue
        runtime.require()
        chosen += [(runtime, variant) for variant in variants]
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Saved:
    inputs: list[Array]
    float_outputs: list[Array]
    simulated: list[Array]


def _saved(artifact: Artifact) -> _Saved:
    arrays = artifact.reference()
    wanted = [f"input.{spec['name']}" for spec in artifact.inputs]
    wanted += [f"{kind}.{name}" for kind in ("float", "simulated") for name in artifact.outputs]
    missing = [name for name in wanted if name not in arrays or (name.startswith("input.") and not arrays[name].ndim)]
    if missing:
        raise ArtifactError(f"the saved samples have no '{missing[0]}'", action="quantize the model again")
    return _Saved(
        inputs=[arrays[f"input.{spec['name']}"] for spec in artifact.inputs],
        float_outputs=[arrays[f"float.{name}"] for name in artifact.outputs],
        simulated=[arrays[f"simulated.{name}"] for name in artifact.outputs],
    )


def _steps(artifact: Artifact, simulated: Sequence[Array]) -> list[float]:
    scales = {e.tensor: float(e.scale.max()) for e in artifact.encodings if e.role == "activation" and e.spec.linear}
    return [scales.get(name) or max(float(np.ptp(s)) / 255, 1e-12) for name, s in zip(artifact.outputs, simulated, strict=True)]


def _references(
    artifact: Artifact, batches: Iterable[Batch] | None, prepared: Prepared | None, saved: _Saved
) -> tuple[list[_Row], Iterable[list[Array]]]:
    """The rows of the float model and of the simulation (last), and the data."""
    float_size, size = artifact.manifest["float_bytes"], artifact.simulation.stat().st_size

    def row(name: str, outputs: Outputs, bytes: int) -> _Row:
        return _Row(name, outputs, bytes, None, dict)

    if batches is None:
        rows = [row("float", lambda _: saved.float_outputs, float_size), row("simulated", lambda _: saved.simulated, size)]
        return rows, [saved.inputs]
    data = _arrays(batches, artifact)
    if prepared is not None:
        return [
            row("float", lambda inputs: _torch(prepared.captured.module, inputs), float_size),
            row("simulated", lambda inputs: _torch(prepared.module, inputs), size),
        ], data
    literal = row("simulated (ONNX, node by node)", _BatchedSession(artifact, artifact.simulation, "onnxruntime", LITERAL), size)
    if artifact.simulation == artifact.model:
        return [literal], data
    changed = any(entry["decision"] == "kept" for entry in artifact.manifest.get("steps", []))
    name = "model.onnx in float" if changed else "float"  # its weights and biases are those of the simulation
    return [row(name, _BatchedSession(artifact, artifact.model, "onnxruntime", LITERAL), float_size), literal], data


def _torch(module: fx.GraphModule, inputs: Sequence[Array]) -> list[Array]:
    tensors = [torch.from_numpy(array) for array in inputs]
    return [made.numpy() for made in run(module, tensors, len(tensors[0]))]


def _arrays(batches: Iterable[Batch], artifact: Artifact) -> Iterator[list[Array]]:
    specs = [TensorSpec.from_json(spec) for spec in artifact.inputs]
    for batch in batches:
        yield [tensor.detach().cpu().numpy() for tensor in checked(batch, specs)]


def _number_faults(artifact: Artifact) -> list[str]:
    """The encodings whose numbers are not those of the file that quantizes."""
    model = artifact.load(artifact.simulation)
    names = tensor_names(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    faults = []
    for encoding in artifact.encodings:
        # half-precision tensors have no numbers, but a node that makes them so
        kind = "DequantizeLinear" if encoding.spec.linear else "LogDequantize" if encoding.spec.grid == "log" else "Cast"
        node = nodes.get(f"{encoding.tensor}_{kind}")
        found = (
            [numpy_helper.to_array(constants[name]).reshape(-1) for name in node.input[1:]]
            if node and constants.keys() >= set(node.input[1:])
            else []
        )
        numbers: dict[str, list[Array]] = {
            "DequantizeLinear": [encoding.scale, encoding.zero_point],
            "LogDequantize": [encoding.scale],
        }
        wanted = numbers.get(kind, [])
        same = node and len(found) == len(wanted) and all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        if encoding.tensor in names and not same:
            faults.append(f"encoding '{encoding.tensor}' has other numbers than {artifact.simulation.name}")
    return faults


def _literal_faults(artifact: Artifact, saved: _Saved, steps: Sequence[float]) -> list[str]:
    """What is wrong between the simulation's saved outputs and the literal run of the file, which is about to stand for it."""
    score = _Score(steps)
    score.add(saved.simulated, _BatchedSession(artifact, artifact.simulation, "onnxruntime", LITERAL)(saved.inputs), None)
    result = score.result("", 0, _asked(artifact, runtimes["onnxruntime"]), {})
    return [f"{artifact.simulation.name} does not compute the saved simulation: {fault}" for fault in result.faults]


def _runtime_row(artifact: Artifact, runtime: Runtime, variant: str) -> _Row:
    feed = _BatchedSession(artifact, artifact.simulation, runtime.name, variant)
    name = runtime.name if len(runtime.variants) == 1 else f"{runtime.name}:{variant}"
    return _Row(name, feed, artifact.simulation.stat().st_size, _asked(artifact, runtime), feed.placement)


def _asked(artifact: Artifact, runtime: Runtime) -> Runtime:
    """`runtime` with the agreement that is asked of it."""
    if artifact.manifest["tie_free"]:
        return runtime
    return replace(runtime, min_agreement=min(runtime.min_agreement, INEXACT))


class _BatchedSession:
    """Run batches of any size on a session, which takes one size: in pieces, the last one filled up with its last sample.

    Where other sizes are open too, runtimes that take only fixed ones get a copy of the file for the sizes at hand.
    """

    def __init__(self, artifact: Artifact, path: Path, runtime: str, variant: str):
        self.path, self.runtime, self.variant = path, runtimes[runtime], variant
        self.specs = [TensorSpec.from_json(spec) for spec in artifact.inputs]
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
            return self.runtime.open(self.path, self.batch, self.variant)
        with tempfile.TemporaryDirectory() as folder:
            every = sizes | {spec.names[0]: self.batch for spec in self.specs if 0 in spec.names}
            copy = Path(folder) / self.path.name
            for file in self.path.parent.iterdir():  # some runtimes read model.onnx and the scale file, for samples one by one
                if file.suffix == ".onnx":
                    fixed = with_sizes(onnx.load(file), every if file == self.path else sizes)
                    onnx.save(fixed, copy.with_name(file.name))
                else:
                    copy.with_name(file.name).symlink_to(file.absolute())
            return self.runtime.open(copy, self.batch, self.variant)

    def __call__(self, inputs: Sequence[Array]) -> list[Array]:
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
