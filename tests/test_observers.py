"""Observers: ranges against tables, numpy and brute force; the histogram against its three promises."""

from __future__ import annotations

import doctest
import importlib
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import brentq
from scipy.special import erf

from qdeploy.core.errors import OptionError
from qdeploy.core.spec import QuantSpec
from qdeploy.numerics.arith import choose_scale, fake_quantize
from qdeploy.numerics.histogram import BINS, LIMIT, RUN, Histogram
from qdeploy.numerics.observer import Observer, make_observer, observers

NAMES = observers.names()
POWERS_ONLY = ("pot_floor", "pot_mode")
"""Observers that choose a power of two, and refuse other scales; see test_more_observers.py."""
FREE = [name for name in NAMES if name not in POWERS_ONLY]
SYMMETRIC = QuantSpec(signed=True, symmetric=True, narrow=True)
ASYMMETRIC = QuantSpec(signed=False, symmetric=False)


def spec(symmetric: bool, bits: int, axis: int | None = None) -> QuantSpec:
    return QuantSpec(signed=symmetric, narrow=symmetric, symmetric=symmetric, bits=bits, axis=axis)


def feed(seen: Observer | Histogram, rows: torch.Tensor, batch: int = LIMIT) -> None:
    for part in rows.split(batch, dim=1):
        seen.update(part, *torch.aminmax(part, dim=1))


def observed(name: str, of: QuantSpec, rows: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    seen = make_observer(name, of, options)
    feed(seen, rows.reshape(-1, rows.shape[-1]))
    return seen.range()


def squared_error(rows: torch.Tensor, of: QuantSpec, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    scale, zero_point = choose_scale(low, high, of)
    return (fake_quantize(rows, scale, zero_point, of) - rows).double().square().mean(1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def samples() -> dict[str, torch.Tensor]:
    """A million evenly spread quantiles: without the luck of the draw, which is 0.1 dB at 8 bits."""
    share = (torch.arange(1_000_000, dtype=torch.float64).unsqueeze(0) + 0.5) / 1_000_000
    exponential, sign = -torch.log1p(-share * (1 - math.exp(-12))), torch.arange(1_000_000) % 2 * 2 - 1
    values = {
        "normal": torch.special.ndtri(share),
        "normal+": torch.special.ndtri(share / 2 + 0.5),
        "laplace": exponential * sign,
        "laplace+": exponential,
    }
    return {name: v.float() for name, v in values.items()}


@pytest.mark.parametrize("name", NAMES)
def test_doctest(name: str) -> None:
    result = doctest.testmod(importlib.import_module(observers[name].__module__))
    assert result.failed == 0
    assert result.attempted > 0


# Least squares and least 2.4-th power thresholds and their SQNR in dB, by numerical integration of the densities: Gaussian in
# standard deviations (Max 1960 and later), Laplace in its scale b and ending at 12 b, which matters from 6 bits on.
THRESHOLDS = {
    ("normal", 2.0): {2: (1.22, 7.21), 3: (1.95, 13.29), 4: (2.47, 18.90), 6: (3.27, 29.71), 8: (3.92, 40.54)},
    ("normal", 2.4): {2: (1.29, 7.18), 3: (2.07, 13.22), 4: (2.63, 18.79), 6: (3.49, 29.53), 8: (4.21, 40.27)},
    ("normal+", 2.0): {2: (1.95, 13.29), 3: (2.47, 18.90), 4: (2.90, 24.33), 6: (3.61, 35.11), 8: (4.21, 46.02)},
    ("normal+", 2.4): {2: (2.07, 13.22), 3: (2.63, 18.79), 4: (3.09, 24.18), 6: (3.86, 34.89), 8: (4.53, 45.72)},
    ("laplace", 2.0): {2: (2.00, 5.78), 3: (3.48, 10.82), 4: (4.81, 15.65), 6: (7.31, 25.41), 8: (9.56, 35.73)},
    ("laplace", 2.4): {2: (2.24, 5.70), 3: (3.91, 10.66), 4: (5.42, 15.42), 6: (8.22, 25.06), 8: (10.41, 35.43)},
    ("laplace+", 2.0): {2: (3.48, 10.82), 3: (4.81, 15.65), 4: (6.08, 20.49), 6: (8.49, 30.47), 8: (10.45, 41.20)},
    ("laplace+", 2.4): {2: (3.91, 10.66), 3: (5.42, 15.42), 4: (6.86, 20.18), 6: (9.44, 30.12), 8: (11.09, 40.98)},
}


@pytest.mark.parametrize(("data", "p"), THRESHOLDS)
def test_mse_finds_the_known_thresholds(data: str, p: float, samples: dict[str, torch.Tensor]) -> None:
    rows = samples[data]
    for bits, (threshold, sqnr) in THRESHOLDS[data, p].items():
        of = spec(not data.endswith("+"), bits)
        low, high = observed("mse", of, rows, p=p)
        assert high.item() == pytest.approx(threshold, rel=0.03), (bits, high)
        found = 10 * torch.log10(rows.double().square().mean() / squared_error(rows, of, low, high))
        assert found.item() == pytest.approx(sqnr, abs=0.1), bits


@pytest.mark.parametrize("bits", [6, 8])
def test_mse_on_the_whole_exponential(bits: int) -> None:
    """Steps are fine there: the error is (c / codes)^2 / 12 + 2 exp(-c), and its derivative is zero at the best c."""
    rows = -torch.log1p(-(torch.arange(1_000_000, dtype=torch.float64).unsqueeze(0) + 0.5) / 1_000_000).float()
    codes = 2**bits - 1
    threshold = brentq(lambda c: c / (6 * codes**2) - 2 * math.exp(-c), 1, 20)
    assert observed("mse", spec(False, bits), rows)[1].item() == pytest.approx(threshold, rel=0.03)


SHAPES = {
    "normal": lambda: normal(1, 20_000),
    "heavy": lambda: normal(1, 20_000) / normal(1, 20_000, seed=1).abs().clamp(min=1e-3),
    "uniform": lambda: normal(1, 20_000).sin().asin(),
    "relu": lambda: normal(1, 20_000).relu(),
    "gelu": lambda: torch.nn.functional.gelu(3 * normal(1, 20_000)),
    "negative": lambda: -normal(1, 20_000).exp(),
    "shifted": lambda: normal(1, 20_000) + 3,
    "far": lambda: normal(1, 20_000) + 100,
    "two values": lambda: (normal(1, 20_000) > 0).float() * 2 - 0.5,
    "outlier": lambda: torch.cat((normal(1, 20_000), torch.tensor([[300.0]])), 1),
}


@pytest.mark.parametrize("p", [2.0, 2.4])
@pytest.mark.parametrize("of", [SYMMETRIC, ASYMMETRIC], ids=QuantSpec.describe)
@pytest.mark.parametrize("shape", SHAPES)
def test_mse_is_never_worse_than_minmax(shape: str, of: QuantSpec, p: float) -> None:
    rows = SHAPES[shape]()
    best, plain = (squared_error(rows, of, *observed(n, of, rows, **o)) for n, o in (("mse", {"p": p}), ("minmax", {})))
    assert best <= plain * (1 + 1e-6 if p == 2 else 1.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_is_the_least_of_all_ranges(shape: str, bits: int) -> None:
    """Against every pair of 40 x 40 shrink factors, measured on the data itself."""
    of, rows = spec(False, bits), SHAPES[shape]()[:, -2000:]
    low, high = rows.amin().clamp(max=0), rows.amax().clamp(min=0)
    factors = torch.linspace(0.025, 1, 40)
    pairs = torch.cartesian_prod(low * factors, high * factors)
    scale, zero_point = choose_scale(pairs[:, 0], pairs[:, 1], of)
    per_channel = spec(False, bits, axis=0)
    loss = (fake_quantize(rows.expand(len(pairs), -1), scale, zero_point, per_channel) - rows).double().square().mean(1)
    found = squared_error(rows, of, *observed("mse", of, rows))
    assert found <= loss.min() * 1.01 + 1e-6 * float(rows.abs().max()) ** 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_says_the_grid_it_means(shape: str, bits: int) -> None:
    """The scale and zero_point that follow from its range are those that it compared: the errors agree with those of p = 2."""
    from qdeploy.calibration import mse

    for symmetric in (True, False):
        seen = make_observer("mse", spec(symmetric, bits), {})
        feed(seen, SHAPES[shape]())
        assert isinstance(seen, mse.MeanSquare)
        h = seen.histogram
        counts = (h.negative() + h.positive() if symmetric else h.counts).double()
        low, high = (v / h.width for v in (h.low.clamp(max=0), h.high.clamp(min=0)))
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        levels = seen.spec.qmax if symmetric else seen.spec.qmax - seen.spec.qmin
        size = high if symmetric else high - low
        scales = size.unsqueeze(1) * torch.linspace(0.02, 0.99, 30, dtype=torch.float64) / levels
        loss, lows, highs = mse._candidates(counts, (low, high), seen.spec)(scales)
        finite = loss[0].isfinite()
        again = mse._power_loss(counts, lows[:, finite], highs[:, finite], seen.spec, 2.0)
        torch.testing.assert_close(loss[:, finite], again, rtol=1e-5, atol=1e-7 * float(counts.sum()))


# SQNR in dB of full-range codes and the best of the scales 2^-k, as a mean over an octave of data sizes, by integration of the
# densities, Laplace up to 13.8 b. A free scale has 40.57, 19.26, 35.38 and 15.98, and the power of two that covers all 35.93, 10.94,
# 30.21 and 5.88.
POWERS = {("normal", 8): 38.94, ("normal", 4): 18.29, ("laplace", 8): 34.14, ("laplace", 4): 15.35}
PHASES = 16


@pytest.mark.parametrize(("data", "bits"), POWERS)
def test_mse_finds_the_known_powers_of_two(data: str, bits: int, samples: dict[str, torch.Tensor]) -> None:
    of, found, rows = QuantSpec.parse(f"int{bits} power-of-two"), 0.0, samples["normal"]
    if data == "laplace":
        share = (torch.arange(1_000_000, dtype=torch.float64).unsqueeze(0) + 0.5) / 1_000_000
        rows = (-torch.log1p(-share * (1 - math.exp(-13.8))) * (torch.arange(1_000_000) % 2 * 2 - 1)).float()
    for phase in range(PHASES):
        x = rows * 2 ** (phase / PHASES)
        error = squared_error(x, of, *observed("mse", of, x))
        found += float(10 * torch.log10(x.double().square().mean() / error)) / PHASES
    assert found == pytest.approx(POWERS[data, bits], abs=0.1)


GRIDS = [f"{kind}int{bits}" for kind in ("", "u", "narrow ", "asymmetric ") for bits in (2, 4, 8)]


@pytest.mark.parametrize("factor", [1.0, 1.37, pytest.param(1e-3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("words", GRIDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_mse_on_powers_of_two_is_the_least_of_all(shape: str, words: str, factor: float) -> None:
    """Against every zero_point with the covering scale and its halvings, measured on the data itself, and against min-max."""
    of, rows = QuantSpec.parse(f"{words} power-of-two"), SHAPES[shape]()[:, -3000:] * factor
    low, high = rows.amin().clamp(max=0), rows.amax().clamp(min=0)
    covering = choose_scale(low.reshape(1), high.reshape(1), of)[0]
    zeros = torch.zeros(1, dtype=torch.int64) if of.symmetric else torch.arange(of.qmin, of.qmax + 1)
    per_channel = QuantSpec.parse(f"{words} power-of-two per-channel")
    losses = []
    for halvings in range(6):
        scale = (covering * 0.5**halvings).expand(len(zeros))
        losses.append((fake_quantize(rows.expand(len(zeros), -1), scale, zeros, per_channel) - rows).double().square().mean(1))
    ranges = observed("mse", of, rows)
    scale, zero_point = choose_scale(*ranges, of)
    assert math.log2(covering.item() / scale.item()) in range(6)
    assert [v.item() for v in ranges] == [(q - zero_point.item()) * scale.item() for q in (of.qmin, of.qmax)]
    found = squared_error(rows, of, *ranges)
    slack = 1e-6 * float(rows.abs().max()) ** 2
    assert found <= torch.stack(losses).min() * 1.01 + slack
    assert found <= squared_error(rows, of, *observed("minmax", of, rows)) * 1.001 + slack


@pytest.mark.parametrize("p", [1.0, 2.4, 4.0])
@pytest.mark.parametrize("words", ["int8", "int4", "uint4"])
def test_mse_on_powers_of_two_heeds_p(words: str, p: float) -> None:
    """Around a size where two scales are about equally good for p = 2, a larger p takes the larger one first."""
    of = QuantSpec.parse(f"{words} power-of-two")
    for factor in np.linspace(1, 2, 20):
        rows = normal(1, 30_000) * float(factor)
        low, high = observed("mse", of, rows, p=p)
        scale, zero_point = choose_scale(low, high, of)
        losses = [(fake_quantize(rows, scale * ratio, zero_point, of) - rows).abs().double().pow(p).mean() for ratio in (0.5, 1, 2)]
        assert losses[1] <= min(losses) * 1.01


@pytest.mark.parametrize("words", ["int16", "uint16", "int12 asymmetric"])
def test_mse_on_powers_of_two_of_many_bits(words: str) -> None:
    of = QuantSpec.parse(f"{words} power-of-two")
    for shape in ("normal", "relu", "far"):
        rows = SHAPES[shape]()
        found, plain = (squared_error(rows, of, *observed(name, of, rows)) for name in ("mse", "minmax"))
        assert found <= plain * 1.01


def test_mse_uses_the_code_beyond_the_positive_end() -> None:
    """-1 fits in full-range codes of 2^-7, and in narrow codes only of 2^-6."""
    rows = torch.linspace(-1, 0.99, 4096).unsqueeze(0)
    assert [v.item() for v in observed("mse", QuantSpec.parse("int8 power-of-two"), rows)] == [-1, 127 / 128]
    assert [v.item() for v in observed("mse", QuantSpec.parse("narrow int8 power-of-two"), rows)] == [-127 / 128, 127 / 128]
    nothing = torch.zeros(1, 5)
    assert [v.item() for v in observed("mse", QuantSpec.parse("int8 power-of-two"), nothing)] == [0, 0]


@pytest.mark.parametrize("words", ["int8 power-of-two", "uint8 power-of-two", "int16 power-of-two"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "kl"])
def test_powers_of_two_of_channels_are_those_of_each(name: str, words: str) -> None:
    rows = torch.cat([make()[:, :4000] for make in SHAPES.values()] + [torch.zeros(1, 4000)])
    rows = rows * torch.logspace(-3, 3, len(rows)).unsqueeze(1)
    together = observed(name, QuantSpec.parse(f"{words} per-channel"), rows)
    for c, row in enumerate(rows):
        alone = observed(name, QuantSpec.parse(words), row.unsqueeze(0))
        torch.testing.assert_close([v[c : c + 1] for v in together], list(alone), rtol=1e-12, atol=0)


UNEVEN = ("log8", "float16", "float16-normal")
REFUSED = {
    **dict.fromkeys(("aciq", "clipstd", "kl", "lsq", "mse"), UNEVEN),
    **dict.fromkeys(POWERS_ONLY, (*UNEVEN, "uint8", "narrow int8")),
    "percentile": ("float16", "float16-normal"),
}


@pytest.mark.parametrize("words", ["int8 power-of-two", "uint8", "int8 asymmetric power-of-two", "log8", "float16", "narrow int8"])
@pytest.mark.parametrize("name", NAMES)
def test_one_pass_serves_every_spec(name: str, words: str) -> None:
    """What is gathered does not depend on the spec, and what a spec refuses it refuses late as well."""
    of, rows = QuantSpec.parse(words), SHAPES["heavy"]()
    seen = make_observer(name, QuantSpec.parse("int8 power-of-two"), {})
    feed(seen, rows)
    if words in REFUSED.get(name, ()):
        with pytest.raises(OptionError, match="use minmax" if words in UNEVEN else "use mse"):
            seen.seen_as(of).range()
    else:
        assert seen.seen_as(of).range() == observed(name, of, rows)


@pytest.mark.parametrize("words", ["log8", "float16", "float16-normal"])
@pytest.mark.parametrize("name", NAMES)
def test_grids_without_even_steps_are_for_minmax(name: str, words: str) -> None:
    of = QuantSpec.parse(words)
    if words in REFUSED.get(name, ()):
        with pytest.raises(OptionError, match=f"'{name}'.*{words}.*use minmax"):
            make_observer(name, of, {})
    else:
        assert observed(name, of, torch.tensor([[-1.0, 2.0] * 20])) == (-1, 2)


def brute_force_kl(counts: np.ndarray, levels: int) -> list[float]:
    """KL(P || Q) for i = levels..bins, straight from the definition; inf where Q is 0 and P is not."""
    counts = counts.astype(float)
    counts[0], losses = counts[1], []
    for kept in range(levels, len(counts) + 1):
        p = counts[:kept].copy()
        p[-1] += counts[kept:].sum()
        group, filled = np.arange(kept) * levels // kept, counts[:kept] > 0
        mass, width = np.bincount(group, counts[:kept], levels), np.bincount(group, filled, levels)
        q = np.where(filled, (mass / np.maximum(width, 1))[group], 0)
        some = p > 0
        bad = (q[some] == 0).any() or not q.any()
        losses.append(np.inf if bad else float((p[some] / p.sum() * np.log(p[some] / p.sum() / q[some] * q.sum())).sum()))
    return losses


@given(seed=st.integers(0, 10**6), bins=st.integers(17, 90), levels=st.sampled_from([8, 16]), sparse=st.floats(0, 0.9))
@settings(max_examples=60, deadline=None)
def test_kl_is_the_definition(seed: int, bins: int, levels: int, sparse: float) -> None:
    from qdeploy.calibration.kl import _kept_bins

    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 100, bins) * (rng.random(bins) >= sparse)
    losses = brute_force_kl(counts, levels)
    kept = _kept_bins(torch.tensor(counts, dtype=torch.float64), levels)
    if np.isfinite(losses).any():
        assert losses[kept - levels] == pytest.approx(min(losses), abs=1e-9)
    else:
        assert kept == bins


@pytest.mark.parametrize("zeros", [0, 1e6])
def test_kl_finds_the_known_thresholds(zeros: float) -> None:
    """Rounded expected counts of 1e6 samples in 2048 bins up to 5 (normal) and 13.8 (Laplace)."""
    from qdeploy.calibration.kl import _kept_bins

    for distribution, top, bins, threshold in (
        (lambda x: erf(x / np.sqrt(2)), 5, 1666, 4.07),
        (lambda x: -np.exp(-x), 13.8, 1408, 9.48),
    ):
        counts = torch.from_numpy(np.round(1e6 * np.diff(distribution(np.linspace(0, top, 2049)))))
        counts[0] += zeros
        assert _kept_bins(counts, 128) == bins
        assert (bins + 0.5) * top / 2048 == pytest.approx(threshold, rel=0.02)


def test_kl_is_blind_to_zeros_and_signs(samples: dict[str, torch.Tensor]) -> None:
    rows = samples["normal+"]
    high = observed("kl", SYMMETRIC, rows)[1]
    assert 4.1 < high < 5
    assert observed("kl", SYMMETRIC, torch.cat((rows, torch.zeros_like(rows)), 1))[1] == high
    assert observed("kl", SYMMETRIC, samples["normal"].clamp(-4.9, 4.9))[1] > 4.1
    low, high = observed("kl", ASYMMETRIC, torch.cat((samples["normal"].clamp(min=-1), torch.tensor([[60.0]])), 1))
    assert low == -1
    assert 2 < high < 30


@pytest.mark.parametrize("bits", [2, 4, 6, 7, 16])
def test_kl_is_for_8_bits(bits: int) -> None:
    with pytest.raises(OptionError, match="mse"):
        make_observer("kl", spec(True, bits), {})


@pytest.mark.parametrize("percentile", [51, 90, 99, 99.9, 99.99, 99.999, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_percentile_is_the_quantile(shape: str, percentile: float) -> None:
    rows = SHAPES[shape]()
    low, high = rows.double().aminmax()
    two_sided = bool(low < 0 < high)
    data = rows.double().numpy().ravel()
    ordered = np.sort(data)

    def assert_close(value: torch.Tensor, quantile: float) -> None:
        """Within a bin of the neighbours of the quantile's place."""
        place = quantile * (data.size - 1)
        first, last = ordered[max(0, int(place) - 1)], ordered[min(data.size - 1, int(place) + 2)]
        width = 2 * max(abs(low), abs(high)).item() / BINS
        assert first - width <= value.item() <= last + width
        if last - first < width:
            assert value.item() == pytest.approx(np.quantile(data, quantile), abs=2 * width)

    tail = (1 - percentile / 100) / (2 if two_sided else 1)
    found = observed("percentile", ASYMMETRIC, rows, percentile=percentile)
    assert_close(found[0], tail if low < 0 else 0)
    assert_close(found[1], 1 - tail if high > 0 else 1)
    data, ordered = np.abs(data), np.sort(np.abs(data))
    magnitude = torch.maximum(*(v.abs() for v in observed("percentile", SYMMETRIC, rows, percentile=percentile)))
    if two_sided or percentile > 99:
        assert_close(magnitude, percentile / 100)


def test_ema_is_the_formula() -> None:
    batches = [normal(1, 50, seed=s) * (s + 1) for s in range(5)]
    seen = make_observer("ema", ASYMMETRIC, {"momentum": 0.7})
    low, high = (float(f(batches[0])) for f in (torch.amin, torch.amax))
    for i, batch in enumerate(batches):
        feed(seen, batch)
        if i:
            low, high = (0.7 * m + 0.3 * float(f(batch)) for m, f in ((low, torch.amin), (high, torch.amax)))
    assert [v.item() for v in seen.range()] == pytest.approx([low, high])


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("of", [SYMMETRIC, ASYMMETRIC], ids=QuantSpec.describe)
def test_per_channel_is_per_tensor_on_each_channel(name: str, of: QuantSpec) -> None:
    rows = torch.cat([make()[:, :16_000] for make in SHAPES.values()]) * torch.logspace(-3, 3, len(SHAPES)).unsqueeze(1)
    together = observed(name, QuantSpec(**{f: getattr(of, f) for f in ("signed", "symmetric", "narrow")}, axis=0), rows)
    for c, row in enumerate(rows):
        alone = observed(name, of, row.unsqueeze(0))
        torch.testing.assert_close([v[c : c + 1] for v in together], list(alone), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("of", [SYMMETRIC, ASYMMETRIC], ids=QuantSpec.describe)
@pytest.mark.parametrize("factor", [1e-44, 1e-30, 1.0, 1e30])
def test_range_is_finite_and_inside_the_data(name: str, of: QuantSpec, factor: float) -> None:
    lists = [[0.0], [1.0], [-1.0], [0.0] * 9, [3.0] * 9, [-0.5] * 9, [-1.0, 2.0], [0.0, 0.0, 5.0], *normal(3, 400).tolist()]
    for values in (torch.tensor([v]) * factor for v in lists):
        low, high = observed(name, of, values)
        assert low.dtype == high.dtype == torch.float64
        assert low.shape == high.shape == (1,)
        assert values.double().min() <= low <= high <= values.double().max()
        scale, _ = choose_scale(low, high, of)
        assert scale.isfinite()
        assert scale > 0


@pytest.mark.parametrize("name", NAMES)
def test_unknown_option(name: str) -> None:
    with pytest.raises(OptionError, match="option"):
        make_observer(name, SYMMETRIC, {"momentumm": 1})


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("ema", "momentum", [-0.1, 1, 2, "a", None, float("nan"), True]),
        ("percentile", "percentile", [50, 0.999, 100.1, "99", None, float("nan"), True]),
        ("mse", "p", [0.5, 5, "2", None, float("nan"), True]),
        ("clipstd", "k", [0, -1, 101, "2", None, float("nan"), True]),
    ],
)
def test_wrong_value(name: str, option: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(OptionError, match="allowed"):
            make_observer(name, SYMMETRIC, {option: value})


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
matrices = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=numbers)


def state(histogram: Histogram) -> list[list[float]]:
    return [v.tolist() for v in (histogram.counts, histogram.exponent, histogram.low, histogram.high)]


@given(values=matrices, seed=st.integers(0, 1000), cut=st.integers(0, 12))
@example(np.float32([[1e-30, 0.0], [0.0, 3e38], [-1e-45, 3e38], [-1e-38, 2.0**12]]), 0, 1)
@settings(max_examples=150, deadline=None)
def test_histogram_depends_on_the_values_alone(values: np.ndarray, seed: int, cut: int) -> None:
    rows = torch.from_numpy(values)
    whole, pieces, left, right = (Histogram(len(rows), 16) for _ in range(4))
    feed(whole, rows)
    shuffled = rows[:, torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(seed))]
    feed(pieces, shuffled, batch=1)
    assert state(pieces) == state(whole)
    for part, half in ((shuffled[:, :cut], left), (shuffled[:, cut:], right)):
        if part.shape[1]:
            feed(half, part)
    before = state(right)
    left.merge(right)
    assert state(left) == state(whole)
    assert state(right) == before


@given(values=matrices)
@settings(max_examples=150, deadline=None)
def test_histogram_is_numpys(values: np.ndarray) -> None:
    """Doubled one value at a time, against one count in exact bins of the last width."""
    histogram = Histogram(len(values), 16)
    feed(histogram, torch.from_numpy(values), batch=1)
    for row, counts, width, exponent in zip(values, histogram.counts, histogram.width.tolist(), histogram.exponent, strict=True):
        edges = np.arange(-16, 17) * width
        assert counts.tolist() == np.histogram(row.astype(float), edges)[0].tolist()
        top = np.abs(row.astype(float)).max()
        assert top < 16 * width
        assert exponent == -100 or top >= 8 * width


def test_histogram_is_bounded() -> None:
    histogram = Histogram(3)
    sizes = set()
    for i in range(-60, 60):
        feed(histogram, normal(3, 100, seed=i) * 2.0**i)
        sizes.add(histogram.counts.nbytes)
    assert sizes == {3 * 2 * BINS * 8}
    assert histogram.counts.sum(1).tolist() == [12000] * 3


def test_large_batches_are_thinned_evenly() -> None:
    """No column of an image is left out, whatever its width, and the extremes are exact."""
    from qdeploy.numerics.histogram import _thinned

    for width in (7, 14, 56, 64, 224, 384, 512):
        columns = torch.arange(width).repeat((8 * LIMIT) // width + 1).unsqueeze(0)
        kept = _thinned(columns)
        assert LIMIT // 2 <= kept.numel() <= LIMIT
        assert kept.shape[-1] == RUN
        shares = torch.bincount(kept.flatten(), minlength=width) * width / kept.numel()
        assert shares.min() > 0.7
        assert shares.max() < 1.3
    rows = normal(1, 1 << 20)
    rows[0, -1] = 50
    histogram = Histogram(1)
    histogram.update(rows, *torch.aminmax(rows, dim=1))
    assert histogram.high == 50
    assert abs(int(histogram.counts.sum()) - LIMIT) < LIMIT / 100
