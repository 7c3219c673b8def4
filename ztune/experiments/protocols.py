"""The papers' protocols: which images are for tuning, and which for testing.

few-shot              K shots per class; all test images
base-to-new           tuned on the first half of the classes; their test images, and the others'
cross-data-set        tuned on all classes of a source; the test images of other data sets
out-of-distribution   the same with variants of the source: its classes, or some of them

Shots are drawn by data/splitter.py: from published lists as in CoOp (arXiv 2109.01134). Classes are
divided as in CoCoOp (arXiv 2203.05557), see data/coop.py. Tuning never sees the test images of a
task's parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ztune.data.coop import CoopSplit, Item, base_and_new, display_name, few_shot
from ztune.data.folders import Listing
from ztune.data.split import ROLES, LeftOut, Sampler, Split, SplitSettings
from ztune.data.splitter import (
    NO_SCREENING,
    Digest,
    Screening,
    describe_shortages,
    digest_file,
    entries_of_lists,
    make_split,
    sort_entries,
    to_coop_split,
)
from ztune.errors import DataError

PROTOCOLS = ("few-shot", "base-to-new", "cross-data-set", "out-of-distribution")
TRANSFERS = ("cross-data-set", "out-of-distribution")
"""Protocols that tune on one data set and test on others."""
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Source:
    """A data set."""

    name: str
    listing: Listing
    templates: tuple[str, ...]
    """Templates of its classes."""
    digest: Digest = digest_file
    settings: SplitSettings = field(default_factory=lambda: SplitSettings(1))
    """Settings of the splitter; shots and seed are replaced."""
    test_listing: Listing | None = None
    """Test images of another folder."""
    skip_broken: bool = False
    screening: Screening = NO_SCREENING
    """Of the images that the splitter draws from."""
    left_out: list[LeftOut] = field(default_factory=list, compare=False)
    """What each draw has left out."""

    @property
    def root(self) -> Path:
        """Absolute root of the lists' paths."""
        return self.listing.root.resolve()

    @property
    def sampler(self) -> Sampler:
        """The sampler of its shots."""
        return "hash" if self.listing.lists is None else "coop"

    def draw(self, shots: int, seed: int) -> tuple[CoopSplit, tuple[str, ...]]:
        """Draw shots and validation images, with all test images, as in `ztune tune`.

        Return them with remarks.

        Raises: DataError for too few images, or no test images.
        """
        settings = replace(self.settings, shots=shots, seed=seed)
        if self.listing.lists is not None and self.test_listing is None:
            return few_shot(self.listing.lists, shots, seed, settings.n_val), ()
        split = make_split(self.listing, settings, self.test_listing, self.digest, self.screening)
        self.left_out.append(split.left_out)
        if not split.entries_of("test"):
            raise DataError(f'data set "{self.name}": {"; ".join(split.notes)}')
        return lists_of(split), tuple(n for n in split.notes if n not in self.listing.notes)

    @property
    def tested(self) -> Source:
        """The source of the test images."""
        if self.test_listing is None:
            return self
        return replace(self, listing=self.test_listing, test_listing=None)

    def to_test(self) -> CoopSplit:
        """Return lists of all classes and test images, as the target of a transfer."""
        listing = self.listing
        if listing.lists is not None:
            return listing.lists
        return to_coop_split(listing) if listing.has_splits else self.draw(1, 0)[0]


def lists_of(split: Split) -> CoopSplit:
    """Return the images of a split by role, in its order."""
    train, val, test = (
        tuple(Item(e.path, e.label, split.classes[e.label]) for e in split.entries_of(role))
        for role in ROLES
    )
    return CoopSplit(train, val, test)


@dataclass(frozen=True)
class Part:
    """Images to score."""

    name: str
    """test, base or new; in a transfer, the target data set."""
    source: Source
    lists: CoopSplit
    """All images of its classes; only `test` is scored."""

    @property
    def items(self) -> tuple[Item, ...]:
        return self.lists.test

    @property
    def classes(self) -> tuple[str, ...]:
        """The candidate classes, those without test images included."""
        return classes_of([item for _, item in self.lists])


@dataclass(frozen=True)
class Task:
    """The images to tune on, and the parts to score."""

    protocol: str
    source: Source
    shots: int
    seed: int
    drawn: CoopSplit
    """Training and validation images only."""
    parts: tuple[Part, ...]
    remarks: tuple[str, ...] = ()
    """On the images drawn."""

    @property
    def classes(self) -> tuple[str, ...]:
        return classes_of(self.drawn.train)


def classes_of(items: Sequence[Item]) -> tuple[str, ...]:
    """Return the unique class names for templates, sorted by code point."""
    return tuple(sorted({display_name(item.name) for item in items}))


def task_of(
    protocol: str, source: Source, targets: Sequence[Source], shots: int, seed: int
) -> Task:
    """Draw a protocol's task; `targets` are those of a transfer, none otherwise.

    Raises: DataError without tuning images, or for a part without enough test classes.
    """
    if not any(image.split in (None, "train") for image in source.listing.images):
        raise DataError(f'data set "{source.name}" has only test images, none to tune on')
    drawn, remarks = source.draw(shots, seed)
    if protocol == "base-to-new":
        base, new = base_and_new(drawn)
        drawn = base
        parts = [Part("base", source.tested, base), Part("new", source.tested, new)]
    elif protocol == "few-shot":
        parts = [Part("test", source.tested, drawn)]
    else:
        parts = [Part(target.name, target, target.to_test()) for target in targets]
    for part in parts:
        if (n := len(classes_of(part.items))) < 2:
            raise DataError(
                f'data set "{part.source.name}" has test images of {n} {_group(part)}class(es), '
                "expected at least 2"
            )
    tuned_on = CoopSplit(drawn.train, drawn.val)
    if not remarks:  # in base-to-new they are on the classes tuned on
        remarks = tuple(describe_shortages(tuned_on, shots, source.settings.n_val))
    return Task(protocol, source, shots, seed, tuned_on, tuple(parts), remarks)


def _group(part: Part) -> str:
    """Return `base ` or `new `, empty for other parts."""
    return "" if part.name == "test" else f"{part.name} "


def remarks_on(task: Task) -> list[str]:
    """Return what is unusual about a task, a line each."""
    remarks = [*task.remarks]
    for part in task.parts:
        if untested := sorted(set(part.classes) - set(classes_of(part.items))):
            named = ", ".join(untested[:_SHOWN])
            remarks.append(
                f"{len(untested)} {_group(part)}class(es) have no test images, and remain "
                f"candidates: {named}"
            )
    if task.protocol == "out-of-distribution":
        for part in task.parts:
            if unknown := sorted(set(part.classes) - set(task.classes)):
                named = ", ".join(unknown[:_SHOWN])
                remarks.append(
                    f"{len(unknown)} of {len(part.classes)} classes of {part.name} are missing in "
                    f"{task.source.name}: {named} (is {part.name} a variant of it?)"
                )
    return remarks


def split_of(task: Task, digest: Digest) -> Split:
    """Return the tuning images as a run's split; duplicates in published lists are kept."""
    root = task.source.root
    entries = entries_of_lists(task.drawn, root, task.classes, digest)
    settings = SplitSettings(task.shots, test_fraction=0.0, seed=task.seed)
    return Split(
        {"data": root}, task.classes, sort_entries(entries), settings, (), task.source.sampler
    )


def tested_split(part: Part, digest: Digest) -> Split:
    """Return a part's test images, in order."""
    root = part.source.root
    tested = CoopSplit(test=part.items)
    entries = entries_of_lists(tested, root, part.classes, digest)
    return Split({"data": root}, part.classes, tuple(entries), None, (), part.source.sampler)
