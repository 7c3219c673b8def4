"""`ztune bench`: run a plan on one or many machines and write the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ztune.cli.options import add
from ztune.cli.output import Output
from ztune.errors import ConfigError, ZtuneError
from ztune.io.schema import plain
from ztune.printing import quoted
from ztune.types import Json

if TYPE_CHECKING:
    from ztune.experiments.bench import PlanResults
    from ztune.experiments.plan import Plan

USAGE = ("PLAN.toml --out OUT [options]", "report OUT [--out DIR]")
EXAMPLE = """\
  ztune bench plans/smoke.toml --out runs/smoke
  ztune bench plans/zip-fewshot.toml --model bundles/vit-b-16 --root /data --out runs/zip \\
      --workers 2
  ztune bench plans/zip-fewshot.toml --model bundles/vit-b-16 --root /data --out runs/zip \\
      --resume
  ztune bench report runs/zip"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="PLAN.toml|report OUT", help="plan to run, or results to show"
    )
    parser.add_argument("--out", type=Path, metavar="OUT", help="folder for results")
    add(parser, "--root")
    parser.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]BUNDLE",
        help="replace the plan's models; repeat with names",
    )
    parser.add_argument("--resume", action="store_true", help="run only missing and failed cells")
    parser.add_argument("--workers", type=int, metavar="N", help="worker processes (default: 1)")
    parser.add_argument("--ray", metavar="ADDRESS", help="Ray cluster: auto, HOST:PORT or local")
    parser.add_argument(
        "--gpus", type=float, metavar="SHARE", help="GPUs per Ray worker, such as 0.25 (default: 0)"
    )
    add(parser, "--provider", default=None, help="provider (default: the plan's)")
    add(parser, "--max-pixels")
    for option, what in (
        ("--methods", "methods"), ("--data", "data sets"), ("--shots", "shots"),
        ("--seeds", "seeds"),
    ):  # fmt: skip
        parser.add_argument(
            option,
            metavar="LIST",
            action="append",
            help=f"run only these {what} of the plan, such as a,b",
        )


def run(arguments: argparse.Namespace, output: Output) -> None:
    if arguments.words[0] == "report":
        _report(arguments, output)
        return
    if len(arguments.words) > 1:
        raise ConfigError(
            "expected one plan (ztune bench PLAN.toml --out OUT) or one folder of results (ztune "
            "bench report OUT)"
        )
    if arguments.out is None:
        raise ConfigError("--out OUT is required: the folder for results")
    _run_plan(arguments, output)


def _report(arguments: argparse.Namespace, output: Output) -> None:
    from ztune.experiments.bench import write_reports

    others = [option for name, option in arguments.given.items() if name != "out"]
    if len(arguments.words) != 2 or others:
        raise ConfigError(
            "bench report takes only a folder of results and --out: ztune bench report OUT --out "
            f"DIR{f' (leave out {others[0]})' if others else ''}"
        )
    files = [str(file) for file in write_reports(Path(arguments.words[1]), arguments.out)]
    output.result({"files": list(files)}, files)


def _run_plan(arguments: argparse.Namespace, output: Output) -> None:
    from ztune.experiments.bench import RESULTS, Workers, run_plan

    plan = _plan(arguments)
    n_workers = 1 if arguments.workers is None else arguments.workers
    out = arguments.out.resolve()
    try:
        results = run_plan(
            plan,
            out,
            methods=_words(arguments.methods),
            data=_words(arguments.data),
            shots=_numbers(arguments.shots, "--shots"),
            seeds=_numbers(arguments.seeds, "--seeds"),
            workers=Workers(n_workers, arguments.ray, arguments.gpus),
            root=arguments.root,
            provider=arguments.provider,
            resume=arguments.resume,
            command=arguments.command,
            progress=output,
        )
    except KeyboardInterrupt:
        started = (out / RESULTS).exists()
        raise KeyboardInterrupt(
            "resume with the same command and --resume" if started else "no run was started"
        ) from None
    _print_results(results, arguments.out, output)
    if results.n_missing:
        raise ZtuneError(
            f"{results.n_missing} cell(s) have no result, see above (retry with --resume)"
        )


def _print_results(found: PlanResults, out: Path, output: Output) -> None:
    """Print the counts of the plan's cells and the path of the report."""
    n_finished = sum(one.outcome is not None for one in found.cells)
    failed = {str(one.cell): one.reason for one in found.cells if one.reason}
    lines = [f"failed: {cell}: {reason}" for cell, reason in failed.items()]
    lines.append(f"{n_finished} of {len(found.cells)} cells finished, {len(failed)} failed")
    lines.append(f"{found.report[0]} (rewrite it with: ztune bench report {quoted(out)})")
    document: dict[str, Json] = {
        "cells": len(found.cells),
        "finished": n_finished,
        "failed": len(failed),
        "failures": [{"cell": cell, "reason": reason} for cell, reason in failed.items()],
        "left_out": {name: plain(one) for name, one in found.view.left_out.items()},
        "report": [str(file) for file in found.report],
    }
    output.result(document, lines)


def _plan(arguments: argparse.Namespace) -> Plan:
    """Return the plan, with --model replacing its models.

    Raises: ConfigError.
    """
    from ztune.experiments.plan import check_name, read_plan

    plan = read_plan(Path(arguments.words[0]))
    if arguments.root is not None and not arguments.root.is_dir():
        raise ConfigError(f'--root "{arguments.root}" is not a folder')
    named: dict[str, str] = {}
    for word in arguments.model or []:
        name, equals, bundle = word.partition("=")
        path = Path(bundle if equals else word).resolve()
        name = name if equals else path.name
        check_name(name, f'--model "{word}"')
        if not bundle and equals:
            raise ConfigError(f'--model "{word}" has no bundle (expected --model NAME=BUNDLE)')
        if name in named:
            raise ConfigError(
                f'duplicate --model name "{name}" (use different names: --model NAME=BUNDLE)'
            )
        named[name] = str(path)
    if not named and not plan.models:
        raise ConfigError(
            f'plan "{plan.path}" names no model: add --model BUNDLE (from ztune export)'
        )
    return replace(plan, models=named or plan.models)


def _words(given: Sequence[str] | None) -> list[str] | None:
    """Return the values of a repeatable, comma-separated option."""
    return None if given is None else [w.strip() for part in given for w in part.split(",")]


def _numbers(given: Sequence[str] | None, option: str) -> list[int] | None:
    words = _words(given)
    for word in words or ():
        if not word.isdecimal():
            raise ConfigError(f'{option}: invalid number "{word}" (expected a list such as 1,2)')
    return None if words is None else [int(word) for word in words]
