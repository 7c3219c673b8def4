"""The built wheel in an empty environment: what a device gets."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import DIGITS, MINI, ROOT


@pytest.mark.skipif(
    os.environ.get("ZTUNE_OFFLINE") == "1", reason="ZTUNE_OFFLINE=1: packages cannot be installed"
)
def test_a_device_tunes_and_packs_without_torch(tmp_path: Path) -> None:
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
    venv.create(tmp_path / "env", with_pip=True)
    scripts = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    run(scripts / "python", "-m", "pip", "install", "--quiet", f"{wheel}[cpu]")
    listed = json.loads(run(scripts / "python", "-m", "pip", "list", "--format", "json"))
    names = {package["name"].lower() for package in listed}
    assert "onnxruntime" in names
    assert not names & {"torch", "torchvision", "open-clip-torch", "transformers", "timm"}

    ztune, out = scripts / "ztune", tmp_path / "run"
    run(ztune, "tune", MINI, "--data", DIGITS, "--queries", 50, "--out", out, "--json")
    assert json.loads(run(ztune, "eval", out, "--json"))["n"] > 500
    packed = tmp_path / "classifier.onnx"
    run(ztune, "pack", MINI, "--prompt", out / "prompt.safetensors", "--out", packed)
    predicted = run(ztune, "predict", packed, DIGITS / "two", "--limit", 3, "--json")
    assert len(json.loads(predicted)["predictions"]) == 3
    assert json.loads(run(ztune, "doctor", MINI, "--json"))["ok"] is True
