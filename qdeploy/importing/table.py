"""The table of ONNX operators: each is a function of torch calls, whose keyword arguments are the operator's attributes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch.fx.traceback import annotate

from qdeploy.importing.values import Value, plain, tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One operator. `settings` are the inputs that must be numbers, not tensors; `mixed`: whether the others may be numbers.

    `run` is what the graph calls; `attributes` are those that it knows; `many`: whether it returns several tensors.
    """

    name: str
    run: Callable[..., Any]
    settings: frozenset[int]
    mixed: bool
    many: bool
    attributes: frozenset[str]
    inputs: int | None


OPERATORS: dict[str, Operator] = {}


def operator(*names: str, settings: Iterable[int] = (), mixed: bool = False, many: bool = False) -> Callable[..., Callable[..., Any]]:
    """Enter a function into the table under the names of operators that it computes."""
    numbers = frozenset(settings)

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*inputs: Value, scope: tuple[str, str] | None = None, **attributes: Any) -> Any:
            """`scope`: the module that the node comes from, and its class; torch.export notes it at every op that is called here."""
            given = [plain(v) if at in numbers else v if mixed else tensor(v) for at, v in enumerate(inputs)]
            with annotate({"scope": scope}) if scope else nullcontext():
                return function(*given, **attributes)

        parameters = inspect.signature(function).parameters.values()
        kinds = [p.kind for p in parameters]
        for name in names:
            assert name not in OPERATORS, name
            OPERATORS[name] = Operator(
                name=name,
                run=run,
                settings=numbers,
                mixed=mixed,
                many=many,
                attributes=frozenset(p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY),
                inputs=None if inspect.Parameter.VAR_POSITIONAL in kinds else kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD),
            )
        return run

    return enter
