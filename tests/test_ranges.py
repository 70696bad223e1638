"""The choice of ranges: by brute force over candidates, its weights by finite slopes, and what must not influence it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import networks
import pytest
import torch
from qdeploy.calibration.ranges import FACTORS, WORTH, Ranges, gains
from torch import Tensor, nn
from torch.nn import functional as F

import qdeploy
from qdeploy import api
from qdeploy.capture.capture import Captured, capture
from qdeploy.core.errors import OptionError
from qdeploy.core.recipe import Recipe, StepChoice
from qdeploy.graph import edit, query
from qdeploy.numerics import arith
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.recipes.step import Declined, Work, make_step
from qdeploy.simulation.prepared import Prepared

RECIPE = Recipe(name="ranges", by_grid=True, steps=(StepChoice(step="ranges"),))


def small() -> nn.Sequential:
    """A convolution with ReLU and a linear layer with one output, which leaves no choice of signs."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 1)).eval()


@cache
def _captured() -> Captured:
    return capture(small(), images(4))


def copied(net: nn.Module) -> Captured:
    """A changed `small()` as it would be captured: the graph is always the same."""
    own = replace(_captured(), module=edit.copy(_captured().module, own_parameters=True))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            query.parameter(own.module, name).copy_(parameter)
    return own


def images(count: int = 16, seed: int = 5) -> Tensor:
    return torch.randn((count, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


def working(model: nn.Module, data: Tensor, backend: str, monkeypatch: pytest.MonkeyPatch, **options: object) -> Work:
    """A calibrated model just before the step runs, with all that was observed."""
    seen: list[dict[str, object]] = []
    with monkeypatch.context() as patch:
        if [*model.state_dict()] == [*small().state_dict()]:
            patch.setattr(api, "capture", lambda *_: copied(model))
        patch.setattr(Ranges, "run", lambda self, work: seen.append(dict(work.prepared.observers)) or "")
        one = qdeploy.calibrate(qdeploy.prepare(model, data[:4], backend, recipe=RECIPE, **options), [data])
    one.observers = seen[0]
    return Work(one, [data])


def numbers(one: Prepared) -> dict[Quantizer, tuple[Tensor, Tensor]]:
    return {quantizer: tuple(v.clone() for v in chosen) for quantizer, chosen in one.chosen.items()}


def slopes(net: nn.Sequential, x: Tensor) -> Tensor:
    """Mean over samples of (dz / dy)^2 for y behind the ReLU, up to a factor: of one output each sample has one slope for each y."""
    (weight,) = net[3].weight
    return weight.view(1, 4, 6, 6).square()


def of(one: Prepared, role: str) -> dict[str, Quantizer]:
    return {tensor: quantizer for tensor, quantizer in one.quantizers.items() if quantizer.role == role}


def test_gains_are_squared_slopes_of_the_output():
    net, x = small(), images()
    module = qdeploy.prepare(net, x[:4], "snpe", recipe="plain").floating
    found = gains(module, [(x,)], seed=0)
    (relu,) = [gain for node, gain in found.items() if node.op == "call_function" and query.op_of(node).name == "relu"]
    assert torch.allclose(relu * net(x).square().sum(), slopes(net, x), rtol=1e-4)


def test_gains_of_several_outputs_are_the_mean_square_of_their_slopes():
    net, x = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).eval(), torch.randn((4096, 6))
    found = gains(qdeploy.prepare(net, x[:4], "snpe", recipe="plain").floating, [(x,)], seed=1)
    (tanh,) = [gain for node, gain in found.items() if node.op == "call_function" and query.op_of(node).name == "tanh"]
    assert torch.allclose(tanh * net(x).square().sum(), net[2].weight.square().sum(0, keepdim=True), rtol=0.15)


@pytest.mark.parametrize(("backend", "options"), [("tensorrt", {}), ("openvino", {}), ("academic", {"first_last_bits": 4})])
def test_every_channel_of_a_weight_gets_its_candidate_of_least_loss(backend: str, options: dict, monkeypatch: pytest.MonkeyPatch):
    net, x = small(), images()
    x[:, 2] *= 0.01  # what little is made of the largest weights makes it worth to clip them
    with torch.no_grad():
        net[0].weight[:, 2] *= 1.3
    work = working(net, x, backend, monkeypatch, **options)
    quantizer = work.prepared.quantizers["0.weight"]
    now, spec = work.prepared.chosen[quantizer][0].clone(), quantizer.spec
    weight, bias = (p.detach() for p in (net[0].weight, net[0].bias))
    full = weight.abs().amax((1, 2, 3)) / spec.qmax
    wanted = F.relu(F.conv2d(x, weight, bias))
    scales, losses = [now], []
    scales += [full, *(torch.minimum(now * factor, full) for factor in FACTORS)]
    for scale in scales:
        s = scale.view(-1, 1, 1, 1)
        error = F.relu(F.conv2d(x, (weight / s).round().clamp(spec.qmin, spec.qmax) * s, bias)) - wanted
        losses.append((error.square() * slopes(net, x)).sum((0, 2, 3)))
    best, index = torch.stack(losses).min(0)
    expected = torch.stack(scales).gather(0, torch.where(best < WORTH["weight"] * losses[0], index, 0).view(1, -1))[0]
    Ranges(samples=16).run(work)
    assert not torch.equal(expected, now), "there is something to choose"
    assert torch.allclose(work.prepared.chosen[quantizer][0], expected, rtol=1e-5)


@pytest.mark.parametrize("stretch", [0.25, 1.0, 4.0])
def test_powers_of_two_are_the_best_of_the_table_of_nine_pairs(stretch: float, monkeypatch: pytest.MonkeyPatch):
    net, x = small(), images()
    work = working(net, x, "vitis", monkeypatch)
    one = work.prepared
    (source,) = [t.tensor for t in one.plan.quantized if t.op == "input"]
    pair = [one.quantizers[name] for name in (source, "0.weight")]
    for quantizer in pair:  # so that another is better
        one.chosen[quantizer] = (one.chosen[quantizer][0] * stretch, one.chosen[quantizer][1])
    start = [float(one.chosen[quantizer][0]) for quantizer in pair]
    weight, bias = (p.detach() for p in (net[0].weight, net[0].bias))
    wanted = F.relu(F.conv2d(x, weight, bias))
    table = torch.empty(3, 3, dtype=torch.float64)
    for i in range(3):
        for w in range(3):
            quantized = []
            for tensor, quantizer, at, k in zip((x, weight), pair, start, (i, w), strict=True):
                numbers = torch.tensor([at * (1, 0.5, 2)[k]]), quantizer.zero_point
                quantized.append(arith.fake_quantize(tensor, *numbers, quantizer.spec))
            error = F.relu(F.conv2d(*quantized, bias)) - wanted
            table[i, w] = (error.square() * slopes(net, x)).sum()
    by_input = table.amin(1)
    i = int(by_input.argmin()) if by_input.min() < WORTH["activation"] * by_input[0] else 0
    w = int(table[i].argmin()) if table[i].min() < WORTH["weight"] * table[i, 0] else 0
    Ranges(samples=16).run(work)
    assert [float(one.chosen[q][0]) for q in pair] == [start[0] * (1, 0.5, 2)[i], start[1] * (1, 0.5, 2)[w]]


@pytest.mark.parametrize("backend", ["snpe", "vitis"])
def test_an_outlier_of_a_weight_that_meets_only_zeros_is_clipped(backend: str, monkeypatch: pytest.MonkeyPatch):
    net, x = small(), images()
    x[:, 2] = 0
    with torch.no_grad():
        limit = float(net[0].weight.abs().max())
        net[0].weight[0, 2, 0, 0], net[0].weight[0, 2, 0, 1] = 2.5 * limit, -2.5 * limit
    work = working(net, x, backend, monkeypatch)
    quantizer = work.prepared.quantizers["0.weight"]
    limits = torch.tensor([-2.5 * limit]), torch.tensor([2.5 * limit])
    work.prepared.chosen[quantizer] = arith.choose_scale(*limits, quantizer.spec)
    before = float(work.prepared.chosen[quantizer][0])
    Ranges(samples=16).run(work)
    assert float(work.prepared.chosen[quantizer][0]) < 0.96 * before


@pytest.mark.parametrize("read", [True, False])
def test_an_outlier_of_an_activation_costs_what_its_readers_make_of_it(read: bool, monkeypatch: pytest.MonkeyPatch):
    net, x = small(), images(160)
    x[0, 0, 3, 3] = 60  # one value of 30720: percentile 99.99 clips it
    with torch.no_grad():
        net[0].weight[:, 0] *= read
    work = working(net, x, "snpe", monkeypatch)
    one = work.prepared
    (source,) = [t.tensor for t in one.plan.quantized if t.op == "input"]
    quantizer = one.quantizers[source]
    one.chosen[quantizer] = arith.choose_scale(x.min().view(1), x.max().view(1), quantizer.spec)
    wide = float(one.chosen[quantizer][0])
    Ranges(samples=64, weights=False).run(work)
    assert (float(one.chosen[quantizer][0]) < 0.9 * wide) is not read


def test_weights_that_are_rounded_already_keep_their_scales(monkeypatch: pytest.MonkeyPatch):
    work = working(small(), images(), "tensorrt", monkeypatch)
    one = work.prepared
    with torch.no_grad():
        for weight, quantizer in of(one, "weight").items():
            parameter = query.parameter(one.module, weight)
            parameter.copy_(arith.fake_quantize(parameter, quantizer.scale, quantizer.zero_point, quantizer.spec))
    before = numbers(one)
    assert "weight" not in Ranges().run(work)
    assert all(torch.equal(one.chosen[q][0], before[q][0]) for q in of(one, "weight").values())


def test_without_weights_only_activations_change(monkeypatch: pytest.MonkeyPatch):
    work = working(small(), images(), "tensorrt", monkeypatch)
    before = numbers(work.prepared)
    assert "weight" not in Ranges(weights=False).run(work)
    assert all(torch.equal(work.prepared.chosen[q][0], before[q][0]) for q in of(work.prepared, "weight").values())


@pytest.mark.parametrize(
    ("name", "backend"),
    [("residual", "openvino"), ("mobile", "vitis"), ("concat", "snpe"), ("mixed", "snpe"), ("mixed", "vitis"), ("several", "openvino")],
)
def test_every_network_runs_and_is_settled_again(name: str, backend: str):
    one = networks.settled(name, backend, recipe=RECIPE)
    (entry,) = one.log
    assert entry["decision"] in ("kept", "undone") and "ranges" in entry["reason"]
    before = {tensor: quantizer.scale.clone() for tensor, quantizer in one.quantizers.items()}
    Work(one, []).make_consistent()
    assert all(torch.equal(quantizer.scale, before[tensor]) for tensor, quantizer in one.quantizers.items())


def test_few_bits_gain_much_at_the_outputs():
    entry = networks.settled("residual", "academic", recipe=RECIPE, weight_bits=3, first_last_bits=3).log[0]
    assert entry["decision"] == "kept" and entry["gain"] > 0.5


def test_transposed_and_grouped_convolutions_have_a_choice_for_each_channel(monkeypatch: pytest.MonkeyPatch):
    layers = (
        nn.ConvTranspose2d(3, 6, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, groups=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=4),
    )
    net = nn.Sequential(*layers).eval()
    work = working(net, images(), "academic", monkeypatch, weight_bits=4, first_last_bits=4)
    shapes = {q: q.scale.shape for q in of(work.prepared, "weight").values()}
    Ranges(samples=16).run(work)
    assert [tuple(shape) for shape in shapes.values()] == [(6,), (2,), (4,)]
    assert all(work.prepared.chosen[q][0].shape == shape for q, shape in shapes.items())


def test_a_grid_without_even_steps_is_declined():
    one = networks.settled("plain", "nnie", recipe=RECIPE)
    assert [entry["decision"] for entry in one.log] == ["declined"]
    with pytest.raises(Declined):
        Ranges().run(Work(one, [images()]))


@pytest.mark.parametrize("options", [{"samples": 0}, {"samples": 1.5}, {"weights": 1}, {"wights": True}])
def test_a_bad_option_is_refused(options: dict):
    with pytest.raises(OptionError):
        make_step("ranges", options)
