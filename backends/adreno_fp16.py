"""Qualcomm Adreno GPUs in half precision, by OpenCL: every tensor is IEEE float16 without subnormals.

Magnitudes below 2^-14 become 0, and a value beyond 65504 does not fit: calibration refuses it. OpenCL's half precision does not ask a
device for subnormals. Nothing is scaled, so there is no scale file: model.onnx has half-precision tensors, with inputs and outputs in
float32, and model.sim.onnx flushes in between. No public document says at which steps inside a kernel the GPU flushes or rounds: here
it does so once for every tensor.
Sources: OpenCL extension cl_khr_fp16 (CL_DEVICE_HALF_FP_CONFIG has CL_FP_DENORM as an option); IEEE 754-2019, binary16.
"""

from qdeploy.core.backend import Backend, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, EVERY, MAX_POOL, MOVE
from qdeploy.core.spec import QuantSpec

_HALF = QuantSpec(signed=True, symmetric=True, bits=16, grid="float16_normal")

ADRENO_FP16 = register(
    Backend(
        name="adreno_fp16",
        title="Qualcomm Adreno, half precision",
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
                command="qairt-converter --input_network {out}/model.onnx --output_path {out}/model.dlc",
            ),
        ),
        sources=("OpenCL extension specification, cl_khr_fp16", "IEEE 754-2019, binary16"),
    )
)
