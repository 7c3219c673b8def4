"""Make splits from the files of a data set's official archive, for lack of a split file.

Each function reads one layout and returns the lists that CoOp's or BlackVIP's published code makes,
with the same class names and label order. Two differences (docs/data.md): images of a folder are
sorted by name instead of file-system order, and the seed differs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from ztune.data.coop import CoopSplit, Item, divide_classes, hold_out_val
from ztune.data.image_files import images_below, is_hidden
from ztune.data.manifests import is_inside, read_text
from ztune.errors import DataError, FormatError
from ztune.io.files import read_json

Maker = Callable[[Path, Path, random.Random], CoopSplit]
"""Called with the data set's folder, its image folder, and a random generator."""
VAL_FRACTION = 0.2
"""Of the official training images, for a data set without a validation list."""
SVHN_TRAIN = 0.7


def class_folders(ignored: Collection[str] = ()) -> Maker:
    """Return a Maker that splits `images/class/*` into 50 % train, 20 % val and 30 % test."""

    def make(_folder: Path, images: Path, generator: random.Random) -> CoopSplit:
        where = f'folder "{images}"'
        classes = {name: _image_files(images, name) for name in list_folders(images, ignored)}
        return divide_classes(classes, generator, where)

    return make


def aircraft(folder: Path, _images: Path, _generator: random.Random) -> CoopSplit:
    """Read images_variant_{train,val,test}.txt: `1025794 707-320`; labels as in variants.txt."""
    label_of = {line: n for n, (_, line) in enumerate(_lines(folder / "variants.txt"))}

    def listed(split: str) -> tuple[Item, ...]:
        items = []
        for where, line in _lines(folder / f"images_variant_{split}.txt"):
            image, _, variant = line.partition(" ")
            if variant not in label_of:
                raise DataError(f"{where}: {variant!r} is not in variants.txt")
            items.append(_item(f"{image}.jpg", label_of[variant], variant, where))
        return tuple(items)

    return CoopSplit(listed("train"), listed("val"), listed("test"))


def clevr(folder: Path, _images: Path, generator: random.Random) -> CoopSplit:
    """Count the objects of scenes/CLEVR_{train,val}_scenes.json; the official val is the test.

    Classes are numbers sorted as text, so "10" comes first.
    """

    def counted(split: str) -> dict[str, list[str]]:
        path = folder / "scenes" / f"CLEVR_{split}_scenes.json"
        where = f'scenes "{path}"'
        try:
            scenes = read_json(path, "scenes").get("scenes")
        except FormatError as error:
            raise DataError(str(error)) from None
        if not isinstance(scenes, list):
            raise DataError(f'{where}: expected {{"scenes": [...]}}')
        found: dict[str, list[str]] = {}
        for place, scene in enumerate(scenes):
            values = scene if isinstance(scene, dict) else {}
            objects, image = values.get("objects"), values.get("image_filename")
            if not isinstance(objects, list) or not isinstance(image, str):
                raise DataError(f"{where}, scene {place}: no objects or no image_filename")
            found.setdefault(str(len(objects)), []).append(f"{values.get('split')}/{image}")
        return found

    trained, tested = counted("train"), counted("val")
    label_of = {number: label for label, number in enumerate(sorted(trained))}
    if extra := sorted(set(tested) - set(trained)):
        raise DataError(
            f'scenes "{folder}/scenes": val has a scene with {extra[0]} objects, train has none'
        )

    def listed(found: dict[str, list[str]]) -> list[Item]:
        return [
            _item(path, label_of[number], number, f'scenes "{folder}/scenes"')
            for number in sorted(found)
            for path in found[number]
        ]

    train, val = hold_out_val(listed(trained), VAL_FRACTION, generator, f'folder "{folder}"')
    return CoopSplit(train, val, tuple(listed(tested)))


def svhn(folder: Path, _images: Path, generator: random.Random) -> CoopSplit:
    """Divide `train/0` ... `train/9` into 70 % train and 30 % val; `test/0` ... are the test.

    Like the published code, this shuffles each class of train, then the same class of test.
    """
    train: list[Item] = []
    val: list[Item] = []
    for label, name in enumerate(list_folders(folder / "train")):
        paths = _image_files(folder, f"train/{name}")
        generator.shuffle(paths)
        generator.shuffle([None] * _n_visible(folder / "test" / name))
        n_train = round(len(paths) * SVHN_TRAIN)
        items = [Item(path, label, name) for path in paths]
        if not 0 < n_train < len(items):
            raise DataError(f'folder "{folder / "train" / name}": too few images for train and val')
        train += items[:n_train]
        val += items[n_train:]
    return CoopSplit(tuple(train), tuple(val), _svhn_test(folder), shuffled=_svhn_shuffled(folder))


def complete_svhn(folder: Path, split: CoopSplit) -> CoopSplit:
    """Complete BlackVIP's split: its paths are relative to `train`, and `test` is its test list.

    The published code reads it, and yet shuffles the files of all folders as without it.
    """

    def below(items: tuple[Item, ...], part: str) -> tuple[Item, ...]:
        if not items or (folder / items[0].path).exists():
            return items
        return tuple(Item(f"{part}/{i.path}", i.label, i.name) for i in items)

    test = below(split.test, "test") if split.test else _svhn_test(folder)
    train, val = below(split.train, "train"), below(split.val, "train")
    return CoopSplit(train, val, test, shuffled=_svhn_shuffled(folder))


def _svhn_shuffled(folder: Path) -> tuple[int, ...]:
    """Return the numbers of files in train/0, test/0, train/1 ..., without hidden ones."""
    if not (folder / "train").is_dir():
        return ()
    names = list_folders(folder / "train")
    return tuple(_n_visible(folder / part / name) for name in names for part in ("train", "test"))


def _n_visible(folder: Path) -> int:
    """Return the number of files in a folder, without hidden ones; 0 if it does not exist."""
    try:
        return sum(not path.name.startswith(".") for path in folder.iterdir())
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise DataError(f'folder "{folder}" cannot be read: {error.strerror}') from None


def _svhn_test(folder: Path) -> tuple[Item, ...]:
    return tuple(
        Item(path, label, name)
        for label, name in enumerate(list_folders(folder / "test"))
        for path in _image_files(folder, f"test/{name}")
    )


def imagenet(folder: Path, images: Path, _generator: random.Random) -> CoopSplit:
    """Read images/{train,val}/n01440764/*: the official val is the test, and there is no val."""
    names = _class_names(folder)
    return CoopSplit(
        train=_by_word_net(images, "train/", names),
        test=_by_word_net(images, "val/", names),
    )


def imagenet_variant(folder: Path, images: Path, _generator: random.Random) -> CoopSplit:
    """Read images/n01440764/*, all of them for testing."""
    return CoopSplit(test=_by_word_net(images, "", _class_names(folder)))


def imagenet_v2(folder: Path, images: Path, _generator: random.Random) -> CoopSplit:
    """Read images/0/* ... images/999/*, all for testing; numbers are lines of classnames.txt."""
    names = list(_class_names(folder).values())
    there = set(list_folders(images))
    absent = [n for n in range(len(names)) if str(n) not in there]
    if absent:
        raise DataError(
            f'folder "{images}": {len(absent)} missing class folder(s), first "{absent[0]}"'
        )
    return CoopSplit(
        test=tuple(
            Item(path, label, name)
            for label, name in enumerate(names)
            for path in _image_files(images, str(label))
        )
    )


def _by_word_net(images: Path, below: str, names: dict[str, str]) -> tuple[Item, ...]:
    items: list[Item] = []
    for label, folder in enumerate(list_folders(images / below)):
        if folder not in names:
            raise DataError(f'folder "{images / below / folder}": not in classnames.txt')
        items += [Item(path, label, names[folder]) for path in _image_files(images, below + folder)]
    return tuple(items)


def _class_names(folder: Path) -> dict[str, str]:
    """Read `n01440764 tench` lines in order; the file in imagenet's folder is the fallback."""
    path = folder / "classnames.txt"
    shared = folder.parent / "imagenet" / "classnames.txt"
    names: dict[str, str] = {}
    for where, line in _lines(path if path.exists() or not shared.exists() else shared):
        word_net, _, name = line.partition(" ")
        if not name.strip() or word_net in names:
            raise DataError(f'{where}: expected a new "n01440764 tench", got {line!r}')
        names[word_net] = name.strip()
    return names


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the location and text of each line, without empty lines and comments."""
    where = f'list "{path}"'
    for number, line in enumerate(read_text(path, where).splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            yield f"{where}, line {number}", line.strip()


def _item(path: str, label: int, name: str, where: str) -> Item:
    if not is_inside(path):
        raise DataError(f"{where}: path {path!r} is outside the image folder")
    return Item(path, label, name)


def list_folders(folder: Path, ignored: Collection[str] = ()) -> list[str]:
    """Return the names of the visible sub-folders, sorted by code point."""
    try:
        return sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.is_dir() and not is_hidden(entry.name) and entry.name not in ignored
        )
    except OSError as error:
        raise DataError(f'folder "{folder}" cannot be read: {error.strerror}') from None


def _image_files(root: Path, below: str) -> list[str]:
    """Return the images in a class folder, relative to `root`, sorted.

    Raises: DataError when there are none.
    """
    found, _ = images_below(root / below, f'folder "{root}"')
    if not found:
        raise DataError(f'folder "{root}": class folder "{below}" contains no images')
    return [path.relative_to(root).as_posix() for path in found]
