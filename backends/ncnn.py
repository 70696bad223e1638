"""ncnn on mobile CPUs: int8 symmetric narrow activations per tensor and weights per channel, halves away from zero, biases in float.

Only what enters a 2-D convolution or a matrix product is quantized; their outputs are float. Weights of 3x3 convolutions with stride 1,
dilation 1 and one group have 6 bits, -31..31, because ncnn computes them by Winograd's F(4, 3) in 16-bit integers.

Written: a float model.onnx and model.table. A line for each layer's weights, `<layer>_param_0` and a number for each output
channel, then one for each layer's input, `<layer>` and one number. The numbers are multipliers, 1 / scale, in float32 with six
decimals (more below 1, where six would not do) and a blank after each, as ncnn2table writes them. A line with a `#` before its
weights' name leaves the layer in float. ncnn has one weight scale a group: where a group has several output channels, the largest
scale of them is written, which holds them all, while the simulation has one each.

`<layer>` is the name of the node in model.onnx. onnx2ncnn keeps node names as layer names, ncnnoptimize those of convolutions; pnnx
does not: for its output, rename the layers in the .param or the lines here, which are both in the order of the graph. A layer whose
name is not found stays float without a word. Sources: ncnn, "Post Training Quantization Tools", tools/quantize/ncnn2table.cpp and
ncnn2int8.cpp, tools/onnx/onnx2ncnn.cpp."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from qdeploy.core.backend import Backend, Emitted, Format, Geometry, Node, OpRule, register
from qdeploy.core.spec import Encoding, QuantSpec

TABLE = "model.table"


def write_table(emitted: Emitted) -> Mapping[str, str]:
    """The weight lines, then the input lines, of every layer that has both encodings, in the order of the nodes."""
    known = {encoding.tensor: encoding for encoding in emitted.encodings}
    turned = {node.outputs[0]: node.inputs[0] for node in emitted.nodes if node.op == "Transpose"}
    weights, inputs = "", ""
    for node in emitted.nodes:
        if node.op not in ("Conv", "Gemm", "MatMul"):
            continue
        source, weight = known.get(node.inputs[0]), known.get(turned.get(node.inputs[1], node.inputs[1]))
        if source is not None and weight is not None and weight.role == "weight":
            weights += f"{node.name}_param_0 {_numbers(_of_groups(weight, node))}\n"
            inputs += f"{node.name} {_numbers(source.scale)}\n"
    return {TABLE: weights + inputs}


def _of_groups(weight: Encoding, node: Node) -> list[float]:
    """The scales as the node has them: one each output channel, or the largest of each group."""
    group = node.attributes.get("group", 1)
    assert isinstance(group, int)
    scales = [float(s) for s in weight.scale]
    size = len(scales) // group if group > 1 else 1
    return [max(scales[start : start + size]) for start in range(0, len(scales), size)]


def _numbers(scales: Iterable[float]) -> str:
    return "".join(f"{multiplier:.{_decimals(multiplier)}f} " for multiplier in _multipliers(scales))


def _multipliers(scales: Iterable[float]) -> list[float]:
    """1 / scale, rounded to float32."""
    rounded = Encoding(
        tensor="", role="weight", spec=_INT8_CHANNELS, scale=[1 / float(s) for s in scales], zero_point=[0 for _ in scales]
    )
    return [float(value) for value in rounded.scale]


def _decimals(multiplier: float) -> int:
    return 6 + max(0, -math.floor(math.log10(multiplier)))


_INT8 = QuantSpec(signed=True, symmetric=True, narrow=True, rounding="half_away")
_INT8_CHANNELS = replace(_INT8, axis=0)
_WINOGRAD = Geometry(kernel=(3, 3), stride=(1, 1), dilation=(1, 1), grouped=False)

NCNN = register(
    Backend(
        name="ncnn",
        title="Mobile CPUs, by ncnn",
        activation=_INT8,
        weight=_INT8_CHANNELS,
        bias="float",
        rules=(
            OpRule(ops=frozenset({"conv2d"}), inputs=True, weight=replace(_INT8_CHANNELS, bits=6), only=_WINOGRAD),
            OpRule(ops=frozenset({"conv2d", "linear"}), inputs=True),
        ),
        formats=(
            Format(
                name="table",
                model="float",
                words=True,
                write=write_table,
                files=(TABLE,),
                command="onnx2ncnn {out}/model.onnx {out}/model.param {out}/model.bin && "
                "ncnn2int8 {out}/model.param {out}/model.bin {out}/model-int8.param {out}/model-int8.bin {out}/model.table",
                origin="public",
            ),
        ),
        runtimes=("onnxruntime", "ncnn"),
        vendor_runtime="ncnn",
        sources=(
            "ncnn, Post Training Quantization Tools (docs/how-to-use-and-FAQ/quantized-int8-inference.md)",
            "ncnn, tools/quantize/ncnn2table.cpp and ncnn2int8.cpp, tools/onnx/onnx2ncnn.cpp",
        ),
    )
)
