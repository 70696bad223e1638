"""The artifact folder: whole or not at all, read back bit for bit, the same bytes from the same inputs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np
import pytest
import torch

from qdeploy.core.backend import backends
from qdeploy.core.errors import ArtifactError, InputError
from qdeploy.export.artifact import REFERENCE, Artifact, npz, write
from qdeploy.export.manifest import MANIFEST, SCHEMA, render, sealed, sha256
from qdeploy.export.place import check_free, claim

FILES = {"model.onnx": b"some bytes", "reference.npz": b"others"}
CHECKOUT = Path(__file__).parent.parent


def listing(folder: Path) -> list[str]:
    """Everything below `folder`, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def put(out: Path, word: str = "first") -> Artifact:
    return write(out, FILES, {"schema": SCHEMA, "word": word})


def copy_of(name: str, backend: str, place: Path) -> Path:
    return Path(shutil.copytree(networks.artifact_path(name, backend), place))


def test_an_artifact_is_written_with_the_hashes_of_its_files_and_nothing_beside_it(tmp_path: Path) -> None:
    made = put(tmp_path / "deep" / "out")
    assert listing(tmp_path) == ["deep", "deep/out", *(f"deep/out/{name}" for name in sorted([*FILES, MANIFEST]))]
    assert made.manifest["files"] == {name: sha256(data) for name, data in FILES.items()}
    assert Artifact.open(tmp_path / "deep" / "out").manifest == made.manifest


def test_a_new_artifact_replaces_an_older_one(tmp_path: Path) -> None:
    put(tmp_path / "out")
    put(tmp_path / "out", "second")
    assert Artifact.open(tmp_path / "out").manifest["word"] == "second"
    assert listing(tmp_path) == ["out", *(f"out/{name}" for name in sorted([*FILES, MANIFEST]))]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert put(tmp_path / "out").path.is_dir()


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_a_failure_while_writing_leaves_what_was_there(older: bool, error: BaseException, tmp_path: Path) -> None:
    if older:
        put(tmp_path / "out")
    before = listing(tmp_path)
    with pytest.raises(type(error)), claim(tmp_path / "out") as place, place.staged() as fresh:  # noqa: PT012
        fresh.mkdir()
        (fresh / "model.onnx").write_bytes(b"half of")
        raise error
    assert listing(tmp_path) == before
    assert not older or Artifact.open(tmp_path / "out").manifest["word"] == "first"


def test_a_failure_of_the_last_rename_brings_the_older_artifact_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "out")
    rename: Callable[[Path, Path], Path] = Path.rename

    def failing(source: Path, target: Path) -> Path:
        if target == tmp_path / "out" and source.parent.name == "new":
            raise OSError("no more of this")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no more of this"):
        put(tmp_path / "out", "second")
    monkeypatch.undo()
    assert Artifact.open(tmp_path / "out").manifest["word"] == "first"
    assert [name for name in listing(tmp_path) if "/" not in name] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from qdeploy.export import place
rename, moment = Path.rename, sys.argv[2]

def stop(source, target):
    if moment == "between the renames" and source.parent.name == "new":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(source, target)

Path.rename = stop
if moment == "after the renames":
    place.shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
with place.claim(Path(sys.argv[1])) as claimed:
    if moment == "before any work":
        os.kill(os.getpid(), signal.SIGKILL)
    with claimed.staged() as fresh:
        fresh.mkdir()
        (fresh / "model.onnx").write_bytes(b"half of")
        if moment == "while it wrote":
            os.kill(os.getpid(), signal.SIGKILL)
        if moment == "after the renames":
            for file in Path(sys.argv[1]).iterdir():
                (fresh / file.name).write_bytes(file.read_bytes())
"""
MOMENTS = ("before any work", "while it wrote", "between the renames", "after the renames")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("older", [False, True])
def test_what_a_killed_process_left_is_mended_by_the_next_run(older: bool, moment: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if older:
        put(out)
    elif moment == "after the renames":
        pytest.skip("nothing is replaced")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), moment], check=False, cwd=CHECKOUT)
    assert killed.returncode == -9
    with claim(out):  # any run: it has not written anything yet
        assert not older or moment == "after the renames" or Artifact.open(out).manifest["word"] == "first"
        assert listing(tmp_path / ".out.work") == ["lock"]
    assert put(out, "second").manifest["word"] == "second"
    assert listing(tmp_path) == ["out", *(f"out/{name}" for name in sorted([*FILES, MANIFEST]))]


def test_of_two_runs_to_one_place_the_second_is_refused_at_once(tmp_path: Path) -> None:
    code = "import sys\nfrom pathlib import Path\nfrom qdeploy.export.place import claim\nwith claim(Path(sys.argv[1])): pass"
    with claim(tmp_path / "out"):
        second = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False, cwd=CHECKOUT, capture_output=True)
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out2")], check=False, cwd=CHECKOUT, capture_output=True)
        with pytest.raises(InputError, match=r"cannot write to '.*out'; found: another run that is writing there; to do: wait"):
            put(tmp_path / "out")
    assert second.returncode and b"another run that is writing there" in second.stderr and not other.returncode
    assert listing(tmp_path) == []


def test_a_work_folder_with_files_of_the_user_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.work").mkdir()
    (tmp_path / ".out.work" / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"cannot work in '.*\.out\.work'; found: a folder with other files, such as 'thesis\.tex'"):
        put(tmp_path / "out")
    assert listing(tmp_path) == [".out.work", ".out.work/thesis.tex"]


def test_a_file_that_comes_into_the_folder_during_a_run_is_kept(tmp_path: Path) -> None:
    put(tmp_path / "out")
    with pytest.raises(InputError, match=r"'mine\.dlc', which"), claim(tmp_path / "out") as place, place.staged() as fresh:  # noqa: PT012
        fresh.mkdir()
        (tmp_path / "out" / "mine.dlc").write_text("precious")
    assert (tmp_path / "out" / "mine.dlc").read_text() == "precious" and listing(tmp_path)[0] == "out"


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"cannot write to .*; found: a folder with other files; to do: name a new folder"):
        put(tmp_path)
    assert listing(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize(
    "what",
    [
        "another file",
        "a folder",
        "a link",
        "a changed file",
        "a file that a faked manifest lists",
        "a file that one lists with its hash",
    ],
)
def test_what_is_not_of_the_artifact_is_never_replaced(what: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    put(out)
    mine = out / "mine.dlc"
    if what == "a folder":
        mine.mkdir()
    elif what == "a link":
        mine.symlink_to(tmp_path)
    elif what == "a changed file":
        mine = out / "model.onnx"
        mine.write_text("precious")
    else:
        mine.write_text("precious")
    if what.startswith("a file that"):
        manifest = json.loads((out / MANIFEST).read_text())
        manifest["files"]["mine.dlc"] = sha256(b"precious") if "its hash" in what else "0" * 64
        (out / MANIFEST).write_text(json.dumps(manifest))
    before = listing(out)
    with pytest.raises(
        InputError, match=rf"cannot write to '.*out'; found: '{mine.name}'.*, which qdeploy did not write so; to do: move"
    ):
        put(out, "second")
    assert listing(out) == before and (not mine.is_file() or mine.read_text() == "precious")


@pytest.mark.parametrize("text", ["{}", "[1]", "no JSON", '{"files": 7}'])
def test_a_manifest_that_is_none_covers_no_file(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="thesis"):
        put(tmp_path)
    assert listing(tmp_path) == sorted([MANIFEST, "thesis.tex"])


def test_what_systems_and_killed_runs_leave_is_no_file_of_the_user(tmp_path: Path) -> None:
    put(tmp_path / "out")
    (tmp_path / "out" / ".DS_Store").touch()
    (tmp_path / "out" / f".{MANIFEST}.work").mkdir()
    (tmp_path / "out" / f".{MANIFEST}.work" / "lock").touch()
    assert put(tmp_path / "out", "second").manifest["word"] == "second"


def test_a_file_in_the_way_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(InputError, match="found: a file"):
        put(tmp_path / "out")
    with pytest.raises(InputError, match=r"found: '.*out' is not a writable folder"):
        put(tmp_path / "out" / "inner")
    assert (tmp_path / "out").read_text() == "precious"


def test_a_parent_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a superuser may write anywhere, so the permission itself is played
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="is not a writable folder"):
        check_free(tmp_path / "new" / "out")


def test_opening_tells_a_folder_without_a_manifest_from_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is no artifact; to do: name a folder with qdeploy\.json"):
        Artifact.open(tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        Artifact.open(tmp_path / "none")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1}', '{"files": {}}', '{"schema": 1, "files": 3}', "\x00\x01"])
def test_a_broken_manifest_is_named(text: str, tmp_path: Path) -> None:
    (put(tmp_path / "out").path / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"qdeploy\.json' is no manifest; found: .*; to do: quantize the model again"):
        Artifact.open(tmp_path / "out")


def test_a_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "out", FILES, {"schema": SCHEMA + 1})
    with pytest.raises(ArtifactError, match="has another schema; found: 4; allowed: 3"):
        Artifact.open(tmp_path / "out")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_and_a_changed_file_are_named(name: str, tmp_path: Path) -> None:
    file = put(tmp_path / "out").path / name
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match=f"{name}' was changed after it was written"):
        Artifact.open(tmp_path / "out")
    file.unlink()
    with pytest.raises(ArtifactError, match=f"{name}' is missing"):
        Artifact.open(tmp_path / "out")


@pytest.mark.parametrize("backend", backends.names())
def test_encodings_survive_the_manifest_bit_for_bit(backend: str) -> None:
    made, read = networks.prepared("several", backend).encodings(), networks.artifact("several", backend).encodings
    assert [(e.tensor, e.role, e.spec) for e in read] == [(e.tensor, e.role, e.spec) for e in made]
    for ours, theirs in zip(made, read, strict=True):
        assert ours.scale.tobytes() == theirs.scale.tobytes() and theirs.scale.dtype == np.float32
        assert ours.zero_point.tobytes() == theirs.zero_point.tobytes()


def test_the_manifest_is_json_of_one_line_an_encoding() -> None:
    manifest = networks.artifact("plain", "snpe").manifest
    assert json.loads(render(manifest)) == manifest
    assert sum('"tensor": ' in line for line in render(manifest).splitlines()) == len(manifest["encodings"])


@pytest.mark.parametrize("backend", ["snpe", "onnxruntime"])
def test_the_reference_holds_inputs_and_both_outputs_and_a_rerun_makes_the_same(backend: str) -> None:
    artifact, prepared = networks.artifact("several", backend), networks.prepared("several", backend)
    saved = artifact.reference()
    assert set(saved) == {
        "input.stem",
        "input.side",
        *(f"{kind}.{name}" for kind in ("float", "simulated") for name in artifact.outputs),
    }
    inputs = [torch.from_numpy(saved[f"input.{name}"]) for name in ("stem", "side")]
    for given, kept in zip(zip(*networks.batches("several"), strict=True), inputs, strict=True):
        assert torch.equal(torch.cat(given)[: len(kept)], kept)
    for kind in ("float", "quantize"):
        with prepared.mode(kind):  # type: ignore[arg-type]
            outputs = prepared.flat(inputs)
        for name, output in zip(artifact.outputs, outputs, strict=True):
            np.testing.assert_array_equal(saved[f"{'simulated' if kind == 'quantize' else kind}.{name}"], output)


def test_arrays_are_saved_with_their_shapes_and_the_same_bytes(tmp_path: Path) -> None:
    arrays = {"scalar": np.array(1.5), "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    (tmp_path / REFERENCE).write_bytes(npz(arrays))
    assert npz(arrays) == npz(arrays)
    read = Artifact(tmp_path, {}).reference()
    assert {name: value.shape for name, value in read.items()} == {"scalar": (), "turned": (3, 2)}
    np.testing.assert_array_equal(read["turned"], arrays["turned"])


def test_recording_a_result_changes_the_manifest_only(tmp_path: Path) -> None:
    artifact = Artifact.open(copy_of("plain", "snpe", tmp_path / "out"))
    artifact.record("verify", {"passed": True})
    assert artifact.manifest == Artifact.open(tmp_path / "out").manifest
    read = Artifact.open(tmp_path / "out")
    assert read.manifest["verify"] == {"passed": True}
    assert listing(tmp_path / "out") == listing(networks.artifact_path("plain", "snpe"))


def test_a_result_is_not_recorded_in_another_artifact_that_took_the_place(tmp_path: Path) -> None:
    artifact = put(tmp_path / "out")
    write(tmp_path / "out", FILES | {"model.onnx": b"another"}, {"schema": SCHEMA})
    with pytest.raises(ArtifactError, match="was replaced by another artifact meanwhile"):
        artifact.record("verify", {"passed": True})
    assert "verify" not in Artifact.open(tmp_path / "out").manifest


@pytest.mark.parametrize("key", [*networks.artifact("plain", "snpe").manifest, "new"])
def test_a_changed_field_of_the_manifest_is_named(key: str, tmp_path: Path) -> None:
    path = copy_of("plain", "snpe", tmp_path / "out") / MANIFEST
    manifest = json.loads(path.read_text())
    seal = key in ("hashes", "sha256")
    changes = {"is another": manifest | {key: None}, "is missing": {k: v for k, v in manifest.items() if k != key}}
    for what, changed in ({"was added": manifest | {key: 1}} if key == "new" else changes).items():
        path.write_text(json.dumps(changed))
        words = "its hashes are others" if seal else f"'{key}' {what}"
        early = {"schema": "is no manifest|has another schema", "files": "is no manifest"}.get(key)
        with pytest.raises(ArtifactError, match=early or rf"qdeploy\.json' was changed after it was written; found: {words}; to do"):
            Artifact.open(tmp_path / "out")


FIELDS = ("float_bytes", "inputs", "outputs", "device_outputs", "parts", "encodings", "encodes_all", "tie_free", "planned", "runtimes")
FIELDS += ("deciding", "steps", "float", "renamed")


@pytest.mark.parametrize("key", FIELDS)
@pytest.mark.parametrize("value", [None, [], 7, "x", [{}], [None], {"a": 1}])
def test_a_field_of_another_form_is_no_traceback_even_where_it_was_sealed(key: str, value: object, tmp_path: Path) -> None:
    path = copy_of("plain", "snpe", tmp_path / "out") / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(render(sealed(manifest | {key: value})))
    opened = Artifact.open(tmp_path / "out")
    empty = value == [] and key in ("encodings", "planned", "runtimes", "deciding", "steps")
    if empty or (key, value) == ("float_bytes", 7):
        opened.check_whole()
    else:
        with pytest.raises(ArtifactError, match=r"qdeploy\.json' is no whole manifest; found: "):
            opened.check_whole()


@pytest.mark.parametrize("name", ["../model.onnx", "a/b", "..", "", "."])
def test_a_manifest_names_files_of_its_folder_only(name: str, tmp_path: Path) -> None:
    write(tmp_path / "out", {}, {"schema": SCHEMA})
    path = tmp_path / "out" / MANIFEST
    path.write_text(render(sealed(json.loads(path.read_text()) | {"files": {name: "0"}})))
    with pytest.raises(ArtifactError, match="'files' names no files of the folder"):
        Artifact.open(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["snpe", "onnxruntime"])
def test_two_processes_write_the_same_bytes(backend: str, tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import networks, qdeploy
qdeploy.quantize(networks.network("plain"), networks.batches("plain"), backend={backend!r}, out=sys.argv[1])
"""
    for number, name in enumerate(("first", "second")):
        environment = os.environ | {"PYTHONHASHSEED": str(number)}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True, cwd=CHECKOUT, env=environment)
    names = listing(tmp_path / "first")
    assert names == listing(tmp_path / "second") and MANIFEST in names
    for name in names:
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("first", "second"))
        assert first == second, name
