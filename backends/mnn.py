"""MNN on mobile CPUs: int8 symmetric activations per tensor, narrow int8 weights per output channel, halves away from zero.

Inputs and outputs of 2-D convolutions are quantized, with the relu that follows inside the layer, and so is what enters an add: MNN
computes it in int8, since every reader of a tensor that has scales gets its codes. Max pooling and ops that only move data keep the
encoding of their input. Biases are float. Linear layers stay in float: MNN's own tool quantizes convolutions only, and its converter
finds no linear layer that has a relu behind it.

Written: a float model.onnx and compression.json, which MNNConvert takes as --compressionParamsFile: for every convolution the
scales of its input, weight and output, found by the name of the output tensor after the relu that goes into the layer. MNN puts a
change of layout behind a convolution that makes a graph output, whose name then ends in `__before_tr`. A convolution with several
groups of several channels becomes one for each group under other names: MNN computes it in float, and it is left out. MNN 3.6.1 reads
what stands inside the "pipeline" of the public example; with that key around it, it converts to float and says little. (PPQ writes
another JSON for MNN, with the roles of tensors in its keys, and there the second input's scale for an Add's output; stock MNN does not
read it.)

MNN's own arithmetic differs in two places from this simulation: the average of a convolution's output is taken in int8 and truncated,
and so are the biases of depthwise convolutions, half a step each on average. On x86 its int8 max pooling takes wrong values where a
tensor has negative ones (MNN 3.6.1); after a relu it is right.
Sources: MNN, docs/tools/convert.md, docs/tools/compress.md, tools/converter/user_provide_quant_params.json and
tools/converter/source/compression/MNN_compression.proto; docs/runtimes.md for what was tried.
"""

import json
from collections.abc import Mapping
from dataclasses import replace

from qdeploy.core.backend import Backend, Emitted, Format, Fusion, OpRule, register
from qdeploy.core.ops import MAX_POOL, MOVE
from qdeploy.core.spec import Encoding, QuantSpec

PARAMETERS = "compression.json"
_RELU = ("Relu", "Clip")


def write_parameters(emitted: Emitted) -> Mapping[str, str]:
    """One object for every convolution that has encodings for its input, its weight and its output."""
    known = {e.tensor: e for e in emitted.encodings}
    after = {node.inputs[0]: node.outputs[0] for node in emitted.nodes if node.op in _RELU}
    layers = []
    for node in emitted.nodes:
        if node.op != "Conv" or (node.attributes.get("group", 1) != 1 and emitted.shapes[node.inputs[1]][1] != 1):
            continue
        made = node.outputs[0] if node.outputs[0] in known else after.get(node.outputs[0], "")
        parts = {"input": node.inputs[0], "weight": node.inputs[1], "output": made}
        if all(name in known for name in parts.values()):
            layer: dict[str, object] = {part: [_entry(known[name], name)] for part, name in parts.items()}
            if made in emitted.outputs:
                layer["output"] = [_entry(known[made], f"{made}__before_tr")]
            layers.append(layer | {"method": 0})
    content = {"version": "0.0.0", "algo": [{"type": 0, "quant_params": {"round_mode": 1, "layer": layers}}]}
    return {PARAMETERS: json.dumps(content, indent=1) + "\n"}


def _entry(encoding: Encoding, name: str) -> dict[str, object]:
    spec = encoding.spec
    scales = [float(s) for s in encoding.scale]
    return {"name": name, "bits": spec.bits, "scales": scales, "clamp_min": spec.qmin, "clamp_max": spec.qmax}


_INT8 = QuantSpec(signed=True, symmetric=True, rounding="half_away")
_CONV = frozenset({"conv2d"})

MNN = register(
    Backend(
        name="mnn",
        title="Mobile CPUs, by MNN",
        activation=_INT8,
        weight=replace(_INT8, narrow=True, axis=0),
        bias="float",
        rules=(
            OpRule(ops=_CONV, inputs=True, output=True),
            OpRule(ops=frozenset({"add"}), inputs=True),
            OpRule(ops=MOVE | MAX_POOL, share=True),
        ),
        fuse=(Fusion(heads=_CONV, tails=frozenset({"relu", "relu6"})),),
        formats=(
            Format(
                name="compression",
                model="float",
                write=write_parameters,
                files=(PARAMETERS,),
                command="MNNConvert -f ONNX --modelFile {out}/model.onnx --MNNModel {out}/model.mnn --bizCode qdeploy "
                "--compressionParamsFile {out}/compression.json",
                origin="public",
            ),
        ),
        runtimes=("onnxruntime", "mnn"),
        vendor_runtime="mnn",
        sources=(
            "MNN, model conversion (docs/tools/convert.md, --compressionParamsFile)",
            "MNN, tools/converter/user_provide_quant_params.json and tools/converter/source/compression/MNN_compression.proto",
            "MNN, docs/tools/compress.md (convolutions only)",
        ),
    )
)
