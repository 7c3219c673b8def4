"""`ztune compare`: every method on the same pictures, with what each costs and gives."""

from __future__ import annotations

import argparse
import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ztune.cli.asked import Asked
from ztune.cli.options import (
    add_execution_arguments,
    add_root_argument,
    settings_from_words,
)
from ztune.cli.output import Output, Table
from ztune.errors import ConfigError, DataError, ZtuneError
from ztune.methods import METHODS, PRESETS, find_method
from ztune.run_config import RunConfig, place_of, remarks_on
from ztune.types import Json

if TYPE_CHECKING:
    from ztune.data.split import Split
    from ztune.experiments.comparing import Folder

EXAMPLE = """\
  ztune compare models/mini --data examples/digits --methods zip,gda --seeds 1,2 --out runs/compare
  ztune compare bundles/vit-b-32 --data photos --methods all --shots 16 --queries 5000 \\
      --pixel-queries 1000 --seeds 1,2,3 --out runs/photos-compare"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--data",
        metavar="FOLDER|NAME",
        required=True,
        help="folder, .csv/.jsonl list, or name with --root",
    )
    add_root_argument(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", required=True, help="new, or one to go on with"
    )
    parser.add_argument(
        "--methods",
        default="all",
        metavar="NAMES",
        help=f"all (default), or of {', '.join(METHODS)}",
    )
    parser.add_argument("--seeds", default="1,2,3", metavar="N,N", help="default: 1,2,3")
    parser.add_argument("--shots", type=int, metavar="N", help="pictures per class (default: 16)")
    parser.add_argument("--queries", type=int, metavar="N", help="of every method (default: 5000)")
    parser.add_argument(
        "--pixel-queries",
        type=int,
        metavar="N",
        help="of methods that encode pictures anew with every query (default: as --queries)",
    )
    parser.add_argument("--preset", help=f"{' or '.join(PRESETS)}")
    parser.add_argument(
        "--set", action="append", metavar="METHOD.KEY=VALUE", help="one method's setting"
    )
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        dest="templates",
        help='hand-written prompt, several are averaged (default: "a photo of a {}.")',
    )
    parser.add_argument(
        "--snapshots", type=int, metavar="N", default=12, help="points of a curve (default: 12)"
    )
    parser.add_argument(
        "--val", type=int, metavar="N", help="validation pictures a class (default: min(shots, 4))"
    )
    parser.add_argument("--test-fraction", metavar="X", help="kept for testing (default: auto)")
    parser.add_argument("--split-seed", type=int, metavar="N", help="default: 0")
    parser.add_argument("--test-data", type=Path, metavar="FOLDER", help="test pictures elsewhere")
    parser.add_argument("--names", type=Path, metavar="FILE", help="lines of folder<TAB>name")
    parser.add_argument(
        "--skip-broken", action="store_true", default=None, help="leave broken pictures out"
    )
    parser.add_argument(
        "--force", action="store_true", default=None, help="tune below the signal-to-noise limit"
    )
    add_execution_arguments(parser, default=None)
    parser.add_argument(
        "--memory-limit", type=int, metavar="MB", help="of the tuning's forward passes"
    )


# Options that every cell's run has alike.
_COMMON = (
    "bundle", "data", "shots", "queries", "preset", "templates", "snapshots", "val",
    "test_fraction", "split_seed", "test_data", "names", "skip_broken", "force", "provider",
    "threads", "memory_limit", "root",
)  # fmt: skip


def run(arguments: argparse.Namespace, output: Output) -> None:
    from ztune.cli.course import Course
    from ztune.experiments.comparing import Folder, write_results
    from ztune.model import open_model, resolve_execution

    asked = _asked(arguments)
    base = asked.base
    execution = resolve_execution(base.provider, base.threads, output, base.memory_limit)
    asked = replace(asked, base=replace(base, provider=execution.provider))
    model = open_model(Path(base.bundle), execution, output)
    split, pictures = _task(asked)
    for remark in (*remarks_on(base), *split.notes):
        output.remark(remark)
    run_config = asked.to_json(model.bundle.digest, pictures)
    folder = Folder.open(arguments.out, run_config, _counts(split))
    with folder.locked():
        try:
            Course(asked, model, split, folder, output).run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("go on with the same command") from None
        document = write_results(folder, _command(arguments))
    output.result(document, _lines(folder))
    wanted = {(m, s) for m in asked.methods for s in asked.seeds}
    failed = [c for c in folder.cells if c.figures is None and (c.method, c.seed) in wanted]
    n_busy = len(wanted - {(c.method, c.seed) for c in folder.cells})
    if failed or n_busy:
        busy = f"{n_busy} of {len(wanted)} cell(s) are being worked on by another process"
        lacking = [f"{len(failed)} of {len(wanted)} cell(s) failed, see above"] if failed else []
        lacking += [busy] if n_busy else []
        raise ZtuneError(f"{'; '.join(lacking)}; the same command tries them again")


def _lines(folder: Folder) -> list[str | Table]:
    """Return what a person reads of a comparison."""
    from ztune.experiments.comparing import (
        access_sentences,
        failures,
        footnotes,
        table_rows,
        title,
    )
    from ztune.experiments.comparison import COLUMNS

    return [
        Table(title(folder), COLUMNS, table_rows(folder)),
        "",
        *failures(folder),
        *footnotes(folder),
        "",
        *access_sentences(folder),
        "",
        f"{folder.path / 'compare.md'}, compare.json, accuracy-queries.png, accuracy-seconds.png",
    ]


def _asked(arguments: argparse.Namespace) -> Asked:
    """Return the request, checked as far as it can be without opening anything."""
    values: dict[str, Any] = {}
    for name in _COMMON:
        value = getattr(arguments, name)
        if value is not None:
            values[name] = str(value.resolve()) if isinstance(value, Path) else value
    values["data"] = place_of(arguments.data, arguments.root)
    values["templates"] = tuple(values.get("templates", RunConfig.templates))
    base = RunConfig(**values)
    base.split_settings()
    methods = tuple(METHODS)
    if arguments.methods != "all":
        methods = tuple(_listed(arguments.methods, "--methods"))
    seeds = []
    for word in _listed(arguments.seeds, "--seeds"):
        if not word.isdecimal():
            raise ConfigError(f'--seeds has "{word}", expected whole numbers such as 1,2,3')
        seeds.append(int(word))
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {arguments.seeds} names a seed twice")
    pixel_queries = base.queries if arguments.pixel_queries is None else arguments.pixel_queries
    if pixel_queries < 1:
        raise ConfigError(f"--pixel-queries is {pixel_queries}, expected at least 1")
    asked = Asked(base, methods, tuple(seeds), pixel_queries, _settings(arguments.set or []))
    for method in (*methods, *asked.settings):
        asked.run_config(method, seeds[0])  # a wrong name or value is told before anything starts
    idle = [name for name in asked.settings if name not in methods]
    if idle:
        raise ConfigError(f"--set {idle[0]}.… is for a method that --methods leaves out")
    return asked


def _listed(text: str, option: str) -> list[str]:
    """Return the words between commas, in order.

    Raises: ConfigError for an empty list or word, or the same word twice.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f'{option} is "{text}", expected a list such as a,b,c')
    twice = sorted({word for word in words if words.count(word) > 1})
    if twice:
        raise ConfigError(f"{option} names {twice[0]} twice")
    return words


def _settings(words: Sequence[str]) -> dict[str, dict[str, Json]]:
    """Return {method: {key: text}} of words `method.key=value`."""
    settings: dict[str, dict[str, Json]] = {}
    for word in words:
        name, dot, setting = word.partition(".")
        if not dot or "=" in name:
            raise ConfigError(f'--set takes METHOD.KEY=VALUE here, got "{word}"')
        settings.setdefault(find_method(name).name, {}).update(settings_from_words([setting]))
    return settings


def _task(asked: Asked) -> tuple[Split, str]:
    """Return the first seed's split, and a digest of all pictures that there are.

    Raises: DataError when no pictures are kept for testing.
    """
    from ztune.data.splitter import digest_pictures
    from ztune.training import read_split

    dataset, split = read_split(asked.run_config(asked.methods[0], asked.seeds[0]))
    test = split.entries_of("test")
    if not test:
        raise DataError(
            f'data "{asked.base.data}" leaves no pictures to test on (use more pictures, fewer '
            "--shots, --test-fraction or --test-data)"
        )
    names = [dataset.classes[picture.label] for picture in dataset.pictures]
    digests = digest_pictures(dataset)
    seen = [f"{name} {digest}" for name, digest in zip(names, digests, strict=True)]
    seen += [f"test {split.classes[entry.label]} {entry.sha256}" for entry in test]
    return split, hashlib.sha256("\n".join(seen).encode()).hexdigest()


def _counts(split: Split) -> dict[str, Json]:
    from ztune.data.split import ROLES

    counts: dict[str, Json] = {role: len(split.entries_of(role)) for role in ROLES}
    return {"classes": len(split.classes), **counts}


def _command(arguments: argparse.Namespace) -> str:
    """Return what was typed, options in the order of the help."""
    words = ["ztune", "compare", str(arguments.bundle)]
    for name, value in vars(arguments).items():
        option = f"--{name.replace('_', '-').replace('templates', 'template')}"
        if name in ("bundle", "verb", "run", "json", "quiet", "debug") or value is None:
            continue
        if value is True:
            words.append(option)
        for one in value if isinstance(value, list) else [] if value is True else [value]:
            words += [option, str(one)]
    return shlex.join(words)
