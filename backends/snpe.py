"""Qualcomm Hexagon by SNPE / QAIRT: uint8 asymmetric per-tensor weights and activations, every tensor encoded.

Written: a float model.onnx and an encodings file for the converter, in version 1.0.0 or 0.6.1 of the public schema. Sign: an offset in
the file is -zero_point, so it is never positive for codes that start at 0. min and max are those of the grid, not of the data. Biases
are int32 at input scale x weight scale, as the converter makes them with a 32-bit bias width.
Sources: Qualcomm documentation, "QAIRT Quantization Specification"; AIMET, "Encoding Format Specification" 0.6.1 and 1.0.0.
"""

import json
from collections.abc import Mapping, Sequence

from qdeploy.backend import Backend, Fusion, OpRule, register
from qdeploy.ops import COMPUTE, EVERY, MAX_POOL, MOVE
from qdeploy.spec import Encoding, QuantSpec

ENCODINGS = "model.encodings"


def write_encodings(encodings: Sequence[Encoding], version: str) -> Mapping[str, str]:
    """The encodings file: activations under one key, weights, biases and constants under the other."""
    activations = [e for e in encodings if e.role == "activation"]
    parameters = [e for e in encodings if e.role != "activation"]
    content: dict[str, object]
    if version == "1.0.0":
        content = {
            "version": version,
            "activation_encodings": [_entry(e) for e in activations],
            "param_encodings": [_entry(e) for e in parameters],
        }
    else:
        content = {
            "version": version,
            "activation_encodings": {e.tensor: _channels(e) for e in activations},
            "param_encodings": {e.tensor: _channels(e) for e in parameters},
        }
    return {ENCODINGS: json.dumps(content, indent=1) + "\n"}


def _entry(encoding: Encoding) -> dict[str, object]:
    """One tensor in version 1.0.0: arrays over the channels."""
    return {
        "name": encoding.tensor,
        "dtype": "INT",
        "enc_type": "PER_TENSOR" if encoding.scale.size == 1 else "PER_CHANNEL",
        "bw": encoding.spec.bits,
        "is_sym": encoding.spec.symmetric,
        "scale": [float(s) for s in encoding.scale],
        "offset": [_offset(encoding, int(z)) for z in encoding.zero_point],
    }


def _channels(encoding: Encoding) -> list[dict[str, object]]:
    """One tensor in version 0.6.1: an object per channel, booleans as strings."""
    numbers = zip(encoding.scale, encoding.zero_point, encoding.low, encoding.high, strict=True)
    return [
        {
            "bitwidth": encoding.spec.bits,
            "dtype": "int",
            "is_symmetric": str(encoding.spec.symmetric),
            "max": float(high),
            "min": float(low),
            "offset": _offset(encoding, int(zero)),
            "scale": float(scale),
        }
        for scale, zero, low, high in numbers
    ]


def _offset(encoding: Encoding, zero_point: int) -> int:
    """The file counts codes from 0, so signed codes are moved up by their smallest full-range code."""
    signed_shift = 1 << (encoding.spec.bits - 1) if encoding.spec.signed else 0
    return -(zero_point + signed_shift)


SNPE = register(
    Backend(
        name="snpe",
        title="Qualcomm Hexagon, by SNPE / QAIRT",
        activation=QuantSpec(signed=False, symmetric=False),
        weight=QuantSpec(signed=False, symmetric=False),
        bias="int32",
        rules=(
            OpRule(ops=MOVE | MAX_POOL, inputs=True, output=True, share=True),
            OpRule(ops=EVERY, inputs=True, output=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add"}), tails=frozenset({"relu", "relu6"})),),
        emits="float",
        write=write_encodings,
        formats=("1.0.0", "0.6.1"),
        command="qairt-converter --input_network {out}/model.onnx --quantization_overrides {out}/model.encodings",
        runtimes=("onnxruntime", "openvino", "tvm", "qnn_htp"),
    )
)
