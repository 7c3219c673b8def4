"""Child Python processes that import nothing from the working folder.

`python -m` puts that folder on the path, so a data set unpacked there could run its `json.py`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_OURS = Path(__file__).resolve().parents[2]
# Only built-in modules are imported before the path is set.
_PRELUDE = "import sys; n = int(sys.argv[1]) + 2; sys.path[:] = sys.argv[2:n]; del sys.argv[1:n]; "


def python_command(program: str, *words: str) -> list[str]:
    """Return the command of a child that runs `program` with `words` as sys.argv[1:].

    Its module path is this process's, without the working folder.
    """
    path = _path()
    return [sys.executable, "-c", _PRELUDE + program, str(len(path)), *path, *words]


def _path() -> list[str]:
    """Return this process's path without the working folder, unless ztune itself is there."""
    here = os.path.realpath(Path.cwd())
    path = [entry for entry in sys.path if entry and os.path.realpath(entry) != here]
    return path if here != str(_OURS) else [*path, here]


@contextlib.contextmanager
def empty_working_folder() -> Iterator[None]:
    """Change to an empty folder: joblib and Ray put the current one on their workers' path."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="ztune-workers-") as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
