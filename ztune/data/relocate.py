"""A split whose images lie elsewhere now: below other folders, by the same relative paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ztune.data.split import Split
from ztune.errors import DataError


def new_roots(data: Path | str | None, test_data: Path | str | None) -> dict[str, Path]:
    """Return the folders that images are looked for in from now on; a manifest stands for its own.

    Raises: DataError for what does not exist.
    """
    roots = {}
    for root, name, place in (("data", "data", data), ("test", "test_data", test_data)):
        if place is None:
            continue
        path = Path(place).absolute()
        if not path.exists():
            raise DataError(
                f'`{name}` "{place}" does not exist, expected the folder where the run\'s images '
                "are now"
            )
        roots[root] = path if path.is_dir() else path.parent
    return roots


def relocated(split: Split, roots: Mapping[str, Path]) -> Split:
    """Return a split with its images below other folders; `Split.check_unchanged` compares them.

    Raises: DataError for a test set of its own where the split has none.
    """
    if "test" in roots and "test" not in split.roots:
        raise DataError(
            "the run has no test images from a folder of their own: leave out `test_data` (`data` "
            "is for all of its images)"
        )
    first = {entry.root: entry.path for entry in reversed(split.entries)}
    found = {
        name: _holding(root, split.roots[name], first[name])
        for name, root in roots.items()
        if name in first
    }
    return replace(split, roots={**split.roots, **found})


def _holding(root: Path, former: Path, image: str) -> Path:
    """Return the new folder, or the one inside that was the root: images/ of a named data set."""
    inside = (root.joinpath(*former.parts[-depth:]) for depth in (1, 2))
    return next((folder for folder in (root, *inside) if (folder / image).is_file()), root)
