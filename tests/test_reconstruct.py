"""Reconstruction: what is learned starts where it should, ends on the grid, and has the gradients of the slow formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from qdeploy.core.spec import QuantSpec, Role
from qdeploy.numerics import arith
from qdeploy.numerics.learned_rounding import LearnedRounding, RandomDrop, step_quantize
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.recipes.reconstruct import Settings, apply, reconstruct

QUICK = Settings(iterations=120, batch=16, rounding_rate=2e-2)
WEIGHTS = ["int3", "int3 per-channel", "uint3 per-channel", "int4 power-of-two narrow", "int3 half-away", "uint2"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(spec: QuantSpec, role: Role, x: Tensor, share: float = 0.8) -> Quantizer:
    """One for `share` of the range of `x`: something is clipped."""
    rows = x.detach().reshape(1, -1) if spec.axis is None else x.detach().flatten(1)
    made = Quantizer(spec, role)
    made.set(*arith.choose_scale(share * rows.amin(1), share * rows.amax(1), spec))
    return made


class Block(nn.Module):
    """Two convolutions around a relu, and a shortcut; weights, inputs and biases are quantized as a target would."""

    def __init__(self, weight: str = "int3 per-channel", activation: str = "uint4", bias: bool = False):
        super().__init__()
        spec = QuantSpec.parse(weight)
        self.conv1, self.conv2 = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        for seed, conv in enumerate((self.conv1, self.conv2)):
            conv.weight.data = normal(*conv.weight.shape, seed=seed) / 7
            conv.bias.data = normal(len(conv.bias), seed=seed + 5) / 5
        inner = normal(1000).relu()
        self.input, self.inner = (quantizer(QuantSpec.parse(activation), "activation", x) for x in (normal(1000), inner))
        self.weight1, self.weight2 = (quantizer(spec, "weight", conv.weight) for conv in (self.conv1, self.conv2))
        self.bias1 = quantizer(QuantSpec(bits=32, signed=True, symmetric=True), "bias", self.conv1.bias)


def block(weight: str = "int3 per-channel", activation: str = "uint4") -> fx.GraphModule:
    """`Block` as a unit of the simulation: x [N, 6, H, W] -> relu(x + conv(relu(conv(x))))."""
    root, g = Block(weight, activation), fx.Graph()
    aten = torch.ops.aten
    x = g.placeholder("x")
    entered = g.call_module("input", (x, "x"))
    weights = [g.call_module(f"weight{i}", (g.get_attr(f"conv{i}.weight"), f"conv{i}.weight")) for i in (1, 2)]
    bias = g.call_module("bias1", (g.get_attr("conv1.bias"), "conv1.bias"))
    first = g.call_function(aten.conv2d.default, (entered, weights[0], bias, [1, 1], [1, 1]))
    inner = g.call_module("inner", (g.call_function(aten.relu.default, (first,)), "relu"))
    second = g.call_function(aten.conv2d.default, (inner, weights[1], g.get_attr("conv2.bias"), [1, 1], [1, 1]))
    g.output((g.call_function(aten.relu.default, (g.call_function(aten.add.Tensor, (second, x)),)),))
    return fx.GraphModule(root, g)


def mode(unit: fx.GraphModule, name: str) -> fx.GraphModule:
    for module in unit.modules():
        if isinstance(module, Quantizer):
            module.mode = name
    return unit


@torch.no_grad()
def data(unit: fx.GraphModule) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs as a quantized network makes them, those of the float one, and its outputs. Their channels are related, as in life."""
    exact = torch.einsum("oc,nchw->nohw", normal(6, 2, seed=2), normal(64, 2, 6, 6, seed=3)).relu()
    return exact + 0.02 * normal(64, 6, 6, 6, seed=4), exact, mode(unit, "float")(exact)[0]


@torch.no_grad()
def error(unit: fx.GraphModule, x: Tensor, target: Tensor) -> float:
    return float((mode(unit, "quantize")(x)[0] - target).square().sum(1).mean())


def run(unit: fx.GraphModule, settings: Settings = QUICK, seed: int = 0, **options: object) -> dict[str, Tensor]:
    x, exact, target = data(unit)
    return reconstruct(unit, [x], [exact], [target], settings, seed, **options)


def state(unit: fx.GraphModule) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in unit.state_dict().items()}


@pytest.mark.parametrize("words", WEIGHTS)
def test_soft_weights_start_as_the_weights_inside_the_range_and_at_its_ends_outside(words: str):
    spec, w = QuantSpec.parse(words), normal(5, 4, 3, 3)
    made = quantizer(spec, "weight", w, share=0.4)
    low, high = ((q - made.zero_point) * made.scale for q in (spec.qmin, spec.qmax))
    low, high = (arith.along_axis(limit, spec.axis, 4) for limit in (low, high))
    wanted = torch.minimum(torch.maximum(w, low), high)
    assert not torch.equal(wanted, w)
    (soft,) = LearnedRounding([w], [(made.scale, made.zero_point, spec)]).soft
    torch.testing.assert_close(soft.detach(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("words", WEIGHTS)
def test_learned_codes_are_at_most_one_from_the_nearest_and_the_unit_computes_with_them(words: str):
    unit = block(words)
    before = {f"conv{i}.weight": unit.get_parameter(f"conv{i}.weight").detach().clone() for i in (1, 2)}
    starts = [copy.deepcopy(getattr(unit, f"weight{i}")) for i in (1, 2)]
    run(unit, Settings(iterations=60, batch=8, rounding_rate=5e-2))
    moved = 0
    for (path, old), start, made in zip(before.items(), starts, (unit.weight1, unit.weight2), strict=True):
        now, spec = unit.get_parameter(path).detach(), made.spec
        codes = arith.quantize(now, made.scale, made.zero_point, spec)
        nearest = arith.quantize(old, start.scale, start.zero_point, spec)
        assert torch.equal(arith.dequantize(codes, made.scale, made.zero_point, spec), now), "on the grid"
        assert torch.equal(made(now, path), now)
        assert (codes - nearest).abs().max() == 1
        moved += int((codes != nearest).sum())
        assert torch.equal(made.zero_point, start.zero_point)
        assert torch.equal(made.scale, start.scale) == (spec.grid == "power_of_two")
    assert 5 < moved < sum(w.numel() for w in before.values()) / 2


@pytest.mark.parametrize("activation", ["uint8", "int6", "uint8 power-of-two"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_reconstruction_beats_rounding_to_nearest_by_far(keep: float, activation: str):
    unit = block(activation=activation)
    x, _, target = data(unit)
    before = error(unit, x, target)
    losses: list[float] = []
    scales = unit.input.scale, unit.inner.scale
    run(
        unit,
        Settings(iterations=200, batch=16, rounding_rate=2e-2, regularizer=2e-3, keep=keep),
        progress=lambda _, loss: losses.append(loss),
    )
    assert error(unit, x, target) < 0.7 * before
    assert len(losses) == 4 and max(losses) < before
    learned = keep > 0 and unit.input.spec.grid == "uniform"
    assert [torch.equal(old, q.scale) for old, q in zip(scales, (unit.input, unit.inner), strict=True)] == [not learned] * 2


@pytest.mark.parametrize(
    ("option", "keys"),
    [("learn_weight_steps", {"scale:weight1", "scale:weight2"}), ("learn_activation_steps", {"scale:input", "scale:inner"}),
     ("learn_bias", {"bias:conv1.bias", "bias:conv2.bias"})],
)  # fmt: skip
def test_only_what_is_asked_for_is_learned(option: str, keys: set[str]):
    unit = block()
    before = {key: unit.state_dict()[key.partition(":")[2] + (".scale" if "scale" in key else "")].clone() for key in keys}
    changed = run(unit, Settings(iterations=8, batch=8, **{option: False}))
    assert {"weight:conv1.weight", "weight:conv2.weight"} < changed.keys()
    assert all(torch.equal(changed.get(key, old), old) for key, old in before.items())
    unit = block()
    changed = run(unit, Settings(iterations=8, batch=8))
    assert all(not torch.equal(changed[key], old) for key, old in before.items())


def test_nothing_learned_stays_attached():
    unit = block()
    for parameter in unit.parameters():
        parameter.requires_grad_(False)
    run(unit, Settings(iterations=3, batch=8))
    quantizers = [m for m in unit.modules() if isinstance(m, Quantizer)]
    assert all(q.learned is None and q.mode == "quantize" and not q.scale.requires_grad for q in quantizers)
    assert not any(p.requires_grad or p.grad is not None for p in unit.parameters())


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    units = [block() for _ in range(3)]
    for unit, seed in zip(units, (1, 1, 2), strict=True):
        run(unit, Settings(iterations=20, batch=8, rounding_rate=5e-2), seed)
    assert state(units[0]) == state(units[1]) != state(units[2])


def test_applying_what_was_returned_gives_the_same_bytes():
    unit, other = block(), block()
    changed = run(unit, Settings(iterations=20, batch=8))
    apply(other, {key: value.clone() for key, value in changed.items()})
    assert state(unit) == state(other) != state(block())
    assert all(m.mode == "quantize" for m in other.modules() if isinstance(m, Quantizer))


def test_a_unit_without_weights_learns_the_steps_of_its_activations_if_it_has_any():
    def unit() -> fx.GraphModule:
        root, g = nn.Module(), fx.Graph()
        root.enter = quantizer(QuantSpec.parse("uint4"), "activation", normal(500), share=0.3)
        g.output((g.call_function(torch.ops.aten.relu.default, (g.call_module("enter", (g.placeholder("x"), "x")),)),))
        return fx.GraphModule(root, g)

    made, x = unit(), normal(64, 5)
    before = error(made, x, x.relu())
    settings = Settings(iterations=200, batch=16, activation_step_rate=2e-2)
    assert set(reconstruct(made, [x], [x], [x.relu()], settings, 0)) == {"scale:enter"}
    assert error(made, x, x.relu()) < 0.8 * before
    made = unit()
    assert reconstruct(made, [x], [x], [x.relu()], Settings(learn_activation_steps=False), 0) == {}
    assert made.enter.mode == "quantize"


def test_importance_says_which_errors_count():
    plain, even, none = block(), block(), block()
    x, exact, target = data(plain)
    nearest = [arith.fake_quantize(w, q.scale, q.zero_point, q.spec) for w, q in ((none.conv1.weight, none.weight1),)]
    settings = Settings(iterations=60, batch=8, rounding_rate=5e-2, learn_weight_steps=False)
    for unit, importance in ((plain, None), (even, [torch.ones_like(target)]), (none, [torch.zeros_like(target)])):
        reconstruct(unit, [x], [exact], [target], settings, 0, importance=importance)
    assert state(plain) == state(even)
    assert torch.equal(none.conv1.weight, nearest[0]), "where no error counts, only the regularizer is left"
    assert not torch.equal(plain.conv1.weight, nearest[0])


def slow(x: Tensor, log_step: Tensor, start: Tensor, zero: int, spec: QuantSpec, mask: Tensor) -> Tensor:
    """LSQ by straight-through: s * clip(round(x / s)), where the mask is 1."""
    scale = start * log_step.exp()
    steps = x / scale
    rounded = steps + (torch.round(steps) - steps).detach()
    low, high = spec.qmin - zero, spec.qmax - zero
    # torch's own clamp has a gradient at its bounds up to 2.13, and none since
    clamped = torch.where((rounded < low) | (rounded > high), rounded.detach().clamp(low, high), rounded)
    return torch.where(mask.bool(), clamped * scale, x)


@pytest.mark.parametrize("keep", [0.5, 1.0])
@pytest.mark.parametrize(("words", "zero"), [("uint4", 0), ("uint4", 6), ("int3", 0), ("uint8", 100)])
@pytest.mark.parametrize("layout", ["plain", "channels_last", "neither"])
def test_a_step_has_the_gradients_of_the_slow_formula_inside_and_outside(words: str, zero: int, keep: float, layout: str):
    spec, start = QuantSpec.parse(words), torch.tensor(3.2 / 2 ** QuantSpec.parse(words).bits)
    x, upstream = 1.5 * normal(6, 5, 60, 50), normal(6, 5, 60, 50, seed=1)
    if layout == "channels_last":
        x, upstream = (t.contiguous(memory_format=torch.channels_last) for t in (x, upstream))
    elif layout == "neither":
        x = x.transpose(0, 3).contiguous().transpose(0, 3)
    results = []
    for function in (step_quantize, slow):
        leaf, t = x.clone().requires_grad_(), torch.zeros((), requires_grad=True)
        chance = RandomDrop(keep, torch.Generator().manual_seed(0))
        if function is slow:
            base = torch.zeros_like(leaf).contiguous() if layout == "neither" else torch.zeros_like(leaf)
            mask = chance.mix(base, torch.ones_like(base))
            assert abs(float(mask.mean()) - keep) < 0.01
            made = slow(leaf, t, start, zero, spec, mask)
        else:
            made = step_quantize(leaf, t, start * t.detach().exp(), zero, spec, chance)
        made.backward(upstream)
        results.append((made.detach(), leaf.grad, t.grad))
    for fast, wanted in zip(*results, strict=True):
        torch.testing.assert_close(fast, wanted, rtol=2e-4, atol=2e-5)
    assert 0 < float((results[0][1] == 0).float().mean()) < 0.5, "some are outside"


def test_with_keep_1_all_is_quantized_and_the_float_inputs_do_not_matter():
    x = normal(3, 7, 5, 5)
    made = quantizer(QuantSpec.parse("uint4"), "activation", x)
    chance = RandomDrop(1.0, torch.Generator().manual_seed(0))
    values = step_quantize(x, torch.zeros(()), made.scale[0], int(made.zero_point), made.spec, chance)
    assert torch.equal(values, arith.fake_quantize(x, made.scale, made.zero_point, made.spec))
    units = [block(), block()]
    x, exact, target = data(units[0])
    for unit, second in zip(units, (exact, torch.full_like(exact, torch.nan)), strict=True):
        reconstruct(unit, [x], [second], [target], Settings(iterations=10, batch=8, keep=1.0), 0)
    assert state(units[0]) == state(units[1])


@pytest.mark.parametrize("words", WEIGHTS)
def test_rounding_has_the_gradients_of_the_slow_formula(words: str):
    spec, w, upstream = QuantSpec.parse(words), normal(5, 4, 3, 3), normal(5, 4, 3, 3, seed=1)
    made = quantizer(spec, "weight", w)
    rounding = LearnedRounding([w], [(made.scale, made.zero_point, spec)])
    generator = torch.Generator().manual_seed(1)
    rounding.logits += torch.randn(rounding.logits.shape, generator=generator)
    rounding.log_steps += 0.1
    rounding.refresh()
    rounding.backward([upstream], strength=0.3, beta=4.0)
    logits, t = rounding.logits.clone().requires_grad_(), rounding.log_steps.clone().requires_grad_()
    h = (1.2 * torch.sigmoid(logits) - 0.1).clamp(0, 1)
    steps = (w.double() / arith.along_axis(made.scale, spec.axis, 4).double()).floor()
    zero = arith.along_axis(made.zero_point, spec.axis, 4)
    base = torch.minimum(torch.maximum(steps, spec.qmin - zero), spec.qmax - 1 - zero).float()
    shaped = h.view(5, 3, 3, 4).permute(0, 3, 1, 2)
    soft = (base + shaped) * arith.along_axis(made.scale * t.exp(), spec.axis, 4)
    ((soft * upstream).sum() + 0.3 * (1 - (2 * h - 1).abs() ** 4).sum()).backward()
    torch.testing.assert_close(rounding.soft[0].detach(), soft.detach())
    torch.testing.assert_close(rounding.logits.grad, logits.grad, rtol=1e-4, atol=1e-5)
    wanted = torch.zeros_like(t) if spec.grid == "power_of_two" else t.grad
    torch.testing.assert_close(rounding.log_steps.grad, wanted, rtol=1e-4, atol=1e-4)


def test_samples_are_taken_by_index_from_anything_that_has_them():
    class Reversed:
        def __init__(self, x: Tensor):
            self.x, self.asked = x.flip(0), 0

        def __len__(self) -> int:
            return len(self.x)

        def __getitem__(self, which: Tensor) -> Tensor:
            self.asked += len(which)
            return self.x[len(self.x) - 1 - which]

    units = [block(), block()]
    tensors = data(units[0])
    stores = [Reversed(t) for t in tensors]
    for unit, (x, exact, target) in zip(units, (tensors, stores), strict=True):
        reconstruct(unit, [x], [exact], [target], Settings(iterations=5, batch=8), 0)
    assert state(units[0]) == state(units[1])
    assert [store.asked for store in stores] == [24, 24, 24], "three batches serve five iterations"
