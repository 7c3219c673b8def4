"""Verbs on data sets by name: `--data NAME --root DIR` for tune, compare and eval."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DIGITS, MINI, Command, Result
from tests.ztune.test_data_named import parquet_file
from ztune.data.library import read_named
from ztune.data.named import NAMED
from ztune.data.split import Split
from ztune.io.files import read_json

FEW = ("--shots", 2, "--method", "gda")
CLASSES = ("one", "two", "three")
SPEC = NAMED["dtd"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a root with DTD, its textures being digits: 6 to train, 2 to validate, 4 to test."""
    images = tmp_path / "all" / SPEC.folder / SPEC.images
    lists: dict[str, list[list[Any]]] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(CLASSES):
        (images / name).mkdir(parents=True)
        for place, image in enumerate(sorted((DIGITS / name).iterdir())[:12]):
            role = "train" if place < 6 else "val" if place < 8 else "test"
            target = f"{name}/{place:02}{image.suffix}"
            shutil.copy(image, images / target)
            lists[role].append([target, label, name])
    (images.parent / SPEC.splits[0]).write_text(json.dumps(lists))
    return tmp_path / "all"


@pytest.fixture
def run(root: Path, ztune: Command, tmp_path: Path) -> Path:
    """Return a run on the data set."""
    out = tmp_path / "run"
    done = ztune("tune", MINI, "--data", "DTD", "--root", root, *FEW, "--out", out)
    assert done.code == 0, done.err
    (out / "said").write_text(done.err)
    return out


def entries_of(run: Path, role: str) -> set[str]:
    entries = json.loads((run / "split.json").read_text())["entries"]
    return {entry["path"] for entry in entries if entry["role"] == role}


def listed(root: Path, role: str) -> set[str]:
    lists = json.loads((root / SPEC.folder / SPEC.splits[0]).read_text())
    return {path for path, _, _ in lists[role]}


def refused(result: Result, *parts: str) -> None:
    assert result.code == 1
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err


def test_a_run_takes_the_published_lists(run: Path, root: Path) -> None:
    request = json.loads((run / "run.json").read_text())["run_config"]
    assert (request["data"], request["root"]) == ("dtd", str(root))
    assert request["templates"] == ["a photo of a {}."]
    assert entries_of(run, "test") == listed(root, "test")
    assert len(entries_of(run, "train")) == len(entries_of(run, "val")) == 2 * 3
    assert entries_of(run, "train") < listed(root, "train")
    assert entries_of(run, "val") <= listed(root, "val")
    said = (run / "said").read_text()
    assert 'DTD: the papers use --template "{} texture.", this run "a photo of a {}."' in said


def test_what_is_not_as_published_is_said(
    ztune: Command, run: Path, root: Path, tmp_path: Path
) -> None:
    note = "DTD has 3 classes, published: 47"
    assert note in (run / "said").read_text()
    assert note in json.loads((run / "split.json").read_text())["notes"]
    bundle = ("eval", MINI, "--data", "dtd", "--root", root, "--split", "test")
    assert note in ztune(*bundle).err
    words = ("--data", "dtd", "--root", root, "--methods", "gda", "--shots", 2, "--seeds", 1)
    assert note in ztune("compare", MINI, *words, "--out", tmp_path / "compare").err


def test_no_remark_where_the_template_is_the_papers(
    ztune: Command, root: Path, tmp_path: Path
) -> None:
    words = ("--data", "dtd", "--root", root, "--template", SPEC.template, *FEW)
    done = ztune("tune", MINI, *words, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "the papers use" not in done.err


def test_eval_scores_on_the_published_test_images(ztune: Command, run: Path, root: Path) -> None:
    words = ("--data", "dtd", "--root", root, "--json")
    plain = ztune("eval", MINI, *words).json
    assert (plain["n"], plain["split"], plain["candidates"]) == (12, "test", 3)
    assert ztune("eval", MINI, *words, "--split", "all").json["n"] == 36
    own = ztune("eval", run, "--json").json
    assert own["zero_shot_accuracy"] == plain["accuracy"]
    tuned = ztune("eval", MINI, *words, "--prompt", run / "prompt.safetensors").json
    assert tuned["accuracy"] == own["accuracy"]
    assert tuned["tuning_images"] == 0


def test_compare_takes_a_name(ztune: Command, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "compare"
    words = ("compare", MINI, "--data", "dtd", "--root", root, "--out", out, "--shots", 2)
    done = ztune(*words, "--methods", "zero-shot,gda", "--seeds", 1)
    assert done.code == 0, done.err
    assert "dtd on mini, 2 shots" in done.out
    assert "the papers use --template" in done.err
    document = json.loads((out / "compare.json").read_text())
    assert document["counts"]["test"] == 12
    assert {cell["method"] for cell in document["cells"] if "accuracy" in cell} == {
        "zero-shot", "gda",
    }  # fmt: skip
    (tested,) = (out / "splits").iterdir()
    split = Split.from_json(read_json(tested, "split"), "split")
    assert {entry.path for entry in split.entries} == listed(root, "test")


def test_copies_in_a_published_set_stay_and_are_counted(
    ztune: Command, root: Path, tmp_path: Path
) -> None:
    images = root / SPEC.folder / SPEC.images
    twin = sorted(listed(root, "test"))[0]
    copied = [sorted(listed(root, "train"))[0], sorted(listed(root, "val"))[-1]]
    inside = sorted(listed(root, "test"))[1]
    for path in (*copied, inside):
        shutil.copy(images / twin, images / path)
    out, words = tmp_path / "run", ("--shots", 16, "--method", "gda")
    done = ztune("tune", MINI, "--data", "dtd", "--root", root, *words, "--out", out)
    assert done.code == 0, done.err
    assert "identical to a training or validation image: 2 (kept, as published)" in done.err
    assert set(copied) <= entries_of(out, "train") | entries_of(out, "val")
    assert entries_of(out, "test") == listed(root, "test")
    scored = ztune("eval", out, "--json")
    assert scored.code == 0, scored.err
    assert scored.json["n"] == 12
    assert scored.json["tuning_images"] == 2
    assert "were used for tuning or validation" in scored.err

    # The same images in a folder are refused: one of each can be removed there.
    own = tmp_path / "own"
    for role in ("train", "val", "test"):
        for path in listed(root, role):
            (own / role / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(images / path, own / role / path)
    few = ("--shots", 5, "--val", 1, "--method", "gda")
    refused(
        ztune("tune", MINI, "--data", own, *few, "--out", tmp_path / "x", "--quiet"),
        "the same image has two",
        "remove one of each",
    )


def test_a_data_set_for_testing_only(ztune: Command, root: Path, tmp_path: Path) -> None:
    spec = NAMED["imagenetr"]
    folder = root / spec.folder
    for net, name in (("n01440764", "one"), ("n04356056", "two")):
        shutil.copytree(DIGITS / name, folder / spec.images / net)
    (folder / "classnames.txt").write_text("n01440764 one\nn04356056 two\n")
    named = ("--data", "imagenet-r", "--root", root)
    scored = ztune("eval", MINI, *named, "--json")
    assert scored.code == 0, scored.err
    assert scored.json["n"] == sum(1 for name in CLASSES[:2] for _ in (DIGITS / name).iterdir())
    refused(
        ztune("tune", MINI, *named, *FEW, "--out", tmp_path / "x", "--quiet"),
        'data set "imagenetr" has only test images',
    )
    assert not (tmp_path / "x").exists()


def test_parquet_files_by_path(ztune: Command, tmp_path: Path) -> None:
    images = [
        (image.read_bytes(), label)
        for label, name in enumerate(CLASSES)
        for image in sorted((DIGITS / name).iterdir())[:12]
    ]
    folder = tmp_path / "mine"
    for n, part in enumerate(("train", "validation", "test")):
        rows = images[n::3]
        parquet_file(folder / "data" / f"{part}-00000-of-00001.parquet", rows, names=CLASSES)
    out = tmp_path / "run"
    done = ztune("tune", MINI, "--data", folder, *FEW, "--out", out, "--quiet")
    assert done.code == 0, done.err
    assert len(entries_of(out, "test")) == 12
    assert all(path.startswith("images/test/") for path in entries_of(out, "test"))
    scored = ztune("eval", MINI, "--data", folder, "--json")
    assert scored.json["n"] == 12


def test_a_drawn_split_is_kept_with_the_data(ztune: Command, root: Path, tmp_path: Path) -> None:
    (root / SPEC.folder / SPEC.splits[0]).unlink()
    done = ztune("eval", MINI, "--data", "dtd", "--root", root, "--json")
    assert done.json["n"] == 3 * (12 - 6 - 2)
    assert (root / SPEC.folder / SPEC.own_split).exists()
    assert read_named("dtd", root).source == root / SPEC.folder / SPEC.own_split


@pytest.mark.parametrize("verb", ["tune", "compare", "eval"])
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("dtd",), ("is a named data set", 'add --root DIR, the folder that contains "dtd"')),
        (
            ("dtx", "--root", "ROOT"),
            ("nor a known data set", "did you mean dtd?"),
        ),
        (("flags", "--root", "ROOT"), ("nor a known data set", "known: caltech101, oxfordpets")),
        (("dtd", "--root", "nowhere"), ('root "', "nowhere", "does not exist")),
        (("dtd", "--root", "ROOT/dtd"), ("looks like the data set itself",)),
        (("food101", "--root", "ROOT"), ('data set "food101"', "does not exist")),
        (("ROOT/dtd/images", "--root", "ROOT"), ("--root requires a data set's name",)),
        (("dtd", "--root", "ROOT", "--names", "x.tsv"), ("omit --names",)),
    ],
)
def test_wrong_words(
    verb: str,
    words: tuple[str, ...],
    parts: tuple[str, ...],
    ztune: Command,
    root: Path,
    tmp_path: Path,
) -> None:
    own = () if verb == "eval" else ("--out", tmp_path / "out")
    given = [word.replace("ROOT", str(root)) for word in words]
    refused(ztune(verb, MINI, "--data", *given, *own, "--quiet"), *parts)
    assert not (tmp_path / "out").exists()


def test_a_root_without_data(ztune: Command, run: Path, root: Path, tmp_path: Path) -> None:
    given = ("--root", root, "--quiet")
    refused(ztune("tune", MINI, *given, "--out", tmp_path / "x"), "--data is required")
    refused(ztune("eval", MINI, *given), "--data FOLDER or --split-file RUN/split.json is required")
    split = ("--split-file", run / "split.json")
    refused(ztune("eval", MINI, *split, *given), "--root does not apply to --split-file")
    refused(ztune("eval", run, *given), "--root does not apply to a run")
    refused(ztune("tune", "--resume", run, *given), "--root does not apply to --resume")
    assert ztune("compare", MINI, *given, "--out", tmp_path / "x").code == 2


def test_a_name_that_is_a_folder_here(
    ztune: Command, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(root / "dtd" / "images", "dtd")
    for more in ((), ("--root", root)):
        refused(
            ztune("eval", MINI, "--data", "dtd", *more, "--quiet"), 'write "./dtd" for the path'
        )
    scored = ztune("eval", MINI, "--data", "./dtd", "--split", "all", "--json")
    assert scored.json["n"] == 36


def test_a_named_data_set_has_no_nested_folders(ztune: Command, root: Path, tmp_path: Path) -> None:
    words = ("tune", MINI, "--data", "dtd", "--root", root, "--nested", "--out", tmp_path / "run")
    done = ztune(*words)
    assert done.code == 1
    assert done.err.splitlines()[-1] == ('error: data set "dtd" has a known layout; omit --nested')
