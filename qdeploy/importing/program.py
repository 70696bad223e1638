"""The door of the importer: from a path to an exported program, or to a module where sizes other than the batch are open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from qdeploy.capture.inputs import BATCH, NAMES, OPEN, check_sizes
from qdeploy.core.errors import CaptureError, InputError, QDeployError
from qdeploy.importing import fuse
from qdeploy.importing.elementwise import torch_dtype
from qdeploy.importing.graph import Builder
from qdeploy.importing.read import read


def load(path: Path, ends: Sequence[str] = ()) -> ExportedProgram | fx.GraphModule:
    """The model in the ONNX file at `path`, up to the tensors `ends`, or all of it.

    An exported program, whose batch is open where the file's is; where other sizes are open as well, the module, to be exported with
    the caller's example, and what is open in its `meta`. Raises `InputError` and `CaptureError` with the node that cannot be imported.
    """
    model = read(path, ends)
    inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    shapes = [_shape(path, value) for value in inputs]
    if not inputs:
        raise InputError(f"'{path}' takes nothing", found="a graph without inputs", action="export a model with inputs")
    try:
        module = Builder(model, loose=not any(shape and shape[0] is None for shape in shapes)).module()
    except QDeployError as error:
        raise type(error)(f"'{path}': {error}") from error
    fuse.fuse(module)
    if any(size is None for shape in shapes for size in shape[1:]):
        module.meta[OPEN] = _left_open(module, inputs)
        return module
    example = tuple(_example(value, shape) for value, shape in zip(inputs, shapes, strict=True))
    program = _export(path, module, example, shapes)
    program.graph_module.meta[NAMES] = module.meta[NAMES]
    return program


def _shape(path: Path, value: ir.Value) -> list[int | None]:
    if not isinstance(value.type, ir.TensorType) or value.shape is None:
        found = "no tensor" if value.type is not None and not isinstance(value.type, ir.TensorType) else "no shape"
        raise InputError(
            f"'{path}': input '{value.name}' must be a tensor with known dimensions", found=found, action="export it again"
        )
    sizes = [size if isinstance(size, int) else None for size in value.shape]
    check_sizes(f"'{path}': input '{value.name}'", sizes, least=0)
    return sizes


def _left_open(module: fx.GraphModule, inputs: Sequence[ir.Value]) -> dict[str, dict[int, str]]:
    """The sizes beyond the batch that the file leaves open, by the module's inputs, with the file's names where these are usable."""
    found: dict[str, dict[int, str]] = {}
    for node, value in zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        assert value.shape is not None
        for dimension, size in enumerate(value.shape):
            if dimension and not isinstance(size, int):
                name = str(size.value or "")
                usable = name.isidentifier() and name != BATCH
                found.setdefault(str(value.name), {})[dimension] = name if usable else f"{node.name}_{dimension}"
    return found


def _example(value: ir.Value, shape: list[int | None]) -> Tensor:
    assert value.dtype is not None
    sizes = [2 if size is None else size for size in shape]  # torch.export takes a batch of 1 for a constant
    dtype = torch_dtype(value.dtype)
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.zeros(sizes, dtype=dtype)


def _export(path: Path, module: fx.GraphModule, example: tuple[Tensor, ...], shapes: list[list[int | None]]) -> ExportedProgram:
    dynamic: Any = tuple({0: Dim("batch")} if shape and shape[0] is None else None for shape in shapes)
    try:
        with torch.no_grad():
            return torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch raises many kinds
        _find(path, module, example)
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        open_batch = any(dynamic)
        raise CaptureError(
            f"'{path}': torch.export cannot capture the imported graph" + (" with an open batch" if open_batch else ""),
            found=f"{type(error).__name__}: {first}",
            action="export the ONNX file with a fixed batch, or give the PyTorch model itself"
            if open_batch
            else "give the PyTorch model",
        ) from error


def _find(path: Path, module: fx.GraphModule, example: tuple[Tensor, ...]) -> None:
    """Raise the error of the node that fails on the example, if one does."""
    try:
        with torch.no_grad():
            _Finder(module).run(*example)
    except QDeployError as error:
        message = str(error).partition("\n")[0]  # the interpreter adds lines of its own
        raise type(error)(f"'{path}': {message}") from error


class _Finder(fx.Interpreter):
    """Runs node by node, and says at which one it failed."""

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except QDeployError as error:
            raise type(error)(f"{n.meta.get('where', n.name)}: {error}") from error
        except Exception as error:
            found = " ".join(str(error).split())[:300]
            raise CaptureError(
                f"{n.meta.get('where', n.name)} cannot be computed", found=found, action="check the ONNX file"
            ) from error
