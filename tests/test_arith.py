"""The formulas, against exact fractions written out here, and against ONNX's own reference evaluator."""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import onnx
import onnx.parser
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qdeploy.core.spec import FLOAT16_MAX, QuantSpec
from qdeploy.numerics import arith

HALF = Fraction(1, 2)
magnitudes = st.floats(-(2.0**100), 2.0**100, width=32)
ranges = st.lists(st.tuples(magnitudes, magnitudes).map(sorted), min_size=1, max_size=4)
ROUNDINGS = ["half_even", "half_away", "dpu"]
roundings = st.sampled_from(ROUNDINGS)


def lists(elements: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
    return st.lists(elements, min_size=1, max_size=30)


@st.composite
def specs(draw: st.DrawFn, axis: int | None = None) -> QuantSpec:
    signed = draw(st.booleans())
    return QuantSpec(
        signed=signed,
        symmetric=signed and draw(st.booleans()),
        narrow=signed and draw(st.booleans()),
        bits=draw(st.integers(2, 16)),
        rounding=draw(roundings),
        axis=axis,
    )


def rounded(x: Fraction, rounding: str) -> int:
    """Independent of the code under test: whole numbers and exact halves of a fraction."""
    whole = math.floor(x + HALF)
    if x + HALF != whole:
        return whole
    if rounding == "half_even" or (rounding == "dpu" and x > 0):
        return whole if whole % 2 == 0 else whole - 1
    return whole if x > 0 or rounding == "dpu" else whole - 1


def quotient(x: float, scale: float) -> Fraction | None:
    """x / scale as float32, None if it overflows."""
    with np.errstate(over="ignore"):
        value = np.float32(x) / np.float32(scale)
    return Fraction(float(value)) if np.isfinite(value) else None


def code(x: float, scale: float, zero_point: int, spec: QuantSpec) -> int:
    exact = quotient(x, scale)
    if exact is None:
        return spec.qmax if x > 0 else spec.qmin
    return min(max(rounded(exact, spec.rounding) + zero_point, spec.qmin), spec.qmax)


def encoding(spec: QuantSpec, pairs: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = torch.tensor(pairs, dtype=torch.float64).T
    return arith.choose_scale(low, high, spec)


@given(lists(st.floats(-1e6, 1e6, width=32) | st.integers(-40, 40).map(lambda i: i / 2)), roundings)
@example([0.49999997, -0.49999997, 0.50000006, -0.50000006, 8388607.5, -8388607.5, 8388609.0, -0.5, 2.5, -3.5], "half_away")
@example([0.49999997, -0.49999997, 0.50000006, -0.50000006, 8388607.5, -8388607.5, 8388609.0, -0.5, 2.5, -3.5], "dpu")
@example([-1.5, -0.5, -2.5, 0.5, 1.5, 2.5, -1e-30], "dpu")
def test_round_codes(values: list[float], rounding: str) -> None:
    found = arith.round_codes(torch.tensor(values), rounding)
    assert found.tolist() == [rounded(Fraction(float(np.float32(v))), rounding) for v in values]


ONNX_ROUNDINGS = """
< ir_version: 10, opset_import: ["" : 21] >
rounding (float[N] x) => (float[N] half_even, float[N] half_away, float[N] dpu) {
    half = Constant <value_float = 0.5> ()
    zero = Constant <value_float = 0.0> ()
    half_even = Round (x)
    size = Abs (x)
    whole = Floor (size)
    rest = Sub (size, whole)
    up = GreaterOrEqual (rest, half)
    one = Cast <to = 1> (up)
    away = Add (whole, one)
    sign = Sign (x)
    half_away = Mul (sign, away)
    below = Floor (x)
    above = Sub (x, below)
    tie = Equal (above, half)
    negative = Less (x, zero)
    special = And (negative, tie)
    ceiling = Ceil (x)
    dpu = Where (special, ceiling, half_even)
}
"""


def test_roundings_are_onnxs_to_the_sign_of_zero() -> None:
    halves = np.arange(-(2**17), 2**17, dtype=np.float32) / 2
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    values = np.concatenate([halves, np.nextafter(halves, np.float32(9e9)), np.nextafter(halves, np.float32(-9e9)), random])
    values = values[np.isfinite(values)]
    onnxs = ReferenceEvaluator(onnx.parser.parse_model(ONNX_ROUNDINGS)).run(None, {"x": values})
    for rounding, expected in zip(ROUNDINGS, onnxs, strict=True):
        found = arith.round_codes(torch.from_numpy(values), rounding).numpy()
        assert np.array_equal(found.view(np.int32), expected.view(np.int32)), rounding


@given(specs(axis=0), ranges)
@example(QuantSpec(signed=False, symmetric=False, axis=0), [[0.0, 0.0], [0.0, 0.0]])
@example(QuantSpec(signed=True, symmetric=True, axis=0), [[0.0, 0.0], [-1.0, 1.0]])
@example(QuantSpec(signed=False, symmetric=False, axis=0), [[2.0, 3.0], [-3.0, -2.0]])
@settings(max_examples=150, deadline=None)
def test_choose_scale(spec: QuantSpec, pairs: list[list[float]]) -> None:
    scale, zero_point = encoding(spec, pairs)
    widened = [(Fraction(min(low, 0.0)), Fraction(max(high, 0.0))) for low, high in pairs]
    codes = spec.qmax - spec.qmin
    plain = [max(-low, high) / spec.qmax if spec.symmetric else (high - low) / codes for low, high in widened]
    floor = max(max(plain) / 2**15 if max(plain) else Fraction(1, codes), Fraction(1, 2**64))
    for s, z, p, (low, high) in zip(scale.tolist(), zero_point.tolist(), plain, widened, strict=True):
        assert s == pytest.approx(float(max(p, floor)), rel=2**-23)
        assert spec.qmin <= z <= spec.qmax
        if spec.symmetric:
            assert z == 0
            continue
        assert abs(spec.qmin - low / max(p, floor) - z) <= HALF + Fraction(1, 2**30)
        slack = Fraction(s) * (HALF + Fraction(1, 100))
        assert (spec.qmin - z) * Fraction(s) - slack <= low
        assert (spec.qmax - z) * Fraction(s) + slack >= high


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_choose_scale_refuses(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        arith.choose_scale(torch.tensor([-1.0]), torch.tensor([bad]), QuantSpec(signed=True, symmetric=True))


@given(specs(), ranges)
@settings(deadline=None)
def test_zero_is_exact(spec: QuantSpec, pairs: list[list[float]]) -> None:
    scale, zero_point = encoding(spec, pairs[:1])
    zero = torch.zeros(1)
    assert arith.quantize(zero, scale, zero_point, spec).equal(zero_point)
    assert arith.dequantize(zero_point, scale, zero_point, spec).item() == 0
    assert arith.fake_quantize(zero, scale, zero_point, spec).item() == 0


@given(specs(), ranges, st.data())
@settings(max_examples=150, deadline=None)
def test_quantize_dequantize_saturated(spec: QuantSpec, pairs: list[list[float]], data: st.DataObject) -> None:
    scale, zero_point = encoding(spec, pairs[:1])
    s, z = scale.item(), zero_point.item()
    steps = st.integers(2 * spec.qmin - 9, 2 * spec.qmax + 9)
    values = data.draw(lists(st.floats(width=32, allow_nan=False, allow_infinity=False) | steps.map(lambda i: (i - z) / 2 * s)))
    x = torch.tensor(values)
    codes = arith.quantize(x, scale, zero_point, spec)
    assert codes.tolist() == [code(v, s, z, spec) for v in x.tolist()]
    exact = [np.float32(q - z) * np.float32(s) for q in codes.tolist()]
    assert arith.dequantize(codes, scale, zero_point, spec).tolist() == [float(v) for v in exact]
    quotients = [quotient(v, s) for v in x.tolist()]
    clamped = [q is None or not spec.qmin <= rounded(q, spec.rounding) + z <= spec.qmax for q in quotients]
    assert arith.saturated(x, scale, zero_point, spec).tolist() == clamped


@given(specs(), ranges, lists(st.floats(0, 1, width=32)))
@settings(max_examples=150, deadline=None)
def test_error_is_half_a_step_and_twice_is_once(spec: QuantSpec, pairs: list[list[float]], shares: list[float]) -> None:
    scale, zero_point = encoding(spec, pairs[:1])
    bottom, top = ((q - zero_point.item()) * scale.double() for q in (spec.qmin, spec.qmax))
    x = (bottom + torch.tensor(shares, dtype=torch.float64) * (top - bottom)).float()
    once = arith.fake_quantize(x, scale, zero_point, spec)
    # x / scale is a float32, so that of 16 bits the last 7 or more of its fraction are left.
    assert ((once.double() - x.double()).abs() <= scale.double() * (0.5 + 2**-7)).all()
    assert torch.equal(arith.fake_quantize(once, scale, zero_point, spec), once)
    codes = arith.quantize(x, scale, zero_point, spec)
    assert torch.equal(arith.quantize(once, scale, zero_point, spec), codes)


KINDS = [(True, True, False), (True, True, True), (True, False, False), (True, False, True), (False, False, False)]


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("signed", "symmetric", "narrow"), KINDS)
def test_fake_quantize_is_both(signed: bool, symmetric: bool, narrow: bool, rounding: str, axis: int | None) -> None:
    for bits in range(2, 17):
        check_fake_quantize(
            QuantSpec(bits=bits, signed=signed, symmetric=symmetric, narrow=narrow, rounding=rounding, axis=axis), bits, axis
        )


def check_fake_quantize(spec: QuantSpec, bits: int, axis: int | None) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(6, 5, 7, generator=generator) * 3
    channels = 1 if axis is None else x.shape[axis]
    low = -torch.rand(channels, generator=generator) * 2
    scale, zero_point = arith.choose_scale(low, low + 4, spec)
    x[0] = torch.round(x[0] * 2) / 2 * scale[0]
    found = arith.fake_quantize(x, scale, zero_point, spec)
    codes = arith.quantize(x, scale, zero_point, spec)
    assert codes.min() >= spec.qmin, spec
    assert codes.max() <= spec.qmax, spec
    assert torch.equal(found, arith.dequantize(codes, scale, zero_point, spec)), spec
    where = 0 if axis is None else axis % 3
    for at in ((0, 0, 0), (0, 4, 6), (3, 2, 1), (5, 4, 4)):
        c = 0 if axis is None else at[where]
        assert codes[at] == code(x[at].item(), scale[c].item(), zero_point[c].item(), spec), spec


def qdq(integer: int, axis: int | None) -> ReferenceEvaluator:
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["codes"], **attributes),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["y"], **attributes),
    ]
    kinds = (("x", TensorProto.FLOAT), ("scale", TensorProto.FLOAT), ("zero_point", integer))
    inputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds]
    outputs = [helper.make_tensor_value_info(n, k, None) for n, k in (("codes", integer), ("y", TensorProto.FLOAT))]
    graph = helper.make_graph(nodes, "qdq", inputs, outputs)
    return ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize(("signed", "symmetric"), [(True, True), (True, False), (False, False)])
def test_codes_are_onnxs(signed: bool, symmetric: bool, axis: int | None) -> None:
    spec = QuantSpec(signed=signed, symmetric=symmetric, axis=axis)
    integer = TensorProto.INT8 if signed else TensorProto.UINT8
    evaluator = qdq(integer, axis)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 400, generator=generator) * 10.0 ** (seed - 2)
        channels = 1 if axis is None else x.shape[axis]
        low = -torch.rand(channels, generator=generator) * 10.0 ** (seed - 2)
        scale, zero_point = arith.choose_scale(low, low + 2 * 10.0 ** (seed - 2), spec)
        x[:, ::2] = torch.round(x[:, ::2] / scale[0] * 2) / 2 * scale[0]
        numbers = (v if axis is not None else v[0] for v in (scale, zero_point))
        arrays = [v.numpy() for v in numbers]
        feeds = {
            "x": x.numpy(),
            "scale": arrays[0],
            "zero_point": arrays[1].astype(onnx.helper.tensor_dtype_to_np_dtype(integer)),
        }
        codes, values = evaluator.run(None, feeds)
        found = arith.quantize(x, scale, zero_point, spec)
        assert np.array_equal(found.numpy(), codes.astype(np.int64))
        assert np.array_equal(arith.dequantize(found, scale, zero_point, spec).numpy(), values)
        assert np.array_equal(arith.fake_quantize(x, scale, zero_point, spec).numpy(), values)


def test_32_bits_are_exact() -> None:
    spec = QuantSpec(signed=True, symmetric=True, bits=32)
    codes = torch.tensor([2**31 - 1, -(2**31), 2**24 + 1, 0])
    scale, zero_point = torch.tensor([0.5]), torch.tensor([0])
    assert arith.quantize(codes.double() * 0.5, scale, zero_point, spec).equal(codes)
    assert arith.fake_quantize(torch.tensor([3e9]), scale, zero_point, spec).item() == (2.0**31) * 0.5


@given(lists(st.floats(-1e6, 1e6, width=32)), st.floats(2.0**-20, 4, width=32), st.floats(2.0**-30, 4, width=32))
def test_a_bias_fits_its_scale(bias: list[float], input_scale: float, weight_scale: float) -> None:
    b, i, w = (torch.tensor(v) for v in (bias, [input_scale], [weight_scale] * len(bias)))
    raised = arith.weight_scale_for_bias(b, i, w)
    for value, before, after in zip(b.tolist(), w.tolist(), raised.tolist(), strict=True):
        needed = abs(Fraction(value)) / (Fraction(i.item()) * 2**30)
        assert after == pytest.approx(float(max(Fraction(before), needed)), rel=2**-23)
        assert after >= before
    codes = b.double() / arith.bias_scale(i, raised, len(b)).double()
    assert codes.abs().max() <= 2**30 * (1 + 2**-20)
    assert arith.bias_scale(i, raised, len(b)).tolist() == [float(np.float32(i.item() * r)) for r in raised.tolist()]


def rounded_half(halves: int, rounding: str) -> int:
    """halves / 2 rounded, in whole numbers only."""
    below, odd = divmod(halves, 2)
    if not odd:
        return below
    even = below + below % 2
    return {"half_even": even, "half_away": below + (halves > 0), "dpu": even if halves > 0 else below + 1}[rounding]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("signed", "symmetric", "narrow"), KINDS)
@pytest.mark.parametrize("bits", [pytest.param(n, marks=[] if n <= 10 or n in (12, 16) else pytest.mark.slow) for n in range(2, 17)])
def test_every_code_and_every_half(bits: int, signed: bool, symmetric: bool, narrow: bool, rounding: str) -> None:
    """And a few beyond both ends, for a scale that keeps all of them exact."""
    spec = QuantSpec(bits=bits, signed=signed, symmetric=symmetric, narrow=narrow, rounding=rounding, grid="power_of_two")
    zero = 0 if symmetric else spec.qmin + (spec.qmax - spec.qmin) // 3
    steps = range(2 * (spec.qmin - zero) - 7, 2 * (spec.qmax - zero) + 8)
    codes = [rounded_half(step, rounding) + zero for step in steps]
    clamped = [min(max(code, spec.qmin), spec.qmax) for code in codes]
    x = torch.arange(steps.start, steps.stop).float() * 2.0**-5
    scale, zero_point = torch.tensor([2.0**-4]), torch.tensor([zero])
    assert set(clamped) == set(range(spec.qmin, spec.qmax + 1))
    assert arith.quantize(x, scale, zero_point, spec).tolist() == clamped
    values = [(code - zero) / 16 for code in clamped]
    assert arith.dequantize(torch.tensor(clamped), scale, zero_point, spec).tolist() == values
    assert arith.fake_quantize(x, scale, zero_point, spec).tolist() == values
    assert arith.saturated(x, scale, zero_point, spec).tolist() == [a != b for a, b in zip(codes, clamped, strict=True)]


def covers(scale: Fraction, low: Fraction, high: Fraction, spec: QuantSpec) -> bool:
    if spec.symmetric:
        return spec.qmin * scale <= low and high <= spec.qmax * scale
    return math.ceil(-low / scale) + math.ceil(high / scale) <= spec.qmax - spec.qmin


def assert_powers_of_two(spec: QuantSpec, pairs: list[list[float]]) -> None:
    """The smallest power of two that covers each range, and a zero_point with which it does."""
    scales, zero_points = encoding(replace(spec, axis=0), pairs)
    for scale, z, (low, high) in zip(scales.tolist(), zero_points.tolist(), pairs, strict=True):
        s, first, last = Fraction(scale), Fraction(min(low, 0.0)), Fraction(max(high, 0.0))
        assert (s.numerator * s.denominator).bit_count() == 1
        assert covers(s, first, last, spec), (low, high)
        assert not covers(s / 2, first, last, spec), (low, high)
        assert (spec.qmin - z) * s <= first
        assert (spec.qmax - z) * s >= last
        assert z == 0 if spec.symmetric else (spec.qmin - z + 1) * s > first


POWERS = [
    QuantSpec(bits=bits, signed=signed, symmetric=symmetric, narrow=narrow, grid="power_of_two")
    for bits in (2, 4, 5, 8, 16)
    for signed, symmetric, narrow in KINDS
]


@pytest.mark.parametrize("exponents", [(-40, -17, -1, 0, 1, 8, 23, 40), pytest.param(range(-40, 41), marks=pytest.mark.slow)], ids=repr)
@pytest.mark.parametrize("spec", POWERS, ids=QuantSpec.describe)
def test_a_power_of_two_covers_the_range(spec: QuantSpec, exponents: Sequence[int]) -> None:
    """Around all that may be a border: exact powers, and the ends of exact grids."""
    for exponent in exponents:
        for size in {1, 3, -spec.qmin, spec.qmax, spec.qmax - spec.qmin} - {0}:
            exact = np.float32(size * 2.0**exponent)
            values = [float(v) for v in (exact, np.nextafter(exact, np.float32(0)), np.nextafter(exact, np.float32(np.inf)))]
            pairs = [[[0.0, v], [-v, 0.0], [-v, v], [-v, v / 3], [-v / 256, v]] for v in values]
            assert_powers_of_two(spec, list(itertools.chain(*pairs)))


@given(st.sampled_from(POWERS), st.floats(-(2.0**60), 0, width=32), st.floats(0, 2.0**60, width=32))
@settings(max_examples=300, deadline=None)
def test_any_range_is_covered_by_a_power_of_two(spec: QuantSpec, low: float, high: float) -> None:
    if max(-low, high) > 2.0**-40:
        assert_powers_of_two(spec, [[low, high]])


@pytest.mark.parametrize("spec", POWERS, ids=QuantSpec.describe)
def test_a_power_of_two_gives_itself(spec: QuantSpec) -> None:
    for exponent in range(-40, 41):
        for zero in [0] if spec.symmetric else (spec.qmin, spec.qmin + 1, spec.qmax - 1, spec.qmax):
            limits = [(q - zero) * 2.0**exponent for q in (spec.qmin, spec.qmax)]
            scale, zero_point = encoding(spec, [limits])
            assert (scale.item(), zero_point.item()) == (2.0**exponent, zero)


def test_powers_of_two_of_channels_are_each_its_own_but_for_dead_ones() -> None:
    spec = QuantSpec(signed=True, symmetric=True, axis=0, grid="power_of_two")
    pairs = [[-1.0, 0.5], [-1.0, 1.0], [0.0, 0.0], [0.0, 1e-9]]
    assert encoding(spec, pairs)[0].tolist() == [2.0**-7, 2.0**-6, 2.0**-21, 2.0**-21]
    assert encoding(spec, [[0.0, 0.0]] * 2)[0].tolist() == encoding(spec, [[0.0, 1.0]] * 2)[0].tolist() == [2.0**-6] * 2
    assert encoding(spec, [[0.0, 1e-44]])[0].item() == arith.MIN_SCALE
    assert encoding(QuantSpec.parse("int2 power-of-two"), [[0.0, 3.4e38]])[0].item() == arith.MAX_POWER


@given(lists(st.floats(-1e6, 1e6, width=32)), st.integers(-20, 3), st.integers(-30, 3))
def test_a_bias_keeps_powers_of_two(bias: list[float], input_exponent: int, weight_exponent: int) -> None:
    b, i = torch.tensor(bias), torch.tensor([2.0**input_exponent])
    w = torch.full((len(bias),), 2.0**weight_exponent)
    raised = arith.weight_scale_for_bias(b, i, w, "power_of_two")
    for value, after in zip(b.tolist(), raised.tolist(), strict=True):
        candidates = (Fraction(2) ** k for k in itertools.count(weight_exponent))
        limit = 2**30 * Fraction(i.item())
        assert after == next(float(c) for c in candidates if abs(Fraction(value)) <= c * limit)
    assert arith.bias_scale(i, raised, len(b)).tolist() == [r * i.item() for r in raised.tolist()]
    for grid in ("log", "float16", "float16_normal"):
        assert arith.weight_scale_for_bias(b, i, w[:1], grid).tolist() == w.tolist()


LOG = QuantSpec.parse("log8")
OFFSETS = [k - 127 for k in (-384, -383, -100, -16, -3, 0, 1, 7, 14, 15, 16, 32, 100, 319, 320)]
"""z of several clip values 2^(k/16), among them the first and the last, and c = 4."""


def log_power(j: int) -> float:
    """2^(j/16) as the nearest float32, from whole numbers: 2^24 times its fraction is the 16th root of 2^(r + 384)."""
    octave, r = divmod(j, 16)
    root = 1 << r + 24 * 16
    for _ in range(4):
        root = math.isqrt(root)
    return math.ldexp((root + 1) // 2, octave - 23)


def log_code(x: float, z: int) -> int:
    """The definition in fractions raised to whole powers: no logarithm, no root."""
    exact = Fraction(x)
    size, two = abs(exact), Fraction(2)
    if exact > 0 and (2 * size) ** 16 >= two**z:
        sign, first = 0, 0
    elif exact < 0 and (2 * size) ** 16 > two ** (z + 1):
        sign, first = 128, 1
    else:
        return 128
    low, high = first, 127
    while low < high:  # the code is the number of borders 2^((2 (z + m) - 1) / 32) at or below |x|
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size**32 >= two ** (2 * (z + middle) - 1) else (low, middle - 1)
    return sign + low


def log_value(code: int, z: int) -> float:
    magnitude = log_power(z + code % 128)
    return 0.0 if code == 128 else -magnitude if code > 128 else magnitude


def log_scale(z: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([log_power(z)]), torch.tensor([0])


def neighbours(values: list[float]) -> list[float]:
    """Each value as float32, and the float32 below and above it."""
    middle = np.float32(values)
    return [float(v) for v in np.concatenate([middle, *(np.nextafter(middle, np.float32(end)) for end in (-np.inf, np.inf))])]


def test_all_log_codes_of_all_clips_round_trip() -> None:
    codes = torch.arange(256)
    for k in range(-384, 321):
        scale, zero_point = log_scale(k - 127)
        assert arith.log_offset(scale).item() == k - 127
        values = arith.dequantize(codes, scale, zero_point, LOG)
        assert values.tolist() == [log_value(code, k - 127) for code in range(256)]
        assert torch.equal(arith.quantize(values, scale, zero_point, LOG), codes)
        assert torch.equal(arith.fake_quantize(values, scale, zero_point, LOG), values)
        assert not arith.saturated(values, scale, zero_point, LOG).any()


@pytest.mark.parametrize("z", OFFSETS)
def test_log_codes_change_at_the_borders(z: int) -> None:
    borders = [2.0 ** ((2 * (z + m) + 1) / 32) for m in range(-1, 129)] + [log_power(z) / 2, log_power(z + 1) / 2]
    both = [sign * border for border in borders for sign in (1, -1)]
    values = [*neighbours(both), 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, math.inf, -math.inf]
    scale, zero_point = log_scale(z)
    x = torch.tensor(values)
    expected = [{math.inf: 127, -math.inf: 255}.get(v) or log_code(v, z) for v in values]
    assert arith.quantize(x, scale, zero_point, LOG).tolist() == expected
    assert arith.fake_quantize(x, scale, zero_point, LOG).tolist() == [log_value(code, z) for code in expected]
    clipped = [math.isinf(v) or abs(Fraction(v)) ** 32 >= Fraction(2) ** (2 * (z + 127) + 1) for v in values]
    assert arith.saturated(x, scale, zero_point, LOG).tolist() == clipped
    assert set(expected) == set(range(256))


@given(st.sampled_from(OFFSETS), lists(st.floats(-1, 1, width=32)), st.integers(-160, 16))
@settings(max_examples=100, deadline=None)
def test_log_codes_are_the_definition(z: int, values: list[float], steps: int) -> None:
    x = torch.tensor(values) * 2.0 ** ((z + 127 + steps) / 16)
    assert arith.quantize(x, *log_scale(z), LOG).tolist() == [log_code(v, z) for v in x.tolist()]


def test_no_float32_is_near_a_tie_of_the_log_code() -> None:
    """So any float64 logarithm, torch's or an ONNX runtime's, gives the same code."""
    for r in range(16):
        place = 2.0 ** ((2 * r + 1) / 32) * 2**23
        for whole in (math.floor(place), math.ceil(place)):
            assert abs(16 * math.log2(whole) - 16 * 23 - (r + 0.5)) > 2**-26


def test_the_worked_log_code() -> None:
    scale, zero_point = encoding(LOG, [[-1.0, 4.0]])
    assert arith.log_offset(scale).item() == -95
    x = torch.tensor([1.0, -0.3, 0.0081583, 0.0081585, -0.0085195, -0.0085197, 4.0, -9.0])
    codes = arith.quantize(x, scale, zero_point, LOG)
    assert codes.tolist() == [0x5F, 0xC3, 0x80, 0x00, 0x80, 0x81, 0x7F, 0xFF]
    values = [1.0, -0.297302, 0.0, 0.016317, 0.0, -0.017039, 4.0, -4.0]
    assert arith.dequantize(codes, scale, zero_point, LOG).tolist() == pytest.approx(values, abs=1e-6)


@given(st.floats(2.0**-24, 2.0**20, width=32), st.floats(0, 1))
@example(2.0**-24, 0.5)
@example(2.0**20, 0.5)
@example(log_power(5), 0.5)
@example(float(np.nextafter(np.float32(log_power(5)), np.float32(9))), 0.5)
def test_a_log_tensor_is_never_clipped(largest: float, share: float) -> None:
    """Neither by the nearest lower entry, and a value of the table is its own clip value."""
    for pair in ([-largest, largest * share], [-largest * share, largest]):
        scale, zero_point = encoding(LOG, [pair])
        k = arith.log_offset(scale).item() + 127
        assert scale.item() == log_power(k - 127)
        assert zero_point.item() == 0
        assert log_power(k - 1) < largest <= log_power(k)
        assert not arith.saturated(torch.tensor([largest, -largest]), scale, zero_point, LOG).any()


def test_the_table_of_log_clips_ends() -> None:
    clips = [arith.log_offset(encoding(LOG, [[-v, v]])[0]).item() + 127 for v in (1e-30, 2.0**-25, 0.0, 2.0**21, 3e38)]
    assert clips == [-384, -384, 0, 320, 320]


HALF_WORDS = ["float16", "float16-normal"]
HALVES = [
    math.ldexp(significand + (1024 if exponent else 0), max(exponent, 1) - 25) for exponent in range(31) for significand in range(1024)
]
"""All finite float16 from 0 up; the place in the list is the bit pattern."""


def flushed(values: list[float], words: str) -> list[float]:
    return [0.0 if words == "float16-normal" and abs(v) < 2**-14 else v for v in values]


def half(values: list[float], words: str) -> list[float]:
    spec = QuantSpec.parse(words)
    scale, zero_point = encoding(spec, [[-5.0, 3.0]])
    assert (scale.tolist(), zero_point.tolist()) == ([1.0], [0])
    x = torch.tensor(values)
    found = arith.fake_quantize(x, scale, zero_point, spec)
    codes = arith.quantize(x, scale, zero_point, spec)
    assert torch.equal(arith.dequantize(codes, scale, zero_point, spec), found)
    assert torch.equal(arith.saturated(x, scale, zero_point, spec), found.isinf())
    again: list[float] = found.tolist()
    return again


@pytest.mark.parametrize("words", HALF_WORDS)
def test_every_float16_is_itself_or_flushed(words: str) -> None:
    negative = [-v for v in HALVES]
    assert HALVES[-1] == FLOAT16_MAX
    assert half(HALVES + negative, words) == flushed(HALVES + negative, words)
    patterns = arith.quantize(torch.tensor(HALVES), torch.ones(1), torch.zeros(1), QuantSpec.parse(words)).tolist()
    assert patterns == [0 if words == "float16-normal" and i < 1024 else i for i in range(len(HALVES))]


@pytest.mark.parametrize("words", HALF_WORDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_between_two_float16_the_nearer_one_or_the_even_one(words: str, sign: int) -> None:
    pairs = list(itertools.pairwise(HALVES))
    middles = [sign * (a + b) / 2 for a, b in pairs]
    even = [sign * pair[place % 2] for place, pair in enumerate(pairs)]
    assert half(middles, words) == flushed(even, words)
    for side in (0, 1):
        end = np.float32(sign * np.inf) if side else np.float32(0)
        beside = [float(v) for v in np.nextafter(np.float32(middles), end)]
        assert half(beside, words) == flushed([sign * pair[side] for pair in pairs], words)


@pytest.mark.parametrize("words", HALF_WORDS)
def test_float16_overflows_and_flushes_after_rounding(words: str) -> None:
    assert half([65519.996, 65520.0, -65520.0, 1e30], words) == [65504.0, math.inf, -math.inf, math.inf]
    assert half([2.0**-14 * (1 - 2**-12)], words) == [2.0**-14]
    assert math.copysign(1, half([-1e-9], words)[0]) == (1 if words == "float16-normal" else -1)


def test_shift_average_is_the_table() -> None:
    """The factors by which AMD's quantizer multiplies an average over these windows."""
    factors = {
        (3, 3): Fraction(9 * 7, 64),
        (5, 5): Fraction(25 * 10, 256),
        (6, 6): Fraction(36 * 7, 256),
        (3, 6): Fraction(36 * 7, 256),
        (6, 3): Fraction(36 * 7, 256),
        (7, 7): Fraction(49 * 21, 1024),
        (14, 14): Fraction(196 * 21, 4096),
    }
    for (h, w), factor in factors.items():
        multiplier, shift = arith.shift_average(h, w)
        assert Fraction(multiplier, 1 << shift) * h * w == factor
        assert abs(factor - 1) < 0.026


def test_shift_average_is_the_nearest_short_fraction() -> None:
    for h, w in itertools.product(range(1, 21), range(1, 21)):
        if (h, w) in arith.AVERAGES:
            continue
        count, (multiplier, shift) = h * w, arith.shift_average(h, w)
        error = abs(Fraction(multiplier, 1 << shift) - Fraction(1, count))
        for k in range(math.ceil(math.log2(count)) + 7):
            for m in (2**k // count, 2**k // count + 1):
                other = abs(Fraction(m, 1 << k) - Fraction(1, count))
                assert (error, shift) <= (other, k)
        assert shift <= math.log2(count) + 7
        assert error * count < Fraction(1, 128)
        if count.bit_count() == 1:
            assert (multiplier, 1 << shift) == (1, count)


@pytest.mark.parametrize(("name", "decibels"), [("normal", 38.05), ("laplace", 37.78), ("uniform", 38.05)])
def test_log_codes_have_the_known_error(name: str, decibels: float) -> None:
    """Of a million samples, nothing clipped; by numerical evaluation elsewhere."""
    rng = np.random.default_rng(0)
    values = {"normal": rng.standard_normal, "laplace": lambda n: rng.laplace(size=n), "uniform": lambda n: rng.uniform(-1, 1, n)}
    x = torch.from_numpy(values[name](1_000_000).astype(np.float32))
    scale, zero_point = arith.choose_scale(x.min().reshape(1), x.max().reshape(1), LOG)
    error = (arith.fake_quantize(x, scale, zero_point, LOG) - x).double().square().mean()
    assert 10 * torch.log10(x.double().square().mean() / error).item() == pytest.approx(decibels, abs=0.1)


def test_doctest() -> None:
    result = doctest.testmod(arith)
    assert result.failed == 0
    assert result.attempted > 9


def test_groups_of_a_transposed_convolution_share_the_scales_of_their_channels() -> None:
    b, i, w = torch.tensor([1.0, 2.0, 2.0**31, 4.0]), torch.tensor([0.5]), torch.tensor([0.25, 0.75])
    raised = arith.weight_scale_for_bias(b, i, w)
    assert raised.tolist() == [4.0, 0.75]
    assert arith.bias_scale(i, raised, 4).tolist() == [2.0, 0.375, 2.0, 0.375]
