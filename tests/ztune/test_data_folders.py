"""Images and classes of folders and manifests, and errors for unusable ones."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztune.data.folders import read_dataset
from ztune.data.manifests import is_inside, read_class_list, read_manifest
from ztune.errors import ConfigError, DataError


def put(root: Path, *paths: str) -> Path:
    """Write one file for every path, its content being its path."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    return root


def found(path: Path, names: Path | None = None) -> list[tuple[str, str, str | None]]:
    dataset = read_dataset(path, names)
    return [(p.path, dataset.classes[p.label], p.split) for p in dataset.images]


def test_class_folders(tmp_path: Path) -> None:
    put(
        tmp_path, "b_owl/2.JPG", "b_owl/1.png", "a/deep/er/x.webp", "a/b.gif", "é/i.ppm", "B/c.tiff"
    )
    assert found(tmp_path) == [
        ("B/c.tiff", "B", None),
        ("a/b.gif", "a", None),
        ("a/deep/er/x.webp", "a", None),
        ("b_owl/1.png", "b owl", None),
        ("b_owl/2.JPG", "b owl", None),
        ("é/i.ppm", "é", None),
    ]
    assert read_dataset(tmp_path).classes == ("B", "a", "b owl", "é")


def test_the_rest_is_counted(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/1.png", "a/.hidden.png", "a/notes.txt", "loose.png", "a/.git/x.png")
    put(tmp_path, ".cache/x.png", "__MACOSX/a/1.png")
    dataset = read_dataset(tmp_path)
    assert [p.path for p in dataset.images] == ["a/1.png", "b/1.png"]
    assert dataset.ignored == ("a/notes.txt", "loose.png", "a/.hidden.png")
    assert dataset.remarks == (
        'files ignored, not images of a class: 3 ("a/notes.txt", "loose.png", "a/.hidden.png")',
    )


def test_names_are_composed(tmp_path: Path) -> None:
    put(tmp_path, "e\u0301/1.png", "z/1.png")
    assert read_dataset(tmp_path).classes == ("z", "é")


def test_class_folders_may_be_links_and_circles_are_not_followed(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "cats/1.png")
    put(tmp_path / "root", "dog/1.png")
    (tmp_path / "root" / "cat").symlink_to(tmp_path / "elsewhere" / "cats")
    (tmp_path / "root" / "dog" / "again").symlink_to(tmp_path / "root")
    assert [path for path, _, _ in found(tmp_path / "root")] == ["cat/1.png", "dog/1.png"]


def test_linked_sub_folders_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path / "pool", "1.png", "deep/2.png")
    put(tmp_path / "root", "cat/3.png", "cat/own/4.png", "dog/5.png")
    (tmp_path / "root" / "cat" / "a").symlink_to(tmp_path / "pool")
    (tmp_path / "root" / "cat" / "b").symlink_to(tmp_path / "pool" / "deep")
    (tmp_path / "root" / "cat" / "c").symlink_to(tmp_path / "root" / "cat" / "own")
    (tmp_path / "pool" / "deep" / "round").symlink_to(tmp_path / "pool")
    assert [path for path, _, _ in found(tmp_path / "root")] == [
        "cat/3.png", "cat/a/1.png", "cat/a/deep/2.png", "cat/own/4.png", "dog/5.png",
    ]  # fmt: skip


def test_a_class_folder_may_have_only_a_linked_one(tmp_path: Path) -> None:
    put(tmp_path / "pool", "1.png")
    put(tmp_path / "root", "cat/1.png")
    (tmp_path / "root" / "dog").mkdir()
    (tmp_path / "root" / "dog" / "part").symlink_to(tmp_path / "pool")
    assert found(tmp_path / "root") == [
        ("cat/1.png", "cat", None),
        ("dog/part/1.png", "dog", None),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "@eaDir", "@EADIR", "#recycle", "#snapshot", "lost+found", "LOST.DIR", "__MACOSX",
        "$RECYCLE.BIN", ".ipynb_checkpoints", ".Trash-1000", "System Volume Information",
        "__pycache__", "@Recycle", "~snapshot", ".@__thumb", "@__thumb", "RECYCLED", "$Extend",
        "FOUND.001", "found.012", "@SynoResource",
    ],
)  # fmt: skip
def test_storage_folders_are_never_images_or_classes(tmp_path: Path, name: str) -> None:
    put(tmp_path, "train/cat/1.png", "train/dog/2.png")
    expected = found(tmp_path)
    put(tmp_path, *(f"{at}{name}/x.png" for at in ("", "train/", "train/cat/")))
    put(tmp_path, f"train/dog/{name}/2.png/SYNOPHOTO_THUMB_M.jpg")
    assert found(tmp_path) == expected


JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF"
PNG_HEAD = b"\x89PNG\r\n\x1a\n"
TIFF = b"II*\0\x08\0\0\0"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("1.jfif", JPEG),
        ("1.JPE", JPEG),
        ("1.avif", b"damaged"),
        ("1.heic", b""),
        ("1.jp2", b""),
        ("1.pnm", b""),
        ("photo", JPEG),
        ("IMG.0001", JPEG),
        ("1.jpg_large", PNG_HEAD),
        ("scan", TIFF),
        ("1.img", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        ("1.x", b"P5\n# by hand\n1 1\n255\n\0"),
        ("1.x", b"\0\0\0\x1cftypmif1\0\0\0\0avifmif1miaf"),
        ("1.x", b"RIFF\0\0\0\0WEBPVP8 "),
        ("1.dib", b"BM" + bytes(12) + b"\x28\0\0\0"),
    ],
)
def test_images_by_ending_or_content(tmp_path: Path, name: str, content: bytes) -> None:
    put(tmp_path, "a/0.png", "b/0.png")
    (tmp_path / "a" / name).write_bytes(content)
    assert len(found(tmp_path)) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", b"BMW and other cars"),
        ("P1 list", b"P1 is the first"),
        ("empty", b""),
        ("raw.NEF", TIFF),
        ("raw.dng", TIFF),
        ("film.mp4", b"\0\0\0\x18ftypisom\0\0\0\0isommp42"),
        ("page", b"<html>"),
        (".hidden", JPEG),
        ("data.npz", b"PK\x03\x04"),
        ("a.wav", b"RIFF\0\0\0\0WAVE"),
    ],
)
def test_other_files_are_ignored_and_listed(tmp_path: Path, name: str, content: bytes) -> None:
    put(tmp_path, "a/0.png", "b/0.png")
    (tmp_path / "a" / name).write_bytes(content)
    assert read_dataset(tmp_path).ignored == (f"a/{name}",)


def test_a_class_folder_with_other_files_only_names_them(tmp_path: Path) -> None:
    put(tmp_path, "a/0.png", "b/raw.nef", "b/list.txt")
    with pytest.raises(DataError, match=r'remove it; its files are "list.txt", "raw.nef"'):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("name", "unclear"),
    [
        ("AnnualCrop", True), ("n01440764", True), ("N01440764", True), ("SeaLake", True),
        ("Q1460", True), ("001.Black_footed_Albatross", True), ("12 - cat", True),
        ("class_3", True), ("class3", True), ("Label 12", True), ("00017", True),
        ("greatWhiteShark", True),
        ("cat", False), ("7", False), ("42", False), ("golden retriever", False),
        ("iPhone", False), ("eBay", False), ("McDonald", False), ("US dollar", False),
        ("747-400", False), ("F-16A", False), ("b2", False), ("ABBA", False), ("Ötzi", False),
        ("first class", False), ("T-shirt", False), ("x-ray", False),
    ],
)  # fmt: skip
def test_unclear_class_names_are_pointed_out(tmp_path: Path, name: str, unclear: bool) -> None:
    put(tmp_path, f"{name}/1.png", "bird/1.png")
    shown = name.replace("_", " ")
    remarks = "".join(read_dataset(tmp_path).remarks)
    assert (f'may not understand: "{shown}" (give plain ones with `names`' in remarks) == unclear


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_folders(tmp_path: Path, val: str) -> None:
    put(tmp_path, "train/a/1.png", "train/b/1.png", f"{val}/a/2.png", "test/b/3.png")
    assert sorted((name, split) for _, name, split in found(tmp_path)) == [
        ("a", "train"),
        ("a", "val"),
        ("b", "test"),
        ("b", "train"),
    ]


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("Train", "Test", "test"),
        ("TRAIN", "TEST", "test"),
        ("training", "testing", "test"),
        ("trainset", "testset", "test"),
        ("Training", "Validation", "val"),
        ("training_set", "test_set", "test"),
        ("Train-Images", "Test Images", "test"),
        ("train_data", "DEV", "val"),
        ("train2017", "val2017", "val"),
        ("Training Dataset", "Testing Dataset", "test"),
    ],
)
def test_splits_in_any_spelling(tmp_path: Path, train: str, other: str, split: str) -> None:
    put(tmp_path, *(f"{part}/{name}/1.png" for part in (train, other) for name in "ab"))
    assert sorted((name, role) for _, name, role in found(tmp_path)) == sorted(
        (name, role) for name in "ab" for role in ("train", split)
    )
    rows = [
        {"path": f"{part}/{name}/1.png", "label": name, "split": part}
        for part in (train, other)
        for name in "ab"
    ]
    (tmp_path / "list.csv").write_text(rows_csv(rows))
    assert {role for _, _, role in found(tmp_path / "list.csv")} == {"train", split}


@pytest.mark.parametrize("name", ["trains", "tests", "latest", "trainers", "valley", "contest"])
def test_classes_that_resemble_splits(tmp_path: Path, name: str) -> None:
    put(tmp_path, f"{name}/1.png", f"{name}/more/1.png", "bus/1.png")
    assert read_dataset(tmp_path).classes == tuple(sorted(("bus", name)))


NESTED = ("animals/cat/1.png", "animals/dog/2.png", "plants/fern/3.png")


@pytest.mark.parametrize(
    "paths",
    [
        NESTED,
        ("animals/cat/1.png", "plants/fern/3.png"),
        (*NESTED, "cars/4.png"),
        tuple(f"{part}/{path}" for part in ("Train", "Test") for path in NESTED),
        ("my_train/cat/1.png", "my_train/dog/2.png", "my_test/cat/3.png", "my_test/dog/4.png"),
        ("cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png"),
        ("archive/cat/1.png", "archive/dog/2.png"),
    ],
)
def test_nested_class_folders_must_be_explained(tmp_path: Path, paths: tuple[str, ...]) -> None:
    put(tmp_path, *paths)
    with pytest.raises(DataError, match=r"are in its sub-folders .*`nested=leaf`.*`nested=top`"):
        read_dataset(tmp_path)


def test_nested_class_folders_as_explained(tmp_path: Path) -> None:
    put(tmp_path, *(f"{part}/{path}" for part in ("train", "test") for path in NESTED))
    assert read_dataset(tmp_path, nested="leaf").classes == ("cat", "dog", "fern")
    assert read_dataset(tmp_path, nested="top").classes == ("animals", "plants")
    names = tmp_path / "names.txt"
    names.write_text("animals/cat\tlion\nanimals/dog\twolf\nplants/fern\toak\n")
    assert read_dataset(tmp_path, names, nested="leaf").classes == ("lion", "oak", "wolf")
    with pytest.raises(ConfigError, match='`nested` is "deep", expected leaf or top'):
        read_dataset(tmp_path, nested="deep")


def test_two_leaves_of_one_name_are_an_error(tmp_path: Path) -> None:
    put(tmp_path, "animals/other/1.png", "plants/other/2.png", "plants/fern/3.png")
    with pytest.raises(DataError, match='"animals/other" and "plants/other" have the same class'):
        read_dataset(tmp_path, nested="leaf")


def test_sub_folders_of_one_name_are_no_classes(tmp_path: Path) -> None:
    put(tmp_path, "n01/images/1.png", "n02/images/2.png")
    assert read_dataset(tmp_path).classes == ("n01", "n02")


def test_split_folders_without_classes_are_no_classes(tmp_path: Path) -> None:
    put(tmp_path, "Train/1.png", "Test/2.png")
    with pytest.raises(DataError, match='"Test", "Train" contain no class folders'):
        read_dataset(tmp_path)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    put(tmp_path, "train/1.png", "bus/1.png", "test/1.png")
    assert found(tmp_path) == [
        ("bus/1.png", "bus", None),
        ("test/1.png", "test", None),
        ("train/1.png", "train", None),
    ]


def test_names_file(tmp_path: Path) -> None:
    put(tmp_path / "d", "n01/1.png", "n02/1.png")
    names = tmp_path / "names.txt"
    names.write_text("n02\ttench, a fish\r\n\nn01\tzebra_x\n", encoding="utf-8-sig")
    assert found(tmp_path / "d", names) == [
        ("n01/1.png", "zebra_x", None),
        ("n02/1.png", "tench, a fish", None),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("n01\tx\nn02\ty\nn03\tz\n", 'has no class "n03"'),
        ("n01\tx\n", 'class "n02" of folder .* has no name'),
        ("n01\tx\nn01\ty\n", "line 2: folder .* listed twice"),
        ("n01 x\n", "line 1: expected folder, a tab"),
        ("n01\tx\nn02\tx\n", 'have the same class name "x"'),
        (b"n01\t\xff\n", "not UTF-8"),
    ],
)
def test_wrong_names_files(tmp_path: Path, content: str | bytes, message: str) -> None:
    put(tmp_path / "d", "n01/1.png", "n02/1.png")
    names = tmp_path / "names.txt"
    names.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path / "d", names)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "contains no images"),
        (["loose.png"], "contains no images"),
        (["a/1.png"], 'only one class, "a"'),
        (["a/1.png", "b/notes.txt"], 'class folder "b" contains no images'),
        (["a_b/1.png", "a b/1.png", "c/1.png"], '"a b" and "a_b" have the same class name "a b"'),
        (["_/1.png", "a/1.png"], "empty class name"),
        (["train/a/1.png", "train/b/1.png", "c/1.png"], 'unexpected folder "c" next to "train"'),
        (["val/a/1.png", "test/b/1.png"], "no train images"),
        (["train/a/1.png", "train/b/1.png", "test/c/1.png"], 'class "c" has test images but no'),
        (["train/a/1.png", "val/a/1.png", "valid/a/1.png"], "two folders for val"),
    ],
)
def test_wrong_folders(tmp_path: Path, paths: list[str], message: str) -> None:
    put(tmp_path, *paths)
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_data_and_other_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_dataset(tmp_path / "no")
    put(tmp_path, "a.zip")
    with pytest.raises(DataError, match="is not a folder or manifest"):
        read_dataset(tmp_path / "a.zip")


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "b/1.png")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xff.png")).touch()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    with pytest.raises(DataError, match="not UTF-8"):
        read_dataset(tmp_path)


def test_class_lists_are_read_as_folder_names_are(tmp_path: Path) -> None:
    listed = tmp_path / "classes.txt"
    listed.write_text("e\u0301  cole \nn01\tzebra_x\n\ndog\t\n")
    assert read_class_list(listed) == ("é cole", "zebra_x", "dog")
    put(tmp_path / "d", "e\u0301__cole/1.png", "n02/1.png")
    assert read_dataset(tmp_path / "d").classes == ("n02", "é cole")
    names = tmp_path / "names.txt"
    names.write_text("e\u0301__cole\te\u0301  cole\nn02\tdog\n")
    assert read_dataset(tmp_path / "d", names).classes == ("dog", "é cole")
    for content, message in (("é\ne\u0301\n", 'duplicate class name "é"'), ("a\n", "at least two")):
        listed.write_text(content)
        with pytest.raises(DataError, match=message):
            read_class_list(listed)


# Manifests


def rows_csv(rows: list[dict[str, str]]) -> str:
    keys = list(rows[0])
    return "\n".join([",".join(keys), *(",".join(row[key] for key in keys) for row in rows)]) + "\n"


def rows_jsonl(rows: list[dict[str, str]]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


@pytest.mark.parametrize(("suffix", "write"), [("csv", rows_csv), ("JSONL", rows_jsonl)])
def test_manifest(
    tmp_path: Path, suffix: str, write: Callable[[list[dict[str, str]]], str]
) -> None:
    put(tmp_path, "x/2.png", "x/1.png", "3.data")
    rows = [
        {"path": "x/2.png", "label": "b_c", "split": "train"},
        {"path": "x/1.png", "label": "a", "split": "train"},
        {"path": "3.data", "label": "a", "split": "valid"},
    ]
    manifest = tmp_path / f"list.{suffix}"
    manifest.write_text(write(rows), encoding="utf-8-sig")
    assert found(manifest) == [
        ("3.data", "a", "val"),
        ("x/1.png", "a", "train"),
        ("x/2.png", "b c", "train"),
    ]
    for row in rows:
        del row["split"]
    manifest.write_text(write(rows))
    assert {split for _, _, split in found(manifest)} == {None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "first line is nothing, expected path,label"),
        ("where,label\nx,y\n", "first line is where,label, expected path,label"),
        ("path;label,split\nx,y\n", "first line is path;label,split, expected path,label"),
        ("path,label;path;label,x\n", "first line is path,label;path;label,x, expected"),
        ("file,Image,label\nx,y,z\n", 'columns "file" and "Image" could both be the path'),
        ("path,class,category\nx,y,z\n", 'columns "class" and "category" could both be the label'),
        ("path,label,label\nx,y,z\n", 'columns "label" and "label" could both'),
        (
            "path,label\na.png;a\n",
            "line 2: 1 .* commas, expected 2 .*it contains semicolons: use one",
        ),
        ("path;label\na.png,a\n", "line 2: 1 .* semicolons, expected 2 .*it contains commas: use"),
        ("path\tlabel\na.png a\n", "line 2: 1 .* tabs, expected 2 as in the first line"),
        ("path,label\n\na.png,a,b\n", "line 3: 3 column.* expected 2 .*quote cells"),
        ("path,label,split\na.png,a\n", "line 2: 2 column.* expected 3 .*need a separator"),
        ("path,label\n", "contains no images"),
        ("path,label\na.png\n", "line 2: 1 column.* separated by commas, expected 2"),
        ("path,label\na.png, \n", "line 2: path is 'a.png', label '', expected text"),
        ("path,label\na.png,a\na.png,b\n", 'line 3: path "a.png" is listed twice'),
        ("path,label\na.png,a\nno.png,b\nneither.png,b\n", r'2 missing image\(s\), first "no.png"'),
        ("path,label\na.png,a\n", "only one class"),
        ("path,label\n../a.png,a\n", 'line 2: path "../a.png" is outside'),
        ("path,label\n/etc/passwd,a\n", "is outside the manifest's folder"),
        ("path,label\nx/../../m/a.png,a\n", "is outside the manifest's folder"),
        ("path,label\nlink/secret.png,a\n", "is outside the manifest's folder"),
        ("path,label\n..\\a.png,a\n", "is outside the manifest's folder"),
        ("path,label\n" + "x" * 9000 + ",a\n", "missing image|is outside the manifest's folder"),
        ("path,label,split\na.png,a,learn\n", "split is 'learn', expected train"),
        ("path,label,split\na.png,a,train\nb.png,b,\n", "some images have no split"),
        ("path,label,split\na.png,a,test\nb.png,b,test\n", "no train images"),
        ('path,label\n"a.png,a\n', "unexpected end"),
        (b"path,label\n\xff.png,a\n", "not UTF-8"),
    ],
)
def test_wrong_csv(tmp_path: Path, content: str | bytes, message: str) -> None:
    put(tmp_path, "secret.png", "m/a.png", "m/b.png")
    (tmp_path / "m" / "link").symlink_to(tmp_path)
    manifest = tmp_path / "m" / "list.csv"
    manifest.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(manifest)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: invalid JSON"),
        ("[1]", "line 1: expected"),
        (
            '{"path": "a.png", "label": 3}',
            "line 1: path is 'a.png', label 3, expected text for both",
        ),
        ('\n{"path": "a.png"}', "line 2: path is 'a.png', label None, expected text"),
        ('{"path": "a\\u0000.png", "label": "a"}', "contains a NUL character"),
        ('{"path": "a\\ud800.png", "label": "a"}', "unpaired surrogate"),
        ('{"path": "a.png", "label": "a", "split": []}', r"split is \[\]"),
        ("[" * 100000, "line 1: invalid JSON"),
    ],
)
def test_wrong_jsonl(tmp_path: Path, content: str, message: str) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "list.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path / "list.jsonl")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(
    "header",
    [
        ("path", "label", "split"),
        (" Path ", " LABEL", "Split "),
        ("filename", "class", "split"),
        ("File Name", "Class-Name", "SPLIT"),
        ("image_path", "category", "split"),
        ("img", "category_name", "id"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "TSV"])
def test_tables_as_other_programs_write_them(
    tmp_path: Path, separator: str, header: tuple[str, str, str], suffix: str
) -> None:
    odd = f"b{separator if separator != chr(9) else ','}c.png"
    put(tmp_path, "x/a.png", odd)
    has_split = header[2] != "id"
    rows = [("x/a.png", "one, two; three", "Train"), (odd, ' say "four" ', " TRAIN ")]
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator="\r\n")
    writer.writerows([header, rows[0], ("", "", ""), rows[1]])
    manifest = tmp_path / f"list.{suffix}"
    manifest.write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode() + b"\r\n")
    split = "train" if has_split else None
    expected = [(odd, 'say "four"', split), ("x/a.png", "one, two; three", split)]
    assert found(manifest) == sorted(expected)


CELL = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1, max_size=12)


@given(
    labels=st.lists(CELL.filter(lambda label: label.strip()), min_size=2, max_size=6),
    separator=st.sampled_from(",;\t"),
    order=st.permutations(["Path ", " label", "other"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@settings(max_examples=60, deadline=None)
def test_any_cell_survives_a_table(
    labels: list[str], separator: str, order: list[str], quoting: Any
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{number}.png" for number in range(len(labels))]
        put(Path(folder), *paths)
        cells = {"Path ": paths, " label": labels, "other": labels[::-1]}
        text = io.StringIO()
        writer = csv.writer(text, delimiter=separator, quoting=quoting)
        writer.writerows([order, *zip(*(cells[name] for name in order), strict=True)])
        manifest = Path(folder) / "list.csv"
        manifest.write_text(text.getvalue(), newline="")
        read = [(one.path, one.label) for one in read_manifest(manifest)]
        assert read == [(p, label.strip()) for p, label in zip(paths, labels, strict=True)]


def test_keys_of_jsonl_have_other_names_too(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    manifest = tmp_path / "metadata.jsonl"
    rows = [{"file_name": "a.png", "Label": "a"}, {"image": "b.png", "class": "b", "split": None}]
    manifest.write_text(rows_jsonl(rows))  # type: ignore[arg-type]
    assert found(manifest) == [("a.png", "a", None), ("b.png", "b", None)]
    manifest.write_text('\n{"file_name": "a.png", "image": "a.png", "label": "a"}')
    with pytest.raises(DataError, match=r'line 2: the columns "file_name" and "image" could both'):
        found(manifest)


def test_absolute_paths_below_the_manifest_are_relative_ones(tmp_path: Path) -> None:
    root = tmp_path / "real"
    put(root, "x/a.png", "b.png")
    (tmp_path / "link").symlink_to(root)
    outside = put(tmp_path, "c.png") / "c.png"
    expected = [("b.png", "b", None), ("x/a.png", "a", None)]
    for folder in (root, tmp_path / "link"):
        for named in (root, folder):
            lines = ["path,label", f"{named}/x/a.png,a", "./b.png,b"]
            (folder / "list.csv").write_text("\n".join(lines))
            assert found(folder / "list.csv") == expected
        for path in (outside, root / ".." / "c.png", root):
            (folder / "list.csv").write_text(f"path,label\n{path},a")
            with pytest.raises(DataError, match="is outside the manifest's folder"):
                found(folder / "list.csv")
    (root / "list.csv").write_text(f"path,label\n{root}/b.png,b\nb.png,b")
    with pytest.raises(DataError, match=r'line 3: path "b.png" is listed twice'):
        found(root / "list.csv")


@pytest.mark.parametrize("path", ["", ".", "..", "a/..", "/a", "a//b", "a/", "a\0", "./a"])
def test_paths_that_leave(path: str) -> None:
    assert not is_inside(path)
    assert is_inside("a/..b/c d.png")


@pytest.mark.parametrize("other", ["class", "category", "set"])
def test_a_column_of_the_very_name_goes_before_others(tmp_path: Path, other: str) -> None:
    put(tmp_path, "x/a.png", "b.png")
    table = f"{other},path,label\n7,.//x/./a.png,one\n8,b.png,two\n"
    (tmp_path / "list.csv").write_text(table)
    found = read_dataset(tmp_path / "list.csv")
    assert found.classes == ("one", "two")
    assert [image.path for image in found.images] == ["b.png", "x/a.png"]
