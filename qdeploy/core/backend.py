"""What a target hardware is to qdeploy: a frozen value. One file in `backends/` makes one and registers it.

A backend says how tensors are quantized (`activation`, `weight`, `bias`), where (`rules`, `fuse`, `residual`), what is handed over
(`formats`) and where it can be checked (`runtimes`). `plan` turns the placement part into decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from qdeploy.core.errors import OptionError
from qdeploy.core.ops import EVERY
from qdeploy.core.registry import Registry
from qdeploy.core.spec import Encoding, QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The shape of a convolution, or what a rule asks of it: None there means any. `grouped` is groups > 1."""

    kernel: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    dilation: tuple[int, ...] | None = None
    grouped: bool | None = None

    def admits(self, shape: Geometry) -> bool:
        """Whether `shape` is as asked."""
        pairs = ((getattr(self, name), getattr(shape, name)) for name in ("kernel", "stride", "dilation", "grouped"))
        return all(asked is None or asked == has for asked, has in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRule:
    """What a target does at some ops.

    inputs: the tensors that enter are quantized. output: the tensor that leaves is quantized. share: the output carries the
    encoding of the input, or of all inputs together. align: the inputs have one encoding, the output its own. stay_float: what enters
    is never quantized on its account, nor what only moves data to such ops. weight: the weight's spec, where it is not the backend's.
    only: the rule is for convolutions of this geometry.
    """

    ops: frozenset[str]
    inputs: bool = False
    output: bool = False
    share: bool = False
    align: bool = False
    stay_float: bool = False
    weight: QuantSpec | None = None
    only: Geometry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """Between a head op and a tail op that is its only reader there is no quantizer: the target computes both at once."""

    heads: frozenset[str]
    tails: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node of the emitted model.onnx, in ONNX's words: `op` is "Conv", `inputs` are tensor names, "" where one is left out."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitted:
    """What a scale file is written from: all encodings, and the model.onnx that it stands beside.

    nodes: in topological order. shapes: of every tensor whose shape is known, with None for a dimension that may vary.
    """

    encodings: tuple[Encoding, ...]
    nodes: tuple[Node, ...]
    shapes: Mapping[str, tuple[int | None, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def encoding(self, tensor: str) -> Encoding | None:
        """The encoding of `tensor`, if it has one."""
        return next((e for e in self.encodings if e.tensor == tensor), None)


Writer = Callable[[Emitted], Mapping[str, str]]
"""From what was emitted to the texts of the scale files, by file name."""
Origin = Literal["standard", "public", "qdeploy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One way to hand a model over to the target's toolchain.

    model: what model.onnx is: "qdq" has QuantizeLinear and DequantizeLinear, "float" none, "float16" has half-precision tensors.
    clip_weights: the weights of a float model are clipped to the limits of their grid. write, files: the scale files.
    words: the target splits names at spaces, so that a name has none.
    command: what the user runs next, with `{out}` for the folder. origin: where the format is described: the ONNX "standard", a
    "public" document of the vendor (or the code of a public tool that writes it), or "qdeploy" itself.
    """

    name: str
    model: Literal["qdq", "float", "float16"] = "qdq"
    clip_weights: bool = False
    words: bool = False
    write: Writer | None = None
    files: tuple[str, ...] = ()
    command: str = ""
    origin: Origin = "standard"


QDQ = Format(name="qdq")
"""A QDQ model.onnx alone."""


LITERAL_RUN = "onnxruntime:none"
"""The runtime that computes node by node what a file says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """One target.

    bias: "float"; "int32" at input scale x weight scale; or a spec of its own. residual: an add quantizes "both" branches or only the
    "skip" branch, when the other one ends in a convolution, and none behind a linear layer. average: "shift" where average pooling
    multiplies and shifts instead of dividing (see `arith.shift_average`). weight_bits, activation_bits: the widths that a user may
    choose. first_last_bits: the width of the first and last layer's weights and inputs, where it is not the others'. weight_schemes:
    other specs of weights that a user may choose. fixed_range: ops whose output has the range of their function, whatever is behind
    them: through a concat they do not share an encoding. any_scheme: the user may choose any specs. formats: default first. runtimes:
    where the artifact can be checked here, as NAME or NAME:VARIANT. vendor_runtime: the one of them that is the vendor's own. sources:
    where the facts are from.
    """

    name: str
    title: str
    activation: QuantSpec
    weight: QuantSpec
    bias: Literal["float", "int32"] | QuantSpec
    rules: tuple[OpRule, ...]
    fuse: tuple[Fusion, ...] = ()
    residual: Literal["both", "skip"] = "both"
    average: Literal["exact", "shift"] = "exact"
    weight_bits: tuple[int, ...] = (8,)
    activation_bits: tuple[int, ...] = (8,)
    first_last_bits: int | None = None
    weight_schemes: tuple[QuantSpec, ...] = ()
    fixed_range: frozenset[str] = frozenset()
    any_scheme: bool = False
    formats: tuple[Format, ...] = (QDQ,)
    opset: int = 21
    runtimes: tuple[str, ...] = ("onnxruntime",)
    vendor_runtime: str = ""
    sources: tuple[str, ...] = ()

    @property
    def deciding(self) -> tuple[str, ...]:
        """The runtimes, as NAME or NAME:VARIANT, that say whether an artifact is as it should be: the vendor's own, and the literal run
        of the file. The others show what else runs it.
        """
        return tuple(dict.fromkeys((*filter(None, (self.vendor_runtime,)), LITERAL_RUN)))

    def rule(self, op: str, shape: Geometry | None = None) -> OpRule | None:
        """The first rule that names `op`, or every op, and admits its shape; None where the target leaves the op in float."""
        for rule in self.rules:
            named = op in rule.ops or rule.ops == EVERY
            if named and (rule.only is None or (shape is not None and rule.only.admits(shape))):
                return rule
        return None

    @property
    def encodes_all(self) -> bool:
        """Whether the target computes every op with integers, so that no float tensor of its file may be without an encoding."""
        return self.activation.linear and self.weight.linear and any(rule.ops == EVERY for rule in self.rules)

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

    def choose_format(self, name: str | None = None) -> Format:
        """The format called `name`, or the default; `OptionError` with the list for a name that there is not."""
        if name is None:
            return self.formats[0]
        for known in self.formats:
            if known.name == name:
                return known
        allowed = ", ".join(known.name for known in self.formats)
        raise OptionError(f"backend '{self.name}' does not write format '{name}'", allowed=allowed, action="leave --format out")


backends: Registry[Backend] = Registry("backend", "qdeploy.backends")


def register(backend: Backend) -> Backend:
    """Add `backend` to the registry; every backend file ends in this."""
    return backends.add(backend.name, backend)
