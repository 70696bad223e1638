"""Ambarella CVFlow in half precision: every tensor is IEEE float16, with subnormals.

Nothing is scaled, so there is no scale file: model.onnx has half-precision tensors, with inputs and outputs in float32. A value beyond
65504 does not fit, and calibration refuses it. No public document says how the toolchain rounds, whether it keeps subnormals, or how
it is called: the arithmetic here is IEEE's.
Source: IEEE 754-2019, binary16.
"""

from qdeploy.core.backend import Backend, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, EVERY, MAX_POOL, MOVE
from qdeploy.core.spec import QuantSpec

_HALF = QuantSpec(signed=True, symmetric=True, bits=16, grid="float16")

AMBARELLA_FP16 = register(
    Backend(
        name="ambarella_fp16",
        title="Ambarella CVFlow, half precision",
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
        formats=(Format(name="float16", model="float16"),),
        sources=("IEEE 754-2019, binary16",),
    )
)
