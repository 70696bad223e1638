"""What the command line prints: results on standard output, as tables or as JSON; progress on a terminal only."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdeploy.core.progress import StepProgress
    from qdeploy.verification.debug import Divergence
    from qdeploy.verification.verify import Report, Result


LINE = "\n" + 17 * " "
"""A new line below the values of a table with one entry."""


@contextmanager
def silence_torch() -> Iterator[None]:
    """Keep off the terminal what torch prints and logs, graphs and tracebacks, before it raises an error that says enough."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


class Console:
    """Where results and progress go: a table or JSON on standard output, progress on a terminal only."""

    def __init__(self, as_json: bool, quiet: bool):
        self.as_json = as_json
        self.quiet = quiet
        self.output = sys.stdout
        if as_json:  # what the user's own code prints is no part of the document
            sys.stdout = sys.stderr

    def say(self, text: str) -> None:
        if not self.as_json and not self.quiet:
            print(text)

    def show(self, data: dict[str, Any], otherwise: Callable[[], None]) -> None:
        self.dump(data)
        self.print(otherwise)

    def dump(self, data: object) -> None:
        if self.as_json:
            print(json.dumps(data, indent=1), file=self.output)

    def print(self, table: Callable[[], None]) -> None:
        if not self.as_json and not self.quiet:
            table()

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        if self.quiet or self.as_json or not sys.stderr.isatty():
            yield lambda done: None
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=RichConsole(stderr=True)) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.update(task, completed=done)

    @contextmanager
    def step_progress(self) -> Iterator[StepProgress]:
        """How the steps of a recipe go: a bar a step, with what it works on, its loss and the time that is left."""
        if self.quiet or self.as_json or not sys.stderr.isatty():
            yield lambda what, done, total, loss=None: None
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        texts = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"), TextColumn("{task.fields[loss]}"))
        tasks: dict[str, TaskID] = {}
        with Progress(*texts, TimeElapsedColumn(), TimeRemainingColumn(), console=RichConsole(stderr=True)) as bar:

            def show(what: str, done: int, total: int, loss: float | None = None) -> None:
                step, _, part = what.partition(" ")
                if step not in tasks:
                    tasks[step] = bar.add_task(step, what="", loss="")
                bar.update(tasks[step], completed=done, total=total, what=part, loss="" if loss is None else f"loss {loss:.4g}")

            yield show


def print_steps(log: Sequence[dict[str, Any]]) -> None:
    """What the steps of a recipe brought."""
    from rich.console import Console as RichConsole
    from rich.table import Table

    if not log:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "before", "after", "gain", "", "seconds", "decision", "what was done"):
        table.add_column(column, justify="left" if column in ("step", "", "decision", "what was done") else "right")
    for entry in log:
        numbers = [f"{entry[key]:.4g}" for key in ("before", "after")] + [f"{entry['gain']:+.3g}"]
        table.add_row(entry["step"], *numbers, entry["metric"], f"{entry['seconds']:.1f}", entry["decision"], entry["reason"])
    RichConsole(width=None if sys.stdout.isatty() else 160).print(table)


def _print_outputs(report: Report, console: Any) -> None:
    """The SQNR of every output and part of one, where there are several."""
    from rich.markup import escape
    from rich.table import Table

    rows = [row for row in report.results if row.outputs and row.name != "simulated"]
    names = list(rows[0].outputs) if rows else []
    if len(names) < 2:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("SQNR dB to the simulation", *(row.name for row in rows)):
        table.add_column(column, justify="right" if column != "SQNR dB to the simulation" else "left")
    for name in names:
        levels = [row.outputs.get(name) for row in rows]
        table.add_row(escape(name), *("" if v is None else "exact" if v >= 999 else f"{v:.1f}" for v in levels))
    console.print(table)


def print_report(report: Report, out: str, data: Sequence[str]) -> None:
    """The table of a verification, and what to do next where not all is well; `data` are the options that name the samples."""
    from rich.console import Console as RichConsole
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "",
        "accuracy",
        "top-1 agreement",
        *([report.metric] if report.metric else []),
        "SQNR dB",
        "max steps",
        "nodes",
        "size",
        "decides",
        "check",
    ):
        table.add_column(column, justify="left" if column in ("", "decides", "check") else "right", no_wrap=column == "")
    for r in report.results:
        placed = f"{r.placement['accelerator']} + {r.placement['fallback']} on CPU" if r.placement else ""
        table.add_row(
            r.name,
            "" if r.accuracy is None else f"{r.accuracy:.2%}",
            "" if r.agreement is None else f"{r.agreement:.2%}",
            *(["" if r.metric is None else f"{r.metric:.4g}"] if report.metric else []),
            "" if r.sqnr is None else "exact" if r.sqnr >= 999 else f"{r.sqnr:.1f}",
            "" if r.max_steps is None else f"{r.max_steps:g}",
            placed,
            f"{r.bytes / 1024:.0f} KiB",
            "yes" if r.verdict and r.decides else "",
            escape(_check(r)),
        )
    console = RichConsole(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(f"{report.results[0].samples} samples", style="dim")
    _print_outputs(report, console)
    for fault in (*report.faults, *report.quality):
        console.print(f"{'accepted' if report.accepted and fault in report.quality else 'fault'}: {fault}", markup=False)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    if report.unrecorded:
        console.print(f"note: this result is not kept in the artifact, for {report.unrecorded}", markup=False)
    for step in report.next_steps(out, data):
        console.print(step, markup=False, highlight=False, soft_wrap=True)


def _check(row: Result) -> str:
    """What came of a row, in words."""
    if row.faults:
        return "; ".join((*row.faults, *row.remarks))
    if not row.verdict:
        return ""
    return "; ".join(row.remarks if any(remark.startswith(row.verdict) for remark in row.remarks) else (row.verdict, *row.remarks))


def print_divergence(found: Divergence) -> None:
    """The table of a comparison tensor by tensor, and what it says."""
    from rich.console import Console as RichConsole
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tensor", "ops", "scheme", "codes that differ", "largest, in steps"):
        table.add_column(column, justify="right" if column in ("codes that differ", "largest, in steps") else "left", overflow="fold")
    for one in found.tensors:
        numbers = (
            (one.failure, "") if one.failure else (f"{one.differ:.2%}" if one.differ else "", f"{one.largest}" if one.differ else "")
        )
        table.add_row(*map(escape, (one.tensor, one.op, one.scheme, *numbers)))
    console = RichConsole(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(f"{found.samples} samples on {found.runtime}", style="dim")
    first = found.first
    if first is not None:
        which = "the first to part, given the simulation's inputs" if found.isolated else "the first to part"
        text = f"{which}: '{first.tensor}' ({first.op}), {first.differ:.2%} of its codes, by up to {first.largest} steps"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    elif not any(one.failure for one in found.tensors):
        text = "no tensor parts: where verify saw a difference, it comes from ops that the runtime fuses across tensors"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_rows(rows: Sequence[dict[str, Any]], columns: Sequence[str], name: str | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
    elif name:
        for key, value in rows[0].items():
            parts = value if isinstance(value, list) else [value]
            print(f"{key:16} {(LINE if any(isinstance(p, dict) for p in parts) else ', ').join(map(_words, parts))}")
    else:
        widths = [max(len(str(row[column])) for row in [dict(zip(columns, columns, strict=True)), *rows]) for column in columns]
        for row in [dict(zip(columns, columns, strict=True)), *rows]:
            print("  ".join(str(row[column]).ljust(width) for column, width in zip(columns, widths, strict=True)).rstrip())


def _words(value: object) -> str:
    """A value for reading: a table of options as a line."""
    if not isinstance(value, dict):
        return str(value)
    return " ".join(str(v) if k in ("name", "observer") else f"{k}={v}" for k, v in value.items())
