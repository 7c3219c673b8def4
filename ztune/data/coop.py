"""Read and draw CoOp's splits: lists of images for train, val and test in one JSON file.

    {"train": [["Faces/image_0274.jpg", 0, "face"], ...], "val": [...], "test": [...]}

Paths are relative to the data set's image folder; labels start at 0. Lists keep their order, since
the images that a seed draws depend on it.

Few-shot sets, base and new classes, and splits of data sets without a split file follow CoOp (arXiv
2109.01134): the same file and seed give the images that its published code draws.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ztune.data.manifests import SplitName, class_name, is_inside, is_utf8, read_text
from ztune.errors import ConfigError, DataError
from ztune.io.files import write_bytes

SPLITS: tuple[SplitName, ...] = ("train", "val", "test")
MOST_VAL = 4
"""Validation images per class of a few-shot set, or the shots if fewer."""


@dataclass(frozen=True)
class Item:
    """One image of a split."""

    path: str
    """Relative to the image folder, with forward slashes."""
    label: int
    """From 0, in the data set's order of classes."""
    name: str
    """The class name in the file."""


@dataclass(frozen=True)
class CoopSplit:
    """The three lists, in their order; a list may be empty."""

    train: tuple[Item, ...] = ()
    val: tuple[Item, ...] = ()
    test: tuple[Item, ...] = ()
    shuffled: tuple[int, ...] = field(default=(), kw_only=True)
    """Lengths of the lists that the published code shuffles before it draws shots: SVHN's only."""

    def of(self, role: SplitName) -> tuple[Item, ...]:
        return {"train": self.train, "val": self.val, "test": self.test}[role]

    def __iter__(self) -> Iterator[tuple[SplitName, Item]]:
        for role in SPLITS:
            for item in self.of(role):
                yield role, item

    @property
    def counts(self) -> dict[SplitName, int]:
        return {role: len(self.of(role)) for role in SPLITS}

    @property
    def classes(self) -> dict[int, str]:
        """Class names by ascending label."""
        names = {item.label: item.name for _, item in self}
        return {label: names[label] for label in sorted(names)}


def read_split(path: Path, needs: Sequence[SplitName] = SPLITS) -> CoopSplit:
    """Read a split file, without checking that its images exist.

    A list that is not in `needs` may be missing; it is then empty.

    Raises: DataError naming an invalid entry, a path outside the image folder, a label with two
        names, or a file without images.
    """
    where = f'split "{path}"'
    try:
        values = json.loads(read_text(path, where))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: invalid JSON ({error}; download the file again)") from None
    if not isinstance(values, dict):
        raise DataError(f'{where}: expected {{"train": [...], "val": [...], "test": [...]}}')
    names: dict[int, str] = {}
    lists: dict[str, tuple[Item, ...]] = {}
    for role in SPLITS:
        entries = values.get(role, None if role in needs else [])
        if not isinstance(entries, list):
            got = "nothing" if entries is None else type(entries).__name__
            raise DataError(f'{where}: "{role}" is {got}, expected a list of [path, label, name]')
        items = []
        for place, entry in enumerate(entries):
            item = _item(entry, f"{where}, {role} entry {place}")
            known = names.setdefault(item.label, item.name)
            if known != item.name:
                raise DataError(
                    f'{where}, {role} entry {place}: label {item.label} has two names, "{known}" '
                    f'and "{item.name}"'
                )
            items.append(item)
        lists[role] = tuple(items)
    if not names:
        raise DataError(f"{where}: contains no images")
    return CoopSplit(lists["train"], lists["val"], lists["test"])


def _item(entry: object, where: str) -> Item:
    if not isinstance(entry, list) or len(entry) != 3:
        raise DataError(f"{where}: expected [path, label, class name]")
    path, label, name = entry
    if isinstance(label, str) and label.isascii() and label.isdigit() and len(label) < 10:
        label = int(label)
    if (
        not isinstance(path, str)
        or not isinstance(name, str)
        or not isinstance(label, int)
        or isinstance(label, bool)
        or label < 0
        or not name.strip()
    ):
        raise DataError(f"{where}: expected [path, label from 0, class name]")
    if not is_utf8(path + name):
        raise DataError(f"{where}: path or name contains an unpaired surrogate")
    if not is_inside(path):
        raise DataError(f"{where}: path {path!r} is outside the image folder")
    return Item(path, label, name)


def write_split(path: Path, split: CoopSplit) -> None:
    """Write a split in the same format, atomically."""
    lists = {role: [[i.path, i.label, i.name] for i in split.of(role)] for role in SPLITS}
    write_bytes(path, (json.dumps(lists, indent=4, ensure_ascii=False) + "\n").encode())


def display_name(name: str) -> str:
    """Return a class name for use in a template."""
    return class_name(name.replace("_", " "))


def few_shot(split: CoopSplit, shots: int, seed: int, n_val: int | None = None) -> CoopSplit:
    """Draw a few-shot set: `shots` per class to train, `n_val` to validate, all to test.

    `n_val` of None is the published number, min(shots, 4).

    This draws as CoOp does: one generator, seeded once; a sample without replacement from each
    class of train in order of first appearance; then, with the same generator, from the classes of
    val. Lists that the published code shuffles with this generator first are shuffled here too. A
    smaller class is taken whole, as in BlackVIP's copy of the sampler (an older version drew with
    replacement).

    Raises: ConfigError when shots or seed is out of range.
    """
    if shots < 1:
        raise ConfigError(f"`shots` is {shots}, expected at least 1")
    if seed < 0:
        raise ConfigError(f"`seed` is {seed}, expected at least 0")
    generator = random.Random(seed)
    for length in split.shuffled:
        generator.shuffle([None] * length)  # what is drawn depends on the length only
    train = _sample(split.train, shots, generator)
    val = _sample(split.val, min(shots, MOST_VAL) if n_val is None else n_val, generator)
    return CoopSplit(train, val, split.test)


def _sample(items: Iterable[Item], n: int, generator: random.Random) -> tuple[Item, ...]:
    drawn: list[Item] = []
    for group in by_label(items).values():
        drawn += generator.sample(group, n) if len(group) >= n else group
    return tuple(drawn)


def by_label(items: Iterable[Item]) -> dict[int, list[Item]]:
    """Return the items of each label, in order of first appearance."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    return groups


def base_and_new(split: CoopSplit) -> tuple[CoopSplit, CoopSplit]:
    """Divide the classes by ascending label: the first ceil(C / 2) are base, the others new.

    C is the number of classes with training images (of a test-only data set: all). Labels start at
    0 in both halves. CoOp draws the shots first: `base_and_new(few_shot(split, shots, seed))`.

    Raises: DataError when there are fewer than two classes.
    """
    labels = sorted({item.label for item in split.train or split.test})
    if len(labels) < 2:
        raise DataError(f"base and new classes: got {len(labels)} class(es), expected at least 2")
    n_base = math.ceil(len(labels) / 2)
    return _select_classes(split, labels[:n_base]), _select_classes(split, labels[n_base:])


def _select_classes(split: CoopSplit, labels: Sequence[int]) -> CoopSplit:
    place = {label: new for new, label in enumerate(labels)}
    train, val, test = (
        tuple(Item(i.path, place[i.label], i.name) for i in split.of(role) if i.label in place)
        for role in SPLITS
    )
    return CoopSplit(train, val, test)


def divide_classes(
    classes: Mapping[str, Sequence[str]], generator: random.Random, where: str
) -> CoopSplit:
    """Shuffle every class and split it into 50 % train, 20 % val and the rest test.

    `classes` are paths by class name; a class's label is its index. Fractions are rounded half to
    even.

    Raises: DataError naming a class with too few images for all three.
    """
    lists: dict[SplitName, list[Item]] = {role: [] for role in SPLITS}
    for label, (name, paths) in enumerate(classes.items()):
        items = [Item(path, label, name) for path in paths]
        generator.shuffle(items)
        n_train, n_val = round(len(items) * 0.5), round(len(items) * 0.2)
        parts = (items[:n_train], items[n_train : n_train + n_val], items[n_train + n_val :])
        if not all(parts):
            raise DataError(
                f'{where}: class "{name}" has {len(items)} images, too few for train, val and test'
            )
        for role, part in zip(SPLITS, parts, strict=True):
            lists[role] += part
    return CoopSplit(*(tuple(lists[role]) for role in SPLITS))


def hold_out_val(
    items: Iterable[Item], fraction: float, generator: random.Random, where: str
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """Shuffle the training images of every class and split off a fraction: return train, val.

    Raises: DataError naming a class with too few images for both.
    """
    train: list[Item] = []
    val: list[Item] = []
    for group in by_label(items).values():
        n_val = round(len(group) * fraction)
        if not 0 < n_val < len(group):
            raise DataError(
                f'{where}: class "{group[0].name}" has {len(group)} images, too few for train '
                "and val"
            )
        generator.shuffle(group)
        val += group[:n_val]
        train += group[n_val:]
    return tuple(train), tuple(val)
