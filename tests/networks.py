"""Small seeded networks with calibration batches, and what qdeploy makes of them for every backend: prepared once a process, all
backends from one capture and one pass over the data; converted once a test run.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qdeploy
from qdeploy import api
from qdeploy.capture.capture import Captured, capture
from qdeploy.core.backend import Backend, backends
from qdeploy.export.artifact import Artifact
from qdeploy.recipes.presets import find_recipe
from qdeploy.recipes.step_runner import made_steps
from qdeploy.runtimes.runtime import runtimes
from qdeploy.simulation.prepared import Prepared
from qdeploy.verification.verdict import MIN_SQNR

Batch = tuple[Tensor, ...]
_OWN = tempfile.TemporaryDirectory(prefix="qdeploy-tests-")
FOLDER = Path(_OWN.name)
"""Where artifacts are kept; conftest.py names one folder for all processes of a test run."""
torch.set_num_threads(1)
OLD_EVALUATOR = tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 23)
"""Before onnx 1.23, its reference evaluator is wrong in some Attentions, and fails in a Gather of indices that are not contiguous."""


class Plain(nn.Module):
    """conv, batch norm, relu, max pool, global average pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.mean(self.pool(self.relu(self.bn(self.conv(x))))), 1))


class Residual(nn.Module):
    """Two residual blocks that share one `relu`: an identity shortcut, then one that strides and pads with zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.conv4 = nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem_bn(self.stem(x)))
        x = self.relu(x + self.conv2(self.relu(self.conv1(x))))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = self.relu(self.conv4(self.relu(self.conv3(x))) + shortcut)
        return self.fc(x.mean((2, 3)))


class Mobile(nn.Module):
    """Pointwise, depthwise and linear projection with ReLU6, as in MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU6())
        self.project = nn.Conv2d(12, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.project(self.depthwise(self.expand(x))).mean((2, 3)))


class Concat(nn.Module):
    """Two branches of different range joined by a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 1)
        self.join = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(self.left(x)), 3 * self.right(x)], 1)
        return self.fc(F.relu(self.join(both)).flatten(1))


class Several(nn.Module):
    """Two inputs, a dictionary of two outputs; the first input has the name of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.gate = nn.Linear(4, 6)
        self.fc = nn.Linear(6, 5)
        self.map = nn.Conv2d(6, 2, 1)

    def forward(self, stem: Tensor, side: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(stem)) + self.gate(side)[:, :, None, None]
        return {"scores": self.fc(x.mean((2, 3))), "map": self.map(x)}


class Mixed(nn.Module):
    """Every kind of op that a target may place in its own way, once: depthwise, residual add, concat, both pools, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point = nn.Conv2d(6, 6, 1)
        self.left = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.point(F.relu6(self.depthwise(x))))
        x = torch.cat([F.relu(self.left(x)), F.max_pool2d(x, 3, 1, 1)], 1)
        x = F.adaptive_avg_pool2d(F.avg_pool2d(x, 2), 1)
        return self.fc(x.flatten(1))


class Toy(nn.Module):
    """The network of the worked examples: conv0 and relu; x in [-1, 1], r0 in [0, 2.54], channel maxima of the weight 0.5 and 0.25."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 2, 3)
        self.r0 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.r0(self.conv0(x))


def toy() -> tuple[Toy, list[Batch]]:
    """The toy network and its data, with exactly those ranges (r0 to a float32 rounding)."""
    random = torch.Generator().manual_seed(13)
    net = Toy().eval()
    x = torch.rand((8, 3, 8, 8), generator=random) * 2 - 1
    x.view(-1)[:2] = torch.tensor([-1.0, 1.0])
    with torch.no_grad():
        net.conv0.weight.copy_(torch.rand(net.conv0.weight.shape, generator=random) - 0.5)
        for channel, largest in enumerate((0.5, 0.25)):
            weight = net.conv0.weight[channel]
            weight.mul_(0.9 * largest / weight.abs().max())
            weight[0, 0, 0], weight[0, 0, 1] = largest, -largest
        net.conv0.bias.zero_()
        top = net.conv0(x).amax((0, 2, 3))
        net.conv0.bias.copy_(torch.tensor([2.54, 1.5]) - top)
    return net, [(x,)]


def uneven() -> tuple[nn.Module, list[Batch]]:
    """A network that equalization helps where a weight has one scale, and hurts where each channel has one, and its data.

    Half of the first channels are differences of nearly equal colours: large weights, ordinary outputs.
    """
    random = torch.Generator().manual_seed(1)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 3)]
    with torch.no_grad():
        for layer, size in zip(layers, (0.1, 0.1, 0.3, 0.1), strict=True):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=random) * size)
            layer.bias.zero_()
        large = torch.randn((8, 1, 3, 3), generator=random) * 4
        layers[0].weight[::2] = torch.cat([large, -large, 0 * large], 1)
        layers[0].weight.div_(255)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.ReLU(), layers[3]).eval()
    gray = torch.randn((32, 1, 16, 16), generator=random)
    colors = 255 * (gray + 0.03 * torch.randn((32, 3, 16, 16), generator=random))
    return model, [(part,) for part in colors.split(8)]


def _images(seed: int, count: int = 4, batch: int = 8) -> list[Batch]:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn((batch, 3, 8, 8), generator=random),) for _ in range(count)]


def _pairs(seed: int, count: int = 4, batch: int = 8) -> list[Batch]:
    random = torch.Generator().manual_seed(seed)
    return [(images, torch.randn((batch, 4), generator=random)) for (images,) in _images(seed, count, batch)]


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A network whose weights, running statistics and spread of outputs are no defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        net = make()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5)):
                    nn.init.uniform_(tensor, low, high)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight)
    return net.eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mixed": Mixed,
    "plain": Plain,
    "residual": Residual,
    "mobile": Mobile,
    "concat": Concat,
    "several": Several,
}


def network(name: str) -> nn.Module:
    """A fresh copy of a network, always with the same weights, in eval mode."""
    return _seeded(NETWORKS[name])


def batches(name: str, seed: int = 1, count: int = 4, batch: int = 8) -> list[Batch]:
    """Calibration batches for a network."""
    return (_pairs if name == "several" else _images)(seed, count, batch)


def calibrated(name: str, backend: str | Backend, **options: object) -> Prepared:
    """A network prepared for one backend alone and calibrated; a fresh one, which the caller may change."""
    data = batches(name)
    chosen: dict[str, object] = {"recipe": "plain"} | options
    return qdeploy.calibrate(qdeploy.prepare(network(name), data[0], backend, **chosen), data)


@cache
def _captured(name: str, with_biases: bool) -> Captured:
    return capture(network(name), batches(name)[0])


def captured_once(name: str, with_biases: bool = False) -> AbstractContextManager[object]:
    """A context in which `name` is what is captured, once a process, whatever model is given; it is exported once, too."""
    return patch.object(api, "capture", return_value=_captured(name, with_biases))


def fresh(name: str, backend: str | Backend, **options: object) -> Prepared:
    """A network prepared for one backend, captured once a process: what is captured is shared, as by targets that are prepared
    together, and the simulation is a fresh one, which the caller may change.
    """
    chosen: dict[str, object] = {"recipe": "plain"} | options
    steps = made_steps(find_recipe(chosen["recipe"]))  # type: ignore[arg-type]
    with captured_once(name, any(step.needs_biases for step in steps)):
        return qdeploy.prepare(network(name), batches(name)[0], backend, **chosen)


def settled(name: str, backend: str | Backend, **options: object) -> Prepared:
    """`calibrated`, from the one capture."""
    return qdeploy.calibrate(fresh(name, backend, **options), batches(name))


def several(
    model: nn.Module, data: Sequence[Batch], targets: Sequence[str | Backend] = (), recipe: str = "plain"
) -> dict[str, Prepared]:
    """`model` calibrated for several backends (all that there are) at once, by name."""
    together = api.prepare_all(model, data[0], tuple(targets) or backends.names(), recipe=recipe)
    return {prepared.backend.name: prepared for prepared in api.calibrate_all(together, data)}


@cache
def _prepared(name: str) -> dict[str, Prepared]:
    return several(network(name), batches(name))


def prepared(name: str, backend: str) -> Prepared:
    """A calibrated network, made once a process with those of all other backends: not to be changed."""
    return _prepared(name)[backend]


def distinct() -> tuple[str, ...]:
    """Backends of which no two place quantizers alike."""
    kinds = {}
    for b in backends:
        bias = b.bias if isinstance(b.bias, str) else "own"
        kinds.setdefault((b.rules, b.fuse, b.residual, b.average, bias, b.formats[0].model, b.activation.linear), b.name)
    return tuple(kinds.values())


def matrix() -> list[tuple[str, str]]:
    """Networks with backends: two networks for all backends, the others for those that place quantizers in a way of their own."""
    return [(n, b) for n in NETWORKS for b in (backends.names() if n in ("mixed", "residual") else distinct())]


def once(path: Path, make: Callable[[], Path]) -> Path:
    """The folder `path`, which `make` writes, once for all processes of a test run."""
    descriptor = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return path if path.exists() else make()
    finally:
        os.close(descriptor)


@cache
def artifact_path(name: str, backend: str) -> Path:
    """The artifact of a network for a backend: not to be changed."""
    path = FOLDER / f"{name}-{backend}"
    return once(path, lambda: qdeploy.convert(prepared(name, backend), path).path)


def artifact(name: str, backend: str) -> Artifact:
    """The artifact, opened anew."""
    return Artifact.open(artifact_path(name, backend))


def flat(outputs: object) -> Sequence[Tensor]:
    """All tensors of a model's output, in order."""
    return torch.utils._pytree.tree_leaves(outputs)


def poor(artifact: Artifact, variant: str = "none") -> dict[str, float]:
    """The outputs that ONNX Runtime computes with an SQNR below the bound of `verify`, which looks at all outputs together."""
    saved = artifact.reference()
    inputs = [saved[f"input.{spec['name']}"] for spec in artifact.inputs]
    made = runtimes["onnxruntime"].open(artifact.simulation, len(inputs[0]), variant).run(inputs)
    found = {}
    for name, ours in zip(artifact.outputs, made, strict=True):
        simulated = saved[f"simulated.{name}"]
        noise = float(np.square(simulated - ours, dtype=np.float64).sum())
        sqnr = 10 * np.log10(max(float(np.square(simulated, dtype=np.float64).sum()), 1e-300) / max(noise, 1e-300))
        if not sqnr >= MIN_SQNR:
            found[name] = float(sqnr)
    return found
