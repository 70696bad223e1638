"""Models from files: `load_model` tells from a file's content what it holds, and runs no code from it unless told to.

model.pt2                  torch.export.save               an ExportedProgram
model.onnx                 any exporter                    an ExportedProgram; a module where more sizes than the batch are open
model.onnx:boxes,scores    the same                        the same of the part that makes these tensors
weights.pt --arch M:C      a state dict, or safetensors    the module that C() returns, with these weights
module.pt --allow-pickle   torch.save(module)              the module; unpickling runs code from the file
zoo.py:make                                                what make() returns
"""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qdeploy.core.errors import InputError, NotInstalledError, OptionError, one_line
from qdeploy.files.format import COPY_AGAIN, EXPORT, MODEL_FILES, describe_kind, model_kind
from qdeploy.files.pt2 import load_program
from qdeploy.files.reference import add_to_path, call, is_reference, load_callable, where

__all__ = ["load_callable", "load_model"]

_WRAPPERS = ("state_dict", "model_state_dict", "model")  # the usual keys of training checkpoints
_PREFIXES = ("module.", "_orig_mod.")  # what DataParallel and torch.compile put before every name
_PLAIN = re.compile(
    r"collections OrderedDict|torch \w+(Storage|Tensor)|torch (Size|device|u?int\d+|b?float\w+|bool)"
    r"|torch\.storage \w+|torch\._utils _rebuild_\w+|torch\.nn\.parameter Parameter|torch\._tensor \w+"
)


def load_model(path: Path | str, *, arch: str | None = None, allow_pickle: bool = False) -> nn.Module | ExportedProgram:
    """The model in the file at `path`, or that the MODULE:CALLABLE `path` returns; a module comes in eval mode.

    `arch` is the MODULE:CALLABLE that returns the module to which a state dict belongs. Raises `InputError` for files that
    cannot be used, `OptionError` where `arch` is missing, wrong or of no use, `NotInstalledError` without safetensors.
    """
    text, ends = _part(str(path))
    if is_reference(text):
        _refuse_arch(arch, f"'{text}' returns a whole model")
        return _from_callable(text)
    path = Path(text)
    kind = model_kind(path)
    if ends and kind != "onnx":
        what = f"only of an ONNX file a part can be taken, and '{path}' is {describe_kind(kind)}"
        raise OptionError(what, found=f"the tensors {', '.join(ends)}", action="leave them out")
    if kind == "pt2":
        _refuse_arch(arch, f"'{path}' holds a whole model")
        return load_program(path, trusted=allow_pickle)
    if kind == "onnx":
        from qdeploy.importing.program import load

        _refuse_arch(arch, f"'{path}' holds a whole model")
        return load(path, ends)
    content = _read_safetensors(path) if kind == "safetensors" else _read_torch(path, allow_pickle)
    if isinstance(content, Mapping):
        content = _unwrap(content)
    if isinstance(content, nn.Module):
        _refuse_arch(arch, f"'{path}' holds a whole module")
        return content.eval()
    if not isinstance(content, dict):
        raise InputError(f"'{path}' holds no model", found=_describe(content), allowed=MODEL_FILES, action=EXPORT)
    return _from_state(path, content, arch)


def _part(text: str) -> tuple[str, tuple[str, ...]]:
    """The path in MODEL.onnx:TENSOR,TENSOR and the tensors; `text` itself where it names no tensors.

    >>> _part("yolo.onnx:boxes,scores:0"), _part("zoo.py:make")
    (('yolo.onnx', ('boxes', 'scores:0')), ('zoo.py:make', ()))
    """
    name, mark, tensors = text.partition(".onnx:")
    if not mark or Path(text).exists():
        return text, ()
    return f"{name}.onnx", tuple(tensor.strip() for tensor in tensors.split(","))


def _refuse_arch(arch: str | None, reason: str) -> None:
    if arch is not None:
        raise OptionError(f"--arch is only for a state dict, and {reason}", found=arch, action="leave --arch out")


def _from_callable(reference: str) -> nn.Module | ExportedProgram:
    model = call(reference, "MODEL")
    if isinstance(model, ExportedProgram):
        return model
    return _checked(model, reference, "MODEL").eval()


def _checked(model: object, reference: str, option: str) -> nn.Module:
    if isinstance(model, torch.jit.ScriptModule) or not isinstance(model, nn.Module):
        hint = "call the class" if isinstance(model, type) else "return the model"
        raise OptionError(
            f"{option}: '{reference}' returned no model", found=_describe(model), allowed="a torch.nn.Module", action=hint
        )
    return model


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        what = f"'{path}' is a safetensors file, and the package that reads it is not installed"
        raise NotInstalledError(what, action="pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:  # its own SafetensorError and others for damaged files
        found = f"a damaged safetensors file ({one_line(error)})"
        raise InputError(f"cannot read '{path}'", found=found, action=COPY_AGAIN) from error


def _read_torch(path: Path, allow_pickle: bool) -> object:
    """What torch.save put into the file: plain tensors are read without running code, all else only with `allow_pickle`."""
    try:
        return _torch_load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds, for code as for damage
        foreign = _foreign_globals(path)
        if not allow_pickle and not foreign:
            found = f"a damaged torch.save file ({one_line(error)})"
            raise InputError(f"cannot read '{path}'", found=found, action=COPY_AGAIN) from error
        if not allow_pickle:
            raise InputError(
                f"'{path}' holds pickled Python objects, and unpickling them runs code from the file",
                found=", ".join(foreign[:6]) + (", ..." if len(foreign) > 6 else ""),
                allowed=MODEL_FILES,
                action="pass --allow-pickle if you trust the file, or save the model with torch.export.save",
            ) from error
    add_to_path(Path.cwd())
    try:
        return _torch_load(path, weights_only=False)
    except (Exception, SystemExit) as error:  # code from the file may raise anything
        raise _unpickling_failed(path, error) from error


def _torch_load(path: Path, *, weights_only: bool) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=weights_only)


def _unpickling_failed(path: Path, error: BaseException) -> InputError:
    text = str(error)
    missing = None
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = f"module '{error.name}'"
    elif isinstance(error, (AttributeError, ImportError)) and (
        found := re.search(r"attribute '([\w.]+)' on .*module '([\w.]+)'", text)
    ):
        missing = f"'{found[1]}' in module '{found[2]}'"
    if missing is None:
        return InputError(f"cannot unpickle '{path}'", found=one_line(error) + where(error), action=EXPORT)
    return InputError(
        f"cannot unpickle '{path}', for its classes cannot be imported here",
        found=f"no {missing}",
        action="run in the folder where it can be imported, or save model.state_dict() and pass --arch MODULE:CALLABLE",
    )


def _foreign_globals(path: Path) -> list[str]:
    """The names that the file's pickles import beyond those of plain tensors, found without running them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            stream = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        names = _globals(io.BytesIO(stream))
    else:
        with path.open("rb") as legacy:
            names = _globals(legacy)
    return sorted({name.replace(" ", ".") for name in names if not _PLAIN.fullmatch(name)})


def _globals(file: BinaryIO) -> list[str]:
    """The "module name" pairs that the pickles in `file` import. A legacy file has four: magic, protocol, system, object."""
    names: list[str] = []
    strings = ["?", "?"]
    try:
        for _ in range(4):
            for opcode, argument, _position in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(str(argument))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(" ".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except ValueError:  # the end of the pickles, or a damaged one
        pass
    return names


def _unwrap(content: Mapping[Any, Any]) -> nn.Module | dict[str, Tensor] | object:
    """The state dict or module inside a checkpoint; the content itself where there is none."""
    for key in _WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, nn.Module):
            return inner
        if isinstance(inner, Mapping) and _is_state(inner):
            return dict(inner)
    return dict(content) if _is_state(content) else _NoState(content)


class _NoState:
    """A dict that is no state dict, for the message about it."""

    def __init__(self, content: Mapping[Any, Any]):
        keys = ", ".join(repr(key) for key in list(content)[:6])
        self.text = f"a dict without tensors, with the keys {keys}" if keys else "an empty dict"


def _describe(content: object) -> str:
    return content.text if isinstance(content, _NoState) else f"an object of type {type(content).__module__}.{type(content).__name__}"


def _is_state(content: Mapping[Any, Any]) -> bool:
    tensors = [isinstance(value, Tensor) for value in content.values()]
    names = all(isinstance(key, str) for key in content)
    extra = all(ok or key.endswith("_extra_state") for key, ok in zip(content, tensors, strict=True)) if names else False
    return any(tensors) and extra


def _from_state(path: Path, state: dict[str, Tensor], arch: str | None) -> nn.Module:
    if arch is None:
        raise OptionError(
            f"'{path}' is a state dict: weights without the module they belong to",
            found=f"{len(state)} tensors, from '{next(iter(state))}'",
            action="pass --arch MODULE:CALLABLE, such as zoo.py:make, that returns the module",
        )
    module = _checked(call(arch, "--arch"), arch, "--arch")
    own = module.state_dict()
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    wrong = _shapes(own, state)
    if not wrong:
        try:
            keys = module.load_state_dict(state, strict=False)
        except Exception as error:  # a module's own hooks may raise anything
            wrong = [one_line(error)]
        else:
            wrong = _listed("missing", keys.missing_keys, keys.unexpected_keys)
            wrong += _listed("unexpected", keys.unexpected_keys, keys.missing_keys)
    if wrong:
        action = "name the callable that builds the module these weights were saved from"
        raise InputError(f"the weights in '{path}' do not fit the module of --arch '{arch}'", found=" / ".join(wrong), action=action)
    return module.eval()


def _shapes(own: Mapping[str, Any], state: Mapping[str, Tensor]) -> list[str]:
    wrong = [
        f"'{key}' {list(value.shape)} where the module has {list(own[key].shape)}"
        for key, value in state.items()
        if isinstance(value, Tensor) and isinstance(own.get(key), Tensor) and own[key].shape != value.shape
    ]
    return [f"{len(wrong)} of another shape: {', '.join(wrong[:3])}"] if wrong else []


def _listed(word: str, keys: list[str], others: list[str]) -> list[str]:
    if not keys:
        return []
    near = get_close_matches(keys[0], others, n=1)
    hint = f" (nearest: '{near[0]}')" if near else ""
    return [f"{len(keys)} {word}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}{hint}"]
