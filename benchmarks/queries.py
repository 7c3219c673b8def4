"""Measure how many queries each method needs to reach ZIP's 5,000-query accuracy.

    python -m benchmarks.queries run BUNDLE --images FOLDER --out OUT
    python -m benchmarks.queries report OUT --docs docs/results/queries
    python -m benchmarks.queries run BUNDLE --images FOLDER --out OUT --labels study
    python -m benchmarks.queries study OUT

`run` runs the cells that OUT lacks, label by label and task by task. It may be stopped and resumed,
and several processes may share an OUT. `report` makes tables and plots of finished cells, `study`
the table of single changed settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import ROOT, say
from benchmarks.query_cells import SEEDS, Cell
from benchmarks.query_driver import Driver
from benchmarks.query_labels import EVERY, LABELS, STUDY_TASKS, VARIANTS
from benchmarks.query_report import write_report
from benchmarks.query_study import read_study, study_table
from benchmarks.query_tasks import TASKS
from ztune.errors import ConfigError, ZtuneError
from ztune.methods.registry import find_method
from ztune.system import commit


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run cells")
    run.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="for all but digits")
    run.add_argument("--images", type=Path, metavar="DIR", help="folder of the image sets")
    run.add_argument("--out", type=Path, required=True, metavar="OUT")
    run.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        default=ROOT / ".cache" / "benchmarks" / "images",
        help="folder of derived image sets, which are written once",
    )
    run.add_argument("--tasks", help=f"of {', '.join(TASKS)}")
    run.add_argument(
        "--labels", help=f"of {', '.join(LABELS)}; or study: {len(VARIANTS)} variants of ogn's"
    )
    run.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    report = verbs.add_parser("report", help="make tables and plots")
    report.add_argument("out", type=Path, metavar="OUT")
    report.add_argument("--docs", type=Path, required=True, metavar="DIR")
    study = verbs.add_parser("study", help="print the table of the study's variants")
    study.add_argument("out", type=Path, metavar="OUT")
    arguments = parser.parse_args(words)
    try:
        return {"run": _run, "report": _report, "study": _study}[arguments.verb](arguments)
    except ZtuneError as error:
        say(f"error: {error}")
        return 1


def _run(arguments: argparse.Namespace) -> int:
    tasks = _chosen(arguments.tasks, tuple(TASKS), "tasks")
    if arguments.labels == "study":
        tasks = _chosen(arguments.tasks or ",".join(STUDY_TASKS), tuple(TASKS), "tasks")
        labels = tuple(VARIANTS)
    else:
        labels = _chosen(arguments.labels or ",".join(LABELS), tuple(EVERY), "labels")
    seeds = [int(word) for word in arguments.seeds.split(",")]
    for label in labels:
        find_method(EVERY[label].method)  # report an unknown one now
    driver = Driver(arguments.out, arguments.work, arguments.images, arguments.bundle, commit())
    cells = [Cell(task, label, seed) for label in labels for task in tasks for seed in seeds]
    return 1 if driver.run(cells) else 0


def _report(arguments: argparse.Namespace) -> int:
    for file in write_report(arguments.out, arguments.docs):
        print(file)
    return 0


def _study(arguments: argparse.Namespace) -> int:
    print("\n".join(study_table(read_study(arguments.out))))
    return 0


def _chosen(listed: str | None, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Return the names of a list in order, or all without one.

    Raises: ConfigError for an unknown one.
    """
    if listed is None:
        return known
    names = tuple(listed.split(","))
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(f'--{what}: unknown "{unknown[0]}" (known: {", ".join(known)})')
    return names


if __name__ == "__main__":
    sys.exit(main())
