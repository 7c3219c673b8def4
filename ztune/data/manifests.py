"""Small text files that name pictures or classes: CSV and JSONL manifests, and names files.

A manifest has the columns path, label and, for all of its pictures or none, split. Paths are
relative to the manifest's own folder and, links followed, never leave it: a manifest may come from
elsewhere, and must not make this program read other files.
"""

from __future__ import annotations

import csv
import io
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ztune.errors import DataError
from ztune.io.files import read_bytes, resolves_inside

SplitName = Literal["train", "val", "test"]
SPLIT_NAMES: Mapping[str, SplitName] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
SUFFIXES = (".csv", ".jsonl")


@dataclass(frozen=True)
class Listed:
    """A picture as a folder or a manifest lists it."""

    path: str
    """Relative to the root, with forward slashes."""
    label: str
    """The class folder's name or the manifest's label, as written."""
    split: SplitName | None


def read_manifest(manifest: Path) -> list[Listed]:
    """Read the pictures of a .csv or .jsonl file, in its order.

    Raises: DataError naming the line that is wrong, or the first picture that is missing.
    """
    where = f'manifest "{manifest}"'
    text = read_text(manifest, where)
    rows = _csv_rows(text, where) if manifest.suffix.lower() == ".csv" else _jsonl_rows(text, where)
    root = manifest.parent.resolve()
    listed: dict[str, Listed] = {}
    missing = []
    for line, row in rows:
        path, label, split = (row.get(key) for key in ("path", "label", "split"))
        if not isinstance(path, str) or not isinstance(label, str) or not path or not label.strip():
            raise DataError(f"{where}, line {line}: expected a path and a label, both as text")
        if not is_utf8(path + label):
            raise DataError(f"{where}, line {line}: path or label holds half a character")
        if split not in (None, "", *SPLIT_NAMES):
            raise DataError(
                f"{where}, line {line}: split is {split!r}, expected train, val or test"
            )
        path = path.replace("\\", "/")
        if not is_inside(path) or not resolves_inside(root, path):
            raise DataError(
                f'{where}, line {line}: path "{path}" leaves the folder of the manifest '
                "(use relative paths, and put the manifest above its pictures)"
            )
        if path in listed:
            raise DataError(f'{where}, line {line}: path "{path}" is listed twice')
        if not _is_file(root / path):
            missing.append(path)
        listed[path] = Listed(path, label, SPLIT_NAMES[str(split)] if split else None)
    if missing:
        raise DataError(f'{where}: "{missing[0]}" is missing, {len(missing)} picture(s) in all')
    if len({item.split is None for item in listed.values()}) == 2:
        raise DataError(f"{where}: some pictures have a split and some have none (all or none)")
    return list(listed.values())


def read_names(path: Path, *, pipe: bool = False) -> dict[str, str]:
    """Read a names file: one `folder<TAB>class name` a line, empty lines ignored.

    With `pipe` it may be one.

    Raises: DataError naming the line that is wrong.
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
            raise DataError(f'{where}, line {line}: folder "{folder}" is named twice')
        names[folder] = class_name(name)
    return names


def read_class_list(path: Path) -> tuple[str, ...]:
    """Read class names to choose among: one a line, or the second part of `folder<TAB>name`.

    A person names the file, so it may be a pipe.

    Raises: DataError when there are fewer than two, or one stands there twice.
    """
    where = f'class names "{path}"'
    lines = [line.strip() for line in read_text(path, where, pipe=True).splitlines()]
    names: dict[str, None] = {}
    for name in (class_name(line.rpartition("\t")[2]) for line in lines if line):
        if name in names:
            raise DataError(f'{where}: "{name}" stands there twice')
        names[name] = None
    if len(names) < 2:
        raise DataError(f"{where}: expected at least two names, one a line")
    return tuple(names)


def class_name(text: str) -> str:
    """Return a class name as it is compared everywhere: composed (NFC), single spaces.

    Some file systems decompose accents, and names must match elsewhere.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_text(path: Path, where: str, *, pipe: bool = False) -> str:
    """Return the text of a file, its lines ended by newlines alone; `pipe` as for `read_bytes`.

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
    """Tell whether a relative path with forward slashes stays below its root as it is written."""
    if os.name == "nt" and ("\\" in path or ":" in path):
        return False
    return "\0" not in path and not {"", ".", ".."} & set(path.split("/"))


def is_utf8(text: str) -> bool:
    """Tell whether a text, perhaps a file's name, can be written to our files."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the system
        return False


def _csv_rows(text: str, where: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = reader.fieldnames or []
        if not {"path", "label"} <= set(header):
            found = ", ".join(header)[:80] or "nothing"
            raise DataError(f"{where}: the first line is {found}, expected path,label or "
                            "path,label,split")  # fmt: skip
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{where}, line {reader.line_num}: {error}") from None


def _jsonl_rows(text: str, where: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    for line, part in enumerate(text.split("\n"), 1):
        if not part.strip():
            continue
        try:
            row = json.loads(part)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}, line {line}: no JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f'{where}, line {line}: expected {{"path": ..., "label": ...}}')
        yield line, row
