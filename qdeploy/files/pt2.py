"""Read `.pt2` files (torch.export.save) without running code that a stranger put into them.

A .pt2 file looks like plain data, but `torch.export.load` unpickles its sample inputs with `weights_only=False` when the safe
way fails, evaluates its shape expressions with `sympy.sympify`, and `ExportedProgram.module` compiles its guards. `screen`
looks at all of these first: every pickle must load with `weights_only=True`, every expression and guard must be arithmetic on
shapes, and every call must be one of an operator. It is a screen and no sandbox.

>>> is_shape_expression("Mul(Integer(4), Symbol('s27', positive=True, integer=True))")
True
>>> is_shape_expression("__import__('os').system('true')")
False
"""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qdeploy.core.errors import InputError
from qdeploy.files.format import one_line

_EXPRESSIONS = re.compile(
    "Symbol|Integer|Float|Rational|Half|Zero|One|NegativeOne|Infinity|Add|Mul|Pow|Mod|Max|Min|Abs|floor|ceiling|And|Or|Not|Eq|Ne"
    "|Lt|Le|Gt|Ge|Equality|Unequality|StrictLessThan|StrictGreaterThan|LessThan|GreaterThan|Piecewise|ExprCondPair|Tuple"
    "|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilDiv|CeilToInt|FloorToInt|LShift|RShift|PowByNatural|FloatPow"
    "|FloatTrueDiv|IntTrueDiv|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|Identity"
    r"|IsNonOverlappingAndDenseIndicator|OpaqueUnaryFn_\w+|BitwiseFn_\w+"
)
_GUARD_FUNCTIONS = frozenset({"max", "min", "abs", "len", "int", "float", "bool", "round", "math", "torch", "L"})
_GUARD_ATTRIBUTES = frozenset({"size", "stride", "storage_offset", "dim", "numel", "shape", "ndim"})
_TARGETS = re.compile(
    r"torch\.ops\.(?!__|load_library|import_module)\w+\.\w+(\.\w+)*|torch\._?sym_\w+|math\.[a-z]\w*|#.*"
    r"|_operator\.(?!call$|methodcaller|attrgetter|itemgetter|_)\w+"
)
_OBJECTS = ("custom_obj_", "opaque_obj_")  # torch names pickled objects so
_SHAPE_NODES = (ast.Expression, ast.Call, ast.Name, ast.Constant, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp)
_ALWAYS = (ast.expr_context, ast.operator, ast.unaryop, ast.cmpop, ast.boolop)


def load_program(path: Path, *, trusted: bool) -> torch.export.ExportedProgram:
    """The program of a .pt2 file; unless `trusted`, only after `screen` has found no code in it.

    Raises `InputError` for a file that cannot be read, that another version of torch wrote, or that `screen` refuses.
    """
    with zipfile.ZipFile(path) as archive:
        reason = None if trusted else screen(archive)
        written_by = _torch_version(archive)
    if reason is not None:
        raise InputError(
            f"'{path}' holds more than a graph and tensors, and loading it could run code from the file",
            found=reason,
            action="pass --allow-pickle if you trust the file, or export the model again with plain tensors as example inputs",
        )
    heard: list[str] = []
    try:
        with _listening(heard), path.open("rb") as file:
            return torch.export.load(file)
    except Exception as error:  # torch raises many kinds for files of other versions and for damaged ones
        raise InputError(
            f"torch {torch.__version__} cannot load '{path}'",
            found=heard[-1] if heard else one_line(error),
            allowed="a file that this version of torch can read",
            action=f"export the model again with this torch, or install the one that wrote the file ({written_by}); import the "
            "package of its custom operators first where it has any",
        ) from error


def screen(archive: zipfile.ZipFile) -> str | None:
    """Why loading the archive could run code from it, in words; None where no reason was found."""
    names = archive.namelist()
    if len(set(names)) < len(names):
        return "two parts have the same name"
    for name in names:
        if name.endswith(".pt") and not _is_plain(archive.read(name)):
            return f"'{name}' pickles more than tensors"
        if not name.endswith(".json") and "models/" not in name:
            continue
        try:
            document = json.loads(archive.read(name))
        except (ValueError, RecursionError):
            return f"'{name}' is not JSON"
        reason = _screen_payloads(archive, name, document) or _screen_graph(document)
        if reason is not None:
            return f"'{name}' {reason}"
    return None


def is_shape_expression(text: str) -> bool:
    """Whether `text` is arithmetic on symbols and numbers in the words of sympy and torch, which is safe to evaluate."""
    names: set[int] = set()  # the strings that are only names and numbers; sympy would evaluate any other
    for node in _nodes(text):  # which yields a call before its arguments
        if isinstance(node, ast.Call):
            if not (isinstance(node.func, ast.Name) and _EXPRESSIONS.fullmatch(node.func.id)):
                return False
            names |= {id(argument) for argument in node.args if node.func.id in ("Symbol", "Float")}
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, (str, bytes)) and id(node) not in names:
                return False
        elif not isinstance(node, (*_SHAPE_NODES, *_ALWAYS)) or (isinstance(node, ast.Name) and node.id.startswith("_")):
            return False
    return True


def is_guard(text: str) -> bool:
    """Whether `text` compares the sizes of inputs and does nothing else."""
    for node in _nodes(text):
        if isinstance(node, ast.Attribute):
            root = node.value.id if isinstance(node.value, ast.Name) else ""
            symbolic = root == "torch" and node.attr.removeprefix("_").startswith("sym_")
            if not (symbolic or (root == "math" and node.attr[0] != "_") or node.attr in _GUARD_ATTRIBUTES):
                return False
        elif isinstance(node, ast.Name):
            if node.id not in _GUARD_FUNCTIONS:
                return False
        elif not isinstance(node, (*_SHAPE_NODES, *_ALWAYS, ast.Subscript)):
            return False
    return True


def _nodes(text: str) -> Iterator[ast.AST]:
    try:
        return ast.walk(ast.parse(text.strip(), mode="eval"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return iter([ast.Pass()])  # which is in no list of allowed nodes


def _screen_payloads(archive: zipfile.ZipFile, name: str, document: Any) -> str | None:
    config = document.get("config") if isinstance(document, dict) else None
    for key, entry in config.items() if isinstance(config, dict) else ():
        if not isinstance(entry, dict):
            continue
        path = str(entry.get("path_name"))
        part = f"{name.rpartition('/')[0]}/{path}"
        pickled = entry.get("use_pickle") and not (part in archive.namelist() and _is_plain(archive.read(part)))
        if pickled or path.startswith(_OBJECTS):
            return f"pickles '{key}', which is no plain tensor"
    return None


def _screen_graph(document: Any) -> str | None:
    if isinstance(document, list):
        return next((reason for item in document if (reason := _screen_graph(item)) is not None), None)
    if not isinstance(document, dict):
        return None
    expression, target = document.get("expr_str"), document.get("target")
    if isinstance(expression, str) and not is_shape_expression(expression):
        return f"has the unusual shape expression {expression[:80]!r}"
    if isinstance(target, str) and "inputs" in document and not _TARGETS.fullmatch(target):
        return f"calls {target[:80]!r}"
    guards = document.get("guards_code")
    for guard in guards if isinstance(guards, list) else ():
        if not is_guard(str(guard)):
            return f"has the unusual guard {str(guard)[:80]!r}"
    return _screen_graph(list(document.values()))


def _is_plain(payload: bytes) -> bool:
    if not payload:
        return True
    try:
        torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception:  # whatever it is, it is not plain
        return False
    return True


def _torch_version(archive: zipfile.ZipFile) -> str:
    for name in archive.namelist():
        if name.endswith(".json") and "/models/" in name:
            found = re.search(rb'"torch_version": "([\w.+-]+)"', archive.read(name))
            if found:
                return f"torch {found[1].decode()}"
    return "an unknown version"


@contextmanager
def _listening(heard: list[str]) -> Iterator[None]:
    """Keep torch's warnings from the terminal; the exceptions that it logs and swallows go into `heard`."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1]:
                heard.append(one_line(record.exc_info[1]))

    logger, listener = logging.getLogger("torch.export"), Listener()
    propagate, handlers = logger.propagate, logger.handlers
    logger.propagate, logger.handlers = False, [listener]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.propagate, logger.handlers = propagate, handlers
