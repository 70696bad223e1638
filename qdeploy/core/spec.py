"""What a tensor is (`TensorSpec`), how it is quantized (`QuantSpec`), with which numbers (`Encoding`): pure data, no torch.

A spec of b bits has the integer codes qmin..qmax: unsigned 0..2^b - 1, signed -2^(b-1)..2^(b-1) - 1, and narrow signed
-(2^(b-1) - 1)..2^(b-1) - 1. An encoding adds one scale and zero_point, or one of each per channel along `spec.axis`;
code q stands for (q - zero_point) * scale. The grid may be another:

    uniform          any scale
    power_of_two     scale = 2^-k, k the fraction length
    log              8-bit codes in sign and magnitude; magnitude m stands for scale * 2^(m/16), see `arith`
    float16          IEEE half precision, with subnormals; scale 1
    float16_normal   the same, where magnitudes below 2^-14 are 0

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
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

Grid = Literal["uniform", "power_of_two", "log", "float16", "float16_normal"]
Rounding = Literal["half_even", "half_away", "dpu"]
"""What becomes of exact halves: to the even neighbour, away from zero, or as AMD's DPU: positive to even, negative up."""
Role = Literal["activation", "weight", "bias", "constant"]
FLOAT16_MAX = 65504.0
LOG_STEPS = 16
"""Codes an octave of the log grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """One way to quantize a tensor. `axis` is the channel axis of a per-channel spec, None for per-tensor."""

    signed: bool
    symmetric: bool
    bits: int = 8
    axis: int | None = None
    narrow: bool = False
    rounding: Rounding = "half_even"
    grid: Grid = "uniform"

    def __post_init__(self) -> None:
        assert 2 <= self.bits <= 16 or self.bits == 32, f"bits {self.bits} is not in 2..16, 32"
        assert self.signed or not self.narrow, "narrow is for signed codes"
        assert self.signed or not self.symmetric, "symmetric codes are signed"
        assert self.rounding in get_args(Rounding) and self.grid in get_args(Grid), f"{self.rounding}, {self.grid}"
        if not self.linear:
            fixed = (self.signed, self.symmetric, self.axis, self.narrow, self.rounding)
            assert fixed == (True, True, None, False, "half_even"), f"grid {self.grid} has no such choice"
            assert self.bits == (8 if self.grid == "log" else 16), f"grid {self.grid} with {self.bits} bits"

    @property
    def linear(self) -> bool:
        """Whether codes stand for (q - zero_point) * scale."""
        return self.grid in ("uniform", "power_of_two")

    @property
    def qmin(self) -> int:
        """Smallest code of a linear grid."""
        return int(self.narrow) - (1 << self.bits - 1) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code of a linear grid."""
        return (1 << self.bits - 1) - 1 if self.signed else (1 << self.bits) - 1

    def describe(self) -> str:
        """Short words, which `parse` reads.

        >>> QuantSpec(signed=True, symmetric=True, axis=0).describe()
        'int8 symmetric per-channel'
        >>> QuantSpec(signed=True, symmetric=True, narrow=True, grid="power_of_two", rounding="dpu").describe()
        'int8 symmetric per-tensor narrow power-of-two dpu'
        >>> QuantSpec(signed=True, symmetric=True, grid="log").describe()
        'log8'
        """
        if not self.linear:
            return {"log": "log8", "float16": "float16", "float16_normal": "float16-normal"}[self.grid]
        words = [f"{'' if self.signed else 'u'}int{self.bits}", "symmetric" if self.symmetric else "asymmetric"]
        words.append("per-tensor" if self.axis is None else "per-channel")
        words += ["narrow"] if self.narrow else []
        words += [self.grid.replace("_", "-")] if self.grid != "uniform" else []
        words += [self.rounding.replace("_", "-")] if self.rounding != "half_even" else []
        return " ".join(words)

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """The spec that `describe` says in these words, in any order; `ValueError` that says what is wrong.

        Left out: symmetric for signed and asymmetric for unsigned codes, per-tensor. A per-channel spec has axis 0.

        >>> QuantSpec.parse("int4 per-channel half-away").describe()
        'int4 symmetric per-channel half-away'
        """
        words = text.lower().replace("_", "-").split()
        named = {"log8": "log", "float16": "float16", "float16-normal": "float16_normal"}
        if len(words) == 1 and words[0] in named:
            grid: Any = named[words[0]]
            return cls(signed=True, symmetric=True, bits=8 if grid == "log" else 16, grid=grid)
        types = [w for w in words if w.removeprefix("u").startswith("int") and w.removeprefix("u")[3:].isdecimal()]
        flags = {"symmetric", "asymmetric", "per-tensor", "per-channel", "narrow", "power-of-two", "half-even", "half-away", "dpu"}
        unknown = [w for w in words if w not in flags and w not in types]
        if unknown or len(types) != 1 or len(set(words)) != len(words):
            raise ValueError(f"'{' '.join(unknown) or text}' is not one of int2..int16, uint2..uint16 with {', '.join(sorted(flags))}")
        signed, bits = not types[0].startswith("u"), int(types[0].removeprefix("u")[3:])
        clashes = [pair for pair in (("symmetric", "asymmetric"), ("per-tensor", "per-channel")) if set(pair) <= set(words)]
        if clashes or len({"half-even", "half-away", "dpu"} & set(words)) > 1:
            raise ValueError("the words contradict each other")
        if not 2 <= bits <= 16:
            raise ValueError(f"{bits} bits are not in 2..16")
        symmetric = "symmetric" in words or (signed and "asymmetric" not in words)
        if not signed and (symmetric or "narrow" in words):
            raise ValueError("unsigned codes are asymmetric and not narrow")
        rounding: Any = next((w.replace("-", "_") for w in words if w in ("half-away", "dpu")), "half_even")
        return cls(
            signed=signed,
            symmetric=symmetric,
            bits=bits,
            axis=0 if "per-channel" in words else None,
            narrow="narrow" in words,
            rounding=rounding,
            grid="power_of_two" if "power-of-two" in words else "uniform",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Name, shape and dtype of one model input; None in the shape is a dimension that may vary.

    `open` has the names of these dimensions in their order, where they have names: one name is one size in all inputs.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    open: tuple[str, ...] = ()

    @property
    def names(self) -> dict[int, str]:
        """The names of the dimensions that may vary."""
        return dict(zip([d for d, size in enumerate(self.shape) if size is None], self.open, strict=False))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        """What a manifest has of an input."""
        return cls(name=data["name"], shape=tuple(data["shape"]), dtype=data["dtype"], open=tuple(data.get("open", ())))


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
        if not self.spec.linear:
            return -self.high
        return (self.spec.qmin - self.zero_point).astype(np.float64) * self.scale

    @property
    def high(self) -> NDArray[np.float64]:
        """Largest represented value per channel, of the grid rather than of the data."""
        if self.spec.grid == "log":
            return np.asarray(self.scale.astype(np.float64) * 2.0 ** (127 / LOG_STEPS))
        if not self.spec.linear:
            return np.full(1, FLOAT16_MAX)
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
