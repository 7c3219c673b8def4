"""LoRA adapters against peft's own merge."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from export.adapter import merge_adapter
from export.clip import load_clip
from tests.export.tiny_clip import CONFIG, KNOWN, assert_same, build, state_of
from ztune.errors import ConfigError, FormatError


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-C", CONFIG)


def train(model: nn.Module, folder: Path, targets: list[str], **options: Any) -> Any:
    """Save an adapter with random weights, and return peft's merged model."""
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    config = peft.LoraConfig(target_modules=targets, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        adapted = peft.get_peft_model(copy.deepcopy(model), config)
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name or (name.endswith(".bias") and options.get("bias")):
            parameter.data += 0.1
    adapted.save_pretrained(str(folder))
    return adapted.merge_and_unload()


WAYS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "linear": (["c_fc", "c_proj"], {}),
    "attention": (["attn"], {}),
    "embedding": (["token_embedding"], {}),
    "convolution": (["conv1", "c_fc"], {}),
    "rslora": (["c_fc"], {"use_rslora": True}),
    "patterns": (
        ["c_fc", "c_proj"],
        {"rank_pattern": {"c_proj": 2}, "alpha_pattern": {"mlp.c_proj": 32}},
    ),
    "saved modules": (["c_fc"], {"modules_to_save": ["ln_final"]}),
    "biases": (["c_fc"], {"bias": "all"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_is_merged_as_by_peft(way: str, tmp_path: Path) -> None:
    targets, options = WAYS[way]
    source = build()
    merged = train(source, tmp_path / "adapter", targets, **options)
    ours = copy.deepcopy(source)
    assert "merged the LoRA adapter of" in merge_adapter(ours, tmp_path / "adapter")
    expected, got = merged.state_dict(), ours.state_dict()
    changed = 0
    for key, value in source.state_dict().items():
        torch.testing.assert_close(got[key], expected[key], atol=1e-6, rtol=1e-5)
        changed += not torch.equal(value, got[key])
    assert changed >= 1
    assert_same(ours, merged)


@pytest.mark.filterwarnings("ignore")
def test_load_clip_merges_it_and_names_it(tmp_path: Path) -> None:
    source = build()
    merged = train(source, tmp_path / "adapter", ["c_fc"])
    torch.save({"state_dict": state_of(source)}, file := tmp_path / "base.pt")
    (known := tmp_path / "known.json").write_text(KNOWN)
    loaded = load_clip(
        "Tiny-C", str(file), preprocess_from=str(known), adapter=tmp_path / "adapter"
    )
    assert_same(loaded.model, merged)
    assert loaded.source["pretrained"] == "base.pt + adapter adapter"
    assert loaded.notes == ("merged the LoRA adapter of 4 modules",)
    with pytest.raises(ConfigError, match=r"a LoRA adapter: pass it as `adapter`"):
        load_clip("Tiny-C", str(tmp_path / "adapter"), preprocess_from=str(known))


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_cannot_be_merged_are_named(tmp_path: Path) -> None:
    source = build()
    folder = tmp_path / "adapter"
    with pytest.raises(ConfigError, match=r"not a folder with adapter_config\.json"):
        merge_adapter(source, folder)
    train(source, folder, ["c_fc"])
    before = state_of(source)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    described, tensors = json.loads(config.read_text()), load_file(file)

    def refuse(message: str, error: type[Exception] = ConfigError, **changes: Any) -> None:
        config.write_text(json.dumps({**described, **changes}))
        with pytest.raises(error, match=message):
            merge_adapter(source, folder)

    refuse("is of kind LOHA, expected plain LoRA: merge it with peft", peft_type="LOHA")
    refuse("is of kind use_dora, expected plain LoRA", use_dora=True)
    refuse("is of kind init_lora_weights pissa, expected plain", init_lora_weights="pissa")
    refuse("alpha_pattern .* is a regular expression", alpha_pattern={"(a+)+$": 3})
    refuse(r"lora_alpha", FormatError, lora_alpha="x")
    first = next(iter(tensors))
    save_file(
        {**tensors, first.replace("lora_A", "lora_magnitude_vector"): tensors[first] + 1}, file
    )
    refuse("lora_magnitude_vector.* is not supported: merge it with peft first")
    save_file({key: value for key, value in tensors.items() if key != first}, file)
    refuse("has only one of lora_A and lora_B")
    save_file({key.replace("c_fc", "fc9"): value for key, value in tensors.items()}, file)
    refuse(r"changes .*fc9\.weight., which no part of the model have")
    save_file({key: value[..., :1].clone() for key, value in tensors.items()}, file)
    refuse(r"lora_A \[4, 1\] and lora_B \[128, 1\] of .* do not match")
    save_file({key: value[-9:].clone() for key, value in tensors.items()}, file)
    refuse(r"adds \[9, 32\] to a weight \[128, 32\]: pass the model that it was trained on")
    save_file({"base_model.model.ln_final.bias": before["ln_final.bias"]}, file)
    refuse("has no lora_A and lora_B weights")
    save_file({"base_model.model.ln_final.bias": torch.zeros(3)}, file)
    refuse(r'"ln_final.bias" is \[3\], the model has \[32\]')
    shutil.copy(config, file)
    refuse("is a JSON file")
    file.unlink()
    refuse("not a folder with")
