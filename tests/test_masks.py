"""Numbers that hide: bounded where nothing but a softmax and its like read them, left as the model means them everywhere else."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import networks
import pytest
import torch
from torch import Tensor, nn

import qdeploy
from qdeploy.capture.capture import capture
from qdeploy.core.errors import InputError
from qdeploy.graph import query
from qdeploy.numerics.observer import MARGIN, MASK, WIDE, Mask, unmasked

Hide = Callable[[Tensor, Tensor], Tensor]
HIDES: dict[str, Hide] = {
    "where of a tensor": lambda scores, seen: torch.where(seen > 0, scores, torch.tensor(-10000.0)),
    "where of a number": lambda scores, seen: torch.where(seen > 0, scores, -1e4),
    "fill with -inf": lambda scores, seen: scores.masked_fill(seen == 0, -math.inf),
    "fill with -100": lambda scores, seen: scores.masked_fill(seen == 0, -100.0),
    "least of float16": lambda scores, seen: torch.where(seen > 0, scores, torch.tensor(-65504.0)),
    "add -1e4": lambda scores, seen: scores + (1 - seen) * -1e4,
    "add -100": lambda scores, seen: scores + (1 - seen) * -100.0,
    "add the least of float32": lambda scores, seen: scores + (1.0 - seen) * torch.finfo(torch.float32).min,
    "add a cast": lambda scores, seen: scores + (seen == 0).float() * -1e9,
    "subtract 1e9": lambda scores, seen: scores - (1 - seen) * 1e9,
    "add seen less one": lambda scores, seen: scores + (seen - 1) * 1e4,
    "half of it": lambda scores, seen: scores.masked_fill(seen == 0, -math.inf) * 0.5,
}


class Masked(nn.Module):
    """Attention without heads, whose scores are masked by `hide`."""

    def __init__(self, hide: Hide) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out, self.hide = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8), hide

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 32**0.5
        return self.out(self.hide(scores, seen[:, None]).softmax(-1) @ self.v(x))


@cache
def sentences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 13, (16,), generator=generator)
    return torch.randn(16, 12, 32, generator=generator) * 2, (torch.arange(12)[None] < lengths[:, None]).float()


def decibels(wanted: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()))


@cache
def without_a_mask(backend: str) -> float:
    return quality(Masked(lambda scores, seen: scores), backend)


def quality(model: nn.Module, backend: str) -> float:
    one = qdeploy.prepare(model.eval(), sentences(), backend, recipe="plain")
    qdeploy.calibrate(one, [sentences()])
    made = one(*sentences())
    assert isinstance(made, Tensor)
    with torch.no_grad():
        return decibels(model(*sentences()), made)


@pytest.mark.parametrize("name", HIDES)
def test_a_mask_costs_next_to_nothing_whichever_way_it_is_written(name: str) -> None:
    assert quality(Masked(HIDES[name]), "snpe") > without_a_mask("snpe") - 2


def test_a_temperature_is_no_mask() -> None:
    module = capture(Masked(lambda scores, seen: scores * -100.0).eval(), sentences()).module
    assert not any("masked" in node.meta for node in module.graph.nodes)


class Infinite(nn.Module):
    """A linear layer of which some numbers are replaced, and what `read` makes of them."""

    def __init__(self, number: float, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head, self.number, self.read = nn.Linear(16, 16), nn.Linear(16, 3), number, read

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.fc(x).masked_fill(x > 1, self.number)))


MEANT: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "nan_to_num": (-math.inf, partial(torch.nan_to_num, neginf=-5.0)),
    "compared": (-math.inf, lambda x: torch.where(x == -math.inf, 1.0, x)),
    "scaled before tanh": (-math.inf, lambda x: torch.tanh(x * 1e-5)),
    "bounded above": (math.inf, lambda x: x.clamp(max=3.0)),
    "the greatest, asked for": (-math.inf, lambda x: torch.nan_to_num(x.amax(1), neginf=-5.0)),
}
ALIKE: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "relu": (-math.inf, torch.relu),
    "sigmoid": (-math.inf, torch.sigmoid),
    "exp": (-math.inf, torch.exp),
    "the greatest": (-math.inf, lambda x: x.amax(1)),
    "the least": (math.inf, lambda x: x.amin(1)),
}


@cache
def features() -> Tensor:
    return torch.randn(16, 10, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MEANT)
def test_a_number_that_the_model_means_stays_and_has_no_code(name: str) -> None:
    model = Infinite(*MEANT[name]).eval()
    with torch.no_grad():
        wanted = model(features())
        assert torch.allclose(capture(model, features()).module(features()), wanted, atol=1e-5)
    one = qdeploy.prepare(model, features(), "tensorrt", recipe="plain")
    qdeploy.calibrate(one, [features()])
    (made,) = networks.flat(one(features()))
    assert decibels(wanted, made) > 30
    (planned,) = [planned for planned in one.plan.tensors if planned.op == "masked_fill"]
    assert planned.spec is None and "no code" in planned.reason
    with pytest.raises(InputError, match=r"tensor 'masked_fill' holds -?inf, for which backend 'snpe' has no code"):
        qdeploy.prepare(model, features(), "snpe", recipe="plain")


@pytest.mark.parametrize("name", ALIKE)
def test_a_number_that_makes_no_difference_is_bounded(name: str) -> None:
    model = Infinite(*ALIKE[name]).eval()
    module = capture(model, features()).module
    (fill,) = [node for node in module.graph.nodes if node.op == "call_function" and query.op_of(node).name == "masked_fill"]
    assert abs(fill.args[2]) == -MASK
    with torch.no_grad():
        wanted = model(features())
        assert torch.allclose(module(features()), wanted, atol=1e-5)
    one = qdeploy.prepare(model, features(), "snpe", recipe="plain")
    qdeploy.calibrate(one, [features()])
    (made,) = networks.flat(one(features()))
    assert decibels(wanted, made) > 29


def test_masked_places_are_told_by_their_level_or_by_a_gap() -> None:
    rows = torch.tensor([[0.5, -100.0, -2.0, -97.0]])
    assert unmasked(rows, Mask(-100.0)).tolist() == [[0.5, -2 - MARGIN, -2.0, -2 - MARGIN]]
    assert unmasked(-rows, Mask(100.0)).tolist() == [[-0.5, 2 + MARGIN, 2.0, 2 + MARGIN]]
    no_gap = torch.tensor([[0.5, -60.0, -49.0]])
    assert torch.equal(unmasked(no_gap, Mask(-100.0)), no_gap)
    assert torch.equal(unmasked(rows[:, 1::2], Mask(-100.0)), rows[:, 1::2])
    term = torch.tensor([[0.0, MASK]])
    assert unmasked(term).tolist() == [[0.0, -WIDE]] and unmasked(term, alone=False).tolist() == [[0.0, -MARGIN]]
