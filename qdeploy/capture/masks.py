"""Masks: numbers so low that what reads them makes nothing of a place, and where they may be replaced by ones that can be quantized.

A softmax makes 0 of -inf, -1e9 and -1e4 alike, but arithmetic on the first ends in inf and NaN, and no range can be found for any. So
where every way from such a number leads to a function that makes the same of all of them, MASK is written instead, and the tensors on
the way are marked with a `Mask` in `meta["masked"]`: observers leave the masked places out of the range. Everywhere else the model
means the number itself: it stays, and `meta["infinite"]` marks the tensors that hold it, for which there is no code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import fx

from qdeploy.core.ops import COMPUTE, MOVE
from qdeploy.graph import query
from qdeploy.numerics.observer import MARGIN, MASK, Mask

_BEYOND = 1e9
"""From here on a number is no value but stands for infinity."""
_SLIGHT = -64.0
"""From here down a number that is filled in before a softmax hides a place as well: exp(-64) is 1e-28. It stays as it is."""
_ENOUGH = -128.0
"""What MASK must still be where it is read, after all factors."""
_FILLS = frozenset({"full", "full_like", "scalar_tensor", "masked_fill", "where", "fill"})
_HANDS_ON = frozenset({"add", "sub", "rsub", "neg", "where", "masked_fill", "mul", "div", "minimum", "maximum"}) | (
    frozenset({"to", "_to_copy", "index", "triu", "tril", "full_like", "fill"}) | MOVE
)
_ENDS = {"softmax": MARGIN, "exp": MARGIN, "sigmoid": MARGIN, "relu": 0.0, "relu6": 0.0}
"""What makes the same of MASK as of -inf, and how far below all other values a masked place must be kept for that."""
_TAKES_ONE = {"amax": 1.0, "max": 1.0, "max_pool1d": 1.0, "max_pool2d": 1.0, "amin": -1.0, "min": -1.0}
"""Of a masked place and others they take another, hidden by low numbers or, with -1, by high ones; where there is no other, what
computes with the result would make inf or NaN of it."""


@dataclass(frozen=True, slots=True)
class _Use:
    """What all readers of a tensor make of masked places: they are kept `margin` below others. `gain` is the product of factors on the
    way; negative where the place is hidden by a high number. `slight`: all are softmaxes, and no tensor is multiplied on the way."""

    margin: float
    gain: float = 1.0
    slight: bool = False


def bound_masks(module: fx.GraphModule) -> int:
    """Write MASK for numbers beyond all others where that makes no difference, and mark what holds them. Returns their number."""
    uses: dict[fx.Node, _Use | None] = {}
    for node in reversed(list(module.graph.nodes)):
        uses[node] = _together([_use(node, user, uses) for user in node.users])
    count = 0
    for node in module.graph.nodes:
        if not query.is_float(node):
            continue
        use = uses[node]
        if node.op == "get_attr":
            count += _constant(module, node, use)
        elif node.op == "call_function":
            count += _written(node, use)
            _carry(node, use)
    module.recompile()
    return count


def _together(uses: list[_Use | None]) -> _Use | None:
    """What holds for all readers; None where one of them needs the number itself, or there is none."""
    known = [use for use in uses if use is not None]
    if len(known) < len(uses) or not known or len({use.gain > 0 for use in known}) > 1:
        return None
    gain = min((use.gain for use in known), key=abs)
    return _Use(max(use.margin for use in known), gain, all(use.slight for use in known))


def _use(node: fx.Node, user: fx.Node, uses: dict[fx.Node, _Use | None]) -> _Use | None:
    """What `user` makes of masked places in `node`."""
    if user.op != "call_function":
        return None
    name = query.op_of(user).name
    if name in _ENDS and user.args[0] is node:
        return _Use(_ENDS[name], slight=name == "softmax")
    if name in _TAKES_ONE and user.args[0] is node:
        return _Use(0.0, _TAKES_ONE[name]) if all(_computes(reader) for reader in user.users) else None
    behind = uses[user]
    if name not in _HANDS_ON or behind is None or not query.is_float(user):
        return None
    if name == "neg" or (name == "sub" and node is not user.args[0]) or (name == "rsub" and node is user.args[0]):
        return replace(behind, gain=-behind.gain)
    if name in ("mul", "div"):
        others = [argument for argument in user.args if argument is not node]
        other = others[0] if others else None
        if isinstance(other, int | float) and other and (name == "mul" or user.args[0] is node):
            return replace(behind, gain=behind.gain * (other if name == "mul" else 1 / other))
        return replace(behind, slight=False) if name == "mul" and isinstance(other, fx.Node) else None
    return behind


def _computes(node: fx.Node) -> bool:
    """Whether a node makes inf or NaN of -inf, so that no model means it; also behind what only moves it."""
    if node.op != "call_function":
        return False
    op = query.op_of(node)
    return op.name in COMPUTE or op.kind == "norm" or (op.name in MOVE and bool(node.users) and all(map(_computes, node.users)))


def _hides(number: float, use: _Use) -> bool:
    """Whether a number is taken for a mask, and MASK can stand for it."""
    low = number if use.gain > 0 else -number
    return (low <= -_BEYOND or low == MASK) and MASK * abs(use.gain) <= _ENOUGH


def _constant(module: fx.GraphModule, node: fx.Node, use: _Use | None) -> int:
    """Bound a stored tensor, and mark it."""
    tensor = query.parameter(module, str(node.target))
    if use is None:
        if bool((tensor.abs() >= _BEYOND).any()):
            node.meta["infinite"] = float(tensor[tensor.abs() >= _BEYOND].flatten()[0])
        return 0
    sign = math.copysign(1.0, use.gain)
    low = tensor.detach() * sign
    bounded = bool((low <= -_BEYOND).any()) and MASK * abs(use.gain) <= _ENOUGH
    if bounded:
        with torch.no_grad():
            tensor.clamp_(min=MASK) if sign > 0 else tensor.clamp_(max=-MASK)
        low = tensor.detach() * sign
    hidden = low[low <= (_SLIGHT if use.slight and _SLIGHT * abs(use.gain) <= _SLIGHT else MASK)]
    if hidden.numel():
        node.meta["masked"] = Mask(float(hidden.max()) * sign, use.margin)
    return int(bounded)


def _written(node: fx.Node, use: _Use | None) -> int:
    """Bound the number that a node writes into a tensor, or multiplies a mask of ones and zeros with, and mark the node."""
    name = query.op_of(node).name
    if name not in _FILLS and name != "mul":
        return 0
    count = 0
    for position, argument in enumerate(node.args):
        if not isinstance(argument, int | float) or isinstance(argument, bool):
            continue
        if use is None:
            if name in _FILLS and abs(argument) >= _BEYOND:
                node.meta["infinite"] = float(argument)
            continue
        sign = _sign_of_mask(node) if name == "mul" else 1.0
        number = argument * (sign or 1.0)
        if _hides(number, use):
            node.update_arg(position, MASK * math.copysign(1.0, use.gain) * (sign or 1.0))
            node.meta["masked"] = Mask(MASK * math.copysign(1.0, use.gain), use.margin)
            count += 1
        elif use.slight and number * use.gain <= _SLIGHT and (name in _FILLS or sign):
            node.meta["masked"] = Mask(number, use.margin)
    return count


def _sign_of_mask(product: fx.Node) -> float:
    """1 where a number is multiplied with a mask of ones and zeros, as 1 - seen, -1 with one of -1, as seen - 1; else 0."""
    source = next(iter(product.all_input_nodes))
    if source.op != "call_function":
        return 0.0
    name, args = query.op_of(source).name, source.args
    number = [argument for argument in args[:2] if isinstance(argument, int | float)]
    if name in ("to", "_to_copy"):
        before = query.value(source.all_input_nodes[0])
        return float(isinstance(before, torch.Tensor) and not before.dtype.is_floating_point)
    if name == "rsub" and number == [1] and source.kwargs.get("alpha", 1) == 1:
        return 1.0
    if number != [1] or name not in ("sub", "add"):
        return 0.0
    return -1.0 if name == "sub" and isinstance(args[0], fx.Node) else 1.0 if name == "sub" else 0.0


def _carry(node: fx.Node, use: _Use | None) -> None:
    """Mark a node that hands on what its sources hold."""
    name = query.op_of(node).name
    if name not in _HANDS_ON:
        return
    for source in node.all_input_nodes:
        if "infinite" in source.meta and "masked" not in node.meta:
            node.meta["infinite"] = source.meta["infinite"]
        mask = source.meta.get("masked")
        if mask is None or use is None:
            continue
        through = _use(source, node, {node: _Use(0.0)})
        level = mask.level * (through.gain if through is not None else 1.0)
        old = node.meta.get("masked")
        if old is None or abs(level) < abs(old.level):
            node.meta["masked"] = Mask(level, use.margin)
