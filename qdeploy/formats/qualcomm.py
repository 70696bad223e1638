"""model.encodings, the file of Qualcomm's converters, by tensor names, in three versions of the public schema.

1.0.0, 0.6.1  offset = -zero_point for codes from 0, and -2^(bits - 1) for symmetric signed ones: never positive.
2.0.0         one list for all tensors, in the words and signs of ONNX QuantizeLinear: `output_dtype` int8, `y_zero_point` in ONNX's
              sign, `axis` the channel axis of the ONNX weight (1 for a transposed convolution).

The encodings of 0.6.1 have `min` and `max` of the grid, not of the data.
Sources: Qualcomm, "QAIRT Quantization Specification"; AIMET, "Encoding Format Specification" (all three schemas).
"""

import json
from collections.abc import Mapping

from qdeploy.core.backend import Emitted
from qdeploy.core.spec import Encoding

ENCODINGS = "model.encodings"


def write_2_0_0(emitted: Emitted) -> Mapping[str, str]:
    """One object a tensor, in the order of the plan."""
    return _file({"version": "2.0.0", "encodings": [_quantize_linear(e) for e in emitted.encodings]})


def write_1_0_0(emitted: Emitted) -> Mapping[str, str]:
    """Activations under one key, weights, biases and constants under the other; an object a tensor, with arrays over the channels."""
    activations, parameters = ([_entry(e) for e in part] for part in _parts(emitted))
    return _file({"version": "1.0.0", "activation_encodings": activations, "param_encodings": parameters})


def write_0_6_1(emitted: Emitted) -> Mapping[str, str]:
    """The same keys, by tensor name; an object a channel, booleans as strings."""
    activations, parameters = ({e.tensor: _channels(e) for e in part} for part in _parts(emitted))
    return _file({"version": "0.6.1", "activation_encodings": activations, "param_encodings": parameters})


def _parts(emitted: Emitted) -> tuple[list[Encoding], list[Encoding]]:
    activations = [e for e in emitted.encodings if e.role == "activation"]
    return activations, [e for e in emitted.encodings if e.role != "activation"]


def _file(content: Mapping[str, object]) -> Mapping[str, str]:
    return {ENCODINGS: json.dumps(content, indent=1) + "\n"}


def _quantize_linear(encoding: Encoding) -> dict[str, object]:
    spec = encoding.spec
    scales, zeros = [float(s) for s in encoding.scale], [int(z) for z in encoding.zero_point]
    entry: dict[str, object] = {"name": encoding.tensor}
    if spec.axis is None:
        entry |= {"y_scale": scales[0], "y_zero_point": zeros[0]}
    else:
        entry |= {"y_scale": scales, "y_zero_point": zeros, "axis": spec.axis}
    return entry | {"output_dtype": f"{'' if spec.signed else 'u'}int{spec.bits}"}


def _entry(encoding: Encoding) -> dict[str, object]:
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
    """Versions before 2.0.0 count codes from 0, so signed codes are moved up by their smallest full-range code."""
    return -(zero_point + (1 << (encoding.spec.bits - 1) if encoding.spec.signed else 0))


COMMAND = f"qairt-converter --input_network {{out}}/model.onnx --quantization_overrides {{out}}/{ENCODINGS}"
