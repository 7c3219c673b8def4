"""One cell of a comparison: a process that tunes, then one that scores on the test pictures.

Processes of their own, so that peak memory and failures are the cell's.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ztune.errors import ConfigError, FormatError, ZtuneError
from ztune.experiments.comparison import Figures, figures_of
from ztune.io.children import python_command
from ztune.io.fields import Fields
from ztune.printing import printable
from ztune.run import RunFolder

# Seconds that a stopped process has to save its state.
_GRACE = 20.0
_PROGRAM = "from ztune.cli.main import main; sys.exit(main())"
_KILLED = 9  # SIGKILL, which Windows' signal module lacks


class CellError(ZtuneError):
    """A cell's process that did not succeed; the message is its reason in one line."""


class BusyError(ZtuneError):
    """A cell whose run another process is working on: no failure of its method."""


def carry_out(
    run: Path, tune_words: Sequence[str], eval_words: Sequence[str], log: Path
) -> Figures:
    """Begin a run or go on with it, score it, return its figures.

    Raises: CellError; BusyError where another process works on the run.
    """
    folder = RunFolder(run)
    if run.is_dir():
        try:
            with folder.locked():  # and at once free for the process that follows
                pass
        except ConfigError as error:
            raise BusyError(str(error)) from None
    try:
        status = folder.read().get("status") if folder.run.is_file() else None
        if status == "running":
            call(["tune", "--resume", str(run)], log)
        elif status != "finished":  # not begun, or refused before its first step
            call([*tune_words, "--out", str(run)], log)
        scored = call(["eval", str(run), *eval_words, "--json"], log)
        where = f'run "{run}"'
        return figures_of(Fields(folder.read(), where), Fields(json.loads(scored), where))
    except FormatError as error:
        raise CellError(str(error)) from None


def call(words: Sequence[str], log: Path) -> str:
    """Run `ztune` with these words in a process of its own; return its standard output.

    Its standard error is appended to `log`. Where this process is interrupted, so is the other.

    Raises: CellError.
    """
    with log.open("ab") as errors:
        errors.write(f"$ ztune {printable(shlex.join(words))}\n".encode())
        errors.flush()
        said_before = errors.tell()
        child = subprocess.Popen(
            python_command(_PROGRAM, *words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            # Ctrl-C reaches this process alone, which then stops the other once.
            start_new_session=True,
        )
        try:
            out, _ = child.communicate()
        except BaseException:
            _stop(child)
            raise
    if child.returncode:
        with log.open("rb") as said:
            said.seek(said_before)
            raise CellError(reason(child.returncode, said.read().decode(errors="replace")))
    return out.decode()


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.communicate(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()


def reason(code: int, said: str) -> str:
    """Return why a process failed, in one line: its own word, else how it ended."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    if code < 0:
        hint = " (out of memory?)" if -code == _KILLED else ""
        return f"killed by signal {-code}{hint}"
    return lines[-1] if lines else f"exit code {code}"
