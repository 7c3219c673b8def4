"""Where images come from: a data set known by name below a root, or a path to one's own.

    read_source("dtd", Path("/data"))     # the published lists
    read_source("photos", None)           # one's own

One's own are class folders, folders train, val and test, a manifest (folders.py), or a folder with
parquet files of the Hugging Face hub, whose images are extracted beside them once (parquet.py).
"""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path

from ztune.data import parquet
from ztune.data.checking import doubts, is_published
from ztune.data.folders import Listing, read_dataset
from ztune.data.library import NamedData, data_folder, read_named
from ztune.data.named import NAMED, Spec, find_spec
from ztune.errors import ConfigError, DataError

TEMPLATE = "a photo of a {}."
"""The hand-written prompt of data for which none was published."""


def read_source(
    place: str,
    root: Path | None,
    names: Path | None = None,
    tuned: bool = True,
    *,
    pipe: bool = True,
) -> Listing:
    """Return the images of a data set by name, where there is a root, or by path.

    With `tuned` every class must have images to tune with. `names` is a names file as a person
    names it: it may be a pipe, unless a plan names it.

    Raises: ConfigError for an unknown name; DataError when the data cannot be used.
    """
    if root is None:
        return read_dataset(_listed(Path(place)), names, tuned, pipe=pipe)
    data = _read_named(find_spec(place), root, names)
    if tuned and not data.split.train:
        raise DataError(
            f'data set "{data.spec.name}" has no images to tune with, only to test on (tune on '
            "another, and score on this one with ztune eval)"
        )
    return replace(data.dataset(), notes=_remarks_on(data), is_published=is_published(data))


def find_named(place: str, root: Path | None) -> Spec | None:
    """Return the data set that a bare word names, None for a path.

    Raises: ConfigError for a name that is also a path here, or has no root; DataError for a word
        that is neither.
    """
    if Path(place).name != place:  # "./dtd" is a path, whatever is called dtd
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
            f'"{place}" is the name of a data set and a path here (write "./{place}" for the '
            f"path; to mean the data set of the name, start elsewhere and give `root=DIR`)"
        )
    if root is None:
        raise ConfigError(
            f'"{place}" is the name of a data set, and there is no path of that name (add '
            f'`root=DIR`, the folder that holds "{spec.folder}")'
        )
    return spec


def _suggest(place: str, root: Path | None) -> None:
    """Raise DataError where a name was meant: one is close, or there is a root for it."""
    close = difflib.get_close_matches(place.lower(), NAMED, n=1, cutoff=0.65)
    if close or root:
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(NAMED)}"
        raise DataError(f'data "{place}" does not exist and is no known data set ({hint})')


def _is_same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:  # the other is not there
        return False


def _read_named(spec: Spec, root: Path, names: Path | None) -> NamedData:
    """Read a data set by name, and keep what has to be made where its folder may be written."""
    if names is not None:
        raise ConfigError(f'data set "{spec.name}" brings its class names; leave out `names`')
    return read_named(spec.name, root, save=os.access(data_folder(spec, root), os.W_OK))


def _remarks_on(data: NamedData) -> tuple[str, ...]:
    """Return what of a data set by name is not as published, a line each."""
    title, remarks = data.spec.title, []
    if not data.has_published_lists:
        extracted = data.root.name in parquet.EXTRACTED
        remarks.append(
            f"{title} has no published split file here, so its train, val and test are "
            f"{'those of its parquet files' if extracted else 'drawn by ztune'}"
        )
    return (*remarks, *(f"{title} has {doubt}" for doubt in doubts(data)))


def _listed(path: Path) -> Path:
    """Return a path as `read_dataset` takes it: of parquet files, the manifest of their images.

    Parquet files beside class folders are left alone, as all other files there.
    """
    if not path.is_dir():
        return path
    folders = {p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if folders - {"data", *parquet.EXTRACTED} or not (files := parquet.parquet_files(path)):
        return path
    return parquet.extract(files, parquet.extracted_below(path)) / parquet.MANIFEST
