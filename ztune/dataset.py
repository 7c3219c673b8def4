"""Labelled images as a caller has them: a folder, a list, a data set by name, or arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from runtimes.in_memory import image_digest
from runtimes.preprocess import ImageLike, convert_image
from ztune.data.folders import ListedImage, Listing
from ztune.data.named import find_spec
from ztune.data.sources import TEMPLATE, read_source
from ztune.data.split import Split, SplitSettings
from ztune.data.splitter import digest_file, make_split, training_split
from ztune.errors import DataError
from ztune.evaluate import LabelledImages
from ztune.progress import warn
from ztune.types import I64

MEMORY = Path("/in-memory").absolute()
"""Where images that are in memory are said to lie; no file is read there."""
Labels = Sequence[str] | Sequence[int] | np.ndarray[Any, Any]
Images = Sequence[ImageLike] | np.ndarray[Any, Any]
"""Paths, images of Pillow's, u8[N, H, W, 3], a list of u8[H, W, 3], or features f32[N, e]."""


@dataclass(frozen=True)
class TrainingSet:
    """What a classifier is fitted on: training images, and validation images inside.

    >>> train = Dataset.from_folder("examples/digits").whole()
    >>> len(train), len(train.classes), train.template
    (1797, 10, 'a photo of a {}.')
    """

    split: Split
    template: str = TEMPLATE
    """The hand-written prompt that goes with the classes, with {} for a name."""
    held: Mapping[Path, Image.Image] = field(default_factory=dict)
    """Images that are in memory, by the paths that stand for them."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, sorted."""
        return self.split.classes

    def __len__(self) -> int:
        """Return the number of training images, those for validation left out."""
        return len(self.split.entries_of("train"))


@dataclass(frozen=True)
class Dataset:
    """Labelled images; a file is not decoded before it is used.

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
    def from_folder(cls, path: Path | str, *, names: Path | str | None = None) -> Dataset:
        """Return the images of a folder with a folder for each class.

        `root/class/*.jpg` or `root/{train,val,test}/class/*`; `names` is a file with lines of
        folder, tab, class name.

        Raises: DataError for a folder that is not of this kind.
        """
        return cls(read_source(str(Path(path)), None, None if names is None else Path(names)))

    @classmethod
    def from_manifest(cls, path: Path | str) -> Dataset:
        """Return the images that a .csv or .jsonl list names, with path, label and perhaps split.

        Raises: DataError naming the line that is wrong.
        """
        return cls.from_folder(path)

    @classmethod
    def from_parquet(cls, path: Path | str) -> Dataset:
        """Return the images in a folder of parquet files, as the Hugging Face hub has them.

        They are extracted once, below the folder.

        Raises: DataError; ConfigError without pyarrow.
        """
        return cls.from_folder(path)

    @classmethod
    def named(cls, name: str, root: Path | str) -> Dataset:
        """Return a data set by a name that `ztune data list` shows, from the folder of all of them.

        Raises: ConfigError for an unknown name; DataError for data that cannot be used.
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
        """Return images that are in memory: u8[N, H, W, 3], a list of u8[H, W, 3], or Pillow's.

        Paths may be among them. Labels are class names, or indices into `class_names`.

        Raises: DataError for images or labels of another kind, or of different numbers.
        """
        given = class_names_of(class_names)
        names = labels_as_names(labels, given)
        images = as_rows(images)
        if len(images) != len(names):
            raise DataError(
                f"`images` are {len(images)} and `labels` {len(names)}, expected as many"
            )
        classes = tuple(sorted(set(names if given is None else given)))
        if len(classes) < 2:
            raise DataError(f"`labels` are of {len(classes)} class(es), expected at least two")
        paths = [Path(image).absolute() for image in images if isinstance(image, str | Path)]
        try:
            root = Path(os.path.commonpath([path.parent for path in paths])) if paths else MEMORY
        except ValueError:  # of several drives
            raise DataError("`images` lie on several drives, expected one") from None
        held: dict[Path, Image.Image] = {}
        listed = []
        for number, (image, name) in enumerate(zip(images, names, strict=True)):
            if isinstance(image, str | Path):
                path = Path(image).absolute().relative_to(root).as_posix()
            else:
                path = f"{MEMORY.name}-{number:09d}"
                held[root / path] = convert_image(image, f"image {number}")
            listed.append(ListedImage(path, classes.index(name), None))
        return cls(Listing(root, classes, tuple(listed), 0), held=held)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, sorted."""
        return self.listing.classes

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.listing.images)

    def split(
        self,
        shots: int = 16,
        seed: int = 1,
        *,
        val: int | None = None,
        test_fraction: float | Literal["auto"] = "auto",
        split_seed: int = 0,
    ) -> tuple[TrainingSet, LabelledImages]:
        """Draw `shots` training images a class, validation images inside, and keep test images.

        The images that `ztune tune` draws with the same numbers. `val` is the number of validation
        images a class (None: min(shots, 4), or what is left); `test_fraction` of a class is kept
        for testing (auto: half, where every class has at least 2 * (shots + val) images).

        Raises: DataError for a class with too few images, or one image with two classes.
        """
        settings = SplitSettings(shots, val, test_fraction, split_seed, seed)
        split = make_split(self.listing, settings, digest=self._digest)
        if not split.entries_of("test"):
            warn("; ".join(split.notes))
        return TrainingSet(split, self.template, self.held), self._tested(split)

    def whole(self, seed: int = 1) -> TrainingSet:
        """Return all images as training images, none kept.

        Files of a class are drawn in the order that `ztune tune` has with this seed; with images in
        memory the order is that in which they were given.

        Raises: DataError for data with test images of its own, one image with two classes, or a
            class without images.
        """
        if any(image.split not in (None, "train") for image in self.listing.images):
            raise DataError("the data have validation or test images of their own: use split()")
        order = None if self.held else seed
        return TrainingSet(
            training_split(self.listing, self._digest, order), self.template, self.held
        )

    def _tested(self, split: Split) -> LabelledImages:
        items, labels = split.items("test"), split.labels("test")
        return LabelledImages(items, labels, split.classes, "test", self.held)

    def _digest(self, path: Path) -> str:
        held = self.held.get(path)
        return digest_file(path) if held is None else image_digest(held)


def as_rows(values: Any) -> Any:
    """Return a sequence or array of images, features or labels.

    Raises: DataError for what cannot be indexed, such as a generator or a set.
    """
    if hasattr(values, "to_numpy"):  # of pandas
        return values.to_numpy()
    if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
        raise DataError(f"{type(values).__name__} is not a list or an array")
    return values


def class_names_of(names: Any) -> list[str] | None:
    """Return class names as a caller gives them, None where there are none.

    Raises: DataError for names that are no strings, or not different.
    """
    if names is None:
        return None
    found = [str(name) if isinstance(name, np.str_) else name for name in as_rows(names)]
    if not found or not all(isinstance(name, str) for name in found):
        raise DataError("`class_names` are not strings, expected one for each class")
    if len(set(found)) < len(found):
        raise DataError("`class_names` has a name twice, expected one for each class")
    return found


def labels_as_names(labels: Labels, class_names: Sequence[str] | None) -> list[str]:
    """Return the class name of every label.

    Raises: DataError for labels that are neither names nor whole numbers, numbers without
        `class_names`, or out of their range.
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
            "`labels` are indices: give class names, or name the classes with `class_names`"
        )
    if wrong := [value for value in values if not 0 <= value < len(names)]:
        raise DataError(f"label {wrong[0]} is out of range: there are {len(names)} names")
    return [names[int(value)] for value in values]


def listed_images(X: Images | LabelledImages) -> Sequence[ImageLike] | np.ndarray[Any, Any]:
    """Return the images to classify, or features, at least one.

    Raises: DataError for none, or one image that is not in a list.
    """
    if isinstance(X, TrainingSet | Dataset):
        raise DataError("`X` is to be fitted on: classify the test images of split(), or a list")
    images = X.images if isinstance(X, LabelledImages) else X
    if isinstance(images, str | Path | Image.Image):
        raise DataError("`X` is one image, expected a list of images (put it into one)")
    rows: Sequence[ImageLike] | np.ndarray[Any, Any] = as_rows(images)
    if not len(rows):
        raise DataError("`X` is empty, expected at least one image")
    return rows


def true_labels(
    X: Images | LabelledImages,
    y: Labels | None,
    classes: tuple[str, ...],
    class_names: Sequence[str] | None = None,
) -> I64:
    """Return i64[N], the labels to score by as indices into a classifier's classes.

    Those of a split, or `y`: class names, or indices into `class_names`.

    Raises: DataError for labels that are missing, or cannot be used.
    """
    if isinstance(X, LabelledImages):
        if y is not None:
            raise DataError("`y` goes with images; a split has its own labels")
        return X.among(classes, "the classifier's classes")
    if y is None:
        raise DataError("`y` is missing: labels go with images that are no split")
    if len(X) != len(y):
        raise DataError(f"`X` has {len(X)} images and `y` {len(y)} labels, expected as many")
    return label_array(labels_as_names(y, class_names), classes)


def label_array(names: Sequence[str], classes: Sequence[str]) -> I64:
    """Return i64[N], the place of each name among the classes.

    Raises: DataError for one that is not among them.
    """
    index = {name: place for place, name in enumerate(classes)}
    if unknown := sorted({*names} - {*index}):
        raise DataError(f"label {unknown[0]!r} is not among the classes of the classifier")
    return np.array([index[name] for name in names], dtype=np.int64)
