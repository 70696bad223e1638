"""Ceva DSPs: asymmetric weights and activations of 8 or 16 bits, weights per tensor or per output channel.

Only the scheme is public. Placement follows the nearest public relative, PPQ's quantizer for a DSP: inputs and outputs of all ops, a
relu with the layer before it; biases are int32 at input scale x weight scale. Nothing public says what file Ceva's tools read. So
written are a QDQ model.onnx and qdeploy's own encodings.json (docs/encodings.md).
Sources: PPQ, ppq/quantization/quantizer/DSPQuantizer.py (placement).
"""

from dataclasses import replace

from qdeploy.core.backend import Backend, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, EVERY, MAX_POOL, MOVE
from qdeploy.core.spec import QuantSpec
from qdeploy.formats.encodings_json import ENCODINGS, write_encodings

_UINT8 = QuantSpec(signed=False, symmetric=False)

CEVA = register(
    Backend(
        name="ceva",
        title="Ceva DSPs",
        activation=_UINT8,
        weight=_UINT8,
        bias="int32",
        rules=(
            OpRule(ops=MOVE | MAX_POOL, inputs=True, output=True, share=True),
            OpRule(ops=EVERY, inputs=True, output=True),
        ),
        fuse=(Fusion(heads=COMPUTE, tails=frozenset({"relu", "relu6"})),),
        weight_bits=(8, 16),
        activation_bits=(8, 16),
        weight_schemes=(replace(_UINT8, axis=0),),
        formats=(Format(name="encodings", write=write_encodings, files=(ENCODINGS,), origin="qdeploy"),),
        sources=("PPQ, ppq/quantization/quantizer/DSPQuantizer.py",),
    )
)
