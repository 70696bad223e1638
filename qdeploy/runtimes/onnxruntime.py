"""ONNX Runtime on the CPU, with all graph optimizations ("all") and with none ("none").

Two of its optimizations change the numbers that the file describes, and are switched off in "all":

- `WeightBiasQuantization` rounds a bias that the file leaves float to int32 at `scale_x * scale_w`.
- `DoubleQDQPairsRemover` drops the first of two requantizations in a row, and its rounding with it.

What remains re-associates float operations. On processors without VNNI its uint8 x int8 kernels may saturate: that is how it deploys
there, and `verify` on such a machine shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdeploy.runtimes import Array, Runtime, runtimes

INEXACT_OPTIMIZERS = ("WeightBiasQuantization", "DoubleQDQPairsRemover")


@dataclass(frozen=True, slots=True)
class OrtSession:
    """A session of ONNX Runtime with any execution provider."""

    session: Any
    counts: Mapping[str, int] = field(default_factory=dict)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """All outputs for one batch of `inputs`, both in graph order."""
        names = [node.name for node in self.session.get_inputs()]
        outputs: list[Array] = self.session.run(None, dict(zip(names, inputs, strict=True)))
        return outputs

    def placement(self) -> Mapping[str, int]:
        """Compute nodes on the accelerator and on the CPU; empty where there is only a CPU."""
        return self.counts


def _open(path: Path, batch: int, variant: str) -> OrtSession:
    import onnxruntime as ort

    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.graph_optimization_level = {"all": levels.ORT_ENABLE_ALL, "none": levels.ORT_DISABLE_ALL}[variant]
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(INEXACT_OPTIMIZERS))
    return OrtSession(session)


runtimes.add(
    "onnxruntime",
    Runtime(
        name="onnxruntime",
        title="ONNX Runtime, CPU",
        module="onnxruntime",
        extra=None,
        min_agreement=0.999,
        open=_open,
        variants=("all", "none"),
    ),
)
