"""The promise on real pretrained networks, where they are at hand: a folder `shared` beside the checkout with `models/zoo.py`."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import networks
import pytest
import torch

import qdeploy
from qdeploy.core.backend import backends
from qdeploy.runtimes.runtime import runtimes
from qdeploy.simulation.prepared import Prepared

ZOO = Path(__file__).resolve().parent.parent.parent / "shared" / "models" / "zoo.py"
IMAGES = {"resnet20": 1000, "mobilenetv2": 400}
PER_CHANNEL = tuple(b.name for b in backends if b.weight.axis is not None)
CASES = [("resnet20", name) for name in backends.names()] + [
    ("mobilenetv2", name) if name in networks.distinct() else pytest.param("mobilenetv2", name, marks=pytest.mark.slow)
    for name in PER_CHANNEL
]


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    if not ZOO.is_file():
        pytest.skip("the pretrained networks are not beside the checkout")
    sys.path.insert(0, str(ZOO.parent))
    return importlib.import_module("zoo")


@cache
def calibrated(network: str) -> dict[str, Prepared]:
    """The network for all its backends, from one pass over 512 images."""
    zoo = importlib.import_module("zoo")
    images, _ = zoo.data("train")
    data = [(batch,) for batch in torch.split(images[:: len(images) // 512][:512], 32)]
    return networks.several(zoo.load(network), data, [name for case, name in map(values, CASES) if case == network])


def values(case: Any) -> tuple[str, str]:
    """Network and backend of a case."""
    return case if isinstance(case, tuple) and not hasattr(case, "values") else case.values


def exact(prepared: Prepared) -> bool:
    """Whether every runtime rounds alike: integers of at most 8 bits with no tie among them, and no float bias."""
    return prepared.plan.tie_free and prepared.backend.bias != "float" and prepared.backend.activation.bits <= 8


@pytest.mark.parametrize(("network", "backend"), CASES)
def test_the_accuracy_is_kept_and_onnxruntime_computes_the_simulation(
    zoo: ModuleType, network: str, backend: str, tmp_path: Path
) -> None:
    prepared = calibrated(network)[backend]
    artifact = qdeploy.convert(prepared, tmp_path / "out")
    images, labels = (t[: IMAGES[network]] for t in zoo.data("val"))
    report = qdeploy.verify(artifact, torch.split(images, 50), "onnxruntime", labels, simulation=prepared)
    floating, simulated, *ran = report.results
    assert floating.accuracy is not None and simulated.accuracy is not None
    # 0.5 points on 4000 images; on 1000 of them chance alone moves it by as much
    assert round((floating.accuracy - simulated.accuracy) * IMAGES[network]) <= 0.01 * IMAGES[network]
    assert report.passed, report
    if exact(prepared):
        assert [row.sqnr for row in ran] == [999.0, 999.0], "not every output has the bits of the simulation"


@pytest.mark.parametrize("runtime", [r.name for r in runtimes if r.name not in ("onnxruntime", "qnn_htp", "ncnn", "mnn")])
def test_other_runtimes_agree_with_the_simulation_of_a_residual_network(zoo: ModuleType, runtime: str, tmp_path: Path) -> None:
    if not runtimes[runtime].installed():
        pytest.skip(f"runtime '{runtime}' is not installed")
    images, _ = zoo.data("train")
    prepared = qdeploy.prepare(zoo.load("resnet20"), images[:2], "openvino", "fast")
    qdeploy.calibrate(prepared, torch.split(images[:256], 32))
    artifact = qdeploy.convert(prepared, tmp_path / "out")
    report = qdeploy.verify(artifact, torch.split(zoo.data("val")[0][:500], 50), runtime, simulation=prepared)
    assert report.passed, report
