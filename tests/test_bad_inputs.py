"""Every bad input of a command is one message that says what, where, what was found or is allowed, and what to do; exit status 2."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from torch import nn

from qdeploy.cli.main import main

SAMPLES = Path(__file__).resolve().parent.parent / "samples"

ZOO = """
    import torch
    from torch import nn

    def make(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    def other(): return nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 10))
    def broken(): return {}["nothing"]
    def number(): return 7

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 10)
        def forward(self, x):
            x = self.linear(x.flatten(1))
            if x.sum() > 0:
                x = -x
            return x

    class Empty(nn.Module):
        def forward(self, x): return x.flatten(1) * 2

    class Whole(Branch):
        def forward(self, x): return self.linear(x.flatten(1)).argmax(1)

    class Scalar(Branch):
        def forward(self, x, factor): return self.linear(x.flatten(1)) * factor

    def with_scalar(): return torch.export.export(Scalar(), (torch.zeros(2, 1, 8, 8), 2))
    def in_bfloat16(): return torch.export.export(make().bfloat16(), (torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16),))

    class Nine(Branch):
        def forward(self, x): return self.linear(x.reshape(9, 64))

    def of_nine(): return torch.export.export(Nine(), (torch.zeros(9, 1, 8, 8),))

    def images(): return torch.rand(8, 1, 8, 8)
    def nothing(): return None
    def no_items(): return []
    def raises_late():
        yield torch.zeros(1, 8, 8)
        raise RuntimeError("the\\ndisk is gone")
"""

RECIPES = {
    "broken": "[activation\n",
    "key": '[activaton]\nobserver = "mse"\n',
    "observer": '[activation]\nobserver = "percentil"\n',
    "option": '[activation]\nobserver = "percentile"\npercent = 99\n',
    "value": '[activation]\nobserver = "percentile"\npercentile = 12\n',
    "shape": 'activation = "mse"\n',
    "name": "name = 3\n",
}

BACKENDS = {
    "broken": "def (:\n",
    "raises": "raise RuntimeError('two\\nlines')\n",
    "empty": "import qdeploy\n",
}


class Local(nn.Module):
    """A module of this file, for a pickle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the bad files, and what goes with them."""
    place = tmp_path_factory.mktemp("bad")
    (place / "zoo.py").write_text(textwrap.dedent(ZOO))
    _make_models(place)
    _make_data(place)
    for name, text in RECIPES.items():
        (place / f"{name}.toml").write_text(text)
    for name, text in BACKENDS.items():
        (place / f"{name}_npu.py").write_text(text)
    (place / "file").write_text("something\n")
    (place / "full").mkdir()
    (place / "full" / "thesis.txt").touch()
    return place


@pytest.fixture(scope="module", autouse=True)
def _digits_loaded_once() -> Iterator[None]:
    """Most cases name the same good model."""
    load, loaded = torch.export.load, {}

    def cached(file: IO[bytes]) -> torch.export.ExportedProgram:
        content = file.read()
        if content not in loaded:
            loaded[content] = load(io.BytesIO(content))
        return loaded[content]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "load", cached)
        yield


def _make_models(place: Path) -> None:
    import onnx
    from safetensors.torch import save_file

    whole = (SAMPLES / "digits.pt2").read_bytes()
    (place / "cut.pt2").write_bytes(whole[: len(whole) // 2])
    (place / "empty.pt2").touch()
    (place / "text.pt2").write_text("a model of digits\n")
    torch.manual_seed(0)
    state = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)).state_dict()
    torch.save(state, place / "state.pt")
    (place / "cut_state.pt").write_bytes((place / "state.pt").read_bytes()[:-100])
    torch.save({f"{key}_": value for key, value in state.items()}, place / "keys.pt")
    save_file(state, place / "whole.safetensors")
    (place / "cut.safetensors").write_bytes((place / "whole.safetensors").read_bytes()[:-9])
    torch.save(Local(), place / "pickle.pt")
    sys.path.insert(0, str(place))
    try:
        (place / "gone_model.py").write_text("from torch import nn\nclass Gone(nn.Module): pass\n")
        import gone_model  # type: ignore[import-not-found]

        torch.save(gone_model.Gone(), place / "gone.pt")
    finally:
        sys.path.remove(str(place))
        sys.modules.pop("gone_model", None)
        (place / "gone_model.py").unlink()
    torch.jit.trace(nn.ReLU(), torch.zeros(1)).save(str(place / "script.pt"))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), place / "model.onnx")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4, 2, 3]) for name in "xy")
    lstm = onnx.helper.make_node("LSTM", ["x", "x", "x"], ["y"], name="memory", hidden_size=3)
    model = onnx.helper.make_model(onnx.helper.make_graph([lstm], "g", [x], [y]), opset_imports=[onnx.helper.make_opsetid("", 18)])
    onnx.save(model, place / "lstm.onnx")
    (place / "cut.onnx").write_bytes((place / "lstm.onnx").read_bytes()[:-30])
    (place / "saved").mkdir()
    pb = b"\x0a\x1c\x0a\x01x\x12\x0bPlaceholder\x2a\x0a\x0a\x05dtype\x12\x01\x00"
    (place / "saved" / "saved_model.pb").write_bytes(b"\x08\x01\x12" + pb)
    (place / "frozen.pb").write_bytes(pb)
    (place / "keras.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))


def _make_data(place: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    good = rng.random((8, 1, 8, 8), np.float32)
    arrays = {
        "good": good,
        "wrong_shape": good[:, :, :7],
        "flat": good.reshape(-1),
        "strings": np.array(["a", "b"]),
        "nan": np.where(np.arange(8).reshape(8, 1, 1, 1) == 3, np.float32("nan"), good),
        "inf": np.where(np.arange(8).reshape(8, 1, 1, 1) == 5, np.float32("inf"), good),
        "none": good[:0],
        "objects": np.array([{"a": 1}, None], dtype=object),
        "integers": (good * 10).astype(np.int64),
    }
    for name, array in arrays.items():
        np.save(place / f"{name}.npy", array, allow_pickle=True)
    np.savez(place / "keys.npz", pictures=good, masks=good)
    np.savez(place / "only_labels.npz", labels=np.arange(3))
    whole = (SAMPLES / "digits_calibration.npz").read_bytes()
    (place / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("photos", "mixed", "rgb"):
        (place / name).mkdir()
        for i in range(4):
            Image.new("L" if name != "rgb" else "RGB", (8, 8), 10 * i if name != "rgb" else (10 * i, 0, 0)).save(
                place / name / f"{i}.png"
            )
    (place / "mixed" / "2.png").write_bytes(b"not a picture")
    (place / "nothing").mkdir()
    (place / "papers").mkdir()
    (place / "papers" / "a.pdf").touch()
    np.save(place / "few.npy", np.arange(3))
    np.save(place / "many.npy", np.arange(500))
    np.save(place / "fractions.npy", np.full(8, 0.5))
    (place / "words.txt").write_text("1\ntwo\n3\n")


DIGITS = shlex.quote(str(SAMPLES / "digits.pt2"))
DATA = f"--data {shlex.quote(str(SAMPLES / 'digits_calibration.npz'))}"
NET = "{at}/zoo.py:make --data {at}/good.npy"
"""A smaller network than the digits', for what is found after the capture."""
STATE = f"{{at}}/state.pt {DATA}"
VERIFY_DATA = "--verify-data {at}/good.npy"

# name -> (the arguments after `quantize --backend snpe`, words of the message)
MODELS: dict[str, tuple[str, list[str]]] = {
    "missing model": (f"{{at}}/nowhere.pt2 {DATA}", ["no model file '{at}/nowhere.pt2'", "found: in '{at}': ", "check the path"]),
    "missing folder": (f"{{at}}/no/where.pt2 {DATA}", ["'{at}/no/where.pt2'", "no folder '{at}/no' either", "check the path"]),
    "folder as model": (f"{{at}}/photos {DATA}", ["'{at}/photos'", "found: a folder", "allowed: a file", "name a file in it"]),
    "empty file": (f"{{at}}/empty.pt2 {DATA}", ["'{at}/empty.pt2'", "an empty file (0 bytes)", "save the file again"]),
    "text file": (
        f"{{at}}/text.pt2 {DATA}",
        ["'{at}/text.pt2'", "a text file", "a .pt2 file of torch.export.save", "name a model file"],
    ),
    "python file": (f"{{at}}/zoo.py {DATA}", ["'{at}/zoo.py'", "a text file", "add the callable, as in zoo.py:make"]),
    "truncated pt2": (f"{{at}}/cut.pt2 {DATA}", ["'{at}/cut.pt2'", "truncated or damaged zip", "save the file again"]),
    "truncated zip": (f"{{at}}/cut_state.pt {DATA}", ["'{at}/cut_state.pt'", "truncated or damaged zip", "save the file again"]),
    "pickled module": (
        f"{{at}}/pickle.pt {DATA}",
        ["'{at}/pickle.pt'", "unpickling them runs code", "test_bad_inputs.Local", "pass --allow-pickle if you trust"],
    ),
    "pickle of a lost class": (
        f"{{at}}/gone.pt {DATA} --allow-pickle",
        ["'{at}/gone.pt'", "no module 'gone_model'", "run in the folder where it can be imported"],
    ),
    "state dict without arch": (
        STATE,
        ["'{at}/state.pt' is a state dict", "4 tensors, from '0.weight'", "pass --arch MODULE:CALLABLE"],
    ),
    "arch without colon": (
        f"{STATE} --arch {{at}}/zoo.py",
        ["--arch '{at}/zoo.py' names no callable", "allowed: MODULE:CALLABLE", "add ':' and the name"],
    ),
    "arch of a missing file": (
        f"{STATE} --arch {{at}}/zo.py:make",
        ["--arch: no file '{at}/zo.py'", "allowed: MODULE:CALLABLE", "check the path"],
    ),
    "arch of a missing module": (
        f"{STATE} --arch no_such_zoo:make",
        ["--arch: no module 'no_such_zoo'", "allowed: MODULE:CALLABLE", "install it"],
    ),
    "arch of a missing attribute": (
        f"{STATE} --arch {{at}}/zoo.py:mkae",
        ["--arch: '{at}/zoo.py' has no 'mkae'", "found: Branch", "did you mean 'make'?"],
    ),
    "arch raises": (
        f"{STATE} --arch {{at}}/zoo.py:broken",
        ["--arch: '{at}/zoo.py:broken' raised", "KeyError: 'nothing' ('{at}/zoo.py' line 7)", "mend the function"],
    ),
    "arch returns no module": (
        f"{STATE} --arch {{at}}/zoo.py:number",
        ["'{at}/zoo.py:number' returned no model", "builtins.int", "allowed: a torch.nn.Module", "return the model"],
    ),
    "arch with a whole model": (
        f"{DIGITS} {DATA} --arch {{at}}/zoo.py:make",
        ["--arch is only for a state dict", "digits.pt2' holds a whole model", "leave --arch out"],
    ),
    "weights of another model": (
        f"{STATE} --arch {{at}}/zoo.py:other",
        ["'{at}/state.pt'", "'0.weight' [4, 1, 3, 3] where the module has [5, 1, 3, 3]", "name the callable that builds"],
    ),
    "keys that do not match": (
        f"{{at}}/keys.pt {DATA} --arch {{at}}/zoo.py:make",
        ["'{at}/keys.pt'", "4 missing: 0.weight", "4 unexpected: 0.weight_", "(nearest: '0.weight_')"],
    ),
    "torchscript": (f"{{at}}/script.pt {DATA}", ["'{at}/script.pt'", "a TorchScript archive", "torch.export.save"]),
    "empty onnx": (f"{{at}}/model.onnx {DATA}", ["'{at}/model.onnx' returns nothing", "a graph without outputs"]),
    "damaged onnx": (f"{{at}}/cut.onnx {DATA}", ["cannot read '{at}/cut.onnx'", "a damaged ONNX file", "export the file again"]),
    "onnx with what is unknown": (
        f"{{at}}/lstm.onnx {DATA}",
        ["'{at}/lstm.onnx', node 'memory' (LSTM, domain ai.onnx, opset 18): recurrent layers", "Conv, ConvTranspose", "without them"],
    ),
    "saved model": (f"{{at}}/saved {DATA}", ["'{at}/saved'", "a TensorFlow SavedModel", "convert it"]),
    "frozen graph": (f"{{at}}/frozen.pb {DATA}", ["'{at}/frozen.pb'", "a TensorFlow GraphDef", "convert it"]),
    "keras": (f"{{at}}/keras.h5 {DATA}", ["'{at}/keras.h5'", "an HDF5 file, such as Keras writes", "convert it"]),
    "damaged safetensors": (
        f"{{at}}/cut.safetensors {DATA} --arch {{at}}/zoo.py:make",
        ["'{at}/cut.safetensors'", "a damaged safetensors file", "save the file again"],
    ),
    "npz as model": (
        f"{shlex.quote(str(SAMPLES / 'digits_test.npz'))} {DATA}",
        ["digits_test.npz'", "which is data", "give it as --data"],
    ),
    "callable that is missing": (f"{{at}}/zoo.py:mkae {DATA}", ["MODEL: '{at}/zoo.py' has no 'mkae'", "did you mean 'make'?"]),
    "branch on data": (
        "{at}/zoo.py:Branch --data {at}/good.npy",
        ["torch.export cannot capture", "{at}/zoo.py:16: if x.sum() > 0:", "torch.where"],
    ),
    "no layer": ("{at}/zoo.py:Empty --data {at}/good.npy", ["backend 'snpe' finds no layer to quantize", "ops: input, mul, reshape"]),
    "integer output": ("{at}/zoo.py:Whole --data {at}/good.npy", ["returns no floating-point tensor", "return the tensors"]),
    "input that is no tensor": ("{at}/zoo.py:with_scalar --data {at}/good.npy", ["error: "]),
    "model in bfloat16": ("{at}/zoo.py:in_bfloat16 --data {at}/good.npy", ["bfloat16 in 'input'", "call model.float()"]),
}

SAMPLES_OF: dict[str, tuple[str, list[str]]] = {
    "missing data": (f"{DIGITS} --data {{at}}/nowhere", ["no data file '{at}/nowhere'", "found: in '{at}'", "check the path"]),
    "missing data for a module": ("{at}/zoo.py:make --data {at}/nowhere", ["no data file '{at}/nowhere'", "check the path"]),
    "empty folder": (
        f"{DIGITS} --data {{at}}/nothing",
        ["no images in the folder '{at}/nothing'", "an empty folder", "allowed: .png, .jpg", "name another folder"],
    ),
    "folder without images": (
        f"{DIGITS} --data {{at}}/papers",
        ["'{at}/papers'", "1 files with .pdf", "allowed: .png, .jpg", "name another folder"],
    ),
    "corrupt image": (
        f"{DIGITS} --data {{at}}/mixed",
        ["cannot read the image '{at}/mixed/2.png'", "UnidentifiedImageError", "remove it or replace it"],
    ),
    "single image": (
        f"{DIGITS} --data {{at}}/photos/1.png",
        ["'{at}/photos/1.png'", "a single image", "name the folder that holds the images"],
    ),
    "text as data": (f"{DIGITS} --data {{at}}/file", ["'{at}/file'", "a text file", "an .npy or .npz file"]),
    "model as data": (f"{DIGITS} --data {DIGITS}", ["digits.pt2'", "a PyTorch model", "a folder of images"]),
    "wrong shape": (
        f"{DIGITS} --data {{at}}/wrong_shape.npy",
        ["'{at}/wrong_shape.npy'", "for input 'images'", "found: [8, 1, 7, 8] float32", "allowed: [N, 1, 8, 8]"],
    ),
    "wrong shape for a module": (
        "{at}/zoo.py:make --data {at}/wrong_shape.npy",
        ["cannot capture", "[144, 10]", "the shapes fit the batch"],
    ),
    "flat array for a module": (
        "{at}/zoo.py:make --data {at}/flat.npy",
        ["cannot capture", "4D (batched) input to conv2d", "the shapes fit the batch"],
    ),
    "strings": (
        f"{DIGITS} --data {{at}}/strings.npy",
        ["'{at}/strings.npy'", "wrong dtype for input 'images'", "found: <U1", "allowed: floats", "save the array as float32"],
    ),
    "strings for a module": (
        "{at}/zoo.py:make --data {at}/strings.npy",
        ["'{at}/strings.npy'", "wrong dtype", "found: <U1", "allowed: floats", "save numbers"],
    ),
    "integers": (
        f"{DIGITS} --data {{at}}/integers.npy",
        ["'{at}/integers.npy'", "found: int64", "allowed: floats", "save the array as float32"],
    ),
    "integers for a module": ("{at}/zoo.py:make --data {at}/integers.npy", ["cannot capture", "long int"]),
    "NaN": ("{at}/zoo.py:make --data {at}/nan.npy", ["sample 3 of '{at}/nan.npy' holds NaN or Inf", "input 'input'", "remove it"]),
    "infinity": ("{at}/zoo.py:make --data {at}/inf.npy", ["sample 5 of '{at}/inf.npy' holds NaN or Inf", "input 'input'", "remove it"]),
    "no samples": (f"{DIGITS} --data {{at}}/none.npy", ["'{at}/none.npy' holds no samples", "found: 0", "give at least one"]),
    "objects": (f"{DIGITS} --data {{at}}/objects.npy", ["'{at}/objects.npy'", "an array of Python objects", "numeric dtype"]),
    "truncated npz": (f"{DIGITS} --data {{at}}/cut.npz", ["'{at}/cut.npz'", "truncated or damaged", "save the file again"]),
    "unknown keys": (
        f"{DIGITS} --data {{at}}/keys.npz",
        ["'{at}/keys.npz'", "input 'images'", "the keys 'pictures', 'masks'", "one of images, x, data", "np.savez"],
    ),
    "only labels": (
        f"{DIGITS} --data {{at}}/only_labels.npz",
        ["'{at}/only_labels.npz'", "input 'images'", "none but labels", "np.savez"],
    ),
    "only labels for a module": (
        "{at}/zoo.py:make --data {at}/only_labels.npz",
        ["'{at}/only_labels.npz'", "found: labels only", "save the inputs"],
    ),
    "callable that raises": (
        f"{DIGITS} --data {{at}}/zoo.py:broken",
        ["--data: '{at}/zoo.py:broken' raised", "KeyError: 'nothing' ('{at}/zoo.py' line 7)", "mend the function"],
    ),
    "callable that raises late": (
        f"{DIGITS} --data {{at}}/zoo.py:raises_late",
        ["'{at}/zoo.py:raises_late'", "RuntimeError: the disk is gone ('{at}/zoo.py' line 42)", "mend it"],
    ),
    "callable that returns nothing": (
        f"{DIGITS} --data {{at}}/zoo.py:nothing",
        ["'{at}/zoo.py:nothing' returned no data", "NoneType", "allowed: arrays", "return one of these"],
    ),
    "callable that returns no items": (
        f"{DIGITS} --data {{at}}/zoo.py:no_items",
        ["'{at}/zoo.py:no_items' holds no samples", "give at least one"],
    ),
    "callable that is missing": (
        f"{DIGITS} --data {{at}}/zoo.py:image",
        ["--data: '{at}/zoo.py' has no 'image'", "did you mean 'images'?"],
    ),
    "mean of the wrong length": (
        f"{DIGITS} --data {{at}}/photos --mean 0.1,0.2,0.3",
        ["--mean has the wrong length", "3 numbers for images of 1 channel", "allowed: 1 number", "one for each channel"],
    ),
    "mean that is no number": (
        f"{DIGITS} --data {{at}}/photos --mean grey",
        ["--mean", "found: grey", "one number a channel", "0.5,0.5,0.5"],
    ),
    "mean for floats": (
        f"{DIGITS} --data {{at}}/good.npy --mean 0.5",
        ["--mean", "for 8-bit images", "float32 in '{at}/good.npy'", "leave --mean"],
    ),
    "std of zero": (f"{DIGITS} --data {{at}}/photos --std 0", ["--std is wrong", "found: (0.0,)", "numbers above 0"]),
    "resize that is no size": (f"{DIGITS} --data {{at}}/photos --resize 224", ["--resize", "found: 224;", "HEIGHTxWIDTH", "224x224"]),
    "resize in odd digits": (f"{DIGITS} --data {{at}}/photos --resize 8x²", ["--resize", "found: 8x²", "HEIGHTxWIDTH"]),
    "resize to another size": (
        f"{DIGITS} --data {{at}}/photos --resize 16x16",
        ["image size does not fit", "found: 16x16", "allowed: 8x8", "'images'", "leave it out"],
    ),
    "input shape that is none": (
        "{at}/zoo.py:make --data {at}/photos --input-shape 1,a,8",
        ["--input-shape", "found: 1,a,8", "batch first", "1,3,224,224"],
    ),
    "input shape of zero": (
        "{at}/zoo.py:make --data {at}/photos --input-shape 1,0,8,8",
        ["--input-shape", "found: 1,0,8,8", "whole numbers from 1"],
    ),
    "input shape of another model": (
        "{at}/zoo.py:make --data {at}/photos --input-shape 1,3,8,8",
        ["cannot capture", "to have 1 channels, but got 3", "the shapes fit the batch"],
    ),
    "two input shapes": (
        "{at}/zoo.py:make --data {at}/photos --input-shape 1,1,8,8 --input-shape 1,1,8,8",
        ["'{at}/photos'", "2 inputs: x0, x1", ".npz file with an array for each input"],
    ),
    "no input shape": ("{at}/zoo.py:make --data {at}/photos", ["input shape is not known", "give --input-shape, such as 1,3,224,224"]),
    "input shape of a pt2": (
        f"{DIGITS} {DATA} --input-shape 1,1,8,8",
        ["--input-shape is of no use here", "an exported program has its shapes", "leave it out"],
    ),
}

OPTIONS: dict[str, tuple[str, list[str]]] = {
    "unknown backend": (
        f"{DIGITS} {DATA} --backend snpee",
        ["unknown backend 'snpee'", "allowed: ", "onnxruntime, openvino, ", "sigmastar, snpe, ", "did you mean 'snpe'?"],
    ),
    "missing backend file": (f"{DIGITS} {DATA} --backend {{at}}/none_npu.py", ["'{at}/none_npu.py'", "name a Python file"]),
    "backend file that is no Python": (
        f"{DIGITS} {DATA} --backend {{at}}/broken_npu.py",
        ["'{at}/broken_npu.py'", "SyntaxError", "line 1", "mend the file"],
    ),
    "backend file that raises": (
        f"{DIGITS} {DATA} --backend {{at}}/raises_npu.py",
        ["'{at}/raises_npu.py'", "RuntimeError: two lines", "mend the file"],
    ),
    "backend file without a backend": (
        f"{DIGITS} {DATA} --backend {{at}}/empty_npu.py",
        ["'{at}/empty_npu.py' registers 0 backends", "exactly one", "register one"],
    ),
    "unknown recipe": (
        f"{DIGITS} {DATA} --recipe defualt",
        ["unknown recipe 'defualt'", "allowed: aciq, adaround, brecq", "did you mean 'default'?"],
    ),
    "missing recipe file": (f"{DIGITS} {DATA} --recipe {{at}}/none.toml", ["'{at}/none.toml'", "qdeploy recipes"]),
    "broken recipe": (f"{DIGITS} {DATA} --recipe {{at}}/broken.toml", ["'{at}/broken.toml' is not TOML", "line 1", "mend the file"]),
    "recipe with an unknown key": (
        f"{DIGITS} {DATA} --recipe {{at}}/key.toml",
        ["'{at}/key.toml'", "'activaton'", "allowed: activation", "did you mean 'activation'?"],
    ),
    "recipe with an unknown observer": (
        f"{DIGITS} {DATA} --recipe {{at}}/observer.toml",
        ["'{at}/observer.toml', [activation]", "'percentil'", "allowed: aciq, clipstd, ema", "did you mean 'percentile'?"],
    ),
    "recipe with an unknown option": (
        f"{DIGITS} {DATA} --recipe {{at}}/option.toml",
        ["'{at}/option.toml', [activation]", "'percent'", "allowed: percentile", "did you mean 'percentile'?"],
    ),
    "recipe with a wrong value": (
        f"{DIGITS} {DATA} --recipe {{at}}/value.toml",
        ["'{at}/value.toml', [activation]", "found: 12", "allowed: 50 < percentile <= 100"],
    ),
    "recipe without an observer": (
        f"{DIGITS} {DATA} --recipe {{at}}/shape.toml",
        ["'{at}/shape.toml': [activation]", "found: 'mse'", 'observer = "NAME"', "a line [activation]"],
    ),
    "recipe with a wrong name": (
        f"{DIGITS} {DATA} --recipe {{at}}/name.toml",
        ["'{at}/name.toml': name", "found: 3", "allowed: a string", "quotes"],
    ),
    "weight bits": (f"{NET} --weight-bits 3", ["backend 'snpe' has no 3-bit weights", "allowed: 8", "choose one"]),
    "activation bits": (
        f"{NET} --activation-bits 5",
        ["backend 'snpe' has no 5-bit activations", "allowed: 8", "choose one"],
    ),
    "widths of the second of two backends": (
        f"{NET} --backend qnn,snpe --activation-bits 16",
        ["backend 'snpe' has no 16-bit activations", "allowed: 8", "choose one"],
    ),
    "a backend named twice": (f"{DIGITS} {DATA} --backend snpe,tvm,snpe", ["backend 'snpe' is named twice", "name it once"]),
    "an empty name among backends": (f"{DIGITS} {DATA} --backend snpe,", ["unknown backend ''", "allowed: ", "snpe"]),
    "one unknown backend of two": (f"{DIGITS} {DATA} --backend tvm,snpee", ["unknown backend 'snpee'", "did you mean 'snpe'?"]),
    "a format that one backend of two has not": (
        f"{DIGITS} {DATA} --backend snpe,tvm --format 1.0.0",
        ["backend 'tvm' does not write format '1.0.0'", "allowed: qdq"],
    ),
    "a scheme where the target leaves no choice": (
        f"{DIGITS} {DATA} --weight-scheme int4",
        ["backend 'snpe' has no such weight scheme", "found: int4", "allowed: uint8 asymmetric per-tensor", "academic"],
    ),
    "a scheme that is none": (
        f"{DIGITS} {DATA} --backend academic --weight-scheme octal",
        ["weight scheme 'octal'", "'octal' is not one of int2..int16", "per-channel", "write it as"],
    ),
    "a scheme that contradicts itself": (
        f"{DIGITS} {DATA} --backend academic --weight-scheme 'int8 symmetric asymmetric'",
        ["weight scheme 'int8 symmetric asymmetric'", "the words contradict each other", "write it as"],
    ),
    "a scheme of one bit": (
        f"{DIGITS} {DATA} --backend academic --activation-scheme uint1",
        ["activation scheme 'uint1'", "1 bits are not in 2..16", "write it as"],
    ),
    "channels of activations": (
        f"{DIGITS} {DATA} --backend academic --activation-scheme 'int8 per-channel'",
        ["activation scheme", "found: per-channel", "allowed: per-tensor", "for weights only"],
    ),
    "a width that the grid has not": (
        f"{NET} --backend academic --weight-scheme float16 --weight-bits 4",
        ["backend 'academic' has no 4-bit weights", "allowed: 16;", "choose one"],
    ),
    "a width of activations that the grid has not": (
        f"{NET} --backend academic --activation-scheme log8 --activation-bits 4",
        ["backend 'academic' has no 4-bit activations", "allowed: 8;", "choose one"],
    ),
    "first and last bits": (
        f"{NET} --first-last-bits 7",
        ["backend 'snpe' has no 7-bit weights", "allowed: 8", "choose one"],
    ),
    "format of a backend without": (
        f"{DIGITS} {DATA} --backend tvm --format 1.0.0",
        ["backend 'tvm'", "'1.0.0'", "allowed: qdq", "leave --format out"],
    ),
    "unknown format": (f"{DIGITS} {DATA} --format 2.0", ["backend 'snpe'", "'2.0'", "allowed: 1.0.0, 0.6.1", "leave --format out"]),
    "unknown runtime": (
        f"{DIGITS} {DATA} --runtime onnxruntme",
        ["unknown runtime 'onnxruntme'", "allowed: ", "onnxruntime, openvino", "did you mean 'onnxruntime'?"],
    ),
    "unknown variant": (
        f"{DIGITS} {DATA} --runtime onnxruntime:al",
        ["runtime 'onnxruntime': 'al'", "allowed: all, faithful, none", "did you mean 'all'?"],
    ),
    "variant that is empty": (f"{DIGITS} {DATA} --runtime onnxruntime:", ["runtime 'onnxruntime': ''", "allowed: all, faithful, none"]),
    "no samples": (f"{DIGITS} {DATA} --samples 0", ["--samples", "found: 0", "allowed: 1 or more"]),
    "negative seed": (f"{DIGITS} {DATA} --seed -1", ["--seed", "found: -1", "allowed: 0 to"]),
    "huge seed": (f"{DIGITS} {DATA} --seed 99999999999999999999999", ["--seed", "found: 99999999999999999999999", "allowed: 0 to"]),
    "out is a file": (
        f"{DIGITS} {DATA} --out {{at}}/file",
        ["cannot write to '{at}/file'", "found: a file", "name a new folder with --out"],
    ),
    "out is in use": (
        f"{DIGITS} {DATA} --out {{at}}/full",
        ["cannot write to '{at}/full'", "a folder with other files", "name a new folder with --out"],
    ),
    "out is below a file": (
        f"{DIGITS} {DATA} --out {{at}}/file/out",
        ["'{at}/file/out'", "'{at}/file' is not a writable folder", "name another folder"],
    ),
    "labels without their samples": (
        f"{DIGITS} {DATA} --labels {{at}}/few.npy",
        ["--labels go with --verify-data", "name the samples"],
    ),
    "missing labels": (f"{DIGITS} {DATA} {VERIFY_DATA} --labels {{at}}/no.npy", ["no labels file '{at}/no.npy'", "check the path"]),
    "too few labels": (
        f"{DIGITS} {DATA} {VERIFY_DATA} --labels {{at}}/few.npy",
        ["{at}/few.npy", "3 labels for 8 samples", "allowed: 8", "one for each sample"],
    ),
    "too many labels": (
        f"{DIGITS} {DATA} {VERIFY_DATA} --labels {{at}}/many.npy",
        ["{at}/many.npy", "500 labels for 8 samples", "allowed: 8", "one for each sample"],
    ),
    "fractions as labels": (
        f"{DIGITS} {DATA} {VERIFY_DATA} --labels {{at}}/fractions.npy",
        ["{at}/fractions.npy", "[8] float64", "integers [N]", "give class numbers"],
    ),
    "words as labels": (
        f"{DIGITS} {DATA} {VERIFY_DATA} --labels {{at}}/words.txt",
        ["'{at}/words.txt' line 2", "'two'", "one integer on each line", "mend the line"],
    ),
    "missing data to verify with": (
        f"{DIGITS} {DATA} --verify-data {{at}}/nowhere.npy",
        ["no data file '{at}/nowhere.npy'", "check the path"],
    ),
}

QUANTIZE = {
    f"{part}: {name}": case
    for part, cases in (("model", MODELS), ("data", SAMPLES_OF), ("option", OPTIONS))
    for name, case in cases.items()
}
ACTION_ELSEWHERE = ("model: no layer", "option: recipe with a wrong value")  # what is found or allowed says it all


def split(given: str, **places: Path) -> list[str]:
    """The arguments of a command line, in which the path of a place may have blanks."""
    return [word.format(**places) for word in shlex.split(given)]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """Exit status, standard output and standard error of the command line."""
    monkeypatch.setattr(sys, "argv", ["qdeploy", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    capfd.readouterr()
    status: object = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    shown = capfd.readouterr()
    return status, shown.out, shown.err


def check_message(shown: tuple[object, str, str], words: list[str], action: bool = True) -> None:
    """Exit status 2 and one line of the form that every error has, and nothing else."""
    status, out, err = shown
    assert (status, out) == (2, ""), err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err
    assert not [word for word in words if word not in err], err
    assert not action or "; to do: " in err, err


def content(place: Path) -> dict[Path, bytes]:
    """Every file and folder below `place`, but what Python compiles."""
    paths = [path for path in place.rglob("*") if "__pycache__" not in path.parts]
    return {path: path.read_bytes() if path.is_file() else b"" for path in paths}


# a program's input that is no tensor fails in qdeploy.capture.inputs.program_inputs


@pytest.mark.parametrize("name", QUANTIZE)
def test_quantize(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    given, words = QUANTIZE[name]
    options = ["--backend", "snpe", "--recipe", "fast", "--runtime", "onnxruntime", "--json", "--out", str(tmp_path / "place" / "out")]
    (tmp_path / "place").mkdir()
    before = content(folder)
    shown = run(["quantize", *options, *split(given, at=folder)], monkeypatch, capfd)
    check_message(shown, [word.format(at=folder) for word in words], action=name not in ACTION_ELSEWHERE)
    assert not list((tmp_path / "place").iterdir())
    assert content(folder) == before


@pytest.fixture(scope="module")
def artifact(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network for images of the digits' size, quantized."""
    import qdeploy
    from qdeploy.files.model import load_model

    images = torch.from_numpy(np.load(folder / "good.npy"))
    prepared = qdeploy.prepare(load_model(f"{folder}/zoo.py:make"), images, backend="onnxruntime", recipe="fast")
    return qdeploy.convert(qdeploy.calibrate(prepared, [images]), tmp_path_factory.mktemp("artifact") / "out").path


def _edit(name: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda out: (out / name).write_text(change((out / name).read_text()))


def _append(out: Path) -> None:
    (out / "model.onnx").write_bytes((out / "model.onnx").read_bytes() + b"\0")


# name -> (what is done to the folder, arguments after `verify OUT`, words of the message)
VERIFY: dict[str, tuple[Callable[[Path], object], str, list[str]]] = {
    "missing folder": (shutil.rmtree, "", ["'{out}' does not exist", "name a folder with qdeploy.json"]),
    "folder without manifest": (lambda out: (out / "qdeploy.json").unlink(), "", ["'{out}' is no artifact", "qdeploy quantize"]),
    "file in place of a folder": (lambda out: (shutil.rmtree(out), out.touch()), "", ["'{out}'", "name a folder with qdeploy.json"]),
    "changed file": (_append, "", ["'{out}/model.onnx' was changed", "quantize the model again"]),
    "missing file": (lambda out: (out / "reference.npz").unlink(), "", ["'{out}/reference.npz' is missing", "again"]),
    "broken JSON": (_edit("qdeploy.json", lambda text: text[:99]), "", ["'{out}/qdeploy.json' is no manifest", "found: ", "again"]),
    "JSON of another kind": (_edit("qdeploy.json", lambda text: "[1]"), "", ["'{out}/qdeploy.json' is no manifest", "again"]),
    "empty JSON": (_edit("qdeploy.json", lambda text: "{}"), "", ["'{out}/qdeploy.json' is no manifest", "found: KeyError: 'schema'"]),
    "other schema": (
        _edit("qdeploy.json", lambda text: text.replace('"schema": 3', '"schema": 99')),
        "",
        ["'{out}/qdeploy.json' has another schema", "found: 99", "allowed: 3", "use the qdeploy that wrote it"],
    ),
    "missing data": (bool, "--data {at}/nowhere.npz", ["no data file '{at}/nowhere.npz'", "check the path"]),
    "wrong shape": (bool, "--data {at}/wrong_shape.npy", ["'{at}/wrong_shape.npy'", "found: [8, 1, 7, 8]", "allowed: [N, 1, 8, 8]"]),
    "NaN": (bool, "--data {at}/nan.npy", ["sample 3 of '{at}/nan.npy' holds NaN or Inf"]),
    "labels without their samples": (bool, "--labels {at}/few.npy", ["--labels go with --data", "name the samples"]),
    "too few labels": (bool, "--data {at}/good.npy --labels {at}/few.npy", ["{at}/few.npy", "3 labels for 8 samples"]),
    "unknown runtime": (bool, "--runtime tmv", ["unknown runtime 'tmv'", "allowed: ", "onnxruntime, openvino", "did you mean 'tvm'?"]),
}


@pytest.mark.parametrize("name", VERIFY)
def test_verify(
    name: str, folder: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    change, given, words = VERIFY[name]
    out = tmp_path / "out"
    shutil.copytree(artifact, out)
    change(out)
    before = content(tmp_path)
    shown = run(["verify", str(out), "--json", *split(given, at=folder)], monkeypatch, capfd)
    check_message(shown, [word.format(at=folder, out=out) for word in words])
    assert content(tmp_path) == before


OTHERS = {
    "inspect of an unknown backend": (f"inspect {DIGITS} --backend tensort", ["unknown backend 'tensort'", "did you mean 'tensorrt'?"]),
    "inspect of a missing model": ("inspect nowhere.pt2 --backend snpe", ["no model file 'nowhere.pt2'", "check the path"]),
    "inspect of a module without shapes": ("inspect {at}/zoo.py:make --backend snpe", ["input shape is not known", "--input-shape"]),
    "inspect of strings": ("inspect {at}/zoo.py:make --backend snpe --data {at}/strings.npy", ["'{at}/strings.npy'", "found: <U1"]),
    "unknown backend": ("backends snep", ["unknown backend 'snep'", "did you mean 'snpe'?"]),
    "unknown recipe": ("recipes defalt", ["unknown recipe 'defalt'", "did you mean 'default'?"]),
    "unknown runtime": ("runtimes qnn", ["unknown runtime 'qnn'", "allowed: ", "onnxruntime, openvino, qnn_htp"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_commands(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    given, words = OTHERS[name]
    check_message(run([*split(given, at=folder), "--json"], monkeypatch, capfd), [word.format(at=folder) for word in words])


def test_runtime_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from qdeploy.runtimes.runtime import Runtime

    monkeypatch.setattr(Runtime, "installed", lambda self: False)
    given = f"quantize {DIGITS} {DATA} --backend snpe --runtime tvm --out {{out}}"
    shown = run(split(given, out=tmp_path / "out"), monkeypatch, capfd)
    check_message(shown, ["runtime 'tvm' is not installed", "pip install apache-tvm"])
    assert not list(tmp_path.iterdir())


def test_out_below_a_folder_that_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    # who runs this may be root, who may write anywhere
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode == os.W_OK and Path(path).name == "locked"))
    out = tmp_path / "locked" / "deeper" / "out"
    shown = run(split(f"quantize {DIGITS} {DATA} --backend snpe --out {{out}}", out=out), monkeypatch, capfd)
    check_message(shown, [f"cannot write to '{out}'", f"'{tmp_path / 'locked'}' is not a writable folder", "name another folder"])
    assert not list((tmp_path / "locked").iterdir())


def test_fewer_samples_than_a_fixed_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    given = "quantize {at}/zoo.py:of_nine --data {at}/good.npy --backend snpe --recipe fast --out {out}"
    shown = run(split(given, at=folder, out=tmp_path / "out"), monkeypatch, capfd)
    check_message(shown, ["fewer samples than the model's fixed batch", "found: 8 samples", "allowed: 9 or more", "give more"])
    assert not list(tmp_path.iterdir())


REAL = [
    (
        "quantize {at}/zoo.py:Branch --backend snpe --data {at}/good.npy --out {out}",
        ["{at}/zoo.py:16: if x.sum() > 0:", "torch.where"],
    ),
    (
        "quantize {at}/zoo.py:make --backend snpe --data {at}/wrong_shape.npy --out {out}",
        ["cannot capture", "the shapes fit the batch"],
    ),
    ("verify {at}/photos", ["'{at}/photos' is no artifact"]),
    ("quantize {at}/nowhere.pt2 --backend snpe --data {at}/good.npy --out {out}", ["'{at}/nowhere.pt2'", "check the path"]),
]


def test_real_process(folder: Path, tmp_path: Path) -> None:
    """One process for all, since torch takes seconds to import: only the last command ends it."""
    commands = [split(given, at=folder, out=tmp_path / "out") for given, _ in REAL]
    code = f"""
import sys
from qdeploy.cli.main import main
for command in {commands!r}:
    sys.argv = ["qdeploy", *command]
    try:
        main()
    except SystemExit as end:
        if command == {commands[-1]!r}:
            raise
        print(end.code, flush=True)
        print("next", file=sys.stderr, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["2"] * (len(REAL) - 1) and done.returncode == 2, done.stderr
    messages = done.stderr.split("next\n")
    for (_, words), message in zip(REAL, messages, strict=True):
        check_message((2, "", message), [word.format(at=folder) for word in words])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("quantize", "Missing argument"),
        (f"quantize {DIGITS}", "Missing option '--backend'"),
        (f"quantize {DIGITS} --backend snpe --wieght-bits 8", "No such option: --wieght-bits"),
        (f"quantize {DIGITS} --backend snpe --samples many", "'--samples'"),
        ("qantize", "No such command 'qantize'"),
    ],
)
def test_usage(given: str, word: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(split(given), monkeypatch, capfd)
    assert (status, out) == (2, "")
    assert word in err and "Usage: " in err and "Traceback" not in err
