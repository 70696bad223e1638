"""qdeploy's own scale file, for targets whose format is not public: `encodings.json`, described in docs/encodings.md.

    {"schema": "qdeploy-encodings", "version": 1, "tensors": [
      {"name": "x", "role": "activation", "scheme": "uint8 asymmetric per-tensor", "bits": 8, "grid": "uniform",
       "rounding": "half_even", "qmin": 0, "qmax": 255, "axis": null, "scale": [0.5], "zero_point": [2]}
    ]}

A code q stands for (q - zero_point) * scale; zero_point is the code of 0, as in ONNX.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from qdeploy.core.backend import Emitted
from qdeploy.core.spec import Encoding

ENCODINGS = "encodings.json"


def write_encodings(emitted: Emitted) -> Mapping[str, str]:
    """The file, one tensor a line, in the order of the plan."""
    lines = ",\n".join(f"  {json.dumps(_entry(encoding))}" for encoding in emitted.encodings)
    return {ENCODINGS: f'{{"schema": "qdeploy-encodings", "version": 1, "tensors": [\n{lines}\n]}}\n'}


def _entry(encoding: Encoding) -> dict[str, object]:
    spec = encoding.spec
    entry: dict[str, object] = {
        "name": encoding.tensor,
        "role": encoding.role,
        "scheme": spec.describe(),
        "bits": spec.bits,
        "grid": spec.grid,
        "rounding": spec.rounding,
    }
    if spec.linear:
        entry |= {"qmin": spec.qmin, "qmax": spec.qmax, "axis": spec.axis}
    return entry | {"scale": [float(s) for s in encoding.scale], "zero_point": [int(z) for z in encoding.zero_point]}
