"""Rockchip NPUs by RKNN-Toolkit2: uint8 asymmetric activations, int8 symmetric narrow per-channel weights, int32 biases.

That is the toolkit's "asymmetric_quantized-8" with its default method "channel"; the method "layer" has uint8 asymmetric weights per
tensor, and is chosen with --weight-scheme. Placement is PPQ's for this platform: inputs and outputs of convolutions, linear layers,
average pooling, relu, adds, multiplications, sigmoid and concat, a relu with the layer before it.

Written: a QDQ model.onnx alone, in opset 19, since the toolkit refuses later ones. It takes every scale from the file when it is told
not to quantize. Tried with RKNN-Toolkit2 2.5.0 from PyPI and its simulator (in an environment of its own: it wants torch 2.4 and numpy
1.26 at most): layers with uint8 weights came out with the same codes everywhere; int8 weights are put on another grid, which moves
codes by up to 2, and adds are rounded otherwise, by up to 3. A layer whose output is not quantized does not build. At the default
optimization level, 3, averages differ more. A free batch dimension has to be fixed with inputs= and input_size_list=.
Sources: PPQ, ppq/quantization/quantizer/RKNNQuantizer.py (placement, both schemes); Rockchip, RKNN-Toolkit2 documentation,
`rknn.config` (quantized_dtype, quantized_method), CHANGELOG (QAT models of ONNX, opset 12 to 19) and list of ONNX operators.
"""

from qdeploy.core.backend import Backend, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, MAX_POOL, MEAN_POOL, MOVE
from qdeploy.core.spec import QuantSpec

_UINT8 = QuantSpec(signed=False, symmetric=False)
_CONCAT = frozenset({"concat"})
_RELU = frozenset({"relu", "relu6"})
_OPS = COMPUTE | MEAN_POOL | _CONCAT | _RELU | frozenset({"add", "mul", "sigmoid", "leaky_relu"})

RKNN = register(
    Backend(
        name="rknn",
        title="Rockchip NPUs, by RKNN-Toolkit2",
        activation=_UINT8,
        weight=QuantSpec(signed=True, symmetric=True, narrow=True, axis=0),
        bias="int32",
        rules=(
            OpRule(ops=(MOVE - _CONCAT) | MAX_POOL, inputs=True, output=True, share=True),
            OpRule(ops=_OPS, inputs=True, output=True),
        ),
        fuse=(Fusion(heads=COMPUTE, tails=_RELU),),
        weight_schemes=(_UINT8,),
        formats=(
            Format(
                name="qdq",
                command="rknn.config(target_platform=..., optimization_level=2); rknn.load_onnx('{out}/model.onnx'); "
                "rknn.build(do_quantization=False); rknn.export_rknn('{out}/model.rknn')",
            ),
        ),
        opset=19,
        sources=(
            "PPQ, ppq/quantization/quantizer/RKNNQuantizer.py",
            "Rockchip, RKNN-Toolkit2 documentation, rknn.config (quantized_dtype, quantized_method)",
            "Rockchip, RKNN-Toolkit2, CHANGELOG.md (QAT models of ONNX; opset 12 to 19) and doc/RKNNToolKit2_OP_Support-v2.1.0.md",
        ),
    )
)
