"""Results say how many images each rule of docs/images.md changed."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ztune as library
from runtimes.conversions import CONVERSIONS
from tests.conftest import DIGITS, MINI, Command
from ztune.errors import ZtuneWarning

EXPECTED = {"alpha": 1, "orientation": 1, "first_frame": 1, "grey_12_bit": 1}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of three classes with four images each, four of which are converted."""
    for name in ("one", "two", "three"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for image in sorted((DIGITS / name).iterdir())[:4]:
            shutil.copy(image, tmp_path / "photos" / name)
    changed = sorted((tmp_path / "photos" / "one").iterdir())
    digits = [Image.open(path).convert("L") for path in changed]
    digits[0].convert("LA").save(changed[0])
    exif = Image.Exif()
    exif[0x0112] = 3
    digits[1].save(changed[1], exif=exif)
    digits[2].save(changed[2], save_all=True, append_images=[digits[2].rotate(90)])
    Image.fromarray(np.asarray(digits[3]).astype(np.uint16) * 16).save(changed[3])
    return tmp_path / "photos"


def test_every_verb_counts_conversions(ztune: Command, photos: Path, tmp_path: Path) -> None:
    out, packed = tmp_path / "run", tmp_path / "c.onnx"
    tune = ("tune", MINI, "--data", photos, "--shots", 4, "--val", 0, "--test-fraction", 0)
    line = (
        r": 1 with transparency \(ignored\), 1 with EXIF orientation \(applied\), 1 with several "
        r"frames or pages \(first one used\), 1 with 12-bit levels in 16 bits \(scaled\)"
    )
    for again in (("--out", out), ("--out", tmp_path / "other", "--cache", out / "features")):
        done = ztune(*tune, "--method", "gda", *again)
        assert done.code == 0, done.err
        assert re.search(f"training images{line}", done.err), done.err
        assert "warning: training images: 1 in 16-bit greyscale without" in done.err
        assert json.loads((again[1] / "run.json").read_text())["conversions"] == EXPECTED
    score = ztune("eval", MINI, "--data", photos, "--split", "all", "--json")
    assert score.json["conversions"] == EXPECTED
    assert re.search(f"images{line}", score.err)
    assert ztune("pack", MINI, "--prompt", out, "--out", packed).code == 0
    score = ztune("eval", packed, "--data", photos, "--split", "all", "--json")
    assert score.json["conversions"] == EXPECTED
    said = ztune("predict", packed, photos, "--json")
    assert said.json["conversions"] == EXPECTED
    assert re.search(f"images{line}", said.err)
    plain = ztune("predict", packed, photos / "two", "--json")
    assert plain.json["conversions"] == {}
    assert "converted" not in plain.err
    quiet = ztune("predict", packed, photos, "--quiet", "--json")
    assert quiet.err.startswith("warning: images: 1 in 16-bit greyscale without")
    assert len(quiet.err.splitlines()) == 1


def test_a_comparison_counts_conversions(ztune: Command, photos: Path, tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / "tested" / name).mkdir(parents=True)
        for image in sorted((DIGITS / name).iterdir())[4:6]:
            Image.open(image).convert("LA").save(tmp_path / "tested" / name / image.name)
    words = ("--data", photos, "--test-data", tmp_path / "tested", "--shots", 4, "--val", 0)
    methods = ("--methods", "gda", "--seeds", 1, "--out", tmp_path / "compare", "--json")
    done = ztune("compare", MINI, *words, *methods)
    assert done.code == 0, done.err
    (cell,) = done.json["cells"]
    assert (cell["conversions"], cell["test_conversions"]) == (EXPECTED, {"alpha": 6})


def test_python_warns_of_guessed_bits(photos: Path) -> None:
    path = sorted((photos / "one").iterdir())[3]
    guessed = pytest.warns(ZtuneWarning, match=r"images: 1 in 16-bit greyscale")
    with library.load(MINI, provider="cpu") as model:
        with guessed:
            from_file = model.encode_images([path])
        with guessed, Image.open(path) as image:
            np.testing.assert_array_equal(model.encode_images([image]), from_file)
        with guessed, Image.open(path) as image:
            library.Dataset.from_arrays([image, np.zeros((4, 4, 3), np.uint8)], ["a", "b"])


def test_the_page_names_every_conversion() -> None:
    page = (Path(__file__).parent.parent / "docs" / "images.md").read_text()
    named = re.findall(r"\| `(\w+)` \|$", page, re.MULTILINE)
    assert sorted(named) == sorted(["conversions", *CONVERSIONS])
