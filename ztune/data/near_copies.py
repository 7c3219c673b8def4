"""Find near copies, such as the same photo saved again, by a perceptual hash.

The hash is the image in 8 x 8 grey levels, as a unit vector of deviations from its mean. Saving as
JPEG or resizing moves it by less than 0.04, distinct handwritten digits differ by more than 0.05;
cropped, mirrored or recoloured copies are not found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ztune.types import F32

MOST = 4000
"""Images that a split compares; `ztune data check FOLDER` compares all."""
_DISTANCE = 0.05
_CHUNK = 1024
PerceptualHash = Callable[[Path], F32 | None]
"""Returns f32[64] of an image, None for one that is unreadable or uniform."""


def near_copies(
    files: Sequence[Path], others: Sequence[Path] | None, hash_of: PerceptualHash
) -> list[tuple[Path, Path]]:
    """Return each file that nearly equals one of the others, with that one, in order.

    Without `others`, files are compared with earlier ones.
    """
    left, found = _hashed(files, hash_of), []
    right = left if others is None else _hashed(others, hash_of)
    if not left or not right:
        return []
    known = np.stack([*right.values()])
    names, places = [*left], [*right]
    for first in range(0, len(names), _CHUNK):
        rows = np.stack([left[path] for path in names[first : first + _CHUNK]])
        alike = rows @ known.T
        if others is None:
            alike[np.arange(len(rows))[:, None] + first <= np.arange(len(known))] = -1
        best = alike.argmax(axis=1)
        near = alike[np.arange(len(rows)), best] >= 1 - _DISTANCE**2 / 2
        found += [(names[first + row], places[best[row]]) for row in np.flatnonzero(near)]
    return found


def _hashed(files: Sequence[Path], hash_of: PerceptualHash) -> dict[Path, F32]:
    hashes = {path: hash_of(path) for path in files}
    return {path: one for path, one in hashes.items() if one is not None}
