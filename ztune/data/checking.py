"""Check a named data set: collect problems and warnings instead of raising them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ztune.data import parquet
from ztune.data.coop import SPLITS, CoopSplit, display_name, write_split
from ztune.data.library import (
    NamedData,
    data_folder,
    describe_missing,
    find_class_problems,
    load_named,
    missing_files,
    missing_images,
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
    """Test images that are also in train or val."""

    by_path: tuple[str, ...]
    """Paths in both."""
    by_content: tuple[tuple[str, str], ...] | None
    """Pairs of files with equal bytes: test, train or val. None: not compared."""


@dataclass
class CheckReport:
    """The result of a check."""

    spec: Spec
    folder: Path | None = None
    data: NamedData | None = None
    saved: Path | None = None
    """The split file that was written."""
    present: list[str] = field(default_factory=list)
    """Files and folders of the layout that exist."""
    absent: list[str] = field(default_factory=list)
    in_parquet: bool = False
    """Its images are in parquet files; problems say what to do."""
    missing: list[str] = field(default_factory=list)
    """Images of the split that do not exist."""
    copies: Copies | None = None
    problems: list[str] = field(default_factory=list)
    """Reasons why it cannot be used."""
    warnings: list[str] = field(default_factory=list)
    """Differences from what was published, or reasons to doubt scores."""

    @property
    def where(self) -> str:
        return f"no folder {self.spec.folder}" if self.folder is None else str(self.folder)

    @property
    def how_to_get(self) -> list[str]:
        """Lines that say where to download it."""
        spec = self.spec
        lines = [f"to get it: {spec.page}", f"  {spec.obtain}"]
        if spec.splits:
            whose = "BlackVIP's README" if "mlai" in spec.splits[-1] else "CoOp's DATASETS.md"
            lines.append(f"  the published split is {spec.splits[-1]}, from {whose}")
        return lines

    @property
    def split_origin(self) -> str:
        source = self.data.source if self.data else None
        if source is not None and self.folder is not None:
            return source.relative_to(self.folder).as_posix()
        if self.saved is not None:
            return f"generated, saved as {self.saved.name}"
        if self.spec.drawn:
            return "generated from the data set's files (`prepare` saves it)"
        return "the data set's own"

    @property
    def copies_found(self) -> str:
        if self.copies is None or self.copies.by_content is None:
            return "test images also in train or val: contents not compared"
        n = len(self.copies.by_path) + len(self.copies.by_content)
        return f"test images also in train or val, by path or content: {n:,}"

    def to_json(self) -> dict[str, Json]:
        data, counts, copies = self.data, published_counts(self.spec), self.copies
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
            "there": [*self.present],
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
    """Return the published facts about a data set."""
    return {
        "name": spec.name,
        "title": spec.title,
        "folder": spec.folder,
        "images": spec.images,
        "classes": spec.n_classes,
        "counts": {role: published_counts(spec)[role] for role in SPLITS},
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
) -> CheckReport:
    """Check a data set. `prepare` saves a split and extracted images; `contents` compares bytes.

    Problems are part of the report, but an unreadable image raises DataError.
    """
    found = CheckReport(spec)
    try:
        found.folder = data_folder(spec, root)
    except DataError as error:
        found.problems.append(str(error))
        return found
    layout = dict.fromkeys((*([spec.images] if spec.images else []), *spec.splits, *spec.needs))
    layout[spec.own_split] = layout[parquet.extracted_below(found.folder).name] = None
    found.present = [name for name in layout if (found.folder / name).exists()]
    try:
        found.data = data = load_named(spec, root, prepare)
    except DataError as error:
        found.problems.append(str(error))
        found.in_parquet = bool(parquet.parquet_files(found.folder))
        if found.in_parquet:
            return found  # nothing has to be downloaded
        found.absent = missing_files(spec, found.folder)
        others = sorted(path.name for path in found.folder.glob("split_*.json"))
        if found.absent and others:
            found.warnings.append(f"split file(s) with an unexpected name: {', '.join(others)}")
        return found
    found.missing = missing_images(data)
    if found.missing:
        found.problems.append(describe_missing(data, found.missing))
    found.problems += find_class_problems(data) + _find_empty_lists(data)
    found.warnings += find_deviations(data)
    found.copies = _copies(data, set(found.missing), contents, progress)
    if found.copies.by_content:
        pairs = [f"{test} = {other}" for test, other in found.copies.by_content]
        found.warnings.append(
            f"{len(pairs)} test image(s) with the same content as an image in train or val: "
            f"{_quoted(pairs)}"
        )
    if prepare and data.source is None and spec.drawn and not found.problems:
        found.saved = found.folder / spec.own_split
        write_split(found.saved, data.split)
    return found


def published_counts(spec: Spec) -> dict[SplitName, int | None]:
    counts = spec.counts
    return {"train": counts.train, "val": counts.val, "test": counts.test}


def is_published(data: NamedData) -> bool:
    """Return whether lists and numbers of images and classes are as published."""
    return data.has_published_lists and not _find_differences(data)


def find_deviations(data: NamedData) -> list[str]:
    """Return differences from what was published and inconsistencies, one line each."""
    return [*_find_differences(data), *_find_inconsistencies(data)]


def _find_differences(data: NamedData) -> list[str]:
    spec, counts = data.spec, data.split.counts
    lines = []
    if len(data.split.classes) != spec.n_classes:
        lines.append(f"{len(data.split.classes):,} classes, published: {spec.n_classes:,}")
    for role, n in published_counts(spec).items():
        if n is not None and counts[role] != n:
            lines.append(f"{counts[role]:,} {role} images, published: {n:,}")
    n_trainval = counts["train"] + counts["val"]
    if spec.counts.trainval is not None and n_trainval != spec.counts.trainval:
        lines.append(
            f"{n_trainval:,} train and val images together, published: {spec.counts.trainval:,}"
        )
    # ImageNet's published names are not all different; those of the others are.
    return lines if _NAMES_FILE in spec.needs else [*lines, *_find_shared_names(data)]


def _find_shared_names(data: NamedData) -> list[str]:
    names = Counter(data.classes)
    shared = [name for name, n in names.items() if n > 1]
    if not shared:
        return []
    return [
        f"{len(shared)} duplicate class name(s), merged into {len(names):,} of "
        f"{len(data.classes):,} classes: {_first_few(shared)}"
    ]


def _find_inconsistencies(data: NamedData) -> list[str]:
    split = data.split
    lines = _find_shared_names(data) if _NAMES_FILE in data.spec.needs else []
    tested = {item.label for item in split.test}
    untested = [display_name(name) for label, name in split.classes.items() if label not in tested]
    if tested and untested:
        lines.append(f"{len(untested)} class(es) without test images: {_first_few(untested)}")
    for role in SPLITS:
        paths = Counter(item.path for item in split.of(role))
        if twice := [path for path, n in paths.items() if n > 1]:
            lines.append(f"{len(twice)} duplicate image(s) in {role}: {_quoted(twice)}")
    if both := _find_overlap(split):
        lines.append(f"{len(both)} test image(s) also in train or val: {_quoted(both)}")
    return lines


def _find_empty_lists(data: NamedData) -> list[str]:
    """Return a problem for each required list that is empty."""
    counts, known, where = (
        data.split.counts,
        published_counts(data.spec),
        f'data set "{data.spec.name}"',
    )
    hint = "get the whole data set, or its split file"
    problems = []
    if not counts["train"] and known["train"] != 0:  # None: an unknown number
        problems.append(f"{where} has no train images ({hint})")
    if not counts["test"]:
        problems.append(f"{where} has no test images ({hint})")
    return problems


def _find_overlap(split: CoopSplit) -> tuple[str, ...]:
    """Return the test images that are also in train or val."""
    tuned = {item.path for item in (*split.train, *split.val)}
    return tuple(dict.fromkeys(item.path for item in split.test if item.path in tuned))


def _copies(
    data: NamedData, missing: set[str], contents: bool, progress: Progress | None
) -> Copies:
    """Compare test images with the others; only files of equal size can have equal bytes."""
    tuned = dict.fromkeys(i.path for i in (*data.split.train, *data.split.val))
    tested = dict.fromkeys(item.path for item in data.split.test)
    both = _find_overlap(data.split)
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
    return _first_few([f'"{name}"' for name in names])


def _first_few(names: Sequence[str]) -> str:
    """Return the first names, with dots if there are more."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
