"""SenseTime STPU: int8 symmetric per-tensor weights and activations with codes -127..127, int32 biases.

Placement: inputs and outputs of layers, poolings, adds, multiplications, sigmoids and PReLU; a relu is computed with the op before it.
Concat, resizing, max pooling and ops that only move data have one range for what enters and what leaves.

Written: a float model.onnx with clipped weights and stpu_minmax.json. Its keys are tensor names for activations, `<node>_weights` and
`<node>_bias` for parameters. min and max are -127 s and 127 s. A bias has alpha = s_x s_w and zero_point 0. The output of an op whose
relu is computed with it has the relu's range too. Some outputs have an `emin`, which the tool wants; its meaning is not public. With
E(v) = floor(log2 v) + 127, the biased exponent of a float32, limited to 1..254, and E(0) = 0:

    Conv, ConvTranspose    E(max(sqrt(n) max_in max_weight, max_out)) - 10,  n = the product of the weight's sizes beyond the first
    Resize, Upsample       E(max_out) - 20
    Gemm                   128

Worked: a 3x3 Conv on 3 channels, inputs to 1, weights to 0.5, outputs to 2.54: sqrt(27) x 0.5 = 2.598 > 2.54, E = 128, emin = 118.
MQBench writes -1 and 1 for every sigmoid, whatever was measured; here a sigmoid has the range that was simulated.
Source: MQBench, deploy_stpu and the STPU quantizer (branch stpu-dev). The tool's command line is not public.
"""

import json
import math
from collections.abc import Mapping

from qdeploy.core.backend import Backend, Emitted, Format, Fusion, Node, OpRule, register
from qdeploy.core.ops import COMPUTE, MAX_POOL, MEAN_POOL, MOVE
from qdeploy.core.spec import Encoding, QuantSpec

RANGES = "stpu_minmax.json"
_RELU = ("Relu", "Clip")


def write_ranges(emitted: Emitted) -> Mapping[str, str]:
    """Ranges of activations and weights, steps of biases."""
    table: dict[str, dict[str, float]] = {}
    layers = _layers(emitted)
    for encoding in emitted.encodings:
        if encoding.role == "weight":
            table |= {f"{name}_weights": _range(encoding) for name in layers.get(encoding.tensor, ())}
        elif encoding.role == "bias":
            step = {"alpha": _short(encoding.scale[0]), "zero_point": 0}
            table |= {f"{name}_bias": step for name in layers.get(encoding.tensor, ())}
        else:
            table[encoding.tensor] = _range(encoding)
    heads = {node.outputs[0]: node for node in emitted.nodes}
    for node in emitted.nodes:
        head = heads.get(node.inputs[0]) if node.op in _RELU else None
        if head is not None and node.outputs[0] in table:
            table.setdefault(head.outputs[0], dict(table[node.outputs[0]]))
    for node in emitted.nodes:
        emin = _emin(node, table, emitted)
        if emin is not None:
            table[node.outputs[0]]["emin"] = emin
    return {RANGES: json.dumps(table, indent=4) + "\n"}


def _layers(emitted: Emitted) -> dict[str, list[str]]:
    """The names of the nodes that read a tensor, as it is or transposed, by tensor."""
    turned = {node.outputs[0]: node.inputs[0] for node in emitted.nodes if node.op == "Transpose"}
    readers: dict[str, list[str]] = {}
    for node in emitted.nodes:
        if node.op != "Transpose":
            for name in {*node.inputs, *(turned[name] for name in node.inputs if name in turned)}:
                readers.setdefault(name, []).append(node.name)
    return readers


def _emin(node: Node, table: Mapping[str, Mapping[str, float]], emitted: Emitted) -> int | None:
    """`emin` of what a node makes, None where it has none."""
    out = table.get(node.outputs[0])
    if out is None:
        return None
    if node.op in ("Resize", "Upsample", "DynamicUpsample"):
        return _exponent(out["max"]) - 20
    if node.op == "Gemm":
        return 128
    entering, weights = table.get(node.inputs[0]), table.get(f"{node.name}_weights")
    if node.op not in ("Conv", "ConvTranspose") or entering is None or weights is None:
        return None
    terms = math.prod(size or 1 for size in emitted.shapes[node.inputs[1]][1:])
    return _exponent(max(math.sqrt(terms) * entering["max"] * weights["max"], out["max"])) - 10


def _exponent(value: float) -> int:
    return min(max(math.frexp(value)[1] + 126, 1), 254) if value else 0


def _range(encoding: Encoding) -> dict[str, float]:
    limit = _short(encoding.high.astype("float32")[0])
    return {"min": -limit, "max": limit}


def _short(value: object) -> float:
    """A float32 as the shortest decimal that reads back the same."""
    return float(str(value))


_INT8 = QuantSpec(signed=True, symmetric=True, narrow=True)
_SHARED = MOVE | MAX_POOL | frozenset({"interpolate"})
_RELUS = frozenset({"relu", "relu6"})
_OPS = COMPUTE | MEAN_POOL | _RELUS | frozenset({"add", "mul", "batch_norm", "prelu", "sigmoid"})

STPU = register(
    Backend(
        name="stpu",
        title="SenseTime STPU",
        activation=_INT8,
        weight=_INT8,
        bias="int32",
        rules=(
            OpRule(ops=_SHARED, inputs=True, output=True, share=True),
            OpRule(ops=_OPS, inputs=True, output=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add", "mul", "batch_norm"}), tails=_RELUS),),
        formats=(Format(name="minmax", model="float", clip_weights=True, write=write_ranges, files=(RANGES,), origin="public"),),
        sources=("MQBench, mqbench/deploy/deploy_stpu.py, branch stpu-dev for the placement",),
    )
)
