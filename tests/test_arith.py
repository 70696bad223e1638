"""The formulas, against exact fractions written out here, and against ONNX's own reference evaluator."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import onnx
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qdeploy import arith
from qdeploy.spec import QuantSpec

HALF = Fraction(1, 2)
magnitudes = st.floats(-(2.0**100), 2.0**100, width=32)
ranges = st.lists(st.tuples(magnitudes, magnitudes).map(sorted), min_size=1, max_size=4)
roundings = st.sampled_from(["half_even", "half_away"])


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
    if rounding == "half_even":
        return whole if whole % 2 == 0 else whole - 1
    return whole if x > 0 else whole - 1


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
@example([0.49999997, -0.49999997, 8388607.5, 8388609.0, -0.5, 2.5, -3.5], "half_away")
def test_round_codes(values: list[float], rounding: str) -> None:
    found = arith.round_codes(torch.tensor(values), rounding)
    assert found.tolist() == [rounded(Fraction(float(np.float32(v))), rounding) for v in values]


@given(specs(axis=0), ranges)
@example(QuantSpec(signed=False, symmetric=False, axis=0), [[0.0, 0.0], [0.0, 0.0]])
@example(QuantSpec(signed=True, symmetric=True, axis=0), [[0.0, 0.0], [-1.0, 1.0]])
@example(QuantSpec(signed=False, symmetric=False, axis=0), [[2.0, 3.0], [-3.0, -2.0]])
@settings(max_examples=300, deadline=None)
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
@settings(max_examples=300, deadline=None)
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
@settings(max_examples=300, deadline=None)
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
@pytest.mark.parametrize("rounding", ["half_even", "half_away"])
@pytest.mark.parametrize(("signed", "symmetric", "narrow"), KINDS)
@pytest.mark.parametrize("bits", range(2, 17))
def test_fake_quantize_is_both(bits: int, signed: bool, symmetric: bool, narrow: bool, rounding: str, axis: int | None) -> None:
    spec = QuantSpec(bits=bits, signed=signed, symmetric=symmetric, narrow=narrow, rounding=rounding, axis=axis)
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(6, 5, 7, generator=generator) * 3
    channels = 1 if axis is None else x.shape[axis]
    low = -torch.rand(channels, generator=generator) * 2
    scale, zero_point = arith.choose_scale(low, low + 4, spec)
    x[0] = torch.round(x[0] * 2) / 2 * scale[0]
    found = arith.fake_quantize(x, scale, zero_point, spec)
    codes = arith.quantize(x, scale, zero_point, spec)
    assert codes.min() >= spec.qmin
    assert codes.max() <= spec.qmax
    assert torch.equal(found, arith.dequantize(codes, scale, zero_point, spec))
    where = 0 if axis is None else axis % 3
    for at in ((0, 0, 0), (0, 4, 6), (3, 2, 1), (5, 4, 4)):
        c = 0 if axis is None else at[where]
        assert codes[at] == code(x[at].item(), scale[c].item(), zero_point[c].item(), spec)


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
    codes = b.double() / arith.bias_scale(i, raised).double()
    assert codes.abs().max() <= 2**30 * (1 + 2**-20)
    assert arith.bias_scale(i, raised).tolist() == [float(np.float32(i.item() * r)) for r in raised.tolist()]
