"""OpenVINO on the CPU, in float32 and without its low-precision transformations.

By default OpenVINO rewrites a quantized graph to int8 kernels whose roundings are not those of the file. With
`LP_TRANSFORMS_MODE` off it computes the file as written: on a ResNet-20, 78 % of the outputs instead of 36 % then equal those
of ONNX Runtime, and top-1 agrees on 99.6 % instead of 98.2 % of 500 images.

The file is opened with a fixed batch: with a dynamic one, OpenVINO 2026.4 returned wrong numbers for quantized ResNets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.runtimes import Array, Runtime, runtimes

OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO"}


@dataclass(frozen=True, slots=True)
class _Session:
    model: Any

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """All outputs for one batch of `inputs`, both in graph order."""
        results = self.model(list(inputs))
        return [results[port].copy() for port in self.model.outputs]

    def placement(self) -> Mapping[str, int]:
        """Empty: there is only a CPU."""
        return {}


@contextmanager
def _no_telemetry() -> Iterator[None]:
    """Make `import openvino` use its own stub in place of the telemetry package, which sends each import over the network."""
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # the import system's way to say "not importable"
    try:
        yield
    finally:
        del sys.modules[name]


def _open(path: Path, batch: int, variant: str) -> _Session:
    with _no_telemetry():
        import openvino as ov

    core = ov.Core()
    model = core.read_model(str(path))
    shapes = {}
    for port in model.inputs:
        shape = port.partial_shape
        if shape.rank.get_length() and shape[0].is_dynamic:
            shape[0] = batch
        shapes[port] = shape
    model.reshape(shapes)
    return _Session(core.compile_model(model, "CPU", OPTIONS))


runtimes.add(
    "openvino",
    Runtime(
        name="openvino",
        title="OpenVINO, CPU",
        module="openvino",
        extra="openvino",
        min_agreement=0.995,
        open=_open,
    ),
)
