"""The emitted folder: one object writes it and reads it back.

    model.onnx       what the target's toolchain reads
    <scale files>    the target's own format
    model.sim.onnx   the same numerics in standard ONNX, where model.onnx alone does not quantize
    tail.onnx        what follows where model.onnx ends before the model does, in float, to be run on the host
    reference.npz    inputs, float outputs and simulated outputs of some calibration samples, for `verify`
    qdeploy.json     the manifest: backend, recipe, seed, versions, every encoding, the hashes of all files, verify's results

The folder is written beside its place and renamed into it, so that it is there whole or not at all; see `place`.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import external_data_helper, numpy_helper

from qdeploy.core.errors import ArtifactError, one_line
from qdeploy.core.spec import Encoding, TensorSpec
from qdeploy.export import manifest, place
from qdeploy.export.manifest import MANIFEST, render, sealed, sha256
from qdeploy.graph.parts import Parts

MODEL = "model.onnx"
SIMULATION = "model.sim.onnx"
TAIL = "tail.onnx"
REFERENCE = "reference.npz"
_NEEDED = ("runtimes", "deciding", "float_bytes", "inputs", "outputs", "device_outputs", "parts", "tie_free", "planned", "encodings")
"""What `verify` reads from a manifest."""

Arrays = dict[str, NDArray[Any]]


class Artifact:
    """A written artifact at `path`. `manifest` is the content of qdeploy.json."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self.path = path
        self.manifest = content

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Read the folder at `path`; `ArtifactError` unless every file is there, and as it was written."""
        path = Path(path)
        content = manifest.read(path)
        missing = [name for name in content["files"] if not (path / name).is_file()]
        if missing:
            raise ArtifactError(f"'{path / missing[0]}' is missing", found=_more(missing), action="quantize the model again")
        changed = [name for name, digest in content["files"].items() if sha256((path / name).read_bytes()) != digest]
        if changed:
            what = f"'{path / changed[0]}' was changed after it was written"
            raise ArtifactError(what, found=_more(changed), action="quantize the model again")
        return cls(path, content)

    def check_whole(self) -> None:
        """`ArtifactError` unless the manifest has all that `verify` reads, in the form that it is written in."""
        missing = [key for key in _NEEDED if key not in self.manifest]
        missing += [name for name in (MODEL, REFERENCE) if name not in self.manifest["files"]]
        try:
            wrong = [] if missing else self._wrong()
        except Exception as error:  # what was changed and sealed again may be anything
            wrong = [one_line(error)]
        if missing or wrong:
            what = f"'{self.path / MANIFEST}' is no whole manifest"
            found = f"without {', '.join(missing)}" if missing else ", ".join(wrong)
            raise ArtifactError(what, found=found, action="quantize the model again")

    def _wrong(self) -> list[str]:
        """The fields that are not of the form that they are written in. Raises all kinds for what has no form at all."""
        specs = self.specs
        lists = [
            key
            for key in ("inputs", "outputs", "device_outputs", "planned", "runtimes", "deciding", "encodings")
            if not isinstance(self.manifest[key], list)
        ]
        named = (self.outputs, self.device_outputs, *(self.manifest[key] for key in ("planned", "runtimes", "deciding")))
        texts = [*(spec.name for spec in specs), *(text for names in named for text in names)]
        sizes = [size for spec in specs for size in spec.shape]
        fits = {
            "inputs": specs and all(size is None or (isinstance(size, int) and size > 0) for size in sizes),
            "outputs": bool(self.outputs),
            "device_outputs": bool(self.device_outputs),
            "planned": all(isinstance(text, str) for text in texts),
            "float_bytes": isinstance(self.manifest["float_bytes"], int),
            "tie_free": isinstance(self.manifest["tie_free"], bool),
            **{key: _texts(self.manifest.get(key, {})) for key in ("float", "renamed")},
            "encodes_all": isinstance(self.manifest.get("encodes_all", False), bool),
            "parts": all(self._fits(name, one) for name, one in self.parts.items()),
            "steps": all(isinstance(step["decision"], str) for step in self.manifest.get("steps", [])),
            "encodings": all(isinstance(encoding.tensor, str) for encoding in self.encodings),
        }
        return [f"'{key}' of another form" for key in (*lists, *(key for key, fit in fits.items() if not fit))]

    def _fits(self, output: str, parts: Parts) -> bool:
        """Whether an output may have these parts."""
        numbers = [parts.axis, *parts.edges]
        ordered = all(a < b for a, b in pairwise(parts.edges)) and len(parts.edges) == len(parts.tensors) + 1
        return output in self.outputs and all(isinstance(n, int) and n >= 0 for n in numbers) and ordered

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
    def tail(self) -> Path | None:
        """What is to be run on the host behind `model`, if it ends before the model does."""
        return self.path / TAIL if TAIL in self.manifest["files"] else None

    @property
    def device_outputs(self) -> list[str]:
        """Names of the outputs of `model`: those of the model, but where a `tail` makes them."""
        return list(self.manifest["device_outputs"])

    @property
    def parts(self) -> dict[str, Parts]:
        """The parts of the outputs that a concat puts together."""
        given = self.manifest["parts"]
        return {name: Parts(one["axis"], tuple(one["edges"]), tuple(one["tensors"])) for name, one in given.items()}

    @property
    def accepted(self) -> bool:
        """Whether the user takes it though quantization has destroyed an output."""
        return bool(self.manifest.get("accepted"))

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """Name, shape (None for a dimension that may vary) and dtype of every model input."""
        return list(self.manifest["inputs"])

    @property
    def specs(self) -> list[TensorSpec]:
        """The model inputs as specs."""
        return [TensorSpec.from_json(spec) for spec in self.inputs]

    @property
    def outputs(self) -> list[str]:
        """Names of the model outputs."""
        return list(self.manifest["outputs"])

    def decides(self, runtime: str, variant: str) -> bool:
        """Whether `verify` follows this runtime by default: it is the vendor's own, or runs the file literally."""
        return any(name in (runtime, f"{runtime}:{variant}") for name in self.manifest["deciding"])

    def reference(self) -> Arrays:
        """The saved samples: `input.<name>`, `float.<output>`, `simulated.<output>`."""
        try:
            with np.load(self.path / REFERENCE, allow_pickle=False) as file:
                arrays = dict(file)
            odd = [name for name, array in arrays.items() if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub"]
            if odd:
                raise ValueError(f"'{odd[0]}' holds no numbers")
            return arrays
        except Exception as error:  # NumPy raises many kinds for damaged files
            what = f"'{self.path / REFERENCE}' cannot be read"
            raise ArtifactError(what, found=one_line(error), action="quantize the model again") from error

    def load(self, path: Path) -> onnx.ModelProto:
        """One of the artifact's ONNX files; `ArtifactError` for one that cannot be read, or that names other files for its tensors."""
        try:
            model = onnx.load(path, load_external_data=False)
            for constant in model.graph.initializer:
                if external_data_helper.uses_external_data(constant):
                    raise ValueError(f"tensor '{constant.name}' is in another file")
                numpy_helper.to_array(constant)
        except Exception as error:  # protobuf and onnx raise many kinds for damaged files
            raise ArtifactError(f"'{path}' cannot be read", found=one_line(error), action="quantize the model again") from error
        return model

    def record(self, key: str, value: object) -> None:
        """Put a result into the manifest; the file is replaced at once or not at all.

        `ArtifactError` where another artifact stands there by now, `OSError` where the folder cannot be written.
        """
        with place.held(self.path / MANIFEST, wait=10) as held:
            if manifest.read(self.path)["files"] != self.manifest["files"]:
                raise ArtifactError(f"'{self.path}' was replaced by another artifact meanwhile", action="verify that one")
            self.manifest = sealed(self.manifest | {key: value})
            held.replace(render(self.manifest))


def _texts(given: object) -> bool:
    """Whether it maps texts to texts."""
    return isinstance(given, dict) and all(isinstance(text, str) for pair in given.items() for text in pair)


def _more(names: Sequence[str]) -> str | None:
    """The other names, where there are several."""
    return f"the same of {', '.join(names[1:6])}{' and more' if len(names) > 6 else ''}" if len(names) > 1 else None


def write(out: Path, files: Mapping[str, bytes], content: Mapping[str, Any]) -> Artifact:
    """Write an artifact folder at `out`, replacing an artifact that stands there; see `place.check_free`."""
    whole = sealed(dict(content) | {"files": {name: sha256(data) for name, data in sorted(files.items())}})
    with place.claim(out) as claimed, claimed.staged() as fresh:
        fresh.mkdir()
        for name, data in files.items():
            (fresh / name).write_bytes(data)
        (fresh / MANIFEST).write_text(render(whole), encoding="utf-8")
    return Artifact(out, json.loads(render(whole)))


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
    encoded = {encoding.tensor: None for encoding in encodings}
    faults = [f"planned tensor '{name}' has no encoding" for name in planned if name not in encoded]
    faults += [f"encoding '{name}' names no tensor of {MODEL}" for name in encoded if name not in names]
    return faults
