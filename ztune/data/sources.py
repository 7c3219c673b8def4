"""Read images from a named data set below a root folder, or from a path.

    read_source("dtd", Path("/data"))     # the published lists
    read_source("photos", None)           # your images

A path is a folder of class folders, of train, val and test folders, a manifest (folders.py), or a
folder with parquet files of the Hugging Face hub, whose images are extracted once (parquet.py).
"""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path

from ztune.data import parquet
from ztune.data.checking import find_deviations, is_published
from ztune.data.folders import Listing, read_dataset
from ztune.data.image_files import is_hidden
from ztune.data.library import NamedData, data_folder, read_named
from ztune.data.named import NAMED, Spec, find_spec
from ztune.errors import ConfigError, DataError

TEMPLATE = "a photo of a {}."
"""The template of data without a published one."""


def read_source(
    place: str,
    root: Path | None,
    names: Path | None = None,
    tuned: bool = True,
    *,
    nested: str | None = None,
    pipe: bool = True,
) -> Listing:
    """Return the images of a named data set, if there is a root, or of a path.

    With `tuned` every class must have training images. The names file `names` may be a pipe, except
    in a plan. `nested` says which of nested folders are classes.

    Raises: ConfigError for an unknown name; DataError when the data cannot be used.
    """
    if root is None:
        return read_dataset(_extract_parquet(Path(place)), names, tuned, nested=nested, pipe=pipe)
    if nested is not None:
        raise ConfigError(f'data set "{place}" has a known layout; omit `nested`')
    data = _read_named(find_spec(place), root, names)
    if tuned and not data.split.train:
        raise DataError(
            f'data set "{data.spec.name}" has only test images (tune on another data set, and '
            "score on this one with ztune eval)"
        )
    return replace(
        data.dataset(), notes=_describe_deviations(data), is_published=is_published(data)
    )


def find_named(place: str, root: Path | None) -> Spec | None:
    """Return the data set of a name, or None for a path.

    Raises: ConfigError for a name that is also a path here, or has no root; DataError for a word
        that is neither.
    """
    if Path(place).name != place:  # "./dtd" is always a path
        return None
    exists = Path(place).exists()
    try:
        spec = find_spec(place)
    except ConfigError:
        if not exists:
            _suggest(place, root)
        return None
    if exists and not (root and _is_same(Path(place), root / spec.folder)):
        raise ConfigError(
            f'"{place}" is both a named data set and a path here (write "./{place}" for the path; '
            "for the named data set, use another working folder and `root=DIR`)"
        )
    if root is None:
        raise ConfigError(
            f'"{place}" is a named data set, and no such path exists (add `root=DIR`, the folder '
            f'that contains "{spec.folder}")'
        )
    return spec


def _suggest(place: str, root: Path | None) -> None:
    """Raise DataError if the user probably meant a name: one is similar, or there is a root."""
    close = difflib.get_close_matches(place.lower(), NAMED, n=1, cutoff=0.65)
    if close or root:
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(NAMED)}"
        raise DataError(f'data "{place}" is neither a path nor a known data set ({hint})')


def _is_same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:  # the other does not exist
        return False


def _read_named(spec: Spec, root: Path, names: Path | None) -> NamedData:
    """Read a named data set, and save a drawn split if its folder is writable."""
    if names is not None:
        raise ConfigError(f'data set "{spec.name}" includes class names; omit `names`')
    return read_named(spec.name, root, save=os.access(data_folder(spec, root), os.W_OK))


def _describe_deviations(data: NamedData) -> tuple[str, ...]:
    """Return how a named data set differs from what was published, one line each."""
    title, remarks = data.spec.title, []
    if len(data.spec.splits) > 1 and data.source is not None and data.has_published_lists:
        others = [n for n in data.spec.splits if n != data.source.name]
        found = [name for name in others if data.source.with_name(name).exists()]
        more = f" ({', '.join(found)} was ignored, as in the published code)" if found else ""
        remarks.append(f"{title}'s split was read from {data.source.name}{more}")
    if not data.has_published_lists:
        extracted = data.root.name in parquet.EXTRACTED
        remarks.append(
            f"{title} has no published split file here, so its train, val and test are "
            f"{'those of its parquet files' if extracted else 'drawn by ztune'}"
        )
    return (*remarks, *(f"{title} has {line}" for line in find_deviations(data)))


def _extract_parquet(path: Path) -> Path:
    """Return a path for `read_dataset`: for parquet files, the manifest of their images.

    Parquet files next to class folders are ignored.
    """
    if not path.is_dir():
        return path
    folders = {p.name for p in path.iterdir() if p.is_dir() and not is_hidden(p.name)}
    if folders - {"data", *parquet.EXTRACTED} or not (files := parquet.parquet_files(path)):
        return path
    return parquet.extract(files, parquet.extracted_below(path)) / parquet.MANIFEST
