"""Read a named data set: find its folder, split and images.

    data = read_named("dtd", Path("/data"))       # /data/dtd, in the layout of CoOp's DATASETS.md
    shots = few_shot(data.split, 16, seed=1)      # coop.py: what CoOp draws with this seed
    data.dataset()                                # a Listing, like other data

Without a split file, the split is made from the data set's official files (official.py), or an
error names the split file to get (named.py).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ztune.data import parquet
from ztune.data.coop import SPLITS, CoopSplit, Item, display_name, read_split, write_split
from ztune.data.folders import ListedImage, Listing
from ztune.data.named import Spec, find_spec
from ztune.errors import DataError
from ztune.printing import quoted

SEED = 1
"""Seed to make a missing split; a split is made once and then saved."""
_SHOWN = 5  # names in an error


@dataclass(frozen=True)
class NamedData:
    """A data set found on disk."""

    spec: Spec
    root: Path
    """The folder that paths of the split are relative to."""
    split: CoopSplit
    """With the published class names."""
    source: Path | None
    """The split file; None for a split just made from the official files."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names for templates (`_` is a space), in the order of the labels."""
        return tuple(display_name(name) for name in self.split.classes.values())

    @property
    def has_published_lists(self) -> bool:
        """Whether the lists come from a published split file or need no random draw."""
        if self.source is None:
            return not self.spec.drawn
        return self.source.name in self.spec.splits

    def dataset(self) -> Listing:
        """Return it as a Listing: classes by name, images by path.

        Labels with the same name (ImageNet has a few) become one class, since classes are
        identified by name.

        Raises: DataError when there are fewer than two classes.
        """
        classes = tuple(sorted(set(self.classes)))
        if len(classes) < 2:
            raise DataError(
                f'data set "{self.spec.name}" has only one class, "{classes[0]}" (expected at '
                "least two)"
            )
        index = {name: label for label, name in enumerate(classes)}
        images = [
            ListedImage(item.path, index[display_name(item.name)], role)
            for role, item in self.split
        ]
        images.sort(key=lambda image: image.path)
        return Listing(self.root, classes, tuple(images), lists=self.split)


def read_named(name: str, root: Path, save: bool = True) -> NamedData:
    """Read a data set by name from the root folder of all data sets, images included.

    With `save`, a drawn split and the images of parquet files are saved in the data set's folder.

    Raises: ConfigError for an unknown name; DataError when the folder, a file or images are
        missing, or a class has no training images.
    """
    data = load_named(find_spec(name), root, save)
    if missing := missing_images(data):
        raise DataError(describe_missing(data, missing))
    if problems := find_class_problems(data):
        raise DataError(problems[0])
    if save and data.source is None and data.spec.drawn:
        write_split(data_folder(data.spec, root) / data.spec.own_split, data.split)
    return data


def load_named(spec: Spec, root: Path, save: bool) -> NamedData:
    """Find or make the split of a data set, without checking that its images exist.

    Raises: DataError when there is none and it cannot be made.
    """
    folder = data_folder(spec, root)
    images = folder / spec.images
    for name in (*spec.splits, spec.own_split):
        if (path := folder / name).exists():
            split = read_split(path, spec.lists)
            if spec.complete:
                split = spec.complete(folder, split)
            return NamedData(spec, images, _rename_classes(spec, split), path)
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
        split = _rename_classes(spec, parquet.read_extracted(extracted))
        return NamedData(spec, extracted, split, extracted / parquet.SPLIT)
    missing = missing_files(spec, folder)
    if missing or spec.make is None:
        raise DataError(
            f'data set "{spec.name}" in "{folder}": missing {", ".join(missing)} '
            f"({spec.instructions})"
        )
    split = spec.make(folder, images, random.Random(SEED))
    if not any(split.counts.values()):
        raise DataError(f'data set "{spec.name}": "{images}" contains no images')
    return NamedData(spec, images, _rename_classes(spec, split), None)


def data_folder(spec: Spec, root: Path) -> Path:
    """Return the folder of a data set.

    Raises: DataError when the root or the folder does not exist, or the root is the folder itself.
    """
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f'root "{root}" {state} (pass the folder that contains "{spec.folder}")')
    folder = root / spec.folder
    if folder.is_dir():
        return folder
    inside = [*spec.splits, spec.own_split, *spec.needs, *([spec.images] if spec.images else [])]
    if any((root / name).exists() for name in inside):
        raise DataError(
            f'root "{root}" looks like the data set itself (pass its parent folder, and rename '
            f'this one "{spec.folder}")'
        )
    raise DataError(
        f'data set "{spec.name}": "{folder}" does not exist (create it; {spec.instructions})'
    )


def missing_files(spec: Spec, folder: Path) -> list[str]:
    """Return the files that a data set without a split file lacks."""
    wanted = [spec.images] if spec.images else []
    wanted += [spec.splits[-1]] if spec.make is None else spec.needs
    absent = [name for name in wanted if not (folder / name).exists()]
    shared = (folder.parent / "imagenet" / "classnames.txt").exists()
    return [name for name in absent if name != "classnames.txt" or not shared]


def _rename_classes(spec: Spec, split: CoopSplit) -> CoopSplit:
    if not spec.renamed:
        return split
    train, val, test = (
        tuple(Item(i.path, i.label, spec.renamed.get(i.name, i.name)) for i in split.of(role))
        for role in SPLITS
    )
    return replace(split, train=train, val=val, test=test)


def missing_images(data: NamedData) -> list[str]:
    """Return the split's paths that are not files, in order, once each."""
    paths = dict.fromkeys(item.path for _, item in data.split)
    return [path for path in paths if not _is_file(data.root / path)]


def describe_missing(data: NamedData, missing: Sequence[str]) -> str:
    """Return a message with the number of missing images, the first ones and what to do."""
    n = len({item.path for _, item in data.split})
    named = ", ".join(f'"{path}"' for path in missing[:_SHOWN])
    hint = "get them, or the right split file"
    if len(missing) == n and data.source is not None:
        hint = f'check that "{data.source.name}" is its split and the image folder is not empty'
    return f'{len(missing)} of {n} images are missing in "{data.root}": {named} ({hint})'


def find_class_problems(data: NamedData) -> list[str]:
    """Return why classes cannot be used: labels without images, or no training images."""
    problems = []
    labels = data.split.classes
    where = f'data set "{data.spec.name}"'
    if gaps := sorted(set(range(max(labels) + 1)) - set(labels)):
        numbers = ", ".join(map(str, gaps[:_SHOWN]))
        problems.append(f"{where}: {len(gaps)} label(s) without images: {numbers}")
    trained = {item.label for item in data.split.train}
    if trained and (untrained := [name for n, name in labels.items() if n not in trained]):
        problems.append(
            f'{where}: {len(untrained)} class(es) without train images, first "{untrained[0]}"'
        )
    return problems


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the system
        return False
