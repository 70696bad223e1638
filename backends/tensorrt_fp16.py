"""NVIDIA GPUs by TensorRT in half precision: every tensor is IEEE float16, with subnormals.

Nothing is scaled, so there is no scale file: model.onnx has half-precision tensors, with inputs and outputs in float32, and a strongly
typed network computes every layer in the type that the file names (older releases: `--fp16`). A value beyond 65504 does not fit, and
calibration refuses it. Tensor cores accumulate in float32 or in float16, as the engine chooses; here a layer rounds once, at its end.
Sources: TensorRT developer guide, "Strongly-typed networks"; NVIDIA Model-Optimizer, AutoCast (half precision keeps subnormals).
"""

from qdeploy.core.backend import Backend, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, EVERY, MAX_POOL, MOVE
from qdeploy.core.spec import QuantSpec

_HALF = QuantSpec(signed=True, symmetric=True, bits=16, grid="float16")

TENSORRT_FP16 = register(
    Backend(
        name="tensorrt_fp16",
        title="NVIDIA GPUs, by TensorRT, half precision",
        activation=_HALF,
        weight=_HALF,
        bias=_HALF,
        rules=(
            OpRule(ops=MOVE | MAX_POOL, inputs=True, output=True, share=True),
            OpRule(ops=EVERY, inputs=True, output=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add"}), tails=frozenset({"relu", "relu6"})),),
        weight_bits=(16,),
        activation_bits=(16,),
        formats=(
            Format(
                name="float16",
                model="float16",
                command="trtexec --onnx={out}/model.onnx --saveEngine={out}/model.engine --stronglyTyped",
            ),
        ),
        sources=(
            "NVIDIA, TensorRT developer guide, strongly typed networks",
            "NVIDIA Model-Optimizer, AutoCast guide (modelopt.onnx.autocast)",
        ),
    )
)
