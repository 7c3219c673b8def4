"""Typed access to a JSON object read from a file: a wrong field is named, never guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ztune.errors import FormatError
from ztune.types import Json


@dataclass(frozen=True)
class Fields:
    """A JSON object and the name under which its errors are reported.

    Every accessor raises FormatError naming the field, what was found and what was expected.
    """

    values: Mapping[str, Json]
    where: str

    def _fail(self, key: str, expected: str) -> FormatError:
        got = repr(self.values[key])[:60] if key in self.values else "nothing"
        return FormatError(f'{self.where}: "{key}" is {got}, expected {expected}')

    def version(self, newest: int) -> int:
        """Return "version", refusing one that this program does not know."""
        value = self.integer("version", least=1)
        if value > newest:
            raise FormatError(
                f"{self.where}: format version {value} is newer than this ztune reads ({newest}); "
                "upgrade ztune"
            )
        return value

    def text(self, key: str, among: tuple[str, ...] = ()) -> str:
        value = self.values.get(key)
        if not _is_text(value) or (among and value not in among):
            raise self._fail(key, " or ".join(among) or "a string")
        return str(value)

    def integer(self, key: str, least: int = 0) -> int:
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self._fail(key, f"a whole number of at least {least}")
        return value

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if not _is_number(value):
            raise self._fail(key, "a finite number")
        return float(value)  # type: ignore[arg-type]

    def flag(self, key: str) -> bool:
        value = self.values.get(key)
        if not isinstance(value, bool):
            raise self._fail(key, "true or false")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(_is_text(item) for item in value):
            raise self._fail(key, "a list of strings")
        return tuple(str(item) for item in value)

    def integers(self, key: str) -> tuple[int, ...]:
        value = self.values.get(key)
        if not isinstance(value, list):
            raise self._fail(key, "a list of whole numbers")
        numbers = [v for v in value if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
        if len(numbers) != len(value):
            raise self._fail(key, "a list of whole numbers")
        return tuple(numbers)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) != length or not all(map(_is_number, value)):
            raise self._fail(key, f"a list of {length} numbers")
        return tuple(float(number) for number in value)  # type: ignore[arg-type]

    def object(self, key: str) -> Fields:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self._fail(key, "an object")
        return Fields(value, f"{self.where}: {key}")

    def objects(self, key: str) -> tuple[Fields, ...]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise self._fail(key, "a list of objects")
        return tuple(
            Fields(item, f"{self.where}: {key}[{i}]")
            for i, item in enumerate(value)
            if isinstance(item, dict)
        )


def _is_text(value: Json) -> bool:
    """Say whether this is text that a file name or a terminal can hold."""
    return isinstance(value, str) and "\0" not in value and _encodes(value)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _is_number(value: Json) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False
