"""Whatever TVM compiles for: uint8 asymmetric activations, int8 symmetric per-channel weights, int32 biases.

TVM's Relax front end reads QuantizeLinear and DequantizeLinear as they stand, so the compiled module computes the file literally.
Every op that has an integer form reads and makes quantized tensors; data movement and max pooling keep the encoding of their input.
Source: Apache TVM documentation, Relax ONNX front end; ONNX operator specification.
"""

from qdeploy.core.backend import Backend, Format, Fusion, OpRule, register
from qdeploy.core.ops import ARITHMETIC, COMPUTE, MAX_POOL, MEAN_POOL, MOVE
from qdeploy.core.spec import QuantSpec

TVM = register(
    Backend(
        name="tvm",
        title="CPUs and accelerators, by Apache TVM",
        activation=QuantSpec(signed=False, symmetric=False),
        weight=QuantSpec(signed=True, symmetric=True, narrow=True, axis=0),
        bias="int32",
        rules=(
            OpRule(ops=MOVE | MAX_POOL, inputs=True, output=True, share=True),
            OpRule(ops=COMPUTE | ARITHMETIC | MEAN_POOL, inputs=True, output=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add"}), tails=frozenset({"relu", "relu6"})),),
        formats=(Format(name="qdq", command="tvm.relax.frontend.onnx.from_onnx(onnx.load('{out}/model.onnx'))"),),
        runtimes=("tvm", "onnxruntime", "openvino:literal"),
        vendor_runtime="tvm",
        sources=(
            "Apache TVM documentation, Relax ONNX front end",
            "ONNX operator specification, QuantizeLinear and DequantizeLinear",
        ),
    )
)
