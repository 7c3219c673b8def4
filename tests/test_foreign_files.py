"""Data that holds other formats, pipes and devices: every verb refuses them, and none waits."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runtimes.preprocess import read_image_file
from tests.conftest import DIGITS, MINI, Command
from tests.foreign import FOREIGN, NOT_REGULAR
from tests.ztune.test_data_named import parquet_file, png
from ztune.data import parquet
from ztune.errors import DataError

TUNE = ("tune", MINI, "--shots", 8, "--val", 0, "--test-fraction", 0, "--method", "gda")
EVAL = ("eval", MINI, "--split", "all")
_REFUSED = "unknown format (supported: JPEG, MPO, PNG, GIF, BMP, TIFF, WebP, "


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return two classes of eight digits."""
    root = tmp_path / "data"
    for name in ("one", "two"):
        (root / name).mkdir(parents=True)
        for image in sorted((DIGITS / name).iterdir())[:8]:
            shutil.copy(image, root / name)
    return root


@pytest.fixture
def classifier(ztune: Command, data: Path, tmp_path: Path) -> Path:
    out, packed = tmp_path / "run", tmp_path / "classifier.onnx"
    assert ztune(*TUNE, "--data", data, "--out", out).code == 0
    done = ztune("pack", MINI, "--prompt", out / "prompt.safetensors", "--out", packed)
    assert done.code == 0, done.err
    return packed


@pytest.mark.parametrize("kind", sorted(FOREIGN))
def test_tune_and_eval_refuse_other_formats(
    kind: str, ztune: Command, data: Path, tmp_path: Path, listed_decoders: None
) -> None:
    named = sorted((data / "one").iterdir())[0]
    named.write_bytes(FOREIGN[kind])
    out = tmp_path / "out"
    for words in ((*TUNE, "--data", data, "--out", out), (*EVAL, "--data", data)):
        refused = ztune(*words, "--quiet")
        assert refused.code == 1
        assert str(named) in refused.err
        assert _REFUSED in refused.err
        assert len(refused.err.splitlines()) == 1
    shutil.rmtree(out, ignore_errors=True)
    done = ztune(*TUNE, "--data", data, "--out", out, "--skip-broken", "--json")
    assert done.code == 0, done.err
    assert done.json["broken_images"] == 1
    done = ztune(*EVAL, "--data", data, "--skip-broken", "--json")
    assert (done.json["broken_images"], done.json["n"]) == (1, 15)


def test_predict_refuses_other_formats(
    ztune: Command, data: Path, classifier: Path, listed_decoders: None
) -> None:
    for number, content in enumerate(FOREIGN.values()):
        named = data / "one" / f"foreign-{number}.png"
        named.write_bytes(content)
        refused = ztune("predict", classifier, named, "--quiet")
        assert refused.code == 1
        assert str(named) in refused.err
        assert _REFUSED in refused.err
    done = ztune("predict", classifier, data / "one", "--skip-broken", "--json")
    assert done.json["broken_images"] == len(FOREIGN)
    assert len(done.json["predictions"]) == 8


@pytest.mark.parametrize("kind", sorted(FOREIGN))
def test_parquet_files_with_other_formats_are_refused(
    kind: str, tmp_path: Path, listed_decoders: None
) -> None:
    rows = [(png(1), 0), (FOREIGN[kind], 1)]
    parquet_file(tmp_path / "train.parquet", rows)
    with pytest.raises(DataError, match="unknown image format"):
        parquet.extract(parquet.parquet_files(tmp_path), tmp_path / "out")
    # A mark of a known kind before it chooses the suffix, never the decoder.
    parquet_file(tmp_path / "train.parquet", [(png(1), 0), (b"GIF8" + FOREIGN[kind], 1)])
    parquet.extract(parquet.parquet_files(tmp_path), tmp_path / "out")
    with pytest.raises(DataError, match="cannot be read"):
        read_image_file(tmp_path / "out" / "images" / "train" / "00000001.gif")


# In a process of its own, since one that waits for a pipe in a thread has to be killed.


def refused(*words: object) -> str:
    """Return the one line that a command ends with, soon."""
    done = subprocess.run(
        [sys.executable, "-m", "ztune.cli.main", *map(str, words), "--quiet"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("make", NOT_REGULAR)
def test_a_folder_with_pipes_and_devices(
    make: Callable[[Path], None], data: Path, classifier: Path, tmp_path: Path
) -> None:
    make(data / "one" / "odd.png")
    for words in (
        (*TUNE, "--data", data, "--out", tmp_path / "out"),
        (*EVAL, "--data", data),
        ("predict", classifier, data),
        ("predict", classifier, data / "one" / "odd.png"),
    ):
        assert '/odd.png" cannot be read: not a regular file' in refused(*words)


@pytest.mark.parametrize("make", NOT_REGULAR)
def test_a_manifest_that_names_pipes_and_devices(make: Callable[[Path], None], data: Path) -> None:
    make(data / "odd.png")
    rows = [f"{path.relative_to(data)},{path.parent.name}" for path in data.glob("*/*.png")]
    (data / "list.csv").write_text("\n".join(["path,label", *rows, "odd.png,one"]))
    message = refused(*EVAL, "--data", data / "list.csv")
    assert "odd.png" in message


@pytest.mark.parametrize("make", NOT_REGULAR)
def test_names_and_plans_and_classifiers_that_are_none(
    make: Callable[[Path], None], data: Path, tmp_path: Path
) -> None:
    for name in ("list.csv", "plan.toml", "a.onnx", "extractor.onnx"):
        make(tmp_path / name)
    for words in (
        (*EVAL, "--data", tmp_path / "list.csv"),
        ("bench", tmp_path / "plan.toml", "--out", tmp_path / "out"),
        ("predict", tmp_path / "a.onnx", data),
        ("tune", MINI, "--data", data, "--out", tmp_path / "out", "--method", "blackvip",
         "--shots", 2, "--queries", 20, "--set", f"extractor={tmp_path / 'extractor.onnx'}"),
    ):  # fmt: skip
        refused(*words)


def test_a_split_of_devices(data: Path, tmp_path: Path, ztune: Command) -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("this system has no /dev/zero")
    assert ztune(*TUNE, "--data", data, "--out", tmp_path / "run").code == 0
    path = tmp_path / "run" / "split.json"
    split = json.loads(path.read_text())
    split["roots"]["data"] = "/dev"
    for number, entry in enumerate(split["entries"]):
        entry["path"] = ("zero", "random", "tty", "stdin")[number % 4]
        entry["sha256"] = hashlib.sha256(str(number).encode()).hexdigest()
    path.write_text(json.dumps(split))
    message = refused("eval", MINI, "--split-file", path, "--split", "all")
    assert '"/dev/zero" cannot be read (not a regular file)' in message
    message = refused("eval", tmp_path / "run", "--split", "all")
    assert '"/dev/zero" cannot be read (not a regular file)' in message


@pytest.mark.parametrize("make", NOT_REGULAR)
def test_a_run_whose_split_is_none(
    make: Callable[[Path], None], data: Path, tmp_path: Path, ztune: Command
) -> None:
    assert ztune(*TUNE, "--data", data, "--out", tmp_path / "run").code == 0
    (tmp_path / "run" / "split.json").unlink()
    make(tmp_path / "run" / "split.json")
    assert "not a regular file" in refused("eval", tmp_path / "run", "--split", "all")
