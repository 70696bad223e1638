"""`.pt2` files: ordinary ones load, code hidden in them does not run, and other versions are refused in words."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_files_model import SAMPLES, refused, repack
from torch import nn

from qdeploy.core.errors import InputError
from qdeploy.files.model import load_model
from qdeploy.files.pt2 import is_guard, is_shape_expression


class Bomb:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "pickle4", "pt2 inputs", "pt2 constants"])
def test_no_code_runs_without_leave(tmp_path: Path, form: str) -> None:
    path, sign = tmp_path / "m.pt", tmp_path / "ran"
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(Bomb(sign), protocol=4 if form == "pickle4" else 2))
    elif form.startswith("pt2"):
        buffer = io.BytesIO()
        torch.save(((Bomb(sign),), {}), buffer)
        config = {"config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}}}

        def change(name: str, data: bytes) -> bytes:
            if form == "pt2 inputs" and "sample_inputs" in name:
                return buffer.getvalue()
            return json.dumps(config).encode() if form == "pt2 constants" and "model_constants" in name else data

        repack(SAMPLES / "digits.pt2", path, change)
    else:
        torch.save({"state_dict": Bomb(sign)}, path, _use_new_zipfile_serialization=form == "zip")
    refused(InputError, str(path), "run", "--allow-pickle", path=path)
    assert not sign.exists()


def test_pt2_with_code_in_its_graph(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    for old, new in [
        (b"Symbol('", b"print('ran') or Symbol('"),
        (b"torch.ops.aten.relu.default", b"torch.os.system"),
        (b'"guards_code": []', b'"guards_code": ["__import__(\'os\')"]'),
    ]:
        repack(SAMPLES / "digits.pt2", path, lambda _, data, old=old, new=new: data.replace(old, new))  # type: ignore[misc]
        refused(InputError, str(path), "could run code", "models/model.json", "--allow-pickle", path=path)


def test_ordinary_shapes_pass_the_screen() -> None:
    assert is_shape_expression("TruncToInt(Mul(Float('0.5', precision=53), ToFloat(Symbol('s27', positive=True, integer=True))))")
    assert is_shape_expression("2*s0 + Max(1, s1//2)")
    for bad in ("open('x')", "Add('print(1)', 2)", "Symbol('a').name", "Add(Mul('1'), 2)", "(", "[1 for x in s]", "lambda: 1"):
        assert not is_shape_expression(bad), bad
    assert is_guard("math.trunc(0.5*torch.sym_float(L['x'].size()[1])) >= 2")
    assert is_guard("(4*L['x'].size()[1]) != (4*max(1, L['x'].size()[1] // 2))")
    for bad in ("open('x')", "torch.os.system('x')", "L['x'].__class__", "math.__loader__", "eval('1')", "L['x'].size.im_self"):
        assert not is_guard(bad), bad


def test_program_with_two_dynamic_dimensions_loads(tmp_path: Path) -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[1] > 8:
                x = x + 1
            return nn.functional.interpolate(x[:, None], scale_factor=0.5).sum() * x.shape[1]

    dynamic = ({0: torch.export.Dim("batch"), 1: torch.export.Dim.AUTO},)
    program = torch.export.export(Half(), (torch.zeros(2, 16, 4),), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "m.pt2")
    assert isinstance(load_model(tmp_path / "m.pt2"), torch.export.ExportedProgram)


def test_pt2_of_another_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.pt2"
    repack(
        SAMPLES / "digits.pt2",
        path,
        lambda _, data: data.replace(b'"schema_version": {"major": 8', b'"schema_version": {"major": 99'),
    )
    words = [str(path), "major=99", torch.__version__, "export the model again"]
    refused(InputError, *words, path=path)
    repack(SAMPLES / "digits.pt2", path, lambda name, data: b"7" if name.endswith("archive_version") else data)
    refused(InputError, str(path), "archive version 7", "export the model again", path=path)
    repack(SAMPLES / "digits.pt2", path, lambda name, data: None if "weight_3" in name else data)
    refused(InputError, str(path), "export the model again", path=path)
    assert not caplog.records
