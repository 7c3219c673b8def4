"""Schemas of all file formats: typed values from JSON documents, with errors that name the place.

A dataclass or `Record` defines a format's fields: `convert` reads it, `plain` writes it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, inspect

from ztune.errors import ConfigError, FormatError
from ztune.io.config import nearest
from ztune.io.old_formats import UPGRADES
from ztune.types import Json

T = TypeVar("T")
Count = Annotated[int, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
_DAMAGED = "file damaged or written by another program"
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
_PLACED = re.compile(r"(.*?)(?: - at `(?:key in )?(.*)`)?", re.DOTALL)
_NOT_SAID = object()
_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON object with exactly the fields as keys."""


class _Version(Record, frozen=True):
    version: AtLeastOne


def decoded(text: bytes | str, where: str) -> dict[str, Json]:
    """Parse a JSON object with finite numbers and strings without NUL.

    Raises: FormatError naming `where`.
    """
    try:
        raw = text.encode() if isinstance(text, str) else text
        value = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # also invalid UTF-8
        raise FormatError(f"{where}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(value).__name__}")
    if _NUL.search(raw):
        raise FormatError(f"{where}: a string has a NUL character ({_DAMAGED})")
    return value


def current(document: Mapping[str, Json], form: str, newest: int, where: str) -> dict[str, Json]:
    """Return a document of the format `form`, upgraded to the newest version.

    `format` and `version` are left out.

    Raises: FormatError for another format, or a newer version.
    """
    if document.get("format") != form:
        raise FormatError(
            f'{where}: $.format: expected "{form}", got {_short(document.get("format"))} (not '
            "written by ztune)"
        )
    said = {key: value for key, value in document.items() if key == "version"}
    version = convert(said, _Version, where).version
    if version > newest:
        raise FormatError(
            f"{where}: format version {version} is newer than this ztune reads ({newest}); "
            "upgrade ztune"
        )
    content = {key: value for key, value in document.items() if key not in ("format", "version")}
    for upgrade in UPGRADES.get(form, ())[version - 1 : newest - 1]:
        content = upgrade(content)
    return content


def convert(value: object, kind: type[T], where: str) -> T:
    """Convert plain JSON to `kind`: a Record, a dataclass or a type of plain values.

    Raises: FormatError, as `WHERE: $.queries: expected int, got str (file damaged or …)`.
    """
    try:
        _refuse_unknown(value, kind)
        made: T = msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        raise FormatError(f"{where}: {_explain(str(problem), value, kind)} ({_DAMAGED})") from None
    except ConfigError as problem:  # from a dataclass's own checks
        raise FormatError(f"{where}: {problem} ({_DAMAGED})") from None
    return made


def plain(value: Any) -> dict[str, Json]:
    """Convert a Record or dataclass to a JSON object.

    Raises: ValueError for a number that is not finite.
    """
    document: dict[str, Json] = json.loads(json.dumps(msgspec.to_builtins(value), allow_nan=False))
    return document


def _refuse_unknown(value: object, kind: Any) -> None:
    """Reject unknown keys of a dataclass, as msgspec does for a Record."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        known = {field.name for field in dataclasses.fields(kind)}
        for key in value:
            if key not in known:
                raise msgspec.ValidationError(f"Object contains unknown field `{key}`")


def _explain(problem: str, value: Any, kind: Any) -> str:
    """Return msgspec's message with the place first, then what was found and expected."""
    found = _PLACED.fullmatch(problem)
    assert found is not None
    said, place = found[1].replace("`", ""), found[2] or "$"
    types: list[Any] = [inspect.type_info(kind)]
    for name, index in _STEP.findall(place):
        types = [part for one in types for part in _parts(one, name, value)]
        value = _part(value, name or index)
    types = [one for kind in types for one in _options(kind, value)]
    if "unknown field" in said:
        key = said.removeprefix("Object contains unknown field ")
        known = [f.encode_name for one in types for f in getattr(one, "fields", ())]
        return f'{place}: unknown key "{key}"{nearest(key, known)}; known: {", ".join(known)}'
    if types and all(isinstance(one, inspect.LiteralType) for one in types):
        said = f"expected {' or '.join(str(word) for one in types for word in one.values)}"
    said = said[:1].lower() + said[1:]
    if value is _NOT_SAID or "got" in said or "missing" in said:
        return f"{place}: {said}"
    return f"{place}: {said}, got {_short(value)}"


def _options(kind: Any, value: Any) -> Iterator[Any]:
    """Yield the types of a union, or only the tagged Record that `value` names."""
    types: tuple[Any, ...] = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    tagged = [one for one in types if getattr(one, "tag_field", None)]
    given = value if isinstance(value, dict) else {}
    yield from [one for one in tagged if one.tag == given.get(one.tag_field)] or types


def _parts(kind: Any, name: str, value: Any) -> Iterator[Any]:
    """Yield the types of a field, or with an empty name of an item."""
    for one in _options(kind, value):
        if name and name == getattr(one, "tag_field", None):
            yield inspect.LiteralType((one.tag,))
        elif name:
            yield from (f.type for f in getattr(one, "fields", ()) if f.encode_name == name)
        else:
            yield from (
                getattr(one, part) for part in ("item_type", "value_type") if hasattr(one, part)
            )


def _part(value: Any, key: str) -> Any:
    try:
        return value[int(key)] if isinstance(value, list | tuple) else value[key]
    except (KeyError, ValueError, TypeError, IndexError):  # `...` of a mapping
        return _NOT_SAID


def _short(value: object) -> str:
    return "nothing" if value is None else repr(value)[:60]
