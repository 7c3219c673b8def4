"""End a process within two seconds of a signal, even inside a long call of a library."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Collection
from types import FrameType

INTERRUPTED = 130
"""Exit code of an interrupted process."""
GRACE = 1.0
"""Seconds that a process has to save its state; less than the two that docs/security.md states."""


def stop_on(signals: Collection[int], grace: float = GRACE) -> None:
    """Raise KeyboardInterrupt at one of `signals`; exit `grace` seconds later if still running.

    Python calls a handler only between two of its own instructions, never inside a call of ONNX
    Runtime or a decoder. A thread can exit there. Files are replaced atomically, so an exit at any
    moment leaves none incomplete.
    """
    for number in signals:
        signal.signal(number, _interrupt)
    reader, writer = os.pipe()
    if os.name == "posix":  # Windows lacks it before Python 3.12
        os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if before != -1:  # stop_on was called before, or the program has an event loop
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
        return
    threading.Thread(target=_watch, args=(reader, signals, grace), daemon=True).start()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _watch(reader: int, signals: Collection[int], grace: float) -> None:
    while not {*os.read(reader, 64)} & {*signals}:  # other signals with a handler arrive too
        pass
    try:
        exit_at = time.monotonic() + grace
        import psutil  # takes part of the time on a loaded machine

        time.sleep(max(0.0, exit_at - time.monotonic()))
        os.write(2, b"error: stopped\n")
        children = psutil.Process().children(recursive=True)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(children, timeout=0.5)
    finally:
        os._exit(INTERRUPTED)
