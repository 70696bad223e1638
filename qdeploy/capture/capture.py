"""From a user's model to a functional FX graph of ATen ops, by `torch.export`, with a dynamic batch and readable tensor names.

Nothing of the user's model is changed: the captured graph has parameters of its own.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from qdeploy.capture import decompose, dimensions, outputs, simplify
from qdeploy.capture.dimensions import Dynamic
from qdeploy.capture.signature import Batch, Call, check_batch, ordered
from qdeploy.core.errors import CaptureError, InputError
from qdeploy.core.spec import TensorSpec
from qdeploy.graph import edit, query


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
        example, program, opened = _from_program(model, example_inputs, dynamic, notes)
    else:
        example, program, opened = _from_module(model, _call(model, example_inputs), dynamic, notes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, while it copies its programs
        program = program.run_decompositions(decompose.DECOMPOSITIONS)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    outputs.check(module)
    _by_place(module)
    _own_parameters(module)
    simplify.fold_constants(module)
    simplify.fold_repeats(module)
    simplify.drop_nothing_ops(module)
    simplify.drop_expands(module)
    simplify.loosen_views(module)
    simplify.plain_averages(module)
    simplify.name_gates(module)
    simplify.infer_batch(module)
    simplify.soften_masks(module)
    placeholders = module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(opened):
        other = next(node.name for node in placeholders if node.name not in opened)
        raise InputError(f"input '{other}' of the model is no tensor", action="export it with tensors only")
    _name_tensors(module, tuple(opened))
    inputs = tuple(_input_spec(node, found) for node, found in zip(placeholders, opened.values(), strict=True))
    return Captured(module=module, inputs=inputs, example=example, notes=tuple(notes))


def _from_module(
    model: nn.Module, given: Call, dynamic: Dynamic | None, notes: list[str]
) -> tuple[tuple[Tensor, ...], ExportedProgram, dict[str, dict[int, str]]]:
    """An example for a module, its program, and its open dimensions."""
    left = model.meta.get(dimensions.MARK) if isinstance(model, fx.GraphModule) else None
    if dynamic is None and left:  # by a file: a wish, and no promise
        try:
            return _from_module(model, given, left, notes)
        except (CaptureError, InputError) as error:
            notes.append(f"sizes that the file leaves open are those of the example: {error}")
    wanted = dynamic or {}
    # torch.export takes a batch of 1 for a constant, so the example has at least 2
    call = given.changed(lambda _, t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t)
    dimensions.check(wanted, call.names, call.tensors)
    try:
        program = _export(model, call, wanted)
    except CaptureError as error:
        call, program = given, _at_one_batch(model, given, wanted, error)
        batch = next((t.shape[0] for t in given.tensors if t.dim()), 1)
        why = dimensions.reason(error.__cause__ or error)
        notes.append(f"the batch stays fixed at {batch}, that of the example: the model does not leave it open ({why})")
    opened = dimensions.named(_inputs(program), call.names, wanted)
    beyond = {name: {d: size for d, size in found.items() if d} for name, found in opened.items()}
    if wanted:
        dimensions.prove(program, call, beyond)
    return call.tensors, program, opened


def _at_one_batch(model: nn.Module, given: Call, dynamic: Dynamic, error: CaptureError) -> ExportedProgram:
    """The program for the batch of the example alone, where it is the batch that cannot be open; else `error`."""
    try:
        return _export(model, given, dynamic, open_batch=False)
    except CaptureError:
        raise error from error.__cause__


def _from_program(
    model: ExportedProgram, given: Batch | None, dynamic: Dynamic | None, notes: list[str]
) -> tuple[tuple[Tensor, ...], ExportedProgram, dict[str, dict[int, str]]]:
    """An example for a program, the program with an open batch, and its open dimensions."""
    nodes = _inputs(model)
    names = [node.name for node in nodes]
    own = tuple(_like(node) for node in nodes)
    dimensions.check(dynamic or {}, names, own)
    opened = dimensions.named(nodes, names, dynamic or {})
    for name, wanted in (dynamic or {}).items():
        for dimension, size in wanted.items():
            if dimension not in opened[name]:
                what = f"the exported program does not leave '{size}' open (dimension {dimension} of input '{name}')"
                raise CaptureError(
                    what, found=list(own[names.index(name)].shape), action="export it with this dimension in dynamic_shapes"
                )
    example = own
    if given is not None:
        example = _tensors(ordered(given, names, "the example"))
        check_batch(example, [_input_spec(node, found) for node, found in zip(nodes, opened.values(), strict=True)], "the example")
        if any(t.shape[d] == 1 for name, t in zip(names, example, strict=True) for d in opened[name]):
            example = own  # what is exported again takes a size of 1 for a constant
    if _is_dynamic(model) and all(_is_plain(size) for node in nodes for size in node.meta["val"].shape):
        return example, model, opened
    program = _make_dynamic(model, example, opened, notes)
    return example, program, dimensions.named(_inputs(program), names, opened)


def _call(model: nn.Module, given: Batch | None) -> Call:
    if given is None:
        raise InputError("example inputs are missing", action="give a tensor, a tuple of tensors or a mapping from names to tensors")
    if not isinstance(given, Tensor | Sequence | Mapping):
        action = "give a tensor, a tuple of tensors or a mapping from names to tensors"
        raise InputError("example inputs are no tensors", found=type(given).__name__, action=action)
    _tensors(given.values() if isinstance(given, Mapping) else ordered(given, ()))
    return Call.of(model, given).changed(lambda _, t: t.clone())


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


def program_inputs(program: ExportedProgram) -> tuple[TensorSpec, ...]:
    """The inputs of an exported program."""
    nodes = _inputs(program)
    opened = dimensions.named(nodes, [node.name for node in nodes], {})
    return tuple(_input_spec(node, found) for node, found in zip(nodes, opened.values(), strict=True))


def _inputs(program: ExportedProgram) -> list[fx.Node]:
    names = set(program.graph_signature.user_inputs)
    return [node for node in program.graph.find_nodes(op="placeholder") if node.name in names]


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
        for node in _inputs(program)
    )


def _export(model: nn.Module, call: Call, dynamic: Dynamic, open_batch: bool = True) -> ExportedProgram:
    def shape(name: str, tensor: Tensor) -> dict[int, Any] | None:
        more: dict[int, Any] = {dimension: Dim.DYNAMIC for dimension in dynamic.get(name, {}) if dimension}
        return ({0: Dim(dimensions.BATCH)} if open_batch else {}) | more if tensor.dim() else None

    try:
        with torch.no_grad(), _inference(model):
            return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=call.map(shape), strict=False)
    except Exception as error:  # the user's own forward runs here and may raise anything
        raise dimensions.explained(error, dynamic) or _explain(error) from error


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


def _make_dynamic(program: ExportedProgram, example: tuple[Tensor, ...], opened: Dynamic, notes: list[str]) -> ExportedProgram:
    """`program` with a dynamic batch, where its graph computes the same for two samples at once; else unchanged, with a note."""
    single = program.module(check_guards=False)
    assert isinstance(single, fx.GraphModule)
    _by_place(single)
    other = tuple(t.flip(tuple(range(t.dim()))) / 2 if t.is_floating_point() and t.dim() else t for t in example)
    doubled = tuple(torch.cat(pair) if pair[0].dim() else pair[0] for pair in zip(example, other, strict=True))
    try:
        call = Call.of(single, doubled)
        dynamic = _export(single, call, dict(zip(call.names, opened.values(), strict=True)))
        both = pytree.tree_leaves(dynamic.module(check_guards=False)(*doubled))
        halves = [pytree.tree_leaves(single(*half)) for half in (example, other)]
        wanted = [torch.cat(pair) for pair in zip(*halves, strict=True)]
        same = all(b.shape == w.shape and torch.allclose(b, w, rtol=1e-4, atol=1e-5) for b, w in zip(both, wanted, strict=True))
    except (CaptureError, InputError, RuntimeError, TypeError, IndexError):
        same = False
    if same:
        return dynamic
    batch = next((spec.shape[0] for spec in program_inputs(program) if spec.shape), 1)
    notes.append(f"the batch stays fixed at {batch}, as it was exported; export with a dynamic batch to change that")
    return program


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


def _input_spec(node: fx.Node, opened: Mapping[int, str]) -> TensorSpec:
    made = node.meta["val"]
    if not isinstance(made, Tensor):
        found = type(made).__name__
        raise InputError(f"input '{node.name}' of the model is no tensor", found=found, action="export it with tensors only")
    shape = tuple(size if isinstance(size, int) else None for size in made.shape)
    dtype = str(made.dtype).removeprefix("torch.")
    return TensorSpec(name=query.tensor_name(node), shape=shape, dtype=dtype, open=tuple(opened.values()))


def _own_parameters(module: fx.GraphModule) -> None:
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = buffer.detach().clone()


def _name_tensors(module: fx.GraphModule, inputs: Sequence[str]) -> None:
    """Give every tensor the path of the module that makes it; `.op` is added where the module is the user's own.

    Inputs have the names `inputs`, and outputs that have keys are called so.
    """
    taken = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    given = dict(zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True))
    keys = outputs.keys(module, taken | set(inputs))
    taken |= {key for node, key in keys.items() if node.op == "call_function"}
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
        node.meta["tensor_name"] = edit.free(name, taken)


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
