"""A worker of a bench: encode images, run jobs, score their results.

    OUT/runs/KEY/run/         the run of `ztune tune`, resumed after a kill
    OUT/runs/KEY/CELL.json    the outcome of a cell, also after the driver has recorded it
    OUT/runs/KEY/attempts     a line per killed attempt in a row without progress

Models stay open from cell to cell, as do the encoded images and prompts of the last few parts.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from runtimes.bundle import load_bundle
from runtimes.providers import Execution, check_precision
from ztune.artifact import (
    Artifact,
    HeadArtifact,
    VisualArtifact,
    read_artifact,
)
from ztune.capabilities import describe
from ztune.data.cache import FeatureCache
from ztune.data.features import encode_files
from ztune.data.split import Split
from ztune.errors import ConfigError, FormatError, ZtuneError
from ztune.evaluate import encode_test, find_extractor
from ztune.experiments.cells import Outcome, PartScore, Point
from ztune.experiments.jobs import (
    CellJob,
    Encoded,
    Encoding,
    Job,
    JobResult,
    ScoredPart,
    Task,
)
from ztune.io.files import read_json, sha256, write_json
from ztune.io.schema import convert, plain
from ztune.methods.plugins import package_of
from ztune.methods.registry import find_method, needs_of
from ztune.model import Model
from ztune.printing import printable_lines, reason_of, without_marks
from ztune.progress import forward_warnings
from ztune.run import RunFolder
from ztune.run_document import RunReport, run_start
from ztune.statistics import Score, score
from ztune.system import one_blas_thread, peak_memory_mb
from ztune.training import TrainingRun
from ztune.types import F32, I64, ImageEncoder

Training = TrainingRun[RunFolder]
MAX_ATTEMPTS = 3
"""Killed attempts without progress after which a run fails."""
ATTEMPTS = "attempts"
_PARTS_BYTES = 512 << 20
"""Limit of the encoded parts that are kept; the last is always kept."""


@dataclass(frozen=True)
class Settings:
    """Settings of all workers."""

    out: Path
    provider: str
    threads: int | None
    memory_limit: int | None
    isolated: bool = False
    """Whether every task has its own process, so its peak memory is known."""

    def peak_memory_mb(self) -> float | None:
        """Return the peak memory of the task in progress; None if it is not known."""
        return round(peak_memory_mb(), 1) if self.isolated else None


@dataclass(frozen=True)
class EncodedPart:
    """A part's test images and hand-written prompts, encoded."""

    split: Split
    features: F32
    """f32[n, e]"""
    labels: I64
    zero_shot: Score
    broken: tuple[str, ...]
    """Paths of the unreadable images."""
    conversions: Mapping[str, int]
    """How many of the others each rule changed."""


@dataclass(frozen=True)
class Tuned:
    """A finished run."""

    training: Training
    report: RunReport
    peak_memory_mb: float | None
    """None if it is not known, or the run was finished by an earlier process."""


@dataclass
class Worker:
    """One process's models and encoded parts."""

    settings: Settings
    _models: dict[Path, Model] = field(default_factory=dict)
    _encoders: dict[Path, ImageEncoder] = field(default_factory=dict)
    _parts: dict[tuple[Path, ScoredPart], EncodedPart] = field(default_factory=dict)

    def perform(self, task: Task) -> Encoded | JobResult:
        """Run a task; a job's errors are part of its result."""
        if isinstance(task, Encoding):
            return self._encode(task)
        self._encoders.clear()  # frees memory for the runs
        started = time.monotonic()
        warnings: list[str] = []
        with forward_warnings(warnings.append):
            answer = self._run_job(task)
        seconds = time.monotonic() - started
        return replace(answer, seconds=seconds, warnings=tuple(warnings))

    def _model(self, bundle: Path) -> Model:
        if bundle not in self._models:
            settings = self.settings
            execution = Execution(settings.provider, settings.threads, settings.memory_limit)
            loaded = load_bundle(bundle)
            check_precision(loaded.precision, execution.provider)
            self._models[bundle] = Model(loaded, execution)
        return self._models[bundle]

    def _encode(self, task: Encoding) -> Encoded:
        try:
            if task.bundle not in self._encoders:
                self._encoders[task.bundle] = self._model(task.bundle).runtime.images()
            started = time.monotonic()  # opening the model is part of a run's own seconds
            found = encode_files(
                self._encoders[task.bundle], task.items, FeatureCache(task.cache), skip_broken=True
            )
        except ZtuneError:  # every cell that needs these images will fail and report it
            return Encoded(task.bundle_digest, 0, 0.0)
        seconds, peak = time.monotonic() - started, self.settings.peak_memory_mb()
        return Encoded(task.bundle_digest, found.n_encoded, seconds, peak)

    def _run_job(self, job: Job) -> JobResult:
        place = self.settings.out / "runs" / job.run
        place.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(RunFolder(place).locked())
            except ConfigError:
                return JobResult(busy=True)
            except ZtuneError as error:
                return JobResult(reasons={one.key: str(error) for one in job.cells})
            return self._answer(job, place)

    def _answer(self, job: Job, place: Path) -> JobResult:
        """Tune and score; a cell's failure does not affect the others."""
        outcomes: dict[str, Outcome] = {}
        reasons: dict[str, str] = {}
        try:
            outcomes |= {one.key: kept for one in job.cells if (kept := _kept(place, one.key))}
            missing = [one for one in job.cells if one.key not in outcomes]
            if not missing:
                return JobResult(outcomes)
            attempts = _earlier_attempts(place)
            if len(attempts) == MAX_ATTEMPTS - 1 and not job.alone:
                return JobResult(alone=True)
            with _recorded_attempt(place, attempts), one_blas_thread():
                tuned = self._tuned(job, place)
                for one in missing:
                    found = self._scored_or_not(tuned, one, place)
                    if isinstance(found, str):
                        reasons[one.key] = found
                    else:
                        outcomes[one.key] = found
        except Exception as error:
            reason = _reason(error, place)
            reasons = {one.key: reason for one in job.cells if one.key not in outcomes}
        return JobResult(outcomes, reasons)

    def _tuned(self, job: Job, place: Path) -> Tuned:
        """Start or resume a run if it is not finished, and return it."""
        model = self._model(Path(job.run_config.bundle))
        if model.bundle.digest != job.bundle_digest:
            raise FormatError(
                f'bundle "{model.bundle.path}" has changed since the bench was started'
            )
        method = job.run_config.method
        if (package := package_of(method)) != job.package:
            raise ConfigError(
                f"{method} is of {package or 'ztune'} here, expected {job.package or 'ztune'} as "
                "at the start of the bench (install the same version)"
            )
        folder = RunFolder(place / "run")
        training = TrainingRun(job.run_config, job.split, folder, model, stores_texts=False)
        was_finished = training.folder.is_finished()
        report = _finished(training, job)
        training.folder.state.unlink(missing_ok=True)  # no longer needed
        return Tuned(training, report, None if was_finished else self.settings.peak_memory_mb())

    def _scored_or_not(self, tuned: Tuned, cell: CellJob, place: Path) -> Outcome | str:
        """Score a cell and save its outcome; return it, or the reason of a failure."""
        try:
            outcome = self._scored(tuned, cell, place.name)
            write_json(place / f"{cell.key}.json", plain(outcome))
        except Exception as error:
            return _reason(error, place)
        return outcome

    def _scored(self, tuned: Tuned, cell: CellJob, key: str) -> Outcome:
        """Score a finished run's result on the parts of a cell."""
        training, run = tuned.training, tuned.report
        result = read_artifact(training.folder.prompt)
        parts = [self._part(training.model, part) for part in cell.parts]
        scores = [
            self._part_score(training, result, part, encoded)
            for part, encoded in zip(cell.parts, parts, strict=True)
        ]
        seconds, queries = run.own_seconds, run.queries
        curve: list[Point] = []
        if cell.curve and queries and scores[0].accuracy is not None:
            curve = list(self._snapshots(training, cell.parts[0], parts[0], queries))
            curve.append(Point(queries, seconds, scores[0].accuracy))
        tuned_on = {entry.sha256 for entry in training.split.entries}
        n_cached = run.image_forwards_cached
        return Outcome(
            uses=training.run_config.method,
            config=run.config,
            run=key,
            artifact=sha256(training.folder.prompt),
            result_bytes=run.result_bytes,
            n_train=len(training.split.entries_of("train")),
            n_val=len(training.split.entries_of("val")),
            copies=sum(
                digest in tuned_on for part in parts for _, digest in part.split.items("test")
            ),
            queries=queries,
            probe_queries=run.probe_queries,
            text_forwards=run.text_forwards,
            image_forwards=run.image_forwards + n_cached,
            image_forwards_cached=n_cached,
            seconds=seconds,
            stop_reason=run.stop_reason,
            train_loss=run.train_loss,
            scores=tuple(scores),
            curve=tuple(curve),
            peak_memory_mb=tuned.peak_memory_mb,
            needs=describe(needs_of(find_method(run.method), training.run_config.method_config)),
            broken=() if run.left_out is None else run.left_out.broken,
            conversions=run.conversions or {},
        )

    def _snapshots(
        self, training: Training, part: ScoredPart, encoded: EncodedPart, queries: int
    ) -> Iterator[Point]:
        seconds = {int(line["queries"]): line["seconds"] for line in training.folder.read_history()}
        for file in sorted(training.folder.snapshots.glob("*.safetensors")):
            snapshot = read_artifact(file)
            spent = snapshot.provenance.queries
            found = self._score(training, snapshot, part, encoded)
            if found is not None and spent < queries:
                yield Point(spent, seconds.get(spent), found.accuracy)

    def _part(self, model: Model, part: ScoredPart) -> EncodedPart:
        """Return an encoded part; the last few are kept."""
        place = model.bundle.path, part
        if place not in self._parts:
            where = f'split "{part.split_file}"'
            split = Split.from_json(read_json(part.split_file, where), where)
            items = split.items("test")
            found = model.features(items, part.cache, what=part.name, skip_broken=part.skip_broken)
            labels = split.labels("test")[found.kept]
            zero_shot = model.zero_shot(part.templates, split.classes)
            before = score(zero_shot.logits(found.values[0]), labels, split.classes)
            self._make_room(found.values.nbytes)
            entries = zip(split.entries_of("test"), found.kept, strict=True)
            broken = tuple(entry.path for entry, keep in entries if not keep)
            self._parts[place] = EncodedPart(
                split, found.values[0], labels, before, broken, found.conversions
            )
        return self._parts[place]

    def _make_room(self, n_bytes: int) -> None:
        """Drop the oldest parts until `n_bytes` fit."""
        while self._parts and n_bytes + self._bytes_kept() > _PARTS_BYTES:
            del self._parts[next(iter(self._parts))]

    def _bytes_kept(self) -> int:
        return sum(part.features.nbytes for part in self._parts.values())

    def _part_score(
        self, training: Training, result: Artifact, part: ScoredPart, encoded: EncodedPart
    ) -> PartScore:
        found, before = self._score(training, result, part, encoded), encoded.zero_shot
        return PartScore(
            part=part.name,
            n=before.n,
            classes=len(before.classes),
            zero_shot=before.accuracy,
            zero_shot_class_accuracy=before.class_accuracy,
            accuracy=None if found is None else found.accuracy,
            class_accuracy=None if found is None else found.class_accuracy,
            broken=encoded.broken,
            conversions=encoded.conversions,
            nll=None if found is None else found.nll,
            brier=None if found is None else found.brier,
            reliability=() if found is None else found.reliability,
        )

    def _score(
        self, training: Training, result: Artifact, part: ScoredPart, encoded: EncodedPart
    ) -> Score | None:
        """Score a result among a part's classes; None for a head without all of them."""
        model, classes = training.model, encoded.split.classes
        if isinstance(result, HeadArtifact):
            if not set(classes) <= set(result.classes):
                return None
            result = result.restricted(classes)
        elif isinstance(result, VisualArtifact) and result.context is None:
            # It uses templates: those of the part's data set.
            result = model.refresh(replace(result, templates=part.templates), classes)
        elif result.classes != classes:
            result = model.refresh(result, classes)
        if not isinstance(result, VisualArtifact):
            logits = result.classifier().logits(encoded.features)
            return score(logits, encoded.labels, classes, result.temperature)
        test_features = encode_test(
            model,
            encoded.split.items("test"),
            part.cache,
            what=part.name,
            skip_broken=part.skip_broken,
            extractor=find_extractor(result, training.folder.path, training.run_config.extractor),
        )
        logits = test_features.logits(result)
        return score(logits, encoded.labels, classes, result.temperature)


def _finished(training: Training, job: Job) -> RunReport:
    """Start or resume a job's run if it is not finished; return its report."""
    folder, found = training.folder, None
    folder.remove_leftovers()
    if folder.run.is_file():
        found = run_start(folder.read(), f'run "{folder.path}"')
        if isinstance(found, RunReport):
            return found
    training.check()
    if found is not None and found.status == "running":
        return training.finish(found, curve=False)
    head = training.head()
    folder.create(plain(head), _with_tests(job).to_json())
    return training.finish(head, curve=False)


def _with_tests(job: Job) -> Split:
    """Return a job's split with the test images of its classes, for `ztune eval RUN`."""
    parts = [part for cell in job.cells for part in cell.parts if part.name in ("test", "base")]
    for file in dict.fromkeys(part.split_file for part in parts):
        tested = Split.from_json(read_json(file, "split"), f'split "{file}"')
        if tested.classes == job.split.classes:
            roots = {**job.split.roots, "test": tested.roots["data"]}
            entries = [replace(entry, root="test") for entry in tested.entries]
            return replace(job.split, roots=roots, entries=(*job.split.entries, *entries))
    return job.split


def _kept(place: Path, key: str) -> Outcome | None:
    """Return the outcome saved by an earlier process; None if missing or damaged."""
    path = place / f"{key}.json"
    if not path.is_file():
        return None
    where = f'outcome "{path}"'
    try:
        return convert(read_json(path, where), Outcome, where)
    except FormatError:
        return None


def _reason(error: Exception, place: Path) -> str:
    """Return an error in one line; save the traceback of an unexpected one."""
    if isinstance(error, ZtuneError):
        hint = f" (remove {place} to restart the run)" if str(place) in str(error) else ""
        return without_marks(f"{error}{hint}")
    (place / "traceback.txt").write_text(
        printable_lines("".join(traceback.format_exception(error)))
    )
    return f"{type(error).__name__}: {reason_of(error)}"


def _earlier_attempts(place: Path) -> list[str]:
    """Return the records of killed attempts since the last progress.

    Raises: ZtuneError for too many, and resets them, so that a resumed bench retries.
    """
    path = place / ATTEMPTS
    notes = path.read_text().splitlines() if path.exists() else []
    notes = [note for note in notes if note.split()[:1] == [_reached(place)]]
    if len(notes) >= MAX_ATTEMPTS:
        path.unlink()
        raise ZtuneError(
            f"the worker process died {len(notes)} times without an error message (killed, or out "
            "of memory?)"
        )
    return notes


def clear_attempts(out: Path) -> None:
    """Remove the records of attempts that stopping the bench ended, except of locked runs."""
    for note in (out / "runs").glob(f"*/{ATTEMPTS}"):
        with contextlib.suppress(ZtuneError), RunFolder(note.parent).locked():
            note.unlink(missing_ok=True)


def _reached(place: Path) -> str:
    """Return a mark that changes when a run saves its state."""
    state = RunFolder(place / "run").state
    return str(state.stat().st_mtime_ns if state.exists() else 0)


@contextlib.contextmanager
def _recorded_attempt(place: Path, earlier: Sequence[str]) -> Iterator[None]:
    """Record an attempt, and remove all records unless it is killed."""
    path = place / ATTEMPTS
    note = f"{_reached(place)} {time.strftime('%Y-%m-%dT%H:%M:%S')} process {os.getpid()}"
    path.write_text("\n".join([*earlier, note]) + "\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # a stopped driver calls clear_attempts
