"""The promise on real pretrained networks, where they are at hand: a folder `shared` beside the checkout with `models/zoo.py`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import qdeploy
from qdeploy.backend import backends
from qdeploy.runtimes import runtimes

ZOO = Path(__file__).resolve().parent.parent.parent / "shared" / "models" / "zoo.py"
IMAGES = 1000
PER_CHANNEL = [b.name for b in backends if b.weight.axis is not None]
CASES = [("resnet20", name) for name in backends.names()] + [("mobilenetv2", name) for name in PER_CHANNEL]


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    if not ZOO.is_file():
        pytest.skip("the pretrained networks are not beside the checkout")
    sys.path.insert(0, str(ZOO.parent))
    return importlib.import_module("zoo")


@pytest.mark.parametrize(("network", "backend"), CASES)
def test_eight_bits_keep_the_accuracy_and_onnxruntime_computes_the_simulation(
    zoo: ModuleType, network: str, backend: str, tmp_path: Path
) -> None:
    images, _ = zoo.data("train")
    prepared = qdeploy.prepare(zoo.load(network), images[:2], backend)
    qdeploy.calibrate(prepared, torch.split(images[:: len(images) // 512][:512], 32))
    artifact = qdeploy.convert(prepared, tmp_path / "out")
    images, labels = (t[:IMAGES] for t in zoo.data("val"))
    report = qdeploy.verify(artifact, torch.split(images, 50), "onnxruntime", labels, simulation=prepared)
    floating, simulated, *ran = report.results
    assert floating.accuracy is not None and simulated.accuracy is not None
    # 0.5 points on 4000 images; on 1000 of them chance alone moves it by as much
    assert floating.accuracy - simulated.accuracy <= 0.01
    assert report.passed, report
    if backends[backend].bias == "int32":
        assert [row.sqnr for row in ran] == [999.0, 999.0], "not every output has the bits of the simulation"


@pytest.mark.parametrize("runtime", [r.name for r in runtimes if r.name not in ("onnxruntime", "qnn_htp")])
def test_other_runtimes_agree_with_the_simulation_of_a_residual_network(zoo: ModuleType, runtime: str, tmp_path: Path) -> None:
    if not runtimes[runtime].installed():
        pytest.skip(f"runtime '{runtime}' is not installed")
    images, _ = zoo.data("train")
    prepared = qdeploy.prepare(zoo.load("resnet20"), images[:2], "openvino", "fast")
    qdeploy.calibrate(prepared, torch.split(images[:256], 32))
    artifact = qdeploy.convert(prepared, tmp_path / "out")
    report = qdeploy.verify(artifact, torch.split(zoo.data("val")[0][:500], 50), runtime, simulation=prepared)
    assert report.passed, report
