"""Find where a runtime parts from the simulation: tensor by tensor, the share of codes that differ, and by how many steps.

    python tools/first_divergence.py samples/digits.pt2 --backend snpe --data samples/digits_test.npz --runtime openvino

The model is quantized in a temporary folder; every activation's codes become outputs of the ONNX file (which may keep a runtime from
fusing across them), and each is compared with the simulation's. The first tensor that differs is where to look: a rounding, a bias, an
average. What follows it differs because its input does. `--isolate` gives every op the simulation's own inputs instead, so that each
row shows what its op alone does.
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
from qdeploy.artifact import Artifact
from qdeploy.files.data import Data, array_specs, open_data
from qdeploy.files.model import load_model
from qdeploy.prepared import Prepared
from qdeploy.quantizer import Quantizer
from qdeploy.runtimes import Runtime, runtimes
from qdeploy.spec import Encoding

TYPES = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8, "uint16": TensorProto.UINT16, "int16": TensorProto.INT16}


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
    codes = simulated_codes(prepared, batch)
    encodings = {e.tensor: e for e in artifact.encodings if e.role == "activation"}
    variant = variant or runtime.variants[0]
    print(f"{'tensor':40} {'codes that differ':>18} {'largest, in steps':>18}")
    parts = isolated(artifact, encodings, codes) if isolate else [whole(artifact, encodings, batch)]
    with tempfile.TemporaryDirectory() as folder:
        for model, names, inputs in parts:
            path = Path(folder) / "part.onnx"
            onnx.save(model, path)
            outputs = runtime.open(path, len(batch[0]), variant).run(inputs)
            for name, made in zip(names, outputs, strict=True):
                steps = np.abs(made.astype(np.int64) - codes[name].astype(np.int64))
                print(f"{name:40} {(steps > 0).mean():>18.2e} {steps.max():>18}")


Part = tuple[onnx.ModelProto, list[str], list[np.ndarray]]


def whole(artifact: Artifact, encodings: dict[str, Encoding], batch: tuple[Tensor, ...]) -> Part:
    """The whole model with the codes of every activation as its outputs."""
    model = onnx.load(artifact.simulation)
    del model.graph.output[:]
    for name, encoding in encodings.items():
        model.graph.output.append(helper.make_tensor_value_info(f"{name}_quantized", TYPES[dtype(encoding)], None))
    return model, list(encodings), [t.numpy() for t in batch]


def isolated(artifact: Artifact, encodings: dict[str, Encoding], codes: dict[str, np.ndarray]) -> Iterator[Part]:
    """For every activation the part of the model between the quantized tensors before it and itself."""
    model = onnx.shape_inference.infer_shapes(onnx.load(artifact.simulation))
    extractor = Extractor(model)
    makers = {out: node for node in model.graph.node for out in node.output}
    for name in encodings:
        sources: list[str] = []
        pending = [makers[f"{name}_quantized"].input[0]]
        while pending:
            tensor = pending.pop()
            maker = makers.get(tensor)
            if maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in makers:
                sources.append(maker.input[0])
            elif maker is not None:
                pending.extend(maker.input)
        if sources:
            sources = sorted(set(sources))
            part = extractor.extract_model(sources, [f"{name}_quantized"])
            yield part, [name], [codes[source.removesuffix("_quantized")] for source in sources]


def dtype(encoding: Encoding) -> str:
    """The integer type of an activation's codes."""
    return f"{'' if encoding.spec.signed else 'u'}int{encoding.spec.bits}"


def simulated_codes(prepared: Prepared, batch: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    """The integer codes of every quantized activation in the simulation."""
    codes: dict[str, np.ndarray] = {}

    def keep(quantizer: Quantizer, args: tuple[object, ...], output: Tensor) -> None:
        if quantizer.role == "activation":
            e = quantizer.encoding(str(args[1]))
            codes[e.tensor] = (torch.round(output / quantizer.scale) + quantizer.zero_point).numpy().astype(dtype(e))

    hooks = [q.register_forward_hook(keep) for q in set(prepared.quantizers.values())]
    prepared.flat(batch)
    for hook in hooks:
        hook.remove()
    return codes


if __name__ == "__main__":
    main()
