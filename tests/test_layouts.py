"""Folders as people keep them: every verb and the face read the same images and classes."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

import ztune as face
from tests.conftest import DIGITS, MINI, Command, Result
from ztune import errors as face_errors

pytestmark = pytest.mark.usefixtures("quick_figures")

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


def every_verb(
    ztune: Command, data: Path, out: Path, *words: object, compare: bool = False
) -> list[Result]:
    """Run tune, bench, eval and, if asked, compare on the data.

    `words` are options, which a plan has as keys.
    """
    plan, more = out / "plan.toml", ""
    out.mkdir()
    for option in words:
        name = str(option).removeprefix("--").replace("-", "_")
        more += 'nested = "leaf"\n' if name == "nested" else f"{name} = true\n"
    plan.write_text(PLAN.format(bundle=MINI, data=data, more=more))
    few = ("--data", data, "--shots", 2, *words)
    done = [
        ztune("tune", MINI, *few, "--method", "zero-shot", "--out", out / "run"),
        ztune("bench", plan, "--out", out / "bench"),
    ]
    if compare:
        seed = ("--seeds", 1, "--out", out / "compare")
        done.append(ztune("compare", MINI, *few, "--methods", "zero-shot", *seed))
    if "--skip-conflicts" not in words:  # scoring needs no rule for them
        done.append(ztune("eval", MINI, "--data", data, "--split", "all", *words))
    return done


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


@pytest.mark.usefixtures("cells_here")
def test_nested_classes(ztune: Command, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for path in ("odd/one", "odd/three", "even/two"):
        digits(data / path, path.rpartition("/")[2], 8)
    for done in every_verb(ztune, data, tmp_path / "refused"):
        assert done.code == 1
        assert "(--nested leaf makes each" in done.err or "(nested=leaf makes each" in done.err
    for done in every_verb(ztune, data, tmp_path / "out", "--nested", compare=True):
        assert done.code == 0, done.err
        assert '3 classes ("one", "three", "two")' in done.err
    assert face.Dataset.from_folder(data, nested="top").classes == ("even", "odd")


def test_images_of_any_ending(ztune: Command, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("one", "two"):
        digits(data / name, name, 8)
        for at, (kind, ending) in enumerate(
            (("JPEG", "jfif"), ("JPEG", "jpe"), ("JPEG", "JPG_original"), ("PNG", ""))
        ):
            file = sorted((data / name).glob("*.png"))[at]
            with Image.open(file, formats=["PNG"]) as image:
                image.save(file.with_suffix(f".{ending}" if ending else ""), kind)
            file.unlink()
        (data / name / "notes.txt").write_text("no image")
    for done in every_verb(ztune, data, tmp_path / "out"):
        assert done.code == 0, done.err
        assert '("one/notes.txt", "two/notes.txt")' in done.err
    run = tmp_path / "out" / "run"
    listed = ["one/notes.txt", "two/notes.txt"]
    assert json.loads((run / "run.json").read_text())["left_out"] == {"ignored": listed}
    assert json.loads((run / "split.json").read_text())["left_out"] == {"ignored": listed}
    done = ztune("eval", MINI, "--data", data, "--split", "all", "--json")
    assert (done.json["n"], done.json["left_out"]["ignored"]) == (16, listed)
    packed = tmp_path / "c.onnx"
    assert ztune("pack", MINI, "--prompt", run, "--out", packed).code == 0
    done = ztune("predict", packed, data, "--json")
    assert len(done.json["predictions"]) == 16
    assert done.json["left_out"]["ignored"] == [str(data / name) for name in listed]
    assert f'files ignored, not images: 2 ("{data / listed[0]}"' in done.err


def heic(path: Path) -> None:
    """Write a HEIC photo that lies on its side, or skip the test."""
    heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 32), (200, 10, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    heif.register_heif_opener()
    image.save(path, "HEIF", exif=exif.tobytes())


def test_heic_with_its_decoder(tmp_path: Path) -> None:
    from runtimes.preprocess import read_image_file

    heic(tmp_path / "photo.jpg")
    assert read_image_file(tmp_path / "photo.jpg").size == (32, 64)


@pytest.mark.parametrize("name", ["photo.heic", "photo.jpg", "photo"])
def test_heic_without_its_decoder(
    ztune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != "HEIF"})
    data = tmp_path / "data"
    for digit in ("one", "two"):
        digits(data / digit, digit, 8)
    (data / "one" / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(16))
    words = ("--data", data, "--shots", 2, "--method", "zero-shot", "--out", tmp_path / "run")
    done = ztune("tune", MINI, *words)
    assert done.code == 1
    assert f'{name}" cannot be read: HEIC needs pillow-heif' in done.err
    assert "pip install '.[heic]'" in done.err
    done = ztune("tune", MINI, *words, "--skip-broken", "--json")
    assert done.json["left_out"] == {"broken": [f"one/{name}"]}


EQUAL = {
    "empty": b"",
    "page": b"<html>404 Not Found</html>",
    "zeros": bytes(300),
    "truncated": (DIGITS / "four" / sorted(p.name for p in (DIGITS / "four").iterdir())[0])
    .read_bytes()[:60],
}  # fmt: skip


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Return a folder with two classes of eight digits."""
    for digit in ("one", "two"):
        digits(tmp_path / "few" / digit, digit, 8)
    return tmp_path / "few"


@pytest.mark.parametrize("content", EQUAL.values(), ids=EQUAL.keys())
@pytest.mark.parametrize("other", ["one", "two"])
def test_equal_broken_files_are_broken_and_no_copies(
    ztune: Command, few: Path, tmp_path: Path, content: bytes, other: str
) -> None:
    names = ["one/a.png", f"{other}/b.png"]
    for name in names:
        (few / name).write_bytes(content)
    (few / "two" / "c.png").write_bytes(b"another")
    words = ("--data", few, "--shots", 2, "--method", "gda", "--out", tmp_path / "run")
    done = ztune("tune", MINI, *words)
    assert done.code == 1
    shown = ", ".join(f'"{few / name}"' for name in [*names, "two/c.png"])
    assert f"3 broken images: {shown}" in done.err
    assert "--skip-broken" in done.err
    done = ztune("tune", MINI, *words, "--skip-broken", "--json")
    assert done.code == 0, done.err
    assert done.json["broken_images"] == 3
    assert done.json["left_out"] == {"broken": [*names, "two/c.png"]}
    with pytest.raises(face_errors.DataError, match="3 broken images"):
        face.Dataset.from_folder(few).split(shots=2)
    train, _ = face.Dataset.from_folder(few).split(shots=2, skip_broken=True)
    assert train.split.left_out.broken == (*names, "two/c.png")


def test_all_broken_images_of_predict_are_named(ztune: Command, few: Path, tmp_path: Path) -> None:
    run, packed = tmp_path / "run", tmp_path / "c.onnx"
    words = ("--data", few, "--shots", 2, "--method", "gda", "--out", run)
    assert ztune("tune", MINI, *words).code == 0
    assert ztune("pack", MINI, "--prompt", run, "--out", packed).code == 0
    broken = [str(few / name) for name in ("one/a.png", "two/b.png")]
    for name, content in zip(broken, (EQUAL["truncated"], b""), strict=True):
        Path(name).write_bytes(content)
    for done in (ztune("predict", packed, few), ztune("eval", packed, "--data", few, *ALL)):
        assert done.code == 1
        assert f'2 broken images: "{broken[0]}", "{broken[1]}"' in done.err
    done = ztune("predict", packed, few, "--skip-broken", "--json")
    assert done.json["left_out"]["broken"] == broken
    done = ztune("eval", MINI, "--data", few, *ALL, "--skip-broken", "--json")
    assert done.json["left_out"]["broken"] == broken
    done = ztune("eval", MINI, "--data", few, *ALL)
    assert f'2 broken images: "{broken[0]}", "{broken[1]}"' in done.err


ALL = ("--split", "all")


@pytest.mark.usefixtures("cells_here")
def test_images_with_two_classes_can_be_left_out(ztune: Command, few: Path, tmp_path: Path) -> None:
    for digit in ("one", "two"):
        digits(few / digit, digit, 8, first=8)
    first, second = (sorted((few / "one").iterdir())[n] for n in (0, 1))
    shutil.copy(first, few / "two" / "x.png")
    shutil.copy(second, few / "two" / "y.png")
    shutil.copy(second, few / "one" / "z.png")
    for done in every_verb(ztune, few, tmp_path / "refused", compare=True)[:3]:
        assert done.code == 1
        assert "the same image has two classes" in done.err
    for done in every_verb(ztune, few, tmp_path / "out", "--skip-conflicts", compare=True):
        assert done.code == 0, done.err
        assert "images with two classes or roles, omitted: 5" in done.err
    document = json.loads((tmp_path / "out" / "run" / "run.json").read_text())
    assert document["left_out"] == {
        "conflicts": [f"one/{first.name}", f"one/{second.name}", "one/z.png", "two/x.png",
                      "two/y.png"]
    }  # fmt: skip
    _, tested = face.Dataset.from_folder(few).split(shots=1, val=0, skip_conflicts=True)
    assert first.read_bytes() not in {path.read_bytes() for path, _ in tested.items}


def saved_again(source: Path, target: Path, **how: object) -> None:
    """Save an image in another file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source, formats=["PNG"]) as image:
        size = how.pop("size", image.size)
        assert isinstance(size, tuple)
        image.resize(size, Image.Resampling.BICUBIC).convert("RGB").save(target, **how)


HOW = {
    "jpeg": {"suffix": ".jpg", "quality": 75},
    "poor jpeg": {"suffix": ".jpg", "quality": 40},
    "larger": {"suffix": ".png", "size": (80, 80)},
    "webp": {"suffix": ".webp", "quality": 80},
    "smaller": {"suffix": ".png", "size": (16, 16)},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW.keys())
def test_near_copies_are_warned_of(ztune: Command, tmp_path: Path, how: dict[str, object]) -> None:
    data, suffix = tmp_path / "data", str(how["suffix"])
    how = {name: value for name, value in how.items() if name != "suffix"}
    for name in ("one", "two"):
        digits(data / "train" / name, name, 8)
        digits(data / "test" / name, name, 8, first=8)
    source = sorted((data / "train" / "two").iterdir())[3]
    copy = data / "test" / "two" / f"again{suffix}"
    saved_again(source, copy, **how)
    pair = f'1 ("test/two/{copy.name} = train/two/{source.name}")'
    words = ("--data", data, "--shots", 8, "--method", "zero-shot", "--quiet")
    done = ztune("tune", MINI, *words, "--out", tmp_path / "run")
    near = f"near copies of training or validation images: {pair}"
    assert f"warning: test images that are {near}" in done.err
    done = ztune("data", "check", data, "--json")
    assert done.code == 0, done.err
    assert done.json["near_copies"] == [[f"test/two/{copy.name}", f"train/two/{source.name}"]]
    with pytest.warns(face_errors.ZtuneWarning, match="near copies"):
        face.Dataset.from_folder(data).split(shots=8, val=0)


def test_different_images_are_no_near_copies(ztune: Command) -> None:
    done = ztune("data", "check", DIGITS, "--json")
    assert done.code == 0, done.err
    assert done.json["near_copies"] == done.json["duplicates"] == []


def test_a_folder_is_checked(ztune: Command, few: Path) -> None:
    some = sorted((few / "one").iterdir())
    shutil.copy(some[0], few / "one" / "same.png")
    shutil.copy(some[1], few / "two" / "other.png")
    for name in ("one/a.png", "two/b.png"):
        (few / name).write_bytes(b"")
    (few / "two" / "c.png").write_bytes(EQUAL["truncated"])
    (few / "two" / "notes.txt").write_text("none")
    (few / "AnnualCrop").mkdir()
    saved_again(some[2], few / "AnnualCrop" / "again.jpg")
    done = ztune("data", "check", few, "--json")
    assert done.code == 1
    assert "3 (" in done.err
    assert "--skip-broken" in done.err
    assert "--skip-conflicts" in done.err
    found = done.json
    assert found["broken"] == ["one/a.png", "two/b.png", "two/c.png"]
    assert found["conflicts"] == [[f"one/{some[1].name}", "two/other.png"]]
    assert found["duplicates"] == [[f"one/{some[0].name}", "one/same.png"]]
    assert found["near_copies"] == [[f"one/{some[2].name}", "AnnualCrop/again.jpg"]]
    assert found["ignored"] == ["two/notes.txt"]
    assert found["classes"]["one"] == {"none": 10}
    assert not found["ok"]
    done = ztune("data", "check", few)
    assert "AnnualCrop" in done.out
    assert 'may not understand: "AnnualCrop" (give plain ones with --names' in done.err


def test_unclear_class_names_are_pointed_out_by_every_verb(ztune: Command, tmp_path: Path) -> None:
    data = tmp_path / "data"
    digits(data / "AnnualCrop", "one", 8)
    digits(data / "n01440764", "two", 8)
    for done in every_verb(ztune, data, tmp_path / "out"):
        assert done.code == 0, done.err
        assert 'may not understand: "AnnualCrop", "n01440764" (give plain ones with ' in done.err


def test_broken_test_images_do_not_lower_the_shots(ztune: Command, tmp_path: Path) -> None:
    """They have the paths of good training images, below another root."""
    train, tested = tmp_path / "train", tmp_path / "tested"
    for digit in ("one", "two"):
        digits(train / digit, digit, 2)
        digits(tested / digit, digit, 3, first=10)
        name = next((train / digit).iterdir()).name
        (tested / digit / name).write_bytes(b"broken")
    words = ("--data", train, "--test-data", tested, "--skip-broken", "--method", "zero-shot")
    done = ztune("tune", MINI, *words, "--shots", 3, "--out", tmp_path / "run")
    assert done.code == 1
    assert "has 2 training images, expected at least 3" in done.err


@pytest.mark.usefixtures("cells_here")
def test_comparisons_list_all_files_that_they_leave_out(
    ztune: Command, few: Path, tmp_path: Path
) -> None:
    """Those that do not start as images, and those that are found broken while encoding."""
    one, two, *_ = sorted((few / "one").iterdir())
    for role, digit in (("train", "one"), ("train", "two"), ("test", "one"), ("test", "two")):
        digits(tmp_path / "all" / role / digit, digit, 6, first=6 * (role == "test"))
    data = tmp_path / "all"
    (data / "train" / "one" / "empty.png").touch()
    for name in ("train/one/cut.png", "test/two/cut.png"):
        (data / name).write_bytes(one.read_bytes()[:200] + name.encode())
    shutil.copy(data / "train" / "one" / two.name, data / "train" / "two" / "both.png")
    shutil.copy(data / "test" / "one" / LAST, data / "test" / "one" / "same.png")
    (data / "train" / "one" / "notes.txt").touch()
    expected = {
        "ignored": ["train/one/notes.txt"],
        "broken": ["train/one/empty.png", "train/one/cut.png", "test/two/cut.png"],
        "conflicts": [f"train/one/{two.name}", "train/two/both.png"],
        "duplicates": ["test/one/same.png"],
    }

    def listed(found: dict[str, list[str]]) -> dict[str, list[str]]:
        return {reason: sorted(paths) for reason, paths in found.items()}

    plan = tmp_path / "plan.toml"
    more = "skip_broken = true\nskip_conflicts = true\nval = 4"
    plan.write_text(PLAN.format(bundle=MINI, data=data, more=more))
    bench = ("bench", plan, "--out", tmp_path / "bench", "--json")
    words = ("--data", data, "--shots", 2, "--val", 4, "--seeds", 1, "--methods", "zero-shot")
    skip = ("--skip-broken", "--skip-conflicts", "--out", tmp_path / "compare", "--json")
    for done in (ztune(*bench), ztune(*bench, "--resume")):
        assert done.code == 0, done.err
        assert listed(done.json["left_out"]["photos"]) == listed(expected)
    done = ztune("compare", MINI, *words, *skip)
    assert done.code == 0, done.err
    assert listed(done.json["left_out"]) == listed(expected)
    assert json.loads((tmp_path / "compare" / "compare.json").read_text()) == done.json


LAST = sorted(path.name for path in (DIGITS / "one").iterdir())[11]


def test_ignored_files_of_test_data_are_counted(ztune: Command, few: Path, tmp_path: Path) -> None:
    for digit in ("one", "two"):
        digits(tmp_path / "tested" / digit, digit, 3, first=10)
        (tmp_path / "tested" / digit / "raw.cr2").write_bytes(b"II*\0")
    words = ("--data", few, "--test-data", tmp_path / "tested", "--shots", 2)
    done = ztune("tune", MINI, *words, "--method", "zero-shot", "--out", tmp_path / "run", "--json")
    listed = ["one/raw.cr2", "two/raw.cr2"]
    assert (
        'files of --test-data ignored, not images of a class: 2 ("one/raw.cr2", "two/raw.cr2")'
        in done.err
    )
    assert done.json["left_out"] == {"ignored": listed}


@pytest.mark.usefixtures("cells_here")
@pytest.mark.skipif(sys.platform != "linux", reason="file names that are not UTF-8")
def test_an_ignored_file_may_have_any_name(ztune: Command, few: Path, tmp_path: Path) -> None:
    name = b"caf\xe9\n.txt"
    Path(os.fsdecode(bytes(few / "one") + b"/" + name)).touch()
    shown = r"one/caf\udce9\n.txt"
    for done in every_verb(ztune, few, tmp_path / "out", compare=True):
        assert done.code == 0, done.err
        assert f'1 ("{shown}")' in done.err
    document = json.loads((tmp_path / "out" / "run" / "run.json").read_text())
    assert document["left_out"] == {"ignored": [shown.replace(r"\n", "\n")]}
    assert ztune("eval", tmp_path / "out" / "run", "--split", "all").code == 0
    done = ztune("data", "check", few, "--json")
    assert done.json["ignored"] == document["left_out"]["ignored"]


def test_an_error_shows_the_line_breaks_of_a_file_name(ztune: Command, few: Path) -> None:
    (few / "one" / "a \n b.png").touch()
    done = ztune("data", "check", few)
    assert f'image "{few}/one/a \\n b.png" cannot be read: the file is empty' in done.err
    assert len(done.err.splitlines()) == 1


def test_images_above_the_limit_are_called_large(
    ztune: Command, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = ztune("data", "check", few, "--max-pixels", 100)
    assert checked.code == 1
    assert "expected at most 100 (scale it down, or allow more: --max-pixels" in checked.err
    assert "ZTUNE_MAX_PIXELS" not in os.environ
    monkeypatch.setenv("ZTUNE_MAX_PIXELS", "many")
    wrong = ztune("data", "check", few)
    assert wrong.err.splitlines()[-1].startswith("error: --max-pixels (ZTUNE_MAX_PIXELS) is 'many'")
