"""All processes of a test run share the artifacts that `networks` makes."""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networks
import pytest
import torch

# a shell starts what it puts in the background with interrupts ignored, and what is ignored here is ignored in our children
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))


@pytest.fixture(scope="session", autouse=True)
def shared_artifacts(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.getbasetemp()
    networks.FOLDER = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "artifacts"
    networks.FOLDER.mkdir(exist_ok=True)


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole files that tools/fuzz.py damages, in a process that is warm after it has made them."""
    import fuzz

    folder, before = tmp_path_factory.mktemp("samples"), sys.argv
    fuzz.make_samples(folder)
    sys.argv = before
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from threads, and lose much where other tests run beside them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def one_table_of_onnx_functions() -> Iterator[None]:
    """torch reads its 500 translations to ONNX and lists its composite ops anew in every export: half the time of a small one."""
    try:  # parts of torch that another release may not have: then every export takes its time
        from torch._export import utils
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        materialize, read = cache(utils._materialize_cpp_cia_ops), cache(ONNXRegistry.from_torchlib)
    except (ImportError, AttributeError):
        yield
        return

    def from_torchlib(**options: int) -> ONNXRegistry:
        registry = copy.copy(read(**options))
        registry.functions = {op: list(found) for op, found in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
        patch.setattr(utils, "_materialize_cpp_cia_ops", materialize)
        yield
