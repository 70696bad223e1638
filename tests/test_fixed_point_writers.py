"""The scale files of the log, power-of-two and integer targets whose files name nodes: signs, names and units, worked by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from qdeploy.core.backend import Backend, Emitted, Geometry, Node, backends
from qdeploy.core.spec import Encoding, QuantSpec, Role

NNIE, SIGMASTAR, STPU, TENGINE, VITIS = (backends[name] for name in ("nnie", "sigmastar", "stpu", "tengine", "vitis"))
RISTRETTO = (backends["ambarella"], backends["wuqi"])
MINE = (*RISTRETTO, backends["ambarella_fp16"], NNIE, SIGMASTAR, STPU, TENGINE, VITIS)
POWER_OF_TWO = QuantSpec(signed=True, symmetric=True, grid="power_of_two")
LOG = QuantSpec(signed=True, symmetric=True, grid="log")
UINT8 = QuantSpec(signed=False, symmetric=False)
NARROW = QuantSpec(signed=True, symmetric=True, narrow=True)


def node(name: str, op: str, inputs: str, output: str, **attributes: object) -> Node:
    return Node(name=name, op=op, inputs=tuple(inputs.split()), outputs=(output,), attributes=attributes)


def encoded(tensor: str, spec: QuantSpec, scale: float | list[float], zero: int = 0, role: Role = "activation") -> Encoding:
    scales = scale if isinstance(scale, list) else [scale]
    return Encoding(tensor=tensor, role=role, spec=spec, scale=scales, zero_point=[zero] * len(scales))


def written(
    backend: Backend, nodes: list[Node], encodings: list[Encoding], shapes: Mapping[str, tuple[int | None, ...]] | None = None
) -> str:
    """The text of the one scale file of the one format."""
    (form,) = backend.formats
    assert form.write is not None
    made = form.write(Emitted(encodings=tuple(encodings), nodes=tuple(nodes), shapes=shapes or {}, inputs=("x",), outputs=()))
    assert tuple(made) == form.files
    return next(iter(made.values()))


def clip(tensor: str, value: float, role: Role = "activation") -> Encoding:
    """A log encoding with the clip value `value`: 127 steps of 1/16 octave above the scale."""
    return encoded(tensor, LOG, value * 2.0 ** (-127 / 16), role=role)


def nnie(nodes: list[Node], encodings: list[Encoding]) -> Any:
    return json.loads(written(NNIE, nodes, encodings))["nnie"]["gfpq_param_dict"]


class TestNnie:
    def test_a_clip_value_is_an_entry_of_the_table_although_the_scale_is_float32(self) -> None:
        for step in range(-200, 200, 7):
            value = 2.0 ** (step / 16)
            assert nnie([node("conv", "Conv", "x w", "y")], [clip("x", value)]) == {"conv": [value]}

    def test_the_key_is_the_node_and_the_values_are_those_of_its_quantized_inputs_in_their_order(self) -> None:
        nodes = [node("fc", "Gemm", "x w b", "y"), node("sum", "Add", "y x", "z"), node("pool", "MaxPool", "z", "p")]
        encodings = [clip("x", 1.0), clip("w", 0.5, "weight"), clip("y", 4.0), clip("z", 2.0)]
        assert nnie(nodes, encodings) == {"fc": [1.0], "sum": [4.0, 1.0], "pool": [2.0]}

    def test_ops_that_the_mapper_takes_no_parameters_for_are_left_out(self) -> None:
        ops = ["Flatten", "Relu", "PRelu", "Sigmoid", "Reshape", "Softmax", "Clip", "GlobalAveragePool", "Mul"]
        nodes = [node(op.lower(), op, "x", f"{op}_out") for op in ops] + [node("float", "MaxPool", "unknown", "y")]
        assert nnie(nodes, [clip("x", 1.0)]) == {}

    def test_grouped_convolutions_are_left_out_and_a_group_of_one_is_not(self) -> None:
        nodes = [node("depthwise", "Conv", "x w", "y", group=8), node("turned", "ConvTranspose", "x w", "t", group=2)]
        nodes += [node("one", "Conv", "x w", "z", group=1), node("plain", "Conv", "x w", "v")]
        assert nnie(nodes, [clip("x", 1.0)]) == {"one": [1.0], "plain": [1.0]}

    def test_an_upsampling_has_a_second_entry_with_a_running_number_and_only_its_first_input(self) -> None:
        nodes = [node("up_a", "Resize", "x  sizes", "a"), node("conv", "Conv", "a w", "b"), node("up_b", "Upsample", "b x", "c")]
        expected = {"up_a": [1.0], "up_a_permute_0": [1.0], "up_b": [2.0], "up_b_permute_1": [2.0]}
        assert nnie(nodes, [clip("x", 1.0), clip("b", 2.0)]) == expected

    def test_grouped_convolutions_stay_in_float_and_others_read_quantized_inputs(self) -> None:
        grouped, plain = (NNIE.rule("conv2d", Geometry(kernel=(3, 3), grouped=g)) for g in (True, False))
        assert grouped is not None and plain is not None
        assert (grouped.inputs, plain.inputs, plain.output) == (False, True, False)
        assert NNIE.formats[0].clip_weights and NNIE.bias == "float"


class TestVitis:
    def test_every_tensor_biases_included_has_its_power_of_two(self) -> None:
        encodings = [
            encoded("x", POWER_OF_TWO, 2.0**-6),
            encoded("conv.weight", POWER_OF_TWO, 2.0**-9, role="weight"),
            encoded("conv.bias", POWER_OF_TWO, 2.0**-12, role="bias"),
            encoded("y", POWER_OF_TWO, 4.0),
        ]
        scales = {"x": 0.015625, "conv.weight": 0.001953125, "conv.bias": 0.000244140625, "y": 4.0}
        assert json.loads(written(VITIS, [], encodings)) == {"vitis": {name: {"scale": scale} for name, scale in scales.items()}}

    def test_activations_round_as_the_dpu_and_parameters_half_to_even(self) -> None:
        assert isinstance(VITIS.bias, QuantSpec)
        assert (VITIS.activation.rounding, VITIS.weight.rounding, VITIS.bias.rounding) == ("dpu", "half_even", "half_even")
        assert VITIS.bias.bits == 8 and VITIS.average == "shift" and VITIS.weight.axis is None

    def test_concat_and_add_share_no_scale_and_max_pooling_does(self) -> None:
        assert [sharing(VITIS, op) for op in ("concat", "add", "max_pool2d", "reshape")] == [False, False, True, True]


def sharing(backend: Backend, op: str) -> bool:
    rule = backend.rule(op)
    assert rule is not None
    return rule.share


def layer(name: str, kind: str, *fields: tuple[str, int, int]) -> str:
    """A block of Ristretto's net description: (part, bits, fraction length)."""
    lines = [f'  name: "{name}"', f'  type: "{kind}"', "  quantization_param {"]
    lines += ["    precision: DYNAMIC_FIXED_POINT", "    rounding_scheme: NEAREST"]
    for part, bits, length in fields:
        lines += [f"    bw_{part}: {bits}", f"    fl_{part}: {length}"]
    return "\n".join(["layer {", *lines, "  }", "}", ""])


@pytest.mark.parametrize("backend", RISTRETTO, ids=lambda backend: backend.name)
class TestRistretto:
    def test_a_fraction_length_is_minus_the_exponent_of_the_scale_and_may_leave_the_width(self, backend: Backend) -> None:
        encodings = [
            encoded("x", POWER_OF_TWO, 8.0),
            encoded("w", POWER_OF_TWO, 2.0**-11, role="weight"),
            encoded("b", QuantSpec(signed=True, symmetric=True, bits=32), 2.0**-8, role="bias"),
            encoded("y", POWER_OF_TWO, 1.0),
        ]
        text = written(backend, [node("fc", "Gemm", "x w b", "y")], encodings)
        assert text == layer("fc", "FcRistretto", ("layer_in", 8, -3), ("layer_out", 8, 0), ("params", 8, 11))

    def test_a_layer_with_a_relu_leaves_with_the_relus_length_and_the_relu_has_no_block(self, backend: Backend) -> None:
        nodes = [node("deconv", "ConvTranspose", "x w", "c"), node("act", "Clip", "c low high", "r"), node("pool", "MaxPool", "r", "p")]
        encodings = [encoded("x", POWER_OF_TWO, 0.5), encoded("w", POWER_OF_TWO, 0.25, role="weight")]
        encodings += [encoded("r", POWER_OF_TWO, 2.0**-4), encoded("p", POWER_OF_TWO, 2.0**-4)]
        deconv = layer("deconv", "DeconvolutionRistretto", ("layer_in", 8, 1), ("layer_out", 8, 4), ("params", 8, 2))
        assert written(backend, nodes, encodings) == deconv + layer("pool", "MaxPool", ("layer_in", 8, 4), ("layer_out", 8, 4))

    def test_a_relu_on_its_own_has_a_block(self, backend: Backend) -> None:
        nodes = [node("act", "Relu", "x", "r"), node("float", "Gelu", "unknown", "y")]
        text = written(backend, nodes, [encoded("x", POWER_OF_TWO, 0.5), encoded("r", POWER_OF_TWO, 0.25)])
        assert text == layer("act", "Relu", ("layer_in", 8, 1), ("layer_out", 8, 2))

    def test_the_width_is_the_tensors_own_and_an_add_has_one_length_for_both_inputs(self, backend: Backend) -> None:
        wide = QuantSpec(signed=True, symmetric=True, bits=16, grid="power_of_two")
        encodings = [encoded(name, wide, 2.0**-12) for name in "ab"] + [encoded("y", POWER_OF_TWO, 2.0**-4)]
        text = written(backend, [node("sum", "Add", "a b", "y")], encodings)
        assert text == layer("sum", "Add", ("layer_in", 16, 12), ("layer_out", 8, 4))
        rule = backend.rule("add")
        assert rule is not None and rule.align

    def test_a_transposed_weight_belongs_to_the_matmul_that_reads_it(self, backend: Backend) -> None:
        nodes = [node("turn", "Transpose", "w", "wt"), node("product", "MatMul", "x wt", "y")]
        encodings = [encoded("w", POWER_OF_TWO, 0.25, role="weight"), encoded("x", POWER_OF_TWO, 0.5)]
        assert written(backend, nodes, encodings) == layer("product", "MatMul", ("layer_in", 8, 1), ("params", 8, 2))

    def test_biases_are_int32_at_a_power_of_two(self, backend: Backend) -> None:
        assert backend.bias == "int32" and backend.weight == backend.activation == POWER_OF_TWO


class TestSigmastar:
    def test_limits_are_lists_that_give_the_scales_again(self) -> None:
        wide = QuantSpec(signed=True, symmetric=True, narrow=True, bits=16, axis=0)
        int8 = QuantSpec(signed=True, symmetric=True)
        encodings = [
            encoded("x", int8, 0.03),
            encoded("w", wide, [1e-3, 2e-5], role="weight"),
            encoded("b", QuantSpec(signed=True, symmetric=True, bits=32, axis=0), [3e-5, 6e-7], role="bias"),
        ]
        x, w = json.loads(written(SIGMASTAR, [], encodings))
        assert x == {"name": "x", "min": [-3.81], "max": [3.81], "bit": 8}
        assert (w["name"], w["bit"], w["min"]) == ("w", 16, [-limit for limit in w["max"]])
        assert [limit / 32767 for limit in w["max"]] == pytest.approx([1e-3, 2e-5], rel=1e-7)

    def test_pooling_keeps_the_range_of_its_input(self) -> None:
        assert [sharing(SIGMASTAR, op) for op in ("adaptive_avg_pool2d", "max_pool2d", "concat", "conv2d")] == [True, True, True, False]


def stpu(nodes: list[Node], encodings: list[Encoding], **shapes: tuple[int | None, ...]) -> Any:
    return json.loads(written(STPU, nodes, encodings, shapes))


class TestStpu:
    def test_parameters_go_by_the_node_and_activations_by_the_tensor(self) -> None:
        encodings = [
            encoded("x", NARROW, 0.5),
            encoded("fc.weight", NARROW, 0.25, role="weight"),
            encoded("fc.bias", QuantSpec(signed=True, symmetric=True, bits=32), 0.125, role="bias"),
            encoded("y", NARROW, 1.0),
        ]
        assert stpu([node("gemm_7", "Gemm", "x fc.weight fc.bias", "y")], encodings) == {
            "x": {"min": -63.5, "max": 63.5},
            "gemm_7_weights": {"min": -31.75, "max": 31.75},
            "gemm_7_bias": {"alpha": 0.125, "zero_point": 0},
            "y": {"min": -127.0, "max": 127.0, "emin": 128},
        }

    def test_the_output_of_a_convolution_has_the_emin_of_its_largest_sum(self) -> None:
        # sqrt(3 * 5 * 5) = 8.66 times 127 / 16 times 127 / 32 = 273 > 127 / 8, and 2^8 <= 273 < 2^9: 8 + 127 - 10
        encodings = [encoded("x", NARROW, 1 / 16), encoded("w", NARROW, 1 / 32, role="weight"), encoded("y", NARROW, 1 / 8)]
        for op in ("Conv", "ConvTranspose"):
            assert stpu([node("conv", op, "x w", "y")], encodings, w=(4, 3, 5, 5))["y"]["emin"] == 125
        # with an output to 127 * 4 = 508 that is the largest; still in [2^8, 2^9)
        encodings[2] = encoded("y", NARROW, 8.0)
        assert stpu([node("conv", "Conv", "x w", "y")], encodings, w=(4, 3, 5, 5))["y"]["emin"] == 9 + 127 - 10

    def test_the_output_of_a_resizing_has_an_emin_of_its_own(self) -> None:
        encodings = [encoded(name, NARROW, 1 / 127) for name in "xy"]
        assert stpu([node("up", "Resize", "x  sizes", "y")], encodings)["y"] == {"min": -1.0, "max": 1.0, "emin": 127 - 20}

    def test_a_range_without_a_convolution_has_no_emin(self) -> None:
        nodes = [node("pool", "MaxPool", "x", "y")]
        assert stpu(nodes, [encoded("x", NARROW, 1.0), encoded("y", NARROW, 1.0)])["y"] == {"min": -127.0, "max": 127.0}

    def test_an_op_has_the_range_of_the_relu_that_it_is_computed_with_and_no_other(self) -> None:
        nodes = [
            node("sum", "Add", "x x", "s"),
            node("act", "Relu", "s", "r"),
            node("pool", "MaxPool", "r", "p"),
            node("b", "Relu", "p", "q"),
        ]
        table = stpu(nodes, [encoded(name, NARROW, scale) for name, scale in (("x", 1.0), ("r", 2.0), ("p", 2.0), ("q", 4.0))])
        assert table["s"] == table["r"] == table["p"] == {"min": -254.0, "max": 254.0}
        assert table["q"]["max"] == 508.0

    def test_a_transposed_weight_belongs_to_the_node_that_reads_it(self) -> None:
        nodes = [node("turn", "Transpose", "w", "wt"), node("product", "MatMul", "x wt", "y")]
        assert stpu(nodes, [encoded("w", NARROW, 1.0, role="weight")]) == {"product_weights": {"min": -127.0, "max": 127.0}}

    def test_concat_and_resizing_share_one_range(self) -> None:
        assert [sharing(STPU, op) for op in ("concat", "interpolate", "reshape", "conv2d", "add")] == [True, True, True, False, False]


class TestTengine:
    def test_lines_have_scale_and_the_code_of_zero_and_parameters_have_none(self) -> None:
        encodings = [encoded("x", UINT8, 0.5, 3), encoded("w", UINT8, 0.25, 7, "weight"), encoded("y", UINT8, 2.0**-20, 255)]
        assert written(TENGINE, [node("conv", "Conv", "x w", "y")], encodings) == "x 0.5 3\ny 9.536743e-07 255\n"

    def test_a_number_reads_back_as_the_float32_that_was_simulated(self) -> None:
        encoding = encoded("x", UINT8, 1 / 3)
        assert encoded("x", UINT8, float(written(TENGINE, [], [encoding]).split()[1])).scale == encoding.scale

    @pytest.mark.parametrize("activation", ["Relu", "Clip"])
    def test_a_convolution_has_the_numbers_of_the_relu_after_it_and_an_add_has_not(self, activation: str) -> None:
        nodes = [
            node("conv", "Conv", "x w", "c"),
            node("act", activation, "c", "r"),
            node("sum", "Add", "r r", "s"),
            node("b", "Relu", "s", "q"),
        ]
        encodings = [encoded("r", UINT8, 0.5, 3), encoded("q", UINT8, 0.25, 9)]
        assert written(TENGINE, nodes, encodings) == "r 0.5 3\nc 0.5 3\nq 0.25 9\n"

    def test_a_convolution_that_is_quantized_itself_keeps_its_numbers(self) -> None:
        nodes = [node("conv", "Conv", "x w", "c"), node("act", "Relu", "c", "r")]
        assert written(TENGINE, nodes, [encoded("c", UINT8, 0.5, 3), encoded("r", UINT8, 0.25)]) == "c 0.5 3\nr 0.25 0\n"

    def test_only_convolutions_are_fused_with_a_relu_and_concat_shares_nothing(self) -> None:
        assert TENGINE.fuses("conv2d", "relu6") and not TENGINE.fuses("add", "relu") and not sharing(TENGINE, "concat")


WIDTHS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "nnie": ((8,), (8,)),
    "vitis": ((8,), (8,)),
    "wuqi": ((8, 16), (8, 16)),
    "ambarella": ((8, 16), (8, 16)),
    "ambarella_fp16": ((16,), (16,)),
    "sigmastar": ((8, 16), (8, 16)),
    "stpu": ((8,), (8,)),
    "tengine": ((8,), (8,)),
}


@pytest.mark.parametrize("backend", MINE, ids=lambda backend: backend.name)
def test_the_widths_are_those_of_the_hardware_and_the_default_is_one_of_them(backend: Backend) -> None:
    assert (backend.weight_bits, backend.activation_bits) == WIDTHS[backend.name]
    assert backend.weight.bits in backend.weight_bits and backend.activation.bits in backend.activation_bits
    assert backend.sources and all(form.origin == "public" or form.model == "float16" for form in backend.formats)
