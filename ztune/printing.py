"""Untrusted text made safe for terminals, tables and plots."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

# C0 and C1 controls, line and paragraph separators, bidirectional marks, overrides and isolates,
# and unpaired surrogates.
_UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# User and password of a URL; a path may have only one of the two slashes. Text after a colon that
# is not a port is a password, even with a slash in it. Bounded, to limit the time on any text.
_PASSWORD = re.compile(
    r"(?<=[A-Za-z0-9+.-]{2})(:/+)"
    r"(?:[^\s/?#]*(?:@|%40)|[^\s/?#:@\[]*:(?!\d+(?:[/?#]|$))\S{0,256}(?:@|%40))"
)


_NAMED = 50  # broken images in an error
_ARGUMENT = re.compile(r"`([a-z_]+(?:=[^`]*)?)`")


def without_marks(text: str) -> str:
    """Return an error's text with plain argument names, for places without options."""
    return _ARGUMENT.sub(r"\1", text)


def quoted(path: Path | str) -> str:
    """Return a path quoted for a shell, for commands suggested in messages."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def printable(text: str) -> str:
    r"""Return a text as one line without terminal controls and without passwords of URLs.

    Controls are shown as escapes such as \x1b; all other characters are unchanged.
    """
    shown = _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return _PASSWORD.sub(r"\1***@", shown)


def one_line(text: object) -> str:
    """Return a printable text without line breaks or runs of spaces."""
    return printable(" ".join(str(text).split()))


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names in quotation marks, with dots if there are more."""
    shown = ", ".join(f'"{name}"' for name in names[:most])
    return shown + (", ..." if len(names) > most else "")


def broken_images(reason: str, paths: Sequence[str]) -> str:
    """Return the error for broken images, which names them all, and why the first is broken."""
    more = "" if len(paths) == 1 else f"; {len(paths)} broken images: {first_few(paths, _NAMED)}"
    return f"{reason}{more} (repair or remove them; or use `skip_broken` in tune, compare and eval)"


def reason_of(error: BaseException, most: int = 200) -> str:
    """Return an error's message in one line, or its type if it has none."""
    text = one_line(getattr(error, "strerror", None) or error) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]}..."


def duration(seconds: float) -> str:
    """Return a duration to two significant digits."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def printable_lines(text: str) -> str:
    """Return a multi-line text with each line printable."""
    return "\n".join(map(printable, text.split("\n")))


def holds_password(address: str) -> bool:
    """Return whether a URL has a user or password."""
    return _PASSWORD.search(address) is not None
