"""The promise on real pretrained networks, where they are at hand: a folder `shared` beside the checkout with `models/zoo.py`."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import networks
import pytest
import torch

import qdeploy
from qdeploy.core.backend import backends
from qdeploy.runtimes.runtime import runtimes
from qdeploy.simulation.prepared import Prepared

ZOO = Path(__file__).resolve().parent.parent.parent / "shared" / "models" / "zoo.py"
IMAGES = {"resnet20": 1000, "mobilenetv2": 400}
TARGETS = {"resnet20": backends.names(), "mobilenetv2": tuple(b.name for b in backends if b.weight.axis is not None)}
FAST = ("onnxruntime", "openvino", "vitis")
"""Three that differ much, which are tried fast on the first network: integers alone, floats between layers, and powers of two as a
DPU rounds them.
"""


def is_fast(network: str, backend: str) -> bool:
    return network == "resnet20" and backend in FAST


CASES = [
    pytest.param(network, name, marks=() if is_fast(network, name) else pytest.mark.slow)
    for network, names in TARGETS.items()
    for name in names
]


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    if not ZOO.is_file():
        pytest.skip("the pretrained networks are not beside the checkout")
    sys.path.insert(0, str(ZOO.parent))
    return importlib.import_module("zoo")


@cache
def together(network: str, fast: bool) -> dict[str, Prepared]:
    """The network for its fast backends or all others, from one pass over the data: 256 images, or twice as many."""
    zoo = importlib.import_module("zoo")
    count = 256 if fast else 512
    images, _ = zoo.data("train")
    data = [(batch,) for batch in torch.split(images[:: len(images) // count][:count], 32)]
    return networks.several(zoo.load(network), data, [name for name in TARGETS[network] if is_fast(network, name) == fast])


def calibrated(network: str, backend: str) -> Prepared:
    return together(network, is_fast(network, backend))[backend]


def exact(prepared: Prepared) -> bool:
    """Whether every runtime rounds alike: integers of at most 8 bits with no tie among them, and no float bias."""
    return prepared.plan.tie_free and prepared.backend.bias != "float" and prepared.backend.activation.bits <= 8


@pytest.mark.parametrize(("network", "backend"), CASES)
def test_the_accuracy_is_kept_and_onnxruntime_computes_the_simulation(
    zoo: ModuleType, network: str, backend: str, tmp_path: Path
) -> None:
    prepared = calibrated(network, backend)
    artifact = qdeploy.convert(prepared, tmp_path / "out")
    count = IMAGES[network] // (2 if is_fast(network, backend) else 1)
    images, labels = (t[:count] for t in zoo.data("val"))
    report = qdeploy.verify(artifact, torch.split(images, 50), "onnxruntime", labels, simulation=prepared)
    floating, simulated, *ran = report.results
    assert floating.accuracy is not None and simulated.accuracy is not None
    # 0.5 points on 4000 images; on 1000 of them chance alone moves it by as much
    assert round((floating.accuracy - simulated.accuracy) * count) <= 0.01 * count
    assert report.passed, report
    if exact(prepared):
        assert [row.sqnr for row in ran] == [999.0, 999.0], "not every output has the bits of the simulation"


OTHERS = [r.name for r in runtimes if r.name not in ("onnxruntime", "qnn_htp", "ncnn", "mnn")]


@pytest.mark.parametrize("runtime", [pytest.param(name, marks=pytest.mark.slow if name == "tvm" else ()) for name in OTHERS])
def test_other_runtimes_agree_with_the_simulation_of_a_residual_network(zoo: ModuleType, runtime: str, tmp_path: Path) -> None:
    if not runtimes[runtime].installed():
        pytest.skip(f"runtime '{runtime}' is not installed")
    prepared = calibrated("resnet20", "openvino")
    artifact = qdeploy.convert(prepared, tmp_path / "out")
    report = qdeploy.verify(artifact, torch.split(zoo.data("val")[0][:500], 50), runtime, simulation=prepared)
    assert report.passed, report
