"""One encoding as ONNX nodes: every scheme that there is, against `arith`, in ONNX Runtime and in ONNX's own reference evaluator."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import networks
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional as F

import qdeploy
from qdeploy.core.backend import Backend, Format, Fusion, OpRule
from qdeploy.core.ops import COMPUTE, EVERY, MAX_POOL, MEAN_POOL, MOVE
from qdeploy.core.spec import Encoding, QuantSpec
from qdeploy.export import emit
from qdeploy.export.artifact import SIMULATION, Artifact
from qdeploy.export.lower import Lowering, fills_type, onnx_type
from qdeploy.export.onnx_functions import DOMAIN, add_functions
from qdeploy.numerics import arith
from qdeploy.simulation.prepared import Prepared

parse = QuantSpec.parse
SKIPS = (OpRule(ops=COMPUTE | MEAN_POOL | frozenset({"add", "mul"}), inputs=True), OpRule(ops=MOVE | MAX_POOL, share=True))
AVERAGES = (OpRule(ops=MOVE | MAX_POOL | MEAN_POOL, inputs=True, output=True, share=True), OpRule(ops=EVERY, inputs=True, output=True))


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A backend of the test: its specs in words."""

    activation: str
    weight: str = "int8 narrow per-channel"
    bias: str = "int32"
    form: str = "qdq"
    more: Mapping[str, object] = field(default_factory=dict)

    def backend(self, name: str) -> Backend:
        place = {
            "rules": (OpRule(ops=MOVE | MAX_POOL, inputs=True, output=True, share=True), OpRule(ops=EVERY, inputs=True, output=True))
        }
        return Backend(
            name=name,
            title=name,
            activation=parse(self.activation),
            weight=parse(self.weight),
            bias=self.bias if self.bias in ("int32", "float") else parse(self.bias),
            fuse=(Fusion(heads=COMPUTE | frozenset({"add"}), tails=frozenset({"relu", "relu6"})),),
            formats=(Format(name=self.form, model=self.form),),
            **(place | dict(self.more)),
        )


SCHEMES = {
    "uint8": Scheme(activation="uint8"),
    "skip branch in float": Scheme(activation="uint8", bias="float", more={"rules": SKIPS, "residual": "skip"}),
    "averages keep scales": Scheme(activation="int8 narrow", more={"rules": AVERAGES}),
    **{f"{bits} bits": Scheme(activation=f"uint{bits}", weight=f"int{bits} per-channel") for bits in (2, 3, 4, 5, 6, 7, 12, 16)},
    **{f"narrow, {bits} bits": Scheme(activation=f"int{bits} narrow", weight=f"int{bits} narrow") for bits in (3, 4, 8, 12, 16)},
    "asymmetric, signed": Scheme(activation="int6 asymmetric", weight="int7 asymmetric per-channel"),
    "asymmetric weights": Scheme(activation="uint8", weight="uint5 per-channel"),
    "half away": Scheme(activation="int8 half-away", weight="int8 half-away per-channel"),
    "half away, float bias": Scheme(
        activation="int8 asymmetric half-away", weight="int8 half-away", bias="float", more={"rules": SKIPS}
    ),
    "half away, odd width": Scheme(activation="uint5 half-away", weight="int3 half-away"),
    "half away, averages keep scales": Scheme(activation="uint8 half-away", more={"rules": AVERAGES}),
    "power of two": Scheme(activation="int8 power-of-two", weight="int8 power-of-two"),
    "power of two, 4 bits per channel": Scheme(activation="uint4 power-of-two", weight="int4 power-of-two per-channel"),
    "power of two activations only": Scheme(activation="int8 power-of-two", weight="int8 per-channel"),
    "bias of its own": Scheme(activation="int8 power-of-two", weight="int8 power-of-two", bias="int16 power-of-two"),
    "uniform bias of its own": Scheme(activation="uint8", bias="int12 narrow"),
    "DPU": Scheme(
        activation="int8 power-of-two dpu",
        weight="int8 power-of-two",
        bias="int8 power-of-two",
        more={"average": "shift"},
    ),
    "DPU, 6 bits": Scheme(activation="int6 power-of-two dpu", weight="int5 power-of-two", more={"average": "shift"}),
    "log": Scheme(activation="log8", weight="log8", bias="float", form="float"),
    "log weights": Scheme(activation="uint8", weight="log8", bias="float", form="float"),
    "log activations": Scheme(activation="log8", bias="float", form="float"),
    "float16": Scheme(activation="float16", weight="float16", bias="float16", form="float16"),
    "float16 without subnormals": Scheme(activation="float16-normal", weight="float16-normal", bias="float16-normal", form="float16"),
    "float16 weights": Scheme(activation="uint8", weight="float16", bias="float", form="float"),
}
TARGETS = {name: scheme.backend(name) for name, scheme in SCHEMES.items()}
STANDARD = [name for name, scheme in SCHEMES.items() if scheme.form == "qdq"]


class Pools(nn.Module):
    """Average poolings of 3 x 3, 7 x 7 and 8 x 8 elements, each of codes of another scale, and two that a target divides exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.next = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = F.relu(self.stem(x))
        y = self.next(x)
        small, padded = F.avg_pool2d(y, 3, 1), F.avg_pool2d(y, 3, 2, 1)
        return (
            self.fc(torch.cat([y.mean((2, 3)), F.adaptive_avg_pool2d(x, 1).flatten(1), F.avg_pool2d(x, 7, 1)[:, :, 0, 0]], 1)),
            small,
            padded,
        )


@cache
def made(network: str) -> dict[str, Prepared]:
    model = networks._seeded(Pools) if network == "pools" else networks.network(network)
    return networks.several(model, networks.batches(network), tuple(TARGETS.values()))


@cache
def folder(network: str, scheme: str) -> Path:
    place = networks.FOLDER / f"scheme-{network}-{scheme.replace(' ', '-')}"
    return networks.once(place, lambda: qdeploy.convert(made(network)[scheme], place, accept=True).path)


def artifact(network: str, scheme: str) -> Artifact:
    return Artifact.open(folder(network, scheme))


def run(path: Path | bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    source = path if isinstance(path, bytes) else str(path)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def saved(opened: Artifact) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    arrays = opened.reference()
    feeds = {spec["name"]: arrays[f"input.{spec['name']}"] for spec in opened.inputs}
    return feeds, [arrays[f"simulated.{name}"] for name in opened.outputs]


WHOLE = ["mixed", pytest.param("residual", marks=pytest.mark.slow), "pools"]


@pytest.mark.parametrize("network", WHOLE)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_literal_run_of_every_scheme_makes_the_codes_of_the_torch_simulation(network: str, scheme: str) -> None:
    opened = artifact(network, scheme)
    feeds, wanted = saved(opened)
    encodings = {e.tensor: e for e in opened.encodings}
    for name, value, simulated in zip(opened.outputs, run(opened.simulation, feeds), wanted, strict=True):
        # sums of log and half-precision values, and of codes of 16 bits, depend on their order
        exact = (
            name in encodings
            and encodings[name].spec.linear
            and all(e.spec.linear and e.spec.bits in (*range(9), 32) for e in encodings.values())
        )
        if exact:
            np.testing.assert_array_equal(value, simulated)
        else:
            assert_near(value, simulated, encodings.get(name))
    assert np.abs(wanted[0]).max() > 0


def assert_near(value: np.ndarray, simulated: np.ndarray, encoding: Encoding | None) -> None:
    """At most one code in a hundred, of 16 bits one in ten, is another, and that by one step."""
    largest = np.abs(simulated).max()
    difference = np.abs(value - simulated)
    step = 1e-5 * largest
    if encoding is not None:
        step = (
            float(encoding.scale[0])
            if encoding.spec.linear
            else np.abs(simulated) * (2 ** (1 / 16) - 1 if encoding.spec.grid == "log" else 2**-10)
        )
    wide = encoding is not None and encoding.spec.bits == 16
    assert (difference > 1e-5 * largest).mean() <= (0.1 if wide else 0.01)
    assert (difference <= 1.01 * step + 1e-5 * largest).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_verify_passes_for_every_scheme(scheme: str, tmp_path: Path) -> None:
    shutil.copytree(folder("mixed", scheme), tmp_path / "out")  # the report is written into it
    report = qdeploy.verify(tmp_path / "out", runtime=("onnxruntime:faithful", "onnxruntime:none"))
    assert report.passed, report


@pytest.mark.parametrize("network", ["mixed", "pools"])
@pytest.mark.parametrize("scheme", STANDARD)
def test_a_qdq_model_has_standard_ops_only_and_a_simulation_file_exactly_where_they_say_something_else(
    network: str, scheme: str
) -> None:
    opened, target, prepared = artifact(network, scheme), TARGETS[scheme], made(network)[scheme]
    model = onnx.load(opened.model)
    assert not model.functions and {entry.domain for entry in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model, full_check=True)
    shifted = target.average == "shift" and any(q.averages for q in prepared.quantizers.values())
    needed = target.activation.rounding != "half_even" or shifted
    assert (SIMULATION in opened.manifest["files"]) == needed
    simulation = onnx.load(opened.simulation)
    called = {node.op_type for node in simulation.graph.node if node.domain == DOMAIN}
    rounding = {"half_even": set(), "half_away": {"QuantizeHalfAway"}, "dpu": {"QuantizeDpu"}}
    assert called == rounding[target.activation.rounding] == {function.name for function in simulation.functions}


@pytest.mark.parametrize("scheme", STANDARD)
def test_a_qdq_model_differs_from_its_simulation_by_roundings_only(scheme: str) -> None:
    opened = artifact("mixed", scheme)
    feeds, wanted = saved(opened)
    (value,) = run(opened.model, feeds)
    scales = [float(e.scale[0]) for e in opened.encodings if e.tensor == "fc"]
    step = scales[0] if scales else float(np.ptp(wanted[0])) / 255
    assert np.abs(value - wanted[0]).max() <= 2.01 * step


def test_the_averages_that_the_target_shifts_are_those_of_a_fixed_number_of_elements() -> None:
    prepared = made("pools")["DPU"]
    kernels = {t.tensor: t.average[1] for t in prepared.plan.quantized if t.average is not None}
    assert kernels == {"mean": (8, 8), "adaptive_avg_pool2d": (8, 8), "avg_pool2d": (3, 3), "avg_pool2d_2": (7, 7)}
    for tensor, kernel in kernels.items():
        source, _ = next(t.average for t in prepared.plan.quantized if t.tensor == tensor)
        multiplier, shift = arith.shift_average(*kernel)
        scale = float(prepared.quantizers[source].scale)
        averages = prepared.quantizers[tensor].averages[tensor]
        assert averages == (kernel[0] * kernel[1] / scale, scale * multiplier / 2**shift)
    others = [t for t in made("pools")["power of two"].plan.quantized if t.average is not None]
    assert not others, "an exact average is no matter of the plan"


@pytest.mark.parametrize("scheme", STANDARD)
def test_codes_have_the_narrowest_type_and_odd_widths_are_clipped(scheme: str) -> None:
    opened, prepared = artifact("mixed", scheme), made("mixed")[scheme]
    model = onnx.shape_inference.infer_shapes(onnx.load(opened.model))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    nodes = {node.name: node for node in model.graph.node}
    # what is moved needs no clipping, since it was clipped before
    observed = {t.tensor for t in prepared.plan.quantized if t.observe or t.op in MEAN_POOL}
    for encoding in opened.encodings:
        spec = encoding.spec
        wanted = getattr(TensorProto, f"{'' if spec.signed else 'U'}INT{next(w for w in (4, 8, 16, 32) if w >= spec.bits)}")
        dequantize = nodes[f"{encoding.tensor}_DequantizeLinear"]
        assert stored[dequantize.input[2]].data_type == wanted
        if encoding.role != "activation":
            codes = numpy_helper.to_array(stored[dequantize.input[0]]).astype(np.int64)
            assert stored[dequantize.input[0]].data_type == wanted
            assert spec.qmin <= codes.min() and codes.max() <= spec.qmax
            assert codes.max() - codes.min() >= (spec.qmax - spec.qmin) // 4 or encoding.role == "bias"
            continue
        before = makers.get(makers[dequantize.input[0]].input[0])
        clipped = before is not None and before.op_type == "Clip" and before.name == f"{encoding.tensor}_Clip"
        assert clipped == (encoding.tensor in observed and (spec.bits not in (4, 8, 16) or spec.narrow))
        if clipped:
            low, high = (float(numpy_helper.to_array(stored[name])) for name in before.input[1:])
            assert (low, high) == (np.float32(encoding.low[0]), np.float32(encoding.high[0]))


@pytest.mark.parametrize("scheme", ["float16", "float16 without subnormals"])
@pytest.mark.parametrize("network", WHOLE)
def test_a_half_precision_model_agrees_with_the_simulation(network: str, scheme: str) -> None:
    opened = artifact(network, scheme)
    model = onnx.load(opened.model)
    onnx.checker.check_model(model, full_check=True)
    floats = [t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and numpy_helper.to_array(t).size > 1]
    assert not floats
    assert all(v.type.tensor_type.elem_type == TensorProto.FLOAT for v in (*model.graph.input, *model.graph.output))
    feeds, wanted = saved(opened)
    for value, simulated in zip(run(opened.model, feeds), wanted, strict=True):
        np.testing.assert_allclose(value, simulated, rtol=1e-2, atol=1e-2 * float(np.abs(simulated).max()))


def test_half_precision_models_hold_the_values_of_the_simulation() -> None:
    """Parameters are rounded before they are stored: what is subnormal is 0 where the target makes it so."""
    tiny = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        tiny[0].weight.fill_(3e-5)
        tiny[0].weight[0, 0] = 1.0
    several = networks.several(tiny.eval(), [(torch.ones(2, 4),)], (TARGETS["float16"], TARGETS["float16 without subnormals"]))
    for name, small in (("float16", float(np.float16(3e-5))), ("float16 without subnormals", 0.0)):
        prepared = several[name]
        exported = emit.export(prepared.captured, prepared.backend.opset)
        view = emit.float_view(exported, prepared, prepared.encodings())
        value = view.graph.initializers["0.weight"].const_value
        assert value is not None
        assert sorted(set(value.numpy().reshape(-1).tolist())) == [small, 1.0]


def test_clipped_weights_end_where_their_grid_ends_and_others_stay(tmp_path: Path) -> None:
    clip = (Format(name="clipped", model="float", clip_weights=True), Format(name="whole", model="float"))
    base = Scheme(activation="uint8", weight="int4 per-channel").backend("clips")
    target, (data,) = replace(base, formats=clip), networks.batches("plain", count=1)
    recipe = tmp_path / "tight.toml"
    recipe.write_text('[weight]\nobserver = "percentile"\npercentile = 90.0\n[activation]\nobserver = "minmax"\n')
    prepared = networks.several(networks.network("plain"), [data], [target], recipe=str(recipe))["clips"]
    encodings = {e.tensor: e for e in prepared.encodings() if e.role == "weight"}
    weights = {}
    for form in ("clipped", "whole"):
        model = onnx.load(qdeploy.convert(prepared, tmp_path / form, form).model)
        weights[form] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name in encodings}
        assert len(weights[form]) == 2
    changed = 0
    for name, encoding in encodings.items():
        whole, low, high = weights["whole"][name], encoding.low, encoding.high
        shape = [-1] + [1] * (whole.ndim - 1)
        wanted = np.clip(whole, low.reshape(shape), high.reshape(shape)).astype(np.float32)
        np.testing.assert_array_equal(weights["clipped"][name], wanted)
        changed += int((wanted != whole).sum())
        np.testing.assert_array_equal(whole, prepared.module.get_parameter(name).detach().numpy())
    assert changed


# the functions alone


def edges(scale: float, low: float, high: float) -> np.ndarray:
    """Halves, whole numbers and their neighbours in steps of `scale`; zeros; what is denormal; what is beyond the limits."""
    steps = np.arange(-300, 301, dtype=np.float32) / 2 * np.float32(scale)
    near = [np.nextafter(steps, np.float32(way)).astype(np.float32) for way in (-np.inf, np.inf)]
    odd = np.float32(
        [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 3e38, -3e38, low, high, np.finfo(np.float32).max, np.finfo(np.float32).min]
    )
    return np.concatenate([steps, *near, odd])


def model_of(encoding: Encoding) -> onnx.ModelProto:
    """x -> codes, y: what `Lowering` makes of one activation."""
    graph = ir.Graph(
        [ir.Input("x", ir.Shape(["n"]), ir.TensorType(ir.DataType.FLOAT))], [], nodes=[], opset_imports={"": 21}, name="main"
    )
    model = ir.Model(graph, ir_version=10)
    lowering = Lowering(model, {"x"}, literal=True)
    nodes = lowering.activation(graph.inputs[0], encoding, False, None)
    graph.extend(nodes)
    graph.outputs.extend([nodes[-1].outputs[0]])
    for node in nodes:
        if "Quantize" in node.op_type and "De" not in node.op_type:
            # onnxruntime returns no 4-bit arrays
            wide = ir.node("Cast", [node.outputs[0]], attributes={"to": ir.DataType.INT32.value}, name="wide")
            wide.outputs[0].name, wide.outputs[0].dtype, wide.outputs[0].shape = "wide", ir.DataType.INT32, node.outputs[0].shape
            graph.append(wide)
            graph.outputs.append(wide.outputs[0])
    add_functions(model, lowering.functions, 21)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def evaluate(model: onnx.ModelProto, how: str, x: np.ndarray) -> list[np.ndarray]:
    if how == "onnxruntime":
        return run(model.SerializeToString(), {"x": x})
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(model).run(None, {"x": x})


LINEAR = [
    "int8 half-away", "int8 dpu", "int8 narrow half-away", "uint8 half-away", "uint8 dpu", "int5 half-away", "uint3 dpu", "int2 dpu",
    "int16 half-away", "uint16 dpu", "int12 narrow half-away", "int8 power-of-two dpu",
    "uint8", "int8 narrow", "int4", "uint4", "int7", "int16", "uint9",
]  # fmt: skip


@pytest.mark.parametrize("how", ["onnxruntime", "reference"])
@pytest.mark.parametrize("scale", [1.0, 0.1, 2.0**-9, 3.7e-5])
@pytest.mark.parametrize("words", LINEAR)
def test_every_rounding_and_width_is_that_of_arith_on_edge_values(words: str, scale: float, how: str) -> None:
    spec = parse(words)
    scale = 2.0 ** round(np.log2(scale)) if spec.grid == "power_of_two" else scale
    zero = 0 if spec.symmetric else (spec.qmin + spec.qmax) // 2
    encoding = Encoding(tensor="t", role="activation", spec=spec, scale=[scale], zero_point=[zero])
    x = edges(scale, float(encoding.low[0]), float(encoding.high[0]))
    if how == "reference":  # its QuantizeLinear casts to integers before it saturates
        x = x[np.abs(x) < 2.0**30 * scale]
    value, codes = evaluate(model_of(encoding), how, x)
    numbers = torch.from_numpy(encoding.scale.copy()), torch.from_numpy(encoding.zero_point.copy())
    wanted = arith.quantize(torch.from_numpy(x), *numbers, spec)
    np.testing.assert_array_equal(codes.astype(np.int64), wanted)
    np.testing.assert_array_equal(value, arith.dequantize(wanted, *numbers, spec))


def log_edges(clip: int) -> np.ndarray:
    """Every value of the grid with the clip value 2^(clip / 16), the middles between them in logarithm, and their neighbours."""
    scale = torch.tensor([2.0 ** ((clip - 127) / 16)])
    values = arith.dequantize(torch.arange(256), scale, torch.zeros(1, dtype=torch.int64), parse("log8")).numpy()
    middles = (values.astype(np.float64) * 2 ** (1 / 32)).astype(np.float32)
    x = np.concatenate([values, middles, edges(float(scale), -4.0, 4.0)])
    return np.concatenate([x, *(np.nextafter(x, np.float32(way)) for way in (-3e38, 3e38))])


@pytest.mark.parametrize("how", ["onnxruntime", "reference"])
@pytest.mark.parametrize("clip", [-384, -33, 0, 32, 37, 320])
def test_the_log_codes_are_those_of_arith_on_all_codes_and_edge_values(clip: int, how: str) -> None:
    spec = parse("log8")
    scale = torch.tensor([2.0 ** ((clip - 127) / 16)])
    encoding = Encoding(tensor="t", role="activation", spec=spec, scale=scale, zero_point=[0])
    x = log_edges(clip)
    x = x[np.isfinite(x)]
    value, codes = evaluate(model_of(encoding), how, x)
    zero = torch.zeros(1, dtype=torch.int64)
    wanted = arith.quantize(torch.from_numpy(x), scale, zero, spec)
    np.testing.assert_array_equal(codes.astype(np.int64), wanted)
    assert len(set(codes.tolist())) == 256, "every code occurs"
    np.testing.assert_array_equal(value, arith.dequantize(wanted, scale, zero, spec))


@pytest.mark.parametrize("how", ["onnxruntime", "reference"])
@pytest.mark.parametrize("words", ["float16", "float16-normal"])
def test_half_precision_is_that_of_arith_on_all_codes_and_edge_values(words: str, how: str) -> None:
    spec = parse(words)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    middles = np.nextafter(halves, np.float32(np.inf)).astype(np.float32)
    x = np.concatenate([halves, middles, halves * np.float32(1 + 2**-11), edges(2.0**-24, -65504.0, 65504.0)])
    x = x[np.abs(x) <= 65519]
    encoding = Encoding(tensor="t", role="activation", spec=spec, scale=[1.0], zero_point=[0])
    (value,) = evaluate(model_of(encoding), how, x)
    wanted = arith.fake_quantize(torch.from_numpy(x), torch.ones(1), torch.zeros(1, dtype=torch.int64), spec)
    np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize(
    ("words", "stored", "fills"),
    [
        ("uint2", ir.DataType.UINT4, False),
        ("int4", ir.DataType.INT4, True),
        ("int4 narrow", ir.DataType.INT4, False),
        ("uint5", ir.DataType.UINT8, False),
        ("uint8", ir.DataType.UINT8, True),
        ("int9", ir.DataType.INT16, False),
        ("uint16", ir.DataType.UINT16, True),
    ],
)
def test_the_type_of_codes_is_the_next_wider_one(words: str, stored: ir.DataType, fills: bool) -> None:
    assert (onnx_type(parse(words)), fills_type(parse(words))) == (stored, fills)


def test_the_types_of_what_is_no_integer() -> None:
    assert onnx_type(QuantSpec(signed=True, symmetric=True, bits=32)) == ir.DataType.INT32
    assert [onnx_type(parse(w)) for w in ("log8", "float16", "float16-normal")] == [ir.DataType.UINT8] + [ir.DataType.FLOAT16] * 2


def test_names_that_are_taken_get_a_number() -> None:
    model = ir.from_proto(helper.make_model(helper.make_graph([], "g", [], [])))
    lowering = Lowering(model, {"x_scale", "x_scale_1"}, literal=True)
    assert [lowering.fresh(name) for name in ("x_scale", "x_scale", "x_zero_point")] == ["x_scale_2", "x_scale_3", "x_zero_point"]
