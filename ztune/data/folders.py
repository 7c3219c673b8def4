"""List the images and classes of a data set on disk.

The layout is detected:

    root/class/*                      no splits: ztune makes one (splitter.py)
    root/{train,val,test}/class/*     val and test are optional, spellings as in `split_name`
    list.csv, list.tsv, list.jsonl    a manifest (manifests.py)

Class folders may be links and may have sub-folders next to their own images, which belong to the
class. If a folder's images are all in sub-folders, NESTED decides which level is the class.
image_files.py decides what is an image and which folders are skipped. Other files are ignored and
listed. All order is by code point, independent of the file system.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ztune.data.coop import CoopSplit
from ztune.data.image_files import images_below, is_hidden
from ztune.data.manifests import (
    SUFFIXES,
    Listed,
    SplitName,
    class_name,
    escape_surrogates,
    is_utf8,
    read_manifest,
    read_names,
    split_name,
)
from ztune.errors import ConfigError, DataError
from ztune.printing import first_few

NESTED = ("leaf", "top")
"""The classes of nested folders: each innermost folder, or the top folders with all below."""
_LAYOUTS = "root/class/*.jpg, root/{train,val,test}/class/*.jpg, or a .csv, .tsv or .jsonl manifest"
# n01440764, class 3, 001.Albatross, 00012, AnnualCrop; but not a digit's 7, or iPhone.
_UNCLEAR = re.compile(
    r"(?i:[a-z]{1,2}\d{4,}|(class|cls|label|category|id)[ -]?\d+|\d+[._ -]+\D.*|\d{3,})"
    r"|.*[a-z]{2}[A-Z][a-z].*"
)

# Folders that ztune writes, detected by these files: they are not data sets.
_FOREIGN = {"run": ("run.json", "split.json"), "bundle": ("bundle.json", "image.onnx")}


@dataclass(frozen=True)
class ListedImage:
    """One image of a data set."""

    path: str
    """Relative to the data set's root, with forward slashes."""
    label: int
    split: SplitName | None
    """None in a data set without splits."""


@dataclass(frozen=True)
class Listing:
    """Classes by name, and images sorted by path."""

    root: Path
    classes: tuple[str, ...]
    """Sorted by code point, at least two."""
    images: tuple[ListedImage, ...]
    ignored: tuple[str, ...] = ()
    """Ignored files: hidden, of another type, or outside class folders; relative to the root."""
    notes: tuple[str, ...] = ()
    """Remarks for the user, one line each."""
    lists: CoopSplit | None = None
    """Published lists in their order, from which images are drawn as published: coop.py."""
    is_published: bool = False
    """Whether the lists come from a published split file, or from official files that leave nothing
    to chance (ImageNet-A), with the published numbers of images and classes and unique names."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Remarks on the files, one line each."""
        remarks = []
        if self.ignored:
            shown = f"{len(self.ignored)} ({first_few(self.ignored)})"
            remarks.append(f"files ignored, not images of a class: {shown}")
        unclear = [name for name in self.classes if is_unclear(name)]
        if unclear and self.lists is None:
            remarks.append(
                f"class names that a text encoder may not understand: {first_few(unclear)} (give "
                "plain ones with `names`, a file with lines of folder, tab, class name)"
            )
        return tuple(remarks)

    @property
    def has_splits(self) -> bool:
        """Whether the data define training and test images."""
        return self.images[0].split is not None


def read_dataset(
    path: Path,
    names: Path | None = None,
    tuned: bool = True,
    *,
    nested: str | None = None,
    pipe: bool = False,
) -> Listing:
    """Find the images and classes of a folder or manifest.

    Class names come from folder names or labels (`_` becomes a space) or from the names file, which
    may be a pipe with `pipe`. Without `tuned`, all images may be test images. `nested` None makes
    nested class folders an error.

    Raises: DataError when it is neither, is empty, or has fewer than two classes, a class without
        images, or two classes with the same name; ConfigError for another `nested`.
    """
    if nested not in (None, *NESTED):
        raise ConfigError(f'`nested` is "{nested}", expected {" or ".join(NESTED)}')
    if not is_utf8(str(path.absolute())):
        raise DataError(f"data {str(path)!r}: its path is not UTF-8 (rename the folder)")
    for kind, marks in _FOREIGN.items():
        if all((path / name).is_file() for name in marks):
            raise DataError(f'data "{path}" is a {kind}, expected {_LAYOUTS}')
    ignored: list[Path] = []
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        where, root = f'manifest "{path}"', path.parent
        listed = read_manifest(path)
    elif path.is_dir():
        where, root = f'folder "{path}"', path
        try:
            listed, ignored = _read_folder(path, where, nested)
        except OSError as error:
            raise DataError(f"{where}: {error.filename} cannot be read: {error.strerror}") from None
    else:
        state = "is not a folder or manifest" if path.exists() else "does not exist"
        raise DataError(f'data "{path}" {state} (expected {_LAYOUTS})')
    if not listed:
        raise DataError(f"{where} contains no images (expected {_LAYOUTS})")
    labels = {item.label for item in listed}
    leaves = path.is_dir() and nested == "leaf"
    plain = {label: label.rpartition("/")[2] if leaves else label for label in labels}
    name_of = _class_names(plain, names, where, pipe)
    classes = tuple(sorted(name_of.values()))
    if len(classes) < 2:
        raise DataError(f'{where} has only one class, "{classes[0]}" (expected at least two)')
    for_testing = not tuned and all(item.split == "test" for item in listed)
    if any(item.split for item in listed) and not for_testing:
        _check_splits(listed, where)
    index = {name: label for label, name in enumerate(classes)}
    images = [ListedImage(item.path, index[name_of[item.label]], item.split) for item in listed]
    visible_first = sorted(ignored, key=lambda p: (p.name.startswith("."), p))
    # Unlike an image, an ignored file may have any name; it is listed in files of UTF-8.
    others = tuple(escape_surrogates(p.relative_to(root).as_posix()) for p in visible_first)
    return Listing(root, classes, tuple(sorted(images, key=lambda p: p.path)), others)


def _read_folder(root: Path, where: str, nested: str | None) -> tuple[list[Listed], list[Path]]:
    """Return the images below a root in either layout, and the ignored files."""
    folders, loose = _subfolders(root)
    named = {folder: split for folder in folders if (split := split_name(folder))}
    splits = [folder for folder in named if _subfolders(root / folder)[0]]
    if not splits:
        if len(set(named.values())) > 1 and len(named) == len(folders):
            raise DataError(
                f"{where}: {first_few(folders)} contain no class folders (expected "
                "root/train/class/*.jpg and root/test/class/*.jpg, or a manifest)"
            )
        found, ignored = _read_classes(root, root, None, where, folders, nested)
        return found, loose + ignored
    others = sorted(set(folders) - set(splits))
    if others:
        raise DataError(
            f'{where}: unexpected folder "{others[0]}" next to "{splits[0]}" (expected only train, '
            "val and test, with class folders in each; or use a manifest)"
        )
    for split in named.values():
        if len(same := [folder for folder in splits if named[folder] == split]) > 1:
            raise DataError(f"{where} has two folders for {split}: {first_few(same)} (keep one)")
    listed: list[Listed] = []
    ignored = loose
    for folder in splits:
        classes, outside = _subfolders(root / folder)
        found, extra = _read_classes(root, root / folder, named[folder], where, classes, nested)
        listed += found
        ignored = ignored + outside + extra
    return listed, ignored


def _read_classes(
    root: Path,
    parent: Path,
    split: SplitName | None,
    where: str,
    folders: list[str],
    nested: str | None,
) -> tuple[list[Listed], list[Path]]:
    """Return the images in the class folders of `parent`, and the ignored files."""
    listed: list[Listed] = []
    ignored: list[Path] = []
    below: dict[str, list[str]] = {}
    for folder in folders:
        images, others = images_below(parent / folder, where)
        for image in images:
            label = image.parent.relative_to(parent).as_posix() if nested == "leaf" else folder
            listed.append(Listed(image.relative_to(root).as_posix(), label, split))
        ignored += others
        parts = [image.relative_to(parent / folder).parts for image in images]
        inner = sorted({part[0] for part in parts})
        if parts and min(map(len, parts)) > 1:
            # A link adds the images of another folder.
            below[folder] = [name for name in inner if not (parent / folder / name).is_symlink()]
        if not images:
            shown = (parent / folder).relative_to(root).as_posix()
            files = f"; its files are {first_few([p.name for p in others])}" if others else ""
            raise DataError(
                f'{where}: class folder "{shown}" contains no images (add some or remove it{files})'
            )
    if nested is None:
        below = {folder: inner for folder, inner in below.items() if inner}
        _check_nested(below, parent.relative_to(root), where)
    return listed, ignored


def _check_nested(below: Mapping[str, list[str]], parent: Path, where: str) -> None:
    """Refuse folders whose images are all in sub-folders, which may be classes.

    `below` has their sub-folders. One name in all of them, as in class/images/*, is not a class.

    Raises: DataError.
    """
    if len(below) > 1 and len({*map(tuple, below.values())}) == 1 == max(map(len, below.values())):
        return
    for folder, inner in below.items():
        raise DataError(
            f'{where}: all images of "{(parent / folder).as_posix()}" are in its sub-folders '
            f"{first_few(inner)} (`nested=leaf` makes each of these a class, `nested=top` makes "
            f'"{folder}" one class; splits must be the top folders, as in root/train/class)'
        )


def _subfolders(folder: Path) -> tuple[list[str], list[Path]]:
    """Return the names of the visible folders, sorted, and the files."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir()) for entry in entries]
    folders = sorted(name for name, is_folder in found if is_folder and not is_hidden(name))
    return folders, [folder / name for name, is_folder in found if not is_folder]


def _class_names(
    plain: Mapping[str, str], names: Path | None, where: str, pipe: bool
) -> dict[str, str]:
    """Return the class name of every label; `plain` has the folder name that it is made from."""
    labels = sorted(plain)
    if names is None:
        name_of = {label: class_name(plain[label].replace("_", " ")) for label in labels}
    else:
        given = read_names(names, pipe=pipe)
        unknown, missing = sorted(given.keys() - set(labels)), sorted(set(labels) - given.keys())
        if unknown:
            raise DataError(f'names file "{names}": {where} has no class "{unknown[0]}"')
        if missing:
            raise DataError(f'names file "{names}": class "{missing[0]}" of {where} has no name')
        name_of = {label: given[label] for label in labels}
    label_of: dict[str, str] = {}
    for label in labels:
        name = name_of[label]
        if not name:
            raise DataError(f'{where}: "{label}" is an empty class name (rename it)')
        if name in label_of:
            raise DataError(
                f'{where}: "{label_of[name]}" and "{label}" have the same class name "{name}" '
                "(rename or merge one of them)"
            )
        label_of[name] = label
    return name_of


def is_unclear(name: str) -> bool:
    """Return whether a class name is an identifier rather than words.

    >>> [is_unclear(name) for name in ("AnnualCrop", "n01440764", "001.Albatross", "7", "iPhone")]
    [True, True, True, False, False]
    """
    return _UNCLEAR.fullmatch(name) is not None


def _check_splits(listed: list[Listed], where: str) -> None:
    """Raise DataError unless every class has training images."""
    trained = {item.label for item in listed if item.split == "train"}
    if not trained:
        raise DataError(f"{where} has splits but no train images (add them, or remove the splits)")
    for item in listed:
        if item.label not in trained:
            raise DataError(
                f'{where}: class "{item.label}" has {item.split} images but no train images'
            )
