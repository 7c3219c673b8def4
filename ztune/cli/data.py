"""`ztune data`: list the known data sets, and check a local copy against the published one."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from ztune.cli.options import add
from ztune.cli.output import Output, Table, Ticker
from ztune.data.checking import CheckReport, Progress, check, published_counts, spec_to_json
from ztune.data.coop import SPLITS
from ztune.data.named import NAMED, find_spec
from ztune.data.sources import find_named, read_source
from ztune.errors import ConfigError, DataError
from ztune.printing import quoted
from ztune.types import Json

if TYPE_CHECKING:
    from ztune.data.folder_check import FolderReport

USAGE = ("list [--root DIR]", "check NAME --root DIR [options]", "check FOLDER [options]")
EXAMPLE = """\
  ztune data list
  ztune data check photos
  ztune data check caltech101 --root /data
  ztune data check dtd --root /data --prepare"""

_SHOWN = 5  # missing images listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("list", "check"), help="list all data sets, or check one")
    parser.add_argument("name", nargs="?", metavar="NAME|FOLDER", help="the data set to check")
    add(parser, "--root", help="folder with one subfolder per data set")
    add(parser, "--names", "--nested", "--max-pixels")
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
    if arguments.name is None:
        raise ConfigError("ztune data check needs a NAME and --root DIR, or a FOLDER")
    named, root = arguments.name, arguments.root
    spec = find_named(named, None) if root is None else find_spec(named)
    found: CheckReport | FolderReport
    with contextlib.ExitStack() as stack:
        tickers: list[Ticker] = []

        def progress(done: int, total: int) -> None:
            if not tickers:  # the total is known only now
                tickers.append(stack.enter_context(output.activity("compare images", total)))
            tickers[0].update(done)

        if spec is None:
            found = _check_folder(arguments, progress)
            lines = _counts(found)
        else:
            contents = not arguments.skip_copies
            found = check(spec, arguments.root, arguments.prepare, contents, progress)
            lines = _lines(found)
    for warning in found.warnings:
        output.warn(warning)
    output.result(found.to_json(), lines)
    if found.problems:
        raise DataError("; ".join(found.problems))


def _check_folder(arguments: argparse.Namespace, progress: Progress) -> FolderReport:
    from runtimes.preprocess import perceptual_hash, reason_broken
    from ztune.data.folder_check import check_listing

    if "prepare" in arguments.given or "skip_copies" in arguments.given:
        raise ConfigError("--prepare and --skip-copies apply only to a NAME (leave them out)")
    names, nested = arguments.names, arguments.nested
    listing = read_source(arguments.name, None, names, tuned=False, nested=nested)
    return check_listing(listing, reason_broken, perceptual_hash, progress)


def _counts(found: FolderReport) -> list[str | Table]:
    counts = found.counts
    splits = sorted({split for by_split in counts.values() for split in by_split})
    rows = [(name, *(f"{own.get(s, 0):,}" for s in splits)) for name, own in counts.items()]
    columns = ("class", *("images" if split == "none" else split for split in splits))
    return [Table(f"{found.listing.root}: {len(counts)} classes", columns, rows)]


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
    lines: list[str | Table] = [f"{spec.title}: {found.where}"]
    if found.present:
        lines.append(f"present: {', '.join(found.present)}")
    if found.absent:
        lines.append(f"missing: {', '.join(found.absent)}")
    if data is None:
        return lines if found.in_parquet else [*lines, *found.how_to_get]
    number, counts = data.split.counts, published_counts(spec)
    rows = [(str(role), f"{number[role]:,}", _shown(counts[role])) for role in SPLITS]
    rows.append(("classes", f"{len(data.split.classes):,}", f"{spec.n_classes:,}"))
    lines += [
        f"split: {found.split_origin}",
        "",
        Table("", ("images", "listed", "published"), rows),
    ]
    if found.missing:
        lines += ["", f"missing images: {len(found.missing):,}", *found.missing[:_SHOWN]]
        lines += found.how_to_get
    return [*lines, "", found.copies_found, f"template: {spec.template}"]


def _shown(n: int | None) -> str:
    return "?" if n is None else f"{n:,}"
