"""The house plan as tests: imports go down only, nothing is imported too early, and registries refuse what they should."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qdeploy.algorithm import steps
from qdeploy.backend import Backend, backends
from qdeploy.errors import InputError, OptionError
from qdeploy.observer import observers
from qdeploy.registry import Registry
from qdeploy.runtimes import runtimes

ROOT = Path(__file__).resolve().parent.parent
LEVELS = (
    ("errors", "registry", "spec", "ops", "backend", "formats"),
    # a recipe names observers and steps, which it only looks up when it is read
    ("arith", "observer", "histogram", "candidates", "recipe", "rounding", "quantizer"),
    (
        "signature",
        "dimensions",
        "graph",
        "channels",
        "outputs",
        "moves",
        "decompose",
        "simplify",
        "capture",
        "fold",
        "plan",
        "ties",
        "insert",
        "watch",
        "prepared",
    ),
    ("flow", "regions", "algorithm", "reconstruct", "blockwise", "distill", "cookbook", "tuning", "onepass"),
    ("functions", "lower", "onnxfile", "artifact", "edges", "translate", "emit", "runtimes", "verification"),
    ("importing", "files"),
    ("targets", "api", "screen", "arguments", "cli"),
)
ORDER = [name for level in LEVELS for name in level]
ENGINE = sorted((ROOT / "qdeploy").rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """One import of ours: `name` below `qdeploy.`; `lazy` where a function makes it, or only a type checker reads it."""

    name: str
    line: int
    lazy: bool


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


def _place(path: Path) -> str:
    return path.relative_to(ROOT / "qdeploy").parts[0].removesuffix(".py")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_file_of_the_engine_has_its_level():
    assert {_place(path) for path in ENGINE} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("path", ENGINE, ids=_name)
def test_imports_go_down_only(path: Path):
    place = _place(path)
    for found in imports(path):
        target = found.name.split(".")[0]
        if place == "__init__":
            assert target == "api" and found.lazy, f"the front door imports {found.name}, line {found.line}"
        elif target and target != place:
            assert ORDER.index(target) < ORDER.index(place), f"{path.name}:{found.line}: {place} imports {found.name}"


@pytest.mark.parametrize("path", sorted((ROOT / "qdeploy/files").glob("*.py")), ids=_name)
def test_the_readers_of_files_stand_alone(path: Path):
    allowed = {"errors", "spec", "registry", "files"}
    assert {found.name.split(".")[0] for found in imports(path) if not found.lazy} <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "backends").glob("*.py")), ids=_name)
def test_a_backend_imports_words_and_the_standard_library_only(path: Path):
    assert {found.name.split(".")[0] for found in imports(path)} <= {"spec", "ops", "backend", "formats"}
    others = {name.split(".")[0] for name in _imported(path)} - {"qdeploy"}
    assert others <= sys.stdlib_module_names


@pytest.mark.parametrize("path", sorted((ROOT / "calibration").glob("*.py")), ids=_name)
def test_a_calibration_file_imports_nothing_above_the_optimization_and_no_backend(path: Path):
    allowed = set(ORDER[: ORDER.index("blockwise") + 1]) - {"backend"} | {"calibration"}
    assert {found.name.split(".")[0] for found in imports(path)} <= allowed


@pytest.mark.parametrize("path", ENGINE, ids=_name)
def test_the_engine_imports_no_backend_no_observer_and_no_runtime_by_name(path: Path):
    for found in imports(path):
        folder, _, member = found.name.partition(".")
        assert folder not in ("backends", "calibration"), f"line {found.line}"
        assert not (folder == "runtimes" and member) or _place(path) == "runtimes", f"line {found.line}"


def _strings(path: Path) -> Iterator[tuple[int, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node.lineno, node.value


@pytest.mark.parametrize("path", [p for p in ENGINE if _place(p) != "runtimes"], ids=_name)
def test_the_engine_names_no_backend(path: Path):
    # some runtimes have backends' names; the reference that reads every artifact literally is named where it is the default
    shared = set(runtimes.names())
    for line, text in _strings(path):
        assert text not in set(backends.names()) - shared, f"{path.name}:{line} names the backend {text!r}"
        assert text not in shared or (text == "onnxruntime" and _place(path) in ("verification", "backend")), (
            f"{path.name}:{line} names the runtime {text!r}"
        )


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", ["qdeploy", "qdeploy.cli", "qdeploy.backend", "qdeploy.recipe", "qdeploy.runtimes"])
def test_importing_does_not_import_torch(module: str):
    done = _python(f"import sys, {module}; print([m for m in ('torch', 'onnx', 'onnxruntime') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_asking_for_the_backends_does_not_import_torch():
    code = "import sys; from qdeploy.backend import backends; print(backends.names() and 'torch' in sys.modules)"
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
from qdeploy.backend import backends, register

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
