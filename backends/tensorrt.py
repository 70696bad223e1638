"""NVIDIA GPUs by TensorRT, explicit quantization: int8 symmetric weights per channel and activations per tensor, biases in float.

Only the tensors that enter a layer are quantized, once each, whoever reads them; what a layer makes stays in float until the next
one reads it, and so does the model's output. A residual add is computed inside the convolution before it, so only its other branch,
the skip, is quantized. Weights are narrow ([-127, 127]); activations saturate at -128, as QuantizeLinear does.
Sources: TensorRT developer guide, "Explicit quantization"; NVIDIA Model-Optimizer, ONNX int8 quantization.
"""

from qdeploy.backend import Backend, Fusion, OpRule, register
from qdeploy.ops import COMPUTE, MAX_POOL, MEAN_POOL, MOVE
from qdeploy.spec import QuantSpec

TENSORRT = register(
    Backend(
        name="tensorrt",
        title="NVIDIA GPUs, by TensorRT",
        activation=QuantSpec(signed=True, symmetric=True),
        weight=QuantSpec(signed=True, symmetric=True, narrow=True, axis=0),
        bias="float",
        rules=(
            OpRule(ops=COMPUTE | MEAN_POOL | frozenset({"add"}), inputs=True),
            OpRule(ops=MOVE | MAX_POOL, share=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add"}), tails=frozenset({"relu", "relu6"})),),
        residual="skip",
        command="trtexec --onnx={out}/model.onnx --saveEngine={out}/model.engine --int8",
        runtimes=("onnxruntime", "openvino", "tvm"),
    )
)
