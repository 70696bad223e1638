"""The pages on targets: targets.md is what the registry says, and the NPU of add_a_target.md works as printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import networks
import pytest

import qdeploy
from qdeploy.core.backend import backends

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))


def npu() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add_a_target.md").read_text(), re.DOTALL)
    return code


def test_the_page_of_targets_is_what_the_registry_says() -> None:
    import list_targets

    assert list_targets.PAGE.read_text() == list_targets.page(), "run python tools/list_targets.py"


@pytest.mark.parametrize("name", backends.names())
def test_every_target_says_where_its_facts_are_from(name: str) -> None:
    assert backends[name].sources and all(backends[name].sources)


def test_the_npu_of_the_page_is_short() -> None:
    assert len(npu().splitlines()) < 40


def test_the_npu_of_the_page_quantizes_and_its_simulation_is_what_the_file_computes(tmp_path: Path) -> None:
    (tmp_path / "my_npu.py").write_text(npu())
    data = networks.batches("residual")
    artifact = qdeploy.quantize(networks.network("residual"), data, str(tmp_path / "my_npu.py"), tmp_path / "out", recipe="plain")
    report = artifact.manifest["verify"]
    assert report["passed"] and {row["agreement"] for row in report["results"][1:]} == {1.0}
    scales = dict(line.split(maxsplit=1) for line in (artifact.path / "acme.scales").read_text().splitlines())
    assert list(scales) == [e.tensor for e in artifact.encodings]
    bits = {e.tensor: e.spec.bits for e in artifact.encodings if e.role == "weight"}
    assert bits == {"stem.weight": 6, "conv1.weight": 6, "conv2.weight": 6, "conv3.weight": 8, "conv4.weight": 6, "fc.weight": 8}
    assert "acme" not in backends, "a user's own file registers nothing for good"
