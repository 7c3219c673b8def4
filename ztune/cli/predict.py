"""`ztune predict`: classify images with a classifier.onnx alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ztune.cli.options import add
from ztune.cli.output import Output, Table
from ztune.errors import ConfigError, DataError
from ztune.printing import first_few
from ztune.types import Json

USAGE = ("classifier.onnx IMAGE|FOLDER ... [options]",)
EXAMPLE = """\
  ztune predict classifier.onnx photo.jpg
  ztune predict classifier.onnx folder --top 1 --json"""

_BATCH = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("classifier", type=Path, metavar="classifier.onnx", help="from ztune pack")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE|FOLDER", help="to classify")
    parser.add_argument(
        "--top", type=int, default=3, metavar="N", help="classes per image (default: 3)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    add(parser, "--skip-broken", "--max-pixels", "--provider", "--threads")


def run(arguments: argparse.Namespace, output: Output) -> None:
    from runtimes.classifier import classify, open_classifier
    from runtimes.conversions import count_conversions
    from runtimes.providers import resolve_execution

    for name in ("top", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}, expected at least 1")
    classifier = open_classifier(
        arguments.classifier, resolve_execution(arguments.provider, arguments.threads, output)
    )
    found, ignored = _images(arguments.images)
    paths = found[: arguments.limit]
    if ignored:
        output.remark(f"files ignored, not images: {len(ignored)} ({first_few(ignored)})")
    logits, probabilities, kept = classify(classifier, paths, arguments.skip_broken, output)
    predictions: list[Json] = []
    rows = []
    shown = [path for path, keep in zip(paths, kept, strict=True) if keep]
    # Ranked by logits: probabilities near 0 and 1 round to the same number.
    for path, order, row in zip(
        shown, np.argsort(-logits, axis=1, kind="stable"), probabilities, strict=True
    ):
        best = order[: arguments.top]
        top = [(classifier.classes[c], float(row[c])) for c in best]
        ranked: list[Json] = [{"class": name, "probability": p} for name, p in top]
        predictions.append({"image": str(path), "class": top[0][0], "top": ranked})
        rows.append((str(path), *(f"{name} {p:.1%}" for name, p in top)))
    document: dict[str, Json] = {
        "classifier": str(arguments.classifier),
        "broken_images": int((~kept).sum()),
        "conversions": dict(count_conversions(shown)),
        "left_out": {
            "ignored": [*ignored],
            "broken": [str(path) for path, keep in zip(paths, kept, strict=True) if not keep],
        },
        "predictions": predictions,
    }
    n_shown = min(arguments.top, len(classifier.classes))
    columns = ("image", *(f"{n + 1}." for n in range(n_shown)))
    output.result(document, [Table("", columns, rows)])


def _images(named: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Return the given images and all images below the given folders, and the folders' other files.

    Raises: DataError for a path that does not exist, a name that is not UTF-8, or a folder without
        images.
    """
    from ztune.data.image_files import images_below
    from ztune.data.manifests import is_utf8

    found: list[Path] = []
    ignored: list[str] = []
    for path in named:
        if not is_utf8(str(path)):
            raise DataError(f"image {str(path)!r}: the name is not UTF-8 (rename it)")
        if path.is_dir():
            below, others = images_below(path, f'folder "{path}"')
            ignored += map(str, others)
            if not below:
                files = f": its files are {first_few([*map(str, others)])}" if others else ""
                raise DataError(f'folder "{path}" contains no images{files}')
            found += below
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f'image "{path}" does not exist')
    return found, ignored
