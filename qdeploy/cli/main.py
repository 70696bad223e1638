"""The command line: parses, prints, nothing else. torch is imported by the commands that need it, not for `--help`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qdeploy.cli import arguments
from qdeploy.cli.arguments import (
    ActivationBits,
    ActivationScheme,
    Arch,
    BackendName,
    BackendNames,
    CalibrationSource,
    DataPath,
    DynamicSizes,
    FirstLastBits,
    Json,
    Labels,
    Mean,
    MetricOption,
    Model,
    Name,
    Pickle,
    Quiet,
    Resize,
    RuntimeNames,
    Shape,
    Std,
    TailOption,
    WeightBits,
    WeightScheme,
)
from qdeploy.cli.console import Console, print_divergence, print_report, print_rows, print_steps, silence_torch
from qdeploy.core.errors import OptionError, QDeployError, one_line

if TYPE_CHECKING:
    from qdeploy.core.spec import TensorSpec
    from qdeploy.export.place import Place
    from qdeploy.files.data import Data
    from qdeploy.simulation.prepared import Prepared
    from qdeploy.verification.verify import Report

LONGEST_MESSAGE = 3000
"""Characters of an error; longer ones only come from odd files."""
app = typer.Typer(
    help="Quantize a model for one piece of hardware, and prove that what was simulated is what is deployed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)


@app.command()
def quantize(
    model: Model,
    backend: BackendNames,
    data: DataPath = None,
    recipe: Annotated[str, typer.Option(help="a name of `qdeploy recipes`, or FILE.toml")] = "default",
    samples: Annotated[int, typer.Option(help="how many samples to calibrate with")] = 512,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    first_last_bits: FirstLastBits = None,
    weight_scheme: WeightScheme = None,
    activation_scheme: ActivationScheme = None,
    arch: Arch = None,
    input_shape: Shape = None,
    dynamic: DynamicSizes = None,
    tail: TailOption = "auto",
    out: Annotated[Path, typer.Option(help="the folder to write; with several targets, of their folders")] = Path("out"),
    seed: Annotated[int, typer.Option(help="of the choice of samples, and of everything random")] = 0,
    allow_pickle: Pickle = False,
    file_format: Annotated[
        str | None, typer.Option("--format", help="which of the target's formats, see `qdeploy backends NAME`")
    ] = None,
    verify_data: Annotated[str | None, typer.Option(help="verify on these samples, not on 64 of --data")] = None,
    labels: Labels = None,
    metric: MetricOption = None,
    data_labels: Annotated[str | None, typer.Option(help="class numbers of --data: judge steps by right classes")] = None,
    accept: Annotated[bool, typer.Option("--accept", help="write it even where quantization destroys what the model computes")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run that was interrupted")] = False,
    runtime: RuntimeNames = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL for a target or several, write the artifacts, and verify them on the runtimes that are installed."""
    from qdeploy import api
    from qdeploy.core.targets import find_backends
    from qdeploy.files.data import open_data
    from qdeploy.simulation.plan import check_tail

    console = Console(as_json, quiet)
    targets = find_backends(backend)
    folders = arguments.free_places(out, targets, file_format)
    arguments.check_choices(recipe, runtime, samples, seed)
    arguments.check_labels(("--labels", labels, "--verify-data", verify_data), ("--data-labels", data_labels, "--data", data))
    images = arguments.image_options(mean, std, resize)
    opened = arguments.dynamic_sizes(dynamic, input_shape)

    with arguments.claimed(out, folders) as (work, places):
        loaded, specs = arguments.load(model, arch, allow_pickle, input_shape, data)
        calibration = open_data(data, specs, images, data_labels).pick(samples, seed) if data else None
        evaluation = open_data(verify_data, arguments.with_open_sizes(specs, opened), images, labels) if verify_data else None
        source = (
            CalibrationSource.given(calibration, bool(data_labels))
            if calibration
            else _distilled(loaded, specs, samples, seed, console)
        )
        options = api.Options(
            recipe=recipe,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            first_last_bits=first_last_bits,
            seed=seed,
            weight_scheme=weight_scheme,
            activation_scheme=activation_scheme,
            dynamic=opened,
            tail=check_tail(tail),
        )
        arguments.check_batch(calibration, specs)
        with silence_torch():
            several = api.prepare_all(loaded, arguments.example(loaded, specs, source.example), targets, **options)
        _calibrate(several, source, work.parts, resume, metric, console)
        shown = arguments.data_options(verify_data, mean, std, resize)
        done = [
            _write(one, place, file_format, accept, metric, evaluation, runtime, shown, console)
            for one, place in zip(several, places, strict=True)
        ]
        work.drop_parts()

    console.dump(done if len(targets) > 1 else done[0])
    if not all(row["verify"]["passed"] for row in done):
        raise typer.Exit(1)


def _distilled(loaded: Any, specs: Sequence[TensorSpec], samples: int, seed: int, console: Console) -> CalibrationSource:
    """Images made from the model's own statistics, where the user gives no data."""
    from qdeploy import api

    example = arguments.zeros(specs)
    with console.step_progress() as progress:
        made = api.distill_data(loaded, example, samples, seed, progress)
    count = sum(len(batch[0]) for batch in made)
    console.say(f"no --data: calibrating on {count} images distilled from the batch-norm statistics")
    return CalibrationSource(example=example, labels=None, count=lambda _: count, batches=lambda _: made)


def _calibrate(
    several: Sequence[Prepared], source: CalibrationSource, folder: Path, resume: bool, metric: str | None, console: Console
) -> None:
    from qdeploy import api

    try:
        with console.progress("calibrate", source.count(several[0])) as progress, console.step_progress() as step_progress:
            api.calibrate_all(several, source.batches(several[0]), progress, source.labels, folder, resume, step_progress, metric)
    except KeyboardInterrupt:
        console.say(f"interrupted; finished parts are in {folder}: run the same command with --resume to go on")
        raise typer.Exit(130) from None


class _Refused(Exception):
    """What was made is not worth keeping."""


def _write(
    prepared: Prepared,
    place: Place,
    file_format: str | None,
    accept: bool,
    metric: str | None,
    evaluation: Data | None,
    runtime: list[str] | None,
    shown: Sequence[str],
    console: Console,
) -> dict[str, Any]:
    """Write and verify one target's artifact, and print what came of it; `shown` are the options that name the samples."""
    from qdeploy import api
    from qdeploy.export.manifest import MANIFEST

    with suppress(_Refused), place.staged() as fresh:
        console.say(f"write ONNX for {prepared.backend.name}")
        written = api.convert(prepared, fresh, file_format, accept)
        if evaluation is None:
            report = api.verify(written, runtime=runtime, metric=metric)
        else:
            used = arguments.count(evaluation, prepared)
            numbers = None if evaluation.labels is None else evaluation.labels[:used]
            with console.progress("verify", used) as progress:
                report = api.verify(written, arguments.batches(evaluation, prepared), runtime, numbers, prepared, progress, metric)
        if report.quality and not accept:
            raise _Refused
    refused = bool(report.quality) and not accept
    command = written.manifest["command"].replace("{out}", str(place.out))
    console.print(lambda: print_steps(prepared.log))
    console.print(lambda: print_report(report, str(place.out), shown))
    if refused:
        console.say(f"\nnot written to {place.out}: quantization destroys what the model computes; --accept writes it all the same")
    else:
        console.say(f"\nwritten to {place.out}: {', '.join((*written.manifest['files'], MANIFEST))}")
    for note in written.manifest["notes"]:
        console.say(f"note: {note}")
    if command and not refused:
        console.say(f"next: {command}")
    return {
        "written": not refused,
        "out": str(place.out),
        "backend": prepared.backend.name,
        "command": command,
        "steps": prepared.log,
        "verify": report.to_json(),
    }


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="the folder of an artifact")],
    data: DataPath = None,
    runtime: RuntimeNames = None,
    labels: Labels = None,
    metric: MetricOption = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a written artifact on real runtimes and compare with what was simulated."""
    from qdeploy import api
    from qdeploy.export.artifact import Artifact
    from qdeploy.files.data import open_data

    console = Console(as_json, quiet)
    opened = Artifact.open(out)
    opened.check_whole()
    arguments.check_choices("default", runtime, 1, 0)
    if data is None:
        if labels:
            raise OptionError("--labels go with --data", action="name the samples that the labels belong to")
        report = api.verify(opened, runtime=runtime, metric=metric)
    else:
        specs = opened.specs
        samples = open_data(data, specs, arguments.image_options(mean, std, resize), labels)
        fixed = specs[0].shape[0]
        used = arguments.in_whole_batches(len(samples), fixed)
        numbers = None if samples.labels is None else samples.labels[:used]
        with console.progress("verify", used) as progress:
            report = api.verify(
                opened, samples.batches(fixed or arguments.BATCH, used), runtime, numbers, progress=progress, metric=metric
            )
    shown = arguments.data_options(data, mean, std, resize)
    console.show(report.to_json(), lambda: print_report(report, str(out), shown))
    _finish(report)


@app.command()
def debug(
    out: Annotated[Path, typer.Argument(help="the folder of an artifact")],
    runtime: Annotated[str, typer.Option("--runtime", help="the one to look at, NAME or NAME:VARIANT")],
    data: DataPath = None,
    samples: Annotated[int, typer.Option(help="how many samples to compare on, at most")] = 64,
    isolate: Annotated[bool, typer.Option("--isolate", help="give every op the simulation's own inputs")] = False,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show tensor by tensor where a runtime parts from the simulation; on the samples of the artifact, or of --data."""
    from qdeploy.export.artifact import Artifact
    from qdeploy.files.data import open_data
    from qdeploy.verification.debug import divergence

    console = Console(as_json, quiet)
    opened = Artifact.open(out)
    opened.check_whole()
    arguments.check_choices("default", [runtime], 1, 0)
    if samples < 1:
        raise OptionError("--samples is too small", found=samples, allowed="1 or more", action="leave it out for 64")
    if data is None:
        saved = opened.reference()
        arrays = [saved[f"input.{spec['name']}"][:samples] for spec in opened.inputs]
    else:
        specs = opened.specs
        given = open_data(data, specs, arguments.image_options(mean, std, resize))
        arrays = [tensor.numpy() for tensor in next(given.batches(min(samples, len(given))))]
    found = divergence(opened, runtime, arrays, isolate)
    console.show({"out": str(out)} | found.to_json(), lambda: print_divergence(found))


@app.command()
def inspect(
    model: Model,
    backend: BackendName,
    data: DataPath = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    first_last_bits: FirstLastBits = None,
    weight_scheme: WeightScheme = None,
    activation_scheme: ActivationScheme = None,
    arch: Arch = None,
    input_shape: Shape = None,
    dynamic: DynamicSizes = None,
    tail: TailOption = "auto",
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Print the plan: how each tensor of MODEL is quantized for a target, or why it is not."""
    from qdeploy import api
    from qdeploy.core.targets import find_backend
    from qdeploy.simulation.plan import check_tail

    target = find_backend(backend)
    opened = arguments.dynamic_sizes(dynamic, input_shape)
    loaded, specs = arguments.load(model, arch, allow_pickle, input_shape, data)
    with silence_torch():
        prepared = api.prepare(
            loaded,
            arguments.example(loaded, specs, arguments.zeros(specs)),
            target,
            "fast",
            weight_bits,
            activation_bits,
            first_last_bits,
            0,
            weight_scheme,
            activation_scheme,
            opened,
            check_tail(tail),
        )
    columns = ("tensor", "role", "op", "scheme", "reason")
    rows = [dict(zip(columns, row, strict=True)) for row in prepared.plan.rows()]
    other = prepared.alternative
    shown = {"backend": target.name, "tensors": rows, "cuts": list(prepared.plan.cuts)}
    Console(as_json, False).show(shown, lambda: print(prepared.plan))
    if other is not None and not as_json:
        print("where a concat behind the last layers would lose a part, as calibration finds, what is behind them is kept apart")


@app.command()
def backends(name: Name = None, as_json: Json = False) -> None:
    """List the targets, or show one."""
    from qdeploy.core.backend import backends as registry

    rows = [
        {
            "name": b.name,
            "hardware": b.title,
            "weights": b.weight.describe(),
            "activations": b.activation.describe(),
            "bias": b.bias if isinstance(b.bias, str) else b.bias.describe(),
            "weight_bits": list(b.weight_bits),
            "activation_bits": list(b.activation_bits),
            "formats": [form.name for form in b.formats],
            "files": list(b.formats[0].files),
            "runtimes": list(b.runtimes),
            "command": b.formats[0].command,
            "sources": list(b.sources),
        }
        for b in ([registry[name]] if name else registry)
    ]
    print_rows(rows, ("name", "hardware", "weights", "activations", "bias"), name, as_json)


@app.command()
def recipes(name: Name = None, as_json: Json = False) -> None:
    """List the recipes, or show one with all its options."""
    from qdeploy.numerics.observer import observer_options
    from qdeploy.recipes.presets import find_recipe, recipe_names
    from qdeploy.recipes.step import step_options

    rows = []
    for recipe in [find_recipe(n) for n in ([name] if name else recipe_names())]:
        row: dict[str, object] = {"name": recipe.name, "summary": recipe.summary, "by_grid": recipe.by_grid}
        for part, choice in (("activation", recipe.activation), ("weight", recipe.weight)):
            row[part] = {"observer": choice.observer} | observer_options(choice.observer) | dict(choice.options)
        row["steps"] = [{"name": one.step} | step_options(one.step) | dict(one.options) for one in recipe.steps]
        rows.append(row)
    print_rows(rows, ("name", "summary"), name, as_json)


@app.command()
def runtimes(name: Name = None, as_json: Json = False) -> None:
    """List the runtimes that can check an artifact, and whether they are installed."""
    from qdeploy.runtimes.runtime import runtimes as registry

    rows = []
    for r in [registry[name]] if name else registry:
        rows.append(
            {"name": r.name, "title": r.title, "variants": [*r.variants, *r.others], "installed": r.installed(), "install": r.install}
        )
    print_rows(rows, ("name", "title", "installed", "install"), name, as_json)


def main() -> None:
    """The entry point: a user's mistake is one message and exit status 2."""
    # torch warns of its own internals while it exports; what concerns the user is an error
    warnings.simplefilter("ignore", FutureWarning)
    output = sys.stdout
    try:
        app()
    except QDeployError as error:
        sys.exit(_fail(str(error)))
    except OSError as error:
        what = f"{error.strerror or error}{f': {error.filename!r}' if error.filename else ''}"
        sys.exit(_fail(str(QDeployError(what, action="check the path, its permissions and the space on the disk"))))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):  # what torch says for it
            raise
        action = "give smaller inputs or fewer samples a batch, or a machine with more memory"
        sys.exit(_fail(str(QDeployError("there is not enough memory", found=one_line(error), action=action))))
    finally:
        sys.stdout = output


def _fail(message: str) -> int:
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    sys.stderr.write(f"error: {line if len(line) <= LONGEST_MESSAGE else line[:LONGEST_MESSAGE] + '...'}\n")
    return 2


def _finish(report: Report) -> None:
    if not report.passed:
        raise typer.Exit(1)
