"""The inputs of a model: how it is called, by place or by name, and which of their sizes stay open.

Inputs have the names of forward's parameters; what forward takes as `*rest` is `rest_0`, `rest_1`.

torch.export takes a size for open as soon as nothing in the model asks for one number. What it has noted beside, such as
`3 * height * width == 768` before a linear layer, only shows at another size: so every name is tried at one.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from qdeploy.core.errors import CaptureError, InputError, OptionError
from qdeploy.core.spec import TensorSpec, show_shape

Batch = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""The inputs of some samples: one tensor, a tensor for each in their order, or tensors by name."""


Dynamic = Mapping[str, Mapping[int, str]]
"""The names of open dimensions beyond the batch, by input and dimension; one name is one size."""
BATCH = "batch"
"""The name of the first dimension of every input."""
LARGEST = 1 << 28
"""Numbers of an input with all its fixed sizes, the batch too: 1 GiB in float32."""
NAMES = "names"
"""Where the module or program of a file keeps the names of its inputs in the file, by the names of its graph, in its `meta`."""
OPEN = "open"
"""Where the module of a file keeps what the file leaves open, in its `meta`."""


def ordered(batch: Batch, names: Sequence[str], what: str = "a batch") -> tuple[Tensor, ...]:
    """The tensors of `batch`, those that are named in the order of `names`; `InputError` for an unknown or missing name."""
    if isinstance(batch, Tensor):
        return (batch,)
    if not isinstance(batch, Mapping):
        return tuple(batch)
    unknown, missing = [name for name in batch if name not in names], [name for name in names if name not in batch]
    if unknown or missing:
        raise _wrong_names(what, unknown, missing, names)
    return tuple(batch[name] for name in names)


def _wrong_names(what: str, unknown: Sequence[object], missing: Sequence[str], names: Sequence[str]) -> InputError:
    near = get_close_matches(str(unknown[0]), missing or names, n=1) if unknown else []
    found = [f"unknown {', '.join(map(repr, unknown))}"] if unknown else []
    found += [f"missing {', '.join(map(repr, missing))}"] if missing else []
    action = f"did you mean '{near[0]}'?" if near else "leave out what is unknown" if unknown else "give what is missing"
    return InputError(f"{what} has wrong input names", found=" and ".join(found), allowed=", ".join(names) or "none", action=action)


def check_batch(batch: Sequence[Tensor], specs: Sequence[TensorSpec], what: str = "a batch") -> None:
    """`InputError` unless `batch` has one fitting tensor for each of `specs`."""
    if len(batch) != len(specs):
        raise InputError(f"{what} has the wrong number of inputs", found=len(batch), allowed=len(specs))
    sizes: dict[str, tuple[int, str]] = {}
    for tensor, spec in zip(batch, specs, strict=True):
        _check_tensor(tensor, spec)
        for dimension, name in spec.names.items():
            size, first = sizes.setdefault(name, (tensor.shape[dimension], spec.name))
            if size != tensor.shape[dimension]:
                found = f"{size} in '{first}', {tensor.shape[dimension]} in '{spec.name}'"
                raise InputError(f"the inputs have different sizes for '{name}'", found=found, action="give all inputs one size")


def checked(batch: Batch, specs: Sequence[TensorSpec], what: str = "a batch") -> tuple[Tensor, ...]:
    """The tensors of `batch` in the order of `specs`; `InputError` where they do not fit."""
    tensors = ordered(batch, [spec.name for spec in specs], what)
    check_batch(tensors, specs, what)
    return tensors


def check_sizes(what: str, sizes: Sequence[int | None], least: int = 1) -> None:
    """`InputError` for an input, `what`, of which no sample can be made: with a size below `least`, or of too many numbers."""
    known = [size for size in sizes if size is not None]
    if any(size < least for size in known):
        found, allowed = show_shape(sizes), f"{least} or more"
        raise InputError(f"{what} has a size that no sample has", found=found, allowed=allowed, action="export it again")
    if math.prod(known) > LARGEST:
        found, allowed = f"{show_shape(sizes)}, {math.prod(known):.1e} numbers", f"up to {LARGEST:.1e}"
        raise InputError(f"{what} is too large", found=found, allowed=allowed, action="export it again, with an open batch")


def _check_tensor(tensor: Tensor, spec: TensorSpec) -> None:
    """`InputError` unless `tensor` has the shape and dtype of `spec`."""
    if not isinstance(tensor, Tensor):
        raise InputError(f"input '{spec.name}' is no tensor", found=type(tensor).__name__, action="give torch tensors")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != spec.dtype:
        raise InputError(f"input '{spec.name}' has the wrong dtype", found=dtype, allowed=spec.dtype)
    same = tensor.dim() == len(spec.shape)
    fits = [want in (None, size) for want, size in zip(spec.shape, tensor.shape, strict=False)]
    if not same or not all(fits) or 0 in tensor.shape:
        fixed = same and fits and not fits[0] and all(fits[1:])
        action = f"give batches of {spec.shape[0]}, which alone the captured model computes" if fixed else None
        raise InputError(
            f"input '{spec.name}' has the wrong shape", found=list(tensor.shape), allowed=show_shape(spec.shape), action=action
        )


def file_names(model: nn.Module | ExportedProgram) -> Mapping[str, str]:
    """The names that the inputs of a graph have in its file, by their names in the graph; empty for what comes from no such file."""
    module = model.graph_module if isinstance(model, ExportedProgram) else model
    names: Mapping[str, str] = module.meta.get(NAMES, {}) if isinstance(module, fx.GraphModule) else {}
    return names


def parameters(model: nn.Module) -> tuple[str, ...]:
    """The inputs that forward names, in their order, by the names of their file where they have one."""
    names = file_names(model)
    return tuple(names.get(name, name) for name in _declared(model))


def _declared(model: nn.Module) -> tuple[str, ...]:
    """The inputs that forward names, as it names them."""
    kinds = {name: parameter.kind for name, parameter in inspect.signature(model.forward).parameters.items()}
    return tuple(name for name, kind in kinds.items() if kind not in (_REST, _MORE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a model: `arguments` as `inspect.Signature.bind` has them, with a tuple for `*rest`.

    `dynamic` names the dimensions beyond the batch that stay open when the model is exported by this call, by the names of inputs:
    those of forward, or of the file that the model comes from, which `labels` has by those of forward.
    """

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    arguments: dict[str, Any]
    dynamic: Dynamic
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, example: Batch, dynamic: Dynamic) -> Call:
        """The call of `model` with `example`; `InputError` where that does not fit its forward."""
        signature = inspect.signature(model.forward)
        kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
        labels = file_names(model)
        declared = _declared(model)
        shown = parameters(model)
        args: tuple[Tensor, ...] = ()
        kwargs: dict[str, Tensor] = {}
        if isinstance(example, Mapping):
            required = [name for name in declared if signature.parameters[name].default is inspect.Parameter.empty]
            unknown = [name for name in example if name not in shown]  # also what forward would take as **more
            missing = [labels.get(name, name) for name in required if labels.get(name, name) not in example]
            if unknown or missing:
                raise _wrong_names("the example", unknown, missing, shown)
            own = dict(zip(shown, declared, strict=True))
            example = {own[name]: tensor for name, tensor in example.items()}
            by_place = [name for name in declared if kinds[name] is inspect.Parameter.POSITIONAL_ONLY]
            args = tuple(example[name] for name in by_place if name in example)
            kwargs = {name: example[name] for name in declared if name in example and name not in by_place}
        else:
            args = ordered(example, ())
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            found = f"{len(args)} tensors: {error}"
            action = "give one for each input, or a mapping from names to tensors"
            raise InputError("the example does not fit the model's forward", found=found, action=action) from error
        return cls(args=args, kwargs=kwargs, arguments=dict(arguments), dynamic=dynamic, labels=labels)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All inputs in their order."""
        return (*self.args, *self.kwargs.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the inputs in their order."""
        return tuple(name for argument, value in self.arguments.items() for name, _ in self._parts(argument, value))

    def map(self, change: Callable[[str, Tensor], Any]) -> dict[str, Any]:
        """`arguments` with `change(name, tensor)` in place of the tensors."""

        def mapped(argument: str, value: Any) -> Any:
            parts = [change(name, part) for name, part in self._parts(argument, value)]
            return tuple(parts) if isinstance(value, tuple) else parts[0]

        return {argument: mapped(argument, value) for argument, value in self.arguments.items()}

    def _parts(self, argument: str, value: Any) -> list[tuple[str, Tensor]]:
        """The named tensors of one argument."""
        if isinstance(value, tuple):
            return [(f"{argument}_{place}", part) for place, part in enumerate(value)]
        return [(self.labels.get(argument, argument), value)]

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> Call:
        """The call with `change(name, tensor)` in place of the tensors."""
        made = dict(zip(self.names, (change(*pair) for pair in zip(self.names, self.tensors, strict=True)), strict=True))
        tensors = tuple(made.values())
        kwargs = dict(zip(self.kwargs, tensors[len(self.args) :], strict=True))
        arguments = self.map(lambda name, _: made[name])
        return replace(self, args=tensors[: len(self.args)], kwargs=kwargs, arguments=arguments)

    def to_export(self) -> Call:
        """The call to export the model by: a batch of 2 at least, as torch.export takes 1 for a constant. `dynamic` is checked."""
        call = self.changed(lambda _, t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t)
        check_dynamic(call.dynamic, call.names, call.tensors)
        return call

    def dynamic_shapes(self, open_batch: bool) -> dict[str, Any]:
        """What `torch.export` is to leave open."""

        def shape(name: str, tensor: Tensor) -> dict[int, Any] | None:
            more: dict[int, Any] = {dimension: Dim.DYNAMIC for dimension in self.dynamic.get(name, {}) if dimension}
            return ({0: Dim(BATCH)} if open_batch else {}) | more if tensor.dim() else None

        return self.map(shape)

    def specs(self, program: ExportedProgram) -> tuple[TensorSpec, ...]:
        """The inputs of `program`, exported by this call; `CaptureError` where `dynamic` names a size that it computes at only."""
        found = specs(input_nodes(program), self.names, self.dynamic)
        if self.dynamic:
            _prove(program, self, {spec.name: {d: size for d, size in spec.names.items() if d} for spec in found})
        return found


_REST, _MORE = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def input_nodes(program: ExportedProgram) -> list[fx.Node]:
    """The placeholders of a program that stand for inputs, and not for parameters."""
    names = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.find_nodes(op="placeholder") if node.name in names]


def input_names(program: ExportedProgram) -> list[str]:
    """The names of a program's inputs: those of the file that it comes from, where there is one."""
    names = file_names(program)
    return [names.get(node.name, node.name) for node in input_nodes(program)]


def program_inputs(program: ExportedProgram) -> tuple[TensorSpec, ...]:
    """The inputs of an exported program."""
    nodes = input_nodes(program)
    found = specs(nodes, input_names(program), {})
    for spec in found:
        check_sizes(f"input '{spec.name}' of the program", spec.shape)
    return found


def specs(nodes: Sequence[fx.Node], names: Sequence[str], given: Dynamic) -> tuple[TensorSpec, ...]:
    """Captured inputs under their `names`; open sizes, the batch too, by the names `given`, or else after the first place of each."""
    shapes: list[Sequence[int | torch.SymInt]] = []
    for node in nodes:
        made = node.meta["val"]
        if not isinstance(made, Tensor):
            found = type(made).__name__
            raise InputError(f"input '{node.name}' of the model is no tensor", found=found, action="export it with tensors only")
        shapes.append(made.shape)
    open_sizes = [
        (name, d, str(size))
        for name, shape in zip(names, shapes, strict=True)
        for d, size in enumerate(shape)
        if not isinstance(size, int)
    ]
    known = {size: given[name][dimension] for name, dimension, size in reversed(open_sizes) if dimension in given.get(name, {})}
    opened: dict[str, list[str]] = {name: [] for name in names}
    for name, dimension, size in open_sizes:
        default = BATCH if dimension == 0 and BATCH not in known.values() else re.sub(r"\W", "_", f"{name}_{dimension}")
        opened[name].append(given.get(name, {}).get(dimension) or known.setdefault(size, default))
    return tuple(
        TensorSpec(
            name=name,
            shape=tuple(size if isinstance(size, int) else None for size in shape),
            dtype=str(node.meta["val"].dtype).removeprefix("torch."),
            open=tuple(opened[name]),
        )
        for node, name, shape in zip(nodes, names, shapes, strict=True)
    )


def check_dynamic(dynamic: Dynamic, names: Sequence[str], tensors: Sequence[Tensor]) -> None:
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


def _prove(program: ExportedProgram, call: Call, dynamic: Dynamic) -> None:
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


def fixed_size_error(error: Exception, call: Call) -> CaptureError | None:
    """What torch.export says of an open dimension of `call` that the model fixes, if `error` is of such."""
    text = str(error)
    if "specialized" not in text and "Constraints violated" not in text:
        return None
    for name, dimension in re.findall(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]", text):
        shown = call.labels.get(name, name)
        size = call.dynamic.get(shown, {}).get(int(dimension))
        if size is not None:
            said = fixed_size_reason(error).replace(f"L['{name}'].size()[{dimension}]", "it")
            return _fixed(size, f"dimension {dimension} of input '{shown}'", said)
    return None


def fixed_size_reason(error: BaseException) -> str:
    """What torch.export says of sizes, without its advice."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.lstrip().startswith("-")] or [_first_line(error)]
    return lines[0].partition(". If you're using")[0]


def _fixed(size: str, shown: str, reason: str) -> CaptureError:
    action = "leave it out, name it like the sizes that it always equals, or make the model compute it from the input's shape"
    return CaptureError(f"the model does not leave '{size}' open ({shown})", found=reason, action=action)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
