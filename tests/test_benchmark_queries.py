"""The measurement of queries: image sets, queries to a target, and the report of real cells."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import query_images
from benchmarks.queries import Curve, Task, main, reached, report, study_rows, tasks_of
from benchmarks.query_images import CHANGES, SETS, ImageSet, write_set
from tests.conftest import MINI
from tests.ztune.experiments.bench_results import PLAN, Row, curve, store_of
from ztune.cli.main import main as ztune
from ztune.errors import DataError
from ztune.experiments.cells import Outcome
from ztune.experiments.store import Store


def image(seed: int, size: tuple[int, int] = (12, 9)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_images(root: Path, names: Sequence[str]) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image(number).save(root / name)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return the folder that all sets are made from, each with two classes."""
    folder = tmp_path / "images"
    for name in ("cifar10", "cifar10-negative", "pacs-photo", "pacs-sketch"):
        write_images(folder / name, ("cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png"))
    caltech = folder / "caltech-101"
    rows: dict[str, list[list[object]]] = {"train": [], "val": [], "test": []}
    for label in range(60):
        for number, part in enumerate(rows):
            # Labels are not in the order of names.
            rows[part].append([f"c{99 - label}/{number}.jpg", label, f"c{99 - label}"])
    listed = [str(path) for part in rows.values() for path, *_ in part]
    write_images(caltech / "101_ObjectCategories", listed)
    (caltech / "split_zhou_Caltech101.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("change", sorted(CHANGES.keys() - {"none"}))
def test_changed_images(change: str, images: Path, tmp_path: Path) -> None:
    photos, outs = images / "cifar10", (tmp_path / "one", tmp_path / "other")
    for out in outs:
        write_set(ImageSet("cifar10", change), images, out)
    files = sorted(path.relative_to(outs[0]) for path in outs[0].rglob("*.png"))
    assert files == sorted(path.relative_to(photos) for path in photos.rglob("*.png"))
    for file in files:
        assert (outs[0] / file).read_bytes() == (outs[1] / file).read_bytes()
        with Image.open(photos / file) as before, Image.open(outs[0] / file) as after:
            assert after.mode == "RGB"
            assert sorted(after.size) == sorted(before.size)
            assert after.tobytes() != before.tobytes()


def test_changes_match_their_names() -> None:
    source = image(1)
    twice = CHANGES["negative"](CHANGES["negative"](source, 0), 0)
    assert twice.tobytes() == source.tobytes()
    turned = np.rot90(np.asarray(source))
    assert np.array_equal(np.asarray(CHANGES["rotated"](source, 0)), turned)
    grey = np.asarray(CHANGES["grey"](source, 0))
    assert (grey == grey[..., :1]).all()
    plain = Image.new("RGB", (9, 9), (90, 90, 90))
    assert not np.asarray(CHANGES["edges"](plain, 0))[1:-1, 1:-1].any()
    first, second = (np.asarray(CHANGES["noise"](plain, seed)) for seed in (1, 2))
    assert not np.array_equal(first, second)


def test_all_sets_are_written_once(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [os.path.relpath(images), "--out", str(tmp_path / "sets")]
    assert query_images.main(words) == 0
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == sorted(SETS)
    assert (tmp_path / "sets" / "cifar10" / "cat" / "a.png").is_file()
    few = tmp_path / "sets" / "caltech-20"
    # The first labels, not the first names; val images are for training.
    assert {path.name for path in (few / "test").iterdir()} == {f"c{n}" for n in range(80, 100)}
    assert sorted(path.name for path in (few / "train" / "c99").iterdir()) == ["0.png", "1.png"]
    (few / "train" / "c99" / "0.png").unlink()
    assert query_images.main(words) == 0
    assert not (few / "train" / "c99" / "0.png").exists()
    assert capsys.readouterr().err.splitlines() == list(SETS)


def test_a_missing_set_is_reported(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "pacs-sketch").rename(images / "sketches")
    assert query_images.main([str(images), "--out", str(tmp_path / "sets")]) == 1
    assert 'pacs-sketch" does not exist (expected a folder of class' in capsys.readouterr().err


def test_a_curve_has_the_last_result_within_the_queries() -> None:
    one = Curve({0: 0.1, 10: 0.2, 30: 0.3})
    assert [one.after(n) for n in (0, 9, 10, 29, 30, 999)] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert one.end == 30


def test_a_target_is_reached_when_the_mean_stays_at_it() -> None:
    rising = Curve({0: 0.1, 10: 0.2, 30: 0.3})
    assert reached([rising], 0.2) == 10
    assert reached([rising], 0.1) == 0
    assert reached([rising], 0.31) is None
    dip = Curve({0: 0.1, 10: 0.3, 20: 0.1, 40: 0.4})
    assert reached([dip], 0.2) == 40
    assert reached([dip], 0.35) == 40
    # The mean of 0.2 and 0.3 after 10 queries, of 0.2 and 0.1 after 20, of 0.3 and 0.1 after 30.
    assert reached([rising, dip], 0.2) == 30
    assert reached([rising, dip], 0.25) == 40
    assert reached([Curve({0: 0.1, 10: 0.1 + 0.2})], 0.3) == 10, "rounding does not matter"


def test_ratios() -> None:
    slow, fast = Curve({0: 0.25, 1000: 0.4}), Curve({0: 0.25, 50: 0.4, 100: 0.45})
    head = Curve({0: 0.5})
    task = Task("a", {"zip": {1: slow, 2: slow}, "fast": {2: fast, 3: head}, "head": {1: head}})
    assert task.ratio("fast", "zip") == 20, "of the seed that both have"
    assert task.ratio("zip", "fast") == 0
    assert task.ratio("zip", "zip") == 1
    assert Task("b", {"zip": {1: slow}, "fast": {2: fast}}).ratio("fast", "zip") == 0
    assert (task.is_tuned("fast"), task.is_tuned("head"), task.is_tuned("x")) == (
        True,
        False,
        False,
    )
    assert task.counts("zip")
    assert not task.counts("x")
    for end, counts in ((0.269, False), (0.27, True)):
        assert Task("c", {"zip": {1: Curve({0: 0.25, 9: end})}}).counts("zip") == counts


def test_differences_are_paired() -> None:
    def cells(accuracies: Mapping[int, float]) -> dict[int, Curve]:
        return {seed: Curve({0: 0.1, 100: one, 500: one}) for seed, one in accuracies.items()}

    tasks = [
        Task("a", {"ogn": cells({1: 0.5, 2: 0.7}), "changed": cells({1: 0.52, 2: 0.76})}),
        Task("b", {"ogn": cells({1: 0.1}), "changed": cells({1: 0.11, 2: 0.9})}),
        Task("c", {"changed": cells({1: 0.9})}),
    ]
    # Differences of 2, 6 and 1 points: mean 3, deviation 2.646, over the root of 3.
    changed = "46.3 (+3.0 ± 1.5)"
    assert study_rows(tasks, "ogn", {"changed": "ogn", "zip-128": "zip", "later": "ogn"}) == [
        ["ogn", "3", "43.3", "43.3"],
        ["changed", "3", changed, changed],
    ]
    assert study_rows(tasks, "zip", {"changed": "ogn"}) == []
    (_, one) = study_rows(tasks[1:], "ogn", {"changed": "ogn"})
    assert one[2] == "11.0 (+1.0 ± –)"


def outcome(queries: int, *points: tuple[int, float]) -> Outcome:
    return replace(curve(*((n, None, one) for n, one in points)), queries=queries)


SLOW, FAST = outcome(5000, (2000, 0.35)), outcome(4990, (240, 0.4), (490, 0.41))


def test_report_of_cells(tmp_path: Path) -> None:
    rows = [
        *(Row("zip-128", name, [0.39, 0.41], outcome=SLOW, zero_shot=0.3) for name in "ab"),
        Row("cma", "a", [0.44, 0.46], outcome=FAST, zero_shot=0.3),
        Row("cma", "b", [0.36, 0.36], outcome=SLOW, zero_shot=0.3),
        *(Row("gda", name, [0.5, 0.5], outcome=outcome(0), zero_shot=0.3) for name in "ab"),
        Row("zip-128", "flat", [0.31], outcome=SLOW, zero_shot=0.3, shots=1),
        Row("cma", "a", ["failed"], shots=4),
        Row("cma", "a", [{"c": 0.9}], protocol="cross-data-set", outcome=SLOW),
        Row(
            "zip-128", "a", [{"base": 0.5, "new": 0.2}], protocol="base-to-new", outcome=SLOW,
            zero_shot=0.3,
        ),
    ]  # fmt: skip
    view = store_of(tmp_path, rows, uses={"zip-128": "zip", "cma": "cma"}).view(PLAN)
    text = "\n".join(report(view))
    # 5,000 over 240, and over never.
    assert "| cma | 2 | 1 | never | never | 50% | 50% |" in text
    assert "| zip-128 | 3 | 3 | 1 × | 1 × | 0% | 0% |" in text
    assert "| a, 16 shots | 1 × | 20.8 × |" in text
    assert "| b, 16 shots | 1 × | never |" in text
    assert "| a, 16 shots, base-to-new | 1 × | – |" in text
    assert "Left out: flat, 1 shot." in text
    assert "Mean accuracy over tasks (2)" in text
    assert "| cma | 30.0 | 30.0 | 35.0 | 35.5 | 35.5 | 40.5 |" in text
    assert "| gda | 50.0 | – | – | – | – | – |" in text
    assert "One thing at a time" not in text
    assert {task.name for task in tasks_of(view)} == {
        "a, 16 shots", "b, 16 shots", "flat, 1 shot", "a, 16 shots, base-to-new",
    }  # fmt: skip


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out")]) == 1
    assert "do not exist" in capsys.readouterr().err
    view = store_of(tmp_path, [Row("zip", "a", [None])]).view(PLAN)
    with pytest.raises(DataError, match='plan "plan" has no finished cells'):
        report(view)


TINY = """
title = "A tiny plan"
seeds = [1, 2]
queries = 40
curve = [10, 25]
[execution]
force = true
[models]
mini = "{mini}"
[data]
digits = {{ path = "{digits}" }}
[methods]
zip-128 = {{ uses = "zip" }}
ogn = {{}}
ogn-rank-4 = {{ uses = "ogn", settings = {{ rank = 4 }} }}
gda = {{}}
[[protocols]]
kind = "few-shot"
shots = [4]
"""


def test_a_real_plan(few_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.toml").write_text(TINY.format(mini=MINI, digits=few_digits))
    words = ["bench", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "out"), "--quiet"]
    assert ztune(words) == 0
    assert ztune([*words, "--resume"]) == 0
    capsys.readouterr()
    assert main([str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# A tiny plan"
    # Rounds of 10: the result after 30 is the first one after 25.
    (task,) = tasks_of(Store.existing(tmp_path / "out" / "results.sqlite").view("tiny"))
    assert {name: [*own[2].accuracies] for name, own in task.curves.items()} == {
        "zip-128": [0, 10, 30, 40], "ogn": [0, 10, 30, 40], "ogn-rank-4": [0, 10, 30, 40],
        "gda": [0],
    }  # fmt: skip
    starts = {
        one.after(0) for name, own in task.curves.items() if name != "gda" for one in own.values()
    }
    assert len(starts) == 1, "all start from zero-shot"
    assert any(line.startswith("| ogn-rank-4 | 2 | ") for line in lines)
