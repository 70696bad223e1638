"""NVIDIA GPUs by SenseTime NART-QUANT: symmetric, 8 or 4 bits, weights per output channel (or per tensor), activations per tensor.

Placement is what the same house's tools have for targets that quantize everything (MQBench, "total int"): all inputs and outputs, a
relu with the op before it; biases are int32 at input scale x weight scale. Written are a QDQ model.onnx and qdeploy's own
encodings.json (docs/encodings.md): nothing public says how a file with scales per output channel looks. What NART's public cuda_quant
module reads is a JSON object of tensor names, and `<node>_param_1` and `<node>_param_2` for a convolution's weight and bias, each with
one alpha (the scale), zero_point, bit and type, and only for convolutions, relu, pooling and sums.
Sources: MQBench, mqbench/custom_quantizer/total_int_quantizer.py (placement); NART, python/docs/tutorial/switch/cuda_quant.rst and
python/nart/modules/cuda_quant.py (codes of the full range, one scale a weight).
"""

from dataclasses import replace

from qdeploy.core.backend import Backend, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, EVERY, MAX_POOL, MOVE
from qdeploy.core.spec import QuantSpec
from qdeploy.formats.encodings_json import ENCODINGS, write_encodings

_WEIGHT = QuantSpec(signed=True, symmetric=True, axis=0)

NART_GPU = register(
    Backend(
        name="nart_gpu",
        title="NVIDIA GPUs, by NART-QUANT",
        activation=QuantSpec(signed=True, symmetric=True),
        weight=_WEIGHT,
        bias="int32",
        rules=(
            OpRule(ops=MOVE | MAX_POOL, inputs=True, output=True, share=True),
            OpRule(ops=EVERY, inputs=True, output=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add"}), tails=frozenset({"relu", "relu6"})),),
        weight_bits=(4, 8),
        activation_bits=(4, 8),
        weight_schemes=(replace(_WEIGHT, axis=None),),
        formats=(Format(name="encodings", write=write_encodings, files=(ENCODINGS,), origin="qdeploy"),),
        sources=(
            "MQBench, mqbench/custom_quantizer/total_int_quantizer.py",
            "ModelTC NART, python/docs/tutorial/switch/cuda_quant.rst and python/nart/modules/cuda_quant.py",
        ),
    )
)
