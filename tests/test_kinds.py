"""One thing named where another is meant: what it is, what was expected, and what to do."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import ztune as face
from tests.conftest import DIGITS, FEW_DIGITS, MINI, Command, Result
from ztune.cli.main import main
from ztune.errors import FormatError
from ztune.io.kinds import kind_of

pytestmark = pytest.mark.usefixtures("quick_figures")

IMAGE = next((DIGITS / "seven").iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run in a folder whose name a shell would take apart."""
    out = tmp_path_factory.mktemp("kinds") / "my run's"
    words = ["tune", MINI, "--data", FEW_DIGITS, "--shots", "2", "--queries", "10", "--out", out]
    assert main([*map(str, words), "--quiet"]) == 0
    return out


def told(result: Result, *parts: str) -> None:
    assert result.code == 1, result.err
    line = result.err.splitlines()[-1]
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ("predict", MINI, IMAGE),
            ("is a bundle, expected a classifier.onnx", "ztune pack {MINI} --prompt RUN --out"),
        ),
        (
            ("predict", "RUN", IMAGE),
            ("is a run, expected a classifier.onnx", "ztune pack BUNDLE --prompt {RUN} --out"),
        ),
        (("predict", "ARTIFACT", IMAGE), ("is an artifact, expected a classifier.onnx",)),
        (("predict", DIGITS, IMAGE), ("is a folder, expected a classifier.onnx", "ztune pack")),
        (("predict", "nowhere", IMAGE), ('"nowhere" does not exist', "ztune pack BUNDLE")),
        (
            ("pack", "RUN", "--prompt", "RUN", "--out", "x"),
            ("is a run, expected a bundle", "ztune tune --resume {RUN}"),
        ),
        (
            ("pack", MINI, "--prompt", MINI, "--out", "x"),
            ("is a bundle, expected a run or its prompt.safetensors", "ztune tune {MINI} --data"),
        ),
        (("pack", MINI, "--prompt", "PACKED", "--out", "x"), ("is an ONNX file, expected a run",)),
        (("pack", MINI, "--prompt", DIGITS, "--out", "x"), ("is a folder without run.json",)),
        (("pack", MINI, "--prompt", "nowhere", "--out", "x"), ('"nowhere" does not exist',)),
        (("eval", "ARTIFACT"), ("is an artifact", "ztune eval BUNDLE --data FOLDER --prompt")),
        (("eval", DIGITS), ("is a folder without run.json and bundle.json, expected a run, a",)),
        (("eval", "nowhere"), ('"nowhere" does not exist, expected a run, a bundle or a',)),
        (("export-triton", "RUN", "--out", "x"), ("is a run, expected a bundle",)),
        (("quantize", "RUN", "--out", "x"), ("is a run, expected a bundle",)),
        (("quantize", "PACKED", "--out", "x"), ("is an ONNX file", "ztune predict {PACKED}")),
        (("tune", "RUN", "--data", FEW_DIGITS, "--out", "x"), ("is a run, expected a bundle",)),
        (("compare", "RUN", "--data", FEW_DIGITS, "--out", "x"), ("is a run, expected a bundle",)),
        (("doctor", "ARTIFACT"), ("is an artifact, expected a bundle", "it was tuned on")),
        (("tune", "--resume", MINI), ("is a bundle, expected a run", "ztune tune {MINI} --data")),
        (("tune", "--resume", "ARTIFACT"), ("is an artifact, expected a run", "folder of its run")),
        (("tune", "--resume", "nowhere"), ('"nowhere" does not exist, expected a run',)),
        (("tune", MINI, "--data", "RUN", "--out", "x"), ("is a run, expected root/class/",)),
        (("tune", MINI, "--data", MINI, "--out", "x"), ("is a bundle, expected root/class/",)),
    ],
)
def test_one_thing_in_the_place_of_another(
    words: tuple[object, ...],
    parts: tuple[str, ...],
    ztune: Command,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = run.parent / "c.onnx"
    if "PACKED" in words:
        assert ztune("pack", MINI, "--prompt", run, "--out", packed, "--force").code == 0
    stand_in = {"RUN": run, "ARTIFACT": run / "prompt.safetensors", "PACKED": packed}
    named = {**stand_in, "MINI": MINI}
    monkeypatch.chdir(tmp_path)
    shown = {name: shlex.quote(str(path)) for name, path in named.items()}
    told(
        ztune(*(stand_in.get(str(word), word) for word in words), "--quiet"),
        *(part.format(**shown) for part in parts),
    )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("place", "suggested"),
    [
        ("host:8001/mini", "triton://host:8001/mini for gRPC, http://host:8001/mini for HTTP"),
        ("localhost:8000", "triton://localhost:8000/NAME"),
        ("10.0.0.7:8001/mini/2", "triton://10.0.0.7:8001/mini/2"),
        ("[::1]:8001/mini", "triton://[::1]:8001/mini"),
    ],
)
def test_an_address_without_its_scheme(place: str, suggested: str, ztune: Command) -> None:
    data = ("--data", FEW_DIGITS)
    for words in (("doctor", place), ("eval", place, *data), ("tune", place, *data, "--out", "x")):
        told(ztune(*words), "does not exist", "for a server add a scheme", suggested)
    with pytest.raises(FormatError, match=re.escape(suggested)):
        face.load(place)


@pytest.mark.parametrize(
    "url", ["tirton://host:8001/mini", "triton:/host:8001/mini", "triton:host:8001/mini"]
)
def test_a_scheme_with_a_slip(url: str, ztune: Command) -> None:
    for words in (("doctor", url), ("eval", url, "--data", FEW_DIGITS)):
        told(ztune(*words), f'"{url}", expected one of triton://, tritons://, http://')


def test_what_only_looks_like_an_address_is_a_path(tmp_path: Path) -> None:
    for name in ("a:b/c", "host:800100", "triton"):
        with pytest.raises(FormatError, match=r"does not exist, expected a bundle \(make one with"):
            face.load(tmp_path / name)
    there = tmp_path / "host:8001"
    there.mkdir()
    with pytest.raises(FormatError, match=r"is a folder without bundle\.json"):
        face.load(there)


def test_a_run_stands_for_its_artifact(ztune: Command, run: Path, tmp_path: Path) -> None:
    for name, given in (("a", run), ("b", run / "prompt.safetensors")):
        assert ztune("pack", MINI, "--prompt", given, "--out", tmp_path / name).code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    scored = ("eval", MINI, "--data", FEW_DIGITS, "--split", "all", "--json", "--prompt")
    assert ztune(*scored, run).json == ztune(*scored, run / "prompt.safetensors").json
    by_split = ztune("eval", MINI, "--split-file", run, "--json")
    assert by_split.json == ztune("eval", MINI, "--split-file", run / "split.json", "--json").json
    with face.load(MINI, provider="cpu") as model:
        fitted = face.FewShotClassifier(model).load_artifact(run)
        assert len(fitted.classes_) == 10


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("running", "is not finished and has no prompt.safetensors yet (resume with: ztune tune"),
        ("refused", "was refused before its first step"),
        (None, "is not finished"),
    ],
)
def test_a_run_without_an_artifact(
    status: str | None, said: str, ztune: Command, run: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other run"))
    document = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**document, "status": status}))
    result = ztune("pack", MINI, "--prompt", other, "--out", tmp_path / "c.onnx")
    told(result, said)
    if status == "running":
        assert f"--resume {shlex.quote(str(other))})" in result.err
    assert not (tmp_path / "c.onnx").exists()


def test_the_library_says_the_same(run: Path) -> None:
    with pytest.raises(FormatError, match=r"is a run, expected a bundle \(give the bundle"):
        face.load(run)
    with pytest.raises(FormatError, match=r"is a bundle, expected a classifier\.onnx \(make one"):
        face.load_classifier(MINI)
    with (
        face.load(MINI, provider="cpu") as model,
        pytest.raises(FormatError, match=r"is a bundle, expected a run or its prompt\.safetensors"),
    ):
        face.FewShotClassifier(model).load_artifact(MINI)


def test_kinds_are_told_by_files_names(run: Path, tmp_path: Path) -> None:
    for name, kind in (("results.sqlite", "bench"), ("compare.json", "comparison")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).touch()
        assert kind_of(tmp_path / kind) == kind
    assert kind_of(run) == "run"
    assert kind_of(MINI) == "bundle"
    assert kind_of(tmp_path) == "folder"
    assert kind_of(run / "run.json") == "file"
