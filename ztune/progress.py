"""Progress reporting and warnings of long operations; silent by default."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, TextIO

from ztune.errors import ZtuneWarning


class Activity(Protocol):
    """A running activity, as a context manager."""

    def __enter__(self) -> Activity: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def update(self, done: int, text: str = "", unit: str = "") -> None:
        """Report that `done` of the total are done; `unit` follows the numbers."""


class Progress(Protocol):
    """Receives progress reports."""

    def remark(self, text: str) -> None:
        """Report one line of information."""

    def activity(self, what: str, total: int) -> Activity:
        """Return the activity `what` of `total` steps, to report its progress to."""


class Silence:
    """Ignores all reports: the default, as Progress and as Activity."""

    def remark(self, text: str) -> None:
        pass

    def activity(self, what: str, total: int) -> Silence:
        return self

    def update(self, done: int, text: str = "", unit: str = "") -> None:
        pass

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        pass


SILENCE = Silence()


def warn(text: str) -> None:
    """Issue a ZtuneWarning; the operation continues."""
    warnings.warn(text, ZtuneWarning, stacklevel=3)


@contextlib.contextmanager
def forward_warnings(listener: Callable[[str], None]) -> Iterator[None]:
    """Forward every ztune warning inside the context to a listener."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", ZtuneWarning)
        others = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, ZtuneWarning):
                listener(str(message))
            else:
                others(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield
