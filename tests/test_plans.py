"""Every plan of `plans/`, end to end on small stand-ins of its data sets: each method on each."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ztune
from tests.ztune.data_trees import TREES, lines, listed, put
from ztune.data.named import NAMED
from ztune.errors import ConfigError
from ztune.experiments.plan import DataPlan, MethodPlan, Plan, read_plan
from ztune.methods.registry import METHODS, find_method, tuned_config

ROOT = Path(__file__).parents[1]
PLANS = sorted((ROOT / "plans").glob("*.toml"))
MODELS = {"mini": ROOT / "models" / "mini"}
QUICK = ("gda", "zip", "ogn")
WORDS = ("cup", "chair", "lamp", "tree")
SUFFIXES = (".jpg", ".jpeg", ".png")


def paint(path: Path) -> None:
    """Write an image of random pixels, different for every path."""
    seed = int(hashlib.sha256(str(path).encode()).hexdigest()[:8], 16)
    pixels = np.random.default_rng(seed).integers(256, size=(12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


def stand_in(root: Path, name: str) -> None:
    """Write a data set of four short names in its own layout: with its split file if it has one."""
    spec, folder = NAMED[name], root / NAMED[name].folder
    if spec.splits:
        tree = listed(spec.images, *WORDS)
        tree.build(folder)
        (folder / spec.splits[0]).write_text(json.dumps(tree.split))
        return
    TREES[name].build(folder)
    if name == "imagenet":
        names = folder / "classnames.txt"
        names.write_text(names.read_text() + "n02085620 dog\n")
        put(folder / "images", (f"train/n02085620/{n}.JPEG" for n in range(3)))
        put(folder / "images", ["val/n02085620/ILSVRC2012_val_1.JPEG"])
    if name == "fgvcaircraft":
        lines(folder, "variants.txt", *WORDS)
        for i, split in enumerate(("train", "val", "test")):
            text = [f"{10 * i + n:07} {word}" for n, word in enumerate(WORDS)]
            lines(folder, f"images_variant_{split}.txt", *text)
            put(folder / "images", (f"{line.split()[0]}.jpg" for line in text))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The named data sets with images of noise, and the folder `own` for a plan's own paths."""
    root = tmp_path_factory.mktemp("root")
    for name in NAMED:
        stand_in(root, name)
    put(root / "own", (f"{word}/{n}.png" for word in WORDS for n in range(60)))
    for path in root.rglob("*"):
        if path.is_file() and path.suffix.lower() in SUFFIXES:
            paint(path)
    return root


def one_step(method: MethodPlan) -> MethodPlan:
    """Return a method with the budget of its first step and no curve."""
    config = tuned_config(find_method(method.uses), method.config)
    return replace(method, queries=1 if config is None else config.step_queries(), curve=0)


def small(plan: Plan, root: Path) -> Plan:
    """Return a plan with one step of its methods, its fewest shots and one seed."""
    own = {
        # Templates for a model of 24 tokens.
        name: replace(data, template="{}.", path=data.path and str(root / "own"))
        for name, data in plan.data.items()
    }
    methods = {name: one_step(method) for name, method in plan.methods.items()}
    protocols = tuple(replace(p, shots=(min(p.shots),), seeds=(1,)) for p in plan.protocols)
    return replace(plan, data=own, methods=methods, protocols=protocols)


@pytest.mark.filterwarnings("ignore::ztune.errors.ZtuneWarning")
@pytest.mark.usefixtures("quick_figures")
@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_runs_from_end_to_end(path: Path, root: Path, tmp_path: Path) -> None:
    """Every method on one data set, and a quick one on all."""
    plan = small(read_plan(path), root)
    sources = list(dict.fromkeys(s for p in plan.protocols for s in p.sources))
    named = {method.uses: name for name, method in plan.methods.items()}
    widest = max(plan.protocols, key=lambda protocol: len(protocol.methods))
    quick = [next(named[uses] for uses in QUICK if uses in named)]
    quick += [named["zero-shot"]] if "zero-shot" in named else []
    finished = set()
    for out, methods, data in (
        ("methods", list(plan.methods), widest.sources[-1:]),
        ("data", quick, sources),
    ):
        results = ztune.run_plan(
            plan, tmp_path / out, models=MODELS, root=root, provider="cpu",
            methods=methods, data=data,
        )  # fmt: skip
        rows = results.rows()
        assert not [row["reason"] for row in rows if row["status"] == "failed"]
        finished |= {(row["method"], row["data"]) for row in rows if row["status"] == "finished"}
    assert {method for method, _ in finished} == set(plan.methods)
    assert {data for _, data in finished} >= set(sources)


def test_the_papers_plans_have_every_published_method_and_data_set() -> None:
    plans = {path.stem: read_plan(path) for path in PLANS}
    few = plans["zip-fewshot"]
    assert {method.uses for method in few.methods.values()} == set(METHODS) - {"auto", "zero-shot"}
    assert set(few.data) <= set(NAMED)
    # What the published code saves for new classes: the last candidate, at most the 1,000th.
    saved = plans["zip-base-to-new"].methods["bptvlm-last"].config
    assert (saved.keep, saved.most_candidates, saved.batch_size) == ("last", 1000, 128)
    code = plans["sharpzo"].methods["sharpzo-code"]
    assert (code.views, code.preset) == (1, "published-code")
    # 100 warm-up steps of 2 · 512 + 40 queries, then 199,900 of two.
    assert code.queries == 100 * (2 * 512 + 40) + 199_900 * 2
    # The same, 19,900 of two, and a hundred prunings.
    assert plans["sharpzo"].methods["sharpzo"].queries == 106_400 + 19_900 * 2 + 100 * 1024


def test_sharpzo_has_the_projection_and_bound_of_the_published_code_on_each_data_set() -> None:
    plan = read_plan(ROOT / "plans" / "sharpzo.toml")
    sources = next(p for p in plan.protocols if p.kind == "few-shot").data
    found = {
        name: (config.projection_std, config.bound)
        for name in sources
        for config in [plan.methods["sharpzo"].on(plan.data[name]).config]
    }
    narrow = 0.2
    assert found == {
        "caltech101": (narrow, 5.0), "oxfordpets": (narrow, 5.0), "stanfordcars": (narrow, 5.0),
        "flowers102": (narrow, 5.0), "food101": (narrow, None), "fgvcaircraft": (narrow, None),
        "sun397": (narrow, 5.0), "ucf101": (narrow, 5.0), "dtd": (1.0, 5.0), "eurosat": (1.0, 5.0),
        "imagenet": (1.0, None),
    }  # fmt: skip


def test_settings_of_a_data_set_are_below_those_of_an_entry() -> None:
    data = DataPlan(settings={"sharpzo": {"sigma": 0.2, "bound": "none"}})
    method = MethodPlan("sharpzo", 5000, "default", 0, settings={"sigma": 0.3})
    config = method.on(data).config
    assert (config.sigma, config.bound, method.config.bound) == (0.3, None, 5.0)
    assert MethodPlan("zip", 5000, "default", 0).on(data).settings == {}
    with pytest.raises(ConfigError, match='unknown method "sharp"'):
        DataPlan(settings={"sharp": {}})
    with pytest.raises(ConfigError, match="bound is 0"):
        DataPlan(settings={"sharpzo": {"bound": 0}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"queries": 14}, r'method "bptvlm" of the plan: `queries` 14 is less than one step'),
        (
            {"queries": 7, "settings": {"batch_size": 1, "population": 4}},
            r'method "bptvlm" of the plan: `queries` 7 is less than one candidate of bptvlm on '
            r"all batches of 8 images, which costs 8",
        ),
        (
            {"uses": "ogn", "augment": 2},
            r'method "bptvlm" of the plan: ogn uses the same images in all rounds',
        ),
        (
            {"uses": "zero-shot", "augment": 2},
            r'method "bptvlm" of the plan: zero-shot uses no training images: leave out `augment`',
        ),
    ],
    ids=["no generation", "no candidate", "views of one batch", "views of nothing"],
)
def test_what_cannot_run_is_refused_before_anything_runs(
    changes: dict[str, Any], said: str, root: Path, tmp_path: Path
) -> None:
    plan = read_plan(ROOT / "plans" / "zip-fewshot.toml")
    method = replace(plan.methods["bptvlm"], **changes)
    plan = replace(plan, methods={"bptvlm": method}, protocols=(
        replace(plan.protocols[0], methods=("bptvlm",), data=("svhn",), shots=(2,)),
    ))  # fmt: skip
    with pytest.raises(ConfigError, match=said):
        ztune.run_plan(plan, tmp_path / "out", models=MODELS, root=root, provider="cpu")
    assert not list((tmp_path / "out").rglob("run.json"))
