"""Compare the image graph that takes tokens with open_clip's parts called one by one."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from export.bundle import export_bundle, export_graph, image_prompted_graph
from export.clip import load_clip
from export.graphs import PromptedImageGraph, visual_tower
from export.loaded import LoadedClip
from export.parity import image_cases, open_graph
from export.quantize import quantize_bundle
from export.shared import SharedWeights
from runtimes.bundle import IMAGE_PROMPTED, load_bundle
from runtimes.ort import parity_on_this_machine
from runtimes.providers import Execution
from runtimes.weights import WEIGHTS
from tests.conftest import MINI, Command
from tests.export.conftest import Exported
from tests.export.small_models import small_model, tiny_config, write_model, write_tiny
from ztune.errors import ConfigError, FormatError

# Image towers that differ in pooling, and before or in the blocks.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("class token, layer scale, patch dropout", {"ls_init_value": 0.5, "patch_dropout": 0.5}),
    ("mean, no first norm", {"pool_type": "avg", "no_ln_pre": True}),
    ("norm after the mean, normalised queries",
     {"pool_type": "avg", "final_ln_after_pool": True, "qk_norm": True}),
    ("attentional pooling, sine positions",
     {"attentional_pool": True, "attn_pooler_heads": 2, "pos_embed_type": "sin_cos_2d"}),
]  # fmt: skip
# candidates, images, tokens: none as traced
SHAPES = [(1, 1, 1), (4, 3, 2), (2, 5, 9), (1, 6, 5), (7, 1, 3)]


def by_hand(loaded: LoadedClip, pixels: torch.Tensor, tokens: torch.Tensor) -> Any:
    """Return f32[P, N, e], one candidate at a time, from open_clip's parts."""
    model: Any = loaded.model
    tower = model.visual.eval()
    results = []
    with torch.no_grad():
        for added in tokens:
            patches = tower.conv1(pixels).flatten(2).transpose(1, 2)
            first = tower.class_embedding.expand(len(pixels), 1, -1)
            own = torch.cat([first, patches], 1) + tower.positional_embedding
            rows = torch.cat([own, torch.stack([added] * len(pixels))], 1)
            states = tower.transformer(tower.ln_pre(rows))[:, : own.shape[1]]
            features = tower._pool(states)[0] @ tower.proj
            results.append(functional.normalize(features, dim=-1))
    return torch.stack(results).numpy()


@pytest.mark.parametrize("vision", [v[1] for v in VARIANTS], ids=[v[0] for v in VARIANTS])
def test_the_graph_is_an_insertion_by_hand(vision: dict[str, Any], tmp_path: Path) -> None:
    loaded = load_clip(write_model(tmp_path / "model", tiny_config(**vision)))
    weights = SharedWeights(tmp_path / WEIGHTS)
    figures, _ = export_graph(image_prompted_graph(loaded), tmp_path, weights, lambda line: None)
    assert 0 <= figures["max_abs"] < 5e-6
    run = open_graph(tmp_path / IMAGE_PROMPTED)
    (plain,) = image_cases(loaded, [6])
    width = visual_tower(loaded.model).conv1.weight.shape[0]
    random = torch.Generator().manual_seed(3)
    for n_candidates, n_images, n_tokens in SHAPES:
        pixels = torch.from_numpy(plain.feeds["pixels"][:n_images])
        tokens = torch.randn(n_candidates, n_tokens, width, generator=random)
        feeds = {"pixels": pixels.numpy(), "tokens": tokens.numpy()}
        (features,) = run.run(["features"], feeds)
        expected = by_hand(loaded, pixels, tokens)
        assert features.shape == (n_candidates, n_images, 64)
        np.testing.assert_allclose(features, expected, atol=5e-6)
        # Tokens have an effect, so the comparison would notice if they were ignored.
        assert np.abs(features - plain.features[None, :n_images]).max() > 1e-3
        order = torch.randperm(n_candidates, generator=random).numpy()
        (permuted,) = run.run(["features"], {**feeds, "tokens": feeds["tokens"][order]})
        np.testing.assert_allclose(permuted, features[order], atol=2e-6)
        if n_candidates > 1:
            assert np.abs(features[0] - features[1]).max() > 1e-3


def test_pooling_does_not_see_the_tokens(tmp_path: Path) -> None:
    # In a tower without blocks, added tokens can only reach a feature through pooling.
    loaded = load_clip(write_model(tmp_path, tiny_config(pool_type="avg")))
    tower = visual_tower(loaded.model)
    tower.transformer.resblocks = torch.nn.ModuleList()
    (plain,) = image_cases(loaded, [3])
    tokens = torch.full((2, 4, tower.conv1.weight.shape[0]), 9.0)
    with torch.no_grad():
        graph = PromptedImageGraph(loaded.model).eval()
        features = graph(torch.from_numpy(plain.feeds["pixels"]), tokens).numpy()
    np.testing.assert_allclose(features, np.stack([plain.features] * 2), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "tower"),
    [
        ("RN50", "ModifiedResNet"),
        ("EVA02-B-16", "Eva"),
        ("ViT-B-16-SigLIP", "VisionTransformer"),
        ("MobileCLIP-S1", "FastVit"),
    ],
)
def test_other_towers_are_refused_before_anything_is_written(
    name: str, tower: str, tmp_path: Path
) -> None:
    loaded = small_model(name, tmp_path / "model")
    with pytest.raises(
        ConfigError,
        match=rf"image tower (timm's )?{tower} does not support image tokens.*omit `image",
    ):
        export_bundle(loaded, tmp_path / "bundle", image_tokens=True)
    assert not (tmp_path / "bundle").exists()


def test_the_bundle_describes_it(tiny: Exported) -> None:
    loaded, bundle = tiny
    model: Any = loaded.model
    weight = model.visual.conv1.weight.double()
    assert bundle.visual is not None
    assert bundle.visual.width == weight.shape[0] == 64
    assert bundle.visual.patch_values == 3 * 32 * 32
    assert bundle.visual.patch_mean == pytest.approx(float(weight.mean()), rel=1e-6)
    assert bundle.visual.patch_std == pytest.approx(float(weight.std()), rel=1e-4)
    assert parity_on_this_machine(bundle, "image_prompted", Execution())["max_abs"] < 5e-6
    model_proto = onnx.load(bundle.file(IMAGE_PROMPTED))
    onnx.checker.check_model(model_proto)
    # Patches are embedded without the candidates' dimension.
    (embedding,) = [node for node in model_proto.graph.node if node.op_type == "Conv"]
    assert embedding.input[0] == "pixels"


@pytest.mark.usefixtures("traced_before")
def test_without_it_the_model_is_the_same(tiny: Exported, tmp_path: Path) -> None:
    loaded, bundle = tiny
    without = export_bundle(loaded, tmp_path / "without")
    assert without.visual is None
    assert IMAGE_PROMPTED not in without.files
    assert without.model_id == bundle.model_id


def change(folder: Path, key: str, value: object) -> None:
    manifest = json.loads((folder / "bundle.json").read_text())
    target = manifest
    *path, last = key.split("/")
    for part in path:
        target = target[part]
    if value is None:
        del target[last]
    else:
        target[last] = value
    (folder / "bundle.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("visual", None, 'only one of "visual" and image_prompted.onnx'),
        ("files/image_prompted.onnx", None, 'only one of "visual" and image_prompted.onnx'),
        ("visual/width", 0, r"\$\.visual\.width: expected int >= 1, got 0"),
        ("visual/width", 10**7, "expected int <= 65536"),
        ("visual/patch_values", 0.5, "expected int, got float"),
        ("visual/patch_mean", "0", "expected float, got str"),
        ("visual/patch_std", 0, "expected float > 0.0, got 0"),
        ("visual", [], r"\$\.visual: expected object"),
    ],
)
def test_a_wrong_manifest_is_refused(key: str, value: object, message: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MINI, tmp_path / "bundle"))
    assert load_bundle(folder).visual is not None
    change(folder, key, value)
    with pytest.raises(FormatError, match=message):
        load_bundle(folder)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_other_precisions_report_that_they_omit_it(precision: str, tmp_path: Path) -> None:
    lines: list[str] = []
    derived = quantize_bundle(load_bundle(MINI), tmp_path / "b", precision, lines.append)
    assert derived.visual is None
    assert IMAGE_PROMPTED not in derived.files
    assert set(derived.parity) == {"image", "text", "prompt"}
    assert [line for line in lines if line.startswith("image_prompted.onnx: omitted")]


@pytest.mark.usefixtures("traced_before")
def test_the_command_adds_it_on_demand(ztune: Command, tmp_path: Path) -> None:
    name = write_tiny(tmp_path / "model")
    words = ("export", "--model", name, "--image-tokens", "--json")
    done = ztune(*words, "--out", tmp_path / "b")
    assert done.code == 0, done.err
    assert done.json["visual"]["width"] == 64
    assert load_bundle(tmp_path / "b").visual is not None
    refused = ztune(*words, "--precision", "int8", "--out", tmp_path / "c")
    assert refused.code == 1
    assert "--image-tokens requires --precision fp32" in refused.err
