"""Check a folder of images: all that tuning would refuse, leave out or warn of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ztune.data.folders import Listing
from ztune.data.near_copies import PerceptualHash, near_copies
from ztune.data.split import Progress
from ztune.data.splitter import digest_images
from ztune.errors import DataError
from ztune.printing import first_few
from ztune.types import Json

_NO_SPLIT = "none"  # in the table of a folder without splits


@dataclass(frozen=True)
class FolderReport:
    """The result of a check; paths are relative to the root."""

    listing: Listing
    broken: tuple[str, ...]
    conflicts: tuple[tuple[str, ...], ...]
    """Equal files with different classes or splits."""
    duplicates: tuple[tuple[str, ...], ...]
    """Equal files of one class and split."""
    near_copies: tuple[tuple[str, str], ...]
    """A test image and one for training or validation; without splits, any two images."""
    reasons: tuple[str, ...] = ()
    """Why the broken images cannot be read."""

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Numbers of images by class and split."""
        found: dict[str, Counter[str]] = {name: Counter() for name in self.listing.classes}
        for image in self.listing.images:
            found[self.listing.classes[image.label]][image.split or _NO_SPLIT] += 1
        return {name: dict(counts) for name, counts in found.items()}

    @property
    def problems(self) -> list[str]:
        """What tuning refuses, one line each."""
        pairs = [" = ".join(paths) for paths in self.conflicts]
        lines = {
            "broken images (`skip_broken` leaves them out)": self.broken,
            "images with two classes or splits (`skip_conflicts` leaves them out)": pairs,
        }
        return [*_counted(lines), *self.reasons[:1]]

    @property
    def warnings(self) -> list[str]:
        """What tuning leaves out or warns of, one line each."""
        near = "near copies of training or validation images among the test images"
        lines = {
            "exact duplicates, only one is used": [" = ".join(p) for p in self.duplicates],
            near if self.listing.has_splits else "near copies": [
                " = ".join(pair) for pair in self.near_copies
            ],
        }
        return [*_counted(lines), *self.listing.remarks]

    def to_json(self) -> dict[str, Json]:
        return {
            "path": str(self.listing.root),
            "classes": {name: {**counts} for name, counts in self.counts.items()},
            "ignored": [*self.listing.ignored],
            "broken": [*self.broken],
            "conflicts": [[*paths] for paths in self.conflicts],
            "duplicates": [[*paths] for paths in self.duplicates],
            "near_copies": [[*pair] for pair in self.near_copies],
            "problems": [*self.problems],
            "warnings": [*self.warnings],
            "ok": not self.problems,
        }


def _counted(lines: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{what}: {len(paths)} ({first_few(paths)})" for what, paths in lines.items() if paths]


def check_listing(
    listing: Listing,
    why_broken: Callable[[Path, bool], DataError | None],
    hash_of: PerceptualHash,
    progress: Progress | None = None,
) -> FolderReport:
    """Read every image once; `why_broken` and `hash_of` are as for the splitter.

    Raises: DataError naming a file that cannot be opened.
    """
    equal: dict[str, list[int]] = {}
    for number, digest in enumerate(digest_images(listing)):
        equal.setdefault(digest, []).append(number)
    broken: set[int] = set()
    reasons: list[str] = []
    for done, numbers in enumerate(equal.values(), 1):
        if reason := why_broken(listing.root / listing.images[numbers[0]].path, True):
            broken.update(numbers)
            reasons.append(str(reason))
        if progress:
            progress(done, len(equal))
    images = listing.images
    conflicts, duplicates, single = [], [], []
    for numbers in equal.values():
        if numbers[0] in broken:
            continue
        if len({(images[n].label, images[n].split) for n in numbers}) > 1:
            conflicts.append(tuple(images[n].path for n in numbers))
        else:
            single.append(images[numbers[0]])
            if len(numbers) > 1:
                duplicates.append(tuple(images[n].path for n in numbers))
    shown = {listing.root / image.path: image.path for image in single}
    tested = [listing.root / image.path for image in single if image.split in ("test", None)]
    others = [listing.root / image.path for image in single if image.split in ("train", "val")]
    pairs = near_copies(tested, others if listing.has_splits else None, hash_of)
    return FolderReport(
        listing,
        tuple(images[n].path for n in sorted(broken)),
        tuple(conflicts),
        tuple(duplicates),
        tuple((shown[one], shown[other]) for one, other in pairs),
        tuple(reasons),
    )
