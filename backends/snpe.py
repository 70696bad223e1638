"""Qualcomm Hexagon by SNPE / QAIRT: uint8 asymmetric per-tensor weights and activations, every tensor encoded.

Written: a float model.onnx and model.encodings for the converter, in version 1.0.0 or 0.6.1 (`qdeploy.formats.qualcomm`). Biases are
int32 at input scale x weight scale, as the converter makes them with a 32-bit bias width. What a softmax or a sigmoid makes keeps an
encoding of its own through a concat: with the zero point of the concat's, Qualcomm's library computes other numbers.
Sources: Qualcomm documentation, "QAIRT Quantization Specification"; AIMET, "Encoding Format Specification" 0.6.1 and 1.0.0.
"""

from qdeploy.core.backend import Backend, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, EVERY, FIXED_RANGE, MAX_POOL, MOVE
from qdeploy.core.spec import QuantSpec
from qdeploy.formats.qualcomm import COMMAND, ENCODINGS, write_0_6_1, write_1_0_0

SNPE = register(
    Backend(
        name="snpe",
        title="Qualcomm Hexagon, by SNPE / QAIRT",
        activation=QuantSpec(signed=False, symmetric=False),
        weight=QuantSpec(signed=False, symmetric=False),
        bias="int32",
        rules=(
            OpRule(ops=MOVE | MAX_POOL, inputs=True, output=True, share=True),
            OpRule(ops=EVERY, inputs=True, output=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add"}), tails=frozenset({"relu", "relu6"})),),
        fixed_range=FIXED_RANGE,
        formats=tuple(
            Format(name=name, model="float", write=write, files=(ENCODINGS,), command=COMMAND, origin="public")
            for name, write in (("1.0.0", write_1_0_0), ("0.6.1", write_0_6_1))
        ),
        runtimes=("onnxruntime", "openvino", "tvm", "qnn_htp"),
        vendor_runtime="qnn_htp",
        sources=(
            "Qualcomm, QAIRT Quantization Specification (docs.qualcomm.com, 80-63442-10, applyencodings)",
            "AIMET, Encoding Format Specification, versions 0.6.1 and 1.0.0 (quic.github.io/aimet-pages)",
        ),
    )
)
