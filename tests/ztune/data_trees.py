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


def pets(folder: Path) -> None:
    kinds = {"Abyssinian": 1, "great_pyrenees": 2}  # underscores and capitals in image names
    names = {kind: [f"{kind}_{n}" for n in range(1, 9)] for kind in kinds}
    put(folder / "images", (f"{name}.jpg" for part in names.values() for name in part))
    for file, place in (("trainval", slice(5)), ("test", slice(5, 8))):
        text = [f"{name} {kinds[kind]} 1 1" for kind in kinds for name in names[kind][place]]
        lines(folder, f"annotations/{file}.txt", *text)


def aircraft(folder: Path) -> None:
    variants = ("Boeing 707-320", "An-12", "F/A-18")  # in the list's own order
    lines(folder, "variants.txt", *variants)
    for place, split in enumerate(("train", "val", "test")):
        text = [f"{1000 + 10 * place + n:07} {name}" for n, name in enumerate(variants)]
        lines(folder, f"images_variant_{split}.txt", *text)
        put(folder / "images", (f"{line.split()[0]}.jpg" for line in text))


def sun397(folder: Path) -> None:
    names = ("/a/abbey", "/a/athletic_field/outdoor", "/y/youth_hostel")
    lines(folder, "ClassName.txt", *names)
    for file, numbers in (("Training", range(5)), ("Testing", range(5, 8))):
        text = [f"{name}/sun_{n}.jpg" for name in names for n in numbers]
        lines(folder, f"{file}_01.txt", *text)
        put(folder / "SUN397", (path[1:] for path in text))


def ucf101(folder: Path) -> None:
    actions = ("ApplyEyeMakeup", "Archery", "YoYo")
    renamed = {"ApplyEyeMakeup": "Apply_Eye_Makeup", "Archery": "Archery", "YoYo": "Yo_Yo"}
    lists = "ucfTrainTestlist"
    lines(folder, f"{lists}/classInd.txt", *(f"{n} {a}" for n, a in enumerate(actions, 1)))
    for file, numbers in (("train", range(5)), ("test", range(5, 7))):
        videos = [(n, action, f"v_{action}_g{i:02}_c01") for n, action in enumerate(actions, 1)
                  for i in numbers]  # fmt: skip
        # The list of training videos has labels, the other has none.
        label = file == "train"
        text = [f"{a}/{video}.avi{f' {n}' if label else ''}" for n, a, video in videos]
        lines(folder, f"{lists}/{file}list01.txt", *text)
        put(folder / "UCF-101-midframes", (f"{renamed[a]}/{v}.jpg" for _, a, v in videos))


def flowers(folder: Path) -> None:
    put(folder / "jpg", (f"image_{n:05}.jpg" for n in range(1, 9)))


def cars(folder: Path) -> None:
    put(folder, (f"cars_train/{n:05}.jpg" for n in range(1, 7)))
    put(folder, (f"cars_test/{n:05}.jpg" for n in range(1, 3)))


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


def listed(path: str, *parts: tuple[int, int, str], first: int = 1) -> list[list[Json]]:
    """Return entries for n images each of (n, label, name), numbered on."""
    entries: list[list[Json]] = []
    for n, label, name in parts:
        for _ in range(n):
            entries.append([path.format(first + len(entries)), label, name])
    return entries


TREES: dict[str, Tree] = {
    "caltech101": Tree(
        classes_below(
            "101_ObjectCategories", "BACKGROUND_Google", "Faces", "Faces_easy", "airplanes",
            "gerenuk", "wild_cat",
        ),
        ("face", "airplane", "gerenuk", "wild cat"), (20, 8, 12),
    ),
    "oxfordpets": Tree(pets, ("abyssinian", "great pyrenees"), (8, 2, 6)),
    "flowers102": Tree(
        flowers, ("pink primrose", "sword lily"), (4, 2, 2),
        {
            "train": listed("image_{:05}.jpg", (2, 1, "sword lily"), (2, 0, "pink primrose")),
            "val": listed(
                "image_{:05}.jpg", (1, 0, "pink primrose"), (1, 1, "sword lily"), first=5
            ),
            "test": listed(
                "image_{:05}.jpg", (1, 0, "pink primrose"), (1, 1, "sword lily"), first=7
            ),
        },
    ),
    "food101": Tree(
        classes_below("images", "apple_pie", "waffles"), ("apple pie", "waffles"), (10, 4, 6)
    ),
    "fgvcaircraft": Tree(aircraft, ("Boeing 707-320", "An-12", "F/A-18"), (3, 3, 3)),
    "sun397": Tree(sun397, ("abbey", "outdoor athletic field", "youth hostel"), (12, 3, 9)),
    "dtd": Tree(
        classes_below("images", "banded", "zigzagged"), ("banded", "zigzagged"), (10, 4, 6)
    ),
    "eurosat": Tree(
        classes_below("2750", "AnnualCrop", "SeaLake"), ("Annual Crop Land", "Sea or Lake"),
        (10, 4, 6),
    ),
    "ucf101": Tree(ucf101, ("Apply Eye Makeup", "Archery", "Yo Yo"), (12, 3, 6)),
    "stanfordcars": Tree(
        cars, ("2000 AM General Hummer SUV", "2012 smart fortwo Convertible"), (4, 2, 2),
        {
            "train": listed("cars_train/{:05}.jpg", (2, 0, "2000 AM General Hummer SUV"),
                            (2, 1, "2012 smart fortwo Convertible")),
            "val": listed("cars_train/{:05}.jpg", (1, 0, "2000 AM General Hummer SUV"),
                          (1, 1, "2012 smart fortwo Convertible"), first=5),
            "test": listed("cars_test/{:05}.jpg", (1, 0, "2000 AM General Hummer SUV"),
                           (1, 1, "2012 smart fortwo Convertible")),
        },
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
