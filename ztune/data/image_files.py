"""Find the image files of a folder.

A file is an image by its suffix (SUFFIXES) or its first bytes; raw photos contain TIFF, so a TIFF
needs its suffix, or none. Hidden folders and system folders (STORAGE) are skipped. Links to folders
are followed once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ztune.data.manifests import is_utf8
from ztune.errors import DataError
from ztune.io.files import open_regular
from ztune.io.image_formats import HEAD, format_of
from ztune.printing import first_few

SUFFIXES = frozenset(
    (
        ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".webp", ".gif", ".tif",
        ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k",
    )
)  # fmt: skip
STORAGE = frozenset(
    (
        "@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot",
        "@__thumb", "@sharebin", "@synoresource", "lost+found", "lost.dir", "__macosx",
        "__pycache__", "$recycle.bin", "$extend", "recycler", "recycled",
        "system volume information", "network trash folder", "temporary items",
    )
)  # fmt: skip
"""Folders of network drives, trash and tools, in lower case."""
_FOUND = re.compile(r"found\.\d{3}")  # of a repaired Windows drive


def is_hidden(name: str) -> bool:
    """Return whether a folder is hidden, or one that a system keeps for itself."""
    folded = name.casefold()
    return name.startswith(".") or folded in STORAGE or _FOUND.fullmatch(folded) is not None


def is_image(path: Path) -> bool:
    """Return whether a file is an image by its name or content; hidden files are not."""
    if path.name.startswith("."):
        return False
    if (suffix := path.suffix.lower()) in SUFFIXES:
        return True
    try:
        with open_regular(path) as file:
            found = format_of(file.read(HEAD))
    except OSError:
        return False
    return found is not None and (found != ".tif" or not suffix)


def images_below(folder: Path, where: str) -> tuple[list[Path], list[Path]]:
    """Return the images in a folder and its visible sub-folders, and the other files, sorted.

    Raises: DataError when a folder cannot be read, or an image's name is not UTF-8.
    """
    images: list[Path] = []
    others: list[Path] = []
    try:
        for path in _files_below(folder):
            (images if is_image(path) else others).append(path)
    except OSError as error:
        raise DataError(f"{where}: {error.filename} cannot be read: {error.strerror}") from None
    for image in images:
        if not is_utf8(str(image)):
            raise DataError(f"{where}: file name {str(image)!r} is not UTF-8 (rename it)")
    return sorted(images, key=Path.as_posix), sorted(others, key=Path.as_posix)


def named_images(named: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the given images and all images below the given folders, and the folders' other files.

    Raises: DataError for a path that does not exist, a name that is not UTF-8, or a folder without
        images.
    """
    found: list[Path] = []
    ignored: list[str] = []
    for path in named:
        if not is_utf8(str(path)):
            raise DataError(f"image {str(path)!r}: the name is not UTF-8 (rename it)")
        if path.is_dir():
            below, others = images_below(path, f'folder "{path}"')
            ignored += map(str, others)
            if not below:
                files = f": its files are {first_few([*map(str, others)])}" if others else ""
                raise DataError(f'folder "{path}" contains no images{files}')
            found += below
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f'image "{path}" does not exist')
    return found, ignored


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and its visible sub-folders.

    Linked folders come last, in order, so that a folder is read under its own name. A link to a
    folder that was read, or that contains `folder`, is not followed.
    """
    start = Path(os.path.realpath(folder))
    seen: set[Path] = set()
    starts = [folder]
    while starts:
        links = []
        for at in starts:
            for directory, below, files in os.walk(at, onerror=_raise):
                real = Path(os.path.realpath(directory))
                if real in seen or (real != start and start.is_relative_to(real)):
                    below.clear()
                    continue
                seen.add(real)
                paths = [Path(directory) / name for name in below if not is_hidden(name)]
                links += [path for path in paths if path.is_symlink()]
                below[:] = [path.name for path in paths if not path.is_symlink()]
                yield from (Path(directory) / name for name in files)
        starts = sorted(links)


def _raise(error: OSError) -> None:
    raise error
