"""Kill runs with SIGKILL at random moments, resume them, and compare with one that was not killed.

python -m tests.kill_drill 200

Each command is forked from this process, which has all imports and no threads, so that a kill costs
no start. Half of the kills hit a random change of a file, so that the short moments between two
writes are hit as well; the others a random time. It prints one JSON document.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image

from runtimes.providers import onnxruntime
from tests.conftest import DIGITS, MINI, save_quickly
from ztune.cli.main import main
from ztune.report import draw_curve
from ztune.run import SaveSchedule

METHODS: dict[str, tuple[object, ...]] = {
    "zip": ("--queries", 100, "--augment", 4, "--init", "a photo of a"),
    "ogn": ("--queries", 24, "--set", "n_prompts=2", "--set", "batch_size=6"),
    "ogn-context": ("--queries", 40, "--set", "n_directions=3", "--set", "batch_size=4"),
    "sharpzo": ("--queries", 120, "--set", "intrinsic_dim=20", "--set", "population=4"),
    "blackvip": ("--queries", 30, "--set", "batch_size=2"),
    "bptvlm": ("--queries", 60, "--set", "text_dim=40", "--set", "vision_dim=30"),
}
COSTS = ("queries", "probe_queries", "train_loss", "validation")
FORWARDS = ("text_forwards", "image_forwards")
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
Before = Callable[[], object]


def data(folder: Path) -> Path:
    """Return images of three classes, for runs that take a moment."""
    for name in ("one", "two", "three"):
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(sorted((DIGITS / name).iterdir())[:6]):
            Image.open(image).save(folder / name / f"{number}.png")
    return folder


def forked(words: Sequence[object], before: Before = lambda: None) -> int:
    """Start a command in a fork and return its process id; its output is dropped."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(nowhere, handle)
        SaveSchedule.due = _always  # type: ignore[method-assign]
        before()
        code = main([str(word) for word in words])
    finally:
        os._exit(code)


def _always(self: SaveSchedule) -> bool:
    return True


def on_change(act: Callable[[], None]) -> Before:
    """Return what lets a process call `act` before each change of a file."""

    def hook(event: str, words: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and words[2] and words[2] & _WRITING):
            act()

    return lambda: sys.addaudithook(hook)


def count_changes(words: Sequence[object], counted: Path) -> int:
    """Run a command and return how often it changed a file."""
    counted.touch()
    handle = os.open(counted, os.O_WRONLY | os.O_APPEND)

    def count() -> None:
        os.write(handle, b".")

    assert ended(forked(words, on_change(count))) == 0
    os.close(handle)
    return counted.stat().st_size


def kill_at(n: int) -> Before:
    """Return what kills a process at its n-th change of a file."""
    left = iter(range(n, 0, -1))

    def die() -> None:
        if next(left) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_change(die)


def ended(pid: int) -> int:
    """Wait for a process; return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def files(out: Path) -> dict[str, object]:
    """Return what two runs of the same settings have in common."""
    document = json.loads((out / "run.json").read_text())
    lines = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return {
        "history": [{**line, "seconds": 0} for line in lines],
        "costs": {name: document[name] for name in COSTS},
        # What a killed process has encoded is in the cache.
        "forwards": [document[name] + document.get(f"{name}_cached", 0) for name in FORWARDS],
        "status": document["status"],
        **{
            str(path.relative_to(out)): path.read_bytes()
            for path in (out / "curve.png", out / "prompt.safetensors", *out.glob("snapshots/*"))
        },
    }


def leftovers(*folders: Path) -> list[str]:
    """Return temporary files and folders of killed processes."""
    return [
        str(path)
        for folder in folders
        for path in (
            *folder.glob(".*.*"),
            *folder.glob("*/.*.*"),
            *folder.glob("ztune-*"),
            *folder.glob(".ztune-*"),
        )
    ]


def drill(n_kills: int, seed: int = 0) -> dict[str, object]:
    """Kill runs of all methods; return how many kills hit what, and what differed."""
    chance, began = random.Random(seed), time.monotonic()
    phases: Counter[str] = Counter()
    differing: list[str] = []
    n_runs = 0
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kills-")))
        temporary = place / "tmp"
        temporary.mkdir()
        stack.enter_context(_temporary_folder(temporary))
        images = data(place / "data")
        share, more = divmod(n_kills, len(METHODS))
        for number, (method, own) in enumerate(METHODS.items()):
            start = ("tune", MINI, "--data", images, "--shots", 2, "--val", 1, "--method", method,
                     "--test-fraction", 0.3, "--snapshots", 3, "--threads", 1, *own)  # fmt: skip
            whole, before = place / f"{method}-whole", time.monotonic()
            n_changes = count_changes((*start, "--out", whole), place / f"{method}.count")
            seconds, expected = time.monotonic() - before, files(whole)
            out, left, code = place / f"{method}-0", share + (number < more), 1
            while left or code:
                words = ("tune", "--resume", out) if out.exists() else (*start, "--out", out)
                at_change = bool(chance.getrandbits(1))
                n = chance.randint(1, n_changes)
                pid = forked(words, kill_at(n) if left and at_change else lambda: None)
                if left and not at_change:
                    time.sleep(chance.uniform(0, seconds))
                    os.kill(pid, signal.SIGKILL)
                code = ended(pid)
                if code == -signal.SIGKILL:
                    left -= 1
                    phases[_phase(out)] += 1
                    continue
                n_runs += 1
                if code:
                    differing.append(f"{method}: exit code {code}")
                    break
                found = files(out)
                wrong = [name for name in expected if found.get(name) != expected[name]]
                wrong += leftovers(place, out, temporary)
                differing += [f"{method}: {name}" for name in wrong]
                out = place / f"{method}-{n_runs}"
    return {
        "kills": sum(phases.values()),
        "phases": dict(phases),
        "runs": n_runs,
        "differing": differing,
        "seconds": round(time.monotonic() - began, 1),
    }


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[None]:
    """Let this process and its forks put temporary files into a folder."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _phase(out: Path) -> str:
    """Return what a killed run had done."""
    if not out.exists():
        return "start"
    if (out / "prompt.safetensors").exists():
        finished = json.loads((out / "run.json").read_text())["status"] == "finished"
        return "finished" if finished else "results"
    return "steps" if (out / "history.jsonl").exists() else "images"


def prepare() -> None:
    """Import and open once what every command needs."""
    from matplotlib.figure import Figure

    import export.classifier  # noqa: F401
    import ztune.training  # noqa: F401

    onnxruntime()
    with tempfile.TemporaryDirectory() as folder:
        line = {"queries": 1.0, "loss": 1.0, "accuracy": 0.5}
        draw_curve([line], {}, "warm", Path(folder, "curve.png"))
    # Half of the kills would hit the drawing.
    mock.patch.object(Figure, "savefig", save_quickly).start()


if __name__ == "__main__":
    prepare()
    json.dump(drill(*map(int, sys.argv[1:])), sys.stdout, indent=2)
    print()  # noqa: T201
