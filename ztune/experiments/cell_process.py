"""One cell of a comparison: start or resume its run, and score it on the test images.

Each cell has its own process, which isolates peak memory and failures.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import IO

from runtimes.providers import resolve_execution
from ztune.errors import ConfigError, FormatError, ZtuneError
from ztune.evaluate import labelled_of_split, score_run
from ztune.experiments.comparison import CellScore, CurvePoint, Figures, figures_of
from ztune.io.children import python_command
from ztune.io.config import as_json
from ztune.io.schema import convert, decoded, plain
from ztune.model import open_model
from ztune.printing import printable, printable_lines
from ztune.progress import Silence, forward_warnings
from ztune.report import draw_confusion
from ztune.run import RunFolder
from ztune.run_config import RunConfig
from ztune.run_document import run_report
from ztune.training import SavedRun, start_run

# Seconds that a stopped process has to save its state.
_GRACE = 20.0
_PROGRAM = "from ztune.experiments.cell_process import main; sys.exit(main())"
_KILLED = 9  # SIGKILL, which Windows' signal module lacks
_INTERRUPTED = 130


class CellError(ZtuneError):
    """A failed cell; the message is the reason in one line."""


class BusyError(ZtuneError):
    """A cell whose run is locked by another process."""


def run_cell(run: Path, run_config: RunConfig, log: Path) -> Figures:
    """Start or resume a run in its own process, score it, and return its figures.

    Raises: CellError; BusyError if another process has locked the run.
    """
    folder = RunFolder(run)
    if run.is_dir():
        try:
            with folder.locked():  # released at once for the child process
                pass
        except ConfigError as error:
            raise BusyError(str(error)) from None
    scored = _run_child(run, run_config, log)
    if scored.error is not None:
        raise CellError(scored.error)
    try:
        return figures_of(run_report(folder.read(), f'run "{run}"'), scored)
    except FormatError as error:
        raise CellError(str(error)) from None


def _run_child(run: Path, run_config: RunConfig, log: Path) -> CellScore:
    """Return the score that `main` prints; an interrupt also stops the child.

    Raises: CellError if the child ends without a score.
    """
    offset = log.stat().st_size if log.exists() else 0
    with log.open("ab") as errors:
        child = subprocess.Popen(
            python_command(_PROGRAM, str(run), str(log)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # Ctrl-C reaches only this process, which then stops the child once.
            start_new_session=True,
        )
        try:
            out, _ = child.communicate(json.dumps(as_json(run_config)).encode())
        except BaseException:
            _stop(child)
            raise
    if child.returncode:
        with log.open("rb") as said:
            said.seek(offset)
            raise CellError(exit_reason(child.returncode, said.read().decode(errors="replace")))
    return convert(decoded(out, "cell"), CellScore, "cell")


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.communicate(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()


def exit_reason(code: int, log: str) -> str:
    """Return in one line why a process ended."""
    if code < 0:
        hint = " (out of memory?)" if -code == _KILLED else ""
        return f"killed by signal {-code}{hint}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"


class Log(Silence):
    """A cell's log: a line per remark, and every few seconds one of progress."""

    _INTERVAL = 5.0  # seconds between progress lines

    def __init__(self, file: IO[str]):
        self._file = file

    def remark(self, text: str) -> None:
        self._file.write(f"{printable(text)}\n")
        self._file.flush()

    def activity(self, what: str, total: int) -> Log:
        self._what, self._total, self._last_line = what, total, time.monotonic()
        return self

    def update(self, done: int, text: str = "", unit: str = "") -> None:
        if time.monotonic() - self._last_line >= self._INTERVAL:
            self._last_line = time.monotonic()
            self.remark(f"{self._what}: {done}/{self._total}{unit} {text}")


def main() -> int:
    """Run one cell: paths in argv, RunConfig on standard input, score on standard output."""
    signal.signal(signal.SIGTERM, _interrupt)
    run, log = map(Path, sys.argv[1:])
    with log.open("a") as file:
        progress = Log(file)
        try:
            with forward_warnings(progress.remark):
                request = convert(decoded(sys.stdin.read(), "cell"), RunConfig, "cell")
                answer = _run_and_score(run, request, progress)
        except (ZtuneError, OSError) as error:
            progress.remark(f"error: {error}")
            answer = CellScore(error=str(error))
        except KeyboardInterrupt:
            progress.remark("stopped")
            return _INTERRUPTED
        except Exception:
            file.write(printable_lines(traceback.format_exc()))
            return 1
    json.dump(plain(answer), sys.stdout)
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _run_and_score(run: Path, run_config: RunConfig, progress: Log) -> CellScore:
    """Start or resume a run if it is not finished; return its score on the test images."""
    folder = RunFolder(run)
    status = folder.read().get("status") if folder.run.is_file() else None
    execution = resolve_execution(
        run_config.provider, run_config.threads, progress, run_config.memory_limit
    )
    with open_model(Path(run_config.bundle), execution, progress) as model:
        if status == "running":
            progress.remark(f"resume {run}")
            with SavedRun.locked(run) as saved:
                saved.resume(model)
        elif status != "finished":  # not started, or refused before its first step
            progress.remark(f"start {run}: {json.dumps(as_json(run_config))}")
            start_run(run_config, model, run)
        progress.remark(f"score {run}")
        images = labelled_of_split(folder.split, "test")
        found = score_run(
            folder,
            run_config,
            images,
            model,
            templates=run_config.templates,
            snapshots=bool(run_config.snapshots),
        )
    with contextlib.suppress(OSError):
        draw_confusion(found.scores, run / "confusion.png")
    return CellScore(
        accuracy=found.tuned.accuracy,
        n=found.tuned.n,
        zero_shot_accuracy=found.zero_shot.accuracy,
        curve=convert(found.curve or [], tuple[CurvePoint, ...], "curve"),
    )
