"""Images of a run that lie elsewhere by now."""

import json
import shutil
from pathlib import Path

import pytest

import ztune as face
from tests.conftest import DIGITS, MINI, Command, Result
from ztune.cli.main import main
from ztune.loop import Tuning
from ztune.run import RunFolder

WORDS = ("--shots", 2, "--queries", 30, "--method", "zip", "--quiet")


def told(result: Result, *parts: str) -> None:
    assert result.code == 1, result.err
    line = result.err.splitlines()[-1]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, line


def digits(root: Path, first: int, n: int) -> Path:
    for name in ("one", "two", "three"):
        (root / name).mkdir(parents=True)
        for image in sorted((DIGITS / name).iterdir())[first : first + n]:
            shutil.copy(image, root / name)
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data, test data, and a run on each of them and on both."""
    root = tmp_path_factory.mktemp("moved")
    data, test = digits(root / "data", 0, 12), digits(root / "test", 20, 3)
    lines = [f"{p.relative_to(data).as_posix()},{p.parent.name}" for p in data.rglob("*.*")]
    (data / "list.csv").write_text("\n".join(["path,label", *sorted(lines)]))
    for name, given in (("plain", ()), ("two", ("--test-data", test))):
        words = ("tune", MINI, "--data", data, *WORDS, *given, "--out", root / name)
        assert main([str(word) for word in words]) == 0
    return root


def test_a_run_is_scored_where_its_images_are_now(ztune: Command, made: Path) -> None:
    at_home = ztune("eval", made / "plain", "--json").json
    away = made.with_name("away")
    made.rename(away)
    try:
        run, data = away / "plain", away / "data"
        told(
            ztune("eval", run),
            f'"{made / "data"}', "cannot be read", "image(s) in total", "name their new folder",
            "with --data or --test-data",
        )  # fmt: skip
        for given in (data, data / "list.csv", away / "plain" / ".." / "data", away):
            found = ztune("eval", run, "--data", given, "--json")
            assert found.code == 0, found.err
            assert found.json == {**at_home, "run": str(run)}
        by_split = ("--split-file", run / "split.json", "--data", data, "--json")
        assert ztune("eval", MINI, *by_split).json["n"] == at_home["n"]
        told(ztune("eval", run, "--data", away / "no"), "--data", '/no" does not exist')
        told(ztune("eval", run, "--data", run), "17 of 17", "ztune eval BUNDLE --data FOLDER")
        told(
            ztune("eval", run, "--data", data, "--test-data", away / "test"),
            "the run has no separate folder of test images: omit --test-data",
        )
        told(
            ztune("eval", MINI, "--data", data, "--test-data", data), "--test-data applies only to"
        )
        told(ztune("eval", away / "two"), f'"{made / "test"}', "9 of 9")
        assert ztune("eval", away / "two", "--test-data", away / "test").code == 0
        assert ztune("eval", away / "two", "--split", "all").code == 1
        both = ("--data", data, "--test-data", away / "test")
        assert ztune("eval", away / "two", "--split", "all", *both).code == 0
        # Nothing of it is kept.
        told(ztune("eval", run), "cannot be read")
    finally:
        away.rename(made)


def test_images_that_are_missing_or_changed(ztune: Command, made: Path, tmp_path: Path) -> None:
    split = json.loads((made / "plain" / "split.json").read_text())
    first, second = [entry["path"] for entry in split["entries"] if entry["role"] == "test"][:2]
    other = Path(shutil.copytree(made / "data", tmp_path / "other"))
    (other / second).unlink()
    told(ztune("eval", made / "plain", "--data", other), f'{other / second}" cannot', "1 of 17")
    shutil.copy(next((DIGITS / "nine").iterdir()), other / first)
    told(ztune("eval", made / "plain", "--data", other), f'{other / first}" has chan', "2 of 17")


def stopped(ztune: Command, words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune until the first step is saved, and no further."""

    def stop(folder: RunFolder, tuning: Tuning) -> None:
        save(folder, tuning)
        raise KeyboardInterrupt

    save = RunFolder.save
    with monkeypatch.context() as patched:
        patched.setattr("ztune.run.SaveSchedule.due", lambda _: True)
        patched.setattr(RunFolder, "save", stop)
        assert ztune(*words).code == 130


def test_a_run_goes_on_where_its_images_are_now(
    ztune: Command, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = digits(tmp_path / "old", 0, 12), tmp_path / "new place"
    out = tmp_path / "run"
    stopped(ztune, ("tune", MINI, "--data", old, *WORDS, "--out", out), monkeypatch)
    old.rename(new)
    resume = ("tune", "--resume", out, "--quiet")
    told(ztune(*resume), "cannot be read", "with --data")
    told(ztune(*resume, "--data", tmp_path), "cannot be read", "with --data")
    told(ztune(*resume, "--shots", 3), "--shots does not apply to --resume")
    done = ztune(*resume, "--data", new)
    assert done.code == 0, done.err
    name = "prompt.safetensors"
    assert (out / name).read_bytes() == (made / "plain" / name).read_bytes()
    assert ztune("eval", out).code == 0  # the run has kept where they are


def test_a_fit_goes_on_where_its_images_are_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, out = digits(tmp_path / "old", 0, 12), tmp_path / "new", tmp_path / "run"
    model = face.load(MINI, provider="cpu")

    def fit(data: Path) -> face.FewShotClassifier:
        train, _ = face.Dataset.from_folder(data).split(shots=2, seed=1)
        return face.FewShotClassifier(model, method="zip", queries=30).fit(train, run_dir=out)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "keep", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(old)
    old.rename(new)
    assert fit(new).score(face.Dataset.from_folder(new).split(shots=2, seed=1)[1]) > 0
    assert str(new) in (out / "split.json").read_text()
