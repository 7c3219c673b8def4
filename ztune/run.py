"""A run's folder: settings, progress, saved state and results.

`run.json` has the settings and, at the end, the results; `state.safetensors` is the last saved
state; `history.jsonl` has a line per step.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Annotated, Any, cast

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from ztune.artifact import Artifact, artifact_bytes, write_artifact
from ztune.budget import Budget
from ztune.data.cache import (
    MOST_BYTES,
    FeatureCache,
    FeatureStore,
    MemoryCache,
    OptionalCache,
    shared_cache,
    trim,
)
from ztune.errors import ConfigError, FormatError, ZtuneError
from ztune.io.files import (
    naming,
    new_folder,
    read_bytes,
    read_json,
    remove_leftovers,
    temporary_name,
    write_json,
)  # fmt: skip
from ztune.io.kinds import RUN_FORMAT, wrong_kind
from ztune.io.old_formats import rename_arrays
from ztune.io.schema import Count, Record, convert, current, decoded, plain
from ztune.io.tensors import read_tensors, write_tensors
from ztune.journal import Journal, RequestCounter
from ztune.loop import Tuning
from ztune.printing import quoted, reason_of
from ztune.report import draw_curve
from ztune.types import U8, Evaluation, Json, Mixing

FORMAT = RUN_FORMAT
VERSION = 3


REPLACED = "replaced"
"""The status of a run whose replacement was interrupted."""
_PLOTS = ("curve.png", "confusion.png")


class SaveSchedule:
    """Schedules saves: at least a second, and ten times a save's duration, after the last one.

    On a local model repeated steps after a kill give the same numbers for free, and flushing every
    step can cost more than a small model. A server bills them, so there every step is saved.
    """

    def __init__(self, *, every_step: bool = False) -> None:
        self._every_step = every_step
        self._next = time.monotonic() + 1.0
        self._began = 0.0

    def due(self) -> bool:
        return self._every_step or time.monotonic() >= self._next

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        now = time.monotonic()
        self._next = now + max(1.0, 10 * (now - self._began))


class _SavedState(Record, frozen=True):
    """The state file's document."""

    optimizer: Mapping[str, Json]
    sampler: Mapping[str, Json]
    step: Count
    seconds: Annotated[float, Meta(ge=0)]
    queries: Count
    text_forwards: Count
    image_forwards: Count
    history_bytes: Count
    text_forwards_cached: Count = 0


class _HistoryLine(Struct, frozen=True):
    """A line of the history; unknown keys are ignored."""

    step: Count
    queries: Count
    loss: float
    accuracy: float
    seconds: float
    validation: bool = False
    result_loss: float | None = None
    result_accuracy: float | None = None


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.run = path / "run.json"
        self.split = path / "split.json"
        self.state = path / "state.safetensors"
        self.history = path / "history.jsonl"
        self.prompt = path / "prompt.safetensors"
        self.journal = path / "sent.jsonl"
        self.snapshots = path / "snapshots"
        self.lock = path / ".lock"
        self.curve = path / "curve.png"

    def require_free(self, *, overwrite: bool = False) -> None:
        """Check that a run can start here: there is none, or one that may be replaced.

        Raises: ConfigError saying what is there and what to do; FormatError for a run.json not
            written by ztune.
        """
        if not self.run.exists():
            if overwrite and self.path.exists() and not _is_empty(self.path):
                raise ConfigError(
                    f'output "{self.path}" is not a run, and `overwrite` only replaces runs (name '
                    "another `out`)"
                )
            return
        status = self.read().get("status")
        if overwrite or status in ("refused", REPLACED):
            return
        if status == "finished":
            raise ConfigError(
                f'output "{self.path}" is a finished run (name another `out`, or replace it with '
                "`overwrite`)"
            )
        with self.locked():  # else another process is working on it
            raise ConfigError(
                f'output "{self.path}" is an unfinished run (resume with: ztune tune '
                f"--resume {quoted(self.path)}; or name another `out`, or replace it with "
                "`overwrite`)"
            )

    @contextlib.contextmanager
    def create_locked(
        self, document: Mapping[str, Json], split: Mapping[str, Json], *, overwrite: bool = False
    ) -> Iterator[None]:
        """Create a run as `create` does, locked against other processes.

        Raises: as `require_free` and `locked`.
        """
        if self.run.exists():
            self.require_free(overwrite=overwrite)
            with self.locked():
                self._replace(document, split)
                yield
        else:
            self.create(document, split)
            with self.locked():
                yield

    def create(self, document: Mapping[str, Json], split: Mapping[str, Json]) -> None:
        """Create the folder with run.json and split.json, all or nothing.

        A run that was refused before its first step is replaced; its cache is kept.

        Raises: ConfigError if it has other content, or cannot be created.
        """
        if self.run.exists():
            self.require_free()
            self._replace(document, split)
            return
        self.remove_leftovers()
        with new_folder(self.path) as work:
            RunFolder(work).write(document)
            write_json(work / self.split.name, dict(split))

    def _replace(self, document: Mapping[str, Json], split: Mapping[str, Json]) -> None:
        """Replace a run by a new one; the cache and foreign files stay.

        An interruption leaves the former run, the new one, or a run with the status of an
        interrupted replacement.
        """
        self.write({**self.read(), "status": REPLACED})
        former = [self.state, self.history, self.prompt, self.journal, self.split]
        former += [self.path / name for name in _PLOTS]
        for file in (*former, *self.snapshots.glob("*.safetensors")):
            file.unlink(missing_ok=True)
        write_json(self.split, dict(split))
        self.write(document)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run against other processes.

        Raises: ConfigError if another process has it; ZtuneError for a file system without locks;
            FormatError if the lock is not a file.
        """
        _require_regular(self.lock, f'run "{self.path}"')
        try:
            opened = self.lock.open("a")
        except OSError as error:
            raise ZtuneError(
                f'run "{self.path}" cannot be written: {error.strerror} (change its permissions, '
                "or copy it to a writable folder)"
            ) from None
        with opened as file:
            try:
                _lock(file)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise ZtuneError(
                        f'run "{self.path}" cannot be locked: {error.strerror} (use a file system '
                        "with locks)"
                    ) from None
                raise ConfigError(
                    f'run "{self.path}" is in use by another process (wait for it, or stop it)'
                ) from None
            self.remove_leftovers()
            yield

    def remove_leftovers(self) -> None:
        """Remove the temporary files and folders that killed processes left of this run."""
        names = (self.run, self.split, self.state, self.prompt, *map(self.path.joinpath, _PLOTS))
        patterns = [f"{temporary_name(file.name)}????????" for file in names]
        found = [file for pattern in patterns for file in self.path.glob(pattern)]
        found += self.snapshots.glob(f"{temporary_name('*.safetensors')}????????")
        start = f"{temporary_name(glob.escape(self.path.name))}????????"
        found += self.path.absolute().parent.glob(start)
        remove_leftovers(found)

    def write(self, document: Mapping[str, Json]) -> None:
        write_json(self.run, {"format": FORMAT, "version": VERSION, **document})

    def read(self) -> dict[str, Json]:
        """Return run.json's content, without format and version.

        Raises: FormatError if this is not a run, has a newer format, or has a non-file or a link
            where a run writes: a link in an untrusted run could lead to other files.
        """
        where = f'run "{self.path}"'
        if not self.run.is_file():
            raise wrong_kind(self.path, "run")
        for file in (self.state, self.history, self.journal):
            _require_regular(file, where)
        document = current(read_json(self.run, where), FORMAT, VERSION, f"{where}: run.json")
        for path in (self.lock, self.history, self.journal, self.snapshots):
            if path.is_symlink():
                raise FormatError(
                    f'{where}: "{path.name}" is a link, expected a file in the run\'s folder '
                    "(replace it by its target)"
                )
        return document

    @property
    def is_started(self) -> bool:
        return self.run.exists()

    @property
    def has_state(self) -> bool:
        return self.state.exists()

    @property
    def where_saved(self) -> str:
        return f"the state before it is saved in {self.state}"

    def cache_folder(self, named: str | None) -> Path:
        """Return the folder of features: the named one, else that of an older run, else shared."""
        if named:
            return Path(named)
        own = self.path / "cache"
        return own if own.is_dir() else shared_cache()

    def cache(self, named: str | None) -> FeatureStore:
        """Return the store of image features."""
        folder = self.cache_folder(named)
        return FeatureCache(folder) if named else OptionalCache(folder)

    def trim_cache(self, named: str | None) -> None:
        """Bound the shared image features."""
        if not named:
            trim(shared_cache(), MOST_BYTES)

    def pixels(self, shape: tuple[int, ...]) -> U8:
        """Return u8 of that shape, mapped to a temporary file.

        Raises: ConfigError if the disk has too little space.
        """
        with tempfile.TemporaryFile(dir=self.path) as file:  # the mapping outlives the file's name
            _reserve(file.fileno(), shape, self.path)
            return np.memmap(cast("Any", file), dtype=np.uint8, mode="w+", shape=shape)

    def open_journal(self, budget: Budget) -> Journal:
        """Return the journal of requests with queries to a server."""
        return Journal(self.journal, budget)

    def keep(self, artifact: Artifact) -> int:
        """Write the run's result and return its size in bytes."""
        write_artifact(self.prompt, artifact)
        return self.prompt.stat().st_size

    def keep_snapshot(self, artifact: Artifact, queries: int) -> None:
        """Write a snapshot of the result after so many queries."""
        self.snapshots.mkdir(exist_ok=True)
        write_artifact(self.snapshots / f"{queries:09d}.safetensors", artifact)

    def draw_curve(self, levels: Mapping[str, float], title: str) -> None:
        """Draw the curve.

        Raises: FormatError if the history is missing or damaged.
        """
        if not self.history.exists():
            raise FormatError(
                f'run "{self.path}": history.jsonl is missing, and the curve is drawn from it (put '
                "it back)"
            )
        draw_curve(self.read_history(), levels, title, self.curve)

    def is_finished(self) -> bool:
        """Return whether there is a finished run."""
        try:
            return self.read().get("status") == "finished"
        except FormatError:  # missing or damaged
            return False

    def save(self, tuning: Tuning) -> None:
        """Save the history, then the state, each whole or not at all."""
        if self.history.exists():
            with self.history.open("rb+") as file:
                os.fsync(file.fileno())
        optimizer, sampler = tuning.optimizer.state(), tuning.sampler.state()
        arrays = {f"optimizer.{k}": v for k, v in optimizer[0].items()}
        arrays |= {f"sampler.{k}": v for k, v in sampler[0].items()}
        budget = tuning.budget
        saved = _SavedState(
            optimizer=optimizer[1],
            sampler=sampler[1],
            step=tuning.step,
            seconds=tuning.seconds,
            queries=budget.queries,
            text_forwards=budget.text_forwards,
            image_forwards=budget.image_forwards,
            history_bytes=self.history.stat().st_size if self.history.exists() else 0,
            text_forwards_cached=budget.text_forwards_cached,
        )
        write_tensors(self.state, arrays, plain(saved))

    def restore(self, tuning: Tuning) -> None:
        """Restore the saved state, if any, and truncate the history to it.

        Raises: FormatError if the state or the history is damaged, or the history is missing.
        """
        if not self.state.exists():
            self.history.unlink(missing_ok=True)
            return
        where = f'run "{self.path}": state'
        arrays, document = read_tensors(self.state, where)
        arrays = rename_arrays(arrays)
        saved = convert(document, _SavedState, where)

        def arrays_of(name: str) -> Mapping[str, NDArray[Any]]:
            return {k.partition(".")[2]: v for k, v in arrays.items() if k.startswith(f"{name}.")}

        restart = f"remove {self.state.name} to start the steps again"
        try:
            tuning.optimizer.restore((arrays_of("optimizer"), saved.optimizer))
            tuning.sampler.restore((arrays_of("sampler"), saved.sampler))
        except FormatError as error:
            raise FormatError(f"{where}: {error}; {restart}") from None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # A plugin's optimizer may check less.
            raise FormatError(
                f"{where} cannot be restored ({type(error).__name__}: {reason_of(error)}; file "
                f"damaged, or of another version); {restart}"
            ) from None
        history = self._history()
        lines = self._lines(history[: saved.history_bytes])
        last = int(lines[-1]["queries"]) if lines else 0
        if (len(lines), last) != (saved.step, saved.queries) or last > tuning.budget.limit:
            raise FormatError(
                f'run "{self.path}": history.jsonl has {len(lines)} steps and {last} queries, '
                f"expected {saved.step} and {saved.queries} as in the saved state (put the file "
                f"back, or {restart})"
            )
        tuning.step, tuning.earlier = saved.step, saved.seconds
        for name in ("queries", "text_forwards", "text_forwards_cached", "image_forwards"):
            setattr(tuning.budget, name, getattr(saved, name))
        if len(history) > saved.history_bytes:
            os.truncate(self.history, saved.history_bytes)

    def log(self, tuning: Tuning, evaluation: Evaluation) -> None:
        """Append one line to the history."""
        with naming(self.history), self.history.open("a") as file:
            file.write(json.dumps(history_line(tuning, evaluation)) + "\n")

    def lacks_snapshot(self, marks: Sequence[int], queries: int) -> bool:
        """Return whether a mark reached by `queries` has no snapshot at or after it."""
        reached = [mark for mark in marks if mark <= queries]
        stems = [file.stem for file in self.snapshots.glob("*.safetensors")]
        written = [int(stem) for stem in stems if stem.isdecimal()]
        return bool(reached) and not any(n >= max(reached) for n in written)

    def read_history(self) -> list[dict[str, float]]:
        """Return the history's complete lines.

        Raises: FormatError naming a damaged line.
        """
        return self._lines(self._history())

    def _history(self) -> bytes:
        return read_bytes(self.history) if self.history.exists() else b""

    def _lines(self, history: bytes) -> list[dict[str, float]]:
        """Return the complete lines of a history; a kill may have cut off the last."""
        lines = []
        for number, line in enumerate(history.split(b"\n")[:-1], 1):
            where = f'run "{self.path}": history.jsonl, line {number}'
            document: dict[str, Any] = decoded(line, where)
            convert(document, _HistoryLine, where)
            lines.append(document)
        return lines


def history_line(tuning: Tuning, evaluation: Evaluation) -> dict[str, Any]:
    """Return a round's entry in the history."""
    line: dict[str, Any] = {
        "step": tuning.step,
        "queries": tuning.budget.queries,
        "loss": round(float(evaluation.losses.mean()), 6),
        "accuracy": round(float(evaluation.accuracies.mean()), 6),
        "seconds": round(tuning.seconds, 3),
    }
    if evaluation.batch_number == 0:
        line["validation"] = True
    optimizer = tuning.optimizer
    if isinstance(optimizer, Mixing) and (fitted := optimizer.fitted()) is not None:
        line["result_loss"], line["result_accuracy"] = (round(one, 6) for one in fitted)
    return line


class MemoryRun:
    """A run in memory, which cannot be resumed."""

    where_saved = "the state is not saved"

    def __init__(self) -> None:
        self.document: dict[str, Json] = {}
        self.artifact: Artifact | None = None
        self._features, self._history = MemoryCache(), list[dict[str, Any]]()
        self._snapshots: list[int] = []

    @property
    def is_started(self) -> bool:
        return bool(self.document)

    @property
    def has_state(self) -> bool:
        return False

    def read(self) -> dict[str, Json]:
        return self.document

    def write(self, document: Mapping[str, Json]) -> None:
        self.document = dict(document)

    def cache_folder(self, named: str | None) -> Path | None:
        return Path(named) if named else None

    def cache(self, named: str | None) -> FeatureStore:
        return FeatureCache(Path(named)) if named else self._features

    def trim_cache(self, named: str | None) -> None:
        pass

    def pixels(self, shape: tuple[int, ...]) -> U8:
        return np.empty(shape, dtype=np.uint8)

    def open_journal(self, budget: Budget) -> RequestCounter:
        return RequestCounter(budget)

    def keep(self, artifact: Artifact) -> int:
        self.artifact = artifact
        return len(artifact_bytes(artifact))

    def keep_snapshot(self, artifact: Artifact, queries: int) -> None:
        self._snapshots.append(queries)

    def lacks_snapshot(self, marks: Sequence[int], queries: int) -> bool:
        return False

    def save(self, tuning: Tuning) -> None:
        pass

    def restore(self, tuning: Tuning) -> None:
        pass

    def log(self, tuning: Tuning, evaluation: Evaluation) -> None:
        self._history.append(history_line(tuning, evaluation))

    def read_history(self) -> list[dict[str, float]]:
        return self._history

    def draw_curve(self, levels: Mapping[str, float], title: str) -> None:
        pass


RunStore = RunFolder | MemoryRun


def _reserve(file: int, shape: tuple[int, ...], folder: Path) -> None:
    """Reserve disk space for u8 `shape`: a full disk would later kill the process without an error.

    Raises: ConfigError if there is too little.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS, Windows
        return
    n_bytes = math.prod(shape)
    try:
        os.posix_fallocate(file, 0, n_bytes)
    except OSError as error:
        raise ConfigError(
            f"the pixels of {shape[0] * shape[1]} images and views need {n_bytes / 1e9:.1f} GB "
            f'in "{folder}": {error.strerror} (name another `out`, or use fewer `augment` views)'
        ) from None


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _require_regular(file: Path, where: str) -> None:
    """Raise for a pipe or device, which could block when opened."""
    if file.exists() and not file.is_file():
        raise FormatError(f"{where}: {file.name} is not a regular file (remove it)")


if sys.platform == "win32":

    def _lock(file: IO[str]) -> None:
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:

    def _lock(file: IO[str]) -> None:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
