"""The words of convolutional networks, some at a time in the branches of a small network: every target quantizes all layers, leaves no
tensor without an encoding that it computes in integers, and computes what was simulated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import qdeploy
from qdeploy.export.artifact import Artifact
from qdeploy.runtimes.runtime import runtimes
from qdeploy.simulation.prepared import Prepared

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import completeness

TARGETS = ("snpe", "tensorrt", "openvino", "vitis", "onnxruntime")
Op = Callable[[Tensor], Tensor]


class Branch(nn.Module):
    """An op between two layers of 8 channels."""

    def __init__(self, op: Op | nn.Module, sides: int, channels: int = 8) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[sides - 1]
        self.first, self.last = conv(3, 8, 3, padding=1), conv(channels, 4, 1)
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.op(self.first(x)))


class Branches(nn.Module):
    """One input, and an output of every branch."""

    def __init__(self, branches: list[Branch]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [branch(x) for branch in self.branches]


class SqueezeExcite(nn.Module):
    """A gate for every channel, made from the mean of all."""

    def __init__(self, gate: Op) -> None:
        super().__init__()
        self.reduce, self.expand, self.gate = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x)))


class Many(nn.Module):
    """One tensor that many ops read, each in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.interpolate(F.max_pool2d(x, 2), scale_factor=2)
        return torch.cat([self.a(x) + x, self.b(x) * x, F.relu(x) - x, torch.sigmoid(x), pooled], 1)


class Standardized(nn.Module):
    """A convolution whose weight is computed in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (weight - mean) / (std + 1e-5), self.conv.bias, padding=1)


class Made(nn.Module):
    """A depthwise convolution whose kernels are made from the input, as far as shapes of a batch of one are known."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


LAYERS: dict[str, tuple[Callable[[], Op], int]] = {
    "grouped": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2), 2),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), 2),
    "dilated": (lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2), 2),
    "strided, without a bias": (lambda: nn.Conv2d(8, 8, 3, stride=2, bias=False), 2),
    "one longer side": (lambda: nn.Conv2d(8, 8, (1, 5), padding=(0, 2)), 2),
    "same padding": (lambda: nn.Conv2d(8, 8, 4, padding="same"), 2),
    "reflected": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), 2),
    "circular": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), 2),
    "replicated": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="replicate"), 2),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 2, stride=2), 2),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=2), 2),
    "transposed, dilated": (lambda: nn.ConvTranspose2d(8, 8, 3, padding=2, dilation=2), 2),
    "in one dimension": (lambda: nn.Conv1d(8, 8, 3, padding=1), 1),
    "in one dimension, transposed": (lambda: nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1), 1),
    "in one dimension, batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(8), nn.ReLU()), 1),
    "in three dimensions": (lambda: nn.Conv3d(8, 8, 3, padding=1), 3),
    "in three dimensions, transposed": (lambda: nn.ConvTranspose3d(8, 8, 2, stride=2), 3),
    "in three dimensions, batch norm": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm3d(8)), 3),
    "called twice": (Twice, 2),
    "with a computed weight": (Standardized, 2),
    "with a computed gain": (Made, 2),
    "squeeze and excite, sigmoid": (lambda: SqueezeExcite(torch.sigmoid), 2),
    "squeeze and excite, hardsigmoid": (lambda: SqueezeExcite(F.hardsigmoid), 2),
    "bilinear product": (lambda: nn.Sequential(nn.Flatten(2), nn.Linear(36, 36), nn.Unflatten(2, (6, 6))), 2),
}
ACTIVATIONS: dict[str, Callable[[], Op]] = {
    **{m.__name__: m for m in (nn.Hardswish, nn.SiLU, nn.LeakyReLU, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.GELU, nn.ELU, nn.Softplus)},
    **{m.__name__: m for m in (nn.Mish, nn.ReLU6, nn.Hardtanh, nn.SELU, nn.CELU, nn.Softsign, nn.LogSigmoid, nn.ReLU)},
    "PReLU, one slope": nn.PReLU,
    "PReLU, a slope a channel": lambda: nn.PReLU(8),
    "GELU with tanh": lambda: nn.GELU(approximate="tanh"),
    "softmax": lambda: nn.Softmax(1),
    "GLU, doubled": lambda: lambda x: torch.cat([F.glu(x, 1), F.glu(x, 1)], 1),
}


def written(x: Tensor) -> Tensor:
    """Parts of a tensor overwritten, as decoders of boxes do."""
    x = x.clone()
    x[:, 0] = x[:, 1] * 2
    x[:, 2:4, 1:] = F.relu(x[:, 2:4, 1:])
    return x


OPS: dict[str, Op] = {
    "split": lambda x: torch.cat(torch.split(x, [2, 6], 1)[::-1], 1),
    "chunk": lambda x: torch.cat([F.relu(part) for part in x.chunk(2, 1)], 1),
    "halves that differ": lambda x: torch.cat([x[:, :4], F.relu(x[:, 4:]) * 3], 1),
    "stack": lambda x: torch.stack([x, F.relu(x)], 1).mean(1),
    "channel shuffle": lambda x: torch.channel_shuffle(x, 4),
    "channel shuffle, by reshapes": lambda x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2),
    "pixel shuffle and back": lambda x: F.pixel_unshuffle(F.relu(F.pixel_shuffle(x, 2)), 2),
    "space to depth by slices": lambda x: torch.cat([x[:, ::2, a::2, b::2] for a in (0, 1) for b in (0, 1)], 1)[:, :8],
    "picked channels": lambda x: x[:, [3, 0, -1, 2, 2, 7, 6, 5]],
    "written into": written,
    "patches": lambda x: F.unfold(x, 3, padding=1).unflatten(1, (8, 9)).mean(2).unflatten(2, (6, 6)),
    "spread of the sides": lambda x: (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 1),
    "repeated channels": lambda x: x[:, :4].repeat_interleave(2, 1),
    "padding": lambda x: F.pad(x, (1, 0, 0, 1)),
    "padding with a value": lambda x: F.pad(x, (1, 1), value=0.5),
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "nearest, exact": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest-exact"),
    "nearest to a size": lambda x: F.interpolate(x, size=(9, 12)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "bilinear, aligned": lambda x: F.interpolate(x, size=(9, 9), mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2.0, mode="bicubic"),
    "max pooling": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max pooling, rounded up": lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True),
    "max pooling, dilated": lambda x: F.max_pool2d(x, 2, 1, dilation=2),
    "average pooling": lambda x: F.avg_pool2d(x, 2),
    "average pooling with the border": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=True),
    "average pooling without the border": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "average pooling, rounded up": lambda x: F.avg_pool2d(x, 4, 4, ceil_mode=True),
    "adaptive average": lambda x: F.adaptive_avg_pool2d(x, 3),
    "adaptive average to a multiple": lambda x: F.adaptive_avg_pool2d(x, (12, 6)),
    "adaptive average by windows that differ": lambda x: F.adaptive_avg_pool2d(x, (4, 5)),
    "adaptive average of one side": lambda x: F.adaptive_avg_pool2d(x, (1, None)),
    "global average": lambda x: F.adaptive_avg_pool2d(x, 1),
    "mean of the sides": lambda x: x.mean((2, 3), keepdim=True),
    "adaptive maximum": lambda x: F.adaptive_max_pool2d(x, 3),
    "global maximum": lambda x: F.adaptive_max_pool2d(x, 1),
    "greatest": lambda x: x.amax((2, 3), keepdim=True),
    "lp pooling": lambda x: F.lp_pool2d(F.relu(x) + 0.1, 2.0, 2),
    "the stem of a cross": lambda x: x.mean(2, keepdim=True) + x.mean(3, keepdim=True),
}
SIDES: dict[str, tuple[Op, int]] = {
    "max pooling in one": (lambda x: F.max_pool1d(x, 2), 1),
    "average pooling in one": (lambda x: F.avg_pool1d(x, 3, 2, 1), 1),
    "adaptive average in one": (lambda x: F.adaptive_avg_pool1d(x, 1), 1),
    "adaptive maximum in one": (lambda x: F.adaptive_max_pool1d(x, 1), 1),
    "nearest in one": (lambda x: F.interpolate(x, scale_factor=2.0), 1),
    "linear in one": (lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"), 1),
    "max pooling in three": (lambda x: F.max_pool3d(x, 2), 3),
    "average pooling in three": (lambda x: F.avg_pool3d(x, 2), 3),
    "adaptive average in three": (lambda x: F.adaptive_avg_pool3d(x, 1), 3),
    "nearest in three": (lambda x: F.interpolate(x, scale_factor=2.0), 3),
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "group norm": lambda: nn.GroupNorm(2, 8),
    "group norm without parameters": lambda: nn.GroupNorm(4, 8, affine=False),
    "instance norm": lambda: nn.InstanceNorm2d(8, affine=True),
    "instance norm without parameters": lambda: nn.InstanceNorm2d(8),
    "layer norm": lambda: nn.LayerNorm([8, 6, 6]),
    "root mean square norm": lambda: nn.RMSNorm([6]),
    "local response norm": lambda: nn.LocalResponseNorm(3),
}
WORDS: dict[str, tuple[Callable[[], Op], int]] = {
    **LAYERS,
    **{name: (make, 2) for name, make in (ACTIVATIONS | NORMS).items()},
    **{name: (lambda op=op: op, 2) for name, op in OPS.items()},
    **{name: (lambda op=op: op, sides) for name, (op, sides) in SIDES.items()},
    "read by many": (Many, 2),
}
ALIKE = {
    *("grouped", "dilated", "one longer side", "circular", "replicated", "transposed", "transposed, dilated"),
    *("in one dimension", "in one dimension, batch norm", "in three dimensions", "in three dimensions, batch norm"),
    *("squeeze and excite, sigmoid", "Hardsigmoid", "SiLU", "Sigmoid", "Hardtanh", "ReLU", "Softsign", "PReLU, one slope"),
    *("GELU with tanh", "GLU, doubled", "group norm without parameters", "halves that differ", "stack"),
    *("channel shuffle, by reshapes", "space to depth by slices", "patches", "spread of the sides", "padding", "nearest"),
    *("nearest, exact", "nearest to a size", "bilinear", "max pooling", "max pooling, rounded up", "average pooling"),
    *("average pooling with the border", "adaptive average to a multiple", "adaptive average by windows that differ"),
    *("adaptive average of one side", "global average", "mean of the sides", "adaptive maximum", "global maximum"),
    *("the stem of a cross", "adaptive average in one", "adaptive maximum in one", "average pooling in three"),
}
"""Words whose every op, after they are captured, another word has."""
SIZE = 10
"""Branches of a network at most."""


def groups(words: list[str]) -> dict[str, list[str]]:
    """The words of each network, which have as many sides, by the first and the last of them."""
    made: dict[str, list[str]] = {}
    for sides in (1, 2, 3):
        names = [name for name in words if WORDS[name][1] == sides]
        parts = [names[start : start + SIZE] for start in range(0, len(names), SIZE)]
        made |= {f"{part[0]} to {part[-1]}": part for part in parts}
    return made


assert set(WORDS) >= ALIKE
QUICK = groups([name for name in WORDS if name not in ALIKE])
GROUPS = QUICK | groups([name for name in WORDS if name in ALIKE])


@cache
def prepared(group: str) -> dict[str, Prepared]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sides = WORDS[GROUPS[group][0]][1]
        model = Branches([Branch(WORDS[name][0](), sides, 40 if name == "read by many" else 8) for name in GROUPS[group]]).eval()
        data = [(torch.randn(4, 3, *(6,) * sides),) for _ in range(2)]
        for part in model.modules():
            if isinstance(part, nn.GroupNorm | nn.InstanceNorm2d | nn.LayerNorm | _BatchNorm) and part.weight is not None:
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.uniform_(part.bias, -0.5, 0.5)
    return networks.several(model, data, TARGETS)


@pytest.mark.parametrize("group", [group if group in QUICK else pytest.param(group, marks=pytest.mark.slow) for group in GROUPS])
def test_all_layers_are_quantized_nothing_is_missing_and_it_runs_as_simulated(group: str, tmp_path: Path) -> None:
    assert tuple(prepared(group)) == TARGETS
    for target, made in prepared(group).items():
        assert made.plan.share >= 0.95, (target, made.plan)
        layers = [t for t in made.plan.tensors if t.role == "weight"]
        assert len(layers) >= 2 * len(GROUPS[group]), target
        assert [t.tensor for t in layers if t.spec is None] == [], target
        assert all(t.reason for t in made.plan.tensors), target
        artifact = qdeploy.convert(made, tmp_path / target)
        assert completeness.missing(artifact.path) == [], target
        report = qdeploy.verify(artifact, runtime=("onnxruntime:faithful", "onnxruntime:none"), simulation=made)
        assert report.passed, (target, report.faults or report.results)
        assert differing(artifact, GROUPS[group]) == {}, target


def differing(artifact: Artifact, words: list[str]) -> dict[str, float]:
    """The words whose branch ONNX Runtime computes more than a step away from the simulation, on average."""
    saved = artifact.reference()
    inputs = [saved[f"input.{spec['name']}"] for spec in artifact.inputs]
    made = runtimes["onnxruntime"].open(artifact.simulation, len(inputs[0]), "faithful").run(inputs)
    found = {}
    for word, name, ours in zip(words, artifact.outputs, made, strict=True):
        simulated = saved[f"simulated.{name}"]
        error = float(np.abs(ours - simulated).mean() / (np.ptp(simulated) / 255))
        if error > 1:
            found[word] = error
    return found


@pytest.mark.parametrize("name", ["group norm", "instance norm", "layer norm"])
def test_a_norm_that_a_target_has_no_integers_for_stays_in_float_and_says_so(name: str) -> None:
    group = next(group for group, words in GROUPS.items() if name in words)
    path = f"branches.{GROUPS[group].index(name)}.op"
    for target in ("tensorrt", "openvino", "vitis", "onnxruntime"):
        parameters = [t for t in prepared(group)[target].plan.tensors if t.tensor in (f"{path}.weight", f"{path}.bias")]
        assert len(parameters) == 2, target
        assert all(t.spec is None and t.reason.startswith(f"float: {target} does not quantize what") for t in parameters)
