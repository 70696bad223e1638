"""Images out of batch norms: near to real ones where it counts, and refused where there is nothing to make them from."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from networks import network
from torch import Tensor, nn
from torch.nn import functional as F

import qdeploy
from qdeploy.capture import capture, fold
from qdeploy.core.errors import InputError
from qdeploy.core.spec import TensorSpec
from qdeploy.graph import edit, query
from qdeploy.recipes import distill

SIDE = 16


class Net(nn.Module):
    """A residual network whose filters respond to smooth areas, as trained ones do."""

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8, momentum=None)
        self.down = nn.Conv2d(8, 16, 3, 2, 1, bias=False)
        self.down_bn = nn.BatchNorm2d(16, momentum=None)
        self.deep = nn.Conv2d(16, 16, 3, padding=1)
        self.deep_bn = nn.BatchNorm2d(16, momentum=None)
        self.fc = nn.Linear(16, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(self.down_bn(self.down(x)))
        x = F.relu(x + self.deep_bn(self.deep(x)))
        return self.fc(x.mean((2, 3)))


@cache
def scenes(count: int, seed: int) -> Tensor:
    """Colour gradients with three rectangles in front, normalised over all."""
    random = torch.Generator().manual_seed(seed)

    def colour() -> Tensor:
        return torch.randn((3, 1, 1), generator=random)

    axis = torch.linspace(-1, 1, SIDE)
    images = []
    for _ in range(count):
        image = colour() + 0.7 * (colour() * axis + colour() * axis.unsqueeze(1))
        for _ in range(3):
            left, top, width, height = (torch.rand(4, generator=random) * torch.tensor([2, 2, 0.6, 0.6])).tolist()
            inside = ((axis - left + 1).abs() < width + 0.2) & ((axis - top + 1).abs() < height + 0.2).unsqueeze(1)
            image = torch.where(inside, 1.2 * colour(), image)
        images.append(image.clamp(-2.2, 2.2))
    made = torch.stack(images)
    variance, mean = torch.var_mean(made, dim=(0, 2, 3), keepdim=True)
    return (made - mean) / variance.sqrt()


@cache
def trained(seed: int, outputs: int = 10) -> Net:
    """A random network that has seen scenes; not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net(outputs)
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, nn.Conv2d):
                    shape = module.weight.shape
                    module.weight.copy_(0.3 * torch.randn(shape) + torch.randn((*shape[:2], 1, 1)))
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.uniform_(module.bias, -0.5, 0.5)
            net(scenes(512, 1))
    return net.eval()


@cache
def captured(net: nn.Module) -> capture.Captured:
    """Not to be changed."""
    return capture.capture(net, torch.zeros(4, 3, SIDE, SIDE))


@cache
def made_for(net: nn.Module, samples: int = 64, seed: int = 0, **options: int) -> list[Tensor]:
    found = captured(net)
    batches = distill.distill(found.module, found.inputs, samples, seed, **options)
    assert all(len(batch) == 1 for batch in batches)
    return [batch[0] for batch in batches]


def noise(count: int = 64) -> Tensor:
    return torch.randn((count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(5))


def calibrated(net: nn.Module, batches: list[Tensor]) -> qdeploy.simulation.prepared.Prepared:
    prepared = qdeploy.prepare(net, batches[0][:4], "snpe", recipe="mse")
    return qdeploy.calibrate(prepared, batches)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_distilled_images_calibrate_far_better_than_noise(seed: int) -> None:
    net, held = trained(seed), scenes(128, 2)
    sources = {"real": [scenes(64, 3)], "distilled": made_for(net), "noise": [noise()]}
    prepared = {name: calibrated(net, batches) for name, batches in sources.items()}
    with torch.no_grad():
        wanted = net(held)
        sqnr = {name: 10 * math.log10(wanted.square().sum() / (one(held) - wanted).square().sum()) for name, one in prepared.items()}
    assert sqnr["distilled"] > sqnr["noise"] + 8
    assert sqnr["distilled"] > sqnr["real"] - 12

    def off(name: str) -> float:
        """How far the ranges are from those of real images, in octaves, in the root of the mean square."""
        real = prepared["real"].quantizers
        pairs = [(q.scale, real[tensor].scale) for tensor, q in prepared[name].quantizers.items() if q.role == "activation"]
        return math.sqrt(sum((a / b).log2().item() ** 2 for a, b in pairs) / len(pairs))

    assert off("distilled") < 0.5 * off("noise")


def test_distilled_images_have_the_statistics_of_the_batch_norms() -> None:
    net = copy.deepcopy(trained(0))
    seen: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda module, inputs, made, name=name: seen.__setitem__(name, inputs[0]))

    def distance(images: Tensor) -> float:
        """The largest difference of a mean or a deviation, in deviations of its layer."""
        with torch.no_grad():
            net(images)
        found = []
        for name, x in seen.items():
            norm = net.get_submodule(name)
            unit = norm.running_var.mean().sqrt()
            found += [(x.mean((0, 2, 3)) - norm.running_mean) / unit, (x.std((0, 2, 3)) - norm.running_var.sqrt()) / unit]
        return torch.cat(found).abs().max().item()

    images = torch.cat(made_for(trained(0)))
    assert distance(images) < 0.3 < 1 < distance(noise())
    assert distance(images) < distance(images.flip(2).roll(1, 1))  # other colours are another thing


def test_distilled_images_look_like_normalised_images() -> None:
    (images,) = made_for(trained(0))
    assert images.dtype == torch.float32
    assert images.abs().max() < distill.LIMIT
    assert images.mean((0, 2, 3)).abs().max() < 0.2
    assert (images.std((0, 2, 3)) - 1).abs().max() < 0.3
    assert not images.requires_grad

    def neighbours(x: Tensor) -> float:
        return torch.corrcoef(torch.stack((x[..., 1:].flatten(), x[..., :-1].flatten())))[0, 1].item()

    assert abs(neighbours(noise())) < 0.1 < 0.6 < neighbours(images)


def test_the_seed_alone_decides() -> None:
    found = captured(trained(0))

    def made(seed: int) -> list[Tensor]:
        return [batch[0] for batch in distill.distill(found.module, found.inputs, 12, seed, iterations=3, batch=6)]

    first = made(3)
    torch.manual_seed(99)
    with torch.no_grad():
        again = made(3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], made(4)[0])


@pytest.mark.parametrize(("samples", "sizes"), [(5, [5]), (8, [8]), (17, [6, 6, 5])])
def test_batches_are_of_about_one_size(samples: int, sizes: list[int]) -> None:
    told: list[tuple[str, int, int]] = []
    found = captured(trained(0))
    batches = distill.distill(
        found.module,
        found.inputs,
        samples,
        0,
        2,
        batch=8,
        progress=lambda what, done, total, loss=None: told.append((what, done, total)),
    )
    assert [len(batch[0]) for batch in batches] == sizes
    assert told[0][1:] == (1, 2 * len(sizes))
    assert told[-1] == (f"distill batch {len(sizes)} of {len(sizes)}", 2 * len(sizes), 2 * len(sizes))


def test_batches_of_a_large_model_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    image = 4 * SIDE * SIDE * (3 * 8 + 7 * 16 // 4)  # without the small tensors at the end
    for memory, samples, sizes in ((int(4.9 * image), 8, [4, 4]), (10, 2, [1, 1])):
        monkeypatch.setattr(distill, "MEMORY", memory)
        assert [len(images) for images in made_for(trained(0), samples, iterations=1)] == sizes


def test_a_fixed_batch_gets_whole_batches() -> None:
    program = torch.export.export(trained(0), (torch.zeros(3, 3, SIDE, SIDE),))
    found = capture.capture(program, None)
    fixed = [TensorSpec(name=one.name, shape=(3, *one.shape[1:]), dtype=one.dtype) for one in found.inputs]
    batches = distill.distill(found.module, fixed, 7, 0, iterations=1)
    assert [len(batch[0]) for batch in batches] == [3, 3, 3]


def test_the_captured_graph_stays_as_it_is() -> None:
    found = captured(trained(0))
    code, parameters = found.module.code, {name: (p.clone(), p.requires_grad) for name, p in found.module.named_parameters()}
    distill.distill(found.module, found.inputs, 4, 0, iterations=2)
    assert found.module.code == code
    for name, parameter in found.module.named_parameters():
        before, learns = parameters[name]
        assert torch.equal(parameter, before)
        assert parameter.requires_grad == learns
        assert parameter.grad is None


def test_one_output_is_enough() -> None:
    (images,) = made_for(trained(0, outputs=1), 4, iterations=2)
    assert images.isfinite().all()


def test_both_operators_of_batch_norm_are_read() -> None:
    found = captured.__wrapped__(trained(0))
    wanted = distill.distill(found.module, found.inputs, 4, 0, iterations=3)
    for node in list(found.module.graph.nodes):
        if node.op == "call_function" and query.op_of(node).name == "batch_norm":
            args = (*node.args[:5], False, *node.args[5:7], False)
            with found.module.graph.inserting_before(node):
                whole = found.module.graph.call_function(torch.ops.aten.batch_norm.default, args)
            (first,) = node.users
            whole.meta = dict(first.meta)
            first.replace_all_uses_with(whole)
    edit.finish(found.module)
    made = distill.distill(found.module, found.inputs, 4, 0, iterations=3)
    torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-3)


class Norms(nn.Module):
    """A network with layer norms only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm(SIDE - 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def test_a_model_without_batch_norms_is_refused() -> None:
    with pytest.raises(InputError, match=r"batch norms with running statistics.*transformers.*to do: give --data"):
        made_for(Norms())
    folded = captured.__wrapped__(trained(0))
    fold.fold_batch_norms(folded.module)
    with pytest.raises(InputError, match="batch norms"):
        distill.distill(folded.module, folded.inputs, 4, 0)


def test_other_inputs_than_one_image_are_refused() -> None:
    one = captured(trained(0))
    wrong = {
        "int64": [TensorSpec(name="x", shape=(None, 3, 16, 16), dtype="int64")],
        r"\[N, 3, \?, 16\]": [TensorSpec(name="x", shape=(None, 3, None, 16), dtype="float32")],
        r"\[N, 16\]": [TensorSpec(name="x", shape=(None, 16), dtype="float32")],
        "x float32.*y float32": [TensorSpec(name=name, shape=(None, 3, 16, 16), dtype="float32") for name in "xy"],
    }
    for found, inputs in wrong.items():
        with pytest.raises(InputError, match=f"inputs; found: .*{found}.*allowed: .*to do: .*give --data"):
            distill.distill(one.module, inputs, 4, 0)
    several = capture.capture(network("several"), (torch.zeros(4, 3, 8, 8), torch.zeros(4, 4)))
    with pytest.raises(InputError, match="stem float32"):
        distill.distill(several.module, several.inputs, 4, 0)
