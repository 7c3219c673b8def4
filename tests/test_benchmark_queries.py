"""The measurement of queries: derived image sets, queries to a target, cells and report."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import query_cells
from benchmarks.queries import main
from benchmarks.query_cells import Cell, claim, snapshot_queries
from benchmarks.query_figures import ZIP, figures_of, ratio_of, ratios_of, reached, read_results
from benchmarks.query_images import CHANGES, change_images, select_coop_classes
from benchmarks.query_labels import EVERY, GRID, LABELS, QUERIES
from benchmarks.query_tasks import TASKS
from ztune.errors import DataError
from ztune.io.files import write_json


def image(seed: int, size: tuple[int, int] = (12, 9)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return two classes of two images."""
    for number, name in enumerate(("cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png")):
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        image(number).save(file)
    return tmp_path / "photos"


@pytest.mark.parametrize("change", CHANGES)
def test_changed_images(change: str, photos: Path, tmp_path: Path) -> None:
    one, other = (change_images(photos, change, tmp_path / name) for name in ("one", "other"))
    files = sorted(path.relative_to(one) for path in one.rglob("*.png"))
    assert files == sorted(path.relative_to(photos) for path in photos.rglob("*.png"))
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes()
        with Image.open(photos / file) as before, Image.open(one / file) as after:
            assert after.mode == "RGB"
            assert sorted(after.size) == sorted(before.size)
            assert after.tobytes() != before.tobytes()


def test_changes_match_their_names(photos: Path) -> None:
    source = image(1)
    twice = CHANGES["negative"](CHANGES["negative"](source, 0), 0)
    assert twice.tobytes() == source.tobytes()
    turned = np.rot90(np.asarray(source))
    assert np.array_equal(np.asarray(CHANGES["rotated"](source, 0)), turned)
    assert np.array_equal(np.asarray(CHANGES["upside-down"](source, 0)), np.rot90(turned))
    grey = np.asarray(CHANGES["grey"](source, 0))
    assert (grey == grey[..., :1]).all()
    assert len(np.unique(np.asarray(CHANGES["posterized"](source, 0)))) <= 4
    plain = Image.new("RGB", (9, 9), (90, 90, 90))
    assert not np.asarray(CHANGES["edges"](plain, 0))[1:-1, 1:-1].any()
    first, second = (np.asarray(CHANGES["noise"](plain, seed)) for seed in (1, 2))
    assert not np.array_equal(first, second)


def test_a_changed_set_is_written_once(photos: Path, tmp_path: Path) -> None:
    out = change_images(photos, "grey", tmp_path / "grey")
    (out / "cat" / "a.png").unlink()
    assert change_images(photos, "grey", out) == out
    assert not (out / "cat" / "a.png").exists()


def test_classes_of_a_set_in_coop_layout(tmp_path: Path) -> None:
    root, names = tmp_path / "set", ("yak", "ant", "bee", "cow")
    rows: dict[str, list[list[object]]] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(names):
        (root / "101" / name).mkdir(parents=True)
        for number, part in enumerate(rows):
            image(10 * label + number).save(root / "101" / name / f"{number}.jpg")
            rows[part].append([f"{name}/{number}.jpg", label, f"{name}_name"])
    (root / "split_zhou_Set.json").write_text(json.dumps(rows))
    # In the order of the split file, not of the names.
    out = select_coop_classes(root, slice(0, 2), tmp_path / "base")
    found = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert found == [
        "test/ant_name/2.png", "test/yak_name/2.png",
        "train/ant_name/0.png", "train/ant_name/1.png",
        "train/yak_name/0.png", "train/yak_name/1.png",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"split_zhou_\*\.json"):
        select_coop_classes(root / "101", slice(0, 2), tmp_path / "other")


def test_the_table_of_tasks() -> None:
    for task in TASKS.values():
        assert task.change is None or task.change in CHANGES
        assert task.template.count("{}") == 1
    new = TASKS["caltech-base"].of_new_classes
    assert new is not None
    assert new.classes == slice(50, 100)
    assert new.of_new_classes is None


def test_a_target_is_reached_when_it_is_kept() -> None:
    rising = np.linspace(0.1, 0.5, len(GRID))
    assert reached(rising, rising[4], rising=True) == GRID[4]
    assert reached(rising, 0.05, rising=True) == 0
    assert reached(rising, 0.6, rising=True) is None
    dip = rising.copy()
    dip[9] = 0.0
    assert reached(dip, rising[4], rising=True) == GRID[10]
    assert reached(-rising, -rising[4], rising=False) == GRID[4]
    assert [ratio_of(one) for one in (5000, 250, None)] == [1, 20, 0]
    assert ratio_of(0) == np.inf


def test_each_point_has_the_last_whole_candidate_batch_within_it() -> None:
    for size in (1, 6, 10, 20, 24):
        rounds = range(0, QUERIES + 1, size)
        seen = [
            next(spent for spent in rounds if spent >= mark)
            for mark in map(int, snapshot_queries(size, QUERIES).split(","))
        ]
        assert seen == [at - at % size for at in GRID if size <= at < QUERIES]


def test_a_claimed_cell_is_left_alone(tmp_path: Path) -> None:
    cell = Cell("digits", "gda", 1)
    with claim(cell, tmp_path) as run, claim(cell, tmp_path) as other:
        assert run is not None
        assert other is None
        run.mkdir()
        (run / "left").touch()
        place = run.parent
    assert not place.exists()
    # Files of a killed process are deleted.
    (place / "run").mkdir(parents=True)
    (place / "run" / "run.json").touch()
    with claim(cell, tmp_path) as run:
        assert run is not None
        assert not run.exists()


def test_one_real_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    short = {name: replace(label, queries=50) for name, label in EVERY.items()}
    monkeypatch.setattr(query_cells, "EVERY", short)
    monkeypatch.setattr(query_cells, "GRID", (0, 10, 25, 50))
    words = ["run", "--out", str(tmp_path), "--tasks", "digits", "--seeds", "2"]
    assert main([*words, "--labels", "gda,zip-128"]) == 0
    said = capfd.readouterr().err
    assert "[2/2] digits, zip-128, seed 2: " in said
    file = tmp_path / "cells" / "digits" / "zip-128-2.json"
    assert not list((tmp_path / "runs").iterdir())
    cell = json.loads(file.read_text())
    assert [point["queries"] for point in cell["curve"]] == [0, 10, 20, 50]
    assert (cell["classes"], cell["n_train"], cell["queries"]) == (10, 160, 50)
    start, *_, end = cell["curve"]
    assert end["train_loss"] < start["train_loss"]
    assert all(0 < point["class_accuracy"] < 1 for point in cell["curve"])
    tuned, head = read_results(tmp_path)[::-1]
    assert (tuned.label, head.label) == ("zip-128", "gda")
    assert head.zero_shot == tuned.zero_shot
    assert [point.queries for point in head.curve] == [0]
    written = file.stat().st_mtime_ns
    assert main([*words, "--labels", "zip-128"]) == 0
    assert file.stat().st_mtime_ns == written


def test_missing_arguments_are_reported(tmp_path: Path, capfd: Any) -> None:
    words = ["run", "--out", str(tmp_path), "--seeds", "1", "--labels"]
    assert main([*words, "gda", "--tasks", "cifar10"]) == 1
    assert "task cifar10 needs --images DIR" in capfd.readouterr().err
    assert main([*words, "gdb", "--tasks", "digits"]) == 1
    assert '--labels: unknown "gdb"' in capfd.readouterr().err
    assert main(["report", str(tmp_path), "--docs", str(tmp_path / "docs")]) == 1
    assert "contains no cells" in capfd.readouterr().err


def made_up(
    out: Path, label: str, task: str, curve: list[tuple[int, float]], n_train: int = 160
) -> None:
    """Write a label's cells of two seeds, a point up and down; the loss is one less accuracy."""
    for seed in (1, 2):
        off = 0.01 * (2 * seed - 3)

        def point(queries: int, accuracy: float) -> dict[str, Any]:
            return {
                "queries": queries,
                "accuracy": accuracy,
                "class_accuracy": accuracy,
                "train_loss": 1 - accuracy,
            }

        document: dict[str, Any] = {
            "task": task,
            "label": label,
            "seed": seed,
            "classes": 10,
            "n_train": n_train,
            "n_test": 100,
            "zero_shot": point(0, 0.3),
            "curve": [point(queries, accuracy + off) for queries, accuracy in curve],
            "seconds": 1.5,
            "commit": "0123abc",
            "date": "2026-11-23",
            "machine": {"cores": 2, "processor": "x86_64"},
            "versions": {"python": "3.11", "numpy": "2", "onnxruntime": "1"},
        }
        if task == "caltech-base":
            served = [] if curve[-1][0] == 0 else [(500, 0.2), (5000, 0.6)]
            document["new_classes"] = {
                "zero_shot": 0.4,
                "curve": [{"queries": at, "accuracy": value} for at, value in served],
            }
        file = Cell(task, label, seed).file(out)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, document)


SLOW, FAST = [(0, 0.25), (2000, 0.35), (5000, 0.4)], [(0, 0.25), (240, 0.4), (4990, 0.45)]


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """Return made-up cells: CMA is where ZIP ends after 240 queries, on the digits it never is."""
    out = tmp_path / "out"
    for task in ("cifar10", "caltech-base"):
        made_up(out, "gda", task, [(0, 0.5)])
        made_up(out, "zip-128", task, SLOW)
        made_up(out, "cma", task, FAST)
    made_up(out, "zip-full", "cifar10", SLOW)
    made_up(out, "zip-full", "caltech-base", SLOW)
    made_up(out, "gda", "digits", [(0, 0.5)], n_train=80)
    made_up(out, "zip-128", "digits", SLOW, n_train=80)
    made_up(out, "cma", "digits", [(0, 0.25), (5000, 0.3)], n_train=80)
    made_up(out, "zip-128", "cifar10-4shot", [(0, 0.3), (5000, 0.31)])
    return out


def test_figures_of_cells(cells: Path) -> None:
    tasks = {task.task: task for task in figures_of(read_results(cells))}
    assert list(tasks) == [task for task in TASKS if task in tasks]
    # 240 queries are within the grid's 250.
    assert tasks["cifar10"].queries("cma", "accuracy") == 250
    assert tasks["cifar10"].queries("cma", "train_loss") == 250
    assert tasks["digits"].queries("cma", "accuracy") is None
    # Fewer images than a batch: every step of zip-128 has them all.
    assert tasks["digits"].series["zip-full"] == tasks["digits"].series[ZIP]
    assert "zip-full" not in tasks["cifar10-4shot"].series
    assert not tasks["cifar10-4shot"].counts("accuracy")
    assert tasks["cifar10-4shot"].counts("train_loss")
    ratios = {one.label: one for one in ratios_of(list(tasks.values()), "accuracy")}
    assert sorted(ratios["cma"].ratios) == [0, 20, 20]
    assert (ratios["cma"].median, ratios["cma"].n_reached) == (20, 2)
    assert ratios["cma"].share(20) == pytest.approx(2 / 3)
    assert "gda" not in ratios
    assert ratios[ZIP].ratios == (1, 1, 1)


def test_report_of_cells(cells: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    assert main(["report", str(cells), "--docs", str(docs)]) == 0
    summary, tasks = ((docs / name).read_text() for name in ("summary.md", "tasks.md"))
    assert "| cma | 3 | 2 | 20 × | never | 67% | 67% |" in summary
    assert "## Mean test accuracy over tasks (3), %" in summary
    assert "| gda | 50.0 | – | – | – | – | – |" in summary
    # 0.4 on the classes tuned on, 0.2 and 0.6 on others.
    assert "| cma | 40.0 | 20.0 | 26.7 | 45.0 | 60.0 | 51.4 |" in summary
    assert "| gda | 50.0 | 40.0" not in summary
    assert "| cma | 2 | 25.0 ± 1.4 | 25.0 ± 1.4 | 40.0 ± 1.4 |" in tasks
    assert "| 250 (20 ×) | 250 (20 ×) |" in tasks
    assert "| zip-full (as zip-128) |" in tasks
    assert "ZIP gains less than 2 points" in tasks
    images = {path.name for path in docs.glob("*.png")}
    assert images == {
        "summary.png",
        *(f"{task.name}.png" for task in (cells / "cells").iterdir()),
    }
    for line in (summary + tasks).splitlines():
        if line.startswith("!["):
            assert line[line.index("(") + 1 : -1] in images


def test_every_label_can_be_drawn() -> None:
    from benchmarks.query_plots import _LEVELS, _LINES

    assert set(_LINES) | set(_LEVELS) == set(LABELS)
