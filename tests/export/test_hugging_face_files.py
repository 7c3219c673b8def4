"""Ways in which models of transformers are saved, and folders that are refused."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from export.clip import load_clip
from export.fit import fit_weights
from export.loaded import LoadedClip
from tests.export.hugging_face_models import KINDS, SIDE, save
from tests.export.small_models import t5_like_tokenizer, write_tiny
from ztune.errors import ConfigError, FormatError, ZtuneError

TEXTS = ("a photo of a cat", "x", "猫 7")
Saved = tuple[Any, Path]
Settings = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Return a function that saves a small model of a kind once; it and its folder."""

    @functools.cache
    def get(kind: str) -> Saved:
        folder = tmp_path_factory.mktemp("saved") / kind
        return save(kind, folder), folder

    return get


@pytest.fixture
def clip(saved: Callable[[str], Saved], tmp_path: Path) -> Path:
    """Return a copy of a CLIPModel's folder."""
    return shutil.copytree(saved("clip")[1], tmp_path / "mine")


def load(folder: Path, **options: Any) -> LoadedClip:
    return load_clip(f"local-dir:{folder}", **options)


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def unit(features: Any) -> Any:
    found = features if isinstance(features, torch.Tensor) else features.pooler_output
    return torch.nn.functional.normalize(found, dim=-1).numpy()


def assert_equal(loaded: LoadedClip, kind: str, model: Any, folder: Path) -> None:
    """Compare image and text features with those of transformers."""
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    tokens = AutoTokenizer.from_pretrained(folder)(
        list(TEXTS), padding="max_length", max_length=loaded.text.context_length,
        return_tensors="pt",
    )  # fmt: skip
    mask = None if kind.startswith("siglip") else tokens["attention_mask"]
    own: Any = loaded.model
    with torch.no_grad():
        images = unit(model.get_image_features(pixel_values=pixels))
        texts = unit(model.get_text_features(tokens["input_ids"], attention_mask=mask))
        our_images = own.encode_image(pixels, normalize=True)
        ids = torch.from_numpy(loaded.reference.tokenize(TEXTS))
        our_texts = own.encode_text(ids, normalize=True)
    np.testing.assert_allclose(our_images, images, atol=1e-5)
    np.testing.assert_allclose(our_texts, texts, atol=1e-5)
    np.testing.assert_allclose(own.logit_scale.exp(), model.logit_scale.exp().detach())


def in_shards(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def as_bin(model: Any, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def in_bin_shards(model: Any, folder: Path) -> None:
    save_torch_state_dict(
        model.state_dict(), folder, safe_serialization=False, max_shard_size="20KB",
        filename_pattern="pytorch_model{suffix}.bin",
    )  # fmt: skip
    assert (folder / "pytorch_model.bin.index.json").is_file()


def in_half(model: Any, folder: Path) -> None:
    model.half().save_pretrained(folder)


def in_bfloat16(model: Any, folder: Path) -> None:
    model.bfloat16().save_pretrained(folder)


def of_old_versions(model: Any, folder: Path) -> None:
    """Save constants too, as versions before 4.31 did."""
    constants = {
        f"{name}.position_ids": part.position_ids.clone()
        for name, part in model.named_modules()
        if hasattr(part, "position_ids")
    }
    assert constants
    save_file(
        {**model.state_dict(), **constants},
        folder / "model.safetensors",
        {"format": "pt"},
    )


WAYS = (in_shards, as_bin, in_bin_shards, in_half, in_bfloat16, of_old_versions)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_saving_gives_the_features_of_transformers(
    kind: str, way: Callable[[Any, Path], None], saved: Callable[[str], Saved], tmp_path: Path
) -> None:
    original, folder = saved(kind)
    own = shutil.copytree(folder, tmp_path / kind)
    (own / "model.safetensors").unlink()
    model = copy.deepcopy(original)
    way(model, own)
    loaded = load(own)
    assert_equal(loaded, kind, model.float(), own)
    assert loaded.notes == ()


@pytest.mark.parametrize("kind", ["clip", "chinese_clip", "altclip"])
def test_older_tokenizer_files(kind: str, saved: Callable[[str], Saved], tmp_path: Path) -> None:
    model, folder = saved(kind)
    own = shutil.copytree(folder, tmp_path / kind)
    expected = load(folder)
    (own / "tokenizer.json").unlink()
    loaded = load(own)
    np.testing.assert_array_equal(
        loaded.reference.tokenize(TEXTS), expected.reference.tokenize(TEXTS)
    )
    assert_equal(loaded, kind, model, folder)


def test_clip_variants(tmp_path: Path, saved: Callable[[str], Saved]) -> None:
    """Cover what open_clip computes with other settings, and what it does not."""
    exact = {"hidden_act": "gelu", "layer_norm_eps": 1e-3}
    variants: tuple[tuple[Settings, Settings, str], ...] = (
        (exact, exact, "prefix"),
        (exact, {}, "sequence"),
        ({"eos_token_id": 2}, {}, "prefix"),
        ({"hidden_act": "gelu_new"}, {"hidden_act": "gelu_new"}, "sequence"),
    )
    for number, (text, vision, graph) in enumerate(variants):
        folder = shutil.copytree(saved("clip")[1], tmp_path / str(number))
        model = save("clip", folder, text, vision)
        loaded = load(folder)
        assert loaded.text.graph == graph
        assert loaded.text.pooling == ("argmax" if "eos_token_id" in text else "eos")
        assert_equal(loaded, "clip", model, folder)


@pytest.mark.parametrize("prefix", ["", "module.model."])
def test_weights_without_their_folder_fit_open_clips_architecture(
    prefix: str, saved: Callable[[str], Saved]
) -> None:
    model, folder = saved("clip")
    loaded = load(folder, random_weights=3)
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    (note,) = fit_weights(loaded.model, state, "checkpoint", "Tiny")
    assert "transformers' names" in note
    assert_equal(loaded, "clip", model, folder)
    del state[f"{prefix}vision_model.post_layernorm.bias"]
    with pytest.raises(ConfigError, match=r'"visual.ln_post.bias"'):
        fit_weights(loaded.model, state, "checkpoint", "Tiny")


def test_random_weights_need_no_file(clip: Path) -> None:
    (clip / "model.safetensors").unlink()
    first, again = load(clip, random_weights=1), load(clip, random_weights=1)
    assert first.source["pretrained"] == "random weights, seed 1"
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_files_of_the_user_replace_those_of_the_folder(clip: Path, tmp_path: Path) -> None:
    shutil.copy(clip / "tokenizer.json", tmp_path / "t.json")
    values = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": "squash"}
    (tmp_path / "p.json").write_text(json.dumps(values))
    for name in ("preprocessor_config.json", "tokenizer.json", "vocab.json", "merges.txt"):
        (clip / name).unlink()
    loaded = load(
        clip, tokenizer_file=tmp_path / "t.json", preprocess_from=str(tmp_path / "p.json")
    )
    assert loaded.image.mean == (0.1, 0.2, 0.3)
    assert loaded.image.resize_mode == "squash"
    assert loaded.text.suffix_ids == (loaded.text.prefix_ids[0] + 1,)


# Folders that are refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertModel"]}, r'"bert" \(BertModel\), expected'),
        (
            {"model_type": "llava"},
            r'is a "llava" .* expected a model .* image and a text tower: cl',
        ),
        ({"model_type": "clip_vision_model"}, r"\(one tower only\)"),
        ({"model_type": "siglip2", "architectures": ["Siglip2Model"]}, r"NaFlex.*fixed resolution"),
        ({"architectures": ["CLIPForImageClassification"]}, "saved as CLIPForImageClassification"),
        ({"auto_map": {"AutoModel": "x.X"}}, r'code of its own .*"auto_map".* never run'),
        ({"model_type": None}, 'has no "model_type"'),
    ],
)
def test_another_model_is_named(clip: Path, config: dict[str, Any], message: str) -> None:
    edit(clip / "config.json", lambda value: value.update(config))
    with pytest.raises(ConfigError, match=message) as raised:
        load(clip)
    assert "\n" not in str(raised.value)
    assert str(clip.parent) not in str(raised.value)


def test_missing_files_are_named_before_the_model_is_built(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.hugging_face._load_model", lambda *_: pytest.fail("was built"))
    for names, message in (
        (["preprocessor_config.json"], "no preprocessor_config.json; add"),
        (["tokenizer.json", "vocab.json"], r"no tokenizer \(tokenizer.json, .*`tokenizer=FILE`"),
        (["model.safetensors"], r"no weights, expected model.safetensors or pytorch_model.bin"),
    ):
        own = shutil.copytree(clip, clip.parent / names[0])
        for name in names:
            (own / name).unlink()
        with pytest.raises(ConfigError, match=message):
            load(own)
    (clip / "model.safetensors").rename(clip / "tf_model.h5")
    with pytest.raises(ConfigError, match=r"tf_model.h5 cannot be read"):
        load(clip)


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"]
)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_truncated_files(clip: Path, name: str, share: float) -> None:
    content = (clip / name).read_bytes()
    (clip / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises((ConfigError, FormatError)) as raised:
        load(clip)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_damaged_weights_are_named(saved: Callable[[str], Saved], clip: Path) -> None:
    safe, other = clip / "model.safetensors", clip / "pytorch_model.bin"
    for content, message in (
        (b"", "is an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (safe.read_bytes()[:2000], "its weights cannot be loaded as CLIPModel"),
    ):
        safe.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load(clip)
    safe.unlink()
    as_bin(saved("clip")[0], clip)
    other.write_bytes(other.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="is a truncated archive"):
        load(clip)


def test_a_checkpoint_that_could_run_code_is_refused(clip: Path) -> None:
    (clip / "model.safetensors").unlink()
    torch.save({"x": print}, clip / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="its weights cannot be loaded as CLIPModel"):
        load(clip)


def test_shards_stay_in_their_folder(saved: Callable[[str], Saved], clip: Path) -> None:
    (clip / "model.safetensors").rename(clip.parent / "model.safetensors")
    in_shards(saved("clip")[0], clip)
    index = clip / "model.safetensors.index.json"
    edit(index, lambda value: value["weight_map"].update(logit_scale="../model.safetensors"))
    with pytest.raises(ConfigError, match=r"names the file '../model.safetensors', expected one"):
        load(clip)
    edit(index, lambda value: value["weight_map"].update(logit_scale="model-9.safetensors"))
    with pytest.raises(ConfigError, match=r"model-9.safetensors is missing, which .*index.json n"):
        load(clip)
    edit(index, lambda value: value.update(weight_map={}))
    with pytest.raises(ConfigError, match='has no "weight_map"'):
        load(clip)


def test_two_checkpoints_in_a_folder(saved: Callable[[str], Saved], clip: Path) -> None:
    as_bin(saved("clip")[0], clip)
    assert load(clip).notes == ("model.safetensors is used, pytorch_model.bin is not read",)
    (clip / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"two checkpoints, model.safetensors and model.safeten"):
        load(clip)


def test_models_of_both_libraries_in_a_folder(clip: Path) -> None:
    write_tiny(clip)
    with pytest.raises(ConfigError, match=r'folder "mine" has two models: the size of a feature'):
        load(clip)
    edit(clip / "config.json", lambda value: value.clear())
    assert load(clip).reference.library == "open_clip"


def test_weights_that_are_not_those_of_the_model(clip: Path) -> None:
    file = clip / "model.safetensors"
    state = load_file(file)
    save_file({**state, "extra.weight": torch.ones(2)}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"have 1 weights that CLIPModel has not: extra.weight"):
        load(clip)
    del state["text_projection.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 1 weights of CLIPModel: text_projection.weight"):
        load(clip)


def test_weights_that_are_not_finite(clip: Path) -> None:
    file = clip / "model.safetensors"
    state = load_file(file)
    state["visual_projection.weight"][2, 3] = float("inf")
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r'"visual_projection.weight" \[24, 32\] has 1 values'):
        load(clip)


def test_weights_of_another_shape(clip: Path) -> None:
    edit(clip / "config.json", lambda value: value["text_config"].update(hidden_size=64))
    with pytest.raises(ConfigError, match=r'weight "text_model\..*\[.*64.*config.json is of'):
        load(clip)


def test_an_adapter_beside_the_weights_is_not_applied_unasked(clip: Path) -> None:
    (clip / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match="which transformers would apply unasked"):
        load(clip)


def test_a_tokenizer_of_another_model(
    saved: Callable[[str], Saved], clip: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"the tokenizer has ids up to .*, but .* table has"):
        load(saved("siglip")[1], tokenizer_file=clip / "tokenizer.json")
    t5_like_tokenizer().save(str(tmp_path / "t5.json"))
    with pytest.raises(ConfigError, match=r"pads with the id 1, but the text tower .* masks the i"):
        load(saved("chinese_clip")[1], tokenizer_file=tmp_path / "t5.json", pad_id=1)


def test_the_pretrained_option_is_refused(clip: Path) -> None:
    with pytest.raises(ConfigError, match=r"includes its weights: leave out `pretrained`"):
        load(clip, pretrained="openai")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft about transformers
def test_a_lora_adapter_is_merged(
    saved: Callable[[str], Saved], clip: Path, tmp_path: Path
) -> None:
    model = copy.deepcopy(saved("clip")[0])
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "fc1"])
    tuned = peft.get_peft_model(model, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn_like(parameter)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    loaded = load(clip, adapter=tmp_path / "adapter")
    assert loaded.source["pretrained"] == "local-dir:mine + adapter adapter"
    assert_equal(loaded, "clip", tuned.merge_and_unload(), clip)


def test_an_image_size_that_the_processor_does_not_give(clip: Path) -> None:
    file = clip / "preprocessor_config.json"
    refused: tuple[tuple[Settings, str], ...] = (
        ({"crop_size": {"height": 16, "width": 16}}, "crops to 16 x 16, where .* takes 32 x 32"),
        ({"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 40}},
         "resizes to shortest_edge 40 and crops to 32 x 32"),
        ({"size": {"shortest_edge": 32}, "resample": 1}, "resamples with Pillow's filter 1"),
        ({"resample": 3, "rescale_factor": 0.5}, "scales levels by 0.5 instead of 1/255"),
        ({"rescale_factor": 1 / 255, "do_resize": False}, "has do_resize = false"),
        ({"do_resize": True, "image_processor_type": "BlipImageProcessor"}, "is a BlipImageProc"),
    )  # fmt: skip
    for change, message in refused:
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        with pytest.raises(ZtuneError, match=f"{message}.*`preprocess_from"):
            load(clip)
