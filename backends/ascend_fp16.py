"""Huawei Ascend 310 by ATC / ACL in half precision: every tensor is IEEE float16, with subnormals.

Nothing is scaled, so there is no scale file: model.onnx has half-precision tensors, with inputs and outputs in float32. ATC computes in
float16 on this processor also from a float32 model. A value beyond 65504 does not fit, and calibration refuses it. The processor is an
Ascend310 unless `npu-smi info` says otherwise; a model whose batch may vary needs `--input_shape="NAME:1,3,224,224"`.
Uncertain: no public document says how the processor rounds inside a layer, or that it keeps subnormals; the arithmetic here is IEEE's.
Sources: Huawei CANN, ATC documentation (--framework, --soc_version, --precision_mode); IEEE 754-2019, binary16.
"""

from qdeploy.core.backend import Backend, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, EVERY, MAX_POOL, MOVE
from qdeploy.core.spec import QuantSpec

_HALF = QuantSpec(signed=True, symmetric=True, bits=16, grid="float16")

ASCEND_FP16 = register(
    Backend(
        name="ascend_fp16",
        title="Huawei Ascend 310, by ATC / ACL, half precision",
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
                command="atc --framework=5 --model={out}/model.onnx --output={out}/model --soc_version=Ascend310",
            ),
        ),
        sources=("Huawei CANN, ATC documentation (www.hiascend.com)", "IEEE 754-2019, binary16"),
    )
)
