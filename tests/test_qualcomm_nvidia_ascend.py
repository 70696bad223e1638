"""The scale files of Qualcomm, NVIDIA and Ascend targets: signs, names, widths, channels, and what is left out.

The numbers are worked by hand: a scale of 1/2 or 1/4 is exact in float32, so the texts can be written down.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from toy import toy

from qdeploy.core.backend import Emitted, Geometry, Node, backends
from qdeploy.core.spec import Encoding, Grid, QuantSpec, Role

UINT8 = QuantSpec(signed=False, symmetric=False)
UINT16 = QuantSpec(bits=16, signed=False, symmetric=False)
INT8 = QuantSpec(signed=True, symmetric=True)
INT4 = QuantSpec(bits=4, signed=True, symmetric=True, axis=0)
OFFSET8 = QuantSpec(signed=True, symmetric=False)
QUALCOMM = [(name, version) for name in ("snpe", "qnn") for version in ("1.0.0", "0.6.1")]
HALF = ("adreno_fp16", "tensorrt_fp16", "ascend_fp16")


def encoding(tensor: str, spec: QuantSpec, scale: Sequence[float], zero: Sequence[int], role: Role = "activation") -> Encoding:
    return Encoding(tensor=tensor, role=role, spec=spec, scale=scale, zero_point=zero)


def emitted(encodings: Sequence[Encoding], nodes: Sequence[Node] = ()) -> Emitted:
    """No shape is known: none of these writers needs one."""
    return Emitted(encodings=tuple(encodings), nodes=tuple(nodes), shapes={}, inputs=("x",), outputs=("y",))


def write(backend: str, form: str, what: Emitted) -> dict[str, str]:
    writer = backends[backend].choose_format(form).write
    assert writer is not None
    return dict(writer(what))


def read(backend: str, version: str, *encodings: Encoding) -> dict[str, Any]:
    (text,) = write(backend, version, emitted(encodings)).values()
    content: dict[str, Any] = json.loads(text)
    assert content["version"] == version
    return content


def channels(content: dict[str, Any], key: str, tensor: str) -> list[tuple[int, float, int, bool]]:
    """Bits, scale, offset and whether symmetric of each channel, from version 1.0.0 or 0.6.1."""
    if content["version"] == "1.0.0":
        (entry,) = [e for e in content[key] if e["name"] == tensor]
        return [(entry["bw"], s, o, entry["is_sym"]) for s, o in zip(entry["scale"], entry["offset"], strict=True)]
    return [(e["bitwidth"], e["scale"], e["offset"], e["is_symmetric"] == "True") for e in content[key][tensor]]


@pytest.mark.parametrize(("backend", "version"), QUALCOMM)
def test_a_positive_zero_point_is_a_negative_offset(backend: str, version: str) -> None:
    content = read(backend, version, encoding("x", UINT8, [0.5], [128]), encoding("r", UINT8, [0.25], [0]))
    assert channels(content, "activation_encodings", "x") == [(8, 0.5, -128, False)]
    assert channels(content, "activation_encodings", "r") == [(8, 0.25, 0, False)]
    assert not content["param_encodings"]


@pytest.mark.parametrize(("backend", "version"), QUALCOMM)
def test_sixteen_bits_count_from_zero_as_well(backend: str, version: str) -> None:
    content = read(backend, version, encoding("x", UINT16, [0.5], [32768]))
    assert channels(content, "activation_encodings", "x") == [(16, 0.5, -32768, False)]


@pytest.mark.parametrize(("backend", "version"), QUALCOMM)
def test_weights_and_constants_are_parameters_with_a_number_a_channel(backend: str, version: str) -> None:
    weight = encoding("w", INT4, [0.5, 0.25], [0, 0], "weight")
    content = read(backend, version, weight, encoding("shift", UINT8, [0.5], [3], "constant"))
    assert channels(content, "param_encodings", "w") == [(4, 0.5, -8, True), (4, 0.25, -8, True)]
    assert channels(content, "param_encodings", "shift") == [(8, 0.5, -3, False)]


@pytest.mark.parametrize("backend", ["snpe", "qnn"])
def test_the_limits_in_the_older_file_are_those_of_the_grid(backend: str) -> None:
    content = read(backend, "0.6.1", encoding("x", UINT8, [0.5], [128]), encoding("w", INT8, [0.5], [0], "weight"))
    for entry in (content["activation_encodings"]["x"], content["param_encodings"]["w"]):
        assert [(e["min"], e["max"], e["dtype"]) for e in entry] == [(-64.0, 63.5, "int")]


def test_encodings_2_0_0_have_the_signs_and_words_of_onnx() -> None:
    weight = encoding("w", replace(INT4, axis=1), [0.5, 0.25], [0, 0], "weight")
    content = read("qnn", "2.0.0", encoding("x", UINT16, [0.5], [32768]), weight, encoding("s", INT8, [0.25], [0], "weight"))
    assert list(content) == ["version", "encodings"]
    assert content["encodings"] == [
        {"name": "x", "y_scale": 0.5, "y_zero_point": 32768, "output_dtype": "uint16"},
        {"name": "w", "y_scale": [0.5, 0.25], "y_zero_point": [0, 0], "axis": 1, "output_dtype": "int4"},
        {"name": "s", "y_scale": 0.25, "y_zero_point": 0, "output_dtype": "int8"},
    ]


def test_one_channel_is_still_per_channel_in_encodings_2_0_0() -> None:
    (entry,) = read("qnn", "2.0.0", encoding("w", INT4, [0.5], [0], "weight"))["encodings"]
    assert (entry["y_scale"], entry["y_zero_point"], entry["axis"]) == ([0.5], [0], 0)


@pytest.mark.parametrize("version", ["1.0.0", "0.6.1"])
def test_the_two_qualcomm_targets_write_the_same_of_the_same(version: str) -> None:
    what = toy(backends["qnn"])
    assert write("qnn", version, what) == write("snpe", version, what)


def test_tensorrt_has_ranges_of_127_steps_and_scales_in_hexadecimal() -> None:
    made = write("tensorrt", "implicit", emitted([encoding("a/x", INT8, [0.5], [0]), encoding("y", INT8, [2.0**-126], [0])]))
    assert json.loads(made["dynamic_range.json"]) == {"act_quant_info": {"a/x": 63.5, "y": pytest.approx(127 * 2.0**-126, rel=1e-6)}}
    # 0.5 is 0 01111110 0..., 2^-126 is 0 00000001 0...
    assert made["calibration.cache"] == "TRT-8501-EntropyCalibration2\na/x: 3f000000\ny: 00800000\n"


def test_the_ranges_and_the_cache_of_tensorrt_give_the_same_scale() -> None:
    scales = [0.0123456789 * 1.37**n for n in range(40)]
    made = write("tensorrt", "implicit", emitted([encoding(f"t{n}", INT8, [scale], [0]) for n, scale in enumerate(scales)]))
    ranges = json.loads(made["dynamic_range.json"])["act_quant_info"]
    for line in made["calibration.cache"].splitlines()[1:]:
        tensor, _, code = line.partition(": ")
        (scale,) = struct.unpack(">f", bytes.fromhex(code))
        assert ranges[tensor] == pytest.approx(127 * scale, rel=2**-23)


def test_tensorrt_lists_activations_only() -> None:
    weight = encoding("w", replace(INT8, narrow=True, axis=0), [0.5, 0.25], [0, 0], "weight")
    made = write("tensorrt", "implicit", emitted([weight, encoding("c", INT8, [0.5], [0], "constant")]))
    assert json.loads(made["dynamic_range.json"]) == {"act_quant_info": {}}
    assert made["calibration.cache"] == "TRT-8501-EntropyCalibration2\n"


def test_tensorrt_is_explicit_unless_asked_otherwise() -> None:
    form = backends["tensorrt"].choose_format()
    assert (form.name, form.model, form.write, form.origin) == ("explicit", "qdq", None, "standard")
    assert backends["tensorrt"].choose_format("implicit").clip_weights


X, R, P = encoding("x", OFFSET8, [0.5], [0]), encoding("r", OFFSET8, [0.25], [-128]), encoding("p", OFFSET8, [0.5], [3])
W = encoding("w", replace(INT8, axis=0), [0.5, 0.25], [0, 0], "weight")
ONE = encoding("one", INT8, [0.25], [0], "weight")


def node(name: str, op: str, *inputs: str) -> Node:
    return Node(name=name, op=op, inputs=inputs, outputs=(f"{name}_out",))


def record(key: str, *fields: str) -> str:
    lines = "".join(f"    {field}\n" for field in fields)
    return f'record {{\n  key: "{key}"\n  value {{\n{lines}  }}\n}}\n'


def ascend(*nodes: Node) -> str:
    (text,) = write("ascend", "record", emitted([X, R, P, W, ONE], nodes)).values()
    return text


def test_ascend_names_nodes_and_has_all_weight_scales_before_the_offsets() -> None:
    fields = ("scale_d: 0.25", "offset_d: -128", "scale_w: 0.5", "scale_w: 0.25", "offset_w: 0", "offset_w: 0")
    assert ascend(node("conv", "Conv", "r", "w", "bias")) == record("conv", *fields)


def test_the_data_offset_of_ascend_is_the_zero_point_of_signed_codes() -> None:
    assert "offset_d: 0\n" in ascend(node("conv", "Conv", "x", "w"))
    assert "offset_d: -128\n" in ascend(node("conv", "Conv", "r", "w"))
    assert "offset_d: 3\n" in ascend(node("conv", "Conv", "p", "w"))


@pytest.mark.parametrize("op", ["ConvTranspose", "Gemm", "MatMul"])
def test_a_layer_with_one_weight_scale_has_one_line_of_it_for_ascend(op: str) -> None:
    assert ascend(node("layer", op, "x", "one")) == record("layer", "scale_d: 0.5", "offset_d: 0", "scale_w: 0.25", "offset_w: 0")


def test_an_average_pooling_has_no_weight_lines_for_ascend() -> None:
    assert ascend(node("pool", "AveragePool", "p")) == record("pool", "scale_d: 0.5", "offset_d: 3")


def test_ascend_finds_a_weight_behind_a_transpose() -> None:
    made = ascend(node("turn", "Transpose", "one"), node("fc", "MatMul", "x", "turn_out"))
    assert made == record("fc", "scale_d: 0.5", "offset_d: 0", "scale_w: 0.25", "offset_w: 0")


def test_ascend_leaves_out_what_stays_in_float_and_keeps_the_order_of_the_model() -> None:
    nodes = [
        node("relu", "Relu", "x"),
        node("second", "Gemm", "r", "one"),
        node("float input", "Conv", "somewhere", "w"),
        node("float weight", "ConvTranspose", "x", "elsewhere"),
        node("two activations", "MatMul", "x", "r"),
        node("global", "GlobalAveragePool", "x"),
        node("no input", "Constant"),
        node("first", "Conv", "x", "w"),
    ]
    made = ascend(*nodes)
    assert [line for line in made.splitlines() if "key" in line] == ['  key: "second"', '  key: "first"']


def test_ascend_scales_are_confined_to_what_the_tool_takes() -> None:
    tiny = encoding("w", INT8, [2.0**-40], [0], "weight")
    huge = encoding("x", OFFSET8, [2.0**40], [0])
    text = write("ascend", "record", emitted([huge, tiny], [node("conv", "Conv", "x", "w")]))["record.txt"]
    scales = [float(line.split()[1]) for line in text.splitlines() if "scale" in line]
    assert scales == [2.0**23, pytest.approx(2.0**-23, rel=1e-7)]


@pytest.mark.parametrize(("backend", "form"), [(b, f.name) for b in ("snpe", "qnn", "tensorrt", "ascend") for f in backends[b].formats])
def test_a_file_of_the_toy_network_does_not_depend_on_the_shapes(backend: str, form: str) -> None:
    writer, whole = backends[backend].choose_format(form).write, toy(backends[backend])
    assert writer is None or writer(whole) == writer(replace(whole, shapes={}))


@pytest.mark.parametrize("name", HALF)
def test_a_half_precision_target_has_one_grid_for_everything_and_no_scale_file(name: str) -> None:
    backend = backends[name]
    grid: Grid = "float16_normal" if name == "adreno_fp16" else "float16"
    assert backend.activation == backend.weight == backend.bias == QuantSpec(bits=16, signed=True, symmetric=True, grid=grid)
    assert [(f.model, f.files) for f in backend.formats] == [("float16", ())]


PER_CHANNEL = {"qnn": ("conv1d", "conv2d", "conv3d", "conv_transpose2d"), "ascend": ("conv2d",)}
PER_TENSOR = {"qnn": ("linear",), "ascend": ("linear", "conv_transpose2d")}


@pytest.mark.parametrize("backend", ["qnn", "ascend"])
def test_weights_have_a_scale_a_channel_only_where_the_tool_takes_one(backend: str) -> None:
    target = backends[backend]
    plain = Geometry(kernel=(3, 3), stride=(1, 1), dilation=(1, 1), grouped=False)
    for ops, axis in ((PER_CHANNEL[backend], 0), (PER_TENSOR[backend], None)):
        for op in ops:
            rule = target.rule(op, plain)
            assert rule is not None and (rule.weight or target.weight).axis == axis, op


@pytest.mark.parametrize("changed", [{"dilation": (2, 2)}, {"grouped": True}])
def test_ascend_leaves_transposed_convolutions_in_float_that_its_tool_has_not(changed: dict[str, Any]) -> None:
    shape = replace(Geometry(kernel=(3, 3), stride=(1, 1), dilation=(1, 1), grouped=False), **changed)
    assert backends["ascend"].rule("conv_transpose2d", shape) is None
    assert backends["ascend"].rule("conv2d", shape) is not None
