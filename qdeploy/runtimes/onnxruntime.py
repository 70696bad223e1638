"""ONNX Runtime on the CPU.

"all" is the default session: what `onnxruntime.InferenceSession(file)` computes for whoever says nothing. "none" has no graph
optimization, and computes node by node what the file says. "faithful" has all of them but those that change the numbers that the file
describes, or fail on it; it runs where it is named, to tell whether one of these is why "all" parts from "none":

- `WeightBiasQuantization` rounds a bias that the file leaves float to int32 at `scale_x * scale_w`. The biases of our files are on that
  lattice already, but for sums beyond 2^24, as with 16-bit activations (97 dB).
- `DoubleQDQPairsRemover` drops the first of two requantizations in a row, and its rounding with it.
- Its integer softmax is an approximation (44 dB), of which a vision transformer makes 1 dB. So "faithful" goes without integer kernels
  where the file quantizes what enters and what leaves a softmax, which no file for ONNX Runtime itself does.
- Its integer kernels know no 4-bit activations, and what prepares for them stops at such a type.
- `QDQPropagationTransformer` writes the type of int8 activations where a later optimizer, which makes them uint8, does not look.

What remains re-associates float operations. On processors without VNNI its uint8 x int8 kernels may saturate: that is how it deploys
there, and `verify` on such a machine shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdeploy.runtimes.runtime import Array, Runtime, runtimes

INEXACT_OPTIMIZERS = ("WeightBiasQuantization", "DoubleQDQPairsRemover")
FAILS_ON_FOUR_BITS = "ClipQuantRewrite"
FAILS_ON_INT8 = "QDQPropagationTransformer"


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

    options = ort.SessionOptions()
    options.log_severity_level = 3  # prints less, and computes the same
    disabled: list[str] = []
    if variant == "none":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    elif variant == "faithful":
        disabled += INEXACT_OPTIMIZERS
        nodes, types = _graph(path)
        activations = _activation_types(nodes, types)
        few = bool(activations & {"INT4", "UINT4"})
        if few:
            disabled.append(FAILS_ON_FOUR_BITS)
        if few or _quantizes_softmax(nodes):
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if "INT8" in activations:
            disabled.append(FAILS_ON_INT8)
    return OrtSession(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled))


def _graph(path: Path) -> tuple[Sequence[Any], Mapping[str, str]]:
    """The nodes of a file, and the types of its initializers as ONNX names them."""
    import onnx

    graph = onnx.load(path).graph
    return graph.node, {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}


def _activation_types(nodes: Sequence[Any], types: Mapping[str, str]) -> set[str]:
    """The types of the codes that the file computes."""
    dequantized = [n for n in nodes if n.op_type == "DequantizeLinear" and len(n.input) > 2 and n.input[0] not in types]
    return {types.get(node.input[2], "") for node in dequantized}


def _quantizes_softmax(nodes: Sequence[Any]) -> bool:
    """Whether a softmax stands between codes."""
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    quantized = {node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    return any(node.op_type == "Softmax" and node.input[0] in dequantized and node.output[0] in quantized for node in nodes)


runtimes.add(
    "onnxruntime",
    Runtime(
        name="onnxruntime",
        title="ONNX Runtime, CPU",
        modules=("onnxruntime",),
        packages=("onnxruntime",),
        min_agreement=0.999,
        exact=True,
        open=_open,
        variants=("all", "none"),
        others=("faithful",),
        any_size=True,
    ),
)
