"""A device without ONNX Runtime, onnx or torch tunes on a server, from pictures to the artifact."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import MINI
from tests.remote.conftest import DATA, Runs, artifact, one_error, url_of
from tests.servers.triton import TritonServer

# Importing what is None in sys.modules raises ImportError, as where it is not installed.
ABSENT = ("onnxruntime", "onnx", "torch", "open_clip", "transformers")
PROGRAM = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from ztune.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def bare(*words: object) -> subprocess.CompletedProcess[str]:
    """Run `ztune` where ABSENT cannot be imported."""
    command = [sys.executable, "-c", PROGRAM, ",".join(ABSENT), *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))


@pytest.mark.parametrize("method", [("ogn", "--queries", 100), ("gda",)])
def test_a_device_without_onnx_runtime_tunes(
    method: tuple[object, ...], triton: TritonServer, local: Runs, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = bare("tune", url_of(triton), *DATA, "--method", *method, "--out", out)
    assert done.returncode == 0, done.stderr
    assert artifact(out) == artifact(local("--method", *method))


def test_pictures_encoded_here_need_onnx_runtime(triton: TritonServer, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--images", "local", "--client", MINI, "--out", out)
    done = bare("tune", url_of(triton), *DATA, *words)
    one_error(done.returncode, done.stderr, "onnxruntime cannot be imported", "pip install")
    assert not out.exists()
