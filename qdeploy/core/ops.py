"""The one table from ATen overloads to canonical op names, with the kind, the weight argument and the channel axis of each.

Backends name ops by these canonical names; no other file knows an ATen overload for the sake of quantization.

>>> OPS["aten.conv2d.default"].name, OPS["aten.conv2d.default"].weight, OPS["aten.conv2d.default"].channel_axis
('conv2d', 1, 0)
>>> sorted(n for n in MOVE if n.startswith("s"))
['select', 'slice', 'split', 'squeeze']
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["compute", "arithmetic", "activation", "pool", "move", "norm", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operator. `weight` and `bias` are argument positions; `channel_axis` is the output-channel axis of the weight."""

    name: str
    kind: Kind
    weight: int | None = None
    bias: int | None = None
    channel_axis: int = 0


def _table() -> dict[str, Op]:
    table: dict[str, Op] = {}

    def add(kind: Kind, name: str, *overloads: str) -> None:
        for overload in overloads or (f"{name}.default",):
            table[f"aten.{overload}"] = Op(name=name, kind=kind)

    for name in ("conv1d", "conv2d", "conv3d"):
        for overload in ("default", "padding"):
            table[f"aten.{name}.{overload}"] = Op(name=name, kind="compute", weight=1, bias=2)
    for d, overload in ((1, "conv_transpose1d.default"), (2, "conv_transpose2d.input"), (3, "conv_transpose3d.input")):
        table[f"aten.{overload}"] = Op(name=f"conv_transpose{d}d", kind="compute", weight=1, bias=2, channel_axis=1)
    table["aten.linear.default"] = Op(name="linear", kind="compute", weight=1, bias=2)
    add("compute", "matmul", "matmul.default", "mm.default", "bmm.default")

    for name in ("add", "sub", "mul", "div"):
        add("arithmetic", name, f"{name}.Tensor", f"{name}.Scalar")
    for name in ("maximum", "minimum"):
        add("arithmetic", name)

    for name in ("relu", "sigmoid", "tanh", "silu", "gelu", "hardswish", "hardsigmoid", "leaky_relu", "elu", "prelu", "mish"):
        add("activation", name)
    add("activation", "relu6")
    add("activation", "clamp", "hardtanh.default", "clamp.default", "clamp_min.default", "clamp_max.default")
    add("activation", "softmax", "softmax.int", "_softmax.default")

    for d in (1, 2, 3):
        add("pool", f"max_pool{d}d")
        add("pool", f"avg_pool{d}d")
        add("pool", f"adaptive_avg_pool{d}d")
        add("pool", f"adaptive_max_pool{d}d")
    add("pool", "mean", "mean.dim", "mean.default")

    add("move", "reshape", "view.default", "reshape.default", "flatten.using_ints", "_unsafe_view.default", "unflatten.int")
    add("move", "transpose", "permute.default", "transpose.int", "t.default", "numpy_T.default", "movedim.int")
    add("move", "squeeze", "squeeze.dim", "squeeze.dims", "squeeze.default")
    add("move", "slice", "slice.Tensor", "narrow.default")
    add("move", "select", "select.int")
    add("move", "index_select")
    add("move", "split", "split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int")
    add("move", "pad", "pad.default", "constant_pad_nd.default")
    add("move", "expand", "expand.default", "repeat.default")
    add("move", "concat", "cat.default", "stack.default")
    for name in ("unsqueeze", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"):
        add("move", name)
    table["<built-in function getitem>"] = Op(name="split", kind="move")

    add("norm", "batch_norm", "batch_norm.default", "_native_batch_norm_legit_no_training.default")
    for name in ("layer_norm", "group_norm", "instance_norm"):
        add("norm", name)
    add("other", "interpolate", "upsample_nearest2d.vec", "upsample_bilinear2d.vec")
    add("other", "embedding")
    add("other", "where", "where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
    return table


OPS = _table()

COMPUTE = frozenset(op.name for op in OPS.values() if op.kind == "compute")
ARITHMETIC = frozenset(op.name for op in OPS.values() if op.kind == "arithmetic")
ACTIVATION = frozenset(op.name for op in OPS.values() if op.kind == "activation")
POOL = frozenset(op.name for op in OPS.values() if op.kind == "pool")
MOVE = frozenset(op.name for op in OPS.values() if op.kind == "move")
MAX_POOL = frozenset(name for name in POOL if "max_pool" in name)
MEAN_POOL = POOL - MAX_POOL
CONVOLUTION = frozenset(name for name in COMPUTE if name.startswith("conv"))
WEIGHTED = frozenset(op.name for op in OPS.values() if op.weight is not None)
EVERY = frozenset({"*"})
"""In a backend's rule: whatever op there is, also ones that the table does not know."""


def find(overload: str) -> Op:
    """The `Op` of an ATen overload such as `aten.relu.default`; an op of kind `other` under its own stem if not in the table.

    >>> find("aten.cumsum.default").name
    'cumsum'
    """
    known = OPS.get(overload)
    if known is not None:
        return known
    stem = overload.removeprefix("aten.").split(".")[0]
    return Op(name=stem, kind="other")
