"""The emitted folder: one object writes it and reads it back.

    model.onnx       what the target's toolchain reads
    <scale files>    the target's own format
    model.sim.onnx   the same numerics in standard ONNX, where model.onnx alone does not quantize
    reference.npz    inputs, float outputs and simulated outputs of some calibration samples, for `verify`
    qdeploy.json     the manifest: backend, recipe, seed, versions, every encoding, the hashes of all files, verify's results

The folder is written beside its place and renamed into it, so that it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.core.errors import ArtifactError, InputError
from qdeploy.core.spec import Encoding

SCHEMA = 1
MANIFEST = "qdeploy.json"
MODEL = "model.onnx"
SIMULATION = "model.sim.onnx"
REFERENCE = "reference.npz"
_SYSTEM = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
"""What systems put into folders that somebody looks at."""
_NEEDED = ("runtimes", "float_bytes", "inputs", "outputs", "tie_free", "planned", "encodings")
"""What `verify` reads from a manifest."""

Arrays = dict[str, NDArray[Any]]


class Artifact:
    """A written artifact at `path`. `manifest` is the content of qdeploy.json."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read the folder at `path`; `ArtifactError` unless every file is there and has the hash of the manifest."""
        path = Path(path)
        file = path / MANIFEST
        if not file.is_file():
            what = "is no artifact" if path.exists() else "does not exist"
            raise ArtifactError(f"'{path}' {what}", action=f"name a folder with {MANIFEST}, written by qdeploy quantize")
        try:
            manifest = json.loads(file.read_text())
            schema = manifest["schema"]
            files = dict(manifest["files"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"'{file}' is no manifest", found=str(error), action="quantize the model again") from error
        if schema != SCHEMA:
            raise ArtifactError(f"'{file}' has another schema", found=schema, allowed=SCHEMA, action="use the qdeploy that wrote it")
        for name, digest in files.items():
            if not (path / name).is_file():
                raise ArtifactError(f"'{path / name}' is missing", action="quantize the model again")
            if sha256((path / name).read_bytes()) != digest:
                raise ArtifactError(f"'{path / name}' was changed after it was written", action="quantize the model again")
        return cls(path, manifest)

    def check_whole(self) -> None:
        """`ArtifactError` unless the manifest has all that `verify` reads."""
        missing = [key for key in _NEEDED if key not in self.manifest]
        missing += [name for name in (MODEL, REFERENCE) if name not in self.manifest["files"]]
        if missing:
            what = f"'{self.path / MANIFEST}' is no whole manifest"
            raise ArtifactError(what, found=f"without {', '.join(missing)}", action="quantize the model again")

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        """Every encoding, as it was emitted."""
        return tuple(Encoding.from_json(entry) for entry in self.manifest["encodings"])

    @property
    def model(self) -> Path:
        """The file for the target's toolchain."""
        return self.path / MODEL

    @property
    def simulation(self) -> Path:
        """The ONNX file that quantizes: model.sim.onnx where there is one."""
        return self.path / (SIMULATION if SIMULATION in self.manifest["files"] else MODEL)

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """Name, shape (None for a dimension that may vary) and dtype of every model input."""
        return list(self.manifest["inputs"])

    @property
    def outputs(self) -> list[str]:
        """Names of the model outputs."""
        return list(self.manifest["outputs"])

    def reference(self) -> Arrays:
        """The saved samples: `input.<name>`, `float.<output>`, `simulated.<output>`."""
        with np.load(self.path / REFERENCE) as file:
            return dict(file)

    def record(self, key: str, value: object) -> None:
        """Put a result into the manifest; the file is replaced at once or not at all."""
        self.manifest[key] = value
        temporary = self.path / f".{MANIFEST}.{os.getpid()}"
        temporary.write_text(render(self.manifest))
        temporary.replace(self.path / MANIFEST)


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A place beside `out` to write an artifact to; it becomes `out` at the end of the block, and vanishes if that raises."""
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        fresh = Path(folder) / out.name
        yield fresh
        old = Path(folder) / "replaced"
        if out.exists():
            out.rename(old)
        try:
            fresh.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise


def write(out: Path, files: Mapping[str, bytes], manifest: Mapping[str, Any]) -> Artifact:
    """Write an artifact folder at `out`, replacing an artifact that stands there; see `check_free`."""
    whole = dict(manifest) | {"files": {name: sha256(data) for name, data in sorted(files.items())}}
    with staged(out) as fresh:
        fresh.mkdir()
        for name, data in files.items():
            (fresh / name).write_bytes(data)
        (fresh / MANIFEST).write_text(render(whole))
    return Artifact(out, json.loads(render(whole)))


def check_free(out: Path) -> None:
    """`InputError` where `out` is something that qdeploy did not write, or holds something besides: to write replaces the folder."""
    if out.exists() and not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        kind = "a folder with other files" if out.is_dir() else "a file"
        raise InputError(f"cannot write to '{out}'", found=kind, action="name a new folder with --out")
    foreign = _foreign(out)
    if foreign:
        found = f"{', '.join(map(repr, foreign[:5]))}{' and more' if len(foreign) > 5 else ''}, which qdeploy did not write so"
        raise InputError(f"cannot write to '{out}'", found=found, action="move them out of the folder, or name a new one with --out")
    if out.is_symlink() or out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"cannot write to '{out}'", found="a link, or the folder at work", action="name a new folder with --out")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"cannot write to '{out}'", found=f"'{parent}' is not a writable folder", action="name another folder")


def _foreign(out: Path) -> list[str]:
    """What lies in an artifact's folder besides the files of its manifest, as they were written; nothing where there is no manifest."""
    if not (out / MANIFEST).is_file():
        return []
    try:
        written = dict(json.loads((out / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        written = {}
    ours = re.compile(rf"{re.escape(MANIFEST)}|\.{re.escape(MANIFEST)}\.\d+")
    kept = []
    for path in sorted(out.iterdir()):
        same = path.is_file() and not path.is_symlink() and sha256(path.read_bytes()) == written.get(path.name)
        if not same and not ours.fullmatch(path.name) and path.name not in _SYSTEM:
            kept.append(path.name)
    return kept


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def render(manifest: Mapping[str, Any]) -> str:
    """The manifest as text: stable order, one field a line, lists of numbers short."""
    lines = []
    for key, value in manifest.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            items = ",\n".join(f"    {json.dumps(item)}" for item in value)
            lines.append(f'  "{key}": [\n{items}\n  ]')
        else:
            lines.append(f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def npz(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Arrays as a compressed .npz whose bytes depend on the arrays only."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            part = io.BytesIO()
            np.lib.format.write_array(part, np.asarray(array, order="C"), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), part.getvalue(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def missing_names(encodings: Sequence[Encoding], planned: Sequence[str], names: set[str]) -> list[str]:
    """What is wrong between the plan, the encodings and the tensors of model.onnx, one sentence each; empty when all is well."""
    encoded = [encoding.tensor for encoding in encodings]
    faults = [f"planned tensor '{name}' has no encoding" for name in planned if name not in set(encoded)]
    faults += [f"encoding '{name}' names no tensor of {MODEL}" for name in encoded if name not in names]
    return faults
