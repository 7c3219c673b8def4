"""Read text files that list images or classes: CSV and JSONL manifests, and names files.

A manifest has the columns path, label and optionally split, each under one of several names. Paths
are relative to the manifest's folder or absolute, and must be inside it after resolving links, so
that an untrusted manifest cannot make ztune read other files. docs/data.md specifies it.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ztune.errors import DataError
from ztune.io.files import read_bytes, resolves_inside

SplitName = Literal["train", "val", "test"]
_SPLIT_WORDS: Mapping[str, SplitName] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "dev": "val", "test": "test", "testing": "test",
}  # fmt: skip
# Without case and separators: TRAIN, test_set, Training-Images, val2017.
_SPLIT = re.compile(rf"({'|'.join(_SPLIT_WORDS)})(data)?(set|data|images?|split)?((19|20)\d\d)?")
SUFFIXES = (".csv", ".tsv", ".jsonl")
# Names of each column, as returned by `_normalise`.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "path": (
        "path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_name",
        "image_file", "image_path", "img", "img_path",
    ),
    "label": (
        "label", "label_name", "class", "classname", "class_name", "category", "category_name"
    ),
    "split": ("split",),
}  # fmt: skip
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True)
class Listed:
    """An entry of a folder or manifest."""

    path: str
    """Relative to the root, with forward slashes."""
    label: str
    """The class folder's name or the manifest's label, as written."""
    split: SplitName | None


def read_manifest(manifest: Path) -> list[Listed]:
    """Read the images of a .csv, .tsv or .jsonl file, in order.

    Raises: DataError naming the invalid line, or the first missing image.
    """
    where = f'manifest "{manifest}"'
    text = read_text(manifest, where)
    is_jsonl = manifest.suffix.lower() == ".jsonl"
    rows = _jsonl_rows(text, where) if is_jsonl else _csv_rows(text, where)
    root = manifest.parent.resolve()
    listed: dict[str, Listed] = {}
    missing = []
    for line, row in rows:
        path, label, split = (row.get(role) for role in _NAMES)
        if not isinstance(path, str) or not isinstance(label, str) or not path or not label.strip():
            raise DataError(
                f"{where}, line {line}: path is {path!r}, label {label!r}, expected text for both"
            )
        if "\0" in path:
            raise DataError(f"{where}, line {line}: path {path!r} contains a NUL character")
        if not is_utf8(path + label):
            raise DataError(f"{where}, line {line}: path or label contains an unpaired surrogate")
        part = split.strip() or None if isinstance(split, str) else split
        role = split_name(part) if isinstance(part, str) else None
        if part is not None and role is None:
            raise DataError(
                f"{where}, line {line}: split is {split!r}, expected train, val or test (rename "
                "the column if it is not the split)"
            )
        path = _relative(path.replace("\\", "/"), manifest.parent)
        if not is_inside(path) or not resolves_inside(root, path):
            raise DataError(
                f'{where}, line {line}: path "{path}" is outside the manifest\'s folder '
                "(move the manifest to a folder that contains all of its images)"
            )
        if path in listed:
            raise DataError(f'{where}, line {line}: path "{path}" is listed twice')
        if not _is_file(root / path):
            missing.append(path)
        listed[path] = Listed(path, label, role)
    if missing:
        raise DataError(f'{where}: {len(missing)} missing image(s), first "{missing[0]}"')
    if len({item.split is None for item in listed.values()}) == 2:
        raise DataError(f"{where}: some images have no split (expected for all images or none)")
    return list(listed.values())


def read_names(path: Path, *, pipe: bool = False) -> dict[str, str]:
    """Read a names file: one `folder<TAB>class name` per line, ignoring empty lines.

    With `pipe` it may be a pipe.

    Raises: DataError naming the invalid line.
    """
    where = f'names file "{path}"'
    names: dict[str, str] = {}
    for line, text in enumerate(read_text(path, where, pipe=pipe).splitlines(), 1):
        if not text.strip():
            continue
        folder, tab, name = text.partition("\t")
        if not tab or not folder or not name.strip() or "\t" in name.strip():
            raise DataError(f"{where}, line {line}: expected folder, a tab, and the class name")
        if folder in names:
            raise DataError(f'{where}, line {line}: folder "{folder}" is listed twice')
        names[folder] = class_name(name)
    return names


def read_class_list(path: Path) -> tuple[str, ...]:
    """Read class names, one per line, or the second part of `folder<TAB>name`.

    The file may be a pipe.

    Raises: DataError when there are fewer than two, or a duplicate.
    """
    where = f'class names "{path}"'
    lines = [line.strip() for line in read_text(path, where, pipe=True).splitlines()]
    names: dict[str, None] = {}
    for name in (class_name(line.rpartition("\t")[2]) for line in lines if line):
        if name in names:
            raise DataError(f'{where}: duplicate class name "{name}"')
        names[name] = None
    if len(names) < 2:
        raise DataError(f"{where}: expected at least two names, one per line")
    return tuple(names)


def split_name(text: str) -> SplitName | None:
    """Return the split that a folder, file or value is named after, in any usual spelling."""
    found = _SPLIT.fullmatch(re.sub(r"[\W_]+", "", text.casefold()))
    return None if found is None else _SPLIT_WORDS[found[1]]


def class_name(text: str) -> str:
    """Return a class name in canonical form: NFC, since some file systems decompose accents, and
    single spaces.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_text(path: Path, where: str, *, pipe: bool = False) -> str:
    """Return the text of a file with newlines as line ends; `pipe` as for `read_bytes`.

    Raises: DataError.
    """
    try:
        text = read_bytes(path, pipe=pipe).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{where} is not UTF-8 text (save it as UTF-8)") from None
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_inside(path: str) -> bool:
    """Return whether a relative path with forward slashes is lexically inside its root."""
    if os.name == "nt" and ("\\" in path or ":" in path):
        return False
    return "\0" not in path and not {"", ".", ".."} & set(path.split("/"))


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8, unlike some file names."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def escape_surrogates(text: str) -> str:
    """Escape unpaired surrogates (of file names), which SQLite and UTF-8 refuse."""
    return text.encode(errors="backslashreplace").decode()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the system
        return False


def _relative(path: str, folder: Path) -> str:
    """Return a path inside the manifest's folder as a relative one, and others unchanged."""
    if not Path(path).is_absolute():
        return "/".join(part for part in path.split("/") if part not in ("", "."))
    named = Path(path)
    for root in (folder.absolute(), folder.resolve()):
        if named.is_relative_to(root):
            return named.relative_to(root).as_posix()
    return path


def _normalise(name: object) -> str:
    """Return a column's name in the form of `_NAMES`."""
    return "_".join(str(name).lower().replace("-", " ").replace("_", " ").split())


def _roles(names: Iterable[str], where: str) -> dict[str, str]:
    """Return the column names of path, label and split, if present.

    An exact name has priority over alternative names.

    Raises: DataError for ambiguous columns.
    """
    found: dict[str, str] = {}
    for name in names:
        role = _ROLES.get(_normalise(name))
        if role is None or (role in found and _normalise(found[role]) == role != _normalise(name)):
            continue
        if role in found and (_normalise(found[role]) == role) == (_normalise(name) == role):
            raise DataError(
                f'{where}: the columns "{found[role]}" and "{name}" could both be the {role} '
                "(rename or remove one)"
            )
        found[role] = name
    return found


def _is_blank(row: list[str]) -> bool:
    return not any(cell.strip() for cell in row)


def _header(text: str, where: str) -> tuple[str, list[str]]:
    """Return the separator of a table and the column names in its first line.

    Raises: DataError when no separator gives a path and a label, or several do.
    """
    found = []
    for separator in _SEPARATORS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        with contextlib.suppress(csv.Error):
            names = next((row for row in reader if not _is_blank(row)), [])
            if {"path", "label"} <= {_ROLES.get(_normalise(name)) for name in names}:
                found.append((separator, [name.strip() for name in names]))
    if len(found) == 1:
        return found[0]
    first = text.lstrip("\n").partition("\n")[0][:80].strip() or "nothing"
    if found:
        raise DataError(f"{where}: the first line mixes separators: {first}")
    raise DataError(
        f"{where}: the first line is {first}, expected path,label or path,label,split, separated "
        "by commas, semicolons or tabs (docs/data.md lists other column names)"
    )


def _csv_rows(text: str, where: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    separator, names = _header(text, where)
    indices = {role: names.index(name) for role, name in _roles(names, where).items()}
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    started = False
    try:
        for row in reader:
            if _is_blank(row):
                continue
            if started and len(row) != len(names):
                raise _wrong_width(row, names, separator, f"{where}, line {reader.line_num}")
            if started:
                yield reader.line_num, {r: row[index].strip() for r, index in indices.items()}
            started = True
    except csv.Error as error:
        raise DataError(f"{where}, line {reader.line_num}: {error}") from None


def _wrong_width(row: list[str], names: list[str], separator: str, where: str) -> DataError:
    """Return the error for a row with more or fewer cells than the first line."""
    others = [word for mark, word in _SEPARATORS.items() if mark != separator and mark in row[0]]
    advice = f"quote cells that contain {_SEPARATORS[separator]}"
    if len(row) < len(names):
        advice = "empty cells need a separator, too"
    if len(row) == 1 and others:
        advice = f"it contains {others[0]}: use one separator throughout"
    return DataError(
        f"{where}: {len(row)} column(s) separated by {_SEPARATORS[separator]}, expected "
        f"{len(names)} as in the first line ({advice})"
    )


def _jsonl_rows(text: str, where: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    for line, part in enumerate(text.split("\n"), 1):
        if not part.strip():
            continue
        try:
            row = json.loads(part)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}, line {line}: invalid JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f'{where}, line {line}: expected {{"path": ..., "label": ...}}')
        roles = _roles(row, f"{where}, line {line}")
        yield line, {role: row[name] for role, name in roles.items()}
