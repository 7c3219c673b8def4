"""Which pictures tune, validate and test: chosen once, recorded by content, checked on resume.

Pictures are drawn in the order of SHA-256("purpose:seed:digest of the picture"). So a picture's
turn depends on its content alone: neither file names, other pictures, other classes nor the NumPy
version change it, and the 4-shot set is a part of the 16-shot set of the same seed.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from ztune.data.folders import Listing
from ztune.data.manifests import SplitName, is_inside
from ztune.errors import ConfigError, DataError, FormatError
from ztune.io.fields import Fields
from ztune.io.files import sha256
from ztune.types import I64, Json

FORMAT = "ztune-split"
VERSION = 1
ROLES: tuple[SplitName, ...] = ("train", "val", "test")
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
    """auto: half, where every class has at least 2 * (shots + n_val) pictures, else none."""
    split_seed: int = 0
    """Chooses the test pictures."""
    seed: int = 1
    """Chooses the shots, then the validation pictures."""

    def __post_init__(self) -> None:
        if self.shots < 1:
            raise ConfigError(f"`shots` is {self.shots}, expected at least 1")
        if self.n_val is not None and self.n_val < 0:
            raise ConfigError(f"`val` is {self.n_val}, expected 0 or more")
        if self.test_fraction != "auto" and not 0 <= self.test_fraction < 1:
            raise ConfigError(
                f"`test_fraction` is {self.test_fraction}, expected auto or a number in [0, 1)"
            )
        if min(self.seed, self.split_seed) < 0:
            raise ConfigError("`seed` and `split_seed` are 0 or more")

    @property
    def wanted_val(self) -> int:
        return min(self.shots, 4) if self.n_val is None else self.n_val


@dataclass(frozen=True)
class Entry:
    """One picture and what it is for."""

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
    """The pictures of one run, roles never overlapping; `split.json` on disk."""

    roots: Mapping[str, Path]
    """Absolute folders by name."""
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    """By role, then class; within a class the shots in the order drawn, test pictures by path."""
    settings: SplitSettings
    notes: tuple[str, ...]
    """What the user should be told, one line each."""

    def entries_of(self, role: SplitName) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.role == role)

    def items(self, role: SplitName) -> list[tuple[Path, str]]:
        """Return the files of a role and their digests, as `encode_pictures` takes them."""
        return [(self.file(entry), entry.sha256) for entry in self.entries_of(role)]

    def labels(self, role: SplitName) -> I64:
        """Return i64[N], in the order of `items`."""
        return np.array([entry.label for entry in self.entries_of(role)], np.int64)

    def file(self, entry: Entry) -> Path:
        return self.roots[entry.root] / entry.path

    def check_unchanged(self, progress: Progress | None = None) -> None:
        """Compare every picture with its recorded digest.

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
            "roots": {name: str(root) for name, root in self.roots.items()},
            "classes": list(self.classes),
            "settings": {
                "shots": settings.shots,
                "n_val": settings.n_val,
                "test_fraction": settings.test_fraction,
                "split_seed": settings.split_seed,
                "seed": settings.seed,
            },
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
        """Check all of a split file but the pictures themselves (`check_unchanged`).

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
        # A published test set may hold a picture twice, even with two classes.
        others = [entry.sha256 for entry in entries if entry.role != "test"]
        tested = {entry.sha256 for entry in entries if entry.role == "test"}
        if len(set(others)) < len(others) or not tested.isdisjoint(others):
            raise FormatError(f"{where}: the same picture is listed twice")
        if {entry.label for entry in entries if entry.role == "train"} != set(range(len(classes))):
            raise FormatError(f"{where}: a class has no train pictures")
        return cls(folders, classes, tuple(entries), _settings(top), top.texts("notes"))


def _settings(top: Fields) -> SplitSettings:
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


def digest_pictures(dataset: Listing, progress: Progress | None = None) -> list[str]:
    """Return the SHA-256 of every picture's file, in the order of `dataset.pictures`.

    Raises: DataError naming a file that cannot be read.
    """
    digests = []
    for done, picture in enumerate(dataset.pictures, 1):
        path = dataset.root / picture.path
        try:
            digests.append(sha256(path))
        except OSError as error:
            raise DataError(f'picture "{path}" cannot be read: {error.strerror}') from None
        if progress:
            progress(done, len(dataset.pictures))
    return digests


def make_split(
    dataset: Listing,
    digests: Sequence[str],
    settings: SplitSettings,
    test_data: tuple[Listing, Sequence[str]] | None = None,
    published: bool = False,
) -> Split:
    """Choose shots, then validation pictures; test pictures come first where they are cut off.

    `digests` are those of `digest_pictures`; `test_data` is another data set to test on. Of a
    `published` data set, which nobody may edit, all test pictures stay, copies included, and what
    equals one of them, or has two classes, neither tunes nor validates.

    Raises: DataError when a class has too few pictures, one picture would have two classes or two
        roles (and the data are not published), or `test_data` has other classes.
    """
    classes, notes = dataset.classes, [*dataset.notes]
    has_splits = dataset.pictures[0].split is not None
    if settings.test_fraction != "auto" and (has_splits or test_data):
        source = "train and test folders of its own" if has_splits else "`test_data`"
        raise DataError(f'data "{dataset.root}" has {source}: leave out `test_fraction`')
    pool = [
        Entry("data", picture.path, digest, picture.label, picture.split or "train")
        for picture, digest in zip(dataset.pictures, digests, strict=True)
    ]
    roots = {"data": dataset.root.absolute()}
    if test_data:
        n_before = len(pool)
        pool = [entry for entry in pool if entry.role != "test"]
        if len(pool) < n_before:
            notes.append(f"test pictures of the data itself not used: {n_before - len(pool)}")
        pool += _test_entries(dataset, *test_data)
        roots["test"] = test_data[0].root.absolute()
    if published:
        pool, left_out = _without_published_copies(pool)
        notes += left_out
    else:
        pool, n_copies = _without_copies(pool, classes, roots)
        if n_copies:
            notes.append(f"exact copies of another picture, left out: {n_copies}")

    by_class: list[list[Entry]] = [[] for _ in classes]
    for entry in pool:
        by_class[entry.label].append(entry)
    if not has_splits and not test_data:
        by_class, note = _cut_off_test(by_class, classes, settings)
        notes += note
    elif not any(entry.role == "test" for entry in pool):
        notes.append("no test set: the data has none (supply one with `test_data`)")
    by_class = [_choose(entries, settings) for entries in by_class]
    _check_shots(by_class, pool, classes, settings)
    notes += _check_val(by_class, classes, settings)
    entries = [entry for role in ROLES for part in by_class for entry in part if entry.role == role]
    return Split(roots, classes, tuple(entries), settings, tuple(notes))


def whole_split(listing: Listing, digests: Sequence[str], seed: int | None) -> Split:
    """Return a split in which every picture is there to tune with.

    Those of a class are in the order drawn with `seed`, as those of a file are; None: as given.

    Raises: DataError for one picture with two classes, or a class without any.
    """
    classes, roots = listing.classes, {"data": listing.root.absolute()}
    pool = [
        Entry("data", picture.path, digest, picture.label, "train")
        for picture, digest in zip(listing.pictures, digests, strict=True)
    ]
    pool, n_copies = _without_copies(pool, classes, roots)
    notes = [f"exact copies of another picture, left out: {n_copies}"] if n_copies else []
    by_class = [[e for e in pool if e.label == label] for label in range(len(classes))]
    if seed is not None:
        by_class = [_drawn(entries, "tune", seed) for entries in by_class]
    for name, entries in zip(classes, by_class, strict=True):
        if not entries:
            raise DataError(f'class "{name}" has no picture')
    settings = SplitSettings(max(map(len, by_class)), 0, 0, 0, seed or 0)
    return Split(roots, classes, tuple(e for part in by_class for e in part), settings, (*notes,))


def _test_entries(dataset: Listing, other: Listing, digests: Sequence[str]) -> list[Entry]:
    """Return the test pictures of `test_data`: its test folder, or all where it has no splits."""
    missing = sorted(set(dataset.classes) - set(other.classes))
    extra = sorted(set(other.classes) - set(dataset.classes))
    if missing or extra:
        listed = "; ".join(
            f"{what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("not among the data's", extra))
            if names
        )
        raise DataError(f'`test_data` "{other.root}" has other classes than the data ({listed})')
    entries = [
        Entry("test", picture.path, digest, picture.label, "test")
        for picture, digest in zip(other.pictures, digests, strict=True)
        if picture.split in (None, "test")
    ]
    if not entries:
        raise DataError(f'`test_data` "{other.root}" has splits but no test pictures')
    return entries


def _without_copies(
    pool: Iterable[Entry], classes: Sequence[str], roots: Mapping[str, Path]
) -> tuple[list[Entry], int]:
    """Keep the first of equal files, and return how many others there were.

    Raises: DataError where equal files have different classes or roles.
    """
    first: dict[str, Entry] = {}
    conflicts = []
    n_copies = 0
    for entry in pool:
        known = first.setdefault(entry.sha256, entry)
        if known is entry:
            continue
        n_copies += 1
        if (known.label, known.role) != (entry.label, entry.role):
            conflicts.append((known, entry))
    if conflicts:
        shown = " and ".join(
            f'"{roots[entry.root] / entry.path}" ({entry.role}, class "{classes[entry.label]}")'
            for entry in conflicts[0]
        )
        what = "classes" if conflicts[0][0].label != conflicts[0][1].label else "roles"
        raise DataError(
            f"the same picture has two {what}: {shown}; {len(conflicts)} such pair(s) in all "
            "(remove one of each)"
        )
    return list(first.values()), n_copies


def _without_published_copies(pool: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Keep all test pictures, and of the others the first of equal files, train before val.

    Neither is kept of those that equal a test picture or have two classes. Returned with the pool:
    how many were left out and why, a line each.
    """
    tested = {entry.sha256 for entry in pool if entry.role == "test"}
    labels: dict[str, set[int]] = {}
    for entry in pool:
        labels.setdefault(entry.sha256, set()).add(entry.label)
    kept: list[Entry] = []
    once: set[str] = set()
    left_out = Counter[str]()
    for entry in sorted(pool, key=lambda entry: ROLES.index(entry.role)):
        if entry.role == "test":
            kept.append(entry)
        elif entry.sha256 in tested:
            left_out["equal to a test picture"] += 1
        elif len(labels[entry.sha256]) > 1:
            left_out["of two classes at once"] += 1
        elif entry.sha256 in once:
            left_out["copies of another"] += 1
        else:
            once.add(entry.sha256)
            kept.append(entry)
    return kept, [f"left out of train and val, {why}: {n}" for why, n in left_out.items()]


def _drawn(entries: Iterable[Entry], purpose: str, seed: int) -> list[Entry]:
    def turn(entry: Entry) -> bytes:
        return hashlib.sha256(f"{purpose}:{seed}:{entry.sha256}".encode()).digest()

    return sorted(entries, key=turn)


def _cut_off_test(
    by_class: list[list[Entry]], classes: Sequence[str], settings: SplitSettings
) -> tuple[list[list[Entry]], list[str]]:
    """Give the role test to a part of every class; half of an odd number is rounded down."""
    if settings.test_fraction == 0:
        return by_class, ["no test set: `test_fraction` is 0"]
    if settings.test_fraction == "auto":
        fewest = min(range(len(classes)), key=lambda label: len(by_class[label]))
        needed = 2 * (settings.shots + settings.wanted_val)
        if len(by_class[fewest]) < needed:
            return by_class, [
                f'no test set: class "{classes[fewest]}" has {len(by_class[fewest])} pictures, and '
                f"half is kept for testing from {needed} in every class (supply a test set with "
                "`test_data`, or use `test_fraction`)"
            ]
    result = []
    for entries in by_class:
        n = len(entries)
        fraction = settings.test_fraction
        n_test = n // 2 if fraction == "auto" else max(1, round(n * fraction))
        drawn = _drawn(entries, "test", settings.split_seed)
        test = sorted(drawn[:n_test], key=lambda entry: entry.path)
        result.append([replace(entry, role="test") for entry in test] + drawn[n_test:])
    return result, []


def _choose(entries: list[Entry], settings: SplitSettings) -> list[Entry]:
    """Fill the shots, then validation, from one class; pictures left over have no role."""
    drawn = _drawn((entry for entry in entries if entry.role == "train"), "tune", settings.seed)
    given = [entry for entry in entries if entry.role == "val"]
    val = _drawn(given, "tune", settings.seed) if given else drawn[settings.shots :]
    return [
        *drawn[: settings.shots],
        *(replace(entry, role="val") for entry in val[: settings.wanted_val]),
        *(entry for entry in entries if entry.role == "test"),
    ]


def _count(by_class: list[list[Entry]], role: SplitName) -> list[int]:
    return [sum(entry.role == role for entry in entries) for entries in by_class]


def _check_shots(
    by_class: list[list[Entry]],
    pool: Iterable[Entry],
    classes: Sequence[str],
    settings: SplitSettings,
) -> None:
    short = [label for label, n in enumerate(_count(by_class, "train")) if n < settings.shots]
    if not short:
        return
    label = short[0]
    n_train, n_test = _count(by_class, "train")[label], _count(by_class, "test")[label]
    n_all = Counter(entry.label for entry in pool if entry.role == "train")[label]
    kept = f" ({n_all} less {n_test} kept for testing)" if n_all > n_train else ""
    raise DataError(
        f'class "{classes[label]}" has {n_train} pictures to tune with{kept}, `shots` '
        f"{settings.shots} needs {settings.shots}; {len(short)} such class(es) in all (add "
        "pictures or ask for fewer shots)"
    )


def _check_val(
    by_class: list[list[Entry]], classes: Sequence[str], settings: SplitSettings
) -> list[str]:
    counts = _count(by_class, "val")
    fewest, wanted = min(counts), settings.wanted_val
    if fewest == wanted:
        return []
    name = classes[counts.index(fewest)]
    if settings.n_val is not None:
        raise DataError(
            f'class "{name}" has {fewest} pictures left for validation, `val` {wanted} needs '
            f"{wanted} (add pictures, or leave out `val` to take what is left)"
        )
    if max(counts) == 0:
        return ["no validation pictures: the shots take them all"]
    each = str(fewest) if fewest == max(counts) else f"{fewest} to {max(counts)}"
    return [f"validation: {each} pictures per class instead of {wanted}: shots are filled first"]
