"""A bundle whose weights are in one file gives what one of version 1 with the same graphs gives."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from export.quantize import quantize_bundle
from runtimes.bundle import Bundle, load_bundle
from tests.conftest import FEW_DIGITS, MINI, Command
from tests.shared_bundle import share_weights

FEW = ("--data", FEW_DIGITS, "--shots", 2, "--seed", 3)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    mini = load_bundle(MINI)
    return mini, share_weights(mini, tmp_path_factory.mktemp("shared") / "mini")


def stripped(path: Path, digest: str) -> bytes:
    """Return a graph with its weights, without metadata and the bundle's digest."""
    model = onnx.load(path)
    del model.metadata_props[:]
    weights = [w for w in model.graph.initializer if bytes.fromhex(digest) not in w.raw_data]
    for weight in weights:
        weight.ClearField("data_location")  # set by onnx where it was in another file
    del model.graph.initializer[:]
    model.graph.initializer.extend(weights)
    return bytes(model.SerializeToString())


def untimed(history: Path) -> list[object]:
    """Return the lines of a history without their duration; a head has none."""
    lines = history.read_text().splitlines() if history.exists() else []
    return [{**json.loads(line), "seconds": 0} for line in lines]


@pytest.mark.parametrize("method", ["zip", "ogn", "gda"])
def test_tune_eval_pack_and_predict(
    method: str, bundles: tuple[Bundle, Bundle], ztune: Command, tmp_path: Path
) -> None:
    found = []
    for name, bundle in zip(("old", "new"), bundles, strict=True):
        run, packed = tmp_path / name, tmp_path / f"{name}.onnx"
        words = ("--method", method, "--queries", 30, "--out", run, "--quiet")
        done = ztune("tune", bundle.path, *FEW, *words)
        assert done.code == 0, done.err
        score = ztune("eval", run, "--json").json
        artifact = next(run.glob("*.safetensors"))
        assert ztune("pack", bundle.path, "--prompt", artifact, "--out", packed).code == 0
        images = sorted(next(FEW_DIGITS.iterdir()).iterdir())[:3]
        answers = ztune("predict", packed, *images, "--json")
        assert answers.code == 0, answers.err
        history = untimed(run / "history.jsonl")
        tensors = {key: value.tobytes() for key, value in load_file(artifact).items()}
        said = answers.out.replace(f"{name}.onnx", "")
        found.append(
            (
                tensors,
                score["accuracy"],
                score["nll"],
                history,
                stripped(packed, bundle.digest),
                said,
            )
        )
    old, new = found
    for one, other in zip(old, new, strict=True):
        assert one == other


def test_quantize_and_export_triton(
    bundles: tuple[Bundle, Bundle], ztune: Command, tmp_path: Path
) -> None:
    first, second = (
        quantize_bundle(bundle, tmp_path / name, "int8")
        for name, bundle in zip(("old", "new"), bundles, strict=True)
    )
    assert first.files == second.files
    served = []
    for name, bundle in zip(("old", "new"), bundles, strict=True):
        out = tmp_path / f"{name}-served"
        done = ztune("export-triton", bundle.path, "--name", "m", "--out", out)
        assert done.code == 0, done.err
        parts = ("image", "text", "prompt", "score")
        paths = [out / f"m_{part}" / "1" / "model.onnx" for part in parts]
        served.append([stripped(path, bundle.digest) for path in paths])
    assert served[0] == served[1]


def test_image_features_are_cached_under_their_own_key(bundles: tuple[Bundle, Bundle]) -> None:
    from runtimes.ort import OrtImageEncoder
    from runtimes.providers import Execution

    old, new = (OrtImageEncoder(bundle, Execution()) for bundle in bundles)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    assert old.encode(pixels).tobytes() == new.encode(pixels).tobytes()
    assert new.identity.startswith(
        bundles[1].files["image.onnx"].sha256 + bundles[1].files["weights.bin"].sha256
    )


def test_the_manifest_is_the_same_but_for_its_files(bundles: tuple[Bundle, Bundle]) -> None:
    old, new = (json.loads((bundle.path / "bundle.json").read_text()) for bundle in bundles)
    assert set(new) - set(old) == {"token_table", "weight_blocks"}
    assert {key for key in old if old[key] != new[key]} == {"version", "files"}
