"""Where a runtime parts: the tensor with the fault is named, on every grid, from the artifact's folder alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import qdeploy
from qdeploy.core.errors import ArtifactError, InputError, OptionError
from qdeploy.export.artifact import Artifact
from qdeploy.runtimes.runtime import Session, runtimes
from qdeploy.verification.debug import divergence
from qdeploy.verification.session import LITERAL

GRIDS = ("snpe", "openvino", "vitis", "nnie", "adreno_fp16", "ppl_w8a16", "mnn")
"""Integers with and without zero points, powers of two, logarithms, halves, wide codes, and tensors of which some stay float."""


def replaced(monkeypatch: pytest.MonkeyPatch, opened: Callable[[Path, int, str], Session]) -> None:
    """Open files as `opened` does in ONNX Runtime, but in the variant that stands for the simulation."""
    runtime = runtimes["onnxruntime"]

    def chosen(path: Path, batch: int, variant: str) -> Session:
        return runtime.open(path, batch, variant) if variant == LITERAL else opened(path, batch, LITERAL)

    monkeypatch.setitem(runtimes._values, "onnxruntime", replace(runtime, open=chosen))


def with_weights_of(layer: str, factor: float) -> Callable[[Path, int, str], Session]:
    """Files in which one layer's weights have another scale."""
    runtime = runtimes["onnxruntime"]

    def opened(path: Path, batch: int, variant: str) -> Session:
        model = onnx.load(path)
        scales = [node.input[1] for node in model.graph.node if node.name == f"{layer}.weight_DequantizeLinear"]
        for tensor in model.graph.initializer:
            if tensor.name in scales:
                tensor.CopyFrom(numpy_helper.from_array(np.asarray(numpy_helper.to_array(tensor) * np.float32(factor)), tensor.name))
        onnx.save(model, path)
        return runtime.open(path, batch, variant)

    return opened


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("backend", GRIDS)
def test_nothing_parts_where_the_file_is_run_as_it_says(backend: str, isolate: bool) -> None:
    artifact = networks.artifact("mixed", backend)
    found = divergence(artifact, "onnxruntime:none", isolate=isolate)
    quantized = {e.tensor for e in artifact.encodings if e.role == "activation"}
    shown = {one.tensor for one in found.tensors}
    assert found.first is None and not any(one.failure for one in found.tensors)
    assert found.samples == 32 and all(one.values for one in found.tensors)
    assert shown <= quantized | set(artifact.outputs) and len(shown) >= 5
    if not isolate:
        assert quantized | set(artifact.outputs) == shown, "every activation and every output has a row"


@pytest.mark.parametrize("isolate", [False, True])
def test_the_first_tensor_that_parts_is_that_of_the_layer_with_the_fault(isolate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, with_weights_of("conv2", 1.3))
    found = divergence(networks.artifact("residual", "snpe"), "onnxruntime:all", isolate=isolate)
    assert found.runtime == "onnxruntime:all" and found.isolated is isolate
    assert found.first is not None and found.first.tensor == "conv2" and "Conv" in found.first.op
    assert found.first.differ > 0.1 and found.first.largest > 1
    parted = [one.tensor for one in found.tensors if one.differ]
    assert parted == ["conv2"] if isolate else len(parted) > 3, "what follows differs because its input does"
    assert found.to_json()["first"] == "conv2"


def test_an_output_that_stays_float_is_compared_in_steps_of_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, with_weights_of("fc", 1.3))
    *_, last = divergence(networks.artifact("plain", "openvino"), "onnxruntime:all").tensors
    assert (last.tensor, last.scheme) == ("fc", "float") and last.differ > 0.1 and last.largest > 5


def test_other_samples_are_compared_in_pieces_and_all_inputs_are_given() -> None:
    data = networks.batches("several", seed=9, count=1, batch=40)
    found = divergence(networks.artifact("several", "snpe"), "onnxruntime:none", [tensor.numpy() for tensor in data[0]])
    assert found.samples == 32 and found.first is None, "what does not fill a piece of 16 is left out"


class Sequence(nn.Module):
    """A layer for each position of a sequence of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x)))


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("runtime", ["onnxruntime:none", "openvino:literal"])
def test_open_sizes_are_those_of_the_samples(runtime: str, isolate: bool, tmp_path: Path) -> None:
    if not runtimes[runtime.split(":")[0]].installed():
        pytest.skip(f"runtime '{runtime}' is not installed")
    torch.manual_seed(0)
    x = torch.randn(8, 5, 4)
    prepared = qdeploy.prepare(Sequence().eval(), x, "snpe", recipe="plain", dynamic={"x": {1: "length"}})
    artifact = qdeploy.convert(qdeploy.calibrate(prepared, [x]), tmp_path / "out")
    found = divergence(artifact, runtime, [torch.randn(8, 9, 4).numpy()], isolate)
    assert found.first is None and len(found.tensors) >= 2 and not any(one.failure for one in found.tensors), found


def test_a_fixed_batch_is_kept_and_too_few_samples_are_refused(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x * torch.roll(x, 1, 0))

    torch.manual_seed(2)
    x = torch.randn(3, 4)
    program = torch.export.export(Fixed().eval(), (x,))
    artifact = qdeploy.convert(qdeploy.calibrate(qdeploy.prepare(program, None, "snpe", recipe="fast"), [x, -x]), tmp_path / "out")
    assert divergence(artifact, "onnxruntime:none", [np.repeat(x.numpy(), 3, 0)[:8]]).samples == 6
    with pytest.raises(InputError, match="fewer samples than the model's fixed batch; found: 2"):
        divergence(artifact, "onnxruntime:none", [x.numpy()[:2]])


def test_a_runtime_that_shows_no_tensor_inside_is_refused() -> None:
    if not runtimes["mnn"].installed():
        pytest.skip("runtime 'mnn' is not installed")
    with pytest.raises(OptionError, match=r"'mnn' makes its model from the float file .* allowed: onnxruntime, openvino"):
        divergence(networks.artifact("plain", "mnn"), "mnn")


def test_a_runtime_that_cannot_run_with_more_outputs_says_so_and_its_ops_alone_are_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    literal = runtimes["onnxruntime"].open

    def opened(path: Path, batch: int, variant: str) -> Any:
        model = onnx.load(path)
        if len(model.graph.output) > 1 or any(node.op_type == "Gemm" for node in model.graph.node):
            raise RuntimeError("too many\noutputs")
        return literal(path, batch, variant)

    replaced(monkeypatch, opened)
    artifact: Artifact = networks.artifact("plain", "snpe")
    with pytest.raises(
        ArtifactError, match=r"cannot run the file with all tensors as outputs; found: RuntimeError: too many outputs; .*--isolate"
    ):
        divergence(artifact, "onnxruntime:all")
    found = divergence(artifact, "onnxruntime:all", isolate=True)
    assert [one.tensor for one in found.tensors if one.failure] == ["fc"] and found.first is None
    assert found.tensors[-1].failure == "could not run: RuntimeError: too many outputs"


def test_an_unknown_runtime_or_variant_is_named() -> None:
    artifact = networks.artifact("plain", "snpe")
    with pytest.raises(OptionError, match="did you mean 'onnxruntime'"):
        divergence(artifact, "onnxruntim")
    with pytest.raises(OptionError, match="unknown variant of runtime 'onnxruntime': 'al'"):
        divergence(artifact, "onnxruntime:al")
