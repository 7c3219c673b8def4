"""Compare the prompt graphs in torch with open_clip's text forward over whole sequences."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.clip import load_clip
from export.graphs import PrefixGraph, SequenceGraph
from export.loaded import LoadedClip
from export.parity import prompt_cases
from export.text_tower import graph_kind, text_tower
from tests.export.small_models import small_config, small_model, write_model
from ztune.errors import ConfigError

# candidates, context length (0: the longest that fits), classes
SHAPES = [(1, 1, 1), (3, 1, 7), (1, 4, 2), (3, 4, 1), (1, 8, 7), (3, 8, 2), (1, 0, 1), (3, 0, 7)]
FEW = [(1, 1, 1), (2, 0, 2), (3, 4, 7)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    known: dict[str, LoadedClip] = {}

    def load(name: str) -> LoadedClip:
        if name not in known:
            known[name] = small_model(name, tmp_path_factory.mktemp("model") / name)
        return known[name]

    return load


def largest_difference(
    loaded: LoadedClip, graph: torch.nn.Module, shapes: list[tuple[int, int, int]] = FEW
) -> float:
    worst = 0.0
    for case in prompt_cases(loaded, shapes):
        feeds = {name: torch.from_numpy(value) for name, value in case.feeds.items()}
        with torch.no_grad():
            features = graph.eval()(**feeds).numpy()
        assert features.shape == case.features.shape
        worst = max(worst, float(np.abs(features - case.features).max()))
    return worst


@pytest.mark.parametrize(
    ("name", "causal", "pooling", "kind"),
    [
        ("ViT-B-32-quickgelu", True, "argmax", "prefix"),
        ("RN50", True, "argmax", "prefix"),
        ("EVA02-B-16", True, "argmax", "prefix"),
        ("ViT-B-16-SigLIP", False, "last", "sequence"),
        ("MobileCLIP-S1", False, "argmax", "sequence"),
        ("coca_ViT-B-32", True, "class", "sequence"),
    ],
)
def test_the_right_graph_is_chosen_and_exact(
    small: Any, name: str, causal: bool, pooling: str, kind: str
) -> None:
    loaded = small(name)
    assert (loaded.text.causal, loaded.text.pooling, loaded.text.graph) == (causal, pooling, kind)
    graph = (
        PrefixGraph(loaded.tower, loaded.text.prefix_ids[0])
        if kind == "prefix"
        else SequenceGraph(loaded.model, loaded.tower)
    )
    assert largest_difference(loaded, graph, SHAPES) < 2e-6


def test_the_sequence_graph_is_exact_for_causal_towers_too(small: Any) -> None:
    loaded = small("ViT-B-32-quickgelu")
    assert (
        largest_difference(as_kind(loaded, "sequence"), SequenceGraph(loaded.model, loaded.tower))
        < 2e-6
    )
    assert "forward" not in vars(loaded.tower.embedding)  # put back


def as_kind(loaded: LoadedClip, kind: Any) -> LoadedClip:
    return dataclasses.replace(loaded, text=dataclasses.replace(loaded.text, graph=kind))


VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("layer scale", {"ls_init_value": 0.5}, {}),
    ("end-of-text pooling", {"pool_type": "eos", "eos_id": 49407}, {}),
    ("projection with bias", {"proj_bias": True}, {"custom_text": True}),
    ("no projection", {"proj_type": "none"}, {"custom_text": True}),
    ("tanh gelu", {"act_kwargs": {"approximate": "tanh"}}, {}),
    ("another epsilon", {"norm_kwargs": {"eps": 1e-3}}, {}),
    ("one layer", {"layers": 1}, {}),
    ("short tower", {"context_length": 16}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "top"), [v[1:] for v in VARIANTS], ids=[v[0] for v in VARIANTS])
def test_the_prefix_graph_supports_variants_of_plain_towers(
    tmp_path: Path, text: dict[str, Any], top: dict[str, Any]
) -> None:
    config = small_config("ViT-B-32") | top
    config["text_cfg"] |= {"context_length": 32} | text
    loaded = load_clip(write_model(tmp_path, config))
    assert loaded.text.graph == "prefix"
    assert largest_difference(loaded, PrefixGraph(loaded.tower, 49406)) < 2e-6


@pytest.mark.parametrize(
    "text",
    [
        {"qk_norm": True},  # another kind of block
        {"pool_type": "last"},  # sees the padding
        {"pool_type": "first"},
        {"pool_type": "eos", "eos_id": 5},  # not the tokenizer's end-of-text
        {"no_causal_mask": True},
    ],
)
def test_other_towers_get_the_sequence_graph(tmp_path: Path, text: dict[str, Any]) -> None:
    config = small_config("ViT-B-32") | {"custom_text": True}
    config["text_cfg"] |= {"context_length": 32} | text
    loaded = load_clip(write_model(tmp_path, config))
    assert loaded.text.graph == "sequence"
    assert largest_difference(loaded, SequenceGraph(loaded.model, loaded.tower)) < 2e-6


def test_a_changed_mask_is_not_taken_for_causal(small: Any) -> None:
    loaded = small("RN50")
    mask = loaded.model.attn_mask
    try:
        loaded.model.attn_mask = mask.clone()
        loaded.model.attn_mask[0, 1] = 0.0
        tower = text_tower(loaded.model)
        assert not tower.causal
        assert graph_kind(tower, (49406,), (49407,), 49407) == "sequence"
    finally:
        loaded.model.attn_mask = mask


def test_two_special_tokens_or_a_larger_id_exclude_the_prefix_graph(small: Any) -> None:
    tower = small("RN50").tower
    assert graph_kind(tower, (49406,), (49407,), largest_id=49407) == "prefix"
    assert graph_kind(tower, (49406,), (49407,), largest_id=49408) == "sequence"
    assert graph_kind(tower, (49406, 5), (49407,), largest_id=49407) == "sequence"
    assert graph_kind(tower, (), (49407,), largest_id=49407) == "sequence"


def test_the_prefix_graph_is_wrong_where_the_tower_looks_ahead(small: Any) -> None:
    # so the comparison would notice a wrong decision
    loaded = small("MobileCLIP-S1")
    wrong = PrefixGraph(loaded.tower, 49406)
    assert largest_difference(as_kind(loaded, "prefix"), wrong) > 1e-3


def test_another_text_tower_is_refused() -> None:
    class Other(torch.nn.Module):
        pass

    model = torch.nn.Module()
    model.text = Other()
    with pytest.raises(ConfigError, match="text tower Other is not supported"):
        text_tower(model)
