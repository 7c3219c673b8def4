"""`ztune bench`: a plan of many cells carried out, on one machine or many, and the report."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ztune.cli.output import Output
from ztune.errors import ConfigError, ZtuneError
from ztune.types import Json

if TYPE_CHECKING:
    from ztune.bench.plan import Plan
    from ztune.bench.store import Store
    from ztune.cli.bench_prepare import Only
    from ztune.cli.bench_worker import Settings
    from ztune.cli.executors import Executor

EXAMPLE = """\
  ztune bench plans/smoke.toml --out runs/smoke
  ztune bench plans/zip-fewshot.toml --model bundles/vit-b-16 --root /data --out runs/zip \\
      --workers 2
  ztune bench plans/zip-fewshot.toml --model bundles/vit-b-16 --root /data --out runs/zip \\
      --resume
  ztune bench report runs/zip"""

_RESULTS = "results.sqlite"


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
            f"--{name}", metavar="LIST", help=f"only cells with these {what} of the plan, as in a,b"
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
    from ztune.bench.report import write_report
    from ztune.bench.store import Store

    if len(arguments.words) != 2:
        raise ConfigError("bench report takes the folder of results: ztune bench report OUT")
    results = Path(arguments.words[1])
    store = Store.existing(results / _RESULTS)
    files = write_report(store, arguments.out or results / "report")
    output.result({"files": [str(file) for file in files]}, [str(file) for file in files])


def _carry_out(arguments: argparse.Namespace, output: Output) -> None:
    from runtimes.providers import resolve
    from ztune.bench.report import write_report
    from ztune.cli.bench_course import Course
    from ztune.cli.bench_prepare import Preparation
    from ztune.cli.bench_worker import Settings

    plan = _plan(arguments)
    only = _only(arguments, plan)
    out = arguments.out.resolve()
    _check_workers(arguments)
    store = _store(out, arguments.resume)
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
    prepared = Preparation(plan, arguments.root, out, provider, output).prepare()
    store.want(plan.to_json(), prepared.cells)
    executor = _executor(arguments, settings)
    try:
        session = store.begin(_circumstances(executor, provider))
        failed = Course(prepared, only, store, session, executor, output).run()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("go on with the same command and --resume") from None
    finally:
        executor.close()
    files = write_report(store, out / "report")
    _tell(store, arguments.out, files, output)
    if failed:
        raise ZtuneError(f"{failed} cell(s) have no result, see above; --resume tries them again")


def _tell(store: Store, out: Path, files: Sequence[Path], output: Output) -> None:
    """Give the counts of the plan's cells, and where the report lies."""
    results = store.results()
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
    lines.append(f"{out / 'report' / 'report.md'} (make it anew with: ztune bench report {out})")
    document: dict[str, Json] = {**counts, "failures": failed}
    output.result({**document, "report": [str(file) for file in files]}, lines)


def _plan(arguments: argparse.Namespace) -> Plan:
    """Return the plan, with the models that were named in place of its own.

    Raises: ConfigError.
    """
    from ztune.bench.plan import read_plan

    plan = read_plan(Path(arguments.words[0]))
    named: dict[str, str] = {}
    for word in arguments.model or []:
        name, equals, bundle = word.partition("=")
        path = Path(bundle if equals else word).resolve()
        name = name if equals else path.name
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
    from ztune.cli.bench_prepare import Only

    known: dict[str, list[str]] = {
        "methods": [*plan.methods],
        "data": [*dict.fromkeys(name for p in plan.protocols for name in p.sources)],
        "shots": [*dict.fromkeys(str(n) for p in plan.protocols for n in p.shots)],
        "seeds": [*dict.fromkeys(str(n) for p in plan.protocols for n in p.seeds)],
    }
    chosen: dict[str, tuple[str, ...] | None] = {}
    for name, there in known.items():
        given = getattr(arguments, name)
        words = None if given is None else tuple(word.strip() for word in given.split(","))
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
    if arguments.gpus is not None and arguments.gpus < 0:
        raise ConfigError(f"--gpus is {arguments.gpus:g}, expected 0 or more")


def _store(out: Path, resume: bool) -> Store:
    """Take up the results, or begin them.

    Raises: ConfigError where there are some and nobody said to go on, or none to go on with.
    """
    from ztune.bench.store import Store

    results = out / _RESULTS
    if resume:
        if not results.is_file():
            raise ConfigError(f'--resume: "{out}" has no {_RESULTS} to go on with')
        return Store.existing(results)
    if results.exists():
        raise ConfigError(
            f'"{out}" has results already (add --resume to go on with them, or name another --out)'
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f'output "{out}" exists and is not empty (name another --out)')
    out.mkdir(parents=True, exist_ok=True)
    return Store(results)


def _executor(arguments: argparse.Namespace, settings: Settings) -> Executor:
    from ztune.cli.executors import Cluster, Joblib, Ray, Serial

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
