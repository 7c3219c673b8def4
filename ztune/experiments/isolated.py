"""An executor that runs each task in a new process, which isolates its peak memory and crashes.

The task and its result are JSON on the process's standard input and output.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from ztune.experiments.jobs import Encoded, Encoding, Job, JobResult, Task
from ztune.experiments.worker import Settings, Worker
from ztune.io.children import python_command
from ztune.io.stopping import INTERRUPTED, stop_on

_GRACE = 0.8
"""Seconds that a stopped process has to save its state; less than its parent has."""
_PROGRAM = "from ztune.experiments.isolated import main; sys.exit(main())"
_KILLED = 9  # SIGKILL, which Windows' signal module lacks
_RESULTS: dict[type, Any] = {Encoding: Encoded, Job: JobResult}


class Isolated:
    """Runs tasks one after another, each in its own process; a killed one is a failure."""

    name = "a process per run"
    workers = 1

    def __init__(self, settings: Settings):
        self._settings = settings

    def perform(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Encoded | JobResult]]:
        for place, task in enumerate(tasks):
            yield place, self._run(task)

    def _run(self, task: Task) -> Encoded | JobResult:
        request = _encoded([type(task).__name__, self._settings, task])
        with tempfile.TemporaryFile() as log:
            child = subprocess.Popen(
                python_command(_PROGRAM),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                # Ctrl-C reaches only this process, which then stops the child once.
                start_new_session=True,
            )
            try:
                out, _ = child.communicate(request)
            except BaseException:
                _stop(child)
                raise
            reason = "its process returned no valid result"
            if child.returncode == 0:
                with contextlib.suppress(msgspec.MsgspecError):
                    result: Encoded | JobResult = _decoded(out, _RESULTS[type(task)])
                    return result
            else:
                log.seek(0)
                reason = exit_reason(child.returncode, log.read().decode(errors="replace"))
        if isinstance(task, Encoding):  # the cells that need these images fail and report it
            return Encoded(task.bundle_digest, 0, 0.0)
        return JobResult(reasons={cell.key: reason for cell in task.cells})

    def close(self) -> None:
        pass


def main() -> int:
    """Run the task on standard input; print its result."""
    stop_on([signal.SIGTERM], _GRACE)
    kind, settings, task = _decoded(sys.stdin.buffer.read(), tuple[str, msgspec.Raw, msgspec.Raw])
    # Other output goes to the log: standard output has only the result.
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker(_decoded(settings, Settings))
    try:
        result = worker.perform(_decoded(task, Job if kind == "Job" else Encoding))
    except KeyboardInterrupt:
        return INTERRUPTED
    with os.fdopen(answer, "wb") as file:
        file.write(_encoded(result))
    return 0


def exit_reason(code: int, log: str) -> str:
    """Return in one line why a process ended."""
    if code < 0:
        hint = " (out of memory?)" if -code == _KILLED else ""
        return f"killed by signal {-code}{hint}"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"


def _encoded(value: object) -> bytes:
    return msgspec.json.encode(value, enc_hook=str)  # a path is its text


def _decoded(text: bytes | msgspec.Raw, kind: Any) -> Any:
    return msgspec.json.decode(text, type=kind, dec_hook=lambda kind, value: kind(value))


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.communicate(timeout=_GRACE + 1)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
