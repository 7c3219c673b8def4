"""Which images train, validate and test: drawn once (splitter.py), checked on resume.

A split file lists every image with its digest, class and role.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ztune.data.manifests import SplitName, is_inside
from ztune.errors import ConfigError, DataError, FormatError
from ztune.io.fields import Fields
from ztune.io.files import sha256
from ztune.types import I64, Json

FORMAT = "ztune-split"
VERSION = 1
ROLES: tuple[SplitName, ...] = ("train", "val", "test")
Sampler = Literal["hash", "coop"]
SAMPLERS: tuple[Sampler, ...] = ("hash", "coop")
HOW_DRAWN: dict[Sampler, str] = {
    "hash": "drawn by hash, as one's own images are",
    "coop": "drawn by coop, as published",
}
"""What a run says of its images."""
Progress = Callable[[int, int], None]
"""Called with how many are done, and of how many."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class SplitSettings:
    """What is asked for, per class."""

    shots: int
    n_val: int | None = None
    """None: min(shots, 4), or what is left after the shots."""
    test_fraction: float | Literal["auto"] = "auto"
    """Share of one's own images that is kept for testing, by hash. auto: half, where every class
    has at least 2 * (shots + n_val) images and its shots among those not kept; else none."""
    split_seed: int = 0
    """Chooses the test images of one's own."""
    seed: int = 1
    """Chooses the shots, then the validation images."""

    def __post_init__(self) -> None:
        if self.shots < 1:
            raise ConfigError(f"`shots` is {self.shots}, expected at least 1")
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
        return min(self.shots, 4) if self.n_val is None else self.n_val


@dataclass(frozen=True)
class Entry:
    """One image and what it is for."""

    root: str
    """Which of the split's roots it lies under: data, or test (from `test_data`)."""
    path: str
    """Relative to that root, with forward slashes."""
    sha256: str
    """Of the file's content."""
    label: int
    role: SplitName


@dataclass(frozen=True)
class Split:
    """The images of one run, roles never overlapping; `split.json` on disk."""

    roots: Mapping[str, Path]
    """Absolute folders by name."""
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    """By role, then class; within a class the shots in the order drawn, test images by path."""
    settings: SplitSettings | None
    """None: of images to score on, of which none was drawn."""
    notes: tuple[str, ...]
    """What the user should be told, one line each."""
    sampler: Sampler = "hash"
    """What drew the shots."""

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

    def check_unchanged(self, progress: Progress | None = None) -> None:
        """Compare every image with its recorded digest.

        Raises: DataError naming the first that is missing or changed, and how many are.
        """
        wrong = []
        for done, entry in enumerate(self.entries, 1):
            path = self.file(entry)
            try:
                if sha256(path) != entry.sha256:
                    wrong.append(f'"{path}" has changed')
            except OSError as error:
                wrong.append(f'"{path}" cannot be read ({error.strerror})')
            if progress:
                progress(done, len(self.entries))
        if wrong:
            raise DataError(
                f"{wrong[0]} since the split was made, {len(wrong)} of {len(self.entries)} "
                "image(s) in all (put them back, name the folder where they are now with `data` or "
                "`test_data`, or start a new run)"
            )

    def to_json(self) -> dict[str, Json]:
        settings = self.settings
        return {
            "format": FORMAT,
            "version": VERSION,
            "sampler": self.sampler,
            "roots": {name: str(root) for name, root in self.roots.items()},
            "classes": list(self.classes),
            "settings": None if settings is None else {**asdict(settings)},
            "notes": list(self.notes),
            "entries": [
                {
                    "root": entry.root,
                    "path": entry.path,
                    "sha256": entry.sha256,
                    "class": self.classes[entry.label],
                    "role": entry.role,
                }
                for entry in self.entries
            ],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Json], where: str) -> Split:
        """Check all of a split file but the images themselves (`check_unchanged`).

        Raises: FormatError naming `where` and the field.
        """
        top = Fields(values, where)
        top.text("format", among=(FORMAT,))
        top.version(VERSION)
        roots = top.object("roots")
        folders = {name: Path(roots.text(name)) for name in roots.values}
        if "data" not in folders or not all(folder.is_absolute() for folder in folders.values()):
            raise FormatError(f'{roots.where}: expected absolute paths, one of them named "data"')
        classes = top.texts("classes")
        if len(classes) < 2 or list(classes) != sorted(set(classes)):
            raise FormatError(
                f'{where}: "classes" are not at least two names, sorted and different'
            )
        label_of = {name: label for label, name in enumerate(classes)}
        entries = []
        for fields in top.objects("entries"):
            entry = Entry(
                root=fields.text("root", among=tuple(folders)),
                path=fields.text("path"),
                sha256=fields.text("sha256"),
                label=label_of[fields.text("class", among=classes)],
                role=ROLES[ROLES.index(fields.text("role", among=ROLES))],
            )
            if not is_inside(entry.path):
                raise FormatError(f"{fields.where}: path {entry.path!r} leaves its root")
            if not _SHA256.fullmatch(entry.sha256):
                raise FormatError(f'{fields.where}: "sha256" is no SHA-256 in hexadecimal')
            entries.append(entry)
        # Files of before the samplers had a name are of one's own images, or without copies.
        sampler = SAMPLERS[0]
        if "sampler" in values:
            sampler = SAMPLERS[SAMPLERS.index(top.text("sampler", among=SAMPLERS))]
        # Published lists may hold an image twice, even with two classes.
        others = [entry.sha256 for entry in entries if entry.role != "test"]
        tested = {entry.sha256 for entry in entries if entry.role == "test"}
        twice = len(set(others)) < len(others) or not tested.isdisjoint(others)
        if twice and sampler == "hash":
            raise FormatError(f"{where}: the same image is listed twice")
        trained = {entry.label for entry in entries if entry.role == "train"}
        if others and trained != set(range(len(classes))):
            raise FormatError(f"{where}: a class has no train images")
        return cls(folders, classes, tuple(entries), _settings(top), top.texts("notes"), sampler)


def _settings(top: Fields) -> SplitSettings | None:
    if top.values.get("settings", False) is None:
        return None
    fields = top.object("settings")
    fraction = fields.values.get("test_fraction")
    try:
        return SplitSettings(
            shots=fields.integer("shots", least=1),
            n_val=None if fields.values.get("n_val") is None else fields.integer("n_val"),
            test_fraction="auto" if fraction == "auto" else fields.number("test_fraction"),
            split_seed=fields.integer("split_seed"),
            seed=fields.integer("seed"),
        )
    except ConfigError as error:
        raise FormatError(f"{fields.where}: {error}") from None
