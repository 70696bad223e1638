"""No hardware, but the setting of most papers: any bits and any scheme, inputs of layers only, the first and last layer in 8 bits.

The tensors that enter convolutions and linear layers are quantized, through ops that only move data; adds, poolings and the output
stay in float, and so do biases. Without a choice it is 8 bits: int8 symmetric per-channel weights, uint8 asymmetric activations.
Widths are chosen with --weight-bits and --activation-bits, whole schemes with --weight-scheme and --activation-scheme in the words of
`QuantSpec.describe`. Written: a QDQ model.onnx; other widths than 4, 8 and 16 are stored in the next wider type, with a Clip.
Sources: MQBench, "Academic" backend (placement, first and last layer); Li et al. 2021, BRECQ, section 4 (the same setting).
"""

from qdeploy.core.backend import QDQ, Backend, OpRule, register
from qdeploy.core.ops import CONVOLUTION, MAX_POOL, MOVE
from qdeploy.core.spec import QuantSpec

ACADEMIC = register(
    Backend(
        name="academic",
        title="no hardware: any bits, any scheme",
        activation=QuantSpec(signed=False, symmetric=False),
        weight=QuantSpec(signed=True, symmetric=True, axis=0),
        bias="float",
        rules=(
            OpRule(ops=CONVOLUTION | frozenset({"linear"}), inputs=True),
            OpRule(ops=MOVE | MAX_POOL, share=True),
        ),
        weight_bits=tuple(range(2, 17)),
        activation_bits=tuple(range(2, 17)),
        first_last_bits=8,
        any_scheme=True,
        formats=(QDQ,),
        sources=(
            "MQBench, Academic backend (mqbench/custom_quantizer/academic_quantizer.py)",
            "Li et al. 2021, BRECQ, arXiv:2102.05426, section 4",
        ),
    )
)
