"""Loading models: errors where open_clip would silently be wrong."""

import json
import os
import pickle
import socket
import urllib.request
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch

from export.clip import load_clip
from tests.export.small_models import small_config, write_model
from ztune.errors import ConfigError, FormatError, ZtuneError

TINY = small_config("ViT-B-32")
TINY["vision_cfg"] |= {"layers": 1}
TINY["text_cfg"] |= {"layers": 1, "context_length": 20}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def no_name(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small architecture in open_clip's registry, with tags that disagree, and one without."""
    configs = open_clip.factory._MODEL_CONFIGS
    published = open_clip.pretrained._PRETRAINED
    openai = published["ViT-B-32"]["openai"]
    plain = published["ViT-B-32"]["laion2b_s34b_b79k"]
    siglip = published["ViT-B-16-SigLIP"]["webli"]
    assert openai["quick_gelu"]
    assert siglip["mean"] == (0.5, 0.5, 0.5)
    assert siglip["resize_mode"] == "squash"
    for name, tags in {
        "Tiny": {"openai": openai, "laion": plain},
        "Tiny-quick": {"openai": openai},
        "Tiny-squash": {"webli": siglip},
        "Tiny-new": None,
    }.items():
        config = {**TINY, "quick_gelu": True} if name == "Tiny-quick" else TINY
        monkeypatch.setitem(configs, name, config)
        if tags:
            monkeypatch.setitem(published, name, tags)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder, TINY)
    return folder / "open_clip_model.safetensors"


def quick(module: Any) -> bool:
    return any(type(part).__name__ == "QuickGELU" for part in module.modules())


def test_no_weights_is_an_error_that_lists_the_tags() -> None:
    with pytest.raises(ConfigError, match=r"needs `pretrained` TAG or FILE .*laion2b_s34b_b79k"):
        load_clip("ViT-B-32")
    with pytest.raises(ConfigError, match="ViT-S-32 has no published tags"):
        load_clip("ViT-S-32")


def test_random_weights_follow_their_seed(registered: None) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (load_clip("Tiny-new", random_weights=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    table = [loaded.tower.embedding.weight for loaded in (first, again, other)]
    assert torch.equal(table[0], table[1])
    assert not torch.equal(table[0], table[2])
    assert first.source["pretrained"] == "random weights, seed 1"
    with pytest.raises(ConfigError, match="mutually exclusive"):
        load_clip("Tiny-new", "openai", random_weights=1)


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = write_model(tmp_path, TINY)
    file = tmp_path / "open_clip_model.safetensors"
    state = safetensors.torch.load_file(file)
    state["visual.proj"][3, :2] = float("nan")
    safetensors.torch.save_file(state, file)
    with pytest.raises(ConfigError, match=r'weight "visual.proj" \[64, 64\] has 2 values'):
        load_clip(model)


def test_unknown_models_and_tags_name_close_ones() -> None:
    with pytest.raises(ConfigError, match=r'"vit-b-33" is not known .*did you mean ViT-B-32'):
        load_clip("vit-b-33", "openai")
    with pytest.raises(
        ConfigError, match=r"neither a file nor a tag of ViT-B-32; tags: .*laion2b_e16"
    ):
        load_clip("ViT-B-32", "laion2b_e17")


@pytest.mark.usefixtures("offline")
def test_without_network_the_error_says_what_to_pass() -> None:
    for model, tag in (
        ("ViT-B-32", "laion2b_s34b_b79k"),
        ("ViT-B-32", "openai"),
        ("hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K", None),
    ):
        with pytest.raises(ZtuneError, match=r"\(no network\).*`pretrained=FILE`.*local-dir:") as e:
            load_clip(model, tag)
        assert "\n" not in str(e.value)


@pytest.mark.usefixtures("offline", "registered")
def test_a_tokenizer_from_the_hub_can_be_passed_as_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {**TINY, "text_cfg": {**TINY["text_cfg"], "hf_tokenizer_name": "some/where"}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-named", named)
    with pytest.raises(ZtuneError, match=r"tokenizer of .* \(no network\); .*`tokenizer=FILE`"):
        load_clip("Tiny-named", random_weights=0)


def test_local_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none does not exist"):
        load_clip(f"local-dir:{tmp_path / 'none'}")
    with pytest.raises(FormatError, match=r"open_clip_config\.json does not exist"):
        load_clip(f"local-dir:{tmp_path}")
    model = write_model(tmp_path / "model", TINY)
    with pytest.raises(ConfigError, match='includes its weights: remove `pretrained` "openai"'):
        load_clip(model, "openai")
    loaded = load_clip(model)
    assert loaded.source == {
        "model": "local-dir:model", "pretrained": "local-dir:model", "licence": "unknown",
    }  # fmt: skip
    assert loaded.image.mean == (0.5, 0.4, 0.3)
    assert loaded.image.resize_mode == "shortest"
    config = tmp_path / "model" / "open_clip_config.json"
    described = json.loads(config.read_text())
    config.write_text(json.dumps({"model_cfg": described["model_cfg"]}))
    with pytest.raises(ConfigError, match=r"preprocess_cfg.*`preprocess_from"):
        load_clip(model)
    assert load_clip(model, preprocess_from="ViT-B-16-SigLIP:webli").image.resize_mode == "squash"
    (tmp_path / "model" / "open_clip_model.safetensors").unlink()
    config.write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="no weights in"):
        load_clip(model)


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    model = write_model(tmp_path, TINY)
    weights = tmp_path / "open_clip_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    with pytest.raises(ConfigError, match="is a damaged safetensors file"):
        load_clip(model)
    weights.write_bytes(good)
    described = json.loads((tmp_path / "open_clip_config.json").read_text())
    for change in ({"vision_cfg": {"image_size": 96}}, {"text_cfg": {"context_length": 12}}):
        config = json.loads(json.dumps(described))
        for tower, values in change.items():
            config["model_cfg"][tower] |= values
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        # open_clip resizes the embeddings and only logs it
        with pytest.raises(ConfigError, match="position embeddings of another size"):
            load_clip(model)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("evil-was-here",))


@pytest.mark.usefixtures("registered")
def test_a_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "evil.pt"
    file.write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(ConfigError, match="could run code; save its state_dict as safetensors"):
        load_clip("Tiny-squash", str(file))
    torch.save({"state_dict": Evil()}, file)
    with pytest.raises(ConfigError, match="could run code"):
        load_clip("Tiny-squash", str(file))
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.usefixtures("registered")
def test_a_bare_checkpoint_takes_what_published_weights_agree_on(
    checkpoint: Path, tmp_path: Path
) -> None:
    agreed = load_clip("Tiny-squash", str(checkpoint))
    assert agreed.image.mean == (0.5, 0.5, 0.5)
    assert agreed.image.resize_mode == "squash"
    assert agreed.source["pretrained"] == checkpoint.name
    assert load_clip("Tiny-quick", str(checkpoint)).config["quick_gelu"] is True
    with pytest.raises(ConfigError, match="mean, std and quick_gelu of its training are unk"):
        load_clip("Tiny-new", str(checkpoint))

    with pytest.raises(ConfigError, match=r"`preprocess_from` .*groups: openai; laion"):
        load_clip("Tiny", str(checkpoint))
    openai = load_clip("Tiny", str(checkpoint), preprocess_from="openai")
    assert quick(openai.model)
    assert "built with QuickGELU" in openai.notes[0]
    laion = load_clip("Tiny", str(checkpoint), preprocess_from="laion")
    assert not quick(laion.model)
    assert laion.notes == ()
    other = load_clip("Tiny", str(checkpoint), preprocess_from="MobileCLIP-S1:datacompdr")
    assert (other.image.mean, other.image.interpolation) == ((0.0, 0.0, 0.0), "bilinear")

    file = tmp_path / "prepare.json"
    file.write_text(json.dumps({"mean": [0, 0, 0], "std": [1, 1, 1], "quick_gelu": True}))
    given = load_clip("Tiny", str(checkpoint), preprocess_from=str(file))
    assert quick(given.model)
    assert given.image.std == (1.0, 1.0, 1.0)
    file.write_text(json.dumps({"mean": [0, 0, 0], "std": [1, 1, 1], "resize": "squash"}))
    with pytest.raises(ConfigError, match="expected an object with mean, std and optional"):
        load_clip("Tiny", str(checkpoint), preprocess_from=str(file))
    file.write_text(json.dumps({"mean": [0, 0], "std": [1, 1, 1], "quick_gelu": True}))
    with pytest.raises(FormatError, match=r"\$\.mean: expected array of length >= 3"):
        load_clip("Tiny", str(checkpoint), preprocess_from=str(file))
    with pytest.raises(
        ConfigError, match=r"neither a file nor a tag of Tiny \(tags: openai, laion\)"
    ):
        load_clip("Tiny", str(checkpoint), preprocess_from="lion")


@pytest.mark.usefixtures("registered")
def test_a_tag_trained_with_quickgelu_gets_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # open_clip builds the model without it, and only warns
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(checkpoint))
    loaded = load_clip("Tiny", "openai")
    assert quick(loaded.model)
    assert loaded.config["quick_gelu"] is True
    assert "QuickGELU" in loaded.notes[0]
    same = load_clip("Tiny-quick", "openai")
    assert same.notes == ()
    tokens = torch.randint(1, 49406, (2, 20))
    assert torch.equal(same.model.encode_text(tokens), loaded.model.encode_text(tokens))
    plain = load_clip("Tiny", "laion")
    assert not torch.allclose(plain.model.encode_text(tokens), loaded.model.encode_text(tokens))


def test_unsupported_towers(tmp_path: Path) -> None:
    config = json.loads(json.dumps(TINY))
    config["vision_cfg"]["image_size"] = [64, 32]
    with pytest.raises(ConfigError, match="64 x 32; only square"):
        load_clip(write_model(tmp_path, config))


def test_nothing_is_printed_and_loggers_are_left_as_they_were(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import logging

    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    load_clip(write_model(tmp_path, TINY))
    capfd.readouterr()
    load_clip(f"local-dir:{tmp_path}")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert (root.handlers[:], root.level) == before
