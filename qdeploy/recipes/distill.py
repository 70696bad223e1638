"""Calibration images for a model without data, made from what its batch norms remember of its training data.

Images x start as noise and are optimised until, at the input of every batch norm l, their mean m and standard deviation s of each
channel are the stored ones (ZeroQ, Cai et al. 2020). Errors count in units of the layer, since a channel with hardly any spread is of
no consequence:

    loss(x) = mean over l of  E[(m_l - mean_l)^2 + (s_l - std_l)^2] / E[std_l^2]       E over the channels of l
            + the same for the colours of x, with mean 0 and deviation 1
            - OUTPUT * E log(max - min of the outputs of an image)

The last term is small: the mean of many images can be right while none is like anything, and then outputs are too small. Batch norms
alone also leave open what noise x keeps, so that the images are sought where real ones lie:

- x is z with its amplitudes divided by the spatial frequency, as they fall in natural images (Field 1987), and Adam moves z. So x is
  cloudy from the start, when z is white noise, and few iterations do.
- A pixel has a floor and a ceiling: x = LIMIT tanh(x / LIMIT).
- At every step the images are shifted and mirrored at random, so that no pattern is bound to its place.

Images are expected as networks are usually trained: normalised, so that their pixels have about mean 0 and deviation 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qdeploy.core.errors import InputError
from qdeploy.core.progress import StepProgress, no_step_progress
from qdeploy.core.spec import TensorSpec, show_shape
from qdeploy.graph import edit, query
from qdeploy.recipes.step import generator

RATE = 0.3
"""Adam's first learning rate; it falls to 0 as half a cosine."""
LIMIT = 2.7
"""Largest pixel: white, less the mean, over the deviation of the colours of ImageNet is 2.2 to 2.7."""
OUTPUT = 0.02
"""Weight of the outputs' spread."""
SHIFT = 8
"""Images are shifted by up to one in so many of their pixels."""
MEMORY = 1 << 31
"""Bytes that the values of one batch, kept for its gradient, should not exceed."""
NEED = "give --data"

Stored = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Source:
    """What images are made from: `module` returns the inputs of all batch norms, whose statistics are `stored`, and then an output."""

    module: fx.GraphModule
    stored: tuple[Stored, ...]
    size: tuple[int, int, int]
    dtype: torch.dtype


def distill(
    module: fx.GraphModule,
    inputs: Sequence[TensorSpec],
    samples: int,
    seed: int,
    iterations: int = 50,
    batch: int = 64,
    progress: StepProgress = no_step_progress,
) -> list[tuple[Tensor, ...]]:
    """`samples` images in batches of at most `batch`, each `([n, C, H, W],)`; `module` is captured, its batch norms not yet folded.

    The same seed makes the same images. A model with a fixed batch gets whole batches of that, and a large one smaller batches.
    Raises `InputError` where the model has no batch norm with statistics, or takes anything but one floating-point image of known
    size.
    """
    size = _image_size(inputs)
    stored, module = _with_statistics(module)
    source = Source(module, stored, size, getattr(torch, inputs[0].dtype))
    fixed = inputs[0].shape[0]
    count = -(-samples // (fixed or max(1, min(batch, MEMORY // _bytes_an_image(source.module)))))
    sizes = [fixed] * count if fixed else [len(part) for part in torch.arange(samples).tensor_split(count)]
    made: list[tuple[Tensor, ...]] = []
    for index, images in enumerate(sizes):

        def told(done: int, loss: float, index: int = index) -> None:
            progress(f"distill batch {index + 1} of {count}", index * iterations + done, count * iterations, loss)

        made.append((_optimise(source, images, iterations, generator(seed, index), told),))
    return made


def _image_size(inputs: Sequence[TensorSpec]) -> tuple[int, int, int]:
    shown = ", ".join(f"{spec.name} {spec.dtype} {show_shape(spec.shape)}" for spec in inputs)
    what = "images cannot be distilled for this model's inputs"
    if len(inputs) != 1 or not inputs[0].dtype.startswith("float") or len(inputs[0].shape) != 4:
        raise InputError(what, found=shown, allowed="one floating-point image, [N, C, H, W]", action=NEED)
    channels, height, width = inputs[0].shape[1:]
    if channels is None or height is None or width is None:
        raise InputError(what, found=shown, allowed="known sizes, but for the batch", action=f"fix the size of the image, or {NEED}")
    return channels, height, width


def _with_statistics(module: fx.GraphModule) -> tuple[tuple[Stored, ...], fx.GraphModule]:
    """The `(mean, standard deviation)` of all batch norms, `[C]` each, and a copy of `module` as in `Source`."""
    copy = edit.copy(module, own_parameters=True)
    for parameter in copy.parameters():
        parameter.requires_grad_(False)
    read: list[fx.Node] = []
    stored: list[Stored] = []
    for node in copy.graph.nodes:
        if node.op == "call_function" and query.op_of(node).name == "batch_norm":
            before, mean, variance = (node.args[position] for position in (0, 3, 4))
            if isinstance(before, fx.Node) and isinstance(mean, fx.Node) and isinstance(variance, fx.Node):
                read.append(before)
                stored.append((_constant(copy, mean), _constant(copy, variance).sqrt()))
    if not read:
        found = "none; transformers have none, and in ONNX and optimized models they are folded into other layers"
        what = "calibration without data needs batch norms with running statistics"
        raise InputError(what, found=found, action=NEED)
    (output,) = copy.graph.find_nodes(op="output")
    last = next(node for node in query.outputs(copy.graph) if query.is_float(node))
    output.args = ((*read, last),)
    copy.graph.set_codegen(fx.graph.CodeGen())  # the structure of the outputs is another
    edit.finish(copy)
    return tuple(stored), copy


def _bytes_an_image(module: fx.GraphModule) -> int:
    """Roughly what all values of the graph take up for one image."""
    made = [query.value(node) for node in module.graph.nodes if node.op == "call_function" and query.is_float(node)]
    sizes = [value.shape[1:] for value in made if isinstance(value, Tensor)]
    return 4 * sum(math.prod(size) for size in sizes if all(isinstance(side, int) for side in size))


def _constant(module: fx.GraphModule, node: fx.Node) -> Tensor:
    return query.parameter(module, str(node.target)).detach().float()


def _optimise(source: Source, images: int, iterations: int, random: torch.Generator, told: Callable[[int, float], None]) -> Tensor:
    """One batch of `images`."""
    with torch.enable_grad():
        z = torch.randn((images, *source.size), generator=random).requires_grad_()
        optimizer = torch.optim.Adam([z], lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
        for done in range(1, iterations + 1):
            loss = _loss(source, _image(z), random)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            told(done, loss.item())
    return _image(z.detach()).to(source.dtype)


def _image(z: Tensor) -> Tensor:
    """The images `[n, C, H, W]` of coefficients of the same shape."""
    height, width = z.shape[2:]
    frequency = torch.hypot(torch.fft.fftfreq(height).unsqueeze(1), torch.fft.rfftfreq(width))
    amplitude = 1 / frequency.clamp(min=1 / max(height, width))
    amplitude /= amplitude.square().mean().sqrt()
    x = torch.fft.irfft2(torch.fft.rfft2(z) * amplitude, s=(height, width))
    return LIMIT * torch.tanh(x / LIMIT)


def _loss(source: Source, x: Tensor, random: torch.Generator) -> Tensor:
    moved = _moved(x, random).to(source.dtype).contiguous(memory_format=torch.channels_last)
    *seen, output = source.module(moved)
    loss = torch.stack([_distance(values, *stored) for values, stored in zip(seen, source.stored, strict=True)]).mean()
    loss = loss + _distance(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1]))
    rows = output.float().reshape(len(x), -1)
    if rows.shape[1] > 1:
        loss = loss - OUTPUT * (rows.amax(1) - rows.amin(1)).clamp(min=1e-6).log().mean()
    return loss


def _moved(x: Tensor, random: torch.Generator) -> Tensor:
    """`x` shifted, what leaves on one side coming back on the other, and mirrored or not."""
    reach = [side // SHIFT for side in x.shape[2:]]
    steps = [int(torch.randint(-r, r + 1, (), generator=random)) for r in reach]
    x = torch.roll(x, steps, (2, 3))
    return x.flip(3) if torch.rand((), generator=random) < 0.5 else x


def _distance(values: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """How far the statistics of `values` `[n, C, ...]` are from those given, `[C]` each."""
    unit = deviation.square().mean().clamp(min=1e-12)
    variance, average = torch.var_mean(values.float(), dim=[d for d in range(values.dim()) if d != 1], correction=0)
    spread = (variance + 1e-6 * unit).sqrt()
    return ((average - mean).square() + (spread - deviation).square()).mean() / unit
