"""Attention, masks, constants and batch norms: what a captured graph makes of them computes the same, and can be quantized."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import networks
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import qdeploy
from qdeploy import api
from qdeploy.capture import decompose, fold
from qdeploy.capture.capture import capture
from qdeploy.graph import query
from qdeploy.numerics.observer import MARGIN, MASK, unmasked
from qdeploy.simulation.prepared import Prepared

TARGETS = ("snpe", "tensorrt", "openvino", "vitis", "onnxruntime")


def heads(x: Tensor, count: int = 4) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def tensors(*shape: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for _ in range(3))


BOOLEAN = torch.ones(5, 5, dtype=torch.bool).tril(1)
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "scale of one": {"scale": 1.0},
    "boolean mask": {"attn_mask": BOOLEAN},
    "float mask": {"attn_mask": torch.linspace(-2, 1, 25).view(5, 5)},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_attention_is_the_op_it_stands_for(options: dict[str, object]) -> None:
    query, key, value = tensors(2, 4, 5, 8)
    wanted = F.scaled_dot_product_attention(query, key, value, **options)
    assert torch.allclose(decompose.attention(query, key, value, **options), wanted, atol=1e-6)


def test_fewer_heads_of_keys_serve_several_queries_each() -> None:
    query, _, _ = tensors(2, 4, 5, 8)
    _, key, value = tensors(2, 2, 5, 8)
    wanted = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert torch.allclose(decompose.attention(query, key, value, enable_gqa=True), wanted, atol=1e-6)


HIDES = (-math.inf, torch.finfo(torch.float32).min, -1e9)


class Attention(nn.Module):
    """One block of a transformer, for every number that hides; what is hidden is said by a mask of 0 and 1."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, seen: Tensor) -> list[Tensor]:
        query, key, value = (heads(part) for part in self.qkv(self.norm(x)).chunk(3, -1))
        if self.causal:
            made = [F.scaled_dot_product_attention(query, key, value, is_causal=True)]
        else:
            scores = query @ key.transpose(-2, -1) / 8**0.5
            biases = [torch.where(seen[:, None, None] > 0, 0.0, hide) for hide in HIDES]
            made = [torch.softmax(scores + bias, -1) @ value for bias in biases]
        return [x + self.out(part.transpose(1, 2).flatten(2)) for part in made]


def sentences() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    seen = torch.ones(4, 6, dtype=torch.int64)
    seen[1::2, 4:] = 0
    return [(torch.randn(4, 6, 32, generator=generator), seen) for _ in range(3)]


@cache
def masked() -> tuple[nn.Module, dict[str, Prepared]]:
    torch.manual_seed(0)
    net = Attention().eval()
    return net, networks.several(net, sentences(), TARGETS)


@pytest.mark.parametrize("backend", TARGETS)
def test_what_a_mask_hides_stays_hidden_in_the_simulation(backend: str, tmp_path: Path) -> None:
    net, made = masked()
    one = made[backend]
    assert one.plan.share == 1.0
    (x, seen), changed = sentences()[0], sentences()[0][0].clone()
    changed[1::2, 4:] *= 0.5  # within the calibrated ranges
    with torch.no_grad():
        results = ([out[1::2, :4] for out in module(y, seen)] for module, y in ((one, x), (one, changed), (net, x)))
        for hide, before, after, wanted in zip(HIDES, *results, strict=True):
            assert (before - after).abs().max() < 0.05 * before.abs().max(), hide
            assert (before - wanted).square().sum() < 0.01 * wanted.square().sum(), hide
    artifact = qdeploy.convert(one, tmp_path / "out")
    assert qdeploy.verify(artifact, runtime="onnxruntime:none").passed
    assert networks.poor(artifact) == {}


@cache
def causal() -> dict[str, Prepared]:
    torch.manual_seed(0)
    return networks.several(Attention(causal=True).eval(), sentences(), ("snpe", "vitis"))


@pytest.mark.parametrize("backend", ["snpe", "vitis"])
def test_the_approximate_softmax_of_onnxruntime_is_seen_in_its_default_session_and_does_not_decide(
    backend: str, tmp_path: Path
) -> None:
    artifact = qdeploy.convert(causal()[backend], tmp_path / "out")
    variants = ["onnxruntime:all", "onnxruntime:faithful", "onnxruntime:none"]
    found = {row.name: row.sqnr or 0.0 for row in qdeploy.verify(artifact, runtime=variants).results[2:]}
    assert found["onnxruntime:faithful"] > 90 < found["onnxruntime:none"]
    assert (found["onnxruntime:all"] < 60) is (backend == "snpe")
    report = qdeploy.verify(artifact)
    assert report.passed and not any(row.decides for row in report.results if row.name == "onnxruntime:all")


def test_causal_attention_is_quantized_in_all_its_products() -> None:
    one = causal()["snpe"]
    names = [query.op_of(node).name for node in one.captured.module.graph.nodes if node.op == "call_function"]
    assert names.count("matmul") == 2 and "scaled_dot_product_attention" not in names
    quantized = {planned.tensor for planned in one.plan.quantized}
    floats = {query.tensor_name(n) for n in one.captured.module.graph.nodes if n.op == "call_function" and query.is_float(n)}
    assert floats <= quantized, "every tensor has an encoding"


def test_masked_places_are_left_out_of_the_range() -> None:
    rows = torch.tensor([[0.5, MASK, -2.0, MASK + 3]])
    assert unmasked(rows).tolist() == [[0.5, -2 - MARGIN, -2.0, -2 - MARGIN]]
    assert unmasked(torch.full((1, 2), MASK)).tolist() == [[-MARGIN, -MARGIN]]


class Standardized(nn.Module):
    """A convolution whose weight is computed in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        weight = ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)).view_as(self.weight)
        return F.conv2d(x, weight)


def test_a_weight_that_is_computed_in_the_graph_is_quantized_as_one() -> None:
    net, x = Standardized().eval(), torch.randn(2, 3, 8, 8)
    one = qdeploy.prepare(net, x, "tensorrt", recipe="plain")
    (weight,) = [planned for planned in one.plan.quantized if planned.role == "weight"]
    assert weight.spec is not None and weight.spec.axis == 0
    assert torch.allclose(one(x), net(x), atol=1e-5)


class Shifted(nn.Module):
    """What shifted windows compute from shapes and numbers alone: a mask that is filled slice by slice. And a learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gain = nn.Linear(8, 8), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_zeros((6, 6))
        mask[:4, :4], mask[4:, 4:] = 1, 2
        mask = (mask.flatten()[:6].unsqueeze(0) - mask[0].unsqueeze(1)).ne(0)
        scores = torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, -100.0)
        return torch.softmax(self.fc(x) @ x.transpose(1, 2) * self.gain + scores, -1)


def test_what_follows_from_shapes_alone_is_a_constant() -> None:
    captured = capture(Shifted().eval(), torch.randn(2, 6, 8)).module
    made = [query.op_of(node).name for node in captured.graph.nodes if node.op == "call_function"]
    assert sorted(made) == ["add", "linear", "matmul", "mul", "softmax", "transpose"]


class Spread(nn.Module):
    """Linear attention: one vector for a whole image, made as wide as what it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value = self.value(x)
        context = self.key(x).mean((2, 3), keepdim=True)
        return value * context.expand_as(value), context.expand(-1, -1, 2, 2) * context.expand(-1, -1, 2, 2)


def test_what_spreads_by_itself_needs_no_tensor_for_it() -> None:
    net, x = Spread().eval(), torch.randn(8, 3, 6, 6)
    captured = capture(net, x).module
    assert [query.op_of(node).name for node in captured.graph.nodes].count("expand") == 1  # that of two small ones
    assert all(torch.allclose(made, wanted, atol=1e-6) for made, wanted in zip(captured(x), net(x), strict=True))


class Tokens(nn.Module):
    """A learned token before all others, and one table of numbers that two ops read in two places each."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.fc = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.arange(8.0) / 8
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for _ in range(2):
            x = self.fc(x * torch.cos(table)) + x * torch.sin(table)
        return x * 1.0


def norm(channels: int, kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Module:
    made = kind(channels)
    for tensor, low, high in ((made.weight, 0.5, 2), (made.bias, -1, 1), (made.running_mean, -1, 1), (made.running_var, 0.3, 3)):
        nn.init.uniform_(tensor, low, high)
    return made


class Alone(nn.Module):
    """Batch norms that no layer is before: after a concat, behind a relu, and before a convolution with and without padding."""

    def __init__(self, padding: int, groups: int = 1) -> None:
        super().__init__()
        self.left, self.right, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1), norm(8)
        self.conv = nn.Conv2d(8, 6, 3, padding=padding, groups=groups, bias=groups == 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(torch.cat([F.relu(self.left(x)), self.right(x)], 1)))


class Flat(nn.Module):
    """Batch norms of vectors: behind an activation, and behind a layer in a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.last, self.after = nn.Linear(6, 5), norm(5, nn.BatchNorm1d), nn.Linear(5, 4), norm(4, nn.BatchNorm1d)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.last(self.norm(torch.tanh(self.fc(x)))))


NORMS = {
    "padded": (Alone(1), (3, 6, 6), {"conv2d": 4}),
    "folded forward": (Alone(0), (3, 6, 6), {"conv2d": 3}),
    "folded forward into groups": (Alone(0, 2), (3, 6, 6), {"conv2d": 3}),
    "vectors": (Flat(), (6,), {"linear": 2, "mul": 1, "add": 1}),
    "first": (nn.Sequential(norm(3), nn.Conv2d(3, 4, 3, padding=1)), (3, 6, 6), {"conv2d": 2}),
    "in one dimension": (nn.Sequential(norm(3, nn.BatchNorm1d), nn.ReLU()), (3, 6), {"conv1d": 1}),
}


@pytest.mark.parametrize("name", NORMS)
def test_batch_norms_without_a_layer_before_them_become_ops_that_targets_compute(name: str) -> None:
    net, shape, wanted = NORMS[name]
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = net.double().eval()
    module = capture(net, x).module
    fold.fold_batch_norms(module)
    fold.plain_batch_norms(module)
    found = [query.op_of(node).name for node in module.graph.nodes if node.op == "call_function"]
    assert "batch_norm" not in found and {name: found.count(name) for name in wanted} == wanted
    assert torch.allclose(module(x), net(x), rtol=1e-9, atol=1e-9)


class Parts(nn.Module):
    """What is above, side by side: a mask of shapes and a learned number, spread vectors, tokens and tables, a norm behind a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.mask, self.spread, self.tokens, self.norm = Shifted(), Spread(), Tokens(), Alone(1)

    def forward(self, mask: Tensor, spread: Tensor, tokens: Tensor, norm: Tensor) -> dict[str, object]:
        return {"mask": self.mask(mask), "spread": self.spread(spread), "tokens": self.tokens(tokens), "norm": self.norm(norm)}


@cache
def parts() -> dict[str, Prepared]:
    torch.manual_seed(0)
    shapes = ((6, 8), (3, 6, 6), (3, 8), (3, 6, 6))
    return networks.several(Parts().eval(), [tuple(torch.randn(4, *shape) for shape in shapes) for _ in range(2)], TARGETS)


@pytest.mark.parametrize("backend", TARGETS)
def test_masks_spread_vectors_tokens_and_a_norm_behind_a_concat_are_quantized_and_emitted(backend: str, tmp_path: Path) -> None:
    one = parts()[backend]
    assert one.plan.share == 1.0
    artifact = qdeploy.convert(one, tmp_path / "out")
    report = qdeploy.verify(artifact, runtime="onnxruntime")
    assert report.passed, report
    assert networks.poor(artifact) == {} == networks.poor(artifact, "all")


@pytest.mark.parametrize("backend", [b if b == "openvino" else pytest.param(b, marks=pytest.mark.slow) for b in TARGETS])
def test_they_run_on_all_runtimes_at_hand(backend: str, tmp_path: Path) -> None:
    report = qdeploy.verify(qdeploy.convert(parts()[backend], tmp_path / "out"))
    assert report.passed, report


class Paired(nn.Module):
    """A function of a tensor and itself."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, x)


COUNTS = {
    "convolution": (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5), 6 * 3 * 3 * 2 * 9),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5), 4 * 25 * 3 * 9),
    "linear": (nn.Linear(6, 5), (3, 6), 3 * 6 * 5),
    "lstm": (nn.LSTM(4, 5, batch_first=True), (7, 4), 7 * 4 * 5 * (4 + 5)),
    "lstm with a projection": (nn.LSTM(4, 5, proj_size=3, batch_first=True), (7, 4), 7 * (4 * 5 * (4 + 3) + 5 * 3)),
    "gru of two layers and directions": (
        nn.GRU(4, 5, 2, batch_first=True, bidirectional=True),
        (7, 4),
        7 * 2 * 3 * 5 * ((4 + 5) + (2 * 5 + 5)),
    ),
    "rnn cell": (nn.RNNCell(4, 5), (4,), 5 * (4 + 5)),
    "bilinear": (Paired(nn.Bilinear(4, 4, 3)), (6, 4), 6 * 3 * 4 * 4),
    "einsum": (Paired(partial(torch.einsum, "...hid,...hjd->...hij")), (2, 6, 4), 2 * 6 * 6 * 4),
    "inner product": (Paired(torch.inner), (4,), 4),
}


@pytest.mark.parametrize("name", COUNTS)
def test_multiply_accumulates_are_counted_for_one_sample(name: str) -> None:
    layer, shape, wanted = COUNTS[name]
    module = capture(layer.eval(), torch.randn(2, *shape)).module
    assert [made for node in module.graph.nodes if node.op == "call_function" and (made := query.macs(node))] == [wanted]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lstm, self.head = nn.Linear(8, 8), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.fc(x))[0])


def test_a_recurrent_layer_that_stays_in_float_is_part_of_the_share() -> None:
    one = qdeploy.prepare(Recurrent().eval(), torch.randn(4, 10, 8), "tensorrt", recipe="plain")
    linear, recurrent = 8 * 8 + 16 * 4, 4 * 16 * (8 + 16)
    assert math.isclose(one.plan.share, linear / (linear + recurrent))


def test_the_share_of_quantized_work_is_by_multiply_accumulates() -> None:
    assert qdeploy.prepare(networks.network("plain"), networks.batches("plain")[0], "ncnn", recipe="plain").plan.share == 1.0
    up = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2)).eval()
    share = qdeploy.prepare(up, torch.randn(2, 3, 5, 5), "ncnn", recipe="plain").plan.share
    assert share == pytest.approx(3 * 4 * 25 / (3 * 4 * 25 + 4 * 4 * 4 * 25))


def assigned(x: Tensor, where: tuple[object, ...], part: Tensor | float) -> Tensor:
    """`x` with `part` written into it."""
    x = x.clone()
    x[where] = part
    return x


WIDE = torch.linspace(-30, 30, 8 * 36).view(8, 36)
SPELLED = {
    "silu": (F.silu, (1, 8, 6, 6)),
    "glu": (lambda x: F.glu(x, 1), (1, 8, 6, 6)),
    "log_sigmoid": (F.logsigmoid, (1, 8, 6, 6)),
    "rms_norm": (lambda x: F.rms_norm(x, (6, 6), eps=1e-5), (1, 8, 6, 6)),
    "rms_norm of float32's own epsilon": (lambda x: F.rms_norm(x, (6,), WIDE[0, :6]), (1, 8, 6, 6)),
    "rsqrt": (lambda x: torch.rsqrt(x * x + 1), (1, 8, 6, 6)),
    "softplus": (F.softplus, (1, 8, 6, 6)),
    "softplus of a slope": (lambda x: F.softplus(x, 3.0), (1, 8, 6, 6)),
    "softplus of an early end": (lambda x: F.softplus(x, 2.0, 1.0), (1, 8, 6, 6)),
    "channel_shuffle": (lambda x: torch.channel_shuffle(x, 4), (1, 8, 6, 6)),
    "channel_shuffle of sequences": (lambda x: torch.channel_shuffle(x, 2), (1, 8, 36)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 3), (1, 8, 6, 6)),
    "pixel_unshuffle, batched twice": (lambda x: F.pixel_unshuffle(x, 2), (1, 2, 4, 6, 6)),
    "unbind": (lambda x: torch.cat(x.unbind(1)[::-1], 1), (1, 3, 4, 5)),
    "roll": (lambda x: torch.roll(x, (-1, 2, 0), (1, 2, 3)), (1, 3, 4, 5)),
    "roll all the way": (lambda x: torch.roll(x, (5, -9), (2, 2)), (1, 3, 4, 5)),
    "stack": (lambda x: torch.stack([x, x + 1, x * 2], 2), (1, 3, 4)),
    "upsample_linear1d": (lambda x: F.interpolate(x, size=9, mode="linear", align_corners=True), (1, 3, 6)),
    "upsample_linear1d by a factor": (lambda x: F.interpolate(x, scale_factor=1.5, mode="linear"), (1, 3, 6)),
    "adaptive_avg_pool1d": (lambda x: F.adaptive_avg_pool1d(x, 1), (1, 3, 6)),
    "adaptive_avg_pool1d by windows": (lambda x: F.adaptive_avg_pool1d(x, 2), (1, 3, 6)),
    "adaptive_avg_pool1d by windows that differ": (lambda x: F.adaptive_avg_pool1d(x, 4), (1, 3, 6)),
    "adaptive_avg_pool2d to a multiple": (lambda x: F.adaptive_avg_pool2d(x, (6, 4)), (1, 3, 2, 1)),
    "adaptive_avg_pool2d by windows that differ": (lambda x: F.adaptive_avg_pool2d(x, (3, 8)), (1, 3, 7, 5)),
    "adaptive_avg_pool2d without a batch": (lambda x: F.adaptive_avg_pool2d(x, 4), (3, 2, 2)),
    "adaptive_avg_pool3d by windows that differ": (lambda x: F.adaptive_avg_pool3d(x, 3), (1, 2, 4, 4, 4)),
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 3), (1, 3, 6)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, (3, 1)), (1, 3, 6, 4)),
    "adaptive_max_pool2d with its places": (lambda x: torch.cat([*F.adaptive_max_pool2d_with_indices(x, 2)]), (1, 3, 6, 4)),
    "adaptive_max_pool3d": (lambda x: F.adaptive_max_pool3d(x, 1), (1, 2, 4, 4, 4)),
    "addmm": (lambda x: torch.addmm(WIDE[0, :5], x, WIDE[:, :5]), (1, 8)),
    "addmm with factors": (lambda x: torch.addmm(WIDE[0, :5], x, WIDE[:, :5], beta=0.5, alpha=2.0), (1, 8)),
    "addcmul": (lambda x: torch.addcmul(x, x, x + 1), (1, 6, 6)),
    "addcmul with a factor": (lambda x: torch.addcmul(x, x, x + 1, value=0.5), (1, 6, 6)),
    "addcdiv": (lambda x: torch.addcdiv(x, x, x * x + 1), (1, 6, 6)),
    "addcdiv with a factor": (lambda x: torch.addcdiv(x, x, x * x + 1, value=2.0), (1, 6, 6)),
    "lerp": (lambda x: torch.lerp(x, x * x, 0.3), (1, 6, 6)),
    "lerp by a tensor": (lambda x: torch.lerp(x, x * x, torch.sigmoid(x)), (1, 6, 6)),
    "expm1": (lambda x: torch.expm1(x / 9), (1, 6, 6)),
    "log1p": (lambda x: torch.log1p(x * x), (1, 6, 6)),
    "log2": (lambda x: torch.log2(x * x + 1), (1, 6, 6)),
    "log10": (lambda x: torch.log10(x * x + 1), (1, 6, 6)),
    "erfc": (torch.erfc, (1, 6, 6)),
    "logit": (lambda x: torch.logit(torch.sigmoid(x / 9)), (1, 6, 6)),
    "logit within bounds": (lambda x: torch.logit(x, 1e-3), (1, 6, 6)),
    "clamp between tensors": (lambda x: torch.clamp(x, WIDE[:6, :6], WIDE[:6, :6] + 1), (1, 6, 6)),
    "clamp below a tensor": (lambda x: torch.clamp(x, max=WIDE[:6, :6]), (1, 6, 6)),
    "cosine_similarity": (lambda x: torch.cosine_similarity(x, WIDE[:6, :6], 2), (1, 6, 6)),
    "var": (lambda x: x.var((1, 2), keepdim=True), (1, 6, 6)),
    "var, biased": (lambda x: x.var(1, unbiased=False), (1, 6, 6)),
    "std": (lambda x: x.std(-1), (1, 6, 6)),
    "std with a correction": (lambda x: torch.std(x, (2,), correction=2), (1, 6, 6)),
    "var_mean": (lambda x: sum(torch.var_mean(x, (1, 2))), (1, 6, 6)),
    "std_mean": (lambda x: torch.cat(torch.std_mean(x, -1, keepdim=True), 1), (1, 6, 6)),
    "slice_scatter": (lambda x: assigned(x, (slice(None), slice(1, -1)), x[:, 1:-1] * 2), (1, 6, 6)),
    "slice_scatter to the end": (lambda x: assigned(x, (slice(None), slice(None), slice(3, None)), 0.5), (1, 6, 6)),
    "slice_scatter over everything": (lambda x: assigned(x, (slice(None), slice(0, 9)), x * 3), (1, 6, 6)),
    "select_scatter": (lambda x: assigned(x, (..., -2), x[..., 1]), (1, 6, 6)),
    "copy": (lambda x: torch.zeros_like(x).copy_(x[:, :1]), (1, 6, 6)),
    "fill": (lambda x: x.clone().fill_(0.25), (1, 6, 6)),
    "index": (lambda x: x[:, [0, -1, 2]], (1, 6, 6)),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, -1), (1, 6, 6)),
    "_upsample_nearest_exact2d": (lambda x: F.interpolate(x, scale_factor=3, mode="nearest-exact"), (1, 2, 4, 5)),
    "_upsample_nearest_exact2d to a multiple": (lambda x: F.interpolate(x, size=(8, 5), mode="nearest-exact"), (1, 2, 4, 5)),
    "rot90": (lambda x: torch.rot90(x, 1, (2, 3)), (1, 2, 4, 5)),
    "rot90 back": (lambda x: torch.rot90(x, -1, (3, 2)), (1, 2, 4, 5)),
    "rot90 by two": (lambda x: torch.rot90(x, 2, (1, 3)), (1, 2, 4, 5)),
    "rot90 by three": (lambda x: torch.rot90(x, 3, (1, 2)), (1, 2, 4, 5)),
    "unfold": (lambda x: x.unfold(1, 3, 2), (1, 8, 5)),
    "unfold without gaps": (lambda x: x.unfold(-1, 3, 3), (1, 2, 6)),
    "unfold that leaves some out": (lambda x: x.unfold(2, 3, 3), (1, 2, 8, 2)),
    "im2col": (lambda x: F.unfold(x, 3), (1, 2, 6, 5)),
    "im2col with all of its options": (lambda x: F.unfold(x, (2, 3), (2, 1), (1, 2), (1, 2)), (1, 2, 7, 6)),
    "im2col without gaps": (lambda x: F.unfold(x, (2, 3), stride=(2, 3)), (1, 3, 4, 6)),
    "im2col that leaves some out": (lambda x: F.unfold(x, 2, stride=2), (1, 3, 5, 6)),
    "baddbmm": (lambda x: torch.baddbmm(x, x, x.transpose(1, 2), beta=0.5, alpha=0.1), (1, 6, 6)),
}


class Spelled(nn.Module):
    """Ops, each of an input of its own, and a sum behind each."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.ops = [SPELLED[name][0] for name in names]

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [op(x) + 1 for op, x in zip(self.ops, inputs, strict=True)]


def makers(last: fx.Node) -> set[str]:
    """The names of the ops that `last` is made by."""
    nodes, found = [last], {last}
    while nodes:
        fresh = set(nodes.pop().all_input_nodes) - found
        nodes += fresh
        found |= fresh
    return {str(node.target).removeprefix("aten.").split(".")[0] for node in found}


def together(size: int = 20) -> dict[str, list[str]]:
    """Ops that are captured at once, with one batch, by the first and the last of them."""
    made: dict[str, list[str]] = {}
    for batch in sorted({shape[0] for _, shape in SPELLED.values()}):
        names = [name for name, (_, shape) in SPELLED.items() if shape[0] == batch]
        some = [names[start : start + size] for start in range(0, len(names), size)]
        made |= {f"{part[0]} to {part[-1]}": part for part in some}
    return made


@pytest.mark.parametrize("names", together().values(), ids=together().keys())
def test_ops_in_other_words_compute_the_same_and_are_gone(names: list[str]) -> None:
    model, shapes = Spelled(names), [SPELLED[name][1] for name in names]
    inputs = [torch.cat([torch.linspace(-25, 25, math.prod(shape)).view(shape), tensors(*shape)[0]]) for shape in shapes]
    captured = capture(model, inputs)
    (output,) = captured.module.graph.find_nodes(op="output")
    for name, made, wanted, last in zip(names, captured.module(*inputs), model(*inputs), output.args[0], strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        kind = name.split()[0].strip(",")
        assert kind == "softplus" or kind not in makers(last), name


def test_the_ops_of_a_silu_are_quantized_where_the_target_computes_every_op_and_stay_together_where_it_does_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1)).eval()
    both = api.prepare_all(model, torch.randn(2, 3, 4, 4), ("snpe", "openvino"), recipe="plain")
    for one, wanted in zip(both, ({"1", "1.sigmoid"}, {"1"}), strict=True):
        assert {t.tensor for t in one.plan.quantized if t.op == "silu"} == wanted


def test_the_weights_of_gpt2s_layers_are_quantized_and_keep_their_place() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    plan = qdeploy.prepare(nn.Sequential(Layer(), nn.ReLU()), torch.randn(2, 6), "tensorrt", "plain").plan
    (weight,) = (t for t in plan.quantized if t.role == "weight")
    assert weight.tensor == "0.weight_transposed" and weight.op == "linear" and plan.share == 1


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(6), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)], ids=lambda n: type(n).__name__
)
def test_the_scale_and_shift_of_a_norm_are_quantized_where_the_target_computes_every_op_with_integers(norm: nn.Module) -> None:
    wanted = {"snpe": {"0.weight", "0.bias"}, "tensorrt": set(), "onnxruntime": set()}
    model = nn.Sequential(norm, nn.Conv2d(4, 4, 1)).eval()
    for one in api.prepare_all(model, torch.randn(2, 4, 6, 6), tuple(wanted), recipe="plain"):
        assert {t.tensor for t in one.plan.quantized if t.role == "constant"} == wanted[one.backend.name], one.backend.name


class Placed(nn.Module):
    """Positions that an exporter computes anew for every sample, a class token, and a mask."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.token, self.point = kind, nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        if self.kind == "positions":
            return x + self.point(torch.ones(batch, length, dtype=torch.bool).cumsum(1).unsqueeze(2).expand(-1, -1, width).sin())
        if self.kind == "positions beside":
            return torch.cat([x, torch.zeros(batch, length, width).cumsum(1) + 1], 1)
        if self.kind == "mask":
            return x.masked_fill(torch.zeros_like(x[..., 0], dtype=torch.bool).logical_not().cumsum(1).gt(3).unsqueeze(2), 0.0)
        if self.kind == "token":
            return torch.cat([self.token.expand(batch, -1, -1), x], 1)
        return x + torch.arange(batch)[:, None, None]


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("positions", ["add"]),
        ("positions beside", ["sym_size", "expand", "cat"]),
        ("mask", ["sym_size", "expand", "masked_fill"]),
        ("token", ["sym_size", "expand", "cat"]),
        ("numbers of samples", ["sym_size", "arange", "unsqueeze", "unsqueeze", "add"]),
    ],
)
def test_what_is_the_same_for_every_sample_is_stored_once(kind: str, left: list[str]) -> None:
    model = Placed(kind)
    captured = capture(model, torch.randn(2, 5, 4))
    calls = [str(n.target).removeprefix("aten.").split(".")[0] for n in captured.module.graph.nodes if n.op == "call_function"]
    assert calls == left
    for batch in (1, 4):
        x = torch.randn(batch, 5, 4)
        torch.testing.assert_close(captured.module(x), model(x))


AVERAGES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...] | None]] = {
    "mean of both sides": (lambda x: x.mean((2, 3)), (6, 4)),
    "mean of both sides from the end": (lambda x: x.mean((-1, -2), keepdim=True), (6, 4)),
    "mean of the last side": (lambda x: x.mean(-1), (1, 4)),
    "mean of the first side": (lambda x: x.mean(2, keepdim=True), (6, 1)),
    "mean of channels": (lambda x: x.mean(1, keepdim=True), None),
    "mean of a sample": (lambda x: x.mean((1, 2, 3)), None),
    "mean of means": (lambda x: x.mean((2, 3), keepdim=True).mean(1), None),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (3, 1)), (2, 4)),
    "average": (lambda x: F.avg_pool2d(x, 3), (3, 3)),
    "average with a border": (lambda x: F.avg_pool2d(x, 3, 1, 1), None),
    "maximum": (lambda x: F.max_pool2d(x, 2), None),
}


def test_an_average_is_over_a_fixed_number_of_elements_of_the_sides_or_no_pooling() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [compute(x) for compute, _ in AVERAGES.values()]

    (output,) = capture(Net(), torch.randn(2, 5, 6, 4)).module.graph.find_nodes(op="output")
    found = dict(zip(AVERAGES, map(query.pooled, output.args[0]), strict=True))
    assert found == {name: kernel for name, (_, kernel) in AVERAGES.items()}
