"""Figures about this machine and process."""

from __future__ import annotations

import ctypes
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
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, KiB elsewhere.
    return float(peak) / 1e6 if sys.platform == "darwin" else float(peak) * 1024 / 1e6


def return_free_memory() -> None:
    """Have the C library give memory that is free back to the system; glibc keeps it otherwise."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def one_blas_thread() -> AbstractContextManager[object]:
    """Keep numpy's matrix products on the calling thread while the context lasts.

    ONNX Runtime's threads spin between two calls, and a second BLAS thread would wait for them: on
    2 cores a ZIP step at 10 classes took 174 ms instead of 79.
    """
    limits: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limits


def versions() -> dict[str, str]:
    """Return ztune's, Python's and the installed packages' versions by name."""
    found = {"ztune": importlib.metadata.version("ztune"), "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit of the checkout that runs, marked where files differ from it.

    None where ztune was installed from a package, or there is no git.
    """
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--abbrev=12", "--dirty"]
    if not (_ROOT / ".git").exists():  # the git of a folder above says nothing about us
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def machine() -> dict[str, str | int | float]:
    """Return what a result depends on: system, processor type, usable cores, memory in GB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
        "cores": int(cores or 1),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }
