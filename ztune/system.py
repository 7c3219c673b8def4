"""Properties of this machine and process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
from threadpoolctl import threadpool_limits

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "numpy", "pillow", "safetensors", "tokenizers", "onnx", "onnxruntime", "onnxruntime-gpu",
    "torch", "open_clip_torch", "transformers", "tritonclient",
)  # fmt: skip


def peak_memory_mb() -> float:
    """Return the process's peak resident memory in MB (10⁶ bytes)."""
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 1e6
    if sys.platform == "linux":
        # ru_maxrss would include the memory of the process that started this one.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, KiB elsewhere.
    return float(peak) / 1e6 if sys.platform == "darwin" else float(peak) * 1024 / 1e6


def return_free_memory() -> None:
    """Return free heap memory to the system, which glibc would keep."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def one_blas_thread() -> AbstractContextManager[object]:
    """Run numpy's matrix products on the calling thread inside the context.

    ONNX Runtime's threads spin between calls and block a second BLAS thread: on 2 cores a ZIP step
    at 10 classes took 174 ms instead of 79.
    """
    limits: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limits


def versions() -> dict[str, str]:
    """Return the versions of ztune, Python and the installed packages by name."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    # Reading that much metadata takes as long as a whole small run.
    found = {"ztune": importlib.metadata.version("ztune"), "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit of the running checkout, marked if files differ from it.

    None if ztune was installed from a package, or without git.
    """
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=12", "--dirty"]
    if not (_ROOT / ".git").exists():  # a parent folder's repository is not ztune's
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def processor_type() -> str:
    """Return the processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, str | int | float]:
    """Return system, processor type, usable cores and memory in GB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
        "cores": int(cores or 1),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }
