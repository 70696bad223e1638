"""Read `.pt2` files (torch.export.save) without running code that a stranger put into them.

A .pt2 file looks like plain data, but `torch.export.load` unpickles what is marked so, evaluates shape expressions inside sympy, and
makes source text of names. So the file of the user never reaches torch: `archive` reads it once, `program_check` checks each part
against what torch itself writes, and torch loads an archive that is made anew from the checked parts. Sample inputs, guards and extra
files are left out: nobody needs them, and no pickle is read.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qdeploy.core.errors import InputError, one_line
from qdeploy.files.archive import Archive, BadArchive, Fresh
from qdeploy.files.format import COPY_AGAIN
from qdeploy.files.program_check import BadProgram, checked_payloads, checked_program

_MODEL, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_TABLES = {
    "data/weights/model_weights_config.json": "data/weights/",
    "data/constants/model_constants_config.json": "data/constants/",
}
"""The tables of stored tensors, with the folders that they speak of."""
_FACTS = {"archive_format": "pt2", "archive_version": "0", "byteorder": "little"}
_NUMBERS = (".data/version", ".data/serialization_id", "version")
_LEFT_OUT = ("extra/",)
_LONGEST_FACT = 100


def load_program(path: Path, *, trusted: bool) -> torch.export.ExportedProgram:
    """The program of a .pt2 file; unless `trusted`, loaded from checked parts only.

    Raises `InputError` for a file that cannot be read, that another version of torch wrote, or that holds what torch does not write.
    """
    if trusted:
        with path.open("rb") as file:
            return _load(file, path, "the torch that it was exported with")
    try:
        archive = Archive(path)
        with ThreadPoolExecutor(1) as beside:
            damaged = beside.submit(archive.damaged)  # it reads all data once, while torch reads them, and no data are run
            try:
                with _fresh(archive) as fresh:
                    return _load(fresh, path, _torch_version(archive))
            finally:
                if damaged.result():
                    found = f"a wrong checksum of its part '{damaged.result()}'"
                    raise InputError(f"cannot read the model '{path}'", found=found, action=COPY_AGAIN)
    except (BadArchive, BadProgram) as error:
        raise InputError(
            f"'{path}' holds more than a graph and tensors, or not as torch writes them, and loading it could run code from the file",
            found=str(error),
            action="export the model again with this torch and plain tensors, or pass --allow-pickle if you trust the file",
        ) from error


def _fresh(archive: Archive) -> Fresh:
    """An archive of what torch needs, checked."""
    root = {name.partition("/")[0] for name in archive.names()}
    if len(root) != 1:
        raise BadArchive("its parts do not stand in one folder")
    (folder,) = root
    names = {name.partition("/")[2]: name for name in archive.names()}
    parts: dict[str, bytes | memoryview] = {}
    used = {_SAMPLES}
    for inner, name in names.items():
        if inner in _FACTS or inner in _NUMBERS:
            parts[name] = _fact(inner, bytes(archive[name][:_LONGEST_FACT]))
        elif inner == _MODEL:
            with _part(name):
                parts[name] = checked_program(archive[name])
        elif inner in _TABLES:
            place = _TABLES[inner]
            sizes = {other.removeprefix(place): len(archive[full]) for other, full in names.items() if other.startswith(place)}
            with _part(name):
                parts[name], stored = checked_payloads(archive[name], sizes, place)
            used |= set(stored)
            parts |= {f"{folder}/{one}": archive[names[one]] for one in stored}
    for needed in (*_FACTS, _MODEL, *_TABLES):
        if needed not in names and needed != "byteorder":
            raise BadArchive(f"it has no '{needed}'; older torch wrote other files")
    for inner in names:
        if inner not in used and names[inner] not in parts and not inner.startswith(_LEFT_OUT):
            raise BadArchive(f"'{inner}' is no part of a graph with tensors")
    parts[f"{folder}/{_SAMPLES}"] = b""
    known = {name: archive.checksum(name) for name, part in parts.items() if isinstance(part, memoryview)}
    return Fresh(parts, known)


@contextmanager
def _part(name: str) -> Iterator[None]:
    """Say which part it is that is wrong."""
    try:
        yield
    except BadProgram as error:
        raise BadProgram(f"'{name}' {error}") from error


def _fact(name: str, data: bytes) -> bytes:
    """A word or a number about the archive itself."""
    text = data.decode("ascii", "replace").strip()
    if name == "archive_version" and text != _FACTS[name] and text.isdecimal():
        raise BadArchive(f"it has archive version {text}")
    if text != _FACTS.get(name, text) or (name in _NUMBERS and not text.isdecimal()):
        raise BadArchive(f"its '{name}' is {text[:40]!r}")
    return text.encode()


def _load(file: Any, path: Path, written_by: str) -> torch.export.ExportedProgram:
    heard: list[str] = []
    try:
        with _listening(heard):
            return torch.export.load(file)
    except Exception as error:  # torch raises many kinds for files of other versions and for damaged ones
        raise InputError(
            f"torch {torch.__version__} cannot load '{path}'",
            found=heard[-1] if heard else one_line(error),
            allowed="a file that this version of torch can read",
            action=f"export the model again with this torch, or install the one that wrote the file ({written_by}); import the "
            "package of its custom operators first where it has any",
        ) from error


def _torch_version(archive: Archive) -> str:
    name = next(name for name in archive.names() if name.endswith(f"/{_MODEL}"))
    found = re.search(rb'"torch_version": "([\w.+-]+)"', bytes(archive[name]))
    return f"torch {found[1].decode()}" if found else "an unknown version"


@contextmanager
def _listening(heard: list[str]) -> Iterator[None]:
    """Keep torch's warnings from the terminal; the exceptions that it logs and swallows go into `heard`."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1]:
                heard.append(one_line(record.exc_info[1]))

    listener = Listener()
    logging.getLogger("torch.export")  # torch makes it when it has something to say
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.partition(".")[0] == "torch"]
    before = [(logger.propagate, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.propagate, logger.handlers = False, [listener]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, (propagate, handlers) in zip(loggers, before, strict=True):
            logger.propagate, logger.handlers = propagate, handlers
