"""`load_model`: what each kind of file gives, and that every other is refused with what, where and what to do."""

from __future__ import annotations

import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from qdeploy.core.errors import InputError, NotInstalledError, OptionError, QDeployError
from qdeploy.files.model import load_callable, load_model

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
ZOO = """
    import torch
    from torch import nn

    def make():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()

    def other(): return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Conv1d(5, 2, 1, bias=False))
    def broken(): return 1 / 0
    def needs(width): return nn.Linear(width, 1)
    def leaves(): raise SystemExit(3)
    def no_model(): return 7
    def a_class(): return nn.ReLU
    def scripted(): return torch.jit.trace(nn.ReLU(), torch.zeros(1))
    def program(): return torch.export.export(nn.ReLU(), (torch.zeros(1),))
    class Holder:
        make = staticmethod(lambda: nn.ReLU())
    number = 3
"""


class Net(nn.Module):
    """A module of this file, for pickles."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.fixture
def zoo(tmp_path: Path) -> str:
    path = tmp_path / "zoo.py"
    path.write_text(textwrap.dedent(ZOO))
    return str(path)


def refused(kind: type[QDeployError], *words: str, **arguments: object) -> str:
    """The message of a refusal by `load_model`: of this very class, one line, with all these words."""
    with pytest.raises(QDeployError) as caught:
        load_model(**arguments)  # type: ignore[arg-type]
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert "\n" not in message
    assert not [word for word in words if word not in message], message
    assert "to do: " in message
    return message


def repack(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    """Copy a zip archive, with each part's bytes changed; None drops the part."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)


def test_pt2_by_content(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"  # the suffix lies
    path.write_bytes((SAMPLES / "digits.pt2").read_bytes())
    program = load_model(path)
    assert isinstance(program, torch.export.ExportedProgram)
    test = np.load(SAMPLES / "digits_test.npz")
    refused(OptionError, "only of an ONNX file a part can be taken", "logits", path=f"{path}:logits")
    logits = program.module()(torch.from_numpy(test["images"]))
    assert (logits.argmax(1).numpy() == test["labels"]).mean() >= 0.975


def test_onnx_by_content(tmp_path: Path, zoo: str) -> None:
    path = tmp_path / "model.pt2"  # the suffix lies
    model = load_model(f"{zoo}:make")
    assert isinstance(model, nn.Module)
    torch.onnx.export(model, (torch.ones(2, 3),), str(path), opset_version=18, dynamo=True, verbose=False, external_data=False)
    program = load_model(path)
    assert isinstance(program, torch.export.ExportedProgram)
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    torch.testing.assert_close(next(iter(program.module()(x).values())), model(x))
    refused(OptionError, "--arch is only for a state dict", path=path, arch=f"{zoo}:make")


@pytest.mark.parametrize("name", ["digits.pt2", "digits_calibration.npz", "digits_test.npz"])
def test_samples_are_small_and_name_no_path(name: str) -> None:
    assert (SAMPLES / name).stat().st_size < 300_000
    with zipfile.ZipFile(SAMPLES / name) as archive:
        content = b"".join(archive.read(part) for part in archive.namelist())
    assert not [word for word in (b"/work", b"/root", b"/home", b"site-packages", b".py") if word in content]


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module prefix", "legacy", "half"])
def test_state_dict(tmp_path: Path, zoo: str, wrap: str) -> None:
    source = load_model(f"{zoo}:make")
    assert isinstance(source, nn.Module)
    state = {key: value + 1 for key, value in source.state_dict().items()}
    content = {
        "plain": state,
        "legacy": state,
        "state_dict": {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
        "model": {"model": state},
        "module prefix": {f"module.{key}": value for key, value in state.items()},
        "half": {key: value.half() for key, value in state.items()},
    }[wrap]
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=wrap != "legacy")
    model = load_model(tmp_path / "w.pt", arch=f"{zoo}:make")
    assert isinstance(model, nn.Module)
    assert not model.training
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-3, atol=1e-3)


def test_safetensors(tmp_path: Path, zoo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    state = {key: value * 2 for key, value in load_model(f"{zoo}:make").state_dict().items()}  # type: ignore[union-attr]
    path = tmp_path / "w.bin"
    save_file(state, path)
    model = load_model(path, arch=f"{zoo}:make")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())  # type: ignore[union-attr]
    refused(OptionError, str(path), "state dict", "--arch MODULE:CALLABLE", path=path)
    path.write_bytes(path.read_bytes()[:-5])
    refused(InputError, str(path), "damaged safetensors", "again", path=path, arch=f"{zoo}:make")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    refused(NotInstalledError, str(path), "pip install safetensors", path=path, arch=f"{zoo}:make")


def test_state_dict_that_does_not_fit(tmp_path: Path, zoo: str) -> None:
    path = tmp_path / "w.pt"
    torch.save(load_model(f"{zoo}:make").state_dict(), path)  # type: ignore[union-attr]
    refused(OptionError, f"'{path}' is a state dict", "'0.weight'", "--arch MODULE:CALLABLE", path=path)
    words = [str(path), f"{zoo}:other", "'0.weight' [4, 3] where the module has [5, 3]", "callable that builds"]
    refused(InputError, *words, path=path, arch=f"{zoo}:other")
    state = torch.load(path)
    state["0.wieght"] = state.pop("0.weight")
    torch.save(state, path)
    words = ["1 missing: 0.weight (nearest: '0.wieght')", "1 unexpected: 0.wieght (nearest: '0.weight')"]
    refused(InputError, *words, path=path, arch=f"{zoo}:make")


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_module(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "m.pt"
    module = Net().train()
    torch.save(module, path, _use_new_zipfile_serialization=not legacy)
    words = [str(path), "unpickling them runs code", "Net", "--allow-pickle", "torch.export.save"]
    refused(InputError, *words, path=path)
    refused(InputError, *words, path=path, arch="zoo.py:make")
    loaded = load_model(path, allow_pickle=True)
    assert isinstance(loaded, Net)
    assert not loaded.training
    assert torch.equal(loaded.layer.weight, module.layer.weight)
    refused(OptionError, str(path), "--arch", "leave --arch out", path=path, arch="zoo.py:make", allow_pickle=True)
    torch.save({"epoch": 1, "model": module}, path)
    assert isinstance(load_model(path, allow_pickle=True), Net)


def test_unimportable_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone_zoo.py").write_text("from torch import nn\nclass Net(nn.Module): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import gone_zoo  # type: ignore[import-not-found]

    path = tmp_path / "m.pt"
    torch.save(gone_zoo.Net(), path)
    del gone_zoo.Net
    words = [str(path), "run in the folder", "--arch"]
    refused(InputError, "'Net' in module 'gone_zoo'", *words, path=path, allow_pickle=True)
    monkeypatch.undo()
    monkeypatch.delitem(sys.modules, "gone_zoo")
    refused(InputError, "module 'gone_zoo'", *words, path=path, allow_pickle=True)
    monkeypatch.chdir(tmp_path)  # where it can be imported
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert type(load_model(path, allow_pickle=True)).__name__ == "Net"
    monkeypatch.delitem(sys.modules, "gone_zoo")


def test_model_from_callable(zoo: str, tmp_path: Path) -> None:
    model = load_model(f"{zoo}:make")
    assert isinstance(model, nn.Sequential)
    assert not model.training
    assert isinstance(load_model(f"{zoo}:Holder.make"), nn.ReLU)
    assert isinstance(load_model(f"{zoo}:program"), torch.export.ExportedProgram)
    assert isinstance(load_model("torch.nn:ReLU"), nn.ReLU)
    refused(OptionError, "--arch", zoo, "leave --arch out", path=f"{zoo}:make", arch="zoo.py:make")
    assert load_callable("math:sqrt", "--arch")(4) == 2


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("{zoo}:mkae", OptionError, ["mkae", "did you mean 'make'?"]),
        ("{zoo}:number", OptionError, ["not callable", "int"]),
        ("{zoo}:broken", InputError, ["ZeroDivisionError: division by zero", "zoo.py' line 10"]),
        ("{zoo}:needs", InputError, ["missing 1 required positional argument: 'width'", "default values"]),
        ("{zoo}:leaves", InputError, ["SystemExit: 3"]),
        ("{zoo}:no_model", OptionError, ["builtins.int", "torch.nn.Module"]),
        ("{zoo}:a_class", OptionError, ["call the class"]),
        ("{zoo}:scripted", OptionError, ["TopLevelTracedModule", "torch.nn.Module"]),
        ("{zoo}", OptionError, ["names no callable", "MODULE:CALLABLE"]),
        ("{zoo}:", OptionError, ["names no callable", "MODULE:CALLABLE"]),
        ("{folder}/none.py:make", OptionError, ["no file", "none.py"]),
        ("no_such_module:make", OptionError, ["no module 'no_such_module'", ".py file"]),
        ("torch.no_such:make", OptionError, ["no module 'torch.no_such'"]),
        ("{folder}/bad.py:make", InputError, ["SyntaxError", "bad.py"]),
        ("{folder}/lacks.py:make", InputError, ["No module named 'no_such_package'", "lacks.py' line 2", "install"]),
    ],
)
def test_bad_arch(tmp_path: Path, zoo: str, name: str, kind: type[QDeployError], words: list[str]) -> None:
    (tmp_path / "bad.py").write_text("def make(:\n")
    (tmp_path / "lacks.py").write_text("import os\nimport no_such_package\n")
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    refused(kind, "--arch", *words, path=tmp_path / "w.pt", arch=name.format(zoo=zoo, folder=tmp_path))


FOREIGN = {
    "tflite": (b"\x1c\x00\x00\x00TFL3" + bytes(20), "TensorFlow Lite"),
    "pb": (b"\x0a\x1c\x0a\x01x\x12\x0bPlaceholder\x2a\x0a\x0a\x05dtype\x12\x01\x00", "GraphDef"),
    "h5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
    "text": (b"hello\n", "a text file"),
    "py": (b"def make(): ...\n", "zoo.py:make"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "noise": (bytes(range(255, 100, -1)), "in no format"),
    "short": (b"\x00", "in no format"),
    "half pickle": (b"\x80\x02}q\x00(X\x10\x00", "damaged"),
    "empty": (b"", "empty file (0 bytes)"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files(tmp_path: Path, name: str) -> None:
    content, words = FOREIGN[name]
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    refused(InputError, str(path), words, path=path)
    if name not in ("empty", "half pickle"):
        refused(InputError, str(path), words, path=path, allow_pickle=True, arch="zoo.py:make")


def test_real_torchscript_and_arrays(tmp_path: Path) -> None:
    torch.jit.trace(nn.ReLU(), torch.zeros(1)).save(str(tmp_path / "m"))
    refused(InputError, "TorchScript", "torch.export.save", path=tmp_path / "m", allow_pickle=True)
    np.savez(tmp_path / "m.npz", a=np.zeros(2))
    refused(InputError, "m.npz", "--data", path=tmp_path / "m.npz")
    np.save(tmp_path / "m.npy", np.zeros(2))
    refused(InputError, "m.npy", "--data", path=tmp_path / "m.npy")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (["config.json", "metadata.json", "model.weights.h5"], "Keras"),
        (["readme.txt"], "zip archive that torch did not write"),
        ([], "zip archive that torch did not write"),
        (["m/data/aotinductor/model/a.so", "m/archive_format"], "AOTInductor"),
    ],
)
def test_foreign_zips(tmp_path: Path, parts: list[str], words: str) -> None:
    with zipfile.ZipFile(tmp_path / "m", "w") as archive:
        for part in parts:
            archive.writestr(part, "{}")
    refused(InputError, words, str(tmp_path / "m"), path=tmp_path / "m")


def test_module_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo_of_here.py").write_text(textwrap.dedent(ZOO))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_model("zoo_of_here:make"), nn.Sequential)
    monkeypatch.delitem(sys.modules, "zoo_of_here")


def test_folders_and_missing_files(tmp_path: Path) -> None:
    refused(InputError, "a folder", "name a file", path=tmp_path)
    (tmp_path / "qdeploy.json").touch()
    refused(InputError, "finished artifact", path=tmp_path)
    (tmp_path / "saved_model.pb").touch()
    refused(InputError, "SavedModel", path=tmp_path)
    refused(InputError, f"no model file '{tmp_path / 'm.pt'}'", "qdeploy.json", path=tmp_path / "m.pt")
    refused(InputError, "no model file", path="x" * 5000)
    refused(InputError, "no folder", path=tmp_path / "none" / "m.pt")


@pytest.mark.parametrize("source", ["pt2", "state", "legacy"])
def test_every_truncation_is_refused(tmp_path: Path, zoo: str, source: str) -> None:
    whole = tmp_path / "whole"
    if source == "pt2":
        whole = SAMPLES / "digits.pt2"
    else:
        torch.save({"a": torch.zeros(50)}, whole, _use_new_zipfile_serialization=source == "state")
    content = whole.read_bytes()
    path = tmp_path / "cut"
    for length in {1, 3, 4, 10, 100, len(content) // 2, len(content) - 30, len(content) - 1}:
        path.write_bytes(content[:length])
        for allow in (False, True):
            refused(InputError, str(path), path=path, arch=None if source == "pt2" else f"{zoo}:make", allow_pickle=allow)


def test_flipped_bit_is_refused(tmp_path: Path) -> None:
    content = bytearray((SAMPLES / "digits.pt2").read_bytes())
    at = content.find(b"weight_12FB") + 200
    content[at] ^= 1
    (tmp_path / "m.pt2").write_bytes(content)
    refused(InputError, "m.pt2", "checksum", path=tmp_path / "m.pt2")


@pytest.mark.parametrize("content", [torch.zeros(2), {"a": 1}, {}, [torch.zeros(1)], {"state_dict": {"x": "y"}}])
def test_no_model_inside(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "m.pt")
    refused(InputError, "holds no model", "m.pt", "torch.export.save", path=tmp_path / "m.pt", arch="zoo.py:make")
