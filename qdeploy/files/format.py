"""What a file holds, told from its first bytes and never from its suffix. Reads no pickle and imports no torch.

>>> kind_of_head(b"\\x93NUMPY\\x01\\x00")
'npy'
>>> kind_of_head(b"def make():\\n")
'text'
"""

from __future__ import annotations

import zipfile
from pathlib import Path

from qdeploy.core.errors import InputError, one_line

MODEL_FILES = (
    "a .pt2 file of torch.export.save, an ONNX file, a state dict with --arch, a pickled module with --allow-pickle, or MODULE:CALLABLE"
)
EXPORT = "load the model in PyTorch and save it with torch.export.save(torch.export.export(model, example_inputs), 'model.pt2')"
COPY_AGAIN = "copy or save the file again"

_HEAD = 512
_ONNX_FIELDS = frozenset({0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72})  # the fields of ModelProto that may come second

# kind -> (what it is, what to do); the kinds that are no model which qdeploy reads
_REFUSED = {
    "torchscript": ("a TorchScript archive", EXPORT.replace("load", "build", 1)),
    "aotinductor": ("an AOTInductor package, compiled code without a graph", "save with torch.export.save instead"),
    "savedmodel": ("a TensorFlow SavedModel", f"qdeploy reads PyTorch models: convert it, then {EXPORT}"),
    "tensorflow": ("a TensorFlow GraphDef or SavedModel file", f"qdeploy reads PyTorch models: convert it, then {EXPORT}"),
    "hdf5": ("an HDF5 file, such as Keras writes", f"qdeploy reads PyTorch models: convert it, then {EXPORT}"),
    "keras": ("a Keras archive", f"qdeploy reads PyTorch models: convert it, then {EXPORT}"),
    "tflite": ("a TensorFlow Lite file", f"qdeploy reads PyTorch models: find the model it was made from, then {EXPORT}"),
    "npz": ("an .npz archive of NumPy arrays, which is data", "give it as --data, and name a model file"),
    "npy": ("an .npy file, a NumPy array, which is data", "give it as --data, and name a model file"),
    "text": ("a text file", "name a model file; for a Python file add the callable, as in zoo.py:make"),
    "lfs": ("a Git LFS pointer, not the file itself", "run `git lfs pull` and try again"),
    "zip": ("a zip archive that torch did not write", "name a model file"),
    "unknown": ("in no format that qdeploy knows", "name a model file"),
}


def model_kind(path: Path) -> str:
    """`pt2`, `onnx`, `torch_zip`, `torch_legacy` or `safetensors`: how the model file at `path` is to be read.

    Raises `InputError` for everything else: what is missing, empty, damaged, or of another framework.
    """
    kind = file_kind(path, "model")
    if kind in _REFUSED:
        what, action = _REFUSED[kind]
        raise InputError(f"cannot read the model '{path}'", found=what, allowed=MODEL_FILES, action=action)
    return kind


def describe_kind(kind: str) -> str:
    """Words for a kind of file.

    >>> describe_kind("torch_zip"), describe_kind("hdf5")
    ('a PyTorch model or pickle file', 'an HDF5 file, such as Keras writes')
    """
    if kind == "onnx":
        return "an ONNX file"
    return _REFUSED[kind][0] if kind in _REFUSED else "a PyTorch model or pickle file"


def file_kind(path: Path, role: str) -> str:
    """The kind of the file at `path`, which the messages call the `role` file. A folder is an error, unless a SavedModel."""
    try:
        folder = path.is_dir()
    except OSError as error:  # a name that no file can have
        raise InputError(f"no {role} file '{path}'", found=error.strerror, action="check the path") from error
    if folder:
        if (path / "saved_model.pb").is_file():
            return "savedmodel"
        action = "name a file in it"
        if (path / "qdeploy.json").is_file():
            action = "this folder is a finished artifact: name the model it was made from"
        raise InputError(f"cannot read the {role} '{path}'", found="a folder", allowed="a file", action=action)
    if not path.exists():
        raise InputError(f"no {role} file '{path}'", found=_nearby(path), action="check the path")
    head = read_head(path, role)
    if not head:
        raise InputError(f"cannot read the {role} '{path}'", found="an empty file (0 bytes)", action=COPY_AGAIN)
    kind = kind_of_head(head)
    if kind == "unknown" and _is_safetensors(head, path.stat().st_size):
        return "safetensors"
    return _zip_kind(path, role) if kind == "zip" else kind


def read_head(path: Path, role: str) -> bytes:
    """The first bytes of a file."""
    try:
        with path.open("rb") as file:
            return file.read(_HEAD)
    except OSError as error:
        raise InputError(f"cannot open the {role} '{path}'", found=error.strerror, action="check its permissions") from error


def kind_of_head(head: bytes) -> str:
    """The kind of a file with these first bytes, as far as they tell; `unknown` where they do not."""
    magics = {b"PK\x03\x04": "zip", b"PK\x05\x06": "zip", b"\x93NUMPY": "npy", b"\x89HDF\r\n\x1a\n": "hdf5"}
    magics |= {b"version https://git-lfs": "lfs", b"\x08\x01\x12": "tensorflow"}
    for magic, kind in magics.items():
        if head.startswith(magic):
            return kind
    if head[4:8] == b"TFL3":
        return "tflite"
    if len(head) > 1 and head[0] == 0x80 and 1 <= head[1] <= 5:
        return "torch_legacy"
    if len(head) > 2 and head[0] == 0x08 and 1 < head[1] < 0x40 and head[2] in _ONNX_FIELDS:
        return "onnx"
    if head[0] == 0x0A and head.find(b"\x0a", 1, 6) > 0 and b"\x12" in head and not _is_text(head):
        return "tensorflow"
    return "text" if _is_text(head) else "unknown"


def _zip_kind(path: Path, role: str) -> str:
    """The kind of a zip archive, by its names. Its checksums are tested; those of a program are when its parts are read."""
    try:
        with zipfile.ZipFile(path) as archive:
            kind = _kind_of_names(archive.namelist())
            bad = None if kind == "pt2" else archive.testzip()
    except Exception as error:  # zipfile raises many kinds for damaged archives
        found = f"a truncated or damaged zip archive ({one_line(error)})"
        raise InputError(f"cannot read the {role} '{path}'", found=found, action=COPY_AGAIN) from error
    if bad is not None:
        raise InputError(f"cannot read the {role} '{path}'", found=f"a wrong checksum of its part '{bad}'", action=COPY_AGAIN)
    return kind


def _kind_of_names(names: list[str]) -> str:
    inner = {name.partition("/")[2] for name in names}  # torch puts everything under one folder
    if any(name.startswith("data/aotinductor/") for name in inner):
        return "aotinductor"
    if "serialized_exported_program.json" in names or any(_is_program(name) for name in inner):
        return "pt2"
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return "torchscript"
    if "data.pkl" in inner:
        return "torch_zip"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    return "keras" if {"config.json", "model.weights.h5"} & set(names) else "zip"


def _is_program(name: str) -> bool:
    return name == "archive_format" or (name.startswith("models/") and name.endswith(".json"))


def _is_safetensors(head: bytes, size: int) -> bool:
    """A safetensors file starts with the length of its JSON header, as 8 little-endian bytes."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def _is_text(head: bytes) -> bool:
    if b"\0" in head:
        return False
    for cut in range(4):  # the last character may be cut short
        try:
            return all(c.isprintable() or c.isspace() for c in head[: len(head) - cut].decode())
        except UnicodeDecodeError:
            continue
    return False


def _nearby(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"no folder '{parent}' either"
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    return f"in '{parent}': {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}"
