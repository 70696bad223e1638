"""Regions: blocks end where one tensor is all that is left to read, layers end with their activations; together they are the graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import networks
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qdeploy.capture.capture import capture
from qdeploy.graph import query
from qdeploy.graph.regions import Region, blocks, layers


def conv(cin: int, cout: int, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, padding=kernel // 2, **options)


class Inverted(nn.Module):
    """A stem, inverted residuals without expansion, with a stride and with a skip, a head and a classifier, as in MobileNetV2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.depth0, self.project0 = conv(4, 4, groups=4), conv(4, 4, 1)
        self.expand1, self.depth1, self.project1 = conv(4, 8, 1), conv(8, 8, stride=2, groups=8), conv(8, 4, 1)
        self.expand2, self.depth2, self.project2 = conv(4, 8, 1), conv(8, 8, groups=8), conv(8, 4, 1)
        self.expand3, self.depth3, self.project3 = conv(4, 8, 1), conv(8, 8, groups=8), conv(8, 6, 1)
        self.head = conv(6, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        x = self.project0(F.relu6(self.depth0(x)))
        x = self.project1(F.relu6(self.depth1(F.relu6(self.expand1(x)))))
        x = x + self.project2(F.relu6(self.depth2(F.relu6(self.expand2(x)))))
        x = self.project3(F.relu6(self.depth3(F.relu6(self.expand3(x)))))
        return self.fc(F.relu6(self.head(x)).mean((2, 3)))


class Squeeze(nn.Module):
    """A squeeze-and-excite block between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down, self.up, self.last = conv(3, 4), conv(4, 2, 1), conv(2, 4, 1), conv(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.last(x)


class Inception(nn.Module):
    """Branches of a layer, of two layers, and of a pool, joined by a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right1, self.right2, self.last = conv(3, 4), conv(4, 2, 1), conv(4, 2, 1), conv(2, 2), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        branches = F.relu(self.left(x)), F.relu(self.right2(F.relu(self.right1(x)))), F.max_pool2d(x, 3, 1, 1)
        return self.last(torch.cat(branches, 1))


class Hourglass(nn.Module):
    """A U-Net: two steps down, two up, each with the features of its size."""

    def __init__(self) -> None:
        super().__init__()
        self.down0, self.down1, self.deep = conv(3, 4), conv(4, 4), conv(4, 4)
        self.up1, self.up0, self.last = conv(8, 4), conv(8, 4), conv(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = F.relu(self.down0(x))
        middle = F.relu(self.down1(F.max_pool2d(high, 2)))
        low = F.relu(self.deep(F.max_pool2d(middle, 2)))
        middle = F.relu(self.up1(torch.cat([F.interpolate(low, scale_factor=2.0), middle], 1)))
        high = F.relu(self.up0(torch.cat([F.interpolate(middle, scale_factor=2.0), high], 1)))
        return self.last(high)


class Chain(nn.Module):
    """Eight layers without a branch; the activation `act` behind each, before or behind a pool in two places."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.act = act
        for index in range(7):
            self.add_module(f"c{index}", conv(3 if index == 0 else 4, 4))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.5) / 0.25
        for index in range(7):
            x = getattr(self, f"c{index}")(x)
            x = F.max_pool2d(self.act(x), 2) if index == 1 else self.act(F.max_pool2d(x, 2)) if index == 4 else self.act(x)
        return self.fc(x.mean((2, 3)))


class Swish(Chain):
    """The same chain with an activation of two ops, one of which reads around the other."""

    def __init__(self) -> None:
        super().__init__(lambda x: x * torch.sigmoid(x))


class Dense(nn.Module):
    """Every layer reads what all layers before it made."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(conv(3 + 2 * index, 2) for index in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = torch.cat([x, F.relu(part(x))], 1)
        return x


class TwoHeads(nn.Module):
    """Two inputs that meet behind a layer each; the features are returned along with the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.joint, self.fc = conv(3, 4), conv(3, 4), conv(4, 4), nn.Linear(4, 5)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.left(left)) + F.relu(self.right(right))
        features = F.relu(self.joint(x))
        return features, self.fc(features.mean((2, 3)))


class Split(nn.Module):
    """A layer whose result is taken apart: a tuple is no tensor to cut at."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(3, 4), conv(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        kept, _ = self.first(x).split(2, 1)
        return F.relu(self.last(kept)) + 1.0


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "residual": networks.Residual,
    "inverted": Inverted,
    "squeeze": Squeeze,
    "inception": Inception,
    "hourglass": Hourglass,
    "chain": Chain,
    "swish": Swish,
    "dense": Dense,
    "heads": TwoHeads,
    "split": Split,
    "concat": networks.Concat,
    "nothing": nn.ReLU,
}


@cache
def captured(name: str) -> fx.GraphModule:
    example = torch.randn(2, 3, 8, 8)
    return capture(NETWORKS[name]().eval(), (example, example) if name == "heads" else (example,)).module


def weights(regions: Sequence[Region]) -> str:
    """The layers of every region, by the names of their weights."""
    return " | ".join(
        " ".join(str(node.args[1]).removesuffix("_weight") for node in region.nodes if query.op_of(node).weight is not None)
        for region in regions
    )


def ops(regions: Sequence[Region]) -> list[list[str]]:
    return [[query.op_of(node).name for node in region.nodes] for region in regions]


BLOCKS = {
    "residual": "stem | conv1 conv2 | conv3 conv4 | fc",
    "inverted": "stem | depth0 project0 | expand1 depth1 project1 | expand2 depth2 project2 | expand3 depth3 project3 | head | fc",
    "squeeze": "first | down up | last",
    "inception": "first | left right1 right2 | last",
    "hourglass": "down0 | down1 deep up1 | up0 | last",
    "chain": "c0 | c1 c2 c3 | c4 c5 c6 | fc",
    "swish": "c0 | c1 c2 c3 | c4 c5 c6 | fc",
    "dense": "parts_0 | parts_1 | parts_2 | parts_3",
    "heads": "left right | joint | fc",
    "split": "first | last",
    "concat": "left right | join | fc",
    "nothing": "",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_end_where_one_tensor_is_all_that_is_left_to_read(name: str):
    assert weights(blocks(captured(name))) == BLOCKS[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_single_tensor_enters_every_block_but_the_first(name: str):
    for region in blocks(captured(name))[1:]:
        inside = set(region.nodes)
        sources = {source for node in region.nodes for source in node.all_input_nodes if source.op != "get_attr"}
        assert len(sources - inside) == 1


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("partition", [blocks, layers, lambda module: blocks(module, merge=1, largest=1)])
def test_every_op_is_in_one_region_in_graph_order(name: str, partition: Callable[[fx.GraphModule], list[Region]]):
    module = captured(name)
    regions = partition(module)
    assert [node for region in regions for node in region.nodes] == [n for n in module.graph.nodes if n.op == "call_function"]
    assert [region.name for region in regions] == [query.tensor_name(region.nodes[-1]) for region in regions]


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "nothing"])
def test_a_region_of_layers_has_one_layer(name: str):
    assert weights(layers(captured(name))).replace("|", "").split() == weights(blocks(captured(name))).replace("|", "").split()
    assert all(names.strip().count(" ") == 0 for names in weights(layers(captured(name))).split("|"))


def test_activations_and_sums_belong_to_the_layer_before_pools_and_moves_to_the_one_after():
    assert ops(layers(captured("chain"))) == [
        ["sub", "div", "conv2d", "relu"],
        ["conv2d", "relu"],
        ["max_pool2d", "conv2d", "relu"],
        ["conv2d", "relu"],
        ["conv2d", "max_pool2d", "relu"],
        ["conv2d", "relu"],
        ["conv2d", "relu"],
        ["mean", "linear"],
    ]
    assert ops(layers(captured("residual")))[2] == ["conv2d", "add", "relu"]
    assert ops(layers(captured("hourglass")))[3] == ["interpolate", "concat", "conv2d", "relu"]
    assert ops(blocks(captured("residual")))[1][-2:] == ["add", "relu"]
    assert ops(layers(captured("split")))[1] == ["split", "split", "conv2d", "relu", "add"]


@pytest.mark.parametrize(
    ("merge", "found"),
    [
        (1, "c0 | c1 | c2 | c3 | c4 | c5 | c6 | fc"),
        (2, "c0 | c1 c2 | c3 c4 | c5 c6 | fc"),
        (4, "c0 | c1 c2 c3 c4 | c5 c6 | fc"),
        (9, "c0 | c1 c2 c3 c4 c5 c6 | fc"),
    ],
)
def test_a_chain_is_merged_up_to_so_many_layers_between_the_first_and_the_last(merge: int, found: str):
    assert weights(blocks(captured("chain"), merge=merge)) == found


def test_a_block_with_too_many_layers_is_cut_into_its_layers():
    assert weights(blocks(captured("hourglass"), largest=2)) == "down0 | down1 | deep | up1 | up0 | last"
    assert weights(blocks(captured("inverted"), largest=2)).count("expand2 | depth2 | project2") == 1
    assert weights(blocks(captured("hourglass"), largest=3)) == BLOCKS["hourglass"]


@pytest.mark.parametrize("partition", [blocks, layers])
def test_a_chain_of_4000_ops_takes_no_time(partition: Callable[[fx.GraphModule], list[Region]]):
    root, made = nn.Module(), fx.Graph()
    root.register_parameter("weight", nn.Parameter(torch.zeros(4, 4)))
    node, value = made.placeholder("x"), torch.zeros(2, 4)
    skip = node
    for index in range(4000):
        with_weight = (node, made.get_attr("weight")) if index % 4 == 0 else (node, skip) if index % 4 == 3 else (node,)
        target = (torch.ops.aten.linear, torch.ops.aten.relu, torch.ops.aten.relu, torch.ops.aten.add)[index % 4]
        node.meta["val"] = value
        node = made.call_function(target.Tensor if target is torch.ops.aten.add else target.default, with_weight)
        skip = node if index % 4 == 3 else skip
    node.meta["val"] = value
    made.output(node)
    module = fx.GraphModule(root, made)
    start = time.perf_counter()
    regions = partition(module)
    assert time.perf_counter() - start < 2
    assert len(regions) == 1000
