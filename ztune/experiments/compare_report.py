"""The table, plots and JSON document of a comparison, from its results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from ztune.capabilities import describe
from ztune.data.split import together
from ztune.experiments.cells import Outcome
from ztune.experiments.compare import Comparison
from ztune.experiments.environment import describe_environment
from ztune.experiments.figures import draw_cost, styles_of
from ztune.experiments.render import in_markdown, markdown_table
from ztune.experiments.report import image_passes
from ztune.experiments.store import ImagePass, Result
from ztune.experiments.summary import (
    Costs,
    Measured,
    Probabilities,
    Sheet,
    calibration_of,
    costs_of,
    memory_alone,
    names_of,
    seconds_alone,
)
from ztune.io.files import write_bytes, write_json
from ztune.io.schema import plain
from ztune.methods.registry import find_method, needs_of
from ztune.printing import without_marks
from ztune.types import Json

FORMAT = "ztune-compare"
VERSION = 3
COLUMNS = (
    "method", "test accuracy", "ECE", "NLL", "Brier", "seeds", "queries", "text forwards",
    "image forwards", "seconds", "peak MB", "result bytes", "new classes",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One method over its seeds."""

    method: str
    measured: Measured
    costs: Costs | None
    """None without a finished seed."""
    probabilities: Probabilities | None
    """None without a finished seed, or for results of earlier versions."""
    failures: tuple[tuple[int, str], ...]
    """Seed and reason."""

    def cells(self) -> tuple[str, ...]:
        """Return the row's text under COLUMNS; a missing figure is a dash."""
        serves = "yes" if find_method(self.method).serves_new_classes() else "no"
        mean, costs, n = self.measured.mean, self.costs, self.measured.n
        n_failed = len(self.failures)
        if mean is None or costs is None:
            return (self.method, "failed", *"–" * 3, f"0 of {n_failed}", *"–" * 6, serves)
        deviation, peak = self.measured.deviation, costs.peak_memory_mb
        p = self.probabilities
        return (
            self.method,
            f"{mean:.1%}" + ("" if deviation is None else f" ± {100 * deviation:.1f}"),
            *(("–",) * 3 if p is None else (f"{p.ece:.1%}", f"{p.nll:.2f}", f"{p.brier:.2f}")),
            f"{n} of {n + n_failed}" if n_failed else str(n),
            *(f"{x:,.0f}" for x in (costs.queries, costs.text_forwards, costs.image_forwards)),
            f"{costs.seconds:,.1f}",
            "–" if peak is None else f"{peak:,.0f}",
            f"{costs.result_bytes:,.0f}",
            serves,
        )

    def to_json(self) -> dict[str, Json]:
        costs = self.costs
        failures: list[Json] = [{"seed": seed, "reason": why} for seed, why in self.failures]
        return {
            "method": self.method,
            "seeds": [*sorted(self.measured.by_seed)],
            "accuracy": self.measured.mean,
            "deviation": self.measured.deviation,
            "ece": None if self.probabilities is None else self.probabilities.ece,
            "nll": None if self.probabilities is None else self.probabilities.nll,
            "brier": None if self.probabilities is None else self.probabilities.brier,
            "queries": None if costs is None else round(costs.queries),
            "text_forwards": None if costs is None else round(costs.text_forwards),
            "image_forwards": None if costs is None else round(costs.image_forwards),
            "seconds": None if costs is None else costs.seconds,
            "peak_memory_mb": None if costs is None else costs.peak_memory_mb,
            "result_bytes": None if costs is None else round(costs.result_bytes),
            "failures": failures,
        }


@dataclass(frozen=True)
class Report:
    """A comparison as text, plots and JSON."""

    comparison: Comparison

    @cached_property
    def sheet(self) -> Sheet:
        return Sheet("few-shot", self.results[0].cell.model, self.results, self.images)

    @property
    def results(self) -> tuple[Result, ...]:
        return self.comparison.results

    @cached_property
    def images(self) -> ImagePass:
        """Cost of encoding; free if no image was encoded yet."""
        model = self.results[0].cell.model
        return image_passes(self.comparison.view).get(model, ImagePass(0.0, None))

    @property
    def title(self) -> str:
        return self.comparison.title

    @cached_property
    def rows(self) -> list[Row]:
        """A row per method, most accurate first, those without a result last."""
        rows = [self._row(method) for method in self.comparison.config.methods]
        return sorted(rows, key=lambda row: (row.costs is None, -(row.measured.mean or 0.0)))

    def _row(self, method: str) -> Row:
        sheet, data, shots = self.sheet, self.results[0].cell.data, self.results[0].cell.shots
        failures = [(one.cell.seed, one.reason) for one in sheet.of(method) if one.reason]
        if reason := self.comparison.unable.get(method):
            failures = [(seed, reason) for seed in self.comparison.config.seeds]
        return Row(
            method,
            sheet.measured(method, data, "test", shots),
            costs_of(sheet, method),
            calibration_of(score for one in sheet.outcomes(method) for score in one.scores),
            tuple(sorted(failures)),
        )

    def failures(self) -> list[str]:
        """Return a line per method and reason."""
        lines = []
        for row in self.rows:
            for reason in dict.fromkeys(reason for _, reason in row.failures):
                seeds = ", ".join(str(seed) for seed, why in row.failures if why == reason)
                noun = "seeds" if "," in seeds else "seed"
                lines.append(f"{row.method} failed with {noun} {seeds}: {reason}")
        return lines

    def footnotes(self) -> list[str]:
        per_image = 1000 * self.images.seconds_per_image
        tested = [score for one in self.sheet.outcomes() for score in one.scores][:1]
        on = [f"on {score.n} test images of {score.classes} classes, " for score in tested]
        return [
            f"accuracy: {''.join(on)}mean ± sample standard deviation over the seeds, in points. "
            "All methods tune on the same images per seed, never on test images.",
            "ECE: expected calibration error of the probabilities (15 bins, all seeds in one set). "
            "NLL: negative log-likelihood of the labels, in nats. Brier: Brier score, 0 to 2.",
            "queries: candidates evaluated on a batch. text forwards: encoded class prompts, with "
            "the signal check's probes, without the one pass of the templates.",
            "image forwards: images encoded by the run or read from the cache: training and "
            "validation images, and those encoded with every query.",
            "image forwards, seconds, peak MB: as if each method ran alone. The cells share a "
            f"cache, so each is charged {per_image:.2g} ms per cached image, and at least the "
            "memory of the pass that encoded it. Seconds end with the last step, without the run's "
            "report and the scoring on test images.",
        ]

    def capabilities(self) -> dict[str, str]:
        """Return the capabilities that each method needs with its settings."""
        plans = {row.method: self.comparison.config.method_plan(row.method) for row in self.rows}
        return {
            name: describe(needs_of(find_method(name), plan.config)) for name, plan in plans.items()
        }

    def needs(self) -> list[str]:
        return [f"{name} needs {needed}." for name, needed in self.capabilities().items()]

    def to_json(self) -> dict[str, Json]:
        """Return compare.json's content."""
        view = self.comparison.view
        session = view.sessions[max(view.sessions)]
        counts: dict[str, Json] = {}
        for outcome in self.sheet.outcomes()[:1]:
            score = outcome.scores[0]
            counts = {"classes": score.classes, "train": outcome.n_train, "val": outcome.n_val,
                      "test": score.n}  # fmt: skip
        return {
            "format": FORMAT,
            "version": VERSION,
            "title": self.title,
            **{key: session[key] for key in ("command", "provider", "machine", "versions")},
            "counts": counts,
            "left_out": plain(together(view.left_out.values())),
            "images": plain(self.images),
            "table": [row.to_json() for row in self.rows],
            "capabilities": {**self.capabilities()},
            "cells": list(self._cells()),
        }

    def _cells(self) -> Iterator[dict[str, Json]]:
        for result in self.results:
            cell, outcome = result.cell, result.outcome
            head: dict[str, Json] = {"method": cell.method, "seed": cell.seed}
            if outcome is not None:
                yield {**head, "status": "finished", **self._figures(outcome)}
            elif result.reason:
                yield {**head, "status": "failed", "reason": result.reason}
        for method, reason in self.comparison.unable.items():
            for seed in self.comparison.config.seeds:
                yield {"method": method, "seed": seed, "status": "failed", "reason": reason}

    def _figures(self, outcome: Outcome) -> dict[str, Json]:
        document, score = plain(outcome), outcome.scores[0]
        del document["scores"], document["uses"]
        return {
            **document,
            "accuracy": score.accuracy,
            **{name: getattr(score, name) for name in ("ece", "nll", "brier")},
            "n_test": score.n,
            "test_conversions": dict(score.conversions),
            "zero_shot_accuracy": score.zero_shot,
            "run": f"runs/{outcome.run}/run",
            "own_seconds": outcome.seconds,
            "seconds": round(seconds_alone(outcome, self.images), 3),
            "own_peak_memory_mb": outcome.peak_memory_mb,
            "peak_memory_mb": memory_alone(outcome, self.images),
        }

    def write(self) -> None:
        """Write compare.json, compare.md and the plots."""
        out = self.comparison.out
        write_json(out / "compare.json", self.to_json())
        write_bytes(out / "compare.md", "\n".join([*self._markdown(), ""]).encode())
        if self.sheet.outcomes():
            names = names_of(self.comparison.view.document)
            styles = styles_of(self.sheet.methods, names)
            for cost in ("queries", "seconds"):
                draw_cost(
                    cost,
                    self.sheet,
                    self.results[0].cell.data,
                    names,
                    styles,
                    out / f"accuracy-{cost}.png",
                )

    def _markdown(self) -> list[str]:
        return [
            f"# {in_markdown(self.title)}",
            "",
            *markdown_table(COLUMNS, [row.cells() for row in self.rows]),
            "",
            *_listed([in_markdown(without_marks(line)) for line in self.failures()]),
            *_listed(self.footnotes()),
            *_listed(self.needs()),
            "![accuracy against queries](accuracy-queries.png)",
            "![accuracy against seconds](accuracy-seconds.png)",
            "",
            *_listed(describe_environment(self.comparison.view)),
        ]


def _listed(lines: Sequence[str]) -> list[str]:
    return [*(f"- {line}" for line in lines), ""] if lines else []
