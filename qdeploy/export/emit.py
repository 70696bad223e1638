"""From the captured graph to ONNX: one export for all targets, and views of it.

The export has a marker node `qdeploy::edge` on every edge of a float tensor, with the names of the tensor and of its reader. The float
view drops them; the QDQ view of a target puts the nodes of `lower` on the edges that its plan quantizes. In both an encoded tensor has
the name of its encoding; where a graph output is quantized, that name is the output's and the tensor before is `<name>_float`.
Parameters have the values of the target's own simulation.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import rewriter
from onnxscript.rewriter import MatchResult
from torch import fx

from qdeploy.capture import outputs
from qdeploy.capture.capture import Captured
from qdeploy.core.backend import Format
from qdeploy.core.errors import CaptureError
from qdeploy.core.ops import MAX_POOL, MOVE
from qdeploy.core.spec import Encoding
from qdeploy.export import artifact, edge_markers
from qdeploy.export.lower import Lowering
from qdeploy.export.onnx_file import half_precision, simplify_float
from qdeploy.export.onnx_functions import DOMAIN, add_functions
from qdeploy.export.stored import Settled, encodings_in_file, settle
from qdeploy.export.translations import table
from qdeploy.graph import edit, query
from qdeploy.numerics import arith
from qdeploy.numerics.quantizer import Average
from qdeploy.simulation.prepared import Prepared

_KEEP = (MOVE | MAX_POOL) - {"pad"}
"""Ops whose outputs are some of their inputs' values."""
_OUTPUT = "<output>"
_exported: WeakKeyDictionary[fx.GraphModule, dict[int, ir.Model]] = WeakKeyDictionary()
"""The exports of each captured graph, by opset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What one target gets: ONNX files by name, encodings of the tensors as they are there, the bytes of the float model, notes."""

    models: dict[str, bytes]
    encodings: tuple[Encoding, ...]
    float_bytes: int
    notes: list[str]


def files(prepared: Prepared, form: Format, encodings: Sequence[Encoding]) -> Files:
    """model.onnx as `form` has it, and model.sim.onnx where that computes something else."""
    exported = export(prepared.captured, prepared.backend.opset)
    plain, _ = _settled(float_view(exported, prepared))
    literal, forms = _settled(qdq_view(exported, prepared, encodings))
    in_file = encodings_in_file(encodings, forms)
    notes = []
    if form.model == "qdq":
        model, _ = _settled(qdq_view(exported, prepared, encodings, literal=False))
    elif form.model == "float":
        clipped, _ = _settled(float_view(exported, prepared, encodings if form.clip_weights else ()))
        model, note = simplify_float(clipped, [e.tensor for e in in_file])
        notes.append(note)
    else:
        model = half_precision(_settled(float_view(exported, prepared, encodings))[0])
    made = {artifact.MODEL: model}
    if prepared.plan.cuts:
        made[artifact.TAIL], _ = _settled(tail_view(exported, prepared))
        names = ", ".join(prepared.plan.cuts)
        notes.append(f"{artifact.MODEL} ends at {names}: run {artifact.TAIL} on the host, in float, for what is behind")
    models = made if model == literal else made | {artifact.SIMULATION: literal}
    return Files(models=models, encodings=in_file, float_bytes=len(plain), notes=notes)


def _settled(view: ir.Model) -> tuple[bytes, list[Settled]]:
    """A view with its parameters in the form in which they are read, serialized."""
    forms = settle(view)
    return to_bytes(view), forms


def export(captured: Captured, opset: int) -> ir.Model:
    """The captured graph as ONNX with markers, all names in place, nothing in it of where it was made. Made once."""
    known = _exported.setdefault(captured.module, {})
    if opset not in known:
        known[opset] = _export(captured, opset)
    return known[opset]


def _export(captured: Captured, opset: int) -> ir.Model:
    module = _marked(captured.module)
    shapes = tuple(spec.names or None for spec in captured.inputs)
    with _quiet(), _exact_rules(), _few_matches(), _no_stack_traces():
        try:
            program = torch.onnx.export(
                module,
                captured.example,
                dynamo=True,
                dynamic_shapes=shapes if any(shapes) else None,
                opset_version=opset,
                custom_translation_table={torch.ops.qdeploy.edge.default: edge_markers.translate, **table(module)},
                input_names=[spec.name for spec in captured.inputs],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise CaptureError("torch.onnx.export cannot translate the model", found=f"{type(cause).__name__}: {cause}") from error
    assert program is not None
    model = program.model
    edge_markers.restore_names(model, outputs.names(captured.module))
    return model


def _marked(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph with a marker on every edge of a float tensor."""
    copy = edit.copy(module)
    for node in list(copy.graph.nodes):
        if not query.is_float(node) or node.op not in ("placeholder", "call_function", "get_attr"):
            continue
        for user in list(node.users):
            with copy.graph.inserting_before(user):
                arguments = (node, query.tensor_name(node), query.reader_name(user))
                marker = copy.graph.call_function(torch.ops.qdeploy.edge.default, arguments)
            marker.meta["val"] = query.value(node)
            user.replace_input_with(node, marker)
    copy.recompile()
    return copy


def float_view(exported: ir.Model, prepared: Prepared, clip: Sequence[Encoding] = ()) -> ir.Model:
    """The float model, its parameters confined to the values that the grids of `clip` reach (and rounded, where they are float16)."""
    model = _fresh_copy(exported, prepared)
    for encoding in clip:
        if encoding.role != "activation":
            _confine(model.graph.initializers[encoding.tensor], encoding)
    for marker in edge_markers.find(model):
        _bypass(model, marker)
    model.opset_imports.pop(DOMAIN, None)
    return model


def device_outputs(prepared: Prepared) -> list[str]:
    """Names of the outputs of model.onnx: those of the model that are made in it, then the tensors where it is cut."""
    nodes = dict(zip(outputs.names(prepared.captured.module), query.outputs(prepared.captured.module.graph), strict=True))
    return [name for name, node in nodes.items() if query.tensor_name(node) not in prepared.plan.host] + list(prepared.plan.cuts)


def tail_view(exported: ir.Model, prepared: Prepared) -> ir.Model:
    """What lies behind the cuts of the plan, in float: from the tensors there to the outputs of the model."""
    model = _with_parameters(exported, prepared)
    for marker in edge_markers.find(model):
        _bypass(model, marker)
    model.opset_imports.pop(DOMAIN, None)
    named = {str(value.name): value for value in edge_markers.values(model)}
    for cut in prepared.plan.cuts:
        made = named[cut]
        entry = ir.Value(name=cut, shape=made.shape, type=made.type)
        made.replace_all_uses_with(entry)
        made.name = f"{cut}_device"
        model.graph.inputs.append(entry)
    device = set(device_outputs(prepared))
    model.graph.outputs[:] = [value for value in model.graph.outputs if value.name not in device]
    RemoveUnusedNodesPass()(model)
    model.graph.inputs[:] = [value for value in model.graph.inputs if value.uses()]
    return model


def qdq_view(exported: ir.Model, prepared: Prepared, encodings: Sequence[Encoding], literal: bool = True) -> ir.Model:
    """The simulation in ONNX; without `literal` in standard operators only, which round half to even and divide averages exactly."""
    model = _fresh_copy(exported, prepared)
    taken = {str(named.name) for named in (*edge_markers.values(model), *model.graph)}
    lowering = Lowering(model, taken, literal)
    by_name = {encoding.tensor: encoding for encoding in encodings}
    planned = {tensor.tensor: tensor for tensor in prepared.plan.quantized}
    groups: dict[str, list[ir.Node]] = {}
    for marker in edge_markers.find(model):
        groups.setdefault(edge_markers.text(marker, "tensor"), []).append(marker)
    for tensor, markers in groups.items():
        readers = set(planned[tensor].readers) if tensor in planned else set()
        quantized = []
        for marker in markers:
            if edge_markers.text(marker, "reader") in readers:
                quantized.append(marker)
            else:
                _bypass(model, marker)
        if quantized:
            # what only passes through is on the grid already, unless it is averaged or padded
            on_grid = not planned[tensor].observe and planned[tensor].op in _KEEP
            _lower(model, lowering, by_name[tensor], quantized, on_grid, prepared.quantizers[tensor].averages.get(tensor))
    model.opset_imports.pop(DOMAIN, None)
    add_functions(model, lowering.functions, prepared.backend.opset)
    return model


def _lower(
    model: ir.Model, lowering: Lowering, encoding: Encoding, markers: Sequence[ir.Node], on_grid: bool, average: Average | None
) -> None:
    """Put the nodes of one encoding on the edges `markers`."""
    raw = markers[0].inputs[0]
    assert raw is not None
    stored = raw.name in model.graph.initializers
    if stored:
        assert raw.const_value is not None
        nodes = lowering.parameter(raw.const_value.numpy(), encoding)
    else:
        nodes = lowering.activation(raw, encoding, on_grid, average)
    model.graph.insert_before(markers[0], nodes)
    last = nodes[-1].outputs[0]
    if not stored and any(marker.outputs[0].name == encoding.tensor for marker in markers):
        raw.name = lowering.fresh(f"{encoding.tensor}_float")
    for marker in markers:
        _replace(model, marker, last, encoding.tensor)
    if stored and not raw.uses():
        del model.graph.initializers[encoding.tensor]
        last.name = encoding.tensor


def _bypass(model: ir.Model, marker: ir.Node) -> None:
    raw = marker.inputs[0]
    assert raw is not None
    _replace(model, marker, raw, edge_markers.text(marker, "tensor"))


def _replace(model: ir.Model, marker: ir.Node, value: ir.Value, tensor: str) -> None:
    """`value` takes the place of a marker. As a graph output it has the output's name, where it is not one already or a parameter."""
    result = marker.outputs[0]
    for position, output in enumerate(model.graph.outputs) if result.is_graph_output() else ():
        if output is result:
            name = str(result.name)
            if name != tensor:
                copy = ir.node("Identity", [value], name=f"{name}_Identity")
                model.graph.insert_before(marker, [copy])
                value_out = copy.outputs[0]
            else:
                value_out = value
            value_out.name, value_out.shape, value_out.type = name, result.shape, result.type
            model.graph.outputs[position] = value_out
    result.replace_all_uses_with(value)
    model.graph.remove(marker, safe=True)


def _fresh_copy(exported: ir.Model, prepared: Prepared) -> ir.Model:
    """A copy of an export with the parameters of `prepared`, which ends where its plan does."""
    model = _with_parameters(exported, prepared)
    host, cuts = set(prepared.plan.host), list(prepared.plan.cuts)
    if not cuts:
        return model
    ends: dict[str, ir.Value] = {}
    for marker in edge_markers.find(model):
        tensor = edge_markers.text(marker, "tensor")
        if tensor in cuts and tensor not in ends and edge_markers.text(marker, "reader") in host:
            end = ends[tensor] = marker.outputs[0]
            end.name, end.shape, end.type = tensor, marker.inputs[0].shape, marker.inputs[0].type  # type: ignore[union-attr]
    kept = [value for value in model.graph.outputs if value.name in device_outputs(prepared)]
    model.graph.outputs[:] = [*kept, *(ends[cut] for cut in cuts)]
    RemoveUnusedNodesPass()(model)
    return model


def _with_parameters(exported: ir.Model, prepared: Prepared) -> ir.Model:
    model = exported.clone()
    for marker in edge_markers.find(model):
        raw = marker.inputs[0]
        assert raw is not None
        if raw.name in model.graph.initializers:
            values = query.parameter(prepared.module, edge_markers.text(marker, "tensor")).detach().cpu().numpy()
            raw.const_value = ir.tensor(np.array(values, order="C"), name=raw.name)
    return model


def _confine(value: ir.Value, encoding: Encoding) -> None:
    assert value.const_value is not None
    value.const_value = ir.tensor(confined(value.const_value.numpy(), encoding), name=value.name)


def confined(array: NDArray[Any], encoding: Encoding) -> NDArray[Any]:
    """The numbers of a parameter, confined to the values that its grid reaches (and rounded, where they are float16)."""
    if encoding.spec.linear or encoding.spec.grid == "log":
        shape = [-1 if axis == encoding.spec.axis else 1 for axis in range(array.ndim)]
        limited: NDArray[Any] = np.clip(array, encoding.low.reshape(shape), encoding.high.reshape(shape)).astype(np.float32)
        return limited
    scale, zero = torch.from_numpy(encoding.scale.copy()), torch.from_numpy(encoding.zero_point.copy())
    rounded: NDArray[Any] = arith.fake_quantize(torch.from_numpy(np.array(array)), scale, zero, encoding.spec).numpy()
    return rounded


_INEXACT = frozenset({"CastCast", "FuseSuccessiveClip", "FuseSuccessiveClipRelu", "FuseSuccessiveReluClip"})
_INEXACT |= {f"FuseBatchNormInto{layer}" for layer in ("Conv", "ConvTranspose", "Gemm")}
"""Rules of the exporter that change numbers: two roundings become one, limits that exclude each other change places, and weights are
multiplied in float32."""


@contextmanager
def _exact_rules() -> Iterator[None]:
    """Within the block the exporter's rules leave all numbers as they are.

    They take a number for 0 or 1 that is less than 1e-8 or 1e-5 away from it: log(x + 1e-10) would become log(x).
    """
    rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", ())
    numbers = [given for rule in rules for node in rule._matcher.pattern for given in node.inputs if hasattr(given, "_abs_tol")]
    before = [(number, number._rel_tol, number._abs_tol) for number in numbers]
    for number in numbers:
        number._rel_tol = number._abs_tol = 0.0
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if rule.name not in _INEXACT)
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules
        for number, relative, absolute in before:
            number._rel_tol, number._abs_tol = relative, absolute


@contextmanager
def _few_matches() -> Iterator[None]:
    """Within the block the exporter's rules try only what can match.

    Those that match several nodes at once list all nodes of the graph for every node, whatever its operator: in a deep network most
    of the export would be these lists.
    """
    matchers = [rule._matcher for rule in getattr(rewriter, "_DEFAULT_REWRITE_RULES", ())]
    several = [matcher for matcher in matchers if not matcher.pattern.has_single_output_node]

    def checked(matcher: Any) -> Callable[..., Any]:
        wanted, match = matcher.pattern.output_nodes[0].op_identifier(), matcher.match

        def first(model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
            possible = wanted is None or node.op_identifier() == wanted
            return match(model, graph, node, **options) if possible else MatchResult().fail("another operator")

        return first

    for matcher in several:
        matcher.match = checked(matcher)
    try:
        yield
    finally:
        for matcher in several:
            del matcher.match  # its class has one


@contextmanager
def _no_stack_traces() -> Iterator[None]:
    """Leave out the stack trace of every node, which torch's tracer collects and `edge_markers` drops."""
    before = getattr(fx.config, "do_not_emit_stack_traces", None)  # not in every release
    if before is not None:
        fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        if before is not None:
            fx.config.do_not_emit_stack_traces = before


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of packages and of its own internals; failures are exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def to_bytes(model: ir.Model) -> bytes:
    """The serialized ONNX model."""
    data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return data
