"""The manifest of an artifact, qdeploy.json: as text, and sealed with hashes of itself, so that a change is told by its field.

The seal finds changes; it is no signature, since whoever changes a field can seal it anew.

>>> whole = sealed({"schema": 2, "seed": 0})
>>> changes(whole), changes(whole | {"seed": 1}), changes({key: value for key, value in whole.items() if key != "seed"})
([], ["'seed' is another"], ["'seed' is missing"])
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdeploy.core.errors import ArtifactError, one_line

SCHEMA = 3
MANIFEST = "qdeploy.json"
_HASHES, _SEAL = "hashes", "sha256"


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def _digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode())


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """`manifest` with a hash of every field, and one of these hashes."""
    fields = {key: value for key, value in manifest.items() if key not in (_HASHES, _SEAL)}
    hashes = {key: _digest(value) for key, value in fields.items()}
    return fields | {_HASHES: hashes, _SEAL: _digest(hashes)}


def changes(manifest: Mapping[str, Any]) -> list[str]:
    """What was changed since `manifest` was sealed, one sentence a field; empty where nothing was."""
    hashes = manifest.get(_HASHES)
    if not isinstance(hashes, dict) or manifest.get(_SEAL) != _digest(hashes):
        return ["its hashes are others"]
    fields = {key: value for key, value in manifest.items() if key not in (_HASHES, _SEAL)}
    found = [f"'{key}' is missing" for key in hashes if key not in fields]
    found += [f"'{key}' was added" for key in fields if key not in hashes]
    return found + [f"'{key}' is another" for key, value in fields.items() if key in hashes and hashes[key] != _digest(value)]


def parse(text: str) -> dict[str, Any]:
    """The manifest in `text`, sealed or not. Raises `ValueError` for what is no JSON object, or has a field twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a field stands twice")
        return found

    try:
        manifest = json.loads(text, object_pairs_hook=once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(manifest, dict):
        raise ValueError("it is no JSON object")
    return manifest


def read(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`; `ArtifactError` where there is none, where it is none, or where it is not as it was written."""
    path = folder / MANIFEST
    if not path.is_file():
        what = "is no artifact" if folder.exists() else "does not exist"
        raise ArtifactError(f"'{folder}' {what}", action=f"name a folder with {MANIFEST}, written by qdeploy quantize")
    try:
        manifest = parse(path.read_text(encoding="utf-8"))
        schema, files = manifest["schema"], manifest["files"]
        if not isinstance(files, dict) or any(Path(name).name != name or name in ("", "..") for name in files):
            raise ValueError("'files' names no files of the folder")
    except (ValueError, KeyError) as error:
        raise ArtifactError(f"'{path}' is no manifest", found=one_line(error), action="quantize the model again") from error
    if schema != SCHEMA:
        raise ArtifactError(f"'{path}' has another schema", found=schema, allowed=SCHEMA, action="use the qdeploy that wrote it")
    changed = changes(manifest)
    if changed:
        found = ", ".join(changed[:8]) + (f", and {len(changed) - 8} more" if len(changed) > 8 else "")
        raise ArtifactError(f"'{path}' was changed after it was written", found=found, action="quantize the model again")
    return manifest


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
