"""Terminal output: results on standard output, everything else on standard error."""

from __future__ import annotations

import io
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ztune.printing import duration, printable, printable_lines

if TYPE_CHECKING:  # rich is slow to load: help and usage errors do without
    import rich.table
    from rich.console import Console

    from ztune.types import Json

OptionOf = Callable[[str], str | None]
"""Maps an argument of the library to its command-line option, None without one."""


def _none(_argument: str) -> None:
    return None


class Output:
    """A verb's output, and the library's Progress.

    `quiet` drops progress and remarks; `as_json` prints results as JSON instead of text.
    """

    def __init__(self, quiet: bool = False, as_json: bool = False, option_of: OptionOf = _none):
        from rich.console import Console

        self.quiet = quiet
        self.as_json = as_json
        self._option_of = option_of
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # characters that the terminal cannot encode
                stream.reconfigure(errors="backslashreplace")
        # A class may be called ":dog:" or "[red]".
        self._errors = Console(
            stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False
        )
        # Output to a file or pipe is not wrapped.
        width = None if sys.stdout.isatty() else 400
        self._results = Console(
            width=width, highlight=False, soft_wrap=True, markup=False, emoji=False
        )

    def remark(self, text: str) -> None:
        """Print a remark."""
        if not self.quiet:
            self._errors.print(printable(with_options(text, self._option_of)))

    def warn(self, text: str) -> None:
        """Print a warning, also with --quiet."""
        self._errors.print(printable(with_options(f"warning: {text}", self._option_of)))

    def result(self, document: Mapping[str, Json], lines: Sequence[str | Table] = ()) -> None:
        """Print the verb's result: one JSON document, or lines and tables."""
        if self.as_json:
            print(json.dumps(document, allow_nan=False), flush=True)  # noqa: T201
            return
        for line in lines:
            if isinstance(line, Table):
                self._results.print(line.to_rich(self._option_of))
            else:
                self._results.print(printable(with_options(line, self._option_of)))

    def activity(self, what: str, total: int) -> Ticker:
        """Return a live line on a terminal, plain lines elsewhere, nothing with --quiet."""
        return Ticker(self._errors, what, total, self.quiet)


# Quoted text (double quotes, or a shell's single quotes) is a name or path: it stays as it is.
_ARGUMENT = re.compile(r"\"[^\"]*\"|(?<= )'[^']*'|`([a-z_]+)(?:=([^`]*))?`")


def with_options(text: str, option_of: OptionOf) -> str:
    """Replace `name` and `name=value` in a library message by command-line options.

    An argument without an option loses only its backticks.
    """

    def option(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0]
        shown = option_of(found[1])
        if shown is None:
            return found[0].strip("`")
        return shown if found[2] is None else f"{shown} {found[2]}"

    return _ARGUMENT.sub(option, text)


class Ticker:
    """Progress of one activity, as a context manager."""

    _PLAIN_INTERVAL = 5.0  # seconds between plain lines

    def __init__(self, console: Console, what: str, total: int, quiet: bool):
        self._console = console
        self._what, self._total = printable(what), max(total, 1)
        self._quiet = quiet
        self._live = console.is_terminal and not quiet
        if not self._live:
            return
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            transient=True,
        )

    def __enter__(self) -> Ticker:
        self._started = self._last_line = time.monotonic()
        self._first: int | None = None
        if self._live:
            self._progress.start()
            self._task = self._progress.add_task(self._what, total=self._total, text="")
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live:
            self._progress.stop()

    def update(self, done: int, text: str = "", unit: str = "") -> None:
        """Show progress; the rate counts only what this process did."""
        if self._quiet:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = done
        rate = (done - self._first) / (now - self._started) if now > self._started else 0.0
        left = (self._total - done) / rate if rate > 0 else 0.0
        parts = [f"{done}/{self._total}{unit}", text]
        if rate > 0:
            parts += [f"{rate:.0f}{unit}/s"] if rate >= 1 else []
            parts.append(f"{duration(left)} left")
        line = printable(", ".join(part for part in parts if part))
        if self._live:
            self._progress.update(self._task, completed=done, text=line)
        elif now - self._last_line >= self._PLAIN_INTERVAL:
            self._last_line = now
            self._console.print(f"{self._what}: {line}")


@dataclass(frozen=True)
class Table:
    """A plain table, first column left-aligned, the others right; no header where empty."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: tuple[str, ...] = ()
    """Further left-aligned columns."""

    def to_rich(self, option_of: OptionOf) -> rich.table.Table:
        """Return a rich table, with arguments as command-line options."""
        import rich.table

        named = any(self.columns)
        result = rich.table.Table(
            title=printable(self.title) or None,
            title_justify="left",
            box=None,
            pad_edge=False,
            show_header=named,
        )
        for index, column in enumerate(self.columns):
            figures = index and named and column not in self.words
            justify: Literal["left", "right"] = "right" if figures else "left"
            result.add_column(printable(column), justify=justify, overflow="fold")
        for row in self.rows:
            result.add_row(*(printable(with_options(cell, option_of)) for cell in row))
        return result


def fail(message: str) -> None:
    """Print an error in one line."""
    # A quoted name keeps its line breaks, which are escaped; two spaces may be part of a path.
    one_line = re.sub(r'("[^"]*")|\s*\n\s*', lambda found: found[1] or " ", message.strip())
    sys.stderr.write(f"error: {printable(one_line)}\n")


def show_traceback(error: BaseException) -> None:
    """Print the traceback of an error."""
    sys.stderr.write(printable_lines("".join(traceback.format_exception(error))))
