"""Reading an ONNX file, with `onnx_ir`: functions inlined, nodes in order, and nothing in it that the importer does not know.

No code of the file is run. Tensors that the file keeps in other files are read from its own folder only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx.defs
import onnx_ir as ir
from google.protobuf.message import Message
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass

from qdeploy.core.errors import InputError
from qdeploy.importing import elementwise, layers, reducing, shaping
from qdeploy.importing.table import OPERATORS

__all__ = ["FIRST_OPSET", "LAST_OPSET", "elementwise", "layers", "read", "reducing", "shaping", "where"]  # the modules fill the table

FIRST_OPSET, LAST_OPSET = 7, 25
"""Opset 7 brought the broadcasting of today; of later ones than the last, the changes are not known here."""

LONGEST_NAME = 1000
COPY_AGAIN = "copy or export the file again"
_OWN = ("PReluChannels", "SpelledLayerNorm")
_RECURRENT = ("LSTM", "GRU", "RNN")
_CONTROL = ("If", "Loop", "Scan", "SequenceMap")
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def supported() -> list[str]:
    """The names of the ONNX operators that can be imported."""
    return sorted({*OPERATORS, "Constant"} - set(_OWN))


def read(path: Path, ends: Sequence[str] = ()) -> ir.Model:
    """The model in the file, up to the tensors `ends`, or all of it.

    Raises `InputError` for one that is damaged, quantized, or has what the importer does not know.
    """
    logging.getLogger("onnx_ir").setLevel(logging.CRITICAL)  # of a damaged graph it would say line by line what the message says
    try:
        proto = onnx.load(path, load_external_data=False)
        _check_texts(proto)
        model = ir.from_proto(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
    except Exception as error:  # protobuf and onnx_ir raise many kinds for damaged files
        raise InputError(f"cannot read '{path}'", found=f"a damaged ONNX file ({_short(error)})", action=COPY_AGAIN) from error
    _check_external(path, model)
    try:
        made = InlinePass()(model)
        made.model.graph.sort()
    except Exception as error:  # functions that call each other in a circle, or that are not there
        raise InputError(
            f"cannot order the nodes of '{path}'", found=_short(error), action="check it with onnx.checker, or export it again"
        ) from error
    _check_names(path, made.model)
    if ends:
        _end_at(path, made.model, ends)
    _check(path, made.model)
    return made.model


def _check_texts(message: Message) -> None:
    """`ValueError` for a text that is not in UTF-8: protobuf gives its bytes instead, which nobody expects."""
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        for item in (value,) if isinstance(value, str | bytes | Message) else value:
            if isinstance(item, Message):
                _check_texts(item)
            elif isinstance(item, bytes):
                raise ValueError(f"the {field.name} {item[:40]!a} is no text in UTF-8")


def _end_at(path: Path, model: ir.Model, ends: Sequence[str]) -> None:
    """Return the tensors `ends` instead of the file's outputs, and drop what these do not need."""
    made = {value.name: value for node in model.graph for value in node.outputs if value.name}
    for name in ends:
        if name not in made:
            near = get_close_matches(name, made, n=1)
            action = f"did you mean '{near[0]}'?" if near else "look the names up, as with Netron"
            raise InputError(f"'{path}' cannot end at '{name}'", found="no such tensor", allowed="what a node makes", action=action)
    taken = [value for value in model.graph.inputs if value.uses()]
    model.graph.outputs[:] = [made[name] for name in dict.fromkeys(ends)]
    RemoveUnusedNodesPass()(model)
    for value in taken:
        if not value.uses():
            model.graph.inputs.remove(value)


def where(node: ir.Node, opset: int | None) -> str:
    """A node in words: its name, operator, domain and opset."""
    return f"node '{node.name}' ({node.op_type}, domain {node.domain or 'ai.onnx'}, opset {opset})"


def _short(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return text if len(text) <= 300 else text[:297] + "..."


def _check_external(path: Path, model: ir.Model) -> None:
    for tensor in _tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = str(tensor.location)
        parts = PurePosixPath(location).parts + PureWindowsPath(location).parts
        if PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive or ".." in parts:
            found = f"'{location}', for tensor '{tensor.name}'"
            raise InputError(
                f"'{path}' names a file outside of its folder", found=found, action="export it again, with its data beside it"
            )
        target = (path.parent / location).resolve()
        if not target.is_relative_to(path.parent.resolve()):
            found = f"'{location}', a link to '{target}', for tensor '{tensor.name}'"
            raise InputError(f"'{path}' names a file outside of its folder", found=found, action="put the data itself beside it")
        if not (path.parent / location).is_file():
            found = f"no '{location}', which holds the tensor '{tensor.name}'"
            raise InputError(f"'{path}' keeps tensors in a file that is missing", found=found, action="put it beside the ONNX file")


def _tensors(model: ir.Model) -> Iterator[object]:
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield from (value.const_value for value in graph.initializers.values())
        for node in graph:
            yield from (attribute.value for attribute in node.attributes.values() if isinstance(attribute, ir.Attr))


def _check(path: Path, model: ir.Model) -> None:
    opset = model.opset_imports.get("")
    uses = any(not node.domain for node in model.graph)
    if uses and (opset is None or not FIRST_OPSET <= opset <= LAST_OPSET):
        allowed = f"{FIRST_OPSET} to {LAST_OPSET}"
        raise InputError(f"'{path}' is of an opset that is not supported", found=opset, allowed=allowed, action="export it again")
    if not model.graph.outputs:
        raise InputError(f"'{path}' returns nothing", found="a graph without outputs", action="export a model")
    for value in model.graph.outputs:
        if value.producer() is None and not value.is_graph_input() and not value.is_initializer():
            raise InputError(f"'{path}' returns '{value.name}'", found="a tensor that nothing makes", action=COPY_AGAIN)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            found = f"{value.dtype.name} in '{value.name}'"
            raise InputError(f"'{path}' is not in float32", found=found, allowed="float32", action="export the model in float32")
    for node in model.graph:
        _check_node(path, node, model.opset_imports.get(node.domain, opset))
    unknown = [n for n in model.graph if n.domain or n.op_type not in {*OPERATORS, "Constant"} - set(_OWN)]
    if unknown:
        known = supported()
        near = [f"nearest: {name}" for name in get_close_matches(unknown[0].op_type, known, n=1)]
        places = [f"{where(node, model.opset_imports.get(node.domain, opset))}, which reads {_reads(node)}" for node in unknown[:3]]
        more = f", and {len(unknown) - 3} more nodes" if len(unknown) > 3 else ""
        raise InputError(
            f"'{path}' has operators that are not supported",
            found=", ".join([*places, *near]) + more,
            allowed=", ".join(known),
            action=f"end the model before them, with '{path}:TENSOR,TENSOR', export it again without them, or give the PyTorch model",
        )


def _reads(node: ir.Node) -> str:
    """The tensors that `node` reads of other nodes, and where it reads none, of the inputs."""
    values = [value for value in node.inputs if value is not None and not value.is_initializer()]
    return ", ".join(f"'{value.name}'" for value in values if value.producer() is not None) or "inputs only"


def _check_node(path: Path, node: ir.Node, opset: int | None) -> None:
    """What has a reason of its own."""
    place = f"'{path}', {where(node, opset)}"
    if node.op_type in _QUANTIZED or "QLinear" in node.op_type or node.op_type.endswith("Integer"):
        raise InputError(
            f"{place}: the model is quantized already", allowed="a float model", action="give the float model that it was made from"
        )
    if node.op_type in _RECURRENT:
        raise InputError(
            f"{place}: recurrent layers are not supported", allowed=", ".join(supported()), action="give a model without them"
        )
    if node.op_type in _CONTROL:
        raise InputError(
            f"{place}: control flow is not supported",
            allowed="graphs without If, Loop and Scan",
            action="export the model with torch.onnx.export(dynamo=True), or simplify it with onnxsim",
        )
    _check_schema(place, node, opset)
    for value in node.inputs:
        if value is not None and value.producer() is None and not value.is_graph_input() and not value.is_initializer():
            raise InputError(f"{place}: an input that nothing makes", found=f"'{value.name}'", action=COPY_AGAIN)


def _check_schema(place: str, node: ir.Node, opset: int | None) -> None:
    """`InputError` for too few or too many inputs, or an attribute of another type than ONNX defines; what it has not is told later."""
    if node.domain or opset is None or not onnx.defs.has(node.op_type):
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:  # no such operator in this opset
        return
    needed = node.inputs[: schema.min_input]
    if len(needed) < schema.min_input or None in needed or len(node.inputs) > schema.max_input:
        allowed = f"{schema.min_input} to {schema.max_input}" if schema.max_input < 99 else f"{schema.min_input} or more"
        raise InputError(f"{place}: the wrong number of inputs", found=sum(v is not None for v in node.inputs), allowed=allowed)
    for name, attribute in node.attributes.items():
        wanted = str(schema.attributes[name].type).rpartition(".")[2] if name in schema.attributes else attribute.type.name
        if attribute.type.name != wanted:
            raise InputError(f"{place}: attribute '{name}' is of the wrong type", found=attribute.type.name, allowed=wanted)


def _check_names(path: Path, model: ir.Model) -> None:
    """`InputError` for a name that no exporter writes: these get into other files and into messages."""
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    sizes = [size.value or "" for value in graph.inputs if value.shape is not None for size in value.shape if not isinstance(size, int)]
    for name in (*(value.name or "" for value in values), *(node.name or "" for node in graph), *sizes):
        if not name.isprintable() or len(name) > LONGEST_NAME:
            found = ascii(name[:40]) + (f" and {len(name) - 40} more characters" if len(name) > 40 else "")
            allowed = f"up to {LONGEST_NAME} characters that can be printed"
            raise InputError(f"'{path}' has a name that cannot be used", found=found, allowed=allowed, action="export it again")
