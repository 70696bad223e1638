"""Equalization and absorption: the float network computes the same, and every region ends where its ranges meet."""

from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import networks
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qdeploy.capture import fold
from qdeploy.capture.capture import capture
from qdeploy.core.errors import OptionError
from qdeploy.core.recipe import Recipe, StepChoice
from qdeploy.graph import edit, query
from qdeploy.recipes.step import Declined, make_step

# after `steps` has loaded the folder by its own name
equalization = importlib.import_module("qdeploy.calibration.equalize")
absorb, equalize = equalization.absorb, equalization.equalize


class Net(nn.Module):
    """Layers with a rule that says how they are called."""

    def __init__(self, rule: Callable[[Any, Tensor], Any], **layers: nn.Module):
        super().__init__()
        self.rule = rule
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.rule(self, x)


def conv(cin: int, cout: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, **{"padding": kernel // 2} | options)


class Family(nn.Module):
    """Networks next to each other, since capturing each alone takes long."""

    def __init__(self, nets: list[Net]):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x: Tensor) -> list[Any]:
        return [net(x) for net in self.nets]


def unbalance(net: nn.Module, spread: float, random: torch.Generator) -> None:
    """Rescale every channel of every layer by up to 2^`spread`."""
    for layer in net.modules():
        for parameter in layer.parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=random) * 0.5
            factor = torch.exp2(spread * (2 * torch.rand(len(parameter), generator=random) - 1))
            parameter.data = (parameter.data + noise) * factor.view(-1, *[1] * (parameter.dim() - 1))


def double(nets: Family, spread: float = 4.0) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """`nets` unbalanced, captured in float64 and folded, with a batch."""
    random = torch.Generator().manual_seed(3)
    unbalance(nets, spread, random)
    x = torch.randn((3, 4, 8, 8), generator=random, dtype=torch.float64)
    module = capture(nets.double().eval(), x).module
    fold.fold_batch_norms(module)
    return module, (x,)


@cache
def family(kind: str) -> tuple[fx.GraphModule, tuple[Tensor, ...], dict[str, list[fx.Node]]]:
    """All networks of a kind, and the outputs of each."""
    nets = FAMILIES[kind]()
    module, inputs = double(Family(list(nets.values())), 1.0 if "absorbing" in kind else 4.0)
    made = [len(networks.flat(found)) for found in module(*inputs)]
    leaves = iter(query.outputs(module.graph))
    return module, inputs, {name: [next(leaves) for _ in range(count)] for name, count in zip(nets, made, strict=True)}


def single(kind: str, name: str) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """One network of a kind, with parameters of its own."""
    whole, inputs, outputs = family(kind)
    module = edit.copy(whole, own_parameters=True)
    nodes = {node.name: node for node in module.graph.nodes}
    (output,) = module.graph.find_nodes(op="output")
    output.args = (tuple(nodes[node.name] for node in outputs[name]),)
    module.graph.set_codegen(fx.graph.CodeGen())
    edit.finish(module)
    return module, inputs


def difference(module: fx.GraphModule, inputs: tuple[Tensor, ...], change: Callable[[], object]) -> float:
    """The largest relative difference that `change` makes to any output."""
    with torch.no_grad():
        before = [t.clone() for t in networks.flat(module(*inputs))]
        change()
        after = networks.flat(module(*inputs))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(after, before, strict=True))


def parameter(module: fx.GraphModule, name: str) -> Tensor:
    """The parameter whose path ends in `name`."""
    (found,) = (p for path, p in module.named_parameters() if f".{path}".endswith(f".{name}"))
    return found.detach()


def weight(module: fx.GraphModule, name: str) -> Tensor:
    return parameter(module, f"{name}.weight")


def rows(module: fx.GraphModule, name: str) -> Tensor:
    """The range of each output channel of an ungrouped convolution or linear layer."""
    return weight(module, name).abs().flatten(1).amax(1)


def columns(module: fx.GraphModule, name: str) -> Tensor:
    """The range of each input channel."""
    return weight(module, name).abs().transpose(0, 1).flatten(1).amax(1)


def shuffled(net: Any, x: Tensor) -> Tensor:
    x = F.pixel_shuffle(torch.channel_shuffle(F.relu(net.a(x)), 4), 2)
    left, right = F.pixel_unshuffle(x, 2)[:, 1:-1].chunk(2, 1)
    return net.head(torch.cat([right, net.b(left)], 1))


def option_a(net: Any, x: Tensor) -> Tensor:
    x = F.relu(net.a(x))
    return net.head(F.relu(net.b(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))))


def resized(net: Any, x: Tensor) -> Tensor:
    x = F.interpolate(F.avg_pool2d(net.a(x), 3, 2, 1), scale_factor=2.0)
    return net.head(F.pad(F.max_pool2d(x, 3, 1, 1), (1, 0, 2, 1))[:, :, 1:])


def gated(net: Any, x: Tensor) -> Tensor:
    x = F.relu(net.a(x))
    return net.head(x * torch.sigmoid(net.c(F.relu(net.b(x.mean((2, 3), keepdim=True))))))


def tokens(net: Any, x: Tensor) -> Tensor:
    x = net.a(x).flatten(2).transpose(1, 2)
    x = F.relu(net.b(x)) * torch.tensor([2.0])
    return net.head(torch.stack([x, x / 2], 1).permute(0, 3, 1, 2))


def tied(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.maximum(net.a(x), net.b(x)).mean(1))


CASES: dict[str, tuple[Callable[[], Net], int]] = {
    "chain": (lambda: Net(lambda m, x: m.head(F.relu(m.a(x))), a=conv(4, 6), head=conv(6, 5)), 1),
    "depthwise": (
        lambda: Net(lambda m, x: m.head(F.relu(m.b(F.relu(m.a(x))))), a=conv(4, 6), b=conv(6, 6, groups=6), head=conv(6, 5)),
        2,
    ),
    "multiplier": (lambda: Net(lambda m, x: m.head(m.b(m.a(x))), a=conv(4, 3), b=conv(3, 6, groups=3), head=conv(6, 5)), 2),
    "identity": (
        lambda: Net(
            lambda m, x: m.head(F.relu((y := F.relu(m.a(x))) + m.c(F.relu(m.b(y))))),
            a=conv(4, 6),
            b=conv(6, 4),
            c=conv(4, 6),
            head=conv(6, 5),
        ),
        2,
    ),
    "projection": (
        lambda: Net(
            lambda m, x: m.head(F.relu(m.b(y := F.relu(m.a(x))) + m.c(y))), a=conv(4, 6), b=conv(6, 4), c=conv(6, 4, 1), head=conv(4, 5)
        ),
        2,
    ),
    "option_a": (lambda: Net(option_a, a=conv(4, 6), b=conv(6, 9, stride=2), head=conv(9, 5)), 1),
    "concat": (
        lambda: Net(lambda m, x: m.head(torch.cat([F.relu(m.a(x)), m.b(x)], 1)), a=conv(4, 3), b=conv(4, 2, 1), head=conv(5, 5)),
        2,
    ),
    "slopes": (
        lambda: Net(lambda m, x: m.head(F.leaky_relu(m.b(m.p(m.a(x))))), a=conv(4, 6), p=nn.PReLU(6), b=conv(6, 3), head=conv(3, 5)),
        2,
    ),
    "flatten": (lambda: Net(lambda m, x: m.head(F.max_pool2d(m.a(x), 2).flatten(1)), a=conv(4, 3), head=nn.Linear(48, 5)), 1),
    "transposed": (
        lambda: Net(
            lambda m, x: m.head(F.relu(m.b(F.relu(m.a(x))))),
            a=conv(4, 6),
            b=nn.ConvTranspose2d(6, 8, 2, 2, groups=2),
            head=nn.ConvTranspose2d(8, 5, 1),
        ),
        2,
    ),
    "grouped": (lambda: Net(lambda m, x: m.head(F.relu(m.b(m.a(x)))), a=conv(4, 6), b=conv(6, 4, groups=2), head=conv(4, 5)), 2),
    "relu6": (
        lambda: Net(lambda m, x: m.head(F.relu(m.b(F.relu6(m.a(x))))), a=conv(4, 6), b=conv(6, 4), head=conv(4, 5)),
        1,
    ),
    "shared": (
        lambda: Net(lambda m, x: m.head(F.relu(m.b(F.relu(m.b(F.relu(m.a(x))))))), a=conv(4, 6), b=conv(6, 6), head=conv(6, 5)),
        1,
    ),
    "shuffled": (lambda: Net(shuffled, a=conv(4, 8), b=conv(3, 3), head=conv(6, 5)), 2),
    "resized": (lambda: Net(resized, a=conv(4, 6), head=conv(6, 5)), 1),
    "gated": (lambda: Net(gated, a=conv(4, 6), b=conv(6, 2, 1), c=conv(2, 6, 1), head=conv(6, 5)), 2),
    "tokens": (lambda: Net(tokens, a=conv(4, 6), b=nn.Linear(6, 7), head=conv(7, 5)), 2),
    "tied": (lambda: Net(tied, a=conv(4, 6), b=conv(4, 6, 1), head=nn.Linear(8, 5)), 1),
    "one bias": (
        lambda: Net(lambda m, x: m.head(F.conv2d(F.relu(m.a(x)), m.b.weight, m.a.bias)), a=conv(4, 6), b=conv(6, 6), head=conv(6, 5)),
        1,
    ),
    "expanded": (
        lambda: Net(
            lambda m, x: m.head(m.a(x) + m.b(x.mean((2, 3), keepdim=True)).expand(-1, 6, 8, 8)),
            a=conv(4, 6),
            b=conv(4, 6, 1),
            head=conv(6, 5),
        ),
        1,
    ),
    "halves as samples": (lambda: Net(lambda m, x: m.head(m.a(x).reshape(-1, 3, 8, 8)), a=conv(4, 6), head=conv(3, 5)), 1),
    "1d": (
        lambda: Net(lambda m, x: m.head(F.relu(m.a(x.flatten(2)))), a=nn.Conv1d(4, 6, 3), head=nn.Conv1d(6, 5, 3, padding="same")),
        1,
    ),
    "3d": (lambda: Net(lambda m, x: m.head(m.a(x.unsqueeze(1))).mean((2, 3, 4)), a=nn.Conv3d(1, 6, 3), head=nn.Conv3d(6, 5, 1)), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_equalizing_keeps_what_the_network_computes(name: str) -> None:
    module, inputs = single("scaled", name)
    scaled: list[int] = []
    assert difference(module, inputs, lambda: scaled.append(equalize(module))) < 1e-11
    assert scaled == [CASES[name][1]]


@pytest.mark.parametrize("name", CASES)
def test_a_second_time_there_is_nothing_left(name: str) -> None:
    module, _ = single("scaled", name)
    equalize(module, sweeps=500, tolerance=1e-6)
    assert equalize(module) == 0


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_equalizing_and_absorbing_keep_what_whole_networks_compute(name: str) -> None:
    data = networks.batches(name)[0]
    module = capture(networks.network(name), data).module
    fold.fold_batch_norms(module)

    def change() -> None:
        assert equalize(module) > 0
        absorb(module)

    assert difference(module, data, change) < 1e-5


UNSCALED: dict[str, Callable[[Any, Tensor], Any]] = {
    "sigmoid": lambda m, x: m.head(torch.sigmoid(m.a(x))),
    "silu": lambda m, x: m.head(F.silu(m.a(x))),
    "softmax": lambda m, x: m.head(m.a(x).softmax(1)),
    "relu6": lambda m, x: m.head(F.relu6(m.a(x))),
    "a product of both": lambda m, x: m.head(m.a(x) * m.b(x)),
    "a number added": lambda m, x: m.head(m.a(x) + 1),
    "the input added": lambda m, x: m.head(m.a(x) + x),
    "an output": lambda m, x: (y := m.a(x), m.head(y)),
    "padding with ones": lambda m, x: m.head(F.pad(m.a(x), (1, 1, 1, 1), value=1.0)),
    "matmul": lambda m, x: m.head(m.a(x) @ m.a(x)),
    "division by it": lambda m, x: m.head(x / m.a(x)),
    "a rounded quotient": lambda m, x: m.head(torch.div(m.a(x), 2, rounding_mode="floor")),
    "a channel mixed with others": lambda m, x: m.head(m.a(x).cumsum(1)),
    "weight of two kinds of reader": lambda m, x: m.head(m.a(x)) * (x.mean() * m.a.weight).sum(),
    "samples told apart by channels": lambda m, x: m.fc(m.a(x).transpose(0, 1).mean((1, 2, 3))),
}


@pytest.mark.parametrize("name", UNSCALED)
def test_what_cannot_be_scaled_is_left_alone(name: str) -> None:
    module, _ = single("unscaled", name)
    before = [p.clone() for p in module.parameters()]
    assert equalize(module) == 0
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def test_the_ranges_of_a_pair_meet() -> None:
    module, _ = single("scaled", "chain")
    wanted = (rows(module, "a") * columns(module, "head")).sqrt()
    equalize(module)
    torch.testing.assert_close(rows(module, "a"), wanted)
    torch.testing.assert_close(columns(module, "head"), wanted)


def test_a_depthwise_layer_and_its_neighbours_meet_at_the_geometric_mean() -> None:
    module, _ = single("scaled", "depthwise")
    wanted = (rows(module, "a") * rows(module, "b") * columns(module, "head")) ** (1 / 3)
    equalize(module, sweeps=100, tolerance=1e-9)
    for found in (rows(module, "a"), rows(module, "b"), columns(module, "head")):
        torch.testing.assert_close(found, wanted)


def test_all_that_makes_and_reads_a_sum_counts() -> None:
    module, _ = single("scaled", "identity")
    equalize(module, sweeps=200, tolerance=1e-9)
    torch.testing.assert_close(rows(module, "b"), columns(module, "c"))
    made = torch.maximum(rows(module, "a"), rows(module, "c"))
    torch.testing.assert_close(made, torch.maximum(columns(module, "b"), columns(module, "head")))


def test_a_layer_that_reads_what_it_makes_comes_to_rest() -> None:
    module, _ = single("scaled", "shared")
    with torch.no_grad():  # the layer swaps channels, so that full steps would swap their factors forever
        weight(module, "b").mul_(1000 * torch.eye(6)[[1, 0, 3, 2, 5, 4]].view(6, 6, 1, 1))
    equalize(module, sweeps=500, tolerance=1e-9)
    made = torch.maximum(rows(module, "a"), rows(module, "b"))
    torch.testing.assert_close(made, torch.maximum(columns(module, "b"), columns(module, "head")))


def test_the_channels_of_a_padded_shortcut_are_those_they_are_added_to() -> None:
    module, _ = single("scaled", "option_a")
    equalize(module, sweeps=200, tolerance=1e-9)
    made, read = rows(module, "b"), columns(module, "head")
    shared = slice(1, 7)
    torch.testing.assert_close(made[[0, 7, 8]], read[[0, 7, 8]])
    both = torch.maximum(read[shared], columns(module, "b"))
    torch.testing.assert_close(torch.maximum(made[shared], rows(module, "a")), both)


def test_channels_that_were_scaled_apart_come_back() -> None:
    net = Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(4, 6), b=conv(6, 8), c=conv(8, 5))
    good = double(Family([net]), spread=0)[0]
    bad = edit.copy(good, own_parameters=True)
    u = 12 * torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) - 6
    with torch.no_grad():
        for made, read, factor in (("a", "b", u[:6].exp2()), ("b", "c", u.exp2())):
            weight(bad, made).mul_(factor.view(-1, 1, 1, 1))
            parameter(bad, f"{made}.bias").mul_(factor)
            weight(bad, read).div_(factor.view(1, -1, 1, 1))
    assert rows(bad, "b").max() / rows(bad, "b").min() > 20
    for module in (good, bad):
        equalize(module, sweeps=200, tolerance=1e-9)
    for name in "abc":
        torch.testing.assert_close(weight(bad, name), weight(good, name), rtol=1e-6, atol=0)
        torch.testing.assert_close(parameter(bad, f"{name}.bias"), parameter(good, f"{name}.bias"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_a_channel_without_a_range_keeps_its_factor(value: float) -> None:
    module, _ = single("scaled", "chain")
    with torch.no_grad():
        weight(module, "a")[1], weight(module, "head")[:, 2] = value, value
    before = weight(module, "a").clone(), weight(module, "head").clone()
    assert equalize(module) == 1
    for changed, old in zip(
        (weight(module, "a"), weight(module, "head").transpose(0, 1)), (before[0], before[1].transpose(0, 1)), strict=True
    ):
        assert torch.equal(changed[1:3].nan_to_num(), old[1:3].nan_to_num())
        assert not torch.equal(changed[[0, 3, 4, 5]], old[[0, 3, 4, 5]])


@pytest.mark.parametrize(("kind", "name", "change"), [("scaled", "chain", equalize), ("absorbing", "pointwise", absorb)])
def test_who_reads_the_size_only_does_not_count(kind: str, name: str, change: Callable[[fx.GraphModule], int]) -> None:
    module, _ = single(kind, name)
    layer = next(n for n in module.graph.nodes if n.target == torch.ops.aten.conv2d.default)
    with module.graph.inserting_after(layer):
        module.graph.call_function(torch.ops.aten.sym_size.int, (layer, 0)).meta["val"] = 3
    assert change(module) == 1


def test_relu6_alone_keeps_its_layer() -> None:
    module, _ = single("scaled", "relu6")
    before = weight(module, "a").clone()
    equalize(module)
    assert torch.equal(weight(module, "a"), before)


@pytest.mark.parametrize("affine", [True, False])
def test_a_folded_layer_remembers_the_mean_and_std_of_its_output(affine: bool) -> None:
    norm = nn.BatchNorm2d(6, affine=affine)
    norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    net = nn.Sequential(conv(4, 6, bias=False), norm, nn.ReLU(), conv(6, 5)).eval()
    if affine:
        nn.init.uniform_(norm.weight, -2, 2), nn.init.uniform_(norm.bias, -2, 2)
    module = capture(net, torch.randn(2, 4, 8, 8)).module
    fold.fold_batch_norms(module)
    first, second = (n for n in edit.copy(module).graph.nodes if n.target == torch.ops.aten.conv2d.default)
    mean, std = first.meta["statistics"]
    torch.testing.assert_close(mean, norm.bias.detach().double() if affine else torch.zeros(6).double())
    torch.testing.assert_close(std, norm.weight.detach().double().abs() if affine else torch.ones(6).double())
    assert "statistics" not in second.meta

    bias = query.parameter(module, "0.bias").detach().double()
    equalize(module)
    factor = bias / query.parameter(module, "0.bias").detach().double()
    assert factor.max() / factor.min() > 1.05
    (layer, _) = (n for n in module.graph.nodes if n.target == torch.ops.aten.conv2d.default)
    torch.testing.assert_close(layer.meta["statistics"][0] * factor, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.meta["statistics"][1] * factor, std, rtol=1e-5, atol=1e-6)


def bottleneck(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    x = x + net.c(F.relu(net.b(x)))
    return F.relu(net.head(x))


ABSORBING: dict[str, tuple[Callable[[Any, Tensor], Any], int]] = {
    "pointwise": (lambda m, x: m.point(m.a(x)), 1),
    "no padding": (lambda m, x: m.open(m.a(x)), 1),
    "padding": (lambda m, x: m.head(m.a(x)), 0),
    "relu": (lambda m, x: m.point(F.relu(m.a(x))), 0),
    "a second reader": (lambda m, x: (y := m.a(x), m.point(y) + F.relu(y))[1], 0),
    "an output": (lambda m, x: (y := m.a(x), m.point(y)), 0),
    "pooled": (lambda m, x: m.point(F.avg_pool2d(m.a(x), 2)), 1),
    "pooled with padding": (lambda m, x: m.point(F.avg_pool2d(m.a(x), 3, 1, 1)), 0),
    "a pool into a linear layer": (lambda m, x: m.fc(F.adaptive_avg_pool2d(m.a(x), 1).flatten(1)), 1),
    "a flattened map": (lambda m, x: m.fc(m.a(x).flatten(2).mean(2)), 1),
    "a sum": (lambda m, x: m.point(m.a(x) + m.b(x)), 2),
    "a concat": (lambda m, x: m.wide(torch.cat([m.a(x), m.b(x)], 1)), 2),
    "no bias to absorb into": (lambda m, x: m.bare(m.a(x)), 0),
    "a product": (lambda m, x: m.point(m.a(x) * m.b(x)), 0),
    "a number added": (lambda m, x: m.point(m.a(x) + 1), 0),
    "ones around it": (lambda m, x: m.open(F.pad(m.a(x), (1, 1, 1, 1), value=1.0)), 0),
    "the batch read": (lambda m, x: m.point((y := m.a(x)).reshape(y.shape[0], 4, 8, 8)), 1),
    "the bias of two layers": (lambda m, x: m.point(m.a(x) + m.a(-x)), 0),
    "residual bottlenecks": (
        lambda m, x: m.point((y := m.a(x)) + m.b(F.relu(m.wide(torch.cat([y, y], 1))))),
        2,
    ),
}


def absorbing(rule: Callable[[Any, Tensor], Any], norm: bool) -> Net:
    layers: dict[str, nn.Module] = {
        "a": conv(4, 4),
        "b": conv(4, 4),
        "head": conv(4, 4),
        "point": conv(4, 4, 1),
        "open": conv(4, 4, padding=0),
        "wide": conv(8, 4, 1),
        "bare": conv(4, 4, 1, bias=False),
        "fc": nn.Linear(4, 5),
    }
    if norm:
        layers |= {one: nn.Sequential(layers[one], nn.BatchNorm2d(4)) for one in "ab"}
    return Net(rule, **layers)


def unscaled(rule: Callable[[Any, Tensor], Any]) -> Net:
    return Net(rule, a=conv(4, 4), b=conv(4, 4), head=conv(4, 5), fc=nn.Linear(4, 5))


FAMILIES: dict[str, Callable[[], dict[str, Net]]] = {
    "scaled": lambda: {name: make() for name, (make, _) in CASES.items()},
    "unscaled": lambda: {name: unscaled(rule) for name, rule in UNSCALED.items()},
    "absorbing": lambda: {name: absorbing(rule, False) for name, (rule, _) in ABSORBING.items()},
    "absorbing norms": lambda: {name: absorbing(rule, True) for name, (rule, _) in ABSORBING.items()},
}


@pytest.mark.parametrize("name", ABSORBING)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "bias"])
def test_absorbing_is_exact(name: str, norm: bool) -> None:
    module, inputs = single("absorbing norms" if norm else "absorbing", name)
    wanted = ABSORBING[name][1]
    found: list[int] = []
    assert difference(module, inputs, lambda: found.append(absorb(module))) < 1e-11
    if norm and name == "the bias of two layers":
        wanted = 2  # the fold gives each call its own
    assert found == [wanted]
    assert absorb(module) == 0
    producers = [n for n in module.graph.nodes if n.op == "call_function" and str(n.target) == "aten.conv2d.default"][:wanted]
    for node in producers if wanted and name != "residual bottlenecks" else []:
        bias = query.parameter(module, str(query.argument(node, 2).target)).detach()  # type: ignore[union-attr]
        assert (not node.meta["statistics"][0].any()) if norm else (not bias.any())


@pytest.mark.parametrize(
    "options", [{"sweeps": 0}, {"sweeps": 1.5}, {"tolerance": -0.1}, {"tolerance": "small"}, {"absorb": "yes"}, {"sweep": 3}]
)
def test_a_bad_option_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="of step 'equalize'"):
        make_step("equalize", options)


@pytest.mark.parametrize(
    ("absorbing", "said"), [(True, "1 regions scaled, 1 biases absorbed"), (False, "1 regions scaled, 0 biases absorbed")]
)
def test_the_step_says_what_it_did(absorbing: bool, said: str) -> None:
    module, _ = single("absorbing", "pointwise")
    assert make_step("equalize", {"absorb": absorbing}).run(SimpleNamespace(float_module=module)) == said  # type: ignore[arg-type]


def test_the_step_declines_where_no_layers_meet() -> None:
    module, _ = single("unscaled", "sigmoid")
    with pytest.raises(Declined, match="no pair of layers"):
        make_step("equalize", {}).run(SimpleNamespace(float_module=module))  # type: ignore[arg-type]


def test_a_recipe_with_the_step_quantizes_an_ill_scaled_network_better() -> None:
    data = networks.batches("residual")
    net = networks.network("residual")
    factor = torch.tensor([2.0**u for u in range(-4, 4)])
    with torch.no_grad():
        net.conv1.weight.mul_(factor.view(-1, 1, 1, 1)), net.conv1.bias.mul_(factor)  # type: ignore[operator, union-attr]
        net.conv2.weight.div_(factor.view(1, -1, 1, 1))  # type: ignore[operator, union-attr]
    recipe = Recipe(name="mine", steps=(StepChoice(step="equalize"),))
    (entry,) = networks.several(net, data, ("snpe",), recipe)["snpe"].log  # type: ignore[arg-type]
    assert entry["decision"] == "kept" and entry["gain"] > 3


def test_doctest() -> None:
    result = doctest.testmod(equalization)
    assert result.attempted and not result.failed
