"""Small trees in the layout of every data set that is known by name: its folders, its own lists."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ztune.types import Json


def put(root: Path, paths: Iterable[str]) -> None:
    """Write one file for every path; no two have the same content."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{root.name}/{path}")


def lines(root: Path, path: str, *text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text("\n".join(text) + "\n")


@dataclass(frozen=True)
class Tree:
    """What is built, and what reading it must give."""

    build: Callable[[Path], None]
    """Called with the data set's folder."""
    classes: tuple[str, ...]
    """In the order of the labels, as a template takes them."""
    counts: tuple[int, int, int]
    split: dict[str, list[list[Json]]] | None = None
    """The published split file's content, where the data set needs one."""


def classes_below(images: str, *names: str, n: int = 10) -> Callable[[Path], None]:
    """Return what makes class folders of ten images: 5 to train, 2 to validate, 3 to test."""

    def build(folder: Path) -> None:
        put(folder, (f"{images}/{name}/{i:03}.jpg" for name in names for i in range(n)))
        put(folder, (f"{images}/{name}/.hidden.jpg" for name in names))

    return build


def aircraft(folder: Path) -> None:
    variants = ("Boeing 707-320", "An-12", "F/A-18")  # in the list's own order
    lines(folder, "variants.txt", *variants)
    for place, split in enumerate(("train", "val", "test")):
        text = [f"{1000 + 10 * place + n:07} {name}" for n, name in enumerate(variants)]
        lines(folder, f"images_variant_{split}.txt", *text)
        put(folder / "images", (f"{line.split()[0]}.jpg" for line in text))


WORD_NETS = ("n01440764 tench", "n02012849 crane", "n03126707 crane", "n04356056 sunglasses")


def imagenet(folder: Path) -> None:
    lines(folder, "classnames.txt", *WORD_NETS)
    nets = [line.split()[0] for line in WORD_NETS]
    put(folder / "images", (f"train/{net}/{net}_{n}.JPEG" for net in nets for n in range(3)))
    put(folder / "images", (f"val/{net}/ILSVRC2012_val_{net}.JPEG" for net in nets))


def imagenet_v2(folder: Path) -> None:
    text = [f"n{n:08} thing {n}" for n in range(11)]  # ten is after nine, not after one
    lines(folder, "classnames.txt", *text)
    images = folder / "imagenetv2-matched-frequency-format-val"
    put(images, (f"{n}/{i}.jpeg" for n in range(11) for i in range(2)))


def imagenet_variant(images: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        lines(folder, "classnames.txt", *WORD_NETS)  # more classes than there are folders
        nets = ("n01440764", "n04356056")
        put(folder / images, (f"{net}/{n}.jpg" for net in nets for n in range(2)))
        lines(folder / images, "README.txt", "ignored")

    return build


def svhn(folder: Path) -> None:
    put(folder, (f"train/{digit}/{n:05}.jpg" for digit in range(10) for n in range(10)))
    put(folder, (f"test/{digit}/{n:05}.jpg" for digit in range(10) for n in range(4)))


def clevr(folder: Path) -> None:
    for split, n in (("train", 5), ("val", 2)):
        scenes = [
            {"objects": [{}] * number, "image_filename": f"CLEVR_{split}_{number}{i}.png",
             "split": split}
            for number in (3, 10, 4) for i in range(n)
        ]  # fmt: skip
        lines(folder, f"scenes/CLEVR_{split}_scenes.json", json.dumps({"scenes": scenes}))
        put(folder / "images" / split, (str(scene["image_filename"]) for scene in scenes))


def listed(images: str, *names: str, pattern: str = "{name}_{n}.jpg") -> Tree:
    """Return a data set with a published split: of each class 2 to train, 1 to validate, 2 to test.

    The split lists the classes in reverse order, since labels decide, not the order.
    """
    places = {"train": range(2), "val": range(2, 3), "test": range(3, 5)}
    split: dict[str, list[list[Json]]] = {
        role: [
            [pattern.format(name=name, n=n), label, name]
            for label, name in reversed(list(enumerate(names)))
            for n in numbers
        ]
        for role, numbers in places.items()
    }

    def build(folder: Path) -> None:
        put(folder / images, (str(entry[0]) for entries in split.values() for entry in entries))

    classes = tuple(name.replace("_", " ") for name in names)
    return Tree(build, classes, (2 * len(names), len(names), 2 * len(names)), split)


TREES: dict[str, Tree] = {
    "caltech101": Tree(
        classes_below(
            "101_ObjectCategories", "BACKGROUND_Google", "Faces", "Faces_easy", "airplanes",
            "gerenuk", "wild_cat",
        ),
        ("face", "airplane", "gerenuk", "wild cat"), (20, 8, 12),
    ),
    "oxfordpets": listed("images", "abyssinian", "great_pyrenees"),
    "flowers102": listed("jpg", "pink primrose", "sword lily"),
    "food101": Tree(
        classes_below("images", "apple_pie", "waffles"), ("apple pie", "waffles"), (10, 4, 6)
    ),
    "fgvcaircraft": Tree(aircraft, ("Boeing 707-320", "An-12", "F/A-18"), (3, 3, 3)),
    "sun397": listed(
        "SUN397", "abbey", "outdoor athletic_field", "youth_hostel",
        pattern="{name[0]}/{name}/sun_{n}.jpg",
    ),
    "dtd": Tree(
        classes_below("images", "banded", "zigzagged"), ("banded", "zigzagged"), (10, 4, 6)
    ),
    "eurosat": Tree(
        classes_below("2750", "AnnualCrop", "SeaLake"), ("Annual Crop Land", "Sea or Lake"),
        (10, 4, 6),
    ),
    "ucf101": listed(
        "UCF-101-midframes", "Apply_Eye_Makeup", "Archery", "Yo_Yo", pattern="{name}/v_{n}.jpg"
    ),
    "stanfordcars": listed(
        "", "2000 AM General Hummer SUV", "2012 smart fortwo Convertible",
        pattern="cars_train/{name}_{n}.jpg",
    ),
    "imagenet": Tree(imagenet, ("tench", "crane", "crane", "sunglasses"), (12, 0, 4)),
    "svhn": Tree(svhn, tuple("0123456789"), (70, 30, 40)),
    "resisc45": Tree(
        classes_below("NWPU-RESISC45", "airplane", "basketball_court"),
        ("airplane", "basketball court"), (10, 4, 6),
    ),
    "clevr": Tree(clevr, ("10", "3", "4"), (12, 3, 6)),  # numbers sorted as text
    "imagenetv2": Tree(imagenet_v2, tuple(f"thing {n}" for n in range(11)), (0, 0, 22)),
    "imagenetsketch": Tree(imagenet_variant("images"), ("tench", "sunglasses"), (0, 0, 4)),
    "imageneta": Tree(imagenet_variant("imagenet-a"), ("tench", "sunglasses"), (0, 0, 4)),
    "imagenetr": Tree(imagenet_variant("imagenet-r"), ("tench", "sunglasses"), (0, 0, 4)),
}  # fmt: skip
