"""Tasks and results that the driver and the workers of a bench exchange.

A job is one tuning run with the cells scored from its result; cells of several protocols may share
a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ztune.data.split import Split
from ztune.experiments.cells import Cell, Outcome, key_of
from ztune.run_config import RunConfig


def key_of_tested(split: Split) -> str:
    """Return a digest of test images: contents, classes and order, not paths."""
    return key_of(
        {
            "classes": list(split.classes),
            "labels": [entry.label for entry in split.entries],
            "digests": [entry.sha256 for entry in split.entries],
        }
    )


@dataclass(frozen=True)
class ScoredPart:
    """A part to score."""

    name: str
    split_file: Path
    """Its test images."""
    templates: tuple[str, ...]
    """Of its own data set."""
    cache: Path
    skip_broken: bool = False


@dataclass(frozen=True)
class CellJob:
    """One cell of a job."""

    key: str
    cell: Cell
    parts: tuple[ScoredPart, ...]
    curve: bool
    """Whether snapshots are also scored, on the first part."""


@dataclass(frozen=True)
class Job:
    """One run, and the cells scored from its result."""

    run: str
    """Key and folder name."""
    run_config: RunConfig
    bundle_digest: str
    split: Split
    cells: tuple[CellJob, ...]
    package: str | None = None
    """Name and version of the method's package; None: ztune."""
    alone: bool = False
    """Whether it runs without other tasks, which isolates the cause of a killed process."""


@dataclass(frozen=True)
class Encoding:
    """Images to encode before the first run, as (file, SHA-256)."""

    bundle: Path
    bundle_digest: str
    items: tuple[tuple[Path, str], ...]
    cache: Path


@dataclass(frozen=True)
class Encoded:
    """Cost of encoding."""

    bundle_digest: str
    n: int
    """Images that were not in the cache."""
    seconds: float
    peak_memory_mb: float | None = None
    """Of its process; None if that process had other tasks."""


@dataclass(frozen=True)
class JobResult:
    """The result of a job."""

    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    """By cell key."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Failures by cell key."""
    warnings: tuple[str, ...] = ()
    busy: bool = False
    """Not run: another process has locked the run."""
    alone: bool = False
    """Not run: earlier attempts were killed, so retry it without other tasks."""
    seconds: float = 0.0


Task = Encoding | Job
