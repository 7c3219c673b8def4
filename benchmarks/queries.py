"""How many queries each method needs to get where ZIP is after 5,000.

    python -m benchmarks.queries run BUNDLE --pictures FOLDER --out OUT
    python -m benchmarks.queries report OUT --docs docs/results/queries

`run` carries out what OUT still lacks, label by label and task by task. It may be stopped and begun
again, and several processes may work on one OUT. `report` makes tables and plots of what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import ROOT, commit
from benchmarks.query_cells import LABELS, SEEDS, Cell
from benchmarks.query_course import Course
from benchmarks.query_report import write_report
from benchmarks.query_tasks import TASKS
from ztune.cli.output import fail
from ztune.errors import ConfigError, ZtuneError
from ztune.methods import find_method


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="carry out cells")
    run.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="for all but digits")
    run.add_argument("--pictures", type=Path, metavar="DIR", help="folder of the picture sets")
    run.add_argument("--out", type=Path, required=True, metavar="OUT")
    run.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        default=ROOT / ".cache" / "benchmarks" / "pictures",
        help="folder of derived picture sets, which are written once",
    )
    run.add_argument("--tasks", help=f"of {', '.join(TASKS)}")
    run.add_argument("--labels", help=f"of {', '.join(LABELS)}")
    run.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    report = verbs.add_parser("report", help="make tables and plots")
    report.add_argument("out", type=Path, metavar="OUT")
    report.add_argument("--docs", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args(words)
    try:
        return _run(arguments) if arguments.verb == "run" else _report(arguments)
    except ZtuneError as error:
        fail(str(error))
        return 1


def _run(arguments: argparse.Namespace) -> int:
    tasks = _chosen(arguments.tasks, tuple(TASKS), "tasks")
    labels = _chosen(arguments.labels, tuple(LABELS), "labels")
    seeds = [int(word) for word in arguments.seeds.split(",")]
    for label in labels:
        find_method(LABELS[label].method)  # one that there is not is told at once
    course = Course(arguments.out, arguments.work, arguments.pictures, arguments.bundle, commit())
    cells = [Cell(task, label, seed) for label in labels for task in tasks for seed in seeds]
    return 1 if course.run(cells) else 0


def _report(arguments: argparse.Namespace) -> int:
    for file in write_report(arguments.out, arguments.docs):
        print(file)
    return 0


def _chosen(listed: str | None, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    """Return the names of a list, all where there is none, in the order given.

    Raises: ConfigError for one that is not known.
    """
    if listed is None:
        return known
    names = tuple(listed.split(","))
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(f'--{what} has "{unknown[0]}"; known: {", ".join(known)}')
    return names


if __name__ == "__main__":
    sys.exit(main())
