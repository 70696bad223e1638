"""Capture and folding: the graph computes what the module computes, for any batch, and the module stays as it was."""

from __future__ import annotations

import collections
import copy
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import qdeploy
from qdeploy import api
from qdeploy.capture import outputs, simplify
from qdeploy.capture.capture import Captured, capture
from qdeploy.capture.fold import fold_batch_norms, untie_biases
from qdeploy.core.errors import CaptureError, InputError
from qdeploy.graph import edit, query


class Lambda(nn.Module):
    """`forward(self, *inputs)` as a function of the module and its inputs; the keywords are its modules."""

    def __init__(self, compute: Callable[..., object], **modules: nn.Module):
        super().__init__()
        self.compute = compute
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *inputs: Tensor) -> object:
        return self.compute(self, *inputs)


class OneAndMore(nn.Module):
    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return torch.stack([x, *rest]).sum(0)


class Named(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> dict[str, object]:
        return {"sum": left + right, "both": (left * 2, right - left)}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.table(words))


def noisy(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` with batch norms that do something, and without what initialization leaves at 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for owner in module.modules():
        if isinstance(owner, nn.modules.batchnorm._BatchNorm):
            for tensor in (owner.weight, owner.bias, owner.running_mean):
                if tensor is not None:
                    tensor.data.normal_(generator=generator)
            if owner.running_var is not None:
                owner.running_var.uniform_(0.1, 3, generator=generator)
    return module.eval()


def images(batch: int, seed: int = 0, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def words(batch: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 11, (batch, 5), generator=torch.Generator().manual_seed(seed))


def twice(norms: bool) -> nn.Module:
    parts = {"conv": nn.Conv2d(3, 3, 3, padding=1), "a": nn.BatchNorm2d(3), "b": nn.BatchNorm2d(3)}
    return Lambda((lambda s, x: s.b(s.conv(F.relu(s.a(s.conv(x)))))) if norms else (lambda s, x: s.conv(s.conv(x))), **parts)


def depthwise() -> nn.Module:
    first = (nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6())
    return nn.Sequential(*first, nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6), nn.Hardtanh(0, 6))


def linear_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 7), nn.BatchNorm1d(7), nn.ReLU())


def transpose_norm(groups: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups), nn.BatchNorm2d(6))


def one_image(batch: int) -> tuple[Tensor, ...]:
    return (images(batch),)


def one_conv(compute: Callable[..., object]) -> Callable[[], nn.Module]:
    """A model of one 1x1 convolution `c` and one batch norm `b`."""
    return lambda: Lambda(compute, c=nn.Conv2d(3, 3, 1), b=nn.BatchNorm2d(3))


# name -> (module, batch norms that fold, batch size -> inputs)
MODELS: dict[str, tuple[Callable[[], nn.Module], int, Callable[[int], tuple[Tensor, ...]]]] = {
    name: (make, folds, inputs)
    for name, make, folds, inputs in [
        ("conv-bn-relu", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), 1, one_image),
        ("conv-bn-bn", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), 2, one_image),
        ("plain norm", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), 1, one_image),
        ("residual", one_conv(lambda s, x: F.relu(s.b(s.c(x)) + x)), 1, one_image),
        ("depthwise", depthwise, 2, one_image),
        ("dropout", lambda: nn.Sequential(nn.Dropout2d(), nn.Conv2d(3, 4, 3), nn.AlphaDropout(), nn.Dropout()), 0, one_image),
        ("view", lambda: Lambda(lambda s, x: s.fc(x.view(x.size(0), -1)), fc=nn.Linear(192, 2)), 0, one_image),
        ("merge", lambda: Lambda(lambda s, x: s.fc(x.reshape(x.size(0) * 3, -1)), fc=nn.Linear(64, 2)), 0, one_image),
        ("cast", lambda: Lambda(lambda s, x: F.relu(s.c(x.float()).float()), c=nn.Conv2d(3, 4, 3)), 0, one_image),
        ("two inputs", Named, 0, lambda n: (images(n, 1), images(n, 2))),
        ("star", lambda: Lambda(lambda s, x, y: (x - y, {"y": y * 2})), 0, lambda n: (images(n, 1), images(n, 2))),
        ("one and more", OneAndMore, 0, lambda n: (images(n, 1), images(n, 2), images(n, 3))),
        ("twice", lambda: twice(False), 0, one_image),
        ("twice with two norms", lambda: twice(True), 2, one_image),
        ("tied", Tied, 0, lambda n: (words(n),)),
        ("linear-bn", linear_norm, 1, one_image),
        ("transpose-bn", transpose_norm, 1, one_image),
        ("grouped transpose-bn", lambda: transpose_norm(2), 0, one_image),
        ("bn-conv", lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), 0, one_image),
        ("branch", one_conv(lambda s, x: s.b(s.c(x)) + s.c(x * 2).sum()), 1, one_image),
        ("conv read twice", one_conv(lambda s, x: (lambda y: s.b(y) + y)(s.c(x))), 0, one_image),
    ]
}  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return noisy(MODELS[name][0]())


def inputs_of(name: str, batch: int) -> tuple[Tensor, ...]:
    return MODELS[name][2](batch)


@cache
def captured_of(name: str) -> Captured:
    """Made once a process: not to be changed."""
    return capture(build(name), inputs_of(name, 2))


def assert_computes(module: nn.Module, model: nn.Module, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    with torch.no_grad():
        (made, structure), (wanted, expected) = pytree.tree_flatten(module(*inputs)), pytree.tree_flatten(model(*inputs))
    assert structure == expected
    for a, b in zip(made, wanted, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_the_captured_and_folded_graph_computes_the_module_for_any_batch(name: str):
    model, captured = build(name), captured_of(name)
    assert captured.dynamic_batch and not captured.notes
    for batch in (1, 7):
        assert_computes(captured.module, model, inputs_of(name, batch), 1e-6)
    folded = edit.copy(captured.module, own_parameters=True)
    assert fold_batch_norms(folded) == MODELS[name][1]
    untie_biases(folded)
    for batch in (1, 7):
        assert_computes(folded, model, inputs_of(name, batch), 1e-5)


@pytest.mark.parametrize("name", [name for name, (_, folds, _) in MODELS.items() if folds])
def test_folding_in_float64_is_exact_to_rounding(name: str):
    model = build(name).double()
    folded = edit.copy(captured_of(name).module, own_parameters=True).double()
    fold_batch_norms(folded)
    assert not [node for node in folded.graph.nodes if "batch_norm" in str(node.target)]
    assert_computes(folded, model, tuple(x.double() for x in inputs_of(name, 3)), 1e-12)


UNLIKE = ("conv-bn-relu", "dropout", "two inputs", "twice with two norms", "tied", "linear-bn", "grouped transpose-bn")
"""Models that between them have every kind of layer, of input and of sharing."""


def quick(names: Iterable[str], kept: Iterable[str]) -> list[object]:
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", quick(MODELS, UNLIKE))
def test_nothing_of_the_users_model_changes(name: str):
    model = build(name)
    model.train()
    for module in list(model.modules())[1::2]:
        module.training = False
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    captured = capture(model, inputs_of(name, 1))
    fold_batch_norms(captured.module)
    untie_biases(captured.module)
    with torch.no_grad():
        for tensor in (*captured.module.parameters(), *captured.module.buffers()):
            tensor.add_(1)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["conv-bn-relu", "dropout"])
def test_a_model_in_training_mode_is_captured_in_eval_mode(name: str):
    model = build(name)
    captured = capture(copy.deepcopy(model).train(), inputs_of(name, 2))
    assert_computes(captured.module, model, inputs_of(name, 4), 1e-6)


def test_a_traced_graph_in_training_mode_is_captured_in_eval_mode():
    model = build("dropout")
    traced = torch.fx.symbolic_trace(copy.deepcopy(model)).train()
    assert_computes(capture(traced, images(2)).module, model, (images(4),), 1e-6)
    assert traced.training


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_is_functional_with_readable_unique_names_and_no_sizes_to_compute(name: str):
    nodes = list(captured_of(name).module.graph.nodes)
    names = [query.tensor_name(node) for node in nodes if node.op != "output"]
    assert len(set(names)) == len(names)
    assert {node.op for node in nodes} <= {"placeholder", "get_attr", "call_function", "output"}
    targets = [str(node.target) for node in nodes if node.op == "call_function"]
    assert all(target.startswith("aten.") or "getitem" in target for target in targets), targets
    assert not [t for t in targets if "sym_size" in t or "assert" in t or "dropout" in t or t.split(".")[1:2] == ["copy_"]]


def test_tensors_have_the_names_of_the_modules_that_make_them():
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    model.add_module("block", Lambda(lambda s, x: s.conv(x) + x, conv=nn.Conv2d(3, 3, 1)))
    captured = capture(model, images(2))
    made = [query.tensor_name(n) for n in captured.module.graph.nodes if n.op == "call_function"]
    assert made == ["stem.0", "stem.1", "block.conv", "block.add"]


def program(model: nn.Module, *inputs: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), inputs)


PROGRAMS = ("conv-bn-relu", "depthwise", "two inputs", "tied", "linear-bn", "star")


@pytest.mark.parametrize(
    ("name", "given"),
    [(name, "no example") for name in PROGRAMS]
    + [pytest.param(n, "example", marks=() if n in ("conv-bn-relu", "two inputs") else pytest.mark.slow) for n in PROGRAMS],
)
def test_a_program_with_a_fixed_batch_gets_a_dynamic_one(name: str, given: str):
    model, inputs = build(name), inputs_of(name, 1)
    captured = capture(program(model, *inputs), inputs if given == "example" else None)
    assert captured.dynamic_batch and not captured.notes
    for batch in (1, 7):
        assert_computes(captured.module, model, inputs_of(name, batch), 1e-6)


FIXED: dict[str, Callable[..., Tensor]] = {
    "a batch in its sizes": lambda s, x: s.fc(x.view(1, -1)),
    "the mean over everything": lambda s, x: x.reshape(1, -1).mean(1, keepdim=True) + 0 * s.fc.bias[:1],
    "a mean over the batch": lambda s, x: s.fc((x - x.mean((0, 2, 3), keepdim=True)).flatten(1)),
    "a softmax over the batch": lambda s, x: s.fc(torch.softmax(x, 0).flatten(1)),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_program_that_works_for_its_own_batch_only_keeps_it_with_a_note_where_it_has(name: str):
    model = Lambda(FIXED[name], fc=nn.Linear(192, 4)).eval()
    captured = capture(program(model, images(1)), None)
    assert not captured.dynamic_batch and "fixed at 1" in captured.notes[0]
    assert captured.inputs[0].shape == (1, 3, 8, 8)
    assert_computes(captured.module, model, (images(1, 5),), 1e-6)


def test_a_program_with_a_dynamic_batch_is_taken_as_it_is():
    model = build("conv-bn-relu")
    batch = torch.export.Dim("n")
    made = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},))
    captured = capture(made, None)
    assert captured.inputs[0].shape == (None, 3, 8, 8)
    assert_computes(captured.module, model, (images(5),), 1e-6)


class Anchored(nn.Module):
    """Keeps what belongs to the shape it met last, as heads of detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.shape, self.anchors = nn.Conv2d(3, 4, 1), (3, 4, 8, 8), torch.ones(3, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(x)
        if x.shape != self.shape:
            self.shape, self.anchors = x.shape, torch.full((x.shape[0], 1, *x.shape[2:]), 0.5)
        return x + self.anchors


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_model_that_fixes_the_batch_is_captured_at_that_of_the_example_with_a_note(batch: int) -> None:
    model = Anchored()
    prepared = qdeploy.prepare(model, images(batch), "snpe", "plain")
    captured = prepared.captured
    assert captured.inputs[0].shape == (batch, 3, 8, 8)
    assert captured.example[0].shape[0] == batch
    (note,) = captured.notes
    assert f"the batch stays fixed at {batch}" in note
    assert "batch" in note.partition("(")[2]
    with pytest.raises(InputError, match=f"to do: give batches of {batch},"):
        qdeploy.calibrate(prepared, [images(batch + 1)])
    torch.testing.assert_close(captured.module(images(batch)), model(images(batch)))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


def test_control_flow_on_values_is_refused_with_the_users_line():
    lines, first = inspect.getsourcelines(Branching.forward)
    line = first + next(i for i, text in enumerate(lines) if "if x.sum()" in text)
    with pytest.raises(CaptureError, match=r"if x\.sum") as caught:
        capture(Branching(), images(2))
    assert f"{Path(__file__).name}:{line}" in str(caught.value)


def refused(model: object, example: object) -> str:
    with pytest.raises((InputError, CaptureError)) as caught:
        capture(model, example)  # type: ignore[arg-type]
    return str(caught.value)


def test_what_is_no_model_and_no_example_is_refused():
    model = build("conv-bn-relu")
    assert "found: str" in refused("model.pt2", images(1))
    assert "missing" in refused(model, None)
    assert "empty" in refused(model, ())
    assert "found: int" in refused(model, (images(1), 3))
    assert "found: str" in refused(model, "image")
    assert "found: float" in refused(model, 3.0)
    assert "no floating-point tensor" in refused(Lambda(lambda s, x: x.argmax(1)), images(2))
    assert refused(model, images(2, channels=4))
    assert refused(model, images(2, dtype=torch.float64))


def test_an_example_that_does_not_fit_a_program_is_refused():
    made = program(build("conv-bn-relu"), images(1))
    assert "allowed: [1, 3, 8, 8]" in refused(made, torch.zeros(2, 3, 8, 9))
    assert "found: float64; allowed: float32" in refused(made, images(1, dtype=torch.float64))
    assert "number of inputs" in refused(made, (images(1), images(1)))


def test_a_shared_bias_is_copied_once_per_further_reader_and_still_learns():
    captured: Captured = capture(build("twice"), images(2))
    assert untie_biases(captured.module) == 1
    assert untie_biases(captured.module) == 0
    assert all(parameter.requires_grad for parameter in captured.module.parameters())


def test_frozen_parameters_stay_frozen_when_a_batch_norm_is_folded_in():
    model = build("conv-bn-relu")
    model[0].weight.requires_grad_(False)
    captured = capture(model, images(2))
    assert fold_batch_norms(captured.module) == 1
    assert not captured.module.get_parameter("0.weight").requires_grad
    assert_computes(captured.module, model, (images(3),), 1e-5)


@pytest.mark.parametrize("given", ["dropout", "clone", "everything sliced", "part sliced", "casts", "checks", "in order", "same shape"])
def test_simplifying_counts_what_it_drops_and_changes_no_number(given: str):
    compute, expected = {
        "dropout": (lambda x: torch.ops.aten.dropout(torch.ops.aten.dropout(x, 0.5, False), 0.5, True) * 0 + x, 1),
        "clone": (lambda x: torch.ops.aten.detach(torch.ops.aten.clone(x)) + 1, 2),
        "everything sliced": (
            lambda x: torch.ops.aten.slice(torch.ops.aten.slice(torch.ops.aten.slice(x, 1, 0, None), 2, None, 2**63 - 1), 3, -8, 8) + 1,
            3,
        ),
        "casts": (
            lambda x: torch.ops.aten._to_copy(torch.ops.aten.to(torch.ops.aten.type_as(x, x * 2), dtype=x.dtype).double()).float() * 2,
            3,
        ),
        "part sliced": (lambda x: torch.ops.aten.slice(torch.ops.aten.slice(x, 1, 1, 2**63 - 1), 3, 0, 2**63 - 1, 3), 0),
        "in order": (lambda x: torch.ops.aten.permute(torch.ops.aten.transpose(x, 2, 2), [0, 1, 2, 3]).transpose(2, 3) + 1, 2),
        "same shape": (lambda x: torch.ops.aten.expand(x.reshape(-1, 3, 8, 8), [-1, 3, -1, -1]).reshape(-1, 192) + 1, 2),
        "checks": (lambda x: (torch.ops.aten._assert_tensor_metadata(x), x + 1)[1], 1),
    }[given]
    traced = make_fx(compute, pre_dispatch=True)(images(2))
    x = images(3)
    wanted = traced(x)
    assert simplify.drop_no_ops(traced) == expected
    assert simplify.drop_no_ops(traced) == 0
    assert torch.equal(traced(x), wanted)


class NamedLikeOps(nn.Module):
    """Parameters of its own that are called like an op and like the input."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.x = nn.Parameter(torch.ones(1, 3, 1, 1))
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.relu(x + self.x) * self.relu)


def test_parameters_named_like_an_op_or_an_input_keep_their_names() -> None:
    together = api.prepare_all(NamedLikeOps(), torch.randn(2, 3, 8, 8), ("snpe", "tensorrt"), recipe="fast")
    for prepared in together:
        names = [t.tensor for t in prepared.plan.tensors]
        assert len(names) == len(set(names)), prepared.backend.name
    api.calibrate_all(together, [torch.randn(4, 3, 8, 8)])


class Shuffled(nn.Module):
    """A channel shuffle by hand: the exporter puts a clone between the transpose and the view."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).flatten(1)


def test_a_channel_shuffle_by_hand_still_runs_without_its_clone():
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    captured = capture(nn.Sequential(nn.Conv2d(4, 4, 1), Shuffled()).eval(), x)
    module = captured.module
    with torch.no_grad():
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            assert torch.equal(module(given), module(x))


Pair = collections.namedtuple("Pair", "mean spread")
RETURNED: dict[str, tuple[Callable[..., object], list[str]]] = {
    "a tensor": (lambda s, x: s.c(x), ["c"]),
    "a tuple": (lambda s, x: (s.c(x), [s.c(x) * 2]), ["c", "mul"]),
    "a named tuple": (lambda s, x: Pair(s.c(x), s.c(x) * 2), ["mean", "spread"]),
    "a dict in a dict": (lambda s, x: {"a": {"b": s.c(x)}, "none": None, "count": 3}, ["a.b"]),
}


@pytest.mark.parametrize("case", RETURNED)
def test_outputs_are_named_by_their_keys_or_by_their_modules(case: str):
    compute, names = RETURNED[case]
    assert outputs.names(capture(Lambda(compute, c=nn.Conv2d(3, 3, 1)).eval(), images(2)).module) == names


def test_a_number_that_depends_on_the_inputs_is_no_output():
    with pytest.raises(CaptureError, match="returns a number that depends on its inputs"):
        capture(Lambda(lambda s, x: {"y": x * 2, "count": x.shape[0]}), images(2))


class InPlace(nn.Module):
    """Works in place on its input, and on two states of its own."""

    total: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(4, 3)
        self.register_buffer("total", torch.zeros(3))
        self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = self.fc(self.relu(x.add_(0.5)))
        self.total.add_(made.mean())
        self.calls += 1
        return made, x, self.total


@pytest.mark.parametrize("exported", [False, True])
def test_a_model_that_works_in_place_changes_no_data_and_no_state_of_the_user(exported: bool) -> None:
    model, x = noisy(InPlace()).eval(), torch.randn(6, 4)
    given, wanted = x.clone(), [t.clone() for t in copy.deepcopy(model)(x.clone())]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = qdeploy.prepare(program(model, x.clone()) if exported else model, given, "onnxruntime")
    qdeploy.calibrate(one, [given])
    made = one(given)
    assert torch.equal(given, x)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        floats = one.floating(given)
    assert all(
        torch.allclose(a, b, atol=0.05) and torch.allclose(f, b, atol=1e-3) for a, f, b in zip(made, floats, wanted, strict=True)
    )
    (note,) = [note for note in one.captured.notes if "changes its" in note]
    assert "buffers 'total', 'calls'" in note and "at capture" in note


def test_a_program_that_was_decomposed_before_is_captured_as_the_layers_it_was_made_of() -> None:
    model = noisy(
        nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, groups=3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, 2), nn.Flatten(), nn.Linear(256, 5))
    )
    decomposed = program(model, images(2)).run_decompositions()
    assert any(str(node.target) == "aten.convolution.default" for node in decomposed.graph.nodes)
    captured = capture(decomposed, None).module
    made = [query.op_of(node).name for node in captured.graph.nodes if node.op == "call_function"]
    assert made == ["conv2d", "relu", "conv_transpose2d", "reshape", "linear"]
    assert_computes(captured, model, (images(2),), 1e-5)
