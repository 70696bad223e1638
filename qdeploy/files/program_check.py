"""What the JSON of a `.pt2` may hold: torch's own schema with its types, and only texts that are harmless where torch puts them.

torch turns parts of this document into source text and executes it: names of values become arguments and variables, expressions go
through `eval` inside sympy, guards are compiled, targets are looked up attribute by attribute. So every text is checked for the place
that it goes to, and what no place needs is left out of the result. Nothing here calls anything with a text of the file.

>>> is_expression("Mul(Integer(4), Symbol('s27', positive=True, integer=True))"), is_expression("2*s0 + Max(1, s1//2)")
(True, True)
>>> is_expression("__import__('os').system('true')"), is_expression("Symbol('a\\n', x)")
(False, False)
"""

from __future__ import annotations

import dataclasses
import json
import keyword
import re
import types
import typing
from collections.abc import Mapping
from enum import IntEnum
from functools import cache
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE
from torch._export.serde.union import _Union

LONGEST = 4096
"""Characters of an expression; torch writes some hundreds."""
DEEPEST = 64
"""Brackets inside each other in an expression, and levels of nested graphs."""
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PATH = re.compile(r"[^\"'\\{}\x00-\x1f\x7f]*")
"""Of parameters and modules: torch puts them between quotes."""
_WORD = re.compile(r"[\w.+<>=-]*", re.ASCII)
_TARGET = re.compile(
    r"torch\.ops\.(?P<space>[A-Za-z_]\w*)\.(?P<op>[A-Za-z_]\w*)(\.\w+)?|torch\._?sym_[a-z]\w*|math\.[a-z]\w*"
    r"|_operator\.(?!call$|methodcaller|attrgetter|itemgetter|setitem|delitem|i?concat|_)[a-z]\w*",
    re.ASCII,
)
_REFUSED_SPACES = re.compile(
    r"__.*|load_library|import_module|_?c10d.*|_?dtensor|rpc|fsdp|symm_mem|inductor|debugprims|profiler|streams|cuda"
)
"""Namespaces of torch's own operators that compute nothing of a network: they talk to other processes, to devices or to debuggers."""
_REFUSED_OPS = frozenset({"from_file", "_print", "__dict__"})
"""Operators that touch more than their tensors: `aten.from_file` makes files."""
_FUNCTIONS = re.compile(
    "Symbol|Integer|Float|Rational|Half|Zero|One|NegativeOne|Infinity|Add|Mul|Pow|Mod|Max|Min|Abs|floor|ceiling|And|Or|Not|Eq|Ne"
    "|Lt|Le|Gt|Ge|Equality|Unequality|StrictLessThan|StrictGreaterThan|LessThan|GreaterThan|Piecewise|ExprCondPair|Tuple"
    "|FloorDiv|ModularIndexing|Where|PythonMod|CleanDiv|CeilDiv|CeilToInt|FloorToInt|LShift|RShift|PowByNatural|FloatPow"
    "|FloatTrueDiv|IntTrueDiv|TruncToFloat|TruncToInt|RoundToInt|RoundDecimal|ToFloat|Identity"
    r"|IsNonOverlappingAndDenseIndicator|OpaqueUnaryFn_[a-z0-9_]+|BitwiseFn_[a-z0-9_]+"
)
_TOKEN = re.compile(
    r" *(?:(?P<call>[A-Za-z_]\w*)\(|(?P<key>[a-z]+)=(?=True|False|\d)|(?P<name>[A-Za-z]\w*)"
    r"|(?P<number>\d{1,40}(\.\d{1,60})?(e[+-]?\d{1,4})?)"
    r"|'(?P<quoted>[A-Za-z]\w*|-?\d{1,40}(\.\d{1,60})?(e[+-]?\d{1,4})?)'|(?P<mark>\*\*|//|<=|>=|==|!=|[-+*/%<>&|~(),]))",
    re.ASCII,
)
_KEPT_METADATA = ("nn_module_stack", "stack_trace", "custom", "torch_fn")
"""What qdeploy reads of a node's history; the rest would only be parsed."""


class BadProgram(Exception):
    """A document that torch would not have written; the text says where and what."""


def checked_program(data: Any) -> bytes:
    """The document of a model, written anew from its checked parts: without guards, and without what nobody reads."""
    document = _parsed(data)
    major = document.get("schema_version", {}).get("major") if isinstance(document.get("schema_version"), dict) else None
    if major != schema.SCHEMA_VERSION[0]:
        raise BadProgram(f"its schema has version major={major}, and torch {torch.__version__} reads {schema.SCHEMA_VERSION[0]}")
    document["guards_code"] = []  # of sizes in the example; qdeploy proves sizes itself
    return json.dumps(_checked(schema.ExportedProgram, document, "", 0)).encode()


def checked_payloads(data: Any, sizes: Mapping[str, int], prefix: str) -> tuple[bytes, list[str]]:
    """The table of stored tensors, written anew, and the names of the parts that it uses; `sizes` are the bytes of all parts."""
    document = _checked(schema.PayloadConfig, _parsed(data), "", 0)
    used = []
    for name, entry in document["config"].items():
        path, meta = entry["path_name"], entry["tensor_meta"]
        if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", path):
            raise BadProgram(f"pickles '{name}', which is no plain tensor")
        if meta is None or path not in sizes:
            raise BadProgram(f"has no data for '{name}'")
        needed = _bytes(meta, name)
        if needed > sizes[path]:
            raise BadProgram(f"stores {sizes[path]} bytes for '{name}', which needs {needed}")
        used.append(f"{prefix}{path}")
    return json.dumps(document).encode(), used


def _bytes(meta: Mapping[str, Any], name: str) -> int:
    """The bytes of storage that a tensor reaches into."""
    numbers = [size.get("as_int") for size in (*meta["sizes"], *meta["strides"], meta["storage_offset"])]
    if any(number is None or number < 0 for number in numbers) or len(meta["sizes"]) != len(meta["strides"]):
        raise BadProgram(f"has a wrong shape for '{name}'")
    rank = len(meta["sizes"])
    shape, strides, offset = numbers[:rank], numbers[rank:-1], numbers[-1]
    if 0 in shape:
        return 0
    reach = offset + 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return int(reach) * _itemsize(meta["dtype"], name)


def _itemsize(dtype: int, name: str) -> int:
    known: torch.dtype | None = _SERIALIZE_TO_TORCH_DTYPE.get(schema.ScalarType(dtype))
    if known is None:
        raise BadProgram(f"has no known dtype for '{name}'")
    return known.itemsize


def _parsed(data: Any) -> dict[str, Any]:
    try:
        document = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise BadProgram("is not JSON") from error
    if not isinstance(document, dict):
        raise BadProgram("is no JSON object")
    return document


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, globalns=vars(schema))


def _checked(kind: Any, value: Any, where: str, depth: int) -> Any:
    """`value`, if it is of the schema's type `kind`; `where` is the field that it stands in."""
    if depth > 40 * DEEPEST:
        raise BadProgram("is nested too deeply")
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        (one,) = (option for option in typing.get_args(kind) if option is not type(None))
        return None if value is None else _checked(one, value, where, depth)
    if origin is list:
        items = _of(list, value, where)
        return [_checked(typing.get_args(kind)[0], item, where, depth + 1) for item in items]
    if origin is dict:
        items = _of(dict, value, where)
        for key in items:
            _check_key(where, key)
        return {key: _checked(typing.get_args(kind)[1], item, f"{where}[]", depth + 1) for key, item in items.items()}
    if dataclasses.is_dataclass(kind):
        return _fields(kind, _of(dict, value, where), where, depth)
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        if isinstance(value, bool) or not isinstance(value, int) or value not in set(kind):
            raise BadProgram(f"has {value!r} for {where}")
        return value
    if kind is str:
        return _check_text(where, _of(str, value, where))
    if kind is float and isinstance(value, str):
        if value not in ("Infinity", "-Infinity", "NaN"):
            raise BadProgram(f"has {value[:80]!r} for {where}")
        return value
    if kind is float:
        return _of((int, float), value, where)
    return _of(kind, value, where)


def _fields(kind: Any, value: dict[str, Any], where: str, depth: int) -> dict[str, Any]:
    hints = _hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}
    union = issubclass(kind, _Union)
    if union and (len(value) != 1 or not value.keys() <= known.keys()):
        raise BadProgram(f"has {', '.join(map(repr, list(value)[:5]))} where one kind of {kind.__name__} must stand")
    made = {}
    for name, field in known.items():
        if name in value:
            made[name] = _checked(hints[name], value[name], f"{kind.__name__}.{name}", depth + 1)
        elif not union and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise BadProgram(f"lacks {kind.__name__}.{name}")
    if kind is schema.Node:
        made["metadata"] = {key: text for key, text in made["metadata"].items() if key in _KEPT_METADATA}
    return made


def _of(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadProgram(f"has {str(value)[:40]!r} for {where or 'itself'}")
    return value


def _check_key(where: str, key: str) -> None:
    """A key of a table: names of values, or paths of parameters."""
    if where in ("PayloadConfig.config", "Node.metadata", "GraphModule.metadata", "GraphModule.treespec_namedtuple_fields"):
        _check_text("path", key)
    elif where == "ExportedProgram.opset_version":
        _check_text("Device.type", key)
    elif where == "ExportedProgram.range_constraints":  # of symbols, and of what follows from them
        _check_text("SymExpr.expr_str", key)
    else:
        _check_name(where, key)


def _check_name(where: str, text: str) -> str:
    if not _NAME.fullmatch(text) or keyword.iskeyword(text) or text.startswith("__") or len(text) > LONGEST:
        raise BadProgram(f"has the unusual name {text[:80]!r} for {where}")
    return text


def _check_text(where: str, text: str) -> str:
    """`text`, if it may stand in the field `where`; `BadProgram` otherwise."""
    field = where.rpartition(".")[2]
    if where == "SymExpr.expr_str":
        if not is_expression(text):
            raise BadProgram(f"has the unusual shape expression {text[:80]!r}")
    elif where == "Node.target" or field == "as_operator":
        target = _TARGET.fullmatch(text)
        if not target or _REFUSED_SPACES.fullmatch(target["space"] or "") or (target["op"] or "") in _REFUSED_OPS:
            raise BadProgram(f"calls {text[:80]!r}")
    elif field in ("parameter_name", "buffer_name", "tensor_constant_name", "fqn", "path", "path_name"):
        if not _PATH.fullmatch(text) or len(text) > LONGEST or any(part.startswith("__") for part in text.split(".")):
            raise BadProgram(f"has the unusual name {text[:80]!r} for {field}")
    elif field == "in_spec":
        _check_treespec(text)
    elif where in ("Device.type", "ExportedProgram.torch_version", "ExportedProgram.verifiers"):
        if not _WORD.fullmatch(text):
            raise BadProgram(f"has {text[:80]!r} for {where}")
    elif where == "NamedArgument.name" or where == "Node.name":
        return text if not text else _check_name(where, text)
    elif where in ("Node.metadata[]", "GraphModule.metadata[]") or field in ("as_string", "as_strings", "out_spec"):
        pass  # torch keeps them as texts, or reads them as JSON
    elif field in ("class_fqn", "custom_obj_name"):
        raise BadProgram(f"holds an object, {text[:80]!r}, which is no plain tensor")
    else:
        return _check_name(where, text)
    return text


def _check_treespec(text: str) -> None:
    """The structure of the inputs, itself JSON: its keys become source text."""
    try:
        waiting: list[Any] = [json.loads(text)] if text else []
        while waiting:
            node = waiting.pop()
            if isinstance(node, dict):
                waiting += [*node, *node.values()]
            elif isinstance(node, list):
                waiting += node
            elif isinstance(node, str) and node[:1] in ("[", "{", '"'):  # the keys of a dict are JSON in a text
                waiting.append(json.loads(node))
            elif isinstance(node, str) and not _PATH.fullmatch(node):
                raise BadProgram(f"has the unusual key {node[:80]!r} among its inputs")
    except (ValueError, RecursionError) as error:
        raise BadProgram("does not describe its inputs as torch does") from error


def is_expression(text: str) -> bool:
    """Whether `text` is arithmetic on symbols and numbers in the words of sympy and torch, of bounded length and depth."""
    text = text.rstrip(" ")
    at = depth = 0
    before = ""
    while at < len(text) <= LONGEST:
        token = _TOKEN.match(text, at)
        if token is None or (token["call"] and not _FUNCTIONS.fullmatch(token["call"])):
            return False
        if token["name"] and keyword.iskeyword(token["name"]) and token["name"] not in ("True", "False"):
            return False
        if token["quoted"] and before not in ("Symbol", "Float"):  # sympy would evaluate the text of any other
            return False
        before = token["call"] or ""
        depth += bool(token["call"]) + (token["mark"] == "(") - (token["mark"] == ")")
        if not 0 <= depth <= DEEPEST:
            return False
        at = token.end()
    return at > 0 and at == len(text) and depth == 0
