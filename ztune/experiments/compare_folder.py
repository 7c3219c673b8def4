"""A comparison's folder: compare.json, the runs of its cells, the table and the plots.

compare.json   configuration, cells and figures               compare.md    the table
runs/          one run per cell, and those that encode        cache/        encoded images
logs/          the log of each cell                           *.png         the plots
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, structs

from ztune.capabilities import describe
from ztune.errors import ConfigError
from ztune.experiments.comparison import (
    COLUMNS,
    Cell,
    ImagePass,
    Rates,
    Row,
    cell_from_json,
    cell_to_json,
    differences,
    markdown_table,
    mean_curve,
    row_to_json,
    summarise,
    table_row,
)
from ztune.experiments.render import code_in_markdown, in_markdown
from ztune.io.files import new_folder, read_json, write_bytes, write_json
from ztune.io.schema import Count, convert, current, plain
from ztune.methods.base import HeadMethod
from ztune.methods.plugins import package_of
from ztune.methods.registry import find_method, method_config, method_names, needs_of
from ztune.printing import without_marks
from ztune.progress import warn
from ztune.report_compare import Level, Line, draw_accuracy_against_cost
from ztune.run import RunFolder
from ztune.run_document import RunReport
from ztune.system import machine, versions
from ztune.types import Json

FORMAT = "ztune-compare"
VERSION = 2


class SeedImages(Struct, frozen=True):
    """Cost of encoding a seed's images."""

    seed: Count
    image_forwards: Count
    image_seconds: float
    peak_memory_mb: float


class ReportedConfig(Struct, frozen=True):
    """The fields of `CompareConfig.to_json` that a report shows."""

    bundle: str
    data: str
    shots: Count
    provider: str
    preset: str
    settings: Mapping[str, Mapping[str, Json]]


class Head(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """compare.json without the cells and the table."""

    began: str
    compare_config: Mapping[str, Json]
    counts: Mapping[str, Count]
    versions: Mapping[str, Json]
    machine: Mapping[str, Json]
    images: tuple[SeedImages, ...]
    rates: Rates | None = None
    command: str = ""


class Folder:
    """The files of one comparison."""

    def __init__(self, path: Path, head: Head, cells: list[Cell]):
        self.path = path
        self.head = head
        self.config = convert(
            head.compare_config, ReportedConfig, f'comparison "{path}": compare_config'
        )
        self.cells = cells
        self.cache = path / "cache"

    @classmethod
    def open(cls, path: Path, config: Mapping[str, Json], counts: Mapping[str, int]) -> Folder:
        """Make the folder, or open one of the same configuration.

        Raises: ConfigError naming the differences.
        """
        if not (path / "compare.json").is_file():
            head = Head(
                began=datetime.date.today().isoformat(),
                compare_config=config,
                counts=counts,
                versions=dict(versions()),
                machine=dict(machine()),
                images=(),
            )
            with new_folder(path) as work:
                for name in ("runs", "logs", "cache"):
                    (work / name).mkdir()
                cls(work, head, []).write()
            return cls(path, head, [])
        found = cls.read(path)
        found._require_the_same(config)
        found._require_the_same_packages()
        found._warn_of_changes()
        return found

    @classmethod
    def read(cls, path: Path) -> Folder:
        """Read an existing comparison.

        Raises: FormatError if compare.json is damaged, foreign or too new.
        """
        where = f'comparison "{path}"'
        document = current(read_json(path / "compare.json", where), FORMAT, VERSION, where)
        listed = convert(document.get("cells"), list[dict[str, Json]], f"{where}: cells")
        cells = [cell_from_json(one, f"{where}: cells[{i}]") for i, one in enumerate(listed)]
        for cell in cells:
            if cell.method not in method_names():
                raise ConfigError(
                    f'{where} has results of method "{cell.method}", which is not installed '
                    "(install its package, or use another `out`)"
                )
        return cls(path, convert(document, Head, where), cells)

    def _require_the_same(self, config: Mapping[str, Json]) -> None:
        then, now = dict(self.head.compare_config), dict(config)
        same_images = then.pop("images", None) == now.pop("images")
        changed = differences(then, now)
        if changed:
            raise ConfigError(
                f'comparison "{self.path}" was started with other settings: {"; ".join(changed)} '
                "(use the same settings, or another `out`; methods and seeds may be added)"
            )
        if not same_images:
            raise ConfigError(
                f'comparison "{self.path}" was started with other images, or with a version of '
                "ztune that splits them differently (use another `out`)"
            )

    def _require_the_same_packages(self) -> None:
        for cell in self.cells:
            run, now = RunFolder(self.run_of(cell.method, cell.seed)), package_of(cell.method)
            if now and run.is_started and (then := run.read().get("package")) != now:
                raise ConfigError(
                    f'comparison "{self.path}" was started with {cell.method} of '
                    f"{then or 'ztune'}, got {now} (install that version, or use another `out`)"
                )

    def _warn_of_changes(self) -> None:
        then = {**self.head.versions, **self.head.machine}
        changed = differences(then, {**versions(), **machine()})
        if changed:
            warn(f"changed since the comparison was started: {'; '.join(changed)}")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the comparison against other processes."""
        with RunFolder(self.path).locked():
            yield

    def run_of(self, method: str, seed: int) -> Path:
        return self.path / "runs" / f"{method}-{seed}"

    def images_of(self, seed: int) -> Path:
        """Return the run that encodes a seed's images for all cells."""
        return self.path / "runs" / f"images-{seed}"

    def log(self, name: str, seed: int) -> Path:
        return self.path / "logs" / f"{name}-{seed}.log"

    def has(self, method: str, seed: int) -> bool:
        """Return whether a cell is finished and its run exists."""
        found = [c for c in self.cells if (c.method, c.seed) == (method, seed)]
        run = RunFolder(self.run_of(method, seed))
        return bool(found and found[0].figures) and run.is_finished()

    def add(self, cell: Cell) -> None:
        """Add or replace a cell, and save."""
        others = [c for c in self.cells if (c.method, c.seed) != (cell.method, cell.seed)]
        order = method_names()
        self.cells = sorted([*others, cell], key=lambda c: (order.index(c.method), c.seed))
        self.write()

    def has_images(self, seed: int) -> bool:
        return any(one.seed == seed for one in self.head.images)

    def save_image_costs(self, seed: int, run: RunReport) -> None:
        """Save the cost of encoding a seed's images."""
        took = SeedImages(seed, run.image_forwards, run.image_seconds or 0.0, run.peak_memory_mb)
        self._save(images=(*self.head.images, took))

    def _save(self, **changes: Any) -> None:
        self.head = structs.replace(self.head, **changes)
        self.write()

    @property
    def images(self) -> ImagePass:
        """Cost of encoding over all seeds; without a finished pass, the rate measured first."""
        passes, rates = self.head.images, self.head.rates
        n_images = sum(one.image_forwards for one in passes)
        seconds = sum(one.image_seconds for one in passes)
        memory = max((one.peak_memory_mb for one in passes), default=0.0)
        if n_images:
            return ImagePass(seconds / n_images, memory)
        return ImagePass(rates.image if rates else 0.0, memory)

    def save_rates(self, rates: Rates) -> None:
        self._save(rates=rates)

    @property
    def rows(self) -> list[Row]:
        return summarise(self.cells, self.images)

    def document(self) -> dict[str, Json]:
        """Return compare.json's content."""
        images = self.images
        return {
            "format": FORMAT,
            "version": VERSION,
            **plain(self.head),
            "table": [row_to_json(row) for row in self.rows],
            "capabilities": {row.method: _capabilities(self, row.method) for row in self.rows},
            "cells": [cell_to_json(cell, images) for cell in self.cells],
        }

    def write(self) -> None:
        write_json(self.path / "compare.json", self.document())


def write_results(folder: Folder, command: str) -> dict[str, Json]:
    """Write compare.json, compare.md and the plots; return compare.json's content."""
    folder._save(command=command)
    write_bytes(folder.path / "compare.md", "\n".join([*_markdown(folder), ""]).encode())
    if any(cell.figures for cell in folder.cells):
        _draw(folder)
    return folder.document()


def title(folder: Folder) -> str:
    asked = folder.config
    return f"{Path(asked.data).name} on {Path(asked.bundle).name}, {asked.shots} shots"


def table_rows(folder: Folder) -> list[tuple[str, ...]]:
    return [
        table_row(row, new_classes=find_method(row.method).serves_new_classes())
        for row in folder.rows
    ]


def failures(folder: Folder) -> list[str]:
    """Return a line per method and reason."""
    lines = []
    for row in folder.rows:
        for reason in dict.fromkeys(reason for _, reason in row.failures):
            seeds = ", ".join(str(seed) for seed, why in row.failures if why == reason)
            noun = "seeds" if "," in seeds else "seed"
            lines.append(f"{row.method} failed with {noun} {seeds}: {reason}")
    return lines


def footnotes(folder: Folder) -> list[str]:
    n_test, n_classes = (folder.head.counts.get(name, 0) for name in ("test", "classes"))
    per_image = 1000 * folder.images.seconds_per_image
    return [
        f"accuracy: on {n_test} test images of {n_classes} classes, mean ± sample standard "
        "deviation over the seeds, in points. All methods tune on the same images per seed, "
        "never on test images.",
        "queries: candidates evaluated on a batch. text forwards: encoded class prompts, with the "
        "signal check's probes, without the one pass of the templates.",
        "image forwards: images encoded by the run or read from the cache: training and "
        "validation images, and those encoded with every query.",
        "image forwards, seconds, peak MB: as if each method ran alone. The cells share a cache, "
        f"so each is charged {per_image:.2g} ms per cached image, and at least the memory of the "
        "pass that encoded it. Seconds end with the last step, without the run's report and the "
        "scoring on test images.",
    ]


def _capabilities(folder: Folder, name: str) -> str:
    """Return the capabilities that a method needs with its settings."""
    method, own = find_method(name), folder.config.settings.get(name, {})
    return describe(needs_of(method, method_config(method, own, folder.config.preset)))


def describe_needs(folder: Folder) -> list[str]:
    return [f"{row.method} needs {_capabilities(folder, row.method)}." for row in folder.rows]


def _markdown(folder: Folder) -> list[str]:
    head = folder.head
    environment = {**head.machine, **head.versions}
    return [
        f"# {in_markdown(title(folder))}",
        "",
        *markdown_table(COLUMNS, table_rows(folder)),
        "",
        *_listed([in_markdown(without_marks(line)) for line in failures(folder)]),
        *_listed(footnotes(folder)),
        *_listed(describe_needs(folder)),
        "![accuracy against queries](accuracy-queries.png)",
        "![accuracy against seconds](accuracy-seconds.png)",
        "",
        f"Command: {code_in_markdown(head.command)}",
        "",
        f"Started {head.began}, provider {folder.config.provider}; "
        + ", ".join(in_markdown(f"{name} {value}") for name, value in environment.items())
        + ".",
    ]


def _listed(lines: list[str]) -> list[str]:
    return [*(f"- {line}" for line in lines), ""] if lines else []


def _draw(folder: Folder) -> None:
    """Draw accuracy against queries and against seconds."""
    images, style = folder.images, {name: i for i, name in enumerate(method_names())}
    n_seeds = max(len(row.seeds) for row in folder.rows)
    over = f", mean of {n_seeds} seeds (band: lowest to highest)" if n_seeds > 1 else ""
    curves: dict[str, Any] = {}
    for name in style:
        curve = mean_curve([cell for cell in folder.cells if cell.method == name], images)
        if curve is not None:
            curves[name] = curve
    for cost in ("queries", "seconds"):
        lines = [
            Line(name, style[name], getattr(curve, cost), curve.mean, curve.low, curve.high)
            for name, curve in curves.items()
        ]
        levels = [
            Level(
                row.method,
                style[row.method],
                row.accuracy,
                row.seconds if cost == "seconds" else None,
            )
            for row in folder.rows
            if row.accuracy is not None and isinstance(find_method(row.method), HeadMethod)
        ]
        levels += _hand_written(folder, levels)
        path = folder.path / f"accuracy-{cost}.png"
        draw_accuracy_against_cost(cost, lines, levels, f"{title(folder)}{over}", path)


def _hand_written(folder: Folder, levels: list[Level]) -> list[Level]:
    """Return the level of the templates, unless zero-shot is among the methods."""
    found = [c.figures.zero_shot_accuracy for c in folder.cells if c.figures is not None]
    if any(level.name == "zero-shot" for level in levels):
        return []
    return [Level("hand-written prompt", None, sum(found) / len(found))]
