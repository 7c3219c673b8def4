"""Split images into training, validation and test: drawn once, recorded by content.

The data determine which of two samplers is used, in every command:

`hash`, for your images. Whether an image is a test image depends only on its content and
`split_seed`, so adding images moves no other image between training and test while there is a test
set. Whether there is one depends on the number of images (`SplitSettings.test_fraction`). Shots are
drawn from the others in the order of SHA-256("tune:seed:digest of the image"), independent of file
names, other classes and the NumPy version; the 4-shot set is a subset of the 16-shot set of the
same seed. With `shots=all` each class decides for itself whether it has test images, so adding
images to one moves none of another.

`coop`, for published lists (`Listing.lists`). Draws what CoOp's published code draws for the same
lists and seed: coop.py. Test images are those of the lists.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs

from ztune.data.coop import CoopSplit, Item, by_label, display_name, few_shot
from ztune.data.folders import Listing
from ztune.data.manifests import SplitName
from ztune.data.near_copies import MOST, PerceptualHash, near_copies
from ztune.data.split import (
    ALL,
    LEAST_HALVED,
    LEAST_JUDGED,
    ROLES,
    Entry,
    LeftOut,
    Split,
    SplitSettings,
)
from ztune.errors import DataError, ImageSizeError
from ztune.io.files import sha256
from ztune.printing import broken_images, first_few

Digest = Callable[[Path], str]
"""Returns the SHA-256 of an image's file."""


@dataclass(frozen=True)
class Screening:
    """How `hash` handles images that are broken or have two classes or roles."""

    skip_broken: bool = False
    skip_conflicts: bool = False
    why_broken: Callable[[Path, bool], DataError | None] = lambda _path, _whole: None
    """Returns why a file cannot be read, by its start or by decoding the whole; None if it can."""
    every: bool = True
    """Whether every file is checked, else only equal ones; those are always decoded."""
    hash_of: PerceptualHash | None = None
    """To find near copies of training images among the test images; None: not looked for."""


NO_SCREENING = Screening()
NEAR_COPIES = "test images that are near copies of training or validation images"
"""Start of the note on them, which is a warning."""


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises: DataError when it cannot be read.
    """
    try:
        return sha256(path)
    except OSError as error:
        raise DataError(f'image "{path}" cannot be read: {error.strerror}') from None


def digest_images(dataset: Listing) -> list[str]:
    """Return the SHA-256 of every image's file, in the order of `dataset.images`.

    Raises: DataError naming a file that cannot be read.
    """
    return [digest_file(dataset.root / image.path) for image in dataset.images]


def make_split(
    dataset: Listing,
    settings: SplitSettings,
    test_data: Listing | None = None,
    digest: Digest = digest_file,
    screening: Screening = NO_SCREENING,
) -> Split:
    """Draw training, validation and test images by `coop` for published lists, else by `hash`.

    `digest` returns a file's SHA-256; of published lists only drawn images are read. `test_data` is
    another data set to test on. `screening` applies to `hash`.

    Raises: DataError when a class has too few images, images outside published lists are broken or
        have two classes or roles, or `test_data` has other classes.
    """
    if dataset.has_splits or test_data:
        source = "its own train and test images" if dataset.has_splits else "`test_data`"
        asked = "split_seed" if settings.split_seed else "test_fraction"
        if settings.split_seed or settings.test_fraction != "auto":
            raise DataError(f'data "{dataset.root}" has {source}: omit `{asked}`')
    if dataset.lists is not None:
        return _coop_split(dataset, settings, test_data, digest)
    return _hash_split(dataset, settings, test_data, digest, screening)


def _hash_split(
    dataset: Listing,
    settings: SplitSettings,
    test_data: Listing | None,
    digest: Digest,
    screening: Screening,
) -> Split:
    """Hold out test images by hash if the data have none; draw shots, then validation images."""
    classes, notes, roots = dataset.classes, [*dataset.notes], {"data": dataset.root.absolute()}
    pool = entries_of(dataset, digest)
    if test_data:
        tested, note = _read_test_data(dataset, test_data, digest)
        pool = [entry for entry in pool if entry.role != "test"] + tested
        notes += note
        roots["test"] = test_data.root.absolute()
    listed = pool
    pool, left_out, broken = _screened(listed, classes, roots, screening)
    ignored = dataset.ignored + (test_data.ignored if test_data else ())
    left_out = structs.replace(left_out, ignored=ignored)
    notes += _describe(left_out)
    lost = Counter(entry.label for entry in broken if entry.role == "train")
    by_class: list[list[Entry]] = [[] for _ in classes]
    for entry in pool:
        by_class[entry.label].append(entry)
    if not dataset.has_splits and not test_data:
        by_class, note = _hold_out_test(by_class, classes, settings)
        notes += note
    elif not any(entry.role == "test" for entry in pool):
        notes.append("no test set: the data has none (add a test folder, or use `test_data`)")
    by_class = [_assign_roles(entries, settings) for entries in by_class]
    _check_shots(by_class, pool, classes, settings, lost)
    notes += _check_val(by_class, classes, settings)
    entries = [entry for part in by_class for entry in part]
    ordered = sort_entries(entries)
    notes += _find_near_copies(ordered, roots, screening.hash_of)
    return Split(roots, classes, ordered, settings, tuple(notes), "hash", left_out)


def _coop_split(
    dataset: Listing, settings: SplitSettings, test_data: Listing | None, digest: Digest
) -> Split:
    """Draw what CoOp's published code draws from the same lists with the same seed (coop.py).

    Test images stay as published, including duplicates, which may also be drawn for training.
    """
    assert dataset.lists is not None
    notes, roots = [*dataset.notes], {"data": dataset.root.absolute()}
    shots, n_val = settings.shots, settings.n_val
    if shots == ALL:
        shots = len(dataset.lists.train) + 1  # more than any class has: none is drawn from
        n_val = len(dataset.lists.val) + 1 if n_val is None else n_val
    drawn = few_shot(dataset.lists, shots, settings.seed, n_val)
    tested: list[Entry] = []
    if test_data:
        drawn = replace(drawn, test=())
        tested, note = _read_test_data(dataset, test_data, digest)
        notes += note
        roots["test"] = test_data.root.absolute()
    entries = entries_of_lists(drawn, dataset.root, dataset.classes, digest) + tested
    if settings.shots != ALL:
        notes += describe_shortages(drawn, settings.shots, settings.n_val)
    tuned_on = {entry.sha256 for entry in entries if entry.role != "test"}
    copies = sum(entry.role == "test" and entry.sha256 in tuned_on for entry in entries)
    if copies:
        notes.append(
            f"test images identical to a training or validation image: {copies} (kept, as "
            "published)"
        )
    return Split(roots, dataset.classes, sort_entries(entries), settings, tuple(notes), "coop")


def to_coop_split(dataset: Listing) -> CoopSplit:
    """Return the lists of a data set from folders or a manifest, in order.

    Images without a split are training images.
    """
    lists: dict[SplitName, list[Item]] = {role: [] for role in ROLES}
    for image in dataset.images:
        item = Item(image.path, image.label, dataset.classes[image.label])
        lists[image.split or "train"].append(item)
    return CoopSplit(*(tuple(lists[role]) for role in ROLES))


def entries_of(dataset: Listing, digest: Digest) -> list[Entry]:
    """Return the images of a listing in order; those without a role are training images."""
    return [
        Entry("data", p.path, digest(dataset.root / p.path), p.label, p.split or "train")
        for p in dataset.images
    ]


def entries_of_lists(
    lists: CoopSplit, root: Path, classes: Sequence[str], digest: Digest
) -> list[Entry]:
    """Return the images of published lists; labels with the same name are one class."""
    label_of = {name: label for label, name in enumerate(classes)}
    return [
        Entry("data", item.path, digest(root / item.path), label_of[display_name(item.name)], role)
        for role, item in lists
    ]


def sort_entries(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Sort entries by role, then class, keeping the order within a class."""
    return tuple(sorted(entries, key=lambda entry: (ROLES.index(entry.role), entry.label)))


def describe_shortages(drawn: CoopSplit, shots: int, n_val: int | None = None) -> list[str]:
    """Return what published lists lack for `shots` and `n_val`, one line each."""
    remarks = []
    if short := [group for group in by_label(drawn.train).values() if len(group) < shots]:
        fewest = min(short, key=len)
        remarks.append(
            f"{len(short)} class(es) have fewer than {shots} training images (fewest: "
            f'{len(fewest)}, "{fewest[0].name}"); all are used'
        )
    if n_val is not None:
        counts = Counter(item.label for item in drawn.val)
        few = [label for label in by_label(drawn.train) if counts[label] < n_val]
        if few:
            least = min(counts[label] for label in few)
            remarks.append(
                f"{len(few)} class(es) have fewer than {n_val} validation images (fewest: {least});"
                " all are used"
            )
    if not drawn.val and n_val != 0:
        remarks.append("no validation images: heads choose their settings by the shots")
    return remarks


def training_split(
    listing: Listing, digest: Digest, seed: int | None, screening: Screening = NO_SCREENING
) -> Split:
    """Return a split in which every image is a training image.

    Images of a class are shuffled by `seed`; None keeps their order.

    Raises: DataError for broken images, an image with two classes, or a class without images.
    """
    classes, roots = listing.classes, {"data": listing.root.absolute()}
    pool, left_out, _ = _screened(entries_of(listing, digest), classes, roots, screening)
    left_out, notes = structs.replace(left_out, ignored=listing.ignored), _describe(left_out)
    by_class = [[e for e in pool if e.label == label] for label in range(len(classes))]
    if seed is not None:
        by_class = [_shuffle(entries, "tune", seed) for entries in by_class]
    for name, entries in zip(classes, by_class, strict=True):
        if not entries:
            raise DataError(f'class "{name}" has no images')
    settings = SplitSettings(max(map(len, by_class)), 0, 0, 0, seed or 0)
    drawn = tuple(entry for part in by_class for entry in part)
    return Split(roots, classes, drawn, settings, (*notes,), "hash", left_out)


def _read_test_data(
    dataset: Listing, other: Listing, digest: Digest
) -> tuple[list[Entry], list[str]]:
    """Return the test images of `test_data` (all if it has no splits), and notes.

    Raises: DataError when it has other classes, or no test images.
    """
    missing = sorted(set(dataset.classes) - set(other.classes))
    extra = sorted(set(other.classes) - set(dataset.classes))
    if missing or extra:
        listed = "; ".join(
            f"{what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("unknown", extra))
            if names
        )
        raise DataError(f'`test_data` "{other.root}" has other classes than the data ({listed})')
    tested = tuple(image for image in other.images if image.split in (None, "test"))
    if not tested:
        raise DataError(f'`test_data` "{other.root}" has splits but no test images')
    unused = sum(image.split == "test" for image in dataset.images)
    note = [f"test images of the data, not used: {unused}"] if unused else []
    if other.ignored:
        shown = f"{len(other.ignored)} ({first_few(other.ignored)})"
        note.append(f"files of `test_data` ignored, not images of a class: {shown}")
    entries = entries_of(replace(other, images=tested), digest)
    return [replace(entry, root="test", role="test") for entry in entries], note


def _screened(
    pool: Sequence[Entry], classes: Sequence[str], roots: Mapping[str, Path], screening: Screening
) -> tuple[list[Entry], LeftOut, list[Entry]]:
    """Keep readable images, the first of equal files; return also what is left out, and the broken.

    Broken files come first: equal ones are not copies.

    Raises: DataError naming broken files, or equal files with different classes or roles.
    """
    broken = _find_broken(pool, roots, screening)
    if broken and not screening.skip_broken:
        reason = next(iter(broken.values()))
        if isinstance(reason, ImageSizeError):
            raise reason
        raise DataError(broken_images(str(reason), [str(path) for path in broken]))
    readable = [entry for entry in pool if roots[entry.root] / entry.path not in broken]
    first: dict[str, Entry] = {}
    conflicts = []
    for entry in readable:
        known = first.setdefault(entry.sha256, entry)
        if (known.label, known.role) != (entry.label, entry.role):
            conflicts.append((known, entry))
    if conflicts and not screening.skip_conflicts:
        shown = " and ".join(
            f'"{roots[entry.root] / entry.path}" ({entry.role}, class "{classes[entry.label]}")'
            for entry in conflicts[0]
        )
        what = "classes" if conflicts[0][0].label != conflicts[0][1].label else "roles"
        raise DataError(
            f"the same image has two {what}: {shown}; {len(conflicts)} such pair(s) in total "
            "(remove one of each, or leave out both with `skip_conflicts`)"
        )
    unclear = {known.sha256 for known, _ in conflicts}
    kept = [entry for entry in first.values() if entry.sha256 not in unclear]
    unused = [entry for entry in readable if first[entry.sha256] is not entry]
    lost = [entry for entry in pool if roots[entry.root] / entry.path in broken]
    left_out = LeftOut(
        broken=tuple(entry.path for entry in lost),
        conflicts=tuple(e.path for e in readable if e.sha256 in unclear),
        duplicates=tuple(e.path for e in unused if e.sha256 not in unclear),
    )
    return kept, left_out, lost


def _find_broken(
    pool: Sequence[Entry], roots: Mapping[str, Path], screening: Screening
) -> dict[Path, DataError]:
    """Return why files cannot be read, in order; equal files are decoded as a whole."""
    counts = Counter(entry.sha256 for entry in pool)
    decoded: dict[str, DataError | None] = {}
    broken: dict[Path, DataError] = {}
    for entry in pool:
        path, digest = roots[entry.root] / entry.path, entry.sha256
        reason = None
        if counts[digest] > 1:
            if digest not in decoded:
                decoded[digest] = screening.why_broken(path, True)
            reason = decoded[digest]
        elif screening.every:
            reason = screening.why_broken(path, False)
        if reason is not None:
            broken[path] = reason
    return broken


def _find_near_copies(
    entries: Sequence[Entry], roots: Mapping[str, Path], hash_of: PerceptualHash | None
) -> list[str]:
    """Return a note on test images that nearly equal training or validation images."""
    shown = {roots[entry.root] / entry.path: entry.path for entry in entries}
    tested, others = (
        [roots[e.root] / e.path for e in entries if (e.role == "test") == wanted]
        for wanted in (True, False)
    )
    if hash_of is None or not tested:
        return []
    if len(entries) > MOST:
        return [f"near copies not looked for among {len(entries)} images (ztune data check FOLDER)"]
    pairs = [f"{shown[one]} = {shown[two]}" for one, two in near_copies(tested, others, hash_of)]
    return [f"{NEAR_COPIES}: {len(pairs)} ({first_few(pairs)})"] if pairs else []


def _describe(left_out: LeftOut) -> list[str]:
    """Return notes on the images left out, one line each."""
    what = {
        "broken": "broken images, omitted",
        "conflicts": "images with two classes or roles, omitted",
        "duplicates": "exact duplicates of another image, omitted",
    }
    found = {text: getattr(left_out, name) for name, text in what.items()}
    return [f"{text}: {len(paths)} ({first_few(paths)})" for text, paths in found.items() if paths]


def _shuffle(entries: Iterable[Entry], purpose: str, seed: int) -> list[Entry]:
    def turn(entry: Entry) -> bytes:
        return hashlib.sha256(f"{purpose}:{seed}:{entry.sha256}".encode()).digest()

    return sorted(entries, key=turn)


def _hold_out_test(
    by_class: list[list[Entry]], classes: Sequence[str], settings: SplitSettings
) -> tuple[list[list[Entry]], list[str]]:
    """Assign the role test by each image's hash, independently of other images."""
    if settings.test_fraction == 0:
        return by_class, ["no test set: `test_fraction` is 0"]
    auto = settings.test_fraction == "auto"
    share = 0.5 if settings.test_fraction == "auto" else settings.test_fraction
    by_size = auto and settings.shots == ALL
    cut = [
        [
            replace(entry, role="test") if _is_tested(entry, share, settings.split_seed) else entry
            for entry in entries
        ]
        if not by_size or len(entries) >= LEAST_HALVED
        else entries
        for entries in by_class
    ]
    tested, left = _count(cut, "test"), _count(cut, "train")
    if by_size:
        few = [name for name, n in zip(classes, tested, strict=True) if n == 0]
        if len(few) == len(classes):
            return by_class, [
                f"no test set: no class has {LEAST_HALVED} images or more (add a test folder, or "
                "use `test_data`)"
            ]
        if few:
            return cut, [
                f"{len(few)} of {len(classes)} classes have no test images, since they have fewer "
                f"than {LEAST_HALVED} images: {first_few(few)}"
            ]
    elif auto:
        if why := _reason_for_no_test(tested, left, classes, settings):
            return by_class, [f"no test set: {why} (add a test folder, or use `test_data`)"]
    elif 0 in tested:
        none = [name for name, n in zip(classes, tested, strict=True) if n == 0]
        return cut, [f'{len(none)} class(es) have no test images: "{none[0]}"']
    return cut, []


def _is_tested(entry: Entry, share: float, seed: int) -> bool:
    turn = hashlib.sha256(f"test:{seed}:{entry.sha256}".encode()).digest()
    return int.from_bytes(turn[:8], "big") < share * 2**64


def _reason_for_no_test(
    tested: Sequence[int], left: Sequence[int], classes: Sequence[str], settings: SplitSettings
) -> str | None:
    """Return why `auto` holds out no test images of some shots, or None if it does."""
    assert settings.shots != ALL
    needed = 2 * (settings.shots + settings.wanted_val)
    least = settings.shots + (settings.n_val or 0)
    for name, n_test, n_left in zip(classes, tested, left, strict=True):
        if (n := n_test + n_left) < needed:
            return (
                f'class "{name}" has {n} images, and half are held out only with at least {needed} '
                "in every class"
            )
        if n_test == 0 or n_left < least:
            return (
                f'class "{name}" would have {n_test} test and {n_left} training images of {n}, '
                f"expected at least 1 and {least}"
            )
    return None


def _assign_roles(entries: list[Entry], settings: SplitSettings) -> list[Entry]:
    """Assign one class's images to the shots, then to validation; drop the others."""
    drawn = _shuffle((entry for entry in entries if entry.role == "train"), "tune", settings.seed)
    given = [entry for entry in entries if entry.role == "val"]
    n_train, n_val = settings.counts(len(drawn), len(given))
    val = _shuffle(given, "tune", settings.seed) if given else drawn[n_train:]
    return [
        *drawn[:n_train],
        *(replace(entry, role="val") for entry in val[:n_val]),
        *sorted((e for e in entries if e.role == "test"), key=lambda entry: entry.path),
    ]


def _count(by_class: list[list[Entry]], role: SplitName) -> list[int]:
    return [sum(entry.role == role for entry in entries) for entries in by_class]


def _check_shots(
    by_class: list[list[Entry]],
    pool: Iterable[Entry],
    classes: Sequence[str],
    settings: SplitSettings,
    lost: Mapping[int, int],
) -> None:
    """Raise DataError for classes with too few shots, `lost` broken images aside."""
    counts = enumerate(_count(by_class, "train"))
    wanted = 1 if settings.shots == ALL else settings.shots
    short = [label for label, n in counts if n < max(1, wanted - lost[label])]
    if not short:
        return
    label = short[0]
    n_train, n_test = _count(by_class, "train")[label], _count(by_class, "test")[label]
    n_all = Counter(entry.label for entry in pool if entry.role == "train")[label]
    kept = f" ({n_all} minus {n_test} for testing)" if n_all > n_train else ""
    raise DataError(
        f'class "{classes[label]}" has {n_train} training images{kept}, expected at least '
        f"{wanted} (`shots`); {len(short)} such class(es) in total (add images or reduce `shots`)"
    )


def _check_val(
    by_class: list[list[Entry]], classes: Sequence[str], settings: SplitSettings
) -> list[str]:
    counts = _count(by_class, "val")
    fewest, wanted = min(counts), settings.wanted_val
    if fewest >= wanted:
        return []
    each = str(fewest) if fewest == max(counts) else f"{fewest} to {max(counts)}"
    if settings.shots == ALL:
        why = f"at most a fifth of a class, and none of fewer than {LEAST_JUDGED}"
        return [f"validation: {each} images per class instead of {wanted}: {why}"]
    name = classes[counts.index(fewest)]
    if settings.n_val is not None:
        raise DataError(
            f'class "{name}" has {fewest} images left for validation, expected {wanted} (`val`); '
            "add images, or omit `val` to use those left"
        )
    if max(counts) == 0:
        return ["no validation images: all are shots"]
    return [f"validation: {each} images per class instead of {wanted}, since shots come first"]
