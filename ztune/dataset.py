"""Labelled images from a folder, a manifest, a named data set or arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from runtimes.conversions import count_conversions, report_conversions
from runtimes.in_memory import image_digest
from runtimes.preprocess import ImageLike, convert_image, perceptual_hash, reason_broken
from ztune.data.folders import ListedImage, Listing
from ztune.data.named import find_spec
from ztune.data.sources import TEMPLATE, read_source
from ztune.data.split import ALL, PUBLISHED_SHOTS, Shots, Split, SplitSettings
from ztune.data.splitter import NEAR_COPIES, Screening, digest_file, make_split, training_split
from ztune.errors import DataError
from ztune.evaluate import LabelledImages
from ztune.progress import SILENCE, warn
from ztune.types import F32, I64

MEMORY = Path("/in-memory").absolute()
"""The nominal folder of images in memory; no file is read there."""
Labels = Sequence[str] | Sequence[int] | np.ndarray[Any, Any]
Images = Sequence[ImageLike] | np.ndarray[Any, Any]
"""Paths, Pillow images, u8[N, H, W, 3], a list of u8[H, W, 3], or features f32[N, e]."""


@dataclass(frozen=True)
class TrainingSet:
    """Training images and their validation images, as `fit` takes them.

    >>> train = Dataset.from_folder("examples/digits").whole()
    >>> len(train), len(train.classes), train.template
    (1797, 10, 'a photo of a {}.')
    """

    split: Split
    template: str = TEMPLATE
    """The template for the classes, with {} for a name."""
    held: Mapping[Path, Image.Image] = field(default_factory=dict)
    """Images in memory, by nominal path."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, sorted."""
        return self.split.classes

    def __len__(self) -> int:
        """Return the number of training images without validation images."""
        return len(self.split.entries_of("train"))


@dataclass(frozen=True)
class Dataset:
    """Labelled images; files are decoded on use.

    >>> data = Dataset.from_folder("examples/digits")
    >>> data.classes[:3], len(data)
    (('eight', 'five', 'four'), 1797)
    >>> train, test = data.split(shots=16, seed=1)
    >>> len(train), len(test)
    (160, 901)
    """

    listing: Listing
    template: str = TEMPLATE
    held: Mapping[Path, Image.Image] = field(default_factory=dict)

    @classmethod
    def from_folder(
        cls, path: Path | str, *, names: Path | str | None = None, nested: str | None = None
    ) -> Dataset:
        """Return the images of a folder with one subfolder per class.

        `root/class/*.jpg` or `root/{train,val,test}/class/*`; each line of the file `names` is
        folder, tab, class name. Of folders in folders, `nested` makes classes of the innermost
        (leaf) or of the top ones (top).

        Raises: DataError for another layout.
        """
        named = None if names is None else Path(names)
        return cls(read_source(str(Path(path)), None, named, nested=nested))

    @classmethod
    def from_manifest(cls, path: Path | str) -> Dataset:
        """Return the images of a .csv or .jsonl manifest with path, label and optional split.

        Raises: DataError naming the invalid line.
        """
        return cls.from_folder(path)

    @classmethod
    def from_parquet(cls, path: Path | str) -> Dataset:
        """Return the images in a folder of parquet files in the Hugging Face hub's format.

        They are extracted once, into a subfolder.

        Raises: DataError; ConfigError without pyarrow.
        """
        return cls.from_folder(path)

    @classmethod
    def named(cls, name: str, root: Path | str) -> Dataset:
        """Return a data set of `ztune data list` by name, from the folder of all data sets.

        Raises: ConfigError for an unknown name; DataError for unusable data.
        """
        spec = find_spec(name)
        return cls(read_source(spec.name, Path(root)), spec.template)

    @classmethod
    def from_arrays(
        cls,
        images: Images,
        labels: Labels,
        class_names: Sequence[str] | None = None,
    ) -> Dataset:
        """Return images of u8[N, H, W, 3], or of a list of u8[H, W, 3], Pillow images or paths.

        Labels are class names, or indices into `class_names`.

        Raises: DataError for other types, or different lengths.
        """
        given = class_names_of(class_names)
        names = labels_as_names(labels, given)
        images = as_rows(images)
        if len(images) != len(names):
            raise DataError(
                f"got {len(images)} `images` and {len(names)} `labels`, expected equal numbers"
            )
        classes = tuple(sorted(set(names if given is None else given)))
        if len(classes) < 2:
            raise DataError(f"`labels` have {len(classes)} class(es), expected at least two")
        paths = [Path(image).absolute() for image in images if isinstance(image, str | Path)]
        try:
            root = Path(os.path.commonpath([path.parent for path in paths])) if paths else MEMORY
        except ValueError:  # on several drives
            raise DataError("`images` are on several drives, expected one") from None
        in_memory = [image for image in images if isinstance(image, Image.Image)]
        report_conversions(count_conversions(in_memory), "images", SILENCE)
        held: dict[Path, Image.Image] = {}
        listed = []
        for number, (image, name) in enumerate(zip(images, names, strict=True)):
            if isinstance(image, str | Path):
                path = Path(image).absolute().relative_to(root).as_posix()
            else:
                path = f"{MEMORY.name}-{number:09d}"
                held[root / path] = convert_image(image, f"image {number}")
            listed.append(ListedImage(path, classes.index(name), None))
        return cls(Listing(root, classes, tuple(listed)), held=held)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, sorted."""
        return self.listing.classes

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.listing.images)

    def split(
        self,
        shots: Shots | None = None,
        seed: int = 1,
        *,
        val: int | None = None,
        test_fraction: float | Literal["auto"] = "auto",
        split_seed: int = 0,
        skip_broken: bool = False,
        skip_conflicts: bool = False,
    ) -> tuple[TrainingSet, LabelledImages]:
        """Draw `shots` training images per class, validation images, and test images.

        Equal to the split of `ztune tune` with these settings. `shots` may be "all"; None means 16
        for a named data set, else "all". `val` is the number of validation images per class (None:
        min(shots, 4), or the remainder; with all shots only those that the data mark).
        `test_fraction` of a class is kept for testing (auto: half if every class has at least
        2 * (shots + val) images; with all shots half of each class of at least 40).
        `skip_broken` and `skip_conflicts` leave out unreadable images, and images with two classes
        or roles.

        Raises: DataError for a class with too few images, broken images, or an image with two
            classes.
        """
        if shots is None:
            shots = ALL if self.listing.lists is None else PUBLISHED_SHOTS
        settings = SplitSettings(shots, val, test_fraction, split_seed, seed)
        screening = Screening(skip_broken, skip_conflicts, self._why_broken, hash_of=self._hash_of)
        split = make_split(self.listing, settings, digest=self._digest, screening=screening)
        for note in split.notes:
            if note.startswith(NEAR_COPIES):
                warn(note)
        if split.notes and len(np.unique(split.labels("test"))) < len(split.classes):
            warn("; ".join(split.notes))
        return TrainingSet(split, self.template, self.held), self._tested(split)

    def whole(self, seed: int = 1, *, skip_broken: bool = False) -> TrainingSet:
        """Return all images as training images.

        Files of a class are in the order of `ztune tune` with this seed, images in memory in the
        given order. `skip_broken` leaves out unreadable images.

        Raises: DataError for data with its own test images, broken images, an image with two
            classes, or a class without images.
        """
        if any(image.split not in (None, "train") for image in self.listing.images):
            raise DataError("the data already have validation or test images: use split()")
        order = None if self.held else seed
        screening = Screening(skip_broken, False, self._why_broken)
        split = training_split(self.listing, self._digest, order, screening)
        return TrainingSet(split, self.template, self.held)

    def _tested(self, split: Split) -> LabelledImages:
        items, labels = split.items("test"), split.labels("test")
        return LabelledImages(items, labels, split.classes, "test", self.held)

    def _why_broken(self, path: Path, whole: bool) -> DataError | None:
        return None if path in self.held else reason_broken(path, whole)

    def _hash_of(self, path: Path) -> F32 | None:
        return None if path in self.held else perceptual_hash(path)

    def _digest(self, path: Path) -> str:
        held = self.held.get(path)
        return digest_file(path) if held is None else image_digest(held)


def as_rows(values: Any) -> Any:
    """Return a sequence or array of images, features or labels.

    Raises: DataError for types without indexing, such as a generator or a set.
    """
    if hasattr(values, "to_numpy"):  # pandas
        return values.to_numpy()
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
        raise DataError(f"{type(values).__name__} is not a list or an array")
    return values


def class_names_of(names: Any) -> list[str] | None:
    """Return the given class names as a list, or None.

    Raises: DataError for names that are not strings, or duplicates.
    """
    if names is None:
        return None
    found = [str(name) if isinstance(name, np.str_) else name for name in as_rows(names)]
    if not found or not all(isinstance(name, str) for name in found):
        raise DataError("`class_names` are not strings, expected one string per class")
    if len(set(found)) < len(found):
        raise DataError("`class_names` has a duplicate, expected one name per class")
    return found


def labels_as_names(labels: Labels, class_names: Sequence[str] | None) -> list[str]:
    """Return the class name of every label.

    Raises: DataError for labels that are neither names nor integers, indices without
        `class_names`, or indices out of range.
    """
    values = as_rows(labels)
    values = values.tolist() if isinstance(values, np.ndarray) else list(values)
    names = class_names_of(class_names)
    if all(isinstance(value, str) for value in values):
        if names is not None and (unknown := sorted({*values} - {*names})):
            raise DataError(f"label {unknown[0]!r} is not among `class_names`")
        return [str(value) for value in values]
    odd = [v for v in values if isinstance(v, bool | np.bool_) or not isinstance(v, Integral)]
    if odd:
        kind = type(odd[0]).__name__
        raise DataError(f"label {odd[0]!r} is {kind}, expected class names or indices")
    if names is None:
        raise DataError(
            "`labels` are indices without `class_names`: pass class names, or add `class_names`"
        )
    if wrong := [value for value in values if not 0 <= value < len(names)]:
        raise DataError(f"label {wrong[0]} is out of range: there are {len(names)} names")
    return [names[int(value)] for value in values]


def listed_images(X: Images | LabelledImages) -> Sequence[ImageLike] | np.ndarray[Any, Any]:
    """Return the images or features to classify, at least one.

    Raises: DataError for an empty list, or a single image.
    """
    if isinstance(X, TrainingSet | Dataset):
        raise DataError("`X` is a training set, expected the test images of split(), or a list")
    images = X.images if isinstance(X, LabelledImages) else X
    if isinstance(images, str | Path | Image.Image):
        raise DataError("`X` is one image, expected a list of images")
    rows: Sequence[ImageLike] | np.ndarray[Any, Any] = as_rows(images)
    if not len(rows) and isinstance(X, LabelledImages):
        raise DataError(
            f"`X` has no {X.split} images, expected at least one (split with other `shots` or "
            "`test_fraction`, or use more images)"
        )
    if not len(rows):
        raise DataError("`X` is empty, expected at least one image")
    return rows


def true_labels(
    X: Images | LabelledImages,
    y: Labels | None,
    classes: tuple[str, ...],
    class_names: Sequence[str] | None = None,
) -> I64:
    """Return the true labels i64[N] as indices into a classifier's classes.

    They come from a split, or from `y`: class names, or indices into `class_names`.

    Raises: DataError for missing or unusable labels.
    """
    if isinstance(X, LabelledImages):
        if y is not None:
            raise DataError("`y` is given, but the split in `X` has labels: leave it out")
        return X.among(classes, "the classifier's classes")
    if y is None:
        raise DataError("`y` is missing: pass labels, or a split as `X`")
    if len(X) != len(y):
        raise DataError(f"`X` has {len(X)} images and `y` {len(y)} labels, expected equal numbers")
    return label_array(labels_as_names(y, class_names), classes)


def label_array(names: Sequence[str], classes: Sequence[str]) -> I64:
    """Return i64[N], the index of each name among the classes.

    Raises: DataError for an unknown name.
    """
    index = {name: place for place, name in enumerate(classes)}
    if unknown := sorted({*names} - {*index}):
        raise DataError(f"label {unknown[0]!r} is not among the classes of the classifier")
    return np.array([index[name] for name in names], dtype=np.int64)
