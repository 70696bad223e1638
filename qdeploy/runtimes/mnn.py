"""MNN on the CPU: the float model.onnx and its compression parameters, converted by MNN's own converter into an int8 model.

The parameters are a JSON file with input, weight and output scales for each convolution and matrix product, which the converter takes
as `--compressionParamsFile` (MNN's docs/tools/convert.md and tools/converter/user_provide_quant_params.json; the converter of MNN 3.6.1
reads what is inside the "pipeline" of that example, not the whole). MNN's import of QDQ ONNX does not hold: see docs/runtimes.md.

MNN computes convolutions, matrix products and adds as the simulation does, to the last code. Three things differ (MNN 3.6.1):

- A depthwise convolution truncates its bias to a whole multiple of input scale x weight scale.
- Pooling beside a quantized tensor runs in int8, in one scale for input and output: that of its input, or else that of its output,
  which then clips. So a simulation has to let pooling share the scale.
- An average is computed on unsigned codes with a 24-bit reciprocal, and truncated: on average half a step is lost.

The converter's console script installs a logging package and reports each conversion over the network. So its native module is called
instead, in a process of its own, since it aborts on models that it cannot read.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.core.errors import ArtifactError
from qdeploy.runtimes.runtime import Array, Runtime, quiet, runtimes

CONVERT = "import _tools, sys; _tools.mnnconvert(['MNNConvert', *sys.argv[1:]])"


@dataclass(frozen=True, slots=True)
class _Session:
    module: Any
    formats: Any
    outputs: tuple[int, ...]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """All outputs for one batch of `inputs`, both in graph order."""
        const, convert, layout = self.formats.const, self.formats.convert, self.formats.NCHW
        made = self.module.forward([const(np.ascontiguousarray(value), list(value.shape), layout) for value in inputs])
        if len(made) != len(self.outputs):
            raise ArtifactError("MNN cannot run the model", found=f"{len(made)} outputs", allowed=len(self.outputs))
        plain = [convert(value, layout) if rank == 4 else value for value, rank in zip(made, self.outputs, strict=True)]
        return [np.array(value.read()).reshape(value.shape) for value in plain]

    def placement(self) -> Mapping[str, int]:
        """Empty: there is only a CPU."""
        return {}


def _open(path: Path, batch: int, variant: str) -> _Session:
    import onnx

    parameters = _find_parameters(path.parent)
    source = path.with_name("model.onnx")
    graph = onnx.load(source).graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in constants]
    outputs = [value.name for value in graph.output]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.mnn"
        options = ["--bizCode", "qdeploy", "--compressionParamsFile", str(parameters)]
        _convert(target, "-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(target), *options)
        _check_layers(target, parameters)
        with quiet():
            import MNN.expr
            import MNN.nn

            module = MNN.nn.load_module_from_file(str(target), inputs, outputs)
    return _Session(module, MNN.expr, tuple(len(value.type.tensor_type.shape.dim) for value in graph.output))


def _find_parameters(folder: Path) -> Path:
    """The one JSON file in `folder` that holds compression parameters."""
    found = [path for path in sorted(folder.glob("*.json")) if _layers(path)]
    if len(found) != 1 or not (folder / "model.onnx").is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "an empty folder"
        raise ArtifactError("runtime 'mnn' reads model.onnx and compression parameters", found=names, action="quantize for backend mnn")
    return found[0]


def _layers(path: Path) -> list[Any]:
    """The layers of a file of compression parameters; none for any other file."""
    content = json.loads(path.read_text())
    algorithms = content.get("algo", []) if isinstance(content, dict) else []
    return [layer for algorithm in algorithms for layer in algorithm.get("quant_params", {}).get("layer", [])]


def _convert(target: Path, *options: str) -> None:
    """Run MNN's converter, which writes `target`."""
    command = [sys.executable, "-c", CONVERT, *options]
    done = subprocess.run(command, cwd=target.parent, capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        found = said[-1] if said else f"exit code {done.returncode}"
        raise ArtifactError("MNN cannot convert 'model.onnx'", found=found, action="choose another runtime")


def _check_layers(model: Path, parameters: Path) -> None:
    """Raise where the converter, which says nothing of it, left a layer of the parameters float."""
    text = model.with_suffix(".json")
    _convert(text, "-f", "MNN", "--modelFile", str(model), "--JsonFile", str(text))
    ops = json.loads(text.read_text())["oplists"]
    quantized = sum("symmetricQuan" in op.get("main", {}) for op in ops)
    asked = len(_layers(parameters))
    if quantized != asked:
        raise ArtifactError("MNN did not quantize every layer of the parameters", found=quantized, allowed=asked)


runtimes.add(
    "mnn",
    Runtime(
        name="mnn",
        title="MNN, CPU",
        modules=("MNN",),
        packages=("MNN",),
        min_agreement=0.99,
        open=_open,
        isolated=True,
        inside=False,
    ),
)
