"""Settings: frozen dataclasses filled by name from `key=value` strings or a JSON object."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from ztune.errors import ConfigError

if TYPE_CHECKING:  # numpy is loaded with it
    from ztune.types import Json

T = TypeVar("T")
_TABLE = Mapping[str, Any]
_NAMES: dict[Any, str] = {
    tuple[str, ...]: "a list of strings",
    tuple[int, ...]: "a list of integers",
    tuple[_TABLE, ...]: "a list of tables",
    _TABLE: "a table",
    Mapping[str, str]: "a table of strings",
}
_WORDS: dict[str, Json] = {"none": None, "null": None, "true": True, "false": False}


def configured(kind: type[T], settings: Mapping[str, Json], where: str) -> T:
    """Return `kind` with `settings` over its defaults; strings are parsed as the field's type.

    Raises: ConfigError for an unknown key, listing the known ones, or a wrong type.
    """
    hints = _hints(typing.cast(Any, kind))
    known = [f.name for f in dataclasses.fields(typing.cast(Any, kind)) if f.init]
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(
                f'{where} has no setting "{key}"{nearest(key, known)}; it has: {", ".join(known)}'
            )
        values[key] = _converted(value, hints[key], f"{where}: {key}")
    required = [
        f.name
        for f in dataclasses.fields(typing.cast(Any, kind))
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f'{where} lacks "{missing[0]}"')
    return kind(**values)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean …?)" for an unknown word, or "" without a near match."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _converted(value: Json, hint: Any, where: str) -> Json:
    import msgspec  # not for `ztune --help`

    for reading in _readings(value):
        with contextlib.suppress(msgspec.ValidationError):
            made: Json = msgspec.convert(reading, hint)
            if isinstance(made, float) and not math.isfinite(made):
                raise ConfigError(f"{where} is {value!r}, expected a finite number")
            return made
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    names = " or ".join(
        _NAMES.get(option, getattr(option, "__name__", str(option)))
        for option in options
        if option is not types.NoneType
    )
    raise ConfigError(f"{where} is {value!r}, expected {names}")


def _readings(value: Json) -> Iterator[Json]:
    """Yield the parsed values of a string, in order of preference, then the value itself."""
    if isinstance(value, str):
        if value in _WORDS:
            yield _WORDS[value]
        for number in (int, float):
            with contextlib.suppress(ValueError):
                yield number(value)
    yield value
    if isinstance(value, float) and value.is_integer():
        yield int(value)


def as_json(config: Any) -> dict[str, Json]:
    """Return a config's fields as a JSON object."""
    return dict(dataclasses.asdict(config))


def require(config: object, least: float, *names: str, above: bool = False) -> None:
    """Check that settings are at least, or `above`, a number, or None.

    Raises: ConfigError.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value > least if above else value >= least):
            raise ConfigError(
                f"{name} is {value}, expected {'more than' if above else 'at least'} {least}"
            )
