"""Qualcomm's QNN for the Hexagon tensor processor (HTP), run by the x86 emulation of PyPI's onnxruntime-qnn.

The HTP rounds results a little differently from ONNX Runtime: about 2 % of the output codes of a convolution differ by one
step, with every option tried, so that top-1 agrees less often than on the other runtimes.
Only running and comparing is done here: the licence of the libraries forbids more.

Speed is about 40 ms an image for a ResNet-20 at every batch size.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from qdeploy.core.errors import NotInstalledError
from qdeploy.runtimes.onnxruntime import OrtSession
from qdeploy.runtimes.runtime import Runtime, quiet, runtimes

PROVIDER = "QNNExecutionProvider"
SOC_MODEL = "57"  # SM8650; with no SoC named, the emulation cannot finalize a graph

# Ops that compute nothing: boundaries between float and integer, and changes of shape.
NOT_COMPUTE = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast", "Identity", "Constant", "Shape"})
NOT_COMPUTE |= {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"}


@cache
def _device() -> Any:
    """The HTP as a device of ONNX Runtime; registers the provider's library, which a process may do only once."""
    import onnxruntime as ort
    import onnxruntime_qnn as qnn

    def devices() -> list[Any]:
        return [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]

    if not devices():
        ort.register_execution_provider_library(PROVIDER, qnn.get_library_path())
    found = devices()
    if not found:
        raise NotInstalledError("onnxruntime-qnn finds no device on this machine", action="run on x86-64 Linux, or on a Snapdragon")
    return found[0]


def _open(path: Path, batch: int, variant: str) -> OrtSession:
    with quiet():  # QNN's libraries print their settings
        import onnxruntime as ort
        import onnxruntime_qnn as qnn

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_free_dimension_override_by_name("batch", batch)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        htp = {
            "backend_path": qnn.get_qnn_htp_path(),
            "soc_model": SOC_MODEL,
            # The CPU quantizes the input and dequantizes the output, as the file says; the HTP's own rounding there differs.
            "offload_graph_io_quantization": "1",
        }
        options.add_provider_for_devices([_device()], htp)
        # WeightBiasQuantization stays on: the HTP computes only with int32 biases, and a float one gives wrong numbers.
        session = ort.InferenceSession(str(path), options, disabled_optimizers=["DoubleQDQPairsRemover"])
    return OrtSession(session, _placement(session))


def _placement(session: Any) -> dict[str, int]:
    """The number of compute nodes on the HTP and left to the CPU."""
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        place = "accelerator" if part.ep_name == PROVIDER else "fallback"
        counts[place] += sum(node.op_type not in NOT_COMPUTE for node in part.get_nodes())
    return {"accelerator": counts["accelerator"], "fallback": counts["fallback"]}


runtimes.add(
    "qnn_htp",
    Runtime(
        name="qnn_htp",
        title="Qualcomm QNN, HTP emulation",
        modules=("onnxruntime_qnn",),
        packages=("onnxruntime-qnn",),
        min_agreement=0.97,
        room=3.0,  # it took 0.3 dB where it took most; docs/verdicts.md
        open=_open,
        isolated=True,
        limit=3600.0,  # the emulation takes seconds for an image of a large network
        max_batch=10,
    ),
)
