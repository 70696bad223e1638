"""quantization.prototxt: fraction lengths in the syntax of Ristretto's net description.

For every ONNX node that reads or makes fixed-point data there is a block. `type` is Ristretto's layer type where it has one and the
ONNX operator otherwise; the fields are those of the public layer catalogue. A fraction length f stands for a scale of 2^-f.
Source: Ristretto, "Layer Catalogue" (lepsucd.com); pmgysel/caffe, src/caffe/proto/caffe.proto.
"""

import json
import math
from collections.abc import Mapping

from qdeploy.core.backend import Emitted, Node
from qdeploy.core.spec import Encoding

PROTOTXT = "quantization.prototxt"
_TYPES = {"Conv": "ConvolutionRistretto", "ConvTranspose": "DeconvolutionRistretto", "Gemm": "FcRistretto"}
_RELU = ("Relu", "Clip")


def write_fraction_lengths(emitted: Emitted) -> Mapping[str, str]:
    """One block a node, in the order of the model."""
    known = {e.tensor: e for e in emitted.encodings if e.role != "bias"}
    readers: dict[str, list[Node]] = {}
    done: set[str] = set()
    for node in emitted.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
        if node.op == "Transpose" and node.inputs[0] in known and known[node.inputs[0]].role == "weight":
            known[node.outputs[0]] = known[node.inputs[0]]  # a parameter of the MatMul that reads it
            done.add(node.name)
    text = ""
    for node in emitted.nodes:
        if node.name in done:
            continue
        entering = [known[name] for name in node.inputs if name in known]
        leaving = node.outputs[0]
        after = readers.get(leaving, [])
        if leaving not in known and len(after) == 1 and after[0].op in _RELU and entering:
            done.add(after[0].name)
            leaving = after[0].outputs[0]
        text += _block(node, entering, known.get(leaving))
    return {PROTOTXT: text}


def _block(node: Node, entering: list[Encoding], leaving: Encoding | None) -> str:
    """The block of one node; empty where nothing is fixed point."""
    data = [e for e in entering if e.role == "activation"]
    parameters = [e for e in entering if e.role != "activation"]
    parts = (("layer_in", data[:1]), ("layer_out", [leaving] if leaving else []), ("params", parameters[:1]))
    fields = [(part, e.spec.bits, _fraction_length(e)) for part, found in parts for e in found]
    if not fields:
        return ""
    lines = [f"    bw_{part}: {bits}\n    fl_{part}: {length}\n" for part, bits, length in fields]
    start = f'layer {{\n  name: {json.dumps(node.name)}\n  type: "{_TYPES.get(node.op, node.op)}"\n  quantization_param {{\n'
    scheme = "    precision: DYNAMIC_FIXED_POINT\n    rounding_scheme: NEAREST\n"
    return start + scheme + "".join(lines) + "  }\n}\n"


def _fraction_length(encoding: Encoding) -> int:
    return round(-math.log2(encoding.scale[0]))
