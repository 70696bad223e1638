"""What a tensor is (`TensorSpec`), how it is quantized (`QuantSpec`), with which numbers (`Encoding`): pure data, no torch.

A spec of b bits has the integer codes qmin..qmax: unsigned 0..2^b - 1, signed -2^(b-1)..2^(b-1) - 1, and narrow signed
-(2^(b-1) - 1)..2^(b-1) - 1. An encoding adds one scale and zero_point, or one of each per channel along `spec.axis`;
code q stands for (q - zero_point) * scale.

>>> int8 = QuantSpec(signed=True, symmetric=True)
>>> int8.qmin, int8.qmax
(-128, 127)
>>> e = Encoding(tensor="x", role="activation", spec=QuantSpec(signed=False, symmetric=False), scale=[0.5], zero_point=[2])
>>> e.low, e.high
(array([-1.]), array([126.5]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rounding = Literal["half_even", "half_away"]
Role = Literal["activation", "weight", "bias", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """One way to quantize a tensor. `axis` is the channel axis of a per-channel spec, None for per-tensor."""

    signed: bool
    symmetric: bool
    bits: int = 8
    axis: int | None = None
    narrow: bool = False
    rounding: Rounding = "half_even"

    def __post_init__(self) -> None:
        assert 2 <= self.bits <= 16 or self.bits == 32, f"bits {self.bits} is not in 2..16, 32"
        assert self.signed or not self.narrow, "narrow is for signed codes"
        assert self.signed or not self.symmetric, "symmetric codes are signed"

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return int(self.narrow) - (1 << self.bits - 1) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << self.bits - 1) - 1 if self.signed else (1 << self.bits) - 1

    def describe(self) -> str:
        """Short words for tables.

        >>> QuantSpec(signed=True, symmetric=True, axis=0).describe()
        'int8 symmetric per-channel'
        """
        integer = f"{'' if self.signed else 'u'}int{self.bits}"
        symmetry = "symmetric" if self.symmetric else "asymmetric"
        return f"{integer} {symmetry} {'per-tensor' if self.axis is None else 'per-channel'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, shape and dtype of one model input; None in the shape is a dimension that may vary."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


def show_shape(shape: Sequence[int | None]) -> str:
    """A shape in words, with N or ? for what may vary.

    >>> show_shape((None, 3, None))
    '[N, 3, ?]'
    """
    words = ["?" if length is None else str(length) for length in shape]
    return f"[{', '.join(['N', *words[1:]] if shape and shape[0] is None else words)}]"


class Encoding:
    """The measured numbers of one tensor, keyed by the tensor's name in the emitted ONNX.

    `scale` is float32 `[C]` and `zero_point` int64 `[C]`, with C = 1 for a per-tensor spec. Instances are immutable.
    """

    __slots__ = ("role", "scale", "spec", "tensor", "zero_point")

    tensor: str
    role: Role
    spec: QuantSpec
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int64]

    def __init__(self, *, tensor: str, role: Role, spec: QuantSpec, scale: ArrayLike, zero_point: ArrayLike):
        scales = np.array(scale, dtype=np.float32).reshape(-1)
        zeros = np.array(zero_point, dtype=np.int64).reshape(-1)
        assert scales.shape == zeros.shape and (spec.axis is not None or scales.size == 1), f"{tensor}: {scales.shape}"
        assert np.isfinite(scales).all() and (scales > 0).all(), f"{tensor}: scale is not positive and finite"
        scales.setflags(write=False)
        zeros.setflags(write=False)
        fields = {"tensor": tensor, "role": role, "spec": spec, "scale": scales, "zero_point": zeros}
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("an Encoding is immutable")

    @property
    def low(self) -> NDArray[np.float64]:
        """Smallest represented value per channel, of the grid rather than of the data."""
        return (self.spec.qmin - self.zero_point).astype(np.float64) * self.scale

    @property
    def high(self) -> NDArray[np.float64]:
        """Largest represented value per channel, of the grid rather than of the data."""
        return (self.spec.qmax - self.zero_point).astype(np.float64) * self.scale

    def to_json(self) -> dict[str, Any]:
        """Plain data for the manifest; float32 scales are written so that they read back exactly."""
        return {
            "tensor": self.tensor,
            "role": self.role,
            "spec": asdict(self.spec),
            "scale": [float(s) for s in self.scale],
            "zero_point": [int(z) for z in self.zero_point],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Encoding:
        """The inverse of `to_json`."""
        return cls(
            tensor=data["tensor"],
            role=data["role"],
            spec=QuantSpec(**data["spec"]),
            scale=data["scale"],
            zero_point=data["zero_point"],
        )
