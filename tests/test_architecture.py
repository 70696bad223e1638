"""The plan of the house as tests: imports go down only, nothing is imported too early, and registries refuse what they should."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qdeploy.core.backend import Backend, backends
from qdeploy.core.errors import InputError, OptionError
from qdeploy.core.registry import Registry
from qdeploy.numerics.observer import observers
from qdeploy.recipes.step import steps
from qdeploy.runtimes.runtime import runtimes

ROOT = Path(__file__).resolve().parent.parent
PLACES = {path.parent.name: path.parent for base in (ROOT / "qdeploy", ROOT) for path in sorted(base.glob("*/__init__.py"))}
FOLDERS = sorted(PLACES.keys() - {"qdeploy"})
FILES = [path for name in FOLDERS for path in sorted(PLACES[name].glob("*.py"))]
ENGINE = sorted((ROOT / "qdeploy").rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """One import of ours: the module `name` below `qdeploy`; `lazy` where a function makes it, or only a type checker reads it."""

    name: str
    line: int
    lazy: bool

    @property
    def folder(self) -> str:
        return self.name.split(".")[0]


def imports(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(tree.body)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "qdeploy":
                yield Import(_module(name), node.lineno, node not in top)


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _module(name: str) -> str:
    """The dotted module within qdeploy that `qdeploy.a.b` or a member of it stands for; empty for the package itself."""
    parts = name.split(".")[1:]
    while parts:
        for base in (ROOT / "qdeploy", ROOT):
            if base.joinpath(*parts).is_dir() or base.joinpath(*parts).with_suffix(".py").is_file():
                return ".".join(parts)
        parts.pop()
    return ""


def _folder(path: Path) -> str:
    return path.parent.name


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def stated(folder: str) -> set[str]:
    """What a folder says that it imports: the last line of the text in its `__init__.py`."""
    text = ast.get_docstring(ast.parse((PLACES[folder] / "__init__.py").read_text(encoding="utf-8"))) or ""
    found = re.fullmatch(r".{60,}?\n\nImports: ([\w, ]+)\.", text, re.DOTALL)
    assert found, f"{folder}/__init__.py says its job in a paragraph, and in a last line what it imports"
    return set() if found[1] == "nothing of qdeploy" else set(found[1].split(", "))


def test_folders_import_downwards_only():
    graphlib.TopologicalSorter({folder: stated(folder) - {"api"} for folder in FOLDERS}).prepare()
    assert not any("cli" in stated(folder) for folder in FOLDERS), "nothing imports the command line"
    assert [folder for folder in FOLDERS if "api" in stated(folder)] == ["cli"], "the API is asked by the command line only"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_what_it_says_and_nothing_else(folder: str):
    found = {one.folder: f"{_name(path)}:{one.line}" for path in sorted(PLACES[folder].glob("*.py")) for one in imports(path)}
    found.pop(folder, None)
    assert found.keys() == stated(folder), found


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_of_a_folder_import_each_other_in_one_direction(folder: str):
    below = {f"{folder}.{path.stem}": {one.name for one in imports(path)} for path in sorted(PLACES[folder].glob("*.py"))}
    graphlib.TopologicalSorter({name: used & below.keys() for name, used in below.items()}).prepare()


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_face_of_a_folder_says_its_job_and_hands_on_nothing(folder: str):
    face = PLACES[folder] / "__init__.py"
    assert not list(imports(face)) and not list(_imported(face))


def test_the_front_door_imports_the_api_when_it_is_asked_and_the_version():
    for found in imports(ROOT / "qdeploy/__init__.py"):
        assert found.name == "core.version" or (found.folder == "api" and found.lazy), f"line {found.line}"
    assert [path.name for path in sorted((ROOT / "qdeploy").glob("*.py"))] == ["__init__.py", "api.py"], "all else has a folder"


def test_the_documents_draw_the_folders_as_they_are():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(?:qdeploy/)?(\w+)/` \|[^|]+\| ([^|]+) \|$", text, re.MULTILINE)
    drawn = {folder: set(re.findall(r"\w+", used)) - {"nothing"} for folder, used in rows}
    assert drawn == {folder: stated(folder) for folder in FOLDERS}


@pytest.mark.parametrize("path", sorted((ROOT / "qdeploy/files").glob("*.py")), ids=_name)
def test_the_readers_of_files_load_the_importer_only_when_they_need_it(path: Path):
    assert {found.folder for found in imports(path) if not found.lazy} <= {"core", "files"}


@pytest.mark.parametrize("path", sorted((ROOT / "backends").glob("*.py")), ids=_name)
def test_a_backend_imports_words_and_the_standard_library_only(path: Path):
    assert {found.name for found in imports(path) if found.folder == "core"} <= {"core.spec", "core.ops", "core.backend"}
    others = {name.split(".")[0] for name in _imported(path)} - {"qdeploy"}
    assert others <= sys.stdlib_module_names


NO_RUNTIMES = ("runtimes.runtime", "runtimes.process")
"""What all runtimes have in common."""


@pytest.mark.parametrize("path", ENGINE, ids=_name)
def test_the_engine_imports_no_backend_no_observer_and_no_runtime_by_name(path: Path):
    for found in imports(path):
        assert found.folder not in ("backends", "calibration"), f"line {found.line}"
        known = found.folder != "runtimes" or found.name in NO_RUNTIMES or _folder(path) == "runtimes"
        assert known, f"line {found.line}"


def _strings(path: Path) -> Iterator[tuple[int, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", [p for p in ENGINE if _folder(p) != "runtimes"], ids=_name)
def test_the_engine_names_no_backend(path: Path):
    # some runtimes have backends' names; the reference that reads every artifact literally is named where it is the default
    shared = set(runtimes.names())
    for line, text in _strings(path):
        assert text not in set(backends.names()) - shared, f"{path.name}:{line} names the backend {text!r}"
        assert text not in shared or (
            text == "onnxruntime" and _name(path) in ("qdeploy/verification/session.py", "qdeploy/core/backend.py")
        ), f"{path.name}:{line} names the runtime {text!r}"


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "module", ["qdeploy", "qdeploy.cli.main", "qdeploy.core.backend", "qdeploy.core.recipe", "qdeploy.runtimes.runtime"]
)
def test_importing_does_not_import_torch(module: str):
    done = _python(f"import sys, {module}; print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_asking_for_the_backends_does_not_import_torch():
    code = "import sys; from qdeploy.core.backend import backends; print(backends.names() and 'torch' in sys.modules)"
    assert _python(code).stdout.strip() == "False"


@pytest.mark.parametrize("folder", ["backends", "calibration"])
def test_the_open_folders_refuse_their_bare_names(folder: str):
    done = _python(f"import {folder}")
    assert done.returncode != 0 and f"import this folder as qdeploy.{folder}" in done.stderr


@pytest.mark.parametrize("registry", [backends, observers, runtimes, steps], ids=lambda r: r.kind)
def test_a_registry_refuses_a_duplicate_and_lists_the_nearest_of_an_unknown_name(registry: Registry[object]):
    name = registry.names()[0]
    with pytest.raises(AssertionError, match="registered twice"):
        registry.add(name, registry[name])
    with pytest.raises(OptionError) as caught:
        registry[name + "x"]
    assert f"did you mean '{name}'?" in str(caught.value) and all(known in str(caught.value) for known in registry.names())
    assert name in registry and name + "x" not in registry
    assert len(list(registry)) == len(registry.names())


GOOD = """
from __future__ import annotations
from dataclasses import dataclass, replace
from qdeploy.core.backend import backends, register

@dataclass(frozen=True)
class Mine:
    factor: float = 1.0

MINE = register(replace(backends["{base}"], name="{name}"))
"""


def test_a_users_own_backend_file_gives_its_backend_every_time_it_is_loaded(tmp_path: Path):
    path = tmp_path / "my_npu.py"
    path.write_text(GOOD.format(base=backends.names()[0], name="my_npu"))
    known = backends.names()
    for _ in range(2):
        made = backends.load_file(path)
        assert isinstance(made, Backend) and made.name == "my_npu"
    assert backends.names() == known


BAD = {
    "raises while it is imported": ("raise RuntimeError('out of luck')", "out of luck"),
    "asks for a backend that is not there": (GOOD.format(base="nothing", name="x"), "unknown backend"),
    "is no Python": ("def (:", "SyntaxError"),
    "registers a name that is taken": (GOOD.format(base=backends.names()[0], name=backends.names()[0]), "registered twice"),
    "registers nothing": ("x = 1", "registers 0 backends"),
    "registers two": (GOOD.format(base=backends.names()[0], name="a") + GOOD.format(base=backends.names()[0], name="b"), "2 backends"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_users_backend_file_is_refused_with_a_message_where_it(case: str, tmp_path: Path):
    code, message = BAD[case]
    path = tmp_path / "broken.py"
    path.write_text(code.replace("from __future__ import annotations", ""))
    known = backends.names()
    with pytest.raises(InputError, match=message) as caught:
        backends.load_file(path)
    assert str(path) in str(caught.value)
    assert backends.names() == known


@pytest.mark.parametrize("name", ["absent.py", "folder.py", "text.txt"])
def test_a_backend_file_that_is_no_python_file_is_refused(name: str, tmp_path: Path):
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(InputError, match="cannot import backend file"):
        backends.load_file(tmp_path / name)
