"""What a bench's workers are asked to do and what they answer; all of it travels between processes.

A job is one run of tuning, with the cells that are scored from its result: those of several
protocols may share one run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ztune.data.manifests import is_inside
from ztune.data.split import Split
from ztune.errors import FormatError
from ztune.experiments.cells import Cell, Outcome, key_of
from ztune.io.fields import Fields
from ztune.io.files import read_json, write_json
from ztune.run_config import RunConfig
from ztune.types import I64, Json


@dataclass(frozen=True)
class PictureList:
    """Labelled pictures to score on."""

    root: Path
    classes: tuple[str, ...]
    """Sorted."""
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    digests: tuple[str, ...]
    """SHA-256 of the files."""

    @property
    def items(self) -> list[tuple[Path, str]]:
        """The files and their digests, as `encode_pictures` takes them."""
        return [(self.root / p, d) for p, d in zip(self.paths, self.digests, strict=True)]

    @property
    def label_array(self) -> I64:
        return np.array(self.labels, dtype=np.int64)

    @property
    def key(self) -> str:
        """What its figures depend on: contents, classes and order, and not where it lies."""
        return key_of(
            {
                "classes": list(self.classes),
                "labels": list(self.labels),
                "digests": list(self.digests),
            }
        )

    @property
    def file_name(self) -> str:
        return f"{self.key}.json"

    def save(self, path: Path) -> None:
        """Write the list."""
        document: dict[str, Json] = {
            "root": str(self.root),
            "classes": list(self.classes),
            "paths": list(self.paths),
            "labels": list(self.labels),
            "digests": list(self.digests),
        }
        write_json(path, document)

    @classmethod
    def read(cls, path: Path) -> PictureList:
        """Read a list back.

        Raises: FormatError.
        """
        where = f'pictures "{path}"'
        fields = Fields(read_json(path, where), where)
        found = cls(
            Path(fields.text("root")),
            fields.texts("classes"),
            fields.texts("paths"),
            fields.integers("labels"),
            fields.texts("digests"),
        )
        if len({len(found.paths), len(found.labels), len(found.digests)}) > 1:
            raise FormatError(f"{where}: lists of different lengths")
        if outside := [path for path in found.paths if not is_inside(path)]:
            raise FormatError(f"{where}: path {outside[0]!r} leaves its root")
        return found


@dataclass(frozen=True)
class ScoredPart:
    """A part of a task, as a worker scores it."""

    name: str
    list_file: Path
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
    alone: bool = False
    """Whether no other task is under way, so that a lost process is this job's own doing."""


@dataclass(frozen=True)
class Encoding:
    """Pictures to encode before the first run, as (file, SHA-256)."""

    bundle: Path
    bundle_digest: str
    items: tuple[tuple[Path, str], ...]
    cache: Path


@dataclass(frozen=True)
class Encoded:
    """What encoding took."""

    bundle_digest: str
    n: int
    """Pictures that were not found encoded."""
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
