"""The observers of the literature: each against its formula, written out slowly, or against its known numbers."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from qdeploy.calibration import pot_mode
from qdeploy.calibration.aciq import laplace_ratio, normal_ratio
from torch import Tensor

from qdeploy.core.errors import OptionError
from qdeploy.core.spec import QuantSpec
from qdeploy.numerics.arith import choose_scale, fake_quantize
from qdeploy.numerics.observer import make_observer

BATCHES = 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observed(name: str, words: str, batches: list[Tensor], **options: object) -> tuple[Tensor, Tensor]:
    seen = make_observer(name, QuantSpec.parse(words), options)
    for batch in batches:
        seen.update(batch, *torch.aminmax(batch, dim=1))
    return seen.range()


def quantiles(count: int = 200_000) -> Tensor:
    return (torch.arange(count, dtype=torch.float64).unsqueeze(0) + 0.5) / count


def squared_error(x: Tensor, scale: float, zero_point: int, words: str) -> float:
    of = QuantSpec.parse(words)
    return float((fake_quantize(x, torch.tensor([scale]), torch.tensor([zero_point]), of) - x).double().square().sum())


DATA = {
    "both signs": lambda x: x,
    "positive": lambda x: x.relu(),
    "negative": lambda x: -x.abs(),
    "few negative": lambda x: torch.nn.functional.gelu(x),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("words", ["int2", "int4", "narrow int4", "uint2", "uint4", "int4 asymmetric", "int8", "int4 power-of-two"])
def test_lsq_is_the_formula_over_everything_seen(data: str, words: str) -> None:
    of = QuantSpec.parse(words)
    batches = [DATA[data](normal(1, 300 * (seed + 1), seed=seed) * (seed + 1)) for seed in range(BATCHES)]
    x = torch.cat(batches, 1).double().numpy()
    codes = of.qmax if of.symmetric else of.qmax - of.qmin
    if not of.symmetric and data in ("both signs", "few negative"):
        codes /= 2
    end = 2 * np.abs(x).mean() / math.sqrt(codes) * codes
    wanted = max(x.min(), -end), min(x.max(), end)
    found = [v.item() for v in observed("lsq", words, batches)]
    assert found == pytest.approx([np.clip(v, x.min(), x.max()) for v in wanted], rel=1e-9)


def test_lsq_starts_inside_the_data_at_few_bits_only() -> None:
    x = normal(1, 10_000)
    ends = [observed("lsq", f"int{bits}", [x])[1].item() for bits in (2, 3, 4, 8)]
    assert ends == pytest.approx([1.6, 2.76, float(x.max()), float(x.max())], rel=0.02)


@pytest.mark.parametrize("shift", [0.0, 3.0, 1e4])
@pytest.mark.parametrize("k", [0.5, 2.6, 4])
def test_clipstd_is_the_formula_over_everything_seen(shift: float, k: float) -> None:
    batches = [normal(2, 200 * (seed + 1), seed=seed) * (seed + 1) + shift for seed in range(BATCHES)]
    x = torch.cat(batches, 1).double().numpy()
    mean, sigma = x.mean(1), x.std(1)
    low, high = observed("clipstd", "int8 per-channel", batches, k=k)
    assert low.tolist() == pytest.approx(np.maximum(x.min(1), mean - k * sigma).tolist(), rel=1e-11)
    assert high.tolist() == pytest.approx(np.minimum(x.max(1), mean + k * sigma).tolist(), rel=1e-11)


def test_clipstd_takes_large_batches_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(3, 5000) + 2
    whole = observed("clipstd", "int8 per-channel", [x])
    monkeypatch.setattr("qdeploy.calibration.clipstd.PART", 100)
    torch.testing.assert_close(observed("clipstd", "int8 per-channel", [x]), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("make", "known"), [(laplace_ratio, (2.831, 3.897, 5.029, 6.205, 7.413, 8.646, 9.897)),
                                             (normal_ratio, (1.711, 2.152, 2.559, 2.936, 3.287, 3.615, 3.924))])  # fmt: skip
def test_aciq_has_the_known_thresholds(make: object, known: tuple[float, ...]) -> None:
    assert callable(make)
    assert [make(bits) for bits in range(2, 9)] == pytest.approx(known, abs=6e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_aciq_tells_laplace_from_normal(bits: int, mean: float) -> None:
    share = quantiles()
    shapes = {
        laplace_ratio: -torch.sign(share - 0.5) * torch.log1p(-2 * (share - 0.5).abs()),
        normal_ratio: torch.special.ndtri(share),
    }
    for ratio, x in shapes.items():
        low, high = (v.item() for v in observed("aciq", f"int{bits} asymmetric", [(x + mean).float()]))
        assert high == pytest.approx(min(mean + ratio(bits), float(x.max()) + mean), rel=0.01)
        assert low == pytest.approx(max(mean - ratio(bits), float(x.min()) + mean), rel=0.01)


@pytest.mark.parametrize("words", ["uint4", "int4"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("zeros", [0, 1_000_000])
def test_aciq_takes_one_sign_as_half_a_density_without_the_zeros(words: str, sign: int, zeros: int) -> None:
    share, bits = quantiles(), 5 if words.startswith("u") else 4
    for ratio, x in ((laplace_ratio, -torch.log1p(-share)), (normal_ratio, torch.special.ndtri(0.5 + share / 2))):
        found = observed("aciq", words, [sign * x.float(), torch.zeros(1, zeros + 1)])
        assert max(abs(v.item()) for v in found) == pytest.approx(ratio(bits), rel=0.02)
        assert min(abs(v.item()) for v in found) == 0


POWERS = ["int8", "int4", "narrow int4", "uint4", "int4 asymmetric", "uint8"]


def searched(x: Tensor, words: str) -> tuple[float, int, list[float]]:
    """The least scale that covers `x`, its zero_point, and the squared errors of it and its halvings, on the values themselves."""
    scale, zero_point = (v.item() for v in choose_scale(x.min().view(1), x.max().view(1), QuantSpec.parse(words)))
    return scale, zero_point, [squared_error(x, scale / 2**finer, zero_point, words) for finer in range(5)]


@pytest.mark.parametrize("words", [f"{words} power-of-two" for words in POWERS])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("factor", [1.0, 1.4, 1e-4])
def test_pot_floor_is_the_least_of_five_scales_over_everything_seen(words: str, data: str, factor: float) -> None:
    of = QuantSpec.parse(words)
    for heavy in (False, True):
        batches = [DATA[data](normal(1, 3000, seed=seed) * (normal(1, 3000, seed=9) if heavy else 1)) * factor for seed in range(3)]
        widest, zero_point, losses = searched(torch.cat(batches, 1), words)
        low, high = observed("pot_floor", words, batches)
        scale, zero = choose_scale(low, high, of)
        halvings = int(math.log2(widest / scale.item()))
        assert zero.item() == zero_point
        assert losses[halvings] <= 1.01 * min(losses)
        assert [low.item(), high.item()] == [(q - zero_point) * scale.item() for q in (of.qmin, of.qmax)]


def test_pot_floor_never_looks_beyond_four_halvings() -> None:
    x = torch.cat((normal(1, 30_000), torch.tensor([[60.0]])), 1)
    assert [observed(name, "int2 power-of-two", [x])[1].item() for name in ("pot_floor", "mse")] == [64 / 2**4, 64 / 2**5]


@pytest.mark.parametrize("words", [f"{words} power-of-two" for words in POWERS])
@pytest.mark.parametrize("data", DATA)
def test_pot_mode_is_the_vote_of_the_batches(words: str, data: str) -> None:
    of, votes = QuantSpec.parse(words), Counter[float]()
    batches = [DATA[data](normal(1, 2000, seed=seed)) * size for seed, size in enumerate((1, 1.1, 5, 0.9, 0.2, 1.05, 6, 1.02))]
    close = False
    for batch in batches:
        widest, _, losses = searched(batch, words)
        ordered = sorted(losses)
        close |= ordered[1] < 1.05 * ordered[0]
        votes[widest / 2 ** losses.index(min(losses))] += 1
    low, high = observed("pot_mode", words, batches)
    scale, zero_point = choose_scale(low, high, of)
    most = max(votes.values())
    if not close:
        assert scale.item() == max(scale for scale, count in votes.items() if count == most)
    assert zero_point == searched(torch.cat(batches, 1), words)[1]
    assert [low.item(), high.item()] == [(q - zero_point.item()) * scale.item() for q in (of.qmin, of.qmax)]


def test_pot_mode_forgives_rare_batches_and_pot_floor_does_not_forget_them() -> None:
    usual = [normal(1, 1000, seed=seed).clamp(-3.9, 3.9) for seed in range(9)]
    batches = [*usual[:5], 100 * usual[0], *usual[5:]]
    mode, floor = (observed(name, "int8 power-of-two", batches)[1].item() for name in ("pot_mode", "pot_floor"))
    assert mode == 127 / 32
    assert floor > 300


@pytest.mark.parametrize("channels", [1, 3, 5, 40])
def test_pot_mode_keeps_few_histograms_of_many_batches(channels: int) -> None:
    seen = make_observer("pot_mode", QuantSpec.parse("int8 power-of-two per-channel"), {})
    assert isinstance(seen, pot_mode.PowerMode)
    count = 0
    for seed in range(150):
        batch = normal(channels, 60, seed=seed).clamp(-3.9, 3.9)
        seen.update(batch, *torch.aminmax(batch, dim=1))
        count += batch.numel()
        assert len(seen._votes) <= max(pot_mode.FEWEST, pot_mode.BATCHES // channels)
    assert sum(int(one.counts.sum()) for one in seen._votes) == count
    assert set((seen.range()[1] * 32 / 127).tolist()) <= {1.0, 0.5}


@pytest.mark.parametrize("name", ["pot_floor", "pot_mode"])
@pytest.mark.parametrize(("words", "instead"), [("int8", "mse"), ("uint8", "mse"), ("log8", "minmax"), ("float16", "minmax")])
def test_votes_for_powers_need_powers(name: str, words: str, instead: str) -> None:
    with pytest.raises(OptionError, match=f"'{name}'.*power of two.*{words}.*allowed: power-of-two.*use {instead}"):
        make_observer(name, QuantSpec.parse(words), {})


@pytest.mark.parametrize("name", ["pot_floor", "pot_mode"])
def test_zeros_alone_have_no_range(name: str) -> None:
    rows = torch.cat((torch.zeros(1, 50), normal(1, 50)))
    low, high = observed(name, "int8 power-of-two per-channel", [rows, torch.zeros(2, 50)])
    assert low[0] == high[0] == 0
    assert low[1] < 0 < high[1]
