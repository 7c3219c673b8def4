"""What a bench's workers are asked to do and what they answer; all of it travels between processes.

A job is one run of tuning, with the cells that are scored from its result: those of several
protocols may share one run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ztune.data.split import Split
from ztune.experiments.cells import Cell, Outcome, key_of
from ztune.run_config import RunConfig


def key_of_tested(split: Split) -> str:
    """Return what figures on test images depend on: contents, classes and order, not the place."""
    return key_of(
        {
            "classes": list(split.classes),
            "labels": [entry.label for entry in split.entries],
            "digests": [entry.sha256 for entry in split.entries],
        }
    )


@dataclass(frozen=True)
class ScoredPart:
    """A part of a task, as a worker scores it."""

    name: str
    split_file: Path
    """Its test images."""
    templates: tuple[str, ...]
    """Hand-written prompts of its own data set."""
    cache: Path


@dataclass(frozen=True)
class CellJob:
    """One cell of a job."""

    key: str
    cell: Cell
    parts: tuple[ScoredPart, ...]
    curve: bool
    """Whether the results on the way are scored too, on the first part."""


@dataclass(frozen=True)
class Job:
    """One run, and the cells that are scored from its result."""

    run: str
    """Its key, and the name of its folder."""
    run_config: RunConfig
    bundle_digest: str
    split: Split
    cells: tuple[CellJob, ...]
    package: str | None = None
    """Name and version of the package that the method is from; None: of ztune itself."""
    alone: bool = False
    """Whether no other task is under way, so that a lost process is this job's own doing."""


@dataclass(frozen=True)
class Encoding:
    """Images to encode before the first run, as (file, SHA-256)."""

    bundle: Path
    bundle_digest: str
    items: tuple[tuple[Path, str], ...]
    cache: Path


@dataclass(frozen=True)
class Encoded:
    """What encoding took."""

    bundle_digest: str
    n: int
    """Images that were not found encoded."""
    seconds: float


@dataclass(frozen=True)
class JobResult:
    """What became of a job."""

    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    """By the keys of cells."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why cells failed."""
    warnings: tuple[str, ...] = ()
    busy: bool = False
    """Another process works on the run, so that nothing was done."""
    alone: bool = False
    """Processes were lost with it before: nothing was done, it is to be asked for alone."""
    seconds: float = 0.0


Task = Encoding | Job
