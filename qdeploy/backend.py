"""What a target hardware is to qdeploy: a frozen value. One file in `backends/` makes one and registers it.

A backend says how tensors are quantized (`activation`, `weight`, `bias`), where (`rules`, `fuse`, `residual`), what is written
(`emits`, `write`, `opset`) and where it can be checked (`runtimes`). `plan` turns the placement part into decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qdeploy.errors import OptionError
from qdeploy.ops import EVERY
from qdeploy.registry import Registry
from qdeploy.spec import Encoding, QuantSpec

Writer = Callable[[Sequence[Encoding], str], Mapping[str, str]]
"""`(encodings, file format) -> {file name: text}`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRule:
    """What a target does at some ops.

    inputs: the tensors that enter are quantized. output: the tensor that leaves is quantized. share: the output carries the
    encoding of the input, or of all inputs together. weight: the weight's spec, where it is not the backend's.
    """

    ops: frozenset[str]
    inputs: bool = False
    output: bool = False
    share: bool = False
    weight: QuantSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """Between a head op and a tail op that is its only reader there is no quantizer: the target computes both at once."""

    heads: frozenset[str]
    tails: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One target.

    bias: "float", or "int32" at input scale x weight scale. residual: an add quantizes "both" branches or only the "skip" branch,
    when the other one ends in a fused compute op. emits: "qdq" writes model.onnx with QuantizeLinear/DequantizeLinear; "float"
    writes a float model.onnx, the target's scale files, and model.sim.onnx. formats: the versions of the scale file, default
    first. command: what the user runs next, with `{out}` for the folder. runtimes: where the artifact can be checked here, as NAME
    or NAME:VARIANT.
    """

    name: str
    title: str
    activation: QuantSpec
    weight: QuantSpec
    bias: Literal["float", "int32"]
    rules: tuple[OpRule, ...]
    fuse: tuple[Fusion, ...] = ()
    residual: Literal["both", "skip"] = "both"
    weight_bits: tuple[int, ...] = (8,)
    activation_bits: tuple[int, ...] = (8,)
    emits: Literal["qdq", "float"] = "qdq"
    opset: int = 21
    write: Writer | None = None
    formats: tuple[str, ...] = ()
    command: str = ""
    runtimes: tuple[str, ...] = ("onnxruntime",)

    def rule(self, op: str) -> OpRule | None:
        """The first rule that names `op` or every op; None where the target leaves the op in float."""
        return next((rule for rule in self.rules if op in rule.ops or rule.ops == EVERY), None)

    def fuses(self, head: str, tail: str) -> bool:
        """Whether the target computes `tail` together with `head`."""
        return any(head in pair.heads and tail in pair.tails for pair in self.fuse)

    def check_bits(self, what: Literal["weight", "activation"], bits: int) -> int:
        """`bits` if the target has it; `OptionError` with the list otherwise."""
        allowed = self.weight_bits if what == "weight" else self.activation_bits
        if bits not in allowed:
            names = ", ".join(map(str, allowed))
            raise OptionError(f"backend '{self.name}' has no {bits}-bit {what}s", allowed=names, action="choose one of these")
        return bits

    def choose_format(self, version: str | None) -> str:
        """The scale file's version: the default for None; `OptionError` with the list for one that is not there."""
        if version is None:
            return self.formats[0] if self.formats else ""
        if version not in self.formats:
            allowed = ", ".join(self.formats) or "none: this backend has no scale file"
            raise OptionError(f"backend '{self.name}' does not write format {version!r}", allowed=allowed, action="choose one")
        return version


backends: Registry[Backend] = Registry("backend", "qdeploy.backends")


def register(backend: Backend) -> Backend:
    """Make `backend` known under its name."""
    return backends.add(backend.name, backend)
