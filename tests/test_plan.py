"""Plans: what each target quantizes and why, and that inserting the quantizers changes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import networks
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import qdeploy
from qdeploy import api
from qdeploy.capture.capture import capture
from qdeploy.capture.fold import untie_biases
from qdeploy.core.backend import Backend, Geometry, OpRule, backends
from qdeploy.core.errors import InputError, OptionError
from qdeploy.core.ops import CONVOLUTION, EVERY
from qdeploy.core.spec import QuantSpec
from qdeploy.graph import query
from qdeploy.numerics import arith
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.simulation.plan import Plan, TensorPlan, Widths, make_plan

NAMES = backends.names()


def where(what: Callable[[Backend], object]) -> list[str]:
    """The backends that are so."""
    return [backend.name for backend in backends if what(backend)]


def share(backend: Backend, op: str) -> bool:
    rule = backend.rule(op)
    return rule is not None and rule.share


def reads(backend: Backend, op: str) -> bool:
    rule = backend.rule(op, Geometry(kernel=(3, 3), stride=(1, 1), dilation=(1, 1), grouped=False))
    return rule is not None and rule.inputs


FLOAT_OUTPUT = where(lambda b: not any(rule.output for rule in b.rules))
FUSING = where(lambda b: b.fuses("conv2d", "relu") and b.fuses("conv2d", "relu6"))


class Net(nn.Module):
    """`forward` as a function of the module and its input; `c1` ... are convolutions that keep the shape."""

    def __init__(self, compute: Callable[[Net, Tensor], object], **modules: nn.Module):
        super().__init__()
        torch.manual_seed(0)
        self.compute = compute
        for name in ("c1", "c2", "c3"):
            setattr(self, name, nn.Conv2d(4, 4, 3, padding=1))
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> object:
        return self.compute(self, x)


def embedded() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: Net(lambda s, x: s.fc(F.max_pool2d(F.relu(s.c1(x)), 2).flatten(1)), fc=nn.Linear(64, 5)),
    "chain 3": lambda: Net(lambda s, x: s.c3(F.relu(s.c2(F.relu(s.c1(x)))))),
    "skip": lambda: Net(lambda s, x: F.relu(s.c2(F.relu(s.c1(x))) + x)),
    "both": lambda: Net(lambda s, x: F.relu(s.c1(x) + s.c2(x))),
    "two readers": lambda: Net(lambda s, x: (lambda y: s.c2(F.relu(y)) * y)(s.c1(x))),
    "concat": lambda: Net(lambda s, x: s.c3(torch.cat([s.c1(x), F.relu(s.c2(x))], 1)[:, 2:6])),
    "split": lambda: Net(lambda s, x: (lambda p: s.part(p[0]) * p[1])(F.relu(s.c1(x)).chunk(2, 1)), part=nn.Conv2d(2, 2, 1)),
    "transpose": lambda: Net(lambda s, x: s.up(x), up=nn.ConvTranspose2d(4, 6, 2)),
    "mean": lambda: Net(lambda s, x: s.fc(F.adaptive_avg_pool2d(torch.sigmoid(s.c1(x)) * x, 1).reshape(-1, 4)), fc=nn.Linear(4, 2)),
    "embedding": embedded,
    "relu6": lambda: Net(lambda s, x: F.hardtanh(s.c1(x), 0, 6) + torch.clamp(s.c2(x), 0)),
    "constant": lambda: Net(lambda s, x: s.c1(x) + s.shift, shift=nn.ParameterList([torch.ones(4, 1, 1)])[0]),
    "output": lambda: Net(lambda s, x: (lambda y: (s.output(y), y))(torch.sigmoid(s.c1(x))), output=nn.Conv2d(4, 2, 1)),
}  # fmt: skip


def example(name: str, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    if name == "embedding":
        return torch.randint(0, 9, (batch, 3), generator=generator)
    return torch.randn(batch, 4, 8, 8, generator=generator)


@cache
def captured(name: str) -> fx.GraphModule:
    module = capture(MODELS[name](), example(name)).module
    untie_biases(module)
    return module


def planned(name: str, backend: str, widths: Widths | None = None) -> tuple[Plan, dict[str, TensorPlan], fx.GraphModule]:
    module = captured(name)
    plan = make_plan(module, backends[backend], widths)
    return plan, {tensor.tensor: tensor for tensor in plan.tensors}, module


def by_role(plan: Plan, role: str) -> list[TensorPlan]:
    return [tensor for tensor in plan.tensors if tensor.role == role]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", NAMES)
def test_every_float_tensor_has_one_decision_and_a_reason(model: str, backend: str):
    plan, decisions, module = planned(model, backend)
    floats = [query.tensor_name(n) for n in module.graph.nodes if n.op != "output" and query.is_float(n)]
    assert sorted(decisions) == sorted(floats) and len(decisions) == len(plan.tensors)
    assert all(tensor.reason for tensor in plan.tensors)
    for tensor in plan.quantized:
        assert tensor.group and tensor.readers
        assert decisions[tensor.group].spec == tensor.spec
    for tensor in plan.tensors:
        if tensor.spec is None:
            assert tensor.reason.startswith(("float: ", "fused: ")) and not tensor.readers and not tensor.group


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", NAMES)
def test_the_printed_plan_has_a_line_per_tensor(model: str, backend: str):
    plan, _, _ = planned(model, backend)
    title, header, *lines = str(plan).splitlines()
    count = f"{len(plan.quantized)} of {len(plan.tensors)} tensors quantized"
    assert title == f"plan for {backend}: {count}, {100 * plan.share:.1f} % of multiply-accumulates"
    assert header.split() == ["tensor", "role", "op", "scheme", "why"]
    for line, tensor in zip(lines, plan.tensors, strict=True):
        scheme = tensor.spec.describe() if tensor.spec else "float"
        assert line.split() == [tensor.tensor, tensor.role, tensor.op, *scheme.split(), *tensor.reason.split()]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", where(lambda b: any(rule.ops == EVERY and rule.inputs and rule.output for rule in b.rules)))
def test_a_target_that_quantizes_every_op_encodes_every_tensor_but_what_is_fused_away(model: str, backend: str):
    plan, _, _ = planned(model, backend)
    biases = [] if backends[backend].bias != "float" else by_role(plan, "bias")
    assert all(t.spec is not None or t.reason.startswith("fused: ") for t in plan.tensors if t not in biases)


@pytest.mark.parametrize("backend", FUSING)
def test_no_quantizer_stands_between_a_layer_and_the_relu_that_alone_reads_it(backend: str):
    _, decisions, _ = planned("chain", backend)
    assert decisions["c1"].spec is None and decisions["c1"].reason.startswith("fused: conv2d + relu")
    _, decisions, _ = planned("relu6", backend)
    assert decisions["c1"].reason.startswith("fused: conv2d + relu6") and decisions["c2"].reason.startswith("fused: conv2d + relu")


@pytest.mark.parametrize("backend", where(lambda b: not b.fuse))
def test_where_nothing_is_fused_a_layer_has_what_its_readers_and_its_rule_say(backend: str):
    _, decisions, _ = planned("chain", backend)
    rule = backends[backend].rule("conv2d", Geometry(kernel=(3, 3), stride=(1, 1), dilation=(1, 1), grouped=False))
    assert rule is not None
    assert (decisions["c1"].spec is not None) == (rule.output or reads(backends[backend], "relu"))


@pytest.mark.parametrize("backend", NAMES)
def test_a_layer_with_two_readers_is_not_fused(backend: str):
    _, decisions, _ = planned("two readers", backend)
    assert not decisions["c1"].reason.startswith("fused")
    target = backends[backend]
    read = reads(target, "relu") or reads(target, "mul")
    assert (decisions["c1"].spec is not None) == (read or backend not in FLOAT_OUTPUT)


@pytest.mark.parametrize("backend", where(lambda b: b.residual == "skip"))
def test_a_residual_add_quantizes_the_skip_branch_only(backend: str):
    _, decisions, _ = planned("skip", backend)
    assert decisions["c2"].spec is None and "only the skip branch" in decisions["c2"].reason
    assert decisions["x"].spec is not None and "add" in decisions["x"].readers
    _, decisions, _ = planned("both", backend)
    assert decisions["c2"].spec is None and decisions["c1"].spec is not None, "the later of two layers takes the add in"


class Stream(nn.Module):
    """A residual sum behind a linear layer, and one of two that are no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(x) + self.fc(x) + torch.tanh(x))


@pytest.mark.parametrize("backend", where(lambda b: b.residual == "skip"))
def test_a_residual_add_behind_a_linear_layer_stays_in_float(backend: str) -> None:
    plan = qdeploy.prepare(Stream(), torch.zeros(2, 4), backend).plan
    read = {tensor.tensor: tensor.readers for tensor in plan.quantized if tensor.role == "activation"}
    assert read == {"x": ("fc",), "add": ("add_1",), "tanh": ("add_1",)}


@pytest.mark.parametrize("backend", where(lambda b: b.residual == "both" and reads(b, "add")))
@pytest.mark.parametrize("model", ["skip", "both"])
def test_an_add_of_the_other_targets_quantizes_both_branches(backend: str, model: str):
    _, decisions, _ = planned(model, backend)
    assert {decisions["c2"].spec is None, decisions["x"].spec is None} == {False}


@pytest.mark.parametrize("backend", where(lambda b: share(b, "max_pool2d") and share(b, "reshape") and reads(b, "linear")))
def test_pooling_and_moves_share_the_encoding_of_what_they_move(backend: str):
    _, decisions, _ = planned("chain", backend)
    chain = [decisions[name] for name in ("relu", "max_pool2d", "reshape")]
    assert {tensor.group for tensor in chain} == {"relu"}
    assert [tensor.observe for tensor in chain] == [True, False, False]


@pytest.mark.parametrize("backend", where(lambda b: share(b, "split")))
def test_the_parts_of_a_split_share_its_encoding(backend: str):
    _, decisions, _ = planned("split", backend)
    part = decisions["split_1"] if decisions["split_1"].spec else decisions["split_0"]
    assert part.group == decisions["relu"].group and not part.observe


@pytest.mark.parametrize("backend", where(lambda b: share(b, "concat")))
def test_a_concat_has_one_encoding_for_all_its_inputs(backend: str):
    _, decisions, _ = planned("concat", backend)
    names = ("c1", "relu", "concat", "slice")
    assert {decisions[name].group for name in names} == {"c1"}
    assert [decisions[name].observe for name in names] == [True, True, False, False]
    assert decisions["relu"].reason.startswith("shares the encoding of c1: ")


@pytest.mark.parametrize("backend", where(lambda b: reads(b, "concat") and not share(b, "concat") and not b.rule("concat").align))
def test_a_concat_that_does_not_share_has_an_encoding_for_each_of_its_inputs(backend: str):
    _, decisions, _ = planned("concat", backend)
    assert decisions["c1"].group == "c1" and decisions["relu"].group == "relu"
    assert decisions["slice"].group == "concat" and decisions["concat"].observe and not decisions["slice"].observe


@pytest.mark.parametrize("backend", where(lambda b: reads(b, "add") and b.residual == "both"))
def test_the_inputs_of_an_add_have_one_encoding_exactly_where_the_target_aligns_them(backend: str):
    _, decisions, _ = planned("both", backend)
    rule = backends[backend].rule("add")
    assert rule is not None
    one, other, result = (decisions[name] for name in ("c1", "c2", "relu"))
    assert (one.group == other.group) == rule.align
    assert one.observe and other.observe, "values arise in both"
    assert result.spec is None or result.group not in (one.group, other.group)


def test_align_joins_the_inputs_and_leaves_the_output_alone():
    rules = (
        OpRule(ops=frozenset({"add", "concat"}), inputs=True, output=True, align=True),
        OpRule(ops=EVERY, inputs=True, output=True),
    )
    target = replace(backends["onnxruntime"], name="aligned", rules=rules, fuse=())
    decisions = {t.tensor: t for t in make_plan(captured("concat"), target).tensors}
    assert decisions["c1"].group == decisions["relu"].group == "c1"
    assert decisions["concat"].group == "concat" and decisions["slice"].group == "slice"
    assert decisions["relu"].reason.startswith("shares the encoding of c1: ")
    target = replace(target, rules=(OpRule(ops=frozenset({"add"}), inputs=True, align=True), OpRule(ops=CONVOLUTION, inputs=True)))
    decisions = {t.tensor: t for t in make_plan(captured("skip"), target).tensors}
    assert decisions["c2"].group == decisions["x"].group == "x", "x is the input of the first layer as well"


@pytest.mark.parametrize("model", ["chain", "skip", "both", "concat", "relu6"])
@pytest.mark.parametrize("backend", NAMES)
def test_a_plan_is_tie_free_exactly_where_no_float_is_passed_on(model: str, backend: str):
    plan, decisions, module = planned(model, backend)
    if not all(t.spec is None or t.spec.linear for t in plan.tensors):
        assert not plan.tie_free
        return
    behind: set[str] = set()
    """Tensors that end in one that is quantized again."""
    passed = False
    for node in reversed(module.graph.nodes):
        decision = decisions.get(query.tensor_name(node))
        if node.op in ("placeholder", "call_function") and decision is not None and not decision.reason.startswith("fused: "):
            readers = {query.reader_name(user) for user in node.users if user.op == "call_function" and query.is_float(user)}
            passed |= bool((readers - set(decision.readers)) & behind)
        if (decision is not None and decision.readers) or any(query.reader_name(user) in behind for user in node.users):
            behind.add(query.reader_name(node))
    assert plan.tie_free == (not passed)


def test_targets_that_add_in_float_are_not_tie_free_and_those_that_fuse_the_add_are():
    free = {name: planned("skip", name)[0].tie_free for name in ("onnxruntime", "openvino", "tensorrt", "ncnn", "academic", "nnie")}
    assert free == {"onnxruntime": True, "openvino": True, "tensorrt": True, "ncnn": False, "academic": False, "nnie": False}


GEOMETRIES = {
    "any": (Geometry(), {"plain", "wide", "strided", "dilated", "depthwise", "grouped"}),
    "1 x 1 or not": (Geometry(kernel=(3, 3)), {"plain", "strided", "dilated", "depthwise", "grouped"}),
    "stride": (Geometry(stride=(2, 2)), {"strided"}),
    "dilation": (Geometry(dilation=(2, 2)), {"dilated"}),
    "groups": (Geometry(grouped=True), {"depthwise", "grouped"}),
    "no groups": (Geometry(grouped=False, dilation=(1, 1)), {"plain", "wide", "strided"}),
    "all at once": (Geometry(kernel=(3, 3), stride=(1, 1), dilation=(1, 1), grouped=True), {"depthwise", "grouped"}),
}


class Shapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(4, 4, 3, padding=1)
        self.wide = nn.Conv2d(4, 4, 5, padding="same")
        self.strided = nn.Conv2d(4, 4, 3, stride=2)
        self.dilated = nn.Conv2d(4, 4, 3, dilation=2)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        layers = (self.plain, self.wide, self.strided, self.dilated, self.depthwise, self.grouped)
        return [layer(torch.sigmoid(x)) for layer in layers] + [self.fc(x[:, :, 0, 0])]


@cache
def shapes() -> fx.GraphModule:
    return capture(Shapes(), example("chain")).module


@pytest.mark.parametrize("case", GEOMETRIES)
def test_a_rule_for_a_geometry_is_for_those_convolutions_only(case: str):
    only, wanted = GEOMETRIES[case]
    four = QuantSpec(signed=True, symmetric=True, bits=4, axis=0)
    rules = (OpRule(ops=CONVOLUTION, inputs=True, weight=four, only=only), OpRule(ops=frozenset({"linear"}), inputs=True))
    target = replace(backends["onnxruntime"], name="picky", rules=rules)
    plan = make_plan(shapes(), target)
    weights = {t.tensor.removesuffix(".weight"): t.spec for t in by_role(plan, "weight")}
    assert {name for name, spec in weights.items() if spec is not None} == wanted | {"fc"}
    assert {spec.bits for name, spec in weights.items() if name in wanted} == {4} and weights["fc"].bits == 8
    for bias in by_role(plan, "bias"):
        assert (bias.spec is not None) == (bias.tensor.removesuffix(".bias") in wanted | {"fc"})


def test_what_no_rule_for_a_geometry_admits_falls_to_the_next_rule():
    rules = (OpRule(ops=CONVOLUTION, only=Geometry(grouped=True)), OpRule(ops=EVERY, inputs=True, output=True))
    plan = make_plan(shapes(), replace(backends["onnxruntime"], rules=rules))
    floats = {t.tensor for t in by_role(plan, "weight") if t.spec is None}
    assert floats == {"depthwise.weight", "grouped.weight"}


@pytest.mark.parametrize("backend", FLOAT_OUTPUT)
@pytest.mark.parametrize("model", ["chain", "skip", "transpose", "output"])
def test_the_output_stays_float_where_the_target_says_so(backend: str, model: str):
    plan, _, _ = planned(model, backend)
    assert all("<output>" not in tensor.readers for tensor in plan.tensors)


@pytest.mark.parametrize("backend", FLOAT_OUTPUT)
def test_a_tensor_called_output_is_not_taken_for_the_models_output(backend: str):
    prepared = qdeploy.prepare(MODELS["output"](), example("output"), backend=backend, recipe="fast")
    inner, returned = query.outputs(prepared.module.graph)
    assert query.tensor_name(returned) == "sigmoid" and query.tensor_name(inner) == "output"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", NAMES)
def test_weights_and_biases_have_what_the_target_says(model: str, backend: str):
    plan, decisions, module = planned(model, backend)
    target = backends[backend]
    axes = {"conv2d": 0, "linear": 0, "conv_transpose2d": 1}
    layers = {query.tensor_name(p): user for p in module.graph.find_nodes(op="get_attr") for user in p.users}
    for tensor in by_role(plan, "weight"):
        rule = target.rule(tensor.op, query.geometry(layers[tensor.tensor]))
        assert (tensor.spec is not None) == (rule is not None and rule.inputs)
        if rule is not None and tensor.spec is not None:
            spec = rule.weight or target.weight
            bits = target.first_last_bits or spec.bits
            assert tensor.spec == replace(spec, axis=None if spec.axis is None else axes[tensor.op], bits=tensor.spec.bits)
            assert tensor.spec.bits in (spec.bits, bits)
    for tensor in by_role(plan, "bias"):
        weight = decisions[query.tensor_name(layers[tensor.tensor].args[1])].spec
        if weight is None:
            assert tensor.spec is None
        elif isinstance(target.bias, QuantSpec):
            assert tensor.spec == target.bias and tensor.scales_of is None
        elif not weight.linear:
            assert tensor.spec is None and tensor.scales_of is None
        else:
            assert tensor.scales_of is not None and all(decisions[name].spec is not None for name in tensor.scales_of)
            assert (tensor.spec is not None) == (target.bias == "int32")
            if tensor.spec is not None:
                assert (tensor.spec.bits, tensor.spec.axis) == (32, None if weight.axis is None else 0)


@pytest.mark.parametrize("backend", NAMES)
def test_integers_are_not_quantized(backend: str):
    _, decisions, module = planned("embedding", backend)
    assert query.tensor_name(module.graph.find_nodes(op="placeholder")[0]) not in decisions
    assert decisions["1.weight"].role == "weight"
    assert (decisions["0"].spec is not None) == (reads(backends[backend], "linear") or reads(backends[backend], "embedding"))
    assert decisions["0.weight"].role == "constant"
    assert (decisions["0.weight"].spec is not None) == reads(backends[backend], "embedding")


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("what", ["weight", "activation", "first_last"])
def test_a_bit_width_that_the_target_has_not_is_refused_with_the_list(backend: str, what: str):
    target = backends[backend]
    allowed = target.activation_bits if what == "activation" else target.weight_bits
    other = next(bits for bits in range(3, 33) if bits not in allowed)
    words = rf"backend '{backend}' has no {other}-bit .*allowed: {', '.join(map(str, allowed))};"
    with pytest.raises(OptionError, match=words):
        planned("chain", backend, Widths(**{what: other}))


@pytest.mark.parametrize("backend", NAMES)
def test_every_width_on_the_lists_is_planned(backend: str):
    target = backends[backend]
    for bits in target.weight_bits:
        plan, _, _ = planned("chain 3", backend, Widths(weight=bits))
        widths = [t.spec.bits for t in by_role(plan, "weight") if t.spec is not None]
        ends = target.first_last_bits or bits
        assert widths == ([ends] + [bits] * (len(widths) - 2) + [ends])
    for bits in target.activation_bits:
        plan, _, _ = planned("chain 3", backend, Widths(activation=bits))
        widths = {t.spec.bits for t in by_role(plan, "activation") if t.spec is not None}
        assert bits in widths and widths <= {bits, target.first_last_bits}


def test_first_and_last_layers_get_the_bits_that_the_user_chose():
    plan = make_plan(captured("concat"), replace(backends["tvm"], weight_bits=(4, 8)), Widths(weight=4, first_last=8))
    assert [tensor.spec and tensor.spec.bits for tensor in by_role(plan, "weight")] == [8, 4, 8]
    assert {tensor.spec.bits for tensor in plan.quantized if tensor.role == "activation"} == {8}


def test_a_target_that_widens_the_first_and_last_layer_widens_what_they_read_too():
    four = replace(backends["onnxruntime"].activation, bits=4)
    weight = replace(backends["onnxruntime"].weight, bits=4)
    widths = {"weight_bits": (2, 3, 4, 8), "activation_bits": (2, 3, 4, 8)}
    target = replace(backends["onnxruntime"], activation=four, weight=weight, first_last_bits=8, **widths)

    def bits(chosen: Widths | None) -> tuple[list[int], dict[str, int]]:
        plan = make_plan(captured("chain 3"), target, chosen)
        activations = {t.tensor: t.spec.bits for t in plan.quantized if t.role == "activation"}
        return [t.spec.bits for t in by_role(plan, "weight") if t.spec is not None], activations

    names = ("x", "relu", "relu_1", "c3")
    assert bits(None) == ([8, 4, 8], dict(zip(names, (8, 4, 8, 4), strict=True)))
    assert bits(Widths(weight=2, activation=3)) == ([8, 2, 8], dict(zip(names, (8, 3, 8, 3), strict=True)))
    assert bits(Widths(first_last=3)) == ([3, 4, 3], dict(zip(names, (3, 4, 3, 4), strict=True)))
    with pytest.raises(OptionError, match=r"has no 5-bit (weights|activations); allowed: 2, 3, 4, 8;"):
        bits(Widths(first_last=5))
    with pytest.raises(OptionError, match="has no 8-bit activations; allowed: 2, 3, 4;"):
        make_plan(captured("chain 3"), replace(target, activation_bits=(2, 3, 4)), Widths(first_last=8))


def test_a_model_that_is_not_float32_is_refused():
    with pytest.raises(InputError, match=r"found: float64 in .*model.float\(\)"):
        qdeploy.prepare(MODELS["chain"]().double(), example("chain").double(), backend="tvm")


OPS = ("conv", "relu", "pool", "add", "cat", "slice", "mul")


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """Steps of a random graph: an op, and which of the tensors so far it reads."""
    count = draw(st.integers(2, 8))
    steps = [("conv", 0, 0)]
    for index in range(count):
        steps.append((draw(st.sampled_from(OPS)), draw(st.integers(0, index + 1)), draw(st.integers(0, index + 1))))
    return steps


class Random(nn.Module):
    def __init__(self, steps: list[tuple[str, int, int]]):
        super().__init__()
        torch.manual_seed(1)
        self.steps = steps
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for op, _, _ in steps if op == "conv")
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        made, convs = [x], iter(self.convs)
        for op, a, b in self.steps:
            left, right = made[a], made[b]
            if op == "conv":
                made.append(next(convs)(left))
            elif op == "cat":
                made.append(torch.cat([left, right], 1)[:, 1:3])
            elif op == "slice":
                made.append(torch.cat([left[:, 1:], left[:, :1]], 1))
            else:
                one = {"relu": F.relu, "pool": lambda t: F.max_pool2d(t, 3, 1, 1)}
                made.append(one[op](left) if op in one else left + right if op == "add" else left * right)
        return self.fc(made[-1].flatten(1)), made[-2], made[1]


class Watch(fx.Interpreter):
    """Runs a prepared graph, and keeps what enters and leaves every quantizer call by the name of its tensor."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.seen: dict[str, list[tuple[Quantizer, Tensor]]] = {}

    def call_module(self, target: str, args: tuple, kwargs: dict) -> object:
        result = super().call_module(target, args, kwargs)
        self.seen.setdefault(args[1], []).append((self.module.get_submodule(target), result))
        return result


def assert_on_grid(quantizer: Quantizer, values: Tensor) -> None:
    spec, scale, zero = quantizer.spec, quantizer.scale.double(), quantizer.zero_point
    if not spec.linear:
        assert torch.equal(arith.fake_quantize(values, quantizer.scale, zero, spec), values)
        return
    shape = [-1 if d == spec.axis else 1 for d in range(values.dim())] if spec.axis is not None else []
    codes = torch.round(values.double() / scale.reshape(shape)).long() + zero.reshape(shape)
    assert spec.qmin <= codes.min() and codes.max() <= spec.qmax
    assert torch.equal(((codes - zero.reshape(shape)).float() * scale.float().reshape(shape)), values)


@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(steps=programs())
def test_inserted_quantizers_are_called_once_a_tensor_change_nothing_in_float_and_put_values_on_their_grids(steps):
    model = Random(steps).eval()
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = capture(model, x).module(x)
    several = api.prepare_all(model, x, networks.distinct(), recipe="fast")
    for prepared in several:
        assert all(torch.equal(a, b) for a, b in zip(prepared.flat((x,)), wanted, strict=True))
    api.calibrate_all(several, [x])
    for prepared in several:
        with torch.no_grad():
            watch = Watch(prepared.module)
            watch.run(x)
        assert set(watch.seen) == {tensor.tensor for tensor in prepared.plan.quantized}
        for name, calls in watch.seen.items():
            assert len(calls) == 1, f"{prepared.backend.name}: {name} is quantized {len(calls)} times"
            assert calls[0][0] is prepared.quantizers[name]
            assert_on_grid(*calls[0])


@cache
def norm_first() -> fx.GraphModule:
    return capture(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)).module


@pytest.mark.parametrize("backend", NAMES)
def test_the_statistics_of_a_batch_norm_that_stays_are_not_quantized(backend: str) -> None:
    plan = make_plan(norm_first(), backends[backend])
    assert not [t.tensor for t in plan.quantized if t.tensor.startswith("0.") and t.role == "constant"]


class Pooled(torch.nn.Module):
    """A leaky activation, whose negative values max pooling leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = torch.nn.Conv2d(3, 6, 3), torch.nn.PReLU(), torch.nn.Conv2d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.max_pool2d(self.act(self.first(x)), 4, 2))


@pytest.mark.parametrize("backend", ["snpe", "onnxruntime", "tensorrt"])
def test_the_range_of_what_only_max_pooling_reads_is_that_of_its_maxima(backend: str):
    torch.manual_seed(0)
    model, x = Pooled().eval(), torch.randn(16, 3, 12, 12)
    with torch.no_grad():
        model.act.weight.fill_(0.9)
    prepared = qdeploy.calibrate(qdeploy.prepare(model, x, backend, "fast"), [x])
    with torch.no_grad():
        made = model.act(model.first(x))
        pooled = F.max_pool2d(made, 4, 2)
    assert float(made.min()) < 2 * float(pooled.min().clamp(max=0))
    quantizer = prepared.quantizers["max_pool2d"]
    low, high = float(pooled.min().clamp(max=0)), float(pooled.max())
    if quantizer.spec.symmetric:
        assert float(quantizer.scale) == pytest.approx(max(-low, high) / 127, rel=0.01)
    else:
        assert float(quantizer.scale) == pytest.approx((high - low) / 255, rel=0.01)
    scale, zero = quantizer.scale, quantizer.zero_point
    early, late = (arith.fake_quantize(t, scale, zero, quantizer.spec) for t in (made, pooled))
    assert torch.equal(F.max_pool2d(early, 4, 2), late), "clipping and the largest of several commute"
