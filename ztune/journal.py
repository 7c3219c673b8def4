"""What was sent to a server, written down before it goes.

A step whose answers never became part of the saved state is sent again. What is charged stays the
same; that a server may have been paid for it twice is known from here, also after a kill.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import msgspec

from ztune.budget import Budget
from ztune.errors import FormatError
from ztune.io.files import flush_folder, read_bytes

Step = int | None
"""Queries charged before a step; None outside of one."""


class Counted:
    """Counts requests with queries before they go to a server; nothing is written."""

    def __init__(self, budget: Budget):
        self._budget = budget
        self._seen: set[tuple[int, int]] = set()
        self._lock = threading.Lock()

    def __call__(self, part: int, n_queries: int) -> None:
        """Count request `part` of the current step."""
        with self._lock:
            self._count(self._budget.queries if self._budget.in_step else None, part, n_queries)

    def _count(self, step: Step, part: int, n_queries: int) -> None:
        if step is None:
            self._budget.report(n_queries)
            return
        again = (step, part) in self._seen
        self._seen.add((step, part))
        self._budget.send(n_queries, again=again)


class Journal(Counted):
    """Lines of a file, one for each request with queries in it; safe for several threads.

    A line says how many queries were charged before its step, which of the step's requests it is,
    and how many queries it carries. Outside a step it says no step, and counts as a report.
    """

    def __init__(self, path: Path, budget: Budget):
        """Count what earlier processes have sent; a line cut short was never sent.

        Raises: FormatError for a file that is no journal.
        """
        super().__init__(budget)
        self._path = path
        content = read_bytes(path) if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self._count(*msgspec.json.decode(line, type=tuple[Step, int, int]))
            except (msgspec.MsgspecError, RecursionError):
                raise FormatError(
                    f"{path}, line {number}: invalid journal entry (file damaged)"
                ) from None

    def __call__(self, part: int, n_queries: int) -> None:
        """Write down that request `part` of the current step goes now."""
        with self._lock:
            step = self._budget.queries if self._budget.in_step else None
            line = json.dumps([step, part, n_queries]).encode() + b"\n"
            is_new = not self._path.exists()
            with self._path.open("ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                try:
                    if file.write(line) != len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(before)  # half a line would spoil what another thread writes next
                    raise
            if is_new:
                flush_folder(self._path.parent)
            self._count(step, part, n_queries)
