"""Intel CPUs and GPUs by OpenVINO: uint8 asymmetric activations, int8 symmetric narrow per-channel weights, biases in float.

Tensors that enter a layer, a pooling or an elementwise op are quantized; ops that only move data carry the encoding through, and all
inputs of a concat share one. A residual add behind a linear layer is computed in float. The output of the model stays in float.
Sources: OpenVINO documentation, "Low precision transformations"; NNCF, hardware setup of the CPU.
"""

from qdeploy.core.backend import Backend, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, MAX_POOL, MEAN_POOL, MOVE
from qdeploy.core.spec import QuantSpec

OPENVINO = register(
    Backend(
        name="openvino",
        title="Intel CPUs and GPUs, by OpenVINO",
        activation=QuantSpec(signed=False, symmetric=False),
        weight=QuantSpec(signed=True, symmetric=True, narrow=True, axis=0),
        bias="float",
        rules=(
            OpRule(ops=COMPUTE | MEAN_POOL | frozenset({"add", "mul"}), inputs=True),
            OpRule(ops=MOVE | MAX_POOL, share=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add"}), tails=frozenset({"relu", "relu6"})),),
        residual="skip",
        formats=(Format(name="qdq", command="ovc {out}/model.onnx --output_model {out}/model.xml"),),
        runtimes=("openvino", "onnxruntime", "tvm"),
        vendor_runtime="openvino",
        sources=(
            "OpenVINO documentation, Low precision transformations",
            "NNCF, src/nncf/common/hardware/setups/cpu.py",
        ),
    )
)
