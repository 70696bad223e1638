"""Scales without ties, checked with exact fractions: no output of a layer lies where two runtimes could round differently."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import cache
from math import ceil, floor

import networks
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import qdeploy
from qdeploy.core.backend import OpRule, backends
from qdeploy.core.ops import EVERY, MOVE, POOL
from qdeploy.core.spec import QuantSpec
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.simulation.prepared import Prepared
from qdeploy.simulation.rounding_ties import _LARGEST, SHORT, WIDEN, _shorten, _sum_scale, tie_free

HALF = Fraction(1, 2)
INTEGER = [b.name for b in backends if b.bias == "int32" and b.activation.grid == b.weight.grid == "uniform" and b.activation.bits <= 8]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(value: Tensor | float) -> Fraction:
    return Fraction(float(value))


BOUND = Fraction(1, 2**50)
"""What lies this near to an end of the interval, as a share of it, may count as inside or outside: floats decide."""


def brute_force(ratio: float, limit: int) -> tuple[int, int] | None:
    """The fraction with the smallest odd denominator below `limit` inside [ratio, ratio * (1 + WIDEN)], by trying all, exactly."""
    low = Fraction(ratio) * (1 + BOUND)
    high = Fraction(ratio) * (1 + Fraction(WIDEN)) * (1 - BOUND)
    for denominator in range(1, limit, 2):
        numerator = ceil(low * denominator)
        if numerator <= high * denominator:
            return numerator, denominator
    return None


@settings(max_examples=150, deadline=None)
@given(ratio=st.floats(2e-3, 4.0))
@example(ratio=0.0123)
@example(ratio=1 / 3)
@example(ratio=0.5)
@example(ratio=0.008)
def test_the_fraction_has_the_smallest_odd_denominator_that_brute_force_finds(ratio: float):
    found, denominator = tie_free(ratio)
    fraction = Fraction(round(found * denominator), denominator)
    assert denominator % 2 == 1 and found == float(fraction)
    assert ratio <= found <= ratio * (1 + WIDEN)
    wanted = brute_force(ratio, 1 << 14)
    assert wanted is not None and denominator <= wanted[1]
    if denominator < wanted[1]:
        ends = (Fraction(ratio), Fraction(ratio) * (1 + Fraction(WIDEN)))
        assert min(abs(fraction / end - 1) for end in ends) <= BOUND


@pytest.mark.parametrize("ratio", [1e-9, 1e-7])
def test_a_ratio_whose_fraction_would_be_too_fine_stays_as_it_is(ratio: float):
    assert tie_free(ratio) == (ratio, 0)


def distance_from_ties(ratio: Fraction, reach: int) -> Fraction:
    """How near an integer times `ratio` comes to k + 1/2 for all |k| <= reach; only the two integers next to each tie matter."""
    nearest = Fraction(1)
    for k in range(-reach, reach):
        tie = k + HALF
        below = floor(tie / ratio)
        nearest = min(nearest, abs(below * ratio - tie), abs((below + 1) * ratio - tie))
    return nearest


@cache
def trained(seed: int, scale: float = 1.0, ties: bool = False) -> dict[str, Prepared]:
    """A convolution with channels of very different size, calibrated; with `ties` no scale is widened."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()).eval()
    model[0].weight.data *= scale * torch.tensor([1.0, 0.3, 2.0, 0.05, 0.7]).reshape(-1, 1, 1, 1)
    x = normal(4, 3, 8, 8, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        if ties:
            patch.setattr("qdeploy.simulation.insert.avoid_ties", lambda *_: 0)
        return networks.several(model, [(x,)], INTEGER, recipe="fast")


@pytest.mark.parametrize("backend", INTEGER)
@pytest.mark.parametrize("seed", range(3))
def test_no_accumulator_of_a_layer_comes_near_a_tie_with_the_scales_as_they_are_stored(backend: str, seed: int):
    q = trained(seed, 10.0**seed)[backend].quantizers
    source, output = exact(q["input"].scale), exact(q["1"].scale)
    for weight in q["0.weight"].scale:
        ratio = source * exact(weight) / output
        denominator = ratio.limit_denominator(1 << 14).denominator
        assert denominator % 2 == 1
        assert distance_from_ties(ratio, 256) >= Fraction(1, 4 * denominator)


@pytest.mark.parametrize("backend", INTEGER)
@pytest.mark.parametrize("seed", range(3))
def test_scales_grow_by_no_more_than_the_share_that_is_allowed(backend: str, seed: int):
    widened, plain = trained(seed)[backend], trained(seed, ties=True)[backend]
    for tensor in plain.plan.quantized:
        if tensor.role != "bias":
            growth = widened.quantizers[tensor.tensor].scale.double() / plain.quantizers[tensor.tensor].scale.double()
            assert (growth >= 1 - 2**-22).all() and (growth <= 1 + WIDEN + 2**-22).all()
            grew = tensor.role == "weight"
            assert grew or (growth == 1).all()


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(3 * torch.sigmoid(self.conv(x)))


def test_a_weight_that_two_layers_share_grows_once_and_suits_the_first(monkeypatch: pytest.MonkeyPatch):
    x = normal(4, 3, 8, 8)
    widened = qdeploy.calibrate(qdeploy.prepare(Twice(), x, backend="tvm", recipe="fast"), [x]).quantizers
    monkeypatch.setattr("qdeploy.simulation.insert.avoid_ties", lambda *_: 0)
    plain = qdeploy.calibrate(qdeploy.prepare(Twice(), x, backend="tvm", recipe="fast"), [x]).quantizers
    assert (widened["conv.weight"].scale <= plain["conv.weight"].scale * (1 + WIDEN + 2**-22)).all()
    source, output = (exact(widened[name].scale) for name in ("x", "conv"))
    for weight in widened["conv.weight"].scale:
        assert (source * exact(weight) / output).limit_denominator(1 << 14).denominator % 2 == 1


def fixed(scale: float, zero_point: int, spec: QuantSpec) -> Quantizer:
    made = Quantizer(spec, "activation")
    made.set(torch.tensor([scale]), torch.tensor([zero_point]))
    return made


def sum_margin(sources: list[Quantizer], scale: float, sign: int) -> float:
    """The smallest distance of any sum of two codes from a tie, in float64 over all pairs."""
    steps = [np.arange(q.spec.qmin - int(q.zero_point), q.spec.qmax - int(q.zero_point) + 1) * float(q.scale) for q in sources]
    v = (steps[0][:, None] + sign * steps[1][None, :]) / scale
    return float(np.abs(v - np.floor(v) - 0.5).min())


@settings(max_examples=15, deadline=None)
@given(scales=st.tuples(*[st.floats(0.001, 1.0)] * 3), zeros=st.tuples(*[st.integers(0, 255)] * 2), sign=st.sampled_from([1, -1]))
def test_the_widened_scale_of_a_sum_is_no_nearer_to_ties_than_the_plain_one(scales, zeros, sign: int):
    spec = QuantSpec(signed=False, symmetric=False)
    sources = [fixed(scale, zero, spec) for scale, zero in zip(scales, zeros, strict=False)]
    plain = float(np.float32(scales[2]))
    widened = _sum_scale(sources, plain, sign)
    assert plain <= widened <= plain * (1 + WIDEN)
    assert widened == np.float32(widened)
    assert sum_margin(sources, widened, sign) >= sum_margin(sources, plain, sign)


class Deep(nn.Module):
    """Ten layers of every kind: convolutions, sums, products, pools and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(8))
        self.last = nn.Conv2d(4, 6, 1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for index, conv in enumerate(self.convs):
            y = F.relu(conv(x))
            x = x + y if index % 3 == 1 else x * y if index == 6 else y
        return self.fc(F.avg_pool2d(self.last(x), 4).mean((2, 3)))


class Exact(torch.fx.Interpreter):
    """The same graph in float64, every quantized tensor from its rounded codes: exact but for 1e-15."""

    def __init__(self, prepared: Prepared):
        super().__init__(prepared.module)
        self.codes: dict[str, Tensor] = {}

    def fetch_attr(self, target: str) -> object:
        return super().fetch_attr(target).detach().double()

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Tensor:
        q, (x, name) = self.module.get_submodule(target), args
        shape = [-1 if d == q.spec.axis else 1 for d in range(x.dim())] if q.spec.axis is not None else []
        scale, zero = q.scale.double().reshape(shape), q.zero_point.reshape(shape)
        # the parameters' codes are divided in float32, as they are stored
        steps = x / scale if q.role == "activation" else (x.float() / scale.float() if q.spec.bits <= 16 else x / scale)
        codes = (torch.round(steps.double()) + zero).clamp(q.spec.qmin, q.spec.qmax)
        self.codes[name] = codes
        return (codes - zero) * scale


class Simulated(torch.fx.Interpreter):
    def __init__(self, prepared: Prepared):
        super().__init__(prepared.module)
        self.codes: dict[str, Tensor] = {}

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Tensor:
        result, q = super().call_module(target, args, kwargs), self.module.get_submodule(target)
        shape = [-1 if d == q.spec.axis else 1 for d in range(result.dim())] if q.spec.axis is not None else []
        self.codes[args[1]] = torch.round(result.double() / q.scale.double().reshape(shape)) + q.zero_point.reshape(shape)
        return result


def assert_codes_are_exact(prepared: Prepared, fresh: Tensor, count: int) -> None:
    simulated, reference = Simulated(prepared), Exact(prepared)
    with torch.no_grad():
        # the codes of the input are not the layers' doing: start both from values on the input's grid
        start = prepared.quantizers["x"](fresh, "x")
        simulated.run(start)
        reference.run(start.double())
    assert len(simulated.codes) >= count
    for name, codes in reference.codes.items():
        wrong = int((codes != simulated.codes[name]).sum())
        assert not wrong, f"{wrong} of {codes.numel()} codes of '{name}' differ"


@cache
def deep() -> dict[str, Prepared]:
    return networks.several(Deep().eval(), [(normal(16, 4, 8, 8),)], INTEGER, recipe="fast")


@pytest.mark.parametrize("backend", INTEGER)
def test_the_simulation_in_float32_has_the_codes_of_exact_arithmetic_bit_for_bit(backend: str):
    assert_codes_are_exact(deep()[backend], normal(32, 4, 8, 8, seed=9), count=26)


class Averages(nn.Module):
    """Averages of 4, 16 and 64 elements, one of them of a sum, where ties are common."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.relu(self.conv(x))
        z = F.relu(y + self.last(F.avg_pool2d(y, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)))
        return F.adaptive_avg_pool2d(z, 1), F.avg_pool2d(z, 4), y.mean((2, 3))


@pytest.mark.parametrize("signed", [True, False])
def test_an_average_that_keeps_the_scale_of_its_input_has_exact_ties(signed: bool):
    rules = (OpRule(ops=MOVE | POOL, inputs=True, output=True, share=True), OpRule(ops=EVERY, inputs=True, output=True))
    spec = QuantSpec(signed=signed, symmetric=signed)
    target = replace(backends["onnxruntime"], name="keeper", activation=spec, rules=rules)
    x = normal(16, 4, 8, 8)
    prepared = networks.several(Averages().eval(), [(x,)], [target], recipe="fast")["keeper"]
    shared = [t for t in prepared.plan.quantized if t.op in ("avg_pool2d", "adaptive_avg_pool2d", "mean")]
    assert len(shared) == 4 and not any(t.observe for t in shared)
    for tensor in shared:
        mantissa, _ = math.frexp(float(prepared.quantizers[tensor.tensor].scale))
        assert (mantissa * 2**SHORT).is_integer()
    assert_codes_are_exact(prepared, normal(64, 4, 8, 8, seed=9), count=10)


@given(scale=st.floats(1e-6, 1e6))
@example(scale=1.0)
@example(scale=0.9999999)
def test_a_short_scale_is_the_next_one_up_with_few_bits(scale: float):
    short = _shorten(scale)
    assert scale <= short <= scale * (1 + WIDEN)
    assert (math.frexp(short)[0] * 2**SHORT).is_integer() and _shorten(short) == short


class SkipAdd(nn.Module):
    """A residual add whose other branch ends in a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.conv(x) + x))


@pytest.mark.parametrize("backend", [b.name for b in backends if b.residual == "skip" and b.activation.grid == "uniform"])
def test_channels_and_skip_of_a_fused_add_are_fractions_of_one_odd_denominator(backend: str) -> None:
    x = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    prepared = qdeploy.prepare(SkipAdd(), x, backend, "fast")
    qdeploy.calibrate(prepared, [x])
    scales = {name: quantizer.scale.double() for name, quantizer in prepared.quantizers.items()}
    (output,) = (s for name, s in scales.items() if name not in ("x", "conv.weight", "last.weight"))
    ratios = torch.cat([scales["x"], scales["conv.weight"] * scales["x"]]) / output
    denominators = torch.arange(1, _LARGEST, 2, dtype=torch.float64)
    misses = torch.stack([(r * denominators - (r * denominators).round()).abs() for r in ratios]) / ratios[:, None] / denominators
    assert (misses < 2e-7).all(0).any(), "no odd denominator suits all, up to the rounding of float32"
