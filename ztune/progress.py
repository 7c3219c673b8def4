"""What work that takes long tells of itself: nothing, unless a caller listens."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, TextIO

from ztune.errors import ZtuneWarning


class Activity(Protocol):
    """One activity under way, as a context manager."""

    def __enter__(self) -> Activity: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def update(self, done: int, text: str = "", unit: str = "") -> None:
        """Take note that `done` of the total are done; `unit` follows the numbers."""


class Progress(Protocol):
    """Listens to work under way."""

    def remark(self, text: str) -> None:
        """Take note of one line that a person may like to know."""

    def activity(self, what: str, total: int) -> Activity:
        """Return what is told how far `what` has come, of `total` steps."""


class Silence:
    """Listens to nothing: the default everywhere, as Progress and as Activity."""

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
    """Warn of what must be heard, though the work goes on."""
    warnings.warn(text, ZtuneWarning, stacklevel=3)


@contextlib.contextmanager
def warnings_told(listener: Callable[[str], None]) -> Iterator[None]:
    """Tell a listener what ztune warns of meanwhile, each time that it does."""
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
