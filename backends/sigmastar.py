"""SigmaStar IPU: 8 or 16 bits, symmetric, weights per output channel and activations per tensor.

Placement: whatever enters or leaves an op is quantized, after the relu that follows it. Pooling keeps the range of its input, as
SigmaStar's operator table says of AvgPool, and so do ops that only move data. Biases are int32 at input scale x weight scale.

Written: a float model.onnx and quantization.json, which ConvertTool takes as `--quant_file`: a list with an object for each tensor: its
`name`, lists `min` and `max` with a number for the tensor or one for each output channel, and `bit`. The limits are those of the codes
-qmax..qmax, so that max / qmax is the scale; code -qmax - 1 is not counted, as its value would widen a symmetric range. Biases are not
listed: the tool makes them. It also wants an input_config.ini, with the normalization of the images and the input format on the board,
which only the user knows; 16 bits need `input_format = ALL_INT16` in its [CONV_CONFIG].
Uncertain: names are those of model.onnx; a weight that the tool renames as it rewrites the graph is calibrated by the tool itself.
Sources: SigmaStar, IPU toolchain documentation, "Model Conversion" (input_config.ini) and "Using SGS_IPU_SDK to Build a Model"
(pooling); SGS_IPU_SDK, ConvertTool and calibrator_custom.utils.check_quant_param (the file).
"""

import json
from collections.abc import Mapping

from qdeploy.core.backend import Backend, Emitted, Format, Fusion, OpRule, register
from qdeploy.core.ops import COMPUTE, EVERY, MOVE, POOL
from qdeploy.core.spec import Encoding, QuantSpec

RANGES = "quantization.json"


def write_ranges(emitted: Emitted) -> Mapping[str, str]:
    """The range and width of every tensor but the biases, one a line."""
    lines = ",\n".join(f" {json.dumps(_entry(e))}" for e in emitted.encodings if e.role != "bias")
    return {RANGES: f"[\n{lines}\n]\n"}


def _entry(encoding: Encoding) -> dict[str, object]:
    # the shortest decimals that float32 tells apart: the file says 2.54 and not 2.5399999432265759
    limits = [float(str(limit)) for limit in encoding.high.astype("float32")]
    return {"name": encoding.tensor, "min": [-limit for limit in limits], "max": limits, "bit": encoding.spec.bits}


SIGMASTAR = register(
    Backend(
        name="sigmastar",
        title="SigmaStar IPU",
        activation=QuantSpec(signed=True, symmetric=True),
        weight=QuantSpec(signed=True, symmetric=True, narrow=True, axis=0),
        bias="int32",
        rules=(
            OpRule(ops=MOVE | POOL, inputs=True, output=True, share=True),
            OpRule(ops=EVERY, inputs=True, output=True),
        ),
        fuse=(Fusion(heads=COMPUTE | frozenset({"add"}), tails=frozenset({"relu", "relu6"})),),
        weight_bits=(8, 16),
        activation_bits=(8, 16),
        formats=(
            Format(
                name="quant_file",
                model="float",
                write=write_ranges,
                files=(RANGES,),
                command="python3 ConvertTool.py onnx --model_file {out}/model.onnx --input_arrays INPUTS --input_shapes SHAPES "
                "--output_arrays OUTPUTS --input_config input_config.ini --quant_file {out}/quantization.json "
                "--output_file {out}/model_float.sim",
                origin="public",
            ),
        ),
        sources=(
            "SigmaStar, IPU toolchain documentation, Model Conversion (doc.comake.online)",
            "SigmaStar, Using SGS_IPU_SDK to Build a Model, Operator Details",
            "SigmaStar SGS_IPU_SDK, Scripts/ConvertTool/ConvertTool.py and calibrator_custom/utils.py (check_quant_param)",
        ),
    )
)
