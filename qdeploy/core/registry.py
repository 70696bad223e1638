"""Names to values: one typed registry for backends, observers, steps and runtimes each.

A registry knows the package whose modules fill it and imports that package's modules once, at the first question. So a new
file in the folder is all that a new entry needs, and importing qdeploy itself imports none of them.

>>> letters: Registry[int] = Registry("letter")
>>> letters.add("a", 1)
1
>>> letters["a"], letters.names()
(1, ('a',))
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

from qdeploy.core.errors import InputError, one_line, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Named values of one kind, filled by the modules of `package`."""

    def __init__(self, kind: str, package: str | None = None):
        self.kind = kind
        self._package = package
        self._values: dict[str, T] = {}

    def add(self, name: str, value: T) -> T:
        """Register `value`; a second value under the same name is our own mistake."""
        assert name not in self._values, f"{self.kind} {name!r} is registered twice"
        self._values[name] = value
        return value

    def __getitem__(self, name: str) -> T:
        """The value called `name`; `OptionError` with the nearest name where there is none."""
        self._load()
        if name not in self._values:
            raise unknown_name(self.kind, name, self._values)
        return self._values[name]

    def __contains__(self, name: str) -> bool:
        self._load()
        return name in self._values

    def __iter__(self) -> Iterator[T]:
        self._load()
        return iter([self._values[name] for name in sorted(self._values)])

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        self._load()
        return tuple(sorted(self._values))

    def load_file(self, path: Path) -> T:
        """Import a user's own file, which registers exactly one value, and return that value.

        Raises `InputError` if the file cannot be imported or registers no value or several.
        """
        self._load()
        before = set(self._values)
        spec = importlib.util.spec_from_file_location(f"qdeploy_user_{path.stem}", path)
        if spec is None or spec.loader is None or not path.is_file():
            raise InputError(f"cannot import {self.kind} file '{path}'", action="name a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their own module up
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the user's own code runs here and may raise anything
            for name in set(self._values) - before:
                del self._values[name]
            raise InputError(f"cannot import {self.kind} file '{path}'", found=one_line(error), action="mend the file") from error
        added = sorted(set(self._values) - before)
        if len(added) != 1:
            for name in added:
                del self._values[name]
            raise InputError(f"'{path}' registers {len(added)} {self.kind}s", allowed="exactly one", action="register one value")
        return self._values.pop(added[0])

    def _load(self) -> None:
        if self._package is None:
            return
        package, self._package = importlib.import_module(self._package), None
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
