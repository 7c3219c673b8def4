"""Tests; where several files run at once, numpy and torch take one thread in each process."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
