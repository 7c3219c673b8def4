"""What one process of a bench does: encode pictures, carry out runs, score their results.

    OUT/runs/KEY/run/         the run of `ztune tune`, gone on with where a kill left it
    OUT/runs/KEY/CELL.json    the outcome of a cell, until and after the driver has recorded it
    OUT/runs/KEY/deaths       a line per attempt that did not come to an end of its own

Models stay open from cell to cell; so do the encoded pictures and prompts of the last few parts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import traceback
from collections.abc import Iterator
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
from ztune.bench.cells import Outcome, PartScore, Point
from ztune.cli.bench_jobs import (
    Answer,
    CellJob,
    Encoded,
    Encoding,
    Job,
    PictureList,
    ScoredPart,
    Task,
)
from ztune.cli.output import Output
from ztune.cli.scoring import open_gallery
from ztune.cli.tuning import Work, opening
from ztune.cli.workbench import Workbench
from ztune.data.cache import FeatureCache
from ztune.data.features import encode_pictures
from ztune.errors import ConfigError, FormatError, ZtuneError
from ztune.fields import Fields
from ztune.files import read_json, sha256, write_json
from ztune.run import RunFolder
from ztune.statistics import Score, score
from ztune.system import one_blas_thread
from ztune.types import F32, I64, ImageEncoder, Json

MOST_DEATHS = 3
"""Attempts at a run that end a process before the run is given up."""
_PARTS_KEPT = 4


@dataclass(frozen=True)
class Settings:
    """What all workers have alike."""

    out: Path
    provider: str
    threads: int
    memory_limit: int | None


@dataclass(frozen=True)
class EncodedPart:
    """A part's pictures and hand-written prompts, encoded."""

    pictures: PictureList
    features: F32
    """f32[n, e]"""
    labels: I64
    zero_shot: Score


@dataclass
class Worker:
    """One process's models and encoded parts."""

    settings: Settings
    _warnings: list[str] = field(default_factory=list)
    _benches: dict[Path, Workbench] = field(default_factory=dict)
    _encoders: dict[Path, ImageEncoder] = field(default_factory=dict)
    _parts: dict[tuple[Path, ScoredPart], EncodedPart] = field(default_factory=dict)

    def perform(self, task: Task) -> Encoded | Answer:
        """Do what is asked; what goes wrong with a job is part of the answer."""
        if isinstance(task, Encoding):
            return self._encode(task)
        self._encoders.clear()  # their memory is the runs' from here on
        started = time.monotonic()
        self._warnings.clear()
        answer = self._carry_out(task)
        seconds = time.monotonic() - started
        return replace(answer, seconds=seconds, warnings=tuple(self._warnings))

    def _bench(self, bundle: Path) -> Workbench:
        if bundle not in self._benches:
            settings = self.settings
            execution = Execution(settings.provider, settings.threads, settings.memory_limit)
            loaded = load_bundle(bundle)
            check_precision(loaded.precision, execution.provider)
            self._benches[bundle] = Workbench(
                loaded, execution, Output(quiet=True, warnings=self._warnings)
            )
        return self._benches[bundle]

    def _encode(self, task: Encoding) -> Encoded:
        started = time.monotonic()
        try:
            if task.bundle not in self._encoders:
                self._encoders[task.bundle] = self._bench(task.bundle).runtime.images()
            found = encode_pictures(
                self._encoders[task.bundle], task.items, FeatureCache(task.cache), skip_broken=True
            )
        except ZtuneError:  # every cell that needs these pictures fails with the same reason
            return Encoded(task.model, 0, 0.0)
        return Encoded(task.model, found.n_encoded, time.monotonic() - started)

    def _carry_out(self, job: Job) -> Answer:
        place = self.settings.out / "runs" / job.run
        place.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(RunFolder(place).locked())
            except ConfigError:
                return Answer(busy=True)
            try:
                with _counted_deaths(place / "deaths"), one_blas_thread():
                    return self._outcomes(job, place)
            except ZtuneError as error:
                reason = str(error)
            except Exception as error:  # a cell's failure is no failure of the others
                (place / "traceback.txt").write_text(traceback.format_exc())
                said = str(error).strip().splitlines()
                reason = f"{type(error).__name__}: {said[0] if said else 'without a word'}"
            return Answer(reasons={one.key: reason for one in job.cells})

    def _outcomes(self, job: Job, place: Path) -> Answer:
        known = {one.key: outcome for one in job.cells if (outcome := _kept(place, one.key))}
        if len(known) == len(job.cells):
            return Answer(outcomes=known)
        bench = self._bench(Path(job.request.bundle))
        if bench.bundle.digest != job.bundle_digest:
            raise FormatError(
                f'bundle "{bench.bundle.path}" is not the one that the bench began with'
            )
        work = Work(job.request, job.split, RunFolder(place / "run"), bench)
        document = Fields(_finished(work), f'run "{work.folder.path}"')
        outcomes = {}
        for one in job.cells:
            outcome = known.get(one.key) or self._scored(work, document, one, job.run)
            write_json(place / f"{one.key}.json", outcome.to_json())
            outcomes[one.key] = outcome
        # What follows from the result, or is no more use with it.
        shutil.rmtree(work.folder.snapshots, ignore_errors=True)
        work.folder.state.unlink(missing_ok=True)
        return Answer(outcomes=outcomes)

    def _scored(self, work: Work, run: Fields, cell: CellJob, key: str) -> Outcome:
        """Score a finished run's result on the parts of a cell."""
        result = read_artifact(work.folder.prompt)
        parts = [self._part(work.bench, part) for part in cell.parts]
        scores = [
            self._part_score(work.bench, result, part, encoded)
            for part, encoded in zip(cell.parts, parts, strict=True)
        ]
        seconds = round(run.number("seconds") - run.number("report_seconds"), 3)
        queries = run.integer("queries")
        curve: list[Point] = []
        if cell.curve and queries and scores[0].accuracy is not None:
            curve = list(self._snapshots(work, cell.parts[0], parts[0], queries))
            curve.append(Point(queries, seconds, scores[0].accuracy))
        tuned_on = {entry.sha256 for entry in work.split.entries}
        n_cached = run.integer("image_forwards_cached")
        return Outcome(
            uses=work.request.method,
            config=run.object("config").values,
            run=key,
            artifact=sha256(work.folder.prompt),
            result_bytes=run.integer("result_bytes"),
            n_train=len(work.split.entries_of("train")),
            n_val=len(work.split.entries_of("val")),
            copies=sum(digest in tuned_on for part in parts for digest in part.pictures.digests),
            queries=queries,
            probe_queries=run.integer("probe_queries"),
            text_forwards=run.integer("text_forwards"),
            image_forwards=run.integer("image_forwards") + n_cached,
            image_forwards_cached=n_cached,
            seconds=seconds,
            stop_reason=run.text("stop_reason"),
            train_loss=run.number("train_loss"),
            scores=tuple(scores),
            curve=tuple(curve),
        )

    def _snapshots(
        self, work: Work, part: ScoredPart, encoded: EncodedPart, queries: int
    ) -> Iterator[Point]:
        seconds = {int(line["queries"]): line["seconds"] for line in work.folder.read_history()}
        for file in sorted(work.folder.snapshots.glob("*.safetensors")):
            snapshot = read_artifact(file)
            spent = snapshot.provenance.queries
            found = self._score(work.bench, snapshot, part, encoded)
            if found is not None and spent < queries:
                yield Point(spent, seconds.get(spent), found.accuracy)

    def _part(self, bench: Workbench, part: ScoredPart) -> EncodedPart:
        """Return a part encoded; the last few are kept."""
        place = bench.bundle.path, part
        if place not in self._parts:
            pictures = PictureList.read(part.list_file)
            found = bench.features(pictures.items, part.cache, what=part.name)
            labels = pictures.label_array
            zero_shot = bench.zero_shot(part.templates, pictures.classes)
            before = score(zero_shot.logits(found.values[0]), labels, pictures.classes)
            while len(self._parts) >= _PARTS_KEPT:
                del self._parts[next(iter(self._parts))]
            self._parts[place] = EncodedPart(pictures, found.values[0], labels, before)
        return self._parts[place]

    def _part_score(
        self, bench: Workbench, result: Artifact, part: ScoredPart, encoded: EncodedPart
    ) -> PartScore:
        found, before = self._score(bench, result, part, encoded), encoded.zero_shot
        return PartScore(
            part=part.name,
            n=before.n,
            classes=len(before.classes),
            zero_shot=before.accuracy,
            zero_shot_class_accuracy=before.class_accuracy,
            accuracy=None if found is None else found.accuracy,
            class_accuracy=None if found is None else found.class_accuracy,
        )

    def _score(
        self, bench: Workbench, result: Artifact, part: ScoredPart, encoded: EncodedPart
    ) -> Score | None:
        """Score a result among a part's classes; None for a head that does not know them all."""
        classes = encoded.pictures.classes
        if isinstance(result, HeadArtifact):
            if not set(classes) <= set(result.classes):
                return None
            columns = [result.classes.index(name) for name in classes]
            logits = result.classifier().logits(encoded.features)[:, columns]
            return score(logits, encoded.labels, classes)
        if isinstance(result, VisualArtifact) and result.context is None:
            # Its texts are hand-written ones: those of the part's own data set.
            result = bench.refreshed(replace(result, templates=part.templates), classes)
        elif result.classes != classes:
            result = bench.refreshed(result, classes)
        if not isinstance(result, VisualArtifact):
            return score(result.classifier().logits(encoded.features), encoded.labels, classes)
        gallery = open_gallery(
            bench, encoded.pictures.items, part.cache, what=part.name, skip_broken=False
        )
        return score(gallery.logits(result), encoded.labels, classes)


def _finished(work: Work) -> dict[str, Json]:
    """Begin a run, go on with it, or find it done; return run.json's content."""
    folder, head = work.folder, opening(work.request, work.bench, work.split)
    status = None
    if folder.run.is_file():
        found = folder.read()
        status = found.get("status")
        if status == "finished":
            return found
        if status == "running":
            head = {k: v for k, v in found.items() if k not in ("format", "version")}
    work.check()
    if status != "running":
        folder.create(head, work.split.to_json())
    return work.carry_out(head)


def _kept(place: Path, key: str) -> Outcome | None:
    """Return the outcome that an earlier process left, whose driver may not have recorded it."""
    path = place / f"{key}.json"
    if not path.is_file():
        return None
    where = f'outcome "{path}"'
    return Outcome.from_json(Fields(read_json(path, where), where))


@contextlib.contextmanager
def _counted_deaths(path: Path) -> Iterator[None]:
    """Note an attempt, and take the note back when it ends in whatever way but a kill.

    Raises: ZtuneError where too many attempts have left their note.
    """
    notes = path.read_text().splitlines() if path.exists() else []
    if len(notes) >= MOST_DEATHS:
        path.unlink()  # asked for again, it is tried again
        raise ZtuneError(
            f"its process ended {len(notes)} times without a word (killed, or out of memory?)"
        )
    with path.open("a") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} process {os.getpid()}\n")
    try:
        yield
    finally:
        path.unlink()
