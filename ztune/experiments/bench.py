"""Run a plan on one or many machines, into a folder of results and a report.

OUT/results.sqlite   plans and results                OUT/report/PLAN/   tables and plots
OUT/splits/          the test images of each part     OUT/runs/          see worker.py
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runtimes.providers import resolve
from ztune.errors import ConfigError
from ztune.experiments.driver import Driver
from ztune.experiments.executors import Cluster, Executor, Joblib, Ray, Serial
from ztune.experiments.plan import Plan
from ztune.experiments.prepare import RECIPE, CellFilter, Preparation, Prepared
from ztune.experiments.report import write_report
from ztune.experiments.store import Result, Store
from ztune.experiments.worker import Settings, clear_attempts
from ztune.io.children import empty_working_folder
from ztune.io.files import inside, write_json
from ztune.progress import SILENCE, Progress, warn
from ztune.system import commit, machine, versions
from ztune.types import Json

RESULTS = "results.sqlite"
_REPORT = "report"


@dataclass(frozen=True)
class Workers:
    """Where a plan runs: in this process, in processes of this machine, or on a Ray cluster."""

    n: int = 1
    ray: str | None = None
    """Address for ray.init; None: this machine."""
    gpus: float | None = None
    """Per Ray worker."""

    def __post_init__(self) -> None:
        share = self.gpus
        if self.n < 1:
            raise ConfigError(f"`workers` is {self.n}, expected at least 1")
        if share is not None and self.ray is None:
            raise ConfigError("`gpus` applies only with `ray`")
        if share is not None and not (0 <= share <= 1 or (share > 1 and share.is_integer())):
            raise ConfigError(f"`gpus` is {share:g}, expected 0 to 1, or an integer")

    def executor(self, settings: Settings) -> Executor:
        """Start the workers.

        Raises: ConfigError for a missing package or an unreachable cluster.
        """
        if self.ray is not None:
            return Ray(settings, Cluster(self.ray, self.n, self.gpus or 0.0))
        return Serial(settings) if self.n == 1 else Joblib(settings, self.n)


@dataclass(frozen=True)
class PlanResults:
    """A plan's results and report."""

    cells: Sequence[Result]
    report: Sequence[Path]
    n_missing: int
    """Requested cells without a result."""


def run_plan(
    plan: Plan,
    out: Path,
    *,
    only: CellFilter,
    workers: Workers,
    root: Path | None = None,
    provider: str | None = None,
    resume: bool = False,
    command: str = "",
    progress: Progress = SILENCE,
) -> PlanResults:
    """Run the requested cells of a plan into the folder `out`, and write the report.

    `root` has the named data sets, `provider` replaces the plan's, `command` is recorded.

    Raises: ConfigError, DataError, FormatError for invalid input; ZtuneError if all workers are
        lost.
    """
    # Workers run in another working folder, so every path is absolute.
    plan, out = replace(plan, path=plan.path.resolve()), out.resolve()
    root = None if root is None else root.resolve()
    _check_out(out, resume)
    report = _report_folder(out, plan.name)
    asked = provider or plan.execution.provider
    if workers.ray is not None and asked == "auto":
        raise ConfigError(
            "Ray workers may have other devices than this machine: set `provider=cpu` or cuda"
        )
    found, why = (asked, "") if workers.ray is not None else resolve(asked)
    if why:
        progress.remark(why)
    settings = Settings(out, found, plan.execution.threads, plan.execution.memory_limit)
    try:
        with empty_working_folder(), contextlib.closing(workers.executor(settings)) as executor:
            prepared = Preparation(plan, only, root, out, found, progress).prepare()
            store = _save_plan(out, plan, prepared, found, progress)
            session = store.begin_session(_session_document(executor, found, command))
            n_missing = Driver(prepared, only, store, session, executor, progress).run()
    except KeyboardInterrupt:
        clear_attempts(out)
        raise
    view = store.view(plan.name)
    return PlanResults(view.results, write_report(view, report), n_missing)


def write_reports(results: Path, folder: Path | None = None) -> list[Path]:
    """Write the report of every plan in a folder of results, below it or in `folder`.

    Raises: FormatError.
    """
    store = Store.existing(results / RESULTS)
    folders = {name: _report_folder(results, name, folder) for name in store.plans()}
    return [file for name, own in folders.items() for file in write_report(store.view(name), own)]


def _report_folder(results: Path, plan: str, named: Path | None = None) -> Path:
    """Return the folder of a plan's report.

    Raises: FormatError for a plan's name, from a file of results, that is not a folder name.
    """
    where = f'report of "{results}"'
    return inside(named or inside(results, _REPORT, where), plan, where)


def _check_out(out: Path, resume: bool) -> None:
    """Check that there are results to resume, or none yet.

    Raises: ConfigError; FormatError for unreadable results.
    """
    results = out / RESULTS
    if resume:
        if not results.is_file():
            raise ConfigError(f'`resume`: "{out}" has no {RESULTS}')
        Store.existing(results)
        return
    if results.exists():
        raise ConfigError(
            f'"{out}" already has results (add `resume` to continue, or use another `out`)'
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f'output "{out}" exists and is not empty (use another `out`)')


def _save_plan(
    out: Path, plan: Plan, prepared: Prepared, provider: str, progress: Progress
) -> Store:
    """Record the plan and its cells."""
    (out / "splits").mkdir(parents=True, exist_ok=True)
    store = Store(out / RESULTS)  # first: from here on the bench can be resumed
    for file, split in prepared.tested.items():
        write_json(file, split.to_json())
    document = plan.to_json(prepared.digests, prepared.found)
    earlier = store.title_of(plan.name)
    if earlier not in (None, plan.title):
        warn(
            f'"{plan.title}" replaces "{earlier}" in the report: both plan files are named '
            f"{plan.name}"
        )
    store.set_plan(plan.name, {**document, "provider": provider, "recipe": RECIPE}, prepared.cells)
    n_left_out = store.view(plan.name).n_left_out
    if n_left_out and all(prepared.cells.values()):
        progress.remark(
            f"{n_left_out} result(s) in {store.path.name} belong to no plan: images, settings, the "
            "plan or the splitter have changed"
        )
    return store


def _session_document(executor: Executor, provider: str, command: str) -> dict[str, Json]:
    return {
        "began": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit(),
        "executor": executor.name,
        "workers": executor.workers,
        "provider": provider,
        "versions": dict(versions()),
        "machine": dict(machine()),
    }
