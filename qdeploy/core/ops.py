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


_SIDES = (1, 2, 3)
_LAYERS = {
    "conv1d": ("conv1d.default", "conv1d.padding"),
    "conv2d": ("conv2d.default", "conv2d.padding"),
    "conv3d": ("conv3d.default", "conv3d.padding"),
    "conv_transpose1d": ("conv_transpose1d.default",),
    "conv_transpose2d": ("conv_transpose2d.input",),
    "conv_transpose3d": ("conv_transpose3d.input",),
    "linear": ("linear.default",),
}
"""Ops with a weight and a bias."""
_OTHERS: dict[Kind, dict[str, tuple[str, ...]]] = {
    "compute": {"matmul": ("matmul.default", "mm.default", "bmm.default")},
    "arithmetic": {
        **{name: (f"{name}.Tensor", f"{name}.Scalar") for name in ("add", "sub", "mul", "div")},
        "maximum": (),
        "minimum": (),
    },
    "activation": {
        **dict.fromkeys(
            ("relu", "sigmoid", "tanh", "silu", "gelu", "hardswish", "hardsigmoid", "leaky_relu", "elu", "prelu", "mish"), ()
        ),
        "relu6": (),
        "clamp": ("hardtanh.default", "clamp.default", "clamp_min.default", "clamp_max.default"),
        "softmax": ("softmax.int", "_softmax.default"),
    },
    "pool": {
        **{f"{pool}{d}d": () for d in _SIDES for pool in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")},
        "mean": ("mean.dim", "mean.default"),
    },
    "move": {
        "reshape": ("view.default", "reshape.default", "flatten.using_ints", "_unsafe_view.default", "unflatten.int"),
        "transpose": ("permute.default", "transpose.int", "t.default", "numpy_T.default", "movedim.int"),
        "squeeze": ("squeeze.dim", "squeeze.dims", "squeeze.default"),
        "slice": ("slice.Tensor", "narrow.default"),
        "select": ("select.int",),
        "index_select": (),
        "split": ("split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int"),
        "pad": ("pad.default", "constant_pad_nd.default"),
        "expand": ("expand.default", "repeat.default"),
        "concat": ("cat.default", "stack.default"),
        **dict.fromkeys(("unsqueeze", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"), ()),
    },
    "norm": {
        "batch_norm": ("batch_norm.default", "_native_batch_norm_legit_no_training.default"),
        **dict.fromkeys(("layer_norm", "group_norm", "instance_norm"), ()),
    },
    "other": {
        "interpolate": ("upsample_nearest2d.vec", "upsample_bilinear2d.vec"),
        "embedding": (),
        "where": ("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar"),
    },
}
"""The overloads of all other ops by their names; none stands for the one called `default`."""


def _layer(name: str) -> Op:
    return Op(name=name, kind="compute", weight=1, bias=2, channel_axis=1 if "transpose" in name else 0)


OPS = {
    **{f"aten.{overload}": _layer(name) for name, overloads in _LAYERS.items() for overload in overloads},
    **{
        f"aten.{overload}": Op(name=name, kind=kind)
        for kind, ops in _OTHERS.items()
        for name, overloads in ops.items()
        for overload in overloads or (f"{name}.default",)
    },
    "<built-in function getitem>": Op(name="split", kind="move"),
}

COMPUTE = frozenset(op.name for op in OPS.values() if op.kind == "compute")
ARITHMETIC = frozenset(op.name for op in OPS.values() if op.kind == "arithmetic")
ACTIVATION = frozenset(op.name for op in OPS.values() if op.kind == "activation")
POOL = frozenset(op.name for op in OPS.values() if op.kind == "pool")
MOVE = frozenset(op.name for op in OPS.values() if op.kind == "move")
MAX_POOL = frozenset(name for name in POOL if "max_pool" in name)
MEAN_POOL = POOL - MAX_POOL
CONVOLUTION = frozenset(name for name in COMPUTE if name.startswith("conv"))
WEIGHTED = frozenset(op.name for op in OPS.values() if op.weight is not None)
FIXED_RANGE = frozenset({"softmax", "sigmoid", "hardsigmoid", "tanh"})
"""Ops whose outputs have a range by their function: from 0 to 1, or from -1 to 1."""
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
