"""Tengine, uint8: asymmetric per-tensor weights and activations, int32 biases.

Placement: inputs and outputs of layers, poolings, adds, multiplications, concat, relu, PReLU, sigmoid, hardswish and resizing, graph
outputs included, whose scale the runtime wants. A relu or relu6 is computed with the convolution before it. Max pooling and ops that
only move data keep the encoding of their input; nothing else is shared.

Written: a float model.onnx with clipped weights and model.scale, one activation a line: tensor name, scale, zero_point in ONNX's sign.
The converter fuses a Conv with its Relu or Clip(0, 6), so the Conv's own output has a line with the same numbers. Weights and biases
are not listed: quant_tool quantizes them itself.
Sources: MQBench, "Tengine" deployment page and deploy_tengine (the file); PPQ, quantizer of TENGINE_INT8 (biases).
"""

from collections.abc import Mapping

from qdeploy.core.backend import Backend, Emitted, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, MAX_POOL, MEAN_POOL, MOVE
from qdeploy.core.spec import QuantSpec

SCALES = "model.scale"
_RELU = ("Relu", "Clip")


def write_scales(emitted: Emitted) -> Mapping[str, str]:
    """A line for each quantized activation, and for each Conv that has its numbers from the relu after it."""
    encoded = {e.tensor for e in emitted.encodings}
    convolutions = {node.outputs[0] for node in emitted.nodes if node.op == "Conv"} - encoded
    fused = {node.outputs[0]: node.inputs[0] for node in emitted.nodes if node.op in _RELU and node.inputs[0] in convolutions}
    lines: list[str] = []
    for encoding in emitted.encodings:
        if encoding.role == "activation":
            names = [encoding.tensor] + ([fused[encoding.tensor]] if encoding.tensor in fused else [])
            lines += [f"{name} {encoding.scale[0]!s} {encoding.zero_point[0]}\n" for name in names]
    return {SCALES: "".join(lines)}


_UINT8 = QuantSpec(signed=False, symmetric=False)
_CONCAT = frozenset({"concat"})
_RELUS = frozenset({"relu", "relu6"})
_OPS = COMPUTE | MEAN_POOL | _CONCAT | _RELUS | frozenset({"add", "mul", "batch_norm", "prelu", "sigmoid", "hardswish", "interpolate"})

TENGINE = register(
    Backend(
        name="tengine",
        title="Tengine, uint8",
        activation=_UINT8,
        weight=_UINT8,
        bias="int32",
        rules=(
            OpRule(ops=(MOVE - _CONCAT) | MAX_POOL, inputs=True, output=True, share=True),
            OpRule(ops=_OPS, inputs=True, output=True),
        ),
        fuse=(Fusion(heads=COMPUTE, tails=_RELUS),),
        formats=(
            Format(
                name="scale",
                model="float",
                words=True,
                clip_weights=True,
                write=write_scales,
                files=(SCALES,),
                command="tm_convert_tool -f onnx -m {out}/model.onnx -o {out}/model.tmfile && "
                "quant_tool_uint8 -m {out}/model.tmfile -o {out}/model_uint8.tmfile -i ./ -f {out}/model.scale",
                origin="public",
            ),
        ),
        sources=(
            "MQBench, Deployment, Tengine (docs/source/user_guide/deploy/tengine.rst) and mqbench/deploy/deploy_tengine.py",
            "PPQ, quantizer of platform TENGINE_INT8",
        ),
    )
)
