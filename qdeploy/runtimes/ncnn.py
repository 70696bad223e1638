"""ncnn on the CPU: the float model.onnx and its scale table, turned into ncnn's own int8 model as its tools do it.

ncnn reads no QuantizeLinear, so the pair is what it gets. No PyPI package has `onnx2ncnn` or `ncnn2int8`: `pnnx`, from the same
project, converts the float ONNX file, and the step of `ncnn2int8` is done here. That step gives each layer of the table int8 weights
(`ncnn.quantize_to_int8`: multiply, round half away from zero, clamp to +-127), puts the scales behind its bias, and sets
`int8_scale_term`; layers that are not in the table stay float. pnnx renames layers, so they are found by their weights, which it copies
bit by bit. Layout of param and bin: ncnn's docs/developer-guide/operators.md, docs/developer-guide/param-and-model-file-structure.md,
src/modelbin.cpp and tools/quantize/ncnn2int8.cpp.

"packed" is how ncnn runs where nothing is said. On x86 it then takes a 12-bit reciprocal of the scales in depthwise convolutions, and
has returned garbage for grouped ones with a multiple of 8 channels a group (ncnn 1.0.20261020). "plain" switches the packed layout and
half-precision storage off, and computes the table to float32 rounding.
"""

from __future__ import annotations

import importlib.util
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.core.errors import ArtifactError, NotInstalledError
from qdeploy.runtimes.runtime import Array, Runtime, quiet, runtimes

FLOAT, INT8 = (np.uint32(tag).tobytes() for tag in (0, 0x000D4B38))
"""What stands in the bin before weights that are float32, and int8."""
WEIGHTED = {"Convolution": ("5", 2), "ConvolutionDepthWise": ("5", 1), "InnerProduct": ("1", 2)}
"""Layer type: the key of its bias flag, and the value of its `int8_scale_term`."""
SCALE_TERM = "8"
PLAIN = ("use_packing_layout", "use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage")

Table = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class _Session:
    net: Any
    outputs: tuple[tuple[int, ...], ...]

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """All outputs for one batch of `inputs`, both in graph order. ncnn has no batch: the samples run in turn."""
        samples = [self._sample(sample) for sample in zip(*inputs, strict=True)]
        return [np.stack(parts).reshape(-1, *shape) for parts, shape in zip(zip(*samples, strict=True), self.outputs, strict=True)]

    def _sample(self, sample: Sequence[Array]) -> list[Array]:
        import ncnn

        extractor = self.net.create_extractor()
        for index, value in enumerate(sample):
            extractor.input(f"in{index}", ncnn.Mat(np.ascontiguousarray(value)).clone())
        results = [extractor.extract(f"out{index}") for index in range(len(self.outputs))]
        if any(code for code, _ in results):
            raise ArtifactError("ncnn cannot run the model", found=f"return codes {[code for code, _ in results]}")
        return [np.array(mat) for _, mat in results]

    def placement(self) -> Mapping[str, int]:
        """Empty: there is only a CPU."""
        return {}


def _open(path: Path, batch: int, variant: str) -> _Session:
    import onnx

    with quiet():
        import ncnn

    table = _read_table(path.parent)
    model = onnx.load(path.with_name("model.onnx"))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        onnx.save(model, place / "model.onnx")
        _convert(place, model)
        param, blob = (place / f"model.ncnn.{suffix}" for suffix in ("param", "bin"))
        text, data = quantize(param.read_text(), blob.read_bytes(), list(_weights(model)), table)
        param.write_text(text)
        blob.write_bytes(data)
        with quiet():
            net = ncnn.Net()
            for option in PLAIN if variant == "plain" else ():
                setattr(net.opt, option, False)
            if net.load_param(str(param)) or net.load_model(str(blob)):
                layers = {line.split()[0] for line in text.splitlines()[2:] if line.strip()}
                lacking = ", ".join(sorted(layer for layer in layers if ncnn.layer_to_index(layer) < 0)) or "no layer type is unknown"
                raise ArtifactError("ncnn cannot load the model that pnnx made", found=lacking, action="choose another runtime")
    return _Session(net, tuple(shape[1:] for shape in _shapes(model.graph.output)))


def _read_table(folder: Path) -> Table:
    """The one scale table in `folder`: a line each of a name and multipliers, 1/scale."""
    tables = sorted(folder.glob("*.table"))
    if len(tables) != 1 or not (folder / "model.onnx").is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())) or "an empty folder"
        raise ArtifactError("runtime 'ncnn' reads model.onnx and a scale table", found=names, action="quantize for backend ncnn")
    lines = (line.split() for line in tables[0].read_text().splitlines())
    return {words[0]: np.array(words[1:], np.float32) for words in lines if words and not words[0].startswith("#")}


def _shapes(values: Sequence[Any]) -> list[tuple[int, ...]]:
    """The shapes of graph inputs or outputs, with 1 for the batch."""
    dims = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values]
    for value, shape in zip(values, dims, strict=True):
        if not shape or 0 in shape[1:]:
            raise ArtifactError(f"ncnn needs fixed shapes, and '{value.name}' has none", action="choose another runtime")
    return [(1, *shape[1:]) for shape in dims]


def _convert(place: Path, model: Any) -> None:
    """Turn model.onnx in `place` into model.ncnn.param and model.ncnn.bin there."""
    spec = importlib.util.find_spec("pnnx")
    if spec is None or not spec.submodule_search_locations:
        raise NotInstalledError("runtime 'ncnn' needs pnnx, which is not installed", action="pip install pnnx")
    constants = {tensor.name for tensor in model.graph.initializer}
    shapes = _shapes([value for value in model.graph.input if value.name not in constants])
    form = ",".join(f"[{','.join(map(str, shape))}]" for shape in shapes)
    program = Path(spec.submodule_search_locations[0]) / "pnnx"
    done = subprocess.run(
        [program, "model.onnx", f"inputshape={form}", "fp16=0"], cwd=place, capture_output=True, text=True, check=False
    )
    if done.returncode or not (place / "model.ncnn.param").is_file():
        raise ArtifactError("pnnx cannot convert 'model.onnx'", found=done.stderr[-300:].strip() or f"exit code {done.returncode}")


def _weights(model: Any) -> Iterator[tuple[str, Array]]:
    """Each node that has constant weights, with these as ncnn stores them: output channel first."""
    from onnx import helper, numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in constants:
            weight = numpy_helper.to_array(constants[node.input[1]]).astype(np.float32)
            options = {option.name: helper.get_attribute_value(option) for option in node.attribute}
            across = node.op_type == "MatMul" or (node.op_type == "Gemm" and not options.get("transB", 0))
            yield node.name, np.ascontiguousarray(weight.swapaxes(-1, -2) if across else weight)


def quantize(param: str, blob: bytes, weights: Sequence[tuple[str, Array]], table: Table) -> tuple[str, bytes]:
    """The param and bin of the int8 model, for those of a float one and the scale table of the nodes with these `weights`.

    Raises `ArtifactError` where a node of the table cannot be found again.
    """
    places = sorted(_find(blob, weights))
    lines = param.splitlines()
    layers = [index for index, line in enumerate(lines) if line.split()[:1] and line.split()[0] in WEIGHTED]
    named = {name.removesuffix("_param_0") for name in table}
    missing = named - {name for _, name, _ in places}
    if missing or len(layers) != len(places):
        found = ", ".join(sorted(missing)) or f"{len(layers)} layers for {len(places)} nodes"
        raise ArtifactError("pnnx left no layer with the weights of a node", found=found, action="choose another runtime")
    parts, done = [], 0
    for index, (start, name, weight) in zip(layers, places, strict=True):
        kind, layer, _, _, *rest = lines[index].split()
        options = dict(word.split("=", 1) for word in rest if "=" in word)
        if name not in named:
            continue
        bias, term = WEIGHTED[kind]
        multipliers = table[f"{name}_param_0"]
        rows = int(options["7" if kind == "ConvolutionDepthWise" else "0"])
        if len(multipliers) != rows:
            raise ArtifactError(f"the table of '{name}' does not fit layer '{layer}'", found=len(multipliers), allowed=rows)
        behind = start + len(FLOAT) + weight.nbytes
        end = behind + 4 * len(weight) * int(options.get(bias, 0))
        parts += [blob[done:start], INT8, _codes(weight, multipliers), blob[behind:end], multipliers.tobytes(), table[name].tobytes()]
        lines[index] += f" {SCALE_TERM}={term}"
        done = end
    return "\n".join(lines) + "\n", b"".join([*parts, blob[done:]])


def _find(blob: bytes, weights: Sequence[tuple[str, Array]]) -> Iterator[tuple[int, str, Array]]:
    """Where the weights of each node begin. Nodes with equal weights come in the order of the graph."""
    taken: set[int] = set()
    for name, weight in weights:
        pattern = FLOAT + weight.tobytes()
        start = blob.find(pattern)
        while start in taken:
            start = blob.find(pattern, start + 1)
        if start >= 0:
            taken.add(start)
            yield start, name, weight


def _codes(weight: Array, multipliers: Array) -> bytes:
    """int8 codes of `weight`, one multiplier for each of equal parts, padded to whole words."""
    import ncnn

    option = ncnn.Option()
    option.use_packing_layout = False
    codes = np.array(ncnn.quantize_to_int8(ncnn.Mat(weight.reshape(len(multipliers), -1)), ncnn.Mat(multipliers), option)).tobytes()
    return codes + bytes(-len(codes) % 4)


runtimes.add(
    "ncnn",
    Runtime(
        name="ncnn",
        title="ncnn, CPU",
        modules=("ncnn", "pnnx"),
        packages=("ncnn", "pnnx"),
        min_agreement=0.97,  # adds between layers are in float, where kernels round as they like: 98 to 99 % were measured
        open=_open,
        isolated=True,
        inside=False,
        variants=("packed", "plain"),
    ),
)
