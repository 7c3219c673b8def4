"""Bundles of small forms of published architectures: exported, checked, and read back."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file

from export import bundle as bundle_room
from export import parity
from export.bundle import export_bundle, model_id
from export.clip import load_clip
from export.graphs import ImageGraph
from runtimes.bundle import Bundle, load_bundle
from runtimes.ort import OrtPromptGraph
from runtimes.prompts import embed_words, token_table
from runtimes.providers import Execution
from runtimes.tokenizer import Tokenizer
from tests.export.conftest import Exported
from tests.export.graph_checks import check_double_reference
from tests.export.small_models import ARCHITECTURES, write_tiny
from ztune.errors import ConfigError, FormatError, ZtuneError


@pytest.fixture(scope="module", params=ARCHITECTURES)
def exported(request: pytest.FixtureRequest, small: Callable[[str], Exported]) -> Exported:
    return small(request.param)


def session(bundle: Bundle, graph: str) -> Any:
    return onnxruntime.InferenceSession(
        str(bundle.file(f"{graph}.onnx")), providers=["CPUExecutionProvider"]
    )


def test_every_prompt_graph_has_a_reference_in_double_precision(exported: Exported) -> None:
    _, bundle = exported
    check_double_reference(bundle)


def test_every_graph_is_dynamic_and_equals_torch(exported: Exported) -> None:
    loaded, bundle = exported
    for graph, cases in (
        ("image", parity.image_cases(loaded, (1, 3, 4))),
        ("text", parity.text_cases(loaded, (1, 3, 4))),
        ("prompt", parity.prompt_cases(loaded, [(1, 4, 2), (3, 1, 7), (4, 0, 1), (2, 8, 5)])),
    ):
        run = session(bundle, graph)
        for case in cases:
            (features,) = run.run(["features"], dict(case.feeds))
            assert features.shape == case.features.shape
            assert np.abs(features - case.features).max() < 5e-6
            np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, atol=1e-5)
        assert 0 <= bundle.parity[graph]["max_abs"] < 5e-6
        assert bundle.parity[graph]["cosine"] > 0.99999


def test_features_depend_on_what_they_should(exported: Exported) -> None:
    # The comparison above must not hold for any graph because of random weights.
    _, bundle = exported
    graph = OrtPromptGraph(bundle, Tokenizer(bundle), Execution())
    contexts = np.random.default_rng(0).normal(size=(2, 4, bundle.text.width)) * 0.05
    encoder = graph.encoder(("cat", "dog", "red panda"), 4, 2)
    features = encoder.encode(contexts.astype(np.float32))
    assert np.abs(features[0] - features[1]).max() > 1e-3
    assert np.abs(features[:, 0] - features[:, 1]).max() > 1e-3
    assert bundle.embed_dim == features.shape[-1]


def test_embedded_words_as_context_equal_the_template(exported: Exported) -> None:
    _, bundle = exported
    tokenizer = Tokenizer(bundle)
    names = ("cat", "traffic light", "red panda")
    graph = OrtPromptGraph(bundle, tokenizer, Execution())
    words = embed_words(bundle, tokenizer, "a photo of a")
    tuned = graph.encoder(names, len(words), 1).encode(words[None])
    tokens = tokenizer.pad([tokenizer.sequence(f"a photo of a {name}.") for name in names])
    (plain,) = session(bundle, "text").run(None, {"tokens": tokens})
    np.testing.assert_allclose(tuned[0], plain, atol=5e-6)
    np.testing.assert_allclose(graph.encode_template("a photo of a {}.", names), plain, atol=5e-6)


def test_manifest_and_files_describe_the_model(exported: Exported) -> None:
    loaded, bundle = exported
    model: Any = loaded.model
    assert set(bundle.files) == {
        "image.onnx", "text.onnx", "prompt.onnx", "weights.bin", "tokenizer.json",
        "parity.safetensors",
    }  # fmt: skip
    for name in bundle.files:
        bundle.file(name)
    assert bundle.model_id == model_id(loaded)
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", bundle.model_id)
    assert bundle.logit_scale == pytest.approx(float(model.logit_scale.exp()))
    bias = model.logit_bias
    assert bundle.logit_bias == pytest.approx(0.0 if bias is None else float(bias))
    assert bundle.image == loaded.image
    assert bundle.text == loaded.text
    np.testing.assert_array_equal(token_table(bundle), loaded.tower.embedding.weight.numpy())
    kept = load_file(bundle.file("parity.safetensors"))
    for graph in ("image", "text", "prompt"):
        features = kept.pop(f"{graph}.features")
        feeds = {k.partition(".")[2]: v for k, v in kept.items() if k.startswith(f"{graph}.")}
        (here,) = session(bundle, graph).run(None, feeds)
        np.testing.assert_allclose(here, features, atol=5e-6)


def text_of(model: onnx.ModelProto) -> bytes:
    """Return a graph's bytes without the values in it, among which any three letters may occur."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    attributes = [one for node in plain.graph.node for one in node.attribute]
    for tensor in (*plain.graph.initializer, *(one.t for one in attributes if one.HasField("t"))):
        tensor.ClearField("raw_data")
    return bytes(plain.SerializeToString())


def test_graphs_run_on_the_oldest_onnxruntime_and_carry_no_local_paths(exported: Exported) -> None:
    _, bundle = exported
    for graph in ("image", "text", "prompt"):
        path = bundle.file(f"{graph}.onnx")
        model = onnx.load(path)
        onnx.checker.check_model(model)
        # what onnxruntime 1.20 knows
        assert model.ir_version <= 10
        assert [(part.domain, part.version <= 21) for part in model.opset_import] == [("", True)]
        assert not any(part.doc_string or part.metadata_props for part in model.graph.node)
        words = text_of(model)
        for trace in (b"site-packages", b".py", os.fsencode(Path.cwd()), os.fsencode(Path.home())):
            assert trace not in words or trace == b"/"
        # no infinite masks
        for tensor in model.graph.initializer:
            values = onnx.numpy_helper.to_array(tensor)
            assert values.dtype.kind != "f" or np.isfinite(values).all()
    for name in ("bundle.json", "tokenizer.json"):
        assert str(Path.cwd()) not in (bundle.path / name).read_text()


def test_an_export_says_what_it_does_and_leaves_nothing_else(
    tiny: Exported, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded, whole = tiny
    lines: list[str] = []
    (tmp_path / "bundle").mkdir()  # an empty folder is taken
    bundle = export_bundle(loaded, tmp_path / "bundle", progress=lines.append)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert [line.partition(":")[0] for line in lines] == [
        "image.onnx", "image.onnx", "text.onnx", "text.onnx", "prompt.onnx", "prompt.onnx",
    ]  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == ["bundle"]
    for graph in ("image", "text", "prompt"):
        # Nothing differs, though the whole bundle has another graph too.
        one, other = (onnx.load(b.file(f"{graph}.onnx")).graph for b in (bundle, whole))
        assert list(one.node) == list(other.node)
        for first, second in zip(one.initializer, other.initializer, strict=True):
            assert first.name == second.name
            np.testing.assert_array_equal(
                onnx.numpy_helper.to_array(first), onnx.numpy_helper.to_array(second)
            )
    assert bundle.model_id == whole.model_id
    assert bundle.digest != whole.digest


def test_model_id_follows_the_model_and_nothing_else(tiny: Exported, tmp_path: Path) -> None:
    _, bundle = tiny

    def identity(**changes: Any) -> str:
        seed = changes.pop("seed", 0)
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        return model_id(load_clip(write_tiny(folder, seed=seed, **changes)))

    assert identity() == bundle.model_id  # another folder, the same model
    assert identity(seed=1) != bundle.model_id
    other = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.5], "interpolation": "bilinear"}
    assert identity(preprocess=other) != bundle.model_id


def test_a_graph_that_differs_is_refused_and_leaves_nothing(
    tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, _ = tiny

    class Wrong(ImageGraph):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            features = super().forward(pixels)
            return features + 0.001 * features.roll(1, -1)

    monkeypatch.setattr(bundle_room, "ImageGraph", Wrong)
    with pytest.raises(ZtuneError, match=r"image.onnx differs from torch by") as refused:
        export_bundle(loaded, tmp_path / "bundle")
    # The figures are those of a perturbation of 0.001, except for the last bits.
    found = re.search(r"by (\S+) \(1 - cosine (\S+)\), expected at most 0.0001", str(refused.value))
    assert found, refused.value
    assert 1e-4 < float(found[1]) < 1e-3
    assert 1e-7 < float(found[2]) < 1e-6
    assert list(tmp_path.iterdir()) == []


def test_a_difference_that_is_no_number_is_refused(tiny: Exported) -> None:
    loaded, bundle = tiny
    (case,) = parity.text_cases(loaded, [2])
    broken = parity.Case(case.feeds, case.features * np.float32("nan"))
    with pytest.raises(ZtuneError, match="differs from torch by nan"):
        parity.compare(bundle.file("text.onnx"), [broken])
    cut = parity.Case(case.feeds, case.features[:1])
    with pytest.raises(ZtuneError, match="fixed a dynamic dimension"):
        parity.compare(bundle.file("text.onnx"), [cut])


def test_an_output_that_holds_something_is_left_alone(tiny: Exported, tmp_path: Path) -> None:
    loaded, _ = tiny
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export_bundle(loaded, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export_bundle(loaded, tmp_path / "mine.txt")
    with pytest.raises(ConfigError, match="cannot be written"):
        export_bundle(loaded, tmp_path / "mine.txt" / "bundle")


def test_a_kill_leaves_no_half_bundle(tiny: Exported, tmp_path: Path) -> None:
    _, bundle = tiny
    model = write_tiny(tmp_path / "model")
    script = f"""
import os, shutil, signal
from pathlib import Path
from export import bundle
from export.clip import load_clip
def stop(line):
    if line.startswith("image.onnx: maximum difference"):
        os.kill(os.getpid(), signal.SIGKILL)
# Tracing would take longer than the rest.
def copy(module, inputs, path, weights, half):
    for target in (path, weights.path):
        shutil.copy(Path({str(bundle.path)!r}) / target.name, target)
bundle.export_onnx = copy
bundle.export_bundle(load_clip("{model}"), Path({str(tmp_path / "bundle")!r}), progress=stop)
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(FormatError, match="does not exist, expected a bundle"):
        load_bundle(tmp_path / "bundle")


def test_the_trained_clip_exports_exactly(bench_data: Path, trained: Path) -> None:
    loaded = load_clip(f"local-dir:{bench_data / 'bench-clip'}")
    bundle = load_bundle(trained)
    assert bundle.text.graph == "prefix"
    assert max(figures["max_abs"] for figures in bundle.parity.values()) < 2e-6
    assert bundle.manifest["source"] == {
        "model": "local-dir:bench-clip",
        "pretrained": "local-dir:bench-clip",
        "licence": "unknown",
    }
    shapes = [(p, m, c) for p in (1, 3) for m in (1, 4, 0) for c in (1, 7)]
    parity.compare(bundle.file("prompt.onnx"), parity.prompt_cases(loaded, shapes))
