"""Figures over seeds, for tables, plots and rankings.

A sheet has all results of one protocol and one model. Accuracies are in 0…1; the figure of a cell
that failed, was not run, or whose method does not support the part is absent.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ztune.experiments.cells import Outcome, PartScore
from ztune.experiments.plan_document import PlanDocument
from ztune.experiments.protocols import TRANSFERS
from ztune.experiments.store import ImagePass, Result
from ztune.statistics import ece_of


@dataclass(frozen=True)
class Measured:
    """One figure, by seed."""

    by_seed: Mapping[int, float]
    n_wanted: int
    """Seeds of the plan."""

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def mean(self) -> float | None:
        return mean_of(self.by_seed.values())

    @property
    def points(self) -> float | None:
        """Mean in per cent to one decimal: what tables show, and what ranks go by."""
        return None if self.mean is None else round(100 * self.mean, 1)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None for fewer than two seeds."""
        return deviation_of(list(self.by_seed.values()))

    @property
    def is_whole(self) -> bool:
        return self.n == self.n_wanted


def mean_of(values: Iterable[float]) -> float | None:
    """Return the mean, None of no values."""
    found = list(values)
    return math.fsum(found) / len(found) if found else None


def deviation_of(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation (n - 1), None for fewer than two values."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def combined(parts: Sequence[Measured], by: Callable[..., float]) -> Measured:
    """Return `by` of all parts' figures, seed by seed, over their common seeds."""
    if not parts:
        return Measured({}, 0)
    seeds = [seed for seed in parts[0].by_seed if all(seed in part.by_seed for part in parts)]
    figures = {seed: by(*(part.by_seed[seed] for part in parts)) for seed in seeds}
    return Measured(figures, max(part.n_wanted for part in parts))


def average(parts: Sequence[Measured]) -> Measured:
    """Return the mean of the parts, seed by seed, over their common seeds."""
    return combined(parts, lambda *figures: math.fsum(figures) / len(figures))


def harmonic_mean(base: float, new: float) -> float:
    """Return H = 2bn/(b + n), 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


@dataclass(frozen=True)
class Names:
    """The names of a plan."""

    title: str
    uses: Mapping[str, str]
    """Method label in the plan: name of the method."""
    data: Mapping[str, str]
    """Data set: title."""
    known_as: Mapping[str, str]
    """Data set: name in data/named.py, if it is that one."""
    digests: Mapping[str, str]
    """Model: digest of its bundle."""

    def of_data(self, name: str) -> str:
        return self.data.get(name, name)

    def method_of(self, label: str) -> str:
        return self.uses.get(label, label)


def names_of(plan: PlanDocument) -> Names:
    """Return the names of a plan's document; all but the title may be missing."""
    return Names(
        plan.title,
        uses={name: one.uses for name, one in plan.methods.items() if one.uses},
        data={name: one.title for name, one in plan.data.items() if one.title},
        known_as={name: one.known_as for name, one in plan.found.items() if one.known_as},
        digests={name: one.digest for name, one in plan.models.items() if one.digest},
    )


Accessor = Callable[[PartScore], float | None]


def accuracy_of(score: PartScore) -> float | None:
    return score.accuracy


def class_accuracy_of(score: PartScore) -> float | None:
    return score.class_accuracy


def zero_shot_of(score: PartScore) -> float | None:
    return score.zero_shot


def zero_shot_class_accuracy_of(score: PartScore) -> float | None:
    return score.zero_shot_class_accuracy


@dataclass(frozen=True)
class Sheet:
    """The results of one protocol and one model, in plan order."""

    protocol: str
    model: str
    results: tuple[Result, ...]
    images: ImagePass | None = None
    """Cost of encoding with the model; None if it was not recorded, so that it is free."""

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(result.cell.method for result in self.results))

    @property
    def data(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(result.cell.data for result in self.results))

    @property
    def shots(self) -> tuple[int, ...]:
        """In ascending order."""
        return tuple(sorted({result.cell.shots for result in self.results}))

    def of(
        self, method: str | None = None, data: str | None = None, shots: int | None = None
    ) -> tuple[Result, ...]:
        """Return the results of a method, data set and number of shots; None: all."""
        return self._groups.get((method, data, shots), ())

    @functools.cached_property
    def _groups(self) -> dict[tuple[str | None, str | None, int | None], tuple[Result, ...]]:
        """The results by method, data set and number of shots, None for all of them."""
        found: dict[tuple[str | None, str | None, int | None], list[Result]] = {}
        for result in self.results:
            cell = result.cell
            axes = (None, cell.method), (None, cell.data), (None, cell.shots)
            for method, data, shots in itertools.product(*axes):
                found.setdefault((method, data, shots), []).append(result)
        return {key: tuple(results) for key, results in found.items()}

    def data_with(self, shots: int) -> tuple[str, ...]:
        return tuple(dict.fromkeys(result.cell.data for result in self.of(shots=shots)))

    def shots_with(self, data: str) -> tuple[int, ...]:
        return tuple(sorted({result.cell.shots for result in self.of(data=data)}))

    def parts(self, data: str | None = None) -> tuple[str, ...]:
        """Return the parts of all finished cells, in the protocol's order."""
        return tuple(
            dict.fromkeys(score.part for one in self.outcomes(data=data) for score in one.scores)
        )

    def outcomes(
        self, method: str | None = None, data: str | None = None, shots: int | None = None
    ) -> list[Outcome]:
        found = (result.outcome for result in self.of(method, data, shots))
        return [outcome for outcome in found if outcome is not None]

    def measured(
        self, method: str, data: str, part: str, shots: int, of: Accessor = accuracy_of
    ) -> Measured:
        """Return a method's figure on one part."""
        results = self.of(method, data, shots)
        found = {result.cell.seed: _on(result, part, of) for result in results}
        return Measured(
            {seed: figure for seed, figure in found.items() if figure is not None}, len(results)
        )

    def hand_written(
        self, data: str, part: str, shots: int, of: Accessor = zero_shot_of
    ) -> Measured:
        """Return the templates' figure, which every cell measures.

        A seed without a finished cell gets the mean of the others: templates have no seed, and
        unless the protocol draws them, a part's images are the same for all seeds.
        """
        found: dict[int, list[float]] = {}
        results = self.of(data=data, shots=shots)
        for result in results:
            figure = _on(result, part, of)
            if figure is not None:
                found.setdefault(result.cell.seed, []).append(figure)
        usual = mean_of(figure for figures in found.values() for figure in figures)
        if usual is None:
            return Measured({}, 0)
        seeds = dict.fromkeys(result.cell.seed for result in results)
        figures = {seed: mean_of(found.get(seed, [])) for seed in seeds}
        filled = {seed: usual if one is None else one for seed, one in figures.items()}
        return Measured(filled, len(filled))

    def of_unit(self, method: str, data: str, shots: int) -> Measured:
        """Return the figure by which methods are ranked on a data set.

        few-shot: the accuracy; base-to-new: the harmonic mean; transfers: the targets' mean.
        """
        if self.protocol == "base-to-new":
            return self.harmonic(method, data, shots)
        parts = self.parts(data) if self.protocol in TRANSFERS else ("test",)
        return average([self.measured(method, data, part, shots) for part in parts])

    def harmonic(self, method: str, data: str, shots: int) -> Measured:
        """Return the harmonic mean of base and new, seed by seed."""
        halves = [self.measured(method, data, part, shots) for part in ("base", "new")]
        return combined(halves, harmonic_mean)


def _on(result: Result, part: str, of: Accessor) -> float | None:
    scores = result.outcome.scores if result.outcome is not None else ()
    return next((of(score) for score in scores if score.part == part), None)


def sheets_of(
    results: Sequence[Result], images: Mapping[str, ImagePass] | None = None
) -> list[Sheet]:
    """Return a sheet per protocol and model, in plan order; `images` by model."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.cell.protocol, result.cell.model), []).append(result)
    known = images or {}
    return [Sheet(*names, tuple(own), known.get(names[1])) for names, own in groups.items()]


@dataclass(frozen=True)
class Probabilities:
    """How far probabilities can be relied on."""

    ece: float
    """Expected calibration error, in 0…1, with all images in one set of bins."""
    nll: float
    """In nats; mean over the results, as the next."""
    brier: float


def calibration_of(scores: Iterable[PartScore]) -> Probabilities | None:
    """Return the figures over some results; None if one of them does not have them."""
    found = list(scores)
    nll = [one.nll for one in found if one.nll is not None]
    brier = [one.brier for one in found if one.brier is not None]
    if not found or len(nll) < len(found) or len(brier) < len(found):
        return None
    bins = [part for one in found for part in one.reliability]
    return Probabilities(ece_of(bins), math.fsum(nll) / len(nll), math.fsum(brier) / len(brier))


@dataclass(frozen=True)
class Costs:
    """Mean costs of a method's finished cells at its most shots."""

    method: str
    shots: int
    n_cells: int
    queries: float
    probe_queries: float
    text_forwards: float
    image_forwards: float
    seconds: float
    """As if each cell had encoded its images."""
    result_bytes: float
    peak_memory_mb: float | None
    """Largest; None if unknown."""
    needs: str
    """Capabilities; empty if they were not recorded."""


def seconds_alone(outcome: Outcome, images: ImagePass | None) -> float:
    """Return a cell's seconds as if it had encoded its images."""
    per_image = images.seconds_per_image if images else 0.0
    return outcome.seconds + outcome.image_forwards_cached * per_image


def memory_alone(outcome: Outcome, images: ImagePass | None) -> float | None:
    """Return a cell's peak memory in MB as if it had encoded its images; None if unknown."""
    encoding = images.peak_memory_mb if images else None
    own = outcome.peak_memory_mb
    return None if own is None else max(own, encoding or 0.0)


def costs_of(sheet: Sheet, method: str) -> Costs | None:
    """Return a method's costs at its most shots, None without finished cells."""
    finished = [result.cell.shots for result in sheet.of(method) if result.outcome is not None]
    if not finished:
        return None
    shots = max(finished)
    outcomes = sheet.outcomes(method, shots=shots)

    peaks = [memory_alone(one, sheet.images) for one in outcomes]

    def mean(figure: Callable[[Outcome], float]) -> float:
        return math.fsum(map(figure, outcomes)) / len(outcomes)

    return Costs(
        method,
        shots,
        len(outcomes),
        queries=mean(lambda one: one.queries),
        probe_queries=mean(lambda one: one.probe_queries),
        text_forwards=mean(lambda one: one.text_forwards),
        image_forwards=mean(lambda one: one.image_forwards),
        seconds=mean(lambda one: seconds_alone(one, sheet.images)),
        result_bytes=mean(lambda one: one.result_bytes),
        peak_memory_mb=max(filter(None, peaks), default=None),
        needs=outcomes[0].needs,
    )
