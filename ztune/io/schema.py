"""Typed values from documents: every file of ours is read here, and an error names the place.

A dataclass or `Record` is the one list of a format's fields: `convert` reads it, `plain` writes it.
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
    """A JSON object whose keys are the fields: all of them, and no other."""


class _Version(Record, frozen=True):
    version: AtLeastOne


def decoded(text: bytes | str, where: str) -> dict[str, Json]:
    """Return the JSON object of a text, whose numbers are finite and whose strings have no NUL.

    Raises: FormatError naming `where`.
    """
    try:
        raw = text.encode() if isinstance(text, str) else text
        value = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # also what is no UTF-8
        raise FormatError(f"{where}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, got {type(value).__name__}")
    if _NUL.search(raw):
        raise FormatError(f"{where}: a string has a NUL character ({_DAMAGED})")
    return value


def current(document: Mapping[str, Json], form: str, newest: int, where: str) -> dict[str, Json]:
    """Return a document of the format `form` as its newest version has it.

    `format` and `version` are left out; an older version is brought up to date.

    Raises: FormatError for another program's document, and for one of a newer version.
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
    """Return plain JSON as `kind`: a Record, a dataclass or any type of plain values.

    Raises: FormatError, as `WHERE: $.queries: expected int, got str (file damaged or …)`.
    """
    try:
        _refuse_unknown(value, kind)
        made: T = msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        raise FormatError(f"{where}: {_told(str(problem), value, kind)} ({_DAMAGED})") from None
    except ConfigError as problem:  # of a dataclass that checks itself
        raise FormatError(f"{where}: {problem} ({_DAMAGED})") from None
    return made


def plain(value: Any) -> dict[str, Json]:
    """Return a Record or dataclass as a JSON object.

    Raises: ValueError for a number that is not finite.
    """
    document: dict[str, Json] = json.loads(json.dumps(msgspec.to_builtins(value), allow_nan=False))
    return document


def _refuse_unknown(value: object, kind: Any) -> None:
    """See that a dataclass is given fields alone, as msgspec sees for a Record."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        known = {field.name for field in dataclasses.fields(kind)}
        for key in value:
            if key not in known:
                raise msgspec.ValidationError(f"Object contains unknown field `{key}`")


def _told(problem: str, value: Any, kind: Any) -> str:
    """Return msgspec's words with the place first, what was found there, and what may be there."""
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
    """Yield the types of a union; of Records that name their kind the one that `value` names."""
    types: tuple[Any, ...] = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    tagged = [one for one in types if getattr(one, "tag_field", None)]
    given = value if isinstance(value, dict) else {}
    yield from [one for one in tagged if one.tag == given.get(one.tag_field)] or types


def _parts(kind: Any, name: str, value: Any) -> Iterator[Any]:
    """Yield the types that a field, or with an empty name an item, of a type may have."""
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
