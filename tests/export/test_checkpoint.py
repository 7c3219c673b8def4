"""Checkpoints as they come: every way of saving gives the features of the model that was saved."""

import argparse
import copy
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import convert_to_custom_text_state_dict
from safetensors.torch import save_file

from export.checkpoint import read_checkpoint
from export.clip import load_clip
from export.loaded import LoadedClip
from tests.export.tiny_clip import CONFIG, KNOWN, assert_same, build, state_of
from ztune.errors import ConfigError


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = open_clip.factory._MODEL_CONFIGS
    monkeypatch.setitem(configs, "Tiny-C", CONFIG)
    monkeypatch.setitem(configs, "Tiny-C-text", {**CONFIG, "custom_text": True})
    large = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": 48}}
    monkeypatch.setitem(configs, "Tiny-C-48", large)
    long = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "context_length": 28}}
    monkeypatch.setitem(configs, "Tiny-C-long", long)


@pytest.fixture(scope="module")
def source() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-C", CONFIG)
        return build()


@pytest.fixture
def known(tmp_path: Path) -> str:
    file = tmp_path / "known.json"
    file.write_text(KNOWN)
    return str(file)


def load(file: Path, known: str, model: str = "Tiny-C", **options: Any) -> LoadedClip:
    return load_clip(model, str(file), preprocess_from=known, **options)


def prefixed(state: Any, prefix: str) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def with_optimizer(state: Any) -> dict[str, Any]:
    return {
        "epoch": 3,
        "best": np.float64(0.7),
        "step": np.int64(12),
        "lrs": np.linspace(0, 1, 4),
        "flags": np.array([True, False]),
        "args": argparse.Namespace(lr=1e-3, model="x", betas=(0.9, 0.98), seed=np.int32(3)),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
        "state_dict": state,
    }


SAVED: dict[str, Callable[[Any], Any]] = {
    "plain": lambda state: state,
    "ordered": OrderedDict,
    "state_dict": lambda state: {"epoch": 1, "state_dict": state},
    "model": lambda state: {"model": state, "optimizer": {}},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "module": lambda state: {"module": state},
    "nested": lambda state: {"model": {"state_dict": state}},
    "distributed": lambda state: {"state_dict": prefixed(state, "module.")},
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "compiled and distributed": lambda state: prefixed(state, "module._orig_mod."),
    "compiled inside": lambda state: {
        key.replace("transformer.", "transformer._orig_mod."): value for key, value in state.items()
    },
    "lightning": lambda state: {"state_dict": prefixed(state, "model."), "callbacks": {}},
    "clip": lambda state: prefixed(state, "clip."),
    "deep": lambda state: prefixed(state, "learner.backbone.clip_model."),
    "half": lambda state: {key: value.half() for key, value in state.items()},
    "bfloat16": lambda state: {key: value.bfloat16() for key, value in state.items()},
    "double": lambda state: {key: value.double() for key, value in state.items()},
    "scale of shape 1": lambda state: {**state, "logit_scale": state["logit_scale"][None]},
    "with optimizer": with_optimizer,
    "inside text": lambda state: {
        key if key.startswith(("visual.", "logit")) else f"text.{key}": value
        for key, value in state.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("way", SAVED)
def test_every_way_of_saving_gives_the_same_features(
    way: str, source: Any, tmp_path: Path, known: str
) -> None:
    torch.save(SAVED[way](state_of(source)), file := tmp_path / "saved.pt")
    expected = copy.deepcopy(source)
    if way in ("half", "bfloat16"):
        expected = (expected.half() if way == "half" else expected.bfloat16()).float()
    loaded = load(file, known)
    assert_same(loaded.model, expected)
    assert loaded.notes == ()
    assert next(loaded.model.parameters()).dtype == torch.float32


def test_other_containers(source: Any, tmp_path: Path, known: str) -> None:
    save_file(state_of(source), tmp_path / "weights.pt")  # known by content, not by its ending
    assert_same(load(tmp_path / "weights.pt", known).model, source)
    torch.save(state_of(source), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(load(tmp_path / "old.pt", known).model, source)


def test_a_custom_text_tower_takes_a_plain_checkpoint(
    source: Any, tmp_path: Path, known: str
) -> None:
    torch.save(prefixed(state_of(source), "module."), file := tmp_path / "saved.pt")
    assert_same(load(file, known, "Tiny-C-text").model, source)
    custom = convert_to_custom_text_state_dict(state_of(source))
    torch.save(prefixed(custom, "clip."), file)
    assert_same(load(file, known, "Tiny-C-text").model, source)


class Towers(torch.nn.Module):
    """OpenAI's archives are traced forwards of both towers."""

    def __init__(self, clip: Any):
        super().__init__()
        for name, child in clip.named_children():
            self.add_module(name, child)
        for name, parameter in clip.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.register_buffer("input_resolution", torch.tensor(32))
        self.register_buffer("context_length", torch.tensor(20))
        self.register_buffer("attn_mask", clip.attn_mask)
        self.sizes = [1, 2]

    def forward(self, image: torch.Tensor, index: torch.Tensor) -> Any:
        return self.visual(image), self.token_embedding(index) + self.positional_embedding


def archive(source: Any, file: Path) -> Path:
    towers = Towers(copy.deepcopy(source)).half().float()
    example = (torch.randn(2, 3, 32, 32), torch.zeros(2, 20, dtype=torch.long))
    torch.jit.trace(towers, example, check_trace=False).half().save(str(file))
    return file


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_gives_its_tensors_and_runs_nothing(
    source: Any, tmp_path: Path, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = archive(source, tmp_path / "ViT.pt")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the archive's code is compiled")

    expected = torch.jit.load(str(file)).state_dict()
    monkeypatch.setattr(torch.jit, "load", refuse)
    state = read_checkpoint(file).state
    assert {"input_resolution", "context_length", "attn_mask"} == expected.keys() - state.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    loaded = load(file, known)
    assert_same(loaded.model, copy.deepcopy(source).half().float())
    assert loaded.notes == ()

    # The archive's code can be anything: it is not read.
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(tmp_path / "x.pt", "w") as changed:
        for entry in whole.infolist():
            content = whole.read(entry)
            code = entry.filename.endswith(".py")
            changed.writestr(entry.filename, b"import os; os.abort()" if code else content)
    assert_same(load(tmp_path / "x.pt", known).model, loaded.model)
    with (
        zipfile.ZipFile(file) as whole,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as changed,
    ):
        for entry in whole.infolist():
            changed.writestr(entry.filename, whole.read(entry))
    with pytest.raises(ConfigError, match=r"damaged .*compressed, which torch never does"):
        read_checkpoint(tmp_path / "x.pt")


def test_moving_averages_are_taken_only_when_asked_for(
    source: Any, tmp_path: Path, known: str
) -> None:
    averaged = build(seed=1)
    state, ema = state_of(source), state_of(averaged)
    for saved in (
        {"state_dict": state, "ema": ema},
        {"model": state, "model_ema": prefixed(ema, "module.")},
        {"state_dict": state, "state_dict_ema": {"state_dict": ema}},
        {**prefixed(state, "model."), **prefixed(ema, "model_ema.")},
        {"state_dict": {**prefixed(state, "model."), **prefixed(ema, "ema.module.")}},
    ):
        torch.save(saved, file := tmp_path / "saved.pt")
        loaded = load(file, known)
        assert_same(loaded.model, source)
        assert "plain weights are taken (`ema` takes them)" in loaded.notes[0]
        loaded = load(file, known, ema=True)
        assert_same(loaded.model, averaged)
        assert loaded.notes == ()
    torch.save({"ema": ema}, file)
    with pytest.raises(ConfigError, match=r"only EMA weights: pass `ema`"):
        load(file, known)
    torch.save(state, file)
    with pytest.raises(ConfigError, match=r"no EMA weights \(it has .*: leave out `ema`"):
        load(file, known, ema=True)
    with pytest.raises(ConfigError, match="`ema` is for a checkpoint file"):
        load_clip("Tiny-C", random_weights=1, ema=True)


def test_weights_of_other_parts_are_named(source: Any, tmp_path: Path, known: str) -> None:
    head = {f"decoder.{i}.weight": torch.zeros(2) for i in range(5)}
    torch.save({**prefixed(state_of(source), "clip."), **head}, file := tmp_path / "saved.pt")
    loaded = load(file, known)
    assert_same(loaded.model, source)
    assert loaded.notes == (
        "5 weights of the checkpoint are not used: decoder.0.weight, decoder.1.weight, "
        "decoder.2.weight, ...",
    )


@pytest.mark.parametrize("model", ["Tiny-C-48", "Tiny-C-long"])
def test_position_embeddings_are_resized_as_by_open_clip(
    model: str, source: Any, tmp_path: Path, known: str
) -> None:
    torch.save(state_of(source), file := tmp_path / "saved.pt")
    sizes = {
        "Tiny-C-48": r"images of 32 x 32 pixels in the checkpoint, 48 x 48 in the model",
        "Tiny-C-long": r"20 tokens in the checkpoint, 28 in the model",
    }
    with pytest.raises(ConfigError, match=rf"{sizes[model]}.*`interpolate_positions`"):
        load(file, known, model)
    expected = build(model, seed=9)
    open_clip.load_checkpoint(expected, str(file))
    assert_same(load(file, known, model, interpolate_positions=True).model, expected)


def test_two_models_in_one_checkpoint_are_refused(source: Any, tmp_path: Path, known: str) -> None:
    state = state_of(source)
    torch.save({**prefixed(state, "student."), **prefixed(state, "teacher.")}, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match='two models, under "student" and "teacher"'):
        load(tmp_path / "x.pt", known)


def test_two_weights_of_one_name_are_refused(source: Any, tmp_path: Path, known: str) -> None:
    state = state_of(source)
    twice = {f"module.{key}": tensor + 1 for key, tensor in state.items()}
    torch.save({**state, **twice}, tmp_path / "x.pt")
    with pytest.raises(ConfigError, match=r"has two weights .* that differ, with and without"):
        load(tmp_path / "x.pt", known)
    torch.save({**state, **prefixed(state, "module.")}, tmp_path / "x.pt")
    assert_same(load(tmp_path / "x.pt", known).model, source)


def test_what_does_not_fit_is_described(source: Any, tmp_path: Path, known: str) -> None:
    state = state_of(source)
    for key in list(state)[14:20]:
        del state[key]
    state["text_projection"] = torch.zeros(32, 48)
    torch.save(prefixed(state, "module."), file := tmp_path / "saved.pt")
    with pytest.raises(ConfigError) as refused:
        load(file, known)
    message = str(refused.value)
    n = len(source.state_dict())
    assert f'does not match model "Tiny-C": {n - 7} of its {n} weights are in it' in message
    assert '"text_projection" 32 x 48 instead of 32 x 24' in message
    assert "image tower of width 32, depth 2, patch 8, image size 32" in message
    assert (
        "text tower of width 32, depth 2, context 20; embed dim 48: try `model` Tiny-C" in message
    )
    assert "\n" not in message
    torch.save(state_of(open_clip.create_model("ViT-S-32-alt", load_weights=False)), file)
    with pytest.raises(ConfigError, match=r"width 384, depth 12, .*try `model` ViT-S-32-alt"):
        load(file, known)
    torch.save({"backbone.weight": torch.zeros(3), "fc.bias": torch.zeros(3)}, file)
    with pytest.raises(ConfigError, match=r"0 of its .*its weights begin backbone.weight, fc.bias"):
        load(file, known)
    hugging = {"vision_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2, 2)}
    torch.save(hugging, file)
    with pytest.raises(ConfigError, match="saved by transformers: pass the folder"):
        load(file, known)
    quantized = state_of(source)
    quantized["visual.proj"] = quantized["visual.proj"].to(torch.int8)
    torch.save(quantized, file)
    with pytest.raises(ConfigError, match=r'"visual.proj" is torch.int8, expected floating point'):
        load(file, known)
    broken = state_of(source)
    broken["visual.proj"][1, 2] = float("nan")
    torch.save(broken, file)
    with pytest.raises(
        ConfigError, match=r'weight "visual.proj" \[32, 24\] has 1 values that are N'
    ):
        load(file, known)


def test_a_timm_tower_of_another_image_size_is_one_sentence(
    tmp_path: Path, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (224, 384):
        tower = {"timm_model_name": f"vit_tiny_patch16_{size}", "timm_pool": "token"}
        config = {**CONFIG, "vision_cfg": {**tower, "timm_proj": "linear", "image_size": size}}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, f"Tiny-T-{size}", config)
    source = build("Tiny-T-224")
    torch.save(state_of(source), file := tmp_path / "saved.pt")
    assert_same(load(file, known, "Tiny-T-224").model, source)
    for interpolate in (False, True):
        with pytest.raises(
            ConfigError,
            match=r"trunk.pos_embed: 1 x 197 x 192 in the checkpoint, 1 x 577 x 192 in the "
            r"model\), and those of a timm tower cannot be resized",
        ):
            load(file, known, "Tiny-T-384", interpolate_positions=interpolate)


class Stranger:
    pass


def test_files_that_are_no_checkpoint_are_named(tmp_path: Path, known: str) -> None:
    file = tmp_path / "weights.pt"
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as photos:
        photos.writestr("cat.jpg", b"x")
    for content, message in (
        (b"", "is an empty file (0 bytes)"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page (HTML), not the weights"),
        (b"<HTML><body>", "is a web page (HTML)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b'{"error": "not found"}', "is a JSON file"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b"\x1f\x8b\x08\x00", "is a gzip archive"),
        (b"hello world", "is not a checkpoint of torch or safetensors (first bytes b'hello"),
        ((tmp_path / "photos.zip").read_bytes(), 'zip archive without weights of torch (it has "c'),
        (b"\x80\x02}q\x00.", "damaged or truncated"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "is a damaged safetensors file"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=re.escape(message)) as refused:
            load(file, known)
        assert "\n" not in str(refused.value)
    torch.save({"state_dict": {}}, file)
    with pytest.raises(ConfigError, match="has no weights"):
        load(file, known)
    torch.save(torch.zeros(3), file)
    with pytest.raises(ConfigError, match="holds one Tensor, expected weights by name"):
        load(file, known)
    torch.save({"state_dict": {}, "what": Stranger()}, file)
    with pytest.raises(
        ConfigError, match=r'a "tests\.export\.test_checkpoint\.Stranger" object, .*code'
    ):
        load(file, known)
    torch.save(build("Tiny-C"), file)
    with pytest.raises(ConfigError, match=r'a "open_clip\.model\.CLIP" object'):
        load(file, known)
    file.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ConfigError, match=r"could run code|damaged"):
        load(file, known)


@pytest.mark.filterwarnings("ignore")
def test_every_truncated_file_is_named(source: Any, tmp_path: Path, known: str) -> None:
    state = state_of(source)
    save_file(state, tmp_path / "a.safetensors")
    torch.save({"state_dict": state}, tmp_path / "b.pt")
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    archive(source, tmp_path / "d.pt")
    for file in [tmp_path / name for name in ("a.safetensors", "b.pt", "c.pt", "d.pt")]:
        whole = file.read_bytes()
        for length in (1, 7, 8, 9, 40, 700, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(ConfigError, match=re.escape(f'checkpoint "{file}"')) as refused:
                load(file, known)
            assert "\n" not in str(refused.value)
