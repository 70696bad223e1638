"""ARM CPUs by SenseTime NART-QUANT: asymmetric per-tensor weights and activations of 2 to 8 bits.

Placement is what the same house's tools have for targets that quantize everything (MQBench, "total int"): all inputs and outputs, a
relu with the op before it; biases are int32 at input scale x weight scale, as NART's public kernel adds them. No document says what
file the tool reads, and the public code for it looks the same weight up under two different names. So written are a QDQ model.onnx and
qdeploy's own encodings.json (docs/encodings.md).
Sources: MQBench, mqbench/custom_quantizer/total_int_quantizer.py (placement); NART, art/modules/quant/src/op/conv_2d_uint8_impl.c
(uint8 codes, int32 biases) and python/nart/modules/quant.py.
"""

from qdeploy.core.backend import Backend, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, EVERY, MAX_POOL, MOVE
from qdeploy.core.spec import QuantSpec
from qdeploy.formats.encodings_json import ENCODINGS, write_encodings

_UINT8 = QuantSpec(signed=False, symmetric=False)

NART_ARM = register(
    Backend(
        name="nart_arm",
        title="ARM CPUs, by NART-QUANT",
        activation=_UINT8,
        weight=_UINT8,
        bias="int32",
        rules=(
            OpRule(ops=MOVE | MAX_POOL, inputs=True, output=True, share=True),
            OpRule(ops=EVERY, inputs=True, output=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add"}), tails=frozenset({"relu", "relu6"})),),
        weight_bits=(2, 3, 4, 5, 6, 7, 8),
        activation_bits=(2, 3, 4, 5, 6, 7, 8),
        formats=(Format(name="encodings", write=write_encodings, files=(ENCODINGS,), origin="qdeploy"),),
        sources=(
            "MQBench, mqbench/custom_quantizer/total_int_quantizer.py",
            "ModelTC NART, art/modules/quant/src/op/conv_2d_uint8_impl.c and python/nart/modules/quant.py",
        ),
    )
)
