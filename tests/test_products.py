"""Products with a constant matrix are linear layers: planned, named and computed as nn.Linear with the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qdeploy
from qdeploy.capture.capture import capture
from qdeploy.graph import query

Compute = Callable[["Matrix", Tensor], Tensor]


class Matrix(nn.Module):
    """A function of a tensor `[N, 4, 6]` and one of parameters."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.compute = compute
        for name, sizes in {"wide": (6, 5), "tall": (5, 6), "row": (6,), "left": (3, 4), "batched": (4, 6, 5)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(sizes, generator=generator)))
        self.bias, self.column = nn.Parameter(torch.randn(5, generator=generator)), nn.Parameter(torch.randn(3, 1, generator=generator))
        self.one = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


AS_LAYERS: dict[str, tuple[Compute, dict[str, tuple[int, ...]]]] = {
    "right": (lambda m, x: x @ m.wide, {"wide": (5, 6)}),
    "right with a bias": (lambda m, x: x @ m.wide + m.bias, {"wide": (5, 6), "bias": (5,)}),
    "bias in front": (lambda m, x: m.bias + x @ m.wide, {"wide": (5, 6), "bias": (5,)}),
    "one number for all": (lambda m, x: x @ m.wide + m.one, {"wide": (5, 6), "one": (5,)}),
    "transposed": (lambda m, x: x @ m.tall.t() + m.bias, {"tall": (5, 6), "bias": (5,)}),
    "permuted": (lambda m, x: x @ m.tall.permute(1, 0), {"tall": (5, 6)}),
    "of one batch": (lambda m, x: torch.matmul(x, m.wide[None]), {"constants.unsqueeze": (5, 6)}),
    "mm": (lambda m, x: torch.mm(x[:, 0], m.wide), {"wide": (5, 6)}),
    "addmm": (lambda m, x: torch.addmm(m.bias, x[:, 0], m.wide), {"wide_transposed": (5, 6), "bias": (5,)}),
    "addmm of a row": (lambda m, x: torch.addmm(m.bias[None], x[:, 0], m.wide), {"wide": (5, 6), "constants.unsqueeze": (5,)}),
    "a layer and a bias": (
        lambda m, x: nn.functional.linear(x, m.tall) + m.bias[None],
        {"tall": (5, 6), "constants.unsqueeze": (5,)},
    ),
    "einsum": (lambda m, x: torch.einsum("nti,io->nto", x, m.wide) + m.bias, {"wide": (5, 6), "bias": (5,)}),
    "einsum turned": (lambda m, x: torch.einsum("oi,...i->...o", m.tall, x), {"tall": (5, 6)}),
    "tensordot": (lambda m, x: torch.tensordot(x, m.wide, ([-1], [0])), {"wide": (5, 6)}),
    "vector": (lambda m, x: x @ m.row, {"row": (1, 6)}),
    "left": (lambda m, x: m.left @ x, {"left": (3, 4)}),
    "left with a bias": (lambda m, x: m.left @ x + m.column, {"left": (3, 4), "column": (3,)}),
    "left of a transposed one": (lambda m, x: (m.tall @ x.transpose(1, 2)).mT, {"tall": (5, 6)}),
    "one after another": (lambda m, x: (x @ m.wide + m.bias) @ m.tall, {"wide": (5, 6), "bias": (5,), "tall": (6, 5)}),
    "read twice": (lambda m, x: x @ m.wide + (x * 2) @ m.wide, {"wide": (5, 6)}),
    "both ways round": (lambda m, x: x @ m.wide @ m.wide.t(), {"wide": (6, 5), "wide_transposed": (5, 6)}),
}


@pytest.mark.parametrize("name", AS_LAYERS)
def test_a_product_with_a_constant_matrix_is_a_layer(name: str) -> None:
    compute, wanted = AS_LAYERS[name]
    model, x = Matrix(compute).eval(), torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    module = capture(model, x[:2]).module
    layers = [node for node in module.graph.nodes if node.op == "call_function" and query.op_of(node).name == "linear"]
    given = {str(n.target): tuple(query.parameter(module, str(n.target)).shape) for layer in layers for n in query.constants(layer)}
    assert given == wanted
    assert not any(query.op_of(n).name in ("matmul", "einsum", "tensordot") for n in module.graph.nodes if n.op == "call_function")
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_product_seen_from_the_other_side_needs_no_transposition() -> None:
    module = capture(Matrix(AS_LAYERS["left of a transposed one"][0]).eval(), torch.randn(2, 4, 6)).module
    assert [query.op_of(node).name for node in module.graph.nodes if node.op == "call_function"] == ["linear"]


NO_LAYERS: dict[str, Compute] = {
    "a matrix for each place": lambda m, x: torch.matmul(x[:, :, None], m.batched),
    "two tensors": lambda m, x: x @ x.transpose(1, 2),
    "a bias for each row": lambda m, x: (x @ m.wide) * m.one,
}


@pytest.mark.parametrize("name", NO_LAYERS)
def test_what_is_no_layer_computes_what_it_did(name: str) -> None:
    model, x = Matrix(NO_LAYERS[name]).eval(), torch.randn(3, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(capture(model, x[:2]).module(x), model(x), rtol=1e-4, atol=1e-5)


class ByHand(nn.Module):
    """`nn.Linear` spelled as a product; the columns differ by 1000 times, so that one scale for all of them is a coarse one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(32, 16, generator=generator) * torch.logspace(-2.5, 0.5, 16))
        self.c = nn.Parameter(torch.randn(16, generator=generator))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.w + self.c)


class ByModule(nn.Module):
    def __init__(self, other: ByHand) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(32, 16), other.head
        self.fc.weight, self.fc.bias = nn.Parameter(other.w.detach().T.clone()), nn.Parameter(other.c.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x))


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime", "snpe", "ncnn"])
def test_a_layer_by_hand_is_quantized_as_the_module_with_its_numbers(backend: str) -> None:
    by_hand = ByHand().eval()
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    made = []
    for model in (by_hand, ByModule(by_hand).eval()):
        one = qdeploy.prepare(model, x, backend, recipe="plain")
        qdeploy.calibrate(one, [x])
        made.append((one, [(planned.role, planned.op, planned.spec) for planned in one.plan.tensors]))
    (hand, plan), (module, wanted) = made
    assert sorted(plan, key=str) == sorted(wanted, key=str)
    assert torch.equal(hand(x), module(x))
