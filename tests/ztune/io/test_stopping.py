"""A signal ends a process within two seconds, whatever it is doing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.runtimes.test_graph_check import HOSTILE

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
LATEST = 3.0
"""Seconds: the promised two, and one for a machine that runs other tests."""
_START = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
from ztune.io.stopping import stop_on
stop_on([signal.SIGTERM, signal.SIGHUP])
def ready(): Path(sys.argv[2]).write_text(str(os.getpid()))
"""
_ENDLESS = f"""{_START}
import numpy as np
from runtimes.providers import onnxruntime
session = onnxruntime().InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
def run(): session.run(None, {{"x": np.ones(1, np.float32)}})
ready()
"""
PROGRAMS = {
    "a call": f"{_ENDLESS}run()",
    "a call of a thread that is waited for": f"""{_ENDLESS}
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(1) as pool: pool.submit(run).result()""",
    "an interruption that is not heeded": f"""{_START}
ready()
while True:
    try: time.sleep(60)
    except KeyboardInterrupt: pass""",
    "a child that ignores signals": f"""{_START}
child = subprocess.Popen([sys.executable, "-c", "import signal, time; "
    "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"],
    stdout=subprocess.PIPE)
child.stdout.read(1)
Path(sys.argv[2] + ".child").write_text(str(child.pid))
ready()
try: child.wait()
finally: time.sleep(60)""",
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_process_ends_within_two_seconds(
    program: str, number: signal.Signals, tmp_path: Path
) -> None:
    graph, started = tmp_path / "g.onnx", tmp_path / "started"
    graph.write_bytes(HOSTILE["Loop"].SerializeToString())
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAMS[program], graph, started],
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(number)
    try:
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert time.monotonic() - began < LATEST
    assert process.returncode == 130
    assert err == b"error: stopped\n"
    child = Path(f"{started}.child")
    if child.exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int(child.read_text()), 0)


def test_what_ends_in_time_ends_in_its_own_way(tmp_path: Path) -> None:
    program = f"""{_START}
ready()
try: time.sleep(60)
except KeyboardInterrupt: sys.exit(7)"""
    started = tmp_path / "started"
    process = subprocess.Popen([sys.executable, "-c", program, "", started], cwd=ROOT)
    while not started.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 7
