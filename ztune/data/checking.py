"""What is there of a data set by name, what is missing, what is doubtful: found, not raised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ztune.data import parquet
from ztune.data.coop import SPLITS, CoopSplit, shown, write_split
from ztune.data.library import (
    NamedData,
    class_problems,
    data_folder,
    load_named,
    missing_files,
    missing_images,
    missing_message,
)
from ztune.data.manifests import SplitName
from ztune.data.named import Spec
from ztune.errors import DataError
from ztune.io.files import sha256
from ztune.types import Json

Progress = Callable[[int, int], None]
_SHOWN = 5  # names in a warning or document
_NAMES_FILE = "classnames.txt"


@dataclass(frozen=True)
class Copies:
    """Test images that are also among those for train or val."""

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
    in_parquet: bool = False
    """Its images are in parquet files; a problem with these says what to do."""
    missing: list[str] = field(default_factory=list)
    """Images that the split names and that are not there."""
    copies: Copies | None = None
    problems: list[str] = field(default_factory=list)
    """It cannot be used as it is."""
    warnings: list[str] = field(default_factory=list)
    """It can, but is not what was published, or figures on it would mean less."""

    def to_json(self) -> dict[str, Json]:
        data, counts, copies = self.data, published(self.spec), self.copies
        number = data.split.counts if data else None
        n_classes = len(data.split.classes) if data else None
        document: dict[str, Json] = {
            **spec_to_json(self.spec),
            "path": None if self.folder is None else str(self.folder),
            "classes": {"listed": n_classes, "published": self.spec.n_classes},
            "counts": {
                role: {"listed": number[role] if number else None, "published": counts[role]}
                for role in SPLITS
            },
            "present": [*self.there],
            "absent": [*self.absent],
            "problems": [*self.problems],
            "warnings": [*self.warnings],
            "ok": not self.problems,
        }
        if data is None:
            return document
        by_content = None if copies is None else copies.by_content
        return document | {
            "split": None if data.source is None else str(data.source),
            "saved": None if self.saved is None else str(self.saved),
            "missing": {"n": len(self.missing), "first": [*self.missing[:_SHOWN]]},
            "copies": None
            if copies is None
            else {
                "by_path": len(copies.by_path),
                "by_content": None if by_content is None else len(by_content),
            },
        }


def spec_to_json(spec: Spec) -> dict[str, Json]:
    """Return what is published of a data set."""
    return {
        "name": spec.name,
        "title": spec.title,
        "folder": spec.folder,
        "images": spec.images,
        "classes": spec.n_classes,
        "counts": {role: published(spec)[role] for role in SPLITS},
        "template": spec.template,
        "page": spec.page,
        "obtain": spec.obtain,
        "split_files": [*spec.splits],
        "needs_split_file": spec.make is None,
    }


def check(
    spec: Spec,
    root: Path,
    prepare: bool = False,
    contents: bool = True,
    progress: Progress | None = None,
) -> Findings:
    """Look at a data set. `prepare` saves what can be made; `contents` compares files' bytes.

    Problems are part of the findings. An unreadable image does raise DataError.
    """
    found = Findings(spec)
    try:
        found.folder = data_folder(spec, root)
    except DataError as error:
        found.problems.append(str(error))
        return found
    layout = dict.fromkeys((*([spec.images] if spec.images else []), *spec.splits, *spec.needs))
    layout[spec.own_split] = layout[parquet.extracted_below(found.folder).name] = None
    found.there = [name for name in layout if (found.folder / name).exists()]
    try:
        found.data = data = load_named(spec, root, prepare)
    except DataError as error:
        found.problems.append(str(error))
        found.in_parquet = bool(parquet.parquet_files(found.folder))
        if found.in_parquet:
            return found  # images are absent here, but nothing has to be got
        found.absent = missing_files(spec, found.folder)
        others = sorted(path.name for path in found.folder.glob("split_*.json"))
        if found.absent and others:
            found.warnings.append(f"split file(s) of another name: {', '.join(others)}")
        return found
    found.missing = missing_images(data)
    if found.missing:
        found.problems.append(missing_message(data, found.missing))
    found.problems += class_problems(data) + _useless(data)
    found.warnings += doubts(data)
    found.copies = _copies(data, set(found.missing), contents, progress)
    if found.copies.by_content:
        pairs = [f"{test} = {other}" for test, other in found.copies.by_content]
        found.warnings.append(
            f"{len(pairs)} test image(s) with the same content as one in train or val: "
            f"{_quoted(pairs)}"
        )
    if prepare and data.source is None and spec.drawn and not found.problems:
        found.saved = found.folder / spec.own_split
        write_split(found.saved, data.split)
    return found


def published(spec: Spec) -> dict[SplitName, int | None]:
    counts = spec.counts
    return {"train": counts.train, "val": counts.val, "test": counts.test}


def is_published(data: NamedData) -> bool:
    """Return whether lists, numbers of images and classes are all as published."""
    return data.has_published_lists and not _differences(data)


def doubts(data: NamedData) -> list[str]:
    """Return what the lists have that is not as published, or strange: a line each."""
    return [*_differences(data), *_oddities(data)]


def _differences(data: NamedData) -> list[str]:
    spec, counts = data.spec, data.split.counts
    lines = []
    if len(data.split.classes) != spec.n_classes:
        lines.append(f"{len(data.split.classes):,} classes, published: {spec.n_classes:,}")
    for role, n in published(spec).items():
        if n is not None and counts[role] != n:
            lines.append(f"{counts[role]:,} {role} images, published: {n:,}")
    together = counts["train"] + counts["val"]
    if spec.counts.trainval is not None and together != spec.counts.trainval:
        lines.append(
            f"{together:,} train and val images together, published: {spec.counts.trainval:,}"
        )
    # ImageNet's published names are not all different; those of the others are.
    return lines if _NAMES_FILE in spec.needs else [*lines, *_shared_names(data)]


def _shared_names(data: NamedData) -> list[str]:
    names = Counter(data.classes)
    shared = [name for name, n in names.items() if n > 1]
    if not shared:
        return []
    return [
        f"{len(shared)} name(s) for more than one class, taken as one, which leaves "
        f"{len(names):,} of {len(data.classes):,}: {_some(shared)}"
    ]


def _oddities(data: NamedData) -> list[str]:
    split = data.split
    lines = _shared_names(data) if _NAMES_FILE in data.spec.needs else []
    tested = {item.label for item in split.test}
    untested = [shown(name) for label, name in split.classes.items() if label not in tested]
    if tested and untested:
        lines.append(f"{len(untested)} class(es) without test images: {_some(untested)}")
    for role in SPLITS:
        paths = Counter(item.path for item in split.of(role))
        if twice := [path for path, n in paths.items() if n > 1]:
            lines.append(f"{len(twice)} image(s) twice in {role}: {_quoted(twice)}")
    if both := _in_both(split):
        lines.append(f"{len(both)} test image(s) also in train or val: {_quoted(both)}")
    return lines


def _useless(data: NamedData) -> list[str]:
    """Return which lists are empty without which a data set serves nothing."""
    counts, known, where = data.split.counts, published(data.spec), f'data set "{data.spec.name}"'
    hint = "get the whole data set, or its split file"
    problems = []
    if not counts["train"] and known["train"] != 0:  # None: there are, how many is not known
        problems.append(f"{where} has no train images, so none to tune with ({hint})")
    if not counts["test"]:
        problems.append(f"{where} has no test images, so none to score on ({hint})")
    return problems


def _in_both(split: CoopSplit) -> tuple[str, ...]:
    """Return the test images that are listed to train or validate as well."""
    tuned = {item.path for item in (*split.train, *split.val)}
    return tuple(dict.fromkeys(item.path for item in split.test if item.path in tuned))


def _copies(
    data: NamedData, missing: set[str], contents: bool, progress: Progress | None
) -> Copies:
    """Compare test images with the others; only files of equal size can have equal bytes."""
    tuned = dict.fromkeys(i.path for i in (*data.split.train, *data.split.val))
    tested = dict.fromkeys(item.path for item in data.split.test)
    both = _in_both(data.split)
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


def _quoted(names: Sequence[str]) -> str:
    return _some([f'"{name}"' for name in names])


def _some(names: Sequence[str]) -> str:
    """Return the first names, with dots only where there are more."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
