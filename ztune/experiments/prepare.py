"""Turn a plan into jobs: read data sets, draw and digest images, compute the cells' keys."""

from __future__ import annotations

import concurrent.futures
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from runtimes.bundle import Bundle, load_bundle
from runtimes.preprocess import perceptual_hash, reason_broken
from runtimes.providers import check_precision
from ztune.data.coop import Item
from ztune.data.folders import Listing
from ztune.data.manifests import SplitName, escape_surrogates
from ztune.data.named import find_spec
from ztune.data.sources import TEMPLATE, read_source
from ztune.data.split import HOW_DRAWN, LeftOut, Split, together
from ztune.data.splitter import Screening, digest_file
from ztune.errors import ConfigError
from ztune.experiments.cells import Cell, key_of
from ztune.experiments.jobs import CellJob, Encoding, Job, ScoredPart, key_of_tested
from ztune.experiments.plan import DataPlan, Draw, Found, Plan
from ztune.experiments.protocols import (
    TRANSFERS,
    Part,
    Source,
    Task,
    remarks_on,
    split_of,
    task_of,
    tested_split,
)
from ztune.io.config import as_json
from ztune.io.old_formats import IMAGES_IN_KEYS
from ztune.methods.base import HeadMethod
from ztune.methods.plugins import package_of
from ztune.methods.registry import find_method, method_config, settings_of_result, tuned_config
from ztune.printing import first_few
from ztune.progress import Progress, warn
from ztune.run_config import RunConfig, absolute_paths
from ztune.types import LEAST_AREA, Json

RECIPE = 4
"""Part of every key: incremented when the same plan would give other figures."""
_LEAST_ENCODED = 512
"""Minimum images per task."""
_MOST_ENCODINGS = 32
"""Maximum tasks per data set, since each reads the cache."""


@dataclass(frozen=True)
class CellFilter:
    """The requested cells of a plan; None: all."""

    methods: tuple[str, ...] | None = None
    data: tuple[str, ...] | None = None
    shots: tuple[int, ...] | None = None
    seeds: tuple[int, ...] | None = None

    def check(self, plan: Plan) -> None:
        """Raise ConfigError for a value that the plan does not have."""
        known: dict[str, Iterable[object]] = {
            "methods": plan.methods,
            "data": [name for p in plan.protocols for name in p.sources],
            "shots": [n for p in plan.protocols for n in p.shots],
            "seeds": [n for p in plan.protocols for n in p.seeds],
        }
        for name, there in known.items():
            for value in getattr(self, name) or ():
                if value not in there:
                    listed = ", ".join(map(str, dict.fromkeys(there)))
                    raise ConfigError(f'`{name}`: the plan has no "{value}" (expected {listed})')

    def matches(self, cell: Cell) -> bool:
        return all(
            wanted is None or value in wanted
            for wanted, value in (
                (self.methods, cell.method),
                (self.data, cell.data),
                (self.shots, cell.shots),
                (self.seeds, cell.seed),
            )
        )


@dataclass
class Digests:
    """SHA-256 of images, each read once."""

    known: dict[Path, str] = field(default_factory=dict)

    def __call__(self, path: Path) -> str:
        if path not in self.known:
            self.known[path] = digest_file(path)
        return self.known[path]

    def read(self, paths: Iterable[Path], progress: Progress) -> None:
        """Read files in parallel.

        Raises: DataError naming an unreadable file.
        """
        new = [path for path in dict.fromkeys(paths) if path not in self.known]
        if not new:
            return
        with (
            concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
            progress.activity("digest images", len(new)) as ticker,
        ):
            for n, (path, digest) in enumerate(
                zip(new, pool.map(digest_file, new), strict=True), 1
            ):
                self.known[path] = digest
                ticker.update(n)


@dataclass(frozen=True)
class Prepared:
    """All cells of a plan in order with their keys, and the jobs that run them.

    Cells that differ only in their names share a key.
    """

    cells: Mapping[Cell, str | None]
    """None: the data set was not requested and not read."""
    jobs: tuple[Job, ...]
    tested: Mapping[Path, Split]
    """Test images by split file, not yet written."""
    digests: Mapping[str, str]
    """Of the bundles, by model name."""
    found: Mapping[str, Found]
    """Findings on the data sets that were read."""


@dataclass
class Preparation:
    """Prepares a plan; data sets are read once for all cells."""

    plan: Plan
    only: CellFilter
    root: Path | None
    out: Path
    provider: str
    progress: Progress
    _sources: dict[str, Source] = field(default_factory=dict)
    _digests: Digests = field(default_factory=Digests)
    _parts: dict[tuple[str, str, tuple[Item, ...], tuple[str, ...]], ScoredPart] = field(
        default_factory=dict
    )
    _tested: dict[Path, Split] = field(default_factory=dict)
    _known_as: dict[str, str | None] = field(default_factory=dict)
    _remarks: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _copies: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def prepare(self) -> Prepared:
        """Read the requested data and return jobs. Nothing is written to OUT.

        Raises: ConfigError, DataError, FormatError for an invalid bundle, data set or setting, or
            if no cell is requested.
        """
        bundles = {name: self._bundle(path) for name, path in self.plan.models.items()}
        cells: dict[Cell, str | None] = {
            cell: None for draw in self.plan.draws() for cell in self.plan.cells_of(draw)
        }
        if not any(map(self.only.matches, cells)):
            raise ConfigError("no cell of the plan matches `methods`, `data`, `shots` and `seeds`")
        # All cells of a data set that is read get a key, requested or not: keys from before would
        # hide changes of its images.
        requested = {cell.data for cell in filter(self.only.matches, cells)}
        tasks = [(draw, self._task(draw)) for draw in self.plan.draws() if draw.source in requested]
        for _, task in tasks:
            for remark in remarks_on(task):
                shots = f"{task.shots} shot{'' if task.shots == 1 else 's'}"
                self._add_remark(task.source.name, f"{shots}: {remark}")
        self._digests.read(_files(task for _, task in tasks), self.progress)
        jobs: dict[str, Job] = {}
        for draw, task in tasks:
            split = split_of(task, self._digests)
            parts = [self._scored_part(part) for part in task.parts]
            self._count_copies(task, split)
            for cell in self.plan.cells_of(draw):
                if cells[cell] is None:  # else another protocol has the same cell
                    cells[cell] = self._add(cell, task, split, parts, bundles[cell.model], jobs)
        self._warn_of_copies()
        return Prepared(
            cells,
            tuple(jobs.values()),
            self._tested,
            {name: bundle.digest for name, bundle in bundles.items()},
            {
                name: Found(
                    self._known_as[name],
                    [*map(escape_surrogates, self._remarks[name])],
                    together([LeftOut(ignored=source.listing.ignored), *source.left_out]),
                )
                for name, source in self._sources.items()
            },
        )

    def _add_remark(self, data: str, remark: str) -> None:
        """Add a remark on a data set, once for all its tasks."""
        if remark not in self._remarks[data]:
            self._remarks[data].append(remark)
            self.progress.remark(f"{data}: {remark}")

    def _bundle(self, path: str) -> Bundle:
        bundle = load_bundle(self.plan.resolved(path))
        check_precision(bundle.precision, self.provider)
        return bundle

    def _source(self, name: str) -> Source:
        if name not in self._sources:
            self._sources[name] = self._read_source(name, self.plan.data[name])
        return self._sources[name]

    def _read_source(self, name: str, entry: DataPlan) -> Source:
        """Read a data set of the plan.

        Raises: ConfigError for a named data set without root; DataError.
        """
        template, test_listing = TEMPLATE, None
        if entry.path is not None:
            names = None if entry.names is None else self.plan.resolved(entry.names)
            place = str(self.plan.resolved(entry.path))
            listing = read_source(place, None, names, tuned=False, nested=entry.nested, pipe=False)
            for remark in listing.remarks:
                self._add_remark(name, remark)
            self._digest_images(listing)
        elif self.root is None:
            raise ConfigError(
                f'data "{name}" of the plan needs `root=DIR`, the folder of named data sets '
                "(or give its path in the plan)"
            )
        else:
            spec = find_spec(name)
            listing, template = (
                read_source(spec.name, self.root, tuned=False, nested=entry.nested),
                spec.template,
            )
        self._known_as[name] = find_spec(name).name if listing.is_published else None
        for remark in listing.notes:
            self._add_remark(name, remark)
        if entry.test_data is not None:
            place = str(self.plan.resolved(entry.test_data))
            names = None if entry.names is None else self.plan.resolved(entry.names)
            test_listing = read_source(
                place, None, names, tuned=False, nested=entry.nested, pipe=False
            )
            test_listing = replace(test_listing, root=test_listing.root.resolve())
            self._digest_images(test_listing)
        source = Source(
            name,
            replace(listing, root=listing.root.resolve()),
            entry.templates or (template,),
            self._digests,
            entry.split_settings(1, 0),
            test_listing,
            entry.skip_broken,
            # A broken image otherwise fails only the cells that draw it.
            Screening(
                entry.skip_broken,
                entry.skip_conflicts,
                reason_broken,
                entry.skip_broken,
                perceptual_hash,
            ),
        )
        classes = f"{len(listing.classes)} classes ({first_few(listing.classes, 10)})"
        self.progress.remark(f"{name}: {classes}; {HOW_DRAWN[source.sampler]}")
        return source

    def _digest_images(self, listing: Listing) -> None:
        files = (listing.root.resolve() / image.path for image in listing.images)
        self._digests.read(files, self.progress)

    def _task(self, draw: Draw) -> Task:
        protocol = draw.protocol
        targets = [self._source(target) for target in protocol.targets]
        return task_of(protocol.kind, self._source(draw.source), targets, draw.shots, draw.seed)

    def _count_copies(self, task: Task, split: Split) -> None:
        """Count the test images of every part that are byte-identical to tuning images."""
        tuned_on = {entry.sha256 for entry in split.entries}
        for part in task.parts:
            root = part.source.root
            n = sum(self._digests(root / item.path) in tuned_on for item in part.items)
            self._copies.setdefault((task.source.name, part.name), []).append(n)

    def _warn_of_copies(self) -> None:
        for (data, part), counts in self._copies.items():
            if most := max(counts):
                how_many = f"{most}" if min(counts) == most else f"{min(counts)} to {most}"
                remark = (
                    f"{part}: {how_many} test images are byte-identical to a tuning image "
                    "(they are kept, and counted in each result)"
                )
                self._remarks[data].append(remark)
                warn(f"{data}: {remark}")

    def _scored_part(self, part: Part) -> ScoredPart:
        place = part.name, part.source.name, part.items, part.classes
        if place not in self._parts:
            split = tested_split(part, self._digests)
            file = self.out / "splits" / f"{key_of_tested(split)}.json"
            self._tested[file] = split
            cache = self.out / "cache" / part.source.name / "test"
            self._parts[place] = ScoredPart(
                part.name, file, part.source.templates, cache, part.source.skip_broken
            )
        return self._parts[place]

    def _add(
        self,
        cell: Cell,
        task: Task,
        split: Split,
        parts: Sequence[ScoredPart],
        bundle: Bundle,
        jobs: dict[str, Job],
    ) -> str:
        """Add a cell to its job; return its key."""
        run_config = self._run_config_for(cell, task, bundle)
        run = key_of(_run_key_values(run_config, bundle, split))
        scored_on: list[Json] = [
            {"part": p.name, IMAGES_IN_KEYS: p.split_file.stem, "templates": list(p.templates)}
            for p in parts
        ]
        key = key_of({"run": run, "protocol": cell.protocol, "scored_on": scored_on})
        earlier = jobs[run].cells if run in jobs else ()
        if key not in {one.key for one in earlier}:
            scored = CellJob(key, cell, tuple(parts), curve=cell.protocol not in TRANSFERS)
            package = package_of(run_config.method)
            jobs[run] = Job(run, run_config, bundle.digest, split, (*earlier, scored), package)
        return key

    def _run_config_for(self, cell: Cell, task: Task, bundle: Bundle) -> RunConfig:
        execution = self.plan.execution
        method = self.plan.methods[cell.method].on(self.plan.data[cell.data])
        table = find_method(method.uses)
        tuned = tuned_config(table, method_config(table, method.settings, method.preset))
        # Without compared losses there is no signal check.
        gated = tuned is not None and tuned.perturbation_setting is not None
        run_config = RunConfig(
            str(bundle.path),
            str(task.source.root),
            method=method.uses,
            shots=task.shots,
            queries=method.queries,
            seed=task.seed,
            templates=task.source.templates,
            preset=method.preset,
            provider=self.provider,
            threads=execution.threads,
            memory_limit=execution.memory_limit,
            cache=str(self.out / "cache" / task.source.name / "tune"),
            augment=method.views,
            skip_broken=task.source.skip_broken,
            force=execution.force and gated,
            snapshots=0 if tuned is None else method.snapshots,
            settings=absolute_paths(method.settings, self.plan.path.parent),
        )
        try:
            # Reports early what is impossible.
            run_config.check_method()
            run_config.check_budget(len(task.drawn.train))
        except ConfigError as error:
            raise ConfigError(f'method "{cell.method}" of the plan: {error}') from None
        return run_config


def _files(tasks: Iterable[Task]) -> Iterable[Path]:
    for task in tasks:
        for _, item in task.drawn:
            yield task.source.root / item.path
        for part in task.parts:
            for item in part.items:
                yield part.source.root / item.path


# The fields of a RunConfig that change a result, besides settings and images.
_RELEVANT = (
    "method", "queries", "seed", "templates", "provider", "threads", "memory_limit", "augment",
    "force", "snapshots",
)  # fmt: skip


def _run_key_values(run_config: RunConfig, bundle: Bundle, split: Split) -> dict[str, Json]:
    """Return everything that a run's result depends on."""
    document = as_json(run_config)
    values = {name: document[name] for name in _RELEVANT}
    if isinstance(find_method(run_config.method), HeadMethod):
        del values["queries"]  # heads spend none
    if run_config.augment and run_config.views.least_area != LEAST_AREA:
        values["least_area"] = run_config.views.least_area
    if package := package_of(run_config.method):
        values["package"] = package
    entries: list[Json] = [[one.sha256, one.label, one.role] for one in split.entries]
    return {
        **values,
        "recipe": RECIPE,
        "config": settings_of_result(find_method(run_config.method), run_config.method_config),
        "bundle": bundle.digest,
        "classes": list(split.classes),
        "entries": entries,
    }


def encodings(jobs: Sequence[Job], tested: Mapping[Path, Split]) -> list[Encoding]:
    """Return tasks that encode all images of the jobs once."""
    wanted: dict[tuple[Path, str, Path], dict[str, Path]] = {}
    for job in jobs:
        bundle = Path(job.run_config.bundle), job.bundle_digest
        cache = Path(str(job.run_config.cache))
        roles: tuple[SplitName, ...] = ("val",) if job.run_config.augment else ("train", "val")
        items = [item for role in roles for item in job.split.items(role)]
        wanted.setdefault((*bundle, cache), {}).update((digest, path) for path, digest in items)
        for part in dict.fromkeys(part for cell in job.cells for part in cell.parts):
            place = wanted.setdefault((*bundle, part.cache), {})
            items = tested[part.split_file].items("test")
            place.update((digest, path) for path, digest in items)
    tasks = []
    for (path, digest, cache), images in wanted.items():
        items = [(image, name) for name, image in images.items()]
        size = max(_LEAST_ENCODED, -(-len(items) // _MOST_ENCODINGS))
        tasks += [
            Encoding(path, digest, tuple(items[first : first + size]), cache)
            for first in range(0, len(items), size)
        ]
    return tasks
