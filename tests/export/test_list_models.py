"""`ztune export --list`."""

import open_clip
import pytest

import ztune
from tests.conftest import Command
from ztune.errors import ConfigError


def test_all_models_with_their_tags_or_those_with_a_word() -> None:
    assert set(ztune.list_models()) == set(open_clip.list_models())
    by_tag = ztune.list_models("LAION2B_s34b_b79k")
    assert by_tag["ViT-B-32"] == open_clip.list_pretrained_tags_by_model("ViT-B-32")
    assert all("laion2b_s34b_b79k" in tags for tags in by_tag.values())
    with pytest.raises(ConfigError, match='has "nope" in its name or in a tag'):
        ztune.list_models("nope")


def test_the_list_on_the_command_line(ztune: Command) -> None:
    shown = ztune("export", "--list", "vit-s-32")
    assert shown.code == 0, shown.err
    assert shown.out.split() == ["ViT-S-32", "-", "ViT-S-32-alt", "-"]
    assert ztune("export", "--list", "vit-s-32", "--json").json == {
        "models": {"ViT-S-32": [], "ViT-S-32-alt": []}
    }
    both = ztune("export", "--list", "--model", "ViT-B-32")
    assert both.code == 1
    assert "leave out --model" in both.err
    without = ztune("export", "--model", "ViT-B-32")
    assert without.code == 1
    assert "--out BUNDLE is required" in without.err
