"""`ztune bench`: a plan of many cells carried out, on one machine or many, and the report."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ztune.cli.output import Output
from ztune.errors import ConfigError, ZtuneError
from ztune.io.children import empty_working_folder
from ztune.io.files import inside, write_json
from ztune.types import Json

if TYPE_CHECKING:
    from ztune.experiments.executors import Executor
    from ztune.experiments.plan import Plan
    from ztune.experiments.prepare import Only, Prepared
    from ztune.experiments.store import Result, Store
    from ztune.experiments.worker import Settings

EXAMPLE = """\
  ztune bench plans/smoke.toml --out runs/smoke
  ztune bench plans/zip-fewshot.toml --model bundles/vit-b-16 --root /data --out runs/zip \\
      --workers 2
  ztune bench plans/zip-fewshot.toml --model bundles/vit-b-16 --root /data --out runs/zip \\
      --resume
  ztune bench report runs/zip"""

_RESULTS = "results.sqlite"
_REPORT = "report"
_OPTIONS = (
    "root", "model", "resume", "workers", "ray", "gpus", "provider", "methods", "data", "shots",
    "seeds",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="PLAN.toml|report OUT", help="carry a plan out, or report on it"
    )
    parser.add_argument("--out", type=Path, metavar="OUT", help="folder for results")
    parser.add_argument("--root", type=Path, metavar="DIR", help="holds data sets known by name")
    parser.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]BUNDLE",
        help="bundle in place of the plan's; several with names",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on: what is missing or failed, and nothing else"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: 1)")
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="workers are Ray's: auto, HOST:PORT, or local"
    )
    parser.add_argument(
        "--gpus", type=float, metavar="SHARE", help="of a Ray worker, as in 0.25 (default: 0)"
    )
    parser.add_argument("--provider", help="auto, cpu, cuda or tensorrt (default: the plan's)")
    for name, what in (
        ("methods", "methods"), ("data", "data sets"), ("shots", "shots"), ("seeds", "seeds"),
    ):  # fmt: skip
        parser.add_argument(
            f"--{name}",
            metavar="LIST",
            action="append",
            help=f"only cells with these {what} of the plan, as in a,b",
        )


def run(arguments: argparse.Namespace, output: Output) -> None:
    if arguments.words[0] == "report":
        _report(arguments, output)
        return
    if len(arguments.words) > 1:
        raise ConfigError(
            "bench takes one plan, or the word report and the folder of results: ztune bench "
            "PLAN.toml --out OUT, ztune bench report OUT"
        )
    if arguments.out is None:
        raise ConfigError("bench needs --out OUT, the folder for results")
    _carry_out(arguments, output)


def _report(arguments: argparse.Namespace, output: Output) -> None:
    from ztune.experiments.report import write_report
    from ztune.experiments.store import Store

    others = [name for name in _OPTIONS if getattr(arguments, name)]
    if len(arguments.words) != 2 or others:
        raise ConfigError(
            "bench report takes the folder of results, and where the report goes: ztune bench "
            f"report OUT --out DIR{' (leave out --' + others[0] + ')' if others else ''}"
        )
    results = Path(arguments.words[1])
    store = Store.existing(results / _RESULTS)
    folders = {name: _report_folder(results, name, arguments.out) for name in store.plans()}
    files = [
        file for name, folder in folders.items() for file in write_report(store.view(name), folder)
    ]
    output.result({"files": [str(file) for file in files]}, [str(file) for file in files])


def _report_folder(results: Path, plan: str, named: Path | None = None) -> Path:
    """Return where a plan's report goes: into a folder of its name below what the user named.

    Raises: FormatError for a plan whose name, from a file of results, is no folder's name there.
    """
    where = f'report of "{results}"'
    return inside(named or inside(results, _REPORT, where), plan, where)


def _carry_out(arguments: argparse.Namespace, output: Output) -> None:
    from runtimes.providers import resolve
    from ztune.experiments.driver import Driver
    from ztune.experiments.prepare import Preparation
    from ztune.experiments.report import write_report
    from ztune.experiments.worker import Settings, forget_deaths

    plan = _plan(arguments)
    # Workers do not run in the working folder: from here on every path is absolute.
    plan = replace(plan, path=plan.path.resolve())
    root = None if arguments.root is None else arguments.root.resolve()
    only = _only(arguments, plan)
    out = arguments.out.resolve()
    _check_workers(arguments)
    _check_out(out, arguments.resume)
    folder = _report_folder(out, plan.name)
    asked = arguments.provider or plan.execution.provider
    if arguments.ray is not None and asked == "auto":
        raise ConfigError(
            "Ray's workers may have other devices than this machine: name --provider cpu or cuda"
        )
    provider = asked
    if arguments.ray is None:
        provider, why = resolve(asked)
        output.remark(why)
    settings = Settings(out, provider, plan.execution.threads, plan.execution.memory_limit)
    try:
        with empty_working_folder(), contextlib.closing(_executor(arguments, settings)) as executor:
            preparation = Preparation(plan, only, root, out, provider, output)
            prepared = preparation.prepare()
            store = _begun(out, plan, prepared, provider, output)
            session = store.begin(_circumstances(executor, provider))
            lacking = Driver(prepared, only, store, session, executor, output).run()
    except KeyboardInterrupt:
        forget_deaths(out)
        begun = (out / _RESULTS).exists()
        raise KeyboardInterrupt(
            "go on with the same command and --resume" if begun else "nothing was begun"
        ) from None
    view = store.view(plan.name)
    files = write_report(view, folder)
    _tell(view.results, arguments.out, files, output)
    if lacking:
        raise ZtuneError(f"{lacking} cell(s) have no result, see above; --resume tries them again")


def _begun(out: Path, plan: Plan, prepared: Prepared, provider: str, output: Output) -> Store:
    """Write down what is to be done."""
    from ztune.experiments.prepare import RECIPE
    from ztune.experiments.store import Store

    (out / "splits").mkdir(parents=True, exist_ok=True)
    store = Store(out / _RESULTS)  # first: from here on it is a bench to go on with
    for file, split in prepared.tested.items():
        write_json(file, split.to_json())
    document = plan.to_json(prepared.digests, prepared.found)
    earlier = store.title_of(plan.name)
    if earlier not in (None, plan.title):
        output.warn(
            f'"{plan.title}" takes the place of "{earlier}" in the report: their files are both '
            f"called {plan.name}"
        )
    store.want(plan.name, {**document, "provider": provider, "recipe": RECIPE}, prepared.cells)
    n_left_out = store.view(plan.name).n_left_out
    if n_left_out and all(prepared.cells.values()):
        output.remark(
            f"{n_left_out} result(s) in {store.path.name} are of no plan any more: pictures, "
            "settings or the plan have changed since"
        )
    return store


def _tell(results: Sequence[Result], out: Path, files: Sequence[Path], output: Output) -> None:
    """Give the counts of the plan's cells, and where the report lies."""
    counts = {
        "cells": len(results),
        "finished": sum(one.outcome is not None for one in results),
        "failed": sum(bool(one.reason) for one in results),
    }
    failed: list[Json] = [
        {"cell": str(one.cell), "reason": one.reason} for one in results if one.reason
    ]
    lines = [f"failed: {one.cell}: {one.reason}" for one in results if one.reason]
    lines.append(
        f"{counts['finished']} of {counts['cells']} cells finished, {counts['failed']} failed"
    )
    again = shlex.join(["ztune", "bench", "report", str(out)])
    lines.append(f"{files[0]} (make it anew with: {again})")
    document: dict[str, Json] = {**counts, "failures": failed}
    output.result({**document, "report": [str(file) for file in files]}, lines)


def _plan(arguments: argparse.Namespace) -> Plan:
    """Return the plan, with the models that were named in place of its own.

    Raises: ConfigError.
    """
    from ztune.experiments.plan import check_name, read_plan

    plan = read_plan(Path(arguments.words[0]))
    if arguments.root is not None and not arguments.root.is_dir():
        raise ConfigError(f'--root "{arguments.root}" is no folder')
    named: dict[str, str] = {}
    for word in arguments.model or []:
        name, equals, bundle = word.partition("=")
        path = Path(bundle if equals else word).resolve()
        name = name if equals else path.name
        check_name(name, f'--model "{word}"')
        if not bundle and equals:
            raise ConfigError(f'--model "{word}" names no bundle: --model NAME=BUNDLE')
        if name in named:
            raise ConfigError(f'--model names "{name}" twice (give names: --model NAME=BUNDLE)')
        named[name] = str(path)
    if not named and not plan.models:
        raise ConfigError(
            f'plan "{plan.path}" leaves the model to you: add --model BUNDLE (from ztune export)'
        )
    return replace(plan, models=named or plan.models)


def _only(arguments: argparse.Namespace, plan: Plan) -> Only:
    """Return which cells are asked for.

    Raises: ConfigError for a word that the plan does not have.
    """
    from ztune.experiments.prepare import Only

    known: dict[str, list[str]] = {
        "methods": [*plan.methods],
        "data": [*dict.fromkeys(name for p in plan.protocols for name in p.sources)],
        "shots": [*dict.fromkeys(str(n) for p in plan.protocols for n in p.shots)],
        "seeds": [*dict.fromkeys(str(n) for p in plan.protocols for n in p.seeds)],
    }
    chosen: dict[str, tuple[str, ...] | None] = {}
    for name, there in known.items():
        given = getattr(arguments, name)
        words = None
        if given is not None:
            words = tuple(word.strip() for part in given for word in part.split(","))
        for word in words or ():
            if word not in there:
                raise ConfigError(f'--{name}: the plan has no "{word}"; it has: {", ".join(there)}')
        chosen[name] = words
    return Only(
        chosen["methods"], chosen["data"], _numbers(chosen["shots"]), _numbers(chosen["seeds"])
    )


def _numbers(words: Sequence[str] | None) -> tuple[int, ...] | None:
    return None if words is None else tuple(int(word) for word in words)


def _check_workers(arguments: argparse.Namespace) -> None:
    if arguments.workers is not None and arguments.workers < 1:
        raise ConfigError(f"--workers is {arguments.workers}, expected at least 1")
    if arguments.gpus is not None and arguments.ray is None:
        raise ConfigError("--gpus goes with --ray")
    share = arguments.gpus
    if share is not None and not (0 <= share <= 1 or (share > 1 and share.is_integer())):
        raise ConfigError(f"--gpus is {share:g}, expected 0 to 1, or a whole number")


def _check_out(out: Path, resume: bool) -> None:
    """See that there are results to go on with, or none yet.

    Raises: ConfigError, and FormatError for results that this program cannot go on with.
    """
    from ztune.experiments.store import Store

    results = out / _RESULTS
    if resume:
        if not results.is_file():
            raise ConfigError(f'--resume: "{out}" has no {_RESULTS} to go on with')
        Store.existing(results)
        return
    if results.exists():
        raise ConfigError(
            f'"{out}" has results already (add --resume to go on with them, or name another --out)'
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f'output "{out}" exists and is not empty (name another --out)')


def _executor(arguments: argparse.Namespace, settings: Settings) -> Executor:
    from ztune.experiments.executors import Cluster, Joblib, Ray, Serial

    workers = arguments.workers or 1
    if arguments.ray is not None:
        return Ray(settings, Cluster(arguments.ray, workers, arguments.gpus or 0.0))
    return Serial(settings) if workers == 1 else Joblib(settings, workers)


def _circumstances(executor: Executor, provider: str) -> dict[str, Json]:
    from ztune.system import commit, machine, versions

    return {
        "began": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["ztune", *sys.argv[1:]]),
        "commit": commit(),
        "executor": executor.name,
        "workers": executor.workers,
        "provider": provider,
        "versions": dict(versions()),
        "machine": dict(machine()),
    }
