"""GPTQ: against an explicit OBQ with inverses, and by what it is for, a smaller error of a layer's and of a network's output."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import networks
import pytest
import torch
from qdeploy.calibration import gptq as module
from qdeploy.calibration.gptq import GPTQ, gptq, output_error, patches
from torch import Tensor, fx, nn

import qdeploy
from qdeploy.capture.capture import capture
from qdeploy.core.errors import OptionError
from qdeploy.core.spec import QuantSpec
from qdeploy.graph import query
from qdeploy.numerics import arith
from qdeploy.numerics.quantizer import Quantizer
from qdeploy.recipes.step import Declined, Work, generator, make_step
from qdeploy.simulation.prepared import Prepared

SCHEMES = (
    "int4 per-channel",
    "int4",
    "int4 per-channel power-of-two",
    "int4 power-of-two dpu",
    "uint4 per-channel",
    "int4 asymmetric half-away",
    "int2 per-channel",
    "int8 narrow",
)
Numbers = tuple[Tensor, Tensor, QuantSpec]


def numbers(weight: Tensor, scheme: str, share: float = 1.0) -> Numbers:
    """Scale, zero_point and spec of a weight `[O, K]`, for a `share` of its range."""
    spec = QuantSpec.parse(scheme)
    flat = weight if spec.axis == 0 else weight.reshape(1, -1)
    return *arith.choose_scale(share * flat.amin(1), share * flat.amax(1), spec), spec


def inputs(groups: int, size: int, rows: int = 400, seed: int = 0) -> Tensor:
    """Correlated inputs of very different size, float64 `[G, R, K]`."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(groups, rows, size, generator=random) @ torch.randn(groups, size, size, generator=random)
    sizes = torch.stack([torch.logspace(-1, 0.5, size)[torch.randperm(size, generator=random)] for _ in range(groups)])
    return ((mixed + 3 * mixed[:, :, :1]) * sizes.unsqueeze(1)).double()


def weights(rows: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-1, 1, rows)[:, None]


def nearest(weight: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    return arith.fake_quantize(weight, scale, zero_point, spec)


def squares(weight: Tensor, made: Tensor, x: Tensor) -> Tensor:
    """The squared output errors of every row, from the outputs."""
    groups = weight.double().view(len(x), -1, weight.shape[1])
    return (x @ (made.double().view_as(groups) - groups).mT).square().sum(1).flatten()


def test_doctest():
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("groups", [1, 4])
def test_it_errs_less_than_rounding_to_nearest_and_stays_on_the_grid(scheme: str, groups: int):
    weight, x = weights(16, 40), inputs(groups, 40)
    scale, zero, spec = numbers(weight, scheme)
    made = gptq(weight, scale, zero, spec, x.mT @ x)
    before, after = squares(weight, nearest(weight, scale, zero, spec), x), squares(weight, made, x)
    assert (after <= before * (1 + 1e-9)).all()
    assert (after / before).log().mean().exp() < 0.3
    assert torch.equal(made, nearest(made, scale, zero, spec))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_independent_inputs_are_rounded_to_nearest(scheme: str):
    weight = weights(12, 30)
    steps = numbers(weight, scheme, share=0.6)
    hessian = torch.diag(torch.logspace(-3, 3, 30)).double().view(1, 30, 30)
    assert torch.equal(gptq(weight, *steps, hessian), nearest(weight, *steps))
    assert torch.equal(gptq(weight, *steps, torch.eye(30).double().expand(3, 30, 30)), nearest(weight, *steps))


def slow(weight: Tensor, steps: Numbers, hessian: Tensor, damp: float) -> Tensor:
    """One row after the other, one column after the other, with the inverse of what is left computed anew each time (OBQ)."""
    scale, zero, spec = steps
    result = torch.empty_like(weight)
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    order = sorted(range(len(hessian)), key=lambda i: -float(hessian[i, i]))
    for row in range(len(weight)):
        one = (scale[row : row + 1], zero[row : row + 1], spec) if spec.axis == 0 else (scale, zero, spec)
        w = weight[row].double().clone()
        for position, column in enumerate(order):
            rest = order[position:]
            inverse = torch.linalg.inv(damped[rest][:, rest])
            result[row, column] = nearest(w[column].float().view(1), *one)
            w[rest] -= (w[column] - result[row, column]) / inverse[0, 0] * inverse[0]
        change = torch.stack((result[row], nearest(weight[row], *one))).double() - weight[row].double()
        errors = (change @ hessian * change).sum(1)
        if errors[0] >= errors[1]:
            result[row] = nearest(weight[row], *one)
    return result


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize("scheme", ["int4 per-channel", "uint3"])
def test_it_is_obq_in_a_fixed_order_whatever_the_block(block: int, scheme: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BLOCK", block)
    weight, x = weights(6, 24), inputs(1, 24)
    steps = numbers(weight, scheme, share=0.8)
    assert torch.equal(gptq(weight, *steps, x.mT @ x, damp=0.05), slow(weight, steps, (x.mT @ x)[0], 0.05))


def test_groups_are_rounded_as_if_each_were_alone():
    weight, x = weights(12, 9), inputs(4, 9)
    scale, zero, spec = numbers(weight, "int3 per-channel")
    hessian = x.mT @ x
    assert len({tuple(order.tolist()) for order in hessian.diagonal(dim1=1, dim2=2).argsort(1)}) > 1
    parts = [slice(3 * g, 3 * g + 3) for g in range(4)]
    alone = [gptq(weight[p], scale[p], zero[p], spec, hessian[g : g + 1]) for g, p in enumerate(parts)]
    assert torch.equal(gptq(weight, scale, zero, spec, hessian), torch.cat(alone))


@pytest.mark.parametrize("drifts", [False, True])
def test_no_row_errs_more_than_rounded_to_nearest(drifts: bool):
    for seed in range(20):
        weight, x = weights(32, 8, seed), inputs(1, 8, seed=seed)
        steps = numbers(weight, "int2 per-channel", share=0.5)  # what is clipped cannot be made up for
        aim = x + 0.3 * inputs(1, 8, seed=seed + 100) if drifts else x
        made = gptq(weight, *steps, x.mT @ x, drift=(aim - x).mT @ x)
        errors = [(x @ one.double().T - aim @ weight.double().T).square().sum(1) for one in (made, nearest(weight, *steps))]
        assert (errors[0] <= errors[1] * (1 + 1e-9)).all()


@pytest.mark.parametrize("dead", [[0, 5, 17], list(range(20))])
def test_inputs_that_are_always_0_are_rounded_to_nearest_and_change_nothing(dead: list[int]):
    weight, x = weights(8, 20), inputs(2, 20) * 1e-4
    x[0][:, dead] = 0
    steps = numbers(weight, "int4")
    made = gptq(weight, *steps, x.mT @ x)
    assert torch.equal(made[:4, dead], nearest(weight, *steps)[:4, dead])
    live = [column for column in range(20) if column not in dead]
    if live:
        alone = gptq(weight[:4, live], *steps, (x.mT @ x)[:1, live][:, :, live])
        assert torch.equal(made[:4, live], alone)


def test_a_weight_makes_up_for_what_has_become_of_its_input():
    weight, aim = weights(6, 10), inputs(1, 10)
    x = aim / 2
    scale, zero, spec = numbers(2 * weight, "int8 per-channel")
    made = gptq(weight, scale, zero, spec, x.mT @ x, 1e-6, (aim - x).mT @ x)
    assert ((made - 2 * weight).abs().amax(1) < 40 * scale).all()
    assert (x @ made.double().T - aim @ weight.double().T).square().sum() < 1e-4 * (aim @ weight.double().T).square().sum()


def test_the_error_with_a_drift_is_that_of_the_outputs_less_a_constant():
    weight, made, x, aim = weights(8, 12), weights(8, 12, seed=1), inputs(2, 12), inputs(2, 12, seed=1)
    found = output_error(weight, made, x.mT @ x, (aim - x).mT @ x)

    def error(one: Tensor) -> Tensor:
        return (x @ one.double().view(2, 4, 12).mT - aim @ weight.double().view(2, 4, 12).mT).square().sum(1).flatten()

    assert torch.allclose(found, error(made) - error(weight))
    assert torch.allclose(output_error(weight, made, x.mT @ x), squares(weight, made, x))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear on tokens": (lambda: nn.Linear(6, 4), (5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 7)),
    "stride": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(0, 1)), (3, 7, 9)),
    "dilation": (lambda: nn.Conv2d(3, 4, 3, dilation=(2, 1), padding=2), (3, 8, 7)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4), (4, 7, 7)),
    "same": (lambda: nn.Conv2d(3, 4, (2, 3), padding="same", dilation=(3, 2)), (3, 6, 6)),
    "valid": (lambda: nn.Conv2d(3, 4, 2, padding="valid", stride=2), (3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1), stride=(2, 1, 1)), (2, 4, 4, 4)),
}


def layer_of(made: nn.Module, shape: tuple[int, ...]) -> tuple[fx.Node, nn.Module]:
    (node,) = (n for n in capture(made, torch.randn(2, *shape)).module.graph.nodes if n.op == "call_function")
    return node, made


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
def test_patches_tell_the_output_error_of_any_change_of_a_weight(name: str):
    make, shape = LAYERS[name]
    node, made = layer_of(make(), shape)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    rows = patches(node, x, 10**6, generator(0)).double()
    weight = made.weight.detach()
    made.bias.data.zero_()
    made.weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    outputs = made(x).detach().double().square()
    axis = -1 if name.startswith("linear") else 1
    wanted = outputs.movedim(axis, 0).flatten(1).sum(1)
    error = output_error(torch.zeros(len(weight), weight[0].numel()), made.weight.detach().flatten(1), rows.mT @ rows)
    assert torch.allclose(error, wanted, rtol=1e-5)
    assert rows.shape[1] == outputs.numel() // len(weight)


def test_of_many_positions_some_are_drawn_the_same_of_every_sample():
    node, _ = layer_of(nn.Conv2d(1, 1, 1), (1, 8, 8))
    x = torch.arange(3 * 64, dtype=torch.float32).view(3, 1, 8, 8)
    random = generator(5)
    rows, again, later = (patches(node, x, 10, one).view(3, 10) for one in (random, generator(5), random))
    assert torch.equal(rows, again) and not torch.equal(rows, later)
    assert torch.equal(rows - rows[:1], torch.tensor([[0.0], [64.0], [128.0]]).expand(3, 10))
    assert len(rows[0].unique()) == 10


def prepared(name: str, scheme: str = "int4 per-channel", net: nn.Module | None = None) -> Prepared:
    data = networks.batches(name)
    if net is None:
        return networks.settled(name, "academic", weight_scheme=scheme)
    return qdeploy.calibrate(qdeploy.prepare(net, data[0], "academic", "plain", weight_scheme=scheme), data)


def work(name: str, made: Prepared, folder: Path | None = None) -> Work:
    return Work(made, [torch.cat(column) for column in zip(*networks.batches(name), strict=True)], folder)


def parameters(made: Prepared) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in made.module.named_parameters()}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("residual", "int4 per-channel"), ("mobile", "int4"), ("several", "int3 per-channel"), ("concat", "int4 power-of-two")],
)
def test_the_step_brings_a_network_nearer_to_its_float_outputs(name: str, scheme: str):
    made = prepared(name, scheme)
    data = networks.batches(name, seed=9)

    def noise() -> float:
        with torch.no_grad():
            pairs = [(networks.flat(made(*batch)), networks.flat(networks.network(name)(*batch))) for batch in data]
        return sum(float((got - want).square().sum()) for both in pairs for got, want in zip(*both, strict=True))

    before, kept = noise(), parameters(made)
    words = GPTQ().run(work(name, made))
    assert noise() < 0.8 * before
    after = parameters(made)
    rounded = {path for path, one in made.quantizers.items() if one.role == "weight"}
    assert {path for path, value in after.items() if not torch.equal(value, kept[path])} == rounded
    for path in rounded:
        one = made.quantizers[path]
        assert torch.equal(after[path], arith.fake_quantize(after[path], one.scale, one.zero_point, one.spec))
    assert words.startswith(f"rounded {len(rounded)} weights")


class Recorder(fx.Interpreter):
    """Runs a graph and remembers what enters each op."""

    def __init__(self, root: fx.GraphModule):
        super().__init__(root)
        self.entered: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        if n.op == "call_function":
            self.entered[query.tensor_name(n)] = self.map_nodes_to_values(n.args[0], n)  # type: ignore[arg-type]
        return super().run_node(n)


def test_every_layer_is_rounded_for_the_inputs_that_the_rounded_layers_before_give_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ROWS", 10**6)
    name = "residual"
    made, other = prepared(name), prepared(name)
    (x,) = work(name, made).samples
    GPTQ().run(work(name, made))
    float_run = Recorder(other.floating)
    with torch.no_grad():
        float_run.run(x)
        for node in list(other.module.graph.nodes):
            if node.op != "call_function" or query.op_of(node).weight is None:
                continue
            run = Recorder(other.module)
            run.run(x)
            tensor = query.tensor_name(node)
            rows, aim = (patches(node, one.entered[tensor], 10**6, generator(0)).double() for one in (run, float_run))
            call = query.argument(node, 1)
            assert call is not None
            one = other.module.get_submodule(str(call.target))
            assert isinstance(one, Quantizer)
            weight = query.parameter(other.module, str(call.args[1]))
            new = gptq(weight.flatten(1), one.scale, one.zero_point, one.spec, rows.mT @ rows, drift=(aim - rows).mT @ rows)
            weight.copy_(new.view_as(weight))
    ours, theirs = parameters(made), parameters(other)
    same = [float((ours[path] == theirs[path]).float().mean()) for path in ours]
    assert min(same) > 0.99  # sums in another order may turn a single code


def test_an_interrupted_step_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, other = prepared("residual"), prepared("residual")
    GPTQ().run(work("residual", made))
    calls: list[int] = []

    def failing(*args: object) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return gptq(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "gptq", failing)
    with pytest.raises(KeyboardInterrupt):
        GPTQ().run(work("residual", other, tmp_path))
    GPTQ().run(work("residual", other, tmp_path))
    assert len(calls) == 1 + len([one for one in made.quantizers.values() if one.role == "weight"])
    ours, theirs = parameters(made), parameters(other)
    assert all(torch.equal(ours[path], theirs[path]) for path in ours)


class Shared(nn.Module):
    """One layer applied twice, then a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.up = nn.Conv2d(3, 3, 3, padding=1), nn.ConvTranspose2d(3, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.twice(torch.relu(self.twice(x)))))


def test_a_shared_weight_is_rounded_once_and_a_transposed_convolution_is_left():
    torch.manual_seed(0)
    made = prepared("plain", net=Shared().eval())
    kept, run, float_run = parameters(made), Recorder(made.module), Recorder(made.floating)
    (x,) = work("plain", made).samples
    with torch.no_grad():
        run.run(x), float_run.run(x)
    first = next(node for node in made.module.graph.nodes if node.op == "call_function")
    rows, aim = (patches(first, one.entered["twice"], 10**6, generator(0)).double() for one in (run, float_run))
    words = GPTQ().run(work("plain", made))
    assert words.startswith("rounded 1 weights") and "left: up.weight, as conv_transpose2d does not multiply patches" in words
    assert torch.equal(parameters(made)["up.weight"], kept["up.weight"])
    one, weight = made.quantizers["twice.weight"], kept["twice.weight"].flatten(1)
    wanted = gptq(weight, one.scale, one.zero_point, one.spec, rows.mT @ rows, drift=(aim - rows).mT @ rows)
    assert torch.equal(parameters(made)["twice.weight"].flatten(1), wanted)


def test_without_evenly_spaced_codes_there_is_nothing_to_do():
    made = prepared("plain", "log8")
    with pytest.raises(Declined, match="no layer has a weight with evenly spaced codes"):
        GPTQ().run(work("plain", made))


@pytest.mark.parametrize(("option", "value"), [("samples", 0), ("samples", 1.5), ("damp", 0), ("damp", 2), ("damp", "much")])
def test_a_bad_option_is_refused(option: str, value: object):
    with pytest.raises(OptionError, match=f"{option} of step 'gptq'"):
        make_step("gptq", {option: value})


def test_the_grid_of_a_tensor_is_that_of_all_its_rows():
    weight, x = weights(6, 12), inputs(1, 12)
    scale, zero, spec = numbers(weight, "int4")
    spread = gptq(weight, scale.expand(6), zero.expand(6), replace(spec, axis=0), x.mT @ x)
    assert torch.equal(gptq(weight, scale, zero, spec, x.mT @ x), spread)
