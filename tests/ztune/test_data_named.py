"""Every data set known by name: read from its own layout, divided, sampled, counted."""

import io
import json
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.ztune.data_trees import TREES, imagenet, lines, put
from ztune.data import parquet
from ztune.data.checking import check
from ztune.data.coop import Item, base_and_new, few_shot, read_split, write_split
from ztune.data.folders import read_dataset
from ztune.data.library import NamedData, read_named
from ztune.data.named import NAMED, find_spec
from ztune.data.parquet_pages import page_sizes
from ztune.data.sources import read_source
from ztune.dataset import Dataset
from ztune.errors import ConfigError, DataError
from ztune.io.pixel_limit import VARIABLE


def built(root: Path, name: str) -> Path:
    """Build the tree of a data set below a root, with its split file where it needs one."""
    tree, folder = TREES[name], root / NAMED[name].folder
    tree.build(folder)
    if tree.split is not None:
        (folder / NAMED[name].splits[0]).write_text(json.dumps(tree.split))
    return folder


def counts_of(data: NamedData) -> tuple[int, ...]:
    return tuple(data.split.counts.values())


def test_every_known_data_set_is_tested() -> None:
    assert list(TREES) == list(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_a_data_set_is_read_from_its_own_files(tmp_path: Path, name: str) -> None:
    folder, tree, spec = built(tmp_path, name), TREES[name], NAMED[name]
    data = read_named(name, tmp_path)
    assert data.classes == tree.classes
    assert counts_of(data) == tree.counts
    assert all((data.root / item.path).is_file() for _, item in data.split)
    paths = [item.path for _, item in data.split]
    assert len(set(paths)) == len(paths), "no image serves twice"
    # What was drawn is saved, and read the next time; what is fixed anyway is not.
    saved = folder / spec.own_split
    assert saved.exists() == (spec.drawn and tree.split is None)
    again = read_named(name, tmp_path)
    assert (again.split, again.root) == (data.split, data.root)
    if saved.exists():
        assert again.source == saved
        assert read_split(saved) == replace(data.split, shuffled=())


@pytest.mark.parametrize("name", NAMED)
def test_it_fits_what_tuning_reads(tmp_path: Path, name: str) -> None:
    built(tmp_path, name)
    data = read_named(name, tmp_path)
    dataset = data.dataset()
    assert dataset.root == data.root
    assert list(dataset.classes) == sorted(set(TREES[name].classes))
    assert [p.path for p in dataset.images] == sorted(p.path for p in dataset.images)
    listed = {(role, item.path, item.label) for role, item in data.split}
    assert len(dataset.images) == len(listed)
    for image in dataset.images:
        (label,) = [n for role, path, n in listed if (role, path) == (image.split, image.path)]
        assert dataset.classes[image.label] == data.classes[label]


@pytest.mark.parametrize("name", [n for n in NAMED if TREES[n].counts[0]])
def test_few_shots_and_base_and_new_classes(tmp_path: Path, name: str) -> None:
    built(tmp_path, name)
    data = read_named(name, tmp_path)
    n_classes = len(TREES[name].classes)
    shots = few_shot(data.split, 1, 1)
    assert shots.counts["train"] == n_classes
    assert shots.counts["val"] == (n_classes if TREES[name].counts[1] else 0)
    assert shots.test == data.split.test
    base, new = base_and_new(shots)
    n_base = (n_classes + 1) // 2
    few = replace(data, split=base)
    assert few.classes == TREES[name].classes[:n_base]
    assert replace(data, split=new).classes == TREES[name].classes[n_base:]
    if len(set(few.classes)) > 1:
        assert len(few.dataset().classes) == len(set(few.classes))
    else:
        with pytest.raises(DataError, match="has only one class"):
            few.dataset()


@pytest.mark.parametrize("name", [n for n in NAMED if NAMED[n].splits])
def test_a_published_split_goes_before_all_else(tmp_path: Path, name: str) -> None:
    folder, spec = built(tmp_path, name), NAMED[name]
    made = read_named(name, tmp_path)
    assert made.source is None or made.source.name in spec.splits
    turned = replace(made.split, train=made.split.val, val=made.split.train)
    write_split(folder / spec.splits[0], turned)
    data = read_named(name, tmp_path)
    assert data.source == folder / spec.splits[0]
    assert data.split == turned


@pytest.mark.parametrize("name", ["caltech101", "eurosat"])
def test_folder_names_in_a_split_get_the_published_class_names(tmp_path: Path, name: str) -> None:
    folder, spec = built(tmp_path, name), NAMED[name]
    split = read_named(name, tmp_path).split
    old = {new: old for old, new in spec.renamed.items()}
    lists = {
        role: [[i.path, i.label, old.get(i.name, i.name)] for i in split.of(role)]
        for role in ("train", "val", "test")
    }  # fmt: skip
    (folder / spec.splits[0]).write_text(json.dumps(lists))
    assert read_named(name, tmp_path).classes == TREES[name].classes


def test_a_split_is_made_the_same_every_time(tmp_path: Path) -> None:
    for place in ("a", "b"):
        built(tmp_path / place, "dtd")
    state = random.getstate()
    splits = [read_named("dtd", tmp_path / place, save=False).split for place in ("a", "b")]
    assert splits[0] == splits[1]
    assert random.getstate() == state
    assert not (tmp_path / "a" / "dtd" / NAMED["dtd"].own_split).exists()


def test_classes_with_one_name_become_one(tmp_path: Path) -> None:
    built(tmp_path, "imagenet")
    data = read_named("imagenet", tmp_path)
    assert data.split.classes == {0: "tench", 1: "crane", 2: "crane", 3: "sunglasses"}
    assert data.dataset().classes == ("crane", "sunglasses", "tench")
    found = check(NAMED["imagenet"], tmp_path)
    assert "1 duplicate class name(s), merged into 3 of 4 classes: crane" in found.warnings


def test_class_names_of_imagenet_serve_its_variants(tmp_path: Path) -> None:
    imagenet(tmp_path / "imagenet")
    (built(tmp_path, "imageneta") / "classnames.txt").unlink()
    assert read_named("imageneta", tmp_path).classes == ("tench", "sunglasses")
    found = check(NAMED["imageneta"], tmp_path)
    assert not found.problems


@pytest.mark.parametrize("file", ["split_SVHN.json", "split_mlai_SVHN.json"])
@pytest.mark.parametrize("below", ["", "train/"])
def test_the_split_of_svhn_lacks_a_test_list(tmp_path: Path, file: str, below: str) -> None:
    folder = built(tmp_path, "svhn")
    lists = {
        role: [[f"{below}{digit}/{n:05}.jpg", digit, str(digit)] for digit in range(10)]
        for role, n in (("train", 3), ("val", 8))
    }
    (folder / file).write_text(json.dumps(lists))
    data = read_named("svhn", tmp_path)
    assert data.source == folder / file
    assert counts_of(data) == (10, 10, 40)
    assert data.split.train[2] == Item("train/2/00003.jpg", 2, "2")


Paths = list[tuple[str, int]]


def svhn_of_published_code(folder: Path, seed: int, shots: int) -> tuple[Paths, Paths]:
    """Draw paths and labels of shots and validation images as ZIP's code does.

    With split_SVHN.json or without, its one generator shuffles every class folder, first of train,
    then of test; only then does it draw. Without the file it saves the shuffled lists in it. Here
    folders are listed in the order of names.
    """
    generator = random.Random(seed)
    lists: dict[str, Paths] = {"train": [], "val": []}
    for label, digit in enumerate(sorted(path.name for path in (folder / "train").iterdir())):
        files = sorted(p.name for p in (folder / "train" / digit).iterdir() if p.name[0] != ".")
        tested = [p.name for p in (folder / "test" / digit).iterdir() if p.name[0] != "."]
        generator.shuffle(files)
        generator.shuffle(tested)
        n_train, n_val = round(len(files) * 0.7), round(len(files) * (1 - 0.7))
        lists["train"] += [(f"{digit}/{name}", label) for name in files[:n_train]]
        lists["val"] += [(f"{digit}/{name}", label) for name in files[n_train : n_train + n_val]]
    if (saved := folder / "split_SVHN.json").exists():
        content = json.loads(saved.read_text())
        lists = {part: [(path, label) for path, label, _ in content[part]] for part in lists}
    else:
        content = {part: [[*entry, entry[0][0]] for entry in own] for part, own in lists.items()}
        saved.write_text(json.dumps(content))
    drawn: dict[str, Paths] = {}
    for part, n in (("train", shots), ("val", min(shots, 4))):
        by_label = defaultdict(list)
        for entry in lists[part]:
            by_label[entry[1]].append(entry)
        drawn[part] = [entry for own in by_label.values() for entry in generator.sample(own, n)]
    return drawn["train"], drawn["val"]


def uneven_svhn(folder: Path) -> None:
    """Build class folders of 12 to 39 images, and files that are none."""
    put(folder, (f"train/{d}/{n:05}.jpg" for d in range(10) for n in range(12 + 3 * d)))
    put(folder, (f"test/{d}/{n:05}.jpg" for d in range(10) for n in range(3 + d)))
    put(folder, ["train/3/.hidden.jpg", "test/4/.hidden.jpg"])


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("file", NAMED["svhn"].splits)
def test_shots_of_svhn_are_those_of_the_published_code(
    tmp_path: Path, file: str, seed: int
) -> None:
    folder = tmp_path / "svhn"
    uneven_svhn(folder)
    lists = {
        part: [
            [f"{d}/{n:05}.jpg", d, str(d)] for n in numbers for d in (3, *range(3), *range(4, 10))
        ]
        for part, numbers in (("train", range(8)), ("val", range(8, 12)))
    }
    (folder / file).write_text(json.dumps(lists))
    ours = few_shot(read_named("svhn", tmp_path).split, 3, seed)
    (folder / file).rename(folder / "split_SVHN.json")  # the only name that it reads
    train, val = svhn_of_published_code(folder, seed, 3)
    assert [(i.path, i.label) for i in ours.train] == [(f"train/{p}", label) for p, label in train]
    assert [(i.path, i.label) for i in ours.val] == [(f"train/{p}", label) for p, label in val]
    assert ours.shuffled == ()
    plain = few_shot(replace(read_named("svhn", tmp_path).split, shuffled=()), 3, seed)
    assert plain.train != ours.train, "without the shuffles others are drawn"


def test_without_a_split_file_svhn_is_divided_as_by_the_published_code(tmp_path: Path) -> None:
    uneven_svhn(tmp_path / "a" / "svhn")
    uneven_svhn(tmp_path / "b" / "svhn")
    for seed in (1, 2, 3):  # the first one divides, and the others read what it saved
        ours = few_shot(read_named("svhn", tmp_path / "a").split, 3, seed)
        theirs = svhn_of_published_code(tmp_path / "b" / "svhn", seed, 3)
        for part, own in zip((ours.train, ours.val), theirs, strict=True):
            assert [(i.path, i.label) for i in part] == [(f"train/{p}", n) for p, n in own]


@pytest.mark.parametrize("name", [n for n in NAMED if n != "svhn" and TREES[n].counts[0]])
def test_no_other_data_set_is_shuffled_before_shots_are_drawn(tmp_path: Path, name: str) -> None:
    folder = built(tmp_path, name)
    split = read_named(name, tmp_path).split
    assert split.shuffled == ()
    own = folder / NAMED[name].own_split
    if own.exists() and NAMED[name].splits:  # as a published file
        own.rename(folder / NAMED[name].splits[0])
        assert read_named(name, tmp_path).split == split


def test_split_svhn_goes_before_the_file_that_the_readme_hands_out(tmp_path: Path) -> None:
    folder = tmp_path / "svhn"
    uneven_svhn(folder)
    for n, file in enumerate(NAMED["svhn"].splits):
        lists = {
            part: [[f"{d}/{k:05}.jpg", d, str(d)] for d in range(10)]
            for part, k in (("train", n), ("val", 5 + n))
        }
        (folder / file).write_text(json.dumps(lists))
    both = read_source("svhn", tmp_path).notes[0]
    assert both == (
        "SVHN's split was read from split_SVHN.json (split_mlai_SVHN.json was ignored, as in the "
        "published code)"
    )
    assert read_named("svhn", tmp_path).split.train[0].path == "train/0/00000.jpg"
    (folder / "split_SVHN.json").unlink()
    one = read_source("svhn", tmp_path).notes[0]
    assert one == "SVHN's split was read from split_mlai_SVHN.json"
    assert read_named("svhn", tmp_path).split.train[0].path == "train/0/00001.jpg"
    (folder / "split_mlai_SVHN.json").unlink()
    assert "drawn by ztune" in read_source("svhn", tmp_path).notes[0]


def test_a_file_among_the_test_folders_of_svhn_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "svhn"
    uneven_svhn(folder)
    entries = {
        part: [[f"{d}/00000.jpg", d, str(d)] for d in range(10)] for part in ("train", "val")
    }
    (folder / "split_SVHN.json").write_text(json.dumps(entries))
    (folder / "test" / "9").rename(folder / "nine")
    assert read_named("svhn", tmp_path).split.shuffled[-4:] == (36, 11, 39, 0)
    (folder / "test" / "9").touch()
    with pytest.raises(DataError, match=r'folder ".*9" cannot be read: Not a directory'):
        read_named("svhn", tmp_path)


def test_names_are_found_however_they_are_written() -> None:
    for written in ("dtd", "DTD", "DescribableTextures", "ImageNet-A", "oxford_flowers", "CLEVR"):
        assert find_spec(written)
    with pytest.raises(ConfigError, match=r'unknown data set "cifar10" .known: caltech101, '):
        find_spec("cifar10")
    known = [n for s in NAMED.values() for n in {s.name, s.folder, *s.also}]
    assert len(known) == len(set(known))


def test_templates_take_a_class_name() -> None:
    for spec in NAMED.values():
        assert spec.template.count("{}") == 1
        assert spec.template.endswith(".")


# What cannot be read


def test_wrong_roots(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist .pass the folder that contains"):
        read_named("dtd", tmp_path / "no")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is not a folder"):
        read_named("dtd", tmp_path / "file")
    with pytest.raises(DataError, match=r"dtd.* does not exist .create it; from https"):
        read_named("dtd", tmp_path)
    with pytest.raises(DataError, match="looks like the data set itself"):
        read_named("dtd", built(tmp_path, "dtd"))


@pytest.mark.parametrize("name", ["oxfordpets", "flowers102", "sun397", "ucf101", "stanfordcars"])
def test_a_missing_split_file_is_named_with_its_address(tmp_path: Path, name: str) -> None:
    folder, spec = built(tmp_path, name), NAMED[name]
    (folder / spec.splits[0]).unlink()
    with pytest.raises(DataError, match=r"missing split_zhou_\w+.json .download split_") as caught:
        read_named(name, tmp_path)
    assert str(folder) in str(caught.value)
    assert "CoOp/blob/main/DATASETS.md, into it; images from https://" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", [n for n in NAMED if NAMED[n].make and NAMED[n].needs and n != "svhn"]
)
def test_missing_lists_are_named(tmp_path: Path, name: str) -> None:
    folder, need = built(tmp_path, name), NAMED[name].needs[0]
    (folder / need).rename(folder / "elsewhere")
    with pytest.raises(DataError, match=f"missing {need} .from https?://"):
        read_named(name, tmp_path)


def test_missing_images_are_counted_and_the_first_five_named(tmp_path: Path) -> None:
    folder = built(tmp_path, "dtd")
    split = read_named("dtd", tmp_path).split
    gone = [item.path for item in split.train[:7]]
    for path in gone:
        (folder / "images" / path).unlink()
    with pytest.raises(DataError, match="7 of 20 images are missing") as caught:
        read_named("dtd", tmp_path)
    assert [path in str(caught.value) for path in gone] == [True] * 5 + [False] * 2


def test_a_split_of_another_data_set(tmp_path: Path) -> None:
    built(tmp_path, "dtd")
    folder = built(tmp_path, "food101")
    read_named("food101", tmp_path)
    other = (folder / NAMED["food101"].own_split).read_text()
    (tmp_path / "dtd" / NAMED["dtd"].splits[0]).write_text(other)
    with pytest.raises(DataError, match=r"20 of 20 images are missing .* is its split"):
        read_named("dtd", tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("fgvcaircraft", "images_variant_val.txt", "1 Concorde", "'Concorde' is not in variants"),
        ("fgvcaircraft", "images_variant_val.txt", "../1 An-12", "is outside the image folder"),
        ("imagenet", "classnames.txt", "n01440764 tench", "n02012849.: not in classnames.txt"),
        ("imagenet", "classnames.txt", "n01440764", 'expected a new "n01440764 tench"'),
        ("imagenetv2", "classnames.txt", "\n".join(f"n{n} x" for n in range(13)), 'first "11"'),
        ("clevr", "scenes/CLEVR_val_scenes.json", "[", "cannot be read as JSON"),
        ("clevr", "scenes/CLEVR_val_scenes.json", "{}", 'expected {"scenes"'),
        ("clevr", "scenes/CLEVR_val_scenes.json", '{"scenes": [1]}', "scene 0: no objects"),
        (
            "clevr",
            "scenes/CLEVR_val_scenes.json",
            '{"scenes": [{"objects": [], "image_filename": "x", "split": "val"}]}',
            "val has a scene with 0 objects, train has none",
        ),
        (
            "clevr",
            "scenes/CLEVR_train_scenes.json",
            '{"scenes": [{"objects": [], "image_filename": "../../x", "split": "val"}]}',
            "val has a scene with 10 objects|is outside",
        ),
    ],
)
def test_wrong_lists(tmp_path: Path, name: str, file: str, content: str, message: str) -> None:
    folder = built(tmp_path, name)
    lines(folder, file, content)
    with pytest.raises(DataError, match=message) as caught:
        read_named(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_classes_without_images(tmp_path: Path) -> None:
    folder = built(tmp_path, "dtd")
    (folder / "images" / "empty").mkdir()
    with pytest.raises(DataError, match='class folder "empty" contains no images'):
        read_named("dtd", tmp_path)
    put(folder / "images", ["empty/1.jpg", "empty/2.jpg"])
    with pytest.raises(DataError, match='class "empty" has 2 images, too few'):
        read_named("dtd", tmp_path)
    lists = {
        "train": [["banded/000.jpg", 0, "banded"], ["zigzagged/000.jpg", 3, "zigzagged"]],
        "val": [],
        "test": [["empty/1.jpg", 4, "empty"]],
    }
    (folder / NAMED["dtd"].splits[0]).write_text(json.dumps(lists))
    with pytest.raises(DataError, match=r"2 label\(s\) without images: 1, 2"):
        read_named("dtd", tmp_path)
    found = check(NAMED["dtd"], tmp_path)
    assert '1 class(es) without train images, first "empty"' in found.problems[1]
    assert "2 class(es) without test images: banded, zigzagged" in found.warnings
    nine = [[f"{n}/1.jpg", n, f"c_{n}"] for n in range(9)]
    (folder / NAMED["dtd"].splits[0]).write_text(
        json.dumps({"train": [*nine, nine[0]], "val": [], "test": nine[:3]})
    )
    warnings = check(NAMED["dtd"], tmp_path).warnings
    assert "6 class(es) without test images: c 3, c 4, c 5, c 6, c 7, ..." in warnings
    assert '1 duplicate image(s) in train: "0/1.jpg"' in warnings


def test_images_that_are_tested_and_tuned_on(tmp_path: Path) -> None:
    folder = built(tmp_path, "dtd")
    split = read_named("dtd", tmp_path).split
    twin, other = split.test[1].path, split.val[0].path
    (folder / "images" / twin).write_bytes((folder / "images" / other).read_bytes())
    both = type(split)((*split.train, split.test[0], split.train[0]), split.val, split.test)
    write_split(folder / NAMED["dtd"].splits[0], both)
    found = check(NAMED["dtd"], tmp_path)
    assert not found.problems
    assert found.copies is not None
    assert found.copies.by_path == (split.test[0].path,)
    assert found.copies.by_content == ((twin, other),)
    text = " ".join(found.warnings)
    assert f'1 test image(s) also in train or val: "{split.test[0].path}"' in text
    assert f'with the same content as an image in train or val: "{twin} = {other}"' in text
    assert f'1 duplicate image(s) in train: "{split.train[0].path}"' in text
    copies = check(NAMED["dtd"], tmp_path, contents=False).copies
    assert copies is not None
    assert copies.by_content is None


# The real one


def test_the_real_caltech101(bench_data: Path) -> None:
    if not (bench_data / "caltech-101").is_dir():
        pytest.skip("no caltech-101 there")
    data = read_named("caltech101", bench_data, save=False)
    assert counts_of(data) == (4128, 1649, 2465)
    assert len(data.classes) == 100
    assert data.classes[:4] == ("face", "leopard", "motorbike", "accordion")
    drawn = few_shot(data.split, 16, 1)
    assert drawn.counts == {"train": 1600, "val": 400, "test": 2465}
    base, new = base_and_new(drawn)
    assert (len(base.classes), len(new.classes)) == (50, 50)
    assert base.classes[0] == "face"
    assert len(replace(data, split=drawn).dataset().images) == 4465


# Parquet


def png(colour: int) -> bytes:
    image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    image.new("RGB", (2, 2), (colour, 0, 0)).save(out, "PNG")
    return out.getvalue()


NAMES = ["banded", "zig_zagged"]


def parquet_file(
    path: Path,
    rows: Sequence[tuple[bytes | None, int | None]],
    names: object = NAMES,
    metadata: bytes | None = None,
    **options: Any,
) -> None:
    """Write a file as the Hugging Face library does."""
    arrow = pytest.importorskip("pyarrow")
    writer = pytest.importorskip("pyarrow.parquet")
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    table = arrow.table(
        {
            "image": [{"bytes": content, "path": "../../evil.png"} for content, _ in rows],
            "label": arrow.array([label for _, label in rows], arrow.int64()),
        }
    )
    told = json.dumps({"info": {"features": features}}).encode() if metadata is None else metadata
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(table.replace_schema_metadata({"huggingface": told}), path, **options)


def test_a_parquet_data_set_is_extracted_once(tmp_path: Path) -> None:
    folder = tmp_path / "dtd"
    rows = [(png(n), n % 2) for n in range(6)]
    parquet_file(folder / "data" / "train-00000-of-00002.parquet", rows[3:])
    parquet_file(folder / "data" / "train-00001-of-00002.parquet", [*rows[:3], (png(99), -1)])
    parquet_file(folder / "data" / "test-00000-of-00001.parquet", [(png(n + 9), n) for n in (1, 0)])
    with pytest.raises(DataError, match=r"3 parquet file.* not extracted yet") as caught:
        read_named("dtd", tmp_path, save=False)
    assert f"(ztune data check dtd --root {tmp_path} --prepare)" in str(caught.value)
    data = read_named("dtd", tmp_path)
    extracted = folder / parquet.EXTRACTED[0]
    assert data.root == extracted
    assert data.classes == ("banded", "zig zagged")
    assert counts_of(data) == (6, 0, 2)
    # In the order of files and rows, the bytes as they are.
    order = [rows[n] for n in (3, 4, 5, 0, 1, 2)]
    assert [((extracted / i.path).read_bytes(), i.label) for i in data.split.train] == order
    assert [item.label for item in data.split.test] == [1, 0]
    assert not list(tmp_path.rglob("evil.png"))
    # The folder is a separate data set, and the files' folder can be read as one.
    opened = Dataset.from_parquet(folder / "data")
    assert (opened.classes, len(opened)) == (("banded", "zig zagged"), 8)
    dataset = read_dataset(extracted / parquet.MANIFEST)
    assert dataset.classes == ("banded", "zig zagged")
    assert sum(image.split == "test" for image in dataset.images) == 2
    # Not written again, and noticed when the files change.
    stamp = (extracted / parquet.SPLIT).stat().st_mtime_ns
    assert read_named("dtd", tmp_path).split == data.split
    assert (extracted / parquet.SPLIT).stat().st_mtime_ns == stamp
    parquet_file(folder / "data" / "test-00000-of-00001.parquet", rows)
    with pytest.raises(DataError, match=r"was not made from .* as they are now .remove it"):
        read_named("dtd", tmp_path)


def test_a_parquet_file_without_parts(tmp_path: Path) -> None:
    parquet_file(tmp_path / "all.parquet", [(png(n), n % 2) for n in range(4)])
    out = parquet.extract(parquet.parquet_files(tmp_path), tmp_path / "out")
    assert {p.split for p in read_dataset(out / parquet.MANIFEST).images} == {None}
    assert parquet.read_extracted(out).counts == {"train": 4, "val": 0, "test": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [(None, 0)]}, "row 0: no image"),
        (
            {"rows": [(b"\x89PNG\r\n\x1a\n", 0), (b"\x89PNG\r\n\x1a\n", 2)]},
            "row 1: label is 2, expected 0 to 1",
        ),
        ({"rows": [(b"\x89PNG\r\n\x1a\n", None)]}, "row 0: label is None"),
        ({"rows": [(b"<svg/>", 0)]}, "unknown image format"),
        ({"rows": []}, "no labelled images in"),
        ({"names": None}, "no class names of"),
        ({"names": [1]}, "no class names of"),
        ({"metadata": b"{"}, "no `features` metadata"),
        ({"metadata": b"null"}, "no `features` metadata"),
        ({"metadata": b'{"info": {"features": {}}}'}, "expected one column of images"),
    ],
)
def test_wrong_parquet(tmp_path: Path, change: dict[str, object], message: str) -> None:
    file = tmp_path / "train.parquet"
    values: dict[str, object] = {"rows": [(b"\x89PNG\r\n\x1a\n", 0)], **change}
    parquet_file(file, **values)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        parquet.extract([file], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(DataError, match="not a parquet file"):
        parquet.extract([tmp_path / "x.parquet"], tmp_path / "out")


def test_without_pyarrow_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "train.parquet").touch()
    with pytest.raises(DataError, match=r"pip install '\.\[parquet\]' in a checkout"):
        parquet.extract([tmp_path / "train.parquet"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "train.parquet"]


DENSE: dict[str, Any] = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 30}


def bomb(size: int) -> bytes:
    """Return the start of an image and zeros, which pack to nearly nothing."""
    return png(0) + bytes(size)


def test_equal_images_are_unpacked_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "1000000")  # 4 MB
    arrow = pytest.importorskip("pyarrow")
    parquet_file(tmp_path / "all.parquet", [(bomb(3_000_000), n % 2) for n in range(200)], **DENSE)
    assert (tmp_path / "all.parquet").stat().st_size < 100_000
    before, out = arrow.total_allocated_bytes(), tmp_path / "out"
    most, write = [0], Path.write_bytes

    def spy(path: Path, content: bytes) -> int:
        most[0] = max(most[0], arrow.total_allocated_bytes() - before)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", spy)
    with pytest.raises(DataError, match=r"the images of \d+ bytes, expected at most \d+ \(extract"):
        parquet.extract(parquet.parquet_files(tmp_path), out)
    assert 0 < most[0] < 30_000_000
    assert not out.exists()


def test_an_image_of_more_bytes_than_its_pixels_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "1000000")
    parquet_file(tmp_path / "all.parquet", [(bomb(4_000_001), 0), (png(1), 1)], **DENSE)
    with pytest.raises(
        DataError, match=r"an image of \d+ bytes, expected at most 4000000 .*`max_pix"
    ):
        parquet.extract(parquet.parquet_files(tmp_path), tmp_path / "out")
    parquet_file(tmp_path / "all.parquet", [(bomb(90_000_000), 0), (png(1), 1)], **DENSE)
    with pytest.raises(DataError, match="a column of"):
        parquet.extract(parquet.parquet_files(tmp_path), tmp_path / "out")
    monkeypatch.setenv(VARIABLE, "40000000")
    out = parquet.extract(parquet.parquet_files(tmp_path), tmp_path / "out")
    assert parquet.read_extracted(out).counts["train"] == 2


@pytest.mark.parametrize(
    "options",
    [
        {}, {"compression": "none"}, {"use_dictionary": False}, {"data_page_version": "2.0"},
        {"data_page_size": 100, "row_group_size": 2}, {"write_page_checksum": True},
        {"compression": "gzip", "data_page_version": "2.0", "write_page_index": True},
        {"use_dictionary": False, "column_encoding": {"label": "DELTA_BINARY_PACKED"}},
        {"compression": "zstd", "write_statistics": False, "version": "1.0"},
    ],
)  # fmt: skip
def test_pages_of_any_kind(tmp_path: Path, options: dict[str, Any]) -> None:
    file, rows = tmp_path / "all.parquet", [(bomb(n), n % 2) for n in range(9)]
    parquet_file(file, rows, **options)
    out = parquet.extract([file], tmp_path / "out")
    contents = [path.read_bytes() for path in sorted((out / "images" / "train").iterdir())]
    assert contents == [content for content, _ in rows]
    column = pytest.importorskip("pyarrow.parquet").ParquetFile(file).metadata.row_group(0)
    images, content = column.column(0), file.read_bytes()
    start = min(images.data_page_offset, images.dictionary_page_offset or 1 << 60)
    sizes = list(page_sizes(content, start, start + images.total_compressed_size))
    n_headers = images.total_uncompressed_size - sum(sizes)
    assert 0 < n_headers < 3000 * len(sizes)


def varint(number: int, length: int | None = None) -> bytes:
    """Return a number of Thrift's compact protocol, or of so many bytes."""
    found, number = bytearray(), 2 * number
    while number or len(found) < (length or 1):
        found.append(number & 127 | 128)
        number >>= 7
    found[-1] &= 127
    return bytes(found)


def test_sizes_are_those_of_the_pages_not_of_the_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "1000000")
    file = tmp_path / "all.parquet"
    parquet_file(file, [(bomb(20_000_000), 0)], use_dictionary=False, compression="zstd")
    metadata = pytest.importorskip("pyarrow.parquet").ParquetFile(file).metadata.row_group(0)
    size = varint(metadata.column(0).total_uncompressed_size)
    content = file.read_bytes()
    assert content.count(size) == 1
    file.write_bytes(content.replace(size, varint(1000, len(size))))
    with pytest.raises(DataError, match=r"a column of 200\d{5} bytes, expected at most "):
        parquet.extract([file], tmp_path / "out")


@pytest.mark.parametrize(
    "header",
    [b"", b"\x15", b"\x15\x00\x15\x02\x00", b"\x16" + b"\xff" * 11, b"\x1e\x00", b"\x1c" * 40,
     b"\x19\xf1" + b"\xff" * 8 + b"\x01", b"\x19\xf7" + b"\xff" * 8 + b"\x01", b"\x18\xff\x7f\x00",
     b"\x1b" + b"\xff" * 8 + b"\x01\x11"],
)  # fmt: skip
def test_damaged_headers_of_pages(header: bytes) -> None:
    with pytest.raises((ValueError, IndexError)):
        list(page_sizes(header, 0, 1000))


@pytest.mark.parametrize("column", ["image", "label"])
def test_lists_are_not_unpacked(tmp_path: Path, column: str) -> None:
    """A row of a few bytes may have a million values."""
    arrow = pytest.importorskip("pyarrow")
    parquet_file(tmp_path / "train.parquet", [(png(1), 0)])
    writer = pytest.importorskip("pyarrow.parquet")
    table = writer.read_table(tmp_path / "train.parquet")
    row = arrow.array([[None] * 1_000_000], arrow.list_(arrow.int64()))
    table = table.set_column(table.schema.names.index(column), column, row)
    writer.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"columns of .*, expected a struct of bytes and path, and"):
        parquet.extract([tmp_path / "train.parquet"], tmp_path / "out")
