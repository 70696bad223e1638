"""All processes of a test run share the artifacts that `networks` makes."""

from __future__ import annotations

import os
import signal

import networks
import pytest
import torch

# a shell starts what it puts in the background with interrupts ignored, and what is ignored here is ignored in our children
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def shared_artifacts(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.getbasetemp()
    networks.FOLDER = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "artifacts"
    networks.FOLDER.mkdir(exist_ok=True)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from threads, and lose much where other tests run beside them."""
    torch.set_num_threads(1)
