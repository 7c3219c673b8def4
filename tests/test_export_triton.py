"""`ztune export-triton` and `ztune export --client`, and what a person types wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtimes.bundle import load_bundle
from tests.conftest import DIGITS, MINI, ROOT, Command, Result
from ztune.errors import FormatError


def refused(result: Result, *parts: str) -> None:
    assert result.code == 1, (result.out, result.err)
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert part in result.err


@pytest.fixture
def half(ztune: Command, tmp_path: Path) -> Path:
    out = tmp_path / "half"
    assert ztune("export", "--client", MINI, "--out", out).code == 0
    return out


def test_a_repository_says_what_it_holds(ztune: Command, tmp_path: Path) -> None:
    out = tmp_path / "a folder"
    made = ztune("export-triton", MINI, "--out", out)
    assert made.code == 0, made.err
    assert [line.split(":")[0] for line in made.err.splitlines()] == [
        f"mini_{part}" for part in ("image", "text", "prompt", "score", "client")
    ]
    lines = made.out.splitlines()
    assert lines[0].split() == ["model", "bytes"]
    sizes = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in lines[1:-1]}
    assert sizes == {
        folder.name: sum(path.stat().st_size for path in folder.rglob("*.*") if path.is_file())
        for folder in out.iterdir()
    }
    assert sizes["mini_client"] > sum(
        (MINI / name).stat().st_size for name in load_bundle(MINI).client_files
    )
    assert lines[-1] == f"start it with: tritonserver --model-repository='{out}'"


def test_options_reach_the_configurations(ztune: Command, tmp_path: Path) -> None:
    out = tmp_path / "repository"
    made = ztune(
        "export-triton", MINI, "--name", "eyes", "--backend", "python", "--accelerator", "cuda",
        "--instances", 2, "--threads", 3, "--access", "losses", "--out", out,
        "--json", "--quiet",
    )  # fmt: skip
    assert (made.code, made.err) == (0, "")
    assert list(made.json["models"]) == ["eyes_image", "eyes_score", "eyes_client"]
    assert all(model["bytes"] > 0 for model in made.json["models"].values())
    bundle = load_bundle(MINI)
    rest = {key: value for key, value in made.json.items() if key != "models"}
    assert rest == {
        "repository": str(out),
        "bundle_digest": bundle.digest,
        "model_id": bundle.model_id,
        "precision": "fp32",
        "backend": "python",
        "accelerator": "cuda",
        "access": "losses",
    }
    config = (out / "eyes_image" / "config.pbtxt").read_text()
    for words in ('backend: "python"', "max_batch_size: 8", "count: 2", "KIND_GPU"):
        assert words in config
    config = (out / "eyes_client" / "config.pbtxt").read_text()
    assert "KIND_CPU" in config
    assert 'key: "intra_op_thread_count"\n  value {\n    string_value: "3"' in config
    assert '"logits"' not in (out / "eyes_score" / "config.pbtxt").read_text()


def test_defaults(ztune: Command, tmp_path: Path) -> None:
    made = ztune("export-triton", MINI, "--out", tmp_path / "out", "--json")
    assert (made.json["backend"], made.json["access"]) == ("onnxruntime", "features")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--backend", "torch"), ('--backend is "torch"', "onnxruntime, python")),
        (("--accelerator", "gpu"), ('--accelerator is "gpu"', "none, cuda, tensorrt")),
        (("--access", "all"), ('--access is "all"', "features, logits, losses")),
        (("--instances", 0), ("--instances is 0",)),
        (("--threads", 0), ("--threads is 0",)),
        (("--name", "a/b"), ('invalid model name "a/b"', "--name NAME")),
        (("--backend", "python", "--accelerator", "tensorrt"), ("--backend onnxruntime",)),
    ],
)
def test_wrong_settings(
    ztune: Command, tmp_path: Path, words: tuple[object, ...], parts: tuple[str, ...]
) -> None:
    refused(ztune("export-triton", MINI, *words, "--out", tmp_path / "out", "--quiet"), *parts)
    assert not (tmp_path / "out").exists()


def test_wrong_folders(ztune: Command, tmp_path: Path, half: Path) -> None:
    out = tmp_path / "out"
    for bundle, words in (
        (tmp_path / "none", "does not exist, expected a bundle"),
        (DIGITS, "is a folder without bundle.json"),
        (half, "this is the client half of a bundle"),
    ):
        refused(ztune("export-triton", bundle, "--out", out, "--quiet"), words)
        assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    refused(ztune("export-triton", MINI, "--out", out, "--quiet"), "exists and is not empty")
    refused(ztune("export", "--client", MINI, "--out", out, "--quiet"), "exists and is not empty")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_wrong_usage_exits_with_2(ztune: Command, tmp_path: Path) -> None:
    assert ztune("export-triton", MINI).code == 2
    assert ztune("export-triton", "--out", tmp_path / "out").code == 2
    assert ztune("export-triton", MINI, "--instances", "two", "--out", tmp_path / "out").code == 2
    refused(ztune("export", "--client", MINI), "--out BUNDLE is required")


def test_the_client_half_is_the_bundle_without_its_graphs(half: Path) -> None:
    names = load_bundle(MINI).client_files
    assert sorted(path.name for path in half.iterdir()) == sorted(names)
    for name in names:
        assert (half / name).read_bytes() == (MINI / name).read_bytes()
    bundle, whole = load_bundle(half), load_bundle(MINI)
    assert bundle.digest == whole.digest
    assert (bundle.is_client_half, whole.is_client_half) == (True, False)
    bundle.check_client_files()


def test_the_client_half_says_what_it_is(ztune: Command, tmp_path: Path) -> None:
    made = ztune("export", "--client", MINI, "--out", tmp_path / "a")
    assert (made.code, made.err) == (0, "")
    assert load_bundle(MINI).digest[:12] in made.out
    document = ztune("export", "--client", tmp_path / "a", "--out", tmp_path / "b", "--json")
    assert document.json == json.loads((MINI / "bundle.json").read_text())


def test_a_client_half_that_is_asked_for_graphs(half: Path, tmp_path: Path) -> None:
    message = r"prompt\.onnx is missing: this is the client half of a bundle, without"
    with pytest.raises(FormatError, match=message):
        load_bundle(half).file("prompt.onnx")
    # One graph that is missing among others is damage.
    copy = Path(shutil.copytree(MINI, tmp_path / "copy"))
    (copy / "prompt.onnx").unlink()
    with pytest.raises(FormatError, match=r"prompt\.onnx is missing \(export again\)"):
        load_bundle(copy).file("prompt.onnx")
    # So is any other file, whatever else is there.
    (half / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"tokenizer\.json is missing \(export again\)"):
        load_bundle(half).file("tokenizer.json")


def test_the_client_half_of_nothing(ztune: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(ztune("export", "--out", out), "--model NAME or --client BUNDLE is required")
    refused(ztune("export", "--client", tmp_path / "none", "--out", out), "does not exist")
    for words, named in (
        (("--model", "ViT-B-32"), "leave out --model"),
        (("--model", "x", "--precision", "int8"), "leave out --model, --precision"),
        (("--pretrained", "openai"), "leave out --pretrained"),
        (("--random-weights", 0), "leave out --random-weights"),
        (("--pad-id", 0), "leave out --pad-id"),
        (("--image-tokens",), "leave out --image-tokens"),
    ):
        result = ztune("export", "--client", MINI, *words, "--out", out)
        refused(result, named)
        assert result.err.rstrip().endswith(f"{named})")
    assert not out.exists()


def test_a_damaged_bundle_has_no_client_half(ztune: Command, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(MINI, tmp_path / "copy"))
    (copy / "token_table.npy").write_bytes(b"x")
    refused(
        ztune("export", "--client", copy, "--out", tmp_path / "out"),
        "token_table.npy has 1 bytes",
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_neither_verb_needs_torch(tmp_path: Path) -> None:
    program = f"""
import sys
from ztune.cli.main import main
code = main(["export-triton", {str(MINI)!r}, "--out", {str(tmp_path / "a")!r}, "--quiet"])
code += main(["export", "--client", {str(MINI)!r}, "--out", {str(tmp_path / "b")!r}, "--quiet"])
sys.exit(code or ("torch" in sys.modules and "torch was imported"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def made_by(*words: str) -> list[str]:
    """Return the ztune commands that `make export` would run."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make here")
    done = subprocess.run([make, "-n", "export", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [
        " ".join(line.partition("/ztune ")[2].partition("||")[0].split())
        for line in done.stdout.splitlines()
        if "/ztune " in line
    ]


def test_make_export_makes_bundles_and_repositories() -> None:
    model = "export --model 'RN50' --pretrained 'openai' --out 'rn50'"
    given = ("MODEL=RN50", "PRETRAINED=openai", "OUT=rn50")
    assert made_by(*given) == [model]
    assert made_by("BUNDLE=models/mini", "TRITON=repo") == [
        "export-triton 'models/mini' --out 'repo'"
    ]
    assert made_by(*given, "TRITON=repo") == [model, "export-triton 'rn50' --out 'repo'"]
    default = "export --model 'ViT-B-32' --pretrained 'laion2b_s34b_b79k' --out 'bundles/ViT-B-32'"
    assert made_by() == [default, "export-triton 'bundles/ViT-B-32' --out 'repository'"]
