"""A run's folder: what it is doing, how far it is, and how to go on after a kill.

`run.json` says what was asked and, at the end, what came out; `state.safetensors` is the state
after the last saved step; `history.jsonl` has a line per step.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from ztune.artifact import Artifact, artifact_bytes, write_artifact
from ztune.budget import Budget
from ztune.data.cache import FeatureCache, FeatureStore, MemoryCache
from ztune.errors import ConfigError, FormatError, ZtuneError
from ztune.io.files import naming, new_folder, read_json, write_json
from ztune.io.kinds import RUN_FORMAT, wrong_kind
from ztune.io.old_formats import renamed_arrays
from ztune.io.schema import Count, Record, convert, current, plain
from ztune.io.tensors import read_tensors, write_tensors
from ztune.journal import Counted, Journal
from ztune.loop import Tuning
from ztune.printing import quoted
from ztune.report import draw_curve
from ztune.types import U8, Evaluation, Json, Mixing

FORMAT = RUN_FORMAT
VERSION = 2


REPLACED = "replaced"
"""The status of a run whose place another was to take when that was stopped."""
_PLOTS = ("curve.png", "confusion.png")


class SavePace:
    """When to save next: at least a second after the last time, and ten times as long as it took.

    Steps done again after a kill give the same numbers and cost nothing on a local model, while
    flushing every one of them to the disk costs more than a small model does. A server bills them:
    there every step is saved.
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
    """What the state file says besides its arrays."""

    optimizer: Mapping[str, Json]
    sampler: Mapping[str, Json]
    step: Count
    seconds: float
    queries: Count
    text_forwards: Count
    image_forwards: Count
    history_bytes: Count


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

    def require_free(self, *, overwrite: bool = False) -> None:
        """See that a run can begin here: there is none, or one that may be replaced.

        Raises: ConfigError saying what is there and what to do; FormatError for a run.json that
            ztune did not write.
        """
        if not self.run.exists():
            if overwrite and self.path.exists() and not _is_empty(self.path):
                raise ConfigError(
                    f'output "{self.path}" is no run, and `overwrite` replaces runs alone (name '
                    "another `out`)"
                )
            return
        status = self.read().get("status")
        if overwrite or status in ("refused", REPLACED):
            return
        if status == "finished":
            raise ConfigError(
                f'output "{self.path}" is a run that is finished (name another `out`, or replace '
                "it with `overwrite`)"
            )
        with self.locked():  # else another process is at work on it
            raise ConfigError(
                f'output "{self.path}" is a run that is not finished (go on with: ztune tune '
                f"--resume {quoted(self.path)}; or name another `out`, or replace it with "
                "`overwrite`)"
            )

    @contextlib.contextmanager
    def started(
        self, document: Mapping[str, Json], split: Mapping[str, Json], *, overwrite: bool = False
    ) -> Iterator[None]:
        """Create a run as `create` does, and keep other processes from it meanwhile.

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
        """Make the folder with run.json and split.json in it, all or nothing.

        A run that was refused before its first step is replaced; its cache is kept.

        Raises: ConfigError when it exists with something else in it, or cannot be made.
        """
        if self.run.exists():
            self.require_free()
            self._replace(document, split)
            return
        with new_folder(self.path) as work:
            RunFolder(work).write(document)
            write_json(work / self.split.name, dict(split))

    def _replace(self, document: Mapping[str, Json], split: Mapping[str, Json]) -> None:
        """Put a new run in the place of one; its cache stays, and so does what no run writes.

        Whenever it is stopped, what is left is the former run, the new one, or neither: a run that
        says that it was being replaced.
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
        """Keep other processes from working on the same run.

        Raises: ConfigError when one does; ZtuneError where the file system knows no locks;
            FormatError where the lock is not a file.
        """
        _require_regular(self.lock, f'run "{self.path}"')
        try:
            opened = self.lock.open("a")
        except OSError as error:
            raise ZtuneError(
                f'run "{self.path}" cannot be written: {error.strerror} (change its permissions, '
                "or copy it to a folder that may be written)"
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
                    f'run "{self.path}" is being worked on by another process (wait for it, or '
                    "stop it)"
                ) from None
            yield

    def write(self, document: Mapping[str, Json]) -> None:
        write_json(self.run, {"format": FORMAT, "version": VERSION, **document})

    def read(self) -> dict[str, Json]:
        """Return run.json's content, without format and version.

        Raises: FormatError when this is no run, one of a newer format, or one that has something
            else than a file under the name of one, or a link where a run writes: it may come from
            somebody else, and would lead to other files.
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
                    f'{where}: "{path.name}" is a link, and a run writes into its own folder (put '
                    "what it leads to in its place)"
                )
        return document

    @property
    def is_begun(self) -> bool:
        return self.run.exists()

    @property
    def has_state(self) -> bool:
        return self.state.exists()

    @property
    def where_saved(self) -> str:
        return f"the state before it is saved in {self.state}"

    def cache(self, named: str | None) -> FeatureStore:
        """Return where features are kept: the folder that was named, else the run's own."""
        return FeatureCache(Path(named) if named else self.path / "cache")

    def pixels(self, shape: tuple[int, ...]) -> U8:
        """Return u8 of that shape in a file that goes when the process does.

        Raises: ConfigError where the disk has no room for it.
        """
        with tempfile.TemporaryFile(dir=self.path) as file:  # the mapping lives on
            _reserve(file.fileno(), shape, self.path)
            return np.memmap(cast("Any", file), dtype=np.uint8, mode="w+", shape=shape)

    def sending(self, budget: Budget) -> Journal:
        """Return what notes each request with queries before it goes to a server."""
        return Journal(self.journal, budget)

    def keep(self, artifact: Artifact) -> int:
        """Write the run's result and return its size in bytes."""
        write_artifact(self.prompt, artifact)
        return self.prompt.stat().st_size

    def keep_snapshot(self, artifact: Artifact, queries: int) -> None:
        """Write what the run would result in after so many queries."""
        self.snapshots.mkdir(exist_ok=True)
        write_artifact(self.snapshots / f"{queries:09d}.safetensors", artifact)

    def draw_curve(self, levels: Mapping[str, float], title: str) -> None:
        draw_curve(self.read_history(), levels, title, self.path / "curve.png")

    def is_finished(self) -> bool:
        """Return whether there is a run that was finished."""
        try:
            return self.read().get("status") == "finished"
        except FormatError:  # not there, or damaged
            return False

    def save(self, tuning: Tuning) -> None:
        """Save the state after a step, whole or not at all, the history before it."""
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
        )
        write_tensors(self.state, arrays, plain(saved))

    def restore(self, tuning: Tuning) -> None:
        """Take up the saved state, if there is one, and cut the history back to it.

        Raises: FormatError when the state is damaged.
        """
        if not self.state.exists():
            self.history.unlink(missing_ok=True)
            return
        where = f'run "{self.path}": state'
        arrays, document = read_tensors(self.state, where)
        arrays = renamed_arrays(arrays)
        saved = convert(document, _SavedState, where)

        def arrays_of(name: str) -> Mapping[str, NDArray[Any]]:
            return {k.partition(".")[2]: v for k, v in arrays.items() if k.startswith(f"{name}.")}

        try:
            tuning.optimizer.restore((arrays_of("optimizer"), saved.optimizer))
            tuning.sampler.restore((arrays_of("sampler"), saved.sampler))
        except KeyError as missing:
            raise FormatError(f"{where} lacks {missing} (file of another version)") from None
        tuning.step, tuning.earlier = saved.step, saved.seconds
        for name in ("queries", "text_forwards", "image_forwards"):
            setattr(tuning.budget, name, getattr(saved, name))
        if self.history.exists() and self.history.stat().st_size > saved.history_bytes:
            os.truncate(self.history, saved.history_bytes)

    def log(self, tuning: Tuning, evaluation: Evaluation) -> None:
        """Append one line to the history."""
        with naming(self.history), self.history.open("a") as file:
            file.write(json.dumps(history_line(tuning, evaluation)) + "\n")

    def lacks_snapshot(self, marks: Sequence[int], queries: int) -> bool:
        """Return whether a mark that `queries` have reached has no snapshot at or behind it."""
        reached = [mark for mark in marks if mark <= queries]
        stems = [file.stem for file in self.snapshots.glob("*.safetensors")]
        written = [int(stem) for stem in stems if stem.isdecimal()]
        return bool(reached) and not any(n >= max(reached) for n in written)

    def read_history(self) -> list[dict[str, float]]:
        """Return the history's lines; an unfinished last one is left out."""
        if not self.history.exists():
            return []
        lines = self.history.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]


def history_line(tuning: Tuning, evaluation: Evaluation) -> dict[str, Any]:
    """Return what the history keeps of a round."""
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
    """A run that leaves nothing on the disk, and that cannot be resumed."""

    where_saved = "nothing of it is saved"

    def __init__(self) -> None:
        self.document: dict[str, Json] = {}
        self.artifact: Artifact | None = None
        self._features, self._history = MemoryCache(), list[dict[str, Any]]()
        self._snapshots: list[int] = []

    @property
    def is_begun(self) -> bool:
        return bool(self.document)

    @property
    def has_state(self) -> bool:
        return False

    def read(self) -> dict[str, Json]:
        return self.document

    def write(self, document: Mapping[str, Json]) -> None:
        self.document = dict(document)

    def cache(self, named: str | None) -> FeatureStore:
        return FeatureCache(Path(named)) if named else self._features

    def pixels(self, shape: tuple[int, ...]) -> U8:
        return np.empty(shape, dtype=np.uint8)

    def sending(self, budget: Budget) -> Counted:
        return Counted(budget)

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
    """Take the room of u8 `shape` on the disk: one that is full later ends a process wordlessly.

    Raises: ConfigError where there is too little.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS, Windows
        return
    n_bytes = math.prod(shape)
    try:
        os.posix_fallocate(file, 0, n_bytes)
    except OSError as error:
        raise ConfigError(
            f"the pixels of {shape[0] * shape[1]} images and views take {n_bytes / 1e9:.1f} GB "
            f'in "{folder}": {error.strerror} (name another `out`, or take fewer `augment` views)'
        ) from None


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _require_regular(file: Path, where: str) -> None:
    """Refuse a pipe or a device under a file's name: to open it could wait for ever."""
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
