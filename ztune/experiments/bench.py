"""Run a plan on one or many machines, into a folder of results and a report.

OUT/results.sqlite   plans and results                OUT/report/PLAN/   tables and plots
OUT/splits/          the test images of each part     OUT/runs/          see worker.py
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runtimes.providers import resolve
from ztune.errors import ConfigError
from ztune.experiments.csv_rows import cell_rows
from ztune.experiments.driver import Driver
from ztune.experiments.executors import Cluster, Executor, Joblib, Ray, Serial
from ztune.experiments.isolated import Isolated
from ztune.experiments.plan import Plan, check_name, read_plan
from ztune.experiments.prepare import RECIPE, CellFilter, Preparation, Prepared
from ztune.experiments.report import image_passes, write_report
from ztune.experiments.store import Result, Store, View
from ztune.experiments.summary import names_of
from ztune.experiments.worker import Settings, clear_attempts
from ztune.io.children import empty_working_folder
from ztune.io.files import inside, write_json
from ztune.io.kinds import wrong_kind
from ztune.io.schema import T
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

        Raises: ConfigError for a missing package or an unreachable cluster, or several workers of
            isolated runs.
        """
        if settings.isolated:
            if self.n > 1 or self.ray is not None:
                raise ConfigError(
                    "`isolate` of the plan runs one process at a time: omit `workers`"
                )
            return Isolated(settings)
        if self.ray is not None:
            return Ray(settings, Cluster(self.ray, self.n, self.gpus or 0.0))
        return Serial(settings) if self.n == 1 else Joblib(settings, self.n)


@dataclass(frozen=True)
class PlanResults:
    """A plan's results and report."""

    view: View
    report: Sequence[Path]
    """Its files, report.md first."""
    n_missing: int
    """Requested cells without a result."""

    @property
    def cells(self) -> Sequence[Result]:
        return self.view.results

    def rows(self) -> list[dict[str, object]]:
        """Return a flat row per cell, as in cells.csv: for a data frame."""
        names = names_of(self.view.document)
        return list(cell_rows(self.view.results, names, image_passes(self.view)))


def run_plan(
    plan: Plan | Path | str,
    out: Path | str,
    *,
    methods: Sequence[str] | None = None,
    data: Sequence[str] | None = None,
    models: Mapping[str, Path | str] | None = None,
    shots: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    workers: Workers | int = 1,
    root: Path | str | None = None,
    provider: str | None = None,
    resume: bool = False,
    command: str = "",
    progress: Progress = SILENCE,
) -> PlanResults:
    """Run the requested cells of a plan into the folder `out`, and write the report.

    `plan` is a TOML file (docs/bench.md). `methods`, `data`, `shots` and `seeds` select cells of it
    (default: all). `models` has bundles by name, which replace the plan's. `workers` is a number of
    processes or `Workers`, `root` has the named data sets, `provider` replaces the plan's. With
    `resume`, finished cells keep their results. `command` is recorded.

    >>> import ztune
    >>> part = {"methods": ["gda"], "shots": [1, 4], "seeds": [1]}
    >>> results = ztune.run_plan("plans/smoke.toml", "runs/smoke", **part)
    >>> results.n_missing, [row["shots"] for row in results.rows() if row["status"] == "finished"]
    (0, [1, 4, 4])

    Raises: ConfigError, DataError, FormatError for invalid input; ZtuneError if all workers are
        lost.
    """
    plan = plan if isinstance(plan, Plan) else read_plan(Path(plan))
    if models is not None:
        for name in models:
            check_name(name, f'`models` "{name}"')
        named = {name: str(Path(path).resolve()) for name, path in models.items()}
        plan = replace(plan, models=named)
    if not plan.models:
        raise ConfigError(f'plan "{plan.path}" names no model: give `models`')
    out = Path(out).resolve()
    report = _report_folder(out, plan.name)
    workers = Workers(workers) if isinstance(workers, int) else workers
    root = None if root is None else Path(root)
    only = CellFilter(
        _listed("methods", methods),
        _listed("data", data),
        _listed("shots", shots),
        _listed("seeds", seeds),
    )
    only.check(plan)
    view, n_missing = run_cells(plan, out, only, workers, root, provider, resume, command, progress)
    return PlanResults(view, write_report(view, report), n_missing)


def _listed(name: str, values: Sequence[T] | None) -> tuple[T, ...] | None:
    """Return the requested values as a tuple; None: all.

    Raises: ConfigError for a single value.
    """
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ConfigError(f"`{name}` is {values!r}, expected a list")
    return tuple(values)


def run_cells(
    plan: Plan,
    out: Path,
    only: CellFilter,
    workers: Workers,
    root: Path | None,
    provider: str | None,
    resume: bool,
    command: str,
    progress: Progress,
) -> tuple[View, int]:
    """Run a plan as `run_plan` does, without a report.

    Return its results and the number of requested cells without one.
    """
    # Workers run in another working folder, so every path is absolute.
    plan, out = replace(plan, path=plan.path.resolve()), out.resolve()
    root = None if root is None else root.resolve()
    _check_out(out, resume)
    execution = plan.execution
    asked = provider or execution.provider
    if workers.ray is not None and asked == "auto":
        raise ConfigError(
            "Ray workers may have other devices than this machine: set `provider=cpu` or cuda"
        )
    found, why = (asked, "") if workers.ray is not None else resolve(asked)
    if why:
        progress.remark(why)
    settings = Settings(out, found, execution.threads, execution.memory_limit, execution.isolate)
    try:
        with empty_working_folder(), contextlib.closing(workers.executor(settings)) as executor:
            prepared = Preparation(plan, only, root, out, found, progress).prepare()
            store = _save_plan(out, plan, prepared, found, progress)
            session = store.begin_session(_session_document(executor, found, command))
            n_missing = Driver(prepared, only, store, session, executor, progress).run()
    except KeyboardInterrupt:
        clear_attempts(out)
        raise
    # Another process may have replaced the plan in the meantime.
    own = prepared.cells if all(prepared.cells.values()) else None
    return store.view(plan.name, own), n_missing


def write_reports(results: Path, folder: Path | None = None) -> list[Path]:
    """Write the report of every plan in a folder of results, below it or in `folder`.

    Raises: FormatError.
    """
    if not (results / RESULTS).is_file():
        raise wrong_kind(results, "bench")
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
    if earlier not in (None, plan.title) and plan.path.is_file():
        warn(
            f'"{plan.title}" replaces "{earlier}" in the report: both plan files are named '
            f"{plan.name}"
        )
    store.set_plan(plan.name, {**document, "provider": provider, "recipe": RECIPE}, prepared.cells)
    n_left_out = store.view(plan.name).n_left_out
    if n_left_out and all(prepared.cells.values()):
        progress.remark(
            f"{n_left_out} result(s) in {store.path.name} belong to no plan and are kept: their "
            "settings, images or version differ"
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
