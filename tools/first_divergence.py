"""Find where a runtime parts from the simulation: tensor by tensor, the share of codes that differ, and by how many steps.

    python tools/first_divergence.py samples/digits.pt2 --backend snpe --data samples/digits_test.npz --runtime openvino

The model is quantized in a temporary folder; every quantized activation becomes an output of the ONNX file (which may keep a runtime
from fusing across them), and its codes are compared with the simulation's. The first tensor that differs is where to look: a rounding,
a bias, an average. What follows it differs because its input does. `--isolate` gives every op the simulation's own inputs instead, so
that each row shows what its op alone does.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from onnx.utils import Extractor
from torch import Tensor

from qdeploy import api
from qdeploy.core.spec import Encoding
from qdeploy.export.artifact import Artifact
from qdeploy.files.data import Data, array_specs, open_data
from qdeploy.files.model import load_model
from qdeploy.numerics import arith
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.runtimes.runtime import Runtime, runtimes
from qdeploy.simulation.prepared import Prepared

LAST = ("FlushSubnormals", "Cast_1", "LogDequantize", "DequantizeLinear")
"""How the last node of an encoding is called after its tensor, on whichever grid."""


def main() -> None:
    """Quantize, run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--data", required=True, help=".npy or .npz, for calibration and comparison")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--variant", help="of the runtime, such as all or none")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--arch")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--isolate", action="store_true", help="give every op the simulation's inputs")
    args = parser.parse_args()
    specs = array_specs(args.data)
    assert specs is not None, "--data is .npy or .npz"
    model = load_model(args.model, arch=args.arch)
    data = open_data(args.data, specs)
    prepared = api.prepare(model, next(data.batches(2)), args.backend, args.recipe)
    api.calibrate(prepared, data.pick(512, 0).batches(32))
    with tempfile.TemporaryDirectory() as folder:
        artifact = api.convert(prepared, Path(folder) / "out")
        compare(prepared, artifact, data, runtimes[args.runtime], args.variant, args.samples, args.isolate)


def compare(
    prepared: Prepared, artifact: Artifact, data: Data, runtime: Runtime, variant: str | None, samples: int, isolate: bool
) -> None:
    """Print one row per quantized activation, in the order of the graph."""
    batch = next(data.batches(samples))
    raw, codes = simulated(prepared, batch)
    encodings = {e.tensor: e for e in artifact.encodings if e.role == "activation"}
    variant = variant or runtime.variants[0]
    print(f"{'tensor':40} {'codes that differ':>18} {'largest, in steps':>18}")
    parts = isolated(artifact, encodings, raw) if isolate else [whole(artifact, encodings, batch)]
    with tempfile.TemporaryDirectory() as folder:
        for model, names, inputs in parts:
            path = Path(folder) / "part.onnx"
            onnx.save(model, path)
            outputs = runtime.open(path, len(batch[0]), variant).run(inputs)
            for name, made in zip(names, outputs, strict=True):
                steps = np.abs(places(torch.from_numpy(made), encodings[name]) - codes[name])
                print(f"{name:40} {(steps > 0).mean():>18.2e} {steps.max():>18}")


Part = tuple[onnx.ModelProto, list[str], list[np.ndarray]]


def ends(model: onnx.ModelProto, tensor: str) -> tuple[str, str]:
    """The names of an activation's values before the nodes of its encoding and after them."""
    nodes = {node.name: node for node in model.graph.node}
    makers = {out: node for node in model.graph.node for out in node.output}
    first = last = next(nodes[f"{tensor}_{op}"] for op in LAST if f"{tensor}_{op}" in nodes)
    while first.input[0] in makers and makers[first.input[0]].name.startswith(f"{tensor}_{makers[first.input[0]].op_type}"):
        first = makers[first.input[0]]
    return first.input[0], last.output[0]


def whole(artifact: Artifact, encodings: dict[str, Encoding], batch: tuple[Tensor, ...]) -> Part:
    """The whole model with every quantized activation as its outputs."""
    model = onnx.load(artifact.simulation)
    del model.graph.output[:]
    for name in encodings:
        model.graph.output.append(helper.make_tensor_value_info(ends(model, name)[1], TensorProto.FLOAT, None))
    return model, list(encodings), [t.numpy() for t in batch]


def isolated(artifact: Artifact, encodings: dict[str, Encoding], raw: dict[str, np.ndarray]) -> Iterator[Part]:
    """For every activation the part of the model between the quantized tensors before it and itself."""
    model = onnx.shape_inference.infer_shapes(onnx.load(artifact.simulation))
    extractor = Extractor(model)
    makers = {out: node for node in model.graph.node for out in node.output}
    starts = {name: ends(model, name)[0] for name in encodings}
    quantized = {ends(model, name)[1]: name for name in encodings}
    for name in encodings:
        sources: set[str] = set()
        pending = [starts[name]]
        while pending:
            tensor = pending.pop()
            if tensor in quantized:
                sources.add(quantized[tensor])
            elif tensor in makers:
                pending.extend(makers[tensor].input)
        if sources:
            order = sorted(sources)
            part = extractor.extract_model([starts[source] for source in order], [ends(model, name)[1]])
            yield part, [name], [raw[source] for source in order]


def simulated(prepared: Prepared, batch: tuple[Tensor, ...]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What enters the quantizer of every activation in the simulation, and the places of its codes."""
    raw: dict[str, np.ndarray] = {}
    codes: dict[str, np.ndarray] = {}

    def keep(quantizer: Quantizer, args: tuple[Tensor, str], output: Tensor) -> None:
        if quantizer.role == "activation":
            values, tensor = args
            raw[tensor] = values.numpy()
            codes[tensor] = places(output, quantizer.encoding(tensor))

    hooks = [q.register_forward_hook(keep) for q in set(prepared.quantizers.values())]
    prepared.flat(batch)
    for hook in hooks:
        hook.remove()
    return raw, codes


def places(values: Tensor, encoding: Encoding) -> np.ndarray:
    """The codes of values on the grid, counted so that neighbours differ by one: signs and magnitudes become integers."""
    scale, zero = torch.from_numpy(encoding.scale.copy()), torch.from_numpy(encoding.zero_point.copy())
    codes = arith.quantize(values, scale, zero, encoding.spec)
    if encoding.spec.grid == "log":  # 128 is zero and 0 the smallest positive value
        codes = torch.where(codes < 128, codes + 1, 128 - codes)
    elif not encoding.spec.linear:
        codes = torch.where(codes < 0, -(codes + 32768), codes)
    return codes.numpy()


if __name__ == "__main__":
    main()
