"""What was sent to a server, counted over all processes of a run, whatever cut them short."""

import errno
import os
import threading
from pathlib import Path

import pytest

from ztune.budget import Budget
from ztune.errors import FormatError
from ztune.journal import Journal


def stepping(queries: int = 0, step: int = 10) -> Budget:
    """Return a budget of which a step is reserved."""
    budget = Budget(1000, queries)
    budget.reserve(step)
    return budget


def counts(budget: Budget) -> tuple[int, int, int]:
    return budget.sent, budget.possibly_billed_twice, budget.report_queries


def test_a_request_is_counted_each_time_and_doubtful_from_the_second(tmp_path: Path) -> None:
    budget = stepping()
    sending = Journal(tmp_path / "sent.jsonl", budget)
    sending(0, 6)
    sending(1, 4)
    assert counts(budget) == (10, 0, 0)
    sending(1, 4)
    assert counts(budget) == (14, 4, 0)
    budget.commit(1)
    assert budget.queries == 10
    sending(0, 3)  # no step is reserved: a report
    assert counts(budget) == (14, 4, 3)
    budget.reserve(10)
    sending(0, 10)  # the next step's first request is another one
    assert counts(budget) == (24, 4, 3)


def test_a_step_in_flight_at_a_kill_is_doubtful_when_it_is_sent_again(tmp_path: Path) -> None:
    path = tmp_path / "sent.jsonl"
    first = stepping()
    Journal(path, first)(0, 10)
    first.commit(1)
    first.reserve(10)
    Journal(path, first)(0, 10)
    # The state of step 1 was saved, and the process killed before that of step 2.
    again = stepping(queries=10)
    sending = Journal(path, again)
    assert counts(again) == (20, 0, 0)
    sending(0, 10)
    assert counts(again) == (30, 10, 0)
    again.commit(1)
    assert again.queries == 20


def test_a_line_cut_short_was_never_sent(tmp_path: Path) -> None:
    path = tmp_path / "sent.jsonl"
    path.write_bytes(b"[0, 0, 10]\n[10, 0, 1")
    budget = stepping(queries=10)
    sending = Journal(path, budget)
    assert counts(budget) == (10, 0, 0)
    sending(0, 10)
    assert path.read_bytes() == b"[0, 0, 10]\n[10, 0, 10]\n"
    assert counts(budget) == (20, 0, 0)


@pytest.mark.parametrize("line", [b"[0, 0]", b"{}", b"nonsense", b'["a", 0, 1]', b"[[1], 0, 1]"])
def test_a_file_that_is_no_journal_is_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "sent.jsonl"
    path.write_bytes(b"[0, 0, 10]\n" + line + b"\n")
    with pytest.raises(FormatError, match="line 2: invalid journal entry"):
        Journal(path, Budget(10))


def test_what_could_not_be_written_is_not_counted_and_spoils_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, budget = tmp_path / "sent.jsonl", stepping()
    sending = Journal(path, budget)
    sending(0, 4)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            sending(1, 6)
    assert counts(budget) == (4, 0, 0)
    sending(1, 6)
    assert path.read_bytes() == b"[0, 0, 4]\n[0, 1, 6]\n"
    assert counts(budget) == (10, 0, 0)


def test_threads_write_whole_lines(tmp_path: Path) -> None:
    path, budget = tmp_path / "sent.jsonl", stepping()
    sending = Journal(path, budget)
    threads = [threading.Thread(target=sending, args=(part, 1)) for part in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fresh = stepping()
    Journal(path, fresh)
    assert counts(fresh) == counts(budget) == (40, 0, 0)
