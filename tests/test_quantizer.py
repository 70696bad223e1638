"""The quantizer's modes and gradient, and what `freeze` makes of weights, biases and bad numbers."""

from __future__ import annotations

from functools import cache

import networks
import pytest
import torch
from torch import Tensor, nn

import qdeploy
from qdeploy.core.backend import backends
from qdeploy.core.errors import InputError
from qdeploy.core.spec import QuantSpec
from qdeploy.numerics import arith
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.simulation.prepared import Prepared

UINT8 = QuantSpec(signed=False, symmetric=False)
NARROW = QuantSpec(signed=True, symmetric=True, narrow=True)
LOG = QuantSpec(signed=True, symmetric=True, grid="log")
FLOAT16 = QuantSpec(signed=True, symmetric=True, bits=16, grid="float16")
LINEAR = [b.name for b in backends if b.weight.linear]
INT32 = [name for name in LINEAR if backends[name].bias == "int32"]
FLOAT = [name for name in LINEAR if backends[name].bias == "float"]
OWN = [b.name for b in backends if isinstance(b.bias, QuantSpec)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def frozen(spec: QuantSpec, scale: list[float], zero_point: list[int]) -> Quantizer:
    made = Quantizer(spec, "activation")
    made.set(torch.tensor(scale), torch.tensor(zero_point))
    made.mode = "quantize"
    return made


def test_float_mode_lets_everything_pass():
    x = normal(3, 4)
    assert Quantizer(UINT8, "activation")(x, "x") is x
    made = frozen(UINT8, [0.5], [3])
    made.averages["x"] = (2.0, 0.25)
    made.mode = "float"
    assert made(x, "x") is x


def test_an_average_is_that_of_the_targets_multiplication_and_shift_and_of_no_other_tensor():
    # a 3 x 3 pooling of codes of 2^-4, divided by 7 / 64 instead of 1 / 9
    step, made = 2.0**-4, frozen(QuantSpec(signed=True, symmetric=True, grid="power_of_two"), [2.0**-7], [0])
    made.averages["mean"] = (9 / step, step * 7 / 64)
    sums = torch.arange(-130, 131)
    x = (sums * step / 9).requires_grad_()
    wanted = ((sums * 7).double() / 64 * step / 2.0**-7).round().clamp(-128, 127) * 2.0**-7
    assert torch.equal(made(x, "mean").double(), wanted)
    assert not torch.equal(made(x, "other").double(), wanted)
    made(x, "mean").sum().backward()
    inside = (sums * 7 / 64 * step / 2.0**-7).round().abs() <= 127
    assert torch.equal(x.grad != 0, inside)


def test_quantize_mode_is_the_formula():
    made, x = frozen(UINT8, [0.5], [3]), normal(100) * 100
    expected = ((torch.round(x.double() / 0.5) + 3).clamp(0, 255) - 3) * 0.5
    assert torch.equal(made(x, "x").double(), expected)


@pytest.mark.parametrize(
    ("spec", "scale", "zero_point"),
    [(UINT8, [0.01], [100]), (NARROW, [0.01], [0]), (QuantSpec(signed=True, symmetric=True, axis=1), [0.01, 0.002, 0.03], [0, 0, 0])],
)
def test_the_gradient_passes_straight_through_where_nothing_is_clipped(spec: QuantSpec, scale: list[float], zero_point: list[int]):
    x, upstream = (normal(5, 3, 7) * 2).requires_grad_(), normal(5, 3, 7, seed=1)
    frozen(spec, scale, zero_point)(x, "x").backward(upstream)
    step = torch.tensor(scale).reshape(1, -1, 1)
    codes = torch.round(x.detach() / step) + torch.tensor(zero_point).reshape(1, -1, 1)
    inside = (codes >= spec.qmin) & (codes <= spec.qmax)
    assert 0.05 < inside.float().mean() < 0.95
    assert torch.equal(x.grad, upstream * inside)


def test_an_encoding_has_the_very_numbers_that_are_used():
    made = frozen(UINT8, [0.1], [7])
    encoding = made.encoding("x")
    assert encoding.scale[0] == made.scale.numpy()[0] and encoding.zero_point[0] == 7
    assert (encoding.tensor, encoding.role, encoding.spec) == ("x", "activation", UINT8)


@pytest.mark.parametrize(("spec", "scale", "clipped"), [(LOG, 2.0 ** (-127 / 16), 1.03), (FLOAT16, 1.0, 65520.0)])
def test_the_gradient_stops_where_the_other_grids_end(spec: QuantSpec, scale: float, clipped: float):
    x = torch.tensor([-2 * clipped, -clipped, -0.9 * clipped, -0.5, 0.0, 1e-6, 0.9 * clipped, clipped, 2 * clipped]).requires_grad_()
    frozen(spec, [scale], [0])(x, "x").sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


def layer(weight: Tensor, bias: Tensor) -> nn.Module:
    """A convolution of single pixels: not every target has linear layers."""
    made = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    made.weight.data, made.bias.data = pixels(weight).clone(), bias.clone()
    return nn.Sequential(made, nn.ReLU())


def pixels(x: Tensor) -> Tensor:
    return x[:, :, None, None]


def calibrated(model: nn.Module, backend: str, *batches: Tensor) -> Prepared:
    prepared = qdeploy.prepare(model, batches[0], backend=backend, recipe="fast")
    return qdeploy.calibrate(prepared, batches)


CASES: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    "usual": (normal(6, 5), normal(6), normal(20, 5)),
    "large bias": (1e-6 * normal(3, 4), torch.tensor([1000.0, -2.0, 0.0]), normal(20, 4)),
    "zero channel": (normal(3, 4) * torch.tensor([1.0, 0.0, 1.0])[:, None], torch.zeros(3), normal(20, 4)),
    "zeros": (torch.zeros(3, 4), torch.zeros(3), torch.zeros(2, 4)),
}


@cache
def case(name: str) -> dict[str, Prepared]:
    weight, bias, x = CASES[name]
    return networks.several(layer(weight, bias), [(pixels(x),)], recipe="fast")


def scales(prepared: Prepared) -> tuple[Tensor, Tensor]:
    """float64 scales of the input and of the weight of the one layer."""
    bias = next(tensor for tensor in prepared.plan.tensors if tensor.role == "bias")
    assert bias.scales_of is not None
    source, weight = (prepared.quantizers[name].scale.double() for name in bias.scales_of)
    return source, weight


@pytest.mark.parametrize("backend", INT32)
def test_an_integer_bias_has_the_scale_of_the_accumulator(backend: str):
    prepared = case("usual")[backend]
    source, weight = scales(prepared)
    assert torch.equal(prepared.quantizers["0.bias"].scale, (source * weight).float())
    assert not prepared.quantizers["0.bias"].zero_point.any()


@pytest.mark.parametrize("backend", FLOAT)
def test_a_float_bias_lies_on_the_accumulators_steps_of_8_bits(backend: str):
    bias, prepared = CASES["usual"][1], case("usual")[backend]
    source, weight = scales(prepared)
    step = (source * weight).float()
    moved = prepared.module.get_parameter("0.bias").detach()
    assert "0.bias" not in prepared.quantizers
    if backends[backend].activation.bits > 8:  # sums in float32 are coarser than the step
        assert torch.equal(moved, bias)
        return
    assert torch.equal(torch.round(moved.double() / step.double()).float() * step, moved)
    assert ((moved - bias).abs() <= 0.51 * step).all()


@pytest.mark.parametrize("backend", OWN)
def test_a_bias_with_a_spec_of_its_own_has_a_range_of_its_own(backend: str):
    bias, prepared = CASES["usual"][1], case("usual")[backend]
    made = prepared.quantizers["0.bias"]
    assert (made.spec, made.role) == (backends[backend].bias, "bias")
    encoding = made.encoding("0.bias")
    assert encoding.low[0] <= bias.min() and encoding.high[0] >= bias.max()
    assert torch.equal(made(bias, "0.bias"), arith.fake_quantize(bias, made.scale, made.zero_point, made.spec))


@pytest.mark.parametrize("backend", INT32 + FLOAT)
def test_a_bias_that_would_not_fit_raises_the_scale_of_its_weights(backend: str):
    bias, prepared = CASES["large bias"][1], case("large bias")[backend]
    source, raised = scales(prepared)
    codes = bias.double() / (source * raised)
    assert codes.abs().max() <= 2**30 * (1 + 2**-23), "half of int32, to the rounding of a float32 scale"
    coarse = 2 if backends[backend].weight.grid == "power_of_two" else 1
    assert codes.abs().max() >= 2**30 / 1.01 / coarse, "no more than needed"


@pytest.mark.parametrize("backend", backends.names())
def test_a_large_bias_comes_out_as_it_is(backend: str):
    bias, prepared = CASES["large bias"][1], case("large bias")[backend]
    simulated = prepared.flat((pixels(torch.zeros(2, 4)),))[0]
    # half a step of 8 bits, or of the log grid
    assert (simulated[0].flatten() - bias.relu()).abs().max() <= (
        1000 / 128 if backends[backend].activation.linear else 1000 * 2 ** (1 / 32) - 1000
    )


@pytest.mark.parametrize("backend", backends.names())
def test_an_all_zero_channel_of_weights_keeps_a_usable_scale(backend: str):
    prepared = case("zero channel")[backend]
    scale = prepared.quantizers["0.weight"].scale
    assert torch.isfinite(scale).all() and scale.min() >= 2.0**-16 * scale.max()
    assert not prepared.flat((pixels(normal(5, 4)),))[0][:, 1].any()


@pytest.mark.parametrize("backend", backends.names())
def test_a_model_of_zeros_on_zeros_stays_zero(backend: str):
    assert not case("zeros")[backend].flat((pixels(torch.zeros(2, 4)),))[0].any()


HALF = {backends[name].activation: name for name in backends.names() if backends[name].activation.grid.startswith("float16")}
"""A backend for each kind of half precision."""


@pytest.mark.parametrize("backend", HALF.values())
def test_what_does_not_fit_in_half_precision_is_refused(backend: str):
    with pytest.raises(InputError, match=r"tensor 'input' does not fit in float16; found: -?[0-9.e+]+ to 70000; allowed: up to 65504"):
        calibrated(layer(normal(3, 4), normal(3)), backend, pixels(torch.full((2, 4), 7e4)))
    with pytest.raises(InputError, match=r"tensor '0\.weight' does not fit in float16"):
        calibrated(layer(1e5 * torch.ones(3, 4), normal(3)), backend, pixels(torch.full((2, 4), 1e-3)))


class Divides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) / x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_in_the_data_are_refused_with_the_name_of_the_tensor(bad: float):
    x = normal(8, 4)
    x[3, 2] = bad
    with pytest.raises(InputError, match="tensor 'x' holds NaN or Inf"):
        calibrated(Divides(), "snpe", x)


def test_bad_numbers_that_the_model_makes_are_refused_with_the_name_of_the_tensor():
    x = normal(8, 4)
    x[3, 2] = 0
    with pytest.raises(InputError, match="tensor 'div' holds NaN or Inf"):
        calibrated(Divides(), "snpe", x)


def test_bad_weights_are_refused_with_the_name_of_the_tensor():
    weight = normal(3, 4)
    weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN or Inf"):
        calibrated(layer(weight, torch.zeros(3)), "snpe", pixels(normal(8, 4)))


def test_a_calibrated_model_learns_through_its_quantizers():
    prepared = calibrated(layer(normal(3, 4), normal(3)), "tensorrt", pixels(normal(20, 4)))
    loss = prepared(pixels(normal(20, 4, seed=2))).square().mean()
    loss.backward()
    assert prepared.module.get_parameter("0.weight").grad.abs().sum() > 0
