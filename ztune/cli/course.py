"""The course of a comparison: what it will take, then cell by cell what is still lacking."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtimes.ort import OrtImageEncoder
from ztune.access import CONTEXTS
from ztune.cli.asked import Asked
from ztune.cli.cells import BusyError, CellError, carry_out
from ztune.cli.output import Output
from ztune.compositions.base import TunedConfig
from ztune.data.cache import FeatureCache
from ztune.data.features import encode_pictures
from ztune.data.split import Split
from ztune.errors import ZtuneError
from ztune.experiments.comparing import Folder
from ztune.experiments.comparison import Cell, Job, Rates, duration, estimated_seconds
from ztune.io.config import as_json
from ztune.methods import find_method, method_config, tuned_config
from ztune.model import Model
from ztune.run import RunFolder
from ztune.run_config import RunConfig
from ztune.training import TrainingRun


@dataclass(frozen=True)
class Course:
    """Carries out what a comparison still lacks, cell by cell."""

    asked: Asked
    model: Model
    split: Split
    folder: Folder
    output: Output

    def run(self) -> None:
        asked = self.asked
        able = [method for method in asked.methods if self._is_able(method)]
        # Seed by seed, so that an interrupted comparison has something of every method.
        todo = [
            (method, seed)
            for seed in asked.seeds
            for method in able
            if not self.folder.has(method, seed)
        ]
        if not todo:
            return
        rates = self.folder.rates or measured_rates(self.model, self.split, asked.base)
        self.folder.note_rates(rates)
        times = {method: self._seconds(method, rates) for method in able}
        self._announce(todo, times, rates)
        for seed in dict.fromkeys(seed for _, seed in todo):
            self._encode(seed)
        total, expected, took = len(todo), 0.0, 0.0
        for number, (method, seed) in enumerate(todo, 1):
            head = f"[{number}/{total}] {method}, seed {seed}"
            self.output.remark(f"{head}: about {duration(times[method])}")
            try:
                cell, seconds = self._cell(method, seed)
            except BusyError as error:
                self.output.remark(f"{head}: left alone, {error}")
                continue
            expected, took = expected + times[method], took + seconds
            left = sum(times[m] for m, _ in todo[number:]) * took / expected
            result = f"failed: {cell.reason}"
            if cell.figures is not None:
                result = f"{cell.figures.accuracy:.1%} on the test pictures"
            rest = f"; about {duration(left)} left" if left else ""
            self.output.remark(f"{head}: {result}, {duration(seconds)}{rest}")

    def _is_able(self, method: str) -> bool:
        """Say whether a method can run at all; where not, its cells have failed."""
        asked, seed = self.asked, self.asked.seeds[0]
        place = RunFolder(self.folder.run_of(method, seed))
        try:
            TrainingRun(asked.run_config(method, seed), self.split, place, self.model).check()
        except ZtuneError as error:
            for each in asked.seeds:
                if not self.folder.has(method, each):
                    self.folder.add(Cell(method, each, reason=str(error)))
            return False
        return True

    def _seconds(self, method: str, rates: Rates) -> float:
        """Return about how long a cell takes, its score on the test pictures included."""
        run_config = self.asked.run_config(method, self.asked.seeds[0])
        found = find_method(method)
        config = tuned_config(found, method_config(found, run_config.settings, run_config.preset))
        n_train, n_test = len(self.split.entries_of("train")), len(self.split.entries_of("test"))
        job = Job() if config is None else job_of(config, run_config, n_train, n_test)
        return estimated_seconds(job, rates)

    def _announce(
        self, todo: Sequence[tuple[str, int]], times: Mapping[str, float], rates: Rates
    ) -> None:
        """Say how long it will take before it starts."""
        say, n_classes = self.output.remark, len(self.split.classes)
        encoded = len({seed for _, seed in todo}) * len(self.split.entries) * rates.picture
        total = encoded + sum(times[method] for method, _ in todo)
        say(
            f"about {duration(total)} for {len(todo)} cell(s), after "
            f"{1000 * rates.text_query:.2g} ms a text query of {n_classes} classes and "
            f"{1000 * rates.picture:.2g} ms a picture on this machine"
        )
        for method in dict.fromkeys(method for method, _ in todo):
            n_cells = sum(m == method for m, _ in todo)
            say(f"  {method:<14}{n_cells} × {duration(times[method])}")

    def _encode(self, seed: int) -> None:
        """Encode one seed's pictures for all cells, in a process of its own.

        Raises: ZtuneError.
        """
        if self.folder.has_images(seed):
            return
        self.output.remark(f"encoding the pictures of seed {seed}")
        run = self.folder.images_of(seed)
        run_config = self.asked.run_config("zero-shot", seed)
        log = self.folder.log("images", seed)
        try:
            carry_out(run, self._tune_words(run_config), self._eval_words(), log)
        except CellError as error:
            raise ZtuneError(f"the pictures cannot be encoded: {error}") from None
        self.folder.note_images(seed, RunFolder(run).read())

    def _cell(self, method: str, seed: int) -> tuple[Cell, float]:
        """Carry a cell out; return it with the seconds that it took, its scoring included.

        Raises: BusyError, and takes no note of the cell.
        """
        started = time.monotonic()
        run, run_config = self.folder.run_of(method, seed), self.asked.run_config(method, seed)
        words = self._eval_words() + ["--snapshots"] * bool(run_config.snapshots)
        log = self.folder.log(method, seed)
        try:
            figures = carry_out(run, self._tune_words(run_config), words, log)
            cell = Cell(method, seed, figures)
        except CellError as error:
            cell = Cell(method, seed, reason=self.output.in_options(str(error)))
        self.folder.add(cell)
        return cell, time.monotonic() - started

    def _tune_words(self, run_config: RunConfig) -> list[str]:
        words = ["tune", run_config.bundle]
        values = {k: v for k, v in as_json(run_config).items() if k in _WORDS and v is not None}
        words += [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
        words += [f"--template={template}" for template in run_config.templates]
        words += [f"--set={key}={value}" for key, value in run_config.settings.items()]
        words += ["--skip-broken"] * run_config.skip_broken + ["--force"] * run_config.force
        return [*words, f"--cache={self.folder.cache}"]

    def _eval_words(self) -> list[str]:
        base = self.asked.base
        words = [f"--provider={base.provider}"]
        words += [f"--threads={base.threads}"] * (base.threads is not None)
        return words + ["--skip-broken"] * base.skip_broken


# Options of a run that are given as --name=value.
_WORDS = (
    "data", "method", "shots", "queries", "seed", "preset", "snapshots", "val", "test_fraction",
    "split_seed", "test_data", "names", "provider", "threads", "memory_limit", "root",
)  # fmt: skip


def job_of(config: TunedConfig, run_config: RunConfig, n_train: int, n_test: int) -> Job:
    """Return what a tuned method will send."""
    anew = config.program is not None
    spent = config.spends(run_config.queries)
    n_snapshots = min(len(run_config.snapshot_marks(spent)), spent // config.round_size)
    return Job(
        spent,
        changes_texts=CONTEXTS in config.needs,
        pictures_per_query=min(config.batch_size or n_train, n_train) if anew else 0,
        n_scored=n_test * (1 + n_snapshots) if anew else 0,
        own_seconds=config.own_seconds(run_config.queries),
    )


# What is timed: pictures of one batch at most, and rounds of so many candidates and tokens until
# their seconds suffice.
_PICTURES, _CANDIDATES, _CONTEXT, _TEXT_SECONDS = 8, 10, 4, 0.5


def measured_rates(model: Model, split: Split, run_config: RunConfig) -> Rates:
    """Time a few calls of both towers on this data; what a first call takes longer is opening.

    Raises: ZtuneError when a picture cannot be read, or a class name does not fit.
    """
    items = split.items("train")[:_PICTURES]
    first_pictures, pictures, encoding = _picture_times(model, items, run_config.skip_broken)
    first_texts, texts = _text_times(model, split.classes)
    opening = max(0.0, first_pictures - pictures) + max(0.0, first_texts - texts)
    return Rates(texts / _CANDIDATES, pictures / len(items), encoding / len(items), opening)


def _picture_times(
    model: Model, items: Sequence[tuple[Path, str]], skip_broken: bool
) -> tuple[float, float, float]:
    """Return what reading and encoding pictures takes first, then again, and encoding alone."""
    encoder = OrtImageEncoder(model.bundle, model.execution)

    def encode() -> None:
        with tempfile.TemporaryDirectory() as cache:
            encode_pictures(encoder, items, FeatureCache(Path(cache)), skip_broken=skip_broken)

    side = model.bundle.image.size
    blank = np.zeros((len(items), side, side, 3), dtype=np.uint8)
    return _timed(encode), _timed(encode), _timed(lambda: encoder.encode(blank))


def _text_times(model: Model, classes: tuple[str, ...]) -> tuple[float, float]:
    """Return what a round of candidates takes first, and the median of some later ones."""
    own = Model(model.bundle, model.execution)  # its graph goes when it does
    contexts = np.zeros((_CANDIDATES, _CONTEXT, model.bundle.text.width), dtype=np.float32)
    started = time.monotonic()
    encoder = own.prompt_graph.encoder(classes, _CONTEXT, _CANDIDATES)
    encoder.encode(contexts)
    first, later = time.monotonic() - started, [_timed(lambda: encoder.encode(contexts))]
    while sum(later) < _TEXT_SECONDS:
        later.append(_timed(lambda: encoder.encode(contexts)))
    return first, float(np.median(later))


def _timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started
