"""Lists and pictures by name or path: what a word means, how one's own are divided, copies."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.ztune.data_trees import TREES, put
from tests.ztune.test_data_named import built, parquet_file, png
from ztune.data import named, parquet
from ztune.data.checking import check
from ztune.data.coop import CoopSplit, write_split
from ztune.data.folders import Listing
from ztune.data.library import read_named
from ztune.data.named import NAMED, Counts
from ztune.data.sources import Lists, find_named, named_lists, own_lists, read_source
from ztune.data.split import Split, SplitSettings, digest_pictures, make_split
from ztune.errors import ConfigError, DataError, FormatError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder that a bare word is looked for in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def meant(place: str, root: Path | None) -> Lists:
    """Return the lists of what a word means."""
    spec = find_named(place, root)
    if spec is None:
        return own_lists(Path(place))
    assert root is not None
    return named_lists(spec.name, root)


def paths_of(split: CoopSplit) -> tuple[set[str], ...]:
    return tuple({item.path for item in part} for part in (split.train, split.val, split.test))


def classes_below(root: Path, n: int, *names: str) -> None:
    put(root, (f"{name}/{i:02}.jpg" for name in names for i in range(n)))


# By name


@pytest.mark.parametrize("name", NAMED)
def test_the_lists_of_a_name_are_the_published_ones(here: Path, name: str) -> None:
    built(here, name)
    lists, data, spec = meant(name, here), read_named(name, here), NAMED[name]
    assert lists.template == spec.template
    assert lists.split == data.split
    assert lists.root == data.root
    assert lists.root.is_absolute()
    assert not lists.is_published, "a few pictures are not the data set"
    drawn = spec.drawn and TREES[name].split is None
    assert sum("are drawn by ztune" in remark for remark in lists.remarks) == drawn
    checked = check(spec, here, contents=False).warnings
    assert lists.remarks[drawn:] == tuple(f"{spec.title} has {line}" for line in checked)
    assert f"{spec.title} has {len(data.split.test):,} test pictures, published" in "".join(
        lists.remarks
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
        assert [spec.title in remark for remark in first.remarks] == [True]
        (folder / spec.own_split).rename(folder / spec.splits[0])
    lists = meant(name, here)
    assert lists.is_published
    assert lists.remarks == ()
    assert lists.split == first.split


@pytest.mark.parametrize(
    ("other", "remark"),
    [
        ({"n_classes": 3}, "2 classes, published: 3"),
        ({"counts": Counts(11, 4, 6)}, "10 train pictures, published: 11"),
        ({"counts": Counts(10, 0, 6)}, "4 val pictures, published: 0"),
        ({"counts": Counts(10, 4, 6000)}, "6 test pictures, published: 6,000"),
        (
            {"counts": Counts(None, None, 6, trainval=15)},
            "14 train and val pictures together, published: 15",
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
    assert lists.remarks == (f"DTD has {remark}",)


def test_a_name_for_two_classes_is_not_published(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built(here, "dtd")
    read_named("dtd", here)
    own = folder / NAMED["dtd"].own_split
    as_if_published(monkeypatch, "dtd")
    text = own.read_text().replace('"zigzagged"', '"banded_"')
    own.with_name(NAMED["dtd"].splits[0]).write_text(text)
    lists = meant("dtd", here)
    assert not lists.is_published
    assert lists.remarks == (
        "DTD has 1 name(s) for more than one class, taken as one, which leaves 1 of 2: banded",
    )


def test_imagenets_published_names_are_not_all_different(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(here, "imagenet")
    as_if_published(monkeypatch, "imagenet")
    lists = meant("imagenet", here)
    assert lists.is_published
    assert lists.remarks == (
        "ImageNet has 1 name(s) for more than one class, taken as one, which leaves 3 of 4: crane",
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
    assert f'DTD has 1 picture(s) twice in test: "{tested[0].path}"' in lists.remarks
    assert "DTD has 1 class(es) without test pictures: zigzagged" in lists.remarks
    both = f'DTD has 1 test picture(s) also in train or val: "{split.train[0].path}"'
    assert both in lists.remarks


def test_the_root_becomes_absolute(here: Path) -> None:
    built(here / "all", "dtd")
    lists = meant("DTD", Path("all"))
    assert lists.root == here / "all" / "dtd" / "images"


def test_the_pictures_of_a_name_are_those_that_tuning_reads(here: Path) -> None:
    built(here, "dtd")
    found = read_source("dtd", here)
    assert replace(found, notes=()) == read_named("dtd", here).dataset()
    assert found.notes == meant("dtd", here).remarks
    assert "drawn by ztune" in found.notes[0]


def test_a_name_for_testing_only_is_not_tuned_on(here: Path) -> None:
    built(here, "imagenetr")
    assert len(read_source("imagenetr", here, tuned=False).pictures) == 4
    assert meant("imagenetr", here).split.counts == {"train": 0, "val": 0, "test": 4}
    with pytest.raises(DataError, match=r"imagenetr.* no pictures to tune with, only to test on"):
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
    for path in ("./dtd", "../dtd", "/data/dtd", "pictures", "pictures.csv"):
        assert find_named(path, None) is None


def test_a_name_that_is_also_a_path(here: Path) -> None:
    built(here / "all", "dtd")
    classes_below(here / "dtd", 10, "a", "b")
    for root in (None, here / "all", here / "none"):
        with pytest.raises(ConfigError, match=r'name of a data set and a path here .write "./dtd"'):
            meant("dtd", root)
    assert meant("./dtd", here / "all").root == here / "dtd"
    assert named_lists("dtd", here / "all").root == here / "all" / "dtd" / "images"


def test_the_folder_of_the_name_itself_is_no_other_path(here: Path) -> None:
    built(here, "dtd")
    assert meant("dtd", Path()).split == read_named("dtd", here).split


@pytest.mark.parametrize(
    ("place", "root", "kind", "message"),
    [
        ("dtd", None, ConfigError, r'add `root=DIR`, the folder that holds "dtd"'),
        ("oxford_flowers", None, ConfigError, r'folder that holds "oxford_flowers"'),
        ("caltech11", None, DataError, r"does not exist .*did you mean caltech101\?"),
        ("Caltech11", ".", DataError, r"did you mean caltech101\?"),
        ("photos", ".", DataError, r"no known data set \(known: caltech101, .*imagenetr\)"),
        ("photos", None, DataError, r"does not exist \(expected root/class"),
        ("./caltech11", ".", DataError, r"does not exist \(expected root/class"),
        ("dtd", "none", DataError, r'root "none" does not exist'),
        ("dtd", ".", DataError, r'"dtd" does not exist \(make it'),
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
    with pytest.raises(ConfigError, match="brings its class names; leave out `names`"):
        read_source("dtd", here, Path("names.tsv"))
    classes_below(here / "mine", 10, "a", "b")
    lists = own_lists(Path("mine"), Path("names.tsv"))
    assert lists.split.classes == {0: "cat", 1: "dog"}


# One's own


def test_class_folders_are_divided_as_coop_does(here: Path) -> None:
    classes_below(here / "mine", 10, "b", "a_c")
    (here / "mine" / "a_c" / "note.txt").touch()
    lists = own_lists(here / "mine")
    assert lists.split.counts == {"train": 10, "val": 4, "test": 6}
    assert lists.split.classes == {0: "a c", 1: "b"}
    assert lists.template == "a photo of a {}."
    assert lists.root == here / "mine"
    assert "no test pictures: every class is divided into 50 % train" in lists.remarks[0]
    assert lists.remarks[1] == "files that are no pictures of a class, left alone: 1"
    train, val, test = paths_of(lists.split)
    assert len(train | val | test) == 20
    # The order in which a file system lists them does not matter.
    for name in ("b", "a_c"):
        for i in reversed(range(10)):
            put(here / "again", [f"{name}/{i:02}.jpg"])
    assert own_lists(here / "again").split == lists.split


def test_given_parts_stay(here: Path) -> None:
    for part in ("train", "val", "test"):
        classes_below(here / "mine" / part, 2, "a", "b")
    lists = own_lists(here / "mine")
    assert lists.remarks == ()
    assert not lists.is_published
    assert [item.path for item in lists.split.val] == [
        "val/a/00.jpg", "val/a/01.jpg", "val/b/00.jpg", "val/b/01.jpg",
    ]  # fmt: skip
    assert lists.split.counts == {"train": 4, "val": 4, "test": 4}


def test_a_fifth_validates_where_there_is_no_val(here: Path) -> None:
    classes_below(here / "mine" / "train", 10, "a", "b")
    classes_below(here / "mine" / "test", 3, "a", "b")
    lists = own_lists(here / "mine")
    assert lists.split.counts == {"train": 16, "val": 4, "test": 6}
    assert sorted(item.label for item in lists.split.val) == [0, 0, 1, 1]
    train, val, test = paths_of(lists.split)
    assert all(path.startswith("train/") for path in train | val)
    assert test == {f"test/{name}/{i:02}.jpg" for name in "ab" for i in range(3)}
    assert len(lists.remarks) == 1
    assert "a fifth of every class's train pictures validates" in lists.remarks[0]
    assert own_lists(here / "mine") == lists


def test_train_and_val_without_test_are_divided_together(here: Path) -> None:
    classes_below(here / "mine" / "train", 8, "a", "b")
    classes_below(here / "mine" / "val", 2, "a", "b")
    lists = own_lists(here / "mine")
    assert lists.split.counts == {"train": 10, "val": 4, "test": 6}
    assert "every class (its train and val together) is divided" in lists.remarks[0]


def test_a_test_list_alone_is_enough_to_score_on(here: Path) -> None:
    classes_below(here / "mine" / "test", 3, "a", "b")
    lists = own_lists(here / "mine")
    assert lists.split.counts == {"train": 0, "val": 0, "test": 6}
    assert lists.remarks == ()
    assert len(read_source("mine", None, tuned=False).pictures) == 6
    with pytest.raises(DataError, match="no train pictures"):
        read_source("mine", None)
    classes_below(here / "mine" / "val", 1, "a", "b")
    with pytest.raises(DataError, match="no train pictures"):
        own_lists(here / "mine")


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_to_divide(here: Path, n: int) -> None:
    classes_below(here / "mine", 10, "a", "b")
    classes_below(here / "mine", n, "c")
    with pytest.raises(DataError, match=rf'mine": class "c" has {n} pictures, too few for train'):
        own_lists(here / "mine")
    classes_below(here / "other" / "train", n, "a", "b")
    classes_below(here / "other" / "test", n, "a", "b")
    with pytest.raises(DataError, match=rf'class "a" has {n} pictures, too few for train and val'):
        own_lists(here / "other")


def test_a_manifest(here: Path) -> None:
    classes_below(here / "p", 10, "a", "b")
    rows = [{"path": f"p/{name}/{i:02}.jpg", "label": name} for i in range(10) for name in "ba"]
    (here / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lists = own_lists(here / "mine.jsonl")
    assert lists.root == here
    assert lists.split.counts == {"train": 10, "val": 4, "test": 6}
    (here / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert own_lists(here / "other.jsonl").split == lists.split


# Parquet


def parquet_folder(folder: Path) -> list[tuple[bytes, int]]:
    """Write a data set as the hub has it: 10 pictures to train and 4 to test."""
    rows = [(png(n), n % 2) for n in range(14)]
    parquet_file(folder / "data" / "train-00000-of-00001.parquet", rows[:10])
    parquet_file(folder / "data" / "test-00000-of-00001.parquet", rows[10:])
    return rows


def test_a_folder_of_parquet_files(here: Path) -> None:
    rows = parquet_folder(here / "mine")
    (here / "mine" / ".cache").mkdir()
    lists = own_lists(here / "mine")
    extracted = here / "mine" / parquet.EXTRACTED
    assert lists.root == extracted
    assert lists.split.counts == {"train": 8, "val": 2, "test": 4}
    assert lists.split.classes == {0: "banded", 1: "zig zagged"}
    tested = [((extracted / item.path).read_bytes(), item.label) for item in lists.split.test]
    assert tested == rows[10:]
    assert own_lists(here / "mine") == lists
    dataset = read_source(str(here / "mine"), None)
    assert len(dataset.pictures) == 14
    assert dataset.root == extracted


def test_lists_of_parquet_files_are_not_the_published(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet_folder(here / "dtd")
    as_if_published(monkeypatch, "dtd", counts=Counts(10, 0, 4))
    lists = named_lists("dtd", here)
    assert not lists.is_published
    assert lists.remarks == (
        "DTD has no published split file here, so its train, val and test are those of its "
        "parquet files",
    )


def test_parquet_files_beside_class_folders_are_left_alone(here: Path) -> None:
    classes_below(here / "mine", 10, "a", "b")
    put(here / "mine", ["features.parquet"])
    lists = own_lists(here / "mine")
    assert lists.split.classes == {0: "a", 1: "b"}
    assert "left alone: 1" in lists.remarks[1]
    assert not (here / "mine" / parquet.EXTRACTED).exists()


# Copies in a published data set


def copy(folder: Path, source: str, *targets: str) -> None:
    for target in targets:
        (folder / target).write_bytes((folder / source).read_bytes())


@pytest.fixture
def published(here: Path) -> tuple[Listing, list[str]]:
    """Return two classes of 6 train, 2 val and 4 test pictures, with every kind of copy."""
    folder = here / "mine"
    for part, n in (("train", 6), ("val", 2), ("test", 4)):
        classes_below(folder / part, n, "a", "b")
    copy(folder, "test/a/00.jpg", "train/a/00.jpg", "val/b/00.jpg")  # tested, once as another
    copy(folder, "test/a/01.jpg", "test/a/02.jpg", "test/b/00.jpg")  # among the tested alone
    copy(folder, "train/a/01.jpg", "train/b/01.jpg")  # two classes
    copy(folder, "train/a/02.jpg", "train/a/03.jpg", "val/a/01.jpg")  # the same class
    dataset = read_source("mine", None)
    return dataset, digest_pictures(dataset)


def test_copies_in_a_published_set_never_tune(published: tuple[Listing, list[str]]) -> None:
    split = make_split(*published, SplitSettings(3, n_val=1), published=True)
    assert len(split.entries_of("test")) == 8, "the published test set stays whole"
    assert [entry.path for entry in split.entries_of("test")] == sorted(
        f"test/{name}/{i:02}.jpg" for name in "ab" for i in range(4)
    )
    assert set(split.notes) == {
        "left out of train and val, equal to a test picture: 2",
        "left out of train and val, of two classes at once: 2",
        "left out of train and val, copies of another: 2",
    }
    tested = {entry.sha256 for entry in split.entries_of("test")}
    tuned = [entry for entry in split.entries if entry.role != "test"]
    assert tested.isdisjoint(entry.sha256 for entry in tuned)
    left = {f"train/a/{i:02}.jpg" for i in (2, 4, 5)}
    assert {e.path for e in split.entries_of("train") if e.label == 0} == left
    # Of equal files, that of train stays.
    assert [e.path for e in split.entries_of("val")] == ["val/a/00.jpg", "val/b/01.jpg"]


def test_a_published_set_with_copies_is_read_back(published: tuple[Listing, list[str]]) -> None:
    split = make_split(*published, SplitSettings(3, n_val=1), published=True)
    document = json.loads(json.dumps(split.to_json()))
    again = Split.from_json(document, "split.json")
    assert again == split
    again.check_unchanged()


@pytest.mark.parametrize("role", ["train", "test"])
def test_a_split_file_with_a_copy_that_tunes_is_refused(
    published: tuple[Listing, list[str]], role: str
) -> None:
    split = make_split(*published, SplitSettings(3, n_val=1), published=True)
    document = json.loads(json.dumps(split.to_json()))
    entries = document["entries"]
    (first,) = [e for e in entries if e["path"] == "train/a/02.jpg"]
    entries.append({**first, "path": f"{role}/a/99.jpg", "role": role})
    with pytest.raises(FormatError, match="the same picture is listed twice"):
        Split.from_json(document, "split.json")


def test_too_few_are_left_of_a_published_set(published: tuple[Listing, list[str]]) -> None:
    with pytest.raises(DataError, match='class "a" has 3 pictures to tune with'):
        make_split(*published, SplitSettings(4), published=True)


def test_copies_in_ones_own_are_refused(published: tuple[Listing, list[str]]) -> None:
    with pytest.raises(DataError, match=r"the same picture has two .*\(remove one of each\)"):
        make_split(*published, SplitSettings(3, n_val=1))


def test_a_published_set_without_copies_is_divided_as_ones_own_lists(here: Path) -> None:
    for part in ("train", "val", "test"):
        classes_below(here / "mine" / part, 6, "a", "b")
    dataset = read_source("mine", None)
    digests, settings = digest_pictures(dataset), SplitSettings(3)
    assert make_split(dataset, digests, settings, published=True) == make_split(
        dataset, digests, settings
    )
