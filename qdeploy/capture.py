"""From a user's model to a functional FX graph of ATen ops, by `torch.export`, with a dynamic batch and readable tensor names.

Nothing of the user's model is changed: the captured graph has parameters of its own.
"""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from qdeploy import graph, simplify
from qdeploy.errors import CaptureError, InputError
from qdeploy.spec import TensorSpec, show_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """A captured model: `module` is the graph, `example` inputs that it takes, `notes` what the user should know."""

    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    example: tuple[Tensor, ...]
    notes: tuple[str, ...]

    @property
    def dynamic_batch(self) -> bool:
        """Whether the first dimension of the inputs may vary."""
        return any(spec.shape and spec.shape[0] is None for spec in self.inputs)


def capture(model: nn.Module | ExportedProgram, example_inputs: Tensor | Sequence[Tensor] | None) -> Captured:
    """Capture `model`; `example_inputs` is a tensor or a tuple of them, with any batch size, or None for an ExportedProgram.

    Raises `CaptureError` with the user's line where `torch.export` fails.
    """
    if not isinstance(model, nn.Module | ExportedProgram):
        raise InputError("the model is no nn.Module and no ExportedProgram", found=type(model).__name__)
    example = _example(model, example_inputs)
    notes: list[str] = []
    if isinstance(model, ExportedProgram):
        program = model if _is_dynamic(model) else _make_dynamic(model, example, notes)
    else:
        program = _export(model, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, while it copies its programs
        program = program.run_decompositions(simplify.DECOMPOSITIONS)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    _check_outputs(module)
    _own_parameters(module)
    simplify.fold_constants(module)
    simplify.drop_nothing_ops(module)
    simplify.drop_expands(module)
    simplify.loosen_views(module)
    simplify.infer_batch(module)
    simplify.soften_masks(module)
    _name_tensors(module)
    inputs = tuple(_input_spec(node) for node in module.graph.find_nodes(op="placeholder"))
    if example_inputs is not None:
        _check_example(example, inputs)
    return Captured(module=module, inputs=inputs, example=example, notes=tuple(notes))


def _example(model: nn.Module | ExportedProgram, given: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    if given is None:
        if not isinstance(model, ExportedProgram):
            raise InputError("example inputs are missing", action="give a tensor or a tuple of tensors as example_inputs")
        return tuple(_like(node) for node in _inputs(model))
    if not isinstance(given, Tensor | Sequence):
        raise InputError("example inputs are no tensors", found=type(given).__name__, action="give a tensor or a tuple of tensors")
    tensors = (given,) if isinstance(given, Tensor) else tuple(given)
    for position, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            found = type(tensor).__name__
            raise InputError(f"example input {position} is no tensor", found=found, action="give torch tensors")
    if not tensors:
        raise InputError("example inputs are empty", action="give at least one tensor")
    if isinstance(model, ExportedProgram):
        return tensors
    # torch.export takes a batch of 1 for a constant, so the example has at least 2.
    return tuple(torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t.clone() for t in tensors)


def program_inputs(program: ExportedProgram) -> tuple[TensorSpec, ...]:
    """The inputs of an exported program."""
    return tuple(_input_spec(node) for node in _inputs(program))


def _inputs(program: ExportedProgram) -> list[fx.Node]:
    names = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.find_nodes(op="placeholder") if node.name in names]


def _like(node: fx.Node) -> Tensor:
    made = node.meta["val"]
    if not isinstance(made, Tensor):
        raise InputError(f"input '{node.name}' of the exported program is no tensor", found=type(made).__name__)
    shape = [size if isinstance(size, int) else 2 for size in made.shape]
    if made.dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=made.dtype)
    return torch.zeros(shape, dtype=made.dtype)


def _is_dynamic(program: ExportedProgram) -> bool:
    return any(
        isinstance(node.meta["val"], Tensor) and node.meta["val"].dim() and not isinstance(node.meta["val"].shape[0], int)
        for node in _inputs(program)
    )


def _export(model: nn.Module, example: tuple[Tensor, ...]) -> ExportedProgram:
    shapes = tuple({0: Dim("batch")} if t.dim() else None for t in example)
    try:
        with torch.no_grad(), _inference(model):
            return torch.export.export(model, example, dynamic_shapes=_nest(shapes, model), strict=False)
    except Exception as error:  # the user's own forward runs here and may raise anything
        raise _explain(error) from error


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode within the block; afterwards every module of it is in its own mode again."""
    training = {module: module.training for module in model.modules()}
    with suppress(NotImplementedError):  # the module of an ExportedProgram refuses, and has one mode only
        model.eval()
    try:
        yield
    finally:
        with suppress(NotImplementedError):
            model.train(training[model])
        for module, mode in training.items():
            module.training = mode


def _nest(shapes: tuple[object, ...], model: nn.Module) -> tuple[object, ...]:
    """What a forward takes as `*args` has its dynamic shapes in one nested tuple."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return shapes
    first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*shapes[:first], shapes[first:]) if len(shapes) > first else shapes


def _explain(error: Exception) -> CaptureError:
    """The error with the last line of it that is neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*ours, "<"))]
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return CaptureError(
        f"torch.export cannot capture the model{where}",
        found=f"{type(error).__name__}: {first}",
        action="make this line independent of the values of tensors (torch.where, torch.cond), and the shapes fit the batch",
    )


def _make_dynamic(program: ExportedProgram, example: tuple[Tensor, ...], notes: list[str]) -> ExportedProgram:
    """`program` with a dynamic batch, where its graph computes the same for two samples at once; else unchanged, with a note."""
    single = program.module(check_guards=False)
    assert isinstance(single, fx.GraphModule)
    other = tuple(t.flip(tuple(range(t.dim()))) / 2 if t.is_floating_point() and t.dim() else t for t in example)
    doubled = tuple(torch.cat(pair) if pair[0].dim() else pair[0] for pair in zip(example, other, strict=True))
    try:
        dynamic = _export(single, doubled)
        both = pytree.tree_leaves(dynamic.module(check_guards=False)(*doubled))
        halves = [pytree.tree_leaves(single(*half)) for half in (example, other)]
        wanted = [torch.cat(pair) for pair in zip(*halves, strict=True)]
        same = all(b.shape == w.shape and torch.allclose(b, w, rtol=1e-4, atol=1e-5) for b, w in zip(both, wanted, strict=True))
    except (CaptureError, RuntimeError, TypeError, IndexError):
        same = False
    if same:
        return dynamic
    batch = next((spec.shape[0] for spec in program_inputs(program) if spec.shape), 1)
    notes.append(f"the batch stays fixed at {batch}, as it was exported; export with a dynamic batch to change that")
    return program


def _check_outputs(module: fx.GraphModule) -> None:
    made = graph.outputs(module.graph)
    if not made or not any(graph.is_float(node) for node in made):
        raise CaptureError("the model returns no floating-point tensor", action="return the tensors to be deployed")


def _check_example(example: Sequence[Tensor], inputs: Sequence[TensorSpec]) -> None:
    if len(example) != len(inputs):
        raise InputError("the example has the wrong number of inputs", found=len(example), allowed=len(inputs))
    for tensor, spec in zip(example, inputs, strict=True):
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype != spec.dtype:
            raise InputError(f"input '{spec.name}' has the wrong dtype", found=dtype, allowed=spec.dtype)
        fits = tensor.dim() == len(spec.shape) and all(
            want is None or want == size for want, size in zip(spec.shape, tensor.shape, strict=True)
        )
        if not fits:
            raise InputError(f"input '{spec.name}' has the wrong shape", found=list(tensor.shape), allowed=show_shape(spec.shape))


def _input_spec(node: fx.Node) -> TensorSpec:
    made = node.meta["val"]
    if not isinstance(made, Tensor):
        found = type(made).__name__
        raise InputError(f"input '{node.name}' of the model is no tensor", found=found, action="export it with tensors only")
    shape = tuple(size if isinstance(size, int) else None for size in made.shape)
    return TensorSpec(name=graph.tensor_name(node), shape=shape, dtype=str(made.dtype).removeprefix("torch."))


def _own_parameters(module: fx.GraphModule) -> None:
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = buffer.detach().clone()


def _name_tensors(module: fx.GraphModule) -> None:
    """Give every tensor the path of the module that makes it; `.op` is added where the module is the user's own."""
    taken = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            name = node.name
        elif node.op == "get_attr":
            node.meta["tensor_name"] = str(node.target)
            node.meta.setdefault("val", graph.parameter(module, str(node.target)).detach())
            continue
        elif node.op == "call_function":
            name = _path(node)
        else:
            continue
        unique, count = name, 0
        while unique in taken:
            count += 1
            unique = f"{name}_{count}"
        taken.add(unique)
        node.meta["tensor_name"] = unique


def _path(node: fx.Node) -> str:
    op = graph.op_of(node).name
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = (node.meta.get("custom") or {}).get("scope") or (stack[-1] if stack else ("", ""))  # the scope is of an ONNX file
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    weight = graph.argument(node, graph.op_of(node).weight)
    if not path and weight is not None and weight.op == "get_attr":
        return str(weight.target).rpartition(".")[0] or op
    if not path:
        return op
    return str(path) if kind.startswith("torch.nn.") and "container" not in kind else f"{path}.{op}"
