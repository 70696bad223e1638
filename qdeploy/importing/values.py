"""The two kinds of values in an imported graph: tensors, and what describes shapes, which is plain numbers and flat lists of them.

ONNX computes shapes with operators on small int64 tensors. Here these are Python numbers (or symbolic ones while torch.export
traces), so that a size that depends on the batch stays symbolic and never becomes data.

>>> each(lambda a, b: a * b, [2, 3], 4)
[8, 12]
>>> tensor([1, 2]).dtype, tensor(0.5).dtype
(torch.int64, torch.float32)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qdeploy.core.errors import CaptureError

Value = Any
"""A tensor, a number, a flat list of numbers, or None for an optional input that is left out."""

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
SMALL = 64
"""Integer vectors up to this length are lists: longer ones are tables or indices and stay tensors."""


def is_plain(value: Value) -> bool:
    """Whether `value` is a number or a flat list of numbers."""
    return isinstance(value, (*_NUMBERS, list, tuple))


def is_symbolic(value: Value) -> bool:
    """Whether `value` is a number that torch.export keeps open, or has one."""
    return any(isinstance(v, torch.SymInt | torch.SymFloat | torch.SymBool) for v in listed(value))


def listed(value: Value) -> list[Any]:
    """The numbers of a plain value."""
    return list(value) if isinstance(value, list | tuple) else [value]


def constant(value: Tensor, learned: bool = False) -> Value:
    """A constant of the file as what it is worked with: a number or a list where it may describe a shape, else the tensor.

    A vector of one float is a list as well, unless it may be `learned`.
    """
    whole = value.dtype in (torch.int64, torch.int32, torch.bool)
    if whole and value.dim() <= 1 and value.numel() <= SMALL:
        return value.tolist()
    if value.dtype == torch.float32 and (not value.dim() or (list(value.shape) == [1] and not learned)):
        return value.tolist()
    return value


def plain(value: Value) -> Value:
    """`value` as numbers; raises `CaptureError` where they are only known with the data."""
    if isinstance(value, Tensor):
        raise CaptureError(
            "a shape, an axis or another setting is computed from the values of tensors",
            found=f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}",
            allowed="constants, and what is computed from shapes",
        )
    return value


def tensor(value: Value) -> Value:
    """`value` as a tensor, as int64, float32 or bool; None stays None."""
    if value is None or isinstance(value, Tensor):
        return value
    numbers = listed(value)
    if is_symbolic(value):
        parts = [torch.full((1,), number, dtype=torch.int64) for number in numbers]
        whole = torch.cat(parts)
        return whole if isinstance(value, list | tuple) else whole[0]
    return torch.tensor(value if isinstance(value, list) else list(value) if isinstance(value, tuple) else value, dtype=_dtype(numbers))


def _dtype(numbers: Sequence[Any]) -> torch.dtype:
    if numbers and all(isinstance(number, bool) for number in numbers):
        return torch.bool
    return torch.float32 if any(isinstance(number, float) for number in numbers) else torch.int64


def each(function: Callable[..., Any], *values: Value) -> Value:
    """`function` of plain values, element by element, with numbers and lists of one repeated."""
    if not any(isinstance(value, list | tuple) for value in values):
        return function(*values)
    lists = [listed(value) for value in values]
    length = 0 if any(not numbers for numbers in lists) else max(len(numbers) for numbers in lists)
    repeated = [numbers * length if len(numbers) == 1 else numbers for numbers in lists]
    return [function(*numbers) for numbers in zip(*repeated, strict=True)]
