"""Bias correction: afterwards the mean of every layer's output is that of the float layer, from data; by formula from batch norms."""

from __future__ import annotations

import math

import networks
import pytest
import torch
from qdeploy.calibration.bias_correction import Moments, clipped, correct, mean_shift, propagate
from torch import Tensor, fx, nn

import qdeploy
from qdeploy.core.errors import OptionError
from qdeploy.core.recipe import Recipe, StepChoice
from qdeploy.graph import query
from qdeploy.graph.flow import Flow, TensorStore
from qdeploy.graph.regions import is_layer
from qdeploy.numerics import arith
from qdeploy.recipes.step import Declined, Work, make_step
from qdeploy.simulation.prepared import Prepared

BACKENDS = ("snpe", "tensorrt", "openvino", "vitis", "academic", "nnie")
COARSE = {"weight_bits": 4, "first_last_bits": 4}


def samples(name: str) -> list[Tensor]:
    return [torch.cat(column) for column in zip(*networks.batches(name), strict=True)]


def prepared(name: str, backend: str) -> Prepared:
    return networks.settled(name, backend, **(COARSE if backend == "academic" else {}))


def layers(one: Prepared) -> list[fx.Node]:
    return [n for n in one.floating.graph.nodes if n.op == "call_function" and is_layer(n) and query.argument(n, 2) is not None]


def bias_of(layer: fx.Node) -> str:
    bias = query.argument(layer, 2)
    assert bias is not None
    return query.tensor_name(bias)


def added(one: Prepared, path: str) -> Tensor:
    """What the simulation adds for a bias."""
    bias, quantizer = query.parameter(one.module, path).detach().clone(), one.quantizers.get(path)
    return bias if quantizer is None else quantizer.quantize(bias)


def step_of(one: Prepared, path: str) -> float:
    """The largest step of a bias: of its quantizer, of the accumulator that a float bias is a multiple of, or none."""
    if path in one.quantizers:
        return float(one.quantizers[path].scale.max())
    parents = next(planned.scales_of for planned in one.plan.tensors if planned.tensor == path)
    return float(math.prod(one.quantizers[name].scale.max() for name in parents)) if parents is not None else 0.0


def gaps(one: Prepared, data: list[Tensor]) -> dict[str, Tensor]:
    """By layer, how far the mean of its simulated output is from that of the float one, `[C]`."""
    floating, simulated = (Flow(module, data, TensorStore(), 32) for module in (one.floating, one.module))
    found = {}
    for layer in layers(one):
        name = query.tensor_name(layer)
        means = []
        for flow in (floating, simulated):
            node = flow.node(name)
            flow.through(node)
            axis = 1 if query.op_of(node).name.startswith("conv") else flow[node].dim() - 1
            means.append(flow[node].double().mean([d for d in range(flow[node].dim()) if d != axis]))
        found[name] = means[1] - means[0]
    return found


@pytest.mark.parametrize(
    ("name", "backend"), [*(("residual", b) for b in BACKENDS), ("mobile", "vitis"), ("mobile", "academic"), ("several", "tensorrt")]
)
def test_afterwards_the_means_of_all_layers_are_those_of_the_float_ones(name: str, backend: str):
    one, data = prepared(name, backend), samples(name)
    before = gaps(one, data)
    make_step("bias_correction", {}).run(Work(one, data))
    largest = max(float(gap.abs().max()) for gap in before.values())
    assert largest > 1e-4, "there is something to correct"
    steps = {query.tensor_name(n): step_of(one, bias_of(n)) for n in layers(one)}
    for layer, gap in gaps(one, data).items():
        step = steps[layer]
        # half a step of the bias, and float sums
        assert gap.abs().max() <= 0.5 * step + 1e-5, (layer, gap.abs().max(), largest)


def test_a_layer_is_corrected_for_what_the_corrected_layers_before_leave():
    one, data = prepared("residual", "academic"), samples("residual")
    start = {bias_of(n): added(one, bias_of(n)) for n in layers(one)}
    before = gaps(one, data)
    make_step("bias_correction", {}).run(Work(one, data))
    extra = [(start[bias_of(n)] - one.biases[bias_of(n)] - before[query.tensor_name(n)]).abs().max() for n in layers(one)]
    assert extra[0] < 1e-5, "nothing comes before the first"
    assert max(extra[1:]) > 1e-3, "the later ones are not corrected twice for the same error"


@pytest.mark.parametrize("backend", ["snpe", "vitis", "tensorrt"])
def test_settling_again_keeps_a_correction(backend: str):
    one, data = prepared("mobile", backend), samples("mobile")
    make_step("bias_correction", {}).run(Work(one, data))
    corrected = {bias_of(n): added(one, bias_of(n)) for n in layers(one)}
    Work(one, data).make_consistent()
    assert all(torch.equal(added(one, path), bias) for path, bias in corrected.items())


@pytest.mark.parametrize("times", [0.01, 4.0])
def test_a_bias_with_a_range_of_its_own_gets_the_power_of_two_that_suits_it(times: float):
    one, data = prepared("plain", "vitis"), samples("plain")
    layer = layers(one)[0]
    quantizer = one.quantizers[bias_of(layer)]
    old, bias = float(quantizer.scale), query.parameter(one.module, bias_of(layer))
    start = added(one, bias_of(layer))
    wanted = torch.linspace(-1, 1, len(start)) * 127 * old * times
    moved = correct(Work(one, data), layer, wanted - start, rounded=True)
    scale = float(quantizer.scale)
    assert math.log2(scale) % 1 == 0 and (scale > old if times > 1 else scale <= old)
    assert torch.allclose(start + moved, wanted, atol=scale / 2 + 1e-7)
    assert one.chosen[quantizer][0] == scale and torch.allclose(bias, wanted, atol=1e-6)


def test_what_a_coarse_bias_is_rounded_by_is_not_corrected_twice():
    """The gap that is measured has the rounding of the old bias in it: the new one starts from what was added."""
    one, data = prepared("mobile", "vitis"), samples("mobile")
    exact = {bias_of(n): query.parameter(one.module, bias_of(n)).detach().clone() for n in layers(one)}
    first = layers(one)[0]
    gap = gaps(one, data)[query.tensor_name(first)]
    rounding = added(one, bias_of(first)) - exact[bias_of(first)]
    make_step("bias_correction", {}).run(Work(one, data))
    moved = query.parameter(one.module, bias_of(first)) - exact[bias_of(first)]
    assert torch.allclose(moved.double(), rounding.double() - gap, atol=1e-5) and rounding.abs().max() > 1e-3


@pytest.mark.parametrize("top", [6.0, 2.0, math.inf])
def test_moments_of_clipped_normal_values_are_those_of_many_draws(top: float):
    mean = torch.tensor([-2.0, -0.5, 0.0, 1.0, 5.0], dtype=torch.float64)
    deviation = torch.tensor([1.0, 0.5, 2.0, 3.0, 1.0], dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    draws = (torch.randn((400_000, 5), dtype=torch.float64, generator=random) * deviation + mean).clamp(0, top)
    made = clipped(Moments(mean, deviation.square()), top)
    assert torch.allclose(made.mean, draws.mean(0), atol=0.02)
    assert made.variance is not None and torch.allclose(made.variance, draws.var(0), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("deviation", [0.0, 1e-8])
def test_moments_of_a_channel_that_hardly_varies_are_its_value(deviation: float):
    made = clipped(Moments(torch.tensor([2.0, -2.0]), torch.full((2,), deviation**2)))
    assert torch.allclose(made.mean, torch.tensor([2.0, 0.0])) and torch.isfinite(made.mean).all()


def test_by_batch_norms_a_bias_moves_by_the_weight_error_times_the_mean_of_the_input():
    one, data = prepared("mobile", "academic"), samples("mobile")
    layer = layers(one)[1]
    source = query.argument(layer, 0)
    assert source is not None
    mean, deviation = layers(one)[0].meta["statistics"]
    expected = clipped(Moments(mean, deviation.square()), 6.0).mean
    entering = propagate(one.floating)[source].mean
    assert torch.allclose(entering, expected.view(1, -1, 1, 1).expand_as(entering))
    weight = query.parameter(one.floating, query.tensor_name(layer.args[1])).detach()
    quantizer = one.quantizers[query.tensor_name(layer.args[1])]
    error = arith.fake_quantize(weight, quantizer.scale, quantizer.zero_point, quantizer.spec) - weight
    inner = nn.functional.conv2d(entering.float(), error, None, padding=1, groups=12).mean((0, 2, 3))
    assert torch.allclose(mean_shift(Work(one, data), layer, entering).float(), inner, atol=1e-5)
    unpadded = torch.stack([error[o, 0].sum() * expected[o] for o in range(12)]).float()
    assert not torch.allclose(inner, unpadded, atol=1e-4), "at the border the kernel meets the padding"
    start = one.biases[bias_of(layer)].clone()
    make_step("bias_correction", {"statistics": "batch_norm"}).run(Work(one, []))
    assert torch.allclose(start - one.biases[bias_of(layer)], inner, atol=1e-5)


class Joined(nn.Module):
    """A sum, a concat, a pad and both poolings behind batch norms: all means follow but that of a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))
        self.mid, self.flat, self.late = nn.Conv2d(8, 4, 3), nn.Linear(8, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, right = self.left(x[:, :3]), self.right(x[:, 3:])
        both = torch.cat([nn.functional.relu(left), nn.functional.relu6(left + right)], 1)
        padded = self.mid(nn.functional.pad(both, (1, 1, 1, 1)))
        return padded, self.flat(both.mean((2, 3))), self.late(nn.functional.max_pool2d(nn.functional.relu(right), 2))


def test_means_go_through_sums_concats_pads_and_pools_as_the_network_would_have_them():
    x = torch.randn((4096, 6, 4, 4), generator=torch.Generator().manual_seed(4))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        net = Joined()
        for side in (net.left, net.right):
            nn.init.uniform_(side[1].weight, 0.5, 1.5)
            nn.init.uniform_(side[1].bias, -1, 1)
            side[1].momentum = 1.0
        net.train()(x)  # running statistics
    one = qdeploy.prepare(net.eval(), x[:4], "tensorrt", recipe=Recipe(name="t"))
    found = propagate(one.floating)
    flow = Flow(one.floating, [x], TensorStore(), 1024)
    checked = 0
    for layer in layers(one):
        source = query.argument(layer, 0)
        assert source is not None
        flow.advance(layer)
        assert (source in found) == (query.op_of(source).name != "max_pool2d")
        if source in found and query.op_of(source).name != "slice":
            assert torch.allclose(found[source].mean.float(), flow[source].mean(0, keepdim=True), atol=0.06)
            checked += 1
    assert checked == 2


def test_layers_whose_mean_input_is_unknown_are_left_and_counted():
    one = networks.settled("mixed", "snpe")
    with pytest.raises(Declined, match="batch norm"):
        make_step("bias_correction", {"statistics": "batch_norm"}).run(Work(one, []))
    one = networks.settled("residual", "snpe")
    words = make_step("bias_correction", {"statistics": "batch_norm"}).run(Work(one, []))
    done, left = (int(word) for word in words.split() if word.isdecimal())
    assert done + left == len(layers(one)) == 6 and left >= 1


def test_a_recipe_gives_layers_biases_and_corrects_them():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5, bias=False)).eval()
    recipe = Recipe(name="t", by_grid=True, steps=(StepChoice(step="bias_correction"),))
    data = networks.batches("plain")
    one = qdeploy.calibrate(qdeploy.prepare(net, data[0], "academic", recipe=recipe, **COARSE), data)
    assert {"0.bias", "3.bias"} <= {name for name, _ in one.module.named_parameters()}
    (entry,) = one.log
    assert entry["decision"] == "kept" and entry["reason"] == "2 biases corrected" and all(one.biases[b].any() for b in one.biases)


@pytest.mark.parametrize("options", [{"statistics": "guess"}, {"statistics": 3}, {"samples": 0}])
def test_a_bad_option_is_refused(options: dict):
    with pytest.raises(OptionError):
        make_step("bias_correction", options)
