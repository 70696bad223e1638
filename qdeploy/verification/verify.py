"""Prove an artifact: run what was written, on real runtimes, and compare with what was simulated.

Everything is read from the folder. Per runtime: the share of samples with the simulation's top-1, the SQNR

    10 log10( sum s^2 / sum (s - r)^2 )   in dB, of runtime outputs r against simulated outputs s

of the output where it is least, and the largest |s - r| in steps of the output's scale (of its range / 255 where the output is float).
With labels, accuracy too. What follows from these numbers on so many samples is said by `qdeploy.verification.verdict`.
The simulated outputs are those saved in the folder; for other data they come from the `Prepared` at hand, or else from the literal
run of the ONNX file (ONNX Runtime without any optimization), which the saved outputs are compared with first.

Not every row decides: the artifact passes where the vendor's own runtime and the literal run do (`Artifact.decides`), and whatever else
the user named. The others show what else runs the file. Whatever a runtime does ends as a row.
"""

from __future__ import annotations

import errno
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import fx

from qdeploy.capture.inputs import Batch, check_batch, checked
from qdeploy.core.errors import ArtifactError, InputError, QDeployError, one_line
from qdeploy.core.progress import SampleProgress, no_progress
from qdeploy.export.artifact import Artifact, missing_names
from qdeploy.export.onnx_file import tensor_names
from qdeploy.graph.flow import run
from qdeploy.numerics.metrics import Metric
from qdeploy.runtimes.runtime import Runtime, find_runtime, runtimes
from qdeploy.simulation.prepared import Prepared
from qdeploy.verification.encoded import without_encoding
from qdeploy.verification.quality import destroyed, fewer_right
from qdeploy.verification.session import LITERAL, REFERENCE, BatchedSession
from qdeploy.verification.verdict import ALARM, FAILED, PASSED, UNDECIDED, Asked, Comparison, Output

Array = NDArray[Any]
Outputs = Callable[[Sequence[Array]], list[Array]]

FALLBACK = "nodes fell back to the CPU"
INEXACT = 0.995
"""Share of samples with the simulation's top-1 that is asked where no choice of scales keeps all sums off the ties of rounding: with
logarithmic, half-precision and wide codes, and where ops between layers stay in float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row: a runtime in one variant, or the float model or the simulation.

    `agreement` is the share of samples with the simulation's top-1, and `interval` the bounds of the share that agree or are near-ties;
    `disagreements` counts the others. `outputs` has the SQNR of each output in dB, `sqnr` the least of them. `verdict` is `passed`,
    `failed`, or that there are not enough samples to tell, which is no failure; empty where nothing is asked. `decides` says whether
    the artifact fails with it.
    """

    name: str
    samples: int
    bytes: int
    agreement: float | None = None
    sqnr: float | None = None
    max_steps: float | None = None
    accuracy: float | None = None
    metric: float | None = None
    placement: dict[str, int] = field(default_factory=dict)
    checked: bool = False
    faults: tuple[str, ...] = ()
    near_ties: int | None = None
    disagreements: int | None = None
    interval: tuple[float, float] | None = None
    outputs: dict[str, float] = field(default_factory=dict)
    verdict: str = ""
    remarks: tuple[str, ...] = ()
    decides: bool = True

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong with the row."""
        return not self.faults

    @property
    def parted(self) -> bool:
        """Whether a fault is in the outputs, or there are none: not in where nodes run alone."""
        return any(FALLBACK not in fault for fault in self.faults)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All rows, and what is wrong with the folder itself."""

    results: tuple[Result, ...]
    faults: tuple[str, ...]
    quality: tuple[str, ...] = ()
    """Where the simulation has lost what the float model computes."""
    metric: str = ""
    """The name of the metric that rows have besides SQNR, if any."""
    accepted: bool = False
    """Whether the user takes that, by `--accept`."""
    unrecorded: str = ""
    """Why the manifest has not got this report; empty where it has."""

    @property
    def passed(self) -> bool:
        """Whether the artifact meets all its checks: those that decide."""
        lost = self.quality and not self.accepted
        return not self.faults and not lost and all(result.passed for result in self.results if result.decides)

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to know of the rows, a sentence each."""
        if not any(row.faults and not row.decides for row in self.results):
            return ()
        names = ", ".join(row.name for row in self.results if row.decides and row.verdict)
        failed = ", ".join(row.name for row in self.results if row.faults and not row.decides)
        return (f"the check follows {names}; what failed elsewhere does not decide: {failed}",)

    def next_steps(self, out: str, data: Sequence[str] = ()) -> tuple[str, ...]:
        """What to do where something failed or stays open, a line each: commands for the artifact at `out`, with the options `data`."""
        if self.faults:  # a runtime is compared with the file, which is not what was simulated
            return ("the artifact itself is at fault, whatever runs it: quantize the model again",)
        place, options = shlex.quote(out), "".join(f" {shlex.quote(word)}" for word in data)
        lines = []
        if self.quality:
            lines.append("to gain accuracy: more calibration samples, another --recipe (qdeploy recipes), or more bits")
        for row in self.results:
            name = row.name.partition(":")[0]
            if row.verdict == UNDECIDED:
                lines.append(f"to settle {row.name}: qdeploy verify {place} --runtime {row.name} --data PATH, with more samples")
            elif row.verdict == FAILED and row.parted and name in runtimes and runtimes[name].inside:
                isolate = "" if row.samples else " --isolate"
                lines.append(f"to see which tensor parts first: qdeploy debug {place} --runtime {row.name}{options}{isolate}")
        passed = [row.name for row in self.results if row.verdict == PASSED]
        if any(row.verdict == FAILED for row in self.results):
            lines.append(f"the file is usable on {', '.join(passed)}" if passed else "the file passed on no runtime that was tried")
        return tuple(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the manifest and `--json`."""
        rows = [asdict(result) for result in self.results]
        said = {"faults": self.faults, "quality": self.quality, "notes": self.notes}
        return {
            "passed": self.passed,
            "accepted": self.accepted,
            "metric": self.metric,
            **{key: list(texts) for key, texts in said.items()},
            "results": rows,
        }


class _Row:
    """One way to compute outputs, and how they compare. `size` is that of the file it runs; nothing is `asked` of a reference.
    Whether it `decides` is said of it in the end.
    """

    def __init__(
        self,
        name: str,
        outputs: Outputs,
        size: int,
        asked: Asked | None,
        placement: Callable[[], dict[str, int]],
        decides: bool = True,
    ):
        self.name = name
        self.outputs = outputs
        self.size = size
        self.asked = asked
        self.placement = placement
        self.decides = decides
        self.comparison: Comparison | None = None
        self.failure = ""
        self.classes = True
        """Whether the first output may be classes."""
        self.kept: list[Sequence[Array]] = []
        """All outputs, where another metric asks for them."""

    def run(self, inputs: Sequence[Array]) -> list[Array] | None:
        """The outputs, or None where they cannot be computed: that is a result, and no reason to lose the artifact or other rows."""
        if self.failure:
            return None
        try:
            return list(self.outputs(inputs))
        except Exception as error:  # a vendor's library may raise anything
            self._failed("could not run", error)
            return None

    def add(self, made: Sequence[Array], simulated: Sequence[Array], labels: Array | None, known: Sequence[Output]) -> None:
        """Compare a batch; outputs that cannot be compared end the row."""
        self.comparison = self.comparison or Comparison(known, self.classes)
        try:
            self.comparison.add(simulated, made, labels)
        except Exception as error:  # whatever a vendor's library returned
            self._failed("could not be compared", error)

    def _failed(self, what: str, error: Exception) -> None:
        said = str(error) if isinstance(error, QDeployError) else one_line(error)
        self.failure = f"{what}: {' '.join(''.join(c if c.isprintable() else ' ' for c in said).split())}"
        self.close()

    def close(self) -> None:
        """Give back what the way to compute holds."""
        if isinstance(self.outputs, BatchedSession):
            self.outputs.close()

    def _placed(self) -> dict[str, int]:
        try:
            return {} if self.failure or self.comparison is None else self.placement()
        except Exception as error:
            self._failed("could not say where it ran", error)
            return {}

    @property
    def tests(self) -> int:
        """How many things are asked of the row."""
        return self.comparison.tests if self.asked is not None and self.comparison is not None else 0

    def result(self, level: float) -> Result:
        """The row, where every test may give a false alarm with the chance `level`."""
        placement = self._placed()
        compared = self.comparison
        if self.failure or compared is None:
            faults: tuple[str, ...] = (self.failure or "was not run",)
            name, size, decides = self.name, self.size, self.decides
            return Result(name=name, samples=0, bytes=size, checked=True, faults=faults, verdict=FAILED, decides=decides)
        result = Result(
            name=self.name,
            samples=compared.samples,
            bytes=self.size,
            agreement=compared.agreement,
            sqnr=min(map(compared.sqnr, range(len(compared.outputs))), default=999.0),
            max_steps=None if compared.max_steps is None else round(compared.max_steps, 3),
            accuracy=compared.accuracy,
            placement=placement,
            checked=self.asked is not None,
            outputs={output.name: compared.sqnr(place) for place, output in enumerate(compared.outputs)},
            decides=self.decides,
        )
        if self.asked is None:
            return result if compared.finite else replace(result, faults=("its outputs hold NaN or infinity",))
        verdict = compared.judged(self.asked, level)
        others, fallen = compared.disagreements(self.asked.room), placement.get("fallback", 0)
        faults = (*verdict.faults, *([f"{fallen} compute {FALLBACK}"] if fallen else []))
        return replace(
            result,
            near_ties=len(compared.margins) - others if compared.ranked else None,
            disagreements=others if compared.ranked else None,
            interval=compared.interval(self.asked.room, level),
            faults=faults,
            remarks=verdict.remarks,
            verdict=FAILED if faults else verdict.word,
        )


def verify_artifact(
    artifact: Artifact,
    batches: Iterable[Batch] | None = None,
    runtime: str | Sequence[str] | None = None,
    labels: Array | None = None,
    simulation: Prepared | None = None,
    progress: SampleProgress = no_progress,
    metric: Metric | None = None,
) -> Report:
    """Check `artifact`, on its saved samples or on `batches`, in `runtime` (default: all of its backend's that are installed).

    `labels` `[N]` are class numbers. `simulation` is the prepared model, where it is still at hand. All runtimes see each batch in
    turn, so the data is passed once; `progress` is told the samples done. The report also goes into qdeploy.json. What `runtime` names
    decides; by default what `Artifact.decides` says, or all rows where none of these ran. `metric` is measured of every row against
    the float model, for which all outputs are kept; top-1 is then not asked for.
    """
    artifact.check_whole()
    chosen = _choose(artifact, runtime)
    model = artifact.load(artifact.model)
    faults = missing_names(artifact.encodings, artifact.manifest["planned"], tensor_names(model))
    if artifact.manifest.get("encodes_all"):
        found = _without_encoding(artifact, model)
        faults += [fault for tensor, fault in found.items() if tensor not in artifact.manifest["planned"]]  # these are said already
    faults += _number_faults(artifact)
    saved = _saved(artifact)
    known = _known(artifact, saved)
    quality = destroyed(known, saved.float_outputs, saved.simulated)
    references, data = _references(artifact, batches, simulation, saved)
    deciding = [runtime is not None or artifact.decides(way.name, variant) for way, variant in chosen]
    rows = [
        _runtime_row(artifact, way, variant, decides or not any(deciding))
        for (way, variant), decides in zip(chosen, deciding, strict=True)
    ]
    with ExitStack() as open_rows:
        for row in (*references, *rows):
            open_rows.callback(row.close)
            row.classes = metric is None or metric.name == "top1"
        literal = [_literal_row(artifact, saved, known)] if batches is not None and simulation is None else []
        faults += _compare(references, rows, data, labels, known, progress, metric)
        level = ALARM / max(1, sum(row.tests for row in (*rows, *literal)))
        for row in literal:
            faults += [
                f"{artifact.simulation.name} does not compute the saved simulation: {fault}" for fault in row.result(level).faults
            ]
        results = tuple(row.result(level) for row in (*references, *rows))
        if metric is not None:
            results = _measured(metric, artifact.outputs, results, [row.kept for row in (*references, *rows)], labels)
        quality += fewer_right([row.accuracy for row in results[: len(references)]])
        report = Report(
            results=results,
            faults=tuple(faults),
            quality=tuple(quality),
            accepted=artifact.accepted,
            metric=metric.name if metric else "",
        )
    try:
        artifact.record("verify", report.to_json())
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        return replace(report, unrecorded=f"'{artifact.path}' cannot be written: {error.strerror}")
    return report


def _measured(
    metric: Metric, names: Sequence[str], results: Sequence[Result], kept: Sequence[Sequence[Sequence[Array]]], labels: Array | None
) -> tuple[Result, ...]:
    """The rows with the metric of each, against the outputs of the first one, which is the float model."""
    joined = [[np.concatenate(parts) for parts in zip(*batches, strict=True)] for batches in kept]
    found = []
    for result, made in zip(results, joined, strict=True):
        fits = made and result.samples == results[0].samples
        found.append(replace(result, metric=float(metric.scores(names, made, joined[0], labels).mean())) if fits else result)
    return tuple(found)


def _without_encoding(artifact: Artifact, model: onnx.ModelProto) -> dict[str, str]:
    """The float tensors of `model` without an encoding, with a sentence on each; `ArtifactError` for a damaged one."""
    try:
        return without_encoding(model, artifact.encodings, artifact.manifest.get("float", {}))
    except Exception as error:  # onnx raises many kinds for damaged models
        raise ArtifactError(
            f"'{artifact.model}' is no whole model", found=one_line(error), action="quantize the model again"
        ) from error


def _compare(
    references: Sequence[_Row],
    rows: Sequence[_Row],
    data: Iterable[list[Array]],
    labels: Array | None,
    known: Sequence[Output],
    progress: SampleProgress,
    metric: Metric | None,
) -> list[str]:
    """Show all data to all rows, which are compared with the last of `references`; what is wrong with that one itself."""
    simulation = references[-1]
    done = 0
    for inputs in data:
        count = len(inputs[0])
        part = None if labels is None else labels[done : done + count]
        if labels is not None and len(labels) < done + count:
            raise InputError("there are fewer labels than samples", found=f"{len(labels)} labels", action="give one label per sample")
        simulated = simulation.run(inputs)
        if simulated is None:
            return [f"the simulation {simulation.failure}"]
        for row in (*references, *rows):
            made = simulated if row is simulation else row.run(inputs)
            if made is not None:
                row.add(made, simulated, part, known)
                if metric is not None:
                    row.kept.append([np.asarray(array) for array in made])
        done += count
        progress(done)
    if done == 0:
        raise InputError("there is no data to verify with", action="give at least one sample")
    if labels is not None and len(labels) != done:
        raise InputError("there are more labels than samples", found=f"{len(labels)} labels, {done} samples")
    return []


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
    specs = artifact.specs
    fixed = [spec.shape[0] for spec in specs if spec.shape and spec.shape[0] is not None]
    unit = fixed[0] if fixed else None  # several batches are saved, where the model fixes their size
    given = [torch.from_numpy(arrays[f"input.{spec.name}"]) for spec in specs]
    whole = unit is None or all(len(array) % unit == 0 for array in given)
    check_batch([array[:unit] for array in given] if whole else given, specs, "the artifact's saved samples")
    return _Saved(
        inputs=[arrays[f"input.{spec['name']}"] for spec in artifact.inputs],
        float_outputs=[arrays[f"float.{name}"] for name in artifact.outputs],
        simulated=[arrays[f"simulated.{name}"] for name in artifact.outputs],
    )


def _known(artifact: Artifact, saved: _Saved) -> list[Output]:
    """What the folder says of every output."""
    scales = {e.tensor: float(e.scale.max()) for e in artifact.encodings if e.role == "activation" and e.spec.linear}
    floats = [a[np.isfinite(a)] for a in (*saved.inputs, *saved.simulated) if a.dtype.kind == "f"]
    loudest = max((float(np.abs(values).max(initial=0.0)) for values in floats), default=0.0)
    pairs = zip(artifact.outputs, saved.float_outputs, saved.simulated, strict=True)
    in_file = artifact.manifest.get("renamed", {})
    steps = [scales.get(in_file.get(name, name)) for name in artifact.outputs]
    known = [Output.seen(name, plain, simulated, step, loudest) for (name, plain, simulated), step in zip(pairs, steps, strict=True)]
    for name, parts in artifact.parts.items():
        place = artifact.outputs.index(name)
        for tensor, (start, stop) in zip(parts.tensors, pairwise(parts.edges), strict=True):
            whole = known[place]
            part = replace(whole, name=f"{name}[{tensor}]", part=(place, parts.axis, start, stop))
            plain, simulated = (part.of(values, place) for values in (saved.float_outputs, saved.simulated))
            known.append(replace(Output.seen(part.name, plain, simulated, steps[place], loudest), part=part.part))
    return known


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
    literal = row("simulated (ONNX, node by node)", BatchedSession(artifact, artifact.simulation, REFERENCE, LITERAL), size)
    if artifact.simulation == artifact.model:
        return [literal], data
    changed = any(entry["decision"] == "kept" for entry in artifact.manifest.get("steps", []))
    name = "model.onnx in float" if changed else "float"  # its weights and biases are those of the simulation
    return [row(name, BatchedSession(artifact, artifact.model, REFERENCE, LITERAL), float_size), literal], data


def _torch(module: fx.GraphModule, inputs: Sequence[Array]) -> list[Array]:
    tensors = [torch.from_numpy(array) for array in inputs]
    return [made.detach().numpy() for made in run(module, tensors, len(tensors[0]))]


def _arrays(batches: Iterable[Batch], artifact: Artifact) -> Iterator[list[Array]]:
    specs = artifact.specs
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


def _literal_row(artifact: Artifact, saved: _Saved, known: Sequence[Output]) -> _Row:
    """The literal run of the file, which stands for the simulation on other data, against the simulation's saved outputs."""
    feed = BatchedSession(artifact, artifact.simulation, REFERENCE, LITERAL)
    row = _Row("", feed, 0, _asked(artifact, runtimes[REFERENCE]), dict)
    made = row.run(saved.inputs)
    if made is not None:
        row.add(made, saved.simulated, None, known)
    return row


def _runtime_row(artifact: Artifact, runtime: Runtime, variant: str, decides: bool) -> _Row:
    feed, size = BatchedSession(artifact, artifact.simulation, runtime.name, variant), artifact.simulation.stat().st_size
    return _Row(runtime.reference(variant), feed, size, _asked(artifact, runtime), feed.placement, decides)


def _asked(artifact: Artifact, runtime: Runtime) -> Asked:
    """What is asked of `runtime`: every code only where no sum of the artifact can be a tie of rounding, and all are whole numbers.

    Biases that are float, on the lattice of the sums or not, are added in another order by some kernels: a few codes flip, and behind
    56 layers these are 52 dB. There an exact runtime gets no room.
    """
    if artifact.manifest["tie_free"]:
        whole = any(encoding.role == "bias" for encoding in artifact.encodings)
        room = 0.0 if runtime.exact else runtime.room
        return Asked(min_agreement=runtime.min_agreement, room=room, exact=runtime.exact and whole)
    return Asked(min_agreement=min(runtime.min_agreement, INEXACT), room=runtime.room)
