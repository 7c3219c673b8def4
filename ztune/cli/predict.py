"""`ztune predict`: classify images with a classifier.onnx alone."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ztune.cli.options import add
from ztune.cli.output import Output, Table
from ztune.errors import ConfigError
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
    from ztune.data.image_files import named_images

    for name in ("top", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}, expected at least 1")
    classifier = open_classifier(
        arguments.classifier, resolve_execution(arguments.provider, arguments.threads, output)
    )
    found, ignored = named_images(arguments.images)
    paths = found[: arguments.limit]
    if ignored:
        output.remark(f"files ignored, not images: {len(ignored)} ({first_few(ignored)})")
    outputs, kept = classify(classifier, paths, arguments.skip_broken, output)
    predictions: list[Json] = []
    rows = []
    shown = [path for path, keep in zip(paths, kept, strict=True) if keep]
    # Ranked by logits: probabilities near 0 and 1 round to the same number.
    orders = np.argsort(-outputs.logits, axis=1, kind="stable")
    for n, (path, order) in enumerate(zip(shown, orders, strict=True)):
        best = order[: arguments.top]
        top = [(classifier.classes[c], float(outputs.probabilities[n, c])) for c in best]
        ranked: list[Json] = [{"class": name, "probability": p} for name, p in top]
        named = None if outputs.unknown[n] else top[0][0]
        prediction: dict[str, Json] = {"image": str(path), "class": named, "top": ranked}
        shown_class: tuple[str, ...] = ()
        if outputs.inlier_scores is not None:
            prediction["inlier_score"] = float(outputs.inlier_scores[n])
            shown_class = (named or "unknown",)
        predictions.append(prediction)
        rows.append((str(path), *shown_class, *(f"{name} {p:.1%}" for name, p in top)))
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
    told = () if classifier.reject is None else ("class",)
    columns = ("image", *told, *(f"{n + 1}." for n in range(n_shown)))
    output.result(document, [Table("", columns, rows)])
