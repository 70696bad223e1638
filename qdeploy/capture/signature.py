"""How a model is called: which tensor is which input, given by place or by name.

Inputs have the names of forward's parameters; what forward takes as `*rest` is `rest_0`, `rest_1`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from qdeploy.core.errors import InputError
from qdeploy.core.spec import TensorSpec, show_shape

Batch = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""The inputs of some samples: one tensor, a tensor for each in their order, or tensors by name."""


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


def parameters(model: nn.Module) -> tuple[str, ...]:
    """The inputs that forward names, in their order."""
    kinds = {name: parameter.kind for name, parameter in inspect.signature(model.forward).parameters.items()}
    return tuple(name for name, kind in kinds.items() if kind not in (_REST, _MORE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a model: `arguments` as `inspect.Signature.bind` has them, with a tuple for `*rest`."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    arguments: dict[str, Any]

    @classmethod
    def of(cls, model: nn.Module, example: Batch) -> Call:
        """The call of `model` with `example`; `InputError` where that does not fit its forward."""
        signature = inspect.signature(model.forward)
        kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
        declared = parameters(model)
        args: tuple[Tensor, ...] = ()
        kwargs: dict[str, Tensor] = {}
        if isinstance(example, Mapping):
            required = [name for name in declared if signature.parameters[name].default is inspect.Parameter.empty]
            unknown = [name for name in example if name not in declared]  # also what forward would take as **more
            missing = [name for name in required if name not in example]
            if unknown or missing:
                raise _wrong_names("the example", unknown, missing, declared)
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
        return cls(args=args, kwargs=kwargs, arguments=dict(arguments))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All inputs in their order."""
        return (*self.args, *self.kwargs.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the inputs in their order."""
        return tuple(name for argument, value in self.arguments.items() for name, _ in _parts(argument, value))

    def map(self, change: Callable[[str, Tensor], Any]) -> dict[str, Any]:
        """`arguments` with `change(name, tensor)` in place of the tensors."""

        def mapped(argument: str, value: Any) -> Any:
            parts = [change(name, part) for name, part in _parts(argument, value)]
            return tuple(parts) if isinstance(value, tuple) else parts[0]

        return {argument: mapped(argument, value) for argument, value in self.arguments.items()}

    def changed(self, change: Callable[[str, Tensor], Tensor]) -> Call:
        """The call with `change(name, tensor)` in place of the tensors."""
        made = dict(zip(self.names, (change(*pair) for pair in zip(self.names, self.tensors, strict=True)), strict=True))
        tensors = tuple(made.values())
        kwargs = dict(zip(self.kwargs, tensors[len(self.args) :], strict=True))
        arguments = self.map(lambda name, _: made[name])
        return replace(self, args=tensors[: len(self.args)], kwargs=kwargs, arguments=arguments)


_REST, _MORE = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def _parts(argument: str, value: Any) -> list[tuple[str, Tensor]]:
    """The named tensors of one argument."""
    return [(f"{argument}_{place}", part) for place, part in enumerate(value)] if isinstance(value, tuple) else [(argument, value)]
