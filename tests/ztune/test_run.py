"""What a run's folder is told, and how often its state is saved."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ztune import run
from ztune.budget import Budget
from ztune.errors import FormatError
from ztune.io.files import replacing
from ztune.loop import Tuning
from ztune.methods.ogn import OgnConfig, PromptMixture
from ztune.objective import BatchSampler
from ztune.optim.spsa import Spsa, SpsaConfig
from ztune.run import RunFolder, SaveSchedule
from ztune.types import Evaluation, Optimizer


class Clock:
    """A clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 50.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(run, "time", clock)
    return clock


def test_a_quick_save_is_due_each_second(clock: Clock) -> None:
    pace = SaveSchedule()
    for _ in range(3):
        assert not pace.due()
        clock.now += 0.9
        assert not pace.due()
        clock.now += 0.2
        assert pace.due()
        assert pace.due()  # until it is saved
        with pace:
            clock.now += 0.01


def test_a_slow_save_is_due_after_ten_times_what_it_took(clock: Clock) -> None:
    pace = SaveSchedule()
    clock.now += 5
    with pace:
        clock.now += 3
    clock.now += 29.9
    assert not pace.due()
    clock.now += 0.2
    assert pace.due()
    with pace:
        pass
    clock.now += 1.0
    assert pace.due()


def test_a_save_that_fails_is_told_and_not_tried_again_at_once(clock: Clock) -> None:
    pace = SaveSchedule()
    clock.now += 2
    with pytest.raises(OSError, match="disk full"), pace:
        raise OSError("disk full")
    assert not pace.due()


def log(folder: RunFolder, optimizer: Optimizer, n_rounds: int) -> list[dict[str, float]]:
    """Return the history of a run whose model answers with the label, more or less."""
    sampler = BatchSampler(6, 6, 1, np.random.default_rng(0))
    tuning, labels = Tuning(optimizer, sampler, Budget(100), 0.0), np.arange(6) % 3
    for number in range(1, n_rounds + 1):
        n = len(optimizer.ask().points)
        noise = np.random.default_rng(number).standard_normal((n, 6, 3))
        logits = (noise + np.eye(3)[labels]).astype(np.float32)
        told = Evaluation(np.full(n, 2.0), np.full(n, 0.25), labels, 1, logits)
        tuning.budget.reserve(n)
        optimizer.tell(told)
        tuning.budget.commit(0, 0)
        tuning.step = number
        folder.log(tuning, told)
    return folder.read_history()


def test_a_mixtures_history_says_what_the_result_by_then_does(tmp_path: Path) -> None:
    config = OgnConfig(n_prompts=3)
    optimizer = PromptMixture(config, None, 2, np.arange(50), 100, np.random.default_rng(1))
    (tmp_path / "first").mkdir()
    lines = log(RunFolder(tmp_path / "first"), copy.deepcopy(optimizer), 5)
    assert [line["queries"] for line in lines] == [3, 6, 9, 12, 15]
    assert ["result_loss" in line for line in lines] == [True, True, False, True, False]
    for line in lines:
        assert ("result_accuracy" in line) == ("result_loss" in line)
        assert (line["loss"], line["accuracy"]) == (2, 0.25)
    last = log(RunFolder(tmp_path), optimizer, 4)[-1]
    assert (last["result_loss"], last["result_accuracy"]) == pytest.approx(
        optimizer.fitted(), abs=1e-6
    )
    assert last["result_loss"] == lines[3]["result_loss"]


def test_a_history_of_single_points_has_no_result_by_then(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    optimizer = Spsa(SpsaConfig(), np.ones(4), np.random.default_rng(0))
    lines = log(folder, optimizer, 3)
    assert all(set(line) == {"step", "queries", "loss", "accuracy", "seconds"} for line in lines)
    # A line that was cut off by a kill is left out.
    with folder.history.open("a") as file:
        file.write(json.dumps(lines[0])[:-4])
    assert folder.read_history() == lines


@pytest.mark.parametrize("name", [".lock", "history.jsonl", "sent.jsonl", "snapshots"])
def test_a_run_does_not_write_through_links(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create({"status": "running"}, {})
    assert folder.read()["status"] == "running"
    other = tmp_path / "other"
    for there in (True, False):  # a link that leads nowhere would make a file there
        if there:
            other.touch()
        (folder.path / name).symlink_to(other)
        with pytest.raises(FormatError, match=f'"{name}" is a link'):
            folder.read()
        (folder.path / name).unlink()
        other.unlink(missing_ok=True)


def test_a_foreign_file_among_the_snapshots_is_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.snapshots.mkdir()
    (folder.snapshots / "abc.safetensors").touch()
    assert folder.lacks_snapshot([5], 10)
    (folder.snapshots / "000000010.safetensors").touch()
    assert not folder.lacks_snapshot([5], 10)


LEFT = tuple(
    f"{name}.ztune-ab12cd34"
    for name in (
        ".curve.png", ".confusion.png", ".run.json", ".split.json", ".state.safetensors",
        ".prompt.safetensors", "snapshots/.000000010.safetensors",
    )
)  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on temporary files there")
def test_what_a_kill_leaves_is_removed_by_the_next_lock(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.create({"status": "running"}, {})
    folder.snapshots.mkdir()
    for name in LEFT:
        (folder.path / name).touch()
    started, foreign = tmp_path / ".run.ztune-ab12cd34", tmp_path / ".run.20240131"
    for other in (started, foreign):
        other.mkdir()
        (other / "run.json").touch()
    (foreign / "notes.txt").touch()
    mine = [
        tmp_path / ".runs.ztune-ab12cd34",
        folder.path / ".notes",
        folder.path / ".run.json.swp",
    ]
    mine[0].mkdir()
    for file in mine[1:]:
        file.touch()
    with replacing(folder.curve) as temporary, folder.locked():
        assert temporary.exists()  # its process lives
        assert not [name for name in LEFT if (folder.path / name).exists()]
        assert not started.exists()
    assert all(path.exists() for path in (foreign, *mine))


@pytest.mark.skipif(sys.platform == "win32", reason="no locks on temporary files there")
def test_a_start_removes_the_folder_of_a_killed_start(tmp_path: Path) -> None:
    for name in ("run", "[a]*?"):
        left = tmp_path / f".{name}.ztune-ab12cd34"
        left.mkdir()
        (left / ".split.json.ztune-ab12cd34").touch()
        RunFolder(tmp_path / name).create({"status": "running"}, {})
        assert not left.exists()
