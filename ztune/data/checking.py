"""What is there of a data set by name, what is missing, what is doubtful: found, not raised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ztune.data import parquet
from ztune.data.coop import SPLITS, write_split
from ztune.data.library import (
    NamedData,
    class_problems,
    data_folder,
    load_named,
    missing_files,
    missing_message,
    missing_pictures,
)
from ztune.data.manifests import SplitName
from ztune.data.named import Spec
from ztune.errors import DataError
from ztune.files import sha256

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Copies:
    """Test pictures that are also among those for train or val."""

    by_path: tuple[str, ...]
    """Listed in both."""
    by_content: tuple[tuple[str, str], ...] | None
    """Other files with equal bytes: test, train or val. None: not compared."""


@dataclass
class Findings:
    """What a check found."""

    spec: Spec
    folder: Path | None = None
    data: NamedData | None = None
    saved: Path | None = None
    """The split file that was written."""
    there: list[str] = field(default_factory=list)
    """Files and folders of the layout that exist."""
    absent: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Pictures that the split names and that are not there."""
    copies: Copies | None = None
    problems: list[str] = field(default_factory=list)
    """It cannot be used as it is."""
    warnings: list[str] = field(default_factory=list)
    """It can, but is not what was published, or figures on it would mean less."""


def check(
    spec: Spec,
    root: Path,
    prepare: bool = False,
    contents: bool = True,
    progress: Progress | None = None,
) -> Findings:
    """Look at a data set. `prepare` saves what can be made; `contents` compares files' bytes.

    Problems are part of the findings. An unreadable picture does raise DataError.
    """
    found = Findings(spec)
    try:
        found.folder = data_folder(spec, root)
    except DataError as error:
        found.problems.append(str(error))
        return found
    layout = dict.fromkeys((*([spec.images] if spec.images else []), *spec.splits, *spec.needs))
    layout[spec.own_split] = layout[parquet.EXTRACTED] = None
    found.there = [name for name in layout if (found.folder / name).exists()]
    try:
        found.data = data = load_named(spec, root, prepare)
    except DataError as error:
        found.absent = missing_files(spec, found.folder)
        found.problems.append(str(error))
        others = sorted(path.name for path in found.folder.glob("split_*.json"))
        if found.absent and others:
            found.warnings.append(f"split file(s) of another name: {', '.join(others)}")
        return found
    found.missing = missing_pictures(data)
    if found.missing:
        found.problems.append(missing_message(data, found.missing))
    found.problems += class_problems(data)
    found.warnings += _count_warnings(data)
    found.copies = _copies(data, set(found.missing), contents, progress)
    found.warnings += _copy_warnings(found.copies)
    if prepare and data.source is None and spec.drawn and not found.problems:
        found.saved = found.folder / spec.own_split
        write_split(found.saved, data.split)
    return found


def published(spec: Spec) -> dict[SplitName, int | None]:
    counts = spec.counts
    return {"train": counts.train, "val": counts.val, "test": counts.test}


def _count_warnings(data: NamedData) -> list[str]:
    spec, counts = data.spec, data.split.counts
    warnings = []
    if len(data.split.classes) != spec.n_classes:
        warnings.append(f"{len(data.split.classes)} classes, published: {spec.n_classes}")
    for role, n in published(spec).items():
        if n is not None and counts[role] != n:
            warnings.append(f"{counts[role]:,} {role} pictures, published: {n:,}")
    together = counts["train"] + counts["val"]
    if spec.counts.trainval is not None and together != spec.counts.trainval:
        warnings.append(
            f"{together:,} train and val pictures together, published: {spec.counts.trainval:,}"
        )
    names = Counter(data.classes)
    if shared := [name for name, n in names.items() if n > 1]:
        warnings.append(
            f"{len(shared)} name(s) for more than one class, taken as one: {', '.join(shared[:5])}"
        )
    tested = {item.label for item in data.split.test}
    if untested := [name for n, name in data.split.classes.items() if n not in tested]:
        warnings.append(f"{len(untested)} class(es) without test pictures: {untested[0]}, ...")
    for role in SPLITS:
        paths = Counter(item.path for item in data.split.of(role))
        if twice := [path for path, n in paths.items() if n > 1]:
            warnings.append(f'{len(twice)} picture(s) twice in {role}: "{twice[0]}", ...')
    return warnings


def _copies(
    data: NamedData, missing: set[str], contents: bool, progress: Progress | None
) -> Copies:
    """Compare test pictures with the others; only files of equal size can have equal bytes."""
    tuned = dict.fromkeys(i.path for i in (*data.split.train, *data.split.val))
    tested = dict.fromkeys(item.path for item in data.split.test)
    both = tuple(path for path in tested if path in tuned)
    if not contents:
        return Copies(both, None)
    sizes: dict[int, tuple[list[str], list[str]]] = {}
    for place, paths in enumerate((tuned, tested)):
        for path in paths:
            if path not in missing and (place == 0 or path not in tuned):
                size = (data.root / path).stat().st_size
                sizes.setdefault(size, ([], []))[place].append(path)
    groups = [group for group in sizes.values() if all(group)]
    total, done = sum(len(part) for group in groups for part in group), 0
    equal: dict[str, str] = {}
    for group in groups:
        known: dict[str, str] = {}
        for place, part in enumerate(group):
            for path in part:
                digest = sha256(data.root / path)
                if place == 0:
                    known.setdefault(digest, path)
                elif digest in known:
                    equal[path] = known[digest]
                done += 1
                if progress:
                    progress(done, total)
    return Copies(both, tuple((path, equal[path]) for path in tested if path in equal))


def _copy_warnings(copies: Copies) -> list[str]:
    warnings = []
    if copies.by_path:
        warnings.append(
            f"{len(copies.by_path)} test picture(s) also in train or val: {_quoted(copies.by_path)}"
        )
    if copies.by_content:
        pairs = [f"{test} = {other}" for test, other in copies.by_content]
        warnings.append(
            f"{len(pairs)} test picture(s) with the same content as one in train or val: "
            f"{_quoted(pairs)}"
        )
    return warnings


def _quoted(names: Sequence[str]) -> str:
    listed = ", ".join(f'"{name}"' for name in names[:5])
    return f"{listed}, ..." if len(names) > 5 else listed
