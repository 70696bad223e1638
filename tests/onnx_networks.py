"""Torch modules whose ONNX files spell things in ways of their own: what the importer must read and find again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Two layers of attention: one by hand with a mask of constants, one by scaled_dot_product_attention; positions are embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 16)
        self.positions = nn.Embedding(12, 16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.qkv2 = nn.Linear(16, 48, bias=False)
        self.head = nn.Linear(16, 3)
        self.register_buffer("mask", torch.ones(12, 12).tril().bool())

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, t, _ = x.shape
        q, k, v = x.reshape(n, t, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, ids: Tensor) -> Tensor:
        n, t = ids.shape
        x = self.tokens(ids) + self.positions(torch.arange(t))
        q, k, v = self.heads(self.qkv(x))
        scores = (q @ k.transpose(-1, -2)) / 2.0
        scores = scores.masked_fill(~self.mask[:t, :t], -1e9)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, -1))
        q, k, v = self.heads(self.qkv2(self.norm(x)))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, 16)
        return self.head(x.mean(1))


class Vision(nn.Module):
    """A vision transformer in small: patches, a class token for every sample, torch's own encoder layer with gelu."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        self.norm = nn.LayerNorm(16, eps=1e-6)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.fc((x + self.mlp(self.norm(x)))[:, 0])


class Mlp(nn.Module):
    """Linear layers on three dimensions with gelu in both spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 16)
        self.b = nn.Linear(16, 8, bias=False)
        self.c = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.gelu(self.b(F.gelu(self.a(x))), approximate="tanh"))


class Decoder(nn.Module):
    """Transposed convolution, resizing in two ways, pixel shuffle, group and instance norm, a skip that is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.group = nn.GroupNorm(4, 8)
        self.up = nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1)
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.mix = nn.Conv2d(8, 4, 1, padding_mode="reflect")
        self.act = nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.group(self.down(x)))
        z = self.instance(self.up(y)) + F.interpolate(y, scale_factor=2, mode="nearest")
        z = self.act(self.mix(z)) + F.pixel_shuffle(y, 2).mean(1, keepdim=True)
        z = F.interpolate(z, size=(7, 9), mode="bilinear", align_corners=False)
        return F.pad(z, (1, 0, 0, 2), value=0.5)


class Shuffle(nn.Module):
    """A unit of ShuffleNetV2: halves of the channels, a depthwise convolution, a shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=4))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(x.mean((2, 3)))


class Squeeze(nn.Module):
    """Squeeze and excite with hard swish and hard sigmoid, as in MobileNetV3, and mish."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.reduce = nn.Conv2d(8, 4, 1)
        self.expand = nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.bn(self.stem(x)))
        gate = F.hardsigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))
        x = F.mish(x * gate)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Recurrent(nn.Module):
    """What is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def _images() -> Tensor:
    return torch.randn((3, 3, 8, 8), generator=torch.Generator().manual_seed(3))


NETWORKS: dict[str, tuple[type[nn.Module], Tensor]] = {
    "attention": (Attention, torch.arange(21).reshape(3, 7) % 11),
    "vision": (Vision, _images()),
    "mlp": (Mlp, torch.randn((3, 6, 8), generator=torch.Generator().manual_seed(3))),
    "decoder": (Decoder, _images()),
    "shuffle": (Shuffle, _images()),
    "squeeze": (Squeeze, _images()),
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network, seeded and in eval mode, with an input for it."""
    make, example = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return make().eval(), example


def written(
    path: Path, inputs: str, outputs: str, body: str, opset: int = 18, functions: str = "", **constants: np.ndarray | np.generic
) -> Path:
    """An ONNX file from ONNX's own text form; nodes are named after their operators and places."""
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "own" : 1, "com.acme" : 1]>'
    model = onnx.parser.parse_model(f"{head} g ({inputs}) => ({outputs}) {{ {body} }} {functions}")
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items())
    for at, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}{at}"
    onnx.save(model, path)
    return path
