"""The scale files of OpenPPL, ncnn and MNN, and qdeploy's own: signs, names and units, worked by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qdeploy.core.backend import Backend, Emitted, Geometry, Node, backends
from qdeploy.core.spec import Encoding, QuantSpec, Role

PPL_CUDA, PPL_W8A16, NCNN, MNN, RKNN, CEVA, ACADEMIC = (
    backends[name] for name in ("ppl_cuda", "ppl_w8a16", "ncnn", "mnn", "rknn", "ceva", "academic")
)
INT8 = QuantSpec(signed=True, symmetric=True)
CHANNELS = QuantSpec(signed=True, symmetric=True, axis=0)
UINT8 = QuantSpec(signed=False, symmetric=False)
UINT16 = QuantSpec(signed=False, symmetric=False, bits=16)
INT32 = QuantSpec(signed=True, symmetric=True, bits=32)


def node(name: str, op: str, inputs: str, outputs: str, **attributes: object) -> Node:
    return Node(name=name, op=op, inputs=tuple(inputs.split()), outputs=tuple(outputs.split()), attributes=attributes)


def encoded(tensor: str, scale: float | list[float], spec: QuantSpec = INT8, zero: int = 0, role: Role = "activation") -> Encoding:
    scales = scale if isinstance(scale, list) else [scale]
    return Encoding(tensor=tensor, role=role, spec=spec, scale=scales, zero_point=[zero] * len(scales))


def weight(tensor: str, *scales: float) -> Encoding:
    return encoded(tensor, list(scales), CHANNELS, role="weight")


def written(
    backend: Backend,
    nodes: list[Node],
    encodings: list[Encoding],
    outputs: tuple[str, ...] = (),
    shapes: dict[str, tuple[int | None, ...]] | None = None,
) -> str:
    """The text of the one scale file."""
    (form,) = backend.formats
    assert form.write is not None
    made = form.write(Emitted(encodings=tuple(encodings), nodes=tuple(nodes), shapes=shapes or {}, inputs=("x",), outputs=outputs))
    assert tuple(made) == form.files
    return next(iter(made.values()))


class TestNcnn:
    def test_all_weight_lines_come_before_all_input_lines_in_the_order_of_the_nodes(self) -> None:
        nodes = [node("first", "Conv", "x w b", "y"), node("relu", "Relu", "y", "r"), node("second", "Gemm", "r v c", "z")]
        encodings = [weight("v", 0.25), encoded("r", 0.5), weight("w", 0.125, 0.0625), encoded("x", 1.0)]
        expected = "first_param_0 8.000000 16.000000 \nsecond_param_0 4.000000 \nfirst 1.000000 \nsecond 2.000000 \n"
        assert written(NCNN, nodes, encodings) == expected

    def test_a_number_is_a_multiplier_in_float32_not_a_scale(self) -> None:
        # 0.5 / 127 in float32 is a little small, and 1 / it in float64 is 254.000001
        text = written(NCNN, [node("conv", "Conv", "x w", "y")], [encoded("x", 1 / 127), weight("w", 0.5 / 127, 0.5 / 31)])
        assert text == "conv_param_0 254.000000 62.000000 \nconv 127.000000 \n"

    @pytest.mark.parametrize("scale", [3.0, 700.0, 2.0e6])
    def test_a_multiplier_below_one_keeps_six_digits(self, scale: float) -> None:
        text = written(NCNN, [node("conv", "Conv", "x w", "y")], [encoded("x", scale), weight("w", 1.0)])
        assert float(text.split()[-1]) == pytest.approx(1 / scale, rel=1e-6)

    def test_a_group_has_the_multiplier_of_its_largest_scale_and_a_depthwise_layer_one_a_channel(self) -> None:
        scales = weight("w", 0.5, 0.25, 0.125, 1.0)
        grouped, depthwise = (
            written(NCNN, [node("c", "Conv", "x w", "y", group=g)], [encoded("x", 1.0), scales]).splitlines()[0] for g in (2, 4)
        )
        assert grouped == "c_param_0 2.000000 1.000000 "
        assert depthwise == "c_param_0 2.000000 4.000000 8.000000 1.000000 "

    def test_a_layer_without_both_encodings_has_no_line_and_other_ops_have_none(self) -> None:
        nodes = [node("a", "Conv", "x w", "y"), node("b", "Conv", "float v", "z"), node("s", "Add", "x x", "t")]
        assert written(NCNN, nodes, [encoded("x", 1.0), weight("v", 1.0)]) == ""

    def test_the_weight_of_a_matrix_product_is_found_behind_its_transpose(self) -> None:
        nodes = [node("turn", "Transpose", "w", "t"), node("fc", "MatMul", "x t", "y")]
        assert written(NCNN, nodes, [encoded("x", 0.5), weight("w", 0.25)]) == "fc_param_0 4.000000 \nfc 2.000000 \n"

    @pytest.mark.parametrize(
        ("change", "bits"),
        [({}, 6), ({"stride": (2, 2)}, 8), ({"dilation": (2, 2)}, 8), ({"grouped": True}, 8), ({"kernel": (1, 1)}, 8)],
    )
    def test_only_plain_3x3_convolutions_have_6_bit_weights(self, change: dict[str, Any], bits: int) -> None:
        shape: dict[str, Any] = {"kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1), "grouped": False} | change
        rule = NCNN.rule("conv2d", Geometry(**shape))
        assert rule is not None and rule.inputs and not rule.output
        spec = rule.weight or NCNN.weight
        assert (spec.bits, spec.qmin, spec.qmax) == (bits, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
        assert spec.rounding == NCNN.activation.rounding == "half_away"

    def test_what_is_no_convolution_in_2d_and_no_linear_layer_stays_float(self) -> None:
        assert all(NCNN.rule(op) is None for op in ("add", "conv1d", "conv_transpose2d", "max_pool2d", "matmul"))


def mnn(nodes: list[Node], encodings: list[Encoding], **more: Any) -> list[dict[str, Any]]:
    content = json.loads(written(MNN, nodes, encodings, **more))
    assert content["version"] == "0.0.0" and list(content) == ["version", "algo"], "not inside of a 'pipeline'"
    (algorithm,) = content["algo"]
    layers: list[dict[str, Any]] = algorithm["quant_params"]["layer"]
    return layers


class TestMnn:
    def test_a_layer_is_named_after_the_tensor_behind_its_relu_and_an_inner_one_has_its_own_name(self) -> None:
        nodes = [node("c", "Conv", "x w b", "y"), node("r", "Clip", "y low high", "z"), node("d", "Conv", "z v", "u")]
        encodings = [encoded("x", 0.5), weight("w", 1.0), encoded("z", 0.25), weight("v", 2.0), encoded("u", 0.125)]
        made = mnn(nodes, encodings)
        assert [[layer[part][0]["name"] for part in ("input", "weight", "output")] for layer in made] == [
            ["x", "w", "z"],
            ["z", "v", "u"],
        ]
        assert [layer["output"][0]["scales"] for layer in made] == [[0.25], [0.125]]

    def test_a_convolution_that_makes_an_output_is_named_as_before_the_change_of_layout(self) -> None:
        (layer,) = mnn([node("c", "Conv", "x w", "y")], [encoded("x", 1.0), weight("w", 1.0), encoded("y", 1.0)], outputs=("y",))
        assert layer["output"][0]["name"] == "y__before_tr" and layer["input"][0]["name"] == "x"

    def test_an_add_and_a_linear_layer_have_no_entry(self) -> None:
        nodes = [node("s", "Add", "x y", "z"), node("fc", "Gemm", "x w b", "y")]
        assert mnn(nodes, [encoded("x", 0.5), encoded("y", 0.25), encoded("z", 0.125), weight("w", 1.0)]) == []
        assert MNN.rule("linear") is None

    def test_a_grouped_convolution_is_left_out_and_a_depthwise_one_is_not(self) -> None:
        nodes = [node("g", "Conv", "x w", "y", group=2), node("d", "Conv", "x v", "z", group=4)]
        encodings = [encoded("x", 1.0), weight("w", 1.0), encoded("y", 1.0), weight("v", 1.0), encoded("z", 1.0)]
        (layer,) = mnn(nodes, encodings, shapes={"w": (4, 2, 3, 3), "v": (4, 1, 3, 3)})
        assert layer["weight"][0]["name"] == "v"


class TestPplCuda:
    def quant(self, nodes: list[Node], encodings: list[Encoding]) -> Any:
        return json.loads(written(PPL_CUDA, nodes, encodings))

    def test_the_scale_that_the_engine_computes_from_the_limits_is_the_scale(self) -> None:
        encodings = [encoded("x", 0.037), weight("w", 0.5 / 127, 1e-6)]
        info = self.quant([node("c", "Conv", "x w", "y")], encodings)["quant_info"]
        assert (info["x"]["tensor_max"] - info["x"]["tensor_min"]) / 255 == pytest.approx(info["x"]["scale"], rel=1e-12)
        for low, high, scale in zip(*(info["w"][key] for key in ("tensor_min", "tensor_max", "scale")), strict=True):
            assert (high - low) / 255 == pytest.approx(scale, rel=1e-12)

    def test_lists_are_for_per_channel_weights_and_numbers_that_are_no_codes_have_a_point(self) -> None:
        text = written(PPL_CUDA, [], [encoded("x", 1.0), weight("w", 1.0)])
        info = json.loads(text)["quant_info"]
        assert info["w"]["per_channel"] and info["w"]["zero_point"] == [0] and not info["x"]["per_channel"]
        assert '"tensor_min": -128.0' in text, "the engine's parser takes a number without a point for an integer"

    def test_equal_numbers_have_one_dominator_and_the_tensor_before_a_fused_activation_is_listed(self) -> None:
        nodes = [node("c", "Conv", "x w", "y"), node("r", "Sigmoid", "y", "z"), node("m", "MaxPool", "z", "p")]
        made = self.quant(nodes, [encoded("x", 1.0), weight("w", 1.0), encoded("z", 0.5), encoded("p", 0.5)])
        info = made["quant_info"]
        assert [(name, entry["hash"], entry["dominator"]) for name, entry in info.items()] == [
            ("x", 1, 1),
            ("w", 2, 2),
            ("z", 3, 3),
            ("y", 4, 3),
            ("p", 5, 3),
        ]
        assert list(made["op_info"]) == ["c", "r", "m"]

    def test_biases_are_left_out_and_a_node_with_a_float_tensor_does_not_run_in_int8(self) -> None:
        nodes = [node("c", "Conv", "x w b", "y"), node("s", "Add", "y unknown", "z"), node("t", "Softmax", "y", "u")]
        encodings = [encoded("x", 1.0), weight("w", 1.0), encoded("b", 1.0, INT32, role="bias"), encoded("y", 1.0), encoded("z", 1.0)]
        made = self.quant([node("f", "Exp", "x", "unknown"), *nodes], encodings)
        assert "b" not in made["quant_info"] and made["op_info"] == {"c": {"data_type": "INT8"}}


class TestPplW8A16:
    def test_zero_points_are_positive_and_min_and_max_are_those_of_the_grid(self) -> None:
        encodings = [encoded("x", 2.0**-15, UINT16, 32768), encoded("w", 2.0**-8, UINT8, 100, "weight")]
        made = json.loads(written(PPL_W8A16, [], encodings))["ppl"]
        assert made["x"] == {"step": 2.0**-15, "zero_point": 32768, "min": -1.0, "max": 32767 / 32768, "bit": 16, "type": "biased"}
        assert made["w"] == {"step": 2.0**-8, "zero_point": 100, "min": -100 / 256, "max": 155 / 256, "bit": 8, "type": "biased"}


class TestOwn:
    def test_zero_points_have_the_sign_of_onnx_and_numbers_read_back_exactly(self) -> None:
        entry = encoded("x", 0.1, UINT8, 100)
        content = json.loads(written(CEVA, [], [entry, encoded("w", [0.1, 0.3], CHANNELS, role="weight")]))
        first, second = content["tensors"]
        assert (first["zero_point"], first["qmin"], first["qmax"], first["axis"]) == ([100], 0, 255, None)
        assert first["scale"] == [float(entry.scale[0])] != [0.1]
        assert (second["axis"], second["zero_point"], QuantSpec.parse(second["scheme"])) == (0, [0, 0], CHANNELS)


def test_rockchips_toolkit_gets_a_file_in_an_opset_that_it_takes() -> None:
    (form,) = RKNN.formats
    assert RKNN.opset <= 19 and form.model == "qdq" and not form.files


def test_without_hardware_any_width_and_scheme_goes_and_only_what_enters_layers_is_quantized() -> None:
    assert ACADEMIC.any_scheme and ACADEMIC.first_last_bits == 8
    assert ACADEMIC.weight_bits == ACADEMIC.activation_bits == tuple(range(2, 17))
    assert not any(rule.output for rule in ACADEMIC.rules) and ACADEMIC.rule("add") is None
