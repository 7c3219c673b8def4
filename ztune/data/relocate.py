"""Relocate a split whose images were moved to other folders, under the same relative paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ztune.data.split import Split
from ztune.errors import DataError


def resolve_roots(data: Path | str | None, test_data: Path | str | None) -> dict[str, Path]:
    """Return the new root folders of the images; for a manifest, its folder.

    Raises: DataError for a path that does not exist.
    """
    roots = {}
    for root, name, place in (("data", "data", data), ("test", "test_data", test_data)):
        if place is None:
            continue
        path = Path(place).absolute()
        if not path.exists():
            raise DataError(
                f'`{name}` "{place}" does not exist (expected the current folder of the run\'s '
                "images)"
            )
        roots[root] = path if path.is_dir() else path.parent
    return roots


def relocate(split: Split, roots: Mapping[str, Path]) -> Split:
    """Return a split with other root folders; `Split.check_unchanged` compares the images.

    Raises: DataError for a test folder that the split does not have.
    """
    if "test" in roots and "test" not in split.roots:
        raise DataError(
            "the run has no separate folder of test images: omit `test_data` (`data` is the folder "
            "of all its images)"
        )
    first = {entry.root: entry.path for entry in reversed(split.entries)}
    found = {
        name: _find_root(root, split.roots[name], first[name])
        for name, root in roots.items()
        if name in first
    }
    return replace(split, roots={**split.roots, **found})


def _find_root(root: Path, former: Path, image: str) -> Path:
    """Return the new folder, or its sub-folder that was the root (images/ of a named data set)."""
    inside = (root.joinpath(*former.parts[-depth:]) for depth in (1, 2))
    return next((folder for folder in (root, *inside) if (folder / image).is_file()), root)
