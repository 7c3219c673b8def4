"""A device without ONNX Runtime, onnx or torch tunes on a server, from images to the artifact."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import FEW_DIGITS, MINI
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


def test_images_encoded_here_need_onnx_runtime(triton: TritonServer, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("--images", "local", "--client", MINI, "--out", out)
    done = bare("tune", url_of(triton), *DATA, *words)
    one_error(done.returncode, done.stderr, "onnxruntime cannot be imported", "pip install")
    assert not out.exists()


FACE = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
import ztune
url, digits, out, method, *settings = sys.argv[2:]
model = ztune.load(url)
train, test = ztune.Dataset.from_folder(digits).split(shots=4, seed=1)
given = {word.split("=")[0]: int(word.split("=")[1]) for word in settings}
clf = ztune.FewShotClassifier(model, method=method, **given).fit(train)
clf.save(out)
assert clf.score(test) > 0.3
assert clf.predict([path for path, _ in test.items[:3]]).shape == (3,)
model.close()
"""


@pytest.mark.parametrize("method", [("ogn", "--queries", 100), ("gda",)])
def test_the_face_needs_no_onnx_runtime_either(
    method: tuple[str, ...], triton: TritonServer, local: Runs, tmp_path: Path
) -> None:
    settings = [f"queries={method[2]}"] if len(method) > 1 else []
    out = tmp_path / "prompt.safetensors"
    words = (url_of(triton), FEW_DIGITS, out, method[0], *settings)
    command = [sys.executable, "-c", FACE, ",".join(ABSENT), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == artifact(local("--method", *method))
