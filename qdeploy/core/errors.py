"""Errors that a user can cause, and mend. Everything else is a defect of ours and stays an ordinary exception.

>>> str(InputError("no images in 'photos'", found="0 files", allowed="png, jpg", action="name another folder"))
"no images in 'photos'; found: 0 files; allowed: png, jpg; to do: name another folder"
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class QDeployError(Exception):
    """A mistake in what the user gave: says what and where, what was found, what is allowed, and what to do."""

    def __init__(self, what: str, *, found: object = None, allowed: object = None, action: str | None = None):
        parts = [what]
        for label, part in (("found", found), ("allowed", allowed), ("to do", action)):
            if part is not None:
                parts.append(f"{label}: {part}")
        super().__init__("; ".join(parts))


class InputError(QDeployError):
    """A model, data or label file, or an array, that cannot be used."""


class CaptureError(QDeployError):
    """A model that `torch.export` cannot capture, with the user's own line where known."""


class OptionError(QDeployError):
    """An option with a value that the chosen backend, recipe or runtime does not allow."""


class QualityError(QDeployError):
    """Quantization destroys what the model computes."""


class ArtifactError(QDeployError):
    """A folder that is not a whole, unchanged artifact."""


class NotInstalledError(QDeployError):
    """A runtime or reader whose package is not installed."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> OptionError:
    """The error for a name that is not in a registry, with the nearest valid name.

    >>> str(unknown_name("backend", "snpee", ["snpe", "tvm"]))
    "unknown backend 'snpee'; allowed: snpe, tvm; to do: did you mean 'snpe'?"
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    action = f"did you mean '{near[0]}'?" if near else "choose one of these"
    return OptionError(f"unknown {kind} {name!r}", allowed=", ".join(known), action=action)


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception's message as one line, with its type; long ones are cut.

    >>> one_line(ValueError("two\\n  lines"))
    'ValueError: two lines'
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return text if len(text) <= limit else text[: limit - 3] + "..."
