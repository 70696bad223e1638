"""What the command line takes: its options, and the objects that they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qdeploy.core.errors import InputError, OptionError

if TYPE_CHECKING:
    from qdeploy.core.backend import Backend
    from qdeploy.core.spec import TensorSpec
    from qdeploy.export.place import Place
    from qdeploy.files.data import Data, ImageOptions
    from qdeploy.simulation.prepared import Prepared

BATCH = 32

_MODEL = "a .pt2, an ONNX file (FILE.onnx:TENSOR,... up to these), a pickled module, a state dict (with --arch), or MODULE:CALLABLE"
Model = Annotated[str, typer.Argument(help=_MODEL)]
BackendName = Annotated[str, typer.Option("--backend", help="the target: see `qdeploy backends`, or your own NPU.py")]
BackendNames = Annotated[str, typer.Option("--backend", help="the target, or several with commas: see `qdeploy backends`")]
Scheme = "such as 'int4 symmetric per-channel', where the target leaves the choice"
WeightScheme = Annotated[str | None, typer.Option("--weight-scheme", help=f"of weights, {Scheme}")]
ActivationScheme = Annotated[str | None, typer.Option("--activation-scheme", help=f"of activations, {Scheme}")]
DataPath = Annotated[str | None, typer.Option("--data", help="a folder of images, .npy, .npz or MODULE:CALLABLE")]
Labels = Annotated[str | None, typer.Option("--labels", help="class numbers: .npy, .npz or .txt, one a sample")]
Arch = Annotated[str | None, typer.Option("--arch", help="MODULE:CALLABLE that makes the network of a state dict")]
Shape = Annotated[list[str] | None, typer.Option("--input-shape", help="such as 1,3,224,224; once per input")]
DynamicSizes = Annotated[
    list[str] | None, typer.Option("--dynamic", help="a dimension that stays open, INPUT:DIMENSION=NAME, as x:2=height; repeatable")
]
TailOption = Annotated[
    str, typer.Option("--tail", help="what is behind the last layers: auto, float or quantized; auto keeps parts of a concat apart")
]
MetricOption = Annotated[
    str | None, typer.Option("--metric", help="judge by this too: top1, cosine, iou, relative_error, or MODULE:FUNCTION of your own")
]
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


def load(
    model: str, arch: str | None, allow_pickle: bool, shapes: Sequence[str] | None, data: str | None
) -> tuple[Any, tuple[TensorSpec, ...]]:
    """The model, and its inputs: those of an exported program, of --input-shape, or of the data's own arrays."""
    from torch.export import ExportedProgram

    from qdeploy.capture.inputs import program_inputs
    from qdeploy.files.data import array_specs
    from qdeploy.files.model import load_model

    loaded = load_model(model, arch=arch, allow_pickle=allow_pickle)
    if isinstance(loaded, ExportedProgram):
        if shapes:
            raise OptionError("--input-shape is of no use here", found="an exported program has its shapes", action="leave it out")
        return loaded, program_inputs(loaded)
    found = tuple(_parse_shape(text, position, len(shapes)) for position, text in enumerate(shapes)) if shapes else None
    if found is None and data:
        found = array_specs(data)
    if found is None:
        raise OptionError("the model's input shape is not known", action="give --input-shape, such as 1,3,224,224")
    return loaded, _by_name(loaded, found, by_place=bool(shapes))


def _by_name(model: Any, specs: tuple[TensorSpec, ...], by_place: bool) -> tuple[TensorSpec, ...]:
    """The inputs with the names of forward's parameters, in their order; arrays of a file are found by name."""
    from qdeploy.capture.inputs import parameters

    names = parameters(model)
    if by_place or len(specs) == 1:
        return tuple(replace(spec, name=name) for spec, name in zip(specs, names, strict=False)) if len(names) >= len(specs) else specs
    given = {spec.name: spec for spec in specs}
    if not names or not set(given) <= set(names):
        raise InputError(
            "the arrays of the data are not named as the model's inputs",
            found=", ".join(given),
            allowed=", ".join(names) or "none: forward takes *inputs, which have no names",
            action="save them with np.savez and these names" if names else "give the shapes with --input-shape",
        )
    return tuple(given[name] for name in names if name in given)


def dynamic_sizes(texts: Sequence[str] | None, shapes: Sequence[str] | None) -> dict[str, dict[int, str]] | None:
    """What --dynamic says; without it, --input-shape fixes what a file leaves open."""
    found: dict[str, dict[int, str]] = {}
    for text in texts or ():
        match = re.fullmatch(r"\s*(.+):(-?\d+)=(\w+)\s*", text)
        if match is None:
            allowed = "INPUT:DIMENSION=NAME"
            raise OptionError("--dynamic is wrong", found=repr(text), allowed=allowed, action="write it as input_ids:1=sequence")
        name, dimension, size = match[1], int(match[2]), match[3]
        if found.setdefault(name, {}).setdefault(dimension, size) != size:
            raise OptionError(f"--dynamic names dimension {dimension} of '{name}' twice", found=text, action="name it once")
    return found if texts or shapes else None


def _parse_shape(text: str, position: int, count: int) -> TensorSpec:
    from qdeploy.core.spec import TensorSpec

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


def with_open_sizes(specs: Sequence[TensorSpec], dynamic: dict[str, dict[int, str]] | None) -> list[TensorSpec]:
    """`specs` for other data than that which they were read off: what stays open has any size."""
    opened = dynamic or {}
    shapes = [tuple(None if d in opened.get(spec.name, {}) else size for d, size in enumerate(spec.shape)) for spec in specs]
    return [replace(spec, shape=shape) for spec, shape in zip(specs, shapes, strict=True)]


def zeros(specs: Sequence[TensorSpec]) -> tuple[Any, ...]:
    import torch

    shapes = [[size or (2 if dimension else 1) for dimension, size in enumerate(spec.shape)] for spec in specs]
    return tuple(torch.zeros(shape, dtype=getattr(torch, spec.dtype)) for spec, shape in zip(specs, shapes, strict=True))


def example(model: Any, specs: Sequence[TensorSpec], tensors: Sequence[Any]) -> Any:
    """What a module is captured with: tensors by the names of its inputs, where it has several with names. A program has its own."""
    import torch

    from qdeploy.capture.inputs import parameters

    if not isinstance(model, torch.nn.Module):
        return None
    names = [spec.name for spec in specs]
    return dict(zip(names, tensors, strict=True)) if set(names) <= set(parameters(model)) else tuple(tensors)


def check_batch(data: Data | None, specs: Sequence[TensorSpec]) -> None:
    """`InputError` where the model fixes a batch that the samples do not fill, before it is captured with one."""
    if data is not None and specs and specs[0].shape and specs[0].shape[0] is not None:
        in_whole_batches(len(data), specs[0].shape[0])


def image_options(mean: str | None, std: str | None, resize: str | None) -> ImageOptions:
    from qdeploy.files.data import ImageOptions

    size = None
    if resize is not None:
        height, _, width = resize.lower().partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            raise OptionError("--resize is no size", found=resize, allowed="HEIGHTxWIDTH", action="give a size such as 224x224")
        size = (int(height), int(width))
    return ImageOptions(size=size, mean=_numbers(mean, "--mean", 0.0), std=_numbers(std, "--std", 1.0))


def data_options(data: str | None, mean: str | None, std: str | None, resize: str | None) -> list[str]:
    """The words that name these samples on a command line; none for those of an artifact."""
    given = {"--data": data, "--mean": mean, "--std": std, "--resize": resize}
    return [word for option, value in given.items() if data and value for word in (option, value)]


def _numbers(text: str | None, option: str, default: float) -> tuple[float, ...]:
    if text is None:
        return (default,)
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        action = "give them as 0.5,0.5,0.5"
        raise OptionError(f"{option} is no list of numbers", found=text, allowed="one number a channel", action=action) from None


def free_places(out: Path, targets: Sequence[Backend], file_format: str | None) -> list[Path]:
    """The folder of each target: `out`, or one in it with the target's name. Both may be written, and so may the format."""
    from qdeploy.export.place import check_free

    places = [out / target.name if len(targets) > 1 else out for target in targets]
    for target, place in zip(targets, places, strict=True):
        target.choose_format(file_format)
        check_free(place)
    return places


@contextmanager
def claimed(out: Path, folders: Sequence[Path]) -> Iterator[tuple[Place, list[Place]]]:
    """Hold `out`, beside which finished parts are kept, and every one of the `folders`, which is `out` itself or lies in it."""
    from qdeploy.export.place import claim, held

    with ExitStack() as stack:
        places = [stack.enter_context(claim(folder)) for folder in folders]
        yield places[0] if folders[0] == out else stack.enter_context(held(out)), places


def check_labels(*pairs: tuple[str, str | None, str, str | None]) -> None:
    """`OptionError` for labels, an option with its value, without the samples that they belong to."""
    for option, labels, needed, data in pairs:
        if labels and not data:
            raise OptionError(f"{option} go with {needed}", action="name the samples that the labels belong to")


def check_choices(recipe: str, runtime: Sequence[str] | None, samples: int, seed: int) -> None:
    """Find a wrong name or number before any work is done."""
    from qdeploy.recipes.presets import find_recipe
    from qdeploy.runtimes.runtime import find_runtime

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


def count(data: Data, prepared: Prepared) -> int:
    """How many samples are used: a fixed batch leaves out a remainder."""
    return in_whole_batches(len(data), None if prepared.captured.dynamic_batch else _size(prepared))


def in_whole_batches(count: int, batch: int | None) -> int:
    """`count` without what does not fill a fixed batch."""
    if batch is None:
        return count
    if count < batch:
        found, allowed = f"{count} samples", f"{batch} or more"
        raise InputError("there are fewer samples than the model's fixed batch", found=found, allowed=allowed, action="give more")
    return count - count % batch


def batches(data: Data, prepared: Prepared) -> Iterator[tuple[Any, ...]]:
    return data.batches(_size(prepared), count(data, prepared))


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSource:
    """What a model is calibrated on: `example` for its capture; how many samples, and their batches, for a prepared model."""

    example: tuple[Any, ...]
    labels: Any
    count: Callable[[Prepared], int]
    batches: Callable[[Prepared], Iterable[tuple[Any, ...]]]

    @classmethod
    def given(cls, data: Data, with_labels: bool) -> CalibrationSource:
        """The user's own data; the example has one sample, which is also the batch of a model that fixes it."""
        labels = data.labels if with_labels else None
        return cls(example=next(data.batches(1)), labels=labels, count=partial(count, data), batches=partial(batches, data))
