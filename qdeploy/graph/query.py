"""Small questions about FX nodes: what op one is, what it makes, what it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qdeploy.core import ops
from qdeploy.core.backend import Geometry
from qdeploy.core.ops import CONVOLUTION, MEAN_POOL, Op


def op_of(node: fx.Node) -> Op:
    """The canonical op of a call node. A clamp to (0, 6) is `relu6`, one to (0, nothing) is `relu`, whichever overload says it.

    Both ops of x sigmoid(x) are `silu`: some targets compute the two as one.
    """
    op = ops.find(str(node.target))
    if op.name in ("sigmoid", "mul") and _is_silu(node, op.name):
        return ops.find("aten.silu.default")
    if op.name != "clamp":
        return op
    bounds = dict(zip(("min", "max"), node.args[1:], strict=False)) | node.kwargs
    if "hardtanh" in str(node.target):
        bounds = {"min": -1.0, "max": 1.0} | dict(zip(("min", "max"), node.args[1:], strict=False))
    limits = (bounds.get("min"), bounds.get("max"))
    if limits == (0, 6):
        return ops.find("aten.relu6.default")
    return ops.find("aten.relu.default") if limits == (0, None) else op


def _is_silu(node: fx.Node, name: str) -> bool:
    """Whether a sigmoid or a product is part of x sigmoid(x), of which nothing else reads the sigmoid."""
    if name == "mul":
        factors = node.all_input_nodes
        return len(factors) == 2 and any(
            str(gate.target) == "aten.sigmoid.default" and gate.args[0] is other and len(gate.users) == 1
            for gate, other in (factors, factors[::-1])
        )
    (user,) = node.users if len(node.users) == 1 else (None,)
    return user is not None and str(user.target) == "aten.mul.Tensor" and node.args[0] in user.all_input_nodes


def scope(node: fx.Node) -> tuple[str, Any]:
    """The path and the class of the module that makes `node`: as an ONNX file or a pass notes it, or the exporter's innermost."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    found: tuple[str, Any] = (node.meta.get("custom") or {}).get("scope") or (stack[-1] if stack else ("", ""))
    return found


def value(node: fx.Node) -> object:
    """The fake tensor (or other value) that `node` makes, with its shape and dtype."""
    return node.meta.get("val")


def is_float(node: fx.Node) -> bool:
    """Whether `node` makes one floating-point tensor."""
    made = value(node)
    return isinstance(made, Tensor) and made.dtype.is_floating_point


def tensor_name(node: fx.Node) -> str:
    """The stable, readable name of the tensor that `node` makes: its name in the emitted ONNX."""
    name: str = node.meta.get("tensor_name", node.name)
    return name


def reader_name(node: fx.Node) -> str:
    """The name of `node` as the reader of a tensor: that of the tensor it makes; the graph's output has one that no tensor has."""
    return "<output>" if node.op == "output" else tensor_name(node)


def argument(node: fx.Node, position: int | None) -> fx.Node | None:
    """The node at an argument position of `node`, if there is one. Exporters may pass it by keyword."""
    if position is None:
        return None
    found: object = node.args[position] if position < len(node.args) else None
    if found is None:
        found = node.kwargs.get({1: "weight", 2: "bias"}.get(position, ""))
    return found if isinstance(found, fx.Node) else None


def constants(node: fx.Node) -> set[fx.Node]:
    """The weight and the bias of `node`, as far as they are parameters and not computed."""
    op = op_of(node)
    found = (argument(node, op.weight), argument(node, op.bias))
    return {n for n in found if n is not None and n.op == "get_attr"}


def parameter(module: nn.Module, path: str) -> Tensor:
    """The parameter or buffer at a dotted path."""
    owner, _, name = path.rpartition(".")
    found = getattr(module.get_submodule(owner), name)
    assert isinstance(found, Tensor), path
    return found


def outputs(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that the graph returns, in order."""
    (output,) = graph.find_nodes(op="output")
    return [node for node in torch.utils._pytree.tree_leaves(output.args) if isinstance(node, fx.Node)]


def geometry(node: fx.Node) -> Geometry | None:
    """Kernel, stride, dilation and grouping of a convolution; None for any other op."""
    op = op_of(node)
    weight = argument(node, op.weight)
    if op.name not in CONVOLUTION or weight is None:
        return None
    shape = value(weight)
    assert isinstance(shape, Tensor)
    sides = shape.dim() - 2
    names: dict[str, Any] = {schema.name: schema.default_value for schema in _schema(node).arguments}
    names |= dict(zip(names, node.args, strict=False)) | node.kwargs

    def sizes(name: str) -> tuple[int, ...]:
        found = names[name]
        values = [int(v) for v in found] if isinstance(found, Sequence) else [int(found)]
        return tuple(values if len(values) == sides else values * sides)

    kernel = tuple(int(size) for size in shape.shape[2:])
    return Geometry(kernel=kernel, stride=sizes("stride"), dilation=sizes("dilation"), grouped=int(names["groups"]) > 1)


def macs(node: fx.Node) -> int:
    """Multiply-accumulates of a layer, a matrix product or a recurrent network, for one sample; 0 of any other op."""
    op, made = op_of(node), value(node)
    if op.name in _RECURRENT:  # every step meets every matrix once, whatever the layers and directions
        matrices = [n for n in node.all_input_nodes[1:] if n.op == "get_attr" and len(_shape(n)) == 2]
        return math.prod(_shape(node.all_input_nodes[0])[:-1]) * sum(math.prod(_shape(n)) for n in matrices)
    shapes = [_shape(source) for source in _tensors(node)]
    if not isinstance(made, Tensor) or len(shapes) < 2:
        return 0
    if op.name in _CONTRACTIONS:
        return _elements(made) * _CONTRACTIONS[op.name](node, *shapes)
    weight = argument(node, op.weight)
    if weight is None:
        return 0
    kernel = math.prod(_shape(weight)[1:])
    # of a transposed convolution every input element meets all that a weight has for its channel
    return (math.prod(shapes[0]) if "transpose" in op.name else _elements(made)) * kernel


def _tensors(node: fx.Node) -> list[fx.Node]:
    """The tensors that an op takes, one twice where it takes it twice."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(node.args) if isinstance(leaf, fx.Node)]


def _summed(node: fx.Node, *shapes: tuple[int, ...]) -> int:
    """The sizes over which an einsum sums, multiplied."""
    terms, _, made = str(node.args[0]).replace(" ", "").replace("...", "").partition("->")
    names = terms.split(",")
    if not made:  # as it is without an arrow: what stands there once, stays
        made = "".join(letter for letter in terms if terms.count(letter) == 1)
    sizes: dict[str, int] = {}
    for letters, shape in zip(names, shapes, strict=False):
        sizes |= dict(zip(letters[::-1], shape[::-1], strict=False))
    return math.prod(size for letter, size in sizes.items() if letter not in made)


_RECURRENT = frozenset(f"{name}{end}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") for end in ("", "_cell"))
_CONTRACTIONS: dict[str, Callable[..., int]] = {
    "matmul": lambda _, a, b: a[-1],
    **dict.fromkeys(("mv", "dot", "vdot", "inner"), lambda _, a, b: a[-1]),
    "tensordot": lambda node, a, b: math.prod(a[dim] for dim in node.args[2]),
    "einsum": _summed,
    "bilinear": lambda _, a, b, weight, *bias: math.prod(weight[1:]),
    "conv_tbc": lambda _, a, weight, *bias: math.prod(weight[:2]),
}
"""By the shapes of its tensors, how many products an op adds up for one element of what it makes."""


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Of one sample, where the batch may vary; empty of what is no tensor."""
    made = value(node)
    return tuple(size if isinstance(size, int) else 1 for size in made.shape) if isinstance(made, Tensor) else ()


def _elements(made: Tensor) -> int:
    """Of one sample, where the batch may vary."""
    return math.prod(size if isinstance(size, int) else 1 for size in made.shape)


def _schema(node: fx.Node) -> torch.FunctionSchema:
    assert isinstance(node.target, torch._ops.OpOverload), node.target
    return node.target._schema


def pooled(node: fx.Node) -> tuple[int, ...] | None:
    """How many elements an average pooling takes together along each side; None where that is not fixed, or for any other op.

    An average over a padded border, or with windows that end outside, divides by fewer elements there, which is no fixed number.
    """
    op = op_of(node)
    if op.name not in MEAN_POOL or len(node.all_input_nodes) != 1:
        return None
    before, after = (_sides(value(n)) for n in (node.all_input_nodes[0], node))
    if not before:
        return None
    if op.name.startswith("avg_pool"):
        strided = node.args[2] if len(node.args) > 2 and node.args[2] else node.args[1]
        kernel, stride = ([int(k) for k in given] for given in (node.args[1], strided))  # type: ignore[union-attr, arg-type]
        kernel, stride = (given * len(before) if len(given) == 1 else given for given in (kernel, stride))
        padded = len(node.args) > 3 and any(node.args[3])  # type: ignore[arg-type]
        outside = any((a - 1) * s + k > b for a, s, k, b in zip(after, stride, kernel, before, strict=False))
        return None if padded or outside else tuple(kernel)
    if op.name == "mean":
        given = node.args[1] if len(node.args) > 1 else None
        rank = len(before) + 2
        dims = {int(d) % rank for d in given} if isinstance(given, list | tuple) and given else {0}
        return None if dims & {0, 1} else tuple(b if d in dims else 1 for d, b in enumerate(before, 2))
    if len(before) != len(after) or any(b % a for b, a in zip(before, after, strict=True)):
        return None
    return tuple(b // a for b, a in zip(before, after, strict=True))


def _sides(made: object) -> tuple[int, ...]:
    """The lengths of a tensor `[N, C, ...]` beyond its channels, where they are known; else empty."""
    if not isinstance(made, Tensor) or made.dim() < 3:
        return ()
    sides = made.shape[2:]
    return tuple(sides) if all(isinstance(s, int) and s for s in sides) else ()
