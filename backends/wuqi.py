"""WUQI: Ristretto's dynamic fixed point with 8 or 16 bits, weights and activations per tensor.

A code of b bits stands for q * 2^-f; f, the fraction length, may be negative or exceed b. Halves are rounded to even. A layer has one
fraction length for what enters it, so the inputs of an add share one, one for what leaves it, and one for its parameters. Ristretto's
Caffe layers trim the bias to the bits of the weights as well, which costs accuracy; hardware that took the scheme over sees to the bias
itself (CHaiDNN's guide says so). Here a bias is int32 at 2^-(f_in + f_params), the step of the accumulator that it is added to.

Placement: data between layers is fixed point everywhere. Max pooling and ops that only move data keep the fraction length of what
enters, concat included, and a relu is computed with the layer or add before it, which then has the relu's fraction length.

Written: a float model.onnx and quantization.prototxt (`qdeploy.formats.ristretto`). That WUQI reads the fields of Ristretto's layer
catalogue from such a file is not said anywhere public.
Sources: Ristretto, "Layer Catalogue" and "Approximation Schemes" (lepsucd.com); Gysel et al. 2016, arXiv:1605.06402; CHaiDNN,
"Quantization User Guide" (one fraction length for all inputs of an add; biases).
"""

from qdeploy.core.backend import Backend, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, EVERY, MAX_POOL, MOVE
from qdeploy.core.spec import QuantSpec
from qdeploy.formats.ristretto import PROTOTXT, write_fraction_lengths

_FIXED_POINT = QuantSpec(signed=True, symmetric=True, grid="power_of_two")

WUQI = register(
    Backend(
        name="wuqi",
        title="WUQI",
        activation=_FIXED_POINT,
        weight=_FIXED_POINT,
        bias="int32",
        rules=(
            OpRule(ops=MOVE | MAX_POOL, inputs=True, output=True, share=True),
            OpRule(ops=EVERY, inputs=True, output=True, align=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add"}), tails=frozenset({"relu", "relu6"})),),
        weight_bits=(8, 16),
        activation_bits=(8, 16),
        formats=(Format(name="ristretto", model="float", write=write_fraction_lengths, files=(PROTOTXT,), origin="public"),),
        sources=(
            "Ristretto, Layer Catalogue and Approximation Schemes (lepsucd.com/ristretto-cnn-approximation)",
            "Gysel et al. 2016, Hardware-oriented Approximation of Convolutional Neural Networks, arXiv:1605.06402",
            "Xilinx CHaiDNN, Quantization User Guide (docs/QUANTIZATION.md)",
        ),
    )
)
