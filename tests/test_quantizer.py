"""The quantizer's modes and gradient, and what `freeze` makes of weights, biases and bad numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qdeploy
from qdeploy import arith
from qdeploy.backend import backends
from qdeploy.errors import InputError
from qdeploy.observer import make_observer
from qdeploy.prepared import Prepared
from qdeploy.quantizer import Quantizer
from qdeploy.spec import QuantSpec

UINT8 = QuantSpec(signed=False, symmetric=False)
NARROW = QuantSpec(signed=True, symmetric=True, narrow=True)
INT32 = [name for name in backends.names() if backends[name].bias == "int32"]
FLOAT = [name for name in backends.names() if backends[name].bias == "float"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(spec: QuantSpec = UINT8) -> Quantizer:
    return Quantizer(spec, "activation", make_observer("minmax", spec, {}))


def frozen(spec: QuantSpec, scale: list[float], zero_point: list[int]) -> Quantizer:
    made = quantizer(spec)
    made.set(torch.tensor(scale), torch.tensor(zero_point))
    made.mode = "quantize"
    return made


def test_float_mode_lets_everything_pass_and_observes_nothing():
    made, x = quantizer(), normal(3, 4)
    assert made(x, "x") is x
    with pytest.raises(AssertionError, match="no batch"):
        made.freeze()


def test_observe_mode_lets_everything_pass_and_observes_only_what_it_is_told_to():
    made, x = quantizer(), normal(3, 4)
    made.mode = "observe"
    assert made(x, "x") is x
    assert made(100 * x, "y", observe=False) is not x
    made.freeze()
    scale, zero_point = arith.choose_scale(x.min().reshape(1), x.max().reshape(1), UINT8)
    assert torch.equal(made.scale, scale) and torch.equal(made.zero_point, zero_point)
    assert made.observer is None


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


def layer(weight: Tensor, bias: Tensor) -> nn.Module:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight.data, made.bias.data = weight.clone(), bias.clone()
    return nn.Sequential(made, nn.ReLU())


def calibrated(model: nn.Module, backend: str, *batches: Tensor) -> Prepared:
    prepared = qdeploy.prepare(model, batches[0], backend=backend, recipe="fast")
    return qdeploy.calibrate(prepared, batches)


def scales(prepared: Prepared) -> tuple[Tensor, Tensor]:
    """float64 scales of the input and of the weight of the one layer."""
    bias = next(tensor for tensor in prepared.plan.tensors if tensor.role == "bias")
    assert bias.scales_of is not None
    source, weight = (prepared.quantizers[name].scale.double() for name in bias.scales_of)
    return source, weight


@pytest.mark.parametrize("backend", INT32)
def test_an_integer_bias_has_the_scale_of_the_accumulator(backend: str):
    prepared = calibrated(layer(normal(6, 5), normal(6)), backend, normal(20, 5))
    source, weight = scales(prepared)
    assert torch.equal(prepared.quantizers["0.bias"].scale, (source * weight).float())
    assert not prepared.quantizers["0.bias"].zero_point.any()


@pytest.mark.parametrize("backend", FLOAT)
def test_a_float_bias_lies_on_the_accumulators_steps(backend: str):
    bias = normal(6)
    prepared = calibrated(layer(normal(6, 5), bias), backend, normal(20, 5))
    source, weight = scales(prepared)
    step = (source * weight).float()
    moved = prepared.module.get_parameter("0.bias").detach()
    assert torch.equal(torch.round(moved.double() / step.double()).float() * step, moved)
    assert ((moved - bias).abs() <= 0.51 * step).all()
    assert "0.bias" not in prepared.quantizers


@pytest.mark.parametrize("backend", backends.names())
def test_a_bias_that_would_not_fit_raises_the_scale_of_its_weights(backend: str):
    weight, bias = 1e-6 * normal(3, 4), torch.tensor([1000.0, -2.0, 0.0])
    prepared = calibrated(layer(weight, bias), backend, normal(20, 4))
    source, raised = scales(prepared)
    codes = bias.double() / (source * raised)
    assert codes.abs().max() <= 2**30 * (1 + 2**-23), "half of int32, to the rounding of a float32 scale"
    assert codes.abs().max() >= 2**30 / 1.01, "no more than needed"
    simulated = prepared.flat((torch.zeros(2, 4),))[0]
    assert (simulated[0] - bias.relu()).abs().max() <= 1000 / 128


@pytest.mark.parametrize("backend", backends.names())
def test_an_all_zero_channel_of_weights_keeps_a_usable_scale(backend: str):
    weight = normal(3, 4)
    weight[1] = 0
    prepared = calibrated(layer(weight, torch.zeros(3)), backend, normal(20, 4))
    scale = prepared.quantizers["0.weight"].scale
    assert torch.isfinite(scale).all() and scale.min() >= 2.0**-16 * scale.max()
    assert not prepared.flat((normal(5, 4),))[0][:, 1].any()


@pytest.mark.parametrize("backend", backends.names())
def test_a_model_of_zeros_on_zeros_stays_zero(backend: str):
    prepared = calibrated(layer(torch.zeros(3, 4), torch.zeros(3)), backend, torch.zeros(2, 4))
    assert not prepared.flat((torch.zeros(2, 4),))[0].any()


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
        calibrated(layer(weight, torch.zeros(3)), "snpe", normal(8, 4))


def test_a_calibrated_model_learns_through_its_quantizers():
    prepared = calibrated(layer(normal(3, 4), normal(3)), "tensorrt", normal(20, 4))
    loss = prepared(normal(20, 4, seed=2)).square().mean()
    loss.backward()
    assert prepared.module.get_parameter("0.weight").grad.abs().sum() > 0
