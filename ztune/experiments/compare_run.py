"""Run a comparison: estimate the time, then run the missing cells."""

from __future__ import annotations

import functools
import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from runtimes.ort import OrtImageEncoder
from runtimes.providers import resolve_execution
from ztune.capabilities import CONTEXTS
from ztune.data.cache import FeatureCache
from ztune.data.features import encode_files
from ztune.data.split import HOW_DRAWN, ROLES, Split
from ztune.data.splitter import digest_file
from ztune.errors import DataError, ZtuneError
from ztune.experiments.cell_process import BusyError, CellError, run_cell
from ztune.experiments.compare_config import CompareConfig
from ztune.experiments.compare_folder import Folder, write_results
from ztune.experiments.comparison import Cell, Rates, Workload, duration, estimated_seconds
from ztune.methods.base import TunedConfig
from ztune.methods.registry import find_method, method_config, tuned_config
from ztune.model import Model, open_model
from ztune.progress import SILENCE, Progress
from ztune.run import RunFolder
from ztune.run_config import RunConfig, remarks_on
from ztune.run_document import run_report
from ztune.timing import time_text_queries
from ztune.training import TrainingRun, read_split


def run_comparison(
    config: CompareConfig, out: Path, command: str, progress: Progress = SILENCE
) -> Folder:
    """Run the missing cells of the comparison in the folder `out`, and return it.

    `command` is recorded in the report.

    Raises: ConfigError if `out` has other contents; DataError without test images; ZtuneError.
    """
    base = config.base
    execution = resolve_execution(base.provider, base.threads, progress, base.memory_limit)
    config = replace(config, base=replace(base, provider=execution.provider))
    model = open_model(Path(base.bundle), execution, progress)
    split, images = _first_split(config)
    for remark in (*remarks_on(base), *split.notes, f"images: {HOW_DRAWN[split.sampler]}"):
        progress.remark(remark)
    counts = {"classes": len(split.classes)}
    counts |= {role: len(split.entries_of(role)) for role in ROLES}
    folder = Folder.open(out, config.to_json(model.bundle.digest, images), counts)
    with folder.locked():
        CellRunner(config, model, split, folder, progress).run()
        write_results(folder, command)
    return folder


def _first_split(config: CompareConfig) -> tuple[Split, str]:
    """Return the first seed's split, and a digest of all seeds' images.

    Raises: DataError without test images.
    """
    digest = functools.cache(digest_file)
    dataset, split = read_split(config.run_config(config.methods[0], config.seeds[0]), digest)
    test = split.entries_of("test")
    if not test:
        raise DataError(
            f'data "{config.base.data}" leaves no test images (add images or use fewer '
            "`shots`, `test_fraction` or `test_data`)"
        )
    if dataset.lists is not None:  # published lists may name a million images
        seen = [f"{role} {item.name} {item.path}" for role, item in dataset.lists]
    else:
        seen = [
            f"{dataset.classes[p.label]} {digest(dataset.root / p.path)}" for p in dataset.images
        ]
    seen += [f"test {split.classes[entry.label]} {entry.sha256}" for entry in test]
    return split, hashlib.sha256("\n".join(seen).encode()).hexdigest()


@dataclass(frozen=True)
class CellRunner:
    """Runs the missing cells of a comparison."""

    config: CompareConfig
    model: Model
    split: Split
    folder: Folder
    progress: Progress

    def run(self) -> None:
        config = self.config
        runnable = [method for method in config.methods if self._can_run(method)]
        # Seed by seed: an interrupted comparison then has results of every method.
        todo = [
            (method, seed)
            for seed in config.seeds
            for method in runnable
            if not self.folder.has(method, seed)
        ]
        if not todo:
            return
        rates = self.folder.head.rates or measured_rates(self.model, self.split, config.base)
        self.folder.save_rates(rates)
        times = {method: self._seconds(method, rates) for method in runnable}
        self._announce(todo, times, rates)
        for seed in dict.fromkeys(seed for _, seed in todo):
            self._encode(seed)
        total, expected, took = len(todo), 0.0, 0.0
        for number, (method, seed) in enumerate(todo, 1):
            head = f"[{number}/{total}] {method}, seed {seed}"
            self.progress.remark(f"{head}: about {duration(times[method])}")
            try:
                cell, seconds = self._cell(method, seed)
            except BusyError as error:
                self.progress.remark(f"{head}: skipped, {error}")
                continue
            expected, took = expected + times[method], took + seconds
            left = sum(times[m] for m, _ in todo[number:]) * took / expected
            result = f"failed: {cell.reason}"
            if cell.figures is not None:
                result = f"{cell.figures.accuracy:.1%} on the test images"
            rest = f"; about {duration(left)} left" if left else ""
            self.progress.remark(f"{head}: {result}, {duration(seconds)}{rest}")

    def _can_run(self, method: str) -> bool:
        """Return whether a method can run; if not, record its cells as failed."""
        seed = self.config.seeds[0]
        place = RunFolder(self.folder.run_of(method, seed))
        try:
            run_config = self.config.run_config(method, seed)
            TrainingRun(run_config, self.split, place, self.model).check()
        except ZtuneError as error:
            for each in self.config.seeds:
                if not self.folder.has(method, each):
                    self.folder.add(Cell(method, each, reason=str(error)))
            return False
        return True

    def _seconds(self, method: str, rates: Rates) -> float:
        """Estimate a cell's seconds, with scoring."""
        run_config = self.config.run_config(method, self.config.seeds[0])
        found = find_method(method)
        config = tuned_config(found, method_config(found, run_config.settings, run_config.preset))
        n_train, n_test = len(self.split.entries_of("train")), len(self.split.entries_of("test"))
        job = Workload() if config is None else workload_of(config, run_config, n_train, n_test)
        return estimated_seconds(job, rates)

    def _announce(
        self, todo: Sequence[tuple[str, int]], times: Mapping[str, float], rates: Rates
    ) -> None:
        """Print the estimated time."""
        say, n_classes = self.progress.remark, len(self.split.classes)
        encoded = len({seed for _, seed in todo}) * len(self.split.entries) * rates.image
        total = encoded + sum(times[method] for method, _ in todo)
        say(
            f"about {duration(total)} for {len(todo)} cell(s), at "
            f"{1000 * rates.text_query:.2g} ms per text query of {n_classes} classes and "
            f"{1000 * rates.image:.2g} ms per image"
        )
        for method in dict.fromkeys(method for method, _ in todo):
            n_cells = sum(m == method for m, _ in todo)
            say(f"  {method:<14}{n_cells} × {duration(times[method])}")

    def _encode(self, seed: int) -> None:
        """Encode one seed's images for all cells, in its own process.

        Raises: ZtuneError.
        """
        if self.folder.has_images(seed):
            return
        self.progress.remark(f"encode the images of seed {seed}")
        run = self.folder.images_of(seed)
        try:
            run_cell(run, self._run_config("zero-shot", seed), self.folder.log("images", seed))
        except CellError as error:
            raise ZtuneError(f"cannot encode the images: {error}") from None
        self.folder.save_image_costs(seed, run_report(RunFolder(run).read(), f'run "{run}"'))

    def _cell(self, method: str, seed: int) -> tuple[Cell, float]:
        """Run a cell; return it with its seconds, scoring included.

        Raises: BusyError, without recording the cell.
        """
        started = time.monotonic()
        run, log = self.folder.run_of(method, seed), self.folder.log(method, seed)
        try:
            cell = Cell(method, seed, run_cell(run, self._run_config(method, seed), log))
        except CellError as error:
            cell = Cell(method, seed, reason=str(error))
        self.folder.add(cell)
        return cell, time.monotonic() - started

    def _run_config(self, method: str, seed: int) -> RunConfig:
        """Return a cell's RunConfig, with the common cache."""
        return replace(self.config.run_config(method, seed), cache=str(self.folder.cache.resolve()))


def workload_of(config: TunedConfig, run_config: RunConfig, n_train: int, n_test: int) -> Workload:
    """Return the workload of a tuned method."""
    encodes = config.program is not None
    spent = config.spends(run_config.queries)
    n_snapshots = min(len(run_config.snapshot_marks(spent)), spent // config.round_size)
    return Workload(
        spent,
        changes_texts=CONTEXTS in config.needs,
        images_per_query=min(config.batch_size or n_train, n_train) if encodes else 0,
        n_scored=n_test * (1 + n_snapshots) if encodes else 0,
        own_seconds=config.own_seconds(run_config.queries),
    )


_IMAGES = 8  # images to time: one batch at most


def measured_rates(model: Model, split: Split, run_config: RunConfig) -> Rates:
    """Time a few calls of both towers; the extra time of a first call counts as opening.

    Raises: ZtuneError for an unreadable image or a class name that is too long.
    """
    items = split.items("train")[:_IMAGES]
    first_images, images, encoding = _image_times(model, items, run_config.skip_broken)
    own = Model(model.bundle, model.execution)  # frees its graph
    texts = time_text_queries(own.prompt_graph, split.classes, model.bundle.text.width)
    opening = max(0.0, first_images - images) + max(0.0, texts.first - texts.later)
    return Rates(texts.per_query, images / len(items), encoding / len(items), opening)


def _image_times(
    model: Model, items: Sequence[tuple[Path, str]], skip_broken: bool
) -> tuple[float, float, float]:
    """Return the seconds to read and encode images, first and again, and to encode only."""
    encoder = OrtImageEncoder(model.bundle, model.execution)

    def encode() -> None:
        with tempfile.TemporaryDirectory() as cache:
            encode_files(encoder, items, FeatureCache(Path(cache)), skip_broken=skip_broken)

    side = model.bundle.image.size
    blank = np.zeros((len(items), side, side, 3), dtype=np.uint8)
    return _timed(encode), _timed(encode), _timed(lambda: encoder.encode(blank))


def _timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started
