"""`MODULE:CALLABLE`: a function of the user's own, from an importable module or from a .py file.

`zoo.py:make` runs the file zoo.py and takes its `make`; `torchvision.models:resnet18` imports the module. The current folder,
and for a file its own folder, come first on `sys.path`, as they do for a script.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from qdeploy.core.errors import InputError, OptionError, one_line

FORM = "MODULE:CALLABLE, such as zoo.py:make or torchvision.models:resnet18"


def is_reference(text: str) -> bool:
    """Whether `text` is MODULE:CALLABLE rather than the path of a file that exists, or of one that is missing.

    >>> is_reference("zoo.py:make"), is_reference("photos/"), is_reference("C:/photos/1")
    (True, False, False)
    """
    module, colon, name = text.rpartition(":")
    if not (module and colon and all(part.isidentifier() for part in name.split("."))):
        return False
    return not os.path.exists(text)


def load_callable(reference: str, option: str) -> Callable[[], Any]:
    """The callable that `reference` names; messages call it the value of `option` (such as `--arch`).

    Raises `OptionError` for a reference of the wrong form, a missing file, module or attribute, and what is not callable;
    `InputError` where the user's module itself raises while it is imported.
    """
    module_name, colon, name = reference.rpartition(":")
    if not (module_name and colon and name):
        raise OptionError(f"{option} {reference!r} names no callable", found=reference, allowed=FORM, action="add ':' and the name")
    module = _import_file(Path(module_name), option) if module_name.endswith(".py") else _import_name(module_name, option)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            known = sorted(key for key in dir(value) if not key.startswith("_"))
            near = get_close_matches(part, known, n=1)
            action = f"did you mean '{near[0]}'?" if near else "check the name"
            listed = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise OptionError(f"{option}: '{module_name}' has no '{name}'", found=listed or "nothing", action=action)
        value = getattr(value, part)
    if not callable(value):
        found = f"{type(value).__name__}"
        raise OptionError(
            f"{option}: '{reference}' is not callable",
            found=found,
            allowed="a function without arguments",
            action="name a function or class",
        )
    return value  # type: ignore[no-any-return]


def call(reference: str, option: str) -> Any:
    """What the callable returns, called without arguments; what it raises becomes an `InputError` with the user's own line."""
    function = load_callable(reference, option)
    try:
        return function()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise InputError(
            f"{option}: '{reference}' raised an error when called without arguments",
            found=one_line(error) + where(error),
            action="mend the function, or give its arguments default values",
        ) from error


def where(error: BaseException) -> str:
    """' (FILE line N)' of the last line of the user's own code that an exception passed through; empty where there is none."""
    own = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith("<") or frame.filename.startswith(own) or "site-packages" in frame.filename:
            continue
        if Path(frame.filename).is_relative_to(Path(importlib.__file__).parent.parent):
            continue
        return f" ('{frame.filename}' line {frame.lineno})"
    return ""


def add_to_path(folder: Path) -> None:
    """Put `folder` first on `sys.path`, unless it is there."""
    name = str(folder.resolve())
    if name not in sys.path:
        sys.path.insert(0, name)


def _import_name(name: str, option: str) -> ModuleType:
    add_to_path(Path.cwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise _import_failed(name, option, error) from error
        raise OptionError(
            f"{option}: no module '{name}'",
            found=one_line(error),
            allowed=FORM,
            action="run in the folder it can be imported from, install it, or name its .py file",
        ) from error
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise _import_failed(name, option, error) from error


def _import_file(path: Path, option: str) -> ModuleType:
    if not path.is_file():
        raise OptionError(f"{option}: no file '{path}'", found="nothing there", allowed=FORM, action="check the path")
    name = f"qdeploy_user_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    add_to_path(Path.cwd())
    add_to_path(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        del sys.modules[name]
        raise _import_failed(str(path), option, error) from error
    return module


def _import_failed(name: str, option: str, error: BaseException) -> InputError:
    return InputError(
        f"{option}: '{name}' cannot be imported",
        found=one_line(error) + where(error),
        action="mend it, or install what it needs",
    )
