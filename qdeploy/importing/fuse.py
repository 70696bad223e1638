"""What exporters spell with several operators, and torch has one for: an imported graph is quantized like the model it came from.

gelu          x * 0.5 * (1 + erf(x / sqrt(2))), and the one with tanh
silu          x * sigmoid(x)
mish          x * tanh(softplus(x))
hardswish     x * clip(x + 3, 0, 6) / 6, x * hardsigmoid(x)
layer norm    (x - mean) / sqrt(mean((x - mean)^2) + eps) * scale + bias
group norm    instance norm between two reshapes
prelu         a slope [C, 1, 1] becomes [C]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx

from qdeploy.importing.table import OPERATORS
from qdeploy.importing.weights import attribute, reshaped, slopes, tidy

_DEEPEST = 6
"""Products inside each other that can be one gate; a chain of products is no gate, and may be as long as the model."""
Found = tuple[fx.Node, float, str, dict[str, Any]]
"""The tensor that a gate is multiplied with, the number that comes with it, and what the product is, with attributes."""


def fuse(module: fx.GraphModule) -> None:
    """Rewrite the graph of `module`, whose nodes are calls of the table's functions."""
    layer_norms(module)
    group_norms(module)
    activations(module)
    slopes(module)
    module.graph.eliminate_dead_code()
    tidy(module)
    module.graph.lint()
    module.recompile()


def kind(value: object) -> str:
    """The ONNX operator of a node, empty for everything else."""
    return str(value.meta.get("onnx", "")) if isinstance(value, fx.Node) else ""


def _number(module: fx.GraphModule, value: object) -> float | None:
    """A constant of one element."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, int | float):
        return float(value)
    found = attribute(module, value)
    return float(found) if found is not None and found.numel() == 1 and found.dim() <= 1 else None


def _is_near(value: float | None, wanted: float) -> bool:
    return value is not None and math.isclose(value, wanted, rel_tol=1e-4)


def _replace(old: fx.Node, name: str, inputs: tuple[Any, ...], attributes: dict[str, Any]) -> fx.Node:
    with old.graph.inserting_before(old):
        scope = {"scope": old.kwargs["scope"]} if "scope" in old.kwargs else {}
        new = old.graph.call_function(OPERATORS[name].run, inputs, attributes | scope)
    new.meta = dict(old.meta) | {"onnx": name}
    old.replace_all_uses_with(new)
    return new


def _factors(module: fx.GraphModule, value: Any, stop: fx.Node | None = None, depth: int = 0) -> tuple[float, list[fx.Node]]:
    """A product as its constant and its factors; `stop` is taken whole, and so is what stands below `_DEEPEST` products."""
    number = _number(module, value)
    if number is not None:
        return number, []
    if depth == _DEEPEST:
        return 1.0, [value]
    if value is not stop and kind(value) == "Mul":
        (a, left), (b, right) = (_factors(module, v, stop, depth + 1) for v in value.args)
        return a * b, left + right
    if value is not stop and kind(value) == "Div" and _number(module, value.args[1]):
        a, left = _factors(module, value.args[0], stop, depth + 1)
        return a / (_number(module, value.args[1]) or 1.0), left
    return 1.0, [value]


def _orders(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    a, b = node.args
    yield a, b
    yield b, a


def activations(module: fx.GraphModule) -> None:
    """Products of a tensor with a gate that is made from it; the outermost product first, since it has the constants."""
    for node in reversed(list(module.graph.nodes)):
        if kind(node) not in ("Mul", "Div"):
            continue
        for gate in _factors(module, node)[1]:
            found = next((made for read in _GATES if (made := read(module, gate)) is not None), None)
            if found is None:
                continue
            x, wanted, name, attributes = found
            number, factors = _factors(module, node, x)
            if _is_near(number, wanted) and factors in ([x, gate], [gate, x]):
                _replace(node, name, (x,), attributes)
                break
    module.graph.eliminate_dead_code()


def _erf(module: fx.GraphModule, gate: fx.Node) -> Found | None:
    inner = _plus(module, gate, 1.0)
    if kind(inner) != "Erf":
        return None
    argument: Any = inner.args[0]  # type: ignore[union-attr]
    if kind(argument) == "Div" and _is_near(_number(module, argument.args[1]), math.sqrt(2)):
        return argument.args[0], 0.5, "Gelu", {}
    if kind(argument) == "Mul":
        for x, factor in _orders(argument):
            if _is_near(_number(module, factor), math.sqrt(0.5)):
                return x, 0.5, "Gelu", {}
    return None


def _tanh(module: fx.GraphModule, gate: fx.Node) -> Found | None:
    inner = _plus(module, gate, 1.0)
    if kind(inner) != "Tanh":
        return None
    number, factors = _factors(module, inner.args[0])  # type: ignore[union-attr]
    if not _is_near(number, math.sqrt(2 / math.pi)):
        return None
    for sum_ in (f for f in factors if kind(f) == "Add"):
        for x, rest in _orders(sum_):
            cubic = factors == [sum_] and isinstance(x, fx.Node) and _is_power(module, rest, x, 3)
            others = [f for f in factors if f is not sum_]
            square = len(others) == 1 and _number(module, x) == 1 and _is_power(module, rest, others[0], 2)
            if cubic or square:
                return (x if cubic else others[0]), 0.5, "Gelu", {"approximate": "tanh"}
    return None


def _is_power(module: fx.GraphModule, value: Any, x: fx.Node, power: int) -> bool:
    """Whether `value` is 0.044715 * x^power."""
    number, factors = _factors(module, value, x)
    count = 0.0
    for factor in factors:
        if factor is x:
            count += 1
        elif kind(factor) == "Pow" and factor.args[0] is x:
            count += _number(module, factor.args[1]) or 0.0
        else:
            return False
    return _is_near(number, 0.044715) and count == power


def _sigmoid(module: fx.GraphModule, gate: fx.Node) -> Found | None:
    x = gate.args[0] if kind(gate) in ("Sigmoid", "HardSigmoid") else None
    if not isinstance(x, fx.Node):
        return None
    if kind(gate) == "Sigmoid":
        return x, 1.0, "Swish", {}
    alpha, beta = gate.kwargs.get("alpha", 0.2), gate.kwargs.get("beta", 0.5)
    return (x, 1.0, "HardSwish", {}) if _is_near(alpha, 1 / 6) and beta == 0.5 else None  # type: ignore[arg-type]


def _softplus(module: fx.GraphModule, gate: fx.Node) -> Found | None:
    inner = gate.args[0] if kind(gate) == "Tanh" else None
    x = inner.args[0] if isinstance(inner, fx.Node) and kind(inner) == "Softplus" else None
    return (x, 1.0, "Mish", {}) if isinstance(x, fx.Node) else None


def _clip(module: fx.GraphModule, gate: fx.Node) -> Found | None:
    if kind(gate) != "Clip":
        return None
    given = [*gate.args[1:], None, None][:2]
    low, high = (g if g is not None else gate.kwargs.get(name) for g, name in zip(given, ("min", "max"), strict=True))
    x = _plus(module, gate.args[0], 3.0)
    if _number(module, low) == 0 and _number(module, high) == 6 and isinstance(x, fx.Node):
        return x, 1 / 6, "HardSwish", {}
    return None


_GATES: tuple[Callable[[fx.GraphModule, fx.Node], Found | None], ...] = (_erf, _tanh, _sigmoid, _softplus, _clip)


def _plus(module: fx.GraphModule, value: Any, number: float) -> fx.Node | None:
    """What `number` is added to in the sum `value`."""
    if kind(value) == "Add":
        for x, other in _orders(value):
            if _number(module, other) == number and isinstance(x, fx.Node):
                return x
    return None


def layer_norms(module: fx.GraphModule) -> None:
    """A normalization spelled with means, with its scale and bias where these are constants."""
    for node in list(module.graph.nodes):
        found = _normalized(module, node)
        if found is None:
            continue
        x, axes, epsilon = found
        root, scale, bias = _affine(module, node)
        inputs = (x, *(p if p is None else _again(root, p) for p in (scale, bias)))
        _replace(root, "SpelledLayerNorm", inputs, {"axes": axes, "epsilon": epsilon})
    module.graph.eliminate_dead_code()


def _again(before: fx.Node, parameter: fx.Node) -> fx.Node:
    """A node for the same parameter that stands before `before`."""
    with before.graph.inserting_before(before):
        return before.graph.get_attr(str(parameter.target))


def _affine(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node | None, fx.Node | None]:
    """The last node of `node * scale + bias`, and the two constants; as far as it goes."""
    made: list[fx.Node | None] = [None, None]
    for at, name in enumerate(("Mul", "Add")):
        users = list(node.users)
        if len(users) != 1 or kind(users[0]) != name:
            break
        other = next(o for o in users[0].args if o is not node)
        tensor = attribute(module, other)
        if tensor is None or not isinstance(other, fx.Node):
            break
        made[at], node = other, users[0]
    return node, made[0], made[1]


def _normalized(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, list[int], float] | None:
    """x, the axes and epsilon of (x - mean) / sqrt(variance + epsilon)."""
    if kind(node) == "Div":
        centred, deviation = node.args
    elif kind(node) == "Mul":
        pairs = ((a, _inverse(module, b)) for a, b in _orders(node))
        centred, deviation = next(((a, d) for a, d in pairs if d is not None), (None, None))
    else:
        return None
    if kind(centred) != "Sub" or kind(deviation) != "Sqrt":
        return None
    x, mean = centred.args  # type: ignore[union-attr]
    axes = _axes(mean)
    if axes is None or mean.args[0] is not x or not isinstance(x, fx.Node):  # type: ignore[union-attr]
        return None
    for variance, epsilon in _orders(deviation.args[0]) if kind(deviation.args[0]) == "Add" else ():  # type: ignore[union-attr, arg-type]
        number = _number(module, epsilon)
        if number is not None and _axes(variance) == axes and _is_square(module, variance.args[0], centred):
            return x, axes, number
    return None


def _inverse(module: fx.GraphModule, value: Any) -> Any:
    if kind(value) == "Reciprocal":
        return value.args[0]
    return value.args[1] if kind(value) == "Div" and _number(module, value.args[0]) == 1 else None


def _axes(value: Any) -> list[int] | None:
    """The axes of a mean that keeps its dimensions."""
    if kind(value) != "ReduceMean" or not value.kwargs.get("keepdims", 1):
        return None
    axes = value.args[1] if len(value.args) > 1 else value.kwargs.get("axes")
    return list(axes) if axes else None


def _is_square(module: fx.GraphModule, value: Any, centred: Any) -> bool:
    if kind(value) == "Pow":
        return _is_same(value.args[0], centred) and _number(module, value.args[1]) == 2
    return kind(value) == "Mul" and all(_is_same(a, centred) for a in value.args)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two nodes are one, or the same difference, computed twice."""
    return a is b or (
        kind(a) == kind(b) == "Sub" and a.args[0] is b.args[0] and (a.args[1] is b.args[1] or _twin(a.args[1], b.args[1]))
    )


def _twin(a: Any, b: Any) -> bool:
    return _axes(a) is not None and _axes(a) == _axes(b) and a.args[0] is b.args[0]


def group_norms(module: fx.GraphModule) -> None:
    """Exporters reshape to groups, normalize each as an instance, and reshape back."""
    for node in list(module.graph.nodes):
        if kind(node) != "InstanceNormalization" or kind(node.args[0]) != "Reshape" or len(node.users) != 1:
            continue
        (back,) = node.users
        x, sizes = node.args[0].args
        scale, bias = (attribute(module, p) for p in node.args[1:])
        if kind(back) != "Reshape" or not _is_shape_of(back.args[1], x):
            continue
        if not isinstance(sizes, list | tuple) or len(sizes) != 3 or sizes[0] != 0 or sizes[2] != -1:
            continue
        if scale is None or bias is None or not (scale == 1).all() or bias.any() or sizes[1] != scale.numel():
            continue
        attributes = {"num_groups": int(scale.numel()), "epsilon": node.kwargs.get("epsilon", 1e-5), "opset": 21}
        _replace_group_norm(module, back, x, attributes)
    module.graph.eliminate_dead_code()


def _is_shape_of(value: Any, x: Any) -> bool:
    return kind(value) == "Shape" and value.args[0] is x and not value.kwargs.get("start") and value.kwargs.get("end") is None


def _replace_group_norm(module: fx.GraphModule, back: fx.Node, x: fx.Node, attributes: dict[str, Any]) -> None:
    root, scale, bias = _affine(module, back)
    vectors = [attribute(module, p) for p in (scale, bias)]
    if not all(v is not None and _is_by_channel(v) for v in vectors):
        return
    assert scale is not None and bias is not None
    inputs = (x, *(reshaped(module, root, p, -1) for p in (scale, bias)))
    _replace(root, "GroupNormalization", inputs, attributes)


def _is_by_channel(vector: Tensor) -> bool:
    """`[C, 1, 1]`, or with a 1 for the batch in front."""
    sizes = list(vector.shape)
    sizes = sizes[1:] if len(sizes) > 3 and sizes[0] == 1 else sizes
    return len(sizes) > 1 and all(size == 1 for size in sizes[1:])
