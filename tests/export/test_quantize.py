"""int8 bundles quantized from the embedded fp32 one."""

import json
from pathlib import Path

import numpy as np
import pytest

from export.quantize import quantize_bundle
from runtimes.bundle import load_bundle
from runtimes.ort import OrtImageEncoder
from runtimes.prompts import token_table
from runtimes.providers import Execution, check_precision
from tests.conftest import DIGITS, MINI, Command
from ztune.errors import ConfigError, ProviderError, ZtuneError


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_bundle(load_bundle(MINI), tmp_path_factory.mktemp("b") / "int8", "int8").path


def test_it_is_the_same_model_and_smaller(int8: Path) -> None:
    before, after = load_bundle(MINI), load_bundle(int8)
    assert after.precision == "int8"
    assert after.model_id == before.model_id
    assert after.digest != before.digest
    assert after.manifest["derived_from"] == before.digest
    for graph in ("image", "text", "prompt"):
        assert after.parity[graph]["cosine"] > 0.98
    sizes = [sum(file.bytes for file in bundle.files.values()) for bundle in (after, before)]
    assert sizes[0] < 0.3 * sizes[1]
    for name in ("tokenizer.json", "parity.safetensors"):
        assert after.files[name] == before.files[name]
    np.testing.assert_array_equal(token_table(after), token_table(before))


def test_int8_features_do_not_depend_on_the_batch(int8: Path) -> None:
    encoder = OrtImageEncoder(load_bundle(int8), Execution())
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)
    together = encoder.encode(pixels)
    alone = np.concatenate([encoder.encode(pixels[i : i + 1]) for i in range(4)])
    assert together.tobytes() == alone.tobytes()


def test_a_prompt_serves_both_precisions(int8: Path, ztune: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = ztune("tune", int8, "--data", DIGITS, "--queries", 300, "--out", out, "--json")
    assert done.code == 0, done.err
    assert done.json["precision"] == "int8"
    by_int8 = ztune("eval", out, "--json").json
    prompt, packed = out / "prompt.safetensors", tmp_path / "c.onnx"
    words = ("--data", DIGITS, "--split", "all", "--prompt", prompt, "--json")
    by_fp32 = ztune("eval", MINI, *words).json
    assert by_fp32["accuracy"] == pytest.approx(by_int8["accuracy"], abs=0.04)
    assert ztune("pack", int8, "--prompt", prompt, "--out", packed).code == 0
    again = ztune("eval", packed, "--split-file", out / "split.json", "--json").json
    assert again["accuracy"] == by_int8["accuracy"]


def test_unsupported_precisions_are_refused(
    int8: Path, ztune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="is int8; only an fp32 bundle"):
        quantize_bundle(load_bundle(int8), tmp_path / "x", "int8")
    with pytest.raises(ConfigError, match='unknown precision "int4"'):
        quantize_bundle(load_bundle(MINI), tmp_path / "x", "int4")
    with pytest.raises(ProviderError, match="an int8 bundle cannot run on cuda"):
        check_precision("int8", "cuda")
    with pytest.raises(ProviderError, match="an fp16 bundle cannot run on cpu"):
        check_precision("fp16", "cpu")
    check_precision("fp32", "cuda")
    monkeypatch.setattr("export.quantize._LEAST_COSINE", {"int8": 1.1})
    with pytest.raises(ZtuneError, match="cannot be used in int8"):
        quantize_bundle(load_bundle(MINI), tmp_path / "x", "int8")
    assert not (tmp_path / "x").exists()
    shown = ztune("quantize", MINI, "--out", tmp_path / "y", "--json", "--quiet")
    assert shown.code == 1
    monkeypatch.undo()
    shown = ztune("quantize", MINI, "--out", tmp_path / "y", "--json", "--quiet")
    assert shown.code == 0, shown.err
    assert json.loads((tmp_path / "y" / "bundle.json").read_text())["precision"] == "int8"
