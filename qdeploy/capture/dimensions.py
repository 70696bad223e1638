"""Open dimensions: which sizes of the inputs may vary, their names, and the proof that a captured graph leaves them open.

torch.export takes a size for open as soon as nothing in the model asks for one number. What it has noted beside, such as
`3 * height * width == 768` before a linear layer, only shows at another size: so every name is tried at one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from qdeploy.capture.signature import Call
from qdeploy.core.errors import CaptureError, InputError, OptionError

Dynamic = Mapping[str, Mapping[int, str]]
"""The names of open dimensions beyond the batch, by input and dimension; one name is one size."""
BATCH = "batch"
"""The name of the first dimension of every input."""
MARK = "open"
"""Where the module of a file keeps what the file leaves open, in its `meta`."""


def check(dynamic: Dynamic, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """`OptionError` or `InputError` unless `dynamic` names dimensions of an example, of one size each and of 2 at least."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, dimensions in dynamic.items():
        if name not in names:
            near = get_close_matches(name, names, n=1)
            action = f"did you mean '{near[0]}'?" if near else "name an input"
            raise OptionError(f"dynamic names an unknown input '{name}'", allowed=", ".join(names), action=action)
        shape = tensors[names.index(name)].shape
        for dimension, size in dimensions.items():
            where = f"dimension {dimension} of input '{name}'"
            _check_place(where, dimension, size, len(shape))
            length, first = sizes.setdefault(size, (shape[dimension], where))
            if length != shape[dimension]:
                found = f"{length} in {first}, {shape[dimension]} in {where}"
                raise InputError(f"the example has two sizes for '{size}'", found=found, action="give them names of their own")
            if length < 2:
                action = "torch.export takes a size of 1 for a constant: give an example in which it is 2 or more"
                raise InputError(f"'{size}', {where}, cannot be opened by this example", found=f"a size of {length}", action=action)


def _check_place(where: str, dimension: object, size: object, rank: int) -> None:
    if dimension == 0 and not isinstance(dimension, bool):
        raise OptionError(f"{where} is the batch, which is open already", found=repr(size), action="leave it out")
    if not isinstance(dimension, int) or isinstance(dimension, bool) or not 0 < dimension < rank:
        allowed = f"1 to {rank - 1}" if rank > 1 else "none: it has the batch only"
        raise OptionError(f"there is no {where}", found=repr(dimension), allowed=allowed, action="count dimensions from 0, the batch")
    if not isinstance(size, str) or not size.isidentifier() or size == BATCH:
        allowed = f"a name of letters, digits and _, other than '{BATCH}'"
        raise OptionError(
            f"{where} has no usable name", found=repr(size), allowed=allowed, action="call it by what it counts, as 'height'"
        )


def prove(program: ExportedProgram, call: Call, dynamic: Dynamic) -> None:
    """`CaptureError` unless every size that `dynamic` names can be another one than in `call`."""
    module = program.module()
    for size in dict.fromkeys(size for found in dynamic.values() for size in found.values()):
        places = {name: [d for d, other in found.items() if other == size] for name, found in dynamic.items()}
        shown = [f"dimension {d} of input '{name}'" for name, found in places.items() for d in found]
        length = next(t.shape[places[name][0]] for name, t in zip(call.names, call.tensors, strict=True) if places[name])
        reasons = []
        for other in _others(length):
            resized = call.changed(partial(_resized, places, other))
            try:
                with torch.no_grad():
                    module(*resized.args, **resized.kwargs)
                break
            except Exception as error:  # guards and ops raise many kinds
                reasons.append(_first_line(error))
        else:
            raise _fixed(size, ", ".join(shown), f"it computes at {length} only: {reasons[0]}")


def _others(length: int) -> Iterator[int]:
    """Sizes to try beside `length`: the fewer elements the better, and multiples for what asks for these."""
    tried = [length // 2, length - 1, length + 1, length + 2, 2 * length, length // 4, 3 * length, length + 32]
    return (size for size in dict.fromkeys(tried) if size > 1 and size != length)


def _resized(places: Mapping[str, Sequence[int]], length: int, name: str, tensor: Tensor) -> Tensor:
    """The input `name` with `length` in its `places`, cut or repeated."""
    for dimension in places[name]:
        tensor = tensor.index_select(dimension, torch.arange(length) % tensor.shape[dimension])
    return tensor


def explained(error: Exception, dynamic: Dynamic) -> CaptureError | None:
    """What torch.export says of an open dimension that the model fixes, if `error` is of such."""
    text = str(error)
    if "specialized" not in text and "Constraints violated" not in text:
        return None
    for name, dimension in re.findall(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", text):
        size = dynamic.get(name, {}).get(int(dimension))
        if size is not None:
            said = reason(error).replace(f"L['{name}'].size()[{dimension}]", "it")
            return _fixed(size, f"dimension {dimension} of input '{name}'", said)
    return None


def reason(error: BaseException) -> str:
    """What torch.export says of sizes, without its advice."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.lstrip().startswith("-")] or [_first_line(error)]
    return lines[0].partition(". If you're using")[0]


def _fixed(size: str, shown: str, reason: str) -> CaptureError:
    action = "leave it out, name it like the sizes that it always equals, or make the model compute it from the input's shape"
    return CaptureError(f"the model does not leave '{size}' open ({shown})", found=reason, action=action)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def named(nodes: Sequence[fx.Node], names: Sequence[str], given: Dynamic) -> dict[str, dict[int, str]]:
    """The open dimensions of captured inputs, the batch too, by the names `given`, or else after the first place of each size."""
    shapes = [value.shape if isinstance(value := node.meta["val"], Tensor) else () for node in nodes]
    open_sizes = [
        (name, d, str(size))
        for name, shape in zip(names, shapes, strict=True)
        for d, size in enumerate(shape)
        if not isinstance(size, int)
    ]
    known = {size: given[name][dimension] for name, dimension, size in reversed(open_sizes) if dimension in given.get(name, {})}
    made: dict[str, dict[int, str]] = {name: {} for name in names}
    for name, dimension, size in open_sizes:
        default = BATCH if dimension == 0 and BATCH not in known.values() else f"{name}_{dimension}"
        made[name][dimension] = given.get(name, {}).get(dimension) or known.setdefault(size, default)
    return made
