"""Qualcomm Hexagon tensor processor (HTP) by QNN / QAIRT: int8 symmetric per-channel weights, uint8 asymmetric activations.

Every tensor is encoded. Weights may have 4 bits and activations 16. Convolutions, transposed ones too, have a scale for each output
channel, linear layers one for the whole weight: the converter's per-channel option is for convolutions only, and AIMET leaves Gemm and
MatMul per tensor as well. Biases are int32 at input scale x weight scale. Max pooling and ops that only move data keep the encoding of
their input; a relu is computed with the layer or add before it. What a softmax or a sigmoid makes keeps an encoding of its own through
a concat, as for `snpe`.

Written: a float model.onnx and model.encodings, in one of three versions (`qdeploy.formats.qualcomm`).
No public document says which release of QAIRT was the first
to read 2.0.0, so 1.0.0 is the default.
Sources: AIMET, "Encoding Format Specification" (all three schemas) and default_config_per_channel.json (placement); Qualcomm, "QAIRT
Quantization Specification" and the help of qairt-quantizer (--use_per_channel_quantization, --use_per_row_quantization).
"""

from qdeploy.core.backend import Backend, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, EVERY, FIXED_RANGE, MAX_POOL, MOVE
from qdeploy.core.spec import QuantSpec
from qdeploy.formats.qualcomm import COMMAND, ENCODINGS, write_0_6_1, write_1_0_0, write_2_0_0

_INT8 = QuantSpec(signed=True, symmetric=True)

QNN = register(
    Backend(
        name="qnn",
        title="Qualcomm Hexagon HTP, by QNN / QAIRT",
        activation=QuantSpec(signed=False, symmetric=False),
        weight=QuantSpec(signed=True, symmetric=True, axis=0),
        bias="int32",
        rules=(
            OpRule(ops=MOVE | MAX_POOL, inputs=True, output=True, share=True),
            OpRule(ops=frozenset({"linear"}), inputs=True, output=True, weight=_INT8),
            OpRule(ops=EVERY, inputs=True, output=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add"}), tails=frozenset({"relu", "relu6"})),),
        fixed_range=FIXED_RANGE,
        weight_bits=(4, 8),
        activation_bits=(8, 16),
        formats=tuple(
            Format(name=name, model="float", write=write, files=(ENCODINGS,), command=COMMAND, origin="public")
            for name, write in (("1.0.0", write_1_0_0), ("0.6.1", write_0_6_1), ("2.0.0", write_2_0_0))
        ),
        # not TVM: its ONNX front end has no int4
        runtimes=("onnxruntime", "openvino:literal", "qnn_htp"),
        vendor_runtime="qnn_htp",
        sources=(
            "AIMET, Encoding Format Specification, versions 0.6.1, 1.0.0 and 2.0.0 (quic.github.io/aimet-pages)",
            "AIMET, quantsim_config/default_config_per_channel.json",
            "Qualcomm, QAIRT Quantization Specification (docs.qualcomm.com, 80-63442-10, applyencodings)",
        ),
    )
)
