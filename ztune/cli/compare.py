"""`ztune compare`: cost and accuracy of methods on the same images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ztune.cli.options import add
from ztune.cli.output import Output, Table
from ztune.cli.run_settings import run_config_of, settings_from_words
from ztune.errors import ConfigError, ZtuneError
from ztune.methods.registry import find_method, method_names, usable_methods
from ztune.progress import warn
from ztune.types import Json

if TYPE_CHECKING:
    from ztune.experiments.compare import CompareConfig

USAGE = ("BUNDLE --data FOLDER|NAME --out FOLDER [options]",)
EXAMPLE = """\
  ztune compare models/mini --data examples/digits --methods zip,gda --seeds 1,2 --out runs/compare
  ztune compare bundles/vit-b-32 --data photos --methods all --shots 16 --queries 5000 \\
      --pixel-queries 1000 --seeds 1,2,3 --out runs/photos-compare"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="from ztune export")
    first = parser.add_argument_group("most needed")
    add(first, "--data", required=True)
    add(first, "--root")
    first.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        required=True,
        help="new folder, or comparison to resume",
    )
    first.add_argument(
        "--methods",
        default="all",
        metavar="NAMES",
        help=f"all (default), or of {', '.join(method_names())}",
    )
    first.add_argument("--seeds", default="1,2,3", metavar="N,N", help="default: 1,2,3")
    add(first, "--shots", type=int, default=16, help="training images per class (default: 16)")
    add(first, "--queries")
    first.add_argument(
        "--pixel-queries",
        type=int,
        metavar="N",
        help="budget of methods that encode images with every query (default: --queries)",
    )
    add(first, "--template", "--provider")
    data = parser.add_argument_group("data")
    add(data, "--names", "--nested", "--val", "--test-fraction", "--test-data", "--split-seed")
    add(data, "--skip-broken", "--skip-conflicts")
    method = parser.add_argument_group("method")
    add(method, "--preset")
    add(method, "--set", metavar="METHOD.KEY=VALUE", help="setting of one method")
    method.add_argument(
        "--snapshots",
        type=int,
        metavar="N",
        default=12,
        help="points per accuracy curve (default: 12)",
    )
    machine = parser.add_argument_group("machine")
    add(machine, "--threads", "--memory-limit", "--max-pixels", "--force")


def run(arguments: argparse.Namespace, output: Output) -> None:
    from ztune.experiments.compare import run_comparison
    from ztune.experiments.compare_report import COLUMNS, Report

    try:
        comparison = run_comparison(_config(arguments), arguments.out, arguments.command, output)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("resume with the same command") from None
    report = Report(comparison)
    report.write()
    lines: list[str | Table] = [
        Table(report.title, COLUMNS, [row.cells() for row in report.rows]),
        "",
        *report.failures(),
        *report.footnotes(),
        "",
        *report.needs(),
        "",
        f"{arguments.out / 'compare.md'}, compare.json, accuracy-queries.png, accuracy-seconds.png",
    ]
    output.result(report.to_json(), lines)
    if n := comparison.n_missing:
        n_cells = len(comparison.config.methods) * len(comparison.config.seeds)
        raise ZtuneError(
            f"{n} of {n_cells} cell(s) failed, see above (retry with the same command)"
        )


def _config(arguments: argparse.Namespace) -> CompareConfig:
    """Return the requested comparison, checked without opening any file."""
    from ztune.experiments.compare import CompareConfig

    if arguments.methods == "all":
        usable, failed = usable_methods()
        methods = tuple(usable)
        for error in failed.values():
            warn(str(error))
    else:
        methods = tuple(_listed(arguments.methods, "--methods"))
    seeds = []
    for word in _listed(arguments.seeds, "--seeds"):
        if not word.isdecimal():
            raise ConfigError(f'--seeds: invalid seed "{word}" (expected integers such as 1,2,3)')
        seeds.append(int(word))
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {arguments.seeds} has a duplicate seed")
    base = run_config_of(arguments, {})
    pixel_queries = base.queries if arguments.pixel_queries is None else arguments.pixel_queries
    settings = _settings(arguments.settings or ())
    config = CompareConfig(base, methods, tuple(seeds), pixel_queries, settings)
    config.check()
    return config


def _listed(text: str, option: str) -> list[str]:
    """Return the values of a comma-separated list.

    Raises: ConfigError for an empty list or value, or a duplicate.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f'{option} is "{text}", expected a list such as a,b,c')
    twice = sorted({word for word in words if words.count(word) > 1})
    if twice:
        raise ConfigError(f"{option}: duplicate {twice[0]}")
    return words


def _settings(words: Sequence[str]) -> dict[str, dict[str, Json]]:
    """Return {method: {key: text}} of words `method.key=value`."""
    settings: dict[str, dict[str, Json]] = {}
    for word in words:
        name, dot, setting = word.partition(".")
        if not dot or "=" in name:
            raise ConfigError(f'--set is "{word}", expected METHOD.KEY=VALUE')
        settings.setdefault(find_method(name).name, {}).update(settings_from_words([setting]))
    return settings
