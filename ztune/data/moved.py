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
    return replace(split, roots={**split.roots, **roots})
