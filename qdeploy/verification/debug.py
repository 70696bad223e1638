"""Find where a runtime parts from the simulation: tensor by tensor, the share of codes that differ, and by how many steps.

All that is needed is in the folder. Every quantized activation of the file that quantizes becomes an output, and so does what leaves
the model in float. The reference runtime computes them node by node, as the file says; the runtime in question computes them its own
way. The first tensor that differs is where to look: a rounding, a bias, an average. What follows it differs because its input does.
Isolated, every op gets the reference's own inputs instead, so that each row shows what its op alone does.

Outputs in between may keep a runtime from fusing across them. Where no tensor parts, though the outputs of the whole model did, that is
why.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.utils import Extractor

from qdeploy.core.errors import ArtifactError, InputError, OptionError, QDeployError, one_line
from qdeploy.core.spec import Encoding
from qdeploy.export.artifact import Artifact
from qdeploy.export.onnx_file import with_sizes
from qdeploy.numerics import arith
from qdeploy.runtimes.process import Host
from qdeploy.runtimes.runtime import Runtime, Session, find_runtime, runtimes
from qdeploy.verification.session import LITERAL, REFERENCE

Array = NDArray[Any]

BATCH = 16
"""Samples that are run at once: all tensors of all of them are in memory."""
_LAST = ("FlushSubnormals", "Cast_1", "LogDequantize", "DequantizeLinear")
"""How the last node of an encoding is called after its tensor, on whichever grid."""
_NO_OPS = frozenset({*_LAST, "Cast", "QuantizeLinear", "LogQuantize"})
"""What belongs to the encodings of weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parting:
    """One tensor: the ops that make it, the share of its values that differ by a step or more, and the largest difference in steps.

    Steps are those of its encoding; of its range / 255 where it is float. `failure` says why there are no numbers.
    """

    tensor: str
    op: str
    scheme: str
    values: int = 0
    differ: float = 0.0
    largest: int = 0
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """All tensors in the order of the graph, compared on so many samples."""

    runtime: str
    isolated: bool
    samples: int
    tensors: tuple[Parting, ...]

    @property
    def first(self) -> Parting | None:
        """The first tensor that parts; None where all are the same."""
        return next((one for one in self.tensors if one.differ), None)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `--json`."""
        first = self.first
        return {
            "runtime": self.runtime,
            "isolated": self.isolated,
            "samples": self.samples,
            "first": first and first.tensor,
            "tensors": [asdict(one) for one in self.tensors],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a tensor is in the file: the names of its values before the nodes of its encoding and after them."""

    tensor: str
    encoding: Encoding | None
    start: str
    end: str
    op: str

    def parting(self, differ: int = 0, largest: int = 0, values: int = 0, failure: str = "") -> Parting:
        scheme = self.encoding.spec.describe() if self.encoding else "float"
        share = differ / values if values else 0.0
        return Parting(tensor=self.tensor, op=self.op, scheme=scheme, values=values, differ=share, largest=largest, failure=failure)


def divergence(artifact: Artifact, runtime: str, batch: Sequence[Array] | None = None, isolate: bool = False) -> Divergence:
    """Compare all tensors of `artifact` between `runtime` (`NAME` or `NAME:VARIANT`) and the literal run of its file.

    `batch` has an array `[N, ...]` for each input; without it the saved samples are taken. What does not fill the batch that the model
    fixes, or `BATCH`, is left out. Raises `OptionError` for a runtime that shows no tensors inside, `ArtifactError` where it cannot run
    with all of them as outputs.
    """
    found, variants = find_runtime(runtime)
    found.require()
    if not found.inside:
        others = ", ".join(one.name for one in runtimes if one.inside)
        what = f"runtime '{found.name}' makes its model from the float file and the scale file, and shows no tensor inside"
        raise OptionError(what, allowed=others, action="choose one of these")
    artifact.check_whole()
    saved = artifact.reference()
    arrays = [saved[f"input.{spec['name']}"] for spec in artifact.inputs] if batch is None else list(batch)
    pieces = _pieces(artifact, arrays, found)
    if not pieces:
        raise InputError("there are fewer samples than the model's fixed batch", found=len(arrays[0]), action="give more with --data")
    model = _sized(artifact, pieces[0])
    places = _places(artifact, model)
    size = len(pieces[0][0])
    shown = _with_outputs(model, [name for p in places for name in (p.start, p.end)])
    with closing(Host(runtimes[REFERENCE])) as host:
        reference = _open(shown, host, LITERAL, size)
        made = [reference.run(piece) for piece in pieces]
    # what enters an encoding, and what leaves it
    wanted = [dict(zip([n for p in places for n in (p.start, p.end)], values, strict=True)) for values in made]
    with closing(Host(found)) as host:
        if isolate:
            partings = tuple(_isolated(model, places, wanted, host, variants[0], size))
        else:
            partings = tuple(_whole(model, places, pieces, wanted, host, variants[0], size))
    return Divergence(runtime=found.reference(variants[0]), isolated=isolate, samples=size * len(pieces), tensors=partings)


def _pieces(artifact: Artifact, arrays: Sequence[Array], runtime: Runtime) -> list[list[Array]]:
    """The samples in pieces of one size."""
    fixed = next((spec["shape"][0] for spec in artifact.inputs if spec["shape"]), 1)
    count = len(arrays[0])
    size = fixed or min(BATCH, runtime.max_batch, count)
    return [[array[start : start + size] for array in arrays] for start in range(0, count - size + 1, size)]


def _sized(artifact: Artifact, inputs: Sequence[Array]) -> onnx.ModelProto:
    """The file that quantizes, for the sizes of `inputs` where more than the batch is open."""
    model = artifact.load(artifact.simulation)
    specs = artifact.specs
    sizes = {name: a.shape[d] for spec, a in zip(specs, inputs, strict=True) for d, name in spec.names.items()}
    beyond = any(d for spec in specs for d in spec.names)
    return with_sizes(model, sizes) if beyond else model


def _places(artifact: Artifact, model: onnx.ModelProto) -> list[_Place]:
    """Every quantized activation, and every output that is float, in the order of the graph."""
    nodes = {node.name: node for node in model.graph.node}
    makers = {out: node for node in model.graph.node for out in node.output}
    order = {out: place for place, node in enumerate(model.graph.node) for out in node.output}
    found: list[tuple[str, Encoding | None, str, str]] = []
    for encoding in artifact.encodings:
        tensor = encoding.tensor
        last = next((nodes[f"{tensor}_{kind}"] for kind in _LAST if f"{tensor}_{kind}" in nodes), None)
        if encoding.role != "activation" or last is None:
            continue
        first = last
        while first.input[0] in makers and makers[first.input[0]].name.startswith(f"{tensor}_{makers[first.input[0]].op_type}"):
            first = makers[first.input[0]]
        found.append((tensor, encoding, first.input[0], last.output[0]))
    ends = {end for _, _, _, end in found}
    outputs = [v.name for v in model.graph.output if v.name not in ends and v.type.tensor_type.elem_type == TensorProto.FLOAT]
    found += [(name, None, name, name) for name in outputs]
    places = []
    for tensor, grid, start, end in found:
        between, _ = _behind(start, ends, makers)
        ops = [node.op_type for node in sorted(between, key=lambda node: order[node.output[0]]) if node.op_type not in _NO_OPS]
        op = ", ".join(dict.fromkeys(ops)) or ("requantized" if start in makers else "input")
        places.append(_Place(tensor=tensor, encoding=grid, start=start, end=end, op=op))
    return sorted(places, key=lambda place: order.get(place.end, -1))


def _behind(tensor: str, ends: Collection[str], makers: Mapping[str, onnx.NodeProto]) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that make `tensor` from quantized tensors, and these tensors, which are among `ends`."""
    nodes: dict[str, onnx.NodeProto] = {}
    sources: set[str] = set()
    pending, seen = [tensor], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in ends:
            sources.add(name)
        elif name in makers:
            nodes[makers[name].name] = makers[name]
            pending.extend(makers[name].input)
    return list(nodes.values()), sources


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy of `model` with these float tensors as its outputs; an input or a name that comes twice passes through an Identity."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    taken = {value.name for value in model.graph.input}
    for place, name in enumerate(names):
        shown = name
        if name in taken:
            shown = f"{name}_shown_{place}"
            copy.graph.node.append(helper.make_node("Identity", [name], [shown], name=shown))
        taken.add(shown)
        copy.graph.output.append(helper.make_tensor_value_info(shown, TensorProto.FLOAT, None))
    return copy


def _open(model: onnx.ModelProto, host: Host, variant: str, batch: int) -> Session:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return host.open(path, batch, variant)


Values = Mapping[str, Array]


def _whole(
    model: onnx.ModelProto,
    places: Sequence[_Place],
    pieces: Sequence[Sequence[Array]],
    wanted: Sequence[Values],
    host: Host,
    variant: str,
    batch: int,
) -> Iterator[Parting]:
    """All tensors of one run of the whole model."""
    try:
        session = _open(_with_outputs(model, [place.end for place in places]), host, variant, batch)
        made = [session.run(piece) for piece in pieces]
    except Exception as error:  # a vendor's library may raise anything
        found = str(error) if isinstance(error, QDeployError) else one_line(error)
        what = f"runtime '{host.runtime.name}' cannot run the file with all tensors as outputs"
        raise ArtifactError(what, found=found, action="give --isolate, which runs each op alone") from error
    for index, place in enumerate(places):
        yield _compared(place, [values[place.end] for values in wanted], [outputs[index] for outputs in made])


def _isolated(
    model: onnx.ModelProto, places: Sequence[_Place], wanted: Sequence[Values], host: Host, variant: str, batch: int
) -> Iterator[Parting]:
    """Every tensor from the part of the model between the quantized tensors before it and itself."""
    inferred = onnx.shape_inference.infer_shapes(model)
    extractor = Extractor(inferred)
    makers = {out: node for node in model.graph.node for out in node.output}
    quantized = {place.end: place for place in places if place.encoding}
    for place in places:
        _, sources = _behind(place.start, quantized, makers)
        starts = sorted({quantized[source].start for source in sources})
        if not starts:
            continue
        try:
            part = _fixed(extractor.extract_model(starts, [place.end]), wanted[0])
            session = _open(part, host, variant, batch)
            made = [session.run([values[name] for name in starts])[0] for values in wanted]
        except Exception as error:
            yield place.parting(failure=f"could not run: {error if isinstance(error, QDeployError) else one_line(error)}")
            continue
        yield _compared(place, [values[place.end] for values in wanted], made)


def _fixed(part: onnx.ModelProto, values: Values) -> onnx.ModelProto:
    """`part` for inputs of the shapes of `values`."""
    for value in part.graph.input:
        shape = value.type.tensor_type.shape
        del shape.dim[:]
        for size in values[value.name].shape:
            shape.dim.add().dim_value = size
    for value in part.graph.output:
        value.type.tensor_type.ClearField("shape")
    del part.graph.value_info[:]
    return part


def _compared(place: _Place, wanted: Sequence[Array], made: Sequence[Array]) -> Parting:
    """How a tensor differs over all pieces."""
    peak = max((float(np.ptp(values)) for values in wanted if values.size), default=0.0)
    differ = largest = values = 0
    for ours, theirs in zip(wanted, made, strict=True):
        if ours.shape != np.shape(theirs):
            return place.parting(failure=f"has the shape {list(np.shape(theirs))}, and not {list(ours.shape)}")
        if place.encoding:
            steps = np.abs(_codes(theirs, place.encoding) - _codes(ours, place.encoding))
        else:
            error = np.abs(theirs.astype(np.float64) - ours) / max(peak / 255, 1e-12)
            steps = np.rint(np.nan_to_num(error, nan=255.0, posinf=255.0)).astype(np.int64)
        differ += int((steps > 0).sum())
        largest = max(largest, int(steps.max(initial=0)))
        values += steps.size
    return place.parting(differ, largest, values)


def _codes(values: Array, encoding: Encoding) -> Array:
    """The codes of values on the grid, counted so that neighbours differ by one: signs and magnitudes become integers."""
    scale, zero = torch.from_numpy(encoding.scale.copy()), torch.from_numpy(encoding.zero_point.copy())
    codes = arith.quantize(torch.from_numpy(np.array(values, np.float32)), scale, zero, encoding.spec)
    if encoding.spec.grid == "log":  # 128 is zero and 0 the smallest positive value
        codes = torch.where(codes < 128, codes + 1, 128 - codes)
    elif not encoding.spec.linear:
        codes = torch.where(codes < 0, -(codes + 32768), codes)
    return codes.numpy()
