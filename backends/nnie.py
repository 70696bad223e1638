"""HiSilicon NNIE (Hi3559, Hi3519, Hi3516): 8-bit logarithmic codes for weights and activations, per tensor; biases in float.

16 codes an octave: with the clip value c and z = 16 log2(c) - 127, a code of magnitude m stands for 2^((m + z) / 16), so that 127
stands for c. The mapper is told c, which must be an entry of its table gfpq_param_table_8bit: there 16 log2(c) is always an integer.
The hardware has a 16-bit mode too, but no public document gives its formula or table, so only 8 bits are offered.

Placement: the tensors that enter a layer, a pooling, an add, a multiplication, a concat, a PReLU or a resizing are quantized, through
ops that only move data; outputs are not. Convolutions with groups stay in float: the mapper would want parameters for every group.

Written: a float model.onnx with weights clipped to their c, and gfpq_param_dict.json: under the name of an ONNX node the c of each
quantized input, in input order, weights not counted. Left out are grouped convolutions and the ops in `_LEFT_OUT`. The mapper makes two
layers of an upsampling, so it has a second entry `<node>_permute_<n>`, n counting upsamplings. ONNX of today calls this op Resize; the
hardware only has the nearest one with a factor of 2.
Sources: MQBench, "Quantization Hardware, NNIE" (the code) and deploy_nnie (the file). The mapper's command line is not public.
"""

import json
import math
from collections.abc import Mapping

from qdeploy.core.backend import Backend, Emitted, Format, Geometry, Node, OpRule, register
from qdeploy.core.ops import CONVOLUTION, MOVE, POOL, WEIGHTED
from qdeploy.core.spec import LOG_STEPS, Encoding, QuantSpec

PARAMETERS = "gfpq_param_dict.json"
_LEFT_OUT = ("Flatten", "Relu", "PRelu", "Sigmoid", "Reshape", "Softmax", "CaffeSoftmax", "Clip", "GlobalAveragePool", "Mul")
_UPSAMPLE = ("Resize", "Upsample", "DynamicUpsample")


def write_parameters(emitted: Emitted) -> Mapping[str, str]:
    """The clip values of every node's inputs."""
    clips = {e.tensor: _clip_value(e) for e in emitted.encodings if e.role == "activation"}
    table: dict[str, list[float]] = {}
    upsamplings = 0
    for node in emitted.nodes:
        upsampling = node.op in _UPSAMPLE
        values = [clips[name] for name in node.inputs[: 1 if upsampling else None] if name in clips]
        if not values or node.op in _LEFT_OUT or _grouped(node):
            continue
        table[node.name] = values
        if upsampling:
            table[f"{node.name}_permute_{upsamplings}"] = values
            upsamplings += 1
    return {PARAMETERS: json.dumps({"nnie": {"gfpq_param_dict": table}}, indent=4) + "\n"}


def _grouped(node: Node) -> bool:
    return node.op in ("Conv", "ConvTranspose") and node.attributes.get("group", 1) != 1


def _clip_value(encoding: Encoding) -> float:
    """The table entry nearest to the limit of the grid, which float32 scales only reach within 1e-7."""
    return float(2.0 ** (round(LOG_STEPS * math.log2(encoding.high[0])) / LOG_STEPS))


_LOG = QuantSpec(signed=True, symmetric=True, grid="log")
_CONCAT = frozenset({"concat"})
_INPUTS = WEIGHTED | POOL | _CONCAT | frozenset({"add", "mul", "batch_norm", "prelu", "interpolate"})

NNIE = register(
    Backend(
        name="nnie",
        title="HiSilicon NNIE (Hi3559, Hi3519, Hi3516)",
        activation=_LOG,
        weight=_LOG,
        bias="float",
        rules=(
            OpRule(ops=CONVOLUTION, only=Geometry(grouped=True)),
            OpRule(ops=_INPUTS, inputs=True),
            OpRule(ops=MOVE - _CONCAT, share=True),
        ),
        formats=(Format(name="gfpq", model="float", clip_weights=True, write=write_parameters, files=(PARAMETERS,), origin="public"),),
        sources=(
            "MQBench, Quantization Hardware, NNIE (docs/source/user_guide/hardware/nnie.rst)",
            "MQBench, mqbench/deploy/deploy_nnie.py and mqbench/custom_quantizer/model_quantizer.py",
        ),
    )
)
