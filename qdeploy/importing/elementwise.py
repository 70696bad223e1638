"""ONNX operators that work element by element, and activations."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

from qdeploy.core.errors import CaptureError
from qdeploy.importing.table import operator
from qdeploy.importing.values import Value, each, is_plain, is_symbolic, tensor


def _operand(value: Value, other: Value = None) -> Value:
    """A list as a tensor; a number stays one, so that no constant tensor stands in the graph for it."""
    if not isinstance(value, list | tuple):
        return value
    return value[0] if len(value) == 1 and isinstance(other, Tensor) and other.dim() else tensor(value)


def _binary(name: str, numbers: Callable[[Any, Any], Any], tensors: Callable[[Any, Any], Tensor]) -> Callable[..., Any]:
    def run(a: Value, b: Value) -> Value:
        if is_plain(a) and is_plain(b):
            return each(numbers, a, b)
        return tensors(_operand(a, b), _operand(b, a))

    run.__name__ = f"onnx_{name.lower()}"
    return operator(name, mixed=True)(run)


def _is_whole(a: Value, b: Value) -> bool:
    return all(isinstance(v, int | torch.SymInt) or (isinstance(v, Tensor) and not v.is_floating_point()) for v in (a, b))


def _divide_numbers(a: Any, b: Any) -> Any:
    if not _is_whole(a, b):
        return a / b
    return a // b if is_symbolic(a) or is_symbolic(b) or (a < 0) == (b < 0) else -(-a // b)


def _divide(a: Value, b: Value) -> Tensor:
    return torch.div(a, b, rounding_mode="trunc") if _is_whole(a, b) else torch.div(tensor(a), b)


def _power(a: Value, b: Value) -> Tensor:
    if isinstance(b, float) and b.is_integer():
        b = int(b)
    made: Tensor = torch.pow(a, b)
    return made.to(a.dtype) if isinstance(a, Tensor) else made


add = _binary("Add", python.add, lambda a, b: a + b)
sub = _binary("Sub", python.sub, lambda a, b: a - b)
mul = _binary("Mul", python.mul, lambda a, b: a * b)
div = _binary("Div", _divide_numbers, _divide)
power = _binary("Pow", python.pow, _power)
_binary("Equal", python.eq, lambda a, b: torch.eq(tensor(a), b))
_binary("Less", python.lt, lambda a, b: a < b)
_binary("LessOrEqual", python.le, lambda a, b: a <= b)
_binary("Greater", python.gt, lambda a, b: a > b)
_binary("GreaterOrEqual", python.ge, lambda a, b: a >= b)
_binary("And", lambda a, b: a and b, lambda a, b: torch.logical_and(tensor(a), tensor(b)))
_binary("Or", lambda a, b: a or b, lambda a, b: torch.logical_or(tensor(a), tensor(b)))
_binary("Xor", lambda a, b: a != b, lambda a, b: torch.logical_xor(tensor(a), tensor(b)))


def _unary(name: str, tensors: Callable[[Tensor], Tensor], numbers: Callable[[Any], Any] | None = None) -> Callable[..., Any]:
    def run(x: Value) -> Value:
        if numbers is not None and is_plain(x):
            return each(numbers, x)
        return tensors(tensor(x))

    run.__name__ = f"onnx_{name.lower()}"
    return operator(name, mixed=True)(run)


for _name, _tensors, _numbers in (
    ("Neg", torch.neg, python.neg),
    ("Abs", torch.abs, abs),
    ("Not", torch.logical_not, python.not_),
    ("Floor", torch.floor, lambda v: math.floor(v) * 1.0),
    ("Ceil", torch.ceil, lambda v: math.ceil(v) * 1.0),
    ("Sqrt", torch.sqrt, torch.sym_sqrt),
    ("Reciprocal", torch.reciprocal, lambda v: 1 / v),
):
    _unary(_name, _tensors, _numbers)
for _name, _only in (
    ("Exp", torch.exp),
    ("Log", torch.log),
    ("Erf", torch.erf),
    ("Round", torch.round),
    ("Sign", torch.sign),
    ("Sin", torch.sin),
    ("Cos", torch.cos),
    ("Tan", torch.tan),
    ("Atan", torch.atan),
    ("IsNaN", torch.isnan),
    ("Relu", F.relu),
    ("Sigmoid", torch.sigmoid),
    ("Tanh", torch.tanh),
    ("Softplus", F.softplus),
    ("Softsign", F.softsign),
    ("HardSwish", F.hardswish),
    ("Mish", F.mish),
):
    _unary(_name, _only)


@operator("Mod", mixed=True)
def mod(a: Value, b: Value, *, fmod: int = 0) -> Value:
    if is_plain(a) and is_plain(b):
        return each(math.fmod if fmod else python.mod, a, b)
    return (torch.fmod if fmod else torch.remainder)(tensor(a), _operand(b))


def _extreme(name: str, numbers: Callable[..., Any], tensors: Callable[[Tensor, Tensor], Tensor], bound: str) -> None:
    def run(*values: Value) -> Value:
        if all(is_plain(v) for v in values):
            return each(lambda *v: v[0] if len(v) == 1 else numbers(*v), *values)
        limits = [v for v in values if is_plain(v) and not isinstance(v, list | tuple)]
        others = [tensor(v) for v in values if not any(v is limit for limit in limits)]
        made = others[0]
        for other in others[1:]:
            made = tensors(made, other)
        for limit in limits:
            made = torch.clamp(made, **{bound: limit})
        return made

    run.__name__ = f"onnx_{name.lower()}"
    operator(name, mixed=True)(run)


_extreme("Max", torch.sym_max, torch.maximum, "min")
_extreme("Min", torch.sym_min, torch.minimum, "max")


@operator("Sum")
def total(*values: Tensor) -> Tensor:
    made = values[0]
    for value in values[1:]:
        made = made + value
    return made


@operator("Mean")
def average(*values: Tensor) -> Tensor:
    made: Tensor = total(*values) / len(values)
    return made


@operator("Clip", mixed=True)
def clip(x: Value, low: Value = None, high: Value = None, *, min: float | None = None, max: float | None = None) -> Value:
    """The limits are attributes before opset 11, inputs since; an open side has none, or the largest number there is."""
    low, high = min if low is None else low, max if high is None else high
    if is_plain(x):
        made = x if low is None else each(torch.sym_max, x, low)
        return made if high is None else each(torch.sym_min, made, high)
    largest = torch.finfo(x.dtype).max if x.is_floating_point() else torch.iinfo(x.dtype).max
    if isinstance(low, float) and low <= -largest:
        low = None
    if isinstance(high, float) and high >= largest:
        high = None
    if low is None and high is None:
        return x
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.clamp(x, tensor(low), tensor(high))
    low, high = (int(v) if v is not None and float(v).is_integer() else v for v in (low, high))
    return F.relu(x) if (low, high) == (0, None) else torch.clamp(x, low, high)


@operator("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


@operator("PRelu")
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """A slope for each channel, as torch has it, or one that is broadcast in another way."""
    if slope.dim() == 1 and (slope.shape[0] == 1 or x.dim() == 2):
        return F.prelu(x, slope)
    return torch.clamp(x, min=0) + slope * torch.clamp(x, max=0)


@operator("PReluChannels")
def prelu_channels(x: Tensor, slope: Tensor, *, sides: int) -> Tensor:
    """Not of ONNX: what `weights` makes of a PRelu with a slope for each of the elements that `sides` dimensions follow."""
    if slope.numel() == 1 or x.dim() - 2 == sides:
        return F.prelu(x, slope)
    return torch.clamp(x, min=0) + slope.reshape(-1, *[1] * sides) * torch.clamp(x, max=0)


@operator("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


@operator("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


_SELU = (1.67326319217681884765625, 1.05070102214813232421875)


@operator("Selu")
def selu(x: Tensor, *, alpha: float = _SELU[0], gamma: float = _SELU[1]) -> Tensor:
    if (alpha, gamma) == _SELU:
        return F.selu(x)
    return gamma * F.elu(x, alpha)


@operator("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.threshold(x, alpha, 0.0)


@operator("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    if math.isclose(alpha, 1 / 6, rel_tol=1e-5) and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0, 1)


@operator("Gelu")
def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@operator("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@operator("Softmax")
def softmax(x: Tensor, *, axis: int | None = None, opset: int = 13) -> Tensor:
    return _soft(F.softmax, x, axis, opset)


@operator("LogSoftmax")
def log_softmax(x: Tensor, *, axis: int | None = None, opset: int = 13) -> Tensor:
    return _soft(F.log_softmax, x, axis, opset)


def _soft(function: Callable[..., Tensor], x: Tensor, axis: int | None, opset: int) -> Tensor:
    """Before opset 13 it goes over all dimensions from `axis` on together."""
    if opset >= 13:
        return function(x, dim=-1 if axis is None else axis)
    axis = (1 if axis is None else axis) % x.dim()
    return function(x, dim=-1) if axis == x.dim() - 1 else function(x.flatten(axis), dim=-1).reshape(x.shape)


@operator("Cast", mixed=True)
def cast(x: Value, *, to: int, saturate: int = 1, round_mode: str = "up") -> Value:
    dtype = torch_dtype(ir.DataType(to))
    if not is_plain(x):
        return x.to(dtype)
    if dtype in (torch.int64, torch.int32):
        return each(lambda v: v if isinstance(v, torch.SymInt) else torch.sym_int(v), x)  # type: ignore[no-untyped-call]
    if dtype == torch.bool:
        return each(lambda v: v != 0, x)
    return each(torch.sym_float, x) if dtype == torch.float32 else tensor(x).to(dtype)


@operator("CastLike")
def cast_like(x: Tensor, other: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    return x.to(other.dtype)


def torch_dtype(kind: ir.DataType) -> torch.dtype:
    """The dtype of torch for one of ONNX."""
    name = {"FLOAT": "float32", "DOUBLE": "float64"}.get(kind.name, kind.name.lower())
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CaptureError("a tensor has a type that is not supported", found=kind.name, allowed="float, integer and bool tensors")
    return found


@operator("Where", mixed=True)
def where(condition: Value, a: Value, b: Value) -> Value:
    if is_plain(condition) and is_plain(a) and is_plain(b):
        return each(lambda c, x, y: x if c else y, condition, a, b)
    return torch.where(tensor(condition), _operand(a), _operand(b))


@operator("Identity", mixed=True)
def identity(x: Value) -> Value:
    return x


@operator("Dropout", mixed=True)
def dropout(x: Value, ratio: Value = None, training: Value = False, *, seed: int = 0, is_test: int = 1) -> Value:
    if training:
        raise CaptureError("dropout in training mode", action="export the model in eval mode")
    return x
