"""One rule says which images train, validate and test, in every verb and in the face."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import ztune as face
from tests.conftest import DIGITS, MINI, Command
from ztune.data import splitter
from ztune.data.coop import CoopSplit, Item, write_split
from ztune.data.split import Split
from ztune.io.files import read_json

pytestmark = pytest.mark.usefixtures("quick_figures")

CLASSES = ("one", "seven", "two")
SHOTS, SEED = 4, 2

# Of the images that train and validate in their order, and of those that test.
TABLE = {
    "own": ("hash", "96db804a426d", "3d8006be8d7f"),
    "named": ("coop", "4f5b1d734884", "56b030acd68b"),
    "own, all": ("hash", "a631caca9dd7", "3d8006be8d7f"),
    "named, all": ("coop", "a789c933cb39", "56b030acd68b"),
}
PLAN = """
seeds = [2]
[models]
mini = "{bundle}"
[data]
{data}
[methods]
zero-shot = {{}}
[[protocols]]
kind = "few-shot"
shots = [4]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 40 digits of three classes: one's own, and a data set by its name."""
    root = tmp_path_factory.mktemp("data")
    images = {name: sorted((DIGITS / name).iterdir())[:40] for name in CLASSES}
    lists: dict[str, list[Item]] = {"train": [], "val": [], "test": []}
    for label, (name, files) in enumerate(images.items()):
        for folder in (root / "own" / name, root / "dtd" / "images" / name):
            folder.mkdir(parents=True)
            for file in files:
                shutil.copy(file, folder)
        for place, file in enumerate(files):
            role = "train" if place < 20 else "val" if place < 28 else "test"
            lists[role].append(Item(f"{name}/{file.name}", label, name))
    split = CoopSplit(tuple(lists["train"]), tuple(lists["val"]), tuple(lists["test"]))
    write_split(root / "dtd" / "split_zhou_DescribableTextures.json", split)
    return root


@pytest.fixture(params=["own", "named"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Words = tuple[object, ...]


@pytest.fixture
def data(root: Path, kind: str) -> Words:
    """Return the options that name the data."""
    return ("--data", root / "own") if kind == "own" else ("--data", "dtd", "--root", root)


def row(tuned: Split, tested: Split) -> tuple[str, str, str]:
    """Return the table's row of what a verb drew."""
    drawn = [
        (entry.role, tuned.classes[entry.label], entry.sha256)
        for entry in tuned.entries
        if entry.role != "test"
    ]
    kept = sorted(
        (tested.classes[entry.label], entry.sha256) for entry in tested.entries_of("test")
    )
    of_drawn, of_kept = (
        hashlib.sha256(json.dumps(part).encode()).hexdigest()[:12] for part in (drawn, kept)
    )
    return tuned.sampler, of_drawn, of_kept


def read(path: Path) -> Split:
    return Split.from_json(read_json(path, "split"), str(path))


def test_tune_and_eval(ztune: Command, data: Words, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--method", "zero-shot", "--shots", SHOTS, "--seed", SEED, "--out", out)
    done = ztune("tune", MINI, *data, *words)
    assert done.code == 0, done.err
    split = read(out / "split.json")
    assert row(split, split) == TABLE[kind]
    assert f"drawn by {TABLE[kind][0]}" in done.err
    assert ztune("eval", out, "--json").json["n"] == len(split.entries_of("test"))


def test_all_images(ztune: Command, root: Path, data: Words, kind: str, tmp_path: Path) -> None:
    asked = () if kind == "own" else ("--shots", "all")  # with 40 images a class is tested
    words = (*asked, "--seed", SEED, "--method", "zero-shot", "--out", tmp_path / "run")
    done = ztune("tune", MINI, *data, *words)
    assert done.code == 0, done.err
    split = read(tmp_path / "run" / "split.json")
    assert row(split, split) == TABLE[f"{kind}, all"]
    train, _ = dataset(root, kind).split("all", seed=SEED)
    assert row(train.split, train.split) == TABLE[f"{kind}, all"]


def test_the_default_number_of_shots(
    ztune: Command, root: Path, data: Words, kind: str, tmp_path: Path
) -> None:
    assert ztune("tune", MINI, *data, "--method", "gda", "--out", tmp_path / "run").code == 0
    settings = read(tmp_path / "run" / "split.json").settings
    train, _ = dataset(root, kind).split()
    assert settings == train.split.settings
    assert settings is not None
    assert settings.shots == ("all" if kind == "own" else 16)


@pytest.mark.usefixtures("cells_here")
def test_compare(ztune: Command, data: Words, kind: str, tmp_path: Path) -> None:
    words = ("--methods", "zero-shot", "--shots", SHOTS, "--seeds", SEED, "--out", tmp_path / "out")
    done = ztune("compare", MINI, *data, *words)
    assert done.code == 0, done.err
    assert f"drawn by {TABLE[kind][0]}" in done.err
    (tested,) = (tmp_path / "out" / "splits").iterdir()
    (tuned,) = (tmp_path / "out" / "runs").rglob("split.json")
    assert row(read(tuned), read(tested)) == TABLE[kind]


def test_bench(ztune: Command, root: Path, kind: str, tmp_path: Path) -> None:
    entry = f'own = {{ path = "{root / "own"}" }}' if kind == "own" else "dtd = {}"
    plan, out = tmp_path / "plan.toml", tmp_path / "out"
    plan.write_text(PLAN.format(bundle=MINI, data=entry))
    done = ztune("bench", plan, "--root", root, "--out", out)
    assert done.code == 0, done.err
    (tested,) = (out / "splits").iterdir()
    (tuned,) = (out / "runs").rglob("split.json")
    assert row(read(tuned), read(tested)) == TABLE[kind]
    assert f"drawn by {TABLE[kind][0]}" in done.err


def test_doctor(
    ztune: Command, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Split] = []

    def spy(make: Callable[..., Split]) -> Callable[..., Split]:
        def wrapped(*words: object, **options: object) -> Split:
            drawn.append(make(*words, **options))
            return drawn[-1]

        return wrapped

    monkeypatch.setattr("ztune.starting.make_split", spy(splitter.make_split))
    done = ztune("doctor", MINI, "--data", root / "own", "--shots", SHOTS, "--seed", SEED)
    assert done.code == 0, done.err
    assert {row(split, split) for split in drawn} == {TABLE["own"]}


def dataset(root: Path, kind: str) -> face.Dataset:
    own = face.Dataset.from_folder
    return own(root / "own") if kind == "own" else face.Dataset.named("dtd", root)


def test_the_face(root: Path, kind: str) -> None:
    train, test = dataset(root, kind).split(shots=SHOTS, seed=SEED)
    assert row(train.split, train.split) == TABLE[kind]
    assert sorted(digest for _, digest in test.items) == sorted(
        entry.sha256 for entry in train.split.entries_of("test")
    )
