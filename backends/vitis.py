"""Xilinx DPU by Vitis AI: int8 with power-of-two scales for weights, activations and biases, everything per tensor.

A scale is 2^-p, p the position of the binary point. Weights and biases are rounded half to even, activations too but with negative
halves up (-1.5 to -1, -2.5 to -2). A bias has 8 bits and a position of its own. The DPU averages by multiplying and shifting: a 3x3
average is the sum times 7 / 64.

Placement: network inputs and the output of every layer, pooling, add, multiplication, concat and resize are quantized, after the relu
that follows. Max pooling and ops that only move data keep the position of their input. No scales are shared otherwise.

Written: model.onnx with QuantizeLinear and DequantizeLinear, which the Vitis AI execution provider compiles, in standard operators and
so with halves to even; model.sim.onnx rounds and averages as the DPU. model_clip_ranges.json has the scale 2^-p of every tensor, in the
form in which MQBench hands it to its converter. The quant_info.json of AMD's own quantizer has [8, p] instead, but under names of that
tool's internal graph, so it cannot be written from outside.
Sources: MQBench, "Quantization Hardware, Vitis" (rounding, placement), deploy_linear (the file), convert_xir (averages); AMD, Vitis AI
User Guide UG1414 (power-of-two quantizer); ONNX Runtime documentation, Vitis AI execution provider.
"""

import json
from collections.abc import Mapping

from qdeploy.core.backend import Backend, Emitted, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, MAX_POOL, MEAN_POOL, MOVE
from qdeploy.core.spec import QuantSpec

RANGES = "model_clip_ranges.json"


def write_scales(emitted: Emitted) -> Mapping[str, str]:
    """The power-of-two scale of every activation, weight and bias, by tensor name."""
    scales = {e.tensor: {"scale": float(e.scale[0])} for e in emitted.encodings}
    return {RANGES: json.dumps({"vitis": scales}, indent=4) + "\n"}


_CONCAT = frozenset({"concat"})
_RELU = frozenset({"relu", "relu6"})
_OUTPUTS = COMPUTE | MEAN_POOL | _CONCAT | _RELU | frozenset({"add", "mul", "batch_norm", "prelu", "interpolate"})
_WEIGHT = QuantSpec(signed=True, symmetric=True, grid="power_of_two")

VITIS = register(
    Backend(
        name="vitis",
        title="Xilinx DPU, by Vitis AI",
        activation=QuantSpec(signed=True, symmetric=True, grid="power_of_two", rounding="dpu"),
        weight=_WEIGHT,
        bias=_WEIGHT,
        rules=(
            OpRule(ops=(MOVE - _CONCAT) | MAX_POOL, inputs=True, output=True, share=True),
            OpRule(ops=_OUTPUTS, inputs=True, output=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add"}), tails=_RELU),),
        average="shift",
        formats=(
            Format(
                name="qdq",
                write=write_scales,
                files=(RANGES,),
                command="onnxruntime.InferenceSession('{out}/model.onnx', providers=['VitisAIExecutionProvider'])",
                origin="public",
            ),
        ),
        sources=(
            "MQBench, Quantization Hardware, Vitis (docs/source/user_guide/hardware/vitis.rst)",
            "MQBench, mqbench/deploy/deploy_linear.py and mqbench/deploy/convert_xir.py",
            "AMD, Vitis AI User Guide UG1414, quantizer strategy pof2s",
            "ONNX Runtime documentation, Vitis AI execution provider",
        ),
    )
)
