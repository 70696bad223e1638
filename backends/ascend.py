"""Huawei Ascend 310 by AMCT and ATC / ACL: int8 symmetric weights, int8 asymmetric activations, biases in float.

Placement: AMCT quantizes what enters a layer: 2-D convolutions (grouped ones too), linear layers, average pooling with a window, and
transposed convolutions without dilation and groups. Everything else is float. Convolution weights have a scale for each output
channel; the weights of linear layers and transposed convolutions one for all, since AMCT's record for ONNX takes a vector for
convolutions only. Rounding is to nearest, halves away from zero.

Written: a float model.onnx and record.txt, AMCT's record file: the text form of its protobuf, a record for each quantized layer, under
the name of the ONNX node. scale_d and offset_d are of the data, scale_w and offset_w of the weight, one line a channel, all scale_w
first. Sign: code = round(x / scale) + offset in -128..127, so offset_d is the zero_point of an int8 tensor, that of uint8 codes less
128: -128 for what a relu makes. offset_w is always 0. Average pooling has no weight and no such lines. Scales are confined to
2^-23..2^23, as PPQ does. The record has no `channels`, `height` and `width`: they are fields of AMCT's record for Caffe, not of that
for ONNX, though PPQ writes them there.

Then `atc --framework=5 --soc_version=Ascend310` takes the deploy model that AMCT saves.
Uncertain: AMCT's documents show save_model with a record that its own calibration has filled. They want models of opset 11, while
model.onnx is of a later one, and constant weights, while a linear layer on data of more than two dimensions has its weight behind a
Transpose.
Sources: Huawei CANN, AMCT documentation: ONNX post-training quantization (layers), "Record Files" (fields), "Quantization Algorithm
Principles" and "MIN-MAX" (sign and range); PPQ, quantizer and exporter for Ascend (rounding, layers).
"""

import json
from collections.abc import Iterator, Mapping

from qdeploy.core.backend import Backend, Emitted, Format, Geometry, Node, OpRule, register
from qdeploy.core.spec import Encoding, QuantSpec

RECORD = "record.txt"
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SMALLEST, _LARGEST = 2.0**-23, 2.0**23


def write_record(emitted: Emitted) -> Mapping[str, str]:
    """A record for each node whose data, and weight if it has one, are quantized, in the order of the model."""
    known = {e.tensor: e for e in emitted.encodings}
    # a weight may reach its MatMul through a Transpose
    stored = {node.outputs[0]: node.inputs[0] for node in emitted.nodes if node.op == "Transpose"}
    records: list[str] = []
    for node in emitted.nodes:
        data = known.get(node.inputs[0]) if node.inputs else None
        if data is None or data.role != "activation":
            continue
        if node.op in _LAYERS:
            weight = known.get(stored.get(node.inputs[1], node.inputs[1]))
            if weight is not None and weight.role == "weight":
                records.append(_record(node, data, weight))
        elif node.op == "AveragePool":
            records.append(_record(node, data, None))
    return {RECORD: "".join(records)}


def _record(node: Node, data: Encoding, weight: Encoding | None) -> str:
    fields = [*_numbers("d", data), *(_numbers("w", weight) if weight is not None else ())]
    lines = "".join(f"    {field}\n" for field in fields)
    return f"record {{\n  key: {json.dumps(node.name)}\n  value {{\n{lines}  }}\n}}\n"


def _numbers(suffix: str, encoding: Encoding) -> Iterator[str]:
    for scale in encoding.scale.clip(_SMALLEST, _LARGEST):
        yield f"scale_{suffix}: {scale!s}"
    for zero_point in encoding.zero_point:
        yield f"offset_{suffix}: {zero_point}"


_WEIGHT = QuantSpec(signed=True, symmetric=True, rounding="half_away")
_AMCT = (
    "import amct_onnx as amct; amct.create_quant_config('{out}/quant.json', '{out}/model.onnx'); "
    "amct.quantize_model('{out}/quant.json', '{out}/model.onnx', '{out}/modified.onnx', '{out}/calibrated.txt'); "
    "amct.save_model('{out}/modified.onnx', '{out}/record.txt', '{out}/model')"
)

ASCEND = register(
    Backend(
        name="ascend",
        title="Huawei Ascend 310, by AMCT and ATC / ACL",
        activation=QuantSpec(signed=True, symmetric=False, rounding="half_away"),
        weight=QuantSpec(signed=True, symmetric=True, axis=0, rounding="half_away"),
        bias="float",
        rules=(
            OpRule(ops=frozenset({"conv2d", "avg_pool2d"}), inputs=True),
            OpRule(ops=frozenset({"linear"}), inputs=True, weight=_WEIGHT),
            OpRule(
                ops=frozenset({"conv_transpose2d"}),
                inputs=True,
                weight=_WEIGHT,
                only=Geometry(dilation=(1, 1), grouped=False),
            ),
        ),
        formats=(
            Format(name="record", model="float", write=write_record, files=(RECORD,), command=f'python -c "{_AMCT}"', origin="public"),
        ),
        sources=(
            "Huawei CANN, AMCT documentation, record files and quantization algorithm principles (www.hiascend.com, devaids/amct)",
            "Huawei CANN, AMCT documentation, save_model and the layers that ONNX models may have quantized",
            "PPQ, ppq/quantization/quantizer/AscendQuantizer.py and ppq/parser/ascend_export.py",
        ),
    )
)
