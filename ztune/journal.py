"""A write-ahead journal of the queries sent to a server.

A step whose answers are not in the saved state is sent again. Its charge stays the same; the
journal records, across kills, that the server may have billed it twice.
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
"""Queries charged before a step; None outside the steps."""


class RequestCounter:
    """Counts requests with queries before they are sent, without writing a file."""

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


class Journal(RequestCounter):
    """A file with one line per request with queries; thread-safe.

    A line has the queries charged before its step (none: a report outside the steps), the
    request's index in the step, and its number of queries.
    """

    def __init__(self, path: Path, budget: Budget):
        """Count the requests of earlier processes; a truncated line was never sent.

        Raises: FormatError for a file that is not a journal.
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
        """Record request `part` of the current step before it is sent."""
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
                    file.truncate(before)  # a partial line would corrupt the next one
                    raise
            if is_new:
                flush_folder(self._path.parent)
            self._count(step, part, n_queries)
