"""`ztune data`: list the known data sets, and check a local copy against the published one."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from ztune.cli.options import add
from ztune.cli.output import Output, Table, Ticker
from ztune.data.checking import CheckReport, check, published_counts, spec_to_json
from ztune.data.coop import SPLITS
from ztune.data.named import NAMED, Spec, find_spec
from ztune.errors import ConfigError, DataError
from ztune.printing import quoted
from ztune.types import Json

USAGE = ("list [--root DIR]", "check NAME --root DIR [options]")
EXAMPLE = """\
  ztune data list
  ztune data check caltech101 --root /data
  ztune data check dtd --root /data --prepare"""

_SHOWN = 5  # missing images listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("list", "check"), help="list all data sets, or check one")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the data set to check")
    add(parser, "--root", help="folder with one subfolder per data set")
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="write missing files that can be generated: the split, images from parquet files",
    )
    parser.add_argument("--skip-copies", action="store_true", help="do not compare image contents")


def run(arguments: argparse.Namespace, output: Output) -> None:
    if arguments.what == "list":
        if arguments.name is not None:
            raise ConfigError(
                f"ztune data list takes no name (ztune data check {quoted(arguments.name)})"
            )
        _list(arguments.root, output)
        return
    if arguments.name is None or arguments.root is None:
        raise ConfigError("ztune data check needs a NAME and --root DIR (names: ztune data list)")
    spec = find_spec(arguments.name)
    with contextlib.ExitStack() as stack:
        tickers: list[Ticker] = []

        def progress(done: int, total: int) -> None:
            if not tickers:  # the total is known only now
                tickers.append(stack.enter_context(output.activity("compare images", total)))
            tickers[0].update(done)

        found = check(spec, arguments.root, arguments.prepare, not arguments.skip_copies, progress)
    for warning in found.warnings:
        output.warn(warning)
    output.result(found.to_json(), _lines(found))
    if found.problems:
        raise DataError("; ".join(found.problems))


def _list(root: Path | None, output: Output) -> None:
    if root is not None and not root.is_dir():
        raise DataError(f'root "{root}" is not a folder')
    documents: list[Json] = []
    rows = []
    for spec in NAMED.values():
        document = spec_to_json(spec)
        counts = published_counts(spec)
        row = [
            spec.name, spec.folder, f"{spec.n_classes:,}",
            *(_shown(counts[role]) for role in SPLITS), spec.template,
        ]  # fmt: skip
        if root is not None:
            there = (root / spec.folder).is_dir()
            document["present"] = there
            row.append("yes" if there else "no")
        documents.append(document)
        rows.append(row)
    columns = ["data set", "folder", "classes", *SPLITS, "template"]
    columns += ["present"] if root is not None else []
    listing = Table("", columns, rows, words=("folder", "template"))
    closing = "check a local copy: ztune data check NAME --root DIR"
    output.result({"data": documents}, [listing, "", closing])


def _lines(found: CheckReport) -> list[str | Table]:
    spec, data = found.spec, found.data
    lines: list[str | Table] = [f"{spec.title}: {_where(found)}"]
    if found.present:
        lines.append(f"present: {', '.join(found.present)}")
    if found.absent:
        lines.append(f"missing: {', '.join(found.absent)}")
    if data is None:
        return lines if found.in_parquet else [*lines, *_to_get(spec)]
    number, counts = data.split.counts, published_counts(spec)
    rows = [(str(role), f"{number[role]:,}", _shown(counts[role])) for role in SPLITS]
    rows.append(("classes", f"{len(data.split.classes):,}", f"{spec.n_classes:,}"))
    lines += [f"split: {_split(found)}", "", Table("", ("images", "listed", "published"), rows)]
    if found.missing:
        lines += ["", f"missing images: {len(found.missing):,}", *found.missing[:_SHOWN]]
        lines += _to_get(spec)
    return [*lines, "", _copies(found), f"template: {spec.template}"]


def _to_get(spec: Spec) -> list[str]:
    lines = [f"to get it: {spec.page}", f"  {spec.obtain}"]
    if spec.splits:
        whose = "BlackVIP's README" if "mlai" in spec.splits[0] else "CoOp's DATASETS.md"
        lines.append(f"  the published split is {spec.splits[0]}, from {whose}")
    return lines


def _where(found: CheckReport) -> str:
    return f"no folder {found.spec.folder}" if found.folder is None else str(found.folder)


def _split(found: CheckReport) -> str:
    source = found.data.source if found.data else None
    if source is not None and found.folder is not None:
        return source.relative_to(found.folder).as_posix()
    if found.saved is not None:
        return f"generated, saved as {found.saved.name}"
    if found.spec.drawn:
        return "generated from the data set's files (--prepare saves it)"
    return "the data set's own"


def _copies(found: CheckReport) -> str:
    copies = found.copies
    if copies is None or copies.by_content is None:
        return "test images also in train or val: contents not compared"
    n = len(copies.by_path) + len(copies.by_content)
    return f"test images also in train or val, by path or content: {n:,}"


def _shown(n: int | None) -> str:
    return "?" if n is None else f"{n:,}"
