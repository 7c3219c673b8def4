"""The training, validation and test images of a run: drawn once (splitter.py), checked on resume.

A split file lists every image with its digest, class and role.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from msgspec import field, structs

from ztune.data.manifests import SplitName, is_inside
from ztune.errors import ConfigError, DataError, FormatError
from ztune.io.files import sha256
from ztune.io.schema import Record, Sha256, convert, current, plain
from ztune.types import I64, Json

FORMAT = "ztune-split"
VERSION = 1
ROLES: tuple[SplitName, ...] = ("train", "val", "test")
Sampler = Literal["hash", "coop"]
ALL: Final = "all"
"""The value of `shots` with which all images of a class are used, however many it has."""
Shots = int | Literal["all"]
PUBLISHED_SHOTS = 16
LEAST_HALVED = 40
"""Images of a class from which half are test images, with all shots."""
LEAST_JUDGED = 16
"""Images of a class from which it can have validation images, or an accuracy without test images,
with all shots."""
MOST_VAL = 4
"""Validation images per class, if their number is not given."""
HOW_DRAWN: dict[Sampler, str] = {
    "hash": "drawn by hash, as for custom images",
    "coop": "drawn by coop, as published",
}
"""How the images were drawn, by sampler."""
Progress = Callable[[int, int], None]
"""Called with the number done and the total."""


@dataclass(frozen=True)
class SplitSettings:
    """Settings of a split, per class."""

    shots: Shots
    n_val: int | None = None
    """None: min(shots, 4), or the images left after the shots; with all shots those that the data
    mark as validation images. With all shots of other images at most a fifth of a class, and none
    of fewer than LEAST_JUDGED."""
    test_fraction: float | Literal["auto"] = "auto"
    """Fraction of custom images used for testing, drawn by hash. auto: half if every class has at
    least 2 * (shots + n_val) images and enough others for its shots; else none. With all shots:
    half of each class of at least LEAST_HALVED."""
    split_seed: int = 0
    """Seed of the test images of custom data."""
    seed: int = 1
    """Seed of the shots, then the validation images."""

    def __post_init__(self) -> None:
        if self.shots != ALL and (not isinstance(self.shots, int) or self.shots < 1):
            shown = f'"{self.shots}"' if isinstance(self.shots, str) else self.shots
            raise ConfigError(f"`shots` is {shown}, expected {ALL}, or a number of at least 1")
        if self.n_val is not None and self.n_val < 0:
            raise ConfigError(f"`val` is {self.n_val}, expected 0 or more")
        if self.test_fraction != "auto" and not 0 <= self.test_fraction < 1:
            raise ConfigError(
                f"`test_fraction` is {self.test_fraction}, expected auto or a number in [0, 1)"
            )
        for name in ("seed", "split_seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`{name}` is {getattr(self, name)}, expected 0 or more")

    @property
    def wanted_val(self) -> int:
        """The validation images of a class that has enough."""
        if self.n_val is not None:
            return self.n_val
        return 0 if self.shots == ALL else min(self.shots, MOST_VAL)

    def counts(self, n_train: int, n_val: int) -> tuple[int, int]:
        """Return how many images of a class train, and how many validate.

        The class has `n_train` images to train on, and `n_val` that the data mark for validation;
        without these, validation images are some of the others.
        """
        if self.shots != ALL:
            return self.shots, self.wanted_val
        if n_val:
            return n_train, n_val if self.n_val is None else self.n_val
        most = n_train // 5 if n_train >= LEAST_JUDGED else 0
        held_out = min(self.wanted_val, most)
        return n_train - held_out, held_out


def parse_test_fraction(value: float | str) -> float | Literal["auto"]:
    """Return a number, or auto.

    Raises: ConfigError.
    """
    if value == "auto":
        return "auto"
    try:
        return float(value)
    except ValueError:
        raise ConfigError(
            f'`test_fraction` is "{value}", expected auto or a number in [0, 1)'
        ) from None


@dataclass(frozen=True)
class Entry:
    """One image and its role."""

    root: str
    """The name of its root in the split: data, or test (from `test_data`)."""
    path: str
    """Relative to that root, with forward slashes."""
    sha256: str
    """SHA-256 of the file's content."""
    label: int
    role: SplitName


class LeftOut(Record, frozen=True, kw_only=True, omit_defaults=True):
    """Files that are not used, by reason; paths relative to their root."""

    ignored: tuple[str, ...] = ()
    """Not images of a class."""
    broken: tuple[str, ...] = ()
    """Unreadable."""
    conflicts: tuple[str, ...] = ()
    """Equal files in two classes or roles."""
    duplicates: tuple[str, ...] = ()
    """Equal to another image of the same class and role."""


NOTHING = LeftOut()


def together(parts: Iterable[LeftOut]) -> LeftOut:
    """Return the files of several splits of one data set, each once."""
    every = [structs.asdict(part) for part in parts]
    return LeftOut(
        **{
            name: tuple(dict.fromkeys(path for part in every for path in part[name]))
            for name in LeftOut.__struct_fields__
        }
    )


@dataclass(frozen=True)
class Split:
    """The images of one run in disjoint roles; `split.json` on disk."""

    roots: Mapping[str, Path]
    """Absolute folders by name."""
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    """By role, then class; within a class shots in the order drawn, test images by path."""
    settings: SplitSettings | None
    """None: the images are only scored, none was drawn."""
    notes: tuple[str, ...]
    """Remarks for the user, one line each."""
    sampler: Sampler = "hash"
    """The sampler of the shots."""
    left_out: LeftOut = NOTHING

    def entries_of(self, role: SplitName) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.role == role)

    def items(self, role: SplitName) -> list[tuple[Path, str]]:
        """Return the files of a role and their digests, as `encode_files` takes them."""
        return [(self.file(entry), entry.sha256) for entry in self.entries_of(role)]

    def labels(self, role: SplitName) -> I64:
        """Return i64[N], in the order of `items`."""
        return np.array([entry.label for entry in self.entries_of(role)], np.int64)

    def file(self, entry: Entry) -> Path:
        return self.roots[entry.root] / entry.path

    def check_unchanged(self) -> None:
        """Compare every image with its recorded digest.

        Raises: DataError naming the first missing or changed image, and their number.
        """
        wrong = []
        for entry in self.entries:
            path = self.file(entry)
            try:
                if sha256(path) != entry.sha256:
                    wrong.append(f'"{path}" has changed')
            except OSError as error:
                wrong.append(f'"{path}" cannot be read ({error.strerror})')
        if wrong:
            raise DataError(
                f"{wrong[0]} since the split was made, {len(wrong)} of {len(self.entries)} "
                "image(s) in total (put them back, name their new folder with `data` or "
                "`test_data`, or start a new run)"
            )

    def to_json(self) -> dict[str, Json]:
        content = _Content(
            sampler=self.sampler,
            roots={name: str(root) for name, root in self.roots.items()},
            classes=self.classes,
            settings=self.settings,
            notes=self.notes,
            entries=tuple(
                _Entry(e.root, e.path, e.sha256, self.classes[e.label], e.role)
                for e in self.entries
            ),
            left_out=self.left_out,
        )
        document = {"format": FORMAT, "version": VERSION, **plain(content)}
        if self.left_out == NOTHING:
            del document["left_out"]
        return document

    @classmethod
    def from_json(cls, values: Mapping[str, Json], where: str) -> Split:
        """Read and check a split file; `check_unchanged` checks the images.

        Raises: FormatError naming `where` and the field.
        """
        content = convert(current(values, FORMAT, VERSION, where), _Content, where)
        folders = {name: Path(root) for name, root in content.roots.items()}
        if "data" not in folders or not all(folder.is_absolute() for folder in folders.values()):
            raise FormatError(
                f'{where}: $.roots: expected absolute paths, one of them named "data"'
            )
        classes = content.classes
        if len(classes) < 2 or list(classes) != sorted(set(classes)):
            raise FormatError(
                f"{where}: $.classes: expected at least two names, sorted and different"
            )
        label_of = {name: label for label, name in enumerate(classes)}
        entries = []
        for i, one in enumerate(content.entries):
            if one.root not in folders or one.class_ not in label_of:
                raise FormatError(f"{where}: $.entries[{i}]: no such root or class is listed")
            if not is_inside(one.path):
                raise FormatError(f"{where}: $.entries[{i}]: path {one.path!r} leaves its root")
            label = label_of[one.class_]
            entries.append(Entry(one.root, one.path, one.sha256, label, one.role))
        # Published lists may have an image twice, even with two classes.
        others = [entry.sha256 for entry in entries if entry.role != "test"]
        tested = {entry.sha256 for entry in entries if entry.role == "test"}
        twice = len(set(others)) < len(others) or not tested.isdisjoint(others)
        if twice and content.sampler == "hash":
            raise FormatError(f"{where}: the same image is listed twice")
        trained = {entry.label for entry in entries if entry.role == "train"}
        if others and trained != set(range(len(classes))):
            raise FormatError(f"{where}: a class has no train images")
        return cls(
            folders,
            classes,
            tuple(entries),
            content.settings,
            content.notes,
            content.sampler,
            content.left_out,
        )


class _Entry(Record, frozen=True):
    """An entry of the file."""

    root: str
    path: str
    sha256: Sha256
    class_: str = field(name="class")
    role: SplitName


class _Content(Record, frozen=True, kw_only=True):
    """`split.json`."""

    sampler: Sampler = "hash"
    """Absent in old files: then custom images without duplicates."""
    roots: Mapping[str, str]
    classes: tuple[str, ...]
    settings: SplitSettings | None
    notes: tuple[str, ...]
    entries: tuple[_Entry, ...]
    left_out: LeftOut = NOTHING
