"""Lists and images by name or path: what a word means, what published lists give, copies."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.ztune.data_trees import TREES, put
from tests.ztune.test_data_named import built, parquet_file, png
from ztune.data import named, parquet
from ztune.data.checking import check, find_deviations, is_published
from ztune.data.coop import CoopSplit, few_shot, write_split
from ztune.data.folders import Listing
from ztune.data.library import read_named
from ztune.data.named import NAMED, Counts
from ztune.data.sources import find_named, read_source
from ztune.data.split import Split, SplitSettings
from ztune.data.splitter import digest_file, make_split, to_coop_split
from ztune.errors import ConfigError, DataError, FormatError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder that a bare word is looked for in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def meant(place: str, root: Path | None) -> Listing:
    """Return the images of what a word means."""
    spec = find_named(place, root)
    if spec is None:
        return read_source(place, None, tuned=False)
    return read_source(spec.name, root, tuned=False)


def classes_below(root: Path, n: int, *names: str) -> None:
    put(root, (f"{name}/{i:02}.jpg" for name in names for i in range(n)))


# By name


@pytest.mark.parametrize("name", NAMED)
def test_the_lists_of_a_name_are_the_published_ones(here: Path, name: str) -> None:
    built(here, name)
    lists, data, spec = meant(name, here), read_named(name, here), NAMED[name]
    assert lists.lists == data.split
    assert lists.root == data.root
    assert lists.root.is_absolute()
    assert not lists.is_published, "a few images are not the data set"
    drawn = spec.drawn and TREES[name].split is None
    assert sum("are drawn by ztune" in remark for remark in lists.notes) == drawn
    checked = check(spec, here, contents=False).warnings
    assert lists.notes[drawn:] == tuple(f"{spec.title} has {line}" for line in checked)
    assert f"{spec.title} has {len(data.split.test):,} test images, published" in "".join(
        lists.notes
    )


def as_if_published(monkeypatch: pytest.MonkeyPatch, name: str, **other: Any) -> None:
    """Let the numbers of a small tree be the published ones, but for others."""
    tree = TREES[name]
    counts = Counts(*tree.counts)
    small = replace(NAMED[name], n_classes=len(tree.classes), counts=counts)
    spec = replace(small, **other)
    monkeypatch.setattr(named, "SPECS", [spec if s.name == name else s for s in named.SPECS])


@pytest.mark.parametrize("name", [name for name in NAMED if name != "imagenet"])
def test_lists_are_published_where_numbers_and_file_are(
    here: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_published(monkeypatch, name)
    folder, spec = built(here, name), NAMED[name]
    first = meant(name, here)
    drawn = spec.drawn and TREES[name].split is None
    assert first.is_published != drawn
    if drawn:
        assert [spec.title in remark for remark in first.notes] == [True]
        (folder / spec.own_split).rename(folder / spec.splits[0])
    lists = meant(name, here)
    assert lists.is_published
    read = (f"SVHN's split was read from {spec.splits[0]}",) if name == "svhn" else ()
    assert lists.notes == read
    assert lists.lists == first.lists


@pytest.mark.parametrize(
    ("other", "remark"),
    [
        ({"n_classes": 3}, "2 classes, published: 3"),
        ({"counts": Counts(11, 4, 6)}, "10 train images, published: 11"),
        ({"counts": Counts(10, 0, 6)}, "4 val images, published: 0"),
        ({"counts": Counts(10, 4, 6000)}, "6 test images, published: 6,000"),
        (
            {"counts": Counts(None, None, 6, trainval=15)},
            "14 train and val images together, published: 15",
        ),
    ],
)
def test_other_numbers_are_not_published(
    here: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], remark: str
) -> None:
    folder = built(here, "dtd")
    read_named("dtd", here)
    (folder / NAMED["dtd"].own_split).rename(folder / NAMED["dtd"].splits[0])
    as_if_published(monkeypatch, "dtd", **other)
    lists = meant("dtd", here)
    assert not lists.is_published
    assert lists.notes == (f"DTD has {remark}",)


def test_a_name_for_two_classes_is_not_published(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built(here, "dtd")
    read_named("dtd", here)
    own = folder / NAMED["dtd"].own_split
    as_if_published(monkeypatch, "dtd")
    text = own.read_text().replace('"zigzagged"', '"banded_"')
    own.with_name(NAMED["dtd"].splits[0]).write_text(text)
    data = read_named("dtd", here)
    assert not is_published(data)
    assert find_deviations(data) == [
        "1 duplicate class name(s), merged into 1 of 2 classes: banded"
    ]
    with pytest.raises(DataError, match='has only one class, "banded"'):
        meant("dtd", here)


def test_imagenets_published_names_are_not_all_different(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(here, "imagenet")
    as_if_published(monkeypatch, "imagenet")
    lists = meant("imagenet", here)
    assert lists.is_published
    assert lists.notes == (
        "ImageNet has 1 duplicate class name(s), merged into 3 of 4 classes: crane",
    )


def test_what_is_strange_in_published_lists_is_said(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built(here, "dtd")
    split = read_named("dtd", here).split
    tested = [item for item in split.test if item.label == 0]
    odd = CoopSplit(split.train, split.val, (*tested, tested[0], split.train[0]))
    write_split(folder / NAMED["dtd"].splits[0], odd)
    as_if_published(monkeypatch, "dtd", counts=Counts(*odd.counts.values()))
    lists = meant("dtd", here)
    assert lists.is_published, "published lists may be strange"
    assert f'DTD has 1 duplicate image(s) in test: "{tested[0].path}"' in lists.notes
    assert "DTD has 1 class(es) without test images: zigzagged" in lists.notes
    both = f'DTD has 1 test image(s) also in train or val: "{split.train[0].path}"'
    assert both in lists.notes


def test_the_images_of_a_name_are_those_that_tuning_reads(here: Path) -> None:
    built(here, "dtd")
    found = read_source("dtd", here)
    assert replace(found, notes=()) == read_named("dtd", here).dataset()
    assert "drawn by ztune" in found.notes[0]


def test_a_name_for_testing_only_is_not_tuned_on(here: Path) -> None:
    built(here, "imagenetr")
    assert len(read_source("imagenetr", here, tuned=False).images) == 4
    assert {p.split for p in meant("imagenetr", here).images} == {"test"}
    with pytest.raises(DataError, match=r"imagenetr.* has only test images"):
        read_source("imagenetr", here)


def test_a_folder_that_may_not_be_written_stays_as_it_is(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built(here, "dtd")
    monkeypatch.setattr(os, "access", lambda path, mode: (Path(path), mode) != (folder, os.W_OK))
    first = meant("dtd", here)
    assert not (folder / NAMED["dtd"].own_split).exists()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert meant("dtd", here) == first
    assert (folder / NAMED["dtd"].own_split).exists()


# What a word means


def test_a_word_is_a_name_or_a_path(here: Path) -> None:
    assert find_named("oxford_flowers", here) is NAMED["flowers102"]
    for path in ("./dtd", "../dtd", "/data/dtd", "photos", "photos.csv"):
        assert find_named(path, None) is None


def test_a_name_that_is_also_a_path(here: Path) -> None:
    built(here / "all", "dtd")
    classes_below(here / "dtd", 10, "a", "b")
    for root in (None, here / "all", here / "none"):
        with pytest.raises(
            ConfigError, match=r'both a named data set and a path here .write "./dtd"'
        ):
            meant("dtd", root)
    assert meant("./dtd", here / "all").root == Path("dtd")
    assert read_source("dtd", here / "all").root == here / "all" / "dtd" / "images"


def test_the_folder_of_the_name_itself_is_no_other_path(here: Path) -> None:
    built(here, "dtd")
    assert meant("dtd", Path()).lists == read_named("dtd", here).split


@pytest.mark.parametrize(
    ("place", "root", "kind", "message"),
    [
        ("dtd", None, ConfigError, r'add `root=DIR`, the folder that contains "dtd"'),
        ("oxford_flowers", None, ConfigError, r'folder that contains "oxford_flowers"'),
        ("caltech11", None, DataError, r"neither a path .*did you mean caltech101\?"),
        ("Caltech11", ".", DataError, r"did you mean caltech101\?"),
        ("photos", ".", DataError, r"nor a known data set \(known: caltech101, .*imagenetr\)"),
        ("photos", None, DataError, r"does not exist \(expected root/class"),
        ("./caltech11", ".", DataError, r"does not exist \(expected root/class"),
        ("dtd", "none", DataError, r'root "none" does not exist'),
        ("dtd", ".", DataError, r'"dtd" does not exist \(create it'),
    ],
)
def test_words_that_mean_nothing(
    here: Path, place: str, root: str | None, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        meant(place, None if root is None else Path(root))


def test_a_names_file_goes_with_ones_own_only(here: Path) -> None:
    built(here, "dtd")
    (here / "names.tsv").write_text("a\tcat\nb\tdog\n")
    with pytest.raises(ConfigError, match="includes class names; omit `names`"):
        read_source("dtd", here, Path("names.tsv"))
    classes_below(here / "mine", 10, "a", "b")
    assert read_source("mine", None, Path("names.tsv")).classes == ("cat", "dog")


# Paths


def test_a_test_list_alone_is_enough_to_score_on(here: Path) -> None:
    classes_below(here / "mine" / "test", 3, "a", "b")
    assert len(read_source("mine", None, tuned=False).images) == 6
    with pytest.raises(DataError, match="no train images"):
        read_source("mine", None)
    classes_below(here / "mine" / "val", 1, "a", "b")
    with pytest.raises(DataError, match="no train images"):
        read_source("mine", None, tuned=False)


def test_ones_own_have_no_published_lists(here: Path) -> None:
    for part in ("train", "val", "test"):
        classes_below(here / "mine" / part, 2, "a", "b")
    listing = read_source("mine", None)
    assert (listing.lists, listing.is_published, listing.notes) == (None, False, ())


# Parquet


def parquet_folder(folder: Path) -> list[tuple[bytes, int]]:
    """Write a data set as the hub has it: 10 images to train and 4 to test."""
    rows = [(png(n), n % 2) for n in range(14)]
    parquet_file(folder / "data" / "train-00000-of-00001.parquet", rows[:10])
    parquet_file(folder / "data" / "test-00000-of-00001.parquet", rows[10:])
    return rows


def test_a_folder_of_parquet_files(here: Path) -> None:
    rows = parquet_folder(here / "mine")
    (here / "mine" / ".cache").mkdir()
    dataset = read_source(str(here / "mine"), None)
    assert read_source(str(here / "mine"), None) == dataset
    extracted = here / "mine" / parquet.EXTRACTED[0]
    assert dataset.root == extracted
    assert dataset.classes == ("banded", "zig zagged")
    assert len(dataset.images) == 14
    tested = [
        ((extracted / image.path).read_bytes(), image.label)
        for image in dataset.images
        if image.split == "test"
    ]
    assert tested == rows[10:]


def test_lists_of_parquet_files_are_not_the_published(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet_folder(here / "dtd")
    as_if_published(monkeypatch, "dtd", counts=Counts(10, 0, 4))
    lists = meant("dtd", here)
    assert not lists.is_published
    assert lists.notes == (
        "DTD has no published split file here, so its train, val and test are those of its "
        "parquet files",
    )


def test_parquet_files_beside_class_folders_are_left_alone(here: Path) -> None:
    classes_below(here / "mine", 10, "a", "b")
    put(here / "mine", ["features.parquet"])
    listing = read_source("mine", None)
    assert (listing.classes, listing.ignored) == (("a", "b"), ("features.parquet",))
    assert not (here / "mine" / parquet.EXTRACTED[0]).exists()


# Published lists, copies included


def copy(folder: Path, source: str, *targets: str) -> None:
    for target in targets:
        (folder / target).write_bytes((folder / source).read_bytes())


@pytest.fixture
def published(here: Path) -> Listing:
    """Return two classes of 6 train, 2 val and 4 test images, with every kind of copy."""
    folder = here / "mine"
    for part, n in (("train", 6), ("val", 2), ("test", 4)):
        classes_below(folder / part, n, "a", "b")
    copy(folder, "test/a/00.jpg", "train/a/00.jpg", "val/b/00.jpg")  # tested, once as another
    copy(folder, "test/a/01.jpg", "test/a/02.jpg", "test/b/00.jpg")  # among the tested alone
    copy(folder, "train/a/01.jpg", "train/b/01.jpg")  # two classes
    copy(folder, "train/a/02.jpg", "train/a/03.jpg", "val/a/01.jpg")  # the same class
    listing = read_source("mine", None)
    return replace(listing, lists=to_coop_split(listing))


def test_published_lists_are_drawn_as_coop_draws_them(published: Listing) -> None:
    assert published.lists is not None
    for shots, seed, n_val in ((3, 1, 1), (2, 5, None), (6, 2, 2)):
        split = make_split(published, SplitSettings(shots, n_val, seed=seed))
        drawn = few_shot(published.lists, shots, seed, n_val)
        for role in ("train", "val"):
            for label in (0, 1):
                paths = [item.path for item in drawn.of(role) if item.label == label]
                entries = [e for e in split.entries_of(role) if e.label == label]
                assert [entry.path for entry in entries] == paths
        assert len(split.entries_of("test")) == 8, "the published test set stays whole"
        assert split.sampler == "coop"


def test_copies_in_published_lists_stay_and_are_counted(published: Listing) -> None:
    split = make_split(published, SplitSettings(6, n_val=2))
    assert split.notes == (
        "test images identical to a training or validation image: 1 (kept, as published)",
    )
    document = json.loads(json.dumps(split.to_json()))
    again = Split.from_json(document, "split.json")
    assert again == split
    again.check_unchanged()
    with pytest.raises(FormatError, match="the same image is listed twice"):
        Split.from_json({**document, "sampler": "hash"}, "split.json")


def test_only_what_is_drawn_is_read(published: Listing) -> None:
    read: list[Path] = []

    def digest(path: Path) -> str:
        read.append(path)
        return digest_file(path)

    split = make_split(published, SplitSettings(1, n_val=0), digest=digest)
    assert len(split.entries) == len(read) == 2 + 8


def test_classes_with_fewer_images_than_shots_give_all_they_have(published: Listing) -> None:
    split = make_split(published, SplitSettings(16))
    assert len(split.entries_of("train")) == 12
    assert "2 class(es) have fewer than 16 training images" in split.notes[0]


def test_published_lists_are_tested_elsewhere(published: Listing, here: Path) -> None:
    classes_below(here / "more", 2, "a", "b")
    split = make_split(published, SplitSettings(2), read_source("more", None))
    assert {entry.root for entry in split.entries_of("test")} == {"test"}
    assert len(split.entries_of("test")) == 4
    assert split.notes[0] == "test images of the data, not used: 8"
    with pytest.raises(DataError, match="omit `test_fraction`"):
        make_split(published, SplitSettings(2, test_fraction=0.5))


def test_copies_in_ones_own_are_refused(published: Listing) -> None:
    with pytest.raises(DataError, match=r"the same image has two .*\(remove one of each, "):
        make_split(replace(published, lists=None), SplitSettings(3, n_val=1))


def test_validation_images_that_published_lists_lack_are_told(published: Listing) -> None:
    split = make_split(published, SplitSettings(2, n_val=3))
    assert len(split.entries_of("val")) == 4
    assert split.notes[0] == (
        "2 class(es) have fewer than 3 validation images (fewest: 2); all are used"
    )
    assert not any("validat" in note for note in make_split(published, SplitSettings(2, 0)).notes)


def test_a_split_seed_goes_with_ones_own_images_only(published: Listing) -> None:
    for listing in (published, replace(published, lists=None)):
        with pytest.raises(DataError, match="its own train and test images: omit `split_seed`"):
            make_split(listing, SplitSettings(2, split_seed=1))
