"""OpenPPL on NVIDIA GPUs: int8 symmetric weights per channel and activations per tensor, all codes -128..127, biases in float.

Two public schemes contradict each other. MQBench has uint8 asymmetric for both and writes one number a tensor, which no public version
of the runtime reads. PPQ, by the authors of the runtime, has this one, and the runtime bears it out: its CUDA engine takes
scale = (tensor_max - tensor_min) / (2^bits - 1) and has no zero_point in its convolutions: codes are symmetric, of the full range.
PPQ counts biases in int32 at input scale x weight scale; the engine's int8 convolution takes them in float32. Float biases that are
multiples of that product, as qdeploy writes them, serve both.

Placement as in PPQ: inputs and outputs of the ops below; an activation is computed with the layer before it; the inputs of an add have
one encoding; data movement, max pooling, concat and resizing carry theirs through. Everything else runs in half precision.

Written: a float model.onnx and quant.json. `quant_info` has every tensor but the biases, by tensor name, lists where it is per
channel; `op_info` names the nodes that run in int8. tensor_min and tensor_max are those of the grid; zero_point is the code of 0. The
output of a layer whose activation is computed with it has the numbers of what leaves the pair. `hash` counts the entries; `dominator`
is the hash of the first entry with the same numbers. (In PPQ they are Python's hashes; the engine does not read them.)
Sources: PPQ, parser/ppl.py and the quantizer of PPL_CUDA_INT8; OpenPPL ppl.nn, quant_param_parser.cc, opt_graph.cc and conv_op.cc.
"""

import json
from collections.abc import Iterator, Mapping

from qdeploy.core.backend import Backend, Emitted, Format, Fusion, OpRule, register
from qdeploy.core.ops import MAX_POOL, MEAN_POOL, MOVE
from qdeploy.core.spec import Encoding, QuantSpec

QUANT = "quant.json"
_INT8_NODES = frozenset({"Add", "AveragePool", "Clip", "Concat", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "GlobalMaxPool"})
_INT8_NODES |= {"LeakyRelu", "MaxPool", "Mul", "PRelu", "ReduceMean", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Split"}
_INT8_NODES |= {"Transpose"}
_TAILS = ("Relu", "Clip", "LeakyRelu", "Sigmoid")


def write_quant(emitted: Emitted) -> Mapping[str, str]:
    """The numbers of all tensors with codes of up to 8 bits, and the nodes that have nothing else."""
    numbers = dict(_tensors(emitted))
    first: dict[tuple[bytes, bytes, QuantSpec], int] = {}
    table = {}
    for position, (name, encoding) in enumerate(numbers.items(), start=1):
        key = encoding.scale.tobytes(), encoding.zero_point.tobytes(), encoding.spec
        table[name] = _entry(encoding) | {"hash": position, "dominator": first.setdefault(key, position)}
    moving = {*emitted.inputs, *(tensor for node in emitted.nodes for tensor in node.outputs)}
    nodes = {
        node.name: {"data_type": "INT8"}
        for node in emitted.nodes
        if node.op in _INT8_NODES and moving.intersection((*node.inputs, *node.outputs)) <= numbers.keys()
    }
    return {QUANT: json.dumps({"quant_info": table, "op_info": nodes}, indent=4) + "\n"}


def _tensors(emitted: Emitted) -> Iterator[tuple[str, Encoding]]:
    """Names with their encodings: each encoding's own, and that of the tensor before a fused activation that makes it."""
    encoded = {encoding.tensor for encoding in emitted.encodings}
    before = {node.outputs[0]: node.inputs[0] for node in emitted.nodes if node.op in _TAILS}
    layers = {node.outputs[0] for node in emitted.nodes if node.op in ("Conv", "Gemm")}
    for encoding in emitted.encodings:
        if encoding.spec.bits <= 8:
            yield encoding.tensor, encoding
            head = before.get(encoding.tensor)
            if head in layers - encoded:
                yield str(head), encoding


def _entry(encoding: Encoding) -> dict[str, object]:
    spec = encoding.spec
    fields: dict[str, list[float] | list[int]] = {
        "scale": [float(s) for s in encoding.scale],
        "zero_point": [int(z) for z in encoding.zero_point],
        "tensor_min": [float(low) for low in encoding.low],
        "tensor_max": [float(high) for high in encoding.high],
    }
    per_channel = spec.axis is not None
    return {
        "bit_width": spec.bits,
        "per_channel": per_channel,
        "quant_flag": True,
        "sym": spec.symmetric,
        **(fields if per_channel else {name: values[0] for name, values in fields.items()}),
        "q_min": spec.qmin,
        "q_max": spec.qmax,
    }


_LAYERS = frozenset({"conv2d", "linear"})
_TAIL_OPS = frozenset({"relu", "relu6", "clamp", "leaky_relu", "sigmoid"})

PPL_CUDA = register(
    Backend(
        name="ppl_cuda",
        title="NVIDIA GPUs, by OpenPPL",
        activation=QuantSpec(signed=True, symmetric=True),
        weight=QuantSpec(signed=True, symmetric=True, axis=0),
        bias="float",
        rules=(
            OpRule(ops=MOVE | MAX_POOL | frozenset({"interpolate"}), inputs=True, output=True, share=True),
            OpRule(ops=frozenset({"add"}), inputs=True, output=True, align=True),
            OpRule(ops=_LAYERS | _TAIL_OPS | MEAN_POOL | frozenset({"mul", "prelu"}), inputs=True, output=True),
        ),
        fuse=(Fusion(heads=_LAYERS, tails=_TAIL_OPS),),
        formats=(
            Format(
                name="quant_info",
                model="float",
                write=write_quant,
                files=(QUANT,),
                command="pplnn --use-cuda --onnx-model {out}/model.onnx --quant-file {out}/quant.json",
                origin="public",
            ),
        ),
        sources=(
            "PPQ, md_doc/inference_with_ppl_cuda.md, ppq/parser/ppl.py and the quantizer of PPL_CUDA_INT8",
            "OpenPPL ppl.nn, src/ppl/nn/quantization/quant_param_parser.cc and src/ppl/nn/engines/cuda/optimizer/opt_graph.cc",
            "OpenPPL ppl.nn, src/ppl/nn/engines/cuda/optimizer/ops/onnx/conv_op.cc (float32 biases)",
        ),
    )
)
