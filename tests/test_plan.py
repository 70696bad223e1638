"""Plans: what each target quantizes and why, and that inserting the quantizers changes nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

import qdeploy
from qdeploy import graph
from qdeploy.backend import backends
from qdeploy.capture import capture
from qdeploy.errors import InputError, OptionError
from qdeploy.fold import untie_biases
from qdeploy.plan import Plan, TensorPlan, Widths, make_plan
from qdeploy.prepared import Prepared
from qdeploy.quantizer import Quantizer

NAMES = backends.names()
INT32 = [name for name in NAMES if backends[name].bias == "int32"]
FLOAT_OUTPUT = ["tensorrt", "openvino"]


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
    floats = [graph.tensor_name(n) for n in module.graph.nodes if n.op != "output" and graph.is_float(n)]
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
    assert title == f"plan for {backend}: {len(plan.quantized)} of {len(plan.tensors)} tensors quantized"
    assert header.split() == ["tensor", "role", "op", "scheme", "why"]
    for line, tensor in zip(lines, plan.tensors, strict=True):
        scheme = tensor.spec.describe() if tensor.spec else "float"
        assert line.split() == [tensor.tensor, tensor.role, tensor.op, *scheme.split(), *tensor.reason.split()]


@pytest.mark.parametrize("model", MODELS)
def test_snpe_encodes_every_tensor_but_what_is_fused_away(model: str):
    plan, _, _ = planned(model, "snpe")
    assert all(tensor.spec is not None or tensor.reason.startswith("fused: ") for tensor in plan.tensors)


@pytest.mark.parametrize("backend", NAMES)
def test_no_quantizer_stands_between_a_layer_and_the_relu_that_alone_reads_it(backend: str):
    _, decisions, _ = planned("chain", backend)
    assert decisions["c1"].spec is None and decisions["c1"].reason.startswith("fused: conv2d + relu")
    _, decisions, _ = planned("relu6", backend)
    assert decisions["c1"].reason.startswith("fused: conv2d + relu6") and decisions["c2"].reason.startswith("fused: conv2d + relu")


@pytest.mark.parametrize("backend", NAMES)
def test_a_layer_with_two_readers_is_not_fused(backend: str):
    _, decisions, _ = planned("two readers", backend)
    assert not decisions["c1"].reason.startswith("fused")
    assert (decisions["c1"].spec is not None) == (backend != "tensorrt")


@pytest.mark.parametrize("backend", ["tensorrt", "openvino"])
def test_a_residual_add_quantizes_the_skip_branch_only(backend: str):
    _, decisions, _ = planned("skip", backend)
    assert decisions["c2"].spec is None and "only the skip branch" in decisions["c2"].reason
    assert decisions["x"].spec is not None and "add" in decisions["x"].readers
    _, decisions, _ = planned("both", backend)
    assert decisions["c2"].spec is None and decisions["c1"].spec is not None, "the later of two layers takes the add in"


@pytest.mark.parametrize("backend", [name for name in NAMES if backends[name].residual == "both"])
@pytest.mark.parametrize("model", ["skip", "both"])
def test_an_add_of_the_other_targets_quantizes_both_branches(backend: str, model: str):
    _, decisions, _ = planned(model, backend)
    assert {decisions["c2"].spec is None, decisions["x"].spec is None} == {False}


@pytest.mark.parametrize("backend", NAMES)
def test_pooling_and_moves_share_the_encoding_of_what_they_move(backend: str):
    _, decisions, _ = planned("chain", backend)
    chain = [decisions[name] for name in ("relu", "max_pool2d", "reshape")]
    assert {tensor.group for tensor in chain} == {"relu"}
    assert [tensor.observe for tensor in chain] == [True, False, False]
    _, decisions, _ = planned("split", backend)
    assert decisions["split_1"].group == decisions["relu"].group and not decisions["split_1"].observe


@pytest.mark.parametrize("backend", NAMES)
def test_a_concat_has_one_encoding_for_all_its_inputs(backend: str):
    _, decisions, _ = planned("concat", backend)
    names = ("c1", "relu", "concat", "slice")
    assert {decisions[name].group for name in names} == {"c1"}
    assert [decisions[name].observe for name in names] == [True, True, False, False]
    assert decisions["relu"].reason.startswith("shares the encoding of c1: ")


@pytest.mark.parametrize("backend", FLOAT_OUTPUT)
@pytest.mark.parametrize("model", ["chain", "skip", "transpose", "output"])
def test_the_output_stays_float_where_the_target_says_so(backend: str, model: str):
    plan, _, _ = planned(model, backend)
    assert all("<output>" not in tensor.readers for tensor in plan.tensors)


@pytest.mark.parametrize("backend", FLOAT_OUTPUT)
def test_a_tensor_called_output_is_not_taken_for_the_models_output(backend: str):
    prepared = qdeploy.prepare(MODELS["output"](), example("output"), backend=backend, recipe="fast")
    inner, returned = graph.outputs(prepared.module.graph)
    assert graph.tensor_name(returned) == "sigmoid" and graph.tensor_name(inner) == "output"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", NAMES)
def test_weights_and_biases_have_what_the_target_says(model: str, backend: str):
    plan, decisions, _ = planned(model, backend)
    target = backends[backend]
    axes = {"conv2d": 0, "linear": 0, "conv_transpose2d": 1}
    for tensor in by_role(plan, "weight"):
        assert tensor.spec is not None and tensor.spec.bits == target.weight.bits
        assert tensor.spec.axis == (None if target.weight.axis is None else axes[tensor.op])
    for tensor in by_role(plan, "bias"):
        assert tensor.scales_of is not None and all(decisions[name].spec is not None for name in tensor.scales_of)
        assert (tensor.spec is not None) == (backend in INT32)
        if tensor.spec is not None:
            assert (tensor.spec.bits, tensor.spec.axis) == (32, None if target.weight.axis is None else 0)


@pytest.mark.parametrize("backend", NAMES)
def test_integers_are_not_quantized(backend: str):
    _, decisions, module = planned("embedding", backend)
    assert graph.tensor_name(module.graph.find_nodes(op="placeholder")[0]) not in decisions
    assert decisions["1.weight"].role == "weight" and decisions["0"].spec is not None
    assert decisions["0.weight"].role == "constant"
    assert (decisions["0.weight"].spec is not None) == (backend == "snpe")


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("what", ["weight", "activation", "first_last"])
def test_a_bit_width_that_the_target_has_not_is_refused_with_the_list(backend: str, what: str):
    with pytest.raises(OptionError, match=rf"backend '{backend}' has no 3-bit .*allowed: 8"):
        planned("chain", backend, Widths(**{what: 3}))


def test_first_and_last_layers_get_the_bits_that_the_user_chose():
    plan = make_plan(captured("concat"), replace(backends["tvm"], weight_bits=(4, 8)), Widths(weight=4, first_last=8))
    assert [tensor.spec and tensor.spec.bits for tensor in by_role(plan, "weight")] == [8, 4, 8]


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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
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
        return self.fc(made[-1].flatten(1)), made[-2]


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
    shape = [-1 if d == spec.axis else 1 for d in range(values.dim())] if spec.axis is not None else []
    codes = torch.round(values.double() / scale.reshape(shape)).long() + zero.reshape(shape)
    assert spec.qmin <= codes.min() and codes.max() <= spec.qmax
    assert torch.equal(((codes - zero.reshape(shape)).float() * scale.float().reshape(shape)), values)


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(steps=programs(), backend=st.sampled_from(NAMES))
def test_inserted_quantizers_are_called_once_a_tensor_change_nothing_in_float_and_put_values_on_their_grids(steps, backend: str):
    model = Random(steps).eval()
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = capture(model, x).module(x)
    prepared: Prepared = qdeploy.prepare(model, x, backend=backend, recipe="fast")
    assert all(torch.equal(a, b) for a, b in zip(prepared.flat((x,)), wanted, strict=True))
    qdeploy.calibrate(prepared, [x])
    with torch.no_grad():
        watch = Watch(prepared.module)
        watch.run(x)
    assert set(watch.seen) == {tensor.tensor for tensor in prepared.plan.quantized}
    for name, calls in watch.seen.items():
        assert len(calls) == 1, f"{name} is quantized {len(calls)} times"
        assert calls[0][0] is prepared.quantizers[name]
        assert_on_grid(*calls[0])


@pytest.mark.parametrize("backend", [b.name for b in backends])
def test_the_statistics_of_a_batch_norm_that_stays_are_not_quantized(backend: str) -> None:
    norm_first = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU())
    plan = qdeploy.prepare(norm_first, torch.randn(2, 3, 8, 8), backend, "fast").plan
    assert not [t.tensor for t in plan.quantized if t.tensor.startswith("0.") and t.role == "constant"]
