"""What the arguments of an export name, checked before anything is built."""

import json
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from export.clip import load_clip
from export.naming import model_name, note_on_others
from tests.export.small_models import t5_like_tokenizer, write_model
from tests.export.tiny_clip import CONFIG, KNOWN
from ztune.errors import ConfigError, FormatError, ZtuneError


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-C", CONFIG)
    quick = {**CONFIG, "quick_gelu": True}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Tiny-C-quickgelu", quick)


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model is built before its arguments are checked")

    monkeypatch.setattr(open_clip, "create_model", refuse)


def test_a_path_is_a_folder_and_never_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "x").mkdir(parents=True)
    (tmp_path / "plain").mkdir()
    (tmp_path / "x.pt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("./models/x", "models/x", "plain", str(tmp_path / "models" / "x")):
        assert model_name(path) == f"local-dir:{Path(path)}"
    for path in ("~/plain", "local-dir:~/plain"):
        assert model_name(path) == f"local-dir:{tmp_path / 'plain'}"
    assert model_name("hf-hub:a/b") == "hf-hub:a/b"
    assert model_name("ViT-B/32") == "ViT-B-32"
    for path in ("./models/y", "/nowhere/x", "~/none"):
        with pytest.raises(ConfigError, match=rf'model "{path}": folder .* does not exist'):
            model_name(path)
    with pytest.raises(ConfigError, match="is a file: pass it as `pretrained`"):
        model_name("./x.pt")
    with pytest.raises(ConfigError, match=r'"laion/CLIP-x" is not known .*hf-hub:laion/CLIP-x'):
        model_name("laion/CLIP-x")
    with pytest.raises(ConfigError, match='model "" is not known'):
        model_name("")
    with pytest.raises(ConfigError, match="Empty path"):
        model_name("local-dir:")


def test_a_folder_given_by_its_path_is_loaded(tmp_path: Path) -> None:
    write_model(tmp_path / "model", CONFIG)
    loaded = load_clip(str(tmp_path / "model"))
    assert loaded.source["model"] == "local-dir:model"


@pytest.mark.usefixtures("nothing_built")
def test_a_folder_with_two_checkpoints_is_refused_unless_one_has_a_known_name(
    tmp_path: Path,
) -> None:
    described = {"model_cfg": CONFIG, "preprocess_cfg": json.loads(KNOWN)}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    for name in ("epoch_1.bin", "epoch_2.bin"):
        torch.save({}, tmp_path / name)
    with pytest.raises(
        ConfigError, match=r'several checkpoints \("epoch_1.bin", "epoch_2.bin"\): keep'
    ):
        load_clip(str(tmp_path))
    (tmp_path / "open_clip_model.safetensors").touch()
    with pytest.raises(ConfigError, match="is an empty file"):
        load_clip(str(tmp_path))


def test_other_checkpoints_of_a_folder_are_noted(tmp_path: Path) -> None:
    for name in ("model.safetensors", "notes.txt"):
        (tmp_path / name).touch()
    assert note_on_others(tmp_path / "model.safetensors") == []
    (tmp_path / "epoch_9.pt").touch()
    assert note_on_others(tmp_path / "model.safetensors") == [
        'model.safetensors is used; not read: "epoch_9.pt"'
    ]


@pytest.mark.usefixtures("nothing_built")
def test_a_folder_as_pretrained_lists_its_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"a folder without checkpoints \(expected one of"):
        load_clip("Tiny-C", str(folder))
    for name in ("b.pt", "a.safetensors", "log.txt"):
        (folder / name).touch()
    with pytest.raises(
        ConfigError,
        match=re.escape(
            f'the checkpoints "a.safetensors", "b.pt": pass one, as `pretrained` {folder}/a.safe'
        ),
    ):
        load_clip("Tiny-C", str(folder))
    (folder / "config.json").touch()
    with pytest.raises(ConfigError, match="a whole model: pass `model` local-dir:"):
        load_clip("Tiny-C", str(folder))
    for path in (str(folder / "c.pt"), "none/x", "x.safetensors"):
        with pytest.raises(ConfigError, match=rf'"{path}": file {path} does not exist'):
            load_clip("Tiny-C", path)
    (folder / "page.pt").write_text("<html>")
    with pytest.raises(ConfigError, match="is a web page"):
        load_clip("Tiny-C", str(folder / "page.pt"))


def test_what_a_checkpoint_cannot_tell_is_asked_for(tmp_path: Path) -> None:
    write_model(tmp_path, CONFIG)
    file, known = str(tmp_path / "open_clip_model.safetensors"), tmp_path / "known.json"
    with pytest.raises(ConfigError) as asked:
        load_clip("Tiny-C", file)
    message = str(asked.value)
    assert "mean, std and quick_gelu of its training are unknown" in message
    assert (
        'write {"mean": [R, G, B], "std": [R, G, B], "quick_gelu": true|false} to a JSON file and '
        "pass `preprocess_from=FILE.json`"
    ) in message
    assert '"mean": [0.48145466, 0.4578275, 0.40821073]' in message
    with pytest.raises(ConfigError, match="mean and std of its training are unknown"):
        load_clip("Tiny-C-quickgelu", file)
    known.write_text('{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}')
    with pytest.raises(
        ConfigError, match=r'no "quick_gelu", which Tiny-C does not determine; write \{"quick_gelu'
    ):
        load_clip("Tiny-C", file, preprocess_from=str(known))
    assert load_clip("Tiny-C-quickgelu", file, preprocess_from=str(known)).config["quick_gelu"]
    known.write_text('{"std": [0.5, 0.5, 0.5], "quick_gelu": true}')
    with pytest.raises(ConfigError, match=r'has no mean; write \{"mean": \[R, G, B\]\}'):
        load_clip("Tiny-C", file, preprocess_from=str(known))
    known.write_text('{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "quick_gelu": true}')
    loaded = load_clip("Tiny-C", file, preprocess_from=str(known))
    assert "built with QuickGELU" in loaded.notes[0]
    assert load_clip("Tiny-C", random_weights=1).image.resize_mode == "shortest"


@pytest.mark.usefixtures("nothing_built")
def test_the_tokenizer_is_looked_for_before_the_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("export.downloads._is_reachable", lambda _: False)
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ZtuneError, match=r"tokenizer of .*\(no network\); .*`tokenizer=FILE`"):
        load_clip("ViT-B-16-SigLIP", random_weights=1)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read as tokenizers JSON"):
        load_clip("Tiny-C", random_weights=1, tokenizer_file=tmp_path / "tokenizer.json")


def test_damaged_descriptions_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path, CONFIG)
    config = tmp_path / "open_clip_config.json"
    config.write_text(config.read_text()[:40])
    with pytest.raises(FormatError, match="cannot be read as JSON"):
        load_clip(str(tmp_path))
    config.write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": [1]}))
    with pytest.raises(ConfigError, match='no "preprocess_cfg" with mean and std'):
        load_clip(str(tmp_path))


def test_a_tokenizer_of_another_size_is_noted(tmp_path: Path) -> None:
    t5_like_tokenizer().save(str(tmp_path / "t5.json"))
    loaded = load_clip("Tiny-C", random_weights=1, tokenizer_file=tmp_path / "t5.json", pad_id=0)
    assert loaded.notes == (
        "t5.json has 51 ids, the model's token table 49408 rows: check that it is this model's "
        "tokenizer",
    )
