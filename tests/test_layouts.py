"""Folders as people keep them: every verb and the face read the same images and classes."""

import shutil
from pathlib import Path

import pytest

import ztune as face
from tests.conftest import DIGITS, MINI, Command, Result

PLAN = """
seeds = [1]
[models]
mini = "{bundle}"
[data.photos]
path = "{data}"
{more}
[methods]
zero-shot = {{}}
[[protocols]]
kind = "few-shot"
shots = [2]
"""


def digits(folder: Path, digit: str, n: int, first: int = 0) -> None:
    """Copy some digits into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for image in sorted((DIGITS / digit).iterdir())[first : first + n]:
        shutil.copy(image, folder)


def every_verb(ztune: Command, data: Path, out: Path, *words: object) -> list[Result]:
    """Run tune, compare, eval and bench on the data; `words` are options of all but bench."""
    plan, more = out / "plan.toml", ""
    out.mkdir()
    for option in words:
        name = str(option).removeprefix("--").replace("-", "_")
        more += 'nested = "leaf"\n' if name == "nested" else f"{name} = true\n"
    plan.write_text(PLAN.format(bundle=MINI, data=data, more=more))
    few = ("--data", data, "--shots", 2, *words)
    return [
        ztune("tune", MINI, *few, "--method", "zero-shot", "--out", out / "run"),
        ztune("compare", MINI, *few, "--methods", "zero-shot", "--seeds", 1, "--out", out / "c"),
        ztune("bench", plan, "--out", out / "bench"),
        ztune("eval", MINI, "--data", data, "--split", "all", *words),
    ]


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("training_set", "TEST")])
def test_splits_of_any_spelling_and_class_names_that_are_shown(
    ztune: Command, tmp_path: Path, train: str, test: str
) -> None:
    data = tmp_path / "data"
    for name in ("one", "two"):
        digits(data / train / name, name, 4)
        digits(data / test / name, name, 3, first=4)
    for done in every_verb(ztune, data, tmp_path / "out"):
        assert done.code == 0, done.err
        assert '2 classes ("one", "two")' in done.err
    _, tested = face.Dataset.from_folder(data).split(shots=2)
    assert len(tested) == 6


def test_nested_classes(ztune: Command, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for path in ("odd/one", "odd/three", "even/two"):
        digits(data / path, path.rpartition("/")[2], 8)
    for done in every_verb(ztune, data, tmp_path / "refused"):
        assert done.code == 1
        assert "(--nested leaf makes each" in done.err or "(nested=leaf makes each" in done.err
    for done in every_verb(ztune, data, tmp_path / "out", "--nested"):
        assert done.code == 0, done.err
        assert '3 classes ("one", "three", "two")' in done.err
    assert face.Dataset.from_folder(data, nested="top").classes == ("even", "odd")
