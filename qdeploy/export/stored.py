"""Parameters in the form in which their readers have them: the transpositions and reshapes of stored tensors are done here, once.

The exporter writes a linear layer as initializer -> Transpose -> MatMul, and slopes as initializer -> Reshape -> PRelu. A toolchain
looks an encoding up under the name that the layer reads, so the tensor between would have none. The stored tensor takes the form, the
name stays, and the channel axis of its encoding moves along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdeploy.core.names import Names
from qdeploy.core.spec import Encoding

_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
_RESTORE = ("DequantizeLinear", "LogDequantize", "Cast")
"""What stands between the codes of a parameter and its values."""
Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A parameter that was called `source` in the graph of torch: its `name` in the file, and its axes there, by those in torch.

    An axis that is not in the file as it was is None.
    """

    source: str
    name: str
    axes: tuple[int | None, ...]


def settle(model: ir.Model) -> list[Settled]:
    """Do all moves of stored parameters in `model`; returns what other forms there are now, one for each parameter and form.

    A parameter that is read in several forms is stored in each, the first in the order of the graph under its own name, unless somebody
    reads it as it is.
    """
    found: list[Settled] = []
    taken = Names(str(value.name) for value in _values(model))
    for value in [*model.graph.initializers.values(), *(node.outputs[0] for node in model.graph if _restores(node))]:
        if value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16) and (value.is_initializer() or value.producer() is not None):
            found += _settle(model, value, taken)
    return found


def encodings_in_file(encodings: Sequence[Encoding], settled: Sequence[Settled]) -> tuple[Encoding, ...]:
    """`encodings` for the tensors as the file has them: with their channel axes there, and one for every form of a parameter."""
    forms: dict[str, list[Settled]] = {}
    for one in settled:
        forms.setdefault(one.source, []).append(one)
    made: list[Encoding] = []
    for encoding in encodings:
        others = forms.get(encoding.tensor, [])
        made += [encoding] if all(one.name != encoding.tensor for one in others) else []
        made += [_moved(encoding, one) for one in others]
    return tuple(made)


def _moved(encoding: Encoding, form: Settled) -> Encoding:
    axis = None if encoding.spec.axis is None else form.axes[encoding.spec.axis]
    assert axis is not None or encoding.spec.axis is None, f"{encoding.tensor}: its channels are no axis of {form}"
    spec = replace(encoding.spec, axis=axis)
    return Encoding(tensor=form.name, role=encoding.role, spec=spec, scale=encoding.scale, zero_point=encoding.zero_point)


def _restores(node: ir.Node) -> bool:
    stored = node.inputs[0] if node.inputs else None
    return node.op_type in _RESTORE and stored is not None and stored.is_initializer()


def _values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *model.graph.initializers.values(), *(v for node in model.graph for v in node.outputs)]


def _settle(model: ir.Model, value: ir.Value, taken: Names) -> list[Settled]:
    """Do the moves of one parameter: chains of them, each end of a chain being a form."""
    chains: dict[object, list[list[ir.Node]]] = {}
    plain = value.is_graph_output()
    for user in dict.fromkeys(node for node, _ in value.uses()):
        chain = _chain(value, user)
        if not chain:
            plain = True
            continue
        chains.setdefault(tuple(map(_what, chain)), []).append(chain)
    if not chains:
        return []
    made: list[Settled] = []
    source = str(value.name)
    changes: list[tuple[list[list[ir.Node]], ir.Value]] = []
    for alike in chains.values():
        alone = not plain and not changes
        name = source if alone else taken.free(f"{source}_{alike[0][-1].op_type.lower()}")
        form = value if alone else _copied(model, value, name, taken)
        changes.append((alike, form))
    shape = _shape(value)
    for alike, form in changes:
        chain = alike[0]
        axes = _axes(chain, shape)
        _store(form, chain, axes)
        for moves in alike:
            moves[-1].outputs[0].replace_all_uses_with(form)
            for node in reversed(moves):
                model.graph.remove(node, safe=True)
        made.append(Settled(source=source, name=str(form.name), axes=axes))
    return made


def _chain(value: ir.Value, node: ir.Node) -> list[ir.Node]:
    """The moves from `value` on by `node`, up to what is read by something else; empty where `node` is none."""
    chain: list[ir.Node] = []
    while node.op_type in _MOVES and not node.domain and node.inputs[0] is value and not node.outputs[0].is_graph_output():
        if any(other is None or other.const_value is None for other in node.inputs[1:]):
            break
        chain.append(node)
        value = node.outputs[0]
        users = [user for user, _ in value.uses()]
        if len(users) != 1:
            break
        (node,) = users
    return chain


def _what(node: ir.Node) -> object:
    """What tells a move from others."""
    return node.op_type, repr(sorted((name, attribute.value) for name, attribute in node.attributes.items())), tuple(_numbers(node))


def _numbers(node: ir.Node) -> list[int]:
    """The second input of a move: a shape, or axes."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    return [] if given is None or given.const_value is None else [int(n) for n in given.const_value.numpy().reshape(-1)]


def _through(chain: Sequence[ir.Node], array: Array) -> Array:
    for node in chain:
        array = _move(node)(array)
    return array


def _move(node: ir.Node) -> Callable[[Array], Array]:
    """What a node does to the array of a parameter."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    numbers = _numbers(node)
    match node.op_type:
        case "Transpose":
            return lambda array: np.transpose(array, attributes.get("perm"))
        case "Reshape":
            keep = not attributes.get("allowzero", 0)
            return lambda array: array.reshape([array.shape[at] if keep and not n else n for at, n in enumerate(numbers)])
        case "Squeeze":
            return lambda array: np.squeeze(array, tuple(numbers) or None)
        case "Unsqueeze":
            return lambda array: np.expand_dims(array, tuple(numbers))
    axis = int(attributes.get("axis", 1))
    return lambda array: array.reshape(int(np.prod(array.shape[:axis])), -1)


def _axes(chain: Sequence[ir.Node], shape: Sequence[int]) -> tuple[int | None, ...]:
    """Where each axis is after the moves."""
    found: list[int | None] = []
    for axis, length in enumerate(shape):
        numbers = _along(axis, length, len(shape))
        moved = _through(chain, np.broadcast_to(numbers, shape))
        found.append(next((at for at, size in enumerate(moved.shape) if size == length and _is_along(moved, at)), None))
    return tuple(found)


def _along(axis: int, length: int, rank: int) -> Array:
    """The numbers from 0 along one axis."""
    return np.arange(length).reshape([-1 if at == axis else 1 for at in range(rank)])


def _is_along(numbers: Array, axis: int) -> bool:
    return bool((numbers == _along(axis, numbers.shape[axis], numbers.ndim)).all())


def _codes(value: ir.Value) -> ir.Value:
    """The stored tensor that `value` is, or is made of."""
    maker = value.producer()
    stored = value if maker is None else maker.inputs[0]
    assert stored is not None and stored.const_value is not None, value.name
    return stored


def _shape(value: ir.Value) -> tuple[int, ...]:
    stored = _codes(value)
    assert stored.const_value is not None
    return tuple(stored.const_value.shape.numpy())


def _store(value: ir.Value, chain: Sequence[ir.Node], axes: Sequence[int | None]) -> None:
    """Give the stored tensor of `value` the form behind `chain`."""
    stored, maker = _codes(value), value.producer()
    assert stored.const_value is not None
    array = np.ascontiguousarray(_through(chain, stored.const_value.numpy()))
    stored.const_value = ir.tensor(array, dtype=stored.const_value.dtype, name=stored.name)
    stored.shape = ir.Shape(array.shape)
    value.shape = ir.Shape(array.shape)
    if maker is not None and "axis" in maker.attributes:
        axis = axes[maker.attributes["axis"].as_int()]
        assert axis is not None, f"{value.name}: its channels are no axis of {array.shape}"
        maker.attributes["axis"] = ir.AttrInt64("axis", axis)


def _copied(model: ir.Model, value: ir.Value, name: str, taken: Names) -> ir.Value:
    """A second parameter called `name` with the numbers of `value`."""
    stored, maker = _codes(value), value.producer()
    assert stored.const_value is not None
    own = name if maker is None else taken.free(f"{name}_quantized")
    tensor = ir.tensor(stored.const_value.numpy(), dtype=stored.const_value.dtype, name=own)
    copy = ir.Value(name=own, shape=stored.shape, type=stored.type, const_value=tensor)
    model.graph.register_initializer(copy)
    if maker is None:
        return copy
    attributes = {attribute.name: attribute.value for attribute in maker.attributes.values()}
    kind = f"{name}_{maker.op_type}"
    node = ir.node(maker.op_type, [copy, *maker.inputs[1:]], attributes=attributes, domain=maker.domain, name=kind)
    model.graph.insert_after(maker, [node])
    result = node.outputs[0]
    result.name, result.shape, result.type = name, value.shape, value.type
    return result
