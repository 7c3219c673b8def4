"""Compare methods on one data set: a plan from a few settings, each run in its own process.

OUT/compare.md, compare.json, accuracy-*.png   the table and plots; the rest as in bench.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ztune.data.split import ALL
from ztune.errors import ConfigError
from ztune.experiments.bench import RESULTS, Workers, run_cells
from ztune.experiments.plan import (
    DataPlan,
    ExecutionPlan,
    MethodPlan,
    Plan,
    ProtocolPlan,
    check_name,
)
from ztune.experiments.prepare import CellFilter
from ztune.experiments.store import Result, View
from ztune.methods.registry import find_method, method_config, tuned_config
from ztune.progress import SILENCE, Progress
from ztune.run_config import RunConfig, absolute_paths, remarks_on
from ztune.types import Json

PLAN = "compare"
"""Name of the plan in the results."""


@dataclass(frozen=True)
class CompareConfig:
    """The methods and seeds to compare, and their common settings."""

    base: RunConfig
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    pixel_queries: int
    """The budget of methods that encode images with every query."""
    settings: Mapping[str, Mapping[str, Json]]
    """By method."""

    def check(self) -> None:
        """Check names and values without opening any file.

        Raises: ConfigError.
        """
        if self.pixel_queries < 1:
            raise ConfigError(f"`pixel_queries` is {self.pixel_queries}, expected at least 1")
        if unused := [name for name in self.settings if name not in self.methods]:
            raise ConfigError(f"`settings` {unused[0]}.…: {unused[0]} is not among `methods`")
        if self.base.shots == ALL:
            raise ConfigError(f"`shots` is {ALL}, expected a number: seeds draw different images")
        self.base.split_settings()
        for name in self.methods:
            self.method_plan(name)

    def method_plan(self, name: str) -> MethodPlan:
        """Return a method's settings and budget.

        Raises: ConfigError.
        """
        settings, method = absolute_paths(self.settings.get(name, {})), find_method(name)
        config = tuned_config(method, method_config(method, settings, self.base.preset))
        encodes = config is not None and config.program is not None
        queries = self.pixel_queries if encodes else self.base.queries
        curve = int(self.base.snapshots)
        return MethodPlan(name, queries, self.base.preset, curve, settings=settings)

    def reason_against(self, name: str) -> str:
        """Return why a method cannot run with its budget, or an empty text."""
        plan = self.method_plan(name)
        try:
            RunConfig("", "", name, queries=plan.queries, preset=plan.preset,
                      settings=plan.settings).check_method()  # fmt: skip
        except ConfigError as error:
            return str(error)
        return ""


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison, and the methods that could not run."""

    out: Path
    title: str
    config: CompareConfig
    view: View
    n_missing: int
    """Cells without a result."""
    unable: Mapping[str, str]
    """Reason by method."""

    @property
    def results(self) -> tuple[Result, ...]:
        return self.view.results


def run_comparison(
    config: CompareConfig, out: Path, command: str, progress: Progress = SILENCE
) -> Comparison:
    """Run the missing cells of the comparison in the folder `out`.

    `command` is recorded in the report.

    Raises: ConfigError if `out` has other contents; DataError without test images; ZtuneError.
    """
    for remark in remarks_on(config.base):
        progress.remark(remark)
    reasons = {name: config.reason_against(name) for name in config.methods}
    unable = {name: reason for name, reason in reasons.items() if reason}
    able = tuple(name for name in config.methods if name not in unable)
    if not able:
        raise ConfigError(f"{next(iter(unable))}: {next(iter(unable.values()))}")
    started = (out / RESULTS).is_file()
    if not started and (out / "compare.json").is_file():
        raise ConfigError(
            f'"{out}" is a comparison of another version of ztune (use another `out`)'
        )
    root = None if config.base.root is None else Path(config.base.root)
    plan = plan_of(replace(config, methods=able), out)
    view, n_missing = run_cells(
        plan, out, CellFilter(), Workers(), root, None, started, command, progress
    )
    return Comparison(
        out, plan.title, config, view, n_missing + len(unable) * len(config.seeds), unable
    )


def plan_of(config: CompareConfig, out: Path) -> Plan:
    """Return a comparison as a plan."""
    base = config.base
    bundle, data = Path(base.bundle), Path(base.data)
    name = base.data if base.root is not None else _plain_name(data)
    entry = DataPlan(
        path=None if base.root is not None else str(data),
        template=base.templates,
        names=base.names,
        nested=base.nested,
        test_data=base.test_data,
        test_fraction=base.test_fraction,
        split_seed=base.split_seed,
        val=base.val,
        skip_broken=base.skip_broken,
        skip_conflicts=base.skip_conflicts,
    )
    assert base.shots != ALL
    protocol = ProtocolPlan("few-shot", (base.shots,), config.seeds, config.methods, data=(name,))
    execution = ExecutionPlan(
        base.provider, base.threads, base.memory_limit, base.force, isolate=True
    )
    return Plan(
        path=out / f"{PLAN}.toml",
        title=f"{data.name} on {bundle.name}, {base.shots_shown}",
        models={_plain_name(bundle): str(bundle)},
        data={name: entry},
        methods={method: config.method_plan(method) for method in config.methods},
        protocols=(protocol,),
        execution=execution,
    )


def _plain_name(path: Path) -> str:
    """Return a path's last part as a name of a plan."""
    try:
        check_name(path.name, "name")
    except ConfigError:
        return "data"
    return path.name
