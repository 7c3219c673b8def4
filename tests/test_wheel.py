"""The built wheel in an empty environment: what a device gets."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import MINI, ROOT


@pytest.mark.skipif(
    os.environ.get("ZTUNE_OFFLINE") == "1", reason="ZTUNE_OFFLINE=1: packages cannot be installed"
)
def test_a_device_tunes_and_packs_without_torch(few_digits: Path, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        done = subprocess.run(
            [str(word) for word in words], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    # From a copy: building in place leaves files behind that a later wheel would take up.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for room in ("ztune", "runtimes", "export"):
        shutil.copytree(ROOT / room, source / room)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, source)
    (wheel,) = tmp_path.glob("ztune-*.whl")
    venv.create(tmp_path / "env")
    scripts = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    pip = (sys.executable, "-m", "pip", "--python", tmp_path / "env")
    run(*pip, "install", "--quiet", "--no-compile", f"{wheel}[cpu]")
    listed = json.loads(run(*pip, "list", "--format", "json"))
    names = {package["name"].lower() for package in listed}
    assert "onnxruntime" in names
    assert not names & {"torch", "torchvision", "open-clip-torch", "transformers", "timm"}

    out, packed = tmp_path / "run", tmp_path / "classifier.onnx"
    tune = ("tune", MINI, "--data", few_digits, "--shots", 2, "--queries", 20, "--out", out)
    run(scripts / "ztune", *tune, "--json")
    # The other verbs in one process, which is faster.
    verbs = (
        ("eval", out, "--json"),
        ("pack", MINI, "--prompt", out / "prompt.safetensors", "--out", packed, "--json"),
        ("predict", packed, few_digits / "two", "--limit", 3, "--json"),
        ("doctor", MINI, "--json"),
    )
    program = (
        "import sys; from ztune.cli.main import main\nfor words in {}: assert main(words) == 0"
    )
    listed_verbs = [[str(word) for word in words] for words in verbs]
    said = run(scripts / "python", "-c", program.format(listed_verbs))
    scored, _, predicted, found = (json.loads(line) for line in said.splitlines())
    assert scored["n"] > 100
    assert len(predicted["predictions"]) == 3
    assert found["ok"] is True
