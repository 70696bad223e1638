"""OpenPPL's W8A16: uint8 asymmetric per-tensor weights, uint16 asymmetric per-tensor activations, biases in float.

Placement: inputs and outputs of layers, poolings, adds, multiplications, PReLU, batch norms and resizing; a relu is computed with the
op before it. Max pooling and ops that only move data keep the encoding of their input.

Written: a float model.onnx with clipped weights and clip_ranges.json, by tensor name, weights included. step is the scale, zero_point
the code of 0, min and max those of the grid, type always "biased". The tool that reads it is not public.
Source: MQBench, deploy_linear.py ("ppl") and the PPLW8A16 quantizer.
"""

import json
from collections.abc import Mapping

from qdeploy.core.backend import Backend, Emitted, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, MAX_POOL, MEAN_POOL, MOVE
from qdeploy.core.spec import Encoding, QuantSpec

RANGES = "clip_ranges.json"


def write_ranges(emitted: Emitted) -> Mapping[str, str]:
    """Every encoding under its tensor's name."""
    return {RANGES: json.dumps({"ppl": {e.tensor: _entry(e) for e in emitted.encodings}}, indent=4) + "\n"}


def _entry(encoding: Encoding) -> dict[str, object]:
    return {
        "step": float(encoding.scale[0]),
        "zero_point": int(encoding.zero_point[0]),
        "min": float(encoding.low[0]),
        "max": float(encoding.high[0]),
        "bit": encoding.spec.bits,
        "type": "biased",
    }


_RELUS = frozenset({"relu", "relu6"})
_OPS = COMPUTE | MEAN_POOL | _RELUS | frozenset({"add", "mul", "prelu", "batch_norm", "interpolate"})

PPL_W8A16 = register(
    Backend(
        name="ppl_w8a16",
        title="OpenPPL, 8-bit weights and 16-bit activations",
        activation=QuantSpec(signed=False, symmetric=False, bits=16),
        weight=QuantSpec(signed=False, symmetric=False),
        bias="float",
        rules=(
            OpRule(ops=MOVE | MAX_POOL, inputs=True, output=True, share=True),
            OpRule(ops=_OPS, inputs=True, output=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add", "mul", "batch_norm"}), tails=_RELUS),),
        activation_bits=(16,),
        formats=(Format(name="clip_ranges", model="float", clip_weights=True, write=write_ranges, files=(RANGES,), origin="public"),),
        sources=("MQBench, mqbench/deploy/deploy_linear.py and mqbench/custom_quantizer/total_int_quantizer.py",),
    )
)
