"""From a user's model to a functional FX graph of ATen ops, by `torch.export`, with a dynamic batch and readable tensor names.

Nothing of the user's model is changed: the captured graph has parameters of its own.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from qdeploy.capture import decompose, inputs, outputs, simplify
from qdeploy.capture.inputs import Batch, Call, Dynamic
from qdeploy.core.errors import CaptureError, InputError, QDeployError, one_line
from qdeploy.core.names import GENERATED, Names
from qdeploy.core.spec import TensorSpec
from qdeploy.graph import query


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


def capture(model: nn.Module | ExportedProgram, example_inputs: Batch | None, dynamic: Dynamic | None = None) -> Captured:
    """Capture `model`; `example_inputs` has any batch size, and is None for an ExportedProgram.

    `dynamic` names dimensions beyond the batch that stay open; without it, those that the model's own file leaves open do, as far as
    they can. A model that fixes the batch is captured at that of the example, and `notes` say so. Raises `CaptureError` with the
    user's line where `torch.export` fails.
    """
    if not isinstance(model, nn.Module | ExportedProgram):
        raise InputError("the model is no nn.Module and no ExportedProgram", found=type(model).__name__)
    notes: list[str] = []
    if isinstance(model, ExportedProgram):
        example, program, specs = _from_program(model, example_inputs, dynamic or {}, notes)
    else:
        example, program, specs = _from_module(model, _call(model, example_inputs, dynamic or {}), dynamic is None, notes)
    module = _decomposed(program)
    _drop_writes(module, notes)
    outputs.check(module)
    _by_place(module)
    _own_parameters(module)
    simplify.simplify(module)
    placeholders = module.graph.find_nodes(op="placeholder")
    of_file = bool(inputs.file_names(model))
    if len(placeholders) != len(specs):
        known = {spec.name for spec in specs}
        other = next(node.name for node in placeholders if node.name not in known)
        raise InputError(f"input '{other}' of the model is no tensor", action="export it with tensors only")
    _name_tensors(module, [spec.name for spec in specs], of_file)
    return Captured(module=module, inputs=specs, example=example, notes=tuple(notes))


def _decomposed(program: ExportedProgram, table: dict[Any, Any] = decompose.DECOMPOSITIONS) -> fx.GraphModule:
    """The functional graph of `program` without the operators of `table`; `CaptureError` where torch would have written none such."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, while it copies its programs
            module = program.run_decompositions(table).module(check_guards=False)
    except QDeployError:
        raise
    except Exception as error:  # torch takes graphs on trust, and fails somewhere
        raise CaptureError(
            "the exported program cannot be computed", found=one_line(error), action="export the model again with torch.export"
        ) from error
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.nodes:
        if node.name in GENERATED:  # torch.export names them after parameters, and would hide what the generated source needs
            node._rename(f"{node.name}_")
    return module


def _drop_writes(module: fx.GraphModule, notes: list[str]) -> None:
    """Leave out what writes results back into inputs and buffers, as `x.mul_` does: the graph computes with the results themselves.

    A buffer that a model changes is a state, which no deployed file keeps: every call starts from its value now, and a note says so.
    """
    states = []
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        written, result = node.args[:2]
        assert isinstance(written, fx.Node) and isinstance(result, fx.Node)
        if written.op == "get_attr":
            states.append(f"'{written.target}'")
        node.replace_all_uses_with(result)
        module.graph.erase_node(node)
    if states:
        several = len(states) > 1
        what = f"buffer{'s' if several else ''} {', '.join(states)}"
        action = f"take {'them' if several else 'it'} as an input and return {'them' if several else 'it'} to keep a state"
        notes.append(f"the model changes its {what}; each call of the deployed model starts from what was there at capture: {action}")
    module.recompile()


Traced = tuple[tuple[Tensor, ...], ExportedProgram, tuple[TensorSpec, ...]]
"""An example, the program, and its inputs with what stays open of them."""


def _from_module(model: nn.Module, given: Call, by_file: bool, notes: list[str]) -> Traced:
    """Export a module. `by_file`: what its own file leaves open stays open, as far as it can."""
    left = model.meta.get(inputs.OPEN) if isinstance(model, fx.GraphModule) and by_file else None
    if left:  # a wish, and no promise
        try:
            return _from_module(model, replace(given, dynamic=left), False, notes)
        except (CaptureError, InputError) as error:
            notes.append(f"sizes that the file leaves open are those of the example: {error}")
    call = given.to_export()
    try:
        program = _export(model, call)
    except CaptureError as error:
        call, program = given, _at_one_batch(model, given, error)
        batch = next((t.shape[0] for t in given.tensors if t.dim()), 1)
        why = inputs.fixed_size_reason(error.__cause__ or error)
        notes.append(f"the batch stays fixed at {batch}, that of the example: the model does not leave it open ({why})")
    return call.tensors, program, call.specs(program)


def _at_one_batch(model: nn.Module, given: Call, error: CaptureError) -> ExportedProgram:
    """The program for the batch of the example alone, where it is the batch that cannot be open; else `error`."""
    try:
        return _export(model, given, open_batch=False)
    except CaptureError:
        raise error from error.__cause__


def _from_program(model: ExportedProgram, given: Batch | None, dynamic: Dynamic, notes: list[str]) -> Traced:
    """A program with an open batch, where it can have one."""
    nodes = inputs.input_nodes(model)
    names = inputs.input_names(model)
    own = tuple(_like(node) for node in nodes)
    inputs.check_dynamic(dynamic, names, own)
    specs = inputs.specs(nodes, names, dynamic)
    for spec, tensor in zip(specs, own, strict=True):
        for dimension, size in dynamic.get(spec.name, {}).items():
            if dimension not in spec.names:
                what = f"the exported program does not leave '{size}' open (dimension {dimension} of input '{spec.name}')"
                raise CaptureError(what, found=list(tensor.shape), action="export it with this dimension in dynamic_shapes")
    example = own
    if given is not None:
        example = inputs.checked(_tensors(inputs.ordered(given, names, "the example")), specs, "the example")
        if any(t.shape[d] == 1 for spec, t in zip(specs, example, strict=True) for d in spec.names):
            example = own  # what is exported again takes a size of 1 for a constant
    if _is_dynamic(model) and all(_is_plain(size) for node in nodes for size in node.meta["val"].shape):
        return example, model, specs
    program = _make_dynamic(model, example, specs, notes)
    return example, program, inputs.specs(inputs.input_nodes(program), names, {spec.name: spec.names for spec in specs})


def _call(model: nn.Module, given: Batch | None, dynamic: Dynamic) -> Call:
    if given is None:
        raise InputError("example inputs are missing", action="give a tensor, a tuple of tensors or a mapping from names to tensors")
    if not isinstance(given, Tensor | Sequence | Mapping):
        action = "give a tensor, a tuple of tensors or a mapping from names to tensors"
        raise InputError("example inputs are no tensors", found=type(given).__name__, action=action)
    _tensors(given.values() if isinstance(given, Mapping) else inputs.ordered(given, ()))
    return Call.of(model, given, dynamic).changed(lambda _, t: t.clone())


def _tensors(given: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """`given` as a tuple, checked."""
    tensors = tuple(given)
    for position, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            found = type(tensor).__name__
            raise InputError(f"example input {position} is no tensor", found=found, action="give torch tensors")
    if not tensors:
        raise InputError("example inputs are empty", action="give at least one tensor")
    return tensors


def _like(node: fx.Node) -> Tensor:
    made = node.meta["val"]
    if not isinstance(made, Tensor):
        raise InputError(f"input '{node.name}' of the exported program is no tensor", found=type(made).__name__)
    # a size that is open has the number that it was exported with, where that is known
    shape = [size if isinstance(size, int) else max(size.node.hint or 2, 2) for size in made.shape]
    if made.dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=made.dtype)
    return torch.zeros(shape, dtype=made.dtype)


def _is_plain(size: int | torch.SymInt) -> bool:
    """Whether a size is a number or open, and not computed, such as 4 * height: torch cannot decompose programs of these."""
    return isinstance(size, int) or str(size).isidentifier()


def _is_dynamic(program: ExportedProgram) -> bool:
    return any(
        isinstance(node.meta["val"], Tensor) and node.meta["val"].dim() and not isinstance(node.meta["val"].shape[0], int)
        for node in inputs.input_nodes(program)
    )


def _export(model: nn.Module, call: Call, open_batch: bool = True) -> ExportedProgram:
    try:
        with torch.no_grad(), _inference(model):
            shapes = call.dynamic_shapes(open_batch)
            return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # the user's own forward runs here and may raise anything
        raise inputs.fixed_size_error(error, call) or _explain(error) from error


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


def _make_dynamic(
    program: ExportedProgram, example: tuple[Tensor, ...], specs: Sequence[TensorSpec], notes: list[str]
) -> ExportedProgram:
    """`program` with a dynamic batch, where its graph computes the same for two samples at once; else unchanged, with a note."""
    in_place = any(map(_writes, program.graph.nodes))
    single = _decomposed(program, {}) if in_place else program.module(check_guards=False)
    assert isinstance(single, fx.GraphModule)
    dropped: list[str] = []
    _drop_writes(single, dropped)
    _by_place(single)
    other = tuple(t.flip(tuple(range(t.dim()))) / 2 if t.is_floating_point() and t.dim() else t for t in example)
    doubled = tuple(torch.cat(pair) if pair[0].dim() else pair[0] for pair in zip(example, other, strict=True))
    try:
        call = Call.of(single, doubled, {})
        opened = {name: spec.names for name, spec in zip(call.names, specs, strict=True)}
        dynamic = _export(single, replace(call, dynamic=opened))
        both = pytree.tree_leaves(dynamic.module(check_guards=False)(*doubled))
        halves = [pytree.tree_leaves(single(*half)) for half in (example, other)]
        wanted = [torch.cat(pair) for pair in zip(*halves, strict=True)]
        same = all(b.shape == w.shape and torch.allclose(b, w, rtol=1e-4, atol=1e-5) for b, w in zip(both, wanted, strict=True))
    except (CaptureError, InputError, RuntimeError, TypeError, IndexError):
        same = False
    if same:
        notes.extend(dropped)
        return dynamic
    batch = next((spec.shape[0] for spec in inputs.program_inputs(program) if spec.shape), 1)
    notes.append(f"the batch stays fixed at {batch}, as it was exported; export with a dynamic batch to change that")
    return program


def _writes(node: fx.Node) -> bool:
    """Whether a node works in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _by_place(module: fx.GraphModule) -> None:
    """Make `module` take its inputs one after the other, also those that were exported as keywords."""
    codegen = module.graph._codegen
    assert isinstance(codegen, fx.graph._PyTreeCodeGen)
    info = codegen.pytree_info
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    codegen.pytree_info = info._replace(orig_args=names, in_spec=pytree.tree_structure((tuple(names), {})))
    module._in_spec = codegen.pytree_info.in_spec
    module._forward_pre_hooks.clear()  # torch's check of sizes, which takes some that are open for those of the example
    module._forward_pre_hooks_with_kwargs.clear()
    module.recompile()


def _own_parameters(module: fx.GraphModule) -> None:
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = buffer.detach().clone()


def _name_tensors(module: fx.GraphModule, names: Sequence[str], of_file: bool) -> None:
    """Give every tensor the path of the module that makes it; `.op` is added where the module is the user's own.

    Inputs have the names `names`, and outputs that have keys are called so; of a file, whose keys are names, whatever they look like.
    """
    taken = Names(str(node.target) for node in module.graph.find_nodes(op="get_attr"))
    given = dict(zip(module.graph.find_nodes(op="placeholder"), names, strict=True))
    keys = outputs.keys(module, taken | set(names), of_file)
    taken.update(key for node, key in keys.items() if node.op == "call_function")
    for node in module.graph.nodes:
        if node in keys and node.op == "call_function":
            node.meta["tensor_name"] = keys[node]
            continue
        if node.op == "placeholder":
            name = given[node]
        elif node.op == "get_attr":
            node.meta["tensor_name"] = str(node.target)
            node.meta.setdefault("val", query.parameter(module, str(node.target)).detach())
            continue
        elif node.op == "call_function":
            name = _path(node)
        else:
            continue
        node.meta["tensor_name"] = taken.free(name)


def _path(node: fx.Node) -> str:
    op = query.op_of(node).name
    path, kind = query.scope(node)
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    weight = query.argument(node, query.op_of(node).weight)
    if not path and weight is not None and weight.op == "get_attr":
        return str(weight.target).rpartition(".")[0] or op
    if not path:
        return op
    return str(path) if kind.startswith("torch.nn.") and "container" not in kind else f"{path}.{op}"
