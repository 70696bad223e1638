"""The verbs: prepare, calibrate, convert, verify, and quantize, which is the four in one."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from qdeploy import __version__, artifact, emit, fold, graph
from qdeploy.artifact import Artifact
from qdeploy.backend import Backend, backends
from qdeploy.capture import capture
from qdeploy.errors import InputError, OptionError
from qdeploy.insert import freeze, insert_quantizers
from qdeploy.observer import Observer, make_observer
from qdeploy.plan import Plan, Widths, make_plan
from qdeploy.prepared import Prepared
from qdeploy.recipe import Recipe, find_recipe
from qdeploy.spec import QuantSpec, Role
from qdeploy.verification import Report, verify_artifact

Batch = Tensor | Sequence[Tensor]


def find_backend(name: str | Backend) -> Backend:
    """The backend called `name`, or the one that a user's own Python file registers."""
    if isinstance(name, Backend):
        return name
    return backends.load_file(Path(name)) if name.endswith(".py") else backends[name]


def prepare(
    model: nn.Module | ExportedProgram,
    example_inputs: Batch | None,
    backend: str | Backend,
    recipe: str | Recipe = "default",
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    first_last_bits: int | None = None,
    seed: int = 0,
) -> Prepared:
    """Capture `model`, fold its batch norms, plan for `backend` and insert the quantizers; `model` itself is not changed.

    `example_inputs` is a tensor or a tuple of tensors with any batch size (None for an ExportedProgram). `first_last_bits` is the
    weight width of the first and the last layer. Raises `CaptureError`, `OptionError` or `InputError`.
    """
    target = find_backend(backend)
    chosen = find_recipe(recipe) if isinstance(recipe, str) else recipe
    captured = capture(model, example_inputs)
    fold.fold_batch_norms(captured.module)
    fold.untie_biases(captured.module)
    widths = Widths(weight=weight_bits, activation=activation_bits, first_last=first_last_bits)
    plan = make_plan(captured.module, target, widths)
    if not any(tensor.role == "weight" and tensor.spec for tensor in plan.tensors):
        ops = ", ".join(sorted({tensor.op for tensor in plan.tensors if tensor.role == "activation"}))
        raise InputError(f"backend '{target.name}' finds no layer to quantize", found=f"ops: {ops}", action="see qdeploy inspect")
    _check_float32(captured.module, plan)

    def observer(role: Role, spec: QuantSpec) -> Observer:
        choice = chosen.weight if role == "weight" else chosen.activation
        # a constant is all there is to observe, so its extremes are its range
        return make_observer("minmax", spec, {}) if role == "constant" else make_observer(choice.observer, spec, choice.options)

    quantizers = insert_quantizers(captured.module, plan, observer)
    return Prepared(captured, plan, target, chosen, seed, quantizers)


def _check_float32(module: fx.GraphModule, plan: Plan) -> None:
    planned = {tensor.tensor for tensor in plan.quantized}
    made = {graph.tensor_name(node): graph.value(node) for node in module.graph.nodes}
    for name, value in made.items():
        if name in planned and isinstance(value, Tensor) and value.dtype != torch.float32:
            found = f"{str(value.dtype).removeprefix('torch.')} in '{name}'"
            raise InputError("the model is not in float32", found=found, action="call model.float(), and give float32 examples")


def calibrate(prepared: Prepared, batches: Iterable[Batch], watch: Callable[[int], None] = lambda samples: None) -> Prepared:
    """Pass `batches` once through `prepared` and fix all ranges. `watch` is told the samples done. Returns `prepared`.

    Raises `InputError` where a batch does not fit, holds NaN or Inf, or where there is none.
    """
    if prepared.calibrated:
        raise OptionError("the model is calibrated already", action="prepare it again")
    torch.manual_seed(prepared.seed)
    with prepared.mode("observe"), torch.no_grad():
        for item in batches:
            batch = (item,) if isinstance(item, Tensor) else tuple(item)
            prepared.check(batch)
            prepared(*batch)
            prepared.remember(batch)
            prepared.samples_seen += len(batch[0])
            watch(prepared.samples_seen)
    if not prepared.samples_seen:
        raise InputError("there is no calibration data", action="give at least one batch")
    freeze(prepared.module, prepared.plan, prepared.quantizers)
    prepared.calibrated = True
    prepared.set_mode("quantize")
    return prepared


def convert(prepared: Prepared, out: str | Path, file_format: str | None = None) -> Artifact:
    """Write the artifact of a calibrated model into the folder `out`; `file_format` is the version of the backend's scale file.

    Raises `InputError` where `out` holds something else, `OptionError` for a format that the backend does not write.
    """
    if not prepared.calibrated:
        raise OptionError("the model is not calibrated", action="call qdeploy.calibrate first")
    out = Path(out)
    artifact.check_free(out)
    backend = prepared.backend
    version = backend.choose_format(file_format)
    encodings = prepared.encodings()
    notes = list(prepared.captured.notes)
    exported = emit.export(prepared)
    plain = emit.to_bytes(emit.float_view(exported))
    quantized = emit.to_bytes(emit.qdq_view(exported, encodings))
    files = {artifact.MODEL: quantized}
    if backend.emits == "float":
        simple, note = emit.simplify_float(plain, [e.tensor for e in encodings])
        notes.append(note)
        files = {artifact.MODEL: simple, artifact.SIMULATION: quantized}
    if backend.write is not None:
        files |= {name: text.encode() for name, text in backend.write(encodings, version).items()}
    files[artifact.REFERENCE] = artifact.npz(_reference(prepared))
    manifest = {
        "schema": artifact.SCHEMA,
        "qdeploy": __version__,
        "backend": backend.name,
        "title": backend.title,
        "format": version,
        "command": backend.command,
        "runtimes": list(backend.runtimes),
        "recipe": _plain_recipe(prepared.recipe),
        "seed": prepared.seed,
        "calibration_samples": prepared.samples_seen,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")},
        "notes": notes,
        "float_bytes": len(plain),
        "inputs": [asdict(spec) for spec in prepared.captured.inputs],
        "outputs": emit.output_names(prepared.module),
        "planned": [tensor.tensor for tensor in prepared.plan.quantized],
        "float": {tensor.tensor: tensor.reason for tensor in prepared.plan.tensors if tensor.spec is None},
        "encodings": [encoding.to_json() for encoding in encodings],
    }
    return artifact.write(out, files, manifest)


def verify(
    out: str | Path | Artifact,
    batches: Iterable[Batch] | None = None,
    runtime: str | Sequence[str] | None = None,
    labels: Sequence[int] | Tensor | NDArray[Any] | None = None,
    simulation: Prepared | None = None,
    watch: Callable[[int], None] = lambda samples: None,
) -> Report:
    """Run the artifact in the folder `out` on real runtimes and compare; see `qdeploy.verification`."""
    opened = out if isinstance(out, Artifact) else Artifact.open(out)
    numbers = None if labels is None else np.asarray(labels)
    return verify_artifact(opened, batches, runtime, numbers, simulation, watch)


def quantize(
    model: nn.Module | ExportedProgram,
    batches: Iterable[Batch],
    backend: str | Backend,
    out: str | Path,
    recipe: str | Recipe = "default",
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    first_last_bits: int | None = None,
    seed: int = 0,
    file_format: str | None = None,
) -> Artifact:
    """Prepare, calibrate on `batches`, convert into `out`, and verify on the saved samples with every runtime at hand.

    The report is in the artifact's `manifest["verify"]`.
    """
    artifact.check_free(Path(out))
    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise InputError("there is no calibration data", action="give at least one batch")

    def whole() -> Iterable[Batch]:
        yield first
        yield from stream

    prepared = prepare(model, first, backend, recipe, weight_bits, activation_bits, first_last_bits, seed)
    calibrate(prepared, whole())
    with artifact.staged(Path(out)) as place:
        verify(convert(prepared, place, file_format))
    return Artifact.open(out)


def _plain_recipe(recipe: Recipe) -> dict[str, Any]:
    return asdict(recipe) | {"digest": recipe.digest}


def _reference(prepared: Prepared) -> artifact.Arrays:
    """The kept samples with what the float model and the simulation make of them."""
    inputs = [torch.cat(parts) for parts in zip(*prepared.reference, strict=True)]
    arrays = {f"input.{spec.name}": t.numpy() for spec, t in zip(prepared.captured.inputs, inputs, strict=True)}
    for label, mode in (("float", "float"), ("simulated", "quantize")):
        with prepared.mode(mode):  # type: ignore[arg-type]
            made = prepared.flat(inputs)
        arrays |= {f"{label}.{name}": t.numpy() for name, t in zip(emit.output_names(prepared.module), made, strict=True)}
    return arrays
