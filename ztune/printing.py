"""What a terminal, a table or a plot shows of a text that anyone may have written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

# What moves a cursor, ends a line or turns the direction of what follows: C0 and C1 controls, line
# and paragraph separators, bidirectional marks, overrides and isolates; and halves of characters.
_UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
# User and password of an address. A path has one slash left of two. What follows a colon and is no
# port is a password, even with a slash in it; bounded, so that no text takes long.
_PASSWORD = re.compile(
    r"(?<=[A-Za-z0-9+.-]{2})(:/+)"
    r"(?:[^\s/?#]*(?:@|%40)|[^\s/?#:@\[]*:(?!\d+(?:[/?#]|$))\S{0,256}(?:@|%40))"
)


_ARGUMENT = re.compile(r"`([a-z_]+(?:=[^`]*)?)`")


def without_marks(text: str) -> str:
    """Return an error's text with its arguments as plain words, for where there are no options."""
    return _ARGUMENT.sub(r"\1", text)


def quoted(path: Path | str) -> str:
    """Return a path as a shell and our options take it, for the commands that messages suggest."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def printable(text: str) -> str:
    r"""Return a text as one line without effect on a terminal, and without passwords of addresses.

    Controls are shown as their escapes, such as \x1b; all other characters stay as they are.
    """
    shown = _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return _PASSWORD.sub(r"\1***@", shown)


def one_line(text: object) -> str:
    """Return a printable text without line breaks or runs of spaces."""
    return printable(" ".join(str(text).split()))


def reason_of(error: BaseException, most: int = 200) -> str:
    """Return in one line why something failed: the error's words, or its type without any."""
    text = one_line(getattr(error, "strerror", None) or error) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]}..."


def printable_lines(text: str) -> str:
    """Return a text of several lines with each of them printable."""
    return "\n".join(map(printable, text.split("\n")))


def holds_password(address: str) -> bool:
    """Return whether an address names a user or password."""
    return _PASSWORD.search(address) is not None
