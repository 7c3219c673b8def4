"""`ztune data`: the list, and a check of a data set: present, missing, doubtful."""

import json
import shlex
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.ztune.data_trees import TREES
from tests.ztune.test_data_named import parquet_file, png
from ztune.data.named import NAMED

ROOT = Path(__file__).parent.parent


def build(root: Path, name: str) -> Path:
    folder = root / NAMED[name].folder
    TREES[name].build(folder)
    return folder


def test_the_list_has_every_data_set(ztune: Command, tmp_path: Path) -> None:
    result = ztune("data", "list")
    assert result.code == 0
    for name, spec in NAMED.items():
        (line,) = [line for line in result.out.splitlines() if line.split()[:1] == [name]]
        assert spec.folder in line
        assert spec.template in line
    document = ztune("data", "list", "--json").json
    assert [entry["name"] for entry in document["data"]] == list(NAMED)
    assert document["data"][0]["counts"] == {"train": 4128, "val": 1649, "test": 2465}
    build(tmp_path, "dtd")
    document = ztune("data", "list", "--root", tmp_path, "--json").json
    assert [entry["name"] for entry in document["data"] if entry["present"]] == ["dtd"]


@pytest.mark.parametrize("name", NAMED)
def test_a_check_counts_what_is_there(ztune: Command, tmp_path: Path, name: str) -> None:
    folder, tree, spec = build(tmp_path, name), TREES[name], NAMED[name]
    if tree.split is not None:
        (folder / spec.splits[0]).write_text(json.dumps(tree.split))
    result = ztune("data", "check", name, "--root", tmp_path, "--json")
    assert result.code == 0, result.err
    document = result.json
    assert document["ok"]
    assert document["classes"] == {"listed": len(tree.classes), "published": spec.n_classes}
    listed = {role: count["listed"] for role, count in document["counts"].items()}
    assert listed == dict(zip(("train", "val", "test"), tree.counts, strict=True))
    assert document["copies"] == {"by_path": 0, "by_content": 0}
    assert "published" in " ".join(document["warnings"]), "a few images are not the data set"
    assert not list(folder.glob("split_ztune_*")), "a check writes nothing unasked"


def test_a_check_for_people(ztune: Command, tmp_path: Path) -> None:
    folder = build(tmp_path, "dtd")
    result = ztune("data", "check", "DTD", "--root", tmp_path)
    assert result.code == 0
    assert "generated from the data set's files (--prepare saves it)" in result.out
    assert [line.split() for line in result.out.splitlines() if line.startswith("train")] == [
        ["train", "10", "2,820"]
    ]
    assert ["images", "listed", "published"] in [line.split() for line in result.out.splitlines()]
    assert "{} texture." in result.out
    assert "warning: 10 train images, published: 2,820" in result.err
    result = ztune("data", "check", "dtd", "--root", tmp_path, "--prepare")
    assert "saved as split_ztune_DTD.json" in result.out
    split = (folder / "split_ztune_DTD.json").read_text()
    result = ztune("data", "check", "dtd", "--root", tmp_path, "--prepare")
    assert "split: split_ztune_DTD.json" in result.out
    assert (folder / "split_ztune_DTD.json").read_text() == split


def test_what_is_missing_is_named_with_how_to_get_it(ztune: Command, tmp_path: Path) -> None:
    result = ztune("data", "check", "sun397", "--root", tmp_path)
    assert result.code == 1
    assert "no folder sun397" in result.out
    assert NAMED["sun397"].page in result.out
    assert "split_zhou_SUN397.json, from CoOp's DATASETS.md" in result.out
    folder = build(tmp_path, "sun397")
    (folder / "split_zhou_SUN.json").write_text("{}")
    result = ztune("data", "check", "sun397", "--root", tmp_path)
    assert result.code == 1
    assert "missing: split_zhou_SUN397.json" in result.out
    assert "present: SUN397\n" in result.out
    assert "split file(s) with an unexpected name: split_zhou_SUN.json" in result.err


def test_missing_images(ztune: Command, tmp_path: Path) -> None:
    folder = build(tmp_path, "food101")
    ztune("data", "check", "food101", "--root", tmp_path, "--prepare")
    gone = sorted((folder / "images" / "waffles").glob("0*.jpg"))[:7]
    for path in gone:
        path.unlink()
    result = ztune("data", "check", "food101", "--root", tmp_path)
    assert result.code == 1
    assert "missing images: 7" in result.out
    assert "7 of 20 images are missing" in result.err
    document = ztune("data", "check", "food101", "--root", tmp_path, "--json").json
    assert document["missing"]["n"] == 7
    assert len(document["missing"]["first"]) == 5
    assert not document["ok"]


@pytest.mark.parametrize(
    ("empty", "problem"),
    [
        ("train", 'data set "dtd" has no train images (get the whole'),
        ("test", 'data set "dtd" has no test images (get the whole'),
    ],
)
def test_lists_that_serve_nothing(ztune: Command, tmp_path: Path, empty: str, problem: str) -> None:
    folder = build(tmp_path, "dtd")
    ztune("data", "check", "dtd", "--root", tmp_path, "--prepare")
    lists = json.loads((folder / "split_ztune_DTD.json").read_text()) | {empty: []}
    (folder / NAMED["dtd"].splits[0]).write_text(json.dumps(lists))
    result = ztune("data", "check", "dtd", "--root", tmp_path)
    assert result.code == 1
    assert f"error: {problem}" in result.err
    assert result.err.count("error: ") == 1
    assert not ztune("data", "check", "dtd", "--root", tmp_path, "--json").json["ok"]


def test_parquet_files_before_and_after_they_are_extracted(ztune: Command, tmp_path: Path) -> None:
    root = tmp_path / "all of them"
    folder = root / NAMED["dtd"].folder
    for n, part in enumerate(("train", "test")):
        rows = [(png(4 * n + k), k % 2) for k in range(4)]
        parquet_file(folder / "data" / f"{part}-00000-of-00001.parquet", rows)
    result = ztune("data", "check", "dtd", "--root", root)
    assert result.code == 1
    command = f"ztune data check dtd --root {shlex.quote(str(root))} --prepare"
    assert f"images not extracted yet ({command})" in result.err
    assert result.out == f"DTD: {folder}\n", "nothing else has to be got"
    result = ztune(*shlex.split(command)[1:])
    assert result.code == 0, result.err
    assert "split: parquet-images/split.json" in result.out


def test_doubles_are_warned_of(ztune: Command, tmp_path: Path) -> None:
    folder = build(tmp_path, "dtd")
    ztune("data", "check", "dtd", "--root", tmp_path, "--prepare")
    lists = json.loads((folder / "split_ztune_DTD.json").read_text())
    test, train = lists["test"][0][0], lists["train"][0][0]
    (folder / "images" / test).write_bytes((folder / "images" / train).read_bytes())
    result = ztune("data", "check", "dtd", "--root", tmp_path)
    assert result.code == 0
    assert "by path or content: 1" in result.out
    assert f'the same content as an image in train or val: "{test} = {train}"' in result.err
    result = ztune("data", "check", "dtd", "--root", tmp_path, "--skip-copies")
    assert "contents not compared" in result.out
    assert "same content" not in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("check",), "needs a NAME and --root DIR"),
        (("check", "dtd"), "is a named data set, and no such path exists (add --root DIR"),
        (("check", "no/where"), "does not exist (expected root/class"),
        (("check", "no/where", "--prepare"), "apply only to a NAME"),
        (("check", "dtx", "--root", "."), 'unknown data set "dtx" (known: caltech101, '),
        (("check", "dtd", "--root", "no/where"), 'root "no/where" does not exist'),
        (("list", "dtd"), "takes no name"),
        (("list", "--root", "no/where"), "is not a folder"),
    ],
)
def test_wrong_words(ztune: Command, words: tuple[str, ...], message: str) -> None:
    result = ztune("data", *words)
    assert result.code == 1
    assert message in result.err
    assert "Traceback" not in result.err
    assert ztune("data", "get").code == 2


def test_a_broken_split(ztune: Command, tmp_path: Path) -> None:
    folder = build(tmp_path, "dtd")
    (folder / NAMED["dtd"].splits[0]).write_text('{"train": [["../x.jpg", 0, "x"]]}')
    result = ztune("data", "check", "dtd", "--root", tmp_path)
    assert result.code == 1
    assert "is outside the image folder" in result.err
    (folder / NAMED["dtd"].splits[0]).write_text("{")
    assert "invalid JSON" in ztune("data", "check", "dtd", "--root", tmp_path).err


def test_the_real_caltech101(ztune: Command, bench_data: Path) -> None:
    if not (bench_data / "caltech-101").is_dir():
        pytest.skip("no caltech-101 there")
    result = ztune("data", "check", "caltech101", "--root", bench_data)
    assert result.code == 0
    for words in (["train", "4,128"], ["val", "1,649"], ["test", "2,465"], ["classes", "100"]):
        assert [*words, words[1]] in [line.split() for line in result.out.splitlines()]
    assert not result.err


def test_the_page_of_data_sets_follows_the_table() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = {
        cells[0].strip("`"): cells
        for line in text.splitlines()
        if line.startswith("| `") and len(cells := [c.strip() for c in line.split("|")[1:-1]]) == 8
    }
    assert list(rows) == list(NAMED)
    for name, spec in NAMED.items():
        counts = [spec.n_classes, spec.counts.train, spec.counts.val, spec.counts.test]
        figures = ["?" if n is None else f"{n:,}" for n in counts]
        images = f"`{spec.folder}/{spec.images}`".replace("/`", "`")
        assert rows[name][1:7] == [images, *figures, f"`{spec.template}`"]
        assert rows[name][7] == f"[page]({spec.page})"
        for file in spec.splits:
            assert file in text
