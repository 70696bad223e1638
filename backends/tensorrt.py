"""NVIDIA GPUs by TensorRT: int8 symmetric weights per channel and activations per tensor, biases in float.

Only the tensors that enter a layer are quantized, once each, whoever reads them; what a layer makes stays in float until the next
one reads it, and so does the model's output. A residual add is computed inside the convolution before it, so only its other branch,
the skip, is quantized; one behind a linear layer, as in transformers, is computed in float. Weights are narrow ([-127, 127]);
activations saturate at -128, as QuantizeLinear does.

Written, explicit: model.onnx with QuantizeLinear and DequantizeLinear. TensorRT computes what it says.
Written, implicit: a float model.onnx with clipped weights, and the ranges of activations by tensor name, twice:
calibration.cache   what a TensorRT calibrator stores: a header, then `tensor: hex`, the big-endian float32 of the scale, as text.
dynamic_range.json  {"act_quant_info": {tensor: 127 x scale}}, the limit v of ITensor's dynamic range (-v, v), in the form that PPQ's
                    write_qparams_onnx2trt.py sets.
In implicit mode TensorRT scales the weights itself, by max|w| / 127 of each channel, and chooses freely which layers run in int8, so
the engine may differ from model.sim.onnx. The mode is deprecated since TensorRT 10.1; the header names 8.5.1, and another release may
ask for its own number there.
Sources: TensorRT developer guide, "Explicit quantization" and "Calibration"; NVIDIA Model-Optimizer, ONNX int8 quantization (placement)
and import_scales_from_calib_cache (the cache); PPQ, TensorRT exporter and write_qparams_onnx2trt.py (the JSON).
"""

import json
import struct
from collections.abc import Mapping

from qdeploy.core.backend import Backend, Emitted, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, MAX_POOL, MEAN_POOL, MOVE
from qdeploy.core.spec import QuantSpec

RANGES = "dynamic_range.json"
CACHE = "calibration.cache"
HEADER = "TRT-8501-EntropyCalibration2"


def write_ranges(emitted: Emitted) -> Mapping[str, str]:
    """The range of every quantized activation, as JSON and as calibration cache."""
    activations = [e for e in emitted.encodings if e.role == "activation"]
    # the shortest decimals that float32 tells apart: the file says 2.54 and not 2.5399999432265759
    ranges = {e.tensor: float(str((e.scale * e.spec.qmax)[0])) for e in activations}
    lines = [HEADER, *(f"{e.tensor}: {struct.pack('>f', e.scale[0]).hex()}" for e in activations)]
    return {RANGES: json.dumps({"act_quant_info": ranges}, indent=1) + "\n", CACHE: "\n".join(lines) + "\n"}


_BUILD = "trtexec --onnx={out}/model.onnx --saveEngine={out}/model.engine --int8"

TENSORRT = register(
    Backend(
        name="tensorrt",
        title="NVIDIA GPUs, by TensorRT",
        activation=QuantSpec(signed=True, symmetric=True),
        weight=QuantSpec(signed=True, symmetric=True, narrow=True, axis=0),
        bias="float",
        rules=(
            OpRule(ops=COMPUTE | MEAN_POOL | frozenset({"add"}), inputs=True),
            OpRule(ops=MOVE | MAX_POOL, share=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add"}), tails=frozenset({"relu", "relu6"})),),
        residual="skip",
        formats=(
            Format(name="explicit", command=_BUILD),
            Format(
                name="implicit",
                model="float",
                clip_weights=True,
                write=write_ranges,
                files=(RANGES, CACHE),
                command=f"{_BUILD} --calib={{out}}/{CACHE}",
                origin="public",
            ),
        ),
        runtimes=("onnxruntime", "openvino", "tvm"),
        sources=(
            "NVIDIA, TensorRT developer guide, quantized types and calibration",
            "NVIDIA Model-Optimizer, modelopt/onnx/quantization (int8.py, graph_utils.py, calib_utils.py)",
            "PPQ, ppq/parser/tensorRT.py and ppq/utils/write_qparams_onnx2trt.py",
        ),
    )
)
