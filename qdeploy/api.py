"""The verbs: prepare, calibrate, convert, verify, and quantize, which is the four in one.

Each takes one target or several: several share one capture, one pass over the data and one export.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from qdeploy.capture import fold, outputs
from qdeploy.capture.capture import Captured, capture
from qdeploy.capture.inputs import Batch, Dynamic
from qdeploy.core.backend import Backend, Format
from qdeploy.core.errors import InputError, OptionError, QualityError
from qdeploy.core.progress import SampleProgress, StepProgress, no_progress, no_step_progress
from qdeploy.core.recipe import Recipe
from qdeploy.core.spec import Encoding
from qdeploy.core.targets import Target, Targets, find_backend, find_backends, with_schemes
from qdeploy.core.version import __version__
from qdeploy.export import artifact, emit, float_file, manifest, place, words
from qdeploy.export.artifact import Artifact
from qdeploy.export.onnx_file import emitted
from qdeploy.graph import edit, query
from qdeploy.graph.flow import run
from qdeploy.graph.parts import output_parts
from qdeploy.numerics.metrics import find_metric
from qdeploy.recipes import step_runner
from qdeploy.recipes.calibration_pass import observe, observer_of
from qdeploy.recipes.distill import distill
from qdeploy.recipes.presets import find_recipe
from qdeploy.simulation.insert import insert_quantizers
from qdeploy.simulation.plan import Plan, Tail, Widths, check_tail, make_plans
from qdeploy.simulation.prepared import Prepared
from qdeploy.verification.verify import Report, verify_artifact

Batches = Iterable[Batch] | None
Labels = Sequence[int] | Tensor | NDArray[Any]


class Options(TypedDict, total=False):
    """What `prepare` takes besides the model, an example and the backend, with the same meaning."""

    recipe: str | Recipe
    weight_bits: int | None
    activation_bits: int | None
    first_last_bits: int | None
    seed: int
    weight_scheme: str | None
    activation_scheme: str | None
    dynamic: Dynamic | None
    tail: Tail


def prepare(
    model: nn.Module | ExportedProgram,
    example_inputs: Batch | None,
    backend: Target,
    recipe: str | Recipe = "default",
    weight_bits: int | None = None,
    activation_bits: int | None = None,
    first_last_bits: int | None = None,
    seed: int = 0,
    weight_scheme: str | None = None,
    activation_scheme: str | None = None,
    dynamic: Dynamic | None = None,
    tail: Tail = "auto",
) -> Prepared:
    """Capture `model`, fold its batch norms, plan for `backend` and insert the quantizers; `model` itself is not changed.

    `example_inputs` is a tensor, a tuple of tensors or a mapping from input names to tensors, with any batch size (None for an
    ExportedProgram). `first_last_bits` is the weight width of the first and the last layer. The schemes are words such as "int4
    symmetric per-channel", for backends that leave the choice. `dynamic` names further dimensions whose size may vary, such as
    `{"x": {2: "height", 3: "width"}}`; see `qdeploy.capture.inputs`. `tail` says what becomes of the ops behind the last layers: they
    are "quantized" like the rest, or stay in "float"; "auto" decides by what calibration finds. Raises `CaptureError`,
    `OptionError` or `InputError`.
    """
    widths = Widths(weight=weight_bits, activation=activation_bits, first_last=first_last_bits)
    target = with_schemes(find_backend(backend), weight_scheme, activation_scheme)
    chosen = find_recipe(recipe)  # before the work of a capture
    check_tail(tail)
    return _prepare(capture(model, example_inputs, dynamic), (target,), chosen, widths, seed, tail)[0]


def prepare_all(
    model: nn.Module | ExportedProgram, example_inputs: Batch | None, backends: Targets, **options: Unpack[Options]
) -> tuple[Prepared, ...]:
    """`prepare` for several backends from one capture, with copies of the parameters each; for `calibrate_all`."""
    schemes = options.get("weight_scheme"), options.get("activation_scheme")
    targets = tuple(with_schemes(target, *schemes) for target in find_backends(backends))
    widths = Widths(
        weight=options.get("weight_bits"), activation=options.get("activation_bits"), first_last=options.get("first_last_bits")
    )
    chosen = find_recipe(options.get("recipe", "default"))
    tail = check_tail(options.get("tail", "auto"))
    captured = capture(model, example_inputs, options.get("dynamic"))
    return _prepare(captured, targets, chosen, widths, options.get("seed", 0), tail)


def _prepare(
    captured: Captured, targets: tuple[Backend, ...], recipe: Recipe, widths: Widths, seed: int, tail: Tail
) -> tuple[Prepared, ...]:
    step_runner.check_steps(recipe)
    fold.fold(captured.module, with_biases=any(step.needs_biases for step in step_runner.made_steps(recipe)))
    _check_finite(captured.module)
    plans = [make_plans(captured.module, target, widths, tail) for target in targets]
    return tuple(_prepared(captured, *pair, target, recipe, seed) for pair, target in zip(plans, targets, strict=True))


def _prepared(captured: Captured, plan: Plan, alternative: Plan | None, target: Backend, recipe: Recipe, seed: int) -> Prepared:
    """One target's simulation, with parameters of its own."""
    if not any(tensor.role == "weight" and tensor.spec for tensor in plan.tensors):
        ops = ", ".join(sorted({tensor.op for tensor in plan.tensors if tensor.role == "activation"}))
        raise InputError(f"backend '{target.name}' finds no layer to quantize", found=f"ops: {ops}", action="see qdeploy inspect")
    _check_float32(captured.module, plan)
    module = edit.copy(captured.module, own_parameters=True)
    quantizers = insert_quantizers(module, plan)
    return Prepared(captured, module, plan, target, recipe, seed, quantizers, alternative)


def _check_float32(module: fx.GraphModule, plan: Plan) -> None:
    planned = {tensor.tensor for tensor in plan.quantized}
    made = {query.tensor_name(node): query.value(node) for node in module.graph.nodes}
    for name, value in made.items():
        if name in planned and isinstance(value, Tensor) and value.dtype != torch.float32:
            found = f"{str(value.dtype).removeprefix('torch.')} in '{name}'"
            raise InputError("the model is not in float32", found=found, action="call model.float(), and give float32 examples")


def _check_finite(module: fx.GraphModule) -> None:
    """`InputError` for weights and biases of layers that hold no numbers. A mask may hold them."""
    seen: set[str] = set()
    for constant in (c for node in module.graph.nodes if node.op == "call_function" for c in query.constants(node)):
        name = str(constant.target)
        if name not in seen and not bool(query.parameter(module, name).isfinite().all()):
            action = "check the model in float, and what its batch norms are folded to"
            raise InputError(f"the parameter '{name}' of the model holds NaN or Inf", action=action)
        seen.add(name)


def calibrate(
    prepared: Prepared,
    batches: Iterable[Batch],
    progress: SampleProgress = no_progress,
    labels: Labels | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    step_progress: StepProgress = no_step_progress,
    metric: str | Callable[..., Any] | None = None,
) -> Prepared:
    """Pass `batches` once through `prepared`, fix all ranges, and run the steps of the recipe. Returns `prepared`.

    labels: a class a sample; steps are then judged by right classes instead of SQNR. metric: another measure that judges them, see
    `qdeploy.numerics.metrics`. folder: where long steps keep their finished
    parts, which `resume` reads back. `progress` is told the samples done, `step_progress` how a step goes. Raises `InputError` where a
    batch does not fit, holds NaN or Inf, or where there is none.
    """
    return calibrate_all((prepared,), batches, progress, labels, folder, resume, step_progress, metric)[0]


def calibrate_all(
    several: Sequence[Prepared],
    batches: Iterable[Batch],
    progress: SampleProgress = no_progress,
    labels: Labels | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    step_progress: StepProgress = no_step_progress,
    metric: str | Callable[..., Any] | None = None,
) -> Sequence[Prepared]:
    """`calibrate` for all that one `prepare_all` made, in one pass over the data."""
    if any(one.calibrated for one in several):
        raise OptionError("the model is calibrated already", action="prepare it again")
    if not several or any(one.captured is not several[0].captured for one in several):
        raise OptionError("these models were not prepared together", action="name all backends in one call of prepare")
    first, judged_by = several[0], find_metric(metric)
    torch.manual_seed(first.seed)
    classes = None if labels is None else torch.as_tensor(np.asarray(labels))
    states, samples = observe(several, iter(batches), progress, classes, step_progress)
    if samples is not None:  # what is verified are the samples that no step has seen, where there are any
        first.reference = []
        first.remember(samples.held)
    if folder is not None and any(step_runner.has_simulation_steps(one) for one in several):
        step_runner.open_folder(Path(folder), several, resume)
    for one, own in zip(several, states, strict=True):
        one.samples_seen, one.reference = first.samples_seen, first.reference
        parts = None if folder is None else Path(folder) / one.backend.name
        torch.manual_seed(one.seed)  # so that a target comes out the same, whichever others are made with it
        step_runner.settle(one, own, samples, partial(observer_of, one.recipe), parts, step_progress, judged_by)
        one.check_scales()
        one.calibrated, one.observers = True, {}
    return several


def distill_data(
    model: nn.Module | ExportedProgram,
    example_inputs: Batch | None,
    samples: int = 512,
    seed: int = 0,
    progress: StepProgress = no_step_progress,
) -> list[tuple[Tensor, ...]]:
    """Calibration data for a model without any: batches of images made from its batch-norm statistics; see `qdeploy.recipes.distill`.

    Raises `InputError` where the model has none.
    """
    captured = capture(model, example_inputs, {})  # images have the sizes of the example
    return distill(captured.module, captured.inputs, samples, seed, progress=progress)


def convert(prepared: Prepared, out: str | Path, file_format: str | None = None, accept: bool = False) -> Artifact:
    """Write the artifact of a calibrated model into the folder `out`; `file_format` is one of the backend's formats.

    With `accept`, `verify` takes it that quantization has destroyed an output.

    Raises `InputError` where `out` holds something else, `OptionError` for a format that the backend does not write.
    """
    if not prepared.calibrated:
        raise OptionError("the model is not calibrated", action="call qdeploy.calibrate first")
    out = Path(out)
    place.check_free(out)
    form = prepared.backend.choose_format(file_format)
    written = emit.files(prepared, form, prepared.encodings())
    files = dict(written.models)
    names = outputs.names(prepared.captured.module)
    join: Callable[[str], str] = str
    if form.words:
        join = words.without_spaces(words.names_of(files.values()))
        files = {name: words.rename(model, join) for name, model in files.items()}
        written = replace(written, encodings=words.renamed(written.encodings, join))
    other = {name: join(name) for name in (*(spec.name for spec in prepared.captured.inputs), *names) if join(name) != name}
    if form.write is not None:
        texts = form.write(emitted(files[artifact.MODEL], written.encodings))
        assert tuple(texts) == form.files, f"{prepared.backend.name}: {tuple(texts)}"
        files |= {name: text.encode() for name, text in texts.items()}
    reference = _reference(prepared)
    files[artifact.REFERENCE] = artifact.npz(reference)
    alone = float_file.distances(prepared, form, prepared.encodings(), reference, names) if form.model == "float" else {}
    notes = [
        *prepared.captured.notes,
        *prepared.notes,
        *written.notes,
        *float_file.note(alone),
        *words.note(other),
        *_open_sizes(prepared),
        *prepared.warnings(reference),
    ]
    made = (
        {"notes": notes, "float_bytes": written.float_bytes, "accepted": accept}
        | ({"float_file_sqnr": alone} if alone else {})
        | ({"renamed": other} if other else {})
    )
    return artifact.write(out, files, _origin(prepared, form) | made | _tensors(prepared, written.encodings, join))


def _origin(prepared: Prepared, form: Format) -> dict[str, Any]:
    """What the manifest says of how the artifact came about."""
    backend = prepared.backend
    return {
        "schema": manifest.SCHEMA,
        "qdeploy": __version__,
        "backend": backend.name,
        "title": backend.title,
        "format": form.name,
        "command": form.command,
        "runtimes": list(backend.runtimes),
        "deciding": list(backend.deciding),
        "recipe": _plain_recipe(prepared.recipe),
        "steps": [{key: value for key, value in entry.items() if key != "seconds"} for entry in prepared.log],  # the same every time
        "seed": prepared.seed,
        "calibration_samples": prepared.samples_seen,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnx-ir", "onnxscript")},
    }


def _tensors(prepared: Prepared, encodings: Sequence[Encoding], join: Callable[[str], str]) -> dict[str, Any]:
    """What the manifest says of inputs, outputs, and every tensor: its encoding, or why it has none.

    Inputs and outputs have the names of the model, all others those of the files, which `join` makes.
    """
    graph = prepared.captured.module
    named = dict(zip(outputs.names(graph), query.outputs(graph.graph), strict=True))
    return {
        "inputs": [asdict(spec) for spec in prepared.captured.inputs],
        "outputs": outputs.names(prepared.captured.module),
        "parts": {name: asdict(found) for name, node in named.items() if (found := output_parts(node)) is not None},
        "device_outputs": emit.device_outputs(prepared),
        "tie_free": prepared.plan.tie_free,
        "encodes_all": prepared.backend.encodes_all,
        "planned": [join(tensor.tensor) for tensor in prepared.plan.quantized],
        "float": {join(tensor.tensor): tensor.reason for tensor in prepared.plan.tensors if tensor.spec is None},
        "encodings": [encoding.to_json() for encoding in encodings],
    }


def _open_sizes(prepared: Prepared) -> list[str]:
    """What a toolchain must be told that compiles for one size."""
    places: dict[str, list[str]] = {}
    for spec in prepared.captured.inputs:
        for dimension, name in spec.names.items():
            if dimension:
                places.setdefault(name, []).append(f"dimension {dimension} of '{spec.name}'")
    listed = "; ".join(f"{name} is {' and '.join(found)}" for name, found in places.items())
    return [f"open sizes, which the toolchain must be told if it compiles for one size: {listed}"] if places else []


def verify(
    out: str | Path | Artifact,
    batches: Iterable[Batch] | None = None,
    runtime: str | Sequence[str] | None = None,
    labels: Labels | None = None,
    simulation: Prepared | None = None,
    progress: SampleProgress = no_progress,
    metric: str | Callable[..., Any] | None = None,
) -> Report:
    """Run the artifact in the folder `out` on real runtimes and compare; see `qdeploy.verification.verify`."""
    opened = out if isinstance(out, Artifact) else Artifact.open(out)
    numbers = None if labels is None else np.asarray(labels)
    return verify_artifact(opened, batches, runtime, numbers, simulation, progress, find_metric(metric))


class More(TypedDict, total=False):
    """What `quantize` takes besides `Options`."""

    example_inputs: Batch | None
    file_format: str | None
    labels: Labels | None
    folder: str | Path | None
    resume: bool
    accept: bool
    metric: str | Callable[..., Any] | None


class Everything(Options, More, total=False):
    """All keyword arguments of `quantize`."""


@overload
def quantize(
    model: nn.Module | ExportedProgram, batches: Batches, backend: Target, out: str | Path, **options: Unpack[Everything]
) -> Artifact: ...


@overload
def quantize(
    model: nn.Module | ExportedProgram,
    batches: Batches,
    backend: list[Target] | list[str] | tuple[Target, ...],
    out: str | Path,
    **options: Unpack[Everything],
) -> tuple[Artifact, ...]: ...


def quantize(
    model: nn.Module | ExportedProgram,
    batches: Batches,
    backend: Target | Sequence[Target],
    out: str | Path,
    *,
    example_inputs: Batch | None = None,
    file_format: str | None = None,
    labels: Labels | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    accept: bool = False,
    metric: str | Callable[..., Any] | None = None,
    **options: Unpack[Options],
) -> Artifact | tuple[Artifact, ...]:
    """Prepare, calibrate on `batches`, convert into `out`, and verify on the saved samples with every runtime at hand.

    The report is in the artifact's `manifest["verify"]`. A list of backends gives one artifact each, in folders of `out` with their
    names; the data is passed once. Without data (`batches` None) images are distilled, see `distill_data`; a module needs
    `example_inputs` then. `labels`, `folder`, `resume` and `metric` are those of `calibrate`, `file_format` and `accept` those of
    `convert`: without it, `QualityError` where quantization has destroyed an output, and that artifact is not written.
    """
    single = isinstance(backend, str | Backend)
    targets = (find_backend(backend),) if isinstance(backend, str | Backend) else find_backends(backend)
    folders = [Path(out) if single else Path(out) / target.name for target in targets]
    with ExitStack() as stack:
        places = [stack.enter_context(place.claim(one)) for one in folders]
        if batches is None:
            if example_inputs is None and isinstance(model, nn.Module):
                action = "give example_inputs, whose shapes images are made in"
                raise InputError("there are neither batches nor an example", action=action)
            batches = distill_data(model, example_inputs, seed=options.get("seed", 0))
        stream = iter(batches)
        first = next(stream, None)
        if first is None:
            raise InputError("there is no calibration data", action="give at least one batch")
        example = first if example_inputs is None else example_inputs
        several = prepare_all(model, example, targets, **options)
        made = calibrate_all(several, chain((first,), stream), labels=labels, folder=folder, resume=resume, metric=metric)
        for prepared, claimed in zip(made, places, strict=True):
            with claimed.staged() as fresh:
                report = verify(convert(prepared, fresh, file_format, accept), metric=metric)
                if report.quality and not accept:
                    where = f"quantization for '{prepared.backend.name}' destroys what the model computes"
                    raise QualityError(
                        where, found="; ".join(report.quality), action="try another recipe, or accept it with accept=True"
                    )
    written = tuple(Artifact.open(one) for one in folders)
    return written[0] if single else written


def _plain_recipe(recipe: Recipe) -> dict[str, Any]:
    return asdict(recipe) | {"digest": recipe.digest}


def _reference(prepared: Prepared) -> artifact.Arrays:
    """The kept samples with what the float model and the simulation make of them."""
    inputs = [torch.cat(parts) for parts in zip(*prepared.reference, strict=True)]
    arrays = {f"input.{spec.name}": t.numpy() for spec, t in zip(prepared.captured.inputs, inputs, strict=True)}
    names = outputs.names(prepared.captured.module)
    size = prepared.batch_size
    for label, module in (("float", prepared.captured.module), ("simulated", prepared.module)):
        arrays |= {f"{label}.{name}": t.detach().numpy() for name, t in zip(names, run(module, inputs, size), strict=True)}
    return arrays
