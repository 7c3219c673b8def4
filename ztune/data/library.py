"""Data sets by name, read: where the files lie, which split there is, which images it names.

    data = read_named("dtd", Path("/data"))       # /data/dtd, in the layout of CoOp's DATASETS.md
    shots = few_shot(data.split, 16, seed=1)      # coop.py: what CoOp draws with this seed
    data.with_split(shots).dataset()              # as everything else here takes images

A split file is read as it is; without one, the split is made from the data set's own files
(official.py), or, where these tell too little, the split file is required (named.py says which).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ztune.data import parquet
from ztune.data.coop import SPLITS, CoopSplit, Item, read_split, shown, write_split
from ztune.data.folders import ListedImage, Listing
from ztune.data.named import Spec, find_spec
from ztune.errors import DataError
from ztune.printing import quoted

SEED = 1
"""Divides a data set that comes without a split; a split is made once and then saved."""
_SHOWN = 5  # names in an error


@dataclass(frozen=True)
class NamedData:
    """A data set as it was found."""

    spec: Spec
    root: Path
    """What paths of the split are relative to."""
    split: CoopSplit
    """With the published class names."""
    source: Path | None
    """The split file; None where the split was made from the data set's own files just now."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in the order of the labels, `_` as a space, as a template takes them."""
        return tuple(shown(name) for name in self.split.classes.values())

    @property
    def has_published_lists(self) -> bool:
        """Whether they are of a published split file, or of own files in which nothing is drawn."""
        if self.source is None:
            return not self.spec.drawn
        return self.source.name in self.spec.splits

    def with_split(self, split: CoopSplit) -> NamedData:
        """Return the same with a part of its images, as few_shot and base_and_new choose."""
        return replace(self, split=split)

    def dataset(self) -> Listing:
        """Return it as folders and manifests are read: classes by name, images by path.

        Labels with the same name (ImageNet has a few) become one class, since classes are told
        apart by their names everywhere here.

        Raises: DataError when there are fewer than two classes.
        """
        classes = tuple(sorted(set(self.classes)))
        if len(classes) < 2:
            raise DataError(f'data set "{self.spec.name}" has one class only, "{classes[0]}"')
        index = {name: label for label, name in enumerate(classes)}
        images = [
            ListedImage(item.path, index[shown(item.name)], role) for role, item in self.split
        ]
        images.sort(key=lambda image: image.path)
        return Listing(self.root, classes, tuple(images), 0, lists=self.split)


def read_named(name: str, root: Path, save: bool = True) -> NamedData:
    """Read a data set by name from the folder that all data sets share, images included.

    With `save`, what has to be made is kept in the data set's folder: a split that was drawn, and
    the images of parquet files.

    Raises: ConfigError for an unknown name; DataError when the folder, a file or images are
        missing, or a class cannot be tuned on.
    """
    data = load_named(find_spec(name), root, save)
    if missing := missing_images(data):
        raise DataError(missing_message(data, missing))
    if problems := class_problems(data):
        raise DataError(problems[0])
    if save and data.source is None and data.spec.drawn:
        write_split(data_folder(data.spec, root) / data.spec.own_split, data.split)
    return data


def load_named(spec: Spec, root: Path, save: bool) -> NamedData:
    """Find the split of a data set, or make it, without looking for the images it names.

    Raises: DataError when there is none and it cannot be made.
    """
    folder = data_folder(spec, root)
    images = folder / spec.images
    for name in (*spec.splits, spec.own_split):
        if (path := folder / name).exists():
            split = read_split(path, spec.lists)
            if spec.complete:
                split = spec.complete(folder, split)
            return NamedData(spec, images, _renamed(spec, split), path)
    ready = spec.make is not None and images.is_dir() and not missing_files(spec, folder)
    if not ready and (files := parquet.parquet_files(folder)):
        extracted = parquet.extracted_below(folder)
        if not extracted.exists() and not save:
            raise DataError(
                f'data set "{spec.name}": {len(files)} parquet file(s) in "{files[0].parent}", '
                f"images not extracted yet (ztune data check {spec.name} --root "
                f"{quoted(root)} --prepare)"
            )
        parquet.extract(files, extracted)
        split = _renamed(spec, parquet.read_extracted(extracted))
        return NamedData(spec, extracted, split, extracted / parquet.SPLIT)
    missing = missing_files(spec, folder)
    if missing or spec.make is None:
        raise DataError(
            f'data set "{spec.name}" in "{folder}": missing {", ".join(missing)} '
            f"(from {spec.page}: {spec.obtain})"
        )
    split = spec.make(folder, images, random.Random(SEED))
    if not any(split.counts.values()):
        raise DataError(f'data set "{spec.name}": "{images}" holds no images')
    return NamedData(spec, images, _renamed(spec, split), None)


def data_folder(spec: Spec, root: Path) -> Path:
    """Return the folder of a data set.

    Raises: DataError when the root or the folder is not there, or the root is the folder itself.
    """
    if not root.is_dir():
        state = "is no folder" if root.exists() else "does not exist"
        raise DataError(f'root "{root}" {state} (give the folder that holds "{spec.folder}")')
    folder = root / spec.folder
    if folder.is_dir():
        return folder
    inside = [*spec.splits, spec.own_split, *spec.needs, *([spec.images] if spec.images else [])]
    if any((root / name).exists() for name in inside):
        raise DataError(
            f'root "{root}" looks like the data set itself (give the folder above it, and call '
            f'this one "{spec.folder}")'
        )
    raise DataError(
        f'data set "{spec.name}": "{folder}" does not exist (make it; from {spec.page}: '
        f"{spec.obtain})"
    )


def missing_files(spec: Spec, folder: Path) -> list[str]:
    """Return what a data set lacks to be read, where it has no split file."""
    wanted = [spec.images] if spec.images else []
    wanted += [spec.splits[0]] if spec.make is None else spec.needs
    absent = [name for name in wanted if not (folder / name).exists()]
    beside = (folder.parent / "imagenet" / "classnames.txt").exists()
    return [name for name in absent if name != "classnames.txt" or not beside]


def _renamed(spec: Spec, split: CoopSplit) -> CoopSplit:
    if not spec.renamed:
        return split
    return CoopSplit(
        *(
            tuple(Item(i.path, i.label, spec.renamed.get(i.name, i.name)) for i in split.of(role))
            for role in SPLITS
        )
    )


def missing_images(data: NamedData) -> list[str]:
    """Return the paths that the split names and that are no files, in its order, once each."""
    paths = dict.fromkeys(item.path for _, item in data.split)
    return [path for path in paths if not _is_file(data.root / path)]


def missing_message(data: NamedData, missing: Sequence[str]) -> str:
    """Say how many images are missing, which first, and what that means."""
    n = len({item.path for _, item in data.split})
    named = ", ".join(f'"{path}"' for path in missing[:_SHOWN])
    hint = "get them, or the right split file"
    if len(missing) == n and data.source is not None:
        hint = f'is "{data.source.name}" the split of another data set, or the image folder empty?'
    return f'{len(missing)} of {n} images are missing in "{data.root}": {named} ({hint})'


def class_problems(data: NamedData) -> list[str]:
    """Return why classes cannot be used: labels without images, or none to tune with."""
    problems = []
    labels = data.split.classes
    where = f'data set "{data.spec.name}"'
    if gaps := sorted(set(range(max(labels) + 1)) - set(labels)):
        numbers = ", ".join(map(str, gaps[:_SHOWN]))
        problems.append(f"{where}: {len(gaps)} label(s) without images: {numbers}")
    trained = {item.label for item in data.split.train}
    if trained and (untrained := [name for n, name in labels.items() if n not in trained]):
        problems.append(
            f'{where}: class "{untrained[0]}" has no train images, {len(untrained)} such '
            "class(es) in all"
        )
    return problems


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the system
        return False
