"""The command line: parses, prints, nothing else. torch is imported by the commands that need it, not for `--help`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qdeploy.errors import InputError, OptionError, QDeployError
from qdeploy.screen import Screen, hushed, print_report, print_rows

if TYPE_CHECKING:
    from qdeploy.files.data import Data, ImageOptions
    from qdeploy.prepared import Prepared
    from qdeploy.spec import TensorSpec
    from qdeploy.verification import Report

app = typer.Typer(
    help="Quantize a model for one piece of hardware, and prove that what was simulated is what is deployed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)

BATCH = 32

Model = Annotated[str, typer.Argument(help="a .pt2, a pickled module, a state dict (with --arch), or MODULE:CALLABLE")]
BackendName = Annotated[str, typer.Option("--backend", help="the target: see `qdeploy backends`, or your own NPU.py")]
BackendNames = Annotated[str, typer.Option("--backend", help="the target, or several with commas: see `qdeploy backends`")]
Scheme = "such as 'int4 symmetric per-channel', where the target leaves the choice"
WeightScheme = Annotated[str | None, typer.Option("--weight-scheme", help=f"of weights, {Scheme}")]
ActivationScheme = Annotated[str | None, typer.Option("--activation-scheme", help=f"of activations, {Scheme}")]
DataPath = Annotated[str | None, typer.Option("--data", help="a folder of images, .npy, .npz or MODULE:CALLABLE")]
Labels = Annotated[str | None, typer.Option("--labels", help="class numbers: .npy, .npz or .txt, one a sample")]
Arch = Annotated[str | None, typer.Option("--arch", help="MODULE:CALLABLE that makes the network of a state dict")]
Shape = Annotated[list[str] | None, typer.Option("--input-shape", help="such as 1,3,224,224; once per input")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="unpickle a model file that you trust; this runs its code")]
Mean = Annotated[str | None, typer.Option("--mean", help="of images in [0, 1], per channel: 0.485,0.456,0.406")]
Std = Annotated[str | None, typer.Option("--std", help="of images in [0, 1], per channel: 0.229,0.224,0.225")]
Resize = Annotated[str | None, typer.Option("--resize", help="images to HEIGHTxWIDTH, such as 224x224")]
WeightBits = Annotated[int | None, typer.Option("--weight-bits", help="width of weights, where the target has a choice")]
ActivationBits = Annotated[int | None, typer.Option("--activation-bits", help="width of activations, where there is a choice")]
FirstLastBits = Annotated[int | None, typer.Option("--first-last-bits", help="width of the first and last layer's weights")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", help="print errors only")]
RuntimeNames = Annotated[list[str] | None, typer.Option("--runtime", help="check here only, NAME or NAME:VARIANT; may be repeated")]
Name = Annotated[str | None, typer.Argument(help="show this one")]


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
    out: Annotated[Path, typer.Option(help="the folder to write; with several targets, of their folders")] = Path("out"),
    seed: Annotated[int, typer.Option(help="of the choice of samples, and of everything random")] = 0,
    allow_pickle: Pickle = False,
    file_format: Annotated[
        str | None, typer.Option("--format", help="which of the target's formats, see `qdeploy backends NAME`")
    ] = None,
    verify_data: Annotated[str | None, typer.Option(help="verify on these samples, not on 64 of --data")] = None,
    labels: Labels = None,
    runtime: RuntimeNames = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL for a target or several, write the artifacts, and verify them on the runtimes that are installed."""
    import torch

    from qdeploy import api, artifact
    from qdeploy.files.data import open_data

    screen = Screen(as_json, quiet)
    targets = api.find_backends(backend)
    places = [out / target.name if len(targets) > 1 else out for target in targets]
    for target, place in zip(targets, places, strict=True):
        target.choose_format(file_format)
        artifact.check_free(place)
    _check_choices(recipe, runtime, samples, seed)
    if labels and not verify_data:
        raise OptionError("--labels go with --verify-data", action="name the samples that the labels belong to")
    if data is None:
        raise InputError("calibration data is missing", action="give --data: a folder of images, .npy, .npz or MODULE:CALLABLE")
    images = _image_options(mean, std, resize)
    loaded, specs = _load(model, arch, allow_pickle, input_shape, data)
    calibration = open_data(data, specs, images).pick(samples, seed)
    evaluation = open_data(verify_data, specs, images, labels) if verify_data else None
    # a program brings its own example, of the batch that it was exported with
    example = next(calibration.batches(BATCH)) if isinstance(loaded, torch.nn.Module) else None
    options = api.Options(
        recipe=recipe,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        first_last_bits=first_last_bits,
        seed=seed,
        weight_scheme=weight_scheme,
        activation_scheme=activation_scheme,
    )
    with hushed():
        several = api.prepare_all(loaded, example, targets, **options)
    with screen.progress("calibrate", _count(calibration, several[0])) as watch:
        api.calibrate_all(several, _batches(calibration, several[0]), watch)
    done = [_write(one, place, file_format, evaluation, runtime, screen) for one, place in zip(several, places, strict=True)]
    screen.dump(done if len(targets) > 1 else done[0])
    if not all(row["verify"]["passed"] for row in done):
        raise typer.Exit(1)


def _write(
    prepared: Prepared, out: Path, file_format: str | None, evaluation: Data | None, runtime: list[str] | None, screen: Screen
) -> dict[str, Any]:
    """Write and verify one target's artifact, and print what came of it."""
    from qdeploy import api, artifact

    with artifact.staged(out) as place:
        screen.say(f"write ONNX for {prepared.backend.name}")
        written = api.convert(prepared, place, file_format)
        if evaluation is None:
            report = api.verify(written, runtime=runtime)
        else:
            used = _count(evaluation, prepared)
            numbers = None if evaluation.labels is None else evaluation.labels[:used]
            with screen.progress("verify", used) as watch:
                report = api.verify(written, _batches(evaluation, prepared), runtime, numbers, prepared, watch)
    command = written.manifest["command"].replace("{out}", str(out))
    screen.print(lambda: print_report(report))
    screen.say(f"\nwritten to {out}: {', '.join((*written.manifest['files'], artifact.MANIFEST))}")
    for note in written.manifest["notes"]:
        screen.say(f"note: {note}")
    if command:
        screen.say(f"next: {command}")
    return {"out": str(out), "backend": prepared.backend.name, "command": command, "verify": report.to_json()}


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="the folder of an artifact")],
    data: DataPath = None,
    runtime: RuntimeNames = None,
    labels: Labels = None,
    mean: Mean = None,
    std: Std = None,
    resize: Resize = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a written artifact on real runtimes and compare with what was simulated."""
    from qdeploy import api
    from qdeploy.artifact import Artifact
    from qdeploy.files.data import open_data
    from qdeploy.spec import TensorSpec

    screen = Screen(as_json, quiet)
    opened = Artifact.open(out)
    opened.check_whole()
    _check_choices("default", runtime, 1, 0)
    if data is None:
        if labels:
            raise OptionError("--labels go with --data", action="name the samples that the labels belong to")
        report = api.verify(opened, runtime=runtime)
    else:
        specs = [TensorSpec(name=s["name"], shape=tuple(s["shape"]), dtype=s["dtype"]) for s in opened.inputs]
        samples = open_data(data, specs, _image_options(mean, std, resize), labels)
        fixed = specs[0].shape[0]
        used = _whole(len(samples), fixed)
        numbers = None if samples.labels is None else samples.labels[:used]
        with screen.progress("verify", used) as watch:
            report = api.verify(opened, samples.batches(fixed or BATCH, used), runtime, numbers, watch=watch)
    screen.show(report.to_json(), lambda: print_report(report))
    _finish(report)


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
    allow_pickle: Pickle = False,
    as_json: Json = False,
) -> None:
    """Print the plan: how each tensor of MODEL is quantized for a target, or why it is not."""
    from qdeploy import api

    target = api.find_backend(backend)
    loaded, specs = _load(model, arch, allow_pickle, input_shape, data)
    with hushed():
        prepared = api.prepare(
            loaded, _zeros(specs), target, "fast", weight_bits, activation_bits, first_last_bits, 0, weight_scheme, activation_scheme
        )
    columns = ("tensor", "role", "op", "scheme", "reason")
    rows = [dict(zip(columns, row, strict=True)) for row in prepared.plan.rows()]
    Screen(as_json, False).show({"backend": target.name, "tensors": rows}, lambda: print(prepared.plan))


@app.command()
def backends(name: Name = None, as_json: Json = False) -> None:
    """List the targets, or show one."""
    from qdeploy.backend import backends as registry

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
    from qdeploy.observer import observer_options
    from qdeploy.recipe import find_recipe, recipe_names

    rows = []
    for recipe in [find_recipe(n) for n in ([name] if name else recipe_names())]:
        row: dict[str, object] = {"name": recipe.name, "summary": recipe.summary}
        for part, choice in (("activation", recipe.activation), ("weight", recipe.weight)):
            row[part] = {"observer": choice.observer} | observer_options(choice.observer) | dict(choice.options)
        rows.append(row)
    print_rows(rows, ("name", "summary"), name, as_json)


@app.command()
def runtimes(name: Name = None, as_json: Json = False) -> None:
    """List the runtimes that can check an artifact, and whether they are installed."""
    from qdeploy.runtimes import runtimes as registry

    rows = []
    for r in [registry[name]] if name else registry:
        install = f"pip install 'qdeploy[{r.extra}]'" if r.extra else "pip install qdeploy"
        rows.append({"name": r.name, "title": r.title, "variants": list(r.variants), "installed": r.installed(), "install": install})
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
    finally:
        sys.stdout = output


def _fail(message: str) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return 2


def _load(
    model: str, arch: str | None, allow_pickle: bool, shapes: Sequence[str] | None, data: str | None
) -> tuple[Any, tuple[TensorSpec, ...]]:
    """The model, and its inputs: those of an exported program, of --input-shape, or of the data's own arrays."""
    from torch.export import ExportedProgram

    from qdeploy.capture import program_inputs
    from qdeploy.files.data import array_specs
    from qdeploy.files.model import load_model

    loaded = load_model(model, arch=arch, allow_pickle=allow_pickle)
    if isinstance(loaded, ExportedProgram):
        if shapes:
            raise OptionError("--input-shape is of no use here", found="an exported program has its shapes", action="leave it out")
        return loaded, program_inputs(loaded)
    if shapes:
        return loaded, tuple(_parse_shape(text, position, len(shapes)) for position, text in enumerate(shapes))
    found = array_specs(data) if data else None
    if found is None:
        raise OptionError("the model's input shape is not known", action="give --input-shape, such as 1,3,224,224")
    return loaded, found


def _parse_shape(text: str, position: int, count: int) -> TensorSpec:
    from qdeploy.spec import TensorSpec

    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) < 2 or any(size < 1 for size in sizes):
        raise OptionError(
            "--input-shape is no shape", found=text, allowed="whole numbers from 1, batch first", action="give 1,3,224,224"
        )
    name = "x" if count == 1 else f"x{position}"
    return TensorSpec(name=name, shape=(None, *sizes[1:]), dtype="float32")


def _zeros(specs: Sequence[TensorSpec]) -> list[Any]:
    import torch

    return [torch.zeros([size or 2 for size in spec.shape], dtype=getattr(torch, spec.dtype)) for spec in specs]


def _image_options(mean: str | None, std: str | None, resize: str | None) -> ImageOptions:
    from qdeploy.files.data import ImageOptions

    size = None
    if resize is not None:
        height, _, width = resize.lower().partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            raise OptionError("--resize is no size", found=resize, allowed="HEIGHTxWIDTH", action="give a size such as 224x224")
        size = (int(height), int(width))
    return ImageOptions(size=size, mean=_numbers(mean, "--mean", 0.0), std=_numbers(std, "--std", 1.0))


def _numbers(text: str | None, option: str, default: float) -> tuple[float, ...]:
    if text is None:
        return (default,)
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        action = "give them as 0.5,0.5,0.5"
        raise OptionError(f"{option} is no list of numbers", found=text, allowed="one number a channel", action=action) from None


def _check_choices(recipe: str, runtime: Sequence[str] | None, samples: int, seed: int) -> None:
    """Find a wrong name or number before any work is done."""
    from qdeploy.recipe import find_recipe
    from qdeploy.runtimes import find_runtime

    find_recipe(recipe)
    for name in runtime or ():
        find_runtime(name)[0].require()
    if samples < 1:
        raise OptionError("--samples is too small", found=samples, allowed="1 or more", action="leave it out for 512")
    if not 0 <= seed < 2**63:
        raise OptionError("--seed is out of range", found=seed, allowed="0 to 2^63 - 1", action="leave it out for 0")


def _size(prepared: Prepared) -> int:
    """The batch that the graph takes: ours where it may vary."""
    return BATCH if prepared.captured.dynamic_batch else prepared.captured.inputs[0].shape[0] or BATCH


def _count(data: Data, prepared: Prepared) -> int:
    """How many samples are used: a fixed batch leaves out a remainder."""
    return _whole(len(data), None if prepared.captured.dynamic_batch else _size(prepared))


def _whole(count: int, batch: int | None) -> int:
    """`count` without what does not fill a fixed batch."""
    if batch is None:
        return count
    if count < batch:
        found, allowed = f"{count} samples", f"{batch} or more"
        raise InputError("there are fewer samples than the model's fixed batch", found=found, allowed=allowed, action="give more")
    return count - count % batch


def _batches(data: Data, prepared: Prepared) -> Iterator[tuple[Any, ...]]:
    return data.batches(_size(prepared), _count(data, prepared))


def _finish(report: Report) -> None:
    if not report.passed:
        raise typer.Exit(1)
