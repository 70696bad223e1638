"""TVM: the ONNX file imported into Relax and compiled for the CPU with the generic `llvm` target.

The generic target is faster here than one for the processor at hand (16 against 29 ms an image for a ResNet-20 on a Zen 5).
Compilation takes a few seconds a file and batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.core.errors import ArtifactError
from qdeploy.runtimes.runtime import Array, Runtime, quiet, runtimes


@dataclass(frozen=True, slots=True)
class _Session:
    machine: Any

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """All outputs for one batch of `inputs`, both in graph order."""
        import tvm

        result = self.machine["main"](*(tvm.runtime.tensor(value) for value in inputs))
        tensors = [result] if isinstance(result, tvm.runtime.Tensor) else result
        return [tensor.numpy() for tensor in tensors]

    def placement(self) -> Mapping[str, int]:
        """Empty: there is only a CPU."""
        return {}


def _open(path: Path, batch: int, variant: str) -> _Session:
    import onnx

    model = onnx.load(path)
    shapes, types = {}, {}
    constants = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name not in constants:
            tensor = value.type.tensor_type
            shapes[value.name] = [dim.dim_value if dim.HasField("dim_value") else batch for dim in tensor.shape.dim]
            types[value.name] = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    with quiet():  # TVM warns on stderr about each Gather of a known shape
        import tvm
        from tvm import relax
        from tvm.relax.frontend.onnx import from_onnx

        try:
            module = from_onnx(model, shape_dict=shapes, dtype_dict=types, keep_params_in_input=False)
        except tvm.error.OpError as error:
            raise ArtifactError(f"TVM cannot import '{path.name}'", found=str(error), action="choose another runtime") from error
        return _Session(relax.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu()))


runtimes.add(
    "tvm",
    Runtime(
        name="tvm",
        title="Apache TVM, CPU",
        modules=("tvm",),
        packages=("apache-tvm",),
        min_agreement=0.999,
        exact=True,
        open=_open,
        isolated=True,
    ),
)
