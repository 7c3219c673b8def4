"""Every architecture of open_clip: one a family is exported, and the page lists them all."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import open_clip
import pytest

from benchmarks.coverage import append, export_one, operators_once, read, run
from benchmarks.coverage_page import Row, family_of, render
from tests.conftest import ROOT
from ztune.errors import ZtuneError

# One of each kind that no other test exports.
EXPORTED = {
    "coca_roberta-ViT-B-32": "sequence",
    "ViT-H-14-CLIPA": "sequence",
    "ViT-H-14-worldwide": "prefix",
    "PE-Core-T-16-384": "prefix",
    "ViTamin-S": "prefix",
    "convnext_tiny": "prefix",
    "swin_base_patch4_window7_224": "prefix",
}


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with operators_once():
        yield


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.mark.parametrize("name", EXPORTED)
def test_one_a_family_is_exported(name: str, graphs: Path) -> None:
    row = export_one(name, graphs)
    assert row["graph"] == EXPORTED[name], row
    assert row["max_abs"] < 1e-5


def test_the_page_lists_the_architectures_of_the_version_it_names() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(.+?)`", text, re.MULTILINE)
    made_with = re.search(r"architecture of open_clip (\S+),", text)
    assert made_with is not None
    assert len(listed) == len(set(listed))
    if made_with[1] == open_clip.__version__:
        assert sorted(listed) == sorted(open_clip.list_models())
        assert "not run" not in text


def test_the_page_says_what_is_refused_and_why() -> None:
    rows: dict[str, Row] = {
        "ViT-B-32": {
            "name": "ViT-B-32", "graph": "prefix", "pooling": "argmax", "max_abs": 2e-7,
            "stand_ins": [], "versions": {"open_clip": "3"},
        },
        "RN50": {"name": "RN50", "refused": "too square"},
    }  # fmt: skip
    page = render(["RN50", "ViT-B-32", "ViT-L-14"], {"RN50": ["openai"]}, rows)
    assert "1 of 3 export" in page
    assert "| `RN50` | openai | refused | |" in page
    assert "- `RN50`: too square" in page
    assert "| `ViT-B-32` | none | prefix | argmax | 2.0e-07 |" in page
    assert "| `ViT-L-14` | none | not run | |" in page


def test_every_architecture_has_a_family() -> None:
    assert all(family_of(name) for name in open_clip.list_models())


def test_a_run_continues_and_survives_a_process_that_ends(tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    out.write_text('{"name": "a", "refused": "x"}\n{"name": "b", "ref')
    batches: list[list[str]] = []

    def batch(names: Sequence[str]) -> int:
        batches.append(list(names))
        for name in names:
            if name == "c":
                return -9
            append(out, {"name": name, "refused": "y"})
        return 0

    run(["a", "b", "c", "d"], out, batch)
    assert batches == [["b", "c", "d"], ["d"]]
    assert read(out)["c"] == {"name": "c", "failed": "its process ended with code -9"}
    assert [row["name"] for row in map(json.loads, _whole(out))] == ["a", "b", "c", "d"]
    with pytest.raises(ZtuneError, match="left out e and reported no error"):
        run(["e"], out, lambda _: 0)
    batches.clear()
    run([*"abcdefghi"], out, batch, jobs=2)
    assert sorted(batches) == [["e", "g", "i"], ["f", "h"]]


def _whole(out: Path) -> list[str]:
    return [line for line in out.read_text().splitlines() if line.endswith("}")]
