"""ONNX Runtime on CPUs: uint8 asymmetric activations, int8 symmetric per-channel weights, int32 biases, everything in QDQ.

Its integer kernels take exactly this scheme: with int8 activations half of the convolutions stay unfused and run slower than in
float. A quantizer follows every op, since a float tensor between two integer kernels costs two conversions.
Softmax with what moves data or a mask before it, and layer norm with the sum before it, stay in float: the integer kernel of the one is
an approximation, 44 dB from what the file says, and what enters the other has outliers that eight bits cannot hold.
Source: ONNX Runtime documentation, "Quantize ONNX models"; formats of QDQ in the ONNX operator specification.
"""

from qdeploy.core.backend import Backend, Format, Fusion, OpRule, register
from qdeploy.core.ops import ACTIVATION, ARITHMETIC, COMPUTE, MAX_POOL, MEAN_POOL, MOVE
from qdeploy.core.spec import QuantSpec

_SOFTMAX = frozenset({"softmax"})

ONNXRUNTIME = register(
    Backend(
        name="onnxruntime",
        title="CPUs, by ONNX Runtime",
        activation=QuantSpec(signed=False, symmetric=False),
        weight=QuantSpec(signed=True, symmetric=True, narrow=True, axis=0),
        bias="int32",
        rules=(
            OpRule(ops=_SOFTMAX, stay_float=True),
            OpRule(ops=MOVE | MAX_POOL, inputs=True, output=True, share=True),
            OpRule(ops=COMPUTE | ARITHMETIC | (ACTIVATION - _SOFTMAX) | MEAN_POOL, inputs=True, output=True),
        ),
        fuse=(
            Fusion(heads=COMPUTE | frozenset({"add"}), tails=frozenset({"relu", "relu6"})),
            Fusion(heads=frozenset({"matmul"}), tails=frozenset({"add", "where"}) | _SOFTMAX),
            Fusion(heads=frozenset({"add", "where", "mul", "div"}), tails=_SOFTMAX),
            Fusion(heads=frozenset({"linear"}), tails=frozenset({"add"})),
            Fusion(heads=frozenset({"linear", "add"}), tails=frozenset({"layer_norm"})),
        ),
        formats=(Format(name="qdq", command="onnxruntime.InferenceSession('{out}/model.onnx')"),),
        runtimes=("onnxruntime", "tvm", "openvino:literal"),
        vendor_runtime="onnxruntime",
        sources=(
            "ONNX Runtime documentation, Quantize ONNX models",
            "ONNX operator specification, QuantizeLinear and DequantizeLinear",
        ),
    )
)
